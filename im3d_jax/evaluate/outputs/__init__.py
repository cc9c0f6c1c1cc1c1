"""The outputs of any method as rows: one for each prompt or object, found by convention or by a YAML file.

layouts     what a method's files are: their kind, a pattern for their paths, cameras, axes
presets     the layouts that known methods write by default, by name
patterns    files by patterns such as "{name}/{view}.png"
finding     rows of a method, and what is left out of it by which rule
assets      rows of what `im3d generate` and `im3d batch` write
reading     rows to views [K,H,W,C]
"""

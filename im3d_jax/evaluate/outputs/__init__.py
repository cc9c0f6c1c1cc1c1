"""The outputs of any method as rows: one for each prompt or object, found by convention or by a YAML file.

layouts     what a method's files are: their kind, a pattern for their paths, cameras, axes
presets     the layouts that known methods write by default, by name
names       what outputs are called, and what joins those of several methods
patterns    files by patterns such as "{name}/{view}.png"
finding     rows of a method, and what is left out of it by which rule
assets      rows of what `im3d generate` and `im3d batch` write
pictures    rows of pictures to views [K,H,W,C], without torch
reading     rows of any kind to views
"""

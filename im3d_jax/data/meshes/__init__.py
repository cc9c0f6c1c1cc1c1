"""Mesh files of artists, read to triangles with colours, and what of each file is left out.

`reading.load_mesh` reads a file of any format, `parts` says what it reads it to. `gltf` (with `accessors`,
`compression` and `gltf_materials`), `obj` (with `mtl`), `ply` and `stl` are the readers.
"""

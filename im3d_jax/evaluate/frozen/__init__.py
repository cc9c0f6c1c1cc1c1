"""True views of meshes: rendered once, and frozen by a manifest, so that numbers of years apart compare.

`protocols` says where the cameras stand, `freezing` renders, `manifest` says what there is and whether it is
still what was frozen. `im3d evaluate truth` makes them, `im3d evaluate views3d` measures against them.
"""

MANIFEST = "truth.json"
OBJECTS = "objects"
INPUTS = "inputs"

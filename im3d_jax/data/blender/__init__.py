"""Renders meshes with Blender, whose Python module `bpy` is imported when the first mesh is rendered."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

SUFFIXES = (
    *(".glb", ".gltf", ".obj", ".ply", ".stl"),
    *(".fbx", ".usd", ".usda", ".usdc", ".usdz", ".dae", ".blend"),
)
"""Of the files that Blender reads here."""


class Engine(StrEnum):
    """What traces or draws in Blender.

    CYCLES: a path tracer, on a GPU if Blender finds one that it can use, or else on the CPU.
    EEVEE: a rasterizer, which needs a GPU with OpenGL. Without one, Mesa's software takes minutes for a view.
    """

    CYCLES = "cycles"
    EEVEE = "eevee"


class Look(NamedTuple):
    """How Blender renders.

    Attributes:
        samples: paths for each pixel.
        environment: an .hdr or .exr panorama (equirectangular, +Z up) that lights the objects instead of the
            default light.
    """

    engine: Engine = Engine.CYCLES
    samples: int = 64
    environment: Path | None = None

"""Reads mesh files with Blender's importers, as meshes and the places where the file shows them.

What the file has of modifiers, armatures and instances is evaluated, so that plain meshes are left. Cameras,
lights and worlds of the file are left out, because all objects of a data set are to be lit alike.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
from jaxtyping import Float

from im3d_jax.data.blender.process import last_line
from im3d_jax.data.meshes.parts import CREASE_DEG, check_triangles, grey
from im3d_jax.data.meshes.reading import MAX_FILE_BYTES, UpAxis
from im3d_jax.data.meshes.stl import read_stl
from recon_torch.errors import UserError, first_line

Y_UP = np.array([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]])
"""Takes +Y to +Z, and the front, +Z, to +X, where view 0 is."""

BLENDER_FRONT = np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
"""Takes Blender's front, -Y, to +X; Z stays. On what was imported of a file with +Y up it acts as `Y_UP`."""

SURFACES = ("MESH", "CURVE", "SURFACE", "FONT")
"""Types of objects that are turned into meshes."""

NOT_SHOWN = {
    "LIGHT": "lights",
    "LIGHT_PROBE": "light probes",
    "META": "metaballs",
    "VOLUME": "volumes",
    "CURVES": "hair",
    "POINTCLOUD": "points",
    "GREASEPENCIL": "grease pencil",
}
"""Type of an object -> its name in `left_out`."""


class Placed(NamedTuple):
    """A mesh of Blender in a place. Several may share one mesh.

    Attributes:
        matrix: from the mesh to the world, where +Z is up and the front looks along +X.
        materials: one for each of the mesh's slots, which may be None.
    """

    mesh: Any
    matrix: Float[np.ndarray, "4 4"]
    materials: tuple[Any, ...]


class Imported(NamedTuple):
    """What was read of a file. left_out: what it asks for and is not shown, sorted."""

    placed: list[Placed]
    left_out: tuple[str, ...]


def read(bpy: Any, path: Path, up: UpAxis, log: TextIO) -> Imported:
    """Reads a file into an empty scene, which is empty again when this returns, but for meshes and materials.

    Args:
        up: of files whose format does not say it: .glb, .gltf, .obj, .ply and .stl.
        log: takes Blender's output, for errors.

    Raises UserError, with the path, if it cannot be read or has no surface.
    """
    if not path.is_file():
        raise UserError(f"no mesh at {path}; check the path")
    if not 0 < (size := path.stat().st_size) <= MAX_FILE_BYTES:
        raise UserError(f"cannot read {path}: it has {size:,} bytes; from 1 to {MAX_FILE_BYTES:,} are read")
    if not os.access(path, os.R_OK):
        raise UserError(f"cannot read {path} (Permission denied); check its permissions")
    suffix = path.suffix.lower()
    try:
        left_out = IMPORTERS[suffix](bpy, str(path))
    except UserError as error:
        raise UserError(f"cannot read {path}: {error}") from error
    except Exception as error:  # a broken file may break its importer anywhere
        raise UserError(f"Blender cannot read {path} ({_why(error, log)}); export it again") from error
    turn = _turn(suffix, up)
    left_out |= _not_shown(bpy)
    placed = [each._replace(matrix=turn @ each.matrix) for each in _placed(bpy, suffix, left_out)]
    if not placed:
        why = f"; it has only {' and '.join(sorted(left_out))}" if left_out else f" ({last_line(log)})"
        raise UserError(f"Blender finds no surface in {path}{why}; nothing of it can be rendered")
    left_out |= _missing_textures(bpy)
    for each in list(bpy.data.objects):
        bpy.data.objects.remove(each)
    return Imported(placed, tuple(sorted(left_out)))


def _why(error: Exception, log: TextIO) -> str:
    """One line about an error of an importer, whose own report is better than the traceback of its add-on."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    if lines and "Traceback" in str(error):
        return lines[-1].strip()[:200]
    return first_line(error, 200).removeprefix("Error: ") if lines else last_line(log)


# ---- Formats ----


def _read_gltf(bpy: Any, path: str) -> set[str]:
    # The shapes of bones would be objects of their own.
    bpy.ops.import_scene.gltf(filepath=path, disable_bone_shape=True, import_webp_texture=True)
    return {f"extension {name}" for name in _extensions(Path(path)) - _gltf_extensions()}


def _extensions(path: Path) -> set[str]:
    """The extensions that a glTF file uses."""
    content = path.read_bytes()
    if content[:4] == b"glTF":
        (length,) = struct.unpack_from("<I", content, 12)
        content = content[20 : 20 + length]
    return set(json.loads(content).get("extensionsUsed", ()))


def _gltf_extensions() -> set[str]:
    """The extensions that Blender's importer honours."""
    from io_scene_gltf2.io.imp.gltf2_io_gltf import glTFImporter

    return set(glTFImporter("", {"import_user_extensions": []}).extensions_managed)


def _read_obj(bpy: Any, path: str) -> set[str]:
    bpy.ops.wm.obj_import(filepath=path, forward_axis="Y", up_axis="Z")
    return set()


def _read_ply(bpy: Any, path: str) -> set[str]:
    bpy.ops.wm.ply_import(filepath=path, forward_axis="Y", up_axis="Z")
    return set()


def _read_stl(bpy: Any, path: str) -> set[str]:
    bpy.ops.wm.stl_import(filepath=path, forward_axis="Y", up_axis="Z")
    colors = [part.colors for part in read_stl(Path(path)).parts]
    return {"face colours"} if any((each != grey(len(each))).any() for each in colors) else set()


def _read_fbx(bpy: Any, path: str) -> set[str]:
    bpy.ops.wm.fbx_import(filepath=path, use_anim=False)
    return set()


def _read_usd(bpy: Any, path: str) -> set[str]:
    bpy.ops.wm.usd_import(
        filepath=path, set_frame_range=False, import_subdiv=True, create_world_material=False
    )
    return set()


def _read_dae(bpy: Any, path: str) -> set[str]:
    bpy.ops.wm.collada_import(filepath=path, fix_orientation=True)
    return set()


def _read_blend(bpy: Any, path: str) -> set[str]:
    """Takes the objects of the scene that has most of them. No script of the file is run, nor its drivers.

    The scene itself is not used, whose settings might ask for scripted shaders or other cameras.
    """
    with bpy.data.libraries.load(path, link=False) as (content, wanted):
        names = wanted.scenes = list(content.scenes)
    if not names:
        raise UserError("it has no scene; save it from Blender with one")
    ours = bpy.context.scene
    scene = max((each for each in bpy.data.scenes if each != ours), key=lambda each: len(each.objects))
    hidden = {each.name for each in scene.objects if _is_excluded(scene, each)}
    for each in scene.objects:
        if each.name not in hidden:
            ours.collection.objects.link(each)
    return {"other scenes"} if len(names) > 1 else set()


def _is_excluded(scene: Any, candidate: Any) -> bool:
    """Whether an object lies only in collections that a scene does not render."""
    layer = scene.view_layers[0].layer_collection

    def shown(collection: Any) -> Iterator[Any]:
        if not (collection.exclude or collection.collection.hide_render):
            yield collection.collection
            for each in collection.children:
                yield from shown(each)

    return not any(candidate.name in each.objects for each in shown(layer))


IMPORTERS: dict[str, Callable[[Any, str], set[str]]] = {
    ".glb": _read_gltf,
    ".gltf": _read_gltf,
    ".obj": _read_obj,
    ".ply": _read_ply,
    ".stl": _read_stl,
    ".fbx": _read_fbx,
    **dict.fromkeys((".usd", ".usda", ".usdc", ".usdz"), _read_usd),
    ".dae": _read_dae,
    ".blend": _read_blend,
}
"""Suffix -> what reads such a file into the scene, and returns what of it is left out."""


def _turn(suffix: str, up: UpAxis) -> Float[np.ndarray, "4 4"]:
    """From the importer's axes to +Z up and the front at +X."""
    turn = np.eye(4)
    if suffix in (".obj", ".ply", ".stl"):
        turn[:3, :3] = Y_UP if up == UpAxis.Y else np.eye(3)
    elif suffix in (".glb", ".gltf") and up == UpAxis.Z:
        turn[:3, :3] = Y_UP.T @ BLENDER_FRONT  # undoes what the importer has turned
    else:
        turn[:3, :3] = BLENDER_FRONT
    return turn


# ---- Objects ----


def _placed(bpy: Any, suffix: str, left_out: set[str]) -> list[Placed]:
    """All surfaces of the scene that are rendered, evaluated."""
    graph, meshes, placed, count = bpy.context.evaluated_depsgraph_get(), {}, [], 0
    for instance in graph.object_instances:
        shown = instance.object
        if shown.type not in SURFACES or shown.original.hide_render or not instance.show_self:
            continue
        key = (shown.data.session_uid, shown.name) if shown.data else (0, shown.name)
        if key not in meshes:
            meshes[key] = bpy.data.meshes.new_from_object(
                shown, preserve_all_data_layers=True, depsgraph=graph
            )
        mesh = meshes[key]
        if not mesh.polygons:
            left_out.add("lines" if mesh.edges else "points")
            continue
        if suffix == ".obj" and mesh.color_attributes and any(mesh.materials):
            left_out.add("vertex colours beside a material")
        count += len(mesh.loops) - 2 * len(mesh.polygons)
        check_triangles(count, "the file")
        materials = tuple(slot.material and slot.material.original for slot in shown.material_slots)
        placed.append(Placed(mesh, np.array(instance.matrix_world, np.float64), materials))
    if suffix in (".obj", ".ply", ".stl"):
        for mesh in meshes.values():
            _smooth(mesh)
    return placed


def _smooth(mesh: Any) -> None:
    """Shades a mesh whose file has no normals as the ray caster does: smooth, but for sharp edges."""
    if not mesh.has_custom_normals:
        mesh.shade_smooth()
        mesh.set_sharp_from_angle(angle=np.deg2rad(CREASE_DEG))


def _not_shown(bpy: Any) -> set[str]:
    found = {NOT_SHOWN[each.type] for each in bpy.context.scene.objects if each.type in NOT_SHOWN}
    if bpy.data.actions:
        found.add("animation")
    if any(each.particle_systems for each in bpy.context.scene.objects):
        found.add("particles")
    if any(_has_script(each) for each in (*bpy.data.objects, *bpy.data.materials, *bpy.data.shape_keys)):
        found.add("scripted drivers")
    return found


def _has_script(owner: Any) -> bool:
    """Whether a property of something is computed by an expression that only Python could evaluate."""
    parts = (owner, getattr(owner, "node_tree", None), getattr(owner, "data", None))
    animated = [data for each in parts if (data := getattr(each, "animation_data", None)) is not None]
    drivers = [curve.driver for data in animated for curve in data.drivers]
    return any(each.type == "SCRIPTED" and not each.is_simple_expression for each in drivers)


def _missing_textures(bpy: Any) -> set[str]:
    """Pictures that materials name and that are not there, or cannot be read."""
    found = set()
    for image in bpy.data.images:
        if image.source != "FILE" or not image.users:
            continue
        name = os.path.basename(image.filepath.replace("\\", "/")) or image.name
        if not image.packed_file and not os.path.isfile(bpy.path.abspath(image.filepath)):
            found.add(f"missing texture: {name[:200]}")
        elif not image.size[0]:
            found.add(f"unreadable texture: {name[:200]}")
    return found

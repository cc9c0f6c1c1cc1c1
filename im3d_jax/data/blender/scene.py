"""A scene of Blender: meshes fitted into the ball of radius 0.5, their materials, light and cameras."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from im3d_jax.data.augmentation import Variant, yaw
from im3d_jax.data.blender import Engine, Look
from im3d_jax.data.blender.importing import Placed
from im3d_jax.data.meshes.colors import linear_from_srgb
from im3d_jax.data.meshes.parts import GREY
from im3d_jax.data.procedural import LIGHT
from recon_torch.errors import UserError
from recon_torch.views.cameras import Cameras

WORLD = 0.5
"""The radiance that comes from everywhere by default, of which a matt surface shows its albedo's share."""

SUN = 0.5
"""So much of its albedo a matt surface shows besides where it faces the sun, whose irradiance is pi * SUN."""

SUN_ANGLE_DEG = 5.0  # its diameter, which softens the edges of shadows
MAX_LAYERS = 64  # see-through surfaces that a path passes through, as in the ray caster
GPUS = ("OPTIX", "CUDA", "HIP", "METAL", "ONEAPI")
SENSOR_MM = 36.0


def _matrix(rows: Float[np.ndarray, "4 4"]) -> Any:
    """A matrix as Blender's properties take it; they would take nested lists for columns."""
    from mathutils import Matrix

    return Matrix(rows.tolist())


# ---- Meshes ----


def points_of(placed: Sequence[Placed]) -> Float[np.ndarray, "N 3"]:
    """The corners of all polygons in the world. Points that no polygon uses are not seen and do not count."""
    found, known = [], {}
    for mesh, matrix, _ in placed:
        if mesh.name not in known:
            corners, used = np.empty(3 * len(mesh.vertices), np.float32), np.empty(len(mesh.loops), np.int32)
            mesh.vertices.foreach_get("co", corners)
            mesh.loops.foreach_get("vertex_index", used)
            known[mesh.name] = corners.reshape(-1, 3)[np.unique(used)].astype(np.float64)
        found.append(known[mesh.name] @ matrix[:3, :3].T + matrix[:3, 3])
    return np.concatenate(found)


def fit(points: Float[np.ndarray, "N 3"], variant: Variant | None) -> Float[np.ndarray, "4 4"]:
    """What takes points into the ball of radius 0.5, with the centre of their bounding box at the origin.

    variant: stretches and turns them in the ball, and fits them again, as `augmentation.reshape` does.

    Raises UserError if the points have no extent.
    """
    matrix = _into_ball(points)
    if variant is not None:
        reshaped = np.eye(4)
        reshaped[:3, :3] = yaw(variant.yaw_rad) @ np.diag(variant.scale)
        matrix = reshaped @ matrix
        matrix = _into_ball(points @ matrix[:3, :3].T + matrix[:3, 3]) @ matrix
    return matrix


def _into_ball(points: Float[np.ndarray, "N 3"]) -> Float[np.ndarray, "4 4"]:
    if not np.isfinite(points).all():
        raise UserError("it has positions that are not finite; export it again")
    centre = (points.min(0) + points.max(0)) / 2
    radius = np.linalg.norm(points - centre, axis=-1).max()
    if not radius > 0:
        raise UserError("all its corners lie in one point; nothing of it can be rendered")
    matrix = np.eye(4) * (0.5 / radius)
    matrix[:3, 3] = -centre * (0.5 / radius)
    matrix[3, 3] = 1
    return matrix


def place(bpy: Any, placed: Sequence[Placed], fitted: Float[np.ndarray, "4 4"]) -> None:
    """Puts meshes into the scene."""
    plain: dict[str, Any] = {}
    root = bpy.data.objects.new("fitted", None)
    bpy.context.scene.collection.objects.link(root)
    for mesh, matrix, materials in placed:
        shown = bpy.data.objects.new(mesh.name, mesh)
        bpy.context.scene.collection.objects.link(shown)
        # The inverse of a parent may be any matrix. An object's own has no shear.
        shown.parent = root
        shown.matrix_parent_inverse = _matrix(fitted @ matrix)
        if not mesh.materials:
            mesh.materials.append(None)
        for number, slot in enumerate(shown.material_slots):
            material = materials[number] if number < len(materials) else None
            slot.link = "OBJECT"
            slot.material = material or _plain_material(bpy, mesh, plain)
    for material in bpy.data.materials:
        material.use_backface_culling = False  # EEVEE alone would honour it, and many files ask by mistake


def _plain_material(bpy: Any, mesh: Any, known: dict[str, Any]) -> Any:
    """A matt material in the mesh's colours, or grey."""
    name = mesh.color_attributes[0].name if mesh.color_attributes else ""
    if name not in known:
        material = known[name] = bpy.data.materials.new("plain")
        material.use_nodes = True
        nodes, links = material.node_tree.nodes, material.node_tree.links
        nodes.clear()
        surface, output = nodes.new("ShaderNodeBsdfDiffuse"), nodes.new("ShaderNodeOutputMaterial")
        surface.inputs["Color"].default_value = (*[float(linear_from_srgb(np.array(GREY)))] * 3, 1.0)
        links.new(surface.outputs[0], output.inputs["Surface"])
        if name:
            colors = nodes.new("ShaderNodeVertexColor")
            colors.layer_name = name
            links.new(colors.outputs["Color"], surface.inputs["Color"])
    return known[name]


# ---- Light ----


def light(bpy: Any, environment: Path | None, variant: Variant | None) -> None:
    """Lights the scene by the default light, or by a panorama, which a variant turns about Z."""
    world = bpy.data.worlds.new("light")
    world.use_nodes = True
    bpy.context.scene.world = world
    background = next(node for node in world.node_tree.nodes if node.type == "BACKGROUND")
    background.inputs["Color"].default_value = (1.0, 1.0, 1.0, 1.0)
    background.inputs["Strength"].default_value = WORLD if environment is None else 1.0
    towards = np.array(variant.light) if variant else LIGHT
    if environment is None:
        _add_sun(bpy, towards)
    else:
        turn_rad = float(np.arctan2(towards[1], towards[0])) if variant else 0.0
        _add_panorama(bpy, world.node_tree, background, environment, turn_rad)


def _add_sun(bpy: Any, towards: Float[np.ndarray, "3"]) -> None:
    sun = bpy.data.lights.new("sun", "SUN")
    sun.energy, sun.angle = math.pi * SUN, math.radians(SUN_ANGLE_DEG)
    shown = bpy.data.objects.new("sun", sun)
    side = np.cross([0.0, 0.0, 1.0], towards)
    side = side / np.linalg.norm(side) if np.linalg.norm(side) > 1e-6 else np.array([1.0, 0.0, 0.0])
    matrix = np.eye(4)
    matrix[:3, :3] = np.stack([side, np.cross(towards, side), towards], -1)  # a lamp shines along its -z
    shown.matrix_world = _matrix(matrix)
    bpy.context.scene.collection.objects.link(shown)


def _add_panorama(bpy: Any, tree: Any, background: Any, environment: Path, turn_rad: float) -> None:
    try:
        image = bpy.data.images.load(str(environment))
    except RuntimeError as error:
        raise UserError(f"--environment {environment} cannot be read ({error}); correct it") from error
    if not image.size[0]:
        raise UserError(f"--environment {environment} cannot be read as a picture; correct it")
    picture, turn = tree.nodes.new("ShaderNodeTexEnvironment"), tree.nodes.new("ShaderNodeMapping")
    picture.image = image
    turn.inputs["Rotation"].default_value = (0.0, 0.0, -turn_rad)
    place = tree.nodes.new("ShaderNodeTexCoord")
    tree.links.new(place.outputs["Generated"], turn.inputs["Vector"])
    tree.links.new(turn.outputs["Vector"], picture.inputs["Vector"])
    tree.links.new(picture.outputs["Color"], background.inputs["Color"])


# ---- Pictures ----


def prepare(bpy: Any, look: Look, cameras: Cameras) -> Any:
    """Sets the scene up for pictures as these cameras take them, and returns its camera."""
    scene = bpy.context.scene
    render = scene.render
    render.resolution_x, render.resolution_y, render.resolution_percentage = (
        cameras.width,
        cameras.height,
        100,
    )
    render.film_transparent, render.use_persistent_data = True, True  # only the camera moves between views
    render.use_compositing = render.use_sequencer = False
    picture = render.image_settings
    picture.file_format, picture.color_mode, picture.color_depth = "OPEN_EXR", "RGBA", "32"
    if look.engine == Engine.CYCLES:
        _prepare_cycles(bpy, scene, look.samples)
    else:
        newer = bpy.app.version >= (5, 0)
        render.engine = "BLENDER_EEVEE" if newer else "BLENDER_EEVEE_NEXT"
        scene.eevee.taa_render_samples = look.samples
        render.filter_size = 1.0
    return _add_camera(bpy, scene, cameras)


def _prepare_cycles(bpy: Any, scene: Any, samples: int) -> None:
    scene.render.engine = "CYCLES"
    cycles = scene.cycles
    cycles.samples, cycles.use_adaptive_sampling, cycles.use_denoising, cycles.seed = samples, False, False, 0
    # The mean over the square of a pixel, which is what the ray caster takes as well.
    cycles.pixel_filter_type = "BOX"
    cycles.film_transparent_glass = True
    cycles.transparent_max_bounces = MAX_LAYERS
    cycles.device = "GPU" if _has_gpu(bpy) else "CPU"
    if threads := os.environ.get("OMP_NUM_THREADS", ""):
        scene.render.threads_mode, scene.render.threads = "FIXED", max(1, int(threads.split(",")[0]))


def _has_gpu(bpy: Any) -> bool:
    """Turns the first kind of GPU on that Cycles can use."""
    preferences = bpy.context.preferences.addons["cycles"].preferences
    kinds = [item[0] for item in preferences.get_device_types(bpy.context)]
    for kind in [each for each in GPUS if each in kinds]:
        found = [each for each in preferences.get_devices_for_type(kind) if each.type == kind]
        if found:
            preferences.compute_device_type = kind
            for device in preferences.devices:
                device.use = device.type == kind
            return True
    return False


def _add_camera(bpy: Any, scene: Any, cameras: Cameras) -> Any:
    camera = bpy.data.cameras.new("camera")
    fx, fy = (float(cameras.intrinsics_px[0, axis, axis]) for axis in range(2))
    centre = cameras.intrinsics_px[0, :2, 2].astype(np.float64)
    camera.sensor_fit, camera.sensor_width = "HORIZONTAL", SENSOR_MM
    camera.lens = SENSOR_MM * fx / cameras.width
    scene.render.pixel_aspect_x, scene.render.pixel_aspect_y = 1.0, fx / fy
    # Blender shifts the picture by shares of its width, and its rows grow upwards.
    camera.shift_x = float(cameras.width / 2 - centre[0]) / cameras.width
    camera.shift_y = float(centre[1] - cameras.height / 2) / cameras.width
    camera.clip_start, camera.clip_end = 0.01, 100.0
    shown = bpy.data.objects.new("camera", camera)
    scene.collection.objects.link(shown)
    scene.camera = shown
    return shown


def take(bpy: Any, camera: Any, w2c: Float[np.ndarray, "4 4"], path: Path) -> Float[np.ndarray, "H W 4"]:
    """Renders one view by way of a file: linear colours that are multiplied by alpha, top row first."""
    c2w = np.linalg.inv(w2c.astype(np.float64))
    c2w[:3, 1:3] *= -1  # OpenCV's camera looks along its +z with y down, Blender's along its -z with y up
    camera.matrix_world = _matrix(c2w)
    bpy.context.scene.render.filepath = str(path)
    bpy.ops.render.render(write_still=True)
    image = bpy.data.images.load(str(path))
    width, height = image.size
    pixels = np.empty(width * height * 4, np.float32)
    image.pixels.foreach_get(pixels)
    bpy.data.images.remove(image)
    return pixels.reshape(height, width, 4)[::-1]

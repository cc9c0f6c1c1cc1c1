"""From Gaussians, or a surface that is there already, to a textured mesh in files (A.5, Figure 8).

Paper: a mesh by marching cubes on the opacity. Here: the same on the density of the Gaussians as wide as
viewers draw them, or on their fused depth maps; the texture comes from the views and from renders.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float32

from recon_torch.errors import UserError
from recon_torch.files import write_json
from recon_torch.mesh import baking, cleaning, density, depth, files, fusion, grid, sights
from recon_torch.mesh.baking import Paint, Points
from recon_torch.mesh.files import Textured
from recon_torch.mesh.grid import Grid
from recon_torch.mesh.sights import Sights
from recon_torch.mesh.surface import Surface
from recon_torch.mesh.unwrapping import unwrap
from recon_torch.raster.gaussians import Gaussians
from recon_torch.settings import MeshMethod, MeshSettings
from recon_torch.views.cameras import Cameras
from recon_torch.views.directory import Views
from recon_torch.views.world import HALF_WIDTH, World, upright_rows

REPORT = "mesh.json"
LEVELS = {MeshMethod.OPACITY: 0.45, MeshMethod.DEPTH: -0.25}
UNKNOWN_FITTED_PX = 512.0
NUM_DEPTHS, MOST_DEPTH_PX = 40, 256
HIDDEN = 0.25  # of the fused depth, from which a point is inside
NUM_ALONE, NUM_BESIDE = 32, 12  # renders from the whole sphere, without and beside those of the fit's cameras
SMALLEST_AND_LARGEST_PX = 256, 1024  # of renders for a texture, which are no larger than it is
BESIDE_WEIGHT = 0.02  # of a render from where no view was
MOST_FITTED = 32  # of the fit's cameras that are rendered
GLTF_AXES = [1, 2, 0]  # of a world with +Z up, whose front is +X: glTF has +Y up and the front towards +Z
STAGES = ("surface", "look", "clean", "unwrap", "bake", "write")


class Given(NamedTuple):
    """What a mesh is made of.

    Attributes:
        gaussians: in the unit world.
        world: where this is in the world that the files are to be in.
        up: the axis of either world that is up.
        cameras: of the fit, in the unit world; None where they are not known.
        views: what was fitted, from such cameras; None where it is not there.
    """

    gaussians: Gaussians
    world: World
    up: Float[np.ndarray, "3"]
    cameras: Cameras | None = None
    views: Views | None = None

    @property
    def fitted_px(self) -> float | None:
        """The side in pixels of views that see as much as those of the default orbit with pixels as wide."""
        if self.cameras is None:
            return None
        distances = np.linalg.norm(self.cameras.positions, axis=-1)
        return float(2 * HALF_WIDTH / np.mean(distances / self.cameras.intrinsics_px[:, 1, 1]))


class Frame(NamedTuple):
    """Where the unit world is in the world that files are to be in, and the axis of either that is up."""

    world: World
    up: Float[np.ndarray, "3"]


@dataclass
class Clock:
    """The seconds of the stages, and who is told of them: `on_stage(stage)` when one begins."""

    on_stage: Callable[[str], object] = lambda stage: None
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.on_stage(name)
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 2)


def make(
    given: Given, settings: MeshSettings, out: Path, on_stage: Callable[[str], object] = lambda stage: None
) -> dict[str, Any]:
    """Makes a mesh and writes its files and mesh.json into a directory. Returns what mesh.json says.

    on_stage: told each of STAGES when it begins.

    Raises:
        UserError: there is no surface, or none of what was asked for; a package is missing.
    """
    files.check(settings.formats)  # here too, as not all who make meshes are commands
    clock = Clock(on_stage)
    gaussians = Gaussians(*(tensor.detach().cpu().float() for tensor in given.gaussians))
    given = given._replace(gaussians=gaussians)
    fitted_px = given.fitted_px or UNKNOWN_FITTED_PX
    level = LEVELS[MeshMethod(settings.method)] if settings.level is None else settings.level
    if settings.method == MeshMethod.OPACITY and level <= 0:
        raise UserError(f"level is {level:g}; the density of Gaussians is 0 where nothing is: give more")
    with clock.stage("surface"):
        rough = find_surface(given, settings, level, fitted_px)
    with clock.stage("look"):
        paint = baking.from_sights(look(given, fitted_px, settings.texture))
    made = finish(rough, paint, Frame(given.world, given.up), settings, out, clock)
    report = {
        "method": str(settings.method),
        "level": level,
        "resolution": settings.resolution,
        "fitted_px": round(fitted_px, 1),
        "texture_from": "views" if given.views is not None else "renders",
        **made,
    }
    write_json(out / REPORT, report)
    return report


def finish(
    rough: Surface, paint: Paint, frame: Frame, settings: MeshSettings, out: Path, clock: Clock
) -> dict[str, Any]:
    """Cleans a surface of the unit world, paints a texture for it and writes its files. Returns a report.

    Raises:
        UserError: there is no surface as it was asked for; a package is missing.
    """
    with clock.stage("clean"):
        kept = cleaning.without_floaters(rough, settings.floaters)
        surface = cleaning.decimated(kept.surface, settings.triangles)
        if settings.watertight:
            cleaning.check_watertight(surface)
    with clock.stage("unwrap"):
        unwrapped = unwrap(surface, settings.texture)
    with clock.stage("bake"):
        texture = baking.bake(unwrapped, settings.texture, paint)
        vertices = paint(surface, Points(surface.vertices, surface.normals()))
    with clock.stage("write"):
        turned = [_in_files(each, frame) for each in (unwrapped.surface, surface)]
        colors = np.round(vertices.rgb * 255).astype(np.uint8)
        normals = (unwrapped.normals @ upright_rows(frame.up).T)[:, GLTF_AXES]
        mesh = Textured(turned[0], unwrapped.uvs, normals, texture.pixels, turned[1], colors)
        names = files.write(mesh, out, settings.formats)
    return {
        "files": names,
        "triangles": len(surface.triangles),
        "vertices": len(surface.vertices),
        "watertight": surface.is_watertight,
        "pieces": int(surface.pieces().max()) + 1,
        "floaters_left_out": kept.num_floaters,
        "volume": turned[1].volume,
        "texture_px": settings.texture,
        "texture_coverage": texture.coverage,
        **files.EXTRAS,
        "seconds": clock.seconds,
    }


def find_surface(given: Given, settings: MeshSettings, level: float, fitted_px: float) -> Surface:
    """The surface of Gaussians in the unit world, closed, with all its pieces. Raises UserError for none."""
    wide = sights.blurred(given.gaussians, fitted_px)
    box = grid.grid_around(wide, settings.resolution)
    fused = _fused(given, box, fitted_px)
    if settings.method == MeshMethod.DEPTH:
        return grid.surface_at(fused, level, box)
    field = density.density(wide, box)
    # A fit leaves objects hollow, and open where no view was: what no view can see into is solid.
    if not (field > level).any():
        return grid.surface_at(field, level, box)  # which says so
    # Between a point outside and one far inside, the surface would lie beside the one outside.
    most = np.float32(level + abs(level))
    return grid.surface_at(np.where(fused > HIDDEN, most, np.minimum(field, most)), level, box)


def _fused(given: Given, box: Grid, fitted_px: float) -> Float32[np.ndarray, "x y z"]:
    """The fused depth maps of the fit's cameras. Others tell only where nothing is, not what lies inside."""
    size = min(MOST_DEPTH_PX, 2 * max(box.shape))
    around = sights.sphere(NUM_DEPTHS, size)
    maps = _depths(given.gaussians, around, fitted_px)
    if given.cameras is None:
        return fusion.fuse(maps, around, box)
    cameras = _chosen(given.cameras, size)
    outlines = np.where(np.isinf(maps), maps, fusion.UNKNOWN)
    beside = fusion.fuse(outlines, around, box)
    return np.minimum(fusion.fuse(_depths(given.gaussians, cameras, fitted_px), cameras, box), beside)


def _depths(gaussians: Gaussians, cameras: Cameras, fitted_px: float) -> Float32[np.ndarray, "K H W"]:
    low_pass = sights.low_pass_px2(cameras.height, fitted_px)
    return np.stack([depth.front_depth(gaussians, cameras[k], low_pass) for k in range(len(cameras))])


def _chosen(cameras: Cameras, height: int) -> Cameras:
    """At most MOST_FITTED of the cameras, spread evenly over their order, for pictures of so many rows."""
    numbers = np.unique(np.linspace(0, len(cameras) - 1, MOST_FITTED).round().astype(int))
    return cameras[numbers].resized(max(1, round(height * cameras.width / cameras.height)), height)


def look(given: Given, fitted_px: float, texture_px: int) -> list[Sights]:
    """What the texture is made from: the views, or renders from their cameras; elsewhere other renders."""
    size = int(np.clip(2 * fitted_px, *SMALLEST_AND_LARGEST_PX).clip(max=max(texture_px, 64)))
    low_pass = sights.low_pass_px2(size, fitted_px)
    if given.cameras is None:
        return [sights.look(given.gaussians, sights.sphere(NUM_ALONE, size), low_pass)]
    beside = sights.look(given.gaussians, sights.sphere(NUM_BESIDE, size), low_pass, BESIDE_WEIGHT)
    if given.views is not None:
        seen = sights.of_views(given.views)
        if seen is not None:
            return [seen, beside]
    height = round(given.cameras.height * size / fitted_px)
    return [sights.look(given.gaussians, _chosen(given.cameras, height), low_pass), beside]


def _in_files(surface: Surface, frame: Frame) -> Surface:
    """A surface of the unit world in the axes of glTF, at the scale of the files' world."""
    places = surface.vertices / frame.world.scale + frame.world.center
    return surface._replace(vertices=(places @ upright_rows(frame.up).T)[:, GLTF_AXES])

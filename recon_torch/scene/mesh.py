"""A textured mesh in the Gaussians' place (A.5): DMTet (Shen et al. 2021), optimised by the loss of the fit.

Paper: marching cubes on the Gaussians, and then, where wanted, an optimisation with DMTet inside the same
loop; all else is unspecified. Here: the mesh takes the Gaussians' place from the first step on, and begins as
the visual hull of the masks. What is optimised are a signed distance and a bounded shift of each point of a
lattice of tetrahedra, and colours in space. The surface is where the distance is 0 on edges of the lattice.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32
from scipy import ndimage
from scipy.spatial import cKDTree
from torch import Tensor

from recon_torch.errors import NoGaussiansLeft, UserError
from recon_torch.files import write_json
from recon_torch.mesh import making
from recon_torch.mesh.baking import Colored, Points
from recon_torch.mesh.surface import Surface
from recon_torch.raster import Render
from recon_torch.raster.triangles.edges import edges_of
from recon_torch.raster.triangles.render import rasterizer, render
from recon_torch.scene import surface_terms, tetrahedra
from recon_torch.scene.color_field import OCTAVES, color_grid
from recon_torch.scene.parameters import Parameters
from recon_torch.scene.tetrahedra import Extracted
from recon_torch.settings import Engine, FitSettings, MeshSettings, Start
from recon_torch.views import axes, hull
from recon_torch.views.axes import Axes
from recon_torch.views.cameras import Cameras
from recon_torch.views.world import World

HALF_WIDTH = 0.55  # of the cube that the lattice can fill
HULL_CELLS = 72  # along each side of this cube, where the hull is looked for
HULL_REACH_CELLS = 0.25
BLUR_CELLS = 1.0  # the steps of a hull of cells would stay where no view corrects them
BALL_RADIUS = 0.4  # of what a mesh begins as where it does not begin as the hull
MARGIN_SPACINGS = 1.5  # by which the lattice goes beyond what a mesh begins as
MOST_SHIFT_SPACINGS = 0.3  # so that no tetrahedron turns inside out
RIM_SPACINGS = 0.1  # the least distance of the border of the lattice to the surface
COLOR_CELL_PX = 1.2  # the least size of a cell of colours: what is finer is noise between the pixels
SAMPLES = 2  # along each side of a pixel
FINAL_RATE = 0.1  # the last learning rate as a share of the first


class MeshScene:
    """A `Scene` that is a closed surface. Nothing is ever added to its lattice or dropped.

    Its grid of colours has `settings.mesh_colors` cells along a side, or as many as pixels can tell apart.
    """

    num_gaussians = 0

    def __init__(self, cameras: Cameras, settings: FitSettings, device: torch.device):
        """Raises UserError where no rasteriser of triangles runs on the device."""
        rasterizer(Engine(settings.engine), device)
        self.settings, self.device, self._cameras = settings, device, cameras
        self._begin(_ball())

    def _begin(self, field: Float32[np.ndarray, "n n n"]) -> None:
        """Takes signed distances, at the centres of cells, as what the mesh begins as."""
        cells, colors = self.settings.mesh_cells, min(self.settings.mesh_colors, self._finest_colors())
        margin = MARGIN_SPACINGS * 2 * HALF_WIDTH / cells
        points = tetrahedra.all_points(HALF_WIDTH, cells)
        lattice = tetrahedra.lattice(HALF_WIDTH, cells, _sampled(field, points) < margin)
        grids = [color_grid(field < margin, HALF_WIDTH, max(colors // octave, 1)) for octave in OCTAVES]
        distances = torch.from_numpy(_sampled(field, lattice.points.numpy()))
        tensors = {"distances": distances, "shifts": torch.zeros(len(distances), 3)}
        tensors |= {f"colors_{n}": torch.zeros(grid.num_rows, 3) for n, grid in enumerate(grids)}
        self.parameters = Parameters(tensors, self.device)
        self._field, self._lattice = torch.from_numpy(field), lattice.to(self.device)
        self._grids = [grid.to(self.device) for grid in grids]

    def _finest_colors(self) -> int:
        """The most cells along a side of the grid of colours that pixels of the views can tell apart."""
        distances = np.linalg.norm(self._cameras.positions, axis=-1)
        pixel = float(np.mean(distances / self._cameras.intrinsics_px[:, 1, 1]))
        return max(int(2 * HALF_WIDTH / (COLOR_CELL_PX * pixel)), 1)

    def start_on(self, masks: Float[Tensor, "K H W 1"] | None) -> list[str]:
        """See `Scene`. The mesh becomes the visual hull of the masks, if they agree on any place.

        Raises UserError without masks: over its own colour as a background, a mesh would never end.
        """
        if masks is None:
            raise UserError("a mesh is fitted to the foreground of views; give masks, or pictures with alpha")
        if self.settings.start != Start.HULL:
            return []
        ticks = _ticks()
        cells = np.stack(np.meshgrid(ticks, ticks, ticks, indexing="ij"), -1).reshape(-1, 3)
        reach = HULL_REACH_CELLS * (ticks[1] - ticks[0])
        inside = hull.nearly_inside(cells, self._cameras, masks.cpu().numpy(), reach)
        if not inside.any():
            self._begin(_ball())
            return ["the masks agree on no place for the object, so the mesh starts as a ball"]
        self._begin(_signed_distances(inside.reshape([HULL_CELLS] * 3)))
        return []

    def rates(self, progress: float) -> dict[str, float]:
        settings, decay = self.settings, FINAL_RATE**progress
        own = {"distances": settings.lr_distances, "shifts": settings.lr_shifts}
        return {name: own.get(name, settings.lr_colors) * decay for name in self.parameters.tensors}

    @classmethod
    def render_together(
        cls, scenes: Sequence[MeshScene], cameras: Sequence[Cameras], seeds: Sequence[int | None]
    ) -> list[Render]:
        """See `Scene`. Nothing is drawn at random. The `info` has the surface and its edges."""
        return [scene.render(rig) for scene, rig in zip(scenes, cameras, strict=True)]

    def render(self, cameras: Cameras) -> Render:
        """See `render_together`."""
        surface = self.surface()
        edges = edges_of(surface.triangles)
        rendered = render(
            surface.vertices,
            surface.triangles,
            surface.vertices,
            cameras,
            edges=edges,
            shade=self.colors,
            background=torch.full((3,), self.settings.background, device=self.device),
            engine=Engine(self.settings.engine),
            samples=SAMPLES,
        )
        return rendered._replace(info={"surface": surface, "edges": edges})

    def surface(self) -> Extracted:
        """As it is now; differentiable by the parameters."""
        lattice, distances = self._lattice, self.parameters.tensors["distances"]
        most = MOST_SHIFT_SPACINGS * lattice.spacing
        points = lattice.points + most * self.parameters.tensors["shifts"].tanh()
        kept_out = distances.clamp_min(RIM_SPACINGS * lattice.spacing)
        return tetrahedra.extract(points, torch.where(lattice.is_rim, kept_out, distances), lattice)

    def colors(self, points: Float[Tensor, "P 3"]) -> Float[Tensor, "P 3"]:
        """RGB in (0, 1) at points in space."""
        tables = [self.parameters.tensors[f"colors_{number}"] for number in range(len(self._grids))]
        found = [grid.values(table, points) for grid, table in zip(self._grids, tables, strict=True)]
        return torch.stack(found).sum(0).sigmoid()

    def penalty(self, info: dict[str, Any]) -> Tensor:
        """See `Scene` and `surface_terms`."""
        surface, settings = info["surface"], self.settings
        if not len(surface.triangles):
            return self.parameters.tensors["distances"].sum() * 0
        distances = self.parameters.tensors["distances"] / self._lattice.spacing
        signs = surface_terms.signs(distances, surface.crossed)
        bends = surface_terms.bends(surface.vertices, surface.triangles, info["edges"])
        area = surface_terms.area(surface.vertices, surface.triangles)
        return settings.w_signs * signs + settings.w_bends * bends + settings.w_area * area

    def watch(self, step: int, info: dict[str, Any]) -> None:
        pass

    def refine(self, step: int, info: dict[str, Any], seed: int) -> None:
        if not len(info["surface"].triangles):
            raise NoGaussiansLeft("the mesh has vanished; do the views and the cameras belong together?")

    def limit(self, max_gaussians: int) -> None:
        pass

    @torch.no_grad()
    def save(
        self,
        path: str | os.PathLike,
        world: World | None = None,
        file_axes: Axes = axes.UPRIGHT,
        *,
        up: Float[np.ndarray, "3"] = axes.UP,
        mesh: MeshSettings | None = None,
    ) -> Path:
        """See `Scene`. Writes mesh.glb, or what the settings name, and mesh.json; all have +Y up."""
        out, settings = Path(path).parent, mesh or MeshSettings()
        if not settings.formats:
            raise UserError("the settings of the mesh name no formats; name one, such as glb")
        surface = self.as_surface()
        if not len(surface.triangles):
            raise UserError("the mesh has vanished; do the views and the cameras belong together?")
        frame = making.Frame(world or World(np.zeros(3), 1.0), up)
        made = making.finish(surface, _Painter(self, surface), frame, settings, out, making.Clock())
        write_json(out / making.REPORT, {"method": "dmtet", "texture_from": "the fit", **made})
        return out / made["files"][0]

    @torch.no_grad()
    def as_surface(self) -> Surface:
        """The surface in the fit's world, for those who measure and write it."""
        found = self.surface()
        return Surface(found.vertices.double().cpu().numpy(), found.triangles.cpu().numpy())

    @torch.no_grad()
    def opacity_grid(self, half_width: float, num_cells: int) -> Float[Tensor, "n n n"]:
        """See `Scene`: 1 in cells with a vertex or an inner point of the lattice, else 0."""
        inner = self._lattice.points[(self.parameters.tensors["distances"] < 0) & ~self._lattice.is_rim]
        points = torch.cat([inner, self.surface().vertices])
        cells = ((points / half_width + 1) * (num_cells / 2)).long().clamp(0, num_cells - 1)
        grid = torch.zeros(num_cells, num_cells, num_cells, device=self.device)
        grid[cells.unbind(-1)] = 1
        return grid

    def state_dict(self) -> dict[str, Any]:
        return self.parameters.state_dict() | {"field": self._field.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        field = state["field"].cpu()
        if not torch.equal(field, self._field):
            self._begin(field.numpy().copy())
        self.parameters = Parameters.from_state_dict(state, self.device)


class _Painter:
    """Paints points of what is left of a scene's surface after it was cleaned, see `baking.Paint`.

    Points of a surface that was decimated lie beside the one that was fitted, where nobody learned colours:
    they get those of the tangent plane of its nearest vertex.
    """

    def __init__(self, scene: MeshScene, fitted: Surface):
        self._scene, self._fitted = scene, fitted

    def __call__(self, surface: Surface, points: Points) -> Colored:
        places = points.places
        if len(surface.triangles) < len(self._fitted.triangles):
            normals, vertices = self._fitted.normals(), self._fitted.vertices
            nearest = cKDTree(vertices).query(places)[1]
            above = ((places - vertices[nearest]) * normals[nearest]).sum(-1, keepdims=True)
            places = places - above * normals[nearest]
        device = self._scene.device
        rgb = self._scene.colors(torch.from_numpy(places).to(device, torch.float32)).cpu().numpy()
        return Colored(rgb, np.ones(len(rgb), bool))


# ---- What a mesh begins as ----


def _ticks() -> Float[np.ndarray, " n"]:
    """The centres of cells along an axis."""
    return ((np.arange(HULL_CELLS) + 0.5) / HULL_CELLS * 2 - 1) * HALF_WIDTH


def _ball() -> Float32[np.ndarray, "n n n"]:
    x, y, z = np.meshgrid(_ticks(), _ticks(), _ticks(), indexing="ij")
    return (np.sqrt(x * x + y * y + z * z) - BALL_RADIUS).astype(np.float32)


def _signed_distances(inside: Bool[np.ndarray, "n n n"]) -> Float32[np.ndarray, "n n n"]:
    """Distances, negative inside, of the centres of cells to the surface of those that are inside."""
    outwards = ndimage.distance_transform_edt(~inside) - ndimage.distance_transform_edt(inside)
    cell = 2 * HALF_WIDTH / len(inside)
    halved = outwards - 0.5 * np.sign(outwards)  # from centres of cells to the face between them
    return (ndimage.gaussian_filter(halved, BLUR_CELLS) * cell).astype(np.float32)


def _sampled(
    field: Float32[np.ndarray, "n n n"], points: Float[np.ndarray, "P 3"]
) -> Float32[np.ndarray, " P"]:
    """Trilinear between the centres of cells."""
    places = (points / HALF_WIDTH + 1) / 2 * len(field) - 0.5
    return ndimage.map_coordinates(field, places.T, order=1, mode="nearest").astype(np.float32)

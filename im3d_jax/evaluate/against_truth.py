"""Outputs of methods against frozen truth: views at the same poses, and surfaces in the truth's frame.

A row of pictures has a picture for each true view, in the protocol's order. A row in 3D, and an asset of
im3d, is rendered from the true cameras. The view that methods are given does not count: all of them have it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from im3d_jax.data import mesh_rendering
from im3d_jax.data.clip import Clip
from im3d_jax.data.meshes.parts import Mesh
from im3d_jax.data.meshes.reading import UpAxis, load_mesh
from im3d_jax.evaluate import alignment, surfaces
from im3d_jax.evaluate.alignment import Alignment
from im3d_jax.evaluate.faithfulness import Embedder
from im3d_jax.evaluate.frozen import INPUTS
from im3d_jax.evaluate.frozen.manifest import Frozen, TrueObject
from im3d_jax.evaluate.outputs import reading
from im3d_jax.evaluate.outputs.finding import Asked, MethodOutputs, Output, Rule
from im3d_jax.evaluate.outputs.layouts import Kind, Layout, Shows
from im3d_jax.evaluate.outputs.names import key_of
from im3d_jax.evaluate.result_file import Row
from im3d_jax.evaluate.scores import MAX_PSNR_DB, Pictures
from im3d_jax.evaluate.tables import Column
from recon_torch.errors import UserError
from recon_torch.losses import metrics
from recon_torch.losses.lpips import PerceptualDistance
from recon_torch.process.rendering import render_file
from recon_torch.views import masks
from recon_torch.views.cameras import Cameras
from recon_torch.views.images import to_uint8
from recon_torch.views.resizing import resize
from recon_torch.views.video import count_frames

ASSET, MESH = "asset.ply", "mesh.glb"
SAME_POSE_DEG = 0.5
NO_ALPHA = "pictures have no alpha, so that silhouettes are what stands out from their background"
NO_WHITE = "pictures have another background than white, which counts against all scores but the foreground's"
WHITE_TOLERANCE = 0.03


class Settings(NamedTuple):
    """What is measured beside PSNR, SSIM and silhouettes.

    Attributes:
        perceptual: LPIPS with trained weights; None leaves it out.
        clip: a CLIP for CLIP-S; None leaves it out.
        alignment: of meshes, before they are rendered and compared.
        thresholds: of the F-score.
        unlit: meshes have the light in their textures, so that none is added when they are rendered.
    """

    perceptual: PerceptualDistance | None
    alignment: Alignment = Alignment.NONE
    thresholds: tuple[float, ...] = surfaces.F_THRESHOLDS
    unlit: bool = False
    clip: Clip | None = None


class Measured(NamedTuple):
    """One row of a method.

    Attributes:
        row: with the means over views, and the scores of the surface.
        per_view: of each true view but the given one, by score; None where a view has none.
        pictures: over white, at the size of the truth.
        notes: what was done to them.
    """

    row: Row
    per_view: dict[str, list[float | None]]
    pictures: Float[np.ndarray, "K H W 3"]
    notes: tuple[str, ...]


class Found(NamedTuple):
    """What a method has for one object: pictures over white, their alpha or None, and its mesh or None."""

    rgb: Float[np.ndarray, "K H W 3"]
    alpha: Float[np.ndarray, "K H W 1"] | None
    mesh: Mesh | None = None
    notes: tuple[str, ...] = ()


def asked(frozen: Frozen) -> list[Asked]:
    """The objects of the truth, as rows of methods are found: by name, or by a caption that one has alone."""
    captions = [key_of(item.caption) for item in frozen.objects]
    entries = []
    for item, caption in zip(frozen.objects, captions, strict=True):
        names = {key_of(item.name)} | ({caption} if caption and captions.count(caption) == 1 else set())
        picture = frozen.directory / INPUTS / f"{item.name}.png"
        entries.append(Asked(key_of(item.name), item.caption, picture, frozenset(names)))
    return entries


def measure(
    frozen: Frozen, outputs: MethodOutputs, settings: Settings, tell: Callable[[], object]
) -> Iterator[tuple[TrueObject, Measured]]:
    """The scores of each object that a method has. What cannot be read is moved to what it leaves out.

    tell: called after each object.
    """
    for item, found in read_all(frozen, outputs, settings):
        yield item, score(frozen, item, found, outputs.label, settings)
        tell()


# ---- Reading ----


def read_all(
    frozen: Frozen, outputs: MethodOutputs, settings: Settings
) -> Iterator[tuple[TrueObject, Found]]:
    """What a method has for each object, see `read`. What cannot be read is moved to what it leaves out."""
    for item in frozen.objects:
        row = outputs.rows.get(key_of(item.name))
        if row is None:
            continue
        try:
            found = read(frozen, item, outputs, row, settings)
        except UserError as error:
            rule = Rule.NUM_VIEWS if isinstance(error, reading.OtherCount) else Rule.UNREADABLE
            outputs.exclude(row, rule, str(error))
        else:
            yield item, found


def read(frozen: Frozen, item: TrueObject, outputs: MethodOutputs, row: Output, settings: Settings) -> Found:
    """What a method has for an object, at the poses and the size of the truth.

    Raises UserError if it cannot be read, and `OtherCount` for another number of views.
    """
    kind, cameras = outputs.layout.kind, frozen.cameras(item)
    if kind == Kind.MESH:
        mesh = _mesh(row.paths[0], outputs.layout.up, frozen.surface(item), settings.alignment)
        return _of_rgba(_rendered(mesh, cameras, settings.unlit))._replace(mesh=mesh)
    if kind == Kind.GAUSSIANS:
        return _of_rgba(render_file(row.paths[0], cameras, outputs.layout.up))
    if kind == Kind.ASSETS and outputs.shows == Shows.RENDERS:
        return _of_asset(row.paths[0].parent.parent, cameras, frozen.surface(item), settings.alignment)
    views = _views_of(outputs.layout, row, item)
    height, width = views.shape[1:3]
    if height != width:
        raise UserError(f"its pictures have {width} x {height} pixels; the true views are square")
    # Composited before they are resized, or hidden colours would bleed into the edges.
    found = _of_rgba(views) if views.shape[-1] == 4 else _of_rgb(views)
    if height == cameras.height:
        return found
    rgb, alpha = (None if x is None else _resized(x, cameras) for x in (found.rgb, found.alpha))
    assert rgb is not None
    note = f"pictures of {height} px are resampled to {cameras.height} px"
    return Found(rgb, alpha, notes=(*found.notes, note))


def _views_of(layout: Layout, row: Output, item: TrueObject) -> Float[np.ndarray, "K H W C"]:
    """The pictures of a row in the order of the truth, by the azimuths that the layout states, if it does.

    Raises UserError if a true view is not among them, and `OtherCount` for another number of views.
    """
    count = len(layout.azimuths_deg) or len(item.azimuths_deg)
    if layout.kind == Kind.VIDEO and not layout.azimuths_deg:
        # Evenly spaced frames would be views from elsewhere, without a word.
        num_frames, _ = count_frames(row.paths[0])
        if num_frames != count:
            raise reading.OtherCount(f"{num_frames} frames, not {count}; a layout may say their azimuths_deg")
    views = reading.read_views(layout, row, count).astype(np.float32) / 255
    if len(views) != count:
        raise reading.OtherCount(f"{len(views)} pictures, not {count}")
    if not layout.azimuths_deg:
        return views
    stated = np.stack(np.broadcast_arrays(layout.azimuths_deg, layout.elevations_deg or np.nan))
    apart = stated[:, None] - np.stack([item.azimuths_deg, item.elevations_deg])[..., None]
    apart = np.nan_to_num(np.abs((apart + 180) % 360 - 180)).max(0)
    if apart.min(1).max() > SAME_POSE_DEG:
        view = int(apart.min(1).argmax())
        pose = f"azimuth {item.azimuths_deg[view]:.4g}, elevation {item.elevations_deg[view]:.4g} degrees"
        raise UserError(f"it has no view at {pose}, by the azimuths_deg and elevations_deg of its layout")
    return views[apart.argmin(1)]


def _of_rgba(rgba: Float[np.ndarray, "K H W 4"]) -> Found:
    alpha = rgba[..., 3:]
    return Found(rgba[..., :3] * alpha + 1 - alpha, alpha)


def _of_rgb(rgb: Float[np.ndarray, "K H W 3"]) -> Found:
    border = np.concatenate([rgb[:, [0, -1]].reshape(-1, 3), rgb[:, :, [0, -1]].reshape(-1, 3)])
    is_white = np.median(border, 0).min() > 1 - WHITE_TOLERANCE
    return Found(rgb, None, notes=(NO_ALPHA,) if is_white else (NO_ALPHA, NO_WHITE))


def _resized(pictures: Float[np.ndarray, "K H W C"], cameras: Cameras) -> Float[np.ndarray, "K h w C"]:
    return np.stack([resize(each, cameras.width, cameras.height) for each in pictures])


def _of_asset(folder: Path, cameras: Cameras, truth: surfaces.Triangles, aligned: Alignment) -> Found:
    """An asset of im3d, where it is: its Gaussians or else its mesh, and its mesh if it has one.

    Raises UserError if it has neither.
    """
    splats, mesh_file = folder / ASSET, folder / MESH
    mesh = _mesh(mesh_file, UpAxis.Y, truth, aligned) if mesh_file.is_file() else None
    if splats.is_file():
        return _of_rgba(render_file(splats, cameras))._replace(mesh=mesh)
    if mesh is None:
        raise UserError(f"{folder} has neither {ASSET} nor {MESH}")
    return _of_rgba(_rendered(mesh, cameras, unlit=True))._replace(mesh=mesh)


def _mesh(path: Path, up: str, truth: surfaces.Triangles, aligned: Alignment) -> Mesh:
    """A mesh where its file has it, or aligned to the truth."""
    mesh = load_mesh(path, up or UpAxis.Y, in_ball=False)
    if not surfaces.has_area(mesh.corners):
        raise UserError(f"{path} has no triangle with an area")
    if aligned == Alignment.NONE:
        return mesh
    matrix = alignment.to_truth(mesh.corners, truth, aligned)
    turn = matrix[:3, :3] / np.cbrt(np.linalg.det(matrix[:3, :3]))
    corners, normals = alignment.moved(mesh.corners, matrix), mesh.normals @ turn.T
    return mesh._replace(corners=corners.astype(np.float32), normals=normals.astype(np.float32))


def _rendered(mesh: Mesh, cameras: Cameras, unlit: bool) -> Float[np.ndarray, "K H W 4"]:
    """RGBA of a mesh, in the light of the truth or, where its textures have light in them, in no other."""
    if unlit:
        mesh = mesh._replace(materials=[each._replace(unlit=True) for each in mesh.materials])
    return mesh_rendering.render(mesh, cameras)[0]


# ---- Scores ----


def score(frozen: Frozen, item: TrueObject, found: Found, label: str, settings: Settings) -> Measured:
    """The scores of what a method has for an object."""
    truth = frozen.pictures(item)
    counted = [view for view in range(len(found.rgb)) if view != item.given]
    per_view = score_views(found, truth, settings.perceptual, counted)
    if settings.clip is not None:
        per_view["clip_s"] = clip_similarity(settings.clip, found.rgb[counted], truth[0][counted])
    means = {name: _mean(values) for name, values in per_view.items()}
    if found.mesh is not None:
        means |= surfaces.compare(found.mesh.corners, frozen.surface(item), settings.thresholds)
    return Measured(
        Row(label, key_of(item.name), item.caption, means), per_view, found.rgb.clip(0, 1), found.notes
    )


@torch.no_grad()
def score_views(
    found: Found, truth: Pictures, perceptual: PerceptualDistance | None, counted: Sequence[int]
) -> dict[str, list[float | None]]:
    """The scores of some views: PSNR over white and of the foreground, MSE, SSIM, silhouette IoU, LPIPS.

    Where pictures have no alpha, their silhouette is what stands out from their background. A view whose
    silhouette cannot be told has none.
    """
    silhouettes = masks.by_backdrop(found.rgb[counted]).masks if found.alpha is None else found.alpha[counted]
    rgb, true_rgb, true_alpha = (
        torch.from_numpy(np.ascontiguousarray(each[counted], np.float32))
        for each in (found.rgb.clip(0, 1), *truth)
    )
    alpha = torch.from_numpy(np.ascontiguousarray(silhouettes, np.float32))
    iou = metrics.silhouette_iou(alpha, true_alpha)
    scores = {
        "psnr": metrics.psnr(rgb, true_rgb).clamp_max(MAX_PSNR_DB),
        "psnr_foreground": metrics.psnr(rgb, true_rgb, true_alpha).clamp_max(MAX_PSNR_DB),
        "mse": (rgb - true_rgb).square().mean((1, 2, 3)),
        "ssim": metrics.ssim(rgb, true_rgb),
        "silhouette_iou": torch.where(alpha.isnan().any((1, 2, 3)), torch.nan, iou),
    }
    if perceptual is not None:
        scores["lpips"] = perceptual.distance(rgb, perceptual.features(true_rgb))
    return {name: [_number(value) for value in values.tolist()] for name, values in scores.items()}


def clip_similarity(
    clip: Embedder, rgb: Float[np.ndarray, "K H W 3"], true_rgb: Float[np.ndarray, "K H W 3"]
) -> list[float | None]:
    """CLIP-S of views, as SV3D calls it: the cosine of the embeddings of each and of the true one."""
    made, true = (clip.embed_pictures(list(to_uint8(each))) for each in (rgb, true_rgb))
    return [float(cosine) for cosine in (made * true).sum(-1)]


def _number(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


# ---- What results say ----


def columns(thresholds: Sequence[float]) -> dict[str, Column]:
    """The scores in tables."""
    made = {
        "psnr": Column("PSNR, dB", 2),
        "psnr_foreground": Column("foreground PSNR, dB", 2),
        "ssim": Column("SSIM", 3),
        "lpips": Column("LPIPS", 3, "lower"),
        "clip_s": Column("CLIP-S", 3),
        "mse": Column("MSE", 4, "lower"),
        "silhouette_iou": Column("silhouette IoU", 3),
        "chamfer": Column("Chamfer", 4, "lower"),
    }
    made |= {f"f_{each:g}": Column(f"F-score at {each:g}", 3) for each in thresholds}
    return made | {"normals": Column("normal consistency", 3)}


def protocol(frozen: Frozen, settings: Settings, net: str) -> dict[str, Any]:
    """What decides what the numbers mean."""
    lpips = {"net": net, "sha256": _digest(settings.perceptual)} if settings.perceptual else {}
    return {
        "truth": frozen.digest,
        "views": frozen.settings,
        "given_view": "left out",
        "lpips": lpips,
        "clip": settings.clip.about() if settings.clip else {},
        "meshes": {
            "alignment": str(settings.alignment),
            "thresholds": list(settings.thresholds),
            "points": surfaces.NUM_POINTS,
            "unlit": settings.unlit,
        },
    }


def _digest(perceptual: PerceptualDistance) -> str:
    """SHA-256, in hex, of the weights of LPIPS's network."""
    sha = hashlib.sha256()
    for stage in perceptual.stages:
        for name, tensor in stage.state_dict().items():
            sha.update(name.encode() + np.ascontiguousarray(tensor.cpu().numpy()).tobytes())
    return sha.hexdigest()


def notes(measured: Sequence[Measured]) -> list[str]:
    """What was done to the pictures of methods, and to how many of them."""
    counted = Counter((each.row.method, note) for each in measured for note in each.notes)
    return [f"{method}: {note}, of {count} objects." for (method, note), count in counted.items()]


def about(frozen: Frozen, settings: Settings) -> list[str]:
    """Remarks without which the numbers would mislead."""
    how: dict[str, Any] = frozen.settings
    said = [
        f"{len(frozen.objects)} objects, protocol {how['protocol']}, {how['num_views']} views of"
        f" {how['size_px']} px; the given view is left out of all scores. Truth: {frozen.digest}.",
        f"PSNR is the mean of each view's over white, at most {MAX_PSNR_DB:g} dB; psnr_foreground weights"
        " pixels by the true coverage. A silhouette is what is at least half covered.",
    ]
    if settings.perceptual is None:
        said.append("LPIPS is left out: no trained weights were found; give --lpips-weights.")
    if settings.clip is None:
        said.append("CLIP-S is left out: there is no --clip.")
    else:
        said.append(settings.clip.in_words())
    said.append(
        "Meshes are where their files have them, in the truth's frame."
        if settings.alignment == Alignment.NONE
        else f"Meshes are aligned to the truth first: --align {settings.alignment}."
    )
    if frozen.failed:
        said.append(f"Meshes that could not be rendered: {', '.join(sorted(frozen.failed))}.")
    return said

"""What an asset is: the request for it, the rounds in which it was made, its report and its files.

A directory holds a whole asset if it holds report.json, which is written last. The files:

    asset.ply              the Gaussians in the layout of 3DGS (asset.safetensors for a radiance field)
    asset.spz, ...         and in other formats, where `config.export.formats` asks for them
    mesh.glb, mesh.json    a textured mesh and a report on it, where `config.export.mesh` asks for them, and
                           in place of asset.ply where `config.fit.representation` is "mesh"
    asset.html             a page to look at it, where `config.export.page` asks for it
    turntable.mp4          renders around the asset
    views.png              a contact sheet: the input, and the generated views and renders of each round
    images/, transforms.json            renders of the asset from the cameras of its views
    views_0/, views_1/, ...             the views of each round, where `Request.save_views` asks for them
    report.json            where the asset comes from, its quality, and what it cost
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import socket
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from im3d_jax import threads
from im3d_jax.asset_kinds import ASSET
from im3d_jax.conditions import pictures
from im3d_jax.objects import copies
from im3d_jax.settings import AssetSettings, PictureSettings
from im3d_jax.sides import Side, view_at
from im3d_jax.stages import Stages
from recon_torch import outputs
from recon_torch.asset_files import MESH_REPORT, REPORT
from recon_torch.files import write_json
from recon_torch.process import ReconstructionClient
from recon_torch.settings import MeshSettings, Representation, Verdict
from recon_torch.text_files import read_json
from recon_torch.views import axes
from recon_torch.views.cameras import Cameras, orbit
from recon_torch.views.directory import Views, write_views
from recon_torch.views.images import contact_sheet, straight, write_image
from recon_torch.views.video import write_video

PACKAGES = ("im3d", "jax", "flax", "torch", "gsplat", "numba", "lpips")
"""The packages whose versions a report names."""


class Request(NamedTuple):
    """One asset to make. Either the prompt or the image may be empty, but not both.

    Attributes:
        prompt: what to make.
        image: path or URL of the picture that is view 0.
        sides: further pictures, see `sides.arranged`.
        seed: of everything that is random.
        out: directory for the asset's files.
        elevation_deg: of the cameras of the views, where it is known.
        save_views: whether to write the views of every round as well.
    """

    prompt: str
    image: str
    seed: int
    out: Path
    elevation_deg: float | None = None
    save_views: bool = False
    sides: tuple[Side, ...] = ()

    @property
    def images(self) -> list[str]:
        """The paths of all its pictures, view 0 first."""
        return [self.image, *(side.image for side in self.sides)] if self.image else []


class Picture(NamedTuple):
    """A user's picture as a view: over white, in [0, 1].

    Attributes:
        digest: SHA-256 of its file, in hex.
        doubts, hints: on its foreground, see `pictures.Placed`.
        azimuth_deg: of its camera; 0 is view 0.
    """

    rgb: Float[np.ndarray, "H W 3"]
    alpha: Float[np.ndarray, "H W 1"]
    digest: str
    doubts: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    azimuth_deg: float = 0.0

    @property
    def batch(self) -> tuple[Float[np.ndarray, "1 H W 3"], Float[np.ndarray, "1 H W 1"]]:
        """(rgb, alpha), as a batch of one."""
        return self.rgb[None], self.alpha[None]

    def view(self, num_views: int) -> int | None:
        """Which view of a turntable it shows; None for one between two views."""
        return view_at(self.azimuth_deg, num_views)


class Round(NamedTuple):
    """One part of the fit: what it was fitted to and how far it came. Pictures are over white.

    Attributes:
        until_step: the step of the fit at which the round ended.
        quality: psnr [dB], ssim, lpips ... between the renders and the targets.
        targets: the views and, as alpha, their foreground masks, in [0, 1].
        renders, alphas: of the fit from the same cameras; colours may exceed 1 a little.
    """

    until_step: int
    quality: dict[str, float]
    targets: Float[np.ndarray, "K H W 4"]
    renders: Float[np.ndarray, "K H W 3"]
    alphas: Float[np.ndarray, "K H W 1"]


class Made(NamedTuple):
    """What the method has made of a request; the Gaussians themselves are still with the client.

    Attributes:
        elevation_rad, cameras: of the views.
        quality: what the quality gates say, see `ReconstructionClient.inspect`.
        image_digest: of the user's pictures, see `images_digest`.
        inputs: the numbers of the views that are the input, the first one first.
        counts: network calls and evaluations, as the report names them.
        not_understood: sentences on what of the prompt is left out.
    """

    elevation_rad: float
    cameras: Cameras
    rounds: list[Round]
    quality: dict[str, Any]
    image_digest: str
    counts: dict[str, int]
    not_understood: list[str]
    inputs: tuple[int, ...] = (0,)


@dataclass(frozen=True, eq=False, repr=False)
class Asset:
    """A finished asset.

    Attributes:
        directory: holds its files.
        report: the content of report.json.
        cameras: of the views and of the renders.
        rounds: the rounds of the fit, the first one first.
    """

    directory: Path
    report: dict[str, Any]
    cameras: Cameras
    rounds: list[Round]

    @property
    def views(self) -> Float[np.ndarray, "K H W 3"]:
        """The generated views that the last round was fitted to, over white, in [0, 1]."""
        return self.rounds[-1].targets[..., :3]

    @property
    def masks(self) -> Float[np.ndarray, "K H W 1"]:
        """The foreground masks of `views`, in [0, 1]."""
        return self.rounds[-1].targets[..., 3:]

    @property
    def renders(self) -> Float[np.ndarray, "K H W 3"]:
        """Renders of the asset from the cameras of `views`, over white, in [0, 1]."""
        return self.rounds[-1].renders.clip(0, 1)

    @property
    def alphas(self) -> Float[np.ndarray, "K H W 1"]:
        """The coverage of `renders`, in [0, 1]."""
        return self.rounds[-1].alphas.clip(0, 1)

    @property
    def verdict(self) -> Verdict:
        return Verdict(self.report["quality"]["verdict"])

    def save(self, directory: str | Path) -> Path:
        """Copies the asset's files into a directory, in place of those of an earlier asset there.

        Raises UserError if the directory cannot be made or written to.
        """
        files = outputs.files_of(self.directory, ASSET)
        with outputs.opened(directory, ASSET, files) as target, outputs.owned(target) as staging:
            for path in files:
                copy = staging / path.relative_to(self.directory)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
            outputs.replace(staging, target, ASSET, REPORT)
        return target

    def __repr__(self) -> str:
        name = self.report["prompt"] or self.report["image"]
        psnr = f"{self.rounds[-1].quality['psnr']:.1f} dB to its views"
        count = self.report["num_gaussians"]
        kind = f"{count} Gaussians" if count else "no Gaussians"
        return f"<Asset {name!r}, seed {self.report['seed']}: {self.verdict}, {psnr}, {kind}>"

    def __str__(self) -> str:
        psnr, quality = self.rounds[-1].quality["psnr"], self.report["quality"]
        judged = "; ".join([quality["verdict"], *quality["reasons"], *quality["hints"]])
        return f"{self.directory}: {psnr:.1f} dB to the last views; quality: {judged}"

    def _repr_png_(self) -> bytes:
        """What a notebook shows: the contact sheet."""
        return (self.directory / "views.png").read_bytes()


# ---- The request ----


def opened(request: Request) -> AbstractContextManager[Path]:
    """Holds the directory of a request, see `outputs.opened`. A thread may do so again within."""
    return outputs.opened(request.out, ASSET, request.images)


def read_pictures(request: Request, size: int, settings: PictureSettings) -> list[Picture]:
    """A user's pictures as views of `size` pixels, view 0 first. Raises UserError if that cannot be."""
    if not request.images:
        return []
    azimuths_deg = [0.0, *(side.azimuth_deg for side in request.sides)]
    with ExitStack() as stack:
        paths = [stack.enter_context(copies.local(image)) for image in request.images]
        placed = pictures.load_images(paths, size, **settings.placing)
        digests = [file_digest(path) for path in paths]
    return [
        Picture(each.rgb, each.alpha, digest, each.doubts, each.hints, azimuth_deg)
        for digest, each, azimuth_deg in zip(digests, placed, azimuths_deg, strict=True)
    ]


def images_digest(request: Request, digests: Sequence[str] = ()) -> str:
    """SHA-256, in hex, of the request's picture, or of the digests and azimuths of several; "" for none.

    digests: of the pictures, if they have been read already.
    """
    digests = digests or [file_digest(image) for image in request.images]
    if len(digests) < 2:
        return "".join(digests)
    azimuths_deg = [0.0, *(round(side.azimuth_deg, 6) for side in request.sides)]
    return hashlib.sha256(json.dumps([digests, azimuths_deg]).encode()).hexdigest()


def file_digest(path: str | Path) -> str:
    """SHA-256, in hex, of what a path or a URL names; "" for ""."""
    if not path:
        return ""
    with copies.local(path) as file:
        return hashlib.sha256(file.read_bytes()).hexdigest()


def origin(request: Request, image_digest: str, config_digest: str) -> dict[str, Any]:
    """What an asset is made from, as its report says it. Equal origins make equal assets."""
    elevation_deg = request.elevation_deg
    return {
        "prompt": request.prompt,
        "image_digest": image_digest,
        "seed": request.seed,
        "given_elevation_deg": None if elevation_deg is None else round(float(elevation_deg), 6),
        "config_digest": config_digest,
    }


# ---- The report ----


def make_report(
    made: Made, request: Request, client: ReconstructionClient, config_digest: str
) -> dict[str, Any]:
    """The report without its seconds, which are not over yet."""
    return {
        **origin(request, made.image_digest, config_digest),
        "image": request.image,
        "sides": [side._asdict() for side in request.sides],
        **made.counts,
        "elevation_deg": float(np.rad2deg(made.elevation_rad)),
        "num_gaussians": client.num_gaussians,
        "quality": made.quality,
        "not_understood": made.not_understood,
        "rounds": [{"until_step": each.until_step, **each.quality} for each in made.rounds],
        "versions": {name: version_of(name) for name in PACKAGES} | {"python": platform.python_version()},
        "device": f"{jax.devices()[0].device_kind}, {threads.count()} CPU threads",
        "node": socket.gethostname(),
        "notes": client.notes,
    }


def rank(report: dict[str, Any]) -> tuple[int, int, float]:
    """Orders assets of one request; the least is the best.

    First comes the verdict, then the number of reasons against the asset, then its silhouettes' agreement
    with its views.
    """
    quality, last = report["quality"], report["rounds"][-1]
    return list(Verdict).index(quality["verdict"]), len(quality["reasons"]), -last["silhouette_iou"]


def version_of(package: str) -> str:
    """The version of an installed package. A source tree that is only on the path has none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


# ---- The files ----


def write(
    made: Made, request: Request, client: ReconstructionClient, settings: AssetSettings, stages: Stages
) -> Asset:
    """Writes the files of what `client` holds into `request.out`; none is ever half written there.

    They take the place of those of an earlier asset. Raises UserError where the system refuses to write.
    """
    with outputs.owned(request.out) as staging:
        with stages.timed("export"):
            write_files(staging, made, client, settings)
            if request.save_views:
                for number, each in enumerate(made.rounds):
                    views = _without_white(each.targets)
                    write_views(staging / f"views_{number}", made.cameras, views, "images")
        report = make_report(made, request, client, settings.config_digest)  # with notes on the export
        report["seconds"] = stages.seconds()
        if settings.fit.representation == Representation.MESH:
            report["mesh"] = read_json(staging / MESH_REPORT)
        write_json(staging / REPORT, report)
        if settings.export.mesh:
            report |= {"mesh": _write_mesh(staging, made, settings.mesh)}
            write_json(staging / REPORT, report)
        if settings.export.page:
            from recon_torch.page.html import write_beside  # it reads Gaussians, and nothing else here does

            write_beside(staging, request.out.resolve().name)
        outputs.replace(staging, request.out, ASSET, REPORT)
    return Asset(request.out, report, made.cameras, made.rounds)


def _write_mesh(directory: Path, made: Made, settings: MeshSettings) -> dict[str, Any]:
    """From the views that the last round was fitted to. Returns what the report says of it."""
    from recon_torch.mesh.beside import write_beside  # it reads Gaussians, and nothing else here does

    targets = made.rounds[-1].targets.astype(np.float32)
    names = [f"{index:03d}.png" for index in range(len(targets))]
    views = Views(made.cameras, targets[..., :3], targets[..., 3:], names, [])
    return write_beside(directory, settings, views)


def write_files(
    directory: Path,
    made: Made,
    client: ReconstructionClient,
    settings: AssetSettings,
) -> None:
    """Writes all files but the report and the views."""
    export, turntable = settings.export, settings.turntable
    client.export(directory / "asset.ply", export, settings.mesh)
    last = made.rounds[-1]
    renders = _without_white(np.concatenate([last.renders, last.alphas], -1))
    write_views(directory, made.cameras, renders, "images", **axes.entry(axes.chosen(export.axes)))
    rows, labels = [made.rounds[0].targets[list(made.inputs), ..., :3]], ["input"]
    for number, each in enumerate(made.rounds):
        rows += [each.targets[..., :3], each.renders.clip(0, 1)]
        labels += [f"views {number}", f"renders {number}"]
    write_image(directory / "views.png", contact_sheet(rows, labels))
    around, _ = client.render(orbit(turntable.num_frames, made.elevation_rad, turntable.size))
    write_video(directory / "turntable.mp4", around.clamp(0, 1).cpu().numpy(), turntable.fps)


def _without_white(rgba: Float[np.ndarray, "K H W 4"]) -> Float[np.ndarray, "K H W 4"]:
    """The views as RGBA images; they come with colours over white."""
    return straight(rgba[..., :3], rgba[..., 3:].clip(0, 1))

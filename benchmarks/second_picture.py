"""What a picture of the back adds to one of the front, with the shipped model.

    python benchmarks/second_picture.py --objects 8
    python benchmarks/second_picture.py --meshes DIR --split-file JSON --captions CSV --out out/meshes

Each object of the test split is made twice with the same seed and the true elevation: from its true first
view, and from that and its true view from behind. `views` is the first video's agreement with the true views
that neither picture shows. `asset` is that of the finished asset with true views half a step beside those of
the turntable, which no fit has seen; `behind` is the half of them on the back. All are PSNR in dB, over white
and, in brackets, of the foreground. Differences are paired by objects. --assets 0 makes videos alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import torch
from paired import difference

from im3d_jax import config_flags, pipeline
from im3d_jax.asset import Picture
from im3d_jax.data.captions import read_captions
from im3d_jax.data.meshes.reading import UpAxis
from im3d_jax.data.placement import read_split_file
from im3d_jax.evaluate import truth as truths
from im3d_jax.evaluate.truth import MeshObjects, Objects, ProceduralObjects, Truth
from im3d_jax.evidence import Evidence
from im3d_jax.method import fit_and_refine, sample_video
from im3d_jax.pipeline import Pipeline
from im3d_jax.stages import Stages
from recon_torch.losses.metrics import psnr
from recon_torch.process import ReconstructionClient
from recon_torch.views.cameras import orbit
from recon_torch.views.images import contact_sheet, write_image

WAYS = {"front": (0.0,), "front and back": (0.0, 180.0)}


class Made(NamedTuple):
    """Views of one object over white and their coverage, [K, H, W, 3] and [K, H, W, 1]."""

    rgb: np.ndarray
    alpha: np.ndarray


def main() -> None:
    flags = _parse()
    config = config_flags.load(flags.config)
    scores: dict[str, dict[str, dict[str, list[float]]]] = {}
    with pipeline.load(config) as loaded, loaded.own_client() as client:
        objects = _objects(flags, config)
        azimuths_rad = truths.azimuths_between_rad(config.num_views)
        truth = objects.render(flags.objects)
        between = objects.render(flags.objects, azimuths_rad=azimuths_rad)
        for b in range(len(truth)):
            rows, labels = [truth.rgb[b]], [truth.captions[b] or "truth"]
            for way, azimuths_deg in WAYS.items():
                pictures = [_picture(truth, b, azimuth_deg) for azimuth_deg in azimuths_deg]
                video, asset = _make(loaded, client, truth, b, pictures, fits=b < flags.assets)
                for name, value in _scores(video, asset, truth, between, b).items():
                    scores.setdefault(name, {}).setdefault(way, {})[str(b)] = [value]
                rows += [video.rgb] + [each.rgb.clip(0, 1) for each in (asset,) if each is not None]
                labels += [f"{way}: video"] + [f"{way}: asset"] * (asset is not None)
            write_image(flags.out / f"{b:04d}.png", contact_sheet(rows, labels, tile_px=64))
            told = {name: [round(way[str(b)][0], 2) for way in each.values()] for name, each in scores.items()
                    if str(b) in each["front"]}  # fmt: skip
            print(f"{b} {truth.captions[b]}: {told}", flush=True)
    _report(scores)


def _make(
    loaded: Pipeline,
    client: ReconstructionClient,
    truth: Truth,
    b: int,
    pictures: list[Picture],
    fits: bool,
) -> tuple[Made, Made | None]:
    """The first video of an object, and the asset as it is seen from between the video's cameras."""
    generator, settings = loaded.generator, loaded.settings
    elevation_rad, key, stages = float(truth.elevations_rad[b]), jax.random.key(b), Stages()
    shown = {view: each.batch for each in pictures[1:] if (view := each.view(settings.num_views))}
    given = generator.condition([truth.captions[b]], *pictures[0].batch, elevation_rad, shown)
    video = sample_video(generator, given, key, stages)
    made = Made(*(np.asarray(each[0]) for each in video))
    if not fits:
        return made, None
    evidence = Evidence.of(pictures, settings.num_views, settings.picture.weight)
    client.reset(orbit(settings.num_views, elevation_rad, settings.size))
    fitting = generator, client, given, video, elevation_rad, key, settings.until_steps, stages, evidence
    for _ in fit_and_refine(*fitting):
        pass
    azimuths_rad = truths.azimuths_between_rad(settings.num_views)
    unseen = orbit(settings.num_views, elevation_rad, settings.size, azimuths_rad=azimuths_rad)
    return made, Made(*(each.cpu().numpy().copy() for each in client.render(unseen)))


def _picture(truth: Truth, b: int, azimuth_deg: float) -> Picture:
    view = round(azimuth_deg * truth.rgb.shape[1] / 360)
    return Picture(truth.rgb[b, view], truth.alpha[b, view], "", azimuth_deg=azimuth_deg)


def _scores(video: Made, asset: Made | None, truth: Truth, between: Truth, b: int) -> dict[str, float]:
    """PSNR over white, and of the foreground under the same name with a *."""
    num_views = len(video.rgb)
    neither = [view for view in range(num_views) if view not in (0, num_views // 2)]
    parts = {"views": (video, truth, neither)}
    if asset is not None:
        behind = list(range(num_views // 4, 3 * num_views // 4))
        parts |= {"asset": (asset, between, list(range(num_views))), "behind": (asset, between, behind)}
    found = {}
    for name, (made, true, views) in parts.items():
        rgb = torch.from_numpy(made.rgb[views].clip(0, 1).astype(np.float32))
        target, mask = (torch.from_numpy(np.array(each[b, views])) for each in (true.rgb, true.alpha))
        found[name] = float(psnr(rgb, target).mean())
        found[name + "*"] = float(psnr(rgb, target, mask).nanmean())
    return found


def _report(scores: Mapping[str, Mapping[str, Mapping[str, list[float]]]]) -> None:
    print(f"\n{'':8s}{'front':>18s}{'front and back':>18s}   gain")
    for name in [each for each in scores if not each.endswith("*")]:
        columns = []
        for way in WAYS:
            means = [np.mean([*scores[each][way].values()]) for each in (name, name + "*")]
            columns.append(f"{means[0]:.2f} ({means[1]:.2f})")
        one, both = (scores[name][way] for way in WAYS)
        print(f"{name:8s}{columns[0]:>18s}{columns[1]:>18s}   {difference(both, one)}")


def _objects(flags: argparse.Namespace, config) -> Objects:
    if flags.meshes is None:
        return ProceduralObjects(config.seed, config.size, config.num_views)
    captions = read_captions(flags.captions) if flags.captions else {}
    names = read_split_file(flags.split_file).names()
    return MeshObjects(flags.meshes, captions, names, UpAxis.Y, config.seed, config.size, config.num_views)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/tiny.py")
    parser.add_argument("--objects", type=int, default=8)
    parser.add_argument("--assets", type=int, default=8, help="how many of the objects become assets")
    parser.add_argument("--meshes", type=Path, help="instead of procedural objects, a directory of meshes")
    parser.add_argument("--split-file", type=Path)
    parser.add_argument("--captions", type=Path)
    parser.add_argument(
        "--out", type=Path, default=Path("out/second_picture"), help="for a picture of each object"
    )
    flags = parser.parse_args()
    flags.out.mkdir(parents=True, exist_ok=True)
    return flags


if __name__ == "__main__":
    main()

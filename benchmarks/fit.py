"""What each setting of the fit is worth: quality on held-out true views of procedural objects, and seconds.

    python benchmarks/fit.py                                   # all variants, 4 objects, 64 px
    python benchmarks/fit.py --variants default,lpips --num-objects 1 --sheet fit.png

The variants of the loss are the rows of the paper's Table 2 (which scores them with CLIP). Held-out views
stand halfway between the 16 training views. Seconds are of the fit alone; cpu_s is what it cost over all
threads, the figure to trust on a machine that does other things.
"""

from __future__ import annotations

import argparse
import dataclasses
import time

import numpy as np
import torch

from im3d_jax.data import objects, procedural
from recon_torch.fit.optimization import Fit
from recon_torch.settings import FitSettings
from recon_torch.views.cameras import orbit
from recon_torch.views.images import contact_sheet, write_image

LPIPS = {"lpips_weights": "random"}  # unless torchvision's cache has weights, the default goes without
VARIANTS = {
    "default": {},
    "lpips": LPIPS,
    "rgb-for-lpips": {"w_lpips": 0.0, "w_rgb": 10.0},
    "no-ssim": {"w_ssim": 0.0},
    "no-mask": {"w_mask": 0.0},
    "lpips-alex": LPIPS | {"lpips_net": "alex"},
    "lpips-squeeze": LPIPS | {"lpips_net": "squeeze"},
    "two-views-per-step": {"views_per_step": 2},
    "no-densification": {"refine_every": 10**6},
    "600-steps": {"num_steps": 600},
    "nerf": {"representation": "nerf"},
    "mesh": {"representation": "mesh"},
}
NUM_VIEWS, SHEET_VIEWS = 16, 8
HALFWAY_RAD = 2 * np.pi * (np.arange(NUM_VIEWS) + 0.5) / NUM_VIEWS


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", default=",".join(VARIANTS), help="comma-separated names")
    parser.add_argument("--num-objects", type=int, default=4)
    parser.add_argument("--size", type=int, default=64, help="side of the views in pixels")
    parser.add_argument("--num-steps", type=int, default=FitSettings.num_steps)
    parser.add_argument(
        "--sheet", metavar="PNG", help="held-out views of the first object, a row per variant"
    )
    flags = parser.parse_args()

    first = objects.SPLITS["test"][0]
    indices = range(first, first + flags.num_objects)
    train = procedural.turntables(0, indices, size=flags.size)
    truth = procedural.turntables(0, indices, size=flags.size, azimuths_rad=HALFWAY_RAD)
    rows, labels = [np.asarray(truth.views.rgb[0][:SHEET_VIEWS])], ["truth"]
    print(
        f"{flags.num_objects} objects, {flags.size} px, {torch.get_num_threads()} threads: {train.captions}"
    )
    for name in flags.variants.split(","):
        settings = dataclasses.replace(FitSettings(num_steps=flags.num_steps), **VARIANTS[name])
        results = [fit_object(train, truth, index, settings) for index in range(flags.num_objects)]
        table = {key: np.mean([result[key] for _, result in results]) for key in results[0][1]}
        print(f"{name:20s}" + "".join(f"  {key} {value:.4g}" for key, value in table.items()), flush=True)
        rows.append(results[0][0])
        labels.append(name)
    if flags.sheet:
        write_image(flags.sheet, contact_sheet(rows, labels))


def fit_object(
    train: procedural.Turntables, truth: procedural.Turntables, index: int, settings: FitSettings
) -> tuple[np.ndarray, dict[str, float]]:
    """Renders of held-out views, and the row of the table."""
    size, elevation_rad = train.views.rgb.shape[-2], train.elevation_rad[index]
    fit = Fit(orbit(NUM_VIEWS, elevation_rad, size), settings)
    fit.set_targets(_tensor(train.views.rgb[index]), _tensor(train.views.alpha[index]))
    fit.run(1)  # compiles the rasteriser and computes the targets' features
    wall, cpu = time.perf_counter(), time.process_time()
    fit.run(settings.num_steps)
    seconds = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}

    held_out = orbit(NUM_VIEWS, elevation_rad, size, azimuths_rad=HALFWAY_RAD)
    quality = fit.compare(held_out, _tensor(truth.views.rgb[index]), _tensor(truth.views.alpha[index]))
    quality.pop("lpips")  # each net has its own scale
    renders = fit.render(held_out[:SHEET_VIEWS]).rgb.clamp(0, 1).cpu().numpy()
    return renders, {
        "psnr_train": fit.metrics()["psnr"], **quality, "num_gaussians": fit.num_gaussians, **seconds
    }  # fmt: skip


def _tensor(array) -> torch.Tensor:
    return torch.from_numpy(np.array(array))


if __name__ == "__main__":
    main()

"""Seconds and peak memory of `im3d batch --summarize` and `--status` on a batch of many finished assets.

    python benchmarks/summarize.py                      # 100,000 made-up assets in a temporary directory
    python benchmarks/summarize.py --assets 1000 --keep DIR

The reports have the size of real ones. They were written just before, so that they are read from memory, not
from the disk. One asset in 50 has failed, one in 5 was tried twice, and one in 2 has a page.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

VERDICTS = ("good", "good", "good", "suspect", "bad")
STAGES = ("text_to_image", "video", "elevation", "fit", "renoise_denoise", "inspect", "export")
SCORES = ("psnr", "ssim", "lpips", "psnr_foreground", "silhouette_iou")
NUMBERS = ("floaters_share", "floaters_count", "floor_area", "floor_ratio", "coverage", "worst_view_shape")
NUMBERS += ("worst_view_psnr", "median_view_psnr", "janus_back", "janus_gap", "motion")
WORDS = ("a", "an", "old", "red", "wooden", "copper", "teapot", "dragon", "lamp", "on", "with", "moss")
PACKAGES = ("im3d", "jax", "flax", "torch", "gsplat", "numba", "lpips", "python")
REASON = (
    "the renders disagree with views 0, 1, 2, 3, in shape (score 0.99) or colour (12.9 dB, the median 13.4)"
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--assets", type=int, default=100_000)
    parser.add_argument(
        "--keep", type=Path, help="make the batch here, or use the one that is here, and keep it"
    )
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        out = flags.keep or Path(directory)
        if not (out / "assets").exists():
            make_batch(out, flags.assets)
        size = (out / "assets/000001/report.json").stat().st_size
        print(f"{flags.assets} assets, reports of about {size} bytes")
        print(f"{'':<34}{'seconds':>9}{'CPU, s':>9}{'peak, MB':>10}")
        (out / "index.parquet").unlink(missing_ok=True)
        measure("--summarize, no table yet", "--summarize", out)
        measure("--summarize, with the table", "--summarize", out)
        measure("--status, with the table", "--status", out)
        pages = len(list(out.glob("gallery*.html")))
        print(f"index.parquet: {(out / 'index.parquet').stat().st_size / 1e6:.1f} MB; {pages} pages")


def measure(what: str, flag: str, out: Path) -> None:
    """Runs the command as a process of its own, which waits for nothing of this one."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "im3d_jax", "batch", flag, str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if os.waitstatus_to_exitcode(status) not in (0, 1):  # 1: not all that was asked for is there
        raise SystemExit(f"{command} failed")
    cpu = used.ru_utime + used.ru_stime
    print(f"{what:<34}{seconds:>9.1f}{cpu:>9.1f}{used.ru_maxrss / 1024:>10.0f}", flush=True)


def make_batch(out: Path, num_assets: int) -> None:
    chance = random.Random(0)
    for number in range(num_assets):
        directory = out / "assets" / f"{number:06d}"
        directory.mkdir(parents=True)
        failed = number % 50 == 49
        told = make_error(chance) if failed else make_report(chance, twice=number % 5 == 4)
        (directory / ("error.json" if failed else "report.json")).write_text(
            json.dumps(told, indent=2) + "\n"
        )
        if number % 2 and not failed:
            (directory / "asset.html").touch()


def make_report(chance: random.Random, twice: bool) -> dict:
    verdict = chance.choice(VERDICTS)
    quality = {
        "verdict": verdict,
        "reasons": [REASON] * (verdict != "good"),
        "hints": [],
        "numbers": {name: chance.random() for name in NUMBERS},
    }
    report = {
        **make_origin(chance),
        "sides": [],
        **{f"{name}_calls": 80 for name in ("network", "text_to_image")},
        **{f"{name}_evaluations": 240 for name in ("network", "text_to_image")},
        "elevation_deg": 45 * chance.random(),
        "num_gaussians": chance.randrange(10_000),
        "quality": quality,
        "not_understood": [],
        "rounds": [
            {"until_step": step} | {name: chance.random() for name in SCORES} for step in (500, 1000, 1200)
        ],
        "versions": {name: "0.10.2" for name in PACKAGES},
        "device": "NVIDIA H200, 16 CPU threads",
        "node": f"node{chance.randrange(64)}",
        "notes": ["LPIPS runs on vgg with random weights: a score, no term of the loss"],
        "seconds": {name: round(60 * chance.random(), 2) for name in (*STAGES, "total")},
    }
    return report | ({"tries": [{"seed": report["seed"], **quality}] * 2} if twice else {})


def make_error(chance: random.Random) -> dict:
    return {
        **make_origin(chance),
        "error": "views are not finite; look at them",
        "details": "",
        "node": "node7",
    }


def make_origin(chance: random.Random) -> dict:
    return {
        "prompt": " ".join(chance.choices(WORDS, k=12)),
        "image": "",
        "image_digest": "",
        "seed": chance.randrange(1000),
        "given_elevation_deg": None,
        "config_digest": "d0ea149998816b3b7fef2df5e5d20cb3b09d112c9ec4cf86ad633f16b3967976",
    }


if __name__ == "__main__":
    main()

"""`im3d batch`: an asset of each prompt in a file, over any number of processes, resumed where it stopped.

    im3d batch --prompts prompts.txt --out out/batch
    im3d batch --prompts prompts.jsonl --out out/batch --shard 3/16 --retry-seeds 2
    im3d batch --summarize out/batch

Asset i lies in OUT/assets/00000i, as `im3d generate` writes it; of --num-assets n, prompt i has the n from
i * n on. Shard I of N (default: from SLURM) makes the assets I, I + N, ...; all shards may share OUT. What is
there is not made again. Ends with OUT/summary.json and OUT/gallery.html.

Exit codes: 0, all assets of the shard are there; 1, some failed (their error.json says why, and the next call
tries them again); 75, stopped by SIGTERM or SIGUSR1.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
import traceback
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from im3d_jax import asset, config_flags
from im3d_jax.asset import REPORT, Request
from im3d_jax.commands import generate
from im3d_jax.jobs import gallery, prompt_files
from im3d_jax.jobs.stop import Stop, Stopped
from im3d_jax.training.hosts import EXIT_REQUEUE
from recon_torch.errors import CommandParser, UserError
from recon_torch.files import make_directory, write_json
from recon_torch.process.client import WorkerDied, WorkerFailed

EXIT_INCOMPLETE = 1
MAX_FAILURES = 5  # in a row; then it is not the prompts that are at fault
SIGNAL_PERIOD_S = 0.5
PICTURES_AT_ONCE = 64  # of a text-to-image pipeline, which loads for each lot: bounds what is in memory
ASSETS, ERROR, PICTURES = gallery.ASSETS, gallery.ERROR, "pictures"


class Outcome(NamedTuple):
    """What became of one asset: its verdict, or the line that says why it failed."""

    name: str
    verdict: str = ""
    psnr: float = 0.0
    seconds: float = 0.0
    error: str = ""
    failed_before: bool = False

    def __str__(self) -> str:
        if self.error:
            return f"{self.name} failed: {self.error}"
        return f"{self.name} {self.verdict}, {self.psnr:.1f} dB, {self.seconds:.1f} s"


# ---- What is to be made ----


def shard_of(flag: str, environment: Mapping[str, str]) -> tuple[int, int]:
    """(I, N) of --shard I/N or, without, of SLURM's job array and of the tasks of srun, both or either."""
    if flag:
        parts = flag.split("/")
        if len(parts) != 2 or not all(part.isdecimal() for part in parts):
            raise UserError(f"--shard is {flag!r}; write I/N, as in 0/8")
        index, count = map(int, parts)
        if not index < count:
            raise UserError(f"--shard is {flag!r}; I counts from 0 to N - 1")
        return index, count
    index, count = 0, 1
    if "SLURM_ARRAY_TASK_ID" in environment:
        task, first, last, count, step = (
            int(environment.get(f"SLURM_ARRAY_TASK_{name}", default))
            for name, default in (("ID", 0), ("MIN", 0), ("MAX", 0), ("COUNT", 1), ("STEP", 1))
        )
        if (last - first) // step + 1 != count:
            raise UserError("the indices of this job array are not evenly spaced; give --shard I/N")
        index = (task - first) // step
    if "SLURM_STEP_ID" in environment:  # a script outside srun has a SLURM_PROCID, too, and is alone
        num_tasks = int(environment["SLURM_NTASKS"])
        index, count = index * num_tasks + int(environment["SLURM_PROCID"]), count * num_tasks
    return index, count


def requests_of(entries: list[prompt_files.Entry], flags: Namespace) -> list[Request]:
    """The assets of all shards; their directories are numbered in the file's order."""
    requests = []
    for entry in entries:
        seed = flags.seed if entry.seed is None else entry.seed
        elevation_rad = None if entry.elevation_deg is None else float(np.deg2rad(entry.elevation_deg))
        for number in range(flags.num_assets):
            out = flags.out / ASSETS / f"{len(requests):06d}"
            requests.append(Request(entry.prompt, entry.image, seed + number, out, elevation_rad))
    return requests


def is_made(request: Request, config, num_retries: int, overwrite: bool) -> bool:
    """Whether the asset is there: whole, of this request and, if it is bad, tried as often as asked for.

    Raises UserError for an asset of another request, unless it is to be overwritten.
    """
    try:
        report = json.loads((request.out / REPORT).read_text())
        tries = report.get("tries", [report])
        found = report | {"seed": tries[0]["seed"]}
        is_final = report["quality"]["verdict"] != "bad" or len(tries) > num_retries
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    wanted = {
        "prompt": request.prompt,
        "image_digest": asset.image_digest(request),
        "seed": request.seed,
        "given_elevation_deg": asset.given_elevation_deg(request),
        "config_digest": config_flags.config_digest(config),
    }
    if config.text_to_image.pipeline and not request.image:
        del wanted["image_digest"]  # of what the pipeline drew, by all of the others
    other = [name for name, value in wanted.items() if found.get(name) != value]
    if other and not overwrite:
        made_from = f"{request.out} was made from another {' and '.join(other)}"
        raise UserError(f"{made_from}; give another --out, or --overwrite to make it again")
    return is_final and not other


def draw_pictures(config, requests: list[Request], out: Path) -> tuple[list[Request], list[Outcome]]:
    """The requests with pictures by `config.text_to_image.pipeline`, if there is one, and those that failed.

    They are OUT/pictures/DIGEST/input.png, of prompt, seed and config: what an earlier call drew is kept.
    """
    if not config.text_to_image.pipeline:
        return requests, []
    digest = config_flags.config_digest(config)
    requests = [r if r.image else r._replace(image=str(picture_path(r, digest, out))) for r in requests]
    missing = {
        r.image: r._replace(image="", out=Path(r.image).parent)
        for r in requests
        if not Path(r.image).is_file()
    }
    errors = {}
    for picture, error in undrawable(config, list(missing.values())):
        errors[picture] = error
        if len(errors) == MAX_FAILURES and not any(map(os.path.isfile, missing)):
            raise error
    failed = [failure(r, errors[r.image]) for r in requests if r.image in errors]
    return [r for r in requests if r.image not in errors], failed


def picture_path(request: Request, digest: str, out: Path) -> Path:
    key = json.dumps([request.prompt, request.seed, digest])
    return out / PICTURES / hashlib.sha256(key.encode()).hexdigest()[:32] / "input.png"


def undrawable(config, requests: list[Request]) -> Iterator[tuple[str, UserError]]:
    """Draws the pictures, in lots. Yields the paths of those that cannot be drawn, found by halves."""
    if not requests:
        return
    if len(requests) <= PICTURES_AT_ONCE:
        try:
            generate.draw_images(config, requests)
            return
        except UserError as error:
            if len(requests) == 1:
                yield str(requests[0].out / "input.png"), error
                return
    middle = len(requests) // 2
    yield from undrawable(config, requests[:middle])
    yield from undrawable(config, requests[middle:])


# ---- Making them ----


def make_all(
    config, requests: list[Request], flags: Namespace, stop: Stop, tell: Callable[[Outcome], None]
) -> None:
    """Makes the assets with one loaded model, in `flags.lanes` threads with a worker process each.

    tell: called here with each outcome. Unfinished assets have none.
    """
    settings = generate.fit_settings(config)
    generator, estimator = generate.load(config)
    warn(generator, requests)
    idle = SimpleQueue()

    def attempt(request: Request) -> Outcome | None:
        client = idle.get()
        try:
            clear(request.out)
            models = generator, client, estimator
            report = generate.make_best_asset(*models, request, flags.retry_seeds, stop.show)
        except Stopped:
            with suppress(OSError):  # not empty: an earlier call failed to make it
                request.out.rmdir()
            return None
        except Exception as error:  # whatever it is, it must not end the others
            return failure(request, error)
        finally:
            idle.put(client)
        (request.out / ERROR).unlink(missing_ok=True)
        return success(request, report)

    with ExitStack() as stack:
        # By this thread, with which a worker ends.
        for _ in range(min(flags.lanes, len(requests))):
            idle.put(stack.enter_context(generate.start_client(config, settings)))
        lanes = stack.enter_context(ThreadPoolExecutor(flags.lanes))
        stop.in_lanes = True
        try:
            waiting = iter(requests)
            in_hand = {lanes.submit(attempt, each) for each in islice(waiting, flags.lanes)}
            while in_hand:
                # Now and then, as a signal that comes just before a wait would not end it.
                done, in_hand = wait(in_hand, SIGNAL_PERIOD_S, FIRST_COMPLETED)
                for outcome in filter(None, (future.result() for future in done)):
                    tell(outcome)
                if not stop.soon:
                    in_hand |= {lanes.submit(attempt, each) for each in islice(waiting, len(done))}
        except BaseException:
            stop.soon = stop.now = True
            raise


def warn(generator, requests: list[Request]) -> None:
    """One line on prompts that the model does not wholly understand, however many they are."""
    warned = [(r, warning) for r in requests for warning in generator.text.warnings(r.prompt)]
    if warned:
        request, warning = warned[0]
        which = f"{len(warned)} of {len(requests)} prompts, first {request.out.name}"
        tqdm.write(f"im3d: warning: {which}: {warning}", file=sys.stderr)


def clear(out: Path) -> None:
    """An empty directory for an asset, but for why an earlier call failed to make it."""
    for path in make_directory(out).iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != ERROR:
            path.unlink()


def success(request: Request, report: dict) -> Outcome:
    psnr, seconds = report["rounds"][-1]["psnr"], report["seconds"]["total"]
    return Outcome(request.out.name, report["quality"]["verdict"], psnr, seconds)


def failure(request: Request, error: Exception) -> Outcome:
    """Writes error.json: a line for the user, and for a bug or a lost worker all that is known."""
    if isinstance(error, UserError):
        line, details = str(error), ""
    elif isinstance(error, WorkerDied):
        line, _, details = str(error).partition("\n")
    elif isinstance(error, WorkerFailed):
        line, details = str(error).strip().rpartition("\n")[2], str(error)
    else:
        line = " ".join(traceback.format_exception_only(error)).strip().partition("\n")[0]
        details = "".join(traceback.format_exception(error))
    failed_before = (request.out / ERROR).is_file()
    asked = {"prompt": request.prompt, "image": request.image, "seed": request.seed}
    write_json(request.out / ERROR, asked | {"error": line, "details": details})
    return Outcome(request.out.name, error=line, failed_before=failed_before)


class Progress:
    """Takes the outcomes: shows a bar with rate and ETA on a terminal, a line for each in a log.

    Stops the shard after `MAX_FAILURES` in a row, not counting what has failed in an earlier call.
    """

    def __init__(self, total: int, num_there: int, stop: Stop):
        self.total, self.num_there, self.stop = total, num_there, stop
        self.counts: Counter[str] = Counter()
        self.failures_in_a_row, self.begun = 0, time.monotonic()
        self.bar = tqdm(
            total=total, initial=num_there, unit="asset", smoothing=0, disable=None, file=sys.stderr
        )

    def tell(self, outcome: Outcome) -> None:
        self.counts[outcome.verdict or "failed"] += 1
        self.bar.update()
        if self.bar.disable:
            rate = self.counts.total() / (time.monotonic() - self.begun)
            done = self.num_there + self.counts.total()
            left = tqdm.format_interval((self.total - done) / rate)
            where = f"[{done}/{self.total}, {60 * rate:.2f} a minute, {left} left]"
            print(f"{outcome}  {where}", file=sys.stderr, flush=True)
        elif outcome.error:
            self.bar.write(str(outcome), file=sys.stderr)
        if not outcome.failed_before:
            self.failures_in_a_row = self.failures_in_a_row + 1 if outcome.error else 0
        if self.failures_in_a_row == MAX_FAILURES:
            self.stop.soon = True
            last = f"{MAX_FAILURES} assets failed in a row, the last with: {outcome.error}"
            tqdm.write(f"im3d: stopped: {last}; mend that and give the same command", file=sys.stderr)

    def __str__(self) -> str:
        num_made = self.counts.total() - self.counts["failed"]
        verdicts = ", ".join(f"{self.counts[name]} {name}" for name in asset.VERDICTS if self.counts[name])
        left = self.total - self.num_there - self.counts.total()
        made = f"{num_made} made" + (f" ({verdicts})" if verdicts else "")
        return f"{made}, {self.counts['failed']} failed, {self.num_there} were there, {left} left"


def run(config, flags: Namespace, stop: Stop) -> int:
    """Makes what is missing of this shard. Returns the exit code."""
    generate.fit_settings(config)  # mistakes come to light before anything else
    requests = requests_of(prompt_files.read(flags.prompts), flags)
    index, count = shard_of(flags.shard, os.environ)
    requests = requests[index::count]
    make_directory(flags.out / ASSETS)
    missing = [r for r in requests if not is_made(r, config, flags.retry_seeds, flags.overwrite)]
    # What failed before comes last: whatever is wrong with it does not keep the others waiting.
    missing.sort(key=lambda request: (request.out / ERROR).is_file())
    progress = Progress(len(requests), len(requests) - len(missing), stop)
    with progress.bar:
        missing, failed = draw_pictures(config, missing, flags.out)
        for outcome in failed:
            progress.tell(outcome)
        if missing and not stop.soon:
            make_all(config, missing, flags, stop, progress.tell)
    print(f"{flags.out}: shard {index}/{count}: {progress}; {gallery.write(flags.out)}")
    num_done = progress.num_there + progress.counts.total()
    if stop.by_signal and num_done < len(requests):
        return EXIT_REQUEUE
    return EXIT_INCOMPLETE if progress.counts["failed"] or num_done < len(requests) else 0


def check(flags: Namespace) -> None:
    """Raises UserError for flags that cannot be."""
    if not flags.prompts or not flags.out:
        raise UserError("give --prompts FILE and --out DIR, or --summarize DIR")
    for name, least in (("num_assets", 1), ("lanes", 1), ("retry_seeds", 0), ("seed", 0)):
        if getattr(flags, name) < least:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(flags, name)}, needs at least {least}")


def main(argv: list[str]) -> None:
    parser = CommandParser("batch", __doc__)
    parser.add_argument(
        "--prompts", type=Path, help="file of prompts: .txt, .json or .jsonl, see docs/batch.md"
    )
    parser.add_argument("--out", type=Path, help="directory of the batch")
    parser.add_argument(
        "--shard", default="", help="I/N: the assets I, I + N, ... (default: SLURM's, or all)"
    )
    parser.add_argument(
        "--lanes", type=int, default=1, help="assets at once: one samples while another is fitted"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of each prompt's first asset (default 0)")
    parser.add_argument("--num-assets", type=int, default=1, help="assets for each prompt (default 1)")
    parser.add_argument(
        "--retry-seeds", type=int, default=0, help="further seeds to try while the result is bad (default 0)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="make again what was made from another prompt or config"
    )
    parser.add_argument("--summarize", type=Path, metavar="DIR", help="only write DIR's summary and gallery")
    flags, config = config_flags.parse(argv, parser, default="configs/tiny.py")
    if flags.summarize:
        print(f"{flags.summarize}: {gallery.write(flags.summarize)}")
        return
    check(flags)
    with Stop() as stop:
        code = run(config, flags, stop)
    if code:
        raise SystemExit(code)

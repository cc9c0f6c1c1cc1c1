"""What becomes of each asset of a batch, how that is shown, and when a shard gives up."""

from __future__ import annotations

import socket
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from im3d_jax.asset import Asset, Request
from im3d_jax.jobs import ERROR, FAILED, FAILURE
from im3d_jax.jobs.stop import Stop
from recon_torch import outputs
from recon_torch.errors import UserError
from recon_torch.files import write_json
from recon_torch.process.client import WorkerDied, WorkerFailed
from recon_torch.settings import Verdict

MAX_FAILURES = 5
"""After so many failures in a row a shard gives up, because then it is not the prompts that are at fault."""


Keep = Callable[[Path], None]
"""See `storage.Storage.keep`."""


def nothing(directory: Path) -> None:
    """Keeps what lies on the disk where it is."""


class Outcome(NamedTuple):
    """What became of one asset.

    Attributes:
        name: of its directory.
        verdict, psnr, seconds: of an asset that was made. psnr: to the views of the last round, in dB.
        error: the line that says why it could not be made; "" if it was.
        node: of the cluster, on which this became of it; "" without one.
    """

    name: str
    verdict: str = ""
    psnr: float = 0.0
    seconds: float = 0.0
    error: str = ""
    node: str = ""

    def __str__(self) -> str:
        where = f" on {self.node}" * bool(self.node)
        if self.error:
            return f"{self.name} failed{where}: {self.error}"
        return f"{self.name} {self.verdict}, {self.psnr:.1f} dB, {self.seconds:.1f} s{where}"


def success(asset: Asset, keep: Keep = nothing) -> Outcome:
    """The outcome of an asset that was made, when it is kept. Removes the error.json of an earlier call."""
    outputs.remove(asset.directory, FAILURE)
    keep(asset.directory)
    psnr, seconds = asset.report["rounds"][-1]["psnr"], asset.report["seconds"]["total"]
    return Outcome(asset.directory.name, asset.verdict, psnr, seconds)


def failure(request: Request, error: Exception, keep: Keep = nothing) -> Outcome:
    """The outcome of an asset that could not be made. Writes its error.json, and keeps it if that can be.

    That has one line for the user and, where the cause is a bug or a lost worker, all that is known of it.
    """
    line, details = explain(error)
    asked: dict[str, Any] = {"prompt": request.prompt, "image": request.image, "seed": request.seed}
    told = asked | {"error": line, "details": details, "node": socket.gethostname()}
    outputs.put(request.out, FAILURE, ERROR, lambda path: write_json(path, told))
    with suppress(UserError):  # where no file can be kept, the line is what is told
        keep(request.out)
    return Outcome(request.out.name, error=line)


def explain(error: Exception) -> tuple[str, str]:
    """(the one line of an error, its details)."""
    if isinstance(error, UserError):
        return str(error), error.details if isinstance(error, WorkerDied) else ""
    if isinstance(error, WorkerFailed):
        return str(error).strip().rpartition("\n")[2], str(error)
    line = " ".join(traceback.format_exception_only(error)).strip().partition("\n")[0]
    return line, "".join(traceback.format_exception(error))


class Progress:
    """Takes the outcomes of a shard and shows them: a bar on a terminal, a line for each in a log.

    Stops the shard after `MAX_FAILURES` in a row, not counting assets that failed in an earlier call, too.

    Attributes:
        total: assets of the shard. num_there: those that were there before. num_done: those and the outcomes.
        counts: outcomes by verdict, and `FAILED`.
    """

    def __init__(self, total: int, num_there: int, stop: Stop) -> None:
        self.total, self.num_there = total, num_there
        self.counts: Counter[str] = Counter()
        self.bar = tqdm(
            total=total, initial=num_there, unit="asset", smoothing=0, disable=None, file=sys.stderr
        )
        self._stop = stop
        self._failures_in_a_row = 0
        self._begun = time.monotonic()

    @property
    def num_done(self) -> int:
        return self.num_there + self.counts.total()

    def tell(self, outcome: Outcome, failed_before: bool = False) -> None:
        """Counts and shows an outcome. failed_before: whether the asset failed in an earlier call, too."""
        self.counts[FAILED if outcome.error else outcome.verdict] += 1
        self.bar.update()
        if self.bar.disable:
            rate = self.counts.total() / (time.monotonic() - self._begun)
            left = tqdm.format_interval((self.total - self.num_done) / rate)
            where = f"[{self.num_done}/{self.total}, {60 * rate:.2f} a minute, {left} left]"
            print(f"{outcome}  {where}", file=sys.stderr, flush=True)
        elif outcome.error:
            self.bar.write(str(outcome), file=sys.stderr)
        if not failed_before:
            self._failures_in_a_row = self._failures_in_a_row + 1 if outcome.error else 0
        if self._failures_in_a_row == MAX_FAILURES:
            self._stop.soon = True
            last = f"{MAX_FAILURES} assets failed in a row, the last with: {outcome.error}"
            tqdm.write(f"im3d: stopped: {last}; mend that and give the same command", file=sys.stderr)

    def __str__(self) -> str:
        num_made = self.counts.total() - self.counts[FAILED]
        verdicts = ", ".join(f"{self.counts[name]} {name}" for name in Verdict if self.counts[name])
        made = f"{num_made} made" + (f" ({verdicts})" if verdicts else "")
        left = self.total - self.num_done
        return f"{made}, {self.counts[FAILED]} failed, {self.num_there} were there, {left} left"

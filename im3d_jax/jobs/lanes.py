"""Lanes: threads that make assets side by side with one loaded model and a 3D worker each.

While one lane fits, another one samples; `Generator.turn` keeps two from sampling at the same time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from itertools import islice
from queue import SimpleQueue
from typing import Protocol, runtime_checkable

from tqdm import tqdm

from im3d_jax.asset import REPORT, Asset, Request, opened
from im3d_jax.asset_kinds import ASSET
from im3d_jax.jobs.outcomes import Keep, Outcome, failure, nothing, success
from im3d_jax.jobs.stop import Stop, Stopped
from im3d_jax.stages import Show
from recon_torch import outputs
from recon_torch.process import ReconstructionClient

SIGNAL_PERIOD_S = 0.5
"""How often a waiting batch looks for signals: one that comes just before a wait does not end it."""


@runtime_checkable
class Maker(Protocol):
    """What lanes need of a loaded model; `pipeline.Pipeline` is one."""

    def warnings(self, prompt: str) -> list[str]:
        """What the model does not understand of a prompt."""

    def start_client(self) -> ReconstructionClient:
        """A 3D worker for one lane, which is closed after use."""

    def make_best(
        self, request: Request, client: ReconstructionClient, *, num_retries: int, show: Show
    ) -> Asset:
        """An asset in `request.out`, whose directory is there."""


def make_all(
    maker: Maker,
    requests: Sequence[Request],
    num_lanes: int,
    num_retries: int,
    stop: Stop,
    tell: Callable[[Outcome], None],
    keep: Keep = nothing,
) -> None:
    """Makes the assets in `num_lanes` threads.

    keep: called with the directory of each, see `storage.Storage.keep`.
    tell: called in this thread with the outcome of each asset. Those that a signal stops have none.
    """
    _warn(maker, requests)
    idle: SimpleQueue[ReconstructionClient] = SimpleQueue()

    def attempt(request: Request) -> Outcome | None:
        client = idle.get()
        try:
            with opened(request):
                # What a killed process has left half made does not stay if this fails.
                outputs.remove(request.out, ASSET, REPORT)
                made = maker.make_best(request, client, num_retries=num_retries, show=stop.show)
                return success(made, keep)
        except Stopped:
            return None
        except Exception as error:  # whatever it is, it must not end the other assets
            return failure(request, error, keep)
        finally:
            idle.put(client)

    with ExitStack() as stack:
        # Started by this thread, because a worker ends with the thread that starts it.
        for _ in range(min(num_lanes, len(requests))):
            idle.put(stack.enter_context(closing(maker.start_client())))
        lanes = stack.enter_context(ThreadPoolExecutor(num_lanes))
        stop.in_lanes = True
        try:
            waiting = iter(requests)
            in_hand = {lanes.submit(attempt, each) for each in islice(waiting, num_lanes)}
            while in_hand:
                done, in_hand = wait(in_hand, SIGNAL_PERIOD_S, FIRST_COMPLETED)
                _tell_all(done, tell)
                if not stop.soon:
                    in_hand |= {lanes.submit(attempt, each) for each in islice(waiting, len(done))}
        except BaseException:
            stop.give_up()
            raise


def _tell_all(done: set[Future[Outcome | None]], tell: Callable[[Outcome], None]) -> None:
    for future in done:
        if outcome := future.result():
            tell(outcome)


def _warn(maker: Maker, requests: Sequence[Request]) -> None:
    """One line about the prompts that the model does not wholly understand, however many they are."""
    warned = [(r, warning) for r in requests for warning in maker.warnings(r.prompt)]
    if warned:
        request, warning = warned[0]
        which = f"{len(warned)} of {len(requests)} prompts, first {request.out.name}"
        tqdm.write(f"im3d: warning: {which}: {warning}", file=sys.stderr)

"""A fit that survives what can go wrong in the middle of it: NaN, no Gaussians left, memory that runs out.

After such a setback the fit goes back to its last good state, at most `SNAPSHOT_STEPS` steps ago (to an
earlier one each time that it fails again), and goes on from there: after NaN or the loss of all Gaussians
with other random numbers at half the learning rates; where memory ran out with half the Gaussians.
`Fit.setbacks` says so in the report. What goes wrong in one of several fits that run together does not change
the others.
"""

from __future__ import annotations

import collections
import functools
import gc
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recon_torch.errors import NoGaussiansLeft, UserError
from recon_torch.fit import optimization
from recon_torch.fit.optimization import Fit

SNAPSHOT_STEPS = 50  # what a setback, or the death of a worker, costs at most
MAX_SETBACKS = 3  # per fit
FEWEST_GAUSSIANS = 100  # with fewer, it is not the Gaussians that take the memory

logger = logging.getLogger(__name__)


class Setback(NamedTuple):
    """Why a stretch of steps failed, and what is done about it after going back."""

    note: str  # for the report
    remedy: Callable[[Fit], None]


def run(
    fit: Fit,
    until_step: int,
    on_step: Callable[[int, dict[str, Tensor]], None] | None = None,
    on_snapshot: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """Optimises to the given step as `Fit.run` does; steps come again after a setback.

    Args:
        on_step: see `Fit.run`.
        on_snapshot: gets every good state, as `Fit.state_dict` makes it.

    Raises:
        UserError: the fit fails for the fourth time.
    """
    good_states = collections.deque([fit.state_dict()], maxlen=1 + MAX_SETBACKS)
    while fit.step < until_step:
        setback = _try_steps(fit, min(until_step, fit.step + SNAPSHOT_STEPS), on_step)
        if setback is None:
            good_states.append(fit.state_dict())
            if on_snapshot is not None:
                on_snapshot(good_states[-1])
            continue
        _free_memory()  # not inside of the `except`, whose traceback holds on to the step's memory
        # A state is used once, as what comes of it may be doomed, but for the first, which is always there.
        state = good_states.pop() if len(good_states) > 1 else good_states[0]
        setbacks = [*fit.setbacks, setback.note]
        fit.load_state_dict(state)
        fit.setbacks = setbacks
        setback.remedy(fit)
        logger.warning("%s", setback.note)


def run_together(
    fits: Sequence[Fit],
    until_step: int,
    on_step: Callable[[Fit, dict[str, Tensor]], None] | None = None,
) -> list[UserError | None]:
    """Optimises fits that are at one step to another, as `optimization.run_together` does.

    A stretch of steps in which any of them fails begins again with one fit after the other, each under the
    guards of `run`. Where memory runs out, half as many run together from there on.

    Returns why each fit was given up; None for those that were not.
    """
    if len(fits) == 1:
        return [_run_alone(fits[0], until_step, on_step)]
    given_up: list[UserError | None] = [None] * len(fits)
    at_once = len(fits)
    while behind := [i for i, fit in enumerate(fits) if fit.step < until_step and not given_up[i]]:
        stop = min(until_step, fits[behind[0]].step + SNAPSHOT_STEPS)
        for group in [behind[first : first + at_once] for first in range(0, len(behind), at_once)]:
            states = [fits[i].state_dict() for i in group]
            trouble, out_of_memory = _try_together([fits[i] for i in group], stop, on_step)
            if not trouble:
                continue
            _free_memory()
            if out_of_memory and at_once > 1:
                at_once //= 2
                logger.warning("out of memory; from here on %d fits run together", at_once)
            for i, state in zip(group, states, strict=True):
                fits[i].load_state_dict(state)
                given_up[i] = _run_alone(fits[i], stop, on_step)
    return given_up


def is_out_of_memory(error: BaseException) -> bool:
    """PyTorch has a type of its own for it on a GPU and none on a CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def _try_steps(fit: Fit, until_step: int, on_step: Callable | None) -> Setback | None:
    """Takes steps. None if all went well. Raises UserError if there is nothing more to try."""
    try:
        fit.run(until_step, on_step)
        if fit.scene.parameters.is_finite():
            return None
        raise FloatingPointError("the parameters are not finite")
    except (FloatingPointError, NoGaussiansLeft) as error:
        remedy = functools.partial(Fit.slow_down, caution=fit.caution + 1)
        done = "went on from the last snapshot with other random numbers at half the learning rates"
        reason, advice = str(error).partition(";")[0], "do the views and the cameras belong together?"
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        count = fit.num_gaussians // 2
        if count < FEWEST_GAUSSIANS:
            raise UserError(
                f"out of memory with only {fit.num_gaussians} Gaussians; give fewer or smaller views"
            ) from None
        remedy = functools.partial(Fit.limit, max_gaussians=count)
        done = f"went on from the last snapshot with at most {count} Gaussians"
        reason, advice = f"out of memory with {fit.num_gaussians} Gaussians", "give fewer or smaller views"
    if len(fit.setbacks) == MAX_SETBACKS:
        raise UserError(f"step {fit.step}: {reason}, after {MAX_SETBACKS} fresh attempts; {advice}")
    return Setback(f"step {fit.step}: {reason}; {done}", remedy)


def _try_together(fits: Sequence[Fit], stop: int, on_step: Callable | None) -> tuple[bool, bool]:
    """Whether anything went wrong in any of them, and whether it was memory that ran out."""
    try:
        optimization.run_together(fits, stop, on_step)
        return not all(fit.scene.parameters.is_finite() for fit in fits), False
    except (FloatingPointError, NoGaussiansLeft):
        return True, False
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return True, True


def _run_alone(fit: Fit, stop: int, on_step: Callable | None) -> UserError | None:
    try:
        run(fit, stop, on_step and (lambda step, losses: on_step(fit, losses)))
    except UserError as error:
        return error
    return None


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

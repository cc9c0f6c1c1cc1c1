"""The schedule of flow matching that diffusers' scheduler_config.json describes, and what it samples with.

`config.schedule.kind = "diffusers"` with a `path` takes the schedule from the directory `scheduler` of a
pipeline. Solver and spacing stay those of the config; `read` says which are the scheduler's own. What such a
file asks for and is not done here is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from im3d_jax.diffusion import schedules
from im3d_jax.settings import Solver, Spacing
from recon_torch import text_files
from recon_torch.errors import UserError, quoted

FILE = "scheduler_config.json"

OTHER_LEVELS: dict[str, tuple[Any, ...]] = dict.fromkeys(
    ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"), (False,)
)
"""Options that spread the noise levels in ways that there are not here; false is what is done."""

EULER = OTHER_LEVELS | {
    "invert_sigmas": (False,),
    "shift_terminal": (None,),
    "stochastic_sampling": (False,),
    "use_dynamic_shifting": (False, True),
    "time_shift_type": tuple(schedules.TokenRule),
}
MULTISTEP = OTHER_LEVELS | {
    "use_flow_sigmas": (True,),
    "prediction_type": ("flow_prediction",),
    "use_dynamic_shifting": (False,),
    "thresholding": (False,),
    "lower_order_final": (True,),
    "final_sigmas_type": ("zero",),
    "shift_terminal": (None,),
    "sigma_min": (None,),
    "sigma_max": (None,),
}
UNIPC = MULTISTEP | {
    "solver_order": (2,),
    "solver_type": ("bh2",),
    "predict_x0": (True,),
    "disable_corrector": ([],),
    "solver_p": (None,),
}
DPM = MULTISTEP | {
    "solver_order": (1, 2),
    "solver_type": ("midpoint",),
    "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
    "euler_at_final": (False,),
    "variance_type": (None,),
}
HONOURED: dict[str, dict[str, tuple[Any, ...]]] = {
    "FlowMatchEulerDiscreteScheduler": EULER,
    "UniPCMultistepScheduler": UNIPC,
    "DPMSolverMultistepScheduler": DPM,
}
"""By class: the values that options may have."""

OF_EULER = frozenset(
    ("num_train_timesteps", "shift", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
)
OF_MULTISTEP = frozenset(
    ("num_train_timesteps", "flow_shift")
    + ("beta_start", "beta_end", "beta_schedule", "trained_betas", "timestep_spacing", "steps_offset")
    + ("rescale_betas_zero_snr", "dynamic_thresholding_ratio", "sample_max_value", "lambda_min_clipped")
    + ("time_shift_type",)  # of a multistep scheduler, which has no dynamic shift here
)
"""Numbers of which the schedule is made, and what the multistep schedulers do not read with flow sigmas."""


class Published(NamedTuple):
    """What a scheduler does: `kwargs` are those of `schedules.flow`."""

    kwargs: dict[str, Any]
    solver: Solver
    spacing: Spacing


def read(path: str, num_tokens: int | None = None) -> Published:
    """What the scheduler in a directory does.

    num_tokens: of one sample, which a scheduler with a dynamic shift needs.

    Raises UserError for a file that is not there, a scheduler that is not one of flow matching, an option
    that is not honoured here, and a number of tokens that is missing or not read.
    """
    file = Path(path) / FILE
    if not file.is_file():
        raise UserError(f"config.schedule.path: no {FILE} in {path!r}; give the scheduler's directory")
    found = text_files.read_json(file)
    kind = found.get("_class_name") if isinstance(found, dict) else None
    if kind not in HONOURED:
        raise UserError(
            f"config.schedule.path: {file} is of {quoted(kind)}; there is {', '.join(HONOURED)}, or write the"
            " schedule into the config"
        )
    options = {name: value for name, value in found.items() if not name.startswith("_")}
    _check(file, kind, options)
    return Published(_schedule(file, options, num_tokens), *_sampling(kind, options))


def _check(file: Path, kind: str, options: Mapping[str, Any]) -> None:
    """Raises UserError for the first option that is not honoured here."""
    honoured = HONOURED[kind]
    is_euler = honoured is EULER
    for name, value in options.items():
        if name in honoured and value not in honoured[name]:
            taken = " or ".join(repr(str(each) if isinstance(each, str) else each) for each in honoured[name])
            raise UserError(
                f"config.schedule.path: {file} has {name} {quoted(value)}, and here is only {taken}; write"
                " the schedule into the config if you can do without it"
            )
        if name not in honoured and name not in (OF_EULER if is_euler else OF_MULTISTEP):
            raise UserError(
                f"config.schedule.path: {file} has {name} {quoted(value)}, which is not known here"
            )
    # What these classes do where the file does not say so is not flow matching.
    for name in () if is_euler else ("use_flow_sigmas", "prediction_type"):
        if name not in options:
            raise UserError(f"config.schedule.path: {file} lacks {name}, so this is not one of flow matching")


def _schedule(file: Path, options: Mapping[str, Any], num_tokens: int | None) -> dict[str, Any]:
    """The arguments of `schedules.flow`."""
    is_dynamic = options.get("use_dynamic_shifting", False)
    if is_dynamic and num_tokens is None:
        raise UserError(
            f"config.schedule.path: the shift of {file} depends on the number of tokens; set"
            " config.schedule.num_tokens to that of one sample"
        )
    if num_tokens is not None and not is_dynamic:
        raise UserError(f"config.schedule.num_tokens: the shift of {file} does not depend on it; remove it")
    kwargs = {"num_steps": options.get("num_train_timesteps", 1000)}
    if not is_dynamic:
        return kwargs | {"shift": options.get("shift", options.get("flow_shift", 1.0))}
    names = {
        "base_shift": "base_shift",
        "max_shift": "max_shift",
        "base_tokens": "base_image_seq_len",
        "max_tokens": "max_image_seq_len",
        "token_rule": "time_shift_type",
    }
    line = {ours: options[theirs] for ours, theirs in names.items() if options.get(theirs) is not None}
    return kwargs | line | {"num_tokens": num_tokens}


def _sampling(kind: str, options: Mapping[str, Any]) -> tuple[Solver, Spacing]:
    """The solver and the spacing that are the scheduler's own."""
    if kind == "UniPCMultistepScheduler":
        return Solver.UNIPC, Spacing.FLOW_UNIPC
    if kind == "FlowMatchEulerDiscreteScheduler":
        return Solver.ODE_1, Spacing.FLOW_EULER
    draws_noise = str(options.get("algorithm_type")).startswith("sde")
    first = (Solver.SDE_1, Solver.SDE_2M) if draws_noise else (Solver.ODE_1, Solver.ODE_2M)
    return first[options.get("solver_order", 2) - 1], Spacing.FLOW_DPM


def diffusers(
    num_steps: schedules.NumSteps,
    path: str,
    num_tokens: schedules.NumTokens | None = None,
    beta_start: schedules.Beta | None = None,
    beta_end: schedules.Beta | None = None,
    zero_terminal_snr: bool | None = None,
) -> schedules.Schedule:
    """The schedule of the diffusers scheduler in the directory `path`.

    num_steps: that of the file. num_tokens: see `read`.
    beta_start, beta_end, zero_terminal_snr: are those of other kinds, which every config has; ignored.

    Raises UserError as `read` does, and for another number of steps.
    """
    kwargs = read(path, num_tokens).kwargs
    if kwargs["num_steps"] != num_steps:
        raise UserError(
            f"config.schedule.num_steps is {num_steps}, and {Path(path) / FILE} has num_train_timesteps"
            f" {quoted(kwargs['num_steps'])}; make it the same"
        )
    return schedules.make_schedule("flow", **kwargs)

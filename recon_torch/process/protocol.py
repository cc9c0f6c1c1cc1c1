"""What the client and the worker say to each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from recon_torch.settings import FitSettings, GateSettings
from recon_torch.views.cameras import Cameras

if TYPE_CHECKING:  # the parent reads this module too, and must not wait for gsplat and lpips
    pass


class Start(NamedTuple):
    cameras: Cameras
    settings: FitSettings
    device: str
    snapshot_path: str
    progress_period_s: float


class SetTargets(NamedTuple):
    views: Float[Tensor, "K H W 3"]
    masks: Float[Tensor, "K H W 1"]


class FitUntil(NamedTuple):
    step: int


class RenderInto(NamedTuple):
    cameras: Cameras
    renders: Float[Tensor, "K H W 3"]
    alphas: Float[Tensor, "K H W 1"]


class Inspect(NamedTuple):
    around: Cameras
    settings: GateSettings


class Export(NamedTuple):
    path: str


class Beat(NamedTuple):
    """Part of a command is done."""


class Notice(NamedTuple):
    """Something that the user must wait for, in one line."""

    text: str
    patience_s: float  # how long the child may be silent now


class Progress(NamedTuple):
    """A step of the optimisation is done."""

    step: int
    losses: dict[str, float]


class Done(NamedTuple):
    step: int
    num_gaussians: int
    notes: list[str]
    result: dict[str, Any]  # of FitUntil the metrics, of Inspect the findings, otherwise empty


class Failed(NamedTuple):
    by_user: bool  # `text` is a UserError's line, otherwise a traceback
    text: str


Command = Start | SetTargets | FitUntil | RenderInto | Inspect | Export

Answer = Done | Failed

Reply = Beat | Notice | Progress | Answer

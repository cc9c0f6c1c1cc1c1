"""The messages between the client and the worker.

The client sends one command at a time. The worker answers it with any number of `Progress`, `Beat` and
`Notice`, and then with one `Done` or `Failed`:

    Start         build a `Fit` for a new asset; take its state from the snapshot if there is one
    SetTargets    read the views and masks that the client has written into shared memory
    FitUntil      optimise to the given step, with a snapshot every `recovery.SNAPSHOT_STEPS`
    RenderInto    render cameras into shared memory
    Inspect       judge the fit by the gates of `recon_torch.fit.quality`
    Export        write the object to a file

Only plain values go through the pipe. A shared tensor crosses it as a handle of some hundred bytes, whatever
the size of the tensor.

`Progress` and `Beat` are sent by the work itself and never by a thread of their own, so silence means that
the worker has stalled. The worker ends when its end of the pipe does, so whatever ends the client ends it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float32
from torch import Tensor

from recon_torch.settings import ExportSettings, FitSettings, GateSettings, MeshSettings
from recon_torch.views.cameras import Cameras


class Start(NamedTuple):
    cameras: Cameras
    settings: FitSettings
    device: str
    snapshot_path: str
    progress_period_s: float  # the least time between two `Progress`


class SetTargets(NamedTuple):
    views: Float[Tensor, "K H W 3"]
    masks: Float[Tensor, "K H W 1"]
    weights: list[float] | None = None  # of each view in the loss; None: all have 1


class FitUntil(NamedTuple):
    step: int


class RenderInto(NamedTuple):
    cameras: Cameras
    renders: Float[Tensor, "K H W 3"]
    alphas: Float[Tensor, "K H W 1"]


class Inspect(NamedTuple):
    around: Cameras  # on a closed orbit, view 0 first
    settings: GateSettings
    excursions: Float32[np.ndarray, " K"] | None


class Export(NamedTuple):
    path: str
    settings: ExportSettings
    mesh: MeshSettings  # for a scene that is one


class Beat(NamedTuple):
    """A part of the command is done."""


class Notice(NamedTuple):
    """Something that the user has to wait for, in one line."""

    text: str
    patience_s: float  # how long the worker may be silent now


class Progress(NamedTuple):
    """A step of the optimisation is done."""

    step: int
    losses: dict[str, float]


class Done(NamedTuple):
    step: int
    num_gaussians: int
    notes: list[str]
    result: dict[str, Any]  # the metrics after FitUntil, the judgement after Inspect, otherwise empty


class Failed(NamedTuple):
    by_user: bool  # whether `text` is the line of a UserError; otherwise it is a traceback
    text: str


Command = Start | SetTargets | FitUntil | RenderInto | Inspect | Export

Answer = Done | Failed

Reply = Beat | Notice | Progress | Answer

"""The worker owns the Gaussians and the memory of the fit. It obeys the commands of `protocol`.

It runs in the process that `child` begins; `client` is the other end.
"""

from __future__ import annotations

import dataclasses
import io
import math
import os
import time
import traceback
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch

from recon_torch.errors import UserError
from recon_torch.files import replacing
from recon_torch.fit import export, quality, recovery
from recon_torch.fit.optimization import Fit
from recon_torch.process.protocol import (
    Answer,
    Beat,
    Command,
    Done,
    Export,
    Failed,
    FitUntil,
    Inspect,
    Notice,
    Progress,
    RenderInto,
    Reply,
    SetTargets,
    Start,
)
from recon_torch.raster import gsplat_kernels
from recon_torch.settings import Engine, Representation
from recon_torch.settings import Start as FirstShape
from recon_torch.views import axes

RENDER_CHUNK_VIEWS = 8  # views between two signs of life

WARM_UP_GAUSSIANS = 64

OUT_OF_MEMORY = "the 3D worker is out of memory; give fewer or smaller views"


@runtime_checkable
class Pipe(Protocol):
    """Where replies go: a `multiprocessing` connection, or what a test puts in its place."""

    def send(self, reply: Reply) -> None: ...


class Worker:
    """Obeys commands: one `Fit` after the other, each begun by a `Start`."""

    _fit: Fit

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe
        self._notes: list[str] = []
        self._warm = False
        self._snapshot_path = ""
        self._progress_period_s = 0.0
        self._last_progress_s = -math.inf

    def serve(self, commands: Iterator[Command]) -> None:
        """Answers each command. No exception ends the worker."""
        for command in commands:
            try:
                result = self._obey(command)
                notes = self._fit.notes + self._fit.setbacks + self._notes
                reply: Answer = Done(self._fit.step, self._fit.num_gaussians, notes, result)
            except UserError as error:
                reply = Failed(by_user=True, text=str(error))
            except Exception as error:
                out_of_memory = recovery.is_out_of_memory(error)
                text = OUT_OF_MEMORY if out_of_memory else traceback.format_exc()
                reply = Failed(by_user=out_of_memory, text=text)
            self._pipe.send(reply)

    def _obey(self, command: Command) -> dict[str, Any]:
        """Returns the `result` of `Done`."""
        match command:
            case Start():
                self._start(command)
            case SetTargets(views, masks, weights):
                self._fit.set_targets(views, masks, weights)
            case FitUntil(step):
                return self._fit_until(step)
            case RenderInto():
                self._render_into(command)
            case Inspect():
                return self._inspect(command)
            case Export():
                self._export(command)
        return {}

    def _start(self, command: Start) -> None:
        if not self._warm:
            self._warm_up(command)
            self._warm = True
        self._fit = Fit(command.cameras, command.settings, torch.device(command.device))
        self._notes = []
        self._snapshot_path = command.snapshot_path
        self._progress_period_s = command.progress_period_s
        if os.path.exists(self._snapshot_path):
            self._fit.load_state_dict(torch.load(self._snapshot_path, weights_only=True))

    def _warm_up(self, command: Start) -> None:
        """Takes a step of a small fit, which compiles kernels and loads LPIPS while the parent samples."""
        self.load_kernels(command)
        cameras = command.cameras[:1]
        settings = dataclasses.replace(
            command.settings, num_gaussians=WARM_UP_GAUSSIANS, start=FirstShape.BALL
        )
        fit = Fit(cameras, settings, torch.device(command.device))
        views = torch.ones(1, cameras.height, cameras.width, 3)
        fit.set_targets(views, views[..., :1])
        fit.run(1)

    def load_kernels(self, command: Start) -> None:
        """Loads gsplat's kernels if the fit needs them; tells the client if they have to be compiled."""
        settings = command.settings
        may_use_gsplat = settings.engine in (Engine.AUTO, Engine.GSPLAT)
        is_drawn_by_gsplat = settings.representation == Representation.GAUSSIANS and may_use_gsplat
        if torch.device(command.device).type == "cuda" and is_drawn_by_gsplat:
            patience_s = gsplat_kernels.COMPILE_TIMEOUT_S
            gsplat_kernels.load(lambda text: self._pipe.send(Notice(text, patience_s)))

    def _fit_until(self, step: int) -> dict[str, float]:
        recovery.run(self._fit, step, self._on_step, self._on_snapshot)
        return self._fit.metrics()

    def _export(self, command: Export) -> None:
        settings = command.settings
        file_axes = axes.chosen(settings.axes)
        written = self._fit.scene.save(command.path, file_axes=file_axes, mesh=command.mesh)
        self._notes += export.export_beside(written, settings.formats, axes.UPRIGHT)

    def _inspect(self, command: Inspect) -> dict[str, Any]:
        around, settings, excursions = command
        return quality.inspect(self._fit, around, settings=settings, excursions=excursions)

    def _on_step(self, step: int, losses: dict[str, Any]) -> None:
        now_s = time.monotonic()
        if now_s - self._last_progress_s >= self._progress_period_s:
            self._last_progress_s = now_s
            self._pipe.send(Progress(step, {name: float(value) for name, value in losses.items()}))

    def _on_snapshot(self, state: dict[str, Any]) -> None:
        content = io.BytesIO()  # for a full disk torch.save raises no error that could be told from others
        torch.save(state, content)
        try:
            with replacing(self._snapshot_path) as temporary:
                temporary.write_bytes(content.getbuffer())
        except UserError as error:  # the disk is full, which the fit itself does not need
            note = f"a death of the 3D worker would have cost more than it should: {error}"
            if note not in self._notes:
                self._notes.append(note)
        self._pipe.send(Beat())

    def _render_into(self, command: RenderInto) -> None:
        for first in range(0, len(command.cameras), RENDER_CHUNK_VIEWS):
            chunk = slice(first, first + RENDER_CHUNK_VIEWS)
            render = self._fit.render(command.cameras[chunk])
            command.renders[chunk].copy_(render.rgb)
            command.alphas[chunk].copy_(render.alpha)
            if command.renders.is_cuda:
                torch.cuda.synchronize()  # the client does not wait for this process's stream
            self._pipe.send(Beat())

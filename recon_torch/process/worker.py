"""The child process that owns the Gaussians and the memory of the fit. `client` is its other end.

The protocol. The parent sends one command at a time; the child answers it with any number of `Progress`,
`Beat` and `Notice` and then one `Done` or `Failed`.

    Start         build a `Fit` for a new asset; take its state from the snapshot if there is one
    SetTargets    read the views and masks that the parent has written into shared memory
    FitUntil      optimise to the given step, with a snapshot every `recovery.SNAPSHOT_STEPS`
    RenderInto    render cameras into shared memory
    Inspect       judge the fit by `recon_torch.fit.quality`
    Export        write the object to a file

Only plain values go through the pipe. A shared tensor crosses as its handle, some hundred bytes whatever its
size. The child ends when its end of the pipe does, so whatever ends the parent ends the child.

`Progress` and `Beat` come from the work itself, never from a free thread, so silence means a stalled child.
"""

from __future__ import annotations

import ctypes
import dataclasses
import faulthandler
import io
import math
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from recon_torch.errors import UserError
from recon_torch.files import replacing
from recon_torch.fit import recovery
from recon_torch.raster import gsplat_kernels
from recon_torch.settings import GateSettings
from recon_torch.views.cameras import Cameras

if TYPE_CHECKING:  # the parent reads this module too, and must not wait for gsplat and lpips
    from multiprocessing.connection import Connection

    from recon_torch.fit.optimization import Fit
from recon_torch.process.protocol import (
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
    SetTargets,
    Start,
)

RENDER_CHUNK_VIEWS = 8  # one beat per chunk

WARM_UP_GAUSSIANS = 64

OUT_OF_MEMORY = "the 3D worker is out of memory; give fewer or smaller views"

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(pipe: Connection, log_path: str, num_threads: int | None, follow_parent: bool) -> None:
    """The child's life: read commands from `pipe` until it ends.

    log_path: takes everything that is printed, for the parent to quote when the child dies.
    num_threads: of torch and numba; None leaves them all cores.
    follow_parent: have the kernel end this process with the thread that started it (Linux). The end of the
        pipe does the same later and everywhere, unless a lock or a signal keeps this process from running.
    """
    if follow_parent and sys.platform == "linux":
        _end_with_parent()
    _divert_output(log_path)
    for stop in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C and schedulers reach the whole group
        signal.signal(stop, signal.SIG_IGN)  # the parent decides
    _limit_threads(num_threads)
    from recon_torch.fit.optimization import (
        Fit,  # takes seconds, and must be over when the reader starts to unpickle
    )

    commands = queue.SimpleQueue()
    threading.Thread(target=_read, args=(pipe, commands), daemon=True).start()
    Worker(Fit, pipe).serve(iter(commands.get, None))


def _end_with_parent() -> None:
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != multiprocessing.parent_process().pid:  # it died before the call
        os._exit(1)


def _divert_output(log_path: str) -> None:
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard_output in (1, 2):
        os.dup2(log, standard_output)
    faulthandler.enable(all_threads=False)  # a crash in C code prints its Python stack
    faulthandler.register(signal.SIGUSR1)  # the parent asks a stalled child where it stands


def _limit_threads(num_threads: int | None) -> None:
    if num_threads is None:
        return
    torch.set_num_threads(num_threads)
    os.environ["NUMBA_NUM_THREADS"] = str(num_threads)  # which is not loaded yet


def _read(pipe: Connection, commands: queue.SimpleQueue) -> None:
    """Passes commands on; ends the process, whatever it is doing, when the parent is gone or has closed."""
    try:
        while True:
            commands.put(pipe.recv())
    except (EOFError, ConnectionError):
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


class Worker:
    """One `Fit` after the other, driven by commands."""

    def __init__(self, new_fit: Callable[..., Fit], pipe: Connection) -> None:
        self._new_fit = new_fit
        self._pipe = pipe
        self._fit: Fit | None = None
        self._notes: list[str] = []
        self._warm = False
        self._snapshot_path = ""
        self._progress_period_s = 0.0
        self._last_progress_s = -math.inf

    def serve(self, commands: Iterator[Command]) -> None:
        for command in commands:
            try:
                result = self._obey(command) or {}
                notes = self._fit.notes + self._fit.setbacks + self._notes
                reply = Done(self._fit.step, self._fit.num_gaussians, notes, result)
            except UserError as error:
                reply = Failed(by_user=True, text=str(error))
            except Exception as error:
                out_of_memory = recovery.is_out_of_memory(error)
                text = OUT_OF_MEMORY if out_of_memory else traceback.format_exc()
                reply = Failed(by_user=out_of_memory, text=text)
            self._pipe.send(reply)

    def _obey(self, command: Command) -> dict[str, Any] | None:
        match command:
            case Start():
                self._start(command)
            case SetTargets(views, masks):
                self._fit.set_targets(views, masks)
            case FitUntil(step):
                return self._fit_until(step)
            case RenderInto():
                self._render_into(command)
            case Inspect(around, settings):
                return self._inspect(around, settings)
            case Export(path):
                self._fit.scene.save(path)

    def _start(self, command: Start) -> None:
        if not self._warm:
            self._warm_up(command)
            self._warm = True
        self._fit = self._new_fit(command.cameras, command.settings, torch.device(command.device))
        self._notes = []
        self._snapshot_path = command.snapshot_path
        self._progress_period_s = command.progress_period_s
        if os.path.exists(self._snapshot_path):
            self._fit.load_state_dict(torch.load(self._snapshot_path, weights_only=True))

    def _warm_up(self, command: Start) -> None:
        """A step of a small fit: compiles kernels and loads LPIPS while the parent still samples."""
        self._load_kernels(command)
        cameras = command.cameras[:1]
        settings = dataclasses.replace(command.settings, num_gaussians=WARM_UP_GAUSSIANS)
        fit = self._new_fit(cameras, settings, torch.device(command.device))
        views = torch.ones(1, cameras.height, cameras.width, 3)
        fit.set_targets(views, views[..., :1])
        fit.run(1)

    def _load_kernels(self, command: Start) -> None:
        settings = command.settings
        is_drawn_by_gsplat = settings.representation == "gaussians" and settings.engine in ("auto", "gsplat")
        if torch.device(command.device).type == "cuda" and is_drawn_by_gsplat:
            patience_s = gsplat_kernels.COMPILE_TIMEOUT_S
            gsplat_kernels.load(lambda text: self._pipe.send(Notice(text, patience_s)))

    def _fit_until(self, step: int) -> dict[str, float]:
        recovery.run(self._fit, step, self._on_step, self._on_snapshot)
        return self._fit.metrics()

    def _inspect(self, around: Cameras, settings: GateSettings) -> dict[str, Any]:
        from recon_torch.fit import quality  # which the parent, who reads this module too, need not wait for

        return quality.inspect(self._fit, around, settings=settings)

    def _on_step(self, step: int, losses: dict[str, Any]) -> None:
        now_s = time.monotonic()
        if now_s - self._last_progress_s >= self._progress_period_s:
            self._last_progress_s = now_s
            self._pipe.send(Progress(step, {name: float(value) for name, value in losses.items()}))

    def _on_snapshot(self, state: dict[str, Any]) -> None:
        content = io.BytesIO()  # torch.save itself has no error of its own for a full disk
        torch.save(state, content)
        try:
            with replacing(self._snapshot_path) as temporary:
                temporary.write_bytes(content.getbuffer())
        except UserError as error:  # a full disk; the fit itself needs none
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
                torch.cuda.synchronize()  # the other process does not wait for this one's stream
            self._pipe.send(Beat())

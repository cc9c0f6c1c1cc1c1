"""The client of the worker process that owns the Gaussians: the diffusion side drives the 3D side by it.

    with ReconClient(cameras, FitSettings()) as client:    # returns at once; the worker loads meanwhile
        client.views.copy_(views)
        client.masks.copy_(masks)
        client.set_targets()
        client.fit(500)
        client.render()                                    # into client.renders and client.alphas
        client.export("asset.ply")

The tensors are shared memory (CUDA memory on a GPU) that this process allocates and keeps, so they outlive
the worker: when that dies or falls silent, another one starts from its last snapshot and repeats the command.
Importing this module costs torch alone; gsplat, lpips and numba load in the worker.
"""

from __future__ import annotations

import contextlib
import logging
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from recon_torch import locks
from recon_torch.errors import UserError, first_line
from recon_torch.files import refusal
from recon_torch.process import child, protocol
from recon_torch.settings import ExportSettings, FitSettings, GateSettings, MeshSettings
from recon_torch.views.cameras import Cameras

WORKER_NAME = "recon_torch.process.worker"
EXIT_UNGUARDED = 78
"""Exit code of a worker that runs the script of its parent again and would start a worker itself."""

MAX_DEATHS = 2  # how many workers may die before an asset is given up
QUOTED_LOG_LINES, QUOTED_LOG_COLUMNS = (
    40,
    160,
)  # shown of a dead worker's output; a Python stack fits
NAMES_ERROR = re.compile(r"Fatal Python error:|[\w.]*(Error|Exception)\b")
CLOSE_TIMEOUT_S = 2.0
SHARED_MEMORY = "/dev/shm"
SNAPSHOTS = "recon_"
"""How the names of the directories of snapshots begin."""

R = TypeVar("R")

logger = logging.getLogger(__name__)


class WorkerDied(UserError):
    """The worker has died twice on one asset. The message says how; `details` is what it last printed.

    Nearly always the system has killed it for want of memory, so that it is no bug of ours.
    """

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details


class WorkerFailed(RuntimeError):
    """The worker has raised an exception that no user caused. The message is its traceback."""


class ReconClient:
    """A `ReconstructionClient` by a worker process, and the tensors that the two share.

    It is a context manager that ends the worker. Calls block until the worker is done.

    Attributes:
        views, masks: the targets, float32 in [0, 1]; write them, then call `set_targets`.
        renders, alphas: what the last `render` wrote.
        step, num_gaussians: of the fit, as last heard.
    """

    views: Float[Tensor, "K H W 3"]
    masks: Float[Tensor, "K H W 1"]
    renders: Float[Tensor, "K2 H2 W2 3"]
    alphas: Float[Tensor, "K2 H2 W2 1"]
    _targets: protocol.SetTargets | None = None

    def __init__(
        self,
        cameras: Cameras,
        settings: FitSettings,
        *,
        snapshot_dir: str | os.PathLike | None = None,
        device: str = "auto",
        num_threads: int | None = None,
        progress_period_s: float = 0.2,
        stall_timeout_s: float = 300.0,
        startup_timeout_s: float = 600.0,
    ) -> None:
        """Starts the worker and returns; the first call that needs it waits for it.

        snapshot_dir: where the private directory of the snapshots is made; `close` removes it. None: the
            system's directory for temporary files.
        device: of the fit and the tensors; "auto" is "cuda" where there is one, otherwise "cpu".
        num_threads: of the worker; None is all cores, as this process idles while the worker fits.
        progress_period_s: the least time between two calls of `on_progress`; 0 reports every step.
        stall_timeout_s: a worker that is silent for so long counts as dead. A healthy one is silent longest
            while it computes LPIPS of all views, for a minute or so at 512 px on a CPU.
        startup_timeout_s: the same while the worker imports, compiles the CPU's kernels and loads LPIPS. If
            gsplat's kernels must be compiled, a line on stderr says so, and the worker may be silent for
            `gsplat_kernels.COMPILE_TIMEOUT_S`.
        Raises UserError if the snapshot directory cannot be made or shared memory is too small.
        """
        leave_if_worker()
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._device = torch.device(device)
        self._num_threads = num_threads
        self._progress_period_s = progress_period_s
        self.stall_timeout_s = stall_timeout_s
        self.startup_timeout_s = startup_timeout_s
        self._directory = _private_directory(snapshot_dir)
        self._process: _Process | None = None
        self.views = self.masks = self.renders = self.alphas = torch.empty(0)
        try:
            self._begin(cameras, settings)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> ReconClient:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """The worker's process id; None while there is none."""
        return self._process.pid if self._process else None

    @property
    def notes(self) -> list[str]:
        """What a report on this asset should mention: the fit's own notes, and the deaths of workers."""
        return self._fit_notes + self._deaths

    def reset(self, cameras: Cameras | None = None, settings: FitSettings | None = None) -> None:
        """Begins a new asset in the same process; what is not given stays as it was. Returns at once.

        `views` and `masks` are other tensors afterwards if the number of views or their size changed.
        """
        if self._process and not self._ready:
            self._insist(lambda process: None)  # its answer must not be taken for one about the new asset
        self._begin(cameras or self._cameras, settings or self._settings)

    def set_targets(self, weights: Sequence[float] | None = None) -> None:
        """Makes the fit follow what `views` and `masks` hold now. Raises UserError if that is not finite.

        weights: of each view in the loss; None: all have 1.
        """
        targets = protocol.SetTargets(self.views, self.masks, None if weights is None else list(weights))
        self._call(targets)
        self._targets = targets

    def fit(
        self, until_step: int, on_progress: Callable[[int, dict[str, float]], None] | None = None
    ) -> dict[str, float]:
        """Optimises until the fit has done `until_step` steps in all.

        on_progress: called here as on_progress(step, losses); steps come again after a worker's death.
        Returns psnr [dB], ssim and lpips between the renders and the targets.
        Raises UserError, WorkerFailed, and WorkerDied after the asset's second death.
        """
        return self._call(protocol.FitUntil(until_step), on_progress).result

    def render(
        self, cameras: Cameras | None = None
    ) -> tuple[Float[Tensor, "K2 H2 W2 3"], Float[Tensor, "K2 H2 W2 1"]]:
        """Renders the fit's own or other cameras into `renders` and `alphas`, and returns these two.

        They are other tensors than before if the number of cameras or their size changed.
        """
        cameras = cameras or self._cameras
        self.renders = self._fitting(self.renders, cameras, 3)
        self.alphas = self._fitting(self.alphas, cameras, 1)
        self._call(protocol.RenderInto(cameras, self.renders, self.alphas))
        return self.renders, self.alphas

    def inspect(
        self,
        settings: GateSettings,
        around: Cameras | None = None,
        excursions: Float32[np.ndarray, " K"] | None = None,
    ) -> dict[str, Any]:
        """What `quality.inspect` says of the fit, which has targets.

        around: cameras on a closed orbit, view 0 first; default: the fit's own.
        excursions: of the masks that the object is judged by; default: of the fit's targets.
        """
        return self._call(protocol.Inspect(around or self._cameras, settings, excursions)).result

    def export(
        self,
        path: str | os.PathLike,
        settings: ExportSettings | None = None,
        mesh: MeshSettings | None = None,
    ) -> None:
        """Writes Gaussians as a .ply of 3DGS, a radiance field as .safetensors, a mesh as mesh.glb.

        settings, mesh: the defaults if None.

        Raises UserError if it cannot be written.
        """
        settings, mesh = settings or ExportSettings(), mesh or MeshSettings()
        self._call(protocol.Export(os.path.abspath(path), settings, mesh))

    def close(self) -> None:
        """Ends the worker, whatever it is doing, and removes its snapshots."""
        self._stop()
        self._directory.cleanup()

    def _begin(self, cameras: Cameras, settings: FitSettings) -> None:
        self._cameras, self._settings = cameras, settings
        self.views = self._fitting(self.views, cameras, 3)
        self.masks = self._fitting(self.masks, cameras, 1)
        self._targets = None
        self.step = self.num_gaussians = 0
        self._fit_notes: list[str] = []
        self._deaths: list[str] = []
        self.snapshot_path.unlink(missing_ok=True)
        with contextlib.suppress(_Gone):  # the first call that needs the worker finds out again, and copes
            self._start()

    def _fitting(self, tensor: Tensor, cameras: Cameras, channels: int) -> Tensor:
        shape = (len(cameras), cameras.height, cameras.width, channels)
        return tensor if tensor.shape == shape else _shared_zeros(shape, self._device)

    @property
    def snapshot_path(self) -> Path:
        """Where the worker keeps the state of the fit, for the next worker if it dies."""
        return self._directory.path / "snapshot.pt"

    def _call(self, command: protocol.Command, on_progress: Callable | None = None) -> protocol.Done:
        """Has the worker obey, or the next one if it dies."""
        return self._accept(self._insist(lambda process: self._exchange(process, command, on_progress)))

    def _insist(self, attempt: Callable[[_Process], R]) -> R:
        """What `attempt` returns for a worker that has started, or for the next one if that dies."""
        while True:
            try:
                return attempt(self._started())
            except _Gone as gone:
                self._mourn(gone)
            except BaseException:  # Ctrl-C or an error in on_progress: the worker is still at it
                self._stop()
                raise

    def _start(self) -> _Process:
        """Sends `Start`, to a new process if there is none. `_started` takes the answer."""
        self._ready = False
        if not self._process:
            self._process = _Process(self._directory.path, self._num_threads)
        self._process.send(
            protocol.Start(
                self._cameras,
                self._settings,
                str(self._device),
                str(self.snapshot_path),
                self._progress_period_s,
            )
        )
        return self._process

    def _started(self) -> _Process:
        """The worker, once it is ready for commands."""
        process = self._process or self._start()
        if not self._ready:
            self._accept(self._await_answer(process.receive, self.startup_timeout_s))
            if self._targets:  # this worker takes the place of a dead one
                self._accept(self._exchange(process, self._targets))
            self._ready = True
        return process

    def _exchange(
        self, process: _Process, command: protocol.Command, on_progress: Callable | None = None
    ) -> protocol.Answer:
        process.send(command)
        return self._await_answer(process.receive, self.stall_timeout_s, on_progress)

    def _await_answer(
        self,
        receive: Callable[[float], protocol.Reply],
        patience_s: float,
        on_progress: Callable | None = None,
    ) -> protocol.Answer:
        while True:
            reply = receive(patience_s)
            if isinstance(reply, protocol.Progress):
                self.step = reply.step
                if on_progress:
                    on_progress(reply.step, reply.losses)
            elif isinstance(reply, protocol.Notice):
                print(f"im3d: {reply.text}", file=sys.stderr, flush=True)
                patience_s = max(patience_s, reply.patience_s)
            elif not isinstance(reply, protocol.Beat):
                return reply

    def _accept(self, answer: protocol.Answer) -> protocol.Done:
        if isinstance(answer, protocol.Failed):
            raise (UserError if answer.by_user else WorkerFailed)(answer.text)
        self.step, self.num_gaussians, self._fit_notes = answer.step, answer.num_gaussians, answer.notes
        return answer

    def _mourn(self, gone: _Gone) -> None:
        """Logs why the worker is gone. Raises WorkerDied if it was the asset's last."""
        self._stop()
        self._deaths.append(f"the 3D worker {gone.cause} at about step {self.step}")
        if len(self._deaths) >= MAX_DEATHS:
            deaths = ", then ".join(self._deaths)
            said = f" ({gone.last_words})" if gone.log else ""
            raise WorkerDied(f"{deaths}{said}; the asset is given up", gone.log) from None
        last_words = f"It last printed:\n{gone.log}" if gone.log else "It printed nothing."
        logger.warning("%s; another one goes on from its snapshot. %s", self._deaths[-1], last_words)

    def _stop(self) -> None:
        if self._process:
            self._process.stop()
            self._process = None


class _Gone(Exception):
    """The worker has died, or has stalled and been killed."""

    def __init__(self, cause: str, log: str) -> None:
        super().__init__(cause)
        self.cause = cause
        self.log = log  # the last lines that it printed

    @property
    def last_words(self) -> str:
        """The line of the log that says most: the last that names an error, or else the last one."""
        lines = self.log.strip().splitlines() or [""]
        return next((line for line in reversed(lines) if NAMES_ERROR.match(line)), lines[-1])


class _Process:
    """One worker process, from its start to its end: our end of its pipe, and what it prints."""

    def __init__(self, directory: Path, num_threads: int | None) -> None:
        log, self._log_path = tempfile.mkstemp(prefix="worker-", suffix=".log", dir=directory)
        os.close(log)
        context = torch.multiprocessing.get_context("spawn")  # neither CUDA nor JAX survives a fork
        self._pipe, child_pipe = context.Pipe()
        # The kernel tells of the end of the thread that started the child, not of the whole parent.
        follow_parent = threading.current_thread() is threading.main_thread()
        self._process = context.Process(
            target=child.main,
            args=(child_pipe, self._log_path, num_threads, follow_parent),
            name=WORKER_NAME,
            daemon=True,
        )
        with _main_as_it_can_be_run():
            self._process.start()
        pid = self._process.pid
        assert pid is not None, "a process that has started has an id"
        self.pid = pid
        child_pipe.close()

    def send(self, command: protocol.Command) -> None:
        try:
            self._pipe.send(command)
        except ConnectionError:
            raise self._gone() from None

    def receive(self, patience_s: float) -> protocol.Reply:
        # Short waits, so that the time for which this process itself was suspended counts as one of them.
        num_waits = math.ceil(patience_s)
        try:
            if any(self._pipe.poll(patience_s / num_waits) for _ in range(num_waits)):
                return self._pipe.recv()
        except (EOFError, ConnectionError):
            raise self._gone() from None
        raise self._stalled(patience_s)

    def stop(self) -> None:
        """The end of the pipe ends the worker; one that cannot even notice that is killed."""
        self._pipe.close()
        self._process.join(CLOSE_TIMEOUT_S)
        self._process.kill()
        self._process.join()
        self._process.close()

    def _gone(self) -> _Gone | UserError:
        self._process.join(CLOSE_TIMEOUT_S)
        code = self._process.exitcode
        if code == EXIT_UNGUARDED:
            return UserError(
                "the 3D worker runs this script again from its top: put what makes assets under"
                ' `if __name__ == "__main__":`'
            )
        if code is None:
            cause = "closed its pipe"
        elif code < 0:
            hint = " (the system does that when memory runs out)" if -code == signal.SIGKILL else ""
            cause = f"was killed by {signal.Signals(-code).name}{hint}"
        else:
            cause = f"ended with exit code {code}"
        return _Gone(cause, self._last_lines())

    def _stalled(self, silence_s: float) -> _Gone:
        os.kill(self.pid, signal.SIGUSR1)  # it prints where it stands, if it can
        time.sleep(0.5)
        self._process.kill()
        return _Gone(f"was silent for {silence_s:g} s", self._last_lines())

    def _last_lines(self) -> str:
        lines = Path(self._log_path).read_text(errors="replace").splitlines()
        return "\n".join(line[:QUOTED_LOG_COLUMNS] for line in lines[-QUOTED_LOG_LINES:])


def leave_if_worker() -> None:
    """Ends this process if it is a worker that runs the script of its parent again.

    A spawned process first runs the main script of its parent, without what is under `if __name__ ==
    "__main__":`. A script without that line would load its models in every worker and start workers there.
    The parent recognises the exit code, and says what to do.
    """
    if multiprocessing.current_process().name == WORKER_NAME:
        os._exit(EXIT_UNGUARDED)


@contextlib.contextmanager
def _main_as_it_can_be_run() -> Iterator[None]:
    """Hides the file name of a main script that came from standard input, for which a worker would look."""
    main = sys.modules["__main__"]
    path = getattr(main, "__file__", None)
    if path is None or os.path.exists(path):
        yield
        return
    del main.__file__
    try:
        yield
    finally:
        main.__file__ = path


def _private_directory(parent: str | os.PathLike | None) -> locks.OwnedDirectory:
    try:
        if parent is None:
            parent = locks.process_directory()
        else:
            locks.clear(parent, SNAPSHOTS)
        return locks.OwnedDirectory(SNAPSHOTS, parent)
    except OSError as error:
        raise UserError(
            f"cannot keep snapshots in {parent or 'the directory for temporary files'}: {error.strerror};"
            " choose another snapshot_dir, or TMPDIR"
        ) from error


def _shared_zeros(shape: tuple[int, ...], device: torch.device) -> Tensor:
    if device.type == "cuda":  # CUDA memory is shared when its handle is sent
        return torch.zeros(shape, device=device)
    needed_mib = 4 * torch.Size(shape).numel() / 2**20
    if os.path.isdir(SHARED_MEMORY):  # beyond its limit the first write would be a bus error
        free_mib = shutil.disk_usage(SHARED_MEMORY).free / 2**20
        if needed_mib > free_mib:
            raise UserError(
                f"{SHARED_MEMORY} has {free_mib:.1f} MiB left and the views need {needed_mib:.1f} MiB: "
                "enlarge it (docker run --shm-size=1g)"
            )
    try:
        return torch.zeros(shape).share_memory_()
    except RuntimeError as error:  # read-only, not permitted, or beyond a limit on the size of files
        reason = refusal(error) or first_line(error, 200)
        raise UserError(
            f"cannot share {needed_mib:.1f} MiB with the 3D worker ({reason}): make {SHARED_MEMORY} writable"
            " and large enough, and allow files of that size (ulimit -f)"
        ) from error

"""Several hosts train as one: they start together, agree on settings, stop together and report a hang.

Every host runs the same command, and `jax.distributed` joins their processes. docs/clusters.md shows how
SLURM, GKE and a plain shell start them. The paper leaves this unspecified; it used 80 GPUs for 5 days.

    hosts.initialize(flags)
    hosts.agree({"config": digest, **hosts.versions()})
    with hosts.StopSignal() as stop, hosts.Watchdog(timeout_s=600) as watchdog:
        for step in ...:
            train_step(...)
            watchdog.beat(step)
            if stop.at(step):
                save, and raise SystemExit(hosts.EXIT_REQUEUE)
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import json
import os
import platform
import signal
import socket
import sys
import threading
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import jax
import jaxlib
from jax._src import distributed  # the coordinator's key-value store has no public name; Orbax uses this one
from jax.experimental import multihost_utils

from recon_torch.errors import UserError, first_line
from recon_torch.ranges import whole

EXIT_REQUEUE = 75
"""Exit code of a run that was asked to stop and has saved its state (EX_TEMPFAIL of sysexits.h)."""

EXIT_HUNG = 70
"""Exit code of a process that completed no step within the time limit (EX_SOFTWARE of sysexits.h)."""

CLUSTERS = ("auto", "slurm", "gketpu", "gcetpu")
"""Schedulers from which JAX reads coordinator, process count and process id, by JAX's own names."""

FIRST_SPECIAL_STEP = 0xFFFF_FFF0
"""SLURM numbers from here on what is no step of tasks: 0xFFFFFFFA is the shell that `salloc` opens
(LaunchParameters=use_interactive_step), 0xFFFFFFFB a batch script (SLURM's slurm.h)."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

FIRST_STEP_TIMES = 4
"""The first step includes compilation, so it may take this many times the limit of a later step."""

GRACE_S = 5.0
"""Seconds between the report of a hang and the exit. When process 0 exits, JAX aborts all others, so they
need time to report first."""


def add_flags(parser: ArgumentParser) -> None:
    """Adds the flags that `initialize` reads. Without any of them one process trains alone."""
    group = parser.add_argument_group("several processes", "the same command on every host")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    group.add_argument(
        "--num-processes", type=whole(1, 1_000_000), metavar="N", help="how many processes there are"
    )
    group.add_argument(
        "--process-id", type=whole(0, 999_999), metavar="I", help="which of them this is, from 0"
    )
    group.add_argument("--cluster", choices=CLUSTERS, help="instead: take all three from the scheduler")
    group.add_argument(
        "--connect-timeout-s",
        type=whole(1, 1_000_000),
        default=300,
        help="seconds to wait for the others (300)",
    )


def initialize(flags: Namespace) -> None:
    """Joins the processes of a run. Call it before anything touches a device.

    Raises UserError for flags that are missing or contradict each other, for a scheduler that is not found,
    and for a coordinator that does not answer. If other processes never connect, JAX itself aborts after the
    same time.
    """
    explicit = {
        "--coordinator": flags.coordinator,
        "--num-processes": flags.num_processes,
        "--process-id": flags.process_id,
    }
    missing = [name for name, value in explicit.items() if value is None]
    if flags.cluster and len(missing) < len(explicit):
        raise UserError("--cluster finds the other processes itself: give it or --coordinator, not both")
    if flags.cluster:
        _initialize_by_cluster(flags.cluster, flags.connect_timeout_s)
    elif len(missing) < len(explicit):
        if missing:
            raise UserError(f"several processes need {', '.join(explicit)}; {missing[0]} is missing")
        _initialize_by_address(
            flags.coordinator, flags.num_processes, flags.process_id, flags.connect_timeout_s
        )


def is_slurm_step(environment: Mapping[str, str]) -> bool:
    """Whether SLURM has started this process as one of the tasks of a step, by `srun`.

    The shell that `salloc` opens on a node is a step as well, and so is a batch script, but each is one
    process for the whole allocation, whose number of tasks its environment has.
    """
    number = environment.get("SLURM_STEP_ID", "")
    return number.isdecimal() and int(number) < FIRST_SPECIAL_STEP


def is_main() -> bool:
    """Whether this is process 0, which prints and writes for all."""
    return jax.process_index() == 0


def versions() -> dict[str, str]:
    """What must be equal on all hosts besides the config: SHA-256 of the sources, JAX, Python."""
    root = Path(__file__).parents[2]
    sources = sorted(
        path for package in ("im3d_jax", "recon_torch") for path in root.glob(f"{package}/**/*.py")
    )
    digest = hashlib.sha256()
    for path in sources:
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return {
        "code": digest.hexdigest()[:12],
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "python": platform.python_version(),
    }


def agree(facts: dict[str, str], timeout_s: float = 300.0) -> None:
    """Raises UserError on all processes if their facts differ; the message names the facts and the processes.

    The facts are compared through the coordinator rather than by a collective, because processes whose
    programs differ could wait for each other in a collective for ever.
    """
    client = distributed.global_state.client
    if client is None:
        return
    own = f"im3d/facts/{distributed.global_state.process_id}"
    client.key_value_set(own, json.dumps(facts), allow_overwrite=True)
    try:
        client.wait_at_barrier("im3d/facts", int(timeout_s * 1000))
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"not all processes compared their settings within {timeout_s:g} s: {first_line(error)}"
        ) from None
    found = {
        int(key.rsplit("/", 1)[1]): json.loads(text) for key, text in client.key_value_dir_get("im3d/facts")
    }
    problem = difference([found[process] for process in sorted(found)])
    if problem:
        raise UserError(f"{problem}; start all processes with the same config, code and packages")


@contextlib.contextmanager
def on_main(context: Callable[[], AbstractContextManager], timeout_s: float = 300.0) -> Iterator[None]:
    """Enters a context on process 0, for all. A UserError that this raises is raised on all processes."""
    client, key = distributed.global_state.client, "im3d/main"
    is_first, problem = distributed.global_state.process_id in (0, None), ""
    with contextlib.ExitStack() as entered:
        if is_first:
            try:
                entered.enter_context(context())
            except UserError as error:
                problem = str(error)
        if client is not None:
            if is_first:
                client.key_value_set(key, json.dumps(problem), allow_overwrite=True)
            problem = json.loads(client.blocking_key_value_get(key, int(timeout_s * 1000)))
            client.wait_at_barrier(key, int(timeout_s * 1000))  # or process 0 could end before all have read
        if problem:
            raise UserError(problem)
        yield


def difference(facts: Sequence[dict[str, str]]) -> str | None:
    """Names the facts in which processes differ and which process has which value; None if all are equal."""
    texts = []
    for name in sorted(set().union(*facts)):
        holders: dict[str, list[str]] = {}
        for process, held in enumerate(facts):
            holders.setdefault(held.get(name, "absent"), []).append(str(process))
        if len(holders) > 1:
            values = [
                f"{value} on {', '.join(who[:4])}{', ...' * (len(who) > 4)}" for value, who in holders.items()
            ]
            texts.append(f"{name} ({'; '.join(values)})")
    return f"the processes differ in {', '.join(texts)}" if texts else None


class StopSignal:
    """Turns SIGTERM, SIGUSR1 and Ctrl-C into a stop at the same step on all processes.

    It is enough that one process receives the signal. A second Ctrl-C ends at once, without saving. A second
    SIGTERM or SIGUSR1 changes nothing, because schedulers send theirs repeatedly.
    """

    def __enter__(self) -> StopSignal:
        self._asked = False
        # With several processes JAX chooses the common step, and its own handler of SIGTERM sets that going.
        shared = distributed.global_state.client is not None
        signals = [number for number in STOP_SIGNALS if not (shared and number == signal.SIGTERM)]
        handler = self._pass_on if shared else self._ask
        self._previous = {number: signal.signal(number, handler) for number in signals}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def at(self, step: int) -> bool:
        """Whether to save and stop after `step`. Call it once for every step, on all processes."""
        if distributed.global_state.client is None:
            return self._asked
        return multihost_utils.reached_preemption_sync_point(step)

    def _ask(self, number: int, frame) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True
        # print is not safe here: a handler may run in the middle of another print.
        os.write(2, f"{signal.Signals(number).name}: saves and stops\n".encode())

    def _pass_on(self, number: int, frame) -> None:
        self._ask(number, frame)
        signal.raise_signal(signal.SIGTERM)


class Watchdog:
    """Ends a process that completes no step within `timeout_s`: prints where it hangs, exits with EXIT_HUNG.

    A hang on one host leaves all others waiting in a collective, so every host reports; the host at fault is
    the one whose stack is elsewhere. The clock starts on entering the context, and the first step has more
    time (FIRST_STEP_TIMES). A timeout of 0 switches the watchdog off.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._step: int | None = None
        self._silent_s = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._who = f"host {socket.gethostname()}, process {jax.process_index()} of {jax.process_count()}"
        if self.timeout_s > 0:
            self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._ended.set()

    def beat(self, step: int) -> None:
        """Records that `step` is done."""
        self._step, self._silent_s = step, 0.0

    def _watch(self) -> None:
        # Only time in which this thread ran counts: a job that was suspended for an hour did not hang.
        poll_s = min(1.0, self.timeout_s / 4)
        while not self._ended.wait(poll_s):
            self._silent_s += poll_s
            if self._silent_s >= self.timeout_s * (FIRST_STEP_TIMES if self._step is None else 1):
                self._end()

    def _end(self) -> None:
        since = "the start" if self._step is None else f"step {self._step}"
        print(f"im3d: hung: {self._who}: no step for {self._silent_s:.0f} s since {since}", file=sys.stderr)
        faulthandler.dump_traceback(all_threads=True)
        sys.stderr.flush()
        time.sleep(min(GRACE_S, self.timeout_s))
        os._exit(EXIT_HUNG)


def _initialize_by_cluster(name: str, timeout_s: int) -> None:
    if name in ("auto", "slurm") and "SLURM_STEP_ID" in os.environ and not is_slurm_step(os.environ):
        alone = "this shell is one process for the whole allocation"
        raise UserError(f"--cluster {name}: {alone}; put `srun` before the command, or leave out --cluster")
    method = None if name == "auto" else name
    try:
        jax.distributed.initialize(cluster_detection_method=method, initialization_timeout=timeout_s)
    except (LookupError, ValueError, RuntimeError, OSError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(
            f"--cluster {name}: JAX finds no such cluster here ({reason}); see docs/clusters.md"
        ) from None


def _initialize_by_address(coordinator: str, count: int, process_id: int, timeout_s: int) -> None:
    if not 0 <= process_id < count:
        raise UserError(
            f"--process-id {process_id} is not one of the {count} of --num-processes: 0 to {count - 1}"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"--coordinator {coordinator!r} is not HOST:PORT, such as node001:12345")
    print(f"process {process_id} of {count}: waits for all at {coordinator}", file=sys.stderr, flush=True)
    if process_id != 0:
        _await(host.strip("[]"), int(port), timeout_s)
    try:
        jax.distributed.initialize(coordinator, count, process_id, initialization_timeout=timeout_s)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--coordinator {coordinator}: {first_line(error)}") from None


def _await(host: str, port: int, timeout_s: int) -> None:
    """Waits until the coordinator listens. JAX itself would abort the process with a C++ stack trace."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((host, port), timeout=timeout_s).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"no coordinator at {host}:{port} for {timeout_s} s ({error}); start process 0 there, and"
                    " check --coordinator and the firewall"
                ) from None
        time.sleep(0.5)

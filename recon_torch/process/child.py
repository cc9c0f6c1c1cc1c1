"""How the child process begins: output, signals and threads are arranged before anything heavy is imported.

The client imports this module to start the child, so it must stay light; `worker` does the work.
"""

from __future__ import annotations

import ctypes
import faulthandler
import multiprocessing
import os
import queue
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection

import torch

from recon_torch.process.protocol import Command

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(pipe: Connection, log_path: str, num_threads: int | None, follow_parent: bool) -> None:
    """The whole life of the child: it obeys the commands in `pipe` until that ends.

    log_path: gets everything that is printed, so that the parent can quote it if the child dies.
    num_threads: of torch and numba; None leaves them all cores.
    follow_parent: have the kernel end this process with the thread that started it (Linux). The end of the
        pipe does so everywhere, but later, and not while a lock or a signal keeps this process from running.
    """
    if follow_parent and sys.platform == "linux":
        _end_with_parent()
    _divert_output(log_path)
    for stop in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C and schedulers signal the whole process group
        signal.signal(stop, signal.SIG_IGN)  # and the parent decides what follows
    _limit_threads(num_threads)
    # Only now, as numba reads its environment when it is imported. It takes seconds, and must be over before
    # the reader unpickles commands: two threads that import the same modules may lock each other out.
    from recon_torch.process.worker import Worker

    commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(pipe, commands), daemon=True).start()
    Worker(pipe).serve(iter(commands.get, None))


def _end_with_parent() -> None:
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is None or os.getppid() != parent.pid:  # the parent died before the call
        os._exit(1)


def _divert_output(log_path: str) -> None:
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard_output in (1, 2):
        os.dup2(log, standard_output)
    faulthandler.enable(all_threads=False)  # a crash in C code prints its Python stack
    faulthandler.register(signal.SIGUSR1)  # by which the parent asks a stalled child where it stands


def _limit_threads(num_threads: int | None) -> None:
    if num_threads is None:
        return
    torch.set_num_threads(num_threads)
    os.environ["NUMBA_NUM_THREADS"] = str(num_threads)


def _read(pipe: Connection, commands: queue.SimpleQueue[Command | None]) -> None:
    """Passes commands on. Ends the process, whatever it is doing, when the parent is gone or has closed."""
    try:
        while True:
            commands.put(pipe.recv())
    except (EOFError, ConnectionError):
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)

"""`im3d COMMAND`: finds the command's module and calls its `main(argv)`, nothing else."""

from __future__ import annotations

import difflib
import errno
import importlib
import io
import os
import select
import sys
from typing import Any, NamedTuple

from recon_torch.errors import UserError
from recon_torch.files import refusal


class Command(NamedTuple):
    """A module with `main(argv)`, imported only when the command is asked for, and a line of help."""

    module: str
    help: str


COMMANDS = {
    "generate": Command("im3d_jax.commands.generate", "make assets from prompts or a picture"),
    "batch": Command("im3d_jax.commands.batch", "make the assets of all prompts in a file, in shards"),
    "fit": Command("recon_torch.commands.fit", "fit Gaussians to images with a transforms.json"),
    "render": Command("recon_torch.commands.render", "render Gaussians: images and a turntable"),
    "export": Command("recon_torch.commands.export", "write an asset in the format of another tool"),
    "mesh": Command("recon_torch.commands.mesh", "make a textured mesh of an asset"),
    "view": Command("recon_torch.commands.view", "look at assets in a browser, or write a page of one"),
    "train": Command("im3d_jax.commands.train", "train the video generator"),
    "train-elevation": Command(
        "im3d_jax.commands.train_elevation", "train the estimator of a video's elevation"
    ),
    "convert": Command(
        "im3d_jax.commands.convert", "turn public checkpoints into weights for a backbone, and back"
    ),
    "dataset": Command(
        "im3d_jax.commands.dataset", "render objects, build a data set of turntables, look at one"
    ),
    "embed": Command("im3d_jax.commands.embed", "encode prompts once, for training"),
    "check-backbone": Command(
        "im3d_jax.commands.check_backbone", "test a denoiser, yours too, against the backbone contract"
    ),
    "plan": Command(
        "im3d_jax.commands.plan", "say what a config costs in parameters, FLOPs, memory and seconds"
    ),
    "evaluate": Command("im3d_jax.commands.evaluate", "measure a model, or the outputs of any method"),
    "study": Command("im3d_jax.commands.study", "ask people which of two methods' turntables are better"),
}


def usage() -> str:
    """The text of `im3d --help`."""
    lines = [f"  {name:<16} {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: im3d COMMAND [flags]    (`im3d COMMAND --help` lists the flags)", "", *lines])


def dispatch(argv: list[str]) -> None:
    """Calls the command that `argv[0]` names. Raises UserError for an unknown name."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return
    name, *rest = argv
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the commands are {', '.join(COMMANDS)}"
        raise UserError(f"unknown command {name!r}: {hint}")
    importlib.import_module(COMMANDS[name].module).main(rest)


def run(argv: list[str] | None = None) -> int:
    """The process's exit code: 0, 2 for what the user has to mend (one line on stderr), 130 for Ctrl-C.

    141, as for a command that SIGPIPE ends, where what reads the output has ended, such as `head`.
    """
    # Before torch loads: threads that spin while they wait slow down whatever shares the machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # The script `im3d` has its own directory on Python's path, and a config may name the user's modules here.
    if "" not in sys.path:
        sys.path.append("")
    for stream in (sys.stdout, sys.stderr):  # names of files and prompts may have what a terminal cannot show
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except BrokenPipeError:
        broken = [stream for stream in (sys.stdout, sys.stderr) if _has_no_reader(stream)]
        if not broken:  # it is another pipe, and a bug
            raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in broken:  # or Python would complain when it flushes them at its end
            os.dup2(nowhere, stream.fileno())
        return 141


def _run(argv: list[str]) -> int:
    try:
        dispatch(argv)
        sys.stdout.flush()
    except UserError as error:
        print(f"im3d: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except SystemExit:  # --help has been printed
        sys.stdout.flush()
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            print(f"im3d: error: {UserError(f'{error.strerror}: {error.filename}')}", file=sys.stderr)
            return 2
        # Libraries that write, such as Orbax and tfds, hand this on within errors of their own.
        if reason := refusal(error):
            print(f"im3d: error: {reason}{_where(error)}; make room and go on", file=sys.stderr)
            return 2
        raise
    return 0


def _has_no_reader(stream: Any) -> bool:
    """Whether a stream is a pipe whose other end is closed."""
    poll = select.poll()
    try:
        poll.register(stream.fileno(), 0)
    except (OSError, ValueError):  # it is no file at all
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _where(error: BaseException) -> str:
    """Which file an error is about, if it says so."""
    name = getattr(error, "filename", None)
    return f": {name}" if name else ""

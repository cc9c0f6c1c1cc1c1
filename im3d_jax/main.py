"""`im3d COMMAND`: finds the command's module and calls its `main(argv)`, nothing else."""

from __future__ import annotations

import difflib
import importlib
import os
import sys

from recon_torch.errors import UserError

# command -> (module with `main(argv)`, help). Modules load only when asked for: `im3d fit` never imports jax.
COMMANDS = {
    "generate": ("im3d_jax.commands.generate", "a prompt or an image in, a 3D asset out (Figure 2)"),
    "batch": (
        "im3d_jax.commands.batch",
        "assets of all prompts in a file, in shards, resumed",
    ),
    "fit": (
        "recon_torch.commands.fit",
        "fit Gaussians to a directory of images with a transforms.json (Sec. 3.3)",
    ),
    "render": (
        "recon_torch.commands.render",
        "render a .ply of Gaussians: images, transforms.json and a turntable",
    ),
    "train": ("im3d_jax.commands.train", "train the video generator (Sec. 3.1)"),
    "train-elevation": (
        "im3d_jax.commands.train_elevation",
        "train the estimator of a video's elevation (Sec. 3.3)",
    ),
    "convert": (
        "im3d_jax.commands.convert",
        "public checkpoints into weights for a backbone, and back",
    ),
    "dataset": ("im3d_jax.commands.dataset", "render objects, build a data set of turntables, look at one"),
    "embed": ("im3d_jax.commands.embed", "encode prompts once, for training"),
    "check-backbone": (
        "im3d_jax.commands.check_backbone",
        "test a denoiser, yours too, against the backbone contract",
    ),
    "plan": (
        "im3d_jax.commands.plan",
        "what a config costs: parameters, FLOPs, memory and seconds, without running it",
    ),
    "evaluate": ("im3d_jax.evaluate.suite", "measure the shipped model on test objects"),
}


def usage() -> str:
    lines = [f"  {name:<16} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(["usage: im3d COMMAND [flags]    (`im3d COMMAND --help` lists the flags)", "", *lines])


def dispatch(argv: list[str]) -> None:
    """Calls the command that `argv[0]` names with the rest. Raises `UserError` for an unknown name."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return
    command, *rest = argv
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the commands are {', '.join(COMMANDS)}"
        raise UserError(f"unknown command {command!r}: {hint}")
    importlib.import_module(COMMANDS[command][0]).main(rest)


def run(argv: list[str] | None = None) -> int:
    """The process's exit code: 0, 2 for a mistake of the user (one line on stderr), 130 for Ctrl-C."""
    # Before torch loads: threads that spin while they wait slow down whatever shares the machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        dispatch(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"im3d: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0

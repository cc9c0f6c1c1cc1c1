"""Training state on disk (Orbax) and weights as one file (safetensors). Nothing is ever unpickled."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util
from jax.experimental import multihost_utils
from jaxtyping import PyTree
from numpy.typing import DTypeLike
from safetensors.numpy import save_file

from im3d_jax.params import cast
from recon_torch import weights_files
from recon_torch.errors import UserError, first_line
from recon_torch.files import refusal, replacing

ASIDE = ".unreadable"
"""What is appended to the step of a checkpoint that could not be read."""

END_BYTES = 2**20  # read at a file's start, where safetensors has the names and shapes, and at its end


Renew = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]


class Checkpoints:
    """The checkpoints of a run, in `workdir`/checkpoints, each of a step.

    Saving copies the state from the devices and writes it while the loop goes on. A checkpoint gets its name
    when it is whole, so one that was cut off is never taken for a checkpoint.

    Args:
        keep: how many of the newest stay.
        keep_every: checkpoints of steps that it divides stay too; 0 for none.
    """

    def __init__(self, workdir: Path, keep: int = 2, keep_every: int = 0):
        self.workdir = workdir
        _quiet_refusals()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, keep_period=keep_every or None, enable_async_checkpointing=True
        )
        self._directory = (workdir / "checkpoints").absolute()
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_) -> None:
        """Waits for what is still being written, also when an error ends the run."""
        with self._writing():
            self._manager.wait_until_finished()
            self._remove_replaced()
            self._manager.close()

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in rising order."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: PyTree, meta: dict[str, Any]) -> None:
        """Saves a state and, as JSON, `meta`, whose entry `settings` says what the state depends on.

        Raises UserError where the system refuses to write this checkpoint, or the one before.
        """
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        with self._writing():
            self._manager.save(step, args=args, force=True)
            self._remove_replaced()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            reason = refusal(error)
            if reason is None:
                raise
            raise UserError(
                f"cannot write to {self.workdir / 'checkpoints'} ({reason}); make room and go on"
                " from the last one, which is whole"
            ) from error

    def restore(self, like: PyTree, settings: dict[str, Any]) -> tuple[PyTree, dict[str, Any]] | None:
        """(state, meta) of the newest checkpoint that can be read, placed as `like` is; or None.

        The mesh that it was saved from may be another. Newer ones that cannot be read are put aside, because
        the run will save their steps again. Raises UserError if it was saved with other settings, naming
        them, and if none of the checkpoints that are there can be read.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                meta = self._restore(step, meta=ocp.args.JsonRestore())["meta"]
                check_settings(self.workdir, meta["settings"], settings)
                abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
                state = self._restore(step, state=ocp.args.StandardRestore(abstract))["state"]
            except UserError:
                raise
            except Exception as error:  # whatever a damaged file makes of Orbax
                print(
                    f"im3d: warning: checkpoint {step} cannot be read ({first_line(error)})", file=sys.stderr
                )
                continue
            self._put_aside([each for each in steps if each > step])
            return state, meta
        if steps:
            raise UserError(f"no checkpoint of {self.workdir} can be read; start in another --workdir")
        return None

    def _restore(self, step: int, **args):
        return self._manager.restore(step, args=ocp.args.Composite(**args))

    def _put_aside(self, steps: Sequence[int]) -> None:
        """Renames checkpoints that cannot be read, which would else be in the way of new ones.

        They are not removed yet, because what keeps them from being read may pass.
        """
        if not steps:
            return
        if jax.process_index() == 0:
            for step in steps:
                aside = self._directory / f"{step}{ASIDE}"
                shutil.rmtree(aside, ignore_errors=True)
                (self._directory / str(step)).rename(aside)
                print(f"im3d: {aside} is removed when its step is saved again", file=sys.stderr)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("checkpoints are put aside")
        self._manager.reload()

    def _remove_replaced(self) -> None:
        """Removes what was put aside of steps up to the newest whole checkpoint."""
        if jax.process_index() == 0:
            names = [path.name for path in self._directory.iterdir()]
            newest = max((int(name) for name in names if name.isdecimal()), default=0)
            for name in names:
                step = name.removesuffix(ASIDE)
                if step != name and step.isdecimal() and int(step) <= newest:
                    shutil.rmtree(self._directory / name, ignore_errors=True)


@functools.cache
def _quiet_refusals() -> None:
    """Keeps tracebacks off the log where `Checkpoints` says in one line that the system refuses to write.

    Orbax logs one in each of its threads, asyncio one for each array, and TensorStore calls the hook for
    exceptions when an array ends after that. On a full disk these were thousands of lines.
    """

    def is_other(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
        return error is None or refusal(error) is None

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if str(error) != "Event loop is closed":
            before(kind, error, trace)

    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(is_other)
    before, sys.excepthook = sys.excepthook, hook


def check_settings(workdir: Path, saved: dict, settings: dict) -> None:
    """Raises UserError that lists the keys that differ, if any do."""
    settings = json.loads(json.dumps(settings))
    changed = sorted(key for key in settings | saved if settings.get(key) != saved.get(key))
    if changed:
        differences = "; ".join(f"config.{k} {saved.get(k)!r}, now {settings.get(k)!r}" for k in changed)
        raise UserError(f"{workdir} holds a run with {differences}; use another --workdir")


def fingerprint(path: str | Path) -> str:
    """Tells a weights file from another, wherever it lies: a hash of its size and of both its ends.

    Of a directory it is a hash of those of the weights files below it, in the order of their names.

    Raises UserError if there is no such file.
    """
    path = Path(path)
    if files := sorted(path.rglob("*.safetensors")) if path.is_dir() else []:
        every = "".join(map(fingerprint, files))
        return hashlib.sha256(every.encode()).hexdigest()[:16]
    if not path.is_file():
        raise UserError(f"no weights at {path}; train or convert them, or correct config.train.init_from")
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(END_BYTES))
        file.seek(max(0, size - END_BYTES))
        digest.update(file.read(END_BYTES))
    return digest.hexdigest()[:16]


def save_weights(path: Path, params: PyTree, metadata: dict[str, Any], dtype: DTypeLike = np.float32) -> None:
    """Writes parameters as one safetensors file of `dtype`. The file is whole or not there.

    Raises UserError that names a parameter with a value that `dtype` does not hold.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    arrays = {name: cast(value, dtype, f"{path}: {name}") for name, value in flat.items()}
    with replacing(path) as temporary:
        save_file(arrays, temporary, metadata={"im3d": json.dumps(metadata)})


def load_weights(path: str | Path, like, renew: Renew | None = None) -> tuple[dict, dict]:
    """(parameters in float32 on the host, metadata) of a file of `save_weights`.

    Args:
        like: tree of arrays or ShapeDtypeStructs, such as `jax.eval_shape(model.init, key)`.
        renew: gives the tensors of an older file their present names and shapes.

    Raises UserError that names a missing, extra or wrongly shaped tensor, or says that the file is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no weights at {path}; train them with `im3d train` or correct config.weights")
    with weights_files.opened(path) as file:
        names = list(file.keys())
        # A user's own model may have parameters at the top, whose paths have no "/" either.
        if names and not any("/" in name or name in like for name in names):
            convert = "convert it with `im3d convert` and name what that writes"
            raise UserError(
                f"weights {path} are a public checkpoint, with tensors like {names[0]}; {convert}"
            )
        metadata = metadata_of(path, file.metadata() or {})
        if "lora" in metadata:
            adapted = (
                "and in config.weights the weights that it adapts, or merge them (im3d convert --merge-lora)"
            )
            raise UserError(f"weights {path} are a LoRA alone; name it in config.lora, {adapted}")
        flat = {
            name: weights_files.to_float32(file.get_tensor(name), name, f"weights {path}").numpy()
            for name in names
        }
    if renew:
        flat = renew(flat)
    _check(path, flat, traverse_util.flatten_dict(like, sep="/"))
    return traverse_util.unflatten_dict(flat, sep="/"), metadata


def metadata_of(path: Path, stored: Mapping[str, str]) -> dict[str, Any]:
    """What `save_weights` was given, from a file's metadata. Raises UserError if that is damaged."""
    try:
        metadata = json.loads(stored.get("im3d", "{}"))
        return dict(metadata)
    except (ValueError, TypeError):
        raise UserError(f"weights {path} have damaged metadata; fetch or train them again") from None


def _check(path: Path, found: dict, expected: dict) -> None:
    missing, extra = expected.keys() - found.keys(), found.keys() - expected.keys()
    for problem, names in (("lack", missing), ("have an unknown", extra)):
        if names:
            first = f"{min(names)} ({len(names)} such)"
            raise UserError(f"weights {path} {problem} {first}; give the config that they were trained with")
    for name, value in expected.items():
        if found[name].shape != value.shape:
            shapes = f"is {found[name].shape}, the config makes it {value.shape}"
            raise UserError(f"weights {path}: {name} {shapes}; give the config that they were trained with")

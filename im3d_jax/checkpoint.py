"""Training state on disk (Orbax) and weights as one file (safetensors). Nothing is ever unpickled."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from recon_torch import export
from recon_torch.errors import UserError


def open_manager(workdir: Path, keep: int = 2) -> ocp.CheckpointManager:
    """Keeps the newest `keep` checkpoints under `workdir`/checkpoints; saving does not hold up the loop."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
    return ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options)


def save(manager: ocp.CheckpointManager, step: int, state, settings: dict) -> None:
    """Saves a state and, as JSON, the settings that it depends on."""
    meta = ocp.args.JsonSave({"settings": settings})
    manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=meta))


def restore(manager: ocp.CheckpointManager, like, settings: dict):
    """The newest state, placed as `like` is, or None if there is none yet.

    Raises UserError if it was saved with other settings.
    """
    step = manager.latest_step()
    if step is None:
        return None
    meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
    settings = json.loads(json.dumps(settings))
    saved = meta.get("settings", settings)
    changed = sorted(key for key in settings | saved if settings.get(key) != saved.get(key))
    if changed:
        key = changed[0]
        raise UserError(
            f"{manager.directory.parent} holds a run with config.{key} {saved.get(key)!r}, now it is"
            f" {settings.get(key)!r}; use another --workdir"
        )
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    return manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))["state"]


def save_weights(path: Path, params, metadata: dict, dtype=np.float16) -> None:
    """Writes parameters as one safetensors file of `dtype`; whole or not at all."""
    flat = traverse_util.flatten_dict(params, sep="/")
    arrays = {name: np.array(value, dtype, order="C") for name, value in flat.items()}
    with export.replacing(path) as temporary:
        save_file(arrays, temporary, metadata={"im3d": json.dumps(metadata)})


def load_weights(path: str | Path, like) -> tuple[dict, dict]:
    """(parameters in float32, metadata) of a file of `save_weights`.

    Args:
        like: tree of arrays or ShapeDtypeStructs, such as `jax.eval_shape(model.init, key)`.

    Raises UserError that names a missing, extra or wrongly shaped tensor, or says that the file is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no weights at {path}; train them with `im3d train` or correct config.weights")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = json.loads((file.metadata() or {}).get("im3d", "{}"))
            flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"weights {path} are damaged ({error}); fetch or train them again") from None
    expected = traverse_util.flatten_dict(like, sep="/")
    _check(path, flat, expected)
    flat = {name: jnp.asarray(value, jnp.float32) for name, value in flat.items()}
    return traverse_util.unflatten_dict(flat, sep="/"), metadata


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
        if not np.isfinite(found[name]).all():
            raise UserError(f"weights {path}: {name} holds NaN or infinity; fetch or train them again")

"""Training state on disk (Orbax) and weights as one file (safetensors). Nothing is ever unpickled."""

from __future__ import annotations

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from recon_torch.errors import UserError


def open_manager(workdir: Path, keep: int = 2) -> ocp.CheckpointManager:
    """Keeps the newest `keep` checkpoints under `workdir`/checkpoints; saving does not hold up the loop."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
    return ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options)


def save(manager: ocp.CheckpointManager, step: int, state, config_digest: str) -> None:
    args = ocp.args.Composite(
        state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave({"config_digest": config_digest})
    )
    manager.save(step, args=args)


def restore(manager: ocp.CheckpointManager, like):
    """The newest state, placed as `like` is, or None if there is none yet."""
    step = manager.latest_step()
    if step is None:
        return None
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    return manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))["state"]


def save_weights(path: Path, params, metadata: dict, dtype=np.float16) -> None:
    """Writes parameters as one safetensors file of `dtype`; whole or not at all."""
    flat = traverse_util.flatten_dict(params, sep="/")
    arrays = {name: np.ascontiguousarray(np.asarray(value).astype(dtype)) for name, value in flat.items()}
    temporary = path.with_name(path.name + ".tmp")
    save_file(arrays, temporary, metadata={"im3d": json.dumps(metadata)})
    os.replace(temporary, path)


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
    _check_names(path, flat, expected)
    return traverse_util.unflatten_dict({k: jnp.asarray(v, jnp.float32) for k, v in flat.items()}, sep="/"), metadata


def _check_names(path: Path, found: dict, expected: dict) -> None:
    for problem, names in (("lack", expected.keys() - found.keys()), ("have an unknown", found.keys() - expected.keys())):
        if names:
            raise UserError(f"weights {path} {problem} {sorted(names)[0]} ({len(names)} such); is the config theirs?")
    for name, value in expected.items():
        if found[name].shape != value.shape:
            raise UserError(f"weights {path}: {name} is {found[name].shape}, the config makes it {value.shape}")
        if not np.isfinite(found[name]).all():
            raise UserError(f"weights {path}: {name} holds NaN or infinity; fetch or train them again")

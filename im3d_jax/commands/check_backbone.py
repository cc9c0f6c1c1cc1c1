"""`im3d check-backbone`."""

from __future__ import annotations

import contextlib

import jax

from im3d_jax import backbones, config_flags
from im3d_jax.backbones.conformance import NUM_DEVICES, check
from recon_torch.errors import CommandParser, UserError


def main(argv: list[str]) -> None:
    with contextlib.suppress(RuntimeError):  # JAX has its devices already: the sharded check is skipped
        jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
    jax.config.update("jax_disable_most_optimizations", True)  # compiling is all that takes time here
    parser = CommandParser("check-backbone", __doc__)
    parser.add_argument(
        "name", nargs="?", default="", help="a backbone of im3d_jax, or any importable module"
    )
    configured = any(argument.startswith("--config") for argument in argv)
    flags, config = config_flags.parse(argv, parser, default="configs/tiny.py")
    if configured == bool(flags.name):
        raise UserError("give either a backbone's name or --config=FILE")
    if configured:
        name, kwargs = config.backbone.name, config.backbone.kwargs.to_dict()
        trainable = config.train.trainable if "train" in config else ".*"
    else:
        name, trainable = flags.name, ".*"
        kwargs = backbones.small_kwargs(name)
    rows = check(backbones.build(name, kwargs), trainable)
    width = max(len(row[0]) for row in rows)
    for what, result, detail in rows:
        print(f"{what:<{width}}  {result:<8} {detail}".rstrip())
    failed = sum(result == "failed" for _, result, _ in rows)
    if failed:
        raise UserError(f"{name} fails {failed} of {len(rows)} checks of the backbone contract")
    print(f"{name} keeps the backbone contract")

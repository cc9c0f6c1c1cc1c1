"""`im3d check-backbone`: tests whether a network keeps the backbone contract.

    im3d check-backbone emu_video
    im3d check-backbone my_pkg.my_model
    im3d check-backbone --config=configs/tiny.py

A name alone is checked at the size of the module's `SMALL` arguments (its defaults, if it has none), a config
at the size that it gives, which takes the memory of that size. The contract is told in docs/backbones.md.
"""

from __future__ import annotations

import contextlib

import jax

from im3d_jax import backbones, config_flags, config_sections
from im3d_jax.backbones.conformance import NUM_DEVICES, Outcome, check
from im3d_jax.training_settings import TrainSettings
from recon_torch.errors import CommandParser, UserError


def main(argv: list[str]) -> None:
    parser = CommandParser("check-backbone", __doc__)
    parser.add_argument(
        "name", nargs="?", default="", help="a backbone of im3d_jax, or an importable module of your own"
    )
    configured = any(argument.startswith("--config") for argument in argv)
    flags, config = config_flags.parse(argv, parser, default="configs/tiny.py")
    if configured == bool(flags.name):
        raise UserError("give either a backbone's name or --config=FILE")
    with contextlib.suppress(RuntimeError):  # JAX has its devices already: the sharded check is skipped
        jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
    jax.config.update("jax_disable_most_optimizations", True)  # compiling is all that takes time here
    if configured:
        name, kwargs = config_sections.named(config, "backbone")
        trainable = ".*"
        if "train" in config:
            settings = config_sections.settings(config, "train", TrainSettings)
            trainable = settings.lora.targets if settings.lora.rank else settings.trainable
    else:
        name, trainable = flags.name, ".*"
        kwargs = backbones.small_kwargs(name)
    results = check(backbones.build(name, kwargs), trainable)
    width = max(len(result.check) for result in results)
    for result in results:
        print(f"{result.check:<{width}}  {result.outcome:<8} {result.detail}".rstrip())
    failed = sum(result.outcome == Outcome.FAILED for result in results)
    if failed:
        raise UserError(f"{name} fails {failed} of {len(results)} checks of the backbone contract")
    print(f"{name} keeps the backbone contract")

"""What `im3d train` trains: one module per task, named in `config.train.task`.

A task module has `build(config, mesh)`, which makes the task of a config, and a task has

    init(key) -> params                                     pure
    load(path) -> params                                    on the host, of `config.train.init_from`
    partition_rules                                         of the parameters, see `sharding`
    constants                                               arrays that the loss takes and nothing trains
    stream(name) -> settings                                hashable, of one stream of `config.train.streams`
    collate(examples, stream) -> batch                      arrays [B, ...] of `data.pipeline` examples
    draw(key, num_examples, stream) -> draws                what is random of each example, [B, ...]
    loss(params, constants, batch, draws, stream)           -> (mean over examples, {name: sum over examples})
    flops(trainable, name) -> float                         of one step of a stream, forward and backward
    sample(params, key) -> {name: frames [T,H,W,3]}         to look at, in [0, 1]
    save(directory, params, metadata) -> path               the trained model as its users load it

The loop knows nothing else of what it trains.
"""

from __future__ import annotations

import importlib

from jax.sharding import Mesh

from recon_torch.errors import UserError

NAMES = ("turntable", "autoencoder")


def build(config, mesh: Mesh):
    """The task that `config.train.task` names. Raises UserError if there is none of that name."""
    name = config.train.task
    if name not in NAMES:
        raise UserError(f"config.train.task: no {name!r}; there is {', '.join(NAMES)}")
    return importlib.import_module(f"{__name__}.{name}").build(config, mesh)

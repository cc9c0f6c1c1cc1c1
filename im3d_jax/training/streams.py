"""The streams of a run: which of them a step takes a batch of, and their batches."""

from __future__ import annotations

from collections.abc import Mapping

from jax.sharding import Mesh

from im3d_jax import sharding
from im3d_jax.data import input_pipeline, sources, workers
from im3d_jax.training_settings import StreamSettings
from recon_torch.errors import UserError


def check(streams: Mapping[str, StreamSettings], accumulate: int, mesh: Mesh) -> None:
    """Raises UserError for batches that do not divide, and where a step would have none.

    accumulate: parts of a batch whose gradients are computed one after another.
    """
    shares = sharding.batch_shares(mesh) * accumulate
    for name, stream in streams.items():
        if stream.batch_size % shares:
            key = f"config.train.streams.{name}.batch_size"
            parts = f"{sharding.batch_shares(mesh)} devices x {accumulate} accumulated"
            raise UserError(f"{key} is {stream.batch_size}; give a multiple of {parts} parts")
    if all(stream.every > 1 for stream in streams.values()):
        raise UserError("config.train.streams: some steps have no stream; set `every` of one to 1")


def stream_of(streams: Mapping[str, StreamSettings], step: int) -> str:
    """The stream of a step: of those whose turn it is, the one that comes round least often."""
    due = [name for name, stream in streams.items() if step % stream.every == stream.every - 1]
    return max(due, key=lambda name: streams[name].every)


def is_due(every: int, step: int) -> bool:
    """Whether what happens every `every` steps, or never if that is 0, happens after `step` steps."""
    return every > 0 and step % every == 0


def open_stream(
    stream: StreamSettings,
    mesh: Mesh,
    *,
    seed: int,
    size: int,
    start: int = 0,
    run: workers.Run = workers.run_here,
    **loader: int,
) -> input_pipeline.Stream:
    """Opens this process's part of a stream's batches, from batch `start` on.

    Args:
        seed: of the objects and of their order.
        size: side of the views in pixels.
        run: what makes procedural objects, see `data.workers`.
        loader: see `data.input_pipeline.open_stream`.
    """
    source = sources.open_source(stream.data, seed=seed, size=size, num_views=stream.num_views, run=run)
    return input_pipeline.open_stream(
        source,
        seed=seed,
        batch_size=stream.batch_size,
        shard=input_pipeline.Shard(*sharding.rows_of_process(mesh)),
        start=start,
        shuffle=bool(stream.data.path),
        **loader,
    )

"""What the models of this package have in common: their arguments are frozen, and checked before use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

REMAT = ("", "nothing_saveable", "dots_saveable", "dots_with_no_batch_dims_saveable", "everything_saveable")


def freeze(model) -> None:
    """Makes tuples of a dataclass's lists: a model is a static argument of jit, so it must be hashable."""
    for name, value in vars(model).items():
        if isinstance(value, list):
            object.__setattr__(model, name, tuple(value))


def problems(latent_shape: Sequence[int], levels: int, remat: str, query_chunk: int) -> Iterator[str]:
    """What is wrong with arguments that every UNet has, and why.

    Args:
        latent_shape: (h, w, c); a UNet halves the sides once less than it has `levels`.
        remat: what the backward pass keeps, "" or a policy of `jax.checkpoint_policies`.
        query_chunk: see `attention.attend`; of each level's places, where they are more.
    """
    height, width = latent_shape[:2]
    divisor = 2 ** (levels - 1)
    if height % divisor or width % divisor:
        yield f"latent_shape {latent_shape} is not divisible by {divisor}; change config.size"
    if remat not in REMAT:
        yield f"remat {remat!r} is no policy; there is {', '.join(REMAT[1:])}"
    places = [height * width // 4**level for level in range(levels)]
    if any(count > query_chunk > 0 and count % query_chunk for count in places):
        yield f"query_chunk {query_chunk} does not divide the places {places}"

"""Named random streams."""

from __future__ import annotations

import zlib

import jax


def stream(key: jax.Array, name: str) -> jax.Array:
    """The random stream of a named use: no two uses share numbers, and none depends on the order of calls."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))

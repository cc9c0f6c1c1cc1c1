"""Named random streams: one root key, from which each use folds in its name."""

from __future__ import annotations

import zlib

import jax
from jaxtyping import PRNGKeyArray


def stream(key: PRNGKeyArray, name: str) -> PRNGKeyArray:
    """The random key of a named use. Uses share no numbers and do not depend on the order of calls."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))

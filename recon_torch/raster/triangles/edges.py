"""The edges of a surface, and the two triangles at each."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor


def edges_of(triangles: Int[Tensor, "F 3"]) -> Int[Tensor, "E 4"]:
    """Each edge once, as `Geometry.edges` has it. Of an edge with more than two triangles two are taken."""
    starts, ends = triangles.flatten(), triangles.roll(-1, 1).flatten()
    owners = torch.arange(len(triangles), device=triangles.device).repeat_interleave(3)
    low, high = torch.minimum(starts, ends), torch.maximum(starts, ends)
    keys, order = (low * (high.max() + 1 if len(high) else 1) + high).sort(stable=True)
    first = torch.ones_like(keys, dtype=torch.bool)
    first[1:] = keys[1:] != keys[:-1]
    places = first.nonzero()[:, 0]
    after = (places + 1).clamp_max(len(keys) - 1)
    has_other = (places + 1 < len(keys)) & ~first[after]
    one, other = order[places], owners[order[after]]
    return torch.stack([starts[one], ends[one], owners[one], torch.where(has_other, other, -1)], -1)

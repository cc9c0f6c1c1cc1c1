"""Values of a sparse grid at points, on the CPU: compiled loops that add up gradients in one order."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from recon_torch.kernel import arrays, inlined, kernel, run

GRAIN = 4096  # points of a task


def gather(
    table: Float[Tensor, "rows C"], rows: Int[Tensor, "n n n"], places: Float[Tensor, "P 3"]
) -> Float[Tensor, "P C"]:
    """Trilinear; differentiable by table and places. The latter are in cells, from 0 to n - 1."""
    return _Values.apply(table, *arrays(rows), places)


class _Values(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table, rows, places):
        ctx.saved = (*arrays(table), rows, *arrays(places))
        found = np.empty((len(places), table.shape[1]), ctx.saved[0].dtype)
        run(_gather, len(places), *ctx.saved, found, grain=GRAIN)
        return torch.from_numpy(found)

    @staticmethod
    def backward(ctx, v_found):
        table, _, places = ctx.saved
        v_table, v_places = np.zeros_like(table), np.empty_like(places)
        run(_gather_back, len(places), *ctx.saved, *arrays(v_found), v_places, grain=GRAIN)
        _scatter(*ctx.saved[1:], *arrays(v_found), v_table)
        return torch.from_numpy(v_table), None, torch.from_numpy(v_places)


@inlined()
def _cell(places, p, axis, size):
    first = min(int(places[p, axis]), size - 2)
    high = places[p, axis] - first
    return first, (1 - high, high)


@kernel()
def _gather(begin, end, table, rows, places, found):
    size = len(rows)
    for p in range(begin, end):
        (x, of_x), (y, of_y), (z, of_z) = (
            _cell(places, p, 0, size),
            _cell(places, p, 1, size),
            _cell(places, p, 2, size),
        )
        for c in range(table.shape[1]):
            found[p, c] = 0
        for i in range(2):
            for j in range(2):
                for k in range(2):
                    row, share = rows[x + i, y + j, z + k], of_x[i] * of_y[j] * of_z[k]
                    for c in range(table.shape[1]):
                        found[p, c] += share * table[row, c]


@kernel()
def _gather_back(begin, end, table, rows, places, v_found, v_places):
    """The gradients by the places."""
    size = len(rows)
    for p in range(begin, end):
        (x, of_x), (y, of_y), (z, of_z) = (
            _cell(places, p, 0, size),
            _cell(places, p, 1, size),
            _cell(places, p, 2, size),
        )
        v_x, v_y, v_z = 0.0, 0.0, 0.0
        for i in range(2):
            for j in range(2):
                for k in range(2):
                    row, v = rows[x + i, y + j, z + k], 0.0
                    for c in range(table.shape[1]):
                        v += table[row, c] * v_found[p, c]
                    v_x += (2 * i - 1) * of_y[j] * of_z[k] * v
                    v_y += of_x[i] * (2 * j - 1) * of_z[k] * v
                    v_z += of_x[i] * of_y[j] * (2 * k - 1) * v
        v_places[p, 0], v_places[p, 1], v_places[p, 2] = v_x, v_y, v_z


@kernel()
def _scatter(rows, places, v_found, v_table):
    """The gradients by the table, by one thread, so that their sums are repeatable."""
    size = len(rows)
    for p in range(len(places)):
        (x, of_x), (y, of_y), (z, of_z) = (
            _cell(places, p, 0, size),
            _cell(places, p, 1, size),
            _cell(places, p, 2, size),
        )
        for i in range(2):
            for j in range(2):
                for k in range(2):
                    row, share = rows[x + i, y + j, z + k], of_x[i] * of_y[j] * of_z[k]
                    for c in range(v_table.shape[1]):
                        v_table[row, c] += share * v_found[p, c]

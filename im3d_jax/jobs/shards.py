"""The assets of a batch, and which of them are this process's: shard I of N has the assets I, I + N, ..."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from im3d_jax.asset import Request
from im3d_jax.jobs import ASSETS
from im3d_jax.jobs.prompt_files import Entry
from recon_torch.errors import UserError

MAX_ASSETS = 10_000_000


class Shard(NamedTuple):
    """Shard `number`, counted from 0, of `num_shards`."""

    number: int
    num_shards: int

    def __str__(self) -> str:
        return f"{self.number}/{self.num_shards}"


def make_requests(entries: Sequence[Entry], out: Path, seed: int, num_assets: int) -> list[Request]:
    """The requests of a whole batch, in the order of the entries; asset i goes to OUT/assets/00000i.

    Args:
        seed: of the first asset of an entry that names none.
        num_assets: assets of each entry; their seeds count up.

    Raises UserError for more assets than `MAX_ASSETS`.
    """
    if len(entries) * num_assets > MAX_ASSETS:
        asked = f"{len(entries)} prompts with --num-assets {num_assets}"
        raise UserError(f"{asked} are more than {MAX_ASSETS} assets; divide them among several batches")
    requests: list[Request] = []
    for entry in entries:
        first_seed = seed if entry.seed is None else entry.seed
        elevation_deg = None if entry.elevation_deg is None else float(entry.elevation_deg)
        for number in range(num_assets):
            directory = out / ASSETS / f"{len(requests):06d}"
            requests.append(Request(entry.prompt, entry.image, first_seed + number, directory, elevation_deg))
    return requests


def read_shard(flag: str, environment: Mapping[str, str]) -> Shard:
    """The shard that the flag "I/N" names or, if it is empty, the one that SLURM's environment does.

    Tasks of a job array, tasks of srun, and tasks of srun within a job array all are shards; without any of
    them there is one. Raises UserError for a flag that is no shard, and for an array with uneven indices.
    """
    if flag:
        parts = flag.split("/")
        if len(parts) != 2 or not all(part.isdecimal() for part in parts):
            raise UserError(f"--shard is {flag!r}; write I/N, as in 0/8")
        shard = Shard(*map(int, parts))
        if not shard.number < shard.num_shards:
            raise UserError(f"--shard is {flag!r}; I counts from 0 to N - 1")
        return shard
    index, count = 0, 1
    if "SLURM_ARRAY_TASK_ID" in environment:
        task, first, last, count, step = (
            int(environment.get(f"SLURM_ARRAY_TASK_{name}", default))
            for name, default in (("ID", 0), ("MIN", 0), ("MAX", 0), ("COUNT", 1), ("STEP", 1))
        )
        if (last - first) // step + 1 != count:
            raise UserError("the indices of this job array are not evenly spaced; give --shard I/N")
        index = (task - first) // step
    # A script outside srun has a SLURM_PROCID as well, but is alone.
    if "SLURM_STEP_ID" in environment:
        num_tasks = int(environment["SLURM_NTASKS"])
        index, count = index * num_tasks + int(environment["SLURM_PROCID"]), count * num_tasks
    return Shard(index, count)

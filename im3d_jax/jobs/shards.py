"""The assets of a batch, and which of them are this process's: shard I of N has the assets I, I + N, ..."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from im3d_jax.asset import Request
from im3d_jax.jobs import ASSETS
from im3d_jax.jobs.prompt_files import Entry
from im3d_jax.sides import arranged
from im3d_jax.training import hosts
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
        front, sides = arranged(entry.images, entry.azimuths_deg)
        for number in range(num_assets):
            directory = out / ASSETS / f"{len(requests):06d}"
            made = Request(entry.prompt, front, first_seed + number, directory, elevation_deg, sides=sides)
            requests.append(made)
    return requests


def read_shard(flag: str, environment: Mapping[str, str]) -> Shard:
    """The shard that the flag "I/N" names or, if it is empty, the one that SLURM's environment does.

    Tasks of a job array, tasks of srun, and tasks of srun within a job array all are shards; without any of
    them there is one, as in the shell that salloc opens. Raises UserError for a flag that is no shard, for an
    array with uneven indices, and for an environment that does not say which of how many tasks this is.
    """
    if flag:
        parts = flag.split("/")
        if len(parts) != 2 or not all(part.isdecimal() for part in parts):
            raise UserError(f"--shard is {flag!r}; write I/N, as in 0/8")
        shard = Shard(*map(int, parts))
        if not shard.number < shard.num_shards:
            raise UserError(f"--shard is {flag!r}; I counts from 0 to N - 1")
        return shard
    array, step = _array_shard(environment), _step_shard(environment)
    return Shard(array.number * step.num_shards + step.number, array.num_shards * step.num_shards)


def _array_shard(environment: Mapping[str, str]) -> Shard:
    """Which task of a job array this is."""
    if "SLURM_ARRAY_TASK_ID" not in environment:
        return Shard(0, 1)
    task, first, last, count, step = (
        _number(environment, f"SLURM_ARRAY_TASK_{name}") for name in ("ID", "MIN", "MAX", "COUNT", "STEP")
    )
    if step < 1 or (last - first) // step + 1 != count or task not in range(first, last + 1, step):
        raise UserError("the indices of this job array are not evenly spaced; give --shard I/N")
    return Shard((task - first) // step, count)


def _step_shard(environment: Mapping[str, str]) -> Shard:
    """Which task of `srun` this is. A script outside it has a SLURM_PROCID as well, but is alone."""
    if not hosts.is_slurm_step(environment):
        return Shard(0, 1)
    # Within an allocation of several tasks SLURM_NTASKS may be theirs, for a step of other ones.
    names = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    count = _number(environment, next((name for name in names if name in environment), names[0]))
    shard = Shard(_number(environment, "SLURM_PROCID"), count)
    if not shard.number < shard.num_shards:
        raise UserError(f"SLURM says that this is task {shard.number} of {count}; give --shard I/N")
    return shard


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if not text.isdecimal():
        said = f"says {name}={text!r}, which is no number" if name in environment else f"does not say {name}"
        raise UserError(f"SLURM {said}; give --shard I/N, or --shard 0/1 for all")
    return int(text)

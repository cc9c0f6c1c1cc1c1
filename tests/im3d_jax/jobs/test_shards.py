"""Which shard a process is, by flag and by SLURM, and the requests of a batch."""

from pathlib import Path

import pytest

from im3d_jax.asset import Request
from im3d_jax.jobs import shards
from im3d_jax.jobs.prompt_files import Entry
from recon_torch.errors import UserError

ARRAY = {
    f"SLURM_ARRAY_TASK_{name}": value
    for name, value in dict(ID="6", MIN="4", MAX="8", COUNT="3", STEP="2").items()
}
SALLOC = {
    "SLURM_STEP_ID": "4294967290",
    "SLURM_PROCID": "0",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
}
"""The shell that salloc -n2 opens on a node: one process, with the numbers of the allocation."""

SRUN = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_NTASKS": "4"}


@pytest.mark.parametrize(
    "flag, environment, shard",
    [
        ("", {}, (0, 1)),
        ("2/5", ARRAY, (2, 5)),
        ("", ARRAY, (1, 3)),
        ("", SRUN, (3, 4)),
        ("", ARRAY | SRUN, (7, 12)),
        ("", {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, (0, 1)),  # a script outside srun is alone
        ("", SALLOC, (0, 1)),
        ("", SALLOC | {"SLURM_STEP_ID": str(0xFFFFFFFB)}, (0, 1)),  # a batch script
        ("", SALLOC | {"SLURM_STEP_ID": "3", "SLURM_STEP_NUM_TASKS": "1"}, (0, 1)),  # srun -n1 in it
        ("", {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, (1, 2)),
        ("1/2", {"SLURM_STEP_ID": "0"}, (1, 2)),
    ],
)
def test_shards_by_flag_and_by_slurm(flag, environment, shard):
    assert shards.read_shard(flag, environment) == shard


@pytest.mark.parametrize("flag", ["1", "3/3", "a/3", "-1/3", "1/2/3", "0/0"])
def test_shards_that_cannot_be(flag):
    with pytest.raises(UserError, match="--shard is"):
        shards.read_shard(flag, {})


@pytest.mark.parametrize("changed", [{"MAX": "10"}, {"ID": "5"}, {"ID": "10"}, {"STEP": "0"}])
def test_an_uneven_job_array_is_refused(changed):
    changed = {f"SLURM_ARRAY_TASK_{name}": value for name, value in changed.items()}
    with pytest.raises(UserError, match="not evenly spaced"):
        shards.read_shard("", ARRAY | changed)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"SLURM_STEP_ID": "0"}, "does not say SLURM_STEP_NUM_TASKS"),
        ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"}, "does not say SLURM_PROCID"),
        (SRUN | {"SLURM_PROCID": "4"}, "task 4 of 4"),
        (SRUN | {"SLURM_NTASKS": "4(x2)"}, r"SLURM_NTASKS='4\(x2\)'"),
        ({"SLURM_ARRAY_TASK_ID": "5"}, "does not say SLURM_ARRAY_TASK_MIN"),
    ],
)
def test_what_slurm_does_not_say_is_asked_for(environment, words):
    with pytest.raises(UserError, match=f"{words}.*give --shard I/N"):
        shards.read_shard("", environment)


def test_requests_count_seeds_and_directories_up():
    entries = [Entry("a duck"), Entry("", ("car.png",), 7, -20)]
    duck, car = Request("a duck", "", 3, Path()), Request("", "car.png", 7, Path(), -20.0)
    directories = [Path("out/assets") / f"{number:06d}" for number in range(4)]
    assert shards.make_requests(entries, Path("out"), seed=3, num_assets=2) == [
        duck._replace(out=directories[0]),
        duck._replace(out=directories[1], seed=4),
        car._replace(out=directories[2]),
        car._replace(out=directories[3], seed=8),
    ]


def test_more_assets_than_a_batch_can_hold_are_refused(user_error):
    with user_error("2 prompts with --num-assets 6000000 are more than 10000000 assets"):
        shards.make_requests([Entry("a duck"), Entry("a car")], Path("out"), seed=0, num_assets=6_000_000)

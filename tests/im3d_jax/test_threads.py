"""The number of JAX's threads: what a picture depends on, and what a config can fix."""

import os
import subprocess
import sys

import jax
import pytest

from im3d_jax import threads
from recon_torch.errors import UserError

PROGRAM = """
import os, sys, hashlib
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(sys.argv[1])])
from im3d_jax import threads
threads.limit(int(sys.argv[2]))
import jax, numpy
total = jax.jit(jax.numpy.sum)(jax.random.normal(jax.random.key(0), (1000, 1000)))
print(threads.count(), hashlib.sha1(numpy.asarray(total).tobytes()).hexdigest())
"""


def run(num_cores, num_threads):
    environment = {k: v for k, v in os.environ.items() if k not in ("NPROC", "XLA_FLAGS")}
    command = [sys.executable, "-c", PROGRAM, str(num_cores), str(num_threads)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return result.stdout.split()


@pytest.mark.skipif(threads.cores() < 2, reason="needs two cores")
def test_a_fixed_number_of_threads_gives_the_same_bytes_on_other_cores():
    on_one, on_two = run(1, 2), run(2, 2)
    assert on_one == on_two and on_one[0] == "2"
    count, digest = run(1, 0)
    assert count == "1" and digest != on_two[1], "sums no longer depend on the threads: drop the setting"


def test_a_number_that_comes_too_late_is_refused():
    jax.devices()
    threads.limit(0)
    threads.limit(threads.count())
    with pytest.raises(UserError, match="JAX has started"):
        threads.limit(threads.count() + 1)


def test_a_negative_number_is_refused():
    with pytest.raises(UserError, match="num_threads is -1"):
        threads.limit(-1)

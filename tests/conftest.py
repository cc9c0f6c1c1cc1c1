"""JAX has eight virtual devices, so that sharding is tested anywhere, and compiles fast rather than well.

What is said in the environment holds for the workers of pytest-xdist and the processes that tests start, too.
"""

import atexit
import contextlib
import os
import shutil
import tempfile
from importlib.metadata import version

import pytest

flags = ["--xla_force_host_platform_device_count=8", "--xla_cpu_parallel_codegen_split_count=1"]
if version("jaxlib").startswith("0.10."):
    flags.append("--xla_cpu_use_fusion_emitters=false")  # which take half of all time
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])

# The networks of tests are small: compiling them is all that takes time.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
# Many tests start the same program again. The directory is of this run alone, so that none of its results
# depend on an earlier one.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="im3d-compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax  # noqa: E402  (reads the environment)

# No silent broadcasting of ranks.
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def user_error():
    """`with user_error(pattern):` expects a UserError of a single line in which the pattern is found."""
    from recon_torch.errors import UserError  # not above, where the shape checks are not installed yet

    @contextlib.contextmanager
    def expect(pattern):
        with pytest.raises(UserError, match=pattern) as error:
            yield
        assert "\n" not in str(error.value)

    return expect

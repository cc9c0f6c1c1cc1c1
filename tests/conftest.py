"""JAX has eight virtual devices, so that sharding is tested anywhere, and compiles fast rather than well."""

import contextlib
import os
from importlib.metadata import version

import pytest

flags = ["--xla_force_host_platform_device_count=8", "--xla_cpu_parallel_codegen_split_count=1"]
if version("jaxlib").startswith("0.10."):
    flags.append("--xla_cpu_use_fusion_emitters=false")  # which take half of all time
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])

import jax  # noqa: E402  (reads XLA_FLAGS)

# The networks of tests are small: compiling them is all that takes time.
jax.config.update("jax_disable_most_optimizations", True)
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

"""Eight virtual devices on a CPU, so that sharding is tested anywhere; no silent broadcasting of ranks."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax  # noqa: E402  (reads XLA_FLAGS)

jax.config.update("jax_numpy_rank_promotion", "raise")

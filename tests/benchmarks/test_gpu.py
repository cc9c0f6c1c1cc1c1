"""The arithmetic of the GPU benchmarks, whose mistakes would not show in a table of times."""

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from im3d_jax.conditions.text import build_text

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def benchmarks_can_be_imported():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield
    sys.path.remove(str(ROOT / "benchmarks"))


def test_a_floor_is_the_slower_of_arithmetic_and_memory():
    from gpu_machine import Rates, Stage

    rates = Rates(bfloat16=100.0, float32=50.0, bandwidth=10.0)
    assert Stage("products", 8.0, flops=400.0, bytes=30.0).bound(rates) == ("matrix rate", 4.0)
    assert Stage("products", 8.0, flops=400.0, dtype="float32").bound(rates) == ("matrix rate", 8.0)
    copied = Stage("copy", 8.0, flops=100.0, bytes=40.0).record(rates)
    assert (copied["bound_by"], copied["floor_seconds"], copied["ratio"]) == ("bandwidth", 4.0, 2.0)
    assert Stage("host", 1.0).record(rates)["ratio"] is None


def test_a_stage_leaves_out_the_stages_within_it():
    from gpu_pipeline import Stages

    thing = SimpleNamespace(inner=lambda: time.sleep(0.05))
    thing.outer = lambda: (thing.inner(), thing.inner(), time.sleep(0.01))
    stages = Stages()
    stages.watch(thing, "inner", "inner")
    stages.watch(thing, "outer", "outer")
    started = time.perf_counter()
    thing.outer()
    elapsed = time.perf_counter() - started
    assert stages.calls == {"inner": 2, "outer": 1}
    assert stages.seconds["inner"] >= 0.1
    assert sum(stages.seconds.values()) == pytest.approx(elapsed, rel=0.02)


def test_fit_flops_are_proportional_to_the_pixels():
    from gpu_pipeline import fit_step_flops
    from torch.utils.flop_counter import FlopCounterMode

    from recon_torch.losses.lpips import PerceptualDistance
    from recon_torch.settings import FitSettings

    perceptual = PerceptualDistance("vgg").rounded(torch.float32, 3)
    image, other = (
        torch.rand(1, 160, 160, 3, requires_grad=True),
        perceptual.features(torch.rand(1, 160, 160, 3)),
    )
    with FlopCounterMode(display=False) as counter:
        perceptual.distance(image, [each.detach() for each in other]).sum().backward()
    assert fit_step_flops(160, FitSettings(lpips_stages=3)) == pytest.approx(
        counter.get_total_flops(), rel=1e-6
    )


def test_random_parameters_are_random_in_every_leaf():
    from gpu_paper import random_params

    start = {"kernel": jnp.zeros((3, 3, 16, 32)), "norm": {"scale": jnp.ones(32)}}
    params = random_params(SimpleNamespace(init=lambda key: start))
    assert jax.tree.map(lambda x: x.shape, params) == jax.tree.map(lambda x: x.shape, start)
    kernel, scale = (np.asarray(x, np.float32) for x in (params["kernel"], params["norm"]["scale"]))
    assert kernel.std() == pytest.approx((3 * 3 * 16) ** -0.5, rel=0.05)
    assert scale.std() > 0


def test_the_papers_config_with_random_embeddings(tmp_path):
    import gpu_paper

    config = gpu_paper.load_config(tmp_path, small=False)
    text = build_text(**config.text.to_dict())
    embeddings, masks = text.encode([gpu_paper.PROMPT, ""])
    assert [each.shape for each in embeddings] == [(2, 77, 768), (2, 77, 2048)]
    assert all(mask.all() for mask in masks)

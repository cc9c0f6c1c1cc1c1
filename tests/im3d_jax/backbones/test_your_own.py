"""The worked example of docs/backbones.md keeps the contract and makes a turntable."""

import re
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from im3d_jax import backbones, config_flags, generator
from im3d_jax.backbones import conformance

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs" / "backbones.md"


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The module of the document, importable as its text says."""
    (code,) = re.findall(r"```python\n(\"\"\"my_pkg/my_model\.py.*?)```", DOCS.read_text(), re.DOTALL)
    assert len(code.splitlines()) < 80
    package = tmp_path_factory.mktemp("user") / "my_pkg"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "my_model.py").write_text(code)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(package.parent))
        yield "my_pkg.my_model"
    sys.modules.pop("my_pkg.my_model", None)
    sys.modules.pop("my_pkg", None)


def test_it_keeps_the_contract(example):
    model = backbones.build(example, backbones.small_kwargs(example))
    results = conformance.check(model, "temporal")
    assert [result for result in results if result.outcome == "failed"] == []


def test_its_config_makes_a_turntable_from_a_picture(example, tmp_path):
    (code,) = re.findall(r"\n( +from configs import .*?return config)\n", DOCS.read_text(), re.DOTALL)
    (tmp_path / "config.py").write_text(textwrap.dedent(code))
    config = config_flags.load(tmp_path / "config.py")
    assert config.backbone.name == example and config.backbone.kwargs.width == 128
    config.backbone.kwargs.update(latent_shape=(2, 2, 64), width=8)
    config.update(size=8, num_views=4, weights="random")
    config.video.num_steps = 2
    made = generator.load(config)
    rgb, alpha = jnp.full((1, 8, 8, 3), 0.4), jnp.ones((1, 8, 8, 1))
    latents = made.turntable(made.condition([""], rgb, alpha), jax.random.key(0))
    views, masks = made.decode(latents)
    assert views.shape == (1, 4, 8, 8, 3) and masks.shape == (1, 4, 8, 8, 1)
    np.testing.assert_allclose(views[:, 0], rgb, atol=1e-5)

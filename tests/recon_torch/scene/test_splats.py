"""Which steps of a fit see their views enlarged."""

import numpy as np
import pytest
import torch

from recon_torch.raster import LOW_PASS_PX2, Render
from recon_torch.scene import splats
from recon_torch.settings import FitSettings
from recon_torch.views.cameras import orbit

CAMERAS = orbit(2, 0.3, 32)
STEPS = 200


@pytest.fixture
def low_passes(monkeypatch) -> list[tuple[float, int]]:
    """Of each call that renders: what is added to the variances of splats, and how many scenes there are."""
    calls = []

    def render(scenes, cameras, *, low_pass_px2, **_):
        calls.append((low_pass_px2, len(scenes)))
        return [Render(torch.full((1,), low_pass_px2), each.means, each.means, {}) for each in scenes]

    monkeypatch.setattr(splats, "render_together", render)
    return calls


def scene(**settings) -> splats.Splats:
    settings = FitSettings(num_gaussians=4, num_steps=STEPS, prune_unseen=0.0, **settings)
    return splats.Splats(CAMERAS, settings, torch.device("cpu"))


def share_of_zoomed(thing: splats.Splats, calls: list[tuple[float, int]]) -> float:
    calls.clear()
    for seed in range(2000):
        splats.Splats.render_together([thing], [CAMERAS[0:1]], [seed])
    assert {low_pass for low_pass, _ in calls} <= {LOW_PASS_PX2, LOW_PASS_PX2 / 4}
    return float(np.mean([low_pass < LOW_PASS_PX2 for low_pass, _ in calls]))


def test_early_steps_are_zoomed_five_times_as_often(low_passes):
    thing, info = scene(zoomed=0.1, refine_until=0.0), {}
    assert abs(share_of_zoomed(thing, low_passes) - 0.5) < 0.04
    thing.refine(139, info, seed=0)
    assert abs(share_of_zoomed(thing, low_passes) - 0.1) < 0.03
    restored = scene(zoomed=0.1)
    restored.load_state_dict(thing.state_dict())
    assert share_of_zoomed(restored, low_passes) == share_of_zoomed(thing, low_passes)


def test_without_zooming_and_outside_of_steps_views_are_seen_as_viewers_draw_them(low_passes):
    assert share_of_zoomed(scene(zoomed=0.0), low_passes) == 0
    splats.Splats.render_together([scene(zoomed=0.2)] * 50, [CAMERAS] * 50, [None] * 50)
    assert low_passes[-1] == (LOW_PASS_PX2, 50)


def test_scenes_that_are_rendered_together_are_zoomed_each_by_its_own_seed(low_passes):
    things, seeds = [scene(zoomed=0.1) for _ in range(20)], list(range(20))
    together = splats.Splats.render_together(things, [CAMERAS[0:1]] * 20, seeds)
    assert len(low_passes) == 2 and sum(count for _, count in low_passes) == 20
    for thing, seed, render in zip(things, seeds, together, strict=True):
        (alone,) = splats.Splats.render_together([thing], [CAMERAS[0:1]], [seed])
        assert alone.rgb.item() == render.rgb.item()

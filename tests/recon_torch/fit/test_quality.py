"""Each gate finds a failure made for it, and finds nothing on a good object or on a real fit."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from recon_torch.fit.loss import Targets
from recon_torch.fit.optimization import Fit
from recon_torch.fit.quality import agreement_gate, floor_gate, inspect, rigidity_gate, upright
from recon_torch.raster.gaussians import Gaussians
from recon_torch.raster.render import render as render_gaussians
from recon_torch.scene.opacity_grid import opacity_grid
from recon_torch.settings import FitSettings, GateSettings
from recon_torch.views import rigidity
from recon_torch.views.cameras import Cameras, orbit

pytestmark = pytest.mark.slow

CAMERAS = orbit(8, 0.35, 64)
GREY, RED, BLUE, GREEN = (0.5, 0.5, 0.5), (0.8, 0.1, 0.1), (0.1, 0.2, 0.8), (0.1, 0.6, 0.2)


def ellipsoid(center, radii, color, num=500) -> Gaussians:
    """Small opaque Gaussians spread over the surface by the golden angle."""
    index = torch.arange(num)
    z = 1 - (2 * index + 1) / num
    turn, ring = index * math.pi * (3 - math.sqrt(5)), (1 - z * z).sqrt()
    points = torch.stack([ring * turn.cos(), ring * turn.sin(), z], -1) * torch.tensor(radii)
    area = 4 * math.pi * max(radii) * sorted(radii)[1]
    return gaussians(points + torch.tensor(center), 0.6 * math.sqrt(area / num), color)


def gaussians(means, scale, color) -> Gaussians:
    num = len(means)
    return Gaussians(
        means=means.float(),
        quats=torch.tensor([1.0, 0, 0, 0]).repeat(num, 1),
        log_scales=torch.full((num, 3), math.log(scale)),
        opacity_logits=torch.full((num,), 4.0),
        sh0=((torch.tensor(color) - 0.5) / 0.28209479).repeat(num, 1),
    )


def together(*parts: Gaussians) -> Gaussians:
    return Gaussians(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def duck() -> Gaussians:
    """A body along x, a head and a beak at its front."""
    body = ellipsoid((0, 0, -0.1), (0.3, 0.2, 0.15), BLUE)
    return together(
        body, ellipsoid((0.2, 0, 0.12), (0.12,) * 3, GREEN), ellipsoid((0.33, 0, 0.12), (0.06,) * 3, RED, 100)
    )


def floor(z=-0.26) -> Gaussians:
    ticks = torch.linspace(-0.5, 0.5, 40)
    x, y = torch.meshgrid(ticks, ticks, indexing="ij")
    return gaussians(torch.stack([x, y, torch.full_like(x, z)], -1).view(-1, 3), 0.013, GREY)


def two_faced() -> Gaussians:
    """A wide head with eyes and a mouth on either flat side, or on one of them."""
    return together(one_faced(), *face(-1))


def one_faced() -> Gaussians:
    return together(ellipsoid((0, 0, 0), (0.15, 0.35, 0.35), GREEN, 1500), *face(1))


def face(side):
    eyes = [ellipsoid((0.13 * side, y, 0.1), (0.06, 0.07, 0.07), BLUE, 200) for y in (-0.15, 0.15)]
    return [*eyes, ellipsoid((0.13 * side, 0, -0.15), (0.06, 0.2, 0.05), RED, 300)]


def render(scene: Gaussians, cameras: Cameras):
    return render_gaussians(scene, cameras, background=torch.ones(3))


def fitted(scene: Gaussians, views: torch.Tensor | None = None, masks: torch.Tensor | None = None):
    """Stands for a fit; its targets are renders of the scene itself unless others are given."""
    image = render(scene, CAMERAS)
    return SimpleNamespace(
        cameras=CAMERAS,
        targets=Targets(
            image.rgb if views is None else views,
            image.alpha if masks is None else masks,
            torch.device("cpu"),
            lambda views: [],
        ),
        render=lambda cameras: render(scene, cameras),
        scene=SimpleNamespace(opacity_grid=lambda *cube: opacity_grid(scene, *cube)),
    )


def judge(*args, **changes):
    return inspect(fitted(*args), CAMERAS, settings=GateSettings(**changes))


@pytest.mark.parametrize("scene", [duck, one_faced, lambda: ellipsoid((0, 0, 0), (0.4,) * 3, RED, 1500)])
def test_a_good_object_gets_no_reasons_and_no_hints(scene):
    judged = judge(scene())
    assert (judged["verdict"], judged["reasons"], judged["hints"]) == ("good", [], [])
    assert judged["numbers"]["worst_view_psnr"] == 99 and judged["numbers"]["worst_view_shape"] == 1


def test_without_masks_colours_alone_tell_a_wrong_view():
    fit = fitted(duck())
    fit.targets.masks = None
    judged = inspect(fit, CAMERAS)
    assert (judged["verdict"], judged["numbers"]["worst_view_psnr"]) == ("good", 99)
    fit.targets.views[1] = 1 - fit.targets.views[1]
    (reason,) = inspect(fit, CAMERAS)["reasons"]
    assert "disagree with views 1," in reason


@pytest.mark.parametrize(("count", "verdict"), [(2, "suspect"), (12, "bad")])
def test_floaters_are_counted_and_make_the_verdict(count, verdict):
    angles = 2 * math.pi * (torch.arange(count) + 0.5) / count
    places = torch.stack([0.45 * angles.cos(), 0.45 * angles.sin(), 0.3 + 0 * angles], -1)
    specks = [ellipsoid(place.tolist(), (0.03,) * 3, GREY, 30) for place in places]
    judged = judge(together(duck(), *specks))
    assert judged["verdict"] == verdict and f"in {count} small pieces" in judged["reasons"][0]
    assert judged["numbers"]["floaters_count"] == count
    assert judge(together(duck(), *specks), floaters=0.99)["verdict"] == "good"


def test_two_large_pieces_are_one_object():
    pair = together(ellipsoid((0.3, 0, 0), (0.15,) * 3, RED), ellipsoid((-0.3, 0, 0), (0.15,) * 3, BLUE))
    assert judge(pair)["verdict"] == "good"


def test_a_gap_that_no_view_shows_makes_no_floater():
    """A stem ends inside a dome without touching it."""
    dome = ellipsoid((0, 0, 0.05), (0.35, 0.35, 0.25), RED, 2500)
    dome = Gaussians(*(tensor[dome.means[:, 2] > 0.05] for tensor in dome))
    stem = ellipsoid((0, 0, -0.03), (0.03, 0.03, 0.12), BLUE, 100)
    judged = judge(together(dome, stem))
    assert judged["verdict"] == "good" and judged["numbers"]["floaters_count"] == 0
    beside = stem._replace(means=stem.means + torch.tensor([0.45, 0.35, 0]))
    assert judge(together(dome, beside))["numbers"]["floaters_count"] == 1


def test_views_far_below_the_median_are_named_though_none_is_bad_by_itself():
    shape = torch.ones(8)
    psnr_db = torch.tensor([28.0, 27.5, 29.0, 16.0, 28.5, 28.0, 26.5, 27.0])
    numbers, finding = agreement_gate(shape, psnr_db, GateSettings())
    assert (
        finding is not None and "views 3, " in finding.text and "(16.0 dB, the median 27.5)" in finding.text
    )
    assert numbers["median_view_psnr"] == 27.5
    assert agreement_gate(shape, psnr_db, GateSettings(view_gap=12.0))[1] is None
    assert agreement_gate(shape, torch.full((8,), torch.nan), GateSettings())[1] is None


def test_a_floor_is_found_below_an_object_and_not_through_it():
    judged = judge(together(duck(), floor()))
    assert judged["verdict"] == "suspect" and "a floor?" in judged["reasons"][0]
    assert judged["numbers"]["floor_area"] == pytest.approx(1.0, abs=0.15)
    assert not any("floor" in reason for reason in judge(together(duck(), floor(z=0.26)))["reasons"])


@pytest.mark.parametrize("up", ([0, 0, 1], [0, -1, 0], [1, 0, 0]))
def test_a_floor_is_found_below_for_any_up_axis(up):
    grid = np.zeros((12, 12, 12))
    grid[2:10, 2:10, 3] = 1  # the sheet
    grid[5:7, 5:7, 3:8] = 1  # what stands on it
    lying = np.moveaxis(grid, 2, np.abs(up).argmax())
    lying = lying if sum(up) > 0 else np.flip(lying, np.abs(up).argmax())
    numbers, finding = floor_gate(upright(lying, np.array(up, float)), GateSettings())
    assert finding.level == "suspect" and numbers["floor_ratio"] == 16
    assert floor_gate(upright(lying, -np.array(up, float)), GateSettings())[1] is None


def test_renders_that_are_empty_full_or_cut_off_are_found():
    nothing = duck()._replace(opacity_logits=torch.full((1100,), -8.0))
    judged = judge(nothing, torch.ones(8, 64, 64, 3), torch.zeros(8, 64, 64, 1))
    assert judged["verdict"] == "bad" and "shows nothing in renders 0, 1, 2" in judged["reasons"][0]
    judged = judge(ellipsoid((0, 0, 0), (1.2,) * 3, RED, 4000))
    assert judged["verdict"] == "bad" and "covers everything" in judged["reasons"][0]
    judged = judge(ellipsoid((0, 0, 0), (0.1, 0.1, 0.7), RED, 1500))
    assert judged["verdict"] == "suspect" and "touches the border" in judged["reasons"][0]


@pytest.mark.parametrize(("wrong", "verdict"), [([3], "suspect"), ([1, 3, 6], "bad")])
def test_views_that_disagree_are_named(wrong, verdict):
    image = render(duck(), CAMERAS)
    blank = [image.rgb.clone(), image.alpha.clone()]
    blank[0][wrong], blank[1][wrong] = 1, 0
    recolored = image.rgb.clone()
    recolored[wrong] = recolored[wrong].flip(-1)
    for targets in (blank, [recolored, image.alpha]):
        judged = judge(duck(), *targets)
        assert judged["verdict"] == verdict and f"views {str(wrong)[1:-1]}," in judged["reasons"][0]


def test_two_faces_are_a_hint():
    judged = judge(two_faced())
    assert judged["verdict"] == "good" and "two faces?" in judged["hints"][0]
    assert judged["numbers"]["janus_back"] > 0.9 > judge(one_faced())["numbers"]["janus_back"]


def test_a_real_fit_is_good():
    """The duck is fitted to its own views."""
    image = render(duck(), CAMERAS)
    settings = FitSettings(num_gaussians=1000, num_steps=250, lpips_net="alex", lpips_stages=2)
    fit = Fit(CAMERAS, settings, "cpu")
    fit.set_targets(image.rgb, image.alpha)
    fit.run(settings.num_steps)
    judged = inspect(fit, CAMERAS)
    assert judged["verdict"] == "good" and judged["numbers"]["worst_view_shape"] > 0.85


def test_settings_are_documented():
    assert all(field.name in GateSettings.__doc__ for field in dataclasses.fields(GateSettings))


def test_a_quarter_of_the_views_has_to_stick_out_before_the_object_moves():
    excursions = np.zeros(16, np.float32)
    excursions[[2, 5, 9]] = 0.2
    numbers, finding = rigidity_gate(excursions, GateSettings())
    assert finding is None and numbers["motion"] == 0
    excursions[12] = 0.1
    numbers, finding = rigidity_gate(excursions, GateSettings())
    assert finding.level == "bad" and numbers["motion"] == pytest.approx(0.1)
    assert "explains views 2, 5, 9, 12:" in finding.text and "by up to 20.0%" in finding.text
    assert rigidity_gate(excursions, GateSettings(view_motion=0.15))[1] is None


def test_a_limb_that_moves_during_the_orbit_is_found_and_one_at_rest_is_not():
    cameras = orbit(16, 0.3, 64)
    body = ellipsoid((0, 0, 0), (0.25, 0.2, 0.2), BLUE)

    def verdict(height):
        heights = height * np.sin(2 * np.pi * np.arange(16) / 16)
        limbs = [ellipsoid((0.3, 0, z), (0.12, 0.05, 0.05), RED, 200) for z in heights]
        masks = torch.cat([render(together(body, limb), cameras[k]).alpha for k, limb in enumerate(limbs)])
        return rigidity_gate(rigidity.excursions(cameras, masks.numpy()), GateSettings())[1]

    assert verdict(0.0) is None and "does it move?" in verdict(0.15).text


def test_the_verdict_is_on_the_masks_that_are_handed_in():
    given = np.full(8, 0.2, np.float32)
    assert inspect(fitted(duck()), CAMERAS)["verdict"] == "good"
    (reason,) = inspect(fitted(duck()), CAMERAS, excursions=given)["reasons"]
    assert "no rigid object explains views 0, 1, 2, 3, 4, 5, 6, 7" in reason

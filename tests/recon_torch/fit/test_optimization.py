"""Fits to views of known Gaussians: they find them, repeat themselves and keep to their settings."""

import dataclasses
import io
import math

import numpy as np
import pytest
import torch

from recon_torch import hosting
from recon_torch.errors import UserError
from recon_torch.fit.optimization import Fit, run_together, step_together
from recon_torch.losses.lpips import PerceptualDistance
from recon_torch.losses.ssim import ms_ssim
from recon_torch.raster.gaussians import Gaussians
from recon_torch.raster.render import render as render_gaussians
from recon_torch.scene.densify import CappedStrategy
from recon_torch.scene.visibility import seen_px
from recon_torch.settings import FitSettings
from recon_torch.views.cameras import Cameras, orbit

pytestmark = pytest.mark.slow

SIZE = 32


def known_object(color_shift: float = 0.0) -> Gaussians:
    """Four opaque blobs of different colours and shapes, none in line with another."""
    means = torch.tensor([[0.0, 0.0, -0.2], [0.2, 0.0, 0.1], [-0.15, 0.2, 0.15], [-0.1, -0.25, 0.0]])
    colors = torch.tensor([[0.8, 0.2, 0.1], [0.1, 0.6, 0.2], [0.2, 0.3, 0.9], [0.9, 0.8, 0.2]])
    return Gaussians(
        means=means,
        quats=torch.tensor([1.0, 0, 0, 0]).repeat(4, 1),
        log_scales=torch.tensor(
            [[0.15, 0.15, 0.05], [0.06, 0.1, 0.1], [0.1, 0.1, 0.1], [0.08, 0.05, 0.12]]
        ).log(),
        opacity_logits=torch.full((4,), 5.0),
        sh0=((colors + color_shift).clamp(0, 1) - 0.5) / 0.28209479,
    )


def render(gaussians: Gaussians, cameras: Cameras) -> tuple[torch.Tensor, torch.Tensor]:
    image = render_gaussians(gaussians, cameras, background=torch.ones(3))
    return image.rgb, image.alpha


CAMERAS = orbit(8, 0.4, SIZE)
HELD_OUT = orbit(8, 0.4, SIZE, azimuths_rad=2 * np.pi * (np.arange(8) + 0.5) / 8)
QUICK = FitSettings(
    num_gaussians=600,
    num_steps=300,
    lpips_net="alex",
    lpips_stages=2,
    lpips_weights="random",
    max_gaussians=2000,
    engine="cpu",
)


def make_fit(color_shift: float = 0.0, **changes) -> Fit:
    fit = Fit(CAMERAS, dataclasses.replace(QUICK, **changes), "cpu")
    fit.set_targets(*render(known_object(color_shift), CAMERAS))
    return fit


def test_a_view_counts_by_its_weight():
    """One view is rendered in a step: its loss is that of a fit without weights times its own."""
    weights = np.linspace(0.5, 4, len(CAMERAS)).tolist()
    plain, weighted = make_fit(w_lpips=0.0), make_fit(w_lpips=0.0)
    weighted.set_targets(plain.targets.views, plain.targets.masks, weights)
    (view,) = plain.views_of_step()
    (before,), (after,) = step_together([plain]), step_together([weighted])
    assert before.keys() == after.keys() and before["loss"] > 0
    for name, loss in before.items():
        torch.testing.assert_close(after[name], weights[view] * loss)
    with pytest.raises(ValueError, match="3 weights for 8 views"):
        plain.set_targets(plain.targets.views, plain.targets.masks, [1.0, 1.0, 1.0])


def bytes_of(fit: Fit) -> bytes:
    return b"".join(tensor.numpy().tobytes() for tensor in fit.scene.gaussians)


PAPER = dict(start="ball", w_l1=0.0, prune_unseen=0.0, zoomed=0.0)


@pytest.mark.parametrize("settings, iou", [(PAPER, 0.9), ({}, 0.85)])
def test_a_fit_agrees_with_held_out_views(settings, iou):
    fit = make_fit(**settings)
    views, masks = render(known_object(), HELD_OUT)
    before = make_fit(start="ball").compare(HELD_OUT, views, masks)
    fit.run(300)
    after = fit.compare(HELD_OUT, views, masks)
    assert before["psnr"] < 20 and after["psnr"] > 30
    assert before["silhouette_iou"] < 0.6 and after["silhouette_iou"] > iou
    assert after["ssim"] > 0.95 > before["ssim"]
    assert after["lpips"] < 0.2 * before["lpips"]


def test_gaussians_start_within_the_hull_of_the_targets_masks():
    """The start is the part of the ball that is near the object, or all of it where there is no hull."""
    fit, again, other = (make_fit(start="hull", seed=seed) for seed in (0, 0, 1))
    assert bytes_of(fit) == bytes_of(again) != bytes_of(other)
    ball, started = make_fit(start="ball").scene.gaussians.means, fit.scene.gaussians.means
    nearest = (ball[:, None] - known_object().means).norm(dim=-1).min(1).values
    kept = (ball[:, None] == started).all(-1).any(1)
    assert kept.sum() == len(started) and kept[nearest < 0.05].all() and not kept[nearest > 0.4].any()
    views, masks = render(known_object(), CAMERAS)
    fit.set_targets(views, torch.ones_like(masks))
    assert fit.num_gaussians > len(started)
    fit.set_targets(views, masks)
    assert bytes_of(fit) == bytes_of(again)
    fit.run(1)
    moved = bytes_of(fit)
    fit.set_targets(views, masks)  # as the method's rounds do
    assert bytes_of(fit) == moved

    corners = torch.zeros(masks.shape)
    corners[0::2, :8, :8], corners[1::2, -8:, -8:] = 1.0, 1.0
    lost = make_fit(start="hull")
    lost.set_targets(views, corners)
    assert "agree on no place" in lost.notes[-1] and torch.equal(lost.scene.gaussians.means, ball)


def test_what_no_view_sees_is_pruned_after_the_last_step():
    """What fills fewer pixels than `prune_unseen` times the mean is dropped; with 0, nothing is."""
    settings = dict(num_steps=8, start="ball", prune_opacity=0.0)
    kept, fit = (make_fit(prune_unseen=share, **settings) for share in (0.0, 0.9))
    kept.run(8)
    fit.run(8)
    seen = seen_px(kept.scene.gaussians, CAMERAS)
    expected = kept.scene.gaussians.means[seen >= 0.9 * seen.mean()]
    assert 0 < len(expected) < kept.num_gaussians == QUICK.num_gaussians
    assert torch.equal(fit.scene.gaussians.means, expected)


def test_the_same_seed_gives_the_same_bytes():
    fits = [make_fit(seed=seed, refine_every=10) for seed in (3, 3, 4)]
    for fit in fits:
        fit.run(25)
    first, again, other = map(bytes_of, fits)
    assert first == again != other


def test_a_restored_fit_goes_on_bit_for_bit():
    """The steps include densifications (10, 20, 30, 40), which change the number of Gaussians."""
    settings = dict(refine_every=10, grow_grad2d=1e-4)
    whole = make_fit(**settings)
    whole.run(45)
    broken = make_fit(**settings)
    broken.run(23)
    file = io.BytesIO()
    torch.save(broken.state_dict(), file)
    file.seek(0)
    resumed = make_fit(**settings)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.step == 23 and resumed.num_gaussians == broken.num_gaussians != QUICK.num_gaussians
    resumed.run(45)
    assert bytes_of(resumed) == bytes_of(whole)


def test_a_state_does_not_change_with_the_fit():
    fit = make_fit()
    fit.run(3)
    state = fit.state_dict()
    fit.run(6)
    expected = bytes_of(fit)
    for _ in range(2):
        fit.load_state_dict(state)
        assert fit.step == 3
        fit.run(6)
        assert bytes_of(fit) == expected


def test_fits_that_run_together_end_as_they_do_alone():
    """They differ in objects, seeds and numbers of views, and densify at steps 10 and 20."""
    settings = dataclasses.replace(QUICK, refine_every=10, lpips_dtype="float32", views_per_step=2)
    shifts, losses = (0.0, 0.2, -0.3), {}

    def new_fits():
        fits = []
        for number, shift in enumerate(shifts):
            cameras = orbit(4 + 2 * number, 0.4, SIZE)
            fits.append(Fit(cameras, dataclasses.replace(settings, seed=number), "cpu"))
            fits[-1].set_targets(*render(known_object(shift), cameras))
        return fits

    together, alone = new_fits(), new_fits()
    run_together(together, 25, lambda fit, values: losses.setdefault(fit.settings.seed, []).append(values))
    assert len({fit.num_gaussians for fit in together}) == 3
    for fit, expected in zip(together, alone, strict=True):
        theirs = []
        expected.run(25, lambda step, values, theirs=theirs: theirs.append(values))
        assert fit.step == 25 and fit.num_gaussians == pytest.approx(expected.num_gaussians, rel=0.01)
        for name in ("loss", "lpips", "ssim", "mask", "l1"):
            ours = [values[name].item() for values in losses[fit.settings.seed]]
            np.testing.assert_allclose(ours[:11], [v[name].item() for v in theirs[:11]], rtol=1e-3, atol=1e-6)
        assert fit.metrics()["psnr"] == pytest.approx(expected.metrics()["psnr"], abs=0.3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gsplat_ends_where_the_cpu_engine_does():
    """This holds for a fit alone and for one in a batch."""
    views, masks = render(known_object(), HELD_OUT)
    fits = {name: make_on(device) for name, device in (("cpu", "cpu"), ("alone", "cuda"))}
    batch = [make_on("cuda", seed=seed) for seed in range(3)]
    for fit in fits.values():
        fit.run(150)
    run_together(batch, 150)
    scores = [fit.compare(HELD_OUT, views, masks)["psnr"] for fit in (*fits.values(), *batch)]
    assert min(scores) > 25 and max(scores) - min(scores) < 2


def make_on(device: str, seed: int = 0) -> Fit:
    fit = Fit(CAMERAS, dataclasses.replace(QUICK, engine="auto", seed=seed), device)
    fit.set_targets(*render(known_object(), CAMERAS))
    return fit


def test_fits_that_differ_do_not_run_together():
    fit, other = make_fit(), make_fit(w_mask=2.0)
    with pytest.raises(ValueError, match="do not run together"):
        run_together([fit, other], 1)
    larger = Fit(orbit(4, size=48), QUICK, "cpu")
    with pytest.raises(ValueError, match="do not run together"):
        run_together([fit, larger], 1)
    maskless = make_fit()
    maskless.set_targets(maskless.targets.views, None)
    with pytest.raises(ValueError, match="with and without masks"):
        run_together([fit, maskless], 1)


def test_without_masks_the_views_alone_are_followed_from_a_ball():
    """They are over grey and have noise, and are compared with views that have none."""
    grey, noise = 0.5, 8 / 255
    settings = dataclasses.replace(QUICK, w_lpips=0.0, background=grey)
    image = render_gaussians(known_object(), CAMERAS, background=torch.full((3,), grey))
    generator = torch.Generator().manual_seed(0)
    noisy = (image.rgb + noise * torch.randn(image.rgb.shape, generator=generator)).clamp(0, 1)
    fit = Fit(CAMERAS, settings, "cpu")
    fit.set_targets(noisy, None)
    ball = Fit(CAMERAS, dataclasses.replace(settings, start="ball"), "cpu")
    assert bytes_of(fit) == bytes_of(ball)
    seen = []
    fit.run(300, lambda step, losses: seen.append(set(losses)))
    assert seen[0] == {"ssim", "l1", "loss"}
    truth = render_gaussians(known_object(), HELD_OUT, background=torch.full((3,), grey)).rgb
    scores = fit.compare(HELD_OUT, truth, None)
    assert set(scores) == {"psnr", "ssim", "lpips"} and scores["psnr"] > 27


def test_masks_that_are_a_guess_do_not_spoil_a_fit():
    """Masks two pixels too wide, with and without word that they are a guess there."""
    views, masks = render(known_object(), CAMERAS)
    wide = torch.nn.functional.max_pool2d(masks.permute(0, 3, 1, 2), 5, 1, 2).permute(0, 2, 3, 1).round()
    settings = dataclasses.replace(QUICK, w_lpips=0.0, num_gaussians=300, num_steps=100)
    told, trusting = Fit(CAMERAS, settings, "cpu"), Fit(CAMERAS, settings, "cpu")
    told.set_targets(views, wide, unsure=(wide - masks).abs() > 0.02)
    trusting.set_targets(views, wide)
    held_out = render(known_object(), HELD_OUT)
    scores = []
    for fit in (told, trusting):
        assert torch.equal(fit.targets.masks, wide)
        fit.run(100)
        scores.append(fit.compare(HELD_OUT, *held_out)["silhouette_iou"])
    assert scores[0] > scores[1] + 0.1


def test_new_targets_in_mid_fit_are_followed():
    fit = make_fit()
    fit.run(100)
    views, masks = render(known_object(color_shift=0.3), CAMERAS)
    before = fit.compare(CAMERAS, views, masks)["psnr"]
    fit.set_targets(views, masks)
    fit.run(200)
    assert fit.metrics()["psnr"] > before + 5


def test_targets_are_copied():
    views, masks = render(known_object(), CAMERAS)
    fits = [Fit(CAMERAS, QUICK, "cpu") for _ in range(2)]
    for fit in fits:
        fit.set_targets(views, masks)
    fits[0].run(5)
    views.zero_()
    masks.zero_()
    fits[1].run(5)
    assert bytes_of(fits[0]) == bytes_of(fits[1])


def test_the_loss_is_that_of_the_paper():
    """10 LPIPS + 0.2 (1 - MS-SSIM) + mask loss, from a render of the start by the public functions."""
    fit = make_fit(views_per_step=8, lpips_stages=5, lpips_dtype="float32", w_l1=0.0)
    rgb, alpha = render(fit.scene.gaussians, CAMERAS)
    views, masks = render(known_object(), CAMERAS)
    lpips = PerceptualDistance("alex")
    expected = (
        10 * lpips.distance(rgb, lpips.features(views)).mean()
        + 0.2 * (1 - ms_ssim(rgb, views).mean())
        + (alpha - masks).square().mean()
    )
    seen = []
    fit.run(1, lambda step, losses: seen.append(losses["loss"].item()))
    assert seen == [pytest.approx(expected.item(), rel=1e-4)]


def test_bfloat16_ends_where_float32_does():
    views, masks = render(known_object(), HELD_OUT)
    psnr = {}
    for dtype in ("float32", "bfloat16"):
        fit = make_fit(lpips_dtype=dtype)
        fit.run(150)
        psnr[dtype] = fit.compare(HELD_OUT, views, masks)["psnr"]
    assert psnr["bfloat16"] == pytest.approx(psnr["float32"], abs=0.5) and psnr["float32"] > 25


@pytest.mark.parametrize("removed", ["lpips", "ssim", "mask"])
def test_each_term_can_be_removed(removed):
    """These are the ablations of Table 2, with the pixel loss in the place of LPIPS."""
    changes = {f"w_{removed}": 0.0, "w_l1": 0.0} | ({"w_rgb": 1.0} if removed == "lpips" else {})
    fit, seen = make_fit(**changes), []
    fit.run(60, lambda step, losses: seen.append({name: loss.item() for name, loss in losses.items()}))
    expected = {"lpips", "ssim", "mask", "loss"} - {removed} | ({"rgb"} if removed == "lpips" else set())
    assert set(seen[0]) == expected
    assert np.mean([losses["loss"] for losses in seen[-8:]]) < 0.7 * np.mean(
        [losses["loss"] for losses in seen[:8]]
    )


def test_every_view_is_fitted_once_in_each_shuffle():
    fit = make_fit(views_per_step=2)
    rounds = []
    for step in range(8):
        fit.step = step
        rounds.append(fit.views_of_step())
    first, second = np.concatenate(rounds[:4]), np.concatenate(rounds[4:])
    assert sorted(first) == sorted(second) == list(range(8))
    assert list(first) != list(second)


def test_number_of_gaussians_stays_below_the_cap():
    settings = dict(start="ball", refine_every=5, grow_grad2d=0.0, prune_opacity=0.0, max_gaussians=650)
    fit, counts = make_fit(**settings), []
    fit.run(16, lambda step, losses: counts.append(fit.num_gaussians))
    assert counts[0] == 600 and max(counts) == 650


def test_below_the_cap_the_largest_gradients_come_first():
    strategy = CappedStrategy(grow_grad2d=0.5, refine_start_iter=0, refine_every=1)
    strategy.max_gaussians = 6
    tensors = dict(means=torch.zeros(4, 3), quats=torch.ones(4, 4), scales=torch.full((4, 3), -9.0))
    tensors |= dict(opacities=torch.zeros(4), sh0=torch.arange(12.0).reshape(4, 3))
    params = {name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}
    optimizers = {name: torch.optim.Adam([param]) for name, param in params.items()}
    means2d = torch.zeros(1, 4, 2)
    means2d.grad = torch.zeros(1, 4, 2)
    means2d.grad[0, :, 0] = torch.tensor([0.6, 0.9, 0.4, 0.8])
    info = dict(means2d=means2d, radii=torch.ones(1, 4, 2), width=2, height=2, n_cameras=1, gaussian_ids=None)
    strategy.step_post_backward(params, optimizers, strategy.initialize_state(), 1, info)
    assert len(params["means"]) == 6
    assert params["sh0"][4:, 0].tolist() == [3.0, 9.0] and strategy.grow_grad2d == 0.5


def test_bad_targets_and_settings_are_refused():
    fit = make_fit()
    views, masks = render(known_object(), CAMERAS)
    for tensor in (views, masks):
        broken = [views.clone(), masks.clone()]
        broken[0 if tensor is views else 1][5, 3, 3] = math.nan
        with pytest.raises(UserError, match=r"views \[5\].*not finite"):
            fit.set_targets(*broken)
    with pytest.raises(UserError, match="no foreground"):
        fit.set_targets(views, torch.zeros_like(masks))
    with pytest.raises(ValueError, match="for cameras"):
        fit.set_targets(views[:3], masks[:3])
    with pytest.raises(UserError, match="lpips_stages is 6"):
        Fit(CAMERAS, dataclasses.replace(QUICK, lpips_stages=6), "cpu")
    with pytest.raises(UserError, match="lpips_dtype is 'half'"):
        Fit(CAMERAS, dataclasses.replace(QUICK, lpips_dtype="half"), "cpu")
    with pytest.raises(UserError, match="too small"):
        Fit(orbit(4, 0.0, 16), QUICK, "cpu")


def test_a_fit_that_loses_every_gaussian_says_so():
    with pytest.raises(UserError, match="pruned every Gaussian"):
        make_fit(refine_every=5, prune_opacity=0.999).run(10)


def test_lpips_without_weights_is_no_term_of_the_loss_unless_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    changes = {"default": dict(lpips_weights="auto"), "without": dict(w_lpips=0.0), "asked": {}}
    fits = {name: make_fit(**change) for name, change in changes.items()}
    for fit in fits.values():
        fit.run(10)
    assert bytes_of(fits["default"]) == bytes_of(fits["without"]) != bytes_of(fits["asked"])
    random = "LPIPS runs on alex with random weights"
    assert fits["default"].notes == [f"{random}: a score, no term of the loss"]
    assert fits["without"].notes == fits["asked"].notes == [random]


def test_lpips_with_weights_is_a_term_of_the_loss(tmp_path):
    hosting.declare()
    from torchvision.models import alexnet

    file = tmp_path / "alexnet.pth"
    torch.save(alexnet().state_dict(), file)
    fit, seen = make_fit(lpips_weights=str(file)), []
    fit.run(1, lambda step, losses: seen.append(set(losses)))
    assert seen == [{"lpips", "ssim", "mask", "l1", "loss"}] and fit.notes == []


def test_no_gaussian_is_added_in_the_last_steps():
    settings = dict(refine_every=5, grow_grad2d=0.0, max_gaussians=10**5, prune_opacity=0.0, prune_unseen=0.0)
    fit, counts = make_fit(num_steps=40, refine_until=0.5, **settings), []
    fit.run(40, lambda step, losses: counts.append(fit.num_gaussians))
    assert counts[4] < counts[9] < counts[14] < counts[15] == counts[-1]


def test_larger_views_densify_at_a_lower_threshold():
    """The threshold is a quarter for 16 times the size."""
    small, large = (CappedStrategy.of(QUICK, size) for size in (64.0, 1024.0))
    assert small.grow_grad2d == pytest.approx(4 * large.grow_grad2d)
    assert CappedStrategy.of(QUICK, 128.0).grow_grad2d == QUICK.grow_grad2d

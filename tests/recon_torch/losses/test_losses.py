"""LPIPS against the lpips package, SSIM against scikit-image, MS-SSIM against pytorch-msssim and NumPy."""

import functools
import pickle
import warnings

import numpy as np
import pytest
import pytorch_msssim
import torch
from safetensors.torch import save_file
from skimage.metrics import structural_similarity

from recon_torch import hosting
from recon_torch.errors import UserError
from recon_torch.losses.lpips import RANDOM_BACKBONE_SEED, TORCHVISION_FILES, PerceptualDistance
from recon_torch.losses.pixel import l1_loss, mask_loss, rgb_loss
from recon_torch.losses.ssim import ms_ssim, ssim


def image_pair(side: int, num_views: int = 2, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth random images and disturbed copies: [K,H,W,3] in [0, 1], the first with gradient."""
    generator = torch.Generator().manual_seed(side)
    coarse = torch.rand(num_views, 3, 5, 5, generator=generator, dtype=dtype)
    targets = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear").permute(0, 2, 3, 1)
    noise = 0.2 * torch.randn(num_views, side, side, 3, generator=generator, dtype=dtype)
    return (targets + noise).clamp(0, 1).requires_grad_(), targets.contiguous()


def gradient(values: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(values.sum(), images)[0]


@functools.cache
def lpips_package(net: str) -> torch.nn.Module:
    hosting.declare()
    import lpips

    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(RANDOM_BACKBONE_SEED)
        return lpips.LPIPS(net=net, pnet_rand=True, verbose=False).requires_grad_(False)


def package_distance(net: str, images: torch.Tensor, targets: torch.Tensor, stages: int | None = None):
    channels_first = [tensor.permute(0, 3, 1, 2) for tensor in (images, targets)]
    _, parts = lpips_package(net)(*channels_first, normalize=True, retPerLayer=True)
    return sum(parts[:stages]).flatten()


@pytest.fixture(autouse=True)
def no_cached_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


@pytest.mark.parametrize("net", ["alex", "vgg", "squeeze"])
@pytest.mark.parametrize("stages", [None, 2])
def test_lpips_is_the_packages(net, stages):
    images, targets = image_pair(48)
    distance = PerceptualDistance(net)
    assert distance.random_weights
    mine = distance.distance(images, distance.features(targets, stages))
    theirs = package_distance(net, images, targets, stages)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)
    mine, theirs = gradient(mine, images), gradient(theirs, images)
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())


def test_rounded_lpips_is_nearly_the_same():
    images, targets = image_pair(48)
    distance = PerceptualDistance("alex")
    rounded = distance.rounded(torch.bfloat16, 3)
    assert len(rounded.features(targets)) == rounded.num_stages == 3
    exact = distance.distance(images, distance.features(targets, 3))
    close = rounded.distance(images, rounded.features(targets))
    assert close.dtype == torch.float32 and not torch.equal(close, exact)
    torch.testing.assert_close(close, exact, rtol=1e-2, atol=0)
    expected = gradient(exact, images)
    assert (gradient(close, images) - expected).norm() < 0.15 * expected.norm()


def test_lpips_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    PerceptualDistance("squeeze")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("cached", [False, True])
def test_lpips_takes_torchvisions_weights(tmp_path, suffix, cached):
    """Other weights in the file, in torchvision's names, change the distance as they change the package's."""
    reference = lpips_package("squeeze")
    generator = torch.Generator().manual_seed(1)
    weights = {
        "features." + name.split(".", 1)[1]: 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in reference.net.state_dict().items()
    }
    path = tmp_path / f"squeeze{suffix}"
    if cached:
        path = tmp_path / "hub/checkpoints" / TORCHVISION_FILES["squeeze"]
        path.parent.mkdir(parents=True)
    (save_file if path.suffix == ".safetensors" else torch.save)(weights, path)
    distance = PerceptualDistance("squeeze", "auto" if cached else path)
    assert not distance.random_weights
    images, targets = image_pair(48)
    mine = distance.distance(images, distance.features(targets))
    random_state = {name: tensor.clone() for name, tensor in reference.net.state_dict().items()}
    reference.net.load_state_dict(
        {name: weights["features." + name.split(".", 1)[1]] for name in random_state}
    )
    theirs = package_distance("squeeze", images, targets)
    reference.net.load_state_dict(random_state)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a user's file was unpickled",))


def test_bad_weights_get_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="do not exist"):
        PerceptualDistance("alex", tmp_path / "none.pth")
    (tmp_path / "noise.pth").write_bytes(b"noise")
    (tmp_path / "noise.safetensors").write_bytes(b"noise")
    (tmp_path / "bomb.pth").write_bytes(pickle.dumps(Bomb(), 2))
    for name in ("noise.pth", "noise.safetensors", "bomb.pth"):
        with pytest.raises(UserError, match="cannot be read") as raised:
            PerceptualDistance("alex", tmp_path / name)
        assert "\n" not in str(raised.value)
    torch.save({"features.0.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="not those of torchvision's alex"):
        PerceptualDistance("alex", tmp_path / "other.pth")
    with pytest.raises(UserError, match="unknown LPIPS net"):
        PerceptualDistance("resnet")


def test_ssim_is_scikit_images():
    images, targets = image_pair(64)
    expected = [
        structural_similarity(
            image, target, data_range=1, channel_axis=-1, gaussian_weights=True, use_sample_covariance=False
        )
        for image, target in zip(images.detach().double().numpy(), targets.double().numpy(), strict=True)
    ]
    np.testing.assert_allclose(ssim(images, targets).detach(), expected, atol=2e-5)


@pytest.mark.parametrize("side", [176, 192])
def test_ms_ssim_is_pytorch_msssims_where_all_scales_fit(side):
    images, targets = image_pair(side)
    channels_first = [tensor.permute(0, 3, 1, 2) for tensor in (images, targets)]
    theirs = pytorch_msssim.ms_ssim(*channels_first, data_range=1, size_average=False)
    mine = ms_ssim(images, targets)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)
    theirs = gradient(theirs, images)
    torch.testing.assert_close(gradient(mine, images), theirs, rtol=0, atol=1e-3 * theirs.abs().max().item())


def ms_ssim_numpy(x: np.ndarray, y: np.ndarray, scales: int) -> float:
    """Wang et al. 2003 of one channel [H,W] in float64, window by window."""
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    weights = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333])[:scales]
    result = 1.0
    for scale, weight in enumerate(weights / weights.sum()):
        a, b = (np.lib.stride_tricks.sliding_window_view(image, (11, 11)) for image in (x, y))
        mean_a, mean_b = ((window * patch).sum((2, 3)) for patch in (a, b))
        da, db = a - mean_a[..., None, None], b - mean_b[..., None, None]
        var_a, var_b, cov = ((window * product).sum((2, 3)) for product in (da * da, db * db, da * db))
        term = (2 * cov + 0.03**2) / (var_a + var_b + 0.03**2)
        if scale == scales - 1:
            term = term * (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
        result *= term.mean() ** weight
        x, y = (image.reshape(len(image) // 2, 2, -1, 2).mean((1, 3)) for image in (x, y))
    return result


@pytest.mark.parametrize(("side", "scales"), [(16, 1), (32, 2), (64, 3), (128, 4)])
def test_ms_ssim_uses_the_scales_that_fit(side, scales):
    images, targets = image_pair(side, 1)
    expected = np.mean(
        [
            ms_ssim_numpy(
                images[0, ..., c].detach().double().numpy(), targets[0, ..., c].double().numpy(), scales
            )
            for c in range(3)
        ]
    )
    np.testing.assert_allclose(ms_ssim(images, targets).item(), expected, atol=5e-5)


def test_ms_ssim_gradient_against_finite_differences():
    images, targets = image_pair(22, 1, torch.float64)
    assert torch.autograd.gradcheck(lambda x: ms_ssim(x, targets), images, atol=1e-6)


def test_ms_ssim_has_a_finite_gradient_for_opposed_images():
    images, targets = image_pair(64)
    opposed = (1 - targets).requires_grad_()
    assert torch.isfinite(gradient(ms_ssim(opposed, targets), opposed)).all()
    torch.testing.assert_close(ms_ssim(targets, targets), torch.ones(2))


def test_squared_errors():
    a, b = torch.full((2, 4, 4, 3), 0.75), torch.full((2, 4, 4, 3), 0.25)
    assert mask_loss(a[..., :1], b[..., :1]).tolist() == [0.25, 0.25]
    b[0] = 0.75
    assert rgb_loss(a, b).tolist() == [0, 0.25]


def test_l1_is_that_of_what_is_before_the_background():
    generator = torch.Generator().manual_seed(0)
    colors, alphas = (
        torch.rand(2, 2, 5, 4, 3, generator=generator),
        torch.rand(2, 2, 5, 4, 1, generator=generator),
    )
    layers = torch.cat([colors * alphas, alphas], -1).numpy()
    expected = np.abs(layers[0] - layers[1]).mean((1, 2, 3))
    for grey in (0.0, 0.3, 1.0):
        (rgb, target), (alpha, mask) = colors * alphas + grey * (1 - alphas), alphas
        np.testing.assert_allclose(l1_loss(rgb, alpha, target, mask, grey), expected, rtol=1e-5)

"""LPIPS against the lpips package, and weights as torchvision names them."""

import functools
import pickle
import warnings

import pytest
import torch
from safetensors.torch import save_file

from recon_torch import hosting
from recon_torch.errors import UserError
from recon_torch.losses.lpips import RANDOM_BACKBONE_SEED, TORCHVISION_FILES, PerceptualDistance

pytestmark = pytest.mark.slow


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
def test_lpips_equals_the_lpips_package(net, stages, image_pair, gradient):
    images, targets = image_pair(48)
    distance = PerceptualDistance(net)
    assert distance.random_weights
    mine = distance.distance(images, distance.features(targets, stages))
    theirs = package_distance(net, images, targets, stages)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)
    mine, theirs = gradient(mine, images), gradient(theirs, images)
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())


def test_lpips_in_bfloat16_is_nearly_the_same(image_pair, gradient):
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
def test_lpips_reads_weights_with_torchvisions_names(tmp_path, suffix, cached, image_pair):
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


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda tensor: tensor * float("nan"), "holds NaN or infinity"),
        (lambda tensor: tensor.double() * 1e300, "too large for float32"),
        (lambda tensor: tensor * 1j, "is complex64"),
        (lambda tensor: tensor.long(), "is int64"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_that_are_not_finite_numbers_are_refused(suffix, spoil, words, tmp_path, user_error):
    path = tmp_path / f"squeeze{suffix}"
    state = lpips_package("squeeze").net.state_dict()
    weights = {"features." + name.split(".", 1)[1]: tensor for name, tensor in state.items()}
    weights["features.0.bias"] = spoil(weights["features.0.bias"] + 1)
    (save_file if suffix == ".safetensors" else torch.save)(weights, path)
    with user_error(f"LPIPS weights {path}: features.0.bias .*{words}"):
        PerceptualDistance("squeeze", path)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a user's file was unpickled",))


def test_bad_weights_get_one_clear_line(tmp_path, user_error):
    with pytest.raises(UserError, match="do not exist"):
        PerceptualDistance("alex", tmp_path / "none.pth")
    (tmp_path / "noise.pth").write_bytes(b"noise")
    (tmp_path / "noise.safetensors").write_bytes(b"noise")
    (tmp_path / "bomb.pth").write_bytes(pickle.dumps(Bomb(), 2))
    for name, words in (
        ("noise.pth", "is text"),
        ("noise.safetensors", "is text"),
        ("bomb.pth", "cannot be read"),
    ):
        with user_error(f"LPIPS weights .*{words}"):
            PerceptualDistance("alex", tmp_path / name)
    torch.save({"features.0.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="not those of torchvision's alex"):
        PerceptualDistance("alex", tmp_path / "other.pth")
    with pytest.raises(UserError, match="unknown LPIPS net"):
        PerceptualDistance("resnet")

"""Masks by threshold on drawn discs; IS-Net through a stand-in for rembg, which most machines lack."""

import sys
import types

import numpy as np
import pytest

from recon_torch.errors import UserError
from recon_torch.masks import isnet_masks, threshold_masks


def disc_on(background: float, color: float) -> tuple[np.ndarray, np.ndarray]:
    ticks = np.arange(32) - 15.5
    inside = (ticks[:, None] ** 2 + ticks[None] ** 2 < 100)[..., None]
    return np.where(inside, np.float32([color, 0.5, 0.5]), np.float32(background))[None], inside[None]


@pytest.mark.parametrize("background", [0.0, 0.5, 1.0])
def test_threshold_finds_the_disc_on_a_noisy_background(background):
    image, inside = disc_on(background, 0.2 if background != 0.2 else 0.9)
    noise = np.random.default_rng(0).uniform(-0.03, 0.03, image.shape)
    masks = threshold_masks((image + noise).astype(np.float32), background)
    np.testing.assert_array_equal(masks, inside)
    assert masks.dtype == np.float32


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "isnet.onnx"
    path.write_bytes(b"weights")
    return path


def test_isnet_asks_rembg_for_a_mask_of_each_view_with_something_in_it(monkeypatch, weights):
    calls = []

    def remove(image, session, only_mask):
        assert image.dtype == np.uint8 and only_mask
        calls.append(session)
        return np.full(image.shape[:2], 51, np.uint8)

    stand_in = types.SimpleNamespace(
        new_session=lambda name, model_path: (name, model_path),
        remove=remove,
    )
    monkeypatch.setitem(sys.modules, "rembg", stand_in)
    image, _ = disc_on(1.0, 0.2)
    masks = isnet_masks(np.concatenate([image, np.ones_like(image)]), weights)
    assert calls == [("dis_custom", str(weights))]
    np.testing.assert_allclose(masks[0], 0.2)
    np.testing.assert_array_equal(masks[1], 0)


def test_isnet_says_what_is_missing(monkeypatch, weights, tmp_path):
    image, _ = disc_on(1.0, 0.2)
    with pytest.raises(UserError, match="do not exist"):
        isnet_masks(image, tmp_path / "none.onnx")
    monkeypatch.setitem(sys.modules, "rembg", None)
    with pytest.raises(UserError, match=r"im3d\[masks\]"):
        isnet_masks(image, weights)

    def fail(name, model_path):
        raise RuntimeError("INVALID_PROTOBUF\nand more")

    monkeypatch.setitem(sys.modules, "rembg", types.SimpleNamespace(new_session=fail))
    with pytest.raises(UserError, match="INVALID_PROTOBUF$"):
        isnet_masks(image, weights)

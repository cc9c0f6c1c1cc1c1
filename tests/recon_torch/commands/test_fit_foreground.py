"""The fit command on views whose foreground is nothing, everything or hard to tell, and on noisy ones."""

import json

import numpy as np
import pytest
import torch
from scipy import ndimage

from recon_torch.commands import fit as fit_views
from recon_torch.errors import UserError
from recon_torch.fit import asset
from recon_torch.formats.ply import load_ply
from recon_torch.raster.gaussians import Gaussians
from recon_torch.raster.render import render as render_gaussians
from recon_torch.views.cameras import Cameras, orbit
from recon_torch.views.images import write_image
from recon_torch.views.transforms import write_transforms

pytestmark = pytest.mark.slow

SIZE = 32
CAMERAS = orbit(8, 0.3, SIZE)
HELD_OUT = orbit(4, 0.3, SIZE, azimuths_rad=np.arange(4) * np.pi / 2 + 0.2)
OPTIONS = ["--lpips-net", "alex", "--engine", "cpu"]
OBJECT = Gaussians(  # a red plate and a green ball
    means=torch.tensor([[0.0, 0.0, -0.2], [0.2, 0.0, 0.1]]),
    quats=torch.tensor([1.0, 0, 0, 0]).repeat(2, 1),
    log_scales=torch.tensor([[0.15, 0.15, 0.05], [0.1, 0.1, 0.1]]).log(),
    opacity_logits=torch.full((2,), 5.0),
    sh0=torch.tensor([[1.0, -1.0, -1.5], [-1.0, 0.5, -1.0]]),
)


@pytest.fixture(autouse=True)
def short_turntable(monkeypatch):
    monkeypatch.setattr(asset, "TURNTABLE_FRAMES", 6)


def render(gaussians: Gaussians, cameras: Cameras, background: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    image = render_gaussians(gaussians, cameras, background=torch.full((3,), background))
    return image.rgb.clamp(0, 1).numpy(), image.alpha.numpy()


def test_views_without_foreground_are_refused_and_full_ones_are_noted(tmp_path):
    """All background: nothing to fit, and said so. All object: fitted, and said to be strange."""
    for name, alpha in (("empty", 0.0), ("full", 1.0)):
        picture = np.full((SIZE, SIZE, 4), [0.5, 0.5, 0.5, alpha], np.float32)
        for index in range(len(CAMERAS)):
            write_image(tmp_path / name / f"{index}.png", picture)
            write_image(tmp_path / name / "mask.png", picture[..., 3:])
        write_transforms(tmp_path / name / "transforms.json", CAMERAS, [f"{i}.png" for i in range(8)])
        content = json.loads((tmp_path / name / "transforms.json").read_text()) | {"mask_path": "mask.png"}
        (tmp_path / name / "transforms.json").write_text(json.dumps(content))
    out = ["--out", str(tmp_path / "out"), "--steps", "60", *OPTIONS]
    with pytest.raises(UserError, match="0.png.*no foreground"):
        fit_views.main(["--views", str(tmp_path / "empty"), *out])
    fit_views.main(["--views", str(tmp_path / "full"), *out])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert any(note == "the mask covers everything: all 8 views" for note in report["notes"])
    assert np.isfinite(report["training"]["psnr"]) and report["num_gaussians"] > 0


def test_views_whose_foreground_nobody_can_tell_are_fitted_without_masks(tmp_path, capsys):
    rgb, alpha = render(OBJECT, CAMERAS, background=0.0)
    clutter = np.random.default_rng(0).random(rgb.shape)
    for index, image in enumerate(rgb + (1 - alpha) * clutter):
        write_image(tmp_path / "views" / f"{index}.png", image)
    write_transforms(tmp_path / "views" / "transforms.json", CAMERAS, [f"{i}.png" for i in range(8)])
    options = ["--views", str(tmp_path / "views"), "--out", str(tmp_path / "out"), "--steps", "60", *OPTIONS]
    fit_views.main(options)
    said = "the foreground of 8 of 8 views cannot be told from their background: no masks are used"
    assert said in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (
        any(note.startswith(said) for note in report["notes"]) and "silhouette_iou" not in report["training"]
    )
    with pytest.raises(UserError, match="--normalize needs masks; give mask_path, alpha or --isnet-weights"):
        fit_views.main([*options, "--normalize"])
    with pytest.raises(UserError, match="0 of 8 frames are good"):
        fit_views.main(["--views", str(tmp_path / "views"), "--check"])
    assert "foreground cannot be told from its background; give masks" in capsys.readouterr().out


def test_noise_is_told_before_the_fit_and_does_not_become_floaters(tmp_path, capsys):
    generator = np.random.default_rng(0)
    rgb = render(OBJECT, CAMERAS)[0]
    for index, image in enumerate(rgb + generator.normal(0, 10 / 255, rgb.shape)):
        write_image(tmp_path / "views" / f"{index}.png", image)
    write_transforms(tmp_path / "views" / "transforms.json", CAMERAS, [f"{i}.png" for i in range(8)])
    options = ["--views", str(tmp_path / "views"), "--out", str(tmp_path / "out"), "--steps", "150", *OPTIONS]
    fit_views.main(options)
    assert "the views have noise of about" in capsys.readouterr().out.split("step")[0]
    asset = load_ply(tmp_path / "out" / "asset.ply").gaussians
    _, alpha = render(asset, HELD_OUT)
    _, true = render(OBJECT, HELD_OUT)
    far = ndimage.maximum_filter(true, (1, 7, 7, 1)) < 0.01
    assert far.mean() > 0.2 and alpha[far].max() < 0.02

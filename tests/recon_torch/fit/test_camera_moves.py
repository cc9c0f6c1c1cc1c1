"""Cameras that are off are found and moved to where they should be; right ones stay, to the bit."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from recon_torch.fit import asset, camera_moves
from recon_torch.fit.camera_moves import align, judge, moved, moved_camera
from recon_torch.fit.optimization import Fit
from recon_torch.losses.metrics import standing_out
from recon_torch.raster.gaussians import Gaussians
from recon_torch.raster.render import render
from recon_torch.settings import Engine, FitSettings
from recon_torch.views.cameras import Cameras, orbit
from recon_torch.views.directory import Views
from recon_torch.views.transforms import read_transforms

SIZE = 48
CAMERAS = orbit(8, 0.35, SIZE)
WRONG, AXIS = 3, np.array([1.0, 2.0, -1.0]) / np.sqrt(6)
QUICK = FitSettings(num_gaussians=600, num_steps=320, max_gaussians=1500, w_lpips=0.0, engine="cpu")
GIVEN = torch.tensor([0.1, -0.2, 0.15, 0.05, 0.02, -0.04], dtype=torch.float64)  # a motion far from none


def blobs(dtype=torch.float32) -> Gaussians:
    """Five opaque blobs of different shapes, turned in different ways."""
    generator = torch.Generator().manual_seed(2)
    colors = torch.tensor(
        [[0.8, 0.2, 0.1], [0.1, 0.6, 0.2], [0.2, 0.3, 0.9], [0.9, 0.8, 0.2], [0.2, 0.2, 0.2]]
    )
    means = torch.tensor(
        [[0.0, 0.0, -0.25], [0.25, 0.0, 0.1], [-0.15, 0.2, 0.2], [-0.1, -0.3, 0.0], [0.1, 0.2, -0.1]]
    )
    shapes = 0.05 + 0.1 * torch.rand(5, 3, generator=generator)
    quats = torch.randn(5, 4, generator=generator)
    parts = (means, quats, shapes.log(), torch.full((5,), 5.0), (colors - 0.5) / 0.28209479)
    return Gaussians(*(part.to(dtype) for part in parts))


def views(cameras: Cameras = CAMERAS) -> Views:
    """True pictures from the right cameras, whatever the given ones are."""
    seen = render(blobs(), CAMERAS, background=torch.ones(3), engine=Engine.CPU)
    names = [f"{index}.png" for index in range(len(CAMERAS))]
    return Views(cameras, seen.rgb.clamp(0, 1).numpy(), seen.alpha.numpy(), names, [])


def turned(degrees: float, about: str) -> Cameras:
    """The cameras, with the one of view WRONG turned about the origin or about its own place."""
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_rotvec(degrees * AXIS, degrees=True).as_matrix()
    w2c = CAMERAS.w2c.astype(np.float64)
    w2c[WRONG] = w2c[WRONG] @ turn if about == "object" else turn @ w2c[WRONG]
    return dataclasses.replace(CAMERAS, w2c=w2c.astype(np.float32))


def fitted(cameras: Cameras, steps: int) -> Fit:
    fit = Fit(cameras, QUICK, "cpu")
    given = views()
    fit.set_targets(torch.from_numpy(given.images), torch.from_numpy(given.masks))
    fit.run(steps)
    return fit


def error_deg(cameras: Cameras) -> np.ndarray:
    relative = cameras.w2c[:, :3, :3].astype(np.float64) @ CAMERAS.w2c[:, :3, :3].transpose(0, 2, 1)
    return np.degrees(np.linalg.norm(Rotation.from_matrix(relative).as_rotvec(), axis=-1))


def brightness(rgb: torch.Tensor) -> torch.Tensor:
    """A number that depends on every pixel in another way."""
    weights = torch.rand(rgb.shape, generator=torch.Generator().manual_seed(1))
    return (rgb * weights.to(rgb)).sum()


def gradient(motion: torch.Tensor, dtype: torch.dtype, engine: Engine) -> torch.Tensor:
    motion = motion.to(dtype, copy=True).requires_grad_()
    brightness(render(moved(blobs(dtype), motion), CAMERAS[:1], engine=engine).rgb).backward()
    return motion.grad


@pytest.mark.parametrize("motion", [torch.zeros(6, dtype=torch.float64), GIVEN])
def test_gradients_by_a_motion_are_finite_differences_of_the_moved_camera(motion):
    """In float64; what is moved there is the matrix of the camera, and no Gaussian."""
    small, differences = 1e-5, []
    camera = dataclasses.replace(CAMERAS[:1], w2c=CAMERAS.w2c[:1].astype(np.float64))
    for axis in range(6):
        sides = []
        for sign in (1, -1):
            shifted = motion.clone()
            shifted[axis] += sign * small
            seen = render(blobs(torch.float64), moved_camera(camera, shifted), engine=Engine.TORCH)
            sides.append(brightness(seen.rgb))
        differences.append((sides[0] - sides[1]) / (2 * small))
    expected = torch.stack(differences)
    torch.testing.assert_close(gradient(motion, torch.float64, Engine.TORCH), expected, rtol=1e-4, atol=1e-3)


def test_gradients_by_a_motion_are_those_of_the_reference_on_the_cpu_engine():
    expected = gradient(GIVEN, torch.float64, Engine.TORCH)
    torch.testing.assert_close(
        gradient(GIVEN, torch.float32, Engine.CPU).double(),
        expected,
        rtol=1e-3,
        atol=1e-3 * expected.abs().max(),
    )


def test_a_moved_camera_sees_unmoved_gaussians_as_scipy_has_it():
    camera = dataclasses.replace(CAMERAS[:2], w2c=CAMERAS.w2c[:2].astype(np.float64))
    point = np.array([0.1, 0.2, -0.3])
    expected = Rotation.from_rotvec(GIVEN[:3].numpy()).apply(point) + GIVEN[3:].numpy()
    for view, w2c in enumerate(moved_camera(camera, GIVEN).w2c):
        seen, unmoved = w2c[:3, :3] @ point + w2c[:3, 3], camera.w2c[view]
        np.testing.assert_allclose(seen, unmoved[:3, :3] @ expected + unmoved[:3, 3], atol=1e-12)


def test_views_stand_out_by_the_spread_of_the_others():
    even = torch.tensor([30.0, 29, 31, 30, 28, 30, 24, 15])
    assert standing_out(even, 4.0) == [6, 7]
    assert standing_out(even, 10.0) == [7]
    uneven = torch.tensor([30.0, 22, 36, 27, 33, 24, 20, 15])
    assert standing_out(uneven, 4.0) == []
    strange = torch.tensor([30.0, float("nan"), float("inf"), 30, 30, 10])
    assert standing_out(strange, 4.0) == [5]
    assert standing_out(torch.full((4,), float("nan")), 4.0) == []


@pytest.mark.slow
@pytest.mark.parametrize(("degrees", "about"), [(5.0, "object"), (1.5, "camera"), (-6.0, "object")])
def test_a_camera_is_aligned_with_a_true_scene(degrees, about):
    scene = fitted(CAMERAS, 0)
    scene.scene.load_state_dict(
        scene.scene.state_dict()
        | {"params": dict(zip(("means", "quats", "scales", "opacities", "sh0"), blobs(), strict=True))}
    )
    given, cameras = views(), turned(degrees, about)
    target = torch.from_numpy(given.images[[WRONG]]), torch.from_numpy(given.masks[[WRONG]])
    motion = align(scene, cameras[WRONG], *target)
    w2c = cameras.w2c.copy()
    w2c[WRONG] = moved_camera(cameras[WRONG], motion).w2c[0]
    mended = dataclasses.replace(cameras, w2c=w2c)
    assert error_deg(cameras)[WRONG] == pytest.approx(abs(degrees), abs=1e-3)
    assert error_deg(mended)[WRONG] < 0.2
    assert np.linalg.norm(mended.positions - CAMERAS.positions, axis=-1)[WRONG] < 0.02


@pytest.mark.slow
def test_right_cameras_stay_and_a_wrong_picture_is_no_wrong_camera(monkeypatch):
    monkeypatch.setattr(camera_moves, "CLEAN_STEPS", 120)
    fit = fitted(CAMERAS, 80)
    before = fit.state_dict()
    judged = judge(fit)
    assert not judged.moves and not judged.stray
    for name, tensor in fit.scene.state_dict()["params"].items():
        assert torch.equal(tensor, before["params"][name])
    swapped = views()
    swapped.images[WRONG], swapped.masks[WRONG] = swapped.images[WRONG][::-1], swapped.masks[WRONG][::-1]
    fit = Fit(CAMERAS, QUICK, "cpu")
    fit.set_targets(torch.from_numpy(swapped.images), torch.from_numpy(swapped.masks))
    fit.run(80)
    judged = judge(fit)
    assert not judged.moves and judged.stray == [WRONG]
    assert camera_moves.notes(judged, swapped.names) == [f"{WRONG}.png: {camera_moves.STRAY}"]


def test_an_asset_is_fitted_with_the_cameras_that_were_moved(tmp_path, monkeypatch):
    """The search is given what to find: the right place. An asset beside it goes on as it was."""
    monkeypatch.setattr(asset, "TURNTABLE_FRAMES", 2)
    few = dataclasses.replace(
        QUICK, num_gaussians=100, num_steps=12, lpips_net="squeeze", lpips_weights="random"
    )
    cameras = turned(8.0, "object")
    wrong, right, plain = (asset.prepare(views(each), few) for each in (cameras, CAMERAS, CAMERAS))
    first, true = wrong.fit, wrong.unit.cameras(CAMERAS)
    found = camera_moves.Move(WRONG, true.w2c[WRONG], 8.0, 0.3, 12.0, 28.0)
    asked = []

    def judge(fit: Fit) -> camera_moves.Judged:
        asked.append((fit, fit.step))
        return camera_moves.Judged([found] if fit is first else [], [] if fit is first else [5])

    monkeypatch.setattr(camera_moves, "judge", judge)
    assert asset.run([wrong, right], refine_cameras=True) == [None, None]
    assert asset.run([plain]) == [None]
    assert asked == [(first, 3), (right.fit, 3)]  # a quarter of the steps, and no search without being asked
    assert right.camera_notes == [f"5.png: {camera_moves.STRAY}"] and plain.camera_notes == []
    assert_equal_scenes(right.fit, plain.fit)
    expected = asset.new_fit(true, few, views())
    expected.run(few.num_steps)
    assert wrong.fit is not first and wrong.fit.step == few.num_steps
    assert_equal_scenes(wrong.fit, expected)

    _, report = asset.write(wrong, tmp_path)
    written, _ = read_transforms(tmp_path / "transforms.json")
    assert error_deg(cameras)[WRONG] > 7.9
    np.testing.assert_allclose(written.w2c, CAMERAS.w2c, atol=1e-5)
    (said,) = report["cameras_moved"]
    assert said == {
        "view": f"{WRONG}.png",
        "degrees": 8.0,
        "distance": pytest.approx(0.3 / wrong.unit.scale),
        "psnr_foreground": [12.0, 28.0],
    }
    assert any(f"{WRONG}.png: its camera is off: turned by 8.0 degrees" in note for note in report["notes"])
    assert json.loads((tmp_path / "report.json").read_text())["cameras_moved"] == report["cameras_moved"]


def assert_equal_scenes(fit: Fit, other: Fit) -> None:
    """To the bit."""
    tensors, others = (each.scene.parameters.tensors for each in (fit, other))
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)


def test_a_short_fit_of_some_views_knows_which_masks_are_a_guess(monkeypatch):
    monkeypatch.setattr(camera_moves, "CLEAN_STEPS", 1)
    views, masks = torch.rand(4, 32, 32, 3), torch.ones(4, 32, 32, 1)
    unsure = torch.rand(4, 32, 32, 1) < 0.2
    whole = Fit(orbit(4, 0.3, 32), FitSettings(num_gaussians=50, lpips_weights="random"), "cpu")
    whole.set_targets(views, masks, unsure=unsure)
    clean = camera_moves._fit_to(np.array([0, 2, 3]), whole.cameras, whole)  # noqa: SLF001
    assert torch.equal(clean.targets.opacity.isnan(), unsure[[0, 2, 3]])
    assert torch.equal(clean.targets.masks, masks[[0, 2, 3]])

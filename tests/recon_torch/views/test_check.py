"""A directory without a fault, and each fault in one frame of it: found there, and in no other frame."""

import json
import sys
import types

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from recon_torch.errors import UserError
from recon_torch.views import check
from recon_torch.views.cameras import Cameras, orbit
from recon_torch.views.images import read_image, write_image
from recon_torch.views.transforms import write_transforms

SIZE = 48
BAD = 3  # the frame that gets the fault
CAMERAS = orbit(8, 0.3, SIZE)
CENTER = np.array([0.2, -0.1, 0.05])  # off the axis, so that views differ


def write(directory, cameras, masks):
    names = [f"{index}.png" for index in range(len(cameras))]
    for name, mask in zip(names, masks, strict=True):
        write_image(directory / name, np.concatenate([0.5 * np.repeat(mask, 3, -1), mask], -1))
    write_transforms(directory / "transforms.json", cameras, names)


@pytest.fixture
def directory(tmp_path, ball_masks):
    write(tmp_path, CAMERAS, ball_masks(CAMERAS, CENTER, 0.2))
    return tmp_path


def change(directory, action, index=BAD):
    path = directory / "transforms.json"
    content = json.loads(path.read_text())
    action(content["frames"][index])
    path.write_text(json.dumps(content))


def pose(cameras: Cameras) -> list:
    return (np.linalg.inv(cameras.w2c[0].astype(float)) @ np.diag([1, -1, -1, 1])).tolist()


def roll_image(frame, directory):
    """An image from another moment of the turntable."""
    frame["file_path"] = f"{(BAD + 4) % 8}.png"


def turn_away(frame, directory):
    matrix = np.array(frame["transform_matrix"])
    matrix[:3, [0, 2]] *= -1
    frame["transform_matrix"] = matrix.tolist()


def paint(frame, directory, alpha):
    picture = np.full((SIZE, SIZE, 4), 0.5, np.float32)
    picture[..., 3:] = alpha
    write_image(directory / frame["file_path"], picture)


NOISE = np.random.default_rng(0).random((SIZE, SIZE, 3)).astype(np.float32)
FAULTS = {
    "image '3.png' does not exist": lambda frame, directory: (directory / "3.png").unlink(),
    "cannot read": lambda frame, directory: (directory / "3.png").write_bytes(b"no picture"),
    "is 20x20 px, w and h say 48x48": lambda frame, directory: write_image(
        directory / "3.png", NOISE[:20, :20]
    ),
    "its foreground cannot be told from its background; give masks": lambda frame, directory: write_image(
        directory / "3.png", NOISE
    ),
    "its mask shows nothing": lambda frame, directory: paint(frame, directory, 0),
    "mask 'none.png' does not exist": lambda frame, directory: frame.update(mask_path="none.png"),
    "not a rotation": lambda frame, directory: frame.update(
        transform_matrix=np.diag([2.0, 2, 2, 1]).tolist()
    ),
    "focal length (-5": lambda frame, directory: frame.update(fl_x=-5.0),
    "field of view of 0.5": lambda frame, directory: frame.update(fl_y=5000.0),
    "centre (400, 24) px is outside of its 48x48": lambda frame, directory: frame.update(cx=400.0),
    "lens distortion (k1)": lambda frame, directory: frame.update(k1=0.1),
    "3.png is white around a black object": lambda frame, directory: (
        write_image(directory / "inverse.3.png", 1 - read_image(directory / "3.png")[..., 3:]),
        frame.update(mask_path="inverse.3.png"),
    ),
    "its camera is that of frame 1": lambda frame, directory: frame.update(
        transform_matrix=pose(CAMERAS[1]), file_path="1.png"
    ),
    "30 times as far from": lambda frame, directory: frame.update(
        transform_matrix=pose(orbit(elevation_rad=0.3, radius=60.0, azimuths_rad=np.array([2.356])))
    ),
    "it looks 180 degrees away": turn_away,
    "of its mask is where the other masks allow": roll_image,
}


def test_good_views_have_no_findings(directory):
    checked = check.check(directory)
    for index, finding in enumerate(checked.frames):
        with Image.open(directory / f"{index}.png") as picture:
            share = np.mean(np.asarray(picture)[..., 3] > 127)
        assert str(finding) == f"frame {index} ('{index}.png'): ok; {share:.1%} by alpha"
    assert checked.general == [] and not checked.has_errors
    assert checked.summary == "8 of 8 frames are good"


@pytest.mark.parametrize("message", FAULTS)
def test_an_error_is_reported_for_its_frame(directory, message):
    change(directory, lambda frame: FAULTS[message](frame, directory))
    checked = check.check(directory)
    findings, general = checked
    assert len(findings[BAD].errors) == 1 and message in findings[BAD].errors[0]
    assert all(not finding.errors for index, finding in enumerate(findings) if index != BAD)
    assert general == []
    assert checked.has_errors and checked.summary == "7 of 8 frames are good"
    assert "ERROR: " in str(findings[BAD])


def test_all_errors_of_a_frame_are_on_one_line(directory):
    change(directory, lambda frame: frame.update(file_path="none.png", fl_x="wide"))
    (error,) = check.check(directory)[0][BAD].errors
    assert error == "image 'none.png' does not exist; fl_x is 'wide', not a finite number"


def test_remarks_are_not_errors(directory):
    half = np.zeros((SIZE, SIZE, 1), np.float32)
    half[:, :24] = 1
    change(directory, lambda frame: paint(frame, directory, half))
    change(directory, lambda frame: frame.update(fl_x=200.0), index=5)
    findings, _ = check.check(directory)
    assert findings[BAD].remarks == ["its mask touches the border"]
    assert findings[5].remarks[-1] == "fl_x is 2.53 times fl_y"


def test_swapped_frames_are_reported_and_others_are_not(tmp_path, ball_masks):
    cameras = orbit(16, 0.3, SIZE)
    write(tmp_path, cameras, ball_masks(cameras, CENTER, 0.2))
    change(tmp_path, lambda frame: frame.update(file_path="10.png"), index=2)
    change(tmp_path, lambda frame: frame.update(file_path="2.png"), index=10)
    findings, _ = check.check(tmp_path)
    assert [index for index, finding in enumerate(findings) if finding.errors] == [2, 10]
    assert not any(finding.remarks for finding in findings)


def test_opencv_matrices_are_recognised(directory):
    """Someone forgot to flip y and z: every camera looks outwards."""
    path = directory / "transforms.json"
    content = json.loads(path.read_text())
    for frame in content["frames"]:
        frame["transform_matrix"] = (np.array(frame["transform_matrix"]) @ np.diag([1, -1, -1, 1])).tolist()
    path.write_text(json.dumps(content))
    _, (general,) = check.check(directory)
    assert "8 cameras look away" in general.errors[0] and "OpenGL" in general.errors[0]


def test_few_frames_and_parallel_cameras(directory):
    same = orbit(3, 0.3, SIZE, azimuths_rad=np.zeros(3))
    same.w2c[:, 0, 3] += np.arange(3)  # side by side
    write_transforms(directory / "transforms.json", same, ["0.png", "1.png", "2.png"])
    checked = check.check(directory)
    (general,) = checked.general
    assert general.remarks == ["3 usable frames are few; give at least 4"]
    assert general.errors == ["the cameras all look the same way; give views from around the object"]
    assert checked.has_errors and checked.summary == "3 of 3 frames are good"


def test_a_file_that_is_not_a_transforms_json(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        check.check(tmp_path)


def test_how_masks_and_cameras_were_read_is_a_remark(directory):
    image = read_image(directory / "3.png")
    write_image(directory / "mask.png", (image[..., 3:] > 0.5).astype(np.uint8))  # 0 and 1
    write_image(directory / "3.png", image[..., :3])
    change(directory, lambda frame: frame.update(mask_path="mask.png", fl_x=79.0, depth_file_path="d.png"))
    (finding, other) = check.check(directory).frames[BAD : BAD + 2]
    differs, unread, mask = finding.remarks
    assert "fl_x: the frame's own is taken" in differs and "not read: depth_file_path" in unread
    assert "values up to 1" in mask and finding.mask[0].endswith("% by mask_path") and not other.remarks


def test_frames_to_test_with_are_checked_with_the_others(directory):
    path = directory / "transforms.json"
    content = json.loads(path.read_text())
    train, test = (content | {"frames": content["frames"][part]} for part in (slice(0, 6), slice(6, 8)))
    test["frames"][1]["file_path"] = "2.png"
    (directory / "transforms_train.json").write_text(json.dumps(train))
    (directory / "transforms_test.json").write_text(json.dumps(test))
    path.unlink()
    checked = check.check(directory)
    assert [index for index, finding in enumerate(checked.frames) if finding.errors] == [7]
    assert checked.frames[7].name == "frame 7 ('2.png', to test with)"
    assert check.check(directory / "transforms_train.json").summary == "6 of 6 frames are good"


def repaint(directory, background, sigma, blur_px=0.0):
    """Pictures without alpha in place of those with it."""
    for index in range(8):
        rgba = read_image(directory / f"{index}.png")
        rgb = np.where(rgba[..., 3:] > 0.5, rgba[..., :3], background)
        rgb = ndimage.gaussian_filter(rgb, (blur_px, blur_px, 0)) if blur_px else rgb
        noise = np.random.default_rng(index).normal(0, sigma / 255, rgb.shape)
        write_image(directory / f"{index}.png", np.clip(rgb + noise, 0, 1))


@pytest.mark.parametrize("background", [1.0, 0.8])
def test_noise_is_called_noise_and_neither_masks_nor_cameras_are_blamed(directory, background):
    repaint(directory, background, 10)
    checked = check.check(directory)
    for finding in checked.frames:
        assert finding.errors == []
        (remark,) = finding.remarks
        sigma = int(remark.removeprefix("it has noise of about ").removesuffix("/255"))
        assert sigma == pytest.approx(10, abs=2)
    assert not checked.has_errors and checked.general == []


def test_isnet_finds_what_nobody_else_can_tell(directory, tmp_path, monkeypatch, ball_masks):
    """Its stand-in knows the masks, and sees nothing in one picture."""
    masks = ball_masks(CAMERAS, CENTER, 0.2)
    masks[BAD] = 0
    predictions, noise = list(masks), np.random.default_rng(0)
    for index in range(8):
        write_image(directory / f"{index}.png", noise.random((SIZE, SIZE, 3)))
    (directory / "isnet.onnx").write_bytes(b"weights")

    class Session:
        def __init__(self, path, providers):
            pass

        def get_inputs(self):
            return [types.SimpleNamespace(name="pixels")]

        def run(self, names, inputs):
            small = Image.fromarray(np.float32(predictions.pop(0)[..., 0]))
            return [np.asarray(small.resize((1024, 1024)))[None, None]]

    stand_in = types.SimpleNamespace(InferenceSession=Session, get_available_providers=list)
    monkeypatch.setitem(sys.modules, "onnxruntime", stand_in)
    frames = check.check(directory, directory / "isnet.onnx").frames
    assert [index for index, finding in enumerate(frames) if finding.errors] == [BAD]
    assert frames[BAD].errors == ["its mask shows nothing"]
    assert any("by IS-Net that shows nothing: there is none better" in text for text in frames[BAD].remarks)
    for finding, mask in zip(frames, masks, strict=True):
        assert finding.mask == [f"{np.mean(mask > 0.5):.1%} by IS-Net"]


def test_blur_is_named(directory):
    repaint(directory, 0.9, 0, blur_px=3.0)
    checked = check.check(directory)
    assert all("it is blurred by about 3 px" in finding.remarks for finding in checked.frames)
    assert not checked.has_errors

"""transforms.json against nerfstudio's convention, and damaged files."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from recon_torch.errors import UserError
from recon_torch.views.cameras import Cameras, orbit
from recon_torch.views.transforms import read_frames, read_transforms, write_transforms


@pytest.fixture
def views_dir(tmp_path):
    for index in range(3):
        Image.new("RGB", (32, 24)).save(tmp_path / f"{index:03d}.png")
    return tmp_path


def orbit_32x24() -> Cameras:
    return orbit(3, 0.3, 32).resized(32, 24)


NAMES = ["000.png", "001.png", "002.png"]


@pytest.mark.parametrize("per_frame", [False, True])
def test_transforms_round_trip(views_dir, per_frame):
    cameras = orbit_32x24()
    if per_frame:
        cameras.intrinsics_px[:, 0, 0] += np.arange(3)
    write_transforms(views_dir / "transforms.json", cameras, NAMES, elevation_rad=0.3)
    read, images = read_transforms(views_dir / "transforms.json")
    np.testing.assert_allclose(read.w2c, cameras.w2c, atol=1e-6)
    np.testing.assert_allclose(read.intrinsics_px, cameras.intrinsics_px, rtol=1e-6)
    assert [str(image) for image in images] == NAMES and (read.width, read.height) == (32, 24)
    content = json.loads((views_dir / "transforms.json").read_text())
    assert content["elevation_rad"] == 0.3 and ("fl_x" in content) != per_frame
    assert list(views_dir.glob("*.tmp")) == []


def test_file_holds_opengl_camera_to_world(views_dir):
    """The columns of nerfstudio's matrix: right, up, backward, position."""
    write_transforms(views_dir / "t.json", orbit(1, 0.0, 32), ["000.png"])
    matrix = np.array(json.loads((views_dir / "t.json").read_text())["frames"][0]["transform_matrix"])
    expected = np.array([[0, 0, 1, 2], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1.0]])
    np.testing.assert_allclose(matrix, expected, atol=1e-6)


def test_reads_the_original_nerf_layout(views_dir):
    """camera_angle_x, names without a suffix, no size: the size comes from the image."""
    matrix = [[0, 0, 1, 2], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]
    content = {"camera_angle_x": 0.7, "frames": [{"file_path": "./001", "transform_matrix": matrix}]}
    (views_dir / "t.json").write_text(json.dumps(content))
    cameras, images = read_transforms(views_dir / "t.json")
    assert (cameras.width, cameras.height, images[0].name) == (32, 24, "001.png")
    np.testing.assert_allclose(cameras.intrinsics_px[0, :2, 2], [16, 12])
    np.testing.assert_allclose(cameras.intrinsics_px[0, 0, 0], 16 / np.tan(0.35), rtol=1e-6)
    np.testing.assert_allclose(cameras.positions[0], [2, 0, 0], atol=1e-6)


DAMAGE = {  # the message, and what is done to the file or to its frame 1
    "no frames": lambda content, frame: content.pop("frames"),
    "has no frames": lambda content, frame: content.update(frames=[]),
    "frame 1: image 'nowhere.png' does not exist": lambda content, frame: frame.update(
        file_path="nowhere.png"
    ),
    "it has no file_path": lambda content, frame: frame.pop("file_path"),
    "mask 'nowhere.png' does not exist": lambda content, frame: frame.update(mask_path="nowhere.png"),
    "mask_path 7 is not a file name": lambda content, frame: frame.update(mask_path=7),
    "transform_matrix is missing": lambda content, frame: frame.pop("transform_matrix"),
    "singular": lambda content, frame: frame.update(transform_matrix=np.zeros((4, 4)).tolist()),
    "not finite": lambda content, frame: frame["transform_matrix"][0].__setitem__(0, float("nan")),
    "beyond 1e": lambda content, frame: frame["transform_matrix"][0].__setitem__(3, 1e30),
    "not a rotation": lambda content, frame: frame.update(transform_matrix=np.diag([2.0, 2, 2, 1]).tolist()),
    "end with the row": lambda content, frame: frame["transform_matrix"][3].__setitem__(0, 1.0),
    "neither fl_x": lambda content, frame: content.pop("fl_x"),
    "cx is 'wide'": lambda content, frame: content.update(cx="wide"),
    "cy is 1000": lambda content, frame: frame.update(cy=10**400),
    "focal length": lambda content, frame: content.update(fl_x=-3.0),
    "between 0 and pi": lambda content, frame: (content.pop("fl_x"), content.update(camera_angle_x=0)),
    "is 32x24 px, w and h say 0x24": lambda content, frame: content.update(w=0),
    "is 32x24 px, w and h say 64x24": lambda content, frame: frame.update(w=64),
    r"distortion \(k1\)": lambda content, frame: content.update(k1=0.1),
    "camera_model 'OPENCV_FISHEYE'": lambda content, frame: content.update(camera_model="OPENCV_FISHEYE"),
    "singular; fl_x is None": lambda content, frame: frame.update(
        transform_matrix=np.zeros((4, 4)).tolist(), fl_x=None
    ),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_bad_files_get_one_clear_line(views_dir, message, user_error):
    path = views_dir / "transforms.json"
    write_transforms(path, orbit_32x24(), NAMES)
    content = json.loads(path.read_text())
    DAMAGE[message](content, content["frames"][1])
    path.write_text(json.dumps(content))
    with user_error(message):
        read_transforms(path)


def test_frames_may_differ_in_size_intrinsics_and_mask(views_dir):
    Image.new("L", (48, 40)).save(views_dir / "mask.png")
    Image.new("RGB", (48, 40)).save(views_dir / "002.png")
    path = views_dir / "transforms.json"
    write_transforms(path, orbit_32x24(), NAMES)
    content = json.loads(path.read_text())
    content["frames"][2] |= {"w": 48, "h": 40, "fl_x": 70.0, "fl_y": 75, "cx": 20.5, "mask_path": "mask.png"}
    path.write_text(json.dumps(content))
    frames, missing = read_frames(path)
    assert missing == [] and [frame.mask for frame in frames] == [None, None, Path("mask.png")]
    assert [(frame.width, frame.height) for frame in frames] == [(32, 24), (32, 24), (48, 40)]
    np.testing.assert_allclose(frames[2].intrinsics_px, [[70, 0, 20.5], [0, 75, 12], [0, 0, 1]])
    np.testing.assert_allclose(frames[1].intrinsics_px, orbit_32x24().intrinsics_px[1], rtol=1e-6)
    with pytest.raises(UserError, match="different sizes"):
        read_transforms(path)


def test_missing_images_are_left_out_where_that_is_allowed(views_dir):
    path = views_dir / "transforms.json"
    write_transforms(path, orbit_32x24(), ["000.png", "gone.png", "002.png"])
    with pytest.raises(UserError, match=r"frame 1: image 'gone\.png' does not exist"):
        read_frames(path)
    frames, missing = read_frames(path, allow_missing=True)
    assert [str(frame.image) for frame in frames] == ["000.png", "002.png"] and missing == ["gone.png"]
    np.testing.assert_allclose(frames[1].w2c, orbit_32x24().w2c[2], atol=1e-6)
    write_transforms(path, orbit_32x24()[0], ["gone.png"])
    with pytest.raises(UserError, match="none of the 1 images exists"):
        read_frames(path, allow_missing=True)


def test_large_worlds_keep_their_precision(views_dir):
    """With the coordinates of a land survey, float32 cannot tell half metres apart."""
    path = views_dir / "t.json"
    write_transforms(path, orbit_32x24()[0], ["000.png"])
    content = json.loads(path.read_text())
    content["frames"][0]["transform_matrix"][0][3] = 4_000_000.37
    path.write_text(json.dumps(content))
    (frame,) = read_frames(path)[0]
    np.testing.assert_allclose(np.linalg.inv(frame.w2c)[0, 3], 4_000_000.37, rtol=0, atol=1e-6)


def test_missing_and_unparsable_files_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_transforms(tmp_path / "transforms.json")
    for text in ("{", "[" * 100_000, "9" * 5000, "\ud800"):
        (tmp_path / "transforms.json").write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(UserError, match="JSON|no frames"):
            read_transforms(tmp_path / "transforms.json")

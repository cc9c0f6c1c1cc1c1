"""transforms.json against nerfstudio's convention, and damaged files."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from recon_torch.errors import UserError
from recon_torch.views.cameras import Cameras, orbit
from recon_torch.views.transforms import parts_of, read_frames, read_part, read_transforms, write_transforms


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
    "neither fl_x": lambda content, frame: (content.pop("fl_x"), content.pop("fl_y")),
    "cx is 'wide'": lambda content, frame: content.update(cx="wide"),
    "cy is 1000": lambda content, frame: frame.update(cy=10**400),
    "focal length": lambda content, frame: content.update(fl_x=-3.0),
    "between 0 and pi": lambda content, frame: (content.pop("fl_x"), content.update(camera_angle_x=0)),
    "frames; it needs a list of file_path and transform_matrix; is it 'Frames'": lambda content, frame: (
        content.update(Frames=content.pop("frames"))
    ),
    "is 32x24 px, w and h say 0x24": lambda content, frame: content.update(w=0),
    "is 32x24 px, w and h say 64x24": lambda content, frame: frame.update(w=64),
    r"distortion \(k1\)": lambda content, frame: content.update(k1=0.1),
    "camera_model 'FISHEYE624'": lambda content, frame: content.update(camera_model="FISHEYE624"),
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
        with pytest.raises(UserError, match="JSON|no frames|not UTF-8"):
            read_transforms(tmp_path / "transforms.json")


def write_split(directory, split: dict, **lists):
    """Writes a file of cameras for each name, and images but for those that are called "later"."""
    around = orbit(8, 0.3, 32).resized(32, 24)
    for file, names in split.items():
        write_transforms(directory / file, around[: len(names)], names, **lists)
        for name in names:
            image = directory / f"{name.removesuffix('.png')}.png"
            image.parent.mkdir(exist_ok=True)
            if "later" not in name:
                Image.new("RGB", (32, 24)).save(image)


def names_of(part):
    return None if part is None else [str(frame.image) for frame in read_part(part)[0]]


BLENDER = {
    "transforms_train.json": ["./train/r_0", "./train/r_1"],
    "transforms_test.json": ["./test/r_0"],
}


def test_blender_s_split_is_trained_and_tested(tmp_path):
    write_split(tmp_path, BLENDER)
    parts = parts_of(tmp_path)
    assert names_of(parts.train) == ["train/r_0.png", "train/r_1.png"] and parts.train.notes == []
    assert names_of(parts.test) == ["test/r_0.png"]
    alone = parts_of(tmp_path / "transforms_test.json")
    assert names_of(alone.train) == ["test/r_0.png"] and alone.test is None


def test_what_is_beside_a_split_is_named(tmp_path):
    write_split(tmp_path, BLENDER | {"transforms_val.json": ["./val/r_0"]})
    assert parts_of(tmp_path).train.notes == ["transforms_val.json is not read"]
    (tmp_path / "transforms_test.json").unlink()
    assert names_of(parts_of(tmp_path).test) == ["val/r_0.png"]
    write_split(tmp_path, {"transforms.json": ["a"]})
    parts = parts_of(tmp_path)
    assert names_of(parts.train) == ["a.png"] and parts.test is None
    assert parts.train.notes == [
        "transforms_train.json, transforms_val.json beside transforms.json is not read"
    ]


def test_blender_s_test_views_may_not_be_rendered(tmp_path):
    """The add-on BlenderNeRF writes their cameras at once."""
    write_split(tmp_path, BLENDER | {"transforms_test.json": ["./test/later"]})
    parts = parts_of(tmp_path)
    assert parts.test is None and "none of its images exists" in parts.train.notes[0]


FOUR = ["a.png", "b.png", "c.png", "d.png"]


@pytest.mark.parametrize(
    ("lists", "train", "test", "note"),
    [
        (dict(train_filenames=["a.png", ".\\b.png"], test_filenames=["./c.png", "d.png"]), "ab", "cd", None),
        (dict(train_filenames=["a.png"], test_filenames=["d.png"]), "a", "d", "2 frames that are neither"),
        (dict(train_filenames=["a.png"]), "a", None, "3 frames that are neither"),
        (dict(test_filenames=["d.png"]), "abc", "d", None),
        (dict(val_filenames=["d.png"]), "abc", None, "1 frames that are neither"),
        (
            dict(train_filenames=FOUR, test_filenames=["d.png"]),
            "abcd",
            "d",
            "1 frames are to train and to test",
        ),
    ],
)
def test_lists_of_file_names_split_the_frames(tmp_path, lists, train, test, note):
    write_split(tmp_path, {"transforms.json": FOUR}, **lists)
    parts = parts_of(tmp_path)
    assert names_of(parts.train) == [f"{name}.png" for name in train]
    assert names_of(parts.test) == (test and [f"{name}.png" for name in test])
    assert [note in said for said in parts.train.notes] == ([True] if note else [])


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (dict(train_filenames=["a.png", "e.png"]), "train_filenames names e.png, which no frame has"),
        (dict(test_filenames=FOUR), "leave no frame to train with"),
        (dict(val_filenames="a.png"), "val_filenames is 'a.png', not a list"),
    ],
)
def test_wrong_lists_are_refused(tmp_path, lists, message, user_error):
    write_split(tmp_path, {"transforms.json": FOUR}, **lists)
    with user_error(message):
        parts_of(tmp_path)


def test_a_file_of_another_name_is_a_hint(tmp_path, user_error):
    write_split(tmp_path, {"Transforms.json": ["a"]})
    with user_error(r"transforms\.json does not exist; .* if it is Transforms\.json, give the path"):
        parts_of(tmp_path)
    with user_error(r"none/transforms\.json does not exist"):
        parts_of(tmp_path / "none")
    with user_error(r"transforms\.json does not exist; .* is it 'Transforms\.json'"):
        parts_of(tmp_path / "transforms.json")

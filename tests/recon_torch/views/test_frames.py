"""Frames as real exporters write them: names, sizes, turned photos, entries of their own."""

import numpy as np
import pytest
from PIL import Image

from recon_torch.views.frames import parse_frame
from recon_torch.views.images import read_image

MATRIX = [[0, 0, 1, 2], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]
CAMERA = {"transform_matrix": MATRIX, "fl_x": 50.0}


def frame_of(folder, shared=(), **own):
    return parse_frame(folder, CAMERA | dict(shared), {"file_path": "images/000.png"} | own)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (48, 32)).save(tmp_path / "images" / "000.png")
    return tmp_path


@pytest.mark.parametrize("name", ["images\\000.png", ".\\images\\000", "./images/000", "images//000.png"])
def test_one_image_in_many_spellings(folder, name):
    assert frame_of(folder, file_path=name, mask_path=name).image.as_posix() == "images/000.png"


@pytest.mark.parametrize(
    "name",
    ["Images/000.PNG", "images\\000.PNG", "IMAGES/000", "C:\\me\\images\\000.png", "/tmp/me/images/000"],
)
def test_other_letters_are_refused_with_a_hint(folder, name, user_error):
    with user_error(r"does not exist; is it 'images/000\.png'\?; mask .* is it 'images/000\.png'\?"):
        frame_of(folder, file_path=name, mask_path=name)
    with user_error("image 'images/001.png' does not exist$"):
        frame_of(folder, file_path="images/001.png")


def save_turned(path, size, orientation):
    """A black picture with a white top left quarter, as it is stored."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[: size[1] // 2, : size[0] // 2] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif)


@pytest.mark.parametrize(
    ("orientation", "entries", "size", "upright", "said"),
    [
        (6, {"w": 48, "h": 32}, (48, 32), False, "as it is stored, not turned by EXIF: w and h are"),
        (6, {"w": 32.0, "h": 48.0}, (32, 48), True, "turned as its EXIF entry says: w and h are"),
        (8, {"w": 48}, (48, 32), False, "w and h are"),
        (6, {"cx": 23.0, "cy": 17.0}, (48, 32), False, "cx and cy are"),
        (6, {"cx": 17.0, "cy": 23.0}, (32, 48), True, "cx and cy are"),
        (6, {}, (48, 32), False, "nothing in the file shows"),
        (3, {"w": 48, "h": 32}, (48, 32), False, "nothing in the file shows"),
        (1, {"w": 48, "h": 32}, (48, 32), False, None),
        (99, {}, (48, 32), False, None),
    ],
)
def test_a_turned_photo_is_the_one_that_the_camera_is_of(folder, orientation, entries, size, upright, said):
    save_turned(folder / "images" / "000.png", (48, 32), orientation)
    frame = frame_of(folder, entries)
    assert (frame.width, frame.height) == size and frame.upright == upright
    assert read_image(folder / frame.image, frame.upright).shape[1::-1] == size
    assert [said in note for note in frame.notes] == ([True] if said else [])
    np.testing.assert_allclose(frame.intrinsics_px[0, 2], entries.get("cx", size[0] / 2))


def test_a_turned_photo_of_another_size_is_refused_with_both_sizes(folder, user_error):
    save_turned(folder / "images" / "000.png", (48, 32), 6)
    with user_error("is 48x32 px and turned by EXIF 32x48, w and h say 64x32"):
        frame_of(folder, w=64, h=32)


def test_a_frame_s_own_camera_wins_and_is_noted(folder):
    """nerfstudio 1.1.5 takes the file's, so that the same file gives other cameras there."""
    frame = frame_of(folder, {"fl_y": 60.0, "cx": 24.0}, fl_x=70.0, cx=20, k1=0.0)
    np.testing.assert_array_equal(frame.intrinsics_px[:2], [[70, 0, 20], [0, 60, 16]])
    (note,) = frame.notes
    assert "in fl_x, cx: the frame's own is taken" in note and "nerfstudio 1.1.5" in note
    assert frame_of(folder, fl_x=50).notes == ()


def test_a_frame_s_own_angle_wins_over_the_focal_length_of_the_file(folder):
    frame = frame_of(folder, camera_angle_x=2 * np.arctan(0.5))
    np.testing.assert_allclose(frame.intrinsics_px[0, 0], 48)


def test_focal_lengths_that_contradict_each_other_are_noted(folder):
    entries = {"w": 48, "h": 32, "camera_angle_x": 2 * np.arctan(24 / 50)}
    assert frame_of(folder, entries).notes == ()
    (note,) = frame_of(folder, entries | {"camera_angle_x": 0.5}).notes
    assert "fl_x, camera_angle_x contradict each other: fl_x is taken" in note


def test_what_is_not_read_is_named(folder):
    """What other programs write for their own use is not worth a word."""
    own = {"sharpness": 12.5, "colmap_im_id": 3, "rotation": 0.1, "depth_file_path": "d.png", "time": 0.5}
    frame = frame_of(folder, {"aabb_scale": 16, "applied_transform": MATRIX[:3], "n_frames": 3}, **own)
    assert frame.notes == ("it has entries that are not read: depth_file_path, n_frames, time",)


def test_lens_distortion_gives_a_pinhole_and_a_note(folder):
    frame = frame_of(folder, {"k1": 0.2, "fl_y": 40.0})
    factor = frame.undistortion.factor
    assert factor > 1 and frame.notes == ("its lens distortion is undone",)
    np.testing.assert_allclose(frame.intrinsics_px, [[50 * factor, 0, 24], [0, 40 * factor, 16], [0, 0, 1]])
    assert "fisheye" in frame_of(folder, {"is_fisheye": True, "k1": 0.1}).notes[0]

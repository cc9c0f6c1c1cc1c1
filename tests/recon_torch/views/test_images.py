"""Files: what is written can be read back, and what cannot be read or written is one clear error."""

import json
import subprocess
import sys

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from recon_torch.errors import UserError
from recon_torch.files import replacing, write_json
from recon_torch.views import images
from recon_torch.views.images import contact_sheet, image_size, read_image, to_uint8, write_image
from recon_torch.views.video import write_video


def random_image(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("channels", [3, 4])
def test_image_round_trip(tmp_path, channels):
    pixels = random_image(5, 7, channels)
    write_image(tmp_path / "new" / "x.png", pixels / 255.0)
    read = read_image(tmp_path / "new" / "x.png")
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, pixels.astype(np.float32) / 255.0)


def test_values_are_rounded_and_clipped():
    assert to_uint8(np.array([-1.0, 0.4999 / 255, 0.5001 / 255, 2.0])).tolist() == [0, 0, 1, 255]
    with pytest.raises(ValueError, match="NaN"):
        to_uint8(np.array([np.nan]))


def test_other_modes(tmp_path):
    grey = random_image(4, 6)
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 255, 0])
    cases = {
        "L": (Image.fromarray(grey), np.repeat(grey[..., None], 3, -1) / 255),
        "I16": (Image.fromarray(grey.astype(np.uint16) * 257), np.repeat(grey[..., None], 3, -1) / 255),
        "1": (Image.fromarray(grey > 99), np.repeat(grey[..., None] > 99, 3, -1)),
        "LA": (Image.fromarray(np.stack([grey, grey], -1), "LA"), np.repeat(grey[..., None], 4, -1) / 255),
        "P": (palette, [[[1, 0, 0], [0, 1, 0]]]),
    }
    for name, (image, expected) in cases.items():
        image.save(tmp_path / f"{name}.png")
        np.testing.assert_allclose(read_image(tmp_path / f"{name}.png"), expected, atol=1e-6, err_msg=name)
    palette.save(tmp_path / "clear.png", transparency=0)
    np.testing.assert_array_equal(read_image(tmp_path / "clear.png")[0, :, 3], [0, 1])


def test_exif_rotation_is_applied(tmp_path):
    pixels = random_image(4, 6, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held a quarter turn to the left: turn the picture clockwise
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    np.testing.assert_allclose(read_image(tmp_path / "x.png"), np.rot90(pixels, -1) / 255, atol=1e-6)
    assert image_size(tmp_path / "x.png") == (4, 6)


def test_unreadable_images_are_user_errors(tmp_path, monkeypatch):
    (tmp_path / "text.png").write_text("not a picture")
    write_image(tmp_path / "cut.png", random_image(64, 64, 3))
    content = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    for name, message in [
        ("none.png", "no image at"),
        ("text.png", "cannot read"),
        ("cut.png", "cannot read"),
    ]:
        with pytest.raises(UserError, match=message):
            read_image(tmp_path / name)
    with pytest.raises(UserError, match="cannot read"):
        read_image(tmp_path)
    write_image(tmp_path / "large.png", random_image(8, 8, 3))
    monkeypatch.setattr(images, "MAX_PIXELS", 63)
    with pytest.raises(UserError, match="8 x 8 pixels"):
        read_image(tmp_path / "large.png")


def test_failed_write_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"size": np.float32(0.5), "shape": np.arange(2)})
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, float("nan"))
    assert json.loads(path.read_text()) == {"size": 0.5, "shape": [0, 1]}
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]


def test_unwritable_place_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "taken.json").mkdir()
    for path in (tmp_path / "file" / "x.json", tmp_path / "taken.json"):
        with pytest.raises(UserError, match=f"cannot write {path}"):
            write_json(path, 1)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "taken.json"]


FULL_DISK = """
import resource, signal, sys
import numpy as np
from recon_torch.errors import UserError
from recon_torch.files import write_json
from recon_torch.formats.ply import save_ply
from recon_torch.scene.start import init_ball
from recon_torch.views.images import write_image
from recon_torch.views.video import write_video
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
folder = sys.argv[1]
noise = np.random.default_rng(0).random((12, 128, 128, 3))
for write in (
    lambda: write_json(folder + "/a.json", noise[0]),
    lambda: write_image(folder + "/a.png", noise[0]),
    lambda: write_video(folder + "/a.mp4", noise),
    lambda: save_ply(init_ball(1000), folder + "/a.ply"),
):
    try:
        write()
    except UserError as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs setrlimit")
def test_a_file_that_finds_no_room_leaves_the_old_one_alone(tmp_path):
    """In a process of its own whose files may not grow beyond 20 kB."""
    names = ["a.json", "a.png", "a.mp4", "a.ply"]
    for name in names:
        (tmp_path / name).write_text("old")
    done = subprocess.run([sys.executable, "-c", FULL_DISK, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, line in zip(names, done.stdout.splitlines(), strict=True):
        assert line.startswith(f"cannot write {tmp_path / name} (") and line.endswith("choose another place")
        assert (tmp_path / name).read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def smooth_frames(count, height, width):
    """Coloured ramps that change with time: what survives chroma subsampling."""
    time, row, column = np.meshgrid(*(np.linspace(0, 1, n) for n in (count, height, width)), indexing="ij")
    return np.stack([0.2 + 0.6 * row, 0.8 - 0.6 * column, 0.1 + 0.8 * time], -1).astype(np.float32)


def read_video(path):
    reader = imageio_ffmpeg.read_frames(path)
    meta = next(reader)
    width, height = meta["size"]
    return meta, np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader])


def test_video_round_trip_with_odd_size(tmp_path):
    frames = smooth_frames(6, 33, 47)
    assert write_video(tmp_path / "x.mp4", frames, fps=12) == tmp_path / "x.mp4"
    meta, decoded = read_video(tmp_path / "x.mp4")
    assert (meta["codec"], meta["fps"], meta["pix_fmt"].split("(")[0]) == ("h264", 12.0, "yuv420p")
    assert decoded.shape == (6, 34, 48, 3)
    np.testing.assert_allclose(decoded[:, :33, :47] / 255.0, frames, atol=0.04)
    write_video(tmp_path / "y.mp4", frames, fps=12)
    assert (tmp_path / "x.mp4").read_bytes() == (tmp_path / "y.mp4").read_bytes()


def test_without_ffmpeg_a_gif_is_written(tmp_path, monkeypatch):
    def missing():
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", missing)
    frames = np.stack([np.full((8, 8, 3), level, np.float32) for level in (0.0, 1.0)])
    with pytest.warns(UserWarning, match="no ffmpeg"):
        path = write_video(tmp_path / "x.mp4", frames)
    assert path == tmp_path / "x.gif"
    with Image.open(path) as image:
        assert image.n_frames == 2
        image.seek(1)
        assert np.asarray(image.convert("RGB")).min() == 255


def test_contact_sheet_places_every_tile():
    small = random_image(2, 8, 8, 3) / 255.0
    large = random_image(1, 50, 40, 3, seed=1) / 255.0
    sheet = contact_sheet([small, large], ["views", "render"], tile_px=32, gap_px=2)
    gutter = sheet.shape[1] - 2 * (32 + 2)
    assert sheet.shape[0] == 2 + 34 + 52
    for k in range(2):
        left = gutter + 34 * k
        tile = sheet[2:34, left : left + 32]
        np.testing.assert_array_equal(tile[::4, ::4], to_uint8(small[k]))
        np.testing.assert_array_equal(tile[3::4, 3::4], to_uint8(small[k]))
    np.testing.assert_array_equal(sheet[36:86, gutter : gutter + 40], to_uint8(large[0]))
    assert sheet[:, :gutter].min() == 0  # the labels

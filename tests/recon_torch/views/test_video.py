"""Videos are read as they were written: which frames are taken, and the cameras that they get."""

import functools
import subprocess

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from recon_torch.errors import UserError
from recon_torch.views.cameras import orbit
from recon_torch.views.masks import VIDEO_EDGE_PX, by_backdrop
from recon_torch.views.video import frames_at, load_video, write_video

NUM_FRAMES, HEIGHT, WIDTH = 20, 48, 64


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """A square on a green background that gets brighter from frame to frame."""
    frames = np.full((NUM_FRAMES, HEIGHT, WIDTH, 3), [0.1, 0.5, 0.2], np.float32)
    frames[:, 12:36, 20:44] = np.linspace(0.3, 0.95, NUM_FRAMES)[:, None, None, None]
    return write_video(tmp_path_factory.mktemp("video") / "turn.mp4", frames)


def load(video, **options):
    defaults = {"num_views": 5, "elevation_rad": 0.2, "fov_deg": 40.0}
    return load_video(video, functools.partial(by_backdrop, edge_px=VIDEO_EDGE_PX), **(defaults | options))


def test_takes_evenly_spaced_frames_and_cuts_out_the_object(video):
    views = load(video)
    assert views.names == [f"frame {index}" for index in (0, 4, 8, 12, 16)]
    brightness = np.linspace(0.3, 0.95, NUM_FRAMES)[[0, 4, 8, 12, 16]]
    np.testing.assert_allclose(views.images[:, 24, 32].mean(-1), brightness, atol=0.03)
    np.testing.assert_array_equal(views.images[:, 4, 4], 1)  # white now
    expected = np.zeros((HEIGHT, WIDTH))
    expected[12:36, 20:44] = 1
    assert (np.abs(views.masks[..., 0] - expected) > 0.2).mean() < 0.03
    assert views.notes == []


@pytest.mark.parametrize("clockwise", [False, True])
def test_cameras_of_a_video_go_round(video, clockwise):
    views = load(video, num_views=8, clockwise=clockwise)
    taken = np.array(
        [0, 2, 5, 8, 10, 12, 15, 18]
    )  # 2.5 frames apart, rounded: the angles are the frames' own
    assert views.names == [f"frame {index}" for index in taken]
    azimuths = 2 * np.pi * taken / NUM_FRAMES * (-1 if clockwise else 1)
    np.testing.assert_allclose(
        views.cameras.w2c, orbit(elevation_rad=0.2, azimuths_rad=azimuths).w2c, atol=1e-6
    )
    focal = 0.5 * HEIGHT / np.tan(np.radians(20))
    np.testing.assert_allclose(
        views.cameras.intrinsics_px[3], [[focal, 0, 32], [0, focal, 24], [0, 0, 1]], rtol=1e-5
    )


def test_views_may_be_smaller_than_the_video(video):
    views = load(video, height=24)
    assert views.images.shape == (5, 24, 32, 3)
    focal = 0.5 * 24 / np.tan(np.radians(20))
    np.testing.assert_allclose(
        views.cameras.intrinsics_px[0], [[focal, 0, 16], [0, focal, 12], [0, 0, 1]], rtol=1e-5
    )


def test_bad_videos_are_user_errors(video, tmp_path, user_error):
    with pytest.raises(UserError, match="does not exist"):
        load(tmp_path / "none.mp4")
    with pytest.raises(UserError, match="has 20 frames; take from 1 to that many views of it, not 21"):
        load(video, num_views=21)
    content = video.read_bytes()
    for name, damaged in (
        ("text.mp4", b"no video"),
        ("empty.mp4", b""),
        ("cut.mp4", content[: len(content) // 2]),
    ):
        (tmp_path / name).write_bytes(damaged)
        with user_error(f"{name} cannot be read as a video"):
            load(tmp_path / name)


def ffmpeg(*arguments):
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)], check=True)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
@pytest.mark.parametrize("share", [0.95, 0.85])
def test_a_video_that_is_cut_short_is_no_full_turn(video, tmp_path, name, share, user_error):
    ffmpeg("-i", video, "-c", "copy", "-movflags", "+faststart", tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(len(content) * share)])
    with user_error(f"{name} is cut short or damaged"):
        load(tmp_path / name)


@pytest.mark.parametrize(("missing", "seconds"), [(1, "0.04"), (3, "0.1.")])
def test_a_video_that_ends_between_two_frames_is_cut_short_too(video, tmp_path, missing, seconds, user_error):
    """ffmpeg says nothing then: only the time that the container states shows it."""
    content = video.read_bytes()
    table = content.index(b"stsz") + 12  # the sizes of the frames, of which the last ones end the file
    count = int.from_bytes(content[table : table + 4], "big")
    sizes = np.frombuffer(content[table + 4 : table + 4 + 4 * count], ">u4")
    assert count == NUM_FRAMES
    (tmp_path / "cut.mp4").write_bytes(content[: -int(sizes[-missing:].sum())])
    with user_error(rf"cut.mp4 is cut short or damaged \(it ends {seconds} s before"):
        load(tmp_path / "cut.mp4")


FRAGMENTS = ["-movflags", "+frag_keyframe+empty_moov"]


@pytest.mark.parametrize(
    ("name", "how"), [("a.ts", []), ("a.h264", []), ("a.mp4", FRAGMENTS), ("a.webm", ["-live", "1"])]
)
def test_it_is_told_where_nothing_states_the_length(video, tmp_path, name, how):
    """A part of such a video looks like a whole one."""
    codec = ["-c:v", "libvpx"] if name == "a.webm" else ["-c", "copy"]
    ffmpeg("-i", video, *codec, *how, tmp_path / name)
    (note,) = [each for each in load(tmp_path / name).notes if each.startswith("nothing in")]
    assert note.startswith("nothing in the video states how long it is") and "its 20 frames" in note


@pytest.mark.parametrize(("name", "num_bytes"), [("a.gif", 1), ("a.apng", 12)])
def test_moving_pictures_have_their_last_bytes(video, tmp_path, name, num_bytes, user_error):
    """Those say only that the file ends: all frames are there in what is cut here."""
    ffmpeg("-i", video, tmp_path / name)
    assert load(tmp_path / name).names == load(video).names
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-num_bytes])
    with user_error(f"{name} is cut short or damaged"):
        load(tmp_path / name)


def test_sound_may_be_longer_than_the_pictures(video, tmp_path):
    sound = ["-f", "lavfi", "-i", "sine=duration=2"]
    ffmpeg("-i", video, *sound, "-c:v", "copy", "-c:a", "aac", tmp_path / "sound.mp4")
    assert load(tmp_path / "sound.mp4").names == load(video).names


@pytest.mark.parametrize(("aspect", "columns"), [("2/1", 128), ("1/2", 32), ("0/1", 64)])
def test_pixels_are_made_square(video, tmp_path, aspect, columns):
    ffmpeg("-i", video, "-vf", f"setsar={aspect}", "-c:v", "libx264", tmp_path / "wide.mkv")
    views = load(tmp_path / "wide.mkv")
    assert views.images.shape == (5, HEIGHT, columns, 3)
    focal = 0.5 * HEIGHT / np.tan(np.radians(20))
    expected = [[focal, 0, columns / 2], [0, focal, 24], [0, 0, 1]]
    np.testing.assert_allclose(views.cameras.intrinsics_px[0], expected, rtol=1e-5)
    inside = np.zeros((HEIGHT, columns))
    inside[12:36, round(20 * columns / 64) : round(44 * columns / 64)] = 1
    assert (np.abs(views.masks[..., 0] - inside) > 0.4).mean() < 0.03


def test_a_playlist_opens_no_further_file(tmp_path, video, user_error):
    (tmp_path / "list.mp4").write_text(f"ffconcat version 1.0\nfile {video}\n")
    with user_error("list.mp4 cannot be read as a video"):
        load(tmp_path / "list.mp4")


def smooth_frames(count, height, width):
    """Coloured ramps that change with time, which chroma subsampling does not damage."""
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


@pytest.mark.parametrize(
    "name, codec",
    [
        ("a.mov", "qtrle -pix_fmt argb"),
        ("a.webm", "libvpx-vp9 -pix_fmt yuva420p -lossless 1"),
        ("a.apng", "apng -pix_fmt rgba -plays 0"),
    ],
)
def test_frames_with_alpha_are_over_white(tmp_path, name, codec):
    rgba = np.zeros((3, 32, 32, 4), np.uint8)  # black where it is clear
    rgba[:, 8:24, 8:24] = 200, 40, 40, 255
    rgba[:, 13:19, 13:19, 3] = 128
    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgba"]
    command = [*ffmpeg, "-s", "32x32", "-r", "8", "-i", "-", "-c:v", *codec.split(), str(tmp_path / name)]
    subprocess.run(command, input=rgba.tobytes(), check=True)
    alpha = rgba[1, ..., 3:] / 255
    expected = rgba[1, ..., :3] * alpha + 255 * (1 - alpha)
    (frame,) = frames_at(tmp_path / name, np.array([1]))
    inner = np.s_[[0, 10, 16], [0, 10, 16]]  # away from edges, at which chroma is shared
    np.testing.assert_allclose(frame[inner], expected[inner], atol=6)


def test_frames_without_alpha_are_as_ffmpeg_decodes_them(video):
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(video), "-f", "rawvideo"]
    done = subprocess.run([*command, "-pix_fmt", "rgb24", "-"], capture_output=True, check=True)
    (frame,) = frames_at(video, np.array([0]))
    np.testing.assert_array_equal(frame.ravel(), np.frombuffer(done.stdout, np.uint8)[: frame.size])

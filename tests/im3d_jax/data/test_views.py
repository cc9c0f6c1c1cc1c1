"""Objects as directories of views: which are turntables, why others are not, and what is stored."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from im3d_jax.data import turntables, views
from im3d_jax.data.views import Unfit
from recon_torch.views import cameras
from recon_torch.views.cameras import Cameras
from recon_torch.views.images import straight, to_uint8, write_image

SIZE, VIEWS = 16, 4
ORBIT = cameras.orbit(VIEWS, 0.4, SIZE)
RGBA = np.random.default_rng(0).integers(0, 256, (VIEWS, SIZE, SIZE, 4)) / 255.0


def over_white(rgba):
    return rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:]


@pytest.fixture
def directory(tmp_path):
    """An object that is a turntable."""
    views.write_object(tmp_path / "part" / "cat", RGBA, ORBIT, "a cat", 0.4)
    return tmp_path / "part" / "cat"


def test_an_object_that_was_written_is_read(directory, tmp_path):
    assert views.find_objects(tmp_path) == [directory]
    record = views.read_object(directory, "part/cat")
    assert (record.id, record.caption) == ("part/cat", "a cat")
    assert record.elevation_rad == pytest.approx(0.4, abs=1e-5)
    np.testing.assert_allclose(record.cameras.w2c, ORBIT.w2c, atol=1e-5)
    rgb, alpha = turntables.decode_views(record.views, SIZE)
    np.testing.assert_allclose(rgb, over_white(RGBA), atol=1e-6)
    np.testing.assert_allclose(alpha, RGBA[..., 3:], atol=1e-6)


def test_masks_and_other_formats_become_alpha(directory):
    """Frames with a mask_path, and one without either, whose object is what is not white."""
    content = json.loads((directory / "transforms.json").read_text())
    mask = np.zeros((SIZE, SIZE, 1))
    mask[3:9, 5:12] = 1
    for number, frame in enumerate(content["frames"]):
        frame["file_path"] = f"images/{number}.webp"
        picture = np.where(mask > 0, RGBA[number, ..., :3] * 0.5, 1.0)
        Image.fromarray(to_uint8(picture)).save(directory / f"images/{number}.webp", lossless=True)
        if number:
            frame["mask_path"] = "mask.png"
    write_image(directory / "mask.png", mask)
    (directory / "transforms.json").write_text(json.dumps(content))
    rgb, alpha = turntables.decode_views(views.read_object(directory, "cat").views, SIZE)
    np.testing.assert_array_equal(alpha, np.broadcast_to(mask, alpha.shape))
    np.testing.assert_allclose(rgb, np.where(mask > 0, RGBA[..., :3] * 0.5, 1), atol=0.51 / 255)


def test_colours_without_alpha_composite_to_the_same_picture():
    alpha = np.array([0.0, 1 / 255, 0.3, 1.0])[:, None]
    rgb = over_white(np.concatenate([np.full((4, 3), [0.2, 0.5, 1.0]), alpha], -1))
    found = straight(rgb, alpha)
    np.testing.assert_allclose(over_white(found), rgb, atol=1e-6)
    np.testing.assert_allclose(found[1:, :3], np.full((3, 3), [0.2, 0.5, 1.0]), atol=1e-6)
    np.testing.assert_array_equal(found[0, :3], 1)


@pytest.mark.parametrize("elevation_deg", [-20, 0, 44, 80])
@pytest.mark.parametrize("first_deg", [0, 100])
def test_orbits_are_turntables(elevation_deg, first_deg):
    azimuths_rad = np.deg2rad(first_deg) + 2 * np.pi * np.arange(16) / 16
    orbit = cameras.orbit(16, np.deg2rad(elevation_deg), SIZE, radius=1.3, azimuths_rad=azimuths_rad)
    assert np.rad2deg(views.check_turntable(orbit)) == pytest.approx(elevation_deg, abs=1e-3)


def around(**changes):
    return cameras.orbit(**(dict(num_views=4, elevation_rad=0.4, size=SIZE) | changes))


def moved(orbit, transform):
    """The orbit, in a world that is transformed."""
    return Cameras((orbit.w2c @ transform).astype(np.float32), orbit.intrinsics_px, SIZE, SIZE)


def rolled(orbit):
    turn = np.eye(4)
    turn[:2, :2] = [[0, 1], [-1, 0]]
    return Cameras((turn @ orbit.w2c).astype(np.float32), orbit.intrinsics_px, SIZE, SIZE)


def turned_away(orbit):
    w2c = orbit.w2c.copy()
    w2c[:, :3, 3] = np.einsum("kij,kj->ki", w2c[:, :3, :3], orbit.positions)  # cameras at minus the positions
    return Cameras(w2c, orbit.intrinsics_px, SIZE, SIZE)


def mixed(first, second):
    w2c = np.stack([first.w2c[0], *second.w2c[1:]])
    return Cameras(w2c, first.intrinsics_px, SIZE, SIZE)


QUARTERS = np.arange(4) * np.pi / 2
NO_TURNTABLES = {
    "clockwise": (around(azimuths_rad=-QUARTERS), "270.0 degrees, not 90 counter-clockwise; it is clockwise"),
    "uneven": (around(azimuths_rad=QUARTERS * 0.9), "azimuth steps are 117.0 degrees, not 90"),
    "elevations": (around(elevation_rad=np.array([0.2, 0.2, 0.2, 0.3])), "at 11.5 to 17.2 degrees"),
    "distances": (mixed(around(radius=1.5), around()), "1.5 to 2 from the origin"),
    "tilted": (rolled(around()), "tilted"),
    "upside down": (moved(around(azimuths_rad=-QUARTERS), np.diag([1, -1, -1, 1.0])), "tilted"),
    "elsewhere": (turned_away(around(elevation_rad=0.0)), "do not look at the origin"),
    "not square": (Cameras(ORBIT.w2c, ORBIT.intrinsics_px, 20, SIZE), "20x16, not square"),
}


@pytest.mark.parametrize("kind", NO_TURNTABLES)
def test_cameras_that_are_no_turntable_are_refused_with_the_reason(kind):
    with pytest.raises(Unfit, match=NO_TURNTABLES[kind][1]):
        views.check_turntable(NO_TURNTABLES[kind][0])


def write(name, content):
    return lambda directory: (directory / name).write_text(content)


DAMAGED = {
    "no caption": (lambda directory: (directory / "metadata.json").unlink(), "no caption"),
    "no JSON": (write("metadata.json", "{"), "metadata.json, line 1: is not JSON"),
    "a list": (write("metadata.json", "[]"), "metadata.json cannot be read"),
    "a number": (write("metadata.json", '{"caption": 3}'), "caption must be text"),
    "elevation": (write("metadata.json", '{"caption": "a cat", "elevation_deg": 21.9}'), "stand at 22.9"),
    "no picture": (lambda directory: (directory / "images/002.png").unlink(), "002.png'? does not exist"),
    "a bad picture": (write("images/002.png", "not one"), "cannot read .*002.png"),
    "no cameras": (write("transforms.json", "{}"), "has no frames"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_objects_are_unfit(directory, kind):
    DAMAGED[kind][0](directory)
    with pytest.raises(Unfit, match=DAMAGED[kind][1]):
        views.read_object(directory, "cat")


def as_files(directory, content, test):
    (directory / "transforms_train.json").write_text(json.dumps(content))
    (directory / "transforms_test.json").write_text(json.dumps(content | {"frames": test}))
    (directory / "transforms.json").unlink()


def as_lists(directory, content, test):
    names = [frame["file_path"] for frame in test]
    content = content | {"test_filenames": names, "frames": content["frames"] + test}
    (directory / "transforms.json").write_text(json.dumps(content))


@pytest.mark.parametrize("split", [as_files, as_lists])
def test_of_split_views_those_to_train_with_are_the_object(directory, tmp_path, split):
    content = json.loads((directory / "transforms.json").read_text())
    write_image(directory / "images" / "far.png", RGBA[0, :4])
    split(directory, content, [{**content["frames"][0], "file_path": "images/far.png", "h": 4}])
    assert views.find_objects(tmp_path) == [directory]
    record = views.read_object(directory, "cat")
    np.testing.assert_allclose(record.cameras.w2c, ORBIT.w2c, atol=1e-5)
    rgb, alpha = views.read_views(directory)
    np.testing.assert_allclose(rgb, over_white(RGBA), atol=1e-6)
    np.testing.assert_allclose(alpha, RGBA[..., 3:], atol=1e-6)
    digest = views.source_digest(directory, "cat")
    write_image(directory / "images" / "003.png", RGBA[0])
    assert views.source_digest(directory, "cat") != digest


def test_a_caption_may_be_in_a_text_file(directory):
    (directory / "metadata.json").unlink()
    (directory / "caption.txt").write_text("  a blue cat\n")
    assert views.read_object(directory, "cat").caption == "a blue cat"


def test_pictures_that_can_be_stored_are_kept_byte_for_byte(directory):
    path = directory / "images" / "001.png"
    buffer = io.BytesIO()
    Image.open(path).save(buffer, format="PNG", compress_level=0)
    path.write_bytes(buffer.getvalue())
    assert views.read_object(directory, "cat").views[1] == buffer.getvalue()

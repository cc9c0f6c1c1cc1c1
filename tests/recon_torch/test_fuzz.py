"""Readers of files that are damaged or nonsense return something usable or raise a UserError of one line."""

import json
import tracemalloc
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recon_torch.errors import UserError
from recon_torch.formats.ply import PLY_NAMES, PLY_TYPES, load_ply, save_ply
from recon_torch.raster.gaussians import Gaussians
from recon_torch.views import check, world
from recon_torch.views.cameras import orbit
from recon_torch.views.directory import load_views
from recon_torch.views.images import image_size, read_image, write_image
from recon_torch.views.transforms import read_frames, write_transforms

pytestmark = pytest.mark.slow

SIZE = 16
MOST_BYTES = 32 * 2**20  # of memory that reading a file of some kilobytes may take
NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([0, -1, 10**400, 1e308, 2**63, 1e-320, True]))
JSON = st.recursive(
    st.none()
    | NUMBERS
    | st.text(max_size=20)
    | st.sampled_from(["0.png", "", ".", "..", "\x00", "a" * 5000]),
    lambda children: (
        st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=8), children, max_size=3)
    ),
    max_leaves=8,
)
KEYS = ("file_path", "mask_path", "transform_matrix", "fl_x", "fl_y", "cx", "cy", "w", "h", "k1", "p2")
ANGLES, LENSES = ("camera_angle_x", "camera_angle_y", "x_fov"), ("k4", "is_fisheye", "distortion_params")
ALL_KEYS = (*KEYS, *ANGLES, *LENSES, "camera_model", "frames", "train_filenames", "test_filenames")


def examples(count: int) -> settings:
    """The same examples in every run, without a time limit, because machines may be slow."""
    return settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """The content with a few stretches cut out, doubled, overwritten or swapped for a word of a header."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 40)))
        words = [
            b"",
            b"\n",
            b" ",
            b"9" * 30,
            b"-1",
            b"property",
            b"element vertex 9999999999\n",
            b"end_header\n",
        ]
        words += [
            b"property list uchar int x\n",
            b"double",
            b"[[[[",
            b"NaN",
            b"1e999",
            bytes(data[start:end]) * 2,
        ]
        data[start:end] = draw(st.sampled_from(words) | st.binary(max_size=12))
    return bytes(data)


@st.composite
def ply_of_other_types(draw) -> bytes:
    """All properties of Gaussians in any order and of any type, with others in between, and any values."""
    names = draw(st.permutations([*PLY_NAMES, "red", "f_rest_0"]))
    types = [
        draw(st.sampled_from([*PLY_TYPES, "long"] if name == "red" else list(PLY_TYPES))) for name in names
    ]
    num = draw(st.integers(0, 3))
    lines = ["ply", "format binary_little_endian 1.0", f"element vertex {num}"]
    lines += [f"property {kind} {name}" for kind, name in zip(types, names, strict=True)]
    row_bytes = sum(np.dtype(PLY_TYPES.get(kind, "<i8")).itemsize for kind in types)
    body = draw(st.binary(min_size=num * row_bytes, max_size=num * row_bytes))
    return "\n".join([*lines, "end_header\n"]).encode() + body


def usable_or_refused(read, path, most_bytes=MOST_BYTES):
    """What `read` returns for the file, or None if it raises a UserError of one line; other errors pass."""
    tracemalloc.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return read(path)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
        return None
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < most_bytes


def make_gaussians(num: int) -> Gaussians:
    generator = torch.Generator().manual_seed(0)
    shapes = [(num, 3), (num, 4), (num, 3), (num,), (num, 3)]
    return Gaussians(*(torch.randn(shape, generator=generator) for shape in shapes))


@pytest.fixture(scope="module")
def ply(tmp_path_factory):
    path = tmp_path_factory.mktemp("ply") / "a.ply"
    save_ply(make_gaussians(4), path)
    return path


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("views")
    picture = np.zeros((SIZE, SIZE, 4), np.float32)
    picture[4:12, 4:12] = 1
    for index in range(4):
        write_image(directory / f"{index}.png", picture)
    write_transforms(directory / "transforms.json", orbit(4, 0.3, SIZE), [f"{i}.png" for i in range(4)])
    return directory


def check_gaussians(path):
    loaded = usable_or_refused(load_ply, path)
    if loaded is not None:
        gaussians = loaded.gaussians
        shapes = [(3,), (4,), (3,), (), (3,)]
        for tensor, shape in zip(gaussians, shapes, strict=True):
            assert tensor.shape == (len(gaussians.means), *shape) and tensor.dtype == torch.float32
            assert bool(tensor.isfinite().all())


@examples(120)
@given(
    content=st.binary(max_size=300)
    | st.binary(max_size=100).map(b"ply\nformat binary_little_endian 1.0\n".__add__)
)
def test_ply_of_any_bytes(ply, content):
    path = ply.with_name("any.ply")
    path.write_bytes(content)
    check_gaussians(path)


@examples(250)
@given(data=st.data())
def test_ply_that_is_damaged(ply, data):
    path = ply.with_name("damaged.ply")
    path.write_bytes(data.draw(damaged(ply.read_bytes())))
    check_gaussians(path)


@examples(100)
@given(content=ply_of_other_types())
def test_ply_of_other_types(ply, content):
    path = ply.with_name("types.ply")
    path.write_bytes(content)
    check_gaussians(path)


def check_frames(path):
    for allow_missing in (False, True):
        read = usable_or_refused(lambda path, allow=allow_missing: read_frames(path, allow), path)
        for frame in read[0] if read else []:
            assert frame.w2c.shape == (4, 4) and np.isfinite(frame.w2c).all()
            assert np.isfinite(frame.intrinsics_px).all() and frame.intrinsics_px[0, 0] > 0
            assert (path.parent / frame.image).is_file() and (frame.width, frame.height) == (SIZE, SIZE)


@examples(100)
@given(
    content=st.binary(max_size=200)
    | st.recursive(JSON, st.lists).map(lambda value: json.dumps(value).encode())
)
def test_transforms_of_any_bytes(directory, content):
    path = directory / "any.json"
    path.write_bytes(content)
    check_frames(path)


@examples(120)
@given(data=st.data())
def test_transforms_that_are_damaged(directory, data):
    path = directory / "damaged.json"
    path.write_bytes(data.draw(damaged((directory / "transforms.json").read_bytes())))
    check_frames(path)


@st.composite
def changed(draw, content: dict) -> dict:
    """The content with a few values of the file, of a frame or of a matrix replaced or taken out."""
    for _ in range(draw(st.integers(1, 3))):
        frames = content.get("frames")
        places = [content]
        if isinstance(frames, list):
            places += [frame for frame in frames if isinstance(frame, dict)]
        place = draw(st.sampled_from(places))
        matrix = place.get("transform_matrix")
        if isinstance(matrix, list) and len(matrix) == 4 and draw(st.booleans()):
            matrix[draw(st.integers(0, 3))] = draw(st.lists(NUMBERS, min_size=4, max_size=4) | JSON)
        else:
            place[draw(st.sampled_from(ALL_KEYS))] = draw(JSON | NUMBERS)
    return content


@examples(150)
@given(data=st.data())
def test_transforms_with_other_values(directory, data):
    content = data.draw(changed(json.loads((directory / "transforms.json").read_text())))
    path = directory / "changed.json"
    path.write_text(json.dumps(content))
    check_frames(path)


@examples(25)
@given(data=st.data())
def test_directories_with_other_values(directory, data, tmp_path_factory):
    """What `im3d fit` does with such a file before it fits."""
    copy = directory / "copy"
    copy.mkdir(exist_ok=True)
    for image in directory.glob("*.png"):
        (copy / image.name).write_bytes(image.read_bytes())
    content = data.draw(changed(json.loads((directory / "transforms.json").read_text())))
    (copy / "transforms.json").write_text(json.dumps(content))
    usable_or_refused(check.check, copy)
    views = usable_or_refused(lambda path: load_views(path, allow_missing=True), copy)
    if views is not None:
        assert np.isfinite(views.images).all() and views.images.shape == (len(views), SIZE, SIZE, 3)
        unit = usable_or_refused(lambda _: world.of_cameras(views.cameras).cameras(views.cameras), copy)
        assert unit is None or np.isfinite(unit.w2c).all()


@examples(100)
@given(data=st.data())
def test_images_that_are_damaged(directory, data):
    path = directory / "damaged.png"
    path.write_bytes(data.draw(damaged((directory / "0.png").read_bytes())))
    image = usable_or_refused(read_image, path, most_bytes=2**31)  # Pillow asks for what a chunk claims
    if image is not None:
        assert np.isfinite(image).all() and image.shape[1::-1] == image_size(path)
    path.unlink()

"""The .ply of 3DGS against gsplat's own exporter, and damaged files."""

import gzip
import io
import json
import shutil
import subprocess
import zipfile

import numpy as np
import pytest
import torch
from gsplat.exporter import export_splats

from recon_torch.errors import UserError
from recon_torch.formats.ply import PLY_NAMES, load_ply, save_ply
from recon_torch.raster.gaussians import Gaussians
from recon_torch.raster.render import render_images
from recon_torch.views import axes
from recon_torch.views.cameras import orbit


def random_gaussians(num: int = 7) -> Gaussians:
    generator = torch.Generator().manual_seed(3)
    shapes = [(num, 3), (num, 4), (num, 3), (num,), (num, 3)]
    return Gaussians(*(torch.randn(shape, generator=generator) for shape in shapes))


def test_gaussians_are_read_as_they_were_written(tmp_path):
    gaussians = random_gaussians()
    save_ply(gaussians, tmp_path / "a.ply")
    read, notes, _ = load_ply(tmp_path / "a.ply")
    normalised = gaussians._replace(quats=gaussians.quats / gaussians.quats.norm(dim=-1, keepdim=True))
    for written, back in zip(normalised, read, strict=True):
        torch.testing.assert_close(back, written, rtol=0, atol=1e-7)
    assert notes == []
    assert [p.name for p in tmp_path.iterdir()] == ["a.ply"]


def test_reads_what_gsplat_exports(tmp_path):
    gaussians = random_gaussians()
    export_splats(
        gaussians.means,
        gaussians.log_scales,
        gaussians.quats,
        gaussians.opacity_logits,
        gaussians.sh0[:, None],
        torch.randn(7, 15, 3),
        format="ply",
        save_to=str(tmp_path / "gsplat.ply"),
    )
    read, (note,), _ = load_ply(tmp_path / "gsplat.ply")
    for mine, theirs in zip(gaussians, read, strict=True):
        torch.testing.assert_close(theirs, mine, rtol=0, atol=0)
    assert "f_rest" in note


def test_the_layout_is_that_of_the_reference_implementation(tmp_path):
    """Header and row of graphdeco's 3DGS: 17 floats with normals, in this order."""
    save_ply(random_gaussians(2), tmp_path / "a.ply")
    header, body = (tmp_path / "a.ply").read_bytes().split(b"end_header\n", 1)
    names = [line.split()[-1] for line in header.splitlines() if line.startswith(b"property float")]
    assert b" ".join(names) == (
        b"x y z nx ny nz f_dc_0 f_dc_1 f_dc_2 opacity scale_0 scale_1 scale_2 rot_0 rot_1 rot_2 rot_3"
    )
    assert len(body) == 2 * 17 * 4
    np.testing.assert_array_equal(np.frombuffer(body, "<f4").reshape(2, 17)[:, 3:6], 0)


def columns(path) -> np.ndarray:
    """The rows of a file of ours, in float64."""
    body = path.read_bytes().split(b"end_header\n", 1)[1]
    return np.frombuffer(body, "<f4").reshape(-1, len(PLY_NAMES)).astype(np.float64)


def covariances(quats: np.ndarray, log_scales: np.ndarray) -> np.ndarray:
    """By the textbook's rotation matrix of a quaternion wxyz."""
    w, x, y, z = (quats / np.linalg.norm(quats, axis=-1, keepdims=True)).T
    rotation = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    ).transpose(2, 0, 1)
    spread = rotation * np.exp(log_scales)[:, None, :]
    return spread @ spread.transpose(0, 2, 1)


@pytest.mark.parametrize(
    "file_axes", [axes.UPRIGHT, axes.chosen("upright", np.array([0.0, 1, 0])), axes.WORLD]
)
def test_files_have_the_axes_that_they_state(tmp_path, file_axes):
    """Means without a rounding, covariances by NumPy, and what is read again is what was written."""
    gaussians, path = random_gaussians(50), tmp_path / "a.ply"
    save_ply(gaussians, path, file_axes)
    stated = f"comment im3d axes {' '.join(file_axes)}\n".encode()
    assert (stated in path.read_bytes()) == (file_axes != axes.WORLD)
    rows, rotation = columns(path), axes.matrix(file_axes)
    np.testing.assert_array_equal(rows[:, :3], gaussians.means.double().numpy() @ rotation.T)
    written = covariances(rows[:, 13:], rows[:, 10:13])
    own = covariances(gaussians.quats.double().numpy(), gaussians.log_scales.double().numpy())
    np.testing.assert_allclose(written, rotation @ own @ rotation.T, rtol=1e-4, atol=1e-5 * np.abs(own).max())
    read, notes, upright = load_ply(path)
    assert notes == [] and (upright or axes.WORLD) == file_axes and torch.equal(read.means, gaussians.means)


def test_an_upright_file_renders_as_before_it_was_written(tmp_path):
    gaussians = random_gaussians(60)
    gaussians = gaussians._replace(means=gaussians.means * 0.15, log_scales=gaussians.log_scales * 0.4 - 3)
    save_ply(gaussians, tmp_path / "a.ply")
    cameras = orbit(4, 0.4, 48)
    before, after = (
        render_images(each, cameras) for each in (gaussians, load_ply(tmp_path / "a.ply").gaussians)
    )
    assert before.std() > 0.05
    np.testing.assert_allclose(after, before, atol=1e-4)


@pytest.mark.skipif(not shutil.which("splat-transform"), reason="needs splat-transform of npm")
def test_splat_transform_shows_it_standing(tmp_path):
    """Its .glb is +Y up, as glTF says, and has its front at +Z: the viewers' (y, z, x) of our world."""
    gaussians = random_gaussians(40)
    save_ply(gaussians, tmp_path / "a.ply")
    command = ["splat-transform", tmp_path / "a.ply", tmp_path / "a.glb"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    content = (tmp_path / "a.glb").read_bytes()
    length = int.from_bytes(content[12:16], "little")
    document, binary = json.loads(content[20 : 20 + length]), content[28 + length :]
    assert not any(node.keys() & {"matrix", "rotation"} for node in document["nodes"])
    accessor = document["accessors"][document["meshes"][0]["primitives"][0]["attributes"]["POSITION"]]
    view = document["bufferViews"][accessor["bufferView"]]
    start = view.get("byteOffset", 0) + accessor.get("byteOffset", 0)
    shown = np.frombuffer(binary[start : start + 40 * 12], "<f4").reshape(40, 3)
    expected = gaussians.means.numpy()[:, [1, 2, 0]]
    np.testing.assert_array_equal(shown[np.lexsort(shown.T)], expected[np.lexsort(expected.T)])


@pytest.mark.parametrize(
    "line", ["im3d axes -y z x", "im3d axes", "im3d up -y", "im3d axes -y -z x\ncomment im3d axes x y z"]
)
def test_axes_that_are_not_understood_are_named(tmp_path, line, user_error):
    save_ply(random_gaussians(), tmp_path / "a.ply")
    content = (tmp_path / "a.ply").read_bytes()
    (tmp_path / "a.ply").write_bytes(content.replace(b"im3d axes -y -z x", line.encode()))
    with user_error("a.ply: its "):
        load_ply(tmp_path / "a.ply")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "cut short"),
        (lambda data: data[:60], "not a .ply"),
        (lambda data: b"", "not a .ply"),
        (lambda data: b"\x89PNG" + data, "not a .ply"),
        (lambda data: data.replace(b"vertex 7", b"vertex 99999999999999999"), "cut short"),
        (lambda data: data.replace(b"vertex 7", b"vertex -7"), "first element"),
        (lambda data: data.replace(b"vertex 7", b"vertex " + 5000 * b"7"), "first element"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
        (lambda data: b"<!DOCTYPE html><html>", "web page"),
        (lambda data: data.replace(b"binary_little_endian", b"ascii"), "binary_little_endian"),
        (lambda data: data.replace(b"property float opacity", b"property float opaque"), "lacks opacity"),
        (lambda data: data.replace(b"property float x", b"property list uchar int x"), "property"),
        (lambda data: data.replace(b"property float y", b"property float x"), "property"),
        (lambda data: data[:-4] + np.float32(np.nan).tobytes(), r"rot_3 has 1 values .*\(nan\) in row 6"),
        (lambda data: data.replace(b"vertex 7", b"vertex 0"), "0 Gaussians"),
    ],
)
def test_damaged_files_get_one_clear_line(tmp_path, damage, message, user_error):
    path = tmp_path / "a.ply"
    save_ply(random_gaussians(), path)
    path.write_bytes(damage(path.read_bytes()))
    with user_error(message):
        load_ply(path)


def test_what_follows_the_last_gaussian_is_named(tmp_path):
    save_ply(random_gaussians(), tmp_path / "a.ply")
    content = (tmp_path / "a.ply").read_bytes()
    (tmp_path / "a.ply").write_bytes(content.replace(b"vertex 7", b"vertex 5"))
    read, notes, _ = load_ply(tmp_path / "a.ply")
    assert len(read.means) == 5 and notes == [
        "not read: 136 bytes after the 5 Gaussians that the header states"
    ]


def test_a_missing_file_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        load_ply(tmp_path / "none.ply")


def write_rows(path, rows, columns=PLY_NAMES, kind="float"):
    dtype = {"float": "<f4", "double": "<f8"}[kind]
    lines = ["ply", "format binary_little_endian 1.0", f"element vertex {len(rows)}"]
    header = [*lines, *(f"property {kind} {name}" for name in columns), "end_header\n"]
    path.write_bytes("\n".join(header).encode() + np.asarray(rows, dtype).tobytes())


def rows_of(num: int) -> np.ndarray:
    """Rows whose number is their x."""
    rows = np.random.default_rng(0).normal(size=(num, len(PLY_NAMES)))
    rows[:, 0] = np.arange(num)
    return rows


@pytest.mark.parametrize(
    "column, value, words",
    [
        ("opacity", -np.inf, "opacity of 0"),
        ("scale_1", -np.inf, "scale of 0"),
        ("scale_2", np.inf, "too large for float32"),
        ("scale_0", 89.0, "too large for float32"),
        ("rot", 0.0, "length 0"),
        ("rot", 3e38, "too long"),
    ],
)
def test_what_cannot_be_drawn_is_left_out_and_counted(tmp_path, column, value, words):
    rows, path = rows_of(6), tmp_path / "a.ply"
    for name in PLY_NAMES:
        if name.startswith(column):
            rows[[1, 4], PLY_NAMES.index(name)] = value
    write_rows(path, rows)
    (means, *others), notes, _ = load_ply(path)
    assert means[:, 0].tolist() == [0, 2, 3, 5]
    assert all(each.isfinite().all() and len(each) == 4 for each in others)
    assert len(notes) == 1 and "2 of 6" in notes[0] and words in notes[0]
    write_rows(path, rows[[1, 4]])
    with pytest.raises(UserError, match=f"no Gaussian that can be drawn.*{words}"):
        load_ply(path)


def test_an_infinite_opacity_is_opaque(tmp_path):
    rows = rows_of(3)
    rows[1, PLY_NAMES.index("opacity")] = np.inf
    write_rows(tmp_path / "a.ply", rows)
    gaussians, notes, _ = load_ply(tmp_path / "a.ply")
    assert gaussians.opacities[1] == 1 and gaussians.opacity_logits.isfinite().all() and notes == []


@pytest.mark.parametrize("column", ["y", "f_dc_2", "opacity", "scale_1", "rot_2"])
def test_the_column_that_is_wrong_is_named(tmp_path, column):
    rows = rows_of(3)
    rows[2, PLY_NAMES.index(column)] = np.nan
    write_rows(tmp_path / "a.ply", rows)
    with pytest.raises(UserError, match=f"a.ply: {column} has 1 values .* row 2 "):
        load_ply(tmp_path / "a.ply")


def test_doubles_beyond_float32_are_refused(tmp_path):
    rows = rows_of(3)
    rows[1, 2] = 1e39
    write_rows(tmp_path / "a.ply", rows, kind="double")
    with pytest.raises(UserError, match=r"z has 1 values .*\(1e\+39\)"):
        load_ply(tmp_path / "a.ply")


def test_columns_that_are_not_read_are_named(tmp_path):
    write_rows(tmp_path / "a.ply", np.ones((2, 18)), (*PLY_NAMES, "filter_3D"))
    assert any("filter_3D" in note for note in load_ply(tmp_path / "a.ply").notes)


def _sog() -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr("meta.json", "{}")
    return held.getvalue()


COMPRESSED = b"""ply
format binary_little_endian 1.0
element chunk 1
property float min_x
element vertex 3
property uint packed_position
end_header
"""


@pytest.mark.parametrize(
    "name, content, kind",
    [
        ("a.compressed.ply", COMPRESSED + bytes(20), "compressed .ply"),
        ("a.spz", gzip.compress(b"NGSP" + bytes(40), mtime=0), ".spz"),
        ("a.ply", gzip.compress(b"NGSP" + bytes(40), mtime=0), ".spz"),
        ("a.ply", b"NGSP" + bytes(40), ".spz"),
        ("a.sog", _sog(), ".sog"),
        ("a.zip", _sog(), ".sog"),
        ("meta.json", b"{}", "SOG"),
        ("a.splat", bytes(64), ".splat"),
        ("a.ksplat", bytes(64), ".ksplat"),
        ("a.ply", b"glTF" + bytes(40), ".glb"),
    ],
)
def test_other_formats_of_splats_are_named(tmp_path, name, content, kind):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"is (a|an|the) .*{kind}.*convert"):
        load_ply(tmp_path / name)

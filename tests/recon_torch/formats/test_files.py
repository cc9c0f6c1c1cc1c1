"""Formats of other tools: what a file holds by readers of its own here, and damaged files.

Where splat-transform of npm is there, it reads our files and we read its own.
"""

import gzip
import importlib.util
import io
import json
import random
import shutil
import struct
import subprocess
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

from recon_torch import locks
from recon_torch.errors import UserError
from recon_torch.formats import conversion, files, sizes
from recon_torch.formats.ply import load_ply
from recon_torch.raster.gaussians import SH_C0, Gaussians, turned
from recon_torch.settings import FileAxes, Format
from recon_torch.views import axes

pytest.importorskip("gaussforge", reason='needs the extra "export"')
pytest.importorskip("pxr", reason='needs the extra "export"')
transform = pytest.mark.skipif(not shutil.which("splat-transform"), reason="needs splat-transform of npm")
BY_CONVERSION = list(conversion.FORMATS)


def some(num: int = 40) -> Gaussians:
    """Gaussians whose x alone tells them apart in any order, and whose colours lie in [0, 1]."""
    generator = torch.Generator().manual_seed(5)
    means = torch.rand((num, 3), generator=generator) - 0.5
    means[:, 0] = torch.linspace(-0.5, 0.5, num)
    colors = torch.rand((num, 3), generator=generator)
    quats = torch.randn((num, 4), generator=generator)
    return Gaussians(
        means=means,
        quats=quats / quats.norm(dim=-1, keepdim=True),
        log_scales=torch.rand((num, 3), generator=generator) * 3 - 6,
        opacity_logits=torch.randn((num,), generator=generator) * 2,
        sh0=(colors - 0.5) / SH_C0,
    )


def assert_alike(after: Gaussians, before: Gaussians, means: float, spread: float, light: float) -> None:
    """Compares means, covariances (relative), and colours and opacities (absolute), sorted by x."""
    first, second = (
        Gaussians(*(tensor[each.means[:, 0].argsort()] for tensor in each)) for each in (after, before)
    )
    torch.testing.assert_close(first.means, second.means, atol=means, rtol=0)
    for one, other in zip(covariances(first), covariances(second), strict=True):
        assert (one - other).norm() <= spread * other.norm()
    torch.testing.assert_close(first.colors, second.colors, atol=light, rtol=0)
    torch.testing.assert_close(first.opacities, second.opacities, atol=light, rtol=0)


def covariances(gaussians: Gaussians) -> torch.Tensor:
    w, x, y, z = (gaussians.quats / gaussians.quats.norm(dim=-1, keepdim=True)).double().unbind(-1)
    rows = [
        torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)], -1),
        torch.stack([2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)], -1),
        torch.stack([2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)], -1),
    ]
    spread = torch.stack(rows, -2) * gaussians.scales.double()[:, None]
    return spread @ spread.mT


def written(tmp_path, kind: Format, gaussians: Gaussians | None = None):
    path = tmp_path / f"a{kind.suffix}"
    files.save(some() if gaussians is None else gaussians, path, kind)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    return path


@pytest.mark.parametrize("kind", Format)
def test_files_are_read_as_they_were_written(tmp_path, kind, capfd):
    locks.process_directory()  # which tidies up what other processes left, and says so
    capfd.readouterr()
    loaded = files.load(written(tmp_path, kind))
    is_exact = kind in (Format.GLB, Format.USDZ, Format.USDA)
    bounds = (0, 1e-5, 1e-6) if is_exact else (6e-4, 0.08, 0.009)
    assert_alike(loaded.gaussians, some(), *bounds)
    assert loaded.upright == axes.UPRIGHT and len(loaded.notes) == (0 if is_exact else 1)
    assert capfd.readouterr() == ("", "")  # libraries print what they read


@pytest.mark.parametrize("kind", BY_CONVERSION)
def test_files_of_splats_have_minus_y_up_and_may_be_taken_as_they_are(tmp_path, kind):
    as_they_are = files.load(written(tmp_path, kind), FileAxes.WORLD)
    before = turned(some(), axes.matrix(axes.UPRIGHT))
    order = [each.means[:, 2].argsort() for each in (as_they_are.gaussians, before)]  # x of the world
    found, expected = as_they_are.gaussians.means[order[0]], before.means[order[1]]
    torch.testing.assert_close(found, expected, atol=6e-4, rtol=0)
    assert as_they_are.upright is None and as_they_are.notes == []


def test_a_splat_has_its_rows_as_their_format_says(tmp_path):
    """32 bytes: float32 means and scales, bytes of RGBA, and of the quaternion wxyz."""
    rows = written(tmp_path, Format.SPLAT).read_bytes()
    fields = [("means", "<f4", 3), ("scales", "<f4", 3), ("rgba", "u1", 4), ("quats", "u1", 4)]
    table = np.frombuffer(rows, fields)
    turned_back = table["means"][:, [2, 0, 1]] * [1, -1, -1]
    order, gaussians = np.argsort(turned_back[:, 0]), some()
    np.testing.assert_array_equal(turned_back[order], gaussians.means.numpy())
    np.testing.assert_allclose(table["scales"][order], gaussians.scales.numpy(), rtol=1e-5)
    rgba = torch.cat([gaussians.colors, gaussians.opacities[:, None]], -1).numpy()
    np.testing.assert_allclose(table["rgba"][order] / 255, rgba, atol=1.01 / 255)


@pytest.mark.parametrize("kind, version", [(Format.SPZ, 3), (Format.SPZ4, 4)])
def test_an_spz_has_its_version_and_keeps_the_axes_of_an_upright_file(tmp_path, kind, version):
    content = written(tmp_path, kind).read_bytes()
    plain = gzip.decompress(content) if version == 3 else content
    magic, found, num = struct.unpack("<4sII", plain[:12])
    assert (magic, found, num) == (b"NGSP", version, 40)
    if version == 3:
        steps = np.frombuffer(plain[16 : 16 + 9 * 40], "u1").reshape(40, 3, 3).astype(np.int64)
        values = steps @ [1, 256, 65536]
        means = np.where(values >= 2**23, values - 2**24, values) / 2 ** plain[13]
        np.testing.assert_allclose(means[:, [2, 0, 1]] * [1, -1, -1], some().means.numpy(), atol=2e-4)


def test_a_glb_has_plain_values_with_y_up(tmp_path):
    content = written(tmp_path, Format.GLB).read_bytes()
    magic, version, length, json_bytes = struct.unpack("<4sIII", content[:16])
    assert (magic, version, length) == (b"glTF", 2, len(content)) and json_bytes % 4 == 0
    document, binary = json.loads(content[20 : 20 + json_bytes]), content[28 + json_bytes :]
    assert document["buffers"] == [{"byteLength": len(binary)}]
    [primitive] = document["meshes"][0]["primitives"]

    def column(name):
        accessor = document["accessors"][primitive["attributes"][name]]
        view = document["bufferViews"][accessor["bufferView"]]
        assert view["byteOffset"] % 4 == 0
        kind = {5126: "<f4", 5121: "u1"}[accessor["componentType"]]
        part = binary[view["byteOffset"] : view["byteOffset"] + view["byteLength"]]
        return np.frombuffer(part, kind).reshape(accessor["count"], -1)

    gaussians, name = some(), "KHR_gaussian_splatting:{}".format
    np.testing.assert_array_equal(column("POSITION"), gaussians.means.numpy()[:, [1, 2, 0]])
    np.testing.assert_allclose(column(name("SCALE")), gaussians.scales.numpy(), rtol=1e-6)
    np.testing.assert_allclose(column(name("OPACITY"))[:, 0], gaussians.opacities.numpy(), rtol=1e-6)
    np.testing.assert_array_equal(column(name("SH_DEGREE_0_COEF_0")), gaussians.sh0.numpy())
    np.testing.assert_allclose(column("COLOR_0")[:, :3] / 255, gaussians.colors.numpy(), atol=0.51 / 255)
    expected = turned(gaussians, np.array([[0.0, 1, 0], [0, 0, 1], [1, 0, 0]])).quats[:, [1, 2, 3, 0]].numpy()
    dots = (column(name("ROTATION")) * expected).sum(-1)
    np.testing.assert_allclose(np.abs(dots), 1, atol=1e-6)


@pytest.mark.parametrize("kind", [Format.USDA, Format.USDZ])
def test_usd_has_plain_values_with_y_up_and_a_box(tmp_path, kind):
    from pxr import Usd, UsdGeom

    stage = Usd.Stage.Open(str(written(tmp_path, kind)))
    field, gaussians = stage.GetDefaultPrim(), some()
    assert field.GetTypeName() == "ParticleField3DGaussianSplat"
    assert UsdGeom.GetStageUpAxis(stage) == "Y"
    means = np.array(field.GetAttribute("positions").Get())
    np.testing.assert_array_equal(means, gaussians.means.numpy()[:, [1, 2, 0]])
    quats = [[q.GetReal(), *q.GetImaginary()] for q in field.GetAttribute("orientations").Get()]
    expected = turned(gaussians, np.array([[0.0, 1, 0], [0, 0, 1], [1, 0, 0]])).quats.numpy()
    np.testing.assert_allclose(np.abs((np.array(quats) * expected).sum(-1)), 1, atol=1e-6)
    np.testing.assert_allclose(field.GetAttribute("opacities").Get(), gaussians.opacities.numpy(), rtol=1e-6)
    low, high = np.array(field.GetAttribute("extent").Get())
    assert (low < means.min(0)).all() and (high > means.max(0)).all()


def test_a_stage_with_z_up_is_in_our_world_already(tmp_path):
    path = written(tmp_path, Format.USDA)
    path.write_text(path.read_text().replace('upAxis = "Y"', 'upAxis = "Z"'))
    torch.testing.assert_close(files.load(path).gaussians.means, some().means[:, [1, 2, 0]], rtol=0, atol=0)


@pytest.mark.parametrize("kind", [Format.SPZ, Format.SPLAT, Format.COMPRESSED_PLY, Format.SOG])
def test_what_is_opaque_or_clear_stays(tmp_path, kind):
    """Opacities of 0 and 1 in bytes are infinite logits, which readers drop or hand on."""
    gaussians = some()
    gaussians.opacity_logits[:3], gaussians.opacity_logits[3:6] = 20.0, -20.0
    loaded = files.load(written(tmp_path, kind, gaussians)).gaussians
    assert len(loaded.means) == 40 and all(tensor.isfinite().all() for tensor in loaded)
    assert sum(loaded.opacities > 0.99) >= 3 and sum(loaded.opacities < 0.01) >= 3


@transform
@pytest.mark.parametrize("kind", BY_CONVERSION)
def test_splat_transform_reads_our_files(tmp_path, kind):
    path = written(tmp_path, kind)
    command = ["splat-transform", "-w", path, tmp_path / "back.ply"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    back = load_ply(tmp_path / "back.ply", coded=True).gaussians
    assert_alike(turned(back, axes.matrix(axes.UPRIGHT).T), some(), 6e-4, 0.08, 0.009)


@transform
@pytest.mark.parametrize("suffix", [".compressed.ply", ".sog", ".spz", ".splat", ".glb"])
def test_files_of_splat_transform_are_read(tmp_path, suffix):
    from recon_torch.formats.ply import save_ply

    save_ply(some(), tmp_path / "a.ply")
    command = ["splat-transform", "-w", tmp_path / "a.ply", tmp_path / f"b{suffix}"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    assert_alike(files.load(tmp_path / f"b{suffix}").gaussians, some(), 6e-4, 0.08, 0.009)


# ---- Damaged files ----


def test_a_missing_package_is_named(tmp_path, monkeypatch, user_error):
    path = written(tmp_path, Format.SPZ)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with user_error(r'a.spz needs the package gaussforge; pip install "im3d\[export\]"'):
        files.load(path)
    with user_error("b.usda needs the package pxr"):
        files.save(some(), tmp_path / "b.usda", Format.USDA)
    assert not (tmp_path / "b.usda").exists()


@pytest.mark.parametrize("kind", [each for each in Format if each != Format.SPLAT])
def test_files_that_are_cut_short_get_one_line(tmp_path, kind, user_error):
    path = written(tmp_path, kind)
    content = path.read_bytes()
    for length in (24, len(content) // 2):
        path.write_bytes(content[:length])
        with user_error(rf"a{kind.suffix}"):
            files.load(path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", Format)
def test_damaged_files_are_read_or_refused_in_one_line(tmp_path, kind):
    """gaussforge ends by a signal for some of these, in a process of its own."""
    path, draw = written(tmp_path, kind), random.Random(1)
    content = path.read_bytes()
    for _ in range(6):
        damaged = bytearray(content)
        for _ in range(draw.randint(1, 5)):
            damaged[draw.randrange(min(len(damaged), draw.choice([64, len(damaged)])))] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            assert all(tensor.isfinite().all() for tensor in files.load(path).gaussians)
        except UserError as error:
            assert "\n" not in str(error) and "a." in str(error)


def spz(num: int, body: bytes) -> bytes:
    return gzip.compress(struct.pack("<4sIIBBBB", b"NGSP", 3, num, 0, 12, 0, 0) + body, mtime=0)


def sog(meta: dict, **entries: bytes) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("meta.json", json.dumps(meta))
        for name, content in entries.items():
            archive.writestr(name, content)
    return held.getvalue()


def header(num: int) -> bytes:
    names = ("packed_position", "packed_rotation", "packed_scale", "packed_color")
    lines = ["ply", "format binary_little_endian 1.0", "element chunk 1", "property float min_x"]
    lines += [f"element vertex {num}", *(f"property uint {name}" for name in names), "end_header\n"]
    return "\n".join(lines).encode()


@pytest.mark.parametrize(
    "name, make, message",
    [
        ("a.spz", lambda: spz(5, bytes(2**25)), "unpacks to more than its 5 Gaussians take"),
        ("a.spz", lambda: spz(4 * 10**9, b""), "states 4000000000 Gaussians"),
        ("a.spz", lambda: spz(0, b""), "states 0 Gaussians"),
        ("a.spz", lambda: struct.pack("<4sIII", b"NGSP", 4, 2**31, 0), "states 2147483648 Gaussians"),
        ("a.sog", lambda: sog({"count": 5}, means=bytes(2**25)), "unpacks to more than its size"),
        ("a.sog", lambda: sog({"count": 10**12}), "states 1000000000000 Gaussians"),
        ("a.sog", lambda: sog({"count": "5"}), "no number of Gaussians"),
        ("a.sog", lambda: b"PK" + bytes(60), "is damaged"),
        ("a.splat", lambda: bytes(33), "no multiple of the 32"),
        ("a.splat", lambda: b"", "states 0 Gaussians"),
        ("a.ksplat", lambda: struct.pack("<8I", 256, 1, 0, 1, 10**9, 0, 0, 0), "at least 24000004096 bytes"),
        ("a.compressed.ply", lambda: header(10**9) + bytes(40), "its header states 160"),
        ("a.glb", lambda: struct.pack("<4sIIII", b"glTF", 2, 2**31, 2**31, 0x4E4F534A), "cut short"),
        ("a.glb", lambda: struct.pack("<4sIIII", b"glTF", 1, 20, 0, 0), "version 1"),
        ("a.usda", lambda: b"#usda 1.0\n", "has 0 sets of Gaussians"),
        ("a.usda", lambda: b"#usda 1.0\ndef {", "cannot be read by usd-core"),
        ("a.gltf", lambda: b"{}", "a .gltf file, which is not read"),
        ("a.spz", lambda: b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
    ],
)
def test_what_a_file_states_is_checked_before_it_is_unpacked(tmp_path, name, make, message, user_error):
    (tmp_path / name).write_bytes(make())
    tracemalloc.start()
    try:
        with user_error(f"{name}.*{message}"):
            files.load(tmp_path / name)
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()


def attributes(document: dict) -> dict:
    return document["meshes"][0]["primitives"][0]["attributes"]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d["accessors"][0].update(count=10**9), "POSITION is cut short"),
        (lambda d: d["accessors"][0].update(count=39), r"rows"),
        (lambda d: d["accessors"][0].update(count=-1), "stored in a way"),
        (lambda d: d["accessors"][3].update(sparse={}), "SCALE is stored in a way"),
        (lambda d: d["nodes"][0].update(scale=[2, 2, 2]), "a node has a scale"),
        (lambda d: d.update(extensionsRequired=["EXT_meshopt_compression"]), "it requires 'EXT_meshopt"),
        (lambda d: d["meshes"][0]["primitives"][0]["extensions"].clear(), "has 0 sets of Gaussians"),
        (lambda d: d["meshes"][0]["primitives"].append(d["meshes"][0]["primitives"][0]), "has 2 sets"),
        (
            lambda d: attributes(d).pop("KHR_gaussian_splatting:SCALE"),
            "no KHR",
        ),
        (lambda d: d.update(accessors=5), "no glTF of Gaussians"),
    ],
)
def test_a_glb_that_is_not_understood_is_named(tmp_path, change, message, user_error):
    path = written(tmp_path, Format.GLB)
    content = path.read_bytes()
    json_bytes = int.from_bytes(content[12:16], "little")
    document = json.loads(content[20 : 20 + json_bytes])
    change(document)
    text = json.dumps(document).encode()
    head = struct.pack("<4sIIII", b"glTF", 2, 20 + len(text), len(text), 0x4E4F534A)
    path.write_bytes(head + text + content[20 + json_bytes :])
    with user_error(f"a.glb.*{message}"):
        files.load(path)


def test_all_formats_of_conversion_state_their_size():
    assert sizes.STATED.keys() == set(conversion.FORMATS)

"""The .ply of 3DGS against gsplat's own exporter, and damaged files."""

import numpy as np
import pytest
import torch
from gsplat.exporter import export_splats

from recon_torch.errors import UserError
from recon_torch.formats.ply import load_ply, save_ply
from recon_torch.raster.gaussians import Gaussians


def random_gaussians(num: int = 7) -> Gaussians:
    generator = torch.Generator().manual_seed(3)
    shapes = [(num, 3), (num, 4), (num, 3), (num,), (num, 3)]
    return Gaussians(*(torch.randn(shape, generator=generator) for shape in shapes))


def test_gaussians_are_read_as_they_were_written(tmp_path):
    gaussians = random_gaussians()
    save_ply(gaussians, tmp_path / "a.ply")
    read = load_ply(tmp_path / "a.ply")
    normalised = gaussians._replace(quats=gaussians.quats / gaussians.quats.norm(dim=-1, keepdim=True))
    for written, back in zip(normalised, read, strict=True):
        torch.testing.assert_close(back, written, rtol=0, atol=1e-7)
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
    for mine, theirs in zip(gaussians, load_ply(tmp_path / "gsplat.ply"), strict=True):
        torch.testing.assert_close(theirs, mine, rtol=0, atol=0)


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


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "cut short"),
        (lambda data: data[:60], "not a .ply"),
        (lambda data: b"", "not a .ply"),
        (lambda data: b"\x89PNG" + data, "not a .ply"),
        (lambda data: data.replace(b"vertex 7", b"vertex 99999999999999999"), "cut short"),
        (lambda data: data.replace(b"vertex 7", b"vertex -7"), "first element"),
        (lambda data: data.replace(b"binary_little_endian", b"ascii"), "binary_little_endian"),
        (lambda data: data.replace(b"property float opacity", b"property float opaque"), "lacks opacity"),
        (lambda data: data.replace(b"property float x", b"property list uchar int x"), "property"),
        (lambda data: data.replace(b"property float y", b"property float x"), "property"),
        (lambda data: data[:-4] + np.float32(np.nan).tobytes(), "not finite"),
    ],
)
def test_damaged_files_get_one_clear_line(tmp_path, damage, message, user_error):
    path = tmp_path / "a.ply"
    save_ply(random_gaussians(), path)
    path.write_bytes(damage(path.read_bytes()))
    with user_error(message):
        load_ply(path)


def test_a_missing_file_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        load_ply(tmp_path / "none.ply")

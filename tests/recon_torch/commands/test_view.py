"""`im3d view --html` writes one file, and no file but its own is replaced."""

import math

import pytest
import torch

from recon_torch.commands import view
from recon_torch.formats.ply import save_ply
from recon_torch.raster.gaussians import Gaussians


@pytest.fixture
def dot_file(tmp_path):
    dot = Gaussians(
        means=torch.zeros(1, 3),
        quats=torch.tensor([[1.0, 0.0, 0.0, 0.0]]),
        log_scales=torch.full((1, 3), math.log(0.1)),
        opacity_logits=torch.tensor([4.0]),
        sh0=torch.zeros(1, 3),
    )
    save_ply(dot, tmp_path / "dot.ply")
    return tmp_path / "dot.ply"


def test_a_page_is_written_and_replaced(dot_file, tmp_path, capsys):
    for _ in range(2):
        view.main([str(dot_file), "--html", str(tmp_path / "page.html")])
        assert "page.html: 1 Gaussians, 0 views" in capsys.readouterr().out
    assert (tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")


@pytest.mark.parametrize("content", ["<p>mine</p>", ""])
def test_files_of_others_are_kept(dot_file, tmp_path, user_error, content):
    (tmp_path / "mine.html").write_text(content)
    with user_error("mine.html"):
        view.main([str(dot_file), "--html", str(tmp_path / "mine.html")])
    assert (tmp_path / "mine.html").read_text() == content


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["none"], "none does not exist"),
        (["none", "--html", "page.html"], "none cannot be read"),
        (["dot.ply", "--html", "."], "is no name of a page"),
        (["dot.ply", "--port", "65536"], "--port"),
        (["dot.ply", "--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid"),
        (["mesh.ply"], "mesh.ply is a .ply of another format"),
        (["meshed"], "meshed has a mesh without its asset; `im3d mesh ASSET --out ASSET`"),
        (["meshed", "--html", "page.html"], "meshed has a mesh without its asset"),
        ([], "ASSET"),
    ],
)
def test_wrong_use_is_one_line(dot_file, tmp_path, monkeypatch, user_error, argv, message):
    (tmp_path / "mesh.ply").write_bytes(b"ply\nformat ascii 1.0\nelement vertex 0\nend_header\n")
    (tmp_path / "meshed").mkdir()
    (tmp_path / "meshed/mesh.json").write_text("{}")  # as `im3d mesh` leaves it
    monkeypatch.chdir(tmp_path)
    with user_error(message):
        view.main(argv)
    assert not (tmp_path / "page.html").exists()

"""`im3d export` writes what it can read back, and says how much that differs."""

import json
import math
import os

import numpy as np
import pytest
import torch

from recon_torch.commands import export, render
from recon_torch.errors import UserError
from recon_torch.files import write_json
from recon_torch.fit import export as exports
from recon_torch.formats import files
from recon_torch.formats.ply import load_ply, save_ply
from recon_torch.raster.gaussians import Gaussians
from recon_torch.settings import ExportSettings, Format
from recon_torch.views import axes
from recon_torch.views.cameras import orbit
from recon_torch.views.images import read_image
from recon_torch.views.transforms import write_transforms

pytest.importorskip("gaussforge", reason='needs the extra "export"')


def ball(num: int = 300) -> Gaussians:
    generator = torch.Generator().manual_seed(2)
    means = torch.randn((num, 3), generator=generator)
    return Gaussians(
        means=0.3 * means / means.norm(dim=-1, keepdim=True),
        quats=torch.randn((num, 4), generator=generator),
        log_scales=torch.rand((num, 3), generator=generator) - 4,
        opacity_logits=torch.randn((num,), generator=generator) + 2,
        sh0=torch.rand((num, 3), generator=generator) * 2 - 1,
    )


@pytest.fixture
def asset(tmp_path):
    """A directory with an asset.ply."""
    save_ply(ball(), tmp_path / "asset" / "asset.ply")
    return tmp_path / "asset"


@pytest.mark.parametrize("name", ["a.spz", "a.ply", "a.glb", "A.COMPRESSED.PLY"])
def test_the_line_says_what_was_compared(asset, tmp_path, capsys, name):
    out = tmp_path / "deep" / name
    export.main([str(asset), "--to", str(out)])
    said = capsys.readouterr().out
    assert said.startswith(f"{out}: 300 Gaussians in {out.stat().st_size} bytes; read back: ")
    assert float(said.split("agree by ")[1].split()[0]) > 50
    apart = torch.cdist(files.load(out).gaussians.means, ball().means)
    assert apart.shape == (300, 300) and apart.min(0).values.max() < 1e-3
    assert sorted(os.listdir(out.parent)) == [".im3d.json", name]
    export.main([str(asset / "asset.ply"), "--to", str(out)])  # its own file is replaced


@pytest.mark.parametrize(
    "report, flags, up, noted",
    [
        (None, [], None, True),
        (None, ["--up=-x"], "-x", False),
        ({"config_digest": "0" * 64}, [], "z", False),
        ({"world": {"up": [0.0, 1.0, 0.0]}}, [], "y", False),
        ({"world": {"up": [0.0, 1.0, 0.0]}}, ["--up", "z"], "z", False),
        ({"world": {"up": [0.6, 0.8, 0.0]}}, [], None, True),
    ],
)
def test_an_asset_without_a_statement_stands_as_its_report_or_its_user_says(
    asset, tmp_path, capsys, report, flags, up, noted
):
    save_ply(ball(), asset / "asset.ply", axes.WORLD)
    if report is not None:
        write_json(asset / "report.json", report)
    export.main([str(asset), "--to", str(tmp_path / "a.ply"), *flags])
    assert ("does not say which of its axes is up" in capsys.readouterr().out) == noted
    expected = None if up is None else axes.chosen("upright", np.array(export.UP_AXES[up]))
    assert load_ply(tmp_path / "a.ply").upright == expected


def test_a_foreign_file_may_be_said_to_be_otherwise(asset, tmp_path, capsys):
    """--up names an axis of the file itself."""
    export.main([str(asset), "--to", str(tmp_path / "a.splat")])
    export.main([str(tmp_path / "a.splat"), "--to", str(tmp_path / "b.ply"), "--up=-y"])
    b = load_ply(tmp_path / "b.ply")
    assert b.upright == axes.chosen("upright", np.array([0.0, -1, 0]))
    torch.testing.assert_close(b.gaussians.means, ball().means[:, [1, 2, 0]] * torch.tensor([-1.0, -1, 1]))
    assert "taken as viewers show it" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, message",
    [
        ("{asset} --to {out}/a.splt", "no suffix of a format .*is it '.splat'"),
        ("{asset} --to {out}/a", "no suffix of a format"),
        ("{asset} --to {out}/.spz", "a suffix alone"),
        ("{asset} --to {out}/a.spz --format glb", "are two formats"),
        ("{asset} --to {out}/a.spz --format splt", "invalid choice"),
        ("{out}/none.ply --to {out}/a.spz", "none.ply cannot be read"),
        ("{out}/none --to {out}/a.spz", "none cannot be read"),
        ("{empty} --to {out}/a.spz", "has no asset.ply"),
        ("{field} --to {out}/a.spz", "a radiance field"),
        ("{points} --to {out}/a.spz", "points.ply is not a .ply of Gaussians: it lacks"),
        ("{zero} --to {out}/a.spz", "zero.ply has 0 Gaussians"),
        ("{asset} --to {mine}", "mine.spz is not of an earlier run"),
        ("{asset} --to {asset}/asset.ply", "asset.ply is not of an earlier run"),
        ("/dev/zero --to {out}/a.spz", "/dev/zero is a device"),
        ("{asset} --to {mine}/a.spz", "mine.spz"),
    ],
)
def test_bad_input_leaves_nothing(asset, tmp_path, argv, message, user_error):
    places = {name: tmp_path / name for name in ("out", "empty", "field")} | {"asset": asset}
    places |= {name: tmp_path / f"{name}.ply" for name in ("points", "zero")} | {
        "mine": tmp_path / "mine.spz"
    }
    for name in ("empty", "field"):
        places[name].mkdir()
    (places["field"] / "asset.safetensors").touch()
    lines = ["ply", "format binary_little_endian 1.0", "element vertex 1", "property float x", "end_header\n"]
    places["points"].write_bytes("\n".join(lines).encode() + bytes(4))
    plain = (asset / "asset.ply").read_bytes()
    places["zero"].write_bytes(plain.replace(b"vertex 300", b"vertex 0"))
    places["mine"].write_text("mine")
    with user_error(message):
        export.main(argv.format(**places).split())
    assert not places["out"].exists() and places["mine"].read_text() == "mine"
    assert (asset / "asset.ply").read_bytes() == plain and len(os.listdir(asset)) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_to_is_named(asset, tmp_path, user_error):
    (tmp_path / "shut").mkdir(mode=0o500)
    with user_error("shut cannot be written to"):
        export.main([str(asset), "--to", str(tmp_path / "shut" / "a.spz")])


@pytest.mark.parametrize("what", ["means", "colors", "number"])
def test_a_file_that_would_not_show_the_asset_is_refused(asset, tmp_path, monkeypatch, what, user_error):
    """What a library gets wrong is found by reading the file back."""
    save = files.save

    def careless(gaussians, path, kind, upright):
        wrong = {
            "means": lambda: gaussians._replace(means=gaussians.means + torch.tensor([0.01, 0, 0])),
            "colors": lambda: gaussians._replace(sh0=-gaussians.sh0),
            "number": lambda: Gaussians(*(tensor[1:] for tensor in gaussians)),
        }
        save(wrong[what](), path, kind, upright)

    monkeypatch.setattr(files, "save", careless)
    with user_error("a.splat would not show the asset: .*0.001 and 41.5 dB are asked for"):
        export.main([str(asset), "--to", str(tmp_path / "a.splat")])
    assert sorted(os.listdir(tmp_path)) == ["asset"]


def test_the_limit_on_renders_costs_a_good_asset_three_tenths_of_a_decibel():
    """An error that agrees with the renders by so much, added to one that agrees with the views by 30 dB."""
    loss = 10 * math.log10(10 ** (-30 / 10) + 10 ** (-exports.LEAST_DB / 10)) + 30
    assert loss == pytest.approx(0.3, abs=1e-9)


def test_an_exported_file_is_seen_by_the_cameras_of_its_asset(asset, tmp_path, capsys):
    write_transforms(asset / "transforms.json", orbit(3, 0.3, 48), ["a", "b", "c"])
    export.main([str(asset), "--to", str(tmp_path / "a.spz")])
    pictures = []
    for source in (asset / "asset.ply", tmp_path / "a.spz"):
        out = tmp_path / source.suffix[1:]
        render.main(["--asset", str(source), "--out", str(out), "--cameras", str(asset)])
        pictures.append(np.stack([read_image(path) for path in sorted(out.glob("0*.png"))]))
    assert pictures[0].std() > 0.1 and np.abs(pictures[0] - pictures[1]).mean() < 2 / 255
    assert "a.spz: taken as viewers show it" in capsys.readouterr().out


def test_formats_beside_an_asset_are_noted_and_a_failure_leaves_the_others(asset, monkeypatch):
    kinds = (Format.SPLAT, Format.GLB)
    monkeypatch.setattr(files.glb, "glb_bytes", lambda gaussians: b"glTF")
    splat, glb = exports.export_beside(asset / "asset.ply", kinds, axes.UPRIGHT)
    assert splat.startswith("asset.splat: 300 Gaussians in 9600 bytes; read back: equal means")
    assert glb.startswith(f"asset.glb is left out: {asset / 'asset.glb'} is no .glb")
    assert sorted(os.listdir(asset)) == ["asset.ply", "asset.splat"]


def test_formats_that_cannot_be_are_refused_early(user_error, monkeypatch):
    assert ExportSettings(formats=("spz4", "usda")).formats == (Format.SPZ4, Format.USDA)
    with user_error("of which two write asset.spz"):
        ExportSettings(formats=("spz", "sog", "spz4"))
    with pytest.raises(UserError, match="formats"):
        ExportSettings(formats=("png",))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert ExportSettings(formats=("glb",)).formats == (Format.GLB,)
    with user_error("sog needs gaussforge"):
        ExportSettings(formats=("sog",))


def test_the_marker_says_what_was_exported(asset, tmp_path):
    export.main([str(asset), "--to", str(tmp_path / "a.splat")])
    export.main([str(asset), "--to", str(tmp_path / "b.splat")])
    noted = json.loads((tmp_path / ".im3d.json").read_text())["made_by_im3d"]["export"]
    assert sorted(noted) == ["a.splat", "b.splat"]

"""The Python API: the code of docs/python.md, a light import, and scripts however they are run."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import im3d_jax
from recon_torch.process import client

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "python.md").read_text()
CHANGES = """
    config.text_to_image.num_steps = 1
    config.rounds.update(at_steps=(2,), num_steps=1)
    config.fit.update(num_gaussians=100, num_steps=4, lpips_net="alex")
    config.turntable.update(num_frames=2, size=32)
"""
RENDERS = """
from recon_torch.process.client import ReconClient
from recon_torch.settings import FitSettings
from recon_torch.views.cameras import orbit

def main():
    settings = FitSettings(num_gaussians=50, lpips_net="squeeze")
    with ReconClient(orbit(1, size=32), settings, device="cpu") as client:
        print("rendered", client.render()[0].shape)
"""


@pytest.fixture
def here(tmp_path, monkeypatch, write_runnable):
    """A working directory whose configs/tiny.py is a small one, and which has a photo.png."""
    (tmp_path / "configs").mkdir()
    write_runnable(tmp_path / "configs", CHANGES).rename(tmp_path / "configs" / "tiny.py")
    inside = np.hypot(*(np.mgrid[:40, :40] - 20)) < 10
    photo = np.where(inside[..., None], [200, 30, 40], 255).astype(np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_code_of_the_page_runs(here, local_client, capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 6
    names = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), names)
    asset = names["asset"]
    assert {path.name for path in (here / "out" / "mushroom").iterdir()} == {
        ".im3d.json", "asset.ply", "images", "report.json", "transforms.json", "turntable.mp4", "views.png",
    }  # fmt: skip
    assert (here / "out/photo/views_1/images/003.png").is_file()
    assert (here / "out/lamp/asset.ply").read_bytes() == (asset.directory / "asset.ply").read_bytes()
    assert asset.views.shape == asset.renders.shape == (4, 32, 32, 3)
    assert asset.masks.shape == asset.alphas.shape == (4, 32, 32, 1)
    assert repr(asset).startswith("<Asset 'a blue lamp', seed ") and len(repr(asset)) < 120
    assert repr(names["pipeline"]).startswith("<Pipeline with <Generator emu_video: ")
    assert "dB to the last views; quality: " in capsys.readouterr().out


def test_the_import_loads_no_framework_and_knows_its_names():
    code = (
        "import sys, im3d_jax; heavy = {'jax', 'torch', 'numpy'} & set(sys.modules); assert not heavy, heavy;"
        "assert all(hasattr(im3d_jax, name) for name in im3d_jax.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        im3d_jax.lod  # noqa: B018 - the access is the test


def test_a_worker_loads_no_model(monkeypatch):
    """A worker that runs an unguarded script again ends before it does what its parent has done."""

    class Left(Exception):
        pass

    def leave():
        raise Left

    monkeypatch.setattr(client, "leave_if_worker", leave)
    with pytest.raises(Left):
        im3d_jax.load("no such config")


def test_a_mistake_in_a_call_is_one_line(here, local_client):
    with im3d_jax.load() as pipeline:
        for arguments, words in {
            (): "nothing to make",
            ("  ",): "nothing to make",
        }.items():
            with pytest.raises(im3d_jax.UserError, match=words):
                pipeline.make(*arguments)
        with pytest.raises(im3d_jax.UserError, match="between -90 and 90"):
            pipeline.make("a car", elevation_deg=90)
        with pytest.raises(im3d_jax.UserError, match="no image at none.png"):
            pipeline.make(image="none.png", out="out")
    assert not (here / "out").exists()
    with pytest.raises(im3d_jax.UserError, match="unknown config key 'vidio'"):
        im3d_jax.load(overrides={"vidio": 3})


def test_scripts_however_they_are_run(tmp_path):
    """A script needs its guard, and is told so. Without a file there is nothing to be run again."""
    (tmp_path / "unguarded.py").write_text(RENDERS + "main()\n")
    (tmp_path / "guarded.py").write_text(RENDERS + 'if __name__ == "__main__":\n    main()\n')
    ways = {
        "unguarded": ([str(tmp_path / "unguarded.py")], ""),
        "guarded": ([str(tmp_path / "guarded.py")], ""),
        "command": (["-c", RENDERS + "main()\n"], ""),
        "standard input": ([], RENDERS + "main()\n"),
    }
    # All at once, because each waits for imports most of the time.
    running = {
        name: subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for name, (arguments, _) in ways.items()
    }
    for name, process in running.items():
        process.stdin.write(ways[name][1])
        process.stdin.close()
    ended = {name: (each.stdout.read(), each.stderr.read(), each.wait()) for name, each in running.items()}
    out, err, code = ended.pop("unguarded")
    assert code == 1 and out == ""
    message = err.splitlines()[-1]
    assert message.startswith("recon_torch.errors.UserError: the 3D worker runs this script again")
    assert message.endswith('put what makes assets under `if __name__ == "__main__":`')
    for name, (out, err, code) in ended.items():
        assert (code, out) == (0, "rendered torch.Size([1, 32, 32, 3])\n"), (name, err)

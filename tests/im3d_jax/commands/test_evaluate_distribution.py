"""`im3d evaluate distribution`, as a user calls it, with a tiny CLIP of random weights."""

import json
import shutil

import numpy as np
import pytest
import trimesh
from PIL import Image

from im3d_jax.data.clip import Clip
from im3d_jax.main import run


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """A box, of 16 views of 32 px."""
    root = tmp_path_factory.mktemp("truth")
    trimesh.creation.box([3, 1, 2]).export(root / "box.stl")
    assert run(["evaluate", "truth", f"--meshes={root}", f"--out={root / 'truth'}", "--size=32"]) == 0
    return root / "truth"


@pytest.fixture
def methods(truth, tmp_path):
    """The true views, and the same in another colour and without alpha."""
    shutil.copytree(truth / "objects" / "box" / "images", tmp_path / "copy" / "box")
    for path in (tmp_path / "copy" / "box").iterdir():
        white = Image.new("RGBA", (32, 32), "white")
        white.alpha_composite(Image.open(path))
        (tmp_path / "red" / "box").mkdir(parents=True, exist_ok=True)
        red = (np.asarray(white)[..., :3] * [1, 0.2, 0.4]).astype(np.uint8)
        Image.fromarray(red).save(tmp_path / "red" / "box" / path.name)
    return tmp_path


def call(methods, reference, *flags):
    given = [f"--method={name}={methods / name}" for name in ("copy", "red")]
    return run(
        ["evaluate", "distribution", f"--reference={reference}", f"--out={methods / 'out'}", *given, *flags]
    )


def read(folder):
    pictures = []
    for path in sorted(folder.iterdir()):
        white = Image.new("RGBA", (32, 32), "white")
        white.alpha_composite(Image.open(path).convert("RGBA"))
        pictures.append(np.asarray(white.convert("RGB")))
    return pictures


def test_cmmd_from_a_truth_and_from_a_folder(truth, methods, whole_clip, capsys):
    assert call(methods, truth, f"--clip={whole_clip}") == 0
    assert "FID and KID are left out" in capsys.readouterr().out
    found = json.loads((methods / "out" / "results.json").read_text())["distances"]
    clip = Clip(whole_clip)
    own, true = (
        clip.embed_pictures(read(folder)[1:]).astype(float)  # but the given view
        for folder in (methods / "red" / "box", truth / "objects" / "box" / "images")
    )

    def mean(one, other):
        return np.mean([np.exp(-((x - y) ** 2).sum() / 200) for x in one for y in other])

    expected = 1000 * (mean(own, own) + mean(true, true) - 2 * mean(own, true))
    assert [each["method"] for each in found] == ["copy, renders", "red, renders"]
    assert found[1]["cmmd"] == pytest.approx(expected, rel=1e-3) and expected > 0.01
    assert abs(found[0]["cmmd"]) < 1e-3 * expected
    assert found[1]["num_pictures"] == found[1]["num_reference"] == 15 and found[1]["fid"] is None

    assert call(methods, methods / "red", f"--clip={whole_clip}") == 0
    found = json.loads((methods / "out" / "results.json").read_text())["distances"]
    assert found[0]["cmmd"] > 0.01 and abs(found[1]["cmmd"]) < 1e-6 and found[0]["num_reference"] == 16


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "give --inception FILE for FID and KID, --clip DIR for CMMD"),
        (["--inception=no.pth"], "Inception weights no.pth do not exist"),
        (["--clip=nowhere"], "--clip: no config.json in 'nowhere'"),
    ],
)
def test_weights_that_are_not_there_are_one_line(truth, methods, capsys, flags, words):
    assert call(methods, truth, *flags) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert not (methods / "out").exists()

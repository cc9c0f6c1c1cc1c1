"""Files are whole or absent: a write that fails leaves what was there before, and is one clear error."""

import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from recon_torch.errors import UserError
from recon_torch.files import replacing, sort_safetensors_header, write_json


def test_failed_write_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"size": np.float32(0.5), "shape": np.arange(2)})
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, float("nan"))
    assert json.loads(path.read_text()) == {"size": 0.5, "shape": [0, 1]}
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]


def test_unwritable_place_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "taken.json").mkdir()
    for path in (tmp_path / "file" / "x.json", tmp_path / "taken.json"):
        with pytest.raises(UserError, match=f"cannot write {path}"):
            write_json(path, 1)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "taken.json"]


FULL_DISK = """
import resource, signal, sys
import numpy as np
from recon_torch.errors import UserError
from recon_torch.files import write_json
from recon_torch.formats.ply import save_ply
from recon_torch.scene.start import init_ball
from recon_torch.views.images import write_image
from recon_torch.views.video import write_video
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
folder = sys.argv[1]
noise = np.random.default_rng(0).random((12, 128, 128, 3))
for write in (
    lambda: write_json(folder + "/a.json", noise[0]),
    lambda: write_image(folder + "/a.png", noise[0]),
    lambda: write_video(folder + "/a.mp4", noise),
    lambda: save_ply(init_ball(1000), folder + "/a.ply"),
):
    try:
        write()
    except UserError as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs setrlimit")
@pytest.mark.slow
def test_a_full_disk_leaves_the_old_file_alone(tmp_path):
    """Writes in a process whose files may not grow beyond 20 kB."""
    names = ["a.json", "a.png", "a.mp4", "a.ply"]
    for name in names:
        (tmp_path / name).write_text("old")
    done = subprocess.run([sys.executable, "-c", FULL_DISK, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, line in zip(names, done.stdout.splitlines(), strict=True):
        assert line.startswith(f"cannot write {tmp_path / name} (") and line.endswith("choose another place")
        assert (tmp_path / name).read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_equal_safetensors_with_sorted_headers_have_equal_bytes(tmp_path):
    """The library itself writes six entries in one of 720 orders."""
    path, tensors = tmp_path / "x.safetensors", {"a": np.arange(6, dtype=np.float32), "b": np.ones(3)}
    metadata = {name: f'"{name}" ä' for name in ("rgb", "center", "half_width", "unit", "scale", "up")}
    contents = set()
    for _ in range(4):
        save_file(tensors, path, metadata)
        sort_safetensors_header(path)
        contents.add(path.read_bytes())
    assert len(contents) == 1
    with safe_open(path, framework="numpy") as file:
        assert file.metadata() == metadata
    for name, array in load_file(path).items():
        np.testing.assert_array_equal(array, tensors[name])

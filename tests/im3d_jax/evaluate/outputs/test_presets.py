"""Presets, on made-up folders of the layouts that methods write by default."""

import json
from pathlib import Path

import numpy as np
import pytest

from im3d_jax.evaluate.outputs import finding, layouts, reading
from im3d_jax.evaluate.outputs.layouts import Kind, Source
from im3d_jax.evaluate.outputs.presets import PRESETS
from recon_torch.views.images import write_image
from recon_torch.views.video import write_video

SIZE = 8


def grid(rows, columns, first=0):
    """One picture of rows * columns tiles, whose grey levels count up in steps of 10."""
    levels = first + 10 * np.arange(rows * columns).reshape(rows, columns)
    tiles = levels.repeat(SIZE, 0).repeat(SIZE, 1)[..., None].repeat(3, -1)
    return tiles.astype(np.uint8)


def beside_normals(level):
    """As threestudio's pictures: the render, its normals and its opacity beside each other."""
    return np.concatenate([np.full((SIZE, SIZE, 3), each, np.uint8) for each in (level, 99, 200)], 1)


def trial(root):
    for run in ("a_cat@20240101-000000", "a_cat@20240202-000000"):
        for view in range(12):
            write_image(root / run / f"save/it500-test/{view}.png", beside_normals(view))
    write_image(root / run / "save/it500-0.png", beside_normals(77))


def magic123(root):
    frames = np.full((20, 16, 16, 3), 0.5)
    write_video(
        root / "magic123_a_cat_run1_dmtet/results/magic123_a_cat_run1_dmtet_ep0050_lambertian.mp4", frames
    )
    write_video(root / "magic123_a_cat_run1_dmtet/results/magic123_a_cat_run1_dmtet_ep0050_depth.mp4", frames)


def zero123(root):
    folder = root / "scene-a_cat-index-0_scale-100.0_train-view-True_view-weight-10000/test_10000"
    for view in range(11):
        write_image(folder / f"img/step_{view}.png", grid(1, 1, view))
        write_image(folder / f"view/step_{view}.png", grid(1, 2))


def openlrm(root):
    write_video(root / "videos/a_cat.mov", np.full((20, 16, 16, 3), 0.5))


def sv3d(root):
    write_video(root / "000000.mp4", np.full((21, 16, 16, 3), 0.5))
    write_image(root / "000000.jpg", grid(1, 1))


def stage1(root):
    for view in (0, 1, 2, 3, 8, 9, 10, 11):
        write_image(root / f"a_cat/stage1_8/{view}.png", grid(1, 1, view))
        write_image(root / f"a_cat/stage2_8/{view}_0.png", grid(1, 1, 99))


def mesh(name):
    def write(root):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        corners = ["-0.5 -0.5 0", "0.5 -0.5 0", "0 0.5 0.5"]
        if name.endswith(".ply"):
            header = "ply\nformat ascii 1.0\nelement vertex 3\n" + "".join(
                f"property float {x}\n" for x in "xyz"
            )
            header += "element face 1\nproperty list uchar int vertex_indices\nend_header\n"
            (root / name).write_text(header + "\n".join([*corners, "3 0 1 2", ""]))
        elif name.endswith(".obj"):
            (root / name).write_text("\n".join([*(f"v {x}" for x in corners), "f 1 2 3", ""]))
        else:
            trimesh = pytest.importorskip("trimesh")
            trimesh.Trimesh([[-0.5, -0.5, 0], [0.5, -0.5, 0], [0, 0.5, 0.5]], [[0, 1, 2]]).export(root / name)

    return write


def picture(name, *tiles):
    return lambda root: write_image(root / name, grid(*tiles))


FOLDERS = {
    "mvdream": (picture("a_cat/sample.png", 3, 4), [0, 10, 20, 30]),
    "mvdream-threestudio": (trial, list(range(12))),
    "imagedream": (picture("a_cat_pixel_dream.png", 3, 4), [0, 10, 20, 30]),
    "imagedream-threestudio": (trial, list(range(12))),
    "threestudio": (trial, list(range(12))),
    "magic123": (magic123, 16),
    "zero123": (zero123, list(range(11))),
    "zero123plus": (picture("a_cat.png", 3, 2), [0, 10, 20, 30, 40, 50]),
    "syncdreamer": (picture("a_cat/0.png", 1, 16), list(range(0, 160, 10))),
    "openlrm": (openlrm, 16),
    "openlrm-mesh": (mesh("meshes/a_cat.ply"), 16),
    "one-2-3-45": (mesh("a_cat/mesh.obj"), 16),
    "one-2-3-45-views": (stage1, [0, 1, 2, 3, 8, 9, 10, 11]),
    "sv3d": (sv3d, 21),
    "trellis": (mesh("a_cat/sample.glb"), 16),
    "hunyuan3d-2": (mesh("a_cat.glb"), 16),
}
"""What writes a folder as the method does, and the grey levels of its views or, if these are not exact, their
number. Gaussians are tried in tests/recon_torch/process/test_rendering.py."""


def test_every_preset_is_tried():
    assert FOLDERS.keys() | {"trellis-gaussians"} == PRESETS.keys()
    assert layouts.made("trellis-gaussians", {}).up == "-y"


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_of_a_method_is_read(name, tmp_path):
    write, expected = FOLDERS[name]
    write(tmp_path / "out")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "a small cat", "image": "a_cat.png"}))
    if "{prompt}" in PRESETS[name].fields["path"][0]:
        (tmp_path / "prompts.jsonl").write_text(json.dumps("a cat"))
    asked = finding.read_prompts(tmp_path / "prompts.jsonl")
    [outputs] = finding.find(Source("x", tmp_path / "out", layouts.made(name, {"size": 16})), asked)
    [(row, views)] = reading.read_all(outputs)
    assert row.prompt == asked[0].prompt
    if isinstance(expected, int):
        assert len(views) == expected
    else:
        assert views.shape[1:3] == (SIZE, SIZE)
        assert views.mean((1, 2, 3)).tolist() == expected
    if outputs.layout.kind == Kind.MESH:
        assert views[..., 3].any()
    if name == "sv3d":
        assert row.picture == tmp_path / "out/000000.jpg" and not outputs.excluded
    if name == "threestudio":
        assert [each.name for each in outputs.excluded] == [
            "a_cat@20240101-000000/save/it500-test/{view}.png"
        ]


def test_the_guide_names_every_preset_with_its_source():
    guide = (Path(__file__).parents[4] / "docs/evaluate.md").read_text()
    for name, preset in PRESETS.items():
        assert f"| `{name}` |" in guide and preset.source in guide

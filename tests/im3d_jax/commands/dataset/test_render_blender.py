"""`im3d dataset render --renderer blender`: its flags, its files, and what it says."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import trimesh

from im3d_jax.data import views

needs_blender = pytest.mark.skipif(
    importlib.util.find_spec("bpy") is None, reason="Blender's module bpy is not installed"
)


@pytest.fixture
def meshes(tmp_path):
    directory = tmp_path / "meshes"
    directory.mkdir()
    for name, extents in {"flat": (2, 2, 1), "tall": (1, 1, 2)}.items():
        trimesh.creation.box(extents).export(directory / f"{name}.glb")
    (directory / "broken.fbx").write_bytes(b"?")
    return directory


def test_flags_of_blender_need_it_and_meshes(world, meshes, tmp_path, user_error):
    out = ["--out", tmp_path / "out"]
    with user_error("--engine, --samples and --environment need --renderer blender"):
        world.run("render", "--meshes", meshes, *out, "--samples", 8)
    with user_error("--renderer blender needs --meshes"):
        world.run("render", "--procedural", 1, *out, "--renderer", "blender")
    with user_error("--samples: '0' is not a whole number from 1"):
        world.run("render", "--meshes", meshes, *out, "--renderer", "blender", "--samples", 0)
    assert not (tmp_path / "out").exists()


def test_without_blender_a_line_says_how_to_install_it(world, meshes, tmp_path, user_error, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bpy" else found(name))
    with user_error("needs Blender's Python module; install it: pip install --no-deps 'bpy==4.5"):
        world.run("render", "--meshes", meshes, "--out", tmp_path / "out", "--renderer", "blender")


def test_directories_of_one_renderer_are_not_continued_by_another(world, meshes, tmp_path, user_error):
    out, small = tmp_path / "out", ["--size", 8, "--num-views", 1]
    world.run("render", "--meshes", meshes, "--out", out, *small)
    settings = json.loads((out / "render.json").read_text())
    assert settings["renderer"] == "rays"
    for key, value, told in (("renderer", "blender", "renderer blender"), ("size", 16, "size 16")):
        (out / "render.json").write_text(json.dumps(settings | {key: value}))
        with user_error(f"was begun with {told}, now it is"):
            world.run("render", "--meshes", meshes, "--out", out, *small)
    del settings["renderer"]  # as a directory from before there was Blender
    (out / "render.json").write_text(json.dumps(settings))
    world.run("render", "--meshes", meshes, "--out", out, *small)


@needs_blender
@pytest.mark.parametrize(
    "name, content, told",
    [
        ("light.png", b"", "must be an .hdr or .exr"),
        ("light.hdr", b"no", "is no .hdr picture"),
        ("gone.exr", None, "cannot be read"),
    ],
)
def test_environments_are_checked_first(world, meshes, tmp_path, user_error, name, content, told):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    flags = ["--renderer", "blender", "--environment", tmp_path / name]
    with user_error(told):
        world.run("render", "--meshes", meshes, "--out", tmp_path / "out", *flags)


@needs_blender
@pytest.mark.slow
def test_processes_render_objects_and_variants_and_say_no_more_than_they_should(
    world, meshes, tmp_path, capsys
):
    flags = ["--size", 16, "--num-views", 2, "--samples", 4, "--renderer", "blender", "--augment", 1]
    here, out = tmp_path / "here", tmp_path / "out"
    world.run("render", "--meshes", meshes, *flags, "--out", here)
    command = [sys.executable, "-m", "im3d_jax", "dataset", "render", "--meshes", meshes, "--jobs", "1"]
    command += [*map(str, flags), "--out", out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = "4 objects rendered, 0 were there, 2 skipped (2 unusable)"
    for printed, folder in ((done.stdout, out), (capsys.readouterr().out, here)):
        assert printed == f"{folder}: {made}; {folder}/failures.csv names them\n"
    lines = done.stderr.splitlines()
    assert len(lines) == 3 and all(line.startswith("im3d: ") for line in lines)
    assert {path.name for path in views.find_objects(out)} == {"flat", "flat~1", "tall", "tall~1"}
    for path in views.find_objects(out):
        (rgb, alpha), (rgb_here, alpha_here) = views.read_views(path), views.read_views(here / path.name)
        np.testing.assert_allclose(rgb, rgb_here, atol=2 / 255)
        np.testing.assert_array_equal(alpha, alpha_here)
    told = json.loads((out / "flat~1/metadata.json").read_text())
    assert told["augmentation"]["of"] == "flat" and told["renderer"].startswith("blender 4.")

"""`im3d dataset render`: what is rendered, resumed, shared among jobs and skipped."""

import csv
import hashlib
import json
import os
import shutil

import numpy as np
import pytest
import trimesh

from im3d_jax.data import mesh_rendering, procedural, rendering, views
from im3d_jax.data.meshes.reading import load_mesh
from im3d_jax.data.turntables import read_splits
from recon_torch.errors import UserError
from recon_torch.views import cameras

pytestmark = pytest.mark.slow


def files(directory):
    """{path: (content, time of writing)} of all files below."""
    found = (path for path in directory.rglob("*") if path.is_file())
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in found}


def test_records_are_the_procedural_objects(world, rendered, tmp_path):
    source = world.build(rendered, tmp_path / "data")
    assert len(source) == world.objects
    for number in range(world.objects):
        truth = procedural.turntables(
            world.seed, [world.first + number], size=world.size, num_views=world.views
        )
        example = source[number]
        assert example["id"] == f"train-00000/{number}/{world.first + number:08d}"
        assert example["caption"] == truth.captions[0]
        assert example["elevation_rad"] == pytest.approx(truth.elevation_rad[0], abs=1e-4)
        np.testing.assert_allclose(example["rgb"], truth.views.rgb[0], atol=1.01 / 255)
        np.testing.assert_allclose(example["alpha"], truth.views.alpha[0], atol=0.51 / 255)


def test_rendering_continues_where_it_stopped(world, copied, capsys):
    before = files(copied)
    lost = copied / f"{world.first + 2:08d}"
    shutil.rmtree(lost)
    world.run("render", *world.procedural, "--out", copied)
    after = files(copied)
    assert {path: content for path, (content, _) in after.items()} == {p: c for p, (c, _) in before.items()}
    new = {path.relative_to(copied).parts[0] for path in after if after[path][1] != before[path][1]}
    assert new == {lost.name}
    assert "1 objects rendered, 5 were there" in capsys.readouterr().out
    with pytest.raises(UserError, match="was begun with num_views 4, now it is 2"):
        world.run("render", *world.procedural, "--num-views", 2, "--out", copied)


def test_files_of_others_are_not_overwritten(world, tmp_path):
    (tmp_path / f"{world.first:08d}").mkdir()
    (tmp_path / f"{world.first:08d}" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=f"{world.first:08d}/notes.txt is not of an earlier run"):
        world.run("render", *world.procedural, "--out", tmp_path)
    assert (tmp_path / f"{world.first:08d}" / "notes.txt").read_text() == "mine"
    (tmp_path / "other").mkdir()
    (tmp_path / "other/failures.csv").write_text("mine")
    with pytest.raises(UserError, match="failures.csv is not of an earlier run"):
        world.run("render", *world.procedural, "--out", tmp_path / "other")


def test_parts_are_disjoint_and_cover_all_objects(world, rendered, tmp_path):
    names = []
    for part in range(2):
        out = tmp_path / str(part)
        world.run("render", *world.procedural, "--out", out, "--part", f"{part}/2")
        names += [path.name for path in out.iterdir() if path.is_dir()]
    assert sorted(names) == sorted(path.name for path in rendered.iterdir() if path.is_dir())
    assert len(set(names)) == world.objects


@pytest.fixture
def meshes(tmp_path):
    """Two meshes in folders, one of them without a caption, and a file that is none; and their captions."""
    directory = tmp_path / "meshes"
    for name, shape in {"a/box": trimesh.creation.box((1, 2, 3)), "b": trimesh.creation.icosphere()}.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shape.export(directory / f"{name}.glb")
    (directory / "c.obj").write_text("nothing")
    (tmp_path / "captions.csv").write_text('a/box,"a box, grey"\nother,a cat\n')
    return directory


def test_meshes_become_records(world, meshes, tmp_path, capsys):
    out = tmp_path / "views"
    settings = [
        "--size",
        world.size,
        "--num-views",
        world.views,
        "--seed",
        world.seed,
        "--captions",
        tmp_path / "captions.csv",
    ]
    world.run("render", "--meshes", meshes, "--out", out, *settings)
    printed = capsys.readouterr()
    assert "2 objects rendered, 0 were there, 1 skipped" in printed.out
    assert "im3d: skipped c: " in printed.err and "2 of 3 meshes have no caption" in printed.err
    source = world.build(out, tmp_path / "data")
    examples = [source[0], source[1]]
    assert [each["caption"] for each in examples] == ["a box, grey", ""]
    assert all(0 <= each["elevation_rad"] <= np.pi / 4 for each in examples)
    assert examples[0]["elevation_rad"] != examples[1]["elevation_rad"]
    orbit = cameras.orbit(world.views, examples[0]["elevation_rad"], world.size)
    rgba, _ = mesh_rendering.render(load_mesh(meshes / "a/box.glb"), orbit)
    np.testing.assert_allclose(examples[0]["alpha"], rgba[..., 3:], atol=0.51 / 255)
    over_white = rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:]
    np.testing.assert_allclose(examples[0]["rgb"], over_white, atol=1.01 / 255)


def test_what_files_ask_for_and_views_do_not_show_is_counted_and_kept(world, tmp_path, capsys):
    meshes, out = tmp_path / "meshes", tmp_path / "views"
    meshes.mkdir()
    for name, more in {"a": "map_Kd wood.png\nmap_Bump b.png\n", "b": "map_Bump b.png\n", "c": ""}.items():
        (meshes / f"{name}.mtl").write_text(f"newmtl wood\nKd 1 1 1\n{more}")
        (meshes / f"{name}.obj").write_text(
            f"mtllib {name}.mtl\nusemtl wood\nv 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\nf 1 2 3\nf 1 2 4\nf 2 3 4\n"
        )
    for name in ("d.fbx", "e.FBX", "f/g.blend", "f/h.txt", "f/._a.obj"):
        (meshes / name).parent.mkdir(exist_ok=True)
        (meshes / name).write_bytes(b"?")
    world.run("render", "--meshes", meshes, "--out", out, "--size", world.size, "--num-views", world.views)
    printed = capsys.readouterr()
    assert "3 objects rendered, 0 were there; left out: normal map 2, missing texture 1\n" in printed.out
    assert "im3d: a is rendered without missing texture: wood.png\n" in printed.err
    assert "meshes has 3 files in formats that are not read: .fbx 2, .blend 1 (--" in printed.err
    kept = {name: json.loads((out / name / "metadata.json").read_text()).get("left_out") for name in "abc"}
    assert kept == {"a": ["missing texture: wood.png", "normal map"], "b": ["normal map"], "c": None}
    assert len(world.build(out, tmp_path / "data")) == 3


def test_broken_empty_and_lost_files_and_formats_that_are_not_read(world, tmp_path, capsys, user_error):
    meshes, only = tmp_path / "meshes", tmp_path / "only"
    meshes.mkdir()
    only.mkdir()
    (meshes / "a.glb").write_bytes(b"glTF")
    (meshes / "b.obj").write_bytes(b"")
    (meshes / "c.stl").symlink_to("gone.stl")
    with user_error(r"no object was rendered, 3 skipped \(3 unusable\)"):
        world.run("render", "--meshes", meshes, "--out", tmp_path / "views")
    printed = capsys.readouterr().err
    assert all(f"im3d: skipped {name}: " in printed for name in "abc")
    (only / "a.fbx").write_bytes(b"?")
    with user_error(r"only, only 1 files .* not read: .fbx 1 \(--renderer blender reads .fbx\); convert"):
        world.run("render", "--meshes", only, "--out", tmp_path / "views")


def test_names_that_are_not_utf8_are_refused_by_name_and_the_others_rendered(world, tmp_path, user_error):
    meshes, out = tmp_path / "meshes", tmp_path / "views"
    meshes.mkdir()
    for name in (b"good.stl", b"caf\xe9.stl"):
        trimesh.creation.box((1, 2, 3)).export(meshes / os.fsdecode(name))
    world.run("render", "--meshes", meshes, "--out", out, "--size", world.size, "--num-views", world.views)
    assert views.is_object(out / "good")
    _, row = rows(out / "failures.csv")
    assert row[:2] == [r"caf\udce9", "unusable"] and "not UTF-8; rename the file" in row[3]
    (out / "good").rename(out / os.fsdecode(b"caf\xe9"))
    with user_error("not UTF-8; rename it"):
        views.find_objects(out)


def test_folders_that_look_like_meshes_and_links_to_folders_are_entered(world, tmp_path, capsys):
    inside, linked = tmp_path / "meshes" / "chair.glb", tmp_path / "elsewhere"
    inside.mkdir(parents=True)
    linked.mkdir()
    trimesh.creation.box((1, 2, 3)).export(inside / "scene.glb")
    trimesh.creation.box((1, 2, 3)).export(linked / "box.stl")
    (tmp_path / "meshes" / "link").symlink_to(linked)
    (linked / "loop").symlink_to(tmp_path / "meshes")
    world.run(
        "render",
        "--meshes",
        tmp_path / "meshes",
        "--out",
        tmp_path / "out",
        "--size",
        world.size,
        "--num-views",
        1,
    )
    assert "2 objects rendered" in capsys.readouterr().out
    assert (tmp_path / "out/chair.glb/scene/metadata.json").is_file()
    assert (tmp_path / "out/link/box/metadata.json").is_file()


def test_meshes_with_names_in_conflict_are_refused(world, meshes, tmp_path):
    shutil.copy(meshes / "b.glb", meshes / "a.glb")
    with pytest.raises(UserError, match="a mesh and a folder called a;"):
        world.run("render", "--meshes", meshes, "--out", tmp_path / "views")
    shutil.copy(meshes / "b.glb", meshes / "c.glb")
    with pytest.raises(UserError, match="differ only in their suffix"):
        world.run("render", "--meshes", meshes, "--out", tmp_path / "views")
    assert not (tmp_path / "views").exists()


# ---- At scale ----


def rows(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_processes_render_the_same_and_failures_have_a_table(world, meshes, tmp_path, capsys):
    out, here = tmp_path / "views", tmp_path / "here"
    settings = ["--size", world.size, "--num-views", world.views, "--out", out]
    world.run("render", "--meshes", meshes, *settings, "--jobs", 1)
    assert "2 objects rendered, 0 were there, 1 skipped (1 unusable)" in capsys.readouterr().out
    assert rows(out / "failures.csv")[0] == ["name", "reason", "attempts", "message"]
    assert rows(out / "failures.csv")[1][:3] == ["c", "unusable", "1"]
    world.run("render", "--meshes", meshes, *settings[:-1], here)
    found, expected = ({p.relative_to(top): p.read_bytes() for p in files(top)} for top in (out, here))
    assert found == expected and len(found) == 3 + 2 * (world.views + 2)
    capsys.readouterr()
    (meshes / "c.obj").unlink()
    world.run("render", "--meshes", meshes, *settings)
    assert "0 objects rendered, 2 were there\n" in capsys.readouterr().out
    assert not (out / "failures.csv").exists()


def test_where_nothing_was_rendered_the_command_fails(world, meshes, tmp_path, user_error):
    (meshes / "a/box.glb").unlink()
    (meshes / "b.glb").write_text("nothing")
    out = tmp_path / "views"
    with user_error(r"no object was rendered, 2 skipped \(2 unusable\); .*failures.csv names them"):
        world.run("render", "--meshes", meshes, "--out", out, "--size", world.size, "--part", "0/1")
    assert len(rows(out / "failures.csv")) == 3


def test_an_interrupted_run_keeps_its_table(world, meshes, tmp_path, monkeypatch):
    def stop(path, up):
        if path.stem == "box":
            raise UserError("no")
        raise KeyboardInterrupt

    monkeypatch.setattr(rendering, "load_mesh", stop)
    out = tmp_path / "views"
    with pytest.raises(KeyboardInterrupt):
        world.run("render", "--meshes", meshes, "--out", out, "--size", world.size)
    assert rows(out / "failures.csv")[1:] == [["a/box", "unusable", "1", "no"]]


def test_a_mesh_has_its_digest_beside_its_views(world, meshes, tmp_path):
    out = tmp_path / "views"
    world.run("render", "--meshes", meshes, "--out", out, "--size", world.size)
    metadata = json.loads((out / "b/metadata.json").read_text())
    assert metadata["mesh_sha256"] == hashlib.sha256((meshes / "b.glb").read_bytes()).hexdigest()


def test_variants_lie_beside_their_mesh_and_in_its_split(world, meshes, tmp_path, user_error):
    (meshes / "c.obj").unlink()
    out, data = tmp_path / "views", tmp_path / "data"
    settings = ["--size", world.size, "--num-views", world.views]
    world.run("render", "--meshes", meshes, "--out", out, *settings, "--augment", 3)
    names = {path.relative_to(out).as_posix() for path in views.find_objects(out)}
    assert names == {f"{name}{tail}" for name in ("a/box", "b") for tail in ("", "~1", "~2", "~3")}
    assert json.loads((out / "b~2/metadata.json").read_text())["augmentation"]["of"] == "b"
    world.build(out, data, split="train=0.5,test=0.5")
    assert sorted(count % 4 for count in read_splits(data).values()) == [0, 0]
    with user_error("--augment needs --meshes"):
        world.run("render", *world.procedural, "--out", out, "--augment", 1)

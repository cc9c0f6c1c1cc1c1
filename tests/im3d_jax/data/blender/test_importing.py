"""What Blender reads: formats against a .glb of the same object, broken files, and what is not shown."""

import importlib.util
import json
import os

import numpy as np
import pytest
import trimesh

from im3d_jax.data.blender import SUFFIXES, Look, process
from im3d_jax.data.blender.rendering import Blender
from im3d_jax.data.meshes.reading import UpAxis
from recon_torch.errors import UserError
from recon_torch.views.cameras import orbit

if importlib.util.find_spec("bpy") is None:
    pytest.skip("Blender's module bpy is not installed", allow_module_level=True)
pytestmark = pytest.mark.slow

CAMERAS = orbit(3, 0.4, 48)


def draw(path, cameras=CAMERAS, samples=8):
    return Blender(Look(samples=samples))(path, UpAxis.Y, cameras, None)


def boxes():
    """Three boxes of three colours that no turn maps onto itself."""
    scene = trimesh.Scene()
    for number, (extents, place) in enumerate(
        (((2, 1, 3), (0, 0, 0)), ((1, 1, 1), (2, 0.5, 1)), ((0.5, 2, 0.5), (0.3, 1, -2)))
    ):
        box = trimesh.creation.box(extents)
        color = np.eye(3)[number].tolist()
        material = trimesh.visual.material.PBRMaterial(baseColorFactor=[*color, 1.0], metallicFactor=0.0)
        box.visual = trimesh.visual.TextureVisuals(material=material)
        scene.add_geometry(box, transform=trimesh.transformations.translation_matrix(place))
    return scene


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The directory of boxes.glb, and of what Blender makes of it in other formats."""
    folder = tmp_path_factory.mktemp("exported")
    boxes().export(folder / "boxes.glb")
    process.start()
    with process.quiet():
        bpy = process.empty()
        bpy.ops.import_scene.gltf(filepath=str(folder / "boxes.glb"))
        bpy.ops.export_scene.fbx(filepath=str(folder / "boxes.fbx"))
        bpy.ops.wm.obj_export(filepath=str(folder / "boxes.obj"))
        for suffix in (".usda", ".usdc", ".usdz"):
            bpy.ops.wm.usd_export(filepath=str(folder / f"boxes{suffix}"))
        bpy.ops.wm.usd_export(
            filepath=str(folder / "y_up.usda"),
            convert_orientation=True,
            export_global_forward_selection="NEGATIVE_Z",
            export_global_up_selection="Y",
        )
        bpy.ops.wm.collada_export(filepath=str(folder / "boxes.dae"))
        bpy.ops.wm.save_as_mainfile(filepath=str(folder / "boxes.blend"))
    return folder


@pytest.fixture(scope="module")
def reference(exported):
    return draw(exported / "boxes.glb").rgba


@pytest.mark.parametrize(
    "name",
    [
        "boxes.fbx",
        "boxes.usda",
        "boxes.usdc",
        "boxes.usdz",
        "y_up.usda",
        "boxes.dae",
        "boxes.blend",
        "boxes.obj",
    ],
)
def test_formats_show_the_same_object_in_the_same_colours(exported, reference, name):
    rgba = draw(exported / name).rgba
    alpha, expected = rgba[..., 3], reference[..., 3]
    assert np.minimum(alpha, expected).sum() / np.maximum(alpha, expected).sum() > 0.99
    inside = (alpha == 1) & (expected == 1)
    hue, expected_hue = (each[inside][:, :3].argmax(-1) for each in (rgba, reference))
    assert (hue == expected_hue).mean() > 0.99 and len(np.unique(hue)) == 3


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("content", [b"", b"nothing that any format begins with\n", b"half"])
def test_broken_files_are_one_line(exported, tmp_path, suffix, content):
    path, whole = tmp_path / f"broken{suffix}", exported / f"boxes{suffix}"
    if content == b"half":
        content = whole.read_bytes()[: whole.stat().st_size // 3] if whole.exists() else b"\0" * 100
        if suffix in (".obj", ".usda"):
            content = content[:40]  # the first third of a text may be whole
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        draw(path, orbit(1, 0.4, 8), 1)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no mesh at .*gone\.fbx"):
        draw(tmp_path / "gone.fbx")


def test_scripts_of_blend_files_are_not_run(tmp_path):
    witness, path = tmp_path / "witness", tmp_path / "scripted.blend"
    process.start()
    with process.quiet():
        bpy = process.empty()
        bpy.ops.mesh.primitive_cube_add()
        bpy.ops.mesh.primitive_cube_add()
        cube = bpy.context.object
        text = bpy.data.texts.new("run.py")
        text.write(f"open({str(witness)!r}, 'w').close()")
        text.use_module = True
        driver = cube.driver_add("location", 0).driver
        driver.expression = "3.0 * len([print('run') for _ in range(1)])"
        bpy.ops.wm.save_as_mainfile(filepath=str(path))
    made = draw(path)
    assert not witness.exists() and made.left_out == ("scripted drivers",)
    trimesh.creation.box((2, 2, 2)).export(tmp_path / "cube.ply")  # the driver would move the second cube
    np.testing.assert_allclose(made.rgba[..., 3], draw(tmp_path / "cube.ply").rgba[..., 3], atol=0.13)


def test_what_is_not_shown_is_named(tmp_path):
    boxes().export(tmp_path / "b.glb")
    process.start()
    with process.quiet():
        bpy = process.empty()
        bpy.ops.import_scene.gltf(filepath=str(tmp_path / "b.glb"))
        lamp = bpy.data.objects.new("lamp", bpy.data.lights.new("lamp", "POINT"))
        bpy.context.scene.collection.objects.link(lamp)
        hidden = bpy.data.objects.new("hidden", bpy.data.meshes["geometry_0"])
        hidden.location, hidden.hide_render = (50, 0, 0), True
        bpy.context.scene.collection.objects.link(hidden)
        bpy.data.scenes.new("Second")
        bpy.ops.wm.save_as_mainfile(filepath=str(tmp_path / "b.blend"))
    made = draw(tmp_path / "b.blend")
    assert made.left_out == ("lights", "other scenes")
    expected = draw(tmp_path / "b.glb").rgba[..., 3]
    np.testing.assert_array_equal(made.rgba[..., 3], expected)


def test_missing_textures_and_extensions_are_named(tmp_path):
    (tmp_path / "a.mtl").write_text("newmtl wood\nKd 1 1 1\nmap_Kd oak/wood.png\n")
    (tmp_path / "a.obj").write_text(
        "mtllib a.mtl\nusemtl wood\nv 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\nvt 0 0\n"
        "f 1/1 2/1 3/1\nf 1/1 2/1 4/1\n"
    )
    assert draw(tmp_path / "a.obj").left_out == ("missing texture: wood.png",)
    content = boxes().export(file_type="gltf")
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    gltf = json.loads((tmp_path / "model.gltf").read_text())
    gltf["extensionsUsed"] = ["MADE_up", "KHR_materials_unlit"]
    (tmp_path / "model.gltf").write_text(json.dumps(gltf))
    assert draw(tmp_path / "model.gltf").left_out == ("extension MADE_up",)


def test_colours_that_blender_does_not_show_are_named(tmp_path):
    box = trimesh.creation.box((1, 2, 3))
    content = bytearray(box.export(file_type="stl"))
    (tmp_path / "plain.stl").write_bytes(content)
    for face in range(len(box.faces)):
        content[84 + 50 * face + 48 : 84 + 50 * face + 50] = (0x8000 | 31).to_bytes(2, "little")
    (tmp_path / "colored.stl").write_bytes(content)
    assert draw(tmp_path / "plain.stl").left_out == ()
    assert draw(tmp_path / "colored.stl").left_out == ("face colours",)
    (tmp_path / "a.mtl").write_text("newmtl wood\nKd 1 1 1\n")
    corners = "v 0 0 0 1 0 0\nv 1 0 0 1 0 0\nv 0 1 0 1 0 0\nv 0 0 1 1 0 0\nf 1 2 3\nf 1 2 4\n"
    (tmp_path / "a.obj").write_text(f"mtllib a.mtl\nusemtl wood\n{corners}")
    (tmp_path / "b.obj").write_text(corners)
    assert draw(tmp_path / "a.obj").left_out == ("vertex colours beside a material",)
    assert draw(tmp_path / "b.obj").left_out == ()


def test_folders_of_meshes_are_not_written_to(exported):
    before = sorted(os.listdir(exported))
    for name in ("boxes.fbx", "boxes.usdz", "boxes.blend", "boxes.dae", "boxes.glb"):
        draw(exported / name, orbit(1, 0.4, 8), 1)
    assert sorted(os.listdir(exported)) == before

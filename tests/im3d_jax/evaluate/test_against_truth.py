"""Outputs against frozen truth: scores by NumPy, views put into the truth's order, meshes in its frame."""

import json

import numpy as np
import pytest
import trimesh

from im3d_jax.data.meshes.reading import UpAxis
from im3d_jax.evaluate import against_truth
from im3d_jax.evaluate.against_truth import Settings
from im3d_jax.evaluate.alignment import Alignment
from im3d_jax.evaluate.frozen import freezing, manifest
from im3d_jax.evaluate.frozen.freezing import How
from im3d_jax.evaluate.frozen.protocols import Protocol
from im3d_jax.evaluate.outputs import finding
from im3d_jax.evaluate.outputs.finding import Rule
from im3d_jax.evaluate.outputs.layouts import Kind, Layout, Source, Up
from recon_torch.views.images import read_image, straight, write_image
from recon_torch.views.video import write_video

PLAIN = Settings(None)


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    """Two boxes, of 16 views of 32 px."""
    meshes, out = tmp_path_factory.mktemp("meshes"), tmp_path_factory.mktemp("truth")
    for name, extents in {"long": [3, 1, 2], "flat": [2, 2, 0.5]}.items():
        trimesh.creation.box(extents).export(meshes / f"{name}.stl")
    how = How(Protocol.IM3D, 32, 20.0, 0, UpAxis.Z)
    captions = {"long": "A long box!"}
    freezing.freeze(freezing.objects_below(meshes), meshes, captions, how, out, 0)
    return manifest.read(out)


def outputs_of(frozen, root, layout=None):
    (found,) = finding.find(Source("m", root, layout), against_truth.asked(frozen))
    return found


def measured(frozen, outputs, settings=PLAIN):
    return {item.name: each for item, each in against_truth.measure(frozen, outputs, settings, lambda: None)}


def write_pictures(
    frozen, root, change=lambda picture, view: picture, names=("long", "flat"), order=range(16)
):
    for item in (item for item in frozen.objects if item.name in names):
        rgb, alpha = frozen.pictures(item)
        for place, view in enumerate(order):
            picture = change(straight(rgb[view], alpha[view]), view)
            write_image(root / item.name / f"{place:03d}.png", picture)


def test_scores_are_those_of_numpy(frozen, tmp_path):
    rng = np.random.default_rng(0)

    def noisy(picture, view):
        return np.concatenate(
            [np.clip(picture[..., :3] + rng.normal(0, 0.1, (32, 32, 3)), 0, 1), 1 - picture[..., 3:]], -1
        )

    write_pictures(frozen, tmp_path, noisy, names=["long"])
    outputs = outputs_of(frozen, tmp_path)
    found = measured(frozen, outputs)["long"]
    item = next(item for item in frozen.objects if item.name == "long")
    rgb, alpha = (each.astype(float) for each in frozen.pictures(item))
    read = np.stack([read_image(path) for path in outputs.rows["long"].paths]).astype(float)
    own, own_alpha = read[..., :3] * read[..., 3:] + 1 - read[..., 3:], read[..., 3:]
    errors = ((own - rgb) ** 2)[1:]
    expected = {
        "mse": errors.mean((1, 2, 3)),
        "psnr": -10 * np.log10(errors.mean((1, 2, 3))),
        "psnr_foreground": -10
        * np.log10((errors.mean(-1, keepdims=True) * alpha[1:]).sum((1, 2, 3)) / alpha[1:].sum((1, 2, 3))),
        "silhouette_iou": ((own_alpha >= 0.5) & (alpha >= 0.5)).sum((1, 2, 3))[1:]
        / ((own_alpha >= 0.5) | (alpha >= 0.5)).sum((1, 2, 3))[1:],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(found.per_view[name], values, rtol=1e-4, err_msg=name)
        assert found.row.scores[name] == pytest.approx(values.mean(), rel=1e-4)
    assert len(found.per_view["ssim"]) == 15 and "lpips" not in found.row.scores


def test_rows_are_found_by_name_and_by_caption(frozen, tmp_path):
    write_pictures(frozen, tmp_path)
    (tmp_path / "long").rename(tmp_path / "a_long_box")
    found = measured(frozen, outputs_of(frozen, tmp_path))
    assert set(found) == {"long", "flat"}
    assert found["long"].row.scores["psnr"] > 45 and found["long"].row.scores["silhouette_iou"] == 1


def test_a_layout_that_says_its_azimuths_is_put_in_order(frozen, tmp_path):
    clockwise = [-view % 16 for view in range(16)]
    write_pictures(frozen, tmp_path, order=clockwise, names=["long"])
    stated = tuple(-22.5 * view for view in range(16))
    fits = {}
    for name, azimuths in (
        ("silent", ()),
        ("stated", stated),
        ("wrong", tuple(10 + each for each in stated)),
    ):
        outputs = outputs_of(frozen, tmp_path, Layout(Kind.IMAGES, ("{name}",), azimuths_deg=azimuths))
        found = measured(frozen, outputs)
        fits[name] = found["long"].row.scores["psnr"] if found else outputs.excluded[-1].detail
    assert fits["stated"] > 45 > 25 > fits["silent"]
    assert fits["wrong"].startswith("it has no view at azimuth")


def test_a_video_of_another_number_of_frames_is_left_out(frozen, tmp_path):
    rgb, _ = frozen.pictures(frozen.objects[1])
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "long.mp4", rgb)
    write_video(tmp_path / "videos" / "flat.mp4", rgb[[*range(16), 0, 1]])
    outputs = outputs_of(frozen, tmp_path / "videos")
    found = measured(frozen, outputs)
    assert set(found) == {"long"} and found["long"].row.scores["psnr"] > 25
    assert outputs.excluded[-1].rule == Rule.NUM_VIEWS
    assert outputs.excluded[-1].detail == "18 frames, not 16; a layout may say their azimuths_deg"


def test_pictures_of_another_size_are_resampled_and_of_no_square_left_out(frozen, tmp_path):
    def doubled(picture, _):
        return (picture[..., :3] * picture[..., 3:] + 1 - picture[..., 3:]).repeat(2, 0).repeat(2, 1)

    write_pictures(frozen, tmp_path, doubled, ["long"])
    write_pictures(frozen, tmp_path, lambda picture, _: picture[:8], ["flat"])
    outputs = outputs_of(frozen, tmp_path)
    found = measured(frozen, outputs)
    # The filter against aliasing takes pixels beside those that were repeated.
    assert set(found) == {"long"} and found["long"].row.scores["psnr"] > 30
    assert [note[:12] for note in found["long"].notes] == ["pictures hav", "pictures of "]
    assert outputs.excluded[-1].name == "flat" and "32 x 8 pixels" in outputs.excluded[-1].detail


@pytest.fixture
def meshes(tmp_path):
    """The long box as it is in the truth's frame, or twice as large and turned by 30 degrees."""
    for name, yaw_deg, scale in (("same", 0, 1), ("turned", 30, 2)):
        box = trimesh.creation.box(np.array([3, 1, 2]) / np.sqrt(14) * scale)
        box.apply_transform(trimesh.transformations.rotation_matrix(np.radians(yaw_deg), [0, 0, 1]))
        (tmp_path / name).mkdir()
        box.export(tmp_path / name / "long.stl")
    return tmp_path


def of_meshes(frozen, root, alignment):
    outputs = outputs_of(frozen, root, Layout(Kind.MESH, ("{name}.stl",), up=Up.Z))
    return measured(frozen, outputs, PLAIN._replace(alignment=alignment))["long"].row.scores


@pytest.mark.slow
def test_meshes_are_compared_in_the_frame_of_the_truth(frozen, meshes):
    same = of_meshes(frozen, meshes / "same", Alignment.NONE)
    assert same["chamfer"] < 1e-6 and same["f_0.01"] == 1 and same["normals"] > 0.99
    assert same["psnr"] > 45 and same["silhouette_iou"] == 1
    turned = of_meshes(frozen, meshes / "turned", Alignment.NONE)
    assert turned["chamfer"] > 0.1 and turned["silhouette_iou"] < 0.5
    aligned = of_meshes(frozen, meshes / "turned", Alignment.YAW)
    assert aligned["chamfer"] < 1e-3 and aligned["silhouette_iou"] > 0.95 and aligned["psnr"] > 25


def test_lpips_is_measured_where_it_has_weights(frozen, tmp_path, perceptual):
    write_pictures(frozen, tmp_path, names=["long"])
    found = measured(frozen, outputs_of(frozen, tmp_path), PLAIN._replace(perceptual=perceptual))
    assert 0 <= found["long"].row.scores["lpips"] < 1e-3


@pytest.mark.slow
def test_an_asset_without_splats_is_rendered_from_its_mesh(frozen, tmp_path):
    for name in ("long", "flat"):
        write_image(tmp_path / name / "images" / "000.png", np.ones((8, 8, 3), np.float32))
        report = {"config_digest": "1", "image": f"{name}.png", "seed": 0}
        (tmp_path / name / "report.json").write_text(json.dumps(report))
    extents = np.array([1, 2, 3]) / np.sqrt(14)  # y, z and x of our world
    trimesh.creation.box(extents).export(tmp_path / "long" / "mesh.glb")
    outputs = outputs_of(frozen, tmp_path)
    found = measured(frozen, outputs)
    assert set(found) == {"long"}
    assert found["long"].row.scores["chamfer"] < 1e-6 and found["long"].row.scores["silhouette_iou"] == 1
    assert "has neither asset.ply nor mesh.glb" in outputs.excluded[-1].detail


class MeanColour:
    """A CLIP whose embedding of a picture is its mean colour."""

    max_tokens = 4

    def embed_pictures(self, pictures):
        means = np.array([picture.mean((0, 1)) for picture in pictures])
        return means / np.linalg.norm(means, axis=1, keepdims=True)

    def embed_captions(self, captions):
        raise AssertionError("no caption is asked for")


def test_clip_s_is_the_cosine_with_the_true_view():
    made = np.stack([np.full((4, 4, 3), color, np.float32) for color in ((1, 0, 0), (0, 0, 1), (1, 1, 0))])
    found = against_truth.clip_similarity(MeanColour(), made, made[[0, 0, 0]])
    assert found == pytest.approx([1, 0, 0.5**0.5])


def test_another_background_than_white_is_said(frozen, tmp_path):
    def over(background):
        return lambda picture, _: picture[..., :3] * picture[..., 3:] + background * (1 - picture[..., 3:])

    write_pictures(frozen, tmp_path, over(0.5), ["long"])
    write_pictures(frozen, tmp_path, over(1.0), ["flat"])
    found = measured(frozen, outputs_of(frozen, tmp_path))
    assert against_truth.NO_WHITE in found["long"].notes
    assert found["flat"].notes == (against_truth.NO_ALPHA,)


def test_a_mesh_without_area_is_left_out(frozen, tmp_path):
    (tmp_path / "long.obj").write_text("v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\n")
    outputs = outputs_of(frozen, tmp_path)
    assert measured(frozen, outputs) == {}
    assert "has no triangle with an area" in outputs.excluded[-1].detail

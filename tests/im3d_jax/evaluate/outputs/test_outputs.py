"""Rows of made-up methods: found, joined, read, and left out by a rule that is named."""

import json
from pathlib import Path

import numpy as np
import pytest

from im3d_jax.evaluate.outputs import finding, layouts, reading
from im3d_jax.evaluate.outputs.finding import Rule
from im3d_jax.evaluate.outputs.layouts import Kind, Layout, Shows, Source
from recon_torch.views.images import write_image
from recon_torch.views.video import write_video


def picture(value, size=8):
    return np.full((size, size, 3), value, np.uint8)


def write_views(folder, values, suffix=".png", size=8):
    for number, value in enumerate(values):
        write_image(folder / f"{number}{suffix}", picture(value, size))


def left_out(outputs, rule):
    return [each.name for each in outputs.excluded if each.rule == rule]


def means(outputs, num_views=0):
    """The grey levels of the views of each row."""
    return {row.key: views.mean((1, 2, 3)).tolist() for row, views in reading.read_all(outputs, num_views)}


def test_folders_of_pictures_are_rows_and_other_counts_are_left_out(tmp_path):
    write_views(tmp_path / "a_red_mug", range(12))  # view 10 comes after view 9
    write_views(tmp_path / "car", range(12))
    write_views(tmp_path / "few", range(3))
    (tmp_path / "broken").mkdir()
    write_views(tmp_path / "broken", range(12))
    (tmp_path / "broken" / "5.png").write_bytes(b"no picture")
    (tmp_path / "notes.doc").touch()
    [outputs] = finding.find(Source("x", tmp_path))
    assert outputs.rows["a red mug"].prompt == "a red mug"
    assert means(outputs) == {"a red mug": list(range(12)), "car": list(range(12))}
    assert left_out(outputs, Rule.NUM_VIEWS) == ["few"]
    assert left_out(outputs, Rule.UNREADABLE) == ["broken"]
    assert left_out(outputs, Rule.STRANGE) == ["notes.doc"]
    assert list(outputs.rows) == ["a red mug", "car"]
    assert means(outputs, 4)["car"] == [0, 3, 6, 9]
    assert means(outputs, 13) == {} and len(left_out(outputs, Rule.NUM_VIEWS)) == 3


def test_a_list_of_prompts_is_what_rows_are_joined_to(tmp_path):
    for name in ("mug", "A_Blue_Car!", "ship"):
        write_views(tmp_path / "out" / name, [1, 2])
    write_image(tmp_path / "mug.png", picture(9))
    asked = [
        {"prompt": "a red mug", "image": "mug.png"},
        {"prompt": "a blue car"},
        {"prompt": "a dog", "image": "gone.png"},
    ]
    (tmp_path / "prompts.json").write_text(json.dumps(asked))
    [outputs] = finding.find(Source("x", tmp_path / "out"), finding.read_prompts(tmp_path / "prompts.json"))
    assert list(outputs.rows) == ["a red mug", "a blue car"]  # in the order of the list
    mug, car = outputs.rows.values()
    assert (mug.prompt, mug.picture) == ("a red mug", tmp_path / "mug.png")
    assert (car.prompt, car.picture) == ("a blue car", None)
    assert left_out(outputs, Rule.MISSING) == ["a dog"] and left_out(outputs, Rule.NOT_ASKED) == ["ship"]


def test_pictures_of_one_name_stand_for_no_prompt(tmp_path):
    asked = [{"prompt": p, "image": f"{p}/rgba.png"} for p in ("cat", "dog")] + [
        {"prompt": "rat", "image": "cat.png"}
    ]
    (tmp_path / "prompts.json").write_text(json.dumps(asked))
    names = [each.names for each in finding.read_prompts(tmp_path / "prompts.json")]
    assert names == [{"cat"}, {"dog"}, {"rat"}]  # and "cat" is a prompt


def test_the_convention_that_finds_most_is_used_and_numbers_are_places(tmp_path):
    write_views(tmp_path / "thumbnails", [1, 2])
    for name in ("000.mp4", "001.mp4"):
        write_video(tmp_path / name, np.full((16, 16, 16, 3), 0.5))
        (tmp_path / name.replace("mp4", "json")).touch()
    [outputs] = finding.find(Source("x", tmp_path))
    assert outputs.layout.kind == Kind.VIDEO and list(outputs.rows) == ["number 0", "number 1"]
    assert not any(row.prompt for row in outputs.rows.values())
    assert left_out(outputs, Rule.STRANGE) == ["thumbnails"]
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    [outputs] = finding.find(Source("x", tmp_path), finding.read_prompts(tmp_path / "prompts.txt"))
    assert [row.prompt for row in outputs.rows.values()] == ["a cat", "a dog"]


def test_of_several_runs_of_a_prompt_one_is_taken_and_the_others_are_named(tmp_path):
    for run in ("a_cat@20250102-1/save/it10", "a_cat@20250102-1/save/it9", "a_cat@20250101-7/save/it99"):
        write_views(tmp_path / run, [int(run.rpartition("it")[2])])
    layout = Layout(Kind.IMAGES, ("{prompt}@*/save/it{step}",))
    [outputs] = finding.find(Source("x", tmp_path, layout))
    assert means(outputs) == {"a cat": [99]}  # the greatest step; of equal ones it would be the last run
    assert left_out(outputs, Rule.DOUBLE) == [
        "a_cat@20250102-1/save/it10",
        "a_cat@20250102-1/save/it9",
    ]


def test_views_may_be_files_of_one_folder_or_tiles_of_one_picture(tmp_path):
    for number in range(11):
        write_image(tmp_path / f"flat/mug_3_{number}.png", picture(number))
        write_image(tmp_path / f"flat/car_{number}.png", picture(20 + number))
    [flat] = finding.find(Source("x", tmp_path / "flat", Layout(Kind.IMAGES, ("{name}_{view}.png",))))
    assert means(flat) == {"mug 3": list(range(11)), "car": list(range(20, 31))}
    assert flat.rows["car"].prompt == ""  # a name is no prompt

    tiles = np.concatenate([np.concatenate([picture(3 * r + c) for c in range(3)], 1) for r in range(2)])
    write_image(tmp_path / "grid/0.png", tiles)
    write_image(tmp_path / "grid/1.png", picture(0, 9))
    layout = Layout(Kind.GRID, ("{index}.png",), grid=(2, 3), tiles=(0, 2, 4))
    [grid] = finding.find(Source("x", tmp_path / "grid", layout))
    assert means(grid) == {"number 0": [0, 2, 4]}
    assert left_out(grid, Rule.NUM_VIEWS) == ["number 1"]


def test_videos_are_read_at_even_frames(tmp_path):
    frames = np.repeat(np.linspace(0, 1, 32)[:, None, None, None], 3, -1) * np.ones((1, 32, 32, 1))
    write_video(tmp_path / "a_mug.mp4", frames)
    write_video(tmp_path / "short.mp4", frames[:8])
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "a_mug.txt").write_text("a mug of tea\n")
    [outputs] = finding.find(Source("x", tmp_path))
    assert outputs.rows["a mug of tea"].prompt == "a mug of tea"
    found = means(outputs)
    np.testing.assert_allclose(found["a mug of tea"], 255 * np.arange(16) * 2 / 31, atol=3)
    assert left_out(outputs, Rule.NUM_VIEWS) == ["short"]
    assert left_out(outputs, Rule.UNREADABLE) == ["broken"]
    assert list(found) == ["a mug of tea"]
    assert len(means(outputs, 32)["a mug of tea"]) == 32


def test_meshes_are_rendered_from_their_cameras_with_their_axis_up(tmp_path):
    """A triangle in the plane y = 0 of a file is seen from the equator if z is up, and edge-on if y is."""
    corners = [f"v {x} 0 {z} 1 0 0" for x, z in ((-1, -1), (1, -1), (0, 1))]
    (tmp_path / "fin.obj").write_text("\n".join([*corners, "f 1 2 3", ""]))
    covered = {}
    for up in (layouts.Up.Y, layouts.Up.Z):
        layout = Layout(
            Kind.MESH, ("{name}.obj",), azimuths_deg=(90.0, 270.0), elevations_deg=(0.0,), num_views=2, up=up
        )
        [outputs] = finding.find(Source("x", tmp_path, layout))
        [(_, views)] = reading.read_all(outputs)
        assert views.shape == (2, 256, 256, 4) and views.dtype == np.uint8
        covered[up] = views[..., 3].mean((1, 2)) / 255
    # Scaled into the ball of radius 0.5 its area is 1/4; the square that is seen has sides of 4 tan 16.9 deg.
    np.testing.assert_allclose(covered["z"], 0.25 / (4 * np.tan(np.deg2rad(16.9))) ** 2, rtol=0.01)
    assert (covered["y"] < 0.01).all()


def write_asset(folder, prompt, seed=0, **told):
    report = {"prompt": prompt, "image": "", "seed": seed, "config_digest": "abc", **told}
    write_views(folder / "images", [seed, seed + 1])
    (folder / "report.json").write_text(json.dumps(report))


def test_assets_of_im3d_show_renders_and_the_views_of_the_last_round(tmp_path):
    write_asset(tmp_path / "assets/000000", "A red mug.", seed=3)
    write_asset(tmp_path / "assets/000001", "a red mug", seed=2)
    write_asset(tmp_path / "assets/000002", "a car")
    for number in (2, 10):
        write_views(tmp_path / f"assets/000001/views_{number}/images", [number, number])
    write_image(tmp_path / "assets/000002/input.png", picture(1))
    (tmp_path / "assets/000003").mkdir()
    (tmp_path / "assets/000003/error.json").write_text("{}")
    renders, views = finding.find(Source("ours", tmp_path))
    assert (renders.shows, views.shows) == (Shows.RENDERS, Shows.VIEWS)
    assert means(renders) == {"a car": [0, 1], "a red mug": [2, 3]}  # of the least seed
    assert means(views) == {"a red mug": [10, 10]}
    assert renders.rows["a car"].picture.name == "input.png"
    assert renders.rows["a red mug"].picture is None  # the first round's views, which show it, were not saved
    write_views(tmp_path / "assets/000001/views_0/images", [1])
    (tmp_path / "assets/000001/views_0/images/0.png").rename(
        tmp_path / "assets/000001/views_0/images/000.png"
    )
    [again, _] = finding.find(Source("ours", tmp_path))
    assert again.rows["a red mug"].picture.parts[-3:] == ("views_0", "images", "000.png")
    assert left_out(renders, Rule.DOUBLE) == ["000000"] and left_out(renders, Rule.FAILED) == ["000003"]
    assert left_out(views, Rule.MISSING) == ["000002"]


def test_names_that_are_not_utf8_are_shown_with_marks(tmp_path):
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    write_views(tmp_path / name, [1])
    (tmp_path / f"{name}x.doc").touch()
    [outputs] = finding.find(Source("x", tmp_path))
    assert list(outputs.rows) == ["caf"] and outputs.rows["caf"].prompt == "caf?"
    assert left_out(outputs, Rule.STRANGE) == ["caf?x.doc"] and means(outputs) == {"caf": [1]}
    json.dumps(outputs.about()).encode()


def test_the_digest_is_of_what_is_used(tmp_path):
    def digest():
        [outputs] = finding.find(Source("x", tmp_path))
        return outputs.digest

    write_views(tmp_path / "mug", [1, 2])
    before = digest()
    assert digest() == before
    write_views(tmp_path / "mug", [1, 3])
    assert digest() != before


def test_a_yaml_describes_a_method(tmp_path):
    write_views(tmp_path / "renders/mug", [1])
    described = tmp_path / "mine.yaml"
    described.write_text("root: renders\nkind: images\npath: '{name}'\nshows: views\nelevations_deg: 30\n")
    source = layouts.read(described)
    assert (source.name, source.root) == ("mine", tmp_path / "renders")
    assert source.layout == Layout(Kind.IMAGES, ("{name}",), Shows.VIEWS, elevations_deg=(30.0,))
    [outputs] = finding.find(source)
    assert outputs.label == "mine, views" and means(outputs) == {"mug": [1]}


MISTAKES = {
    "kind: [": "line 1: is not YAML",
    "kind: images\nkind: video": "line 1: is not YAML .*'kind' stands there twice",
    "name: " + "x" * 41: "is no name of a method",
    "- a": "is no YAML with entries",
    "kinds: images": "unknown entry 'kinds'; is it 'kind'",
    "path: '{name}'": "there is no kind; give one of images, grid",
    "kind: pictures\npath: '{name}'": "kind is 'pictures'; give one of",
    "kind: images": "needs a path",
    "kind: images\npath: '{nme}'": r"has \{nme\}; there is \{name\}",
    "kind: images\npath: 'a/b'": "does not say whose row it is",
    "kind: images\npath: '../{name}'": "is not below the root",
    "kind: images\npath: '{name}/{name}'": "has one field twice",
    "kind: grid\npath: '{name}.png'": r"grid is \[rows, columns\]",
    "kind: grid\npath: '{name}.png'\ngrid: [1, 4]\ntiles: [4]": "are not of a grid",
    "kind: images\npath: '{name}'\nnum_views: -1": "num_views is -1; give a whole number from 0",
    "kind: images\npath: '{name}'\nnum_views: 4\nazimuths_deg: [0, 90]": "azimuths_deg is of 2 views, and",
    "kind: mesh\npath: '{name}.obj'\nazimuths_deg: [0, 90]\nelevations_deg: [1, 2, 3]": "and azimuths_",
    "kind: grid\npath: '{name}.png'\ngrid: [1, 4]\nnum_views: 3": "grid is of 4 views, and num_views of 3",
    "kind: mesh\npath: '{name}.obj'\nup: -y": "of meshes it is y or z",
    "preset: nothing": "unknown preset 'nothing'",
    "root: [1]": "root is",
    "kind: images\npath: '{name}'\nroot: gone": "is no directory",
    "kind: images\npath: '{name}'\nprompts: gone.txt": "gone.txt cannot be read",
    "kind: mesh\npath: '{name}.obj'": "nothing is left in",
    "root: .": "has no assets of im3d, folders of pictures",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_mistakes_are_one_line(text, tmp_path, user_error):
    path = Path(tmp_path / "method.yaml")
    path.write_text(text)
    with user_error(MISTAKES[text]):
        finding.find(layouts.read(path))


@pytest.mark.parametrize("others", [["0_mask.png", "1_mask.png", "2_mask.png"], ["input.png"], ["1.jpg"]])
def test_pictures_that_are_not_views_alone_are_left_out(others, tmp_path):
    write_views(tmp_path / "mug", range(3))
    for name in others:
        write_image(tmp_path / "mug" / name, picture(9))
    [outputs] = finding.find(Source("x", tmp_path))
    assert means(outputs) == {} and left_out(outputs, Rule.UNREADABLE) == ["mug"]
    layout = Layout(Kind.IMAGES, ("{name}/{view}.png",))
    [outputs] = finding.find(Source("x", tmp_path, layout))
    assert means(outputs) == {"mug": [0, 1, 2]}


def test_views_with_names_of_their_own_are_taken(tmp_path):
    for value, name in enumerate(("back", "front", "left", "right")):
        write_image(tmp_path / "mug" / f"{name}.png", picture(value))
    [outputs] = finding.find(Source("x", tmp_path))
    assert means(outputs) == {"mug": [0, 1, 2, 3]}


def test_alpha_that_is_opaque_everywhere_is_none(tmp_path):
    rgba = np.full((2, 8, 8, 4), 255, np.uint8)
    for clear, channels in ((False, 3), (True, 4)):
        rgba[1, 0, 0, 3] = 0 if clear else 255
        for view in range(2):
            write_image(tmp_path / "mug" / f"{view}.png", rgba[view])
        [outputs] = finding.find(Source("x", tmp_path))
        [(_, views)] = reading.read_all(outputs)
        assert views.shape[-1] == channels


def test_what_assets_took_is_that_of_their_reports_or_of_the_layout(tmp_path):
    for number, (calls, seconds) in enumerate(((60, 90.0), (80, 30.0), (None, "long"))):
        folder = tmp_path / "out/assets" / f"00000{number}"
        write_views(folder / "images", [0])
        write_views(folder / "views_0/images", [0])
        told = {"prompt": f"p{number}", "config_digest": "1", "network_calls": calls}
        (folder / "report.json").write_text(json.dumps(told | {"seconds": {"total": seconds}}))
    renders, views = finding.find(Source("x", tmp_path / "out"))
    assert renders.cost == (70, 1.0) and renders.about()["minutes"] == 1.0
    assert views.cost == (0, 0) and views.about()["network_calls"] is None
    layout = Layout(Kind.IMAGES, ("{name}/images",), network_calls=25_000, minutes=120.0)
    assert finding.find(Source("x", tmp_path / "out/assets", layout))[0].cost == (25_000, 120)


def test_numbers_that_count_prompts_from_1_are_refused(tmp_path, user_error):
    (tmp_path / "prompts.txt").write_text("a\nb\nc\n")
    asked = finding.read_prompts(tmp_path / "prompts.txt")
    for number in (1, 2):
        write_views(tmp_path / "out" / str(number), [number])
    [outputs] = finding.find(Source("x", tmp_path / "out"), asked)  # the first may be missing
    assert list(outputs.rows) == ["b", "c"] and left_out(outputs, Rule.MISSING) == ["a"]
    write_views(tmp_path / "out/3", [3])
    with user_error("its numbers go from 1 to 3, and those of 3 prompts from 0 to 2"):
        finding.find(Source("x", tmp_path / "out"), asked)

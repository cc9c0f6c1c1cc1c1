"""All sources and renderers of this package keep their contracts: `Source`, `BatchSource` and `Renderer`."""

import numpy as np
import pytest
import trimesh

from im3d_jax.data import BatchSource, Renderer, Source, turntables, views
from im3d_jax.data.meshes.reading import UpAxis
from im3d_jax.data.rendering import MeshRenderer, ProceduralRenderer, Turntable
from im3d_jax.data.sources import ProceduralSource
from im3d_jax.data.turntables import TurntableSource

SIZE, VIEWS = 8, 3
TURNTABLE = Turntable(SIZE, VIEWS, elevation_deg=None, seed=1)


@pytest.fixture(scope="module")
def renderers(tmp_path_factory):
    directory = tmp_path_factory.mktemp("meshes")
    for name, extents in {"flat": (2, 2, 1), "tall": (1, 1, 2)}.items():
        trimesh.creation.box(extents).export(directory / f"{name}.ply")
    meshes = MeshRenderer(directory, {"tall": "a tall box"}, UpAxis.Z, TURNTABLE)
    return {"procedural": ProceduralRenderer(2, TURNTABLE), "meshes": meshes}


@pytest.mark.parametrize("kind", ["procedural", "meshes"])
def test_renderers_make_turntables(kind, renderers):
    renderer = renderers[kind]
    assert isinstance(renderer, Renderer)
    assert len(set(renderer.names)) == len(renderer.names) == 2
    first, second = (renderer.render(name) for name in renderer.names)
    for made in (first, second):
        assert made.rgba.shape == (VIEWS, SIZE, SIZE, 4) and len(made.cameras) == VIEWS
        assert made.rgba.min() >= 0 and made.rgba.max() <= 1 and made.rgba[..., 3].any()
        assert views.check_turntable(made.cameras) == pytest.approx(made.elevation_rad, abs=1e-5)
        assert 0 <= made.elevation_rad <= np.pi / 4
    assert first.elevation_rad != second.elevation_rad and (first.rgba != second.rgba).any()
    again = renderer.render(renderer.names[0])
    np.testing.assert_array_equal(again.rgba, first.rgba)
    assert (again.caption, again.elevation_rad) == (first.caption, first.elevation_rad)


def test_a_fixed_elevation_is_that_of_all_objects(renderers):
    renderer = ProceduralRenderer(1, TURNTABLE._replace(elevation_deg=30.0))
    assert renderer.render(renderer.names[0]).elevation_rad == pytest.approx(np.pi / 6)
    assert renderers["meshes"].without_caption == ["flat"]


def test_sources_give_the_same_example_again(renderers, tmp_path):
    made = [renderers["procedural"].render(name) for name in renderers["procedural"].names]
    for number, each in enumerate(made):
        views.write_object(tmp_path / "views" / str(number), *each)
    records = [views.read_object(tmp_path / "views" / str(number), str(number)) for number in range(2)]
    turntables.write(tmp_path / "data", (("train", record) for record in records), ["train"])
    stored = TurntableSource(tmp_path / "data")
    procedural = ProceduralSource(seed=1, first_object=20_000, size=SIZE, num_views=VIEWS)
    assert isinstance(procedural, BatchSource) and not isinstance(stored, BatchSource)
    for source in (procedural, stored):
        assert isinstance(source, Source) and len(source) >= 2
        first, again = source[1], source[1]
        assert first["id"] == again["id"] != source[0]["id"]
        assert first["caption"] == made[1].caption
        assert first["elevation_rad"] == pytest.approx(made[1].elevation_rad, abs=1e-4)
    assert stored[1]["rgb"].shape == (VIEWS, SIZE, SIZE, 3)
    assert procedural[1]["scene"]["w2c"].shape == (VIEWS, 4, 4)

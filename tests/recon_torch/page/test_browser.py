"""The page in Debian's Chromium: it draws what `im3d render` draws, and asks nobody for anything."""

import base64
import io

import numpy as np
import pytest
import trimesh
from PIL import Image

from recon_torch.mesh.beside import write_beside as write_mesh
from recon_torch.page import contents, html
from recon_torch.raster.render import render_images
from recon_torch.settings import MeshSettings
from tests.recon_torch.page.conftest import CAMERAS, HOSTILE

pytestmark = pytest.mark.slow
SIZE_PX = 160


def drawn(browser, view, panel=0):
    """What the page draws from a view, in [0, 1]: its Gaussians, or what else it shows beside them."""
    draw = f"""const [view, panel, done] = arguments;
        im3d.then((stage) => stage.picture(view, {SIZE_PX}, panel))
            .then(done, (error) => done(error.stack))"""
    sent = {"c2w": view.c2w.ravel().tolist(), "fovDeg": view.fov_deg}
    url = browser.execute_async_script(draw, sent, panel)
    assert url.startswith("data:image/png;base64,"), url
    picture = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")
    return np.asarray(picture) / 255


def decibels(first, second):
    return -10 * np.log10(np.mean((first - second) ** 2))


def test_the_page_shows_the_asset(asset, blobs, browser, tmp_path):
    html.write(contents.read(asset), tmp_path / "page.html")
    browser.get((tmp_path / "page.html").as_uri())
    for index, view in enumerate(contents.read(asset).views[:2]):
        expected = render_images(blobs, CAMERAS[[index]].resized(SIZE_PX, SIZE_PX))[0]
        assert decibels(drawn(browser, view), expected) > 35
    assert browser.find_element("id", "title").text.startswith("</script>")
    assert browser.title.startswith("</script>"), "the title of the page is text, too"
    assert HOSTILE in browser.find_element("css selector", "#facts ul").get_attribute("textContent")
    asked = "return performance.getEntriesByType('resource').map((each) => each.name.slice(0, 5))"
    assert set(browser.execute_script(asked)) <= {"data:", "blob:"}
    assert not browser.get_log("browser")


def traced(path, view):
    """The mesh of a GLB from a view of the page, with its texture as it is: a ray through each pixel."""
    mesh = trimesh.load(path, force="mesh")
    rows, columns = (np.mgrid[:SIZE_PX, :SIZE_PX] + 0.5) / (SIZE_PX / 2) - 1
    slope = np.tan(np.deg2rad(view.fov_deg) / 2)
    rays = np.stack([slope * columns, -slope * rows, -np.ones_like(rows)], -1).reshape(-1, 3)
    rays = rays @ view.c2w[:3, :3].T
    places, which, triangles = mesh.ray.intersects_location(
        np.tile(view.c2w[:3, 3], (len(rays), 1)), rays, multiple_hits=False
    )
    shares = trimesh.triangles.points_to_barycentric(mesh.triangles[triangles], places)
    uv = (mesh.visual.uv[mesh.faces[triangles]] * shares[..., None]).sum(1)
    picture = np.ones((len(rays), 3))
    colours = trimesh.visual.color.uv_to_interpolated_color(uv, mesh.visual.material.baseColorTexture)
    picture[which] = colours[:, :3] / 255
    return picture.reshape(SIZE_PX, SIZE_PX, 3)


def test_the_page_shows_the_mesh_of_the_asset(asset, browser, tmp_path):
    settings = MeshSettings(resolution=48, texture=128, triangles=3000)
    assert "error" not in write_mesh(asset, settings, None)
    shown = contents.read(asset)
    html.write(shown, tmp_path / "page.html")
    browser.get((tmp_path / "page.html").as_uri())
    for view in shown.views[:2]:
        picture, expected = drawn(browser, view, panel=1), traced(asset / "mesh.glb", view)
        inside, wanted = (picture < 0.98).any(-1), (expected < 0.98).any(-1)
        assert (inside & wanted).sum() / (inside | wanted).sum() > 0.97
        assert decibels(picture, expected) > 28
    assert not browser.get_log("browser")

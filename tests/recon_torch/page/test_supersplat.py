"""SuperSplat's viewer (npm @playcanvas/supersplat-viewer) shows `asset.ply` upright and from the front.

IM3D_SUPERSPLAT names the directory of its site, node_modules/@playcanvas/supersplat-viewer/public.
"""

import functools
import http.server
import io
import os
import shutil
import threading
import time

import numpy as np
import pytest
from PIL import Image

from recon_torch.files import write_json
from recon_torch.raster.render import render_images
from tests.recon_torch.page.conftest import CAMERAS, page_points

SITE = os.environ.get("IM3D_SUPERSPLAT", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SITE, reason="IM3D_SUPERSPLAT names no site of SuperSplat's viewer"),
]
SIZE_PX, FOV_DEG, PATIENCE_S = 160, 33.8, 60
EFFECTS = {
    "sharpness": {"enabled": False, "amount": 0},
    "bloom": {"enabled": False, "intensity": 0, "blurLevel": 2},
    "grading": {"enabled": False, "brightness": 1, "contrast": 1, "saturation": 1, "tint": [1, 1, 1]},
    "vignette": {"enabled": False, "intensity": 0, "inner": 0.3, "outer": 0.75, "curvature": 1},
    "fringing": {"enabled": False, "intensity": 0},
}


def settings(position):
    """The viewer's settings, with a camera in its own world, which is Y up."""
    pose = {"position": position.tolist(), "target": [0, 0, 0], "fov": FOV_DEG}
    return {
        "version": 2,
        "tonemapping": "none",
        "highPrecisionRendering": False,
        "background": {"color": [1, 1, 1]},
        "postEffectSettings": EFFECTS,
        "animTracks": [],
        "cameras": [{"initial": pose}],
        "annotations": [],
        "startMode": "default",
    }


@pytest.fixture
def site(tmp_path, asset):
    """The viewer's site with an asset, on loopback."""
    shutil.copytree(SITE, tmp_path / "site")
    shutil.copy(asset / "asset.ply", tmp_path / "site")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "site")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield tmp_path / "site", f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def decibels(first, second):
    return -10 * np.log10(np.mean((first - second) ** 2))


def test_supersplat_shows_the_asset_as_it_is_rendered(site, blobs, browser):
    folder, address = site
    metrics = {"width": SIZE_PX, "height": SIZE_PX, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    for index in (0, 1):
        write_json(folder / "settings.json", settings(page_points(CAMERAS.positions[index])))
        browser.get(f"{address}/?content=asset.ply&noui&noanim&webgl&nofx&camera={index}")
        expected = render_images(blobs, CAMERAS[[index]].resized(SIZE_PX, SIZE_PX))[0]
        shown, until = 0.0, time.monotonic() + PATIENCE_S
        while shown < 25 and time.monotonic() < until:
            picture = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
            shown = decibels(np.asarray(picture) / 255, expected)
        assert shown > 25
        assert decibels(np.asarray(picture)[::-1] / 255, expected) < 20

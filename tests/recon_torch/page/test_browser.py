"""The page in Debian's Chromium: it draws what `im3d render` draws, and asks nobody for anything."""

import base64
import io
import shutil

import numpy as np
import pytest
from PIL import Image

from recon_torch.page import contents, html
from recon_torch.raster.render import render_images
from tests.recon_torch.page.conftest import CAMERAS, HOSTILE

webdriver = pytest.importorskip("selenium.webdriver")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver"),
]
SIZE_PX = 160


@pytest.fixture
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    quiet = ("networking", "timer-throttling")
    for flag in (
        *("headless=new", "no-sandbox", "no-first-run", "disable-sync", "disable-component-update"),
        *(
            "use-angle=swiftshader",
            "enable-unsafe-swiftshader",
            *(f"disable-background-{name}" for name in quiet),
        ),
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_script_timeout(120)
    yield driver
    driver.quit()


def test_the_page_shows_the_asset(asset, blobs, browser, tmp_path):
    html.write(contents.read(asset), tmp_path / "page.html")
    browser.get((tmp_path / "page.html").as_uri())
    draw = f"""const [view, done] = arguments;
        im3d.then((stage) => stage.picture(view, {SIZE_PX})).then(done, (error) => done(error.stack))"""
    for index, view in enumerate(contents.read(asset).views[:2]):
        sent = {"c2w": view.c2w.ravel().tolist(), "fovDeg": view.fov_deg}
        url = browser.execute_async_script(draw, sent)
        assert url.startswith("data:image/png;base64,"), url
        picture = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")
        expected = render_images(blobs, CAMERAS[[index]].resized(SIZE_PX, SIZE_PX))[0]
        error = np.mean((np.asarray(picture) / 255 - expected) ** 2)
        assert -10 * np.log10(error) > 35
    assert browser.find_element("id", "title").text.startswith("</script>")
    assert browser.title.startswith("</script>"), "the title of the page is text, too"
    assert HOSTILE in browser.find_element("css selector", "#facts ul").get_attribute("textContent")
    asked = "return performance.getEntriesByType('resource').map((each) => each.name.slice(0, 5))"
    assert set(browser.execute_script(asked)) <= {"data:", "blob:"}
    assert not browser.get_log("browser")

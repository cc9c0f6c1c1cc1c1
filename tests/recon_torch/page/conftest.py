"""A small asset as `im3d generate` writes it, with a prompt that would break a careless page; a browser."""

import shutil

import numpy as np
import pytest
import torch

from recon_torch.files import write_json
from recon_torch.formats.ply import save_ply
from recon_torch.raster.gaussians import SH_C0, Gaussians
from recon_torch.raster.render import render_images
from recon_torch.views.cameras import orbit
from recon_torch.views.directory import write_views
from recon_torch.views.images import contact_sheet, write_image

HOSTILE = "</script><script>document.title='gone'</script><img src=x onerror=alert(1)> & \u2028"
CAMERAS = orbit(5, 0.4, 48)


@pytest.fixture(scope="session")
def blobs() -> Gaussians:
    """Blobs of unlike sizes and colours: red in front (+X), green at the left (+Y), blue on top."""
    colors = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.7, 0.1], [0.1, 0.2, 0.9], [0.4, 0.4, 0.4]])
    return Gaussians(
        means=torch.tensor([[0.3, 0.0, -0.1], [0.0, 0.35, 0.0], [0.0, 0.05, 0.4], [-0.05, 0.0, -0.05]]),
        quats=torch.tensor([[1.0, 0.2, 0.1, 0.3]]).repeat(4, 1),
        log_scales=torch.tensor(
            [[0.08, 0.05, 0.06], [0.05] * 3, [0.04, 0.09, 0.05], [0.12, 0.1, 0.15]]
        ).log(),
        opacity_logits=torch.tensor([4.0, 3.0, 5.0, 4.0]),
        sh0=(colors - 0.5) / SH_C0,
    )


@pytest.fixture
def asset(tmp_path, blobs):
    """Its directory."""
    folder = tmp_path / "asset"
    folder.mkdir()
    save_ply(blobs, folder / "asset.ply")
    images = render_images(blobs, CAMERAS)
    write_views(folder, CAMERAS, images, "images")
    write_image(folder / "views.png", contact_sheet([images[:1], *[images] * 4], ["a", "b", "c", "d", "e"]))
    report = {
        "prompt": HOSTILE,
        "seed": 7,
        "num_gaussians": 4,
        "seconds": {"fit": 1.25, "total": 2.0},
        "quality": {"verdict": "suspect", "reasons": [HOSTILE], "hints": []},
        "rounds": [{"psnr": 20.04}, {"psnr": 30.06}],
        "notes": ["a note"],
    }
    write_json(folder / "report.json", report)
    return folder


@pytest.fixture
def browser():
    """Debian's Chromium without a window."""
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver_path = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver_path):
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
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
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver_path))
    driver.set_script_timeout(120)
    yield driver
    driver.quit()


def page_points(points: np.ndarray) -> np.ndarray:
    """Points of the world in glTF's axes."""
    return points[..., [1, 2, 0]]

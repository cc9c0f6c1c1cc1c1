"""The page in Debian's Chromium, on a screen and on a phone, under a scripted annotator."""

import shutil
import socket
import subprocess
import sys
import time

import pytest

from im3d_jax.study import annotators, plan
from im3d_jax.study.store import Store
from tests.im3d_jax.study.conftest import HOSTILE

webdriver = pytest.importorskip("selenium.webdriver")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver"),
]


@pytest.fixture
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("headless=new", "no-sandbox", "no-first-run", "disable-sync", "disable-component-update"):
        options.add_argument(f"--{flag}")
    options.add_argument("--disable-background-networking")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Served:
    """`im3d study serve` in a process of its own, which can be killed and started again."""

    def __init__(self, directory, url):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "im3d_jax", "study", "serve", str(directory)]
        self._command = [*command, f"--database={url}", f"--port={self.port}"]

    def start(self):
        self.process = subprocess.Popen(self._command, stdout=subprocess.PIPE)
        assert self.process.stdout.readline().startswith(b"http://127.0.0.1")

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


def until(condition, seconds=180):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_an_annotator_answers_by_keys_and_clicks_while_the_server_dies(directory, tmp_path, browser):
    study, url = plan.read(directory), f"sqlite:///{tmp_path}/answers.sqlite"
    token = list(annotators.read(directory))[1]
    served = Served(directory, url)
    served.start()
    store = Store(study, url)
    find = lambda name: browser.find_element("id", name)  # noqa: E731
    is_ready = lambda: find("question").is_displayed() and find("left").is_enabled()  # noqa: E731
    prompt = lambda: find("prompt").get_attribute("textContent")  # noqa: E731
    keys = webdriver.common.keys.Keys
    try:
        browser.get(f"http://127.0.0.1:{served.port}/a/{token}/")
        until(lambda: find("begin").is_displayed())
        find("begin").click()
        until(is_ready)
        playing = "return [...document.querySelectorAll('video')].every((v) => !v.paused && v.videoWidth > 0)"
        until(lambda: browser.execute_script(playing))
        browser.refresh()
        until(is_ready)
        shown = [prompt()]
        browser.find_element("tag name", "body").send_keys(keys.ARROW_LEFT)
        until(lambda: len(store.answers()) == 1 and is_ready())
        shown.append(prompt())

        served.kill()
        # Twice, as of a hand that shakes; and the page is left while its answer has no server.
        browser.execute_script("const b = document.getElementById('right'); b.click(); b.click()")
        until(lambda: "Your answer is kept" in find("status").text)
        served.start()
        browser.refresh()
        until(lambda: len(store.answers()) == 2)
        until(is_ready)
        while find("question").is_displayed():
            shown.append(prompt())
            if find("left").is_enabled():
                browser.execute_script("document.getElementById('left').click()")
            time.sleep(0.1)
        assert "your share" in find("note-text").text
        assert HOSTILE in shown and browser.title == "Which is better?"
        choices = [answer.choice for answer in store.answers()]
        assert choices == ["left", "right", *["left"] * (len(choices) - 2)] and len(choices) >= 3
        asked = "return performance.getEntriesByType('resource').map((each) => new URL(each.name).host)"
        assert set(browser.execute_script(asked)) == {f"127.0.0.1:{served.port}"}
        errors = [each for each in browser.get_log("browser") if "CONNECTION_REFUSED" not in each["message"]]
        assert not errors, errors
    finally:
        store.close()
        served.kill()


@pytest.mark.parametrize("size", [(390, 844), (844, 390), (1280, 800)])
def test_both_videos_and_their_buttons_fit_the_screen(directory, tmp_path, browser, size):
    token = list(annotators.read(directory))[2]
    served = Served(directory, f"sqlite:///{tmp_path}/answers.sqlite")
    served.start()
    try:
        metrics = dict(width=size[0], height=size[1], deviceScaleFactor=1, mobile=size[0] != 1280)
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.get(f"http://127.0.0.1:{served.port}/a/{token}/")
        until(lambda: browser.find_element("id", "begin").is_displayed())
        browser.find_element("id", "begin").click()
        until(lambda: browser.find_element("id", "left").is_enabled())
        boxes = browser.execute_script(
            "return ['left', 'right'].map((id) => document.getElementById(id).getBoundingClientRect())"
        )
        for box in boxes:
            assert box["left"] >= 0 and box["right"] <= size[0]
            assert box["top"] >= 0 and box["bottom"] <= size[1]
            assert box["width"] >= 150
        assert boxes[0]["right"] <= boxes[1]["left"] and boxes[0]["top"] == boxes[1]["top"]
    finally:
        served.kill()

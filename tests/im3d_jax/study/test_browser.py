"""The page in Debian's Chromium, on a screen and on a phone, under a scripted annotator."""

import shutil
import socket
import subprocess
import sys
import time

import pytest
from PIL import Image

from im3d_jax.study import FILES, STUDY, annotators, drawing, plan
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


def until(condition, seconds=60):
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


@pytest.fixture
def pictured(source, tmp_path):
    """A study of one prompt with a picture, without checks."""
    path = tmp_path / "pictured"
    (path / FILES).mkdir(parents=True)
    Image.new("RGB", (300, 300), "blue").save(tmp_path / "car.png")
    found, settings = (
        [source("ours", "a blue car"), source("base", "a blue car")],
        drawing.Settings(check_share=0.0, num_annotators=5),
    )
    plan.write(
        drawing.draw(found, {"a blue car": tmp_path / "car.png"}, settings, path / FILES), path / STUDY
    )
    annotators.write(path / "annotators.csv", 5)
    return path


@pytest.fixture
def opened(pictured, tmp_path, browser):
    """The first annotator's first question, and what `im3d study serve` keeps."""
    url, token = f"sqlite:///{tmp_path}/answers.sqlite", next(iter(annotators.read(pictured)))
    served = Served(pictured, url)
    served.start()
    store = Store(plan.read(pictured), url)
    try:
        browser.get(f"http://127.0.0.1:{served.port}/")
        browser.find_element("id", "code").send_keys(
            f"http://127.0.0.1:{served.port}/a/{token}/\n"
        )  # or the token
        until(
            lambda: (
                browser.find_elements("id", "begin") and browser.find_element("id", "begin").is_displayed()
            )
        )
        browser.find_element("id", "begin").click()
        until(lambda: is_ready(browser))
        yield store
    finally:
        store.close()
        served.kill()


def is_ready(browser):
    return (
        browser.find_element("id", "left").is_displayed() and browser.find_element("id", "left").is_enabled()
    )


BOXES = "return ['left', 'right'].map((id) => document.getElementById(id).getBoundingClientRect())"
SIZES = [(390, 844), (844, 390), (1280, 800), (1366, 640)]


def test_both_videos_and_their_buttons_fit_the_screen(opened, browser):
    kinds = set()
    for _ in range(2):
        kinds.add(browser.find_element("id", "reference").is_displayed())
        for width, height in SIZES:
            metrics = dict(width=width, height=height, deviceScaleFactor=1, mobile=width < 1000)
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            boxes = browser.execute_script(BOXES)
            for box in boxes:
                assert box["left"] >= 0 and box["right"] <= width
                assert box["top"] >= 0 and box["bottom"] <= height
                assert box["width"] >= 150
            assert boxes[0]["right"] <= boxes[1]["left"] and boxes[0]["top"] == boxes[1]["top"]
        browser.find_element("tag name", "body").send_keys(webdriver.common.keys.Keys.ARROW_LEFT)
        until(lambda: len(opened.answers()) == len(kinds))
        if len(kinds) == 1:
            until(lambda: is_ready(browser))
    assert kinds == {True, False}, "with the picture and without"


def test_neither_a_slow_double_click_nor_another_tab_answers_unseen(opened, browser):
    [first] = browser.window_handles
    browser.switch_to.new_window("tab")
    second = browser.current_window_handle
    browser.switch_to.window(first)
    home = browser.current_url
    browser.switch_to.window(second)
    browser.get(home)
    until(lambda: is_ready(browser))
    browser.switch_to.window(first)
    # The next question stands there at once; no person has seen its videos a third of a second later.
    click = "const b = document.getElementById('left'); b.click(); setTimeout(() => b.click(), 300)"
    browser.execute_script(click)
    until(lambda: browser.find_element("id", "count").text == "2 of 2" and is_ready(browser))
    assert [answer.choice for answer in opened.answers()] == ["left"]
    browser.switch_to.window(second)  # which has the first question still
    browser.execute_script("document.getElementById('right').click()")
    until(lambda: browser.find_element("id", "count").text == "2 of 2" and is_ready(browser))
    assert [answer.choice for answer in opened.answers()] == ["left"]


def test_a_browser_that_waits_for_a_touch_takes_none_as_an_answer(opened, browser):
    """As phones that save power do."""
    refuse = """{ let isTouched = false; const { play } = HTMLMediaElement.prototype;
        addEventListener("pointerup", () => (isTouched = true), true);
        HTMLMediaElement.prototype.play = function () {
          return isTouched ? play.call(this) : Promise.reject(new DOMException("", "NotAllowedError"));
        } }"""
    browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": refuse})
    browser.refresh()
    until(lambda: "Touch the page" in browser.find_element("id", "status").text and is_ready(browser))
    browser.find_element("id", "left").click()
    until(
        lambda: browser.execute_script(
            "return [...document.querySelectorAll('video')].every((v) => !v.paused)"
        )
    )
    assert opened.answers() == []
    time.sleep(0.6)  # from here on a click is an answer
    browser.find_element("id", "left").click()
    until(lambda: len(opened.answers()) == 1)


def test_a_question_waits_for_a_file_that_is_gone_for_a_while(opened, pictured, browser):
    browser.find_element("tag name", "body").send_keys(webdriver.common.keys.Keys.ARROW_LEFT)
    until(lambda: len(opened.answers()) == 1 and is_ready(browser))
    video = browser.find_element("css selector", "#left video").get_attribute("src").rpartition("/")[2]
    path = pictured / FILES / video
    path.rename(path.with_suffix(".away"))
    browser.execute_cdp_cmd("Network.clearBrowserCache", {})
    browser.refresh()
    until(lambda: "cannot be loaded" in browser.find_element("id", "status").text)
    assert not browser.find_element("id", "left").is_enabled()
    path.with_suffix(".away").rename(path)
    until(lambda: is_ready(browser))
    assert not browser.find_element("id", "status").is_displayed()

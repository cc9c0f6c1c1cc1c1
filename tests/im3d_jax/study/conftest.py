"""A small study of two methods, with real videos and a prompt that would break a careless page."""

import subprocess

import imageio_ffmpeg
import pytest

from im3d_jax.study import FILES, STUDY, annotators, drawing, plan, sources

HOSTILE = "</script><script>document.title='gone'</script><img src=x onerror=alert(1)> & ${left_1}"
KEY = sources.key_of(HOSTILE)


def made_up(num_prompts=6, num_checks=2, **changes):
    """A study without files: `ours` is left in items of even numbers, and right in the others."""
    videos, items, checks = {}, [], []
    for number in range(num_prompts):
        for method in ("ours", "base"):
            videos[f"{method}{number}"] = plan.Video(method, f"p{number}", f"{method}{number}.mp4", "0" * 64)
        for question in plan.QUESTIONS:
            sides = [f"ours{number}", f"base{number}"][:: 1 if len(items) % 2 == 0 else -1]
            items.append(plan.Item(f"q{len(items):05d}", f"p{number}", question, *sides))
    for number in range(num_checks):
        checks.append(plan.Item(f"q9{number:04d}", "p0", "quality", "ours0", "base0", "right"))
    settings = dict(seed=3, answers_per_item=5, check_every=5, num_annotators=10)
    return plan.Study(
        **settings | changes,
        methods=["ours", "base"],
        pairs=[["ours", "base"]],
        questions=plan.QUESTIONS,
        prompts={f"p{number}": plan.Prompt(f"prompt {number}") for number in range(num_prompts)},
        videos=videos,
        items=items,
        checks=checks,
    )


def write_test_video(path, size="32x32", seconds=0.25):
    source = f"testsrc2=size={size}:rate=24:duration={seconds}"
    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", "-f", "lavfi", "-i", source]
    subprocess.run([*ffmpeg, "-pix_fmt", "yuv420p", str(path)], check=True)


@pytest.fixture(scope="session")
def video(tmp_path_factory):
    """A video of six frames."""
    path = tmp_path_factory.mktemp("video") / "turntable.mp4"
    write_test_video(path)
    return path


@pytest.fixture(scope="session")
def source(video):
    """A method's name and prompts -> its turntables."""

    def make(name, *prompts):
        turntables = {sources.key_of(prompt): sources.Turntable(prompt, video) for prompt in prompts}
        return sources.Source(name, turntables)

    return make


@pytest.fixture(scope="session")
def directory(tmp_path_factory, source):
    """A whole study in its directory."""
    path = tmp_path_factory.mktemp("study")
    (path / FILES).mkdir()
    found = [source("ours", HOSTILE, "a blue car"), source("base", HOSTILE, "a blue car")]
    settings = drawing.Settings(num_annotators=10, check_share=0.25)
    plan.write(drawing.draw(found, {}, settings, path / FILES), path / STUDY)
    annotators.write(path / "annotators.csv", 10)
    return path

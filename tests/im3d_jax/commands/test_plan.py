"""`im3d plan` on shipped configs: its numbers agree with each other, and mistakes are one line."""

import json

import pytest

from im3d_jax import config_flags, main
from im3d_jax.diffusion import sampler, schedules

pytestmark = pytest.mark.slow


def run(capsys, tmp_path, *arguments):
    code = main.run(["plan", *arguments, f"--json={tmp_path / 'plan.json'}"])
    output = capsys.readouterr()
    assert code == 0, output.err
    return output.out, json.loads((tmp_path / "plan.json").read_text())


def test_the_shipped_config(capsys, tmp_path):
    text, numbers = run(capsys, tmp_path, "--config=configs/tiny.py", "--utilisation=0.5")
    asset = numbers["generate"]
    assert asset["video"]["calls"] == 80 and asset["image"]["evaluations_per_call"] == 2
    flops = 80 * asset["video"]["flops_per_call"] + 40 * asset["image"]["flops_per_call"]
    assert asset["asset"]["flops"] == flops
    assert asset["weights_bytes"] == 4 * numbers["parameters"]["total"]
    assert "train" not in numbers and "published" not in text and "fits" in text


def test_steps_without_guidance_are_counted_by_themselves(capsys, tmp_path):
    """Of the 40 steps and the 4 times 10 of the rounds, those outside the interval have one evaluation."""
    config = config_flags.with_overrides(
        "configs/tiny.py", {"video.w_text": 3.0, "video.guidance_interval": (0.2, 0.6)}
    )
    schedule = schedules.make_schedule(**config.schedule)
    whole, restart = (
        sampler.make_steps(schedule, *each).sigmas[:-1] for each in ((40,), (10, "trailing", 0.7))
    )
    guided = sum(
        int(((each >= 0.2) & (each <= 0.6)).sum()) * times for each, times in ((whole, 1), (restart, 4))
    )
    flags = "--config.video.w_text=3.0", "--config.video.guidance_interval=(0.2, 0.6)"
    text, numbers = run(capsys, tmp_path, "--config=configs/tiny.py", *flags)
    asset = numbers["generate"]
    found = {
        name: (asset[name]["calls"], asset[name]["evaluations_per_call"]) for name in ("video", "video_1")
    }
    assert 0 < guided < 80 and found == {"video": (guided, 2), "video_1": (80 - guided, 1)}
    assert "video_1" in text
    flops = sum(asset[name]["calls"] * asset[name]["flops_per_call"] for name in ("image", *found))
    assert asset["asset"]["flops"] == flops


def test_a_pipeline_draws_the_image(capsys, tmp_path):
    pipeline = "--config.text_to_image.pipeline=some/directory"
    text, numbers = run(capsys, tmp_path, "--config=configs/tiny.py", pipeline)
    assert "image" not in numbers["generate"] and "40 calls" not in text
    assert numbers["generate"]["asset"]["flops"] == 80 * numbers["generate"]["video"]["flops_per_call"]


def test_the_papers_size(capsys, tmp_path):
    """With residual blocks at two levels and attention at one: tracing all of them takes a minute."""
    cut = [
        f"--config.backbone.kwargs.{each}"
        for each in ("num_res_blocks=(1, 0, 0, 1)", "attention_levels=(0,)")
    ]
    paper = "--config=configs/paper_512.py", *cut, "--accelerator=a100"
    text, numbers = run(capsys, tmp_path, *paper, "--mesh=data=40,fsdp=2")
    step, asset = numbers["train"], numbers["generate"]
    assert asset["video"]["evaluations_per_call"] == 3 and step["batch_per_device"] == 3
    assert step["trained_parameters"] == numbers["parameters"]["temporal"]
    held = step["bytes_per_device"]
    counts = numbers["parameters"]  # float32 where they train, bfloat16 where not, on two devices
    assert held["weights"] == pytest.approx((4 * counts["temporal"] + 2 * counts["spatial"]) / 2, rel=0.01)
    assert held["optimizer"] == pytest.approx(2 * held["ema"], rel=0.01)
    kept = step["bytes_kept_for_backward"]
    assert kept["nothing_saveable"] < 0.1 * kept[""]
    seconds = step["flops_per_step"] / (80 * 0.4 * 312e12)
    assert step["seconds_per_step"] == pytest.approx(seconds)
    assert step["device_bytes"] == sum(held.values()) and step["fits"] == (step["device_bytes"] < 80e9)
    assert "published 1.7 G" in text and numbers["published"]["note"] in " ".join(text.split())


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--mesh=data"], "AXIS=NUMBER"),
        (["--mesh=data=0"], "AXIS=NUMBER"),
        (["--mesh=data=2,data=2"], "each axis once"),
        (["--mesh=model=2"], "data, fsdp, tensor"),
        (["--accelerator=v100"], "a100, h100"),
        (["--utilisation=40"], "--utilisation: '40' is not a number above 0 and at most 1"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, words):
    assert main.run(["plan", "--config=configs/tiny.py", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1

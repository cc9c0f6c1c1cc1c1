"""Training of the elevation estimator: data, augmentation, shrunk runs, and the shipped result."""

import io
import json
import math
import os
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from im3d_jax import config_flags, config_sections, pipeline
from im3d_jax.commands import train_elevation
from im3d_jax.config_kinds import ElevationConfig
from im3d_jax.data import objects, procedural
from im3d_jax.data.turntables import Record, write
from im3d_jax.training import elevation as training
from im3d_jax.training.watch import NotFinite
from recon_torch import hosting
from recon_torch.elevation import estimator as elevation
from recon_torch.errors import UserError
from recon_torch.files import make_directory
from recon_torch.views.cameras import orbit
from recon_torch.views.images import to_uint8

pytestmark = pytest.mark.slow


@pytest.fixture
def config():
    return config_flags.load("configs/elevation_tiny.py")


CLEAN = dict(noise=0.0, blur_px=0.0, shift_px=0, colour=0.0)


def test_batches_are_the_objects_at_their_elevations(config, monkeypatch):
    """Sets of 4 frames a quarter apart; each object is rendered once, whatever the order."""
    config.update(num_objects=4, batch_size=4)
    made = []
    make = objects.on_turntables
    monkeypatch.setattr(
        objects, "on_turntables", lambda seed, i, *more: made.append(i) or make(seed, i, *more)
    )
    settings = config_sections.read(config, "config", ElevationConfig)
    source = train_elevation.open_split(settings, "train", 4, num_views=8)
    examples = train_elevation.open_examples(settings, source, 4, start=0, shuffle=True)
    videos = [each for _ in range(3) for each in next(examples)]
    examples.close()
    assert sorted(sum(made, [])) == [20_000, 20_001, 20_002, 20_003]
    assert len({tuple(each["id"] for each in videos[i : i + 4]) for i in (0, 4, 8)}) > 1  # shuffled anew
    expected = procedural.turntables(0, range(20_000, 20_004), size=64, num_views=8)
    for each in videos[:8]:
        row = int(each["id"].removeprefix("procedural/")) - 20_000
        assert each["elevation_rad"] == pytest.approx(objects.elevation_rad(0, 20_000 + row))
        np.testing.assert_allclose(each["rgb"], expected.views.rgb[row], atol=0.501 / 255)


SHRINK = dict(num_objects=4, num_test_objects=4, num_views=4, num_steps=4, batch_size=4, log_every=1)


def run(workdir, **settings):
    settings = SHRINK | settings
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    train_elevation.main(["--workdir", str(workdir), *flags])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Workdir of a run that was not interrupted."""
    workdir = tmp_path_factory.mktemp("whole")
    run(workdir)
    return workdir


def same_bytes(a, b, name):
    return (a / name).read_bytes() == (b / name).read_bytes()


def test_interrupted_and_resumed_is_uninterrupted(whole, tmp_path, monkeypatch, capsys):
    def stop_at_2(*arguments, step=train_elevation.train_step):
        if arguments[-1] == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train_elevation, "train_step", stop_at_2)
        with pytest.raises(SystemExit) as ended:
            run(tmp_path)
    assert ended.value.code == 75 and not (tmp_path / "elevation.safetensors").exists()
    assert not same_bytes(whole, tmp_path, "checkpoint.safetensors")
    run(tmp_path)
    assert same_bytes(whole, tmp_path, "checkpoint.safetensors")
    assert same_bytes(whole, tmp_path, "elevation.safetensors")
    logs = [(each / "metrics.jsonl").read_text().splitlines() for each in (whole, tmp_path)]
    losses = [[json.loads(line)["elevation_loss"] for line in log] for log in logs]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    assert capsys.readouterr().out.count("median error") == 2  # on true and on degraded views


def test_a_run_goes_on_only_with_what_it_was_trained_by(whole, tmp_path):
    with pytest.raises(UserError, match=r"config\.batch_size 4, now 8; use another --workdir"):
        run(whole, batch_size=8)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="checkpoint.safetensors is not of an earlier run"):
        run(tmp_path)
    shutil.copy(whole / "checkpoint.safetensors", tmp_path)  # by which a run is known that has no marker
    with pytest.raises(UserError, match="now 8; use another --workdir"):
        run(tmp_path, batch_size=8)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="is text, .*or remove it to start anew"):
        run(tmp_path)


def test_a_checkpoint_that_does_not_fit_is_named(whole, tmp_path, user_error):
    path = tmp_path / "checkpoint.safetensors"
    with safe_open(whole / "checkpoint.safetensors", "pt") as file:
        good = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        metadata = file.metadata()
    bias, other = good["estimator.head.2.bias"], {"im3d": "[]"}
    cases = [
        ({"estimator.head.2.bias": bias * math.nan}, metadata, "estimator.head.2.bias holds NaN"),
        ({"optimizer.0.exp_avg": good["optimizer.0.exp_avg"] * 1j}, metadata, "exp_avg is complex64"),
        ({"estimator.head.2.bias": bias[:0]}, metadata, "its weights are of another"),
        ({"optimizer.0.exp_avg": bias.clone()}, metadata, "its moments are of another"),
        ({"x": bias.clone()}, metadata, "is damaged"),
        ({}, other, "is damaged"),
    ]
    for changes, told, words in cases:
        save_file(good | changes, path, told)
        with user_error(f"checkpoint.safetensors.*{words}.*remove it to start anew"):
            run(tmp_path)


@pytest.fixture
def broken_step(monkeypatch):
    """The second step's frames are NaN."""
    calls = []

    def degrade(frames, *arguments, whole=training.degrade):
        calls.append(frames)
        return whole(frames, *arguments) * (math.nan if len(calls) == 2 else 1)

    monkeypatch.setattr(training, "degrade", degrade)


def test_what_is_not_finite_stops_with_its_objects(broken_step, tmp_path):
    with pytest.raises(NotFinite, match=r"step 2 of elevation .*loss nan.*objects procedural/2000[0-7], "):
        run(tmp_path)
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_what_is_not_finite_can_be_passed_over(broken_step, tmp_path):
    run(tmp_path, max_skipped=1)
    assert all(
        value.isfinite().all() for value in elevation.load(tmp_path / "elevation.safetensors").parameters()
    )


def test_renders_on_disk_train_as_those_made_on_the_way(tmp_path, config):
    def records():
        made = render_four(20_000, SHRINK["num_views"])
        for rgb, alpha, angle in zip(
            *map(np.asarray, made.views[:2]), map(float, made.elevation_rad), strict=True
        ):
            straight = (rgb - (1 - alpha)) / np.maximum(alpha, 1e-6)
            views = [png(to_uint8(each)) for each in np.concatenate([straight, alpha], -1)]
            yield "train", Record(str(angle), "", orbit(len(views), angle, 64), angle, views)

    write(tmp_path / "data", records(), ["train"])
    config.update(SHRINK)
    losses = []
    for path in ("", str(tmp_path / "data")):
        config.data.path = path
        workdir = make_directory(tmp_path / f"run{len(losses)}")
        train_elevation.train(config, workdir)
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["elevation_loss"] for line in lines])
    np.testing.assert_allclose(*losses, rtol=0.02)
    assert len(losses[0]) == 4 and losses[0] != losses[1]  # PNG files hold colours without their background


def render_four(first, num_views=8):
    return procedural.turntables(0, range(first, first + 4), size=64, num_views=num_views)


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_training_fits_a_few_videos(config, tmp_path):
    config.update(SHRINK | dict(num_objects=8, num_views=8, num_steps=120, log_every=120))
    config.augment.update(CLEAN)
    estimator, is_done = train_elevation.train(config, tmp_path)
    errors_rad = []
    for made in map(render_four, (20_000, 20_004)):
        with torch.no_grad():
            estimates = estimator(torch.from_numpy(np.array(made.views.rgb[:, ::2])))
        errors_rad.append(np.abs(estimates.numpy() - made.elevation_rad))
    error_deg = np.degrees(np.mean(errors_rad))
    assert is_done and error_deg < 4  # the middle of the range is 10 degrees off on average


class Plates:
    """Turntables of a round plate, which is seen as an ellipse of height sin(elevation)."""

    def __init__(self, first, num_views):
        self.first, self.num_views = first, num_views

    def __len__(self):
        return 48

    def __getitem__(self, index):
        angle, radius = np.random.default_rng(self.first + index).uniform((0, 0.6), (np.pi / 4, 0.9))
        y, x = np.mgrid[-1:1:32j, -1:1:32j]
        plate = (x / radius) ** 2 + (y / (radius * max(np.sin(angle), 0.05))) ** 2 < 1
        frame = np.float32(1 - 0.8 * plate)[..., None].repeat(3, -1)
        return dict(id=f"plate/{index}", rgb=np.stack([frame] * self.num_views), elevation_rad=angle)


def test_a_head_on_features_of_dino(tmp_path, config, monkeypatch, capsys):
    """From training to what `im3d generate` loads; even a random transformer's features tell plates apart."""
    hosting.declare()
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)
    sizes |= dict(mlp_ratio=2, layerscale_value=1.0, initializer_range=0.2)
    transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).save_pretrained(tmp_path / "dino")
    monkeypatch.setattr(
        train_elevation,
        "open_source",
        lambda data, *, num_views, **_: Plates(len(data.split) * 100, num_views),
    )
    settings = dict(size=32, num_views=4, num_test_objects=32, num_steps=100, batch_size=16)
    clean = {f"augment.{name}": amount for name, amount in CLEAN.items()}
    run(tmp_path / "run", **settings, **clean, dino=tmp_path / "dino", learning_rate=0.01, log_every=50)
    true_deg = np.degrees([Plates(400, 1)[index]["elevation_rad"] for index in range(32)])
    constant_deg = np.abs(true_deg - np.median(true_deg)).mean()
    found_deg = float(re.search(r"true views: .* mean ([\d.]+)", capsys.readouterr().out)[1])
    assert found_deg < constant_deg / 2

    config = config_flags.load("configs/tiny.py")
    config.elevation.update(
        weights=str(tmp_path / "run" / "elevation.safetensors"), dino=str(tmp_path / "dino")
    )
    estimator = pipeline.load_estimator(config)
    errors_deg = [
        abs(np.degrees(elevation.estimate(estimator, torch.from_numpy(Plates(400, 16)[index]["rgb"]))) - true)
        for index, true in enumerate(true_deg)
    ]
    assert np.mean(errors_deg) == pytest.approx(found_deg, abs=0.01)
    config.elevation.dino = ""
    with pytest.raises(UserError, match="fit another model"):
        pipeline.load_estimator(config)
    with pytest.raises(UserError, match="config.elevation.dino: no config.json in 'elsewhere'"):
        run(tmp_path / "other", dino="elsewhere")


def test_shipped_weights_on_test_objects(config):
    config.num_test_objects = 16
    settings = config_sections.read(config, "config", ElevationConfig)
    errors_deg = train_elevation.errors_on_test_deg(elevation.load(), settings, degraded=False)
    assert np.median(errors_deg) < 3

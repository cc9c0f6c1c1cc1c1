"""Data sets of turntables: what was written is read, without TensorFlow; damage is named by record."""

import io
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from im3d_jax.data import CorruptRecord, turntables
from im3d_jax.data.input_pipeline import Shard, open_stream
from im3d_jax.data.turntables import Record, TurntableSource
from recon_torch.errors import UserError
from recon_torch.views import cameras

pytestmark = pytest.mark.slow

SIZE, VIEWS, TRAIN, TEST = 16, 4, 8, 3
PIXELS = np.random.default_rng(0).integers(0, 256, (TRAIN + TEST, VIEWS, SIZE, SIZE, 4), np.uint8)
TEXT = np.random.default_rng(1).normal(size=(TRAIN + TEST, 2, 5, 3)).astype(np.float16)


def png(pixels, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, **({"format": "PNG"} | options))
    return buffer.getvalue()


def record(number, **changes):
    elevation_rad = 0.05 * number
    values = dict(
        id=f"part/object {number}",
        caption=f"a cat, {number}\u00d7",
        cameras=cameras.orbit(VIEWS, elevation_rad, SIZE),
        elevation_rad=elevation_rad,
        views=[png(view) for view in PIXELS[number]],
    )
    return Record(**(values | changes))


def write(path, records, **options):
    placed = [("train" if number < TRAIN else "test", each) for number, each in enumerate(records)]
    return turntables.write(path, placed, ["train", "validation", "test"], **options)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(turntables, "OBJECTS_PER_SHARD", 3)


@pytest.fixture
def data(tmp_path):
    """A data set of three shards of training objects and one of test objects."""
    path = tmp_path / "data"
    counts = write(path, map(record, range(TRAIN + TEST)), metadata={"made_by": "a test"})
    assert counts == {"train": TRAIN, "validation": 0, "test": TEST}
    return path


@pytest.mark.parametrize("num_views", [None, 4, 2, 1])
def test_what_was_written_is_read(data, num_views):
    source = TurntableSource(data, size=SIZE, num_views=num_views)
    assert (len(source), source.metadata["made_by"]) == (TRAIN, "a test")
    for number in (7, 0, 3, 5, 2):  # of any shard, in any order
        example = source[number]
        truth = PIXELS[number, :: VIEWS // (num_views or VIEWS)].astype(np.float64) / 255
        alpha = truth[..., 3:]
        np.testing.assert_allclose(example["rgb"], truth[..., :3] * alpha + (1 - alpha), atol=1e-6)
        np.testing.assert_allclose(example["alpha"], alpha, atol=1e-6)
        assert example["rgb"].dtype == example["alpha"].dtype == np.float32
        assert example["id"] == f"train-0000{number // 3}/{number % 3}/part/object {number}"
        assert example["caption"] == f"a cat, {number}\u00d7"
        assert example["elevation_rad"] == pytest.approx(0.05 * number)
        assert not {"text", "text_mask", "image_tokens", "latents"} & set(example)
    test = TurntableSource(data, "test")
    assert [test[n]["id"].split("/")[-1] for n in range(3)] == ["object 8", "object 9", "object 10"]


def test_latents_and_embeddings_are_read(tmp_path):
    latents = np.random.default_rng(2).normal(size=(TRAIN, VIEWS, 2, 2, 8)).astype(np.float16)
    mask = np.array([1, 1, 0, 0, 0], np.float32)

    def encoded(number):
        embeddings = dict(text=tuple(TEXT[number]), text_mask=(mask, mask[:3]), image_tokens=TEXT[number, 0])
        return record(number, views=None, latents=latents[number], **embeddings)

    write(tmp_path / "data", map(encoded, range(TRAIN)))
    example = TurntableSource(tmp_path / "data", size=SIZE, num_views=2)[4]
    assert "rgb" not in example and example["latents"].dtype == np.float32
    np.testing.assert_array_equal(example["latents"], latents[4, ::2])
    np.testing.assert_array_equal(example["text"], TEXT[4])
    np.testing.assert_array_equal(example["image_tokens"], TEXT[4, 0])
    for found, expected in zip(example["text_mask"], (mask, mask[:3]), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_tfds_alone_reads_a_data_set_too(data):
    fields = tfds.builder_from_directory(data).as_data_source("train")[6]
    np.testing.assert_array_equal(fields["views"], PIXELS[6])
    orbit = cameras.orbit(VIEWS, 0.05 * 6, SIZE)
    np.testing.assert_array_equal(fields["w2c"], orbit.w2c)
    np.testing.assert_array_equal(fields["intrinsics_px"], orbit.intrinsics_px)


def test_tensorflow_is_not_imported(data, tmp_path):
    program = f"""
import sys
from im3d_jax.data import turntables
from recon_torch.views import cameras
source = turntables.TurntableSource({str(data)!r})
assert source[1]["rgb"].shape == ({VIEWS}, {SIZE}, {SIZE}, 3)
record = turntables.Record("a", "", cameras.orbit(1, 0.0, 8), 0.0, latents=source[0]["alpha"])
turntables.write({str(tmp_path / "new")!r}, [("train", record)], ["train"])
assert "tensorflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_several_threads_read_what_one_thread_reads(data):
    source = TurntableSource(data)
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(source.__getitem__, [n % TRAIN for n in range(64)]))
    for number, example in enumerate(read):
        np.testing.assert_array_equal(example["rgb"], source[number % TRAIN]["rgb"])


# ---- Damage ----


def corrupt(path):
    """{index: message} of the records that cannot be read; the others are as they were written."""
    source, messages = TurntableSource(path), {}
    for number in range(len(source)):
        try:
            np.testing.assert_allclose(
                source[number]["alpha"][..., 0], PIXELS[number, ..., 3] / 255, atol=1e-6
            )
        except CorruptRecord as error:
            messages[number] = str(error)
    return messages


def damage(content, how):
    return {
        "cut off": content[: len(content) // 2],
        "empty": b"",
        "overwritten": content[:2000] + bytes(range(256)) + content[2256:],
        "noise": np.random.default_rng(0).bytes(len(content)),
    }[how]


@pytest.mark.parametrize("how", ["cut off", "empty", "overwritten", "noise"])
def test_a_damaged_shard_loses_only_its_own_records(data, how):
    shard = data / "turntables-train.array_record-00001"
    shard.write_bytes(damage(shard.read_bytes(), how))
    messages = corrupt(data)
    assert messages and set(messages) <= {3, 4, 5}
    for number, message in messages.items():
        assert message.startswith(f"{data}/train-00001/{number - 3} (")
        assert "\n" not in message


BAD_VIEWS = {
    "another size": (png(PIXELS[0, 0, :8, :8]), r"view 2 is 8x8 RGBA, not 16x16 RGBA"),
    "no alpha": (png(PIXELS[0, 0, ..., :3]), r"view 2 is 16x16 RGB, not 16x16 RGBA"),
    "another format": (png(PIXELS[0, 0, ..., :3], format="JPEG"), r"cannot identify image file"),
    "cut off": (png(PIXELS[0, 0])[:300], r"truncated"),
    "no picture": (b"", r"cannot identify image file"),
}


@pytest.mark.parametrize("kind", BAD_VIEWS)
def test_a_bad_picture_is_named_by_record_and_view(tmp_path, kind):
    content, message = BAD_VIEWS[kind]
    bad = record(3)
    bad.views = [*bad.views[:2], content, bad.views[3]]
    write(tmp_path / "data", [record(n) if n != 3 else bad for n in range(5)])
    messages = corrupt(tmp_path / "data")
    assert set(messages) == {3}
    with pytest.raises(CorruptRecord, match=f"train-00001/0 .*{message}"):
        TurntableSource(tmp_path / "data")[3]


def test_an_elevation_that_is_not_finite_is_corrupt(tmp_path):
    write(tmp_path / "data", [record(0, elevation_rad=np.nan)])
    with pytest.raises(CorruptRecord, match="NaN"):
        TurntableSource(tmp_path / "data")[0]


@pytest.mark.parametrize("value", [np.nan, 7e4, -np.inf])
def test_values_beyond_float16_are_refused(tmp_path, value):
    latents = np.zeros((VIEWS, 2, 2, 8))
    latents[1, 0, 0, 3] = value
    with pytest.raises(UserError, match="part/object 0: latents has NaN or values beyond float16"):
        write(tmp_path / "data", [record(0, views=None, latents=latents)])
    assert not (tmp_path / "data").exists()


def test_training_continues_past_a_damaged_shard(data):
    (data / "turntables-train.array_record-00001").write_bytes(b"")
    settings = dict(seed=0, batch_size=4, shard=Shard(0, 1), shuffle=True, num_threads=2, buffer=2)
    stream = open_stream(TurntableSource(data), max_corrupt=3, **settings)
    ids = {example["id"] for _ in range(2) for example in next(stream)}
    assert len(stream.skipped) == 3 and not any("00001/" in each for each in ids)
    stream = open_stream(TurntableSource(data), max_corrupt=2, **settings)
    with pytest.raises(UserError, match="3 corrupt records by batch .*at least 64KB"):
        next(stream), next(stream)


# ---- Mistakes ----

MISTAKES = {
    "no directory": (dict(path="nothing/here"), "no data set in nothing/here: build one"),
    "split": (dict(split="validation"), r"no objects in split 'validation'; there is train, test"),
    "size": (dict(size=64), r"views of 16 px, not 64 px.*--size 64"),
    "views": (dict(num_views=3), r"has 4 views, 3 are no even share of them: give 1, 2, 4"),
    "no views": (dict(num_views=0), r"give 1, 2, 4"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(data, mistake):
    arguments, message = MISTAKES[mistake]
    with pytest.raises(UserError, match=message):
        TurntableSource(**({"path": data} | arguments))


def test_a_missing_shard_is_named(data):
    (data / "turntables-train.array_record-00002").unlink()
    with pytest.raises(UserError, match="train.array_record-00002 is missing"):
        TurntableSource(data)


@pytest.mark.parametrize("file", ["dataset_info.json", "features.json"])
def test_a_damaged_description_is_named(data, file):
    (data / file).write_text("{")
    with pytest.raises(UserError, match="damaged"):
        TurntableSource(data)


def test_another_data_set_is_refused(data):
    info = json.loads((data / "dataset_info.json").read_text())
    (data / "dataset_info.json").write_text(json.dumps(info | {"name": "mnist"}))
    with pytest.raises(UserError, match="holds no turntables"):
        TurntableSource(data)


def test_a_data_set_is_written_whole_or_not_at_all(data, tmp_path):
    def interrupted():
        yield "train", record(0)
        raise KeyboardInterrupt

    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        turntables.write(tmp_path / "new", interrupted(), ["train"])
    with pytest.raises(UserError, match="is there already"):
        write(data, [record(0)])
    with pytest.raises(UserError, match="no objects"):
        write(tmp_path / "new", [])
    assert sorted(tmp_path.iterdir()) == before and not corrupt(data)

"""Embeddings on disk: what the encoders say, resumed after an interruption, and mistakes by name."""

import json

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from im3d_jax.commands import embed
from im3d_jax.conditions import precomputed
from im3d_jax.conditions.encoders import PretrainedText, TokenEncoder
from im3d_jax.conditions.precomputed import PrecomputedText
from recon_torch.errors import UserError

pytestmark = pytest.mark.slow

PROMPTS = ["a cat", "b c", "x", "a cat", "z y", "cat cat"]  # one of them twice


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(precomputed, "SHARD_PROMPTS", 4)
    monkeypatch.setattr(precomputed, "BATCH_PROMPTS", 3)


@pytest.fixture
def settings(clip, t5):
    return [
        dict(kind="clip", path=str(clip / "text_encoder"), max_length=16),
        dict(kind="t5", path=str(t5), max_length=9),
    ]


@pytest.fixture
def encoded(monkeypatch):
    """The prompts that the encoders have seen, in the order they came."""
    seen = []
    original = TokenEncoder.encode
    monkeypatch.setattr(TokenEncoder, "encode", lambda self, new: seen.extend(new) or original(self, new))
    return seen


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("float16", 2e-3)])
def test_what_is_read_is_what_the_encoders_say(settings, tmp_path, dtype, tolerance):
    text = PretrainedText(settings)
    assert precomputed.write(text.encoders, PROMPTS, tmp_path, precomputed.StoredDtype(dtype)) == 6
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "00000.safetensors", "00001.safetensors", "index.json"
    ]  # fmt: skip
    stored, asked = PrecomputedText(tmp_path), ["cat cat", "", "a cat", "", "b c"]
    assert stored.shapes == text.shapes and stored.words == () and stored.warnings("a cat") == []
    for kind, (found, expected) in enumerate(zip(stored.encode(asked), text.encode(asked), strict=True)):
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == np.float32
            np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance if kind == 0 else 0)


def test_what_was_interrupted_goes_on(settings, tmp_path, monkeypatch, encoded):
    text = PretrainedText(settings[:1])
    whole = tmp_path / "whole"
    precomputed.write(text.encoders, PROMPTS, whole)
    original, calls = precomputed.save_file, []

    def fail_at_the_second(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        original(*args, **kwargs)

    parts = tmp_path / "parts"
    monkeypatch.setattr(precomputed, "save_file", fail_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        precomputed.write(text.encoders, PROMPTS, parts)
    assert [file.name for file in parts.iterdir()] == ["00000.safetensors"]
    with pytest.raises(UserError, match="no whole index.json"):
        PrecomputedText(parts)
    monkeypatch.setattr(precomputed, "save_file", original)
    encoded.clear()
    assert precomputed.write(text.encoders, PROMPTS, parts) == 2 and encoded == ["z y", "cat cat"]
    for file in whole.iterdir():
        assert file.read_bytes() == (parts / file.name).read_bytes()
    encoded.clear()
    assert precomputed.write(text.encoders, PROMPTS, parts) == 0 and not encoded


def test_other_prompts_or_encoders_are_encoded_again(settings, tmp_path, encoded):
    precomputed.write(PretrainedText(settings[:1]).encoders, PROMPTS, tmp_path)
    encoded.clear()
    assert precomputed.write(PretrainedText(settings[:1]).encoders, [*PROMPTS, "new"], tmp_path) == 3
    assert encoded == ["z y", "cat cat", "new"]
    other_layer = PretrainedText([settings[0] | dict(layer=-2)]).encoders
    assert precomputed.write(other_layer, PROMPTS, tmp_path) == 6
    assert precomputed.write(other_layer, PROMPTS, tmp_path, precomputed.StoredDtype.FLOAT16) == 6


def test_a_directory_is_checked_when_it_is_read(settings, tmp_path):
    precomputed.write(PretrainedText(settings[:1]).encoders, PROMPTS, tmp_path)
    with pytest.raises(UserError, match="has no prompt 'a dog'; add it to the prompts of `im3d embed`"):
        PrecomputedText(tmp_path).encode(["a cat", "a dog"])
    first, second = tmp_path / "00000.safetensors", tmp_path / "00001.safetensors"
    first.write_bytes(second.read_bytes())
    with pytest.raises(UserError, match="00000.safetensors is missing, damaged or not the index's"):
        PrecomputedText(tmp_path).encode(["a cat"])
    second.write_bytes(second.read_bytes()[:-20])
    with pytest.raises(UserError, match="00001.safetensors is missing, damaged"):
        PrecomputedText(tmp_path).encode(["cat cat"])


@pytest.mark.parametrize("content", ["[1]", "{}", '{"shapes": [], "shards": [{"file": "a"}]}', "<html>"])
def test_an_index_of_something_else_is_named(content, tmp_path, user_error):
    (tmp_path / "index.json").write_text(content)
    with user_error(f"config.text: {tmp_path}/index.json.*; write it with `im3d embed`"):
        PrecomputedText(tmp_path)


def test_embeddings_that_are_not_finite_are_refused(settings, tmp_path, user_error):
    precomputed.write(PretrainedText(settings[:1]).encoders, PROMPTS, tmp_path)
    path = tmp_path / "00000.safetensors"
    with safe_open(path, "np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        metadata = file.metadata()
    tensors["text_0"][1, 0, 0] = np.nan
    save_file(tensors, path, metadata)
    prompt = json.loads((tmp_path / "index.json").read_text())["shards"][0]["prompts"][1]
    with user_error(f"has NaN or infinity for {prompt!r}"):
        PrecomputedText(tmp_path).encode(["", prompt])


CONFIG = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict(dict(text=dict(name={name!r}, kwargs=dict(encoders={encoders!r}))))
"""


def test_the_command(settings, tmp_path, capsys):
    config, prompts, out = tmp_path / "config.py", tmp_path / "prompts.txt", tmp_path / "out"
    config.write_text(CONFIG.format(name="pretrained", encoders=tuple(settings)))
    prompts.write_text("a cat\n\n  b c  \na cat\na b c d e f g h i\n")
    arguments = [f"--config={config}", f"--prompts={prompts}", f"--out={out}"]
    embed.main(arguments)
    captured = capsys.readouterr()
    assert captured.out == f"{out}: 4 prompts, 4 of them encoded now\n"
    assert "the t5 encoder reads 9 tokens and leaves out" in captured.err
    (clip_text, _), _ = PrecomputedText(out).encode(["b c"])
    np.testing.assert_allclose(clip_text, PretrainedText(settings).encode(["b c"])[0][0], atol=1e-5)
    assert json.loads((out / "index.json").read_text())["dtype"] == "float32"

    prompts.write_text("\n \n")
    with pytest.raises(UserError, match="the file is empty"):
        embed.main(arguments)
    prompts.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is UTF-16"):
        embed.main(arguments)
    config.write_text(CONFIG.format(name="words", encoders=()))
    with pytest.raises(UserError, match="config.text.name is 'words'"):
        embed.main(arguments)

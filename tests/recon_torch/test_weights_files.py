"""Files of weights as users bring them: found, or named for what they are."""

import gzip
import io
import json
import os
import pickle
import re
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from recon_torch import weights_files
from recon_torch.errors import UserError

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 3438167536\n"


class Malicious:
    """Whose unpickling would end the test."""

    def __reduce__(self):
        return os._exit, (1,)


def saved(**kwargs):
    """What torch.save writes, with something in it that must not be unpickled."""
    buffer = io.BytesIO()
    torch.save({"state_dict": {"w": torch.zeros(2)}, "bad": Malicious()}, buffer, **kwargs)
    return buffer.getvalue()


def archive(*names):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as opened:
        for name in names:
            opened.writestr(name, b"x")
    return buffer.getvalue()


def tar():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as opened:
        opened.addfile(tarfile.TarInfo("model.bin"), io.BytesIO())
    return buffer.getvalue()


def npy():
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (LFS, "git-lfs pointer.*git lfs pull"),
        (b"/annex/objects/SHA256E-s12--ab.safetensors\n", "git-annex pointer"),
        (b"<!DOCTYPE html><html><title>Log in</title>", "a web page"),
        (b"\n  <HTML>", "a web page"),
        (b'\xef\xbb\xbf<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "XML"),
        (b'{"error": "Repository not found"}', "JSON"),
        (b"Entry not found", "text, which begins with 'Entry not found'"),
        (
            b"Access to model X is restricted.\nYou must be authenticated to access it.",
            "text, which begins with",
        ),
        (saved(), "pickled.*docs/backbones.md"),
        (saved(_use_new_zipfile_serialization=False), "pickled.*docs/backbones.md"),
        (pickle.dumps({"w": Malicious()}), "pickled.*docs/backbones.md"),
        (archive("a.npy", "b.npy"), "archive of NumPy arrays"),
        (archive("model.safetensors"), "zip archive; unpack"),
        (gzip.compress(b"x" * 100, mtime=0), "compressed archive; unpack"),
        (tar(), "tar archive; unpack"),
        (b"GGUF\x03\0\0\0" + b"\x10" * 24, "GGUF"),
        (b"\x89HDF\r\n\x1a\n" + b"\x01" * 20, "HDF5"),
        (npy(), "NumPy array"),
        (bytes(4096), "zeros.*a download that has not ended"),
        (bytes(range(1, 200)), "no safetensors file"),
    ],
)
def test_what_is_no_safetensors_file_is_named(tmp_path, content, words):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words) as error, weights_files.opened(path):
        pass
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_suffix_tells_what_the_bytes_do_not(tmp_path):
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(b"\x81\xa7encoder\x81" + bytes(range(100)))
    with pytest.raises(UserError, match="Flax in msgpack"):
        weights_files.check(path)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(300.0), "b": torch.ones(2, 3)}, path)
    return path


def test_every_cut_and_every_addition_is_noticed(file):
    whole = file.read_bytes()
    weights_files.check(file)
    for length in range(0, len(whole), 29):
        file.write_bytes(whole[:length])
        with pytest.raises(UserError):
            weights_files.check(file)
    file.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=f"cut off: it has {len(whole) - 1:,} of {len(whole):,} bytes"):
        weights_files.check(file)
    file.write_bytes(whole[:60])
    with pytest.raises(UserError, match="cut off within its header"):
        weights_files.check(file)
    file.write_bytes(whole + b"\n")
    with pytest.raises(UserError, match="too long"):
        weights_files.check(file)


@pytest.mark.parametrize(
    "header",
    ['{"a": 1}', "{}}", '{"a": {"data_offsets": ["0", null]}}', '{"a":' * 10_000, "{\xff}"],
)
def test_a_header_that_makes_no_sense_is_refused(tmp_path, header):
    text = header.encode("latin-1")
    (tmp_path / "w").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(UserError, match="its header makes no sense"):
        weights_files.check(tmp_path / "w")


def test_a_pickle_passes_where_torch_reads_it(tmp_path):
    for content in (saved(), saved(_use_new_zipfile_serialization=False)):
        (tmp_path / "vgg.pth").write_bytes(content)
        weights_files.check(tmp_path / "vgg.pth", pickled_too=True)
    (tmp_path / "vgg.pth").write_bytes(LFS)
    with pytest.raises(UserError, match="git-lfs pointer"):
        weights_files.check(tmp_path / "vgg.pth", pickled_too=True)


def test_a_header_that_claims_a_gigabyte_is_not_read(tmp_path):
    (tmp_path / "w").write_bytes(struct.pack("<Q", 2**30) + b"{}")
    with pytest.raises(UserError):
        weights_files.check(tmp_path / "w")


def test_the_lines_in_the_documentation_convert_a_pickle(tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "backbones.md").read_text()
    lines = next(
        block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "torch.load" in block
    )
    shared = torch.arange(6.0).reshape(2, 3)
    state = {"a.weight": shared, "tied.weight": shared, "view": shared.T, "lr": 0.5}
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": state, "epoch": 3}, "model.ckpt")
    exec(lines, {})
    with weights_files.opened("model.safetensors") as file:
        assert sorted(file.keys()) == ["a.weight", "tied.weight", "view"]
        assert torch.equal(file.get_tensor("view"), shared.T)
    torch.save({"bad": Malicious()}, "model.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        exec(lines, {})


def touch(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def index(folder, name, *shards):
    mapping = {f"w{i}": shard for i, shard in enumerate(shards)}
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": mapping}))


SHARDS = ("m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors")


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["diffusion_pytorch_model.safetensors"], ["diffusion_pytorch_model.safetensors"]),
        (["model.fp16.safetensors", "model.safetensors", "config.json"], ["model.safetensors"]),
        (["model.non_ema.safetensors", "model.safetensors"], ["model.safetensors"]),
        (["model.fp16.safetensors"], ["model.fp16.safetensors"]),
        (SHARDS, SHARDS),  # without their index
        (["m.fp16-00001-of-00001.safetensors", *SHARDS], SHARDS),
    ],
)
def test_the_set_of_weights_in_a_directory(tmp_path, names, chosen):
    touch(tmp_path, *names)
    assert [path.name for path in weights_files.find(tmp_path)] == list(chosen)


def test_shards_are_found_from_any_end(tmp_path):
    touch(tmp_path, *SHARDS)
    index(tmp_path, "m.safetensors.index.json", *SHARDS, SHARDS[0])
    for given in (tmp_path, tmp_path / "m.safetensors.index.json", *(tmp_path / name for name in SHARDS)):
        assert [path.name for path in weights_files.find(given)] == list(SHARDS)


def test_missing_shards_are_named(tmp_path):
    touch(tmp_path, SHARDS[0])
    for given in (tmp_path, tmp_path / SHARDS[0]):
        with pytest.raises(UserError, match=f"lacks shard {SHARDS[1]} of the 2"):
            weights_files.find(given)
    index(tmp_path, "m.safetensors.index.json", "../m-00003-of-00003.safetensors", SHARDS[0])
    with pytest.raises(
        UserError, match=r"lacks shard m-00003-of-00003.safetensors of the 2 that m\.safetens"
    ):
        weights_files.find(tmp_path)
    touch(tmp_path / "far", "m-00001-of-99999999.safetensors")
    with pytest.raises(UserError, match="lacks shard m-00002-of-99999999.safetensors"):
        weights_files.find(tmp_path / "far")


@pytest.mark.parametrize(
    "content", ["", "[]", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', LFS.decode()]
)
def test_an_index_that_is_none_is_refused(tmp_path, content):
    (tmp_path / "m.safetensors.index.json").write_text(content)
    with pytest.raises(
        UserError, match=r"(no index of shards|lacks shard any|not JSON|no object|git-lfs pointer)"
    ):
        weights_files.find(tmp_path)


def test_what_a_directory_holds_instead_is_named(tmp_path):
    pipeline = touch(tmp_path / "svd", "model_index.json", "svd_xt.safetensors")
    touch(pipeline / "vae", "diffusion_pytorch_model.safetensors")
    touch(pipeline / "unet", "diffusion_pytorch_model.safetensors")
    touch(tmp_path / "several", "sv3d_p.safetensors", "sv3d_u.safetensors")
    touch(tmp_path / "pickled", "config.json", "pytorch_model.bin")
    touch(tmp_path / "cache/snapshots", "model.safetensors")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "blobs/abc")
    for name, words in {
        "svd": "svd is a whole pipeline; give .*, such as .*svd/unet",
        "several": "several sets of weights, sv3d_p and sv3d_u",
        "pickled": "pytorch_model.bin is pickled; convert it to safetensors",
        "cache": "no .safetensors weights .*cache/snapshots",
        "link.safetensors": "is a link to .*abc, which is not there",
        "nothing": "no .safetensors weights at .*nothing; give a file or a directory",
    }.items():
        with pytest.raises(UserError, match=words):
            weights_files.find(tmp_path / name)


BITS = {  # type -> the bytes 0x01, 0x38, 0x78, 0xc4 by the definition of the type: sign, exponent, mantissa
    torch.float8_e4m3fn: (2.0**-9, 1.0, 256.0, -3.0),
    torch.float8_e5m2: (2.0**-16, 0.5, 32768.0, -4.0),
}


@pytest.mark.parametrize("dtype", BITS)
def test_8_bit_floats_are_what_their_bits_say(tmp_path, dtype):
    stored = torch.tensor([0x01, 0x38, 0x78, 0xC4], dtype=torch.uint8).view(dtype)
    save_file({"w": stored}, tmp_path / "w.safetensors")
    with weights_files.opened(tmp_path / "w.safetensors") as file:
        found = weights_files.to_float32(file.get_tensor("w"), "w", "file")
    np.testing.assert_array_equal(found.numpy(), np.float32(BITS[dtype]))


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.tensor([1e-3, 1e39], dtype=torch.float64), "w holds 1e[+]39, which is too large for float32"),
        (torch.tensor([1, np.nan], dtype=torch.float64), "w holds NaN or infinity"),
        (torch.tensor([1, -np.inf]), "w holds NaN or infinity"),
        (torch.tensor([1, np.inf]).half(), "w holds NaN or infinity"),
        (torch.tensor([0, 0x7F], dtype=torch.uint8).view(torch.float8_e4m3fn), "w holds NaN or infinity"),
        (torch.ones(2, dtype=torch.complex64), "w is complex64"),
        (torch.ones(2, dtype=torch.int8), "w is int8; weights that are quantised"),
        (torch.ones(2, dtype=torch.bool), "w is bool"),
        (torch.ones(2).to(torch.float8_e8m0fnu), "w is float8_e8m0fnu"),
    ],
)
def test_what_float32_does_not_hold_is_refused_by_name(tensor, words):
    with pytest.raises(UserError, match=words):
        weights_files.to_float32(tensor, "w", "file")


def test_other_floats_become_float32():
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        found = weights_files.to_float32(torch.tensor([0.5, -2], dtype=dtype), "w", "file")
        assert found.dtype == torch.float32 and found.tolist() == [0.5, -2]


def test_weights_for_other_libraries_are_plain_floats(tmp_path, user_error):
    """They would take the real part of complex weights, and integers as they are."""
    path, fp8 = tmp_path / "model.safetensors", torch.ones(2).to(torch.float8_e4m3fn)
    good = {"a.weight": torch.ones(2), "position_ids": torch.arange(3), "b.weight": fp8}
    save_file(good, path)
    weights_files.check_directory(tmp_path)
    for name, tensor, words in (
        ("a.weight", torch.ones(2) * 1j, "of type C64"),
        ("scale", torch.ones(2) * 1j, "of type C64"),
        ("a.weight", torch.ones(2, dtype=torch.int8), "of type I8; weights that are quantised"),
        ("a.bias", torch.ones(2, dtype=torch.bool), "of type BOOL"),
        ("b.scale_weight", torch.ones(()), "scales a weight in 8 bits"),
    ):
        save_file({**good, name: tensor}, path)
        with user_error(f"{path}: {name} .*{words}"):
            weights_files.check_directory(tmp_path)

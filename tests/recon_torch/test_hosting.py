"""What hosted models have in common: optional libraries, and their errors as one line."""

import sys

import pytest
from safetensors import SafetensorError

from recon_torch import hosting
from recon_torch.errors import UserError


def test_a_library_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r"diffusers cannot be imported .*pip install \"im3d\[hosted\]\""):
        hosting.library("diffusers")


@pytest.mark.parametrize(
    "error, expected",
    [
        (OSError("no file\nand a long story"), "no file"),
        (RuntimeError("Error(s) in loading:\n\tsize mismatch for a.b\n\tsize"), None),
        (SafetensorError(""), "SafetensorError"),
        (ValueError("x" * 1000), "x" * 200),
    ],
)
def test_errors_of_libraries_become_part_of_a_line(error, expected):
    assert hosting.brief(error) == (expected or "Error(s) in loading: size mismatch for a.b")


def test_the_variant_of_the_weights(tmp_path):
    with pytest.raises(UserError, match="here: no .safetensors weights"):
        hosting.variant(tmp_path, "here")
    (tmp_path / "a").mkdir()
    for name in ("model.fp16.safetensors", "model.fp16-00001-of-00002.safetensors"):
        (tmp_path / "a" / name).touch()
    assert hosting.variant(tmp_path, "here") == "fp16"
    (tmp_path / "a" / "model.safetensors").touch()
    assert hosting.variant(tmp_path, "here") is None

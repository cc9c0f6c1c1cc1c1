"""Text files from any editor, and what is no text or no JSON, which is one clear error."""

import pytest

from recon_torch.text_files import read_json, read_lines, read_settings, read_text

TEXTS = {
    "Linux": b"one\n\n two \nthree",
    "a byte-order mark": b"\xef\xbb\xbfone\n\n two \nthree\n",
    "Windows": b"one\r\n\r\n two \r\nthree\r\n",
    "an old Mac": b"one\r\r two \rthree",
}


@pytest.mark.parametrize("kind", TEXTS)
def test_text_is_the_same_from_every_editor(kind, tmp_path):
    (tmp_path / "a.txt").write_bytes(TEXTS[kind])
    assert list(read_lines(tmp_path / "a.txt")) == [(1, "one"), (3, "two"), (4, "three")]
    assert read_text(tmp_path / "a.txt").strip() == "one\n\n two \nthree"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"one\ntw\xe9", "line 2: is not UTF-8"),
        (b"\xef\xbb\xbf\r\xff\n", "line 2: is not UTF-8"),
        ("one".encode("utf-16"), "is UTF-16; save it as UTF-8"),
        ("one\ntwo".encode("utf-16-le"), "line 1: has a NUL"),
        (b"[1,\n2,\n", "line 3: is not JSON"),
        (b'{"a": 1, "b": {"c": 1, "c": 1}}', "the key 'c' twice"),
        (b"[" * 100_000, "is not JSON that can be read"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a git-lfs pointer.*git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "is a web page"),
    ],
)
def test_what_is_no_text_or_no_json_is_a_user_error(content, message, tmp_path, user_error):
    (tmp_path / "a.json").write_bytes(content)
    with user_error(rf"a\.json.*{message}"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", r"no object of settings but \[1\]"),
        ("[" * 64 + "]" * 64, r"no object of settings but \[\[\["),
        ('{"a": [NaN]}', "holds 'NaN'"),
        ('{"a": {"b": -Infinity}}', "holds '-Infinity'"),
        ('{"a": 1e999}', "holds '1e999'"),
        ('{"a": 1, "a": 2}', "the key 'a' twice"),
        ("", "is not JSON"),
    ],
)
def test_what_is_no_object_of_settings_is_a_user_error(content, message, tmp_path, user_error):
    (tmp_path / "config.json").write_text(content)
    with user_error(rf"config\.json.*{message}"):
        read_settings(tmp_path / "config.json")
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{"a": 1.5}')
    assert read_settings(tmp_path / "config.json") == {"a": 1.5}


def test_json_keeps_what_it_says(tmp_path, user_error):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": [1, "\xe2\x80\xa8"],\r\n"b": {"a": null}}')
    assert read_json(tmp_path / "a.json") == {"a": [1, "\u2028"], "b": {"a": None}}
    for path in (tmp_path / "none.json", tmp_path, tmp_path / "a\0.json"):
        with user_error("cannot be read"):
            read_json(path)

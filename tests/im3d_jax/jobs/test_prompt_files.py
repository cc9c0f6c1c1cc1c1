"""Files of prompts: what they give, and the one line with file and number where they are wrong."""

import json

import pytest

from im3d_jax.jobs import prompt_files
from im3d_jax.jobs.prompt_files import Entry
from recon_torch.errors import UserError


def write(tmp_path, name, text):
    (tmp_path / "car.png").write_bytes(b"looked at when its asset is made")
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_three_formats_say_the_same(tmp_path):
    objects = [{"prompt": "a duck\u2028and <b>"}, {"image": "car.png", "seed": 3, "elevation_deg": -20}]
    image = str(tmp_path / "car.png")
    wanted = [Entry("a duck\u2028and <b>"), Entry("", (image,), 3, -20)]
    lines = "\n\n".join(json.dumps(each, ensure_ascii=False) for each in objects)
    assert prompt_files.read(write(tmp_path, "a.jsonl", lines)) == wanted
    assert prompt_files.read(write(tmp_path, "a.json", json.dumps(objects, indent=3))) == wanted
    text = b"\xef\xbb\xbfa duck\xe2\x80\xa8and <b>\r\n\n  \n../../x \n"
    assert prompt_files.read(write(tmp_path, "a.txt", text)) == [wanted[0], Entry("../../x")]


def test_several_pictures_of_one_object(tmp_path):
    line = '{"image": ["car.png", "./car.png"], "azimuth_deg": [180, 0]}'
    images = (str(tmp_path / "car.png"),) * 2
    assert prompt_files.read(write(tmp_path, "a.jsonl", line)) == [Entry("", images, None, None, (180, 0))]


GOOD = '"a duck"'


@pytest.mark.parametrize(
    "name, text, line, words",
    [
        ("a.jsonl", f"{GOOD}\n\n{{'prompt'", 3, "not JSON"),
        ("a.jsonl", f"{GOOD}\n3", 2, "neither a prompt nor an object"),
        ("a.jsonl", '{"promt": "a duck"}', 1, "unknown key 'promt'"),
        ("a.jsonl", f'{GOOD}\n{{"seed": 3}}', 2, "neither a prompt nor an image"),
        ("a.jsonl", '{"prompt": ["a duck"]}', 1, "'prompt' is no string"),
        ("a.jsonl", '{"prompt": "a", "seed": true}', 1, "'seed' must be"),
        ("a.jsonl", '{"prompt": "a", "seed": -1}', 1, "'seed' must be"),
        ("a.jsonl", '{"prompt": "a", "seed": 2147483648}', 1, "'seed' must be"),
        ("a.jsonl", '{"prompt": "a", "elevation_deg": NaN}', 1, "'elevation_deg' must be"),
        ("a.jsonl", '{"prompt": "a", "elevation_deg": 90}', 1, "'elevation_deg' must be"),
        ("a.jsonl", f'{GOOD}\n{{"image": "none.png"}}', 2, "no image at"),
        ("a.jsonl", '{"image": "car.png\\u0000"}', 1, "NUL"),
        ("a.jsonl", '{"image": ["car.png", 3]}', 1, "'image' is no string"),
        ("a.jsonl", '{"image": ["car.png", "car.png"]}', 1, "2 images, 0 of azimuth-deg"),
        ("a.jsonl", '{"prompt": "a", "azimuth_deg": 90}', 1, "0 images, 1 of azimuth-deg"),
        ("a.jsonl", '"a\\u0000duck"', 1, "NUL"),
        ("a.txt", "a\nb\0", 2, "NUL"),
        ("a.jsonl", '{"seed": 1, "prompt": "a", "seed": 2}', 1, "the key 'seed' twice"),
        ("a.jsonl", '{"' + 5000 * "x" + '": 1}', 1, "unknown key 'xxx"),
        ("a.jsonl", '"half \\ud800"', 1, "lone surrogate"),
        ("a.jsonl", "9" * 5000, 1, "not JSON"),
        ("a.jsonl", "[" * 100_000, 1, "not JSON"),
        ("a.json", f"[{GOOD},\n {GOOD}\n {GOOD}]", 3, "not JSON"),
        ("a.json", f'{{"prompts": [{GOOD}]}}', 1, "is no list"),
        ("a.json", f'\n[\n {GOOD}, {{"prompt":\n "b"}},\n\n  {{"prompt": ""}}]', 6, "neither a prompt nor"),
        ("a.txt", b"a duck\na caf\xe9", 2, "not UTF-8"),
    ],
)
def test_what_is_wrong_has_its_line(name, text, line, words, tmp_path):
    path = write(tmp_path, name, text)
    with pytest.raises(UserError) as caught:
        prompt_files.read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}, line {line}: ") and words in message and "\n" not in message
    assert len(message) < 500


@pytest.mark.parametrize(
    "name, words", [("a.csv", "must end in"), ("a.txt", "is empty"), ("b.txt", "cannot be")]
)
def test_no_prompts_at_all(name, words, tmp_path):
    write(tmp_path, "a.csv", "a duck")
    write(tmp_path, "a.txt", "\n \n")
    with pytest.raises(UserError, match=words):
        prompt_files.read(tmp_path / name)

"""Config files and overrides: types are kept, and every mistake is reported in one line."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import pytest
from ml_collections import ConfigDict

from im3d_jax import config_flags
from im3d_jax.config_kinds import ModelConfig
from recon_torch.errors import CommandParser, UserError
from recon_torch.ranges import Range, settings
from recon_torch.settings import FitSettings, GateSettings

ROOT = Path(__file__).parents[2]
CONFIG = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict({
        "seed": 0, "name": "tiny", "weights": None,
        "fit": {"steps": 1200, "rate": 1e-3, "densify": True, "levels": (1, 2)},
    })
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(CONFIG)
    return path


@settings
class SmallFit:
    steps: Annotated[int, Range(1, 5000)] = 1200
    rate: Annotated[float, Range(0, 10)] = 1e-3
    densify: bool = True
    levels: tuple[Annotated[int, Range(0, 9)], ...] = (1, 2)


@settings
class Small:
    seed: Annotated[int, Range(-9, 9)] = 0
    name: str = "tiny"
    weights: str | None = None
    fit: SmallFit = SmallFit()


def parse(*argv, kind=Small):
    parser = CommandParser("probe", "for this test")
    parser.add_argument("--out")
    return config_flags.parse(list(argv), parser, kind=kind)


def test_flags_and_overrides_keep_types(config_file):
    flags, config = parse(
        f"--config={config_file}", "--config.fit.rate=2", "--out", "x", "--config.fit.densify", "false",
        "--config.fit.levels=[3]", "--config.name=7", "--config.weights=a/b.safetensors",
        "--config.seed", "-1",
    )  # fmt: skip
    assert flags.out == "x"
    assert config.to_dict() == {
        "seed": -1, "name": "7", "weights": "a/b.safetensors",
        "fit": {"steps": 1200, "rate": 2.0, "densify": False, "levels": (3,)},
    }  # fmt: skip
    assert type(config.fit.rate) is float
    assert config.is_locked


def test_every_setting_of_the_fit_and_of_its_gates_can_be_overridden():
    _, config = parse(
        "--config=configs/tiny.py", "--config.fit.lpips_weights=vgg16.pth", "--config.fit.lpips_stages=2",
        "--config.fit.start=hull", "--config.gates.floor_area=0.5", kind=ModelConfig,
    )  # fmt: skip
    changes = dict(lpips_weights="vgg16.pth", lpips_stages=2, start="hull")
    assert FitSettings(**config.fit) == FitSettings(**changes)
    assert GateSettings(**config.gates) == GateSettings(floor_area=0.5, view_motion=0.07)


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--config.fit.stps=3", "unknown config key 'fit.stps'; the nearest is 'fit.steps'"),
        ("--config.fit=3", "unknown config key 'fit'"),
        ("--config.fit.steps=3.5", r"'fit.steps' takes int \(now 1200\), not '3.5'"),
        ("--config.fit.steps=many", "'fit.steps' takes int"),
        ("--config.fit.steps=0", "config.fit.steps is 0; give a whole number from 1 to 5000"),
        ("--config.fit.levels=[3, 10]", r"config.fit.levels is \(3, 10\); give a tuple"),
        ("--config.weights=3", "config.weights is 3; give text, or None"),
        ("--config.fit.rate=nan", "config.fit.rate is nan; give a number from 0 to 10"),
        ("--config.fit.rate=-Infinity", "config.fit.rate is -inf; give a number from 0 to 10"),
        ("--config.fit.steps=inf", "'fit.steps' takes int"),
        pytest.param("--config.fit.steps=" + "ab " * 2500, "'fit.steps' takes int", id="long"),
        pytest.param("--config.fit.rate=-" + "9" * 400, "config.fit.rate is -inf; give", id="huge"),
        ("--config.fit.densify=1", "'fit.densify' takes bool"),
        ("--config.fit.steps", "has no value"),
        ("--fit.steps=3", "unrecognized arguments"),
    ],
)
def test_mistakes_are_user_errors(config_file, argument, message, user_error):
    with user_error(message):
        parse(f"--config={config_file}", argument)


def test_unfit_files_are_user_errors(tmp_path):
    empty = tmp_path / "empty.py"
    empty.write_text("")
    text = tmp_path / "config.txt"
    text.write_text("")
    for path, message in [
        (tmp_path / "none.py", "no config file"),
        (empty, "no get_config"),
        (text, "not a Python"),
    ]:
        with pytest.raises(UserError, match=message):
            parse(f"--config={path}")
    with pytest.raises(UserError, match="required: --config"):
        parse()


def write_configs(directory, **files):
    directory.mkdir(parents=True)
    for name, content in files.items():
        (directory / f"{name}.py").write_text(content)
    return directory


SETTING = "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({'a': %d})\n"


@pytest.mark.parametrize(
    "line", ["import base", "from my_configs import base", "import my_configs.base as base"]
)
def test_a_config_imports_its_neighbours_wherever_the_command_runs(line, tmp_path, monkeypatch):
    leaf = f"{line}\ndef get_config():\n    config = base.get_config()\n    config.b = 2\n    return config\n"
    monkeypatch.chdir(tmp_path)
    for number, user in enumerate(("one", "two")):
        directory = write_configs(tmp_path / user / "my_configs", base=SETTING % number, leaf=leaf)
        config = config_flags.load(directory / "leaf.py")
        assert config.to_dict() == {"a": number, "b": 2}  # not the neighbour of the first, which has its name
    assert not any(str(tmp_path) in place for place in sys.path)


MISTAKES = {
    "a module": (
        "import bases\n",
        r"leaf.py, line 1: no module 'bases' in .*my_configs and .*; correct the import",
    ),
    "a name": ("from json import nothing\n", r"line 1: ImportError: cannot import name 'nothing'"),
    "syntax": ("def get_config(:\n", r"leaf.py, line 1: invalid syntax; correct it"),
    "a neighbour's syntax": ("import broken\n", r"broken.py, line 2: .*; correct it"),
    "a key": ("import base\ndef get_config():\n    return base.get_config().b\n", r"line 3: .*no key 'b'"),
    "a new key": (
        "import base\ndef get_config():\n    config = base.get_config().lock()\n    config['b'] = 1\n",
        r"leaf.py, line 4: KeyError: Key \"b\" does not exist and cannot be added since the config is locked",
    ),
    "a type": (
        "import base\ndef get_config():\n    config = base.get_config()\n    config.a = 'x'\n",
        r"leaf.py, line 4: TypeError: Could not override field 'a'",
    ),
    "an argument": ("def get_config(size):\n    return size\n", r"get_config\(\) missing 1 required"),
    "no config": ("def get_config():\n    return {'a': 1}\n", r"get_config\(\) does not return one"),
    "our setting": (
        "from configs import base\ndef get_config():\n    return base.training({}, stpes=3)\n",
        r"KeyError: no setting stpes",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_a_config_are_one_line_with_their_place(mistake, tmp_path, user_error):
    leaf, message = MISTAKES[mistake]
    broken = "a = 1\nb = (\n"
    directory = write_configs(tmp_path / "my_configs", base=SETTING % 0, broken=broken, leaf=leaf)
    with user_error(message):
        config_flags.load(directory / "leaf.py")


@pytest.mark.parametrize(
    "line, message",
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("open('none.txt')", "FileNotFoundError: .*none.txt"),
        ("assert 1 > 2, 'sizes'", "AssertionError: sizes"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("a = '\0'", "null byte"),
    ],
)
def test_whatever_a_config_raises_is_one_line(line, message, tmp_path, user_error):
    leaf = f"def get_config():\n    {line}\n"
    with user_error(f"config .*leaf.py.*: .*{message}.*; correct it"):
        config_flags.load(write_configs(tmp_path / "my_configs", leaf=leaf) / "leaf.py")


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"fit": 3}, "unknown config key 'fit': it is a section; set an entry of it, such as 'fit.densify'"),
        ({"fit.levels": ("a",)}, r"'fit.levels' takes items of type int \(now \(1, 2\)\)"),
        ({"fit.steps": "a" * 1000}, r"'fit.steps' takes int .* not '?.{,90}$"),
        ({3: 3}, "overrides are a dictionary by dotted names"),
        ("seed=3", "overrides are a dictionary by dotted names, .* not 'seed=3'"),
    ],
)
def test_overrides_in_a_call(config_file, overrides, message, user_error):
    with user_error(message):
        config_flags.with_overrides(config_file, overrides)


def test_overrides_in_a_call_take_numpys_numbers(config_file):
    changes = {"seed": np.int64(3), "fit.rate": np.float32(0.5), "fit.levels": [4]}
    config = config_flags.with_overrides(config_file, changes)
    assert (config.seed, config.fit.rate, config.fit.levels) == (3, 0.5, (4,))


@pytest.mark.parametrize("config", [None, 3, {"seed": 3}])
def test_what_is_no_config_is_a_user_error(config, user_error):
    with user_error("a config is a file's path or a ConfigDict, not "):
        config_flags.with_overrides(config, {})


def test_a_path_without_its_suffix_is_told_the_file(user_error):
    with user_error("no config file 'configs/tiny'; did you mean configs/tiny.py"):
        config_flags.load("configs/tiny")


def test_a_config_of_other_values_than_json_has_is_a_user_error(user_error):
    with user_error("the config has <built-in function len>"):
        config_flags.config_digest(ConfigDict({"a": len}))


def test_a_placeholder_takes_values_of_its_type():
    _, config = parse("--config=configs/tiny.py", "--config.elevation.deg=10", kind=ModelConfig)
    assert config.elevation.deg == 10.0
    with pytest.raises(UserError, match=r"'elevation.deg' takes float \(now None\), not 'steep'"):
        parse("--config=configs/tiny.py", "--config.elevation.deg=steep")


def test_digest_depends_on_content_only():
    first = ConfigDict({"a": 1, "b": {"c": (1.5, None)}})
    second = ConfigDict({"b": {"c": (1.5, None)}, "a": 1})
    assert config_flags.config_digest(first) == config_flags.config_digest(second)
    assert config_flags.config_digest(first) == hashlib.sha256(b'{"a":1,"b":{"c":[1.5,null]}}').hexdigest()
    second.a = 2
    assert config_flags.config_digest(first) != config_flags.config_digest(second)


def test_what_differs_between_configs_is_named(user_error):
    before = {"seed": 0, "fit": {"rate": 0.5, "steps": 3, "old": None}, "words": ["a"] * 100}
    now = {"seed": 0, "fit": {"rate": 0.25, "steps": 3}, "words": ["a"] * 99 + ["b"], "new": 1}
    shown = config_flags.difference(before, now, 9).split("; ")
    assert shown[:3] == ["config.fit.old None, now absent", "config.fit.rate 0.5, now 0.25"] + [
        "config.new absent, now 1"
    ]
    assert shown[3].startswith("config.words ['a', 'a'") and len(shown) == 4 and len(shown[3]) < 220
    assert config_flags.difference(before, now, 1) == "config.fit.old None, now absent; and 3 more"
    first, second = (config_flags.facts(ConfigDict(each)) for each in (before, now))
    assert {key for key in first | second if first.get(key) != second.get(key)} == {
        "config.fit.old", "config.fit.rate", "config.new", "config.words",
    }  # fmt: skip
    assert first["config.fit.rate"] == "0.5" and all(len(each) <= 80 for each in first.values())


def test_shipped_configs_load_from_anywhere(tmp_path):
    """They import one another, so they must be importable wherever the package is installed."""
    names = sorted(path.name for path in (ROOT / "configs").glob("[!_]*.py"))
    code = f"from im3d_jax import config_flags\nfor name in {names!r}: config_flags.load('configs/' + name)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    assert "tiny_turntable.py" in names

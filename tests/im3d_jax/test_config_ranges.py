"""Every number in every config and of every command has a range, and what is beyond it is refused by name.

The tests find fields, arguments and flags by introspection: a new one is tested without being listed here.
"""

import dataclasses
import enum
import importlib
import math
import re
import types
import typing
from pathlib import Path
from typing import Annotated

import pytest
from ml_collections import ConfigDict

from im3d_jax import config_flags, config_help, config_sections, main, parts
from im3d_jax.autoencoders.kl_network import Architecture
from im3d_jax.commands import dataset, evaluate, study
from im3d_jax.conditions.encoders import TokenEncoder
from im3d_jax.config_kinds import ElevationConfig, ModelConfig, PublishedSettings
from im3d_jax.training_settings import (
    AutoencoderLossSettings,
    DataSettings,
    PartSettings,
    StreamSettings,
    TrainSettings,
)
from recon_torch import ranges
from recon_torch.errors import CommandParser, UserError
from recon_torch.settings import plain

SHIPPED = sorted((Path(__file__).parents[2] / "configs").glob("[!_]*.py"))
NUMBERS = [math.nan, math.inf, -math.inf, -1, 0, 1e30, -1e30, 0.5, 2**63]
OTHERS = ["some text", True, None, (), ("a",), b"bytes"]

# ---- What an annotation takes, worked out here once more ----


def unions(hint):
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def numbers_of(hint):
    """(int or float, its range) of each number that an annotation takes itself, not within a tuple."""
    pairs = [typing.get_args(each) for each in unions(hint) if typing.get_origin(each) is Annotated]
    return [(pair[0], pair[1]) for pair in pairs if pair[0] in (int, float)]


def is_taken(value, hint):
    """Whether an annotation takes a value of `NUMBERS` or `OTHERS`, by comparisons alone."""
    plain_types = [each for each in unions(hint) if isinstance(each, type)]
    if value is None:
        return type(None) in plain_types
    if isinstance(value, bool):
        return bool in plain_types
    if isinstance(value, str):
        return str in plain_types and not any(issubclass(each, enum.StrEnum) for each in plain_types)
    if isinstance(value, tuple):
        items = [typing.get_args(each)[0] for each in unions(hint) if typing.get_origin(each) is tuple]
        return any(all(is_taken(each, item) for each in value) for item in items)
    if not isinstance(value, int | float):
        return False
    for kind, limits in numbers_of(hint):
        low = limits.above if limits.least is None else limits.least
        high = limits.below if limits.most is None else limits.most
        at_end = (limits.least is not None and value == low) or (limits.most is not None and value == high)
        if (low < value < high or at_end) and (kind is float or isinstance(value, int)):
            return True
    return False


def leaves(values, kind, prefix="config"):
    """(the section, its key, the dotted key, the annotation) of every entry of a config."""
    for name, hint in ((name, hint) for name, hint in ranges.hints_of(kind).items() if name in values):
        key, value = f"{prefix}.{name}", values[name]
        if isinstance(value, ConfigDict) and (section := ranges.section_of(hint)):
            yield from leaves(value, section, key)
        elif isinstance(value, ConfigDict):
            for each in value:
                yield from leaves(value[each], ranges.sections_by_name(hint), f"{key}.{each}")
        else:
            yield values, name, key, hint


def whole(kind):
    """A config of this kind in which every section is there once."""
    values = kind()
    if kind is ModelConfig:
        data = DataSettings(mix={"meshes": PartSettings(weight=1.0)})
        train = TrainSettings(
            streams={"views": StreamSettings(batch_size=1, data=data)}, autoencoder=AutoencoderLossSettings()
        )
        published = PublishedSettings(total=1.0, spatial=1.0, temporal=1.0)
        values = dataclasses.replace(values, train=train, published=published)
    return ConfigDict(plain(values))


KINDS = [ModelConfig, ElevationConfig]
LEAVES = [(kind, key) for kind in KINDS for _, _, key, _ in leaves(whole(kind), kind)]

# ---- Configs ----


def test_every_section_of_every_kind_of_config_is_walked():
    keys = {key for _, key in LEAVES}
    assert {"config.train.streams.views.data.mix.meshes.weight", "config.fit.seed", "config.size"} <= keys
    assert len(keys) > 130


@pytest.mark.parametrize("kind, key", LEAVES, ids=lambda each: getattr(each, "__name__", each))
def test_a_value_beyond_its_range_is_refused_with_the_key_and_the_range(kind, key):
    config = whole(kind)
    entry = key.split(".")[1]
    config = ConfigDict({entry: config[entry]})  # without the other sections, whose checks take time
    config_sections.check(config, kind)
    [(section, name, _, hint)] = [each for each in leaves(config, kind) if each[2] == key]
    refused = 0
    for value in [*NUMBERS, *OTHERS]:
        del section[name]  # or the new value would be made of the type of the old one
        section[name] = value
        if is_taken(value, hint):
            config_sections.check(config, kind)
            continue
        refused += 1
        with pytest.raises(UserError) as error:
            config_sections.check(config, kind)
        assert str(error.value) == f"{key} is {value!r}; give {ranges.told(hint)}"
    assert refused >= (9 if numbers_of(hint) else 5)  # nan, both infinities and 1e30 among them
    for _, limits in numbers_of(hint):
        assert str(limits) in ranges.told(hint)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_config_has_no_entry_that_has_no_range(path, user_error):
    config = config_flags.load(path)
    kind = ElevationConfig if path.stem == "elevation_tiny" else ModelConfig
    config_sections.check(config, kind)
    for registry, section in ((parts.REGISTRIES[name], config.get(name)) for name in config_sections.PARTS):
        entry = registry.key.rpartition(".")[2]
        if section and entry in section:
            kwargs = section.kwargs if entry == "name" else section
            function = registry.find(section[entry])
            ranges.check_arguments(function, kwargs.to_dict(), registry.section)
    with config.unlocked():
        config.fil = 3
    with user_error("config has an unknown entry 'fil'"):
        config_sections.check(config, kind)


def test_a_section_has_no_unknown_entry(user_error):
    config = whole(ModelConfig)
    config.train.checkpoint.evry = 3
    with user_error("config.train.checkpoint has an unknown entry 'evry'; the nearest is 'every'"):
        config_sections.check(config, ModelConfig)
    config = whole(ModelConfig)
    del config.train.streams.views.batch_size
    with user_error("config.train.streams.views has no batch_size; set it"):
        config_sections.check(config, ModelConfig)


def test_a_task_of_the_users_own_may_have_entries_of_its_own(user_error):
    config = whole(ModelConfig)
    config.train.task, config.train.my_rate, config.my_section = "my_pkg.my_task", 3.0, {"a": 1}
    config_sections.check(config, ModelConfig)
    assert config_sections.settings(config, "train", TrainSettings).task == "my_pkg.my_task"
    config.train.log_every = 0
    with user_error("config.train.log_every is 0"):
        config_sections.check(config, ModelConfig)


# ---- The parts that a config names ----

PARTS = [(section, name) for section, registry in parts.REGISTRIES.items() for name in registry.ours]
FUNCTIONS = {f"{section} {name}": parts.REGISTRIES[section].find(name) for section, name in PARTS}
FUNCTIONS |= {"the sizes of autoencoder_kl": Architecture, "an encoder of text": TokenEncoder}
ARGUMENTS = [
    (part, argument)
    for part, function in FUNCTIONS.items()
    for argument in ranges.arguments_of(function)
    if argument not in ("return", "params", "architecture")
    and typing.get_origin(ranges.arguments_of(function)[argument]) is not typing.ClassVar
]


@pytest.mark.parametrize("part, argument", ARGUMENTS)
def test_an_argument_of_a_part_of_ours_has_a_range(part, argument):
    hint = ranges.arguments_of(FUNCTIONS[part])[argument]
    assert not {"int", "float"} & set(ranges.unlimited(hint)), f"{part} has no range for {argument}"
    if not numbers_of(hint):
        return
    for value in NUMBERS:
        if not is_taken(value, hint):
            with pytest.raises(UserError, match=rf"^config\.part\.{argument} is .*; give a "):
                ranges.check_arguments(FUNCTIONS[part], {argument: value}, "config.part")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"backbone.kwargs.model_channels": 0}, "config.backbone.kwargs.model_channels is 0; give a whole"),
        ({"backbone.kwargs.channel_mult": (1, -2)}, r"config.backbone.kwargs.channel_mult is \(1, -2\)"),
        ({"backbone.kwargs.prediction_type": "y"}, "prediction_type is 'y'; give one of epsilon, v, x0"),
        ({"autoencoder.kwargs.patch": 0}, "config.autoencoder.kwargs.patch is 0; give a whole"),
        ({"text.kwargs.max_words": 10**9}, "config.text.kwargs.max_words is 1000000000; give"),
        ({"schedule.num_steps": 1}, "config.schedule.num_steps is 1; give a whole number from 2"),
        ({"schedule.beta_end": 1.0}, "config.schedule.beta_end is 1.0; give a number between 0 and 1"),
        ({"schedule.kind": "cosin"}, "config.schedule.kind: no 'cosin'; did you mean 'cosine'"),
    ],
)
def test_wrong_arguments_of_parts_are_found_before_anything_is_made(changes, message, user_error):
    config = config_flags.with_overrides("configs/tiny.py", changes)
    with user_error(message):
        parts.check(config)


# ---- Flags ----


class Seen(Exception):
    """Ends a command when its flags are parsed."""


def parser_of(module, argv=()):
    """The parser of a command, as it is when it parses its flags."""
    with pytest.MonkeyPatch.context() as patch:

        def stop(parser, *args, **kwargs):
            raise Seen(parser)

        patch.setattr(CommandParser, "parse_args", stop)
        with pytest.raises(Seen) as seen:
            importlib.import_module(module).main(list(argv))
    return seen.value.args[0]


def actions_of(parser):
    return parser._actions  # noqa: SLF001 - argparse has no other way to list them


WITH_COMMANDS = ("dataset", "evaluate", "study")
MODULES = [each.module for name, each in main.COMMANDS.items() if name not in WITH_COMMANDS]
MODULES += [f"{dataset.__name__}.{name}" for name in dataset.COMMANDS]
MODULES += [f"{evaluate.__name__}.{name}" for name in evaluate.COMMANDS]
MODULES += [f"{study.__name__}.{name}" for name in study.MODULES.values()]
FLAGS = [
    (module, action.option_strings[-1])
    for module in MODULES
    for action in actions_of(parser_of(module))
    if isinstance(action.type, ranges.Flag) or action.type in (int, float)
]


def test_the_flags_of_every_command_are_walked():
    flags = {(module.rpartition(".")[2], flag) for module, flag in FLAGS}
    assert {("generate", "--seed"), ("fit", "--at-once"), ("show", "--objects")} <= flags
    assert len(flags) > 50


def given(action, flag, value):
    """A flag with a value, or with as many of it as the flag takes."""
    return [flag, *[str(value)] * action.nargs] if action.nargs else [f"{flag}={value}"]


@pytest.mark.parametrize("module, flag", FLAGS, ids=lambda each: each.rpartition(".")[2])
def test_a_flag_that_takes_a_number_states_its_range_and_keeps_to_it(module, flag):
    parser = parser_of(module)
    [action] = [each for each in actions_of(parser) if flag in each.option_strings]
    assert isinstance(action.type, ranges.Flag), f"{flag} of {module} has no range"
    [(_, limits)] = numbers_of(action.type.hint)
    defaults = action.default if isinstance(action.default, list) else [action.default]
    assert all(default is None or is_taken(default, action.type.hint) for default in defaults)
    assert str(limits) in " ".join(parser.format_help().split())
    # Where a flag takes several values, argparse reads one such as "-inf" as another flag.
    for value in [each for each in [*NUMBERS, "one"] if not action.nargs or not str(each).startswith("-")]:
        # Whatever is compulsory is missing, but flags are converted before that is found.
        with pytest.raises(UserError) as error:
            parser.parse_args([*given(action, flag, value), "--unknown-flag"])
        message = f"argument {flag}: '{value}' is not {ranges.told(action.type.hint)}; see `im3d"
        assert str(error.value).startswith(message) != is_taken(value, action.type.hint)


# ---- --help-config ----


def test_help_config_shows_every_entry_with_its_value_and_its_range(capsys):
    with pytest.raises(SystemExit) as ended:
        main.dispatch(["train", "--config=configs/tiny_turntable.py", "--config.fit.seed=7", "--help-config"])
    assert ended.value.code == 0  # though --workdir is missing
    shown = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    config = config_flags.load("configs/tiny_turntable.py")
    assert shown.keys() == {f"--config.{key}" for key in keys_of(config.to_dict())}
    assert re.fullmatch(r"7 +a whole number from 0 to 2147483647", shown["--config.fit.seed"])
    assert shown["--config.train.streams.image.keep_image"].split(None, 1)[1] == "a number from 0 to 1"
    assert shown["--config.backbone.kwargs.head_dim"].endswith("a whole number from 1 to 4096")


def keys_of(values, prefix=""):
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from keys_of(value, f"{prefix}{name}.")
        elif not isinstance(value, dict):
            yield f"{prefix}{name}"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_can_be_listed(path):
    kind = ElevationConfig if path.stem == "elevation_tiny" else ModelConfig
    config = config_flags.load(path)
    assert len(config_help.lines(config, kind)) == len(list(keys_of(config.to_dict())))

"""Names in configs: what they stand for, and what is wrong with one that stands for nothing."""

from typing import Protocol

import pytest

from im3d_jax.registry import Registry, missing_members
from recon_torch.errors import UserError

SOURCES = {
    "__init__": "",
    "good": """
class Shape:
    corners = 4
    def __init__(self, side, unit="m"):
        self.side, self.unit = side, unit
    def area(self):
        return self.side**2
class Other(Shape):
    corners = 3
class Flat(Shape):
    area = 0
SIDES = 4
def kind():
    return Shape
""",
    "empty": "",
    "lacking": "class Shape:\n    pass\n",
    "dependent": "import no_such_library\n",
    "broken": "1 / 0\n",
    "misspelt": "import json\nfrom json import lods\n",
    "syntax": "def f(:\n",
    "exits": "raise SystemExit(3)\n",
}
"""A user's package: modules that are right, and one for each rule that a module can break."""


class Shape(Protocol):
    corners: int

    def area(self) -> float: ...


REGISTRY = Registry(
    key="config.shape.name",
    attribute="Shape",
    ours={"square": "my_shapes.good:Shape", "disc": "my_shapes.good:Disc"},
)


@pytest.fixture(autouse=True)
def package(tmp_path, monkeypatch):
    (tmp_path / "my_shapes").mkdir()
    for name, source in SOURCES.items():
        (tmp_path / "my_shapes" / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize("name, corners", [("square", 4), ("my_shapes.good", 4), ("my_shapes.good:Other", 3)])
def test_a_name_is_built_with_its_arguments(name, corners):
    built = REGISTRY.build(name, {"side": 3}, Shape)
    assert (built.corners, built.area(), built.unit) == (corners, 9, "m")


@pytest.mark.parametrize(
    "name, kwargs, message",
    [
        ("sqare", {}, "no 'sqare'; did you mean 'square'?"),
        ("hexagon", {}, "no 'hexagon'; there is square, disc"),
        ("disc", {}, "my_shapes.good has no Disc"),
        ("square", {"side": 1, "colour": 0}, "square takes no argument colour; remove it"),
        ("no_such_package.shapes", {}, "no module no_such_package.shapes; give one of square, disc"),
        ("my_shapes.missing", {}, "no module my_shapes.missing"),
        ("my_shapes.empty", {}, "my_shapes.empty has no Shape, which its contract asks for"),
        ("my_shapes.lacking", {}, "lacks area, corners of the Shape contract"),
        ("my_shapes.dependent", {}, "needs the module no_such_library; install it"),
        ("my_shapes.broken", {}, "broken.py, line 1: ZeroDivisionError: division by zero; correct it"),
        ("my_shapes.misspelt", {}, "line 2: ImportError: cannot import name 'lods' from 'json'"),
        ("my_shapes.syntax", {}, "syntax.py, line 1: invalid syntax; correct it"),
        ("my_shapes.exits", {}, "exits.py, line 1: SystemExit: 3; correct it"),
        ("my_shapes.good:SIDES", {}, "my_shapes.good:SIDES is of type int; it has to be a class or function"),
        ("my_shapes.good:kind", {}, "returns the class Shape; return an object of it"),
        ("my_shapes.good:Flat", {"side": 1}, "lacks area of the Shape contract"),
        ("builtins:dict", {"side": 1}, "lacks area, corners of the Shape contract"),
        *((name, {}, "no module ") for name in (".", ":", ":Shape", "../shapes.py", "my_shapes.", "a b.c")),
        (None, {}, "config.shape.name is None; give a name, such as 'square'"),
        (3, {}, "config.shape.name is 3; give a name"),
    ],
)
def test_what_cannot_be_built_is_one_line(name, kwargs, message):
    with pytest.raises(UserError) as error:
        REGISTRY.build(name, kwargs, Shape)
    assert str(error.value).startswith("config.shape.name") and message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_error_inside_a_users_module_is_the_cause():
    with pytest.raises(UserError) as error:
        REGISTRY.build("my_shapes.broken", {}, Shape)
    assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_missing_members_are_those_of_the_protocol():
    assert missing_members(object(), Shape) == ["area", "corners"]

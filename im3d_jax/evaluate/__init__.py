"""How well a trained model does on test objects whose ground truth is known (`im3d evaluate`)."""

from enum import StrEnum

MAX_OBJECTS = 1000
"""The most objects in one run: all of their true views are in memory."""


class Part(StrEnum):
    """The parts of an evaluation, in the order in which they are measured."""

    VIEWS = "views"
    ASSETS = "assets"
    PROMPTS = "prompts"
    ELEVATION = "elevation"


class SuiteName(StrEnum):
    """The sets of test objects that there are."""

    PROCEDURAL = "procedural"
    MESHES = "meshes"

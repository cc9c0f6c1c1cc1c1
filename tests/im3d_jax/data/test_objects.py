"""Procedural objects depend on (seed, index) alone, lie in the ball, and have captions of known words."""

import numpy as np
import pytest

from im3d_jax.conditions.words import Vocabulary
from im3d_jax.data import objects

SURFACE_POINTS = 400


def surface(kind, shape, rng):
    """Points [N, 3] on the surface of a unit primitive."""
    angle, height = rng.uniform(0, 2 * np.pi, SURFACE_POINTS), rng.uniform(-1, 1, SURFACE_POINTS)
    circle = np.stack([np.cos(angle), np.sin(angle)], -1)
    if kind == "ellipsoid":
        return np.concatenate([circle * np.sqrt(1 - height**2)[:, None], height[:, None]], -1)
    if kind == "box":
        points = rng.uniform(-1, 1, (SURFACE_POINTS, 3))
        corners = np.stack(np.meshgrid(*[[-1, 1]] * 3), -1).reshape(-1, 3)
        return np.concatenate([points, corners])
    if kind == "cone":
        height = np.sign(height)  # the rims are farthest out
        radius = (1 + shape) / 2 - height * (1 - shape) / 2
        return np.concatenate([circle * radius[:, None], height[:, None]], -1)
    around = rng.uniform(0, 2 * np.pi, SURFACE_POINTS)
    ring = 1 + shape * np.cos(around)
    return np.concatenate([circle * ring[:, None], shape * np.sin(around)[:, None]], -1)


@pytest.mark.parametrize("category", objects.CATEGORIES)
def test_objects_lie_in_the_ball_and_fill_it(category):
    rng = np.random.default_rng(0)
    sizes = []
    for index in range(25):
        scene = objects.make_object(1, index, category=category)
        radii = [
            np.linalg.norm(center + surface(kind, shape, rng) @ axes.T, axis=-1).max()
            for kind, group in scene.primitives.items()
            for center, axes, _, shape in group
        ]
        sizes.append(max(radii))
    assert max(sizes) <= 0.5 + 1e-9
    assert min(sizes) > 0.25  # not lost in the picture


@pytest.mark.parametrize("category", objects.CATEGORIES)
def test_objects_fit_the_slots_and_differ(category):
    scenes = [objects.make_object(0, index, category=category) for index in range(10)]
    for kind, slots in objects.SLOTS.items():
        assert all(len(scene.primitives[kind]) <= slots for scene in scenes)
    packed = objects.pack(scenes)
    shapes = np.concatenate([packed[f"{kind}_to_local"].reshape(10, -1) for kind in objects.SLOTS], 1)
    assert len(np.unique(shapes, axis=0)) == 10


def test_an_object_is_a_pure_function_of_seed_and_index():
    forwards = {i: objects.pack([objects.make_object(3, i)]) for i in range(30)}
    for i in reversed(range(30)):
        again = objects.pack([objects.make_object(3, i)])
        assert all(np.array_equal(again[name], forwards[i][name]) for name in again)
    assert objects.make_object(3, 0).caption == objects.make_object(3, 0).caption
    first, other_seed = objects.pack([objects.make_object(3, 5)]), objects.pack([objects.make_object(4, 5)])
    assert any(not np.array_equal(first[name], other_seed[name]) for name in first)


def test_splits_are_disjoint():
    ranges = sorted(objects.SPLITS.values())
    assert all(first < last for first, last in ranges)
    assert all(last <= first for (_, last), (first, _) in zip(ranges, ranges[1:], strict=False))


def test_there_are_enough_categories_and_colours_and_all_are_drawn():
    scenes = [objects.make_object(0, index) for index in range(600)]
    assert len(objects.CATEGORIES) >= 12 and len(objects.COLORS) >= 10
    stems = {
        name: entry.caption.format(first="", second="").split() for name, entry in objects.CATEGORIES.items()
    }
    for words in stems.values():
        words = [word for word in words if word not in ("a", "an")]
        assert any(set(words) <= set(scene.caption.split()) for scene in scenes)
    for color in objects.COLORS:
        assert sum(color in scene.caption.split() for scene in scenes) > 50


def test_captions_are_made_of_the_vocabulary():
    words = objects.vocabulary()
    assert words == sorted(set(words))
    vocabulary = Vocabulary(tuple(words))
    longest = 0
    for category in objects.CATEGORIES:
        for index, color in enumerate(objects.COLORS):
            caption = objects.make_object(0, index, category=category, colors=(color, "orange")).caption
            assert vocabulary.warnings(caption) == []
            longest = max(longest, len(caption.split()))
    assert longest <= vocabulary.max_words
    assert all(any(word in objects.make_object(0, i).caption.split() for i in range(800)) for word in words)


def test_articles_follow_the_vowel():
    def caption(category, *colors):
        return objects.make_object(0, 0, category=category, colors=colors).caption

    assert caption("tree", "orange", "red") == "an orange tree with a red trunk"
    assert caption("ball and box", "red", "orange") == "a red ball beside an orange box"
    assert caption("ice cream", "pink", "beige") == "pink ice cream in a beige cone"


def test_colours_of_the_caption_are_those_of_the_parts():
    packed = objects.pack([objects.make_object(0, 7, category="lamp", colors=("cyan", "brown"))])
    colors = {tuple(np.round(color, 4)) for color in packed["cone_color"][0, : packed["cone_count"][0]]}
    assert colors == {tuple(np.float32(objects.COLORS[name]).round(4)) for name in ("cyan", "brown")}


def test_pack_inverts_the_axes():
    scene = objects.make_object(2, 11, category="rocket")
    packed = objects.pack([scene])
    for slot, (center, axes, _, _) in enumerate(scene.primitives["box"]):
        corner = center + axes @ np.array([1.0, -1.0, 1.0])
        local = packed["box_to_local"][0, slot] @ (corner - packed["box_center"][0, slot])
        np.testing.assert_allclose(local, [1, -1, 1], atol=1e-5)
    assert packed["box_count"] == len(scene.primitives["box"])
    assert not packed["box_to_local"][0, packed["box_count"][0] :].any()

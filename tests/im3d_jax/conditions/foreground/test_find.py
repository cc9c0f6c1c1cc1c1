"""Objects whose coverage is known, photographed badly in many ways: what is found, and what is doubted."""

import io

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from im3d_jax.conditions.foreground.find import find

HEIGHT, WIDTH, SAMPLES = 200, 240, 4
WHITE, GREY, BLUE, BEIGE = (1.0, 1.0, 1.0), (0.6, 0.6, 0.6), (0.15, 0.35, 0.75), (0.85, 0.8, 0.7)
Y, X = np.mgrid[:HEIGHT, :WIDTH] + 0.5
RANDOM = np.random.default_rng(0).random((HEIGHT, WIDTH))
RADIUS = np.hypot(Y / HEIGHT * 2 - 1, X / WIDTH * 2 - 1)  # 1 at the middle of a side


# ---- Objects: RGBA, 4 x 4 samples for each pixel ----


def drawn(*shapes):
    """Shapes over one another. A shape is a function of row and column and its colour, or their colours."""
    y, x = (np.mgrid[: HEIGHT * SAMPLES, : WIDTH * SAMPLES] + 0.5) / SAMPLES
    rgb, alpha = np.ones((*y.shape, 3)), np.zeros(y.shape)
    for shape, color in shapes:
        inside = shape(y, x)
        rgb = np.where(inside[..., None], color(y, x)[..., None] if callable(color) else color, rgb)
        alpha = np.where(inside, 1.0 if color is not None else 0.0, alpha)
    samples = np.concatenate([rgb * alpha[..., None], alpha[..., None]], -1)
    mean = samples.reshape(HEIGHT, SAMPLES, WIDTH, SAMPLES, 4).mean((1, 3))
    mean[..., :3] = np.where(mean[..., 3:] > 0, mean[..., :3] / np.maximum(mean[..., 3:], 1e-6), 1)
    return mean


def ellipse(row, column, height, width):
    return lambda y, x: ((y - row) / height) ** 2 + ((x - column) / width) ** 2 < 1


def box(top, bottom, left, right):
    return lambda y, x: (y > top) & (y < bottom) & (x > left) & (x < right)


def ring(row, column, outer, inner):
    return lambda y, x: (np.hypot(y - row, x - column) < outer) & (np.hypot(y - row, x - column) > inner)


def mug(body=(0.15, 0.6, 0.25), inside=(0.1, 0.4, 0.18)):
    """With a handle through which the backdrop is seen."""
    return drawn(
        (ring(100, 150, 34, 20), body),
        (box(50, 150, 75, 145), body),
        (ellipse(150, 110, 12, 35), body),
        (ellipse(50, 110, 12, 35), inside),
    )


def ball(low, high, row=100, column=120, radius=52):
    """A ball in light from above on the left."""

    def shade(y, x):
        across = ((row - y) + (column - x)) / radius / 2
        return np.clip(low + (high - low) * (across / 1.4 + 0.5), 0, 1)

    return drawn((ellipse(row, column, radius, radius), shade))


def stool():
    return drawn(
        *[(box(70, 160, left, left + 9), (0.75, 0.2, 0.1)) for left in (78, 116, 154)],
        (box(55, 72, 70, 170), (0.85, 0.3, 0.15)),
    )


# ---- Backdrops and cameras ----


def before(backdrop, rgba):
    return rgba[..., :3] * rgba[..., 3:] + np.asarray(backdrop) * (1 - rgba[..., 3:])


def shaded(backdrop, amount):
    return np.asarray(backdrop) * (1 - np.asarray(amount))[..., None]


def contact(rgba, dark=0.6):
    """The light that a soft shadow below an object takes."""
    rows, columns = (np.flatnonzero((rgba[..., 3] > 0.5).any(axis)) for axis in (1, 0))
    half = np.ptp(columns) * 0.6
    away = ((X - columns.mean()) / half) ** 2 + ((Y - rows[-1] + 4) / (0.25 * half)) ** 2
    return dark * np.exp(-1.6 * away)


def cast(rgba, dark=0.45, blur=4.0):
    """The light that a shadow to the right of an object takes."""
    bottom = np.flatnonzero((rgba[..., 3] > 0.5).any(1))[-1]
    row = bottom - (bottom - Y) / 0.35
    shadow = ndimage.map_coordinates(rgba[..., 3], [row, X - 0.5 * (bottom - row)], order=1)
    return dark * ndimage.gaussian_filter(np.where(bottom < Y, 0, shadow), blur)


def noisy(picture, deviation):
    return picture + np.random.default_rng(0).normal(0, deviation / 255, picture.shape)


def jpeg(picture, quality):
    stored = io.BytesIO()
    Image.fromarray(to_bytes(picture)).save(stored, "JPEG", quality=quality)
    return np.asarray(Image.open(stored)) / 255.0


def dusty(picture, *spots):
    picture = picture.copy()
    for row, column in [*np.random.default_rng(0).integers(4, 196, (60, 2)), *spots]:
        picture[row : row + 2, column : column + 3] = 0.35
    return picture


def rounded(radius=24):
    """1 in a rectangle with rounded corners as large as the picture."""
    corner_y, corner_x = (
        np.maximum(np.abs(at - n / 2) - n / 2 + radius, 0) for at, n in ((Y, HEIGHT), (X, WIDTH))
    )
    return np.clip(radius + 0.5 - np.hypot(corner_y, corner_x), 0, 1)


def framed(picture, width=3, color=0.0):
    picture = picture.copy()
    for turned in (picture, picture[::-1], picture.swapaxes(0, 1), picture.swapaxes(0, 1)[::-1]):
        turned[:width] = color
    return picture


def to_bytes(picture):
    return np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)


def look(picture):
    return find((to_bytes(picture) / 255).astype(np.float32), 0.06)


def with_alpha(picture, alpha):
    return np.concatenate([picture, np.broadcast_to(alpha, (HEIGHT, WIDTH))[..., None]], -1)


def overlap(found, rgba):
    """Intersection over union of what is found and what is there."""
    found, there = found.coverage[..., 0] > 0.5, rgba[..., 3] > 0.5
    return (found & there).sum() / (found | there).sum()


MUG, STOOL = mug(), stool()
GREY_BALL, WHITE_BALL, PALE_BALL = ball(0.25, 0.7), ball(0.5, 0.97), ball(0.7, 0.96)

CLEAR = {
    "white": (MUG, before(WHITE, MUG)),
    "black": (MUG, before((0.02, 0.02, 0.02), MUG)),
    "a colour": (STOOL, before(BLUE, STOOL)),
    "noise": (MUG, noisy(before((0.95, 0.95, 0.95), MUG), 6)),
    "much noise on a colour": (STOOL, noisy(before(BLUE, STOOL), 14)),
    "jpeg": (MUG, jpeg(before(WHITE, MUG), 40)),
    "bad jpeg": (STOOL, jpeg(before(WHITE, STOOL), 15)),
    "dust": (MUG, dusty(before(WHITE, MUG), (5, 5), (190, 230))),
    "vignette": (MUG, jpeg(before(shaded(WHITE, 0.3 * RADIUS**2 / 2), MUG), 85)),
    "strong vignette of lens": (MUG, before(shaded(WHITE, 1 - 1 / (1 + 0.5 * RADIUS**2 / 2) ** 2), MUG)),
    "vignette over all": (STOOL, noisy(shaded(before(BEIGE, STOOL), 0.4 * RADIUS**2 / 2), 3)),
    "gradient": (MUG, before(shaded(WHITE, 0.8 * Y / HEIGHT), MUG)),
    "gradient of colours": (STOOL, before(BLUE + (np.array(BEIGE) - BLUE) * X[..., None] / WIDTH, STOOL)),
    "contact shadow": (MUG, before(shaded(WHITE, contact(MUG)), MUG)),
    "contact shadow, noise": (STOOL, noisy(before(shaded(GREY, contact(STOOL)), STOOL), 3)),
    "contact shadow of a grey object": (GREY_BALL, before(shaded(WHITE, contact(GREY_BALL)), GREY_BALL)),
    "cast shadow": (MUG, before(shaded(WHITE, cast(MUG)), MUG)),
    "cast shadow, jpeg": (STOOL, jpeg(before(shaded(BEIGE, cast(STOOL)), STOOL), 85)),
    "sharp cast shadow on a colour": (STOOL, before(shaded(BLUE, cast(STOOL, blur=0.6)), STOOL)),
    "shadow and vignette": (MUG, jpeg(shaded(before(shaded(BEIGE, contact(MUG)), MUG), 0.1 * RADIUS**2), 85)),
    "white on white": (PALE_BALL, before(WHITE, PALE_BALL)),
    "white mug on white": (mug((0.93,) * 3, (0.8,) * 3), before(WHITE, mug((0.93,) * 3, (0.8,) * 3))),
    "rounded white corners": (MUG, before(WHITE, np.dstack([before(BEIGE, MUG), rounded()]))),
    "rounded transparent corners": (MUG, with_alpha(before(BLUE, MUG), rounded())),
    "a black frame": (MUG, framed(before(WHITE, MUG))),
    "alpha of 250": (MUG, with_alpha(before(WHITE, MUG), 250 / 255)),
    "alpha of 0": (STOOL, with_alpha(before(BLUE, STOOL), 0.0)),
    "alpha of 248 to 255": (MUG, with_alpha(before(WHITE, MUG), 1 - 7 / 255 * RANDOM)),
    "alpha": (MUG, MUG),
    "alpha and a speck": (MUG, np.where((Y < 6)[..., None] & (X < 6)[..., None], 1.0, MUG)),
    "alpha with haze": (MUG, with_alpha(MUG[..., :3], 0.9 * MUG[..., 3] + 0.1 * RANDOM)),
    "premultiplied alpha": (MUG, MUG * np.concatenate([MUG[..., [3] * 3], np.ones_like(MUG[..., :1])], -1)),
}  # fmt: skip
"""By what is the matter with it: an object, and a picture of it."""

LEAST_OVERLAP = {"bad jpeg": 0.85, "much noise on a colour": 0.92}


@pytest.mark.parametrize("kind", CLEAR)
def test_the_object_is_found_without_a_doubt(kind):
    rgba, picture = CLEAR[kind]
    found = look(picture)
    assert found.doubts == () and overlap(found, rgba) > LEAST_OVERLAP.get(kind, 0.96)


OUTLINED = drawn((box(50, 150, 80, 160), (0.3,) * 3), (box(53, 147, 83, 157), (1.0,) * 3))
TWO = drawn((ellipse(100, 70, 40, 40), (0.7, 0.1, 0.2)), (box(70, 140, 150, 200), (0.2, 0.5, 0.2)))
LOW = np.roll(STOOL, 60, 0)

UNDER_PALE, UNDER_WHITE = shaded(WHITE, contact(PALE_BALL, 0.3)), shaded(GREY, contact(WHITE_BALL))

DOUBTFUL = {
    "white on white, shadow": (PALE_BALL, before(UNDER_PALE, PALE_BALL), "outline", 0.8),
    "white on grey, shadow": (WHITE_BALL, before(UNDER_WHITE, WHITE_BALL), "outline", 0.75),
    "sharp cast shadow": (MUG, before(shaded(WHITE, cast(MUG, blur=0.6)), MUG), "may be partly shadow", 0.6),
    "an outline": (OUTLINED, before(WHITE, OUTLINED), "may be hollow", 0.98),
    "two objects": (TWO, before(BEIGE, TWO), "is 2 things", 0.98),
    "two objects by alpha": (TWO, TWO, "is 2 things", 0.98),
    "cut off": (LOW, before(BEIGE, LOW), "touches the border of the picture", 0.97),
    "cut off by alpha": (LOW, LOW, "touches the border of the picture", 0.98),
    "half transparent": (MUG, MUG * [1, 1, 1, 0.35], "is half transparent", None),
    "inverted alpha": (MUG, with_alpha(MUG[..., :3], 1 - MUG[..., 3]), "is its alpha inverted", None),
    "a card": (MUG, framed(before(BEIGE, MUG), 16, 1.0), "lies on a rectangle", 0.97),
}  # fmt: skip
"""By what is doubtful: an object, a picture of it, what is said, and the least overlap all the same."""


@pytest.mark.parametrize("kind", DOUBTFUL)
def test_what_cannot_be_told_is_said(kind):
    rgba, picture, words, least = DOUBTFUL[kind]
    found = look(picture)
    assert any(words in doubt for doubt in found.doubts)
    assert least is None or overlap(found, rgba) > least


def test_glass_is_where_its_alpha_is():
    found = look(MUG * [1, 1, 1, 0.35])
    np.testing.assert_allclose(found.coverage[..., 0], 0.35 * MUG[..., 3], atol=0.01)
    np.testing.assert_array_equal(found.mask[MUG[..., 3] > 0.5], True)


def test_edges_are_as_soft_as_they_are_and_free_of_the_backdrop():
    found = look(before(BLUE, MUG))
    edge = (MUG[..., 3] > 0) & (MUG[..., 3] < 1)
    assert np.abs(found.coverage[..., 0] - MUG[..., 3])[edge].mean() < 0.05
    over_white = found.rgb * found.coverage + 1 - found.coverage
    assert np.abs(over_white - before(WHITE, MUG))[edge].mean() < 0.03


def texture():
    return 0.5 + 0.3 * np.sin(X / 3) * np.sin(Y / 4)


NOT_PLAIN = {
    "a pattern": np.repeat(texture()[..., None], 3, -1),
    "a table before a wall": np.where((Y < 110)[..., None], BEIGE, (0.4, 0.25, 0.15)),
    "random colours": np.random.default_rng(0).random((HEIGHT, WIDTH, 3)),
}


@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_a_backdrop_that_is_not_smooth_is_refused_or_doubted(kind):
    found = look(before(NOT_PLAIN[kind], MUG))
    assert found is None or found.doubts


@pytest.mark.parametrize("picture", [np.full((50, 60, 3), 0.3), np.zeros((50, 60, 4)), np.ones((50, 60, 4)),
                                     shaded(np.ones((HEIGHT, WIDTH, 3)), 0.3 * RADIUS**2 / 2)])  # fmt: skip
def test_nothing_is_found_where_nothing_is(picture):
    assert not look(picture).mask.any()

"""How a made-up character is designed, drawn by different hands, and turned into pixels.

Only additions, multiplications, divisions, square roots and comparisons of single numbers are used, whose results are
fixed by IEEE 754, so that every platform and version of numpy draws the same pixels: no sine, no matrix product (whose
order of summation varies), no font or drawing library.
"""

from __future__ import annotations

import numpy as np

from hypertorch.fewshot._random import random_uniform

# The most strokes of a character, and the knots of a stroke.
_STROKES, _KNOTS = 4, 5
# Points per segment between two knots: less than a pixel apart at 28 x 28.
_POINTS = 16
# How likely a character has 1, 2, 3 or 4 strokes.
_STROKE_SHARES = (0.1, 0.4, 0.35, 0.15)
# How likely a stroke is straight or bent once with a corner; otherwise it is a smooth curve.
_STRAIGHT_SHARE, _CORNER_SHARE = 0.25, 0.2

# How much drawings of one character differ; lengths are in units of the character's size.
_KNOT_SHIFT, _STROKE_SHIFT = 0.035, 0.05
_STRETCH, _SLANT, _TURN, _PLACE = 0.2, 0.25, 0.14, 0.12
# Share of the image that a character of size 1 fills, and radius of the pen in shares of the image.
_FILL, _PEN_RADIUS, _PEN_VARIATION = 0.66, 0.03, 0.35

# Streams for what a character is and for how a hand draws it: more drawings change no character.
_DESIGN, _HAND = 1, 2


def draw_class(drawings: int, image_size: int, *key: int) -> np.ndarray:
    """Returns drawings of one character, which is a pure function of the key.

    Drawing `i` is the same however many there are.

    Args:
        drawings: how many.
        image_size: height and width (unit: pixels).
        *key: integers that select the character.

    Returns:
        uint8 `(drawings, image_size, image_size)`, paper 0 and ink 255.
    """
    knots, smoothness = design_character(*key, _DESIGN)
    images = [_draw(knots, smoothness, image_size, *key, _HAND, index) for index in range(drawings)]
    return np.stack(images)


def design_character(*key: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the strokes of a character: knots within the unit square, and how smoothly to join them.

    Returns:
        Knots `(strokes, 5, 2)` as (x, y), and smoothness `(strokes,)`: 0 for straight segments, 0.5 for a curve.
    """
    chances = random_uniform((1 + _STROKES,), *key, 0)
    count = 1 + int(np.searchsorted(np.cumsum(_STROKE_SHARES[:-1]), chances[0], side="right"))
    spots = random_uniform((_STROKES, _KNOTS, 2), *key, 1)
    strokes: list[np.ndarray] = []
    smoothness = np.zeros(count)
    for index in range(count):
        # A single stroke is always a curve: one straight line looks like any other.
        kind = 1.0 if count == 1 else chances[1 + index]
        stroke, smoothness[index] = _stroke(kind, spots[index])
        strokes.append(_attach(stroke, strokes, spots[index]))
    return _fit(np.stack(strokes)), smoothness


def _stroke(kind: float, spots: np.ndarray) -> tuple[np.ndarray, float]:
    """Returns the knots of a stroke that starts at 0, and its smoothness."""
    if kind < _STRAIGHT_SHARE:
        return _straight(spots), 0.0
    if kind < _STRAIGHT_SHARE + _CORNER_SHARE:
        return _corner(spots), 0.0
    return _curve(spots), 0.5


def _straight(spots: np.ndarray) -> np.ndarray:
    """Returns knots along a line of length 0.6 to 1 in a random direction."""
    offset = _direction(spots[0]) * (0.6 + 0.4 * spots[1, 0])
    return np.arange(_KNOTS)[:, None] / (_KNOTS - 1) * offset


def _corner(spots: np.ndarray) -> np.ndarray:
    """Returns knots along two arms that meet at the middle knot."""
    arms = [_direction(spots[0]) * (0.4 + 0.4 * spots[2, 0]), _direction(spots[1]) * (0.4 + 0.4 * spots[2, 1])]
    steps = np.arange(3)[:, None] / 2
    return np.concatenate([(1 - steps[:2]) * arms[0], steps * arms[1]])


def _curve(spots: np.ndarray) -> np.ndarray:
    """Returns the knots of a walk that keeps turning to one side, or changes its mind once."""
    heading = _direction(spots[0])
    turn = 0.35 + 0.55 * spots[1, 0]
    turn = -turn if spots[1, 1] < 0.5 else turn
    length = 0.24 + 0.2 * spots[2, 0]
    knots = [np.zeros(2)]
    for index in range(1, _KNOTS):
        knots.append(knots[-1] + length * heading)
        # An S instead of an arc, for three characters in ten.
        bend = -turn if spots[2, 1] < 0.3 and index >= _KNOTS // 2 else turn
        heading = _rotate(heading, bend * (0.7 + 0.6 * spots[3, index % 2]))
    return np.stack(knots)


def _attach(stroke: np.ndarray, earlier: list[np.ndarray], spots: np.ndarray) -> np.ndarray:
    """Returns the stroke moved so that it starts at, or crosses, an earlier one; sometimes it stands free."""
    choice, where, own = spots[4, 0], spots[3, 0], spots[3, 1]
    if not earlier:
        return stroke
    anchor = earlier[int(where * len(earlier))][int(spots[4, 1] * _KNOTS)]
    if choice < 0.25:
        return stroke + anchor + 0.35 * _direction(spots[2])
    return stroke + anchor - stroke[int(own * _KNOTS)]


def _fit(knots: np.ndarray) -> np.ndarray:
    """Returns the knots scaled alike in both directions so that the longer side of their box is 1, centred on 0."""
    low, high = knots.min(axis=(0, 1)), knots.max(axis=(0, 1))
    return (knots - (low + high) / 2) / (high - low).max()


def _draw(knots: np.ndarray, smoothness: np.ndarray, image_size: int, *key: int) -> np.ndarray:
    """Returns one drawing of the character, uint8 `(image_size, image_size)`, by a hand given by the key."""
    strokes = len(knots)
    shaken = knots + _KNOT_SHIFT * _normal(knots.shape, *key, 0) + _STROKE_SHIFT * _normal((strokes, 1, 2), *key, 1)
    points = _slanted(_joined(shaken, smoothness), *key, 2)
    radius = _PEN_RADIUS * (1 + _PEN_VARIATION * (2 * float(random_uniform((1,), *key, 3)[0]) - 1))
    return _inked(image_size * (0.5 + _FILL * points), image_size * radius, image_size)


def _joined(knots: np.ndarray, smoothness: np.ndarray) -> np.ndarray:
    """Returns points `(points, 2)` along cubic Hermite curves through the knots (Catmull-Rom for smoothness 0.5)."""
    slopes = np.empty_like(knots)
    slopes[:, 1:-1] = knots[:, 2:] - knots[:, :-2]
    # An end has one neighbour, so its slope is one-sided.
    slopes[:, 0], slopes[:, -1] = knots[:, 1] - knots[:, 0], knots[:, -1] - knots[:, -2]
    slopes = (slopes * smoothness[:, None, None])[:, :, None]
    ends = knots[:, :, None]
    t = (np.arange(_POINTS + 1) / _POINTS)[:, None]
    # The cubic Hermite basis, from the values at both ends and the slopes there.
    rise = t * t * (3 - 2 * t)
    start, stop = t * (1 - t) * (1 - t), t * t * (t - 1)
    curve = (1 - rise) * ends[:, :-1] + rise * ends[:, 1:] + start * slopes[:, :-1] + stop * slopes[:, 1:]
    return curve.reshape(-1, 2)


def _slanted(points: np.ndarray, *key: int) -> np.ndarray:
    """Returns the points after a random stretch, slant, turn and shift."""
    stretch_x, stretch_y, slant, turn, shift_x, shift_y = 2 * random_uniform((6,), *key) - 1
    x, y = points[:, 0] * (1 + _STRETCH * stretch_x), points[:, 1] * (1 + _STRETCH * stretch_y)
    turned = _rotate(np.stack([x + _SLANT * slant * y, y], axis=-1), _TURN * turn)
    return turned + _PLACE * np.array([shift_x, shift_y])


def _inked(points: np.ndarray, radius: float, image_size: int) -> np.ndarray:
    """Returns the image of a round pen of the given radius led along the points; all lengths in pixels."""
    # Single precision halves the largest array, points by pixels, and has digits to spare for 255 levels.
    centres = np.arange(image_size, dtype=np.float32) + np.float32(0.5)
    across = (centres - points[:, :1].astype(np.float32)) ** 2
    down = (centres - points[:, 1:].astype(np.float32)) ** 2
    # A minimum is the same in any order. The root comes last, of one number per pixel.
    distance = np.sqrt((down[:, :, None] + across[:, None, :]).min(axis=0))
    # The edge of the ink is one pixel wide, which is what averaging over a pixel's area comes to.
    coverage = np.clip(np.float32(radius + 0.5) - distance, 0, 1)
    return (np.float32(255) * coverage + np.float32(0.5)).astype(np.uint8)


def _rotate(vectors: np.ndarray, half_tangent: float) -> np.ndarray:
    """Returns vectors turned by the angle whose half has the given tangent: exact arithmetic, no sine needed."""
    square = half_tangent * half_tangent
    cosine, sine = (1 - square) / (1 + square), 2 * half_tangent / (1 + square)
    x, y = vectors[..., 0], vectors[..., 1]
    return np.stack([cosine * x - sine * y, sine * x + cosine * y], axis=-1)


def _direction(chances: np.ndarray) -> np.ndarray:
    """Returns a unit vector, roughly uniform over all directions, from two numbers in [0, 1)."""
    # Half tangents in [-1, 1) cover half a turn; the second number adds the other half.
    return _rotate(np.array([1.0 if chances[1] < 0.5 else -1.0, 0.0]), 2 * chances[0] - 1)


def _normal(shape: tuple[int, ...], *key: int) -> np.ndarray:
    """Returns nearly normal numbers with mean 0 and variance 1: sums of four uniform ones."""
    # Each has variance 1/12, four have 1/3: hence the root of 3.
    sums = random_uniform((*shape, 4), *key)
    # Written out, because `sum` may add in another order on another machine.
    return (sums[..., 0] + sums[..., 1] + sums[..., 2] + sums[..., 3] - 2) * np.sqrt(3.0)

"""Characters made from random strokes: Omniglot's shapes and counts without Omniglot's files.

Glyphs are hard for the same reasons as Omniglot. The characters of an alphabet share a small pool of strokes,
so they are easy to confuse. The 20 drawings of a character differ in shape, slant, size, place and pen.
Drawings are black on white at 105 x 105 and shrunk like Omniglot's. Ink, stroke thickness and the accuracy of
nearest neighbours on pixels are close to Omniglot's: with 15 examples per class, 50% of images are right for
50 background classes and 34% for 200 (Omniglot: 50% and 36%).
"""

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from datasets.images import SIZE, ImageSet, cached, shrink
from datasets.omniglot import CANVAS, CLASSES, DRAWINGS, characters
from utils.flag import Range

log = logging.getLogger("anml")

ALPHABETS = {"background": 30, "evaluation": 20}

Floats = NDArray[np.float64]

POOL = 9  # strokes that the characters of one alphabet are composed of
STROKES = 4  # largest number in one character
STROKE_COUNT = (0.4, 0.35, 0.25)  # probability of 2, 3 and 4 strokes in a character
SINGLE = 0.5  # probability that a stroke of the pool is a character by itself
KNOTS = 6  # points of a stroke, which is a smooth curve through them
SAMPLES = 96  # drawn points per stroke: close enough together for the thinnest pen
BORDER = 6  # pixels around the canvas for ink outside it, more than twice the pen's reach

EXTENT = 65.0  # pixels of the canvas, longer side of a character's box
KNOT_NOISE = 0.025  # std, as a fraction of the extent, like all the following
STROKE_SHIFT = 0.045
TRANSLATION = 0.084
ROTATION = 0.10  # std, radians
SHEAR = 0.12
SCALE = 0.13  # std of the logarithm, each axis
PEN_RADIUS = (2.1, 2.9)  # pixels of the canvas


def load(
    split: str,
    root: Path,
    cache_dir: Path,
    size: int = SIZE,
    *,
    glyph_seed: Annotated[int, "seed of the generated characters", Range(0, 2**32 - 1)] = 0,
) -> ImageSet:
    """The image set of characters generated from random strokes.

    Args:
        split: `background` (964 classes, meta-training) or `evaluation` (659, meta-test).
        root: unused.
        cache_dir: see :func:`datasets.images.cached`.
        size: side of the images, in pixels.
        glyph_seed: each seed gives other characters.
    """
    knots, radius = _strokes(split, glyph_seed)

    def make(positions: Sequence[int]) -> NDArray[np.uint8]:
        return _render(knots[list(positions)], radius[list(positions)], size)

    # The cache key covers the strokes of all images, since a changed constant may change a few images only.
    images = cached(cache_dir, f"glyphs-{split}", knots.tobytes() + radius.tobytes(), len(knots), make, size)
    if size > CANVAS:
        log.warning("glyphs %s: drawings of %d x %d pixels are enlarged", split, CANVAS, CANVAS)
    return characters(f"glyphs {split} (seed {glyph_seed})", split, images, names(split))


def names(split: str) -> tuple[str, ...]:
    """The names of the split's characters, `Glyphs01/character01` and so on, in sorted order.

    The evaluation alphabets are numbered after the background alphabets, so the splits share no alphabet.
    """
    first = 1 if split == "background" else 1 + ALPHABETS["background"]
    smaller, larger = divmod(CLASSES[split], ALPHABETS[split])
    return tuple(
        f"Glyphs{first + k:02d}/character{character:02d}"
        for k in range(ALPHABETS[split])
        for character in range(1, smaller + (k < larger) + 1)
    )


def _strokes(split: str, seed: int) -> tuple[Floats, Floats]:
    """The strokes of all drawings of `split`, class after class, the same for the same `seed` (0 or more).

    Returns:
        Knots `[N, STROKES, KNOTS, 2]`, in pixels of the canvas, NaN where a stroke does not exist, and the
        radius of the pen, `[N]`, in pixels of the canvas.
    """
    drawn = []
    for alphabet, count in Counter(int(name[6:8]) for name in names(split)).items():
        # Each alphabet has its own generator: the splits are independent of each other.
        rng = np.random.default_rng([seed, alphabet])
        knots = _drawings(rng, _prototypes(rng, _stroke_pool(rng), count))
        drawn.append((knots, rng.uniform(*PEN_RADIUS, len(knots))))
    knots, radius = map(np.concatenate, zip(*drawn, strict=True))
    return knots, radius


def _stroke_pool(rng: np.random.Generator) -> Floats:
    """Random strokes `[POOL, KNOTS, 2]` of four kinds: straight, bent, with a corner, wavy."""
    steps = KNOTS - 1
    kind = rng.choice(4, POOL, p=[0.3, 0.4, 0.2, 0.1])
    turn = rng.choice([-1.0, 1.0], POOL) * rng.uniform(0.45, 1.25, POOL)
    turns = np.zeros((POOL, steps))
    turns[kind == 1] = turn[kind == 1, None]
    corner = rng.integers(2, steps, POOL)
    snap = np.flatnonzero(kind == 2)
    turns[snap, corner[snap]] = 1.8 * turn[snap]
    turns[kind == 3] = turn[kind == 3, None] * np.where(np.arange(steps) % 2, -1.6, 1.6)
    # An odd number of directions: no two strokes run along the same line, in either sense.
    turns[:, 0] = (rng.permutation(POOL) + rng.random()) * 2 * np.pi / POOL
    turns += rng.normal(0.0, 0.12, turns.shape)
    heading = turns.cumsum(1)
    pace = rng.uniform(0.6, 1.4, (POOL, steps, 1))
    path = (pace * np.stack([np.cos(heading), np.sin(heading)], -1)).cumsum(1)
    path = np.concatenate([np.zeros((POOL, 1, 2)), path], 1)
    size = np.ptp(path, axis=1).max(-1)
    return np.asarray(path / size[:, None, None] * rng.uniform(0.5, 1.0, (POOL, 1, 1)))


def _prototypes(rng: np.random.Generator, pool: Floats, characters: int) -> Floats:
    """Characters `[C, STROKES, KNOTS, 2]` of strokes from the pool, centred; see :func:`_strokes`."""
    index = np.arange(characters)
    # A stroke can be a character by itself once only, else two classes would look the same.
    single = (index < POOL) & (rng.random(characters) < SINGLE)
    count = np.where(single, 1, rng.choice([2, 3, 4], characters, p=STROKE_COUNT))
    stroke_ids = rng.integers(0, POOL, (characters, STROKES))
    stroke_ids[:, 0] = index % POOL
    knots = pool[stroke_ids]
    for stroke in range(1, STROKES):
        # Most strokes touch a knot of an earlier stroke; the others float nearby.
        earlier = knots[index, rng.integers(0, stroke, characters)]
        target = earlier[index, rng.integers(0, KNOTS, characters)]
        own = knots[index, stroke, rng.choice([0, KNOTS // 2, KNOTS - 1], characters)]
        floating = rng.random(characters) < 0.3
        target = target + floating[:, None] * rng.normal(0.0, 0.35, (characters, 2))
        knots[:, stroke] += (target - own)[:, None]
    knots[np.arange(STROKES) >= count[:, None]] = np.nan
    low, high = np.nanmin(knots, (1, 2)), np.nanmax(knots, (1, 2))
    knots = knots - ((low + high) / 2)[:, None, None]
    extent = EXTENT * np.exp(rng.normal(0.0, 0.12, characters)) * (0.75 + 0.09 * count)
    size = np.maximum((high - low).max(-1), 0.3)
    return np.asarray(knots * (extent / size)[:, None, None, None])


def _drawings(rng: np.random.Generator, knots: Floats) -> Floats:
    """Drawings `[C * DRAWINGS, STROKES, KNOTS, 2]`: variations of prototypes `[C, STROKES, KNOTS, 2]`."""
    characters = len(knots)
    each = (characters, DRAWINGS)
    varied = knots[:, None] + EXTENT * (
        rng.normal(0.0, KNOT_NOISE, (*each, STROKES, KNOTS, 2))
        + rng.normal(0.0, STROKE_SHIFT, (*each, STROKES, 1, 2))
    )
    angle = rng.normal(0.0, ROTATION, each)
    rotation = np.stack([np.cos(angle), np.sin(angle), -np.sin(angle), np.cos(angle)], -1)
    slant = np.zeros((*each, 2, 2))
    slant[..., 0, 0], slant[..., 1, 1] = np.exp(rng.normal(0.0, SCALE, (2, *each)))
    slant[..., 1, 0] = rng.normal(0.0, SHEAR, each)
    affine = slant @ rotation.reshape(*each, 2, 2)
    place = CANVAS / 2 + EXTENT * rng.normal(0.0, TRANSLATION, (*each, 1, 1, 2))
    drawings: Floats = varied @ affine[:, :, None] + place
    return drawings.reshape(-1, STROKES, KNOTS, 2)


def _spline() -> Floats:
    """Weights of the knots in the points of the Catmull-Rom curve, `[SAMPLES, KNOTS]`."""
    position = np.linspace(0.0, KNOTS - 1.0, SAMPLES)
    segment = np.minimum(position.astype(int), KNOTS - 2)
    t = position - segment
    curve = -t / 2 + t**2 - t**3 / 2, 1 - 2.5 * t**2 + 1.5 * t**3, t / 2 + 2 * t**2 - 1.5 * t**3
    weights = (*curve, -(t**2) / 2 + t**3 / 2)
    # The curve ends at its outer knots. Further knots continue the curve in a straight line.
    knots = np.pad(np.eye(KNOTS), ((1, 1), (0, 0)), "reflect", reflect_type="odd")
    return np.asarray(sum(weight[:, None] * knots[segment + k] for k, weight in enumerate(weights)))


def _render(knots: Floats, radius: Floats, size: int) -> NDArray[np.uint8]:
    """Images uint8 `[N, 1, S, S]` of N drawings, see :func:`_strokes`, made with a round pen and shrunk."""
    drawing, stroke = np.nonzero(~np.isnan(knots[..., 0, 0]))
    points = (_spline() @ knots)[drawing, stroke]
    radius = radius[drawing]
    reach = int(max(PEN_RADIUS))
    side = CANVAS + 2 * BORDER
    pixel = np.clip(np.rint(points).astype(np.intp) + BORDER, reach, side - 1 - reach)
    index = (drawing[:, None] * side + pixel[..., 1]) * side + pixel[..., 0]
    canvas = np.full((len(knots), side, side), 255, np.uint8)
    ink = canvas.reshape(-1)
    for down in range(-reach, reach + 1):
        for right in range(-reach, reach + 1):
            ink[index[radius >= np.hypot(down, right)] + down * side + right] = 0
    inside = slice(BORDER, BORDER + CANVAS)
    return np.stack([shrink(Image.fromarray(picture[inside, inside]), size)[None] for picture in canvas])

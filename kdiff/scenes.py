"""Captioned images without a download: coloured shapes, drawn from a caption and recognised in the image.

    scene = Scene.parse("a small red circle above a large blue square on a white background")
    scene.draw(32)                     # uint8, (32, 32, 3)
    read(scene.draw(32)) == scene      # True

    images, captions = dataset(10000, 32)                     # for training
    images, captions = dataset(500, 32, held_out=True)        # pairs of things never seen together in training

A scene has one thing, or two in a relation. In training, each colour, shape and size occurs in every position; one in
eight of the pairs of (colour, shape) and (colour, shape) does not occur.
"""

import collections
import functools
import itertools
import math
import re
import zlib
from typing import Any, NamedTuple

import numpy as np

from kdiff.base import check_integer

__all__ = [
    "BACKGROUNDS",
    "CENTRES",
    "COLOURS",
    "EDGE",
    "ENOUGH",
    "NEAR",
    "RELATIONS",
    "SAMPLES",
    "SHAPES",
    "SIZES",
    "Scene",
    "Thing",
    "dataset",
    "read",
    "same",
]

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (150, 60, 190),
    "orange": (245, 140, 30),
}
BACKGROUNDS = {"black": (0, 0, 0), "white": (255, 255, 255), "gray": (128, 128, 128)}
SIZES = {"small": 0.13, "large": 0.21}  # half the side, as a fraction of that of the image
RELATIONS = {"above": (0, -1), "below": (0, 1), "left of": (-1, 0), "right of": (1, 0)}  # (x, y), from second to first
EDGE = 4  # samples per pixel along each axis


def _circle(x, y):
    return x**2 + y**2 <= 1


def _square(x, y):
    return np.maximum(abs(x), abs(y)) <= 1


def _triangle(x, y):
    return (abs(y) <= 1) & (2 * abs(x) <= 1 + y)


SHAPES = {"circle": _circle, "square": _square, "triangle": _triangle}


class Thing(NamedTuple):
    """A shape with a size and a colour."""

    size: str
    colour: str
    shape: str


class Scene(NamedTuple):
    """One thing, or two in a relation, on a background.

    Attributes:
        first: the thing that the relation describes.
        relation: "above", "below", "left of" or "right of"; None for one thing.
        second: the other thing, or None.
        background: "black", "white" or "gray".
    """

    first: Thing
    relation: str | None = None
    second: Thing | None = None
    background: str = "black"

    @property
    def caption(self) -> str:
        """The scene as a sentence, which `parse` reads."""
        things = [f"a {' '.join(thing)}" for thing in (self.first, self.second) if thing]
        return f" {self.relation} ".join(things) + f" on a {self.background} background"

    @classmethod
    def parse(cls, caption: str) -> "Scene":
        """The scene that a caption describes. The default background is black.

        Raises:
            ValueError: if the caption has other words or another word order.
        """
        match = re.fullmatch(_GRAMMAR, caption.strip().lower())
        if not match:
            raise ValueError(
                f"shapes: a caption is such as 'a small red circle above a large blue square on a white background', "
                f"of {list(SIZES)}, {list(COLOURS)}, {list(SHAPES)}, {list(RELATIONS)}, {list(BACKGROUNDS)}; received: "
                f"{caption!r}"
            )
        words = match.groups()
        second = Thing(*words[4:7]) if words[3] else None
        return cls(Thing(*words[:3]), words[3], second, words[7] or "black")

    @property
    def held_out(self) -> bool:
        """Whether its two things never occur together in training, in any order, size, relation or background."""
        if self.second is None:
            return False
        return _never_together(self.first[1:], self.second[1:])

    def draw(self, size: int, generator: np.random.Generator | None = None) -> np.ndarray:
        """The image, uint8 with shape `(size, size, 3)`; with a generator, its things are moved slightly."""
        return _draw([self], np.zeros((1, 2, 2)) if generator is None else _moves(generator, 1), size)[0]

    def _placed(self, moves):
        """The things and their centres, so that they touch neither the edge nor each other."""
        if self.second is None:
            return [(self.first, 0.5 + 3 * moves[0])]
        step = 0.25 * np.array(RELATIONS[self.relation])
        return [(self.first, 0.5 + step + moves[0]), (self.second, 0.5 - step + moves[1])]


@functools.cache
def _never_together(first, second):
    return zlib.crc32(repr(sorted([first, second])).encode()) % 8 == 0


def _words(table):
    return f"({'|'.join(table)})"


_THING = f"an? {_words(SIZES)} {_words(COLOURS)} {_words(SHAPES)}"
_GRAMMAR = f"{_THING}(?: {_words(RELATIONS)} {_THING})?(?: on a {_words(BACKGROUNDS)} background)?"


def dataset(
    count: int, image_size: int = 32, held_out: bool = False, seed: int = 0, rows: Any = None
) -> tuple[np.ndarray, list[str]]:
    """Images and their captions, which are the same for the same arguments.

    Args:
        count: the number of images.
        image_size: their side, in pixels.
        held_out: whether all of them show a pair of things that never occurs in training; otherwise none does.
        seed: the seed of the scenes.
        rows: the indices of the images that are drawn and returned; None: all.

    Returns:
        uint8 images `(count, image_size, image_size, 3)`, and the captions.

    Raises:
        ValueError: if `count` or `image_size` is not an integer above 0.
    """
    check_integer("dataset", "count", count)
    check_integer("dataset", "image_size", image_size)
    generator = np.random.default_rng([seed, held_out])
    scenes = list(itertools.islice((s for s in _random_scenes(generator) if s.held_out == held_out), count))
    moves = _moves(generator, count)
    rows = np.arange(count) if rows is None else np.asarray(rows, int)
    scenes = [scenes[row] for row in rows]
    return _draw(scenes, moves[rows], image_size), [scene.caption for scene in scenes]


def _moves(generator, count):
    """The shifts, in x and y, of the two things in each of `count` scenes."""
    return generator.uniform(-0.04, 0.04, (count, 2, 2))


def _draw(scenes, moves, size):
    """The images of scenes. A pixel is the mean of its samples, each of which shows a thing or the background.

    Things do not overlap, so each is added to the sums, which are integers, in a box around it; those of one kind and
    one position in the caption are drawn together.
    """
    chunk = max(1, SAMPLES // (size * EDGE) ** 2)
    if len(scenes) > chunk:
        starts = range(0, len(scenes), chunk)
        return np.concatenate([_draw(scenes[i : i + chunk], moves[i : i + chunk], size) for i in starts])
    grounds = np.array([BACKGROUNDS[scene.background] for scene in scenes], "int64").reshape(-1, 3)
    sums = np.tile(EDGE**2 * grounds[:, None, None], (1, size, size, 1))
    kinds = collections.defaultdict(list)
    for index, scene in enumerate(scenes):
        for place, (thing, centre) in enumerate(scene._placed(moves[index])):
            kinds[thing.shape, thing.size, place].append((index, COLOURS[thing.colour], centre))
    for (shape, half, _), things in kinds.items():
        picture, colour, centre = (np.array(column) for column in zip(*things, strict=True))
        row, column, covered = _covered(shape, SIZES[half], centre, size)
        sums[picture[:, None, None], row[:, :, None], column[:, None]] += (
            covered[..., None] * (colour - grounds[picture])[:, None, None]
        )
    return np.round(sums / EDGE**2).astype("uint8")


SAMPLES = 2**19  # the number that are drawn together


def _covered(shape, half, centres, size):
    """The rows and columns of a box around each shape, `(count, side)`, and the number of its samples in each pixel."""
    side = min(size, math.ceil(2 * half * size) + 1)
    corner = np.clip(np.floor((centres - half) * size).astype(int), 0, size - side)
    samples = EDGE * corner[..., None] + np.arange(EDGE * side)
    x, y = (((samples + 0.5) / (size * EDGE) - centres[..., None]) / half).swapaxes(0, 1)
    inside = SHAPES[shape](x[:, None], y[:, :, None]).reshape(-1, side, EDGE, side, EDGE)
    column, row = (corner[..., None] + np.arange(side)).swapaxes(0, 1)
    return row, column, inside.sum((2, 4))


def _random_scenes(generator):
    sizes, colours, kinds, relations, backgrounds = map(list, (SIZES, COLOURS, SHAPES, RELATIONS, BACKGROUNDS))

    def choice(names):
        return names[generator.integers(len(names))]

    def thing():
        return Thing(choice(sizes), choice(colours), choice(kinds))

    while True:
        first, second = thing(), thing() if generator.random() < 0.8 else None
        if second is None or second.colour != first.colour:
            yield Scene(first, choice(relations) if second else None, second, choice(backgrounds))


def read(image: np.ndarray) -> Scene | None:
    """The scene that an image shows, or None if it shows none; it measures how well samples follow their captions.

    The background is the colour of most of the border. A thing is found where enough pixels are near one of the
    colours; its shape and size are those whose drawing is most similar. A pixel on an edge counts by the fraction of it
    that has the colour.

    Args:
        image: an array with shape `(size, size, 3)`, uint8, or floating-point in [-1, 1].
    """
    image = np.asarray(image)
    image = image.astype("float64") if image.dtype == np.uint8 else (image.astype("float64") + 1) * 127.5
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    background = min(BACKGROUNDS, key=lambda name: np.median(_distance(border, BACKGROUNDS[name])))
    near = {colour: _distance(image, COLOURS[colour]) < NEAR for colour in COLOURS}
    colours = [colour for colour in COLOURS if near[colour].mean() > ENOUGH]
    if not 1 <= len(colours) <= 2:
        return None
    centres = np.array([np.argwhere(near[colour]).mean(0) for colour in colours])
    positions = np.stack(np.mgrid[: len(image), : len(image)], -1)
    nearest = np.argmin([np.linalg.norm(positions - centre, axis=-1) for centre in centres], axis=0)
    parts = [
        _coverage(image, COLOURS[colour], BACKGROUNDS[background]) * (nearest == i) for i, colour in enumerate(colours)
    ]
    if not all(part.any() for part in parts):  # scattered pixels, each nearer to the centre of the other colour
        return None
    return _related([_thing(*pair) for pair in zip(parts, colours, strict=True)], centres, background)


NEAR = 45.0  # the distance in RGB within which a pixel has a colour: half that of the two most similar
ENOUGH = 0.008  # a fraction of the image: a quarter of the smallest thing


def _distance(image, colour):
    return np.linalg.norm(image - np.array(colour), axis=-1)


def _coverage(image, colour, background):
    """The fraction of each pixel that has the colour, if the rest is background; 0 if it is not such a mixture."""
    line = np.array(colour, "float64") - background
    part = np.clip((image - background) @ line / (line @ line), 0, 1)
    return np.where((_distance(image, background + part[..., None] * line) < NEAR) & (part > 0.1), part, 0)


def _thing(coverage, colour):
    """The thing whose drawing, with the same centre of mass, is most similar to these pixels."""
    size = len(coverage)
    x, y = _grid(size)
    mass = coverage / coverage.sum()
    pixel_x, pixel_y = (_pixels(axis[..., None])[..., 0] for axis in (x, y))
    centre = np.array([(mass * pixel_x).sum(), (mass * pixel_y).sum()])

    def difference(kind):
        shape, half = kind[0], SIZES[kind[1]]
        drawn = SHAPES[shape]((x - centre[0]) / half, (y - centre[1]) / half + CENTRES[shape])
        return ((_pixels(drawn[..., None].astype("float64"))[..., 0] - coverage) ** 2).sum()

    shape, size = min(itertools.product(SHAPES, SIZES), key=difference)
    return Thing(size, colour, shape)


CENTRES = {"circle": 0.0, "square": 0.0, "triangle": 1 / 3}  # the centre of mass, relative to the middle


def _grid(size):
    """x and y of each sample, from 0 to 1."""
    y, x = (np.mgrid[: size * EDGE, : size * EDGE] + 0.5) / (size * EDGE)
    return x, y


def _pixels(samples):
    """The means over the samples of each pixel."""
    size = len(samples) // EDGE
    return samples.reshape(size, EDGE, size, EDGE, -1).mean((1, 3))


def _related(things, centres, background):
    if len(things) == 1:
        return Scene(things[0], background=background)
    dy, dx = centres[0] - centres[1]
    name = ("left of" if dx < 0 else "right of") if abs(dx) > abs(dy) else ("above" if dy < 0 else "below")
    return Scene(things[0], name, things[1], background)


def same(scene: Scene | None, wanted: Scene) -> bool:
    """Whether two scenes are the same, regardless of which thing is named first."""
    return scene is not None and _canonical(scene) == _canonical(wanted)


def _canonical(scene: Scene) -> Scene:
    opposite = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
    if scene.second is None or scene.first <= scene.second:
        return scene
    return Scene(scene.second, opposite[scene.relation], scene.first, scene.background)

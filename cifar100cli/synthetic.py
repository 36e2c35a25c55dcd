"""A drawn data set with CIFAR-100's shape, for a first run without a download and for tests.

A class is a pair: one of 20 outlines (the superclass) and one of 5 textures inside it. Place, size, turn,
both colours, the background's slope and the noise are drawn afresh for every image, so that no pixel
says anything by itself: a model has to learn shapes. The outlines are superformula curves (Gielis, 2003,
"A generic geometric transformation that unifies a wide range of natural and abstract shapes").
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cifar100cli.catalog import DATASETS, SIDE

_ABOUT = DATASETS["synthetic"]
TRAIN_PER_CLASS = _ABOUT.training_images // _ABOUT.classes
TEST_PER_CLASS = _ABOUT.test_images // _ABOUT.classes
SEED = 100

# Name, and m, n1, n2, n3 of r(angle) = (|cos(m angle / 4)|^n2 + |sin(m angle / 4)|^n3)^(-1 / n1).
OUTLINES: dict[str, tuple[float, float, float, float]] = {
    "disc": (0, 1, 1, 1),
    "lens": (2, 1.2, 1.2, 1.2),
    "drop": (1, 0.5, 0.5, 0.5),
    "bean": (2, 0.9, 4, 8),
    "triangle": (3, 4.5, 10, 10),
    "trefoil": (3, 0.6, 0.9, 0.9),
    "propeller": (3, 0.35, 0.35, 0.35),
    "square": (4, 12, 15, 15),
    "diamond": (4, 1, 1, 1),
    "astroid": (4, 0.5, 0.5, 0.5),
    "clover": (4, 1.6, 6, 6),
    "pentagon": (5, 18, 26, 26),
    "starfish": (5, 0.9, 1.7, 1.7),
    "flower": (5, 2, 7, 7),
    "hexagon": (6, 60, 55, 55),
    "snowflake": (6, 0.5, 0.9, 0.9),
    "cogwheel": (8, 2.5, 8, 8),
    "burr": (9, 0.6, 1, 1),
    "saw": (12, 1.5, 1, 5),
    "sun": (16, 0.5, 0.5, 1.6),
}
TEXTURES = ("plain", "striped", "checked", "dotted", "ringed")


@dataclass(frozen=True)
class Drawn:
    """Images (N, 3, 32, 32) uint8 and labels (N,) int64 of both splits, and the names."""

    train: tuple[NDArray[np.uint8], NDArray[np.int64]]
    test: tuple[NDArray[np.uint8], NDArray[np.int64]]
    classes: tuple[str, ...]
    superclasses: tuple[str, ...]
    superclass_of: tuple[int, ...]


def draw(train_per_class: int = TRAIN_PER_CLASS, test_per_class: int = TEST_PER_CLASS) -> Drawn:
    """Draw the data set. Always the same images for the same counts."""
    classes = tuple(f"{texture}_{outline}" for outline in OUTLINES for texture in TEXTURES)
    return Drawn(
        train=_draw_split(train_per_class, np.random.default_rng([SEED, 0])),
        test=_draw_split(test_per_class, np.random.default_rng([SEED, 1])),
        classes=classes,
        superclasses=tuple(OUTLINES),
        superclass_of=tuple(index // len(TEXTURES) for index in range(len(classes))),
    )


def _draw_split(per_class: int, generator: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    labels = generator.permutation(np.repeat(np.arange(len(OUTLINES) * len(TEXTURES)), per_class))
    images = np.empty((len(labels), 3, SIDE, SIDE), np.uint8)
    for start in range(0, len(labels), 1000):  # keeps the temporaries in the cache
        images[start : start + 1000] = _draw_batch(labels[start : start + 1000], generator)
    return images, labels.astype(np.int64)


def _draw_batch(labels: NDArray[np.int64], generator: np.random.Generator) -> NDArray[np.uint8]:
    count = len(labels)

    def uniform(low: float, high: float, *shape: int) -> NDArray[np.float32]:
        return (low + (high - low) * generator.random((count, *(shape or (1, 1))), np.float32)).astype(np.float32)

    grid = np.linspace(-1, 1, SIDE, dtype=np.float32)
    x = grid[None, None, :] - uniform(-0.2, 0.2)
    y = grid[None, :, None] - uniform(-0.2, 0.2)
    turn, size = uniform(-0.35, 0.35), uniform(0.55, 0.85)
    u, v = (np.cos(turn) * x + np.sin(turn) * y) / size, (np.cos(turn) * y - np.sin(turn) * x) / size
    radius = np.sqrt(u * u + v * v)

    inside = _sigmoid((_outline(labels // len(TEXTURES), np.arctan2(v, u)) - radius) * size * 16)
    texture = _texture(labels % len(TEXTURES), u, v, radius, uniform(6.5, 8.5), uniform(0, 6.28))

    background, figure = uniform(0.1, 0.9, 3, 1, 1), uniform(0.1, 0.9, 3, 1, 1)
    # Colours too alike to tell the figure from its ground are pushed apart.
    gap = figure - background
    apart = np.where(background < 0.5, np.float32(0.35), np.float32(-0.35))
    gap = np.where(np.abs(gap) < 0.25, apart, gap)
    slope = uniform(-0.2, 0.2) * grid[None, None, :] + uniform(-0.2, 0.2) * grid[None, :, None]
    blend = (inside * (0.25 + 0.75 * texture))[:, None]
    picture = background + slope[:, None] + blend * (gap - slope[:, None])
    picture += 0.06 * generator.standard_normal(picture.shape, np.float32)
    pixels: NDArray[np.uint8] = (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)
    return pixels


def _outline(outline: NDArray[np.int64], angle: NDArray[np.float32]) -> NDArray[np.float32]:
    """The radius (N, 32, 32) of each image's outline in the direction of each pixel, at most 1."""
    steps = 1024  # a table over the full turn, so that the powers are taken once and not for each pixel
    turn = np.linspace(-np.pi, np.pi, steps, endpoint=False)
    tables = []
    for m, n1, n2, n3 in OUTLINES.values():
        radius = (np.abs(np.cos(m * turn / 4)) ** n2 + np.abs(np.sin(m * turn / 4)) ** n3) ** (-1 / n1)
        tables.append(radius / radius.max())
    column = ((angle + np.pi) * (steps / (2 * np.pi))).astype(np.int64) % steps
    found: NDArray[np.float32] = np.stack(tables).astype(np.float32)[outline[:, None, None], column]
    return found


def _texture(
    texture: NDArray[np.int64],
    u: NDArray[np.float32],
    v: NDArray[np.float32],
    radius: NDArray[np.float32],
    frequency: NDArray[np.float32],
    phase: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Brightness (N, 32, 32) from 0 to 1 inside the outline."""
    value = np.ones(np.broadcast_shapes(u.shape, v.shape), np.float32)
    for index, name in enumerate(TEXTURES):
        chosen = texture == index
        f, p = frequency[chosen], phase[chosen]
        across, down = np.sin(f * u[chosen] + p), np.sin(f * v[chosen] + p)
        if name == "striped":
            value[chosen] = _sigmoid(6 * down)
        elif name == "checked":
            value[chosen] = _sigmoid(9 * across * down)
        elif name == "dotted":
            value[chosen] = _sigmoid(8 * (across + down - 0.9))
        elif name == "ringed":
            value[chosen] = _sigmoid(6 * np.sin(1.3 * f * radius[chosen] + p))
    return value


def _sigmoid(value: NDArray[np.float32]) -> NDArray[np.float32]:
    result: NDArray[np.float32] = np.reciprocal(1 + np.exp(-value))
    return result

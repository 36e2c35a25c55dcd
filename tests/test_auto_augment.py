"""RandAugment and TrivialAugment, held to torchvision: every operation in every strength, and how often each is drawn.

On a CPU with AVX2 every bit is torchvision's. Where PyTorch's kernels round otherwise a blend may be a level off, and a
place half-way between two pixels may be read from the other one.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as reference

from cifar100cli import augment, auto_augment, synthetic
from cifar100cli.augment import Transform
from tests.conftest import epoch_of, varied

NAMES = (
    *("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness"),
    *("Color", "Contrast", "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize"),
)
LIBRARY: dict[bool, Any] = {False: v2.RandAugment(), True: v2.TrivialAugmentWide()}  # by whether the space is wide
BLENDS = {auto_augment.COLOR, auto_augment.CONTRAST, auto_augment.SHARPNESS}
TURNS = {auto_augment.SHEAR_X, auto_augment.SHEAR_Y, auto_augment.ROTATE}


def magnitudes_of(name: str, height: int, width: int, *, wide: bool) -> list[list[float]]:
    """The library's, by bin and sign."""
    table, signed = LIBRARY[wide]._AUGMENTATION_SPACE[name]
    values = table(31, height, width)
    positive = [0.0] * 31 if values is None else [float(value) for value in values]
    return [[value, -value if signed else value] for value in positive]


@pytest.fixture(scope="module")
def images(few_drawings: synthetic.Drawn) -> Tensor:
    """(12, 3, 32, 32): pictures, noise, and images of one colour and of two."""
    pictures = torch.from_numpy(few_drawings.train[0][:12]).clone()
    pictures[6:9] = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pictures[9], pictures[10] = 77, 0
    pictures[10, :, 5:] = torch.tensor([255, 255, 1], dtype=torch.uint8)[:, None, None]  # blue, the next level
    pictures[11] = pictures[11] // 8 + 100
    return pictures


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 40)])
def test_strengths_are_the_librarys(height: int, width: int, *, wide: bool) -> None:
    table = auto_augment.strengths(height, width, wide=wide)
    assert list(LIBRARY[wide]._AUGMENTATION_SPACE) == list(NAMES)
    for operation, name in enumerate(NAMES):
        assert table[operation].tolist() == magnitudes_of(name, height, width, wide=wide), name


def between_pixels(operation: int, magnitude: float, height: int, width: int) -> Tensor:
    """(H, W) bool: where two pixels are as near, and how a processor rounds decides which one is read."""
    matrix = auto_augment.matrices(torch.tensor([operation]), torch.tensor([magnitude]), height, width)[0].double()
    y, x = torch.meshgrid(torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2, indexing="ij")
    read = torch.einsum("ij,jhw->ihw", matrix, torch.stack([x, y, torch.ones_like(x)]).double())
    places = read + torch.tensor([width - 1, height - 1])[:, None, None] / 2
    return ((places % 1 - 0.5).abs() < 1e-4).any(0)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("operation", range(len(NAMES)), ids=NAMES)
def test_operations_are_the_librarys(operation: int, images: Tensor, *, wide: bool) -> None:
    for height, width in ((32, 32), (24, 40)):  # turned by 90 degrees, whole pixels come to lie on whole pixels
        cut = images.repeat(1, 1, 1, 2)[:, :, :height, :width]
        table = auto_augment.strengths(height, width, wide=wide)[operation]
        for magnitude in torch.unique(table).tolist():
            ours = auto_augment.operate(
                cut, torch.full((len(cut),), operation), torch.full((len(cut),), float(magnitude))
            )
            theirs = LIBRARY[wide]._apply_image_or_video_transform(
                cut, NAMES[operation], magnitude, v2.InterpolationMode.NEAREST, LIBRARY[wide]._fill
            )
            off = (ours.int() - theirs.int()).abs()
            if operation in BLENDS:
                assert off.max() <= 1
                assert (off > 0).float().mean() < 0.002
            elif operation in TURNS:
                assert (off > 0).float().mean() < 0.01
                assert not (off * ~between_pixels(operation, magnitude, height, width)).any()
            else:
                assert not off.any()


def test_operations_by_name() -> None:
    """The constants are the places in torchvision's order."""
    for operation, name in enumerate(auto_augment.OPERATIONS):
        assert getattr(auto_augment, name.upper()) == operation
        assert NAMES[operation].lower() == name.replace("_", "")


def test_a_batch_of_all_operations_is_each_by_itself(images: Tensor) -> None:
    """In parts, as on a CPU, and all at once, as on a GPU."""
    ops = torch.arange(len(images)) % 14
    magnitudes = auto_augment.strengths(32, 32, wide=True)[ops, 20, 1]
    together = auto_augment.operate(images, ops, magnitudes)
    for index in range(len(images)):
        one = slice(index, index + 1)
        assert torch.equal(auto_augment.operate(images[one], ops[one], magnitudes[one]), together[one])
    kinds = torch.tensor(auto_augment.KIND_OF)[ops]
    drawn = [(ops, magnitudes)] * len(auto_augment.KINDS)
    assert torch.equal(augment.apply_to_all(auto_augment.KINDS, images, kinds, drawn), together)


def test_operations_come_one_after_the_other(images: Tensor) -> None:
    ops = torch.tensor([[auto_augment.POSTERIZE, auto_augment.ROTATE, auto_augment.SOLARIZE]]).expand(len(images), -1)
    magnitudes = torch.tensor([[3.0, 45.0, 0.5]]).expand(len(images), -1)
    theirs = reference.solarize(reference.rotate(reference.posterize(images, 3), 45.0), 0.5 * 255)
    off = auto_augment.apply(images, ops, magnitudes) != theirs
    assert off.float().mean() < 0.002


# --------------------------------------------------------------------------------------------- drawing


def evenly(counts: Tensor, draws: int) -> bool:
    """Within five deviations of what is expected, where all are as likely."""
    share = 1 / len(counts)
    return bool(((counts - draws * share).abs() < 5 * math.sqrt(draws * share * (1 - share))).all())


@pytest.mark.parametrize("wide", [False, True])
def test_every_operation_in_every_strength_as_often(*, wide: bool) -> None:
    count = 60_000
    policy = auto_augment.trivial_augment() if wide else auto_augment.rand_augment(3, 9)
    ops, magnitudes = policy.draw(epoch_of(count))
    assert ops.shape == magnitudes.shape == (count, 1 if wide else 3)
    for op, magnitude in zip(ops.T, magnitudes.T, strict=True):
        assert evenly(torch.bincount(op, minlength=14), count)
        for operation, name in enumerate(NAMES):
            found = magnitude[op == operation]
            expected = magnitudes_of(name, 32, 32, wide=wide)
            allowed = torch.tensor(expected if wide else expected[9:10]).flatten()
            values, counts = torch.unique(found, return_counts=True)
            assert torch.equal(values, torch.unique(allowed))
            for value, times in zip(values.tolist(), counts.tolist(), strict=True):
                share = (allowed == value).float().mean().item()
                assert abs(times - len(found) * share) <= 5 * math.sqrt(len(found) * share * (1 - share)), name
    if not wide:
        pairs = ops[:, 0] * 14 + ops[:, 1]
        assert evenly(torch.bincount(pairs, minlength=14 * 14), count), "they do not depend on each other"


@pytest.mark.parametrize("magnitude", [0, 30])
def test_the_weakest_and_the_strongest(magnitude: int) -> None:
    ops, magnitudes = auto_augment.rand_augment(2, magnitude).draw(epoch_of(1000))
    expected = np.array([magnitudes_of(name, 32, 32, wide=False)[magnitude] for name in NAMES])
    assert np.isclose(magnitudes.numpy()[..., None], expected[ops.numpy()]).any(-1).all()


@pytest.mark.parametrize("policy", [auto_augment.trivial_augment(), auto_augment.rand_augment(2, 9)])
def test_most_images_are_changed(policy: Transform, images: Tensor) -> None:
    many = images[:6].repeat(50, 1, 1, 1)
    changed = (varied(policy, many, torch.Generator().manual_seed(0)) != many).flatten(1).any(1)
    assert 0.6 < changed.float().mean() < 1

"""Cutout and Random Erasing: what is covered, and how the boxes are distributed."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import v2

from cifar100cli import erasing
from tests.conftest import distance_of_distributions, epoch_of

Array = NDArray[np.float64]
COLOR = (124, 116, 104)


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (200, 3, 24, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def covered(image: Tensor, left: int, top: int, right: int, bottom: int) -> Tensor:
    result = image.clone()
    result[:, top:bottom, left:right] = torch.tensor(COLOR, dtype=torch.uint8)[:, None, None]
    return result


@pytest.mark.parametrize("policy", [erasing.cutout(8, COLOR), erasing.random_erasing(0.5, COLOR)])
def test_the_drawn_box_is_what_is_covered(policy: Any, images: Tensor) -> None:
    (boxes,) = policy.draw(epoch_of(len(images), 24, 40))
    assert boxes.shape == (len(images), 1, 4)
    for before, after, box in zip(images, policy.apply(images, boxes), boxes[:, 0].tolist(), strict=True):
        assert torch.equal(after, covered(before, *box))


@pytest.mark.parametrize("side", [1, 7, 16, 64])
def test_squares_have_their_centre_on_any_pixel(side: int) -> None:
    """As in the paper's code: the centre is drawn, and what is beyond the border is cut off."""
    draws, height, width = 20_000, 24, 40
    boxes = erasing.draw_square(epoch_of(draws, height, width), side)[0][:, 0]
    for low, high, size in ((boxes[:, 0], boxes[:, 2], width), (boxes[:, 1], boxes[:, 3], height)):
        centres = [(max(c - side // 2, 0), min(c - side // 2 + side, size)) for c in range(size)]
        counts = dict.fromkeys(centres, 0)
        for pair in zip(low.tolist(), high.tolist(), strict=True):
            counts[pair] += 1
        for pair, count in counts.items():
            share = centres.count(pair) / size
            assert abs(count - draws * share) < 5 * math.sqrt(draws * share * (1 - share)) + 1
    together = np.corrcoef(boxes[:, 0].numpy(), boxes[:, 1].numpy())[0, 1] if side < 64 else 0
    assert abs(together) < 5 / math.sqrt(draws)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 40), (12, 64)])
def test_boxes_are_distributed_as_torchvisions(height: int, width: int) -> None:
    draws = 3000
    left, top, right, bottom = erasing.draw_erased(epoch_of(draws, height, width), 1.0)[0][:, 0].double().unbind(1)
    library = v2.RandomErasing(p=1)
    torch.manual_seed(0)
    image = torch.zeros(3, height, width)
    drawn = [library.make_params([image]) for _ in range(draws)]
    drawn = [one if one["v"] is not None else dict.fromkeys("ijhw", 0) for one in drawn]
    theirs = [np.array([float(one[name]) for one in drawn]) for name in "jiwh"]
    ours = [values.numpy() for values in (left, top, right - left, bottom - top)]
    limit = 2.7 * math.sqrt(2 / draws)  # exceeded once in a million times if the distributions are the same
    for one, other in zip(ours, theirs, strict=True):
        assert distance_of_distributions(one, other) < limit
    areas = [one[2] * one[3] / (height * width) for one in (ours, theirs)]
    ratios = [one[3] / np.maximum(one[2], 1) for one in (ours, theirs)]
    assert distance_of_distributions(areas[0], areas[1]) < limit
    assert distance_of_distributions(ratios[0], ratios[1]) < limit
    assert areas[0].max() < 0.37
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (right <= width).all()
    assert (bottom <= height).all()
    if height == width:
        assert areas[0].min() > 0.01
        assert abs(areas[0].mean() - 0.175) < 0.01


@pytest.mark.parametrize("probability", [0.1, 0.5, 1.0])
def test_as_many_are_erased_as_is_asked_for(probability: float) -> None:
    boxes = erasing.draw_erased(epoch_of(10_000), probability)[0][:, 0]
    share = (boxes[:, 2:] > boxes[:, :2]).all(1).double().mean().item()
    assert abs(share - probability) <= 5 * math.sqrt(probability * (1 - probability) / 10_000)
    assert not boxes[boxes[:, 2] == 0].any(), "an image that is left alone has an empty box"

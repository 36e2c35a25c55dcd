"""Rectangles of images covered with one colour: Cutout and Random Erasing, for whole batches on their device.

Boxes are as `augment.inside` takes them. The colour is the one that normalising makes zero: the mean, or black.
"""

import functools
import math

import torch
from torch import Tensor

from cifar100cli.augment import Drawn, Epoch, Transform, constant, inside

Color = tuple[int, int, int]  # levels of red, green and blue

SHARES, RATIOS = (0.02, 0.33), (0.3, 3.3)  # of an erased box: of the image's area; its height by its width
TRIES = 10  # at a box that fits


def cover(images: Tensor, boxes: Tensor, color: Color) -> Tensor:
    """The images (N, 3, H, W) uint8 with `color` in their boxes (N, boxes, 4)."""
    paint = constant(color, images.device, torch.uint8)[:, None, None]
    return torch.where(inside(boxes, *images.shape[-2:]), paint, images)


def draw_square(epoch: Epoch, side: int) -> Drawn:
    """A box (N, 1, 4) for each image: a square with its centre on any pixel, cut off at the image's border."""
    size = torch.stack([constant((epoch.width, epoch.height), epoch.device)] * 2).flatten()
    uniform = torch.rand(epoch.count, 2, generator=epoch.generator, device=epoch.device)
    first = (uniform * size[:2]).floor_() - side // 2
    return (torch.cat([first, first + side], 1).clamp_(min=0).minimum(size).long()[:, None],)


def cutout(side: int, color: Color) -> Transform:
    """A square of `side` pixels covered. DeVries and Taylor, "Cutout", arXiv 1708.04552."""
    return Transform(1, functools.partial(draw_square, side=side), functools.partial(cover, color=color))


def draw_erased(epoch: Epoch, probability: float) -> Drawn:
    """A box (N, 1, 4) for each image, empty for those that stay as they are.

    As torchvision's `RandomErasing` draws it: area and ratio until the box is smaller than the image, at most ten
    times, and then its place.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(epoch.count, *shape, generator=epoch.generator, device=epoch.device)

    least, most = SHARES
    low, high = map(math.log, RATIOS)
    areas = epoch.height * epoch.width * (uniform(TRIES) * (most - least) + least)
    ratios = (uniform(TRIES) * (high - low) + low).exp()
    heights, widths = (areas * ratios).sqrt().round(), (areas / ratios).sqrt().round()
    fits = (heights < epoch.height) & (widths < epoch.width)
    first = fits.int().argmax(1, keepdim=True)
    erased = fits.any(1) & (uniform() < probability)
    # Width before height, as in the boxes.
    sides = torch.cat([widths.gather(1, first), heights.gather(1, first)], 1)
    size = constant((epoch.width, epoch.height), epoch.device)
    corner = (uniform(2) * (size + 1 - sides)).floor_()
    return ((torch.cat([corner, corner + sides], 1) * erased[:, None]).long()[:, None],)


def random_erasing(probability: float, color: Color) -> Transform:
    """A box covered, with that probability. Zhong et al., "Random Erasing Data Augmentation", arXiv 1708.04896."""
    return Transform(1, functools.partial(draw_erased, probability=probability), functools.partial(cover, color=color))

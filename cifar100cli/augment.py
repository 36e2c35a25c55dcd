"""Augmentation of whole batches on their device: pure functions of (images, generator).

Each takes uint8 images (N, 3, H, W) and a `torch.Generator` on the same device, and returns images of
the same shape and type. Uint8, before enlarging and normalising, is where the data are smallest.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Policy = Callable[[Tensor, torch.Generator], Tensor]


def flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image left to right with probability 1/2."""
    mirrored = torch.rand(len(images), generator=generator, device=images.device) < 0.5
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images)


def crop(images: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Pad with black by `padding` on all sides and cut the original size out at a random place.

    As torchvision's `RandomCrop(size, padding=4)`, with a place of its own for every image.
    """
    count, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, [padding] * 4)
    offsets = torch.randint(0, 2 * padding + 1, (2, count, 1), generator=generator, device=images.device)
    rows = offsets[0] + torch.arange(height, device=images.device)
    columns = offsets[1] + torch.arange(width, device=images.device)
    image = torch.arange(count, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def crop_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """The usual recipe for CIFAR: a random crop after padding by 4, then a random mirror image."""
    return flip(crop(images, generator), generator)


POLICIES: dict[str, Policy | None] = {"none": None, "flip": flip, "crop_flip": crop_flip}

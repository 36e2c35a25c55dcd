"""Augmentation of whole batches on their device: pure functions of (images, generator).

Each takes uint8 images (N, 3, H, W) and a `torch.Generator` on the same device, and returns images of
the same shape and type. Uint8, before enlarging and normalising, is where the data are smallest.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Policy = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Views:
    """A policy under which an image has few versions, each as likely as the others.

    What depends on the version alone, such as a teacher's logits, can be computed once for each and kept.
    """

    versions: tuple[Callable[[Tensor], Tensor], ...]

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """(count,) int64: the index of each image's version."""
        if len(self.versions) == 1:
            return torch.zeros(count, dtype=torch.int64, device=generator.device)
        return torch.randint(0, len(self.versions), (count,), generator=generator, device=generator.device)

    def apply(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Each image in the version that was drawn for it."""
        result = self.versions[0](images)
        for index, version in enumerate(self.versions[1:], start=1):
            result = torch.where((drawn == index)[:, None, None, None], version(images), result)
        return result

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Draw and apply."""
        return self.apply(images, self.draw(len(images), generator))


def unchanged(images: Tensor) -> Tensor:
    """The images as they are."""
    return images


def mirrored(images: Tensor) -> Tensor:
    """The images with left and right exchanged."""
    return images.flip(-1)


flip = Views((unchanged, mirrored))


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


POLICIES: dict[str, Policy] = {"none": Views((unchanged,)), "flip": flip, "crop_flip": crop_flip}

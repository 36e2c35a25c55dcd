"""Augmentation of whole batches on their device, in two steps: what is random is drawn, then applied.

Images are uint8 (N, 3, H, W): before enlarging and normalising is where the data are smallest. What is drawn
is a tuple of tensors, (N, ...) each, so that images which are divided among devices get what they would
get on one.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

Drawn = tuple[Tensor, ...]  # (N, ...) each


class Policy(Protocol):
    """How training images are varied."""

    @property
    def draws(self) -> int:
        """How many tensors are drawn."""

    def draw(self, count: int, height: int, width: int, generator: torch.Generator, /) -> Drawn:
        """Parameters for N images of H x W, on the generator's device."""

    def apply(self, images: Tensor, /, *drawn: Tensor) -> Tensor:
        """Images (N, 3, H, W) uint8 changed with what was drawn for them. Nothing is drawn here."""


@dataclass(frozen=True)
class Transform:
    """A policy made of two functions."""

    draws: int
    draw: Callable[[int, int, int, torch.Generator], Drawn]
    apply: Callable[..., Tensor]


def drawn_by(policies: Sequence[Policy], drawn: Sequence[Tensor]) -> list[Drawn]:
    """What several policies drew, one after the other, taken apart again."""
    rest = iter(drawn)
    return [tuple(itertools.islice(rest, policy.draws)) for policy in policies]


def in_turn(*policies: Policy) -> Transform:
    """One policy after the other."""

    def draw(count: int, height: int, width: int, generator: torch.Generator) -> Drawn:
        return tuple(tensor for policy in policies for tensor in policy.draw(count, height, width, generator))

    def apply(images: Tensor, *drawn: Tensor) -> Tensor:
        for policy, own in zip(policies, drawn_by(policies, drawn), strict=True):
            images = policy.apply(images, *own)
        return images

    return Transform(sum(policy.draws for policy in policies), draw, apply)


@dataclass(frozen=True)
class Views:
    """A policy under which an image has few versions, each as likely as the others.

    What depends on the version alone, such as a teacher's logits, can be computed once for each and kept.
    """

    versions: tuple[Callable[[Tensor], Tensor], ...]
    draws: ClassVar[int] = 1

    def draw(self, count: int, height: int, width: int, generator: torch.Generator) -> Drawn:
        """(count,) int64: the index of each image's version."""
        if len(self.versions) == 1:
            return (torch.zeros(count, dtype=torch.int64, device=generator.device),)
        return (torch.randint(0, len(self.versions), (count,), generator=generator, device=generator.device),)

    def apply(self, images: Tensor, *drawn: Tensor) -> Tensor:
        """Each image in the version that was drawn for it."""
        result = self.versions[0](images)
        for index, version in enumerate(self.versions[1:], start=1):
            result = torch.where((drawn[0] == index)[:, None, None, None], version(images), result)
        return result


def unchanged(images: Tensor) -> Tensor:
    """The images as they are."""
    return images


def mirrored(images: Tensor) -> Tensor:
    """The images with left and right exchanged."""
    return images.flip(-1)


PADDING = 4  # pixels on each side


def draw_offsets(count: int, height: int, width: int, generator: torch.Generator) -> Drawn:
    """(N, 2) int64 from 0 to 2 PADDING: the row and the column of the padded image at which the crop begins."""
    return (torch.randint(0, 2 * PADDING + 1, (count, 2), generator=generator, device=generator.device),)


def crop(images: Tensor, offsets: Tensor) -> Tensor:
    """Pad with black by PADDING on all sides and cut the original size out.

    As torchvision's `RandomCrop(size, padding=4)`, with a place of its own for every image.
    """
    count, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, [PADDING] * 4)
    rows = offsets[:, :1] + torch.arange(height, device=images.device)
    columns = offsets[:, 1:] + torch.arange(width, device=images.device)
    image = torch.arange(count, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


flip = Views((unchanged, mirrored))
crop_flip = in_turn(Transform(1, draw_offsets, crop), flip)  # the usual recipe for CIFAR

POLICIES: dict[str, Policy] = {"none": Views((unchanged,)), "flip": flip, "crop_flip": crop_flip}

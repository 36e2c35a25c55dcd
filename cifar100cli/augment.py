"""Augmentation of whole batches on their device, in two steps: what is random is drawn, then applied.

Images are uint8 (N, 3, H, W): before enlarging and normalising is where the data are smallest. What is drawn
is a tuple of tensors, (N, ...) each, so that images which are divided among devices get what they would
get on one (but for `mixing`, whose partners are of the same device).
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Drawn = tuple[Tensor, ...]  # (N, ...) each


@dataclass(frozen=True)
class Epoch:
    """What is drawn for, all images of a split in the order of training, and where chance comes from.

    `positions` (N,) int64 are the images' places in the split, on the device. Two sources start from (seed, number):
    `generator`, on the device, and `host`, for distributions that PyTorch cannot draw from a generator. `lasting`, on
    the device, starts from the seed alone, and so gives the same in every epoch.
    """

    positions: Tensor
    height: int
    width: int
    number: int  # counted from 1
    generator: torch.Generator
    lasting: torch.Generator
    host: np.random.Generator

    @property
    def count(self) -> int:
        """Images."""
        return len(self.positions)

    @property
    def device(self) -> torch.device:
        """Of what is drawn."""
        return self.generator.device


class Policy(Protocol):
    """How training images are varied."""

    @property
    def draws(self) -> int:
        """How many tensors are drawn."""

    def draw(self, epoch: Epoch, /) -> Drawn:
        """Parameters for the images of an epoch, on its device."""

    def apply(self, images: Tensor, /, *drawn: Tensor) -> Tensor:
        """Images (N, 3, H, W) uint8 changed with what was drawn for them. Nothing is drawn here."""


@dataclass(frozen=True)
class Transform:
    """A policy made of two functions."""

    draws: int
    draw: Callable[[Epoch], Drawn]
    apply: Callable[..., Tensor]


def drawn_by(policies: Sequence[Policy], drawn: Sequence[Tensor]) -> list[Drawn]:
    """What several policies drew, one after the other, taken apart again."""
    rest = iter(drawn)
    return [tuple(itertools.islice(rest, policy.draws)) for policy in policies]


def in_turn(*policies: Policy) -> Transform:
    """One policy after the other."""

    def draw(epoch: Epoch) -> Drawn:
        return tuple(tensor for policy in policies for tensor in policy.draw(epoch))

    def apply(images: Tensor, *drawn: Tensor) -> Tensor:
        for policy, own in zip(policies, drawn_by(policies, drawn), strict=True):
            images = policy.apply(images, *own)
        return images

    return Transform(sum(policy.draws for policy in policies), draw, apply)


# ------------------------------------------------------------------------------- tensors without waiting


_KEPT: dict[tuple[tuple[Any, ...], torch.device, torch.dtype], Tensor] = {}


def constant(values: tuple[Any, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers on the device; kept, because a copy from the host would make the host wait in every batch.

    For the same reason a CUDA graph can capture what calls this only once it has run. What stands for numbers while
    somebody traces a model, as `torch.export` does, is not kept: others would compute with it.
    """
    known = _KEPT.get((values, device, dtype))
    if known is not None:
        return known
    made = torch.tensor(values, dtype=dtype, device=device)
    if type(made) is Tensor and not torch.compiler.is_compiling():
        _KEPT[values, device, dtype] = made
    return made


def on_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """What was drawn on the host, on the device."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":  # from pinned memory the copy makes nobody wait
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)  # MPS, if not waited for, would read memory that is others' by then (pytorch#189690)


# ---------------------------------------------------------------------- one of several transforms for each image


def apply_chosen(transforms: Sequence[Transform], images: Tensor, chosen: Tensor, drawn: Sequence[Drawn]) -> Tensor:
    """Each image changed by the one of `transforms` that `chosen` (N,) int64 names, with what that one drew."""
    return (apply_in_parts if images.device.type == "cpu" else apply_to_all)(transforms, images, chosen, drawn)


def apply_in_parts(transforms: Sequence[Transform], images: Tensor, chosen: Tensor, drawn: Sequence[Drawn]) -> Tensor:
    """Each image changed by its transform alone. The sizes of the parts are random, which a GPU would wait for."""
    places, parts = [], []
    for index, (transform, own) in enumerate(zip(transforms, drawn, strict=True)):
        part = (chosen == index).nonzero()[:, 0]
        places.append(part)
        parts.append(transform.apply(images.index_select(0, part), *(values.index_select(0, part) for values in own)))
    # One gather of whole images takes a fifth of the time of a scatter for each part.
    return torch.cat(parts).index_select(0, torch.cat(places).argsort())


def apply_to_all(transforms: Sequence[Transform], images: Tensor, chosen: Tensor, drawn: Sequence[Drawn]) -> Tensor:
    """The same images as `apply_in_parts`: every transform of all of them, of which each keeps its own."""
    result = images
    for index, (transform, own) in enumerate(zip(transforms, drawn, strict=True)):
        changed = transform.apply(images, *own)
        result = torch.where((chosen == index)[:, None, None, None], changed, result)
    return result


def draw_nothing(epoch: Epoch) -> tuple[()]:
    """Of transforms that have no parameters."""
    return ()


# ------------------------------------------------------------------------------------------ few versions


@dataclass(frozen=True)
class Views:
    """A policy under which an image has few versions, each as likely as the others.

    What depends on the version alone, such as a teacher's logits, can be computed once for each and kept.
    """

    versions: tuple[Callable[[Tensor], Tensor], ...]
    draws: ClassVar[int] = 1

    def draw(self, epoch: Epoch) -> Drawn:
        """(count,) int64: the index of each image's version."""
        if len(self.versions) == 1:
            return (torch.zeros(epoch.count, dtype=torch.int64, device=epoch.device),)
        generator = epoch.generator
        return (torch.randint(0, len(self.versions), (epoch.count,), generator=generator, device=epoch.device),)

    def apply(self, images: Tensor, *drawn: Tensor) -> Tensor:
        """Each image in the version that was drawn for it."""
        result = self.versions[0](images)
        for index, version in enumerate(self.versions[1:], start=1):
            result = torch.where((drawn[0] == index)[:, None, None, None], version(images), result)
        return result


class Alternating(Views):
    """Each image's versions in turn, from epoch to epoch, beginning with one that is drawn for the image.

    Of two versions, two epochs in a row show both. Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", arXiv
    2404.00498, section 3.6, with mirror images.
    """

    def draw(self, epoch: Epoch) -> Drawn:
        """(count,) int64: the index of each image's version, from seed, position and epoch alone."""
        count = len(self.versions)
        first = torch.randint(0, count, (epoch.count,), generator=epoch.lasting, device=epoch.device)
        return ((first[epoch.positions] + epoch.number - 1) % count,)


def unchanged(images: Tensor) -> Tensor:
    """The images as they are."""
    return images


def mirrored(images: Tensor) -> Tensor:
    """The images with left and right exchanged."""
    return images.flip(-1)


# ---------------------------------------------------------------------------------------------- cropping

PADDING = 4  # pixels on each side, as most train on CIFAR
Border = Literal["black", "reflect"]


def draw_offsets(epoch: Epoch, padding: int = PADDING) -> Drawn:
    """(N, 2) int64 from 0 to 2 padding: the row and the column of the padded image at which the crop begins."""
    return (torch.randint(0, 2 * padding + 1, (epoch.count, 2), generator=epoch.generator, device=epoch.device),)


def pad(images: Tensor, padding: int, border: Border) -> Tensor:
    """The images with `padding` pixels more on each side, black or mirrored at the outermost pixels."""
    if border == "black":
        return torch.nn.functional.pad(images, [padding] * 4)
    for dimension in (2, 3):
        last = images.shape[dimension] - 1
        assert padding <= last, "a border is reflected once"
        places = torch.arange(-padding, last + padding + 1, device=images.device).abs()
        images = images.index_select(dimension, last - (last - places).abs())
    return images


def crop(images: Tensor, offsets: Tensor, padding: int = PADDING, border: Border = "black") -> Tensor:
    """Pad on all sides and cut the original size out.

    As torchvision's `RandomCrop(size, padding, padding_mode)`, with a place of its own for every image.
    """
    count, _, height, width = images.shape
    padded = pad(images, padding, border)
    rows = offsets[:, :1] + torch.arange(height, device=images.device)
    columns = offsets[:, 1:] + torch.arange(width, device=images.device)
    image = torch.arange(count, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def random_crop(padding: int = PADDING, border: Border = "black") -> Transform:
    """A crop of the padded image, every place as likely."""
    return Transform(
        1,
        functools.partial(draw_offsets, padding=padding),
        functools.partial(crop, padding=padding, border=border),
    )


# ---------------------------------------------------------------------------------------------- rectangles


def inside(boxes: Tensor, height: int, width: int) -> Tensor:
    """(N, 1, H, W) bool: which pixels are in any of an image's boxes.

    Boxes (N, boxes, 4) int64 are left, top, right and bottom, of which the latter two are just outside.
    """
    columns, rows = torch.arange(width, device=boxes.device), torch.arange(height, device=boxes.device)
    left, top, right, bottom = boxes[..., None].unbind(2)
    in_columns, in_rows = (columns >= left) & (columns < right), (rows >= top) & (rows < bottom)
    return (in_rows[..., :, None] & in_columns[..., None, :]).any(1, keepdim=True)


# ------------------------------------------------------------------------------------------- the usual ones

none = Views((unchanged,))
flip = Views((unchanged, mirrored))
alternating_flip = Alternating((unchanged, mirrored))

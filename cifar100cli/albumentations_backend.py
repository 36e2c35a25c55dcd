"""The augmentation of `one_of` by albumentations itself, image by image on the host: slow, to compare with."""

import importlib
import importlib.metadata
import os
import random
import warnings

import numpy as np
import torch
from torch import Tensor

from cifar100cli.augment import Drawn, Epoch
from cifar100cli.errors import UsageError

VERSION = "2.0.8"  # releases differ in what they draw by default


class AlbumentationsOneOf:
    """The library's pipeline, as a policy.

    The images may be on any device; they go to the host and back. The result depends on them and on what was drawn
    alone, whatever came before.
    """

    def __init__(self) -> None:
        _check_version()
        os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else the import asks the network for a newer one
        try:
            albumentations = importlib.import_module("albumentations")
        except ImportError as error:
            raise _unusable(f"albumentations cannot be imported ({error})") from error
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="ShiftScaleRotate is a special case", category=UserWarning)
            shift_scale_rotate = albumentations.ShiftScaleRotate()
        others = ("CoarseDropout", "ColorJitter", "HorizontalFlip", "VerticalFlip")
        self.choice = albumentations.OneOf(
            [shift_scale_rotate, *(getattr(albumentations, name)() for name in others)], p=1.0
        )

    draws = 1

    def draw(self, epoch: Epoch) -> Drawn:
        """(N, 2) int64, on the host: the seeds of each image's own choice and parameters."""
        seeds = torch.randint(2**63 - 1, (epoch.count, 2), generator=epoch.generator, device=epoch.device)
        return (seeds.cpu(),)

    def apply(self, images: Tensor, *drawn: Tensor) -> Tensor:
        """Each image (N, 3, H, W) uint8 as the library changes it from its seeds; on the host."""
        pixels = images.permute(0, 2, 3, 1).cpu().numpy()
        result = np.empty(pixels.shape, np.uint8)
        for index, (image, (one, other)) in enumerate(zip(pixels, drawn[0].tolist(), strict=True)):
            # With `set_random_seed` all members would start from the same seed, and the choice and the parameters
            # would come from the same numbers. Two generators that they share have no such ties.
            self.choice.set_random_state(np.random.default_rng(one), random.Random(other))
            result[index] = self.choice(image=np.ascontiguousarray(image))["image"]
        return torch.from_numpy(result).permute(0, 3, 1, 2).contiguous().to(images.device)


def _check_version() -> None:
    try:
        installed = importlib.metadata.version("albumentations")
    except importlib.metadata.PackageNotFoundError as error:
        raise _unusable("albumentations is not installed") from error
    if installed != VERSION:
        raise _unusable(f"albumentations is {installed}, not {VERSION}")


def _unusable(reason: str) -> UsageError:
    return UsageError(f"{reason}: pip install albumentations=={VERSION}, or use augment.backend=batched")

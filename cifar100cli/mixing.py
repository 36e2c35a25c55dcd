"""Images mixed with others of their batch: MixUp and CutMix, at the level of whole batches (N, 3, H, W) of uint8.

Zhang et al., "mixup", arXiv 1710.09412; Yun et al., "CutMix", arXiv 1905.04899. Resizing and normalising come after
and are linear, so that it makes no difference that they do, but for the rounding to whole levels.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cifar100cli.augment import Drawn, Epoch, Policy, inside, on_device

SWITCH = 0.5  # how often it is CutMix, where there are both


@dataclass(frozen=True)
class Mixed:
    """Another policy, and then each image mixed with the one before it in the batch, the first with the last.

    `mixup` and `cutmix` are both parameters of a symmetric Beta distribution; at 0 there is none of that kind, and not
    both are 0. Each image has a weight of its own, and where there are both kinds a kind of its own, as in timm's
    `Mixup(mode="elem")`.
    """

    policy: Policy
    mixup: float
    cutmix: float
    own: ClassVar[int] = 2  # tensors

    @property
    def draws(self) -> int:
        """How many tensors are drawn."""
        return self.policy.draws + self.own

    def draw(self, epoch: Epoch) -> Drawn:
        """What the other policy draws, then the weights and boxes of `draw_mixture`."""
        before = self.policy.draw(epoch)
        weights, boxes = draw_mixture(epoch.host, epoch.count, epoch.height, epoch.width, self.mixup, self.cutmix)
        return *before, on_device(weights, epoch.device), on_device(boxes, epoch.device)

    def apply(self, images: Tensor, *drawn: Tensor) -> Tensor:
        """The images as the other policy changes them, mixed."""
        return mix(self.policy.apply(images, *drawn[: -self.own]), *drawn[-self.own :])

    def weights(self, drawn: Drawn) -> Tensor:
        """(N,) float32: how much of each image is its own."""
        return drawn[-self.own]


def draw_mixture(
    random: np.random.Generator, count: int, height: int, width: int, mixup: float, cutmix: float
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Weights (N,) of the images themselves, and boxes (N, 1, 4) in which CutMix shows the others, else empty.

    A box has the share of the area that the Beta distribution says, its centre on any pixel, and is cut off at the
    image's border; the weight is exactly the share that is left to the image.
    """
    with_box = random.random(count) < (SWITCH if mixup and cutmix else 1 if cutmix else 0)
    weights, cut = (random.beta(alpha, alpha, count) if alpha else np.ones(count) for alpha in (mixup, cutmix))
    size = np.array([width, height])
    sides = (size * np.sqrt(1 - cut)[:, None]).astype(np.int64)
    centre = random.integers(0, size, (count, 2))
    corners: list[NDArray[Any]] = [centre - sides // 2, centre + (sides + 1) // 2]
    boxes = np.concatenate(corners, 1).clip(0, np.tile(size, 2)) * with_box[:, None]
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    weights = np.where(with_box, 1 - area / (height * width), weights)
    return weights.astype(np.float32), boxes[:, None]


def mix(images: Tensor, weights: Tensor, boxes: Tensor) -> Tensor:
    """The images with those before them, (N, 3, H, W) uint8: in the boxes, or all over by weight, to the nearest level.

    An image that has a box is otherwise its own.
    """
    others = images.roll(1, 0).float()
    hidden = inside(boxes, *images.shape[-2:])
    empty = (boxes[:, 0, 2:] <= boxes[:, 0, :2]).any(1)
    share = torch.where(empty, weights, 1)[:, None, None, None].masked_fill(hidden, 0)
    return torch.addcmul(others, images - others, share).round_().to(torch.uint8)

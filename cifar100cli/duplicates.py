"""Images of a split that a model has all but seen: another crop, mirror image or colouring of a training image.

After Barz and Denzler, "Do We Train on Test Data? Purging CIFAR of Near-Duplicates" (arXiv 1902.00423), who found by a
network's features and by eye that 3.3% of CIFAR-10's test images have such a twin in the training set, and 10% of
CIFAR-100's. Here pixels are compared, so that everybody finds the same pairs: of the training images that are most like
an image from afar, that one is its twin whose detail fits closely, wherever it was moved by a few pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from cifar100cli.catalog import SIDE
from cifar100cli.datasets import Split

CELL = 4  # pixels; from afar, an image is the mean colours of its cells
BLUR = 5  # pixels; detail is what a mean over so many takes away
FURTHEST = 4  # pixels that a twin may be moved by, each way
CANDIDATES = 8  # the most alike from afar, whose detail is looked at
ALIKE = 0.7  # correlation from afar of those, at least
CLOSE = 0.7  # correlation of detail from which on two images are the same picture; by eye, most pairs from 0.6 on are
BLOCK = 500  # images that are compared with all others at a time

# What a pair looks like in a picture of pairs.
SCALE = 2
GAP = 4
PAIRS_IN_A_ROW = 12
OTHER_CLASS = (220, 30, 30)


@dataclass(frozen=True)
class NearDuplicates:
    """Pairs, the closest first: images (P,) by their places in the split, and their twins (P,) among the others.

    `likeness` (P,) is the correlation of detail, at most 1; `mirrored` (P,) tells that it is the image's mirror image
    that is like its twin.
    """

    images: NDArray[np.int64]
    twins: NDArray[np.int64]
    likeness: NDArray[np.float32]
    mirrored: NDArray[np.bool_]

    def figures(self, split: Split, known: Split, right: NDArray[np.bool_]) -> dict[str, Any]:
        """What `evaluate --json` prints of them; `right` (N,) tells which of the split's images were.

        Accuracies are fractions, and None of no images. Indices are places in the data set's own order, whatever of it
        was held out or left out.
        """
        apart = np.ones(len(split), bool)
        apart[self.images] = False
        same = split.labels[self.images] == known.labels[self.twins]
        indices, twins = split.positions[self.images], known.positions[self.twins]
        pairs = zip(indices, twins, self.likeness, self.mirrored, same, strict=True)
        return {
            "count": len(self.images),
            "other_class": int((~same).sum()),
            "top1": float(right[~apart].mean()) if not apart.all() else None,
            "top1_without": float(right[apart].mean()) if apart.any() else None,
            "training_images": len(known),
            "pairs": [
                {
                    "index": int(image),
                    "training_index": int(twin),
                    "likeness": round(float(likeness), 4),
                    "mirrored": bool(mirrored),
                    "same_class": bool(alike),
                }
                for image, twin, likeness, mirrored, alike in pairs
            ],
        }


def find(
    images: NDArray[np.uint8],
    others: NDArray[np.uint8],
    device: torch.device,
    advance: Callable[[int], None] = lambda count: None,
) -> NearDuplicates:
    """The images (N, 3, 32, 32) uint8 that have a near-duplicate among `others` (M, 3, 32, 32), each with its closest.

    `advance` is told how many images more were looked at.
    """
    known = torch.from_numpy(others).to(device)
    from_afar = torch.cat([_cells(part) for part in torch.split(known, 5000)])
    found: list[tuple[Tensor, ...]] = []
    for start in range(0, len(images), BLOCK):
        block = torch.from_numpy(images[start : start + BLOCK]).to(device)
        views = torch.stack([block, block.flip(3)], 1)  # (B, 2, 3, 32, 32): as it is, and mirrored
        alike = (_cells(views.flatten(0, 1)) @ from_afar.T).view(len(block), -1)  # (B, 2 M)
        values, columns = alike.topk(min(CANDIDATES, alike.shape[1]), 1)
        image, place = (values >= ALIKE).nonzero(as_tuple=True)
        column = columns[image, place]
        mirrored, twin = column // len(known), column % len(known)
        fit = torch.full_like(values, -1.0)
        if len(image):  # not every library transforms nothing
            fit[image, place] = _fit(_detail(views[image, mirrored]), _detail(known[twin]))
        likeness, best = fit.max(1)
        close = (likeness >= CLOSE).nonzero()[:, 0]
        column = columns[close, best[close]]
        found.append((close + start, column % len(known), likeness[close], column // len(known)))
        advance(len(block))
    image, twin, likeness, mirrored = (torch.cat(parts).cpu() for parts in zip(*found, strict=True))
    order = likeness.argsort(descending=True, stable=True)
    return NearDuplicates(
        image[order].numpy(), twin[order].numpy(), likeness[order].numpy(), mirrored[order].bool().numpy()
    )


def _unit(values: Tensor) -> Tensor:
    """Rows (N, ...) as (N, K) of mean 0 and length 1, so that their products are correlations; of no variance, 0."""
    rows = values.flatten(1)
    return F.normalize(rows - rows.mean(1, keepdim=True), dim=1, eps=1e-3)


def _cells(images: Tensor) -> Tensor:
    """Images from afar."""
    return _unit(F.avg_pool2d(images.float(), CELL))


def _detail(images: Tensor) -> Tensor:
    """The detail (N, 32, 32) of images in grey: without it, every horizon and every apple would be like the others."""
    grey = images.float().mean(1, keepdim=True)
    blurred = F.avg_pool2d(F.pad(grey, (BLUR // 2,) * 4, mode="replicate"), BLUR, 1)
    return _unit(grey - blurred).view(-1, SIDE, SIDE)


def _fit(details: Tensor, others: Tensor) -> Tensor:
    """The highest correlation (P,) of each with its other, wherever it is moved to within FURTHEST pixels.

    By the theorem of convolution, on a plane so large that what leaves it on one side does not count on the other.
    """
    plane = (SIDE + FURTHEST, SIDE + FURTHEST)
    everywhere: Tensor = torch.fft.irfft2(
        torch.fft.rfft2(details, s=plane).conj() * torch.fft.rfft2(others, s=plane), s=plane
    )
    moves = torch.arange(-FURTHEST, FURTHEST + 1, device=details.device) % plane[0]
    return everywhere[:, moves][:, :, moves].amax((1, 2)).clamp(max=1)


def picture(pairs: NDArray[np.uint8], other_class: Sequence[bool]) -> NDArray[np.uint8]:
    """Pairs (P, 2, 3, 32, 32) side by side, as one picture (H, W, 3) in RGB; those of two classes have a red frame."""
    width, height = 2 * SIDE * SCALE + GAP, SIDE * SCALE + GAP
    rows = -(-len(pairs) // PAIRS_IN_A_ROW)
    canvas = np.full((rows * height + GAP, PAIRS_IN_A_ROW * width + GAP, 3), 255, np.uint8)
    for number, (pair, other) in enumerate(zip(pairs, other_class, strict=True)):
        row, column = divmod(number, PAIRS_IN_A_ROW)
        top, left = row * height + GAP, column * width + GAP
        if other:
            canvas[top - GAP : top + height, left - GAP : left + width] = OTHER_CLASS
        both = np.concatenate([*pair], axis=2).transpose(1, 2, 0)
        canvas[top : top + height - GAP, left : left + width - GAP] = both.repeat(SCALE, 0).repeat(SCALE, 1)
    return canvas

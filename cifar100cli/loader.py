"""Batches from images that stay on the device as uint8: order, augmentation, enlarging, normalising."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.nn import functional as F

from cifar100cli import devices
from cifar100cli.augment import Drawn, Epoch, Policy, Views, constant, none, on_device
from cifar100cli.datasets import Split
from cifar100cli.devices import Portions
from cifar100cli.mixing import Mixed
from cifar100cli.models import backbone_normalization
from cifar100cli.schema import Data


@dataclass(frozen=True)
class Preprocessing:
    """From uint8 images to what the network takes. A checkpoint carries it, so that it is never guessed."""

    image_size: int
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __call__(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 to (N, 3, image_size, image_size) float32, channels last but on MPS.

        Resizing is bilinear with half-pixel centres, which is OpenCV's INTER_LINEAR.
        """
        # Before enlarging, which makes weighted means and so changes nothing about this, there is less to do.
        pixels = images.float().div_(255)
        if any(self.mean) or self.std != (1.0, 1.0, 1.0):
            mean, std = (constant(values, pixels.device)[:, None, None] for values in (self.mean, self.std))
            pixels = pixels.sub_(mean).div_(std)
        layout = devices.memory_format(pixels.device)
        if pixels.shape[-2:] != (self.image_size, self.image_size):
            # A CPU enlarges planes three times as fast as pixels of three channels.
            on_cpu = pixels.device.type == "cpu"
            pixels = pixels.contiguous(memory_format=torch.contiguous_format if on_cpu else layout)
            pixels = F.interpolate(
                pixels, size=(self.image_size, self.image_size), mode="bilinear", align_corners=False
            )
        return pixels.contiguous(memory_format=layout)


def preprocessing_for(data: Data, train: Split, backbone: str) -> Preprocessing:
    """The preprocessing that a preset's `data` section means for this training set and timm's `backbone`."""
    normalize, image_size = data.normalize, data.image_size
    if normalize == "values":
        assert data.mean is not None
        assert data.std is not None
        return Preprocessing(image_size, data.mean, data.std)
    if normalize == "imagenet":
        return Preprocessing(image_size, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    if normalize == "backbone":
        return Preprocessing(image_size, *backbone_normalization(backbone))
    if normalize == "dataset":
        # Counting grey levels is exact, whatever the number of images.
        counts = [np.bincount(train.images[:, channel].ravel(), minlength=256) for channel in range(3)]
        levels = np.arange(256) / 255
        means = [float((count * levels).sum() / count.sum()) for count in counts]
        variances = [
            float((count * (levels - mean) ** 2).sum() / count.sum()) for count, mean in zip(counts, means, strict=True)
        ]
        deviations = [max(variance**0.5, 1e-6) for variance in variances]  # a blank channel divides by no zero
        return Preprocessing(image_size, (means[0], means[1], means[2]), (deviations[0], deviations[1], deviations[2]))
    return Preprocessing(image_size)


@dataclass(frozen=True)
class Mixture:
    """What images were mixed with: the others' labels (N,) int64, and the images' own weights (N,) float32."""

    labels: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Batch:
    """Inputs (N, 3, S, S) float32, in the device's memory format, and labels (N,) int64, on the device.

    With them what they were made of: the augmented images (N, 3, H, W) uint8, their positions in the split
    (N,) int64, and under a policy of few versions the version of each (N,) int64. Where features were computed
    before, these are the inputs, and there are no images. `labels` are those of mixed images that they themselves have.
    """

    inputs: Tensor
    labels: Tensor
    images: Tensor | None
    positions: Tensor
    views: Tensor | None
    mixture: Mixture | None = None

    @property
    def leading_labels(self) -> Tensor:
        """(N,) int64: of mixed images the label with the larger weight, which training accuracy is counted by.

        So does torchvision's reference training; timm counts none.
        """
        if self.mixture is None:
            return self.labels
        return torch.where(self.mixture.weights >= 0.5, self.labels, self.mixture.labels)


@dataclass(frozen=True)
class Plan:
    """An epoch laid out: positions in the split in the order of training, (N,) int64, and what was drawn for each.

    `image_size` is the images' side in this epoch, or None where they are as large as for evaluation.
    """

    positions: Tensor
    drawn: Drawn
    image_size: int | None = None


class Features:
    """Inputs that were computed before, (versions, images, ...), in any float type, on the device or on the host.

    Maps (versions, images, H, W, C) become (N, C, H, W), in the device's memory format. However they are kept, they
    come in `dtype`, the type that they were computed in: what is no matrix product takes its own type from them.
    """

    def __init__(self, table: Tensor, device: torch.device, dtype: torch.dtype) -> None:
        self.table, self.device, self.dtype = table, device, dtype

    def __call__(self, views: Tensor, positions: Tensor) -> Tensor:
        """(N, ...) in `dtype` on the device."""
        home = self.table.device
        found = self.table[views.to(home), positions.to(home)].to(self.device, self.dtype)
        if found.ndim != 4:
            return found
        return found.permute(0, 3, 1, 2).contiguous(memory_format=devices.memory_format(self.device))


class DeviceLoader:
    """Batches of a split that lives on the device.

    What is random (order, augmentation) is drawn from (seed, epoch) alone, for all images at once, so that any epoch
    can be had again without those before it. With `features` set, they are looked up in place of the images.

    `images` are (N, 3, H, W) uint8 and `labels` (N,) int64, on `device`; `shares` are this rank's rows of each batch.
    In `portions` of these the images are looked at, where nothing learns.

    Of several `ranks`, each makes its own share of every batch, and together they make the batches of one. A last
    batch of fewer than `smallest_batch` images joins the one before.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        device: torch.device,
        preprocessing: Preprocessing,
        *,
        shuffle: bool = False,
        policy: Policy = none,
        seed: int = 0,
        image_size_in: Callable[[int], int | None] = lambda epoch: None,
        rank: int = 0,
        ranks: int = 1,
        smallest_batch: int = 2,  # batch norm cannot train on one image alone
    ) -> None:
        self.images = torch.from_numpy(split.images).to(device)
        self.labels = torch.from_numpy(split.labels).to(device)
        self.device, self.preprocessing = device, preprocessing
        self.shuffle, self.policy, self.seed = shuffle, policy, seed
        self.image_size_in = image_size_in
        self.features: Features | None = None
        count = len(split)
        starts = list(range(0, count, batch_size))
        if len(starts) > 1 and count - starts[-1] < smallest_batch:
            starts.pop()
        self.bounds = list(zip(starts, [*starts[1:], count], strict=True))
        self.shares = [
            slice(start + (end - start) * rank // ranks, start + (end - start) * (rank + 1) // ranks)
            for start, end in self.bounds
        ]
        self.portions = Portions(device, max(self.batch_sizes()))
        # A batch's loss is the mean over its images, and that of the means of shares when these are weighted.
        self.loss_weights = [
            (share.stop - share.start) * ranks / (end - start)
            for share, (start, end) in zip(self.shares, self.bounds, strict=True)
        ]

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.bounds)

    @property
    def count(self) -> int:
        """Images in an epoch."""
        return len(self.labels)

    def batch_sizes(self) -> list[int]:
        """Images in each batch, on all ranks."""
        return [end - start for start, end in self.bounds]

    def plan(self, epoch: int) -> Plan:
        """Order and augmentation of all images in epoch `epoch`, counted from 1; on the device."""
        host = np.random.default_rng([self.seed, epoch])
        positions = torch.arange(self.count, device=self.device)
        if self.shuffle:
            positions = on_device(host.permutation(self.count), self.device)
        # Epochs count from 1: no epoch's generator begins as the lasting one does.
        generator, lasting = (
            torch.Generator(self.device).manual_seed(derived_seed(self.seed, number)) for number in (epoch, 0)
        )
        height, width = self.images.shape[-2:]
        drawn = self.policy.draw(Epoch(positions, height, width, epoch, generator, lasting, host))
        return Plan(positions, drawn, self.image_size_in(epoch))

    def epoch(self, number: int) -> Iterator[Batch]:
        """This rank's batches of epoch `number`, counted from 1."""
        plan = self.plan(number)
        for share in self.shares:
            yield self.batch(plan, share)

    def batch(self, plan: Plan, rows: slice | Tensor) -> Batch:
        """The images of some rows of a plan. Nothing is drawn here, and the host waits for nothing."""
        positions = plan.positions[rows]
        drawn = tuple(tensor[rows] for tensor in plan.drawn)
        labels = self.labels[positions]
        views = drawn[0] if isinstance(self.policy, Views) else None
        if self.features is not None:
            assert views is not None
            return Batch(self.features(views, positions), labels, None, positions, views)
        # Five times as fast on a CPU as indexing.
        images = self.policy.apply(self.images.index_select(0, positions), *drawn)
        mixture = None
        if isinstance(self.policy, Mixed):
            mixture = Mixture(labels.roll(1), self.policy.weights(drawn))
        preprocessing = self.preprocessing
        if plan.image_size is not None:
            preprocessing = replace(preprocessing, image_size=plan.image_size)
        return Batch(preprocessing(images), labels, images, positions, views, mixture)


def derived_seed(*parts: int) -> int:
    """A seed of 63 bits that depends on every part, as NumPy mixes them."""
    words = np.random.SeedSequence(parts).generate_state(1, np.uint64)
    return int(words[0]) >> 1


def evaluation_batch_size(image_size: int, device: torch.device) -> int:
    """As many images as fill a device well without its memory: 1,000 up to 64 pixels, fewer above.

    On a CPU a quarter of that at 64 pixels, and at most 500. There tensors above 32 MB are given back to the system at
    once, and getting their pages anew would take a sixth of the time at 64 pixels.
    """
    most, at_64 = (500, 250) if device.type == "cpu" else (1000, 1000)
    return max(25, min(most, at_64 * 64 * 64 // (image_size * image_size)))

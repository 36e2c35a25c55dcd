"""The way most code trains, to compare with: a `Dataset` of single images, a `DataLoader`, float32, NCHW.

The same network, task and augmentation in distribution as ours, one image at a time on the host, as in the tutorial:
RandAugment, TrivialAugment and random erasing are torchvision's, crop, mirror and Cutout NumPy's. Mirror images that
alternate are random here, and mixing is left out: it is not done image by image.
"""

import os
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from cifar100cli.erasing import Color
from cifar100cli.loader import Batch, DeviceLoader
from cifar100cli.optim import Group
from cifar100cli.policies import color_of
from cifar100cli.schema import Augment, Optimizer
from cifar100cli.tasks import Task
from cifar100cli.unrolled import as_pytorch_computes

Picture = NDArray[np.uint8]  # (H, W, 3)


class Images(Dataset[tuple[Tensor, int]]):
    """A split image by image: augmented, resized by OpenCV, divided by 255, normalised, as most code does it."""

    def __init__(self, loader: DeviceLoader, augment: Augment) -> None:
        self.pictures = loader.images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        self.labels = loader.labels.tolist()
        self.size = loader.preprocessing.image_size
        self.mean, self.std = (
            torch.tensor(values)[:, None, None] for values in (loader.preprocessing.mean, loader.preprocessing.std)
        )
        self.normalised = any(loader.preprocessing.mean) or loader.preprocessing.std != (1.0, 1.0, 1.0)
        self.changes = changes(augment, color_of(loader.preprocessing.mean))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture = self.pictures[index]
        for change in self.changes:
            picture = change(picture)
        if picture.shape[0] != self.size:
            import cv2

            resized = cv2.resize(picture, (self.size, self.size), interpolation=cv2.INTER_LINEAR)
            picture = resized.astype(np.uint8, copy=False)
        image = torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1))).float() / 255
        return (image - self.mean) / self.std if self.normalised else image, self.labels[index]


def changes(augment: Augment, color: Color) -> list[Callable[[Picture], Picture]]:
    """What happens to a picture, one thing after the other."""
    found: list[Callable[[Picture], Picture]] = []
    if augment.policy == "one_of":
        from cifar100cli.albumentations_backend import AlbumentationsOneOf

        found.append(partial(_by_albumentations, AlbumentationsOneOf().choice))
    if augment.policy == "crop_flip":
        found.append(partial(_cropped, padding=augment.crop_padding, mode=BORDERS[augment.padding_mode]))
    if augment.policy in ("flip", "crop_flip") and augment.flip != "none":
        found.append(_flipped)
    if augment.auto != "none":
        automatic = v2.TrivialAugmentWide()
        if augment.auto == "randaugment":
            automatic = v2.RandAugment(augment.randaugment_ops, augment.randaugment_magnitude)
        found.append(partial(_by_torchvision, automatic))
    if augment.cutout:
        found.append(partial(_cut_out, side=augment.cutout, color=color))
    if augment.erasing:
        found.append(partial(_by_torchvision, v2.RandomErasing(augment.erasing, value=color)))
    return found


BORDERS: dict[str, Literal["constant", "reflect"]] = {"black": "constant", "reflect": "reflect"}  # in NumPy's words


def _flipped(picture: Picture) -> Picture:
    return picture[:, ::-1] if random.random() < 0.5 else picture


def _cropped(picture: Picture, padding: int, mode: Literal["constant", "reflect"]) -> Picture:
    height, width = picture.shape[:2]
    padded = np.pad(picture, ((padding, padding), (padding, padding), (0, 0)), mode=mode)
    top, left = random.randint(0, 2 * padding), random.randint(0, 2 * padding)
    return padded[top : top + height, left : left + width]


def _cut_out(picture: Picture, side: int, color: Color) -> Picture:
    height, width = picture.shape[:2]
    top, left = random.randrange(height) - side // 2, random.randrange(width) - side // 2
    picture = picture.copy()
    picture[max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)] = color
    return picture


def _by_albumentations(transform: Callable[..., dict[str, Picture]], picture: Picture) -> Picture:
    return transform(image=np.ascontiguousarray(picture))["image"]


def _by_torchvision(transform: Callable[[Tensor], Tensor], picture: Picture) -> Picture:
    image = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)
    changed: Picture = transform(image).permute(1, 2, 0).numpy()
    return changed


class PlainLoop:
    """Steps in the plain way: they are taken one by one, and each waits for its loss, as a progress bar wants it."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        loader: DeviceLoader,
        augment: Augment,
        config: Optimizer,
        groups: list[Group],
    ) -> None:
        as_pytorch_computes(model)
        self.model = model.to(memory_format=torch.contiguous_format)
        self.task, self.device, self.grad_clip = task, loader.device, config.grad_clip
        parameters = [
            {
                "params": group.parameters,
                "lr": config.lr * group.scale,
                "weight_decay": config.weight_decay if group.decay else 0.0,
            }
            for group in groups
        ]
        kind: Any = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}[config.name]
        more: dict[str, Any] = {"momentum": config.momentum} if config.name == "sgd" else {"betas": config.betas}
        self.optimizer = kind(parameters, lr=config.lr, **more)
        # On a CPU, workers would take the cores that train.
        workers = 0 if self.device.type == "cpu" else min(8, os.cpu_count() or 1)
        self.batches = DataLoader(
            Images(loader, augment),
            batch_size=loader.batch_sizes()[0],
            shuffle=True,
            num_workers=workers,
            pin_memory=self.device.type == "cuda",
            persistent_workers=workers > 0,
        )
        self.workers = workers

    def epoch(self) -> float:
        """One pass over the images; the mean of the losses."""
        self.model.train()
        total = 0.0
        for inputs, labels in self._on_device():
            output = self.task(self.model, Batch(inputs, labels, None, labels, None))
            self.optimizer.zero_grad()
            output.loss.backward()  # type: ignore[no-untyped-call]
            if self.grad_clip:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
            self.optimizer.step()
            total += output.loss.item()
        return total / len(self.batches)

    def _on_device(self) -> Iterator[tuple[Tensor, Tensor]]:
        for inputs, labels in self.batches:
            yield inputs.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

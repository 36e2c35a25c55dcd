"""A trained model as a teacher: what it says of every image, looked up, or computed in every step.

A teacher sees the very pixels that the student sees, at its own image size and normalisation, and in
evaluation mode.
"""

import hashlib
import time
from dataclasses import asdict

import torch
from torch import Tensor, nn

from cifar100cli import computed
from cifar100cli.checkpoint import Checkpoint
from cifar100cli.devices import Cast
from cifar100cli.loader import Batch, DeviceLoader, Preprocessing, evaluation_batch_size


class OnlineTeacher:
    """Runs in every step, on the batch's own images: for policies that make no two views the same."""

    def __init__(self, model: nn.Module, preprocessing: Preprocessing, cast: Cast) -> None:
        self.model, self.preprocessing, self.cast = model.eval(), preprocessing, cast

    def __call__(self, batch: Batch) -> Tensor:
        """Logits (N, classes) float32."""
        assert batch.images is not None
        chunks = torch.split(batch.images, self.batch_size)
        return torch.cat([self.logits(chunk) for chunk in chunks])

    @property
    def batch_size(self) -> int:
        """As many images as are looked at together."""
        return evaluation_batch_size(self.preprocessing.image_size, next(self.model.parameters()).device)

    def logits(self, images: Tensor) -> Tensor:
        """Logits (N, classes) float32 of uint8 images (N, 3, H, W)."""
        with torch.no_grad(), self.cast():
            logits: Tensor = self.model(self.preprocessing(images)).float()
            return logits

    def seconds(self, batch: Batch) -> float:
        """How long it takes for a batch, after a first time that warms the device up."""
        self(batch).sum().item()
        started = time.perf_counter()
        self(batch).sum().item()  # the number waits for the device
        return time.perf_counter() - started


class CachedTeacher:
    """Looks up what was computed before training: logits (versions, images, classes) float32."""

    def __init__(self, logits: Tensor) -> None:
        self.table = logits

    def __call__(self, batch: Batch) -> Tensor:
        """Logits (N, classes) float32."""
        assert batch.views is not None
        return self.table[batch.views, batch.positions]


def digest(saved: Checkpoint) -> str:
    """What tells a teacher's weights from all others: the sha256 of their names, shapes and bytes."""
    found = hashlib.sha256()
    computed.take_in(found, saved.model.state_dict().items())
    return found.hexdigest()


def key(saved: Checkpoint, loader: DeviceLoader, precision: str) -> str:
    """A name for this teacher's logits on these images."""
    about = {
        "what": "logits",
        "config": saved.config.model_dump(mode="json", include={"model", "loss"}),
        "preprocessing": asdict(saved.preprocessing),
        "precision": precision,
    }
    return computed.key(about, saved.model.state_dict().items(), loader)

"""A trained model as a teacher: what it says of every image, looked up, or computed in every step.

A teacher sees the very pixels that the student sees, at its own image size and normalisation, and in
evaluation mode.
"""

import hashlib
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from cifar100cli import checkpoint, devices, metrics, precomputed
from cifar100cli.augment import Views
from cifar100cli.checkpoint import Checkpoint
from cifar100cli.datasets import Dataset
from cifar100cli.devices import Cast
from cifar100cli.errors import DataError
from cifar100cli.inference import fold
from cifar100cli.loader import Batch, DeviceLoader, Preprocessing, evaluation_batch_size
from cifar100cli.runs import RunDir
from cifar100cli.schema import Config, Distillation
from cifar100cli.tasks import Teacher
from cifar100cli.watcher import Watcher


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


def load(config: Config, distillation: Distillation, dataset: Dataset, watcher: Watcher) -> Checkpoint:
    """Read the teacher that a preset names. Raises `DataError` where it knows other classes than are to be learned."""
    path = Path(distillation.required_teacher())
    saved = checkpoint.load_model(path)
    if path.is_dir() and not RunDir(path).complete:
        watcher.say(f"the teacher's run is not complete: its weights are those of epoch {saved.card.epoch}")
    if saved.card.classes != dataset.classes:
        kind = "other" if len(saved.card.classes) == len(dataset.classes) else f"{len(saved.card.classes)}"
        raise DataError(
            f"--teacher {path}: knows {kind} classes, of {saved.card.dataset}, and the student is to learn "
            f"the {len(dataset.classes)} of {dataset.name}; name a teacher that was trained on {dataset.name}"
        )
    chosen = saved.card.chosen_on == config.data.dataset
    if chosen and config.train.select != "best_test":  # which is marked in every report
        watcher.say("the teacher's epoch was chosen on the test images: the student's test figure may be optimistic")
    unseen = saved.card.unseen.get(config.data.dataset, 1.0)
    if unseen < config.data.val_fraction:
        watcher.say(
            f"the teacher was trained with data.val_fraction = {unseen:g}, and so on images that are held out of the "
            "student's: what is found on these may be optimistic"
        )
    return saved


def make_ready(
    saved: Checkpoint,
    loader: DeviceLoader,
    precision: str,
    config: Config,
    cache_dir: Path,
    watcher: Watcher,
    *,
    dry: bool,
) -> Teacher:
    """The teacher of a run: looked up where an image has few versions, else, or if `dry`, run in every step."""
    device = loader.device
    model = saved.model.to(device=device, memory_format=devices.memory_format(device))  # type: ignore[call-overload]
    if precision == "fp32":
        model = fold(model, saved.preprocessing(loader.images[:2]))
    online = OnlineTeacher(model, saved.preprocessing, devices.autocast(device, precision))
    metrics.refuse_no_answer(online.logits(loader.images[:2]), saved.path, precision)
    if dry:
        return online
    if isinstance(loader.policy, Views):
        logits = precomputed.table(
            "the teacher's logits",
            online.logits,
            loader,
            batch_size=online.batch_size,
            dtype=torch.float32,
            folder=cache_dir / key(saved, loader, precision),
            watcher=watcher,
        )
        return CachedTeacher(logits.to(device))
    looks = 2 if config.optimizer.sam_rho else 1  # SAM runs the whole task at two places
    seconds = looks * online.seconds(next(iter(loader.epoch(1)))) * len(loader)
    watcher.say(
        f"the teacher runs in every step, because no two views are the same under {config.augment.unbounded()}: "
        f"it adds about {seconds:.1f} s an epoch here, {seconds * config.train.epochs / 3600:.1f} h in all; "
        "with --augment none or flip and no more it would look at each image once or twice"
    )
    return online


def digest(saved: Checkpoint) -> str:
    """What tells a teacher's weights from all others: the sha256 of their names, shapes and bytes."""
    found = hashlib.sha256()
    precomputed.take_in(found, saved.model.state_dict().items())
    return found.hexdigest()


def key(saved: Checkpoint, loader: DeviceLoader, precision: str) -> str:
    """A name for this teacher's logits on these images."""
    about = {
        "what": "logits",
        "config": saved.config.model_dump(mode="json", include={"model", "loss"}),
        "preprocessing": asdict(saved.preprocessing),
        "precision": precision,
    }
    return precomputed.key(about, saved.model.state_dict().items(), loader)

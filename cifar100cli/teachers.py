"""A trained model as a teacher: what it says of every image, once and kept, or in every step.

A teacher sees the very pixels that the student sees, at its own image size and normalisation, and in
evaluation mode. Where a policy gives an image few versions its logits are computed once for each and kept on
the disk, in parts, so that a stop loses at most one part and the next run computes nothing again.
"""

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cifar100cli.augment import Views
from cifar100cli.checkpoint import Checkpoint
from cifar100cli.loader import Batch, DeviceLoader, Preprocessing, evaluation_batch_size
from cifar100cli.metrics import Autocast
from cifar100cli.runs import replacing

FORMAT = 1  # of a part of the cache; part of its key
PART = 5000  # images

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


class OnlineTeacher:
    """Runs in every step, on the batch's own images: for policies that make no two views the same."""

    def __init__(self, model: nn.Module, preprocessing: Preprocessing, autocast: Autocast) -> None:
        self.model, self.preprocessing, self.autocast = model.eval(), preprocessing, autocast

    def __call__(self, batch: Batch) -> Tensor:
        """Logits (N, classes) float32."""
        return self.logits(batch.images)

    def logits(self, images: Tensor) -> Tensor:
        """Logits (N, classes) float32 of uint8 images (N, 3, H, W)."""
        with torch.no_grad(), self.autocast():
            chunks = torch.split(images, evaluation_batch_size(self.preprocessing.image_size))
            logits: Tensor = torch.cat([self.model(self.preprocessing(chunk)).float() for chunk in chunks])
            return logits


class CachedTeacher:
    """Looks up what was computed before training: logits (versions, images, classes) float32 on the device."""

    def __init__(self, logits: Tensor) -> None:
        self.table = logits

    def __call__(self, batch: Batch) -> Tensor:
        """Logits (N, classes) float32."""
        assert batch.views is not None
        return self.table[batch.views, batch.positions]


def seconds_of_a_batch(teacher: OnlineTeacher, batch: Batch) -> float:
    """How long the teacher takes for a batch on its device, after a first one that warms it up."""
    teacher(batch).sum().item()
    started = time.perf_counter()
    teacher(batch).sum().item()  # the number waits for the device
    return time.perf_counter() - started


def cached(
    teacher: OnlineTeacher,
    loader: DeviceLoader,
    classes: int,
    folder: Path,
    progress: Progress,
    log: Callable[[str], None],
) -> CachedTeacher:
    """Read the teacher's logits for every version of every image of `loader`, computing those that are not there.

    `folder` is for this teacher on these images alone (`cache_folder`). Where it cannot be written to, the next
    run has the same work again, and this one goes on.
    """
    assert isinstance(loader.policy, Views)
    bounds = [(start, min(start + PART, loader.count)) for start in range(0, loader.count, PART)]
    parts = {
        (version, start, end): _read_part(_part(folder, version, start), end - start, classes)
        for version in loader.policy.versions
        for start, end in bounds
    }
    missing = [key for key, part in parts.items() if part is None]
    if not missing:
        log(f"the teacher's logits are in {folder}: nothing to compute")
    else:
        with progress("the teacher's logits", sum(end - start for _, start, end in missing)) as advance:
            for version, start, end in missing:
                logits = _compute(teacher, version(loader.images[start:end]), advance)
                parts[version, start, end] = logits
                error = _write_part(_part(folder, version, start), logits)
                if error and (version, start, end) == missing[0]:
                    log(f"{folder}: {error}; the next run has to compute the teacher's logits again")
    whole = torch.cat([part for part in parts.values() if part is not None])
    return CachedTeacher(whole.view(len(loader.policy.versions), loader.count, classes).to(loader.device))


def cache_folder(root: Path, saved: Checkpoint, loader: DeviceLoader, precision: str) -> Path:
    """The folder under `root` for this teacher's weights, preprocessing and precision on these images."""
    digest = hashlib.sha256()
    about = {
        "format": FORMAT,
        "config": saved.config.model_dump(mode="json", include={"model", "loss"}),
        "preprocessing": asdict(saved.card.preprocessing),
        "precision": precision,
        "device": loader.device.type,
        "images": list(loader.images.shape),
    }
    digest.update(json.dumps(about, sort_keys=True).encode())
    for name, tensor in saved.model.state_dict().items():
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    digest.update(loader.images.cpu().numpy().tobytes())
    return root / digest.hexdigest()[:32]


def _part(folder: Path, version: Callable[[Tensor], Tensor], start: int) -> Path:
    return folder / f"{version.__name__}-{start:06}.safetensors"


def _compute(teacher: OnlineTeacher, images: Tensor, advance: Callable[[int], None]) -> Tensor:
    found = []
    for chunk in torch.split(images, evaluation_batch_size(teacher.preprocessing.image_size)):
        found.append(teacher.logits(chunk).cpu())
        advance(len(chunk))
    return torch.cat(found)


def _read_part(path: Path, count: int, classes: int) -> Tensor | None:
    """A part of the cache, or None when it is not there or not whole."""
    try:
        logits = load_file(path)["logits"]
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    whole = logits.shape == (count, classes) and logits.dtype == torch.float32 and bool(torch.isfinite(logits).all())
    return logits if whole else None


def _write_part(path: Path, logits: Tensor) -> str | None:
    """Save a part; returns why it could not be saved."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            save_file({"logits": logits}, temporary)
    except (OSError, SafetensorError) as error:
        return f"cannot be written to ({' '.join(str(error).split())[:80]})"
    return None

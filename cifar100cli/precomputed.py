"""What depends on a version of an image alone is computed once: a teacher's logits, a frozen network's features.

Small tables are kept on the disk in parts, so that a stop loses at most one part and the next run computes
nothing again. Large ones are held for the run: on the device, in memory, or in a file without a name.
"""

import contextlib
import hashlib
import json
import math
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from cifar100cli import interrupts, memory, ranks
from cifar100cli.augment import Views
from cifar100cli.card import parse_metadata
from cifar100cli.devices import Portions
from cifar100cli.errors import CifarError, FolderError, UsageError
from cifar100cli.loader import DeviceLoader
from cifar100cli.tensors import are_as_written, load_tensors, save_tensors
from cifar100cli.watcher import Watcher

FORMAT = 3  # of a part; in its key
PART = 5000  # images
KEPT = 2**30  # bytes of the largest table that is kept on the disk
STALE = 3600  # seconds that no part takes to be written
SHARE = 0.5  # of the memory that is free, which a table may take
CAREFUL = 4 * 2**30  # bytes that are taken to be free where the system does not say
PIECE = 2**20  # bytes that are written at once


def key(about: Mapping[str, object], weights: Iterable[tuple[str, Tensor]], loader: DeviceLoader) -> str:
    """A name for what a network with these weights and settings computes from the images of a loader."""
    digest = hashlib.sha256(json.dumps({**about, "format": FORMAT}, sort_keys=True).encode())
    take_in(digest, weights)
    digest.update(f"{loader.device.type} {tuple(loader.images.shape)} ".encode())
    digest.update(loader.images.cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def take_in(digest: "hashlib._Hash", weights: Iterable[tuple[str, Tensor]]) -> None:
    """Let a digest tell tensors from all others, by their names, shapes and bytes."""
    for name, tensor in weights:
        digest.update(f"{name} {tuple(tensor.shape)} ".encode() + tensor.cpu().contiguous().numpy().tobytes())


def table(
    title: str,
    function: Callable[[Tensor], Tensor],
    loader: DeviceLoader,
    *,
    batch_size: int,
    dtype: torch.dtype,
    folder: Path,
    watcher: Watcher,
) -> Tensor:
    """`function` of every version of every image of a loader: (versions, images, ...) of `dtype`.

    `function` takes uint8 images (N, 3, H, W) on the loader's device, at most `batch_size` at once, and fewer where a
    GPU has no memory for so many. `folder` is for this table alone (`key`). The table is on the device if there is
    room, else on the host. Of several ranks each computes some parts, and all have the whole. Raises `UsageError`
    where there is room nowhere, `FolderError` where a file cannot be made, and `CifarError` for a value that is beyond
    `dtype`.
    """
    assert isinstance(loader.policy, Views)
    versions = loader.policy.versions
    shape = (len(versions), loader.count, *function(loader.images[:1]).shape[1:])
    size = math.prod(shape) * dtype.itemsize
    whole = _room(shape, dtype, loader.device, folder.parent, title)
    keep = size <= KEPT
    parts = [
        (index, version, start, min(start + PART, loader.count))
        for index, version in enumerate(versions)
        for start in range(0, loader.count, PART)
    ]
    owned = parts[ranks.rank() :: ranks.count()]
    missing = []
    for index, version, start, end in owned:
        part = _read(_path(folder, version, start), (end - start, *shape[2:]), dtype) if keep else None
        if part is None:
            missing.append((index, version, start, end))
        else:
            whole[index, start:end] = part
    if not missing and ranks.count() == 1:
        watcher.say(f"{title}: kept in {folder}, nothing to compute")
        return whole
    _tidy(folder)
    portions = Portions(loader.device, batch_size)
    left = sum(end - start for *_, start, end in missing)
    with _told_when_stopped(title, folder, watcher), watcher.progress(title, left) as advance:
        for index, version, start, end in missing:

            def compute(rows: slice, version: Callable[[Tensor], Tensor] = version) -> Tensor:
                return function(version(loader.images[rows]))

            for rows, values in portions.of(slice(start, end), compute):
                kept = whole[index, rows] = values.to(dtype)
                narrower = kept.dtype != values.dtype  # else there is nothing to wait for
                if narrower and not bool(kept.isfinite().all()) and bool(values.isfinite().all()):
                    raise CifarError(  # no mistake in what was typed, which all ranks would find
                        f"{title}: some are too large for {str(dtype).removeprefix('torch.')}: "
                        "--set finetune.cache_dtype=float32 keeps them as they are"
                    )
                advance(rows.stop - rows.start)
            if keep:
                problem = _write(_path(folder, version, start), whole[index, start:end])
                if problem:
                    watcher.say(f"{folder}: {problem}; the next run has to compute this again")
                    keep = False
    for number, (index, _, start, end) in enumerate(parts):
        ranks.hand_out(whole[index, start:end], owner=number % ranks.count())
    return whole


@contextlib.contextmanager
def _told_when_stopped(title: str, folder: Path, watcher: Watcher) -> Iterator[None]:
    """Whoever stops this may have waited for hours: tell that it was not for nothing, where it was not."""
    try:
        yield
    except KeyboardInterrupt:
        if any(folder.glob("*.safetensors")):
            watcher.say(f"{title}: the parts that are kept in {folder} will not be computed again")
        raise


def _tidy(folder: Path) -> None:
    """Remove what killed processes have left half-written; another one may be writing a part right now."""
    with contextlib.suppress(OSError):
        for left in [*folder.glob(".*.tmp"), *folder.glob(".tmp*")]:  # ours, and safetensors'
            if time.time() - left.stat().st_mtime > STALE:
                left.unlink()


def _path(folder: Path, version: Callable[[Tensor], Tensor], start: int) -> Path:
    return folder / f"{version.__name__}-{start:06}.safetensors"


@interrupts.held_back()
def _read(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """A part, or None when it is not there, not whole, or not what was written."""
    try:
        found, metadata = load_tensors(path)
        part, about = found["part"], parse_metadata(metadata)
    except (KeyError, ValueError):  # of which DataError is one
        return None
    whole = part.shape == shape and part.dtype == dtype and bool(torch.isfinite(part).all())
    return part if whole and "crc32" in about and are_as_written(found, about) else None


@interrupts.held_back()
def _write(path: Path, part: Tensor) -> str | None:
    """Save a part; returns why it could not be saved."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(path, {"part": part.cpu()}, {})
    except (OSError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        return f"cannot be written to ({' '.join(reason.split())[:80]})"
    return None


def _room(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, disk: Path, title: str) -> Tensor:
    """An empty table: on the device, in memory, or in a file that goes when the process does.

    It is at the same place on all ranks, which hand parts of it to each other, and those of a machine share that.
    """
    size = math.prod(shape) * dtype.itemsize
    needed, free = size * ranks.local_count(), memory.available()
    on_device = device.type == "cuda" and size <= SHARE * _free_on(device)
    in_memory = needed <= SHARE * (CAREFUL if free is None else free)
    place = ranks.greatest(0 if on_device else 1 if in_memory else 2)
    if place < 2:
        return torch.empty(shape, dtype=dtype, device=device if place == 0 else None)
    try:
        disk.mkdir(parents=True, exist_ok=True)
        room = shutil.disk_usage(disk).free
        if not ranks.greatest(needed > 0.95 * room):  # asked on all ranks before any of them takes it
            return torch.frombuffer(_mapped(disk, size), dtype=dtype).view(shape)
    except OSError as error:
        raise FolderError(
            f"{title}: a file of {needed / 1e9:.1f} GB is needed, and none can be had in {disk} "
            f"({error.strerror or error}); name another disk with CIFAR100_CACHE_DIR, or use --no-cache"
        ) from None
    known = "" if free is None else f"{free / 1e9:.1f} GB of memory and "
    raise UsageError(
        f"{title}: {needed / 1e9:.1f} GB are needed, and there are {known}{room / 1e9:.1f} GB in {disk}; lower "
        "--fraction or --image-size, name a larger disk with CIFAR100_CACHE_DIR, or use --no-cache"
    )


def _mapped(disk: Path, size: int) -> mmap.mmap:
    """Memory in a file of that many bytes without a name, which goes with the last tensor in it, or the process.

    The file is whole before it is mapped: a mapping that finds the disk full ends the process without a word.
    """
    with tempfile.TemporaryFile(dir=disk) as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            for start in range(0, size, PIECE):
                file.write(bytes(min(PIECE, size - start)))
            file.flush()
        return mmap.mmap(file.fileno(), size)


def _free_on(device: torch.device) -> int:
    """Bytes of a CUDA device's memory that are free, or that PyTorch keeps of what earlier runs of the process took."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]

"""CIFAR-100 and CIFAR-10 as uint8 arrays, read without unpickling anything that could run.

Source of format and figures: https://www.cs.toronto.edu/~kriz/cifar.html
"""

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from cifar100cli import synthetic
from cifar100cli.bounded import kind_of, read_file
from cifar100cli.catalog import DATASETS, FOLDERS, TITLES, share_of
from cifar100cli.errors import DataError, FolderError, UsageError
from cifar100cli.folders import user_cache
from cifar100cli.unpickle import PickleError, as_text, read_pickle
from cifar100cli.wording import argument

LARGEST_FILE = 256 * 1024 * 1024  # bytes; CIFAR-100's training file has 155,249,918
SPLIT_SEED = 20090408  # the day of the CIFAR report; held-out images are the same for every seed of a run


@dataclass(frozen=True)
class Split:
    """Images (N, 3, 32, 32) uint8 in RGB, and labels (N,) int64.

    Of a part of a data set's training images, `chosen` (N,) int64 are their places among all of them.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    chosen: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: NDArray[np.int64]) -> "Split":
        """The images at `indices`, in that order."""
        return Split(self.images[indices], self.labels[indices], self.positions[indices])

    @property
    def positions(self) -> NDArray[np.int64]:
        """Where each image (N,) stands in the data set's own order."""
        return np.arange(len(self)) if self.chosen is None else self.chosen


@dataclass(frozen=True)
class Dataset:
    """A data set with its names. `superclass_of[class]` is the index of the class's superclass."""

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    superclasses: tuple[str, ...] = ()
    superclass_of: tuple[int, ...] = ()


def load(name: str, data_dir: Path) -> Dataset:
    """Load a data set by its name in the presets.

    Raises `DataError` when it is not in `data_dir`, or is not what it should be.
    """
    if name == "synthetic":
        drawn = synthetic.draw()
        return Dataset(
            name,
            drawn.classes,
            Split(*drawn.train),
            Split(*drawn.test),
            drawn.superclasses,
            drawn.superclass_of,
        )
    folder = find(name, data_dir)
    try:
        return READERS[name](folder)
    except DataError as error:
        raise DataError(f"{error}; `{_download(name, data_dir)} --force` fetches it again") from None


def find(name: str, data_dir: Path) -> Path:
    """The data set's folder. Raises `DataError`, which says what to do, when it is not there."""
    folder = data_dir / FOLDERS[name]
    if kind_of(folder) != "folder":
        if data_dir.resolve().name == FOLDERS[name]:
            parent = argument(data_dir.parent)
            raise DataError(f"{data_dir}: is the data set's own folder; name the one above it: --data-dir {parent}")
        raise DataError(
            f"{TITLES[name]} is not in {data_dir}: run `{_download(name, data_dir)}`, or point --data-dir at the "
            f"folder that holds {FOLDERS[name]} (`cifar100 train --dataset synthetic` needs no download)"
        )
    return folder


def _download(name: str, data_dir: Path) -> str:
    """The command that fetches a data set to where it was looked for."""
    command = "cifar100 download" if name == "cifar100" else f"cifar100 download --dataset {name}"
    with contextlib.suppress(FolderError):
        if data_dir == user_cache():  # which download takes without a word
            return command
    return f"{command} --data-dir {argument(data_dir)}"


# --------------------------------------------------------------------------------------- the two formats


def read_cifar100(folder: Path) -> Dataset:
    """Read the folder `cifar-100-python`: files `train`, `test`, `meta`."""
    about = DATASETS["cifar100"]
    meta = _read_file(folder / "meta")
    classes = _names(folder / "meta", meta, "fine_label_names", 100)
    superclasses = _names(folder / "meta", meta, "coarse_label_names", 20)
    superclass_of = np.full(100, -1)
    splits = []
    for name, count in (("train", about.training_images), ("test", about.test_images)):
        path = folder / name
        content = _read_file(path)
        split = _split(path, content, "fine_labels", count, 100)
        coarse = _labels(path, content, "coarse_labels", count, 20)
        superclass_of[split.labels] = coarse
        if not np.array_equal(superclass_of[split.labels], coarse):
            _refuse(path, "a class has two superclasses")
        splits.append(split)
    if (superclass_of < 0).any():
        _refuse(folder / "train", "a class has no images")
    train, test = splits
    return Dataset("cifar100", classes, train, test, superclasses, tuple(int(i) for i in superclass_of))


def read_cifar10(folder: Path) -> Dataset:
    """Read the folder `cifar-10-batches-py`: `data_batch_1` to `5`, `test_batch`, `batches.meta`."""
    classes = _names(folder / "batches.meta", _read_file(folder / "batches.meta"), "label_names", 10)
    batches = []
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        path = folder / name
        batches.append(_split(path, _read_file(path), "labels", 10_000, 10))
    train = Split(np.concatenate([b.images for b in batches[:5]]), np.concatenate([b.labels for b in batches[:5]]))
    return Dataset("cifar10", classes, train, batches[5])


READERS = {"cifar100": read_cifar100, "cifar10": read_cifar10}


def _refuse(path: Path, reason: str) -> NoReturn:
    raise DataError(f"{path}: {reason}")


def _read_file(path: Path) -> dict[str, Any]:
    try:
        content = read_pickle(read_file(path, LARGEST_FILE))
    except FileNotFoundError:
        _refuse(path, "there is no such file")
    except PickleError as error:
        _refuse(path, str(error))
    if not isinstance(content, dict):
        _refuse(path, "holds no dictionary")
    return {as_text(key): value for key, value in content.items() if isinstance(key, (str, bytes))}


def _get(path: Path, content: dict[str, Any], key: str) -> Any:
    if key not in content:
        _refuse(path, f"has no {key!r}")
    return content[key]


def _names(path: Path, content: dict[str, Any], key: str, count: int) -> tuple[str, ...]:
    names = _get(path, content, key)
    if not isinstance(names, list) or not all(isinstance(name, (str, bytes)) for name in names):
        _refuse(path, f"{key} is no list of names")
    if len({as_text(name) for name in names}) != count or len(names) != count:
        _refuse(path, f"{key} has {len(names)} names and not {count} different ones")
    return tuple(as_text(name) for name in names)


def _labels(path: Path, content: dict[str, Any], key: str, count: int, classes: int) -> NDArray[np.int64]:
    labels = _get(path, content, key)
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        _refuse(path, f"{key} is no list of whole numbers")
    if len(labels) != count:
        _refuse(path, f"{key} has {len(labels):,} labels and not {count:,}")
    if min(labels) < 0 or max(labels) >= classes:
        _refuse(path, f"{key} has labels outside 0 to {classes - 1}")
    return np.asarray(labels, dtype=np.int64)


def _split(path: Path, content: dict[str, Any], key: str, count: int, classes: int) -> Split:
    data = _get(path, content, "data")
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8:
        _refuse(path, "data is no array of uint8")
    if data.shape != (count, 3072):
        _refuse(path, f"data has the shape {data.shape} and not {(count, 3072)}")
    labels = _labels(path, content, key, count, classes)
    return Split(np.ascontiguousarray(data).reshape(count, 3, 32, 32), labels)


# ------------------------------------------------------------------------------------------- splitting


def _by_class(labels: NDArray[np.int64], generator: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """The positions of each class's images, shuffled."""
    for label in range(int(labels.max()) + 1):
        yield generator.permutation(np.flatnonzero(labels == label))


def digest(dataset: Dataset) -> str:
    """What tells a data set's images and labels, in their order, from all others: their sha256."""
    found = hashlib.sha256()
    for split in (dataset.train, dataset.test):
        found.update(np.ascontiguousarray(split.images).data)
        found.update(np.ascontiguousarray(split.labels).data)
    return found.hexdigest()


def hold_out(split: Split, share: float) -> tuple[Split, Split | None]:
    """Part a training set into (training, held-out), with the same share of every class held out.

    The parting is always the same for the same data and share: neither seeds nor fractions let a
    held-out image into training. Without a share nothing is held out.
    """
    if share == 0:
        return split, None
    generator = np.random.default_rng(SPLIT_SEED)
    held_out = np.sort(
        np.concatenate([indices[: share_of(len(indices), share)] for indices in _by_class(split.labels, generator)])
    )
    kept = np.setdiff1d(np.arange(len(split)), held_out)
    if not len(kept):
        raise UsageError(f"data.val_fraction = {share} leaves nothing to train on")
    return split.take(kept), split.take(held_out)


def subset(split: Split, fraction: float, seed: int) -> Split:
    """The same fraction of every class (at least one image of each), drawn with `seed`.

    A smaller fraction is contained in a larger one of the same seed.
    """
    if fraction == 1:
        return split
    generator = np.random.default_rng([SPLIT_SEED, seed])
    chosen = [indices[: share_of(len(indices), fraction)] for indices in _by_class(split.labels, generator)]
    return split.take(np.sort(np.concatenate(chosen)))

"""Reading CIFAR: equal to torchvision, and closed to everything that is not numbers."""

import os
import pickle
import pickletools
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torchvision
from numpy.typing import NDArray

from cifar100cli import datasets, places
from cifar100cli.catalog import DATASETS, FOLDERS, DatasetName
from cifar100cli.datasets import Split
from cifar100cli.download import ARCHIVES
from cifar100cli.errors import DataError, UsageError
from cifar100cli.unpickle import PickleError, read_pickle


class _CIFAR100(torchvision.datasets.CIFAR100):  # type: ignore[misc]
    """torchvision's reader, without the digests of the official files."""

    train_list = (("train", None),)
    test_list = (("test", None),)
    meta = {"filename": "meta", "key": "fine_label_names", "md5": None}  # noqa: RUF012


class _CIFAR10(torchvision.datasets.CIFAR10):  # type: ignore[misc]
    train_list = tuple((f"data_batch_{number}", None) for number in range(1, 6))
    test_list = (("test_batch", None),)
    meta = {"filename": "batches.meta", "key": "label_names", "md5": None}  # noqa: RUF012


def assert_equals_torchvision(name: str, ours: datasets.Dataset, data_dir: Path) -> None:
    """Every pixel, label and name."""
    reader: Any = {"cifar100": _CIFAR100, "cifar10": _CIFAR10}[name]
    for train, split in ((True, ours.train), (False, ours.test)):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "dtype.*align")  # torchvision's use of NumPy, not ours
            reference = reader(data_dir, train=train)
        np.testing.assert_array_equal(split.images, reference.data.transpose(0, 3, 1, 2))
        np.testing.assert_array_equal(split.labels, reference.targets)
        assert list(ours.classes) == reference.classes
        assert (split.images.dtype.name, split.labels.dtype.name) == ("uint8", "int64")


@pytest.mark.parametrize("name", ["cifar100", "cifar10"])
def test_equals_torchvision(pretend_cifar: Path, name: str) -> None:
    ours = datasets.load(name, pretend_cifar)
    assert_equals_torchvision(name, ours, pretend_cifar)
    if name == "cifar100":
        assert ours.superclass_of == tuple(label // 5 for label in range(100))


def test_every_data_set_is_known_everywhere(pretend_cifar: Path) -> None:
    assert set(DATASETS) == set(get_args(DatasetName))
    assert set(FOLDERS) == set(datasets.READERS) == set(ARCHIVES)
    for name, about in DATASETS.items():
        assert len(datasets.load(name, pretend_cifar).classes) == about.classes


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_unpickles_plain_values_of_every_protocol(protocol: int) -> None:
    value: dict[Any, Any] = {
        b"bytes\xff": "text",
        "numbers": [0, 255, 65535, -1, 2**40, 1.5, None, True, False],
        "nested": ({"a": []}, (), (1,), (1, 2), (1, 2, 3), [[1], [2]]),
        "same": [b"x"] * 3,
        "empty": b"",
    }
    assert read_pickle(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("dtype", ["u1", "b1", "<i2", ">i4", "<i8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_unpickles_arrays(protocol: int, dtype: str, order: Any) -> None:
    array = np.asarray(np.arange(24).reshape(2, 3, 4) % 2, dtype=dtype, order=order)
    found = read_pickle(pickle.dumps([array, array], protocol))
    for one in found:
        np.testing.assert_array_equal(one, array)
        assert one.dtype == array.dtype


def test_the_data_sets_own_folder_is_one_too_deep(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"own folder; name the one above it: --data-dir {tmp_path}$"):
        datasets.find("cifar100", tmp_path / FOLDERS["cifar100"])
    with pytest.raises(DataError, match=r"run `cifar100 download --data-dir \./-x`"):  # and no option
        datasets.find("cifar100", Path("-x"))


class _Calls:
    """Pickles to a call of any function with any arguments."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.system, ("touch pwned",), "system"),
        (eval, ("open('pwned', 'w')",), "eval"),
        (os.mkdir, ("pwned",), "mkdir"),
        (Path, ("pwned",), "Path"),
        (np.load, ("pwned",), "load"),
        (bytearray, (2**40,), "bytearray"),
    ],
)
def test_nothing_is_called(
    protocol: int,
    function: Callable[..., object],
    arguments: tuple[object, ...],
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PickleError, match=f"refused: it asks for .*{name}"):
        read_pickle(pickle.dumps({"data": _Calls(function, *arguments)}, protocol))
    assert list(tmp_path.iterdir()) == []


GLOBALS = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "exhausted"),
        (b"\x80\x02", "exhausted"),
        (b".", "readable"),
        (b"garbage", "readable"),
        (b"<!DOCTYPE html><html></html>", "readable"),
        (b"K\x01K\x02.", "readable"),
        (b"\x80\x02]q\x00(K\x01", "exhausted"),
        (b"\x80\x02K\x01a.", "readable"),  # append to nothing
        (b"\x80\x02K\x01K\x02a.", "list was expected"),
        (b"\x80\x02}K\x01K\x02K\x03u.", "no mark"),
        (b"\x80\x02h\x07.", "readable"),  # a memo entry that is not there
        (b"\x80\x02K\x01r\xff\xff\xff\x7f.", None),  # a memo index of two thousand million
        (b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.", "readable"),  # a frame without end
        (b"\x80\x02T\xff\xff\xff\x7fabc.", "readable"),  # a string longer than the file
        (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc.", "readable"),
        (b"\x80\x02\x8a\xffabc.", "readable"),  # a long number cut short
        (b"\x80\x02I" + b"9" * 10_000 + b"\n.", "readable"),
        (b"\x80\x02P1\n.", "PERSID"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"\x80\x02(ios\nsystem\n.", "INST"),
        (b"cnumpy\nndarray\n.", "no number"),
        (b"cnumpy\nndarray\n)R.", "arguments"),
        (b"cnumpy\ndtype\n(S'O8'\nI0\nI1\ntR.", "arguments"),
        (b"cnumpy\ndtype\n(S'V4096'\nI0\nI1\ntR.", "arguments"),
        (GLOBALS + b".", "without content"),
        (GLOBALS + b"]b.", "readable"),
        (GLOBALS + b"(I1\n(I1000000000000\ntcnumpy\ndtype\n(S'u1'\nI0\nI1\ntRI00\nS'abc'\ntb.", "claims the shape"),
        (GLOBALS + b"(I1\n(I-1\nI-3\ntcnumpy\ndtype\n(S'u1'\nI0\nI1\ntRI00\nS'abc'\ntb.", "claims the shape"),
        (GLOBALS + b"(I1\n(I3\ntcnumpy\ndtype\n(S'u1'\nI0\nI1\ntRI00\nI5\ntb.", "no bytes"),
        (b"]I1\nb.", "no array"),
        (b"(" * 100_000 + b".", "readable"),
        (b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", None),  # nested very deeply
    ],
)
def test_broken_and_hostile_pickles(content: bytes, reason: str | None) -> None:
    if reason is None:
        read_pickle(content)
        return
    with pytest.raises(PickleError, match=reason):
        read_pickle(content)


def test_mutations_never_escape() -> None:
    """Whatever is done to a sound file, it is read or refused."""
    sound = pickle.dumps({"data": np.arange(48, dtype=np.uint8).reshape(4, 12), "labels": [1, 2, 3]}, protocol=2)
    assert any(opcode.name == "REDUCE" for opcode, _, _ in pickletools.genops(sound))
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(3000):
        content = bytearray(sound)
        for position in random.integers(0, len(content), random.integers(1, 4)):
            content[position] = random.integers(0, 256)
        if random.random() < 0.2:
            del content[random.integers(0, len(content)) :]
        try:
            read_pickle(bytes(content))
        except PickleError:
            refused += 1
    assert refused > 1000


@pytest.fixture(scope="module")
def sound(pretend_cifar: Path) -> dict[str, Any]:
    content: dict[str, Any] = pickle.loads((pretend_cifar / "cifar-10-batches-py" / "test_batch").read_bytes())  # noqa: S301
    return content


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: c.pop("data"), "test_batch: has no 'data'"),
        (lambda c: c.pop("labels"), "test_batch: has no 'labels'"),
        (lambda c: c.update({"data": c["data"][:, :100]}), "shape"),
        (lambda c: c.update({"data": c["data"].astype(np.int16)}), "uint8"),
        (lambda c: c.update({"data": [1, 2]}), "uint8"),
        (lambda c: c.update({"labels": c["labels"][1:]}), "9,999 labels"),
        (lambda c: c.update({"labels": [10, *c["labels"][1:]]}), "outside 0 to 9"),
        (lambda c: c.update({"labels": [-1, *c["labels"][1:]]}), "outside 0 to 9"),
        (lambda c: c.update({"labels": ["a", *c["labels"][1:]]}), "whole numbers"),
        (lambda c: c.update({"labels": None}), "whole numbers"),
    ],
)
def test_wrong_content_is_named(
    pretend_cifar: Path, sound: dict[str, Any], tmp_path: Path, change: Callable[[dict[str, Any]], Any], reason: str
) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for file in (pretend_cifar / "cifar-10-batches-py").iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "test_batch").unlink()
    content = dict(sound)
    change(content)
    (folder / "test_batch").write_bytes(pickle.dumps(content, protocol=2))
    again = f"`cifar100 download --dataset cifar10 --data-dir {tmp_path} --force` fetches it again"
    with pytest.raises(DataError, match=f"{reason}.*{re.escape(again)}"):
        datasets.load("cifar10", tmp_path)


def test_missing_data_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is named, unless it is the one that `download` takes by itself."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for folder, more in ((tmp_path / "my data", f" --data-dir '{tmp_path}/my data'"), (places.data_folder(None), "")):
        with pytest.raises(DataError, match=f"run `cifar100 download{re.escape(more)}`"):
            datasets.load("cifar100", folder)
        with pytest.raises(DataError, match=f"run `cifar100 download --dataset cifar10{re.escape(more)}`"):
            datasets.load("cifar10", folder)


def test_a_missing_file_is_named(pretend_cifar: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    shutil.copy(pretend_cifar / "cifar-100-python" / "meta", folder)
    with pytest.raises(DataError, match="train: there is no such file"):
        datasets.load("cifar100", tmp_path)


def make_split(counts: list[int]) -> Split:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    images = np.arange(len(labels), dtype=np.int64)[:, None, None, None] % 256 * np.ones((1, 3, 2, 2), np.int64)
    return Split(images.astype(np.uint8), labels)


def test_held_out_is_stratified_disjoint_and_fixed() -> None:
    split = make_split([50, 100, 30])
    training, held_out = datasets.hold_out(split, 0.1)
    assert held_out is not None
    assert np.bincount(held_out.labels).tolist() == [5, 10, 3]
    assert np.bincount(training.labels).tolist() == [45, 90, 27]
    everything = np.concatenate([training.images[:, 0, 0, 0], held_out.images[:, 0, 0, 0]])
    assert sorted(everything) == sorted(split.images[:, 0, 0, 0])
    again = datasets.hold_out(split, 0.1)[1]
    assert again is not None
    np.testing.assert_array_equal(again.images, held_out.images)
    assert datasets.hold_out(split, 0) == (split, None)


def test_fractions_are_stratified_nested_and_seeded() -> None:
    split = make_split([50, 100, 30])
    small, large = datasets.subset(split, 0.1, seed=1), datasets.subset(split, 0.4, seed=1)
    assert np.bincount(small.labels).tolist() == [5, 10, 3]
    assert np.bincount(large.labels).tolist() == [20, 40, 12]
    assert set(small.images[:, 0, 0, 0]) <= set(large.images[:, 0, 0, 0])
    assert not np.array_equal(datasets.subset(split, 0.1, seed=2).images, small.images)
    assert np.bincount(datasets.subset(split, 1e-9, seed=1).labels).tolist() == [1, 1, 1]
    assert datasets.subset(split, 1.0, seed=1) is split


def test_the_same_images_are_drawn_in_every_version() -> None:
    """A run that goes on, or is compared with an older one, has its very images; they stay in the data set's order."""
    split = make_split([50, 100, 30])

    def drawn(labels: NDArray[np.int64], share: float, *seed: int) -> list[int]:
        random = np.random.default_rng([20090408, *seed] if seed else 20090408)
        orders = [random.permutation(np.flatnonzero(labels == label)) for label in range(3)]
        return sorted(int(place) for order in orders for place in order[: round(share * len(order))])

    training, held_out = datasets.hold_out(split, 0.1)
    assert held_out is not None
    part = datasets.subset(training, 0.4, seed=3)
    assert held_out.positions.tolist() == drawn(split.labels, 0.1)
    assert training.positions.tolist() == sorted(set(range(180)) - set(held_out.positions.tolist()))
    assert part.positions.tolist() == training.positions[drawn(training.labels, 0.4, 3)].tolist()
    for one in (training, held_out, part):
        np.testing.assert_array_equal(one.images, split.images[one.positions])
        np.testing.assert_array_equal(one.labels, split.labels[one.positions])


def test_holding_out_everything_is_refused() -> None:
    with pytest.raises(UsageError, match="val_fraction"):
        datasets.hold_out(make_split([1, 1]), 0.9)

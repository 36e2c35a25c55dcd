"""CIFAR-100 and CIFAR-10 as uint8 arrays, read without unpickling anything that could run.

Source of format and figures: https://www.cs.toronto.edu/~kriz/cifar.html
"""

import pickletools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from cifar100cli import synthetic
from cifar100cli.errors import DataError, UsageError

LARGEST_FILE = 256 * 1024 * 1024  # bytes; CIFAR-100's training file has 155,249,918
SPLIT_SEED = 20090408  # the day of the CIFAR report; held-out images are the same for every seed of a run

TITLES = {"cifar100": "CIFAR-100", "cifar10": "CIFAR-10", "synthetic": "synthetic (drawn) data"}


@dataclass(frozen=True)
class Split:
    """Images (N, 3, 32, 32) uint8 in RGB, and labels (N,) int64."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: NDArray[np.int64]) -> "Split":
        """The images at `indices`, in that order."""
        return Split(self.images[indices], self.labels[indices])


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
        raise DataError(f"{error}; `cifar100 download --dataset {name} --force` fetches it again") from None


def find(name: str, data_dir: Path) -> Path:
    """The data set's folder. Raises `DataError`, which says what to do, when it is not there."""
    folder = data_dir / FOLDERS[name]
    if not folder.is_dir():
        flag = "" if name == "cifar100" else f" --dataset {name}"
        raise DataError(
            f"{TITLES[name]} is not in {data_dir}: run `cifar100 download{flag}`, or point --data-dir at it "
            "(`--dataset synthetic` needs no download)"
        )
    return folder


# --------------------------------------------------------------------------------------- the two formats


def read_cifar100(folder: Path) -> Dataset:
    """Read the folder `cifar-100-python`: files `train`, `test`, `meta`."""
    meta = _read_file(folder / "meta")
    classes = _names(folder / "meta", meta, "fine_label_names", 100)
    superclasses = _names(folder / "meta", meta, "coarse_label_names", 20)
    superclass_of = np.full(100, -1)
    splits = []
    for name, count in (("train", 50_000), ("test", 10_000)):
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


FOLDERS = {"cifar100": "cifar-100-python", "cifar10": "cifar-10-batches-py"}
READERS = {"cifar100": read_cifar100, "cifar10": read_cifar10}


def _refuse(path: Path, reason: str) -> NoReturn:
    raise DataError(f"{path}: {reason}")


def _read_file(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LARGEST_FILE:
            _refuse(path, f"larger than {LARGEST_FILE // 2**20} MiB")
        content = read_pickle(path.read_bytes())
    except FileNotFoundError:
        _refuse(path, "there is no such file")
    except PickleError as error:
        _refuse(path, str(error))
    if not isinstance(content, dict):
        _refuse(path, "holds no dictionary")
    return {_text(key): value for key, value in content.items() if isinstance(key, (str, bytes))}


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else value


def _get(path: Path, content: dict[str, Any], key: str) -> Any:
    if key not in content:
        _refuse(path, f"has no {key!r}")
    return content[key]


def _names(path: Path, content: dict[str, Any], key: str, count: int) -> tuple[str, ...]:
    names = _get(path, content, key)
    if not isinstance(names, list) or not all(isinstance(name, (str, bytes)) for name in names):
        _refuse(path, f"{key} is no list of names")
    if len({_text(name) for name in names}) != count or len(names) != count:
        _refuse(path, f"{key} has {len(names)} names and not {count} different ones")
    return tuple(_text(name) for name in names)


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


def hold_out(split: Split, share: float) -> tuple[Split, Split | None]:
    """Part a training set into (training, held-out), with the same share of every class held out.

    The parting is always the same for the same data and share: neither seeds nor fractions let a
    held-out image into training. Without a share nothing is held out.
    """
    if share == 0:
        return split, None
    generator = np.random.default_rng(SPLIT_SEED)
    held_out = np.sort(
        np.concatenate([indices[: _share_of(len(indices), share)] for indices in _by_class(split.labels, generator)])
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
    chosen = [indices[: _share_of(len(indices), fraction)] for indices in _by_class(split.labels, generator)]
    return split.take(np.sort(np.concatenate(chosen)))


def _share_of(count: int, share: float) -> int:
    return min(count, max(1, round(count * share)))


# --------------------------------------------------------------------------------- the restricted unpickler


class PickleError(ValueError):
    """A pickle that is broken, or asks for more than plain containers and arrays of numbers."""


class _Mark:
    pass


_MARK = _Mark()
_DTYPES = ("u1", "b1", "i1", "i2", "i4", "i8")


@dataclass(frozen=True)
class _Global:
    """One of the few names that a pickled array asks for; it is compared, never called."""

    name: str


_NDARRAY, _DTYPE, _RECONSTRUCT = _Global("ndarray"), _Global("dtype"), _Global("_reconstruct")
_FROM_BUFFER, _ENCODE, _BYTES = _Global("_frombuffer"), _Global("encode"), _Global("bytes")
_GLOBALS = {
    "numpy ndarray": _NDARRAY,
    "numpy dtype": _DTYPE,
    "numpy.core.multiarray _reconstruct": _RECONSTRUCT,
    "numpy._core.multiarray _reconstruct": _RECONSTRUCT,
    # Python 3 writes arrays in these two ways besides: as protocol 5, and bytes as protocol 2 and below.
    "numpy.core.numeric _frombuffer": _FROM_BUFFER,
    "numpy._core.numeric _frombuffer": _FROM_BUFFER,
    "_codecs encode": _ENCODE,
    "__builtin__ bytes": _BYTES,
}


@dataclass(eq=False)
class _Array:
    """An array between its construction (`REDUCE`) and its content (`BUILD`)."""

    value: NDArray[Any] | None = None


@dataclass(eq=False)
class _DType:
    """A type between its construction and its byte order (`BUILD`)."""

    code: str
    byte_order: str = "|"


def read_pickle(data: bytes) -> Any:
    """Interpret a pickle that holds numbers, text, plain containers and NumPy arrays of integers.

    This is a stack machine over `pickletools.genops`, which only parses. No name is ever imported and
    nothing is called, so there is nothing to escape from: every other name, and every opcode that could
    reach further, is refused by its name before anything happens. `pickle.Unpickler` with a
    `find_class` would do for the names but still obeys a memo index of 2**31, or an array's claim to
    a terabyte. Raises `PickleError`.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in old string literals
            for opcode, argument, _ in pickletools.genops(data):
                if opcode.name == "STOP":
                    (value,) = stack
                    return _finished(value)
                _step(opcode.name, argument, stack, memo)
    except PickleError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError, RecursionError) as error:
        raise PickleError(f"not a readable pickle ({type(error).__name__}: {str(error)[:80]})") from None
    raise PickleError("not a readable pickle (it has no end)")


def _step(name: str, argument: Any, stack: list[Any], memo: dict[int, Any]) -> None:
    if name in _PUSH:
        stack.append(_PUSH[name](argument))
    elif name in ("PROTO", "FRAME"):
        pass
    elif name == "MARK":
        stack.append(_MARK)
    elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
        memo[len(memo) if argument is None else argument] = stack[-1]
    elif name in ("GET", "BINGET", "LONG_BINGET"):
        stack.append(memo[argument])
    elif name == "APPEND":
        value = stack.pop()
        _top(stack, list).append(_finished(value))
    elif name == "APPENDS":
        values = _above_mark(stack)
        _top(stack, list).extend(map(_finished, values))
    elif name == "SETITEM":
        value, key = stack.pop(), stack.pop()
        _top(stack, dict)[key] = _finished(value)
    elif name == "SETITEMS":
        values = _above_mark(stack)
        _top(stack, dict).update(zip(values[::2], map(_finished, values[1::2]), strict=True))
    elif name == "TUPLE":
        stack.append(tuple(_above_mark(stack)))
    elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
        count = int(name[-1])
        stack[-count:] = [tuple(stack[-count:])]
    elif name == "LIST":
        stack.append([_finished(value) for value in _above_mark(stack)])
    elif name == "DICT":
        values = _above_mark(stack)
        stack.append(dict(zip(values[::2], map(_finished, values[1::2]), strict=True)))
    elif name in ("GLOBAL", "STACK_GLOBAL"):
        asked = argument if name == "GLOBAL" else " ".join(map(str, stack[-2:]))
        if name == "STACK_GLOBAL":
            del stack[-2:]
        if asked not in _GLOBALS:
            raise PickleError(f"refused: it asks for {'.'.join(str(asked).split())[:80]}, which could run code")
        stack.append(_GLOBALS[asked])
    elif name == "REDUCE":
        arguments, function = stack.pop(), stack.pop()
        stack.append(_construct(function, arguments))
    elif name == "BUILD":
        state = stack.pop()
        stack.append(_build(stack.pop(), state))
    else:
        raise PickleError(f"refused: the opcode {name}, which could run code")


_PUSH = {
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "EMPTY_LIST": lambda _: [],
    "EMPTY_DICT": lambda _: {},
    "EMPTY_TUPLE": lambda _: (),
} | dict.fromkeys(
    (
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *(
            "STRING",
            "BINSTRING",
            "SHORT_BINSTRING",
            "UNICODE",
            "SHORT_BINUNICODE",
            "BINUNICODE",
            "BINUNICODE8",
        ),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    ),
    lambda argument: argument,
)


def _top(stack: list[Any], kind: type) -> Any:
    if type(stack[-1]) is not kind:
        raise PickleError(f"not a readable pickle (a {kind.__name__} was expected)")
    return stack[-1]


def _above_mark(stack: list[Any]) -> list[Any]:
    position = len(stack) - 1
    while stack[position] is not _MARK:
        position -= 1
        if position < 0:
            raise PickleError("not a readable pickle (no mark)")
    values = stack[position + 1 :]
    del stack[position:]
    return values


def _construct(function: Any, arguments: Any) -> Any:
    if function is _RECONSTRUCT and arguments[0] is _NDARRAY:
        return _Array()
    if function is _DTYPE and _text(arguments[0]) in _DTYPES:
        return _DType(_text(arguments[0]))
    if function is _ENCODE and type(arguments[0]) is str and arguments[1] in ("latin1", "latin-1"):
        return arguments[0].encode("latin-1")
    if function is _BYTES and arguments == ():
        return b""
    if function is _FROM_BUFFER:
        content, dtype, shape, order = arguments
        return _array(content, dtype, shape, order)
    raise PickleError("refused: it calls something with arguments that no array has")


def _build(target: Any, state: Any) -> _Array | _DType:
    if isinstance(target, _DType):
        version, byte_order = state[0], _text(state[1])
        if version not in (3, 4) or byte_order not in ("|", "<", ">") or any(part is not None for part in state[2:5]):
            raise PickleError("refused: an array of something else than integers")
        target.byte_order = byte_order
        return target
    if not isinstance(target, _Array) or target.value is not None:
        raise PickleError("refused: it changes something that is no array")
    _, shape, dtype, fortran_order, content = state
    target.value = _array(content, dtype, shape, "F" if fortran_order else "C")
    return target


def _array(content: Any, dtype: Any, shape: Any, order: Any) -> NDArray[Any]:
    """The array itself, once its type is known and its shape agrees with the bytes that there are."""
    if not isinstance(dtype, _DType) or not isinstance(shape, tuple) or not all(type(n) is int for n in shape):
        raise PickleError("refused: an array without a plain shape and type")
    if not isinstance(content, (str, bytes, bytearray)) or order not in ("C", "F"):
        raise PickleError("refused: an array whose content is no bytes")
    # A bytearray, so that the array can be written to and torch shares it without a warning.
    raw = bytearray(content, "latin-1") if isinstance(content, str) else bytearray(content)
    element = np.dtype(f"{dtype.byte_order}{dtype.code}")
    if min(shape, default=0) < 0 or len(shape) > 4 or _product(shape) * element.itemsize != len(raw):
        raise PickleError(f"an array claims the shape {shape!r:.60} but has {len(raw):,} bytes")
    return np.frombuffer(raw, dtype=element).reshape(shape, order="F" if order == "F" else "C")


def _product(shape: Sequence[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _finished(value: Any) -> Any:
    """What goes into a container: an array as the array itself."""
    if isinstance(value, _Array):
        if value.value is None:
            raise PickleError("not a readable pickle (an array without content)")
        return value.value
    if isinstance(value, (_DType, _Global, _Mark)):
        raise PickleError("refused: it stores something that is no number, text, container or array")
    return value

"""Read a pickle of numbers, text, containers and arrays, and nothing else: no name in it is ever imported.

Source of the opcodes: the documentation in Python's own `pickletools`.
"""

import math
import pickletools
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


class PickleError(ValueError):
    """A pickle that is broken, or asks for more than plain containers and arrays of numbers."""


class _Mark:
    pass


_MARK = _Mark()
MOST_OPCODES = 2_000_000  # CIFAR-100's training file has about 200,000
MOST_ELEMENTS = 1 << 40  # along an axis: larger numbers take long to multiply
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


class _Room:
    """For the bytes of arrays: as many as the file has, thrice (as text, as bytes, and as an array that is its own).

    A pickle may name the same content any number of times, and each time would be a copy.
    """

    def __init__(self, size: int) -> None:
        self.left = 3 * size

    def take(self, content: str | bytes | bytearray) -> None:
        self.left -= len(content)
        if self.left < 0:
            raise PickleError("refused: it copies its content over and over")


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
    room = _Room(len(data))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in old string literals
            for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
                if count >= MOST_OPCODES:
                    raise PickleError(f"refused: it has more than {MOST_OPCODES:,} parts")
                if opcode.name == "STOP":
                    (value,) = stack
                    return _finished(value)
                _step(opcode.name, argument, stack, memo, room)
    except PickleError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError, RecursionError) as error:
        raise PickleError(f"not a readable pickle ({type(error).__name__}: {str(error)[:80]})") from None
    raise PickleError("not a readable pickle (it has no end)")


def _step(name: str, argument: Any, stack: list[Any], memo: dict[int, Any], room: _Room) -> None:
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
        _top(stack, dict)[_key(key)] = _finished(value)
    elif name == "SETITEMS":
        values = _above_mark(stack)
        _top(stack, dict).update(zip(map(_key, values[::2]), map(_finished, values[1::2]), strict=True))
    elif name == "TUPLE":
        stack.append(tuple(_above_mark(stack)))
    elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
        count = int(name[-1])
        stack[-count:] = [tuple(stack[-count:])]
    elif name == "LIST":
        stack.append([_finished(value) for value in _above_mark(stack)])
    elif name == "DICT":
        values = _above_mark(stack)
        stack.append(dict(zip(map(_key, values[::2]), map(_finished, values[1::2]), strict=True)))
    elif name in ("GLOBAL", "STACK_GLOBAL"):
        asked = argument
        if name == "STACK_GLOBAL":
            parts = [stack.pop(), stack.pop()][::-1]
            if not all(type(part) is str for part in parts):  # writing out tuples of tuples could take for ever
                raise PickleError("refused: it asks for something by a name that is no text, which could run code")
            asked = " ".join(parts)
        if asked not in _GLOBALS:
            raise PickleError(f"refused: it asks for {'.'.join(str(asked).split())[:80]}, which could run code")
        stack.append(_GLOBALS[asked])
    elif name == "REDUCE":
        arguments, function = stack.pop(), stack.pop()
        stack.append(_construct(function, arguments, room))
    elif name == "BUILD":
        state = stack.pop()
        stack.append(_build(stack.pop(), state, room))
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
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
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


def _construct(function: Any, arguments: Any, room: _Room) -> Any:
    if function is _RECONSTRUCT and arguments[0] is _NDARRAY:
        return _Array()
    if function is _DTYPE and as_text(arguments[0]) in _DTYPES:
        return _DType(as_text(arguments[0]))
    if function is _ENCODE and type(arguments[0]) is str and arguments[1] in ("latin1", "latin-1"):
        room.take(arguments[0])
        return arguments[0].encode("latin-1")
    if function is _BYTES and arguments == ():
        return b""
    if function is _FROM_BUFFER:
        content, dtype, shape, order = arguments
        return _array(content, dtype, shape, order, room)
    raise PickleError("refused: it calls something with arguments that no array has")


def _build(target: Any, state: Any, room: _Room) -> _Array | _DType:
    if isinstance(target, _DType):
        version, byte_order = state[0], as_text(state[1])
        if version not in (3, 4) or byte_order not in ("|", "<", ">") or any(part is not None for part in state[2:5]):
            raise PickleError("refused: an array of something else than integers")
        target.byte_order = byte_order
        return target
    if not isinstance(target, _Array) or target.value is not None:
        raise PickleError("refused: it changes something that is no array")
    _, shape, dtype, fortran_order, content = state
    target.value = _array(content, dtype, shape, "F" if fortran_order else "C", room)
    return target


def _array(content: Any, dtype: Any, shape: Any, order: Any, room: _Room) -> NDArray[Any]:
    """The array itself, once its type is known and its shape agrees with the bytes that there are."""
    if not isinstance(dtype, _DType) or not isinstance(shape, tuple) or not all(type(n) is int for n in shape):
        raise PickleError("refused: an array without a plain shape and type")
    if not isinstance(content, (str, bytes, bytearray)) or order not in ("C", "F"):
        raise PickleError("refused: an array whose content is no bytes")
    if len(shape) > 4 or not all(0 <= n < MOST_ELEMENTS for n in shape):
        raise PickleError("an array claims the shape of no array")
    room.take(content)
    # A bytearray, so that the array can be written to and torch shares it without a warning.
    raw = bytearray(content, "latin-1") if isinstance(content, str) else bytearray(content)
    element = np.dtype(f"{dtype.byte_order}{dtype.code}")
    if math.prod(shape) * element.itemsize != len(raw):
        raise PickleError(f"an array claims the shape {shape!r:.60} but has {len(raw):,} bytes")
    return np.frombuffer(raw, dtype=element).reshape(shape, order="F" if order == "F" else "C")


def _key(value: Any) -> str | bytes:
    """Text alone: what else can be a key can be made to take for ever, or to overflow the stack, when it is hashed."""
    if not isinstance(value, (str, bytes)):
        raise PickleError("refused: a dictionary with a key that is not text")
    return value


def _finished(value: Any) -> Any:
    """What goes into a container: an array as the array itself."""
    if isinstance(value, _Array):
        if value.value is None:
            raise PickleError("not a readable pickle (an array without content)")
        return value.value
    if isinstance(value, (_DType, _Global, _Mark)):
        raise PickleError("refused: it stores something that is no number, text, container or array")
    return value


def as_text(value: str | bytes) -> str:
    """Names are bytes or text, by the Python that wrote them."""
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else value

"""Ctrl-C and SIGTERM: the first ends a command in good order, a second Ctrl-C at once, and so does a later SIGTERM."""

import contextlib
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

from cifar100cli.errors import Terminated

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE = 3.0  # seconds in which a launcher passes on what its group of processes has heard already

_at_once = False
_held_back = 0
_pending: KeyboardInterrupt | None = None


@contextlib.contextmanager
def orderly(say: Callable[[str], None], *, grace: float = 0.0) -> Iterator[None]:
    """Within, the first signal raises KeyboardInterrupt or `Terminated`; one that comes `grace` seconds later leaves.

    A SIGTERM leaves after `GRACE` at the earliest: nobody types it twice, and `timeout`, `uv run` and srun send it to
    the whole group and pass it on, too.

    Python runs a signal's handler between two instructions of the main thread, and so never while that is within a
    long call of a library. The bytes that Python writes to a pipe at once, signal by signal, are therefore read by a
    thread, which leaves with `say`, a line for the user, and the exit code.
    """
    stopped = False

    def stop(number: int, frame: FrameType | None) -> None:
        global _pending
        nonlocal stopped
        if _at_once:
            _leave(number, say, "interrupted")
        if not stopped:  # else whatever is being put in order is not disturbed; the thread decides
            stopped = True
            told = Terminated("terminated") if number == signal.SIGTERM else KeyboardInterrupt()
            if not _held_back:
                raise told
            _pending = told

    def again(unraisable: Any) -> None:
        """Python drops what is raised while an object is being finalised: send the signal again, in a moment."""
        nonlocal stopped
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            hook(unraisable)
            return
        stopped = False
        heard.forgive()
        number = signal.SIGTERM if issubclass(unraisable.exc_type, Terminated) else signal.SIGINT
        # On Windows `os.kill` ends the process; elsewhere it gets through to a main thread that waits.
        send = signal.raise_signal if sys.platform == "win32" else functools.partial(os.kill, os.getpid())
        threading.Timer(0.01, send, (number,)).start()

    heard = _Listener(say, grace)
    hook, sys.unraisablehook = sys.unraisablehook, again
    before = [signal.signal(number, stop) for number in SIGNALS]
    try:
        yield
    finally:
        for number, handler in zip(SIGNALS, before, strict=True):
            if signal.getsignal(number) is stop:
                signal.signal(number, handler)
        sys.unraisablehook = hook
        heard.close()


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Within, the first signal leaves too: an exception in the middle of an import could come out as anything."""
    global _at_once
    _at_once = True
    try:
        yield
    finally:
        _at_once = False


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Within, the first signal waits: safetensors, say, takes an exception in the middle of it for a broken file.

    Signals are raised in the main thread alone, so that this does nothing in another.
    """
    global _held_back, _pending
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _held_back += 1
    try:
        yield
    finally:
        _held_back -= 1
        if not _held_back and _pending is not None:
            told, _pending = _pending, None
            raise told


class _Listener:
    """A thread that hears of signals when they come, and ends the process at the second."""

    def __init__(self, say: Callable[[str], None], grace: float) -> None:
        self._say, self._grace = say, grace
        self._forgiven = 0
        self._reading, self._writing = os.pipe()
        if os.name != "nt":  # where `set_wakeup_fd` takes any, and Python 3.11 knows no other
            os.set_blocking(self._writing, False)
        self._before = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def _listen(self) -> None:
        first = None
        while numbers := os.read(self._reading, 64):
            for number in numbers:
                if number not in SIGNALS:
                    continue
                if self._forgiven:
                    self._forgiven -= 1
                elif first is None:
                    first = time.monotonic()
                elif time.monotonic() - first >= (GRACE if number == signal.SIGTERM else self._grace):
                    _leave(number, self._say, "interrupted again, and left at once; what was saved is kept")
        os.close(self._reading)

    def forgive(self) -> None:
        """The next signal is one of our own."""
        self._forgiven += 1

    def close(self) -> None:
        signal.set_wakeup_fd(self._before)
        os.close(self._writing)


def _leave(number: int, say: Callable[[str], None], text: str) -> NoReturn:
    say(text)
    os._exit(128 + number)

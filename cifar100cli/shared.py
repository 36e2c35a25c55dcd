"""What is the whole process's, changed for a while by whichever of its threads needs it."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack


class Shared:
    """A context of the process: of several threads, the first to enter opens it, and the last to leave closes it."""

    def __init__(self, opened: Callable[[], AbstractContextManager[object]]) -> None:
        self._opened, self._stack = opened, ExitStack()
        self._lock, self._within = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._within:
                self._stack.enter_context(self._opened())
            self._within += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._within -= 1
            if not self._within:
                self._stack.close()

"""The mistakes and mishaps that a user is told about in one line, each with its exit code."""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def nearest(name: str, known: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The known name that is nearest to one that does not exist, if any is near."""
    names = {one.lower(): one for one in known}
    near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=cutoff)
    return names[near[0]] if near else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about a name that does not exist."""
    near = nearest(name, known)
    return f"; did you mean {near}?" if near is not None else ""


class CifarError(ValueError):
    """Something that the user can understand and act on; shown as one line, never as a traceback."""

    exit_code = 1
    run_dir: Path | None = None
    """The run that it has ended, if one had begun."""


class UsageError(CifarError):
    """An unknown or impossible flag, preset, key or value; raised before anything is written."""

    exit_code = 2


class DataError(CifarError):
    """A data set, checkpoint or run folder that is missing, corrupt, or not what it should be."""

    exit_code = 3


class FolderError(CifarError):
    """A folder cannot be written to, or another process has it: with several ranks, the same for all of them."""


class NotWrittenError(CifarError):
    """What was measured could not be written to where it was asked for; `result` has the figures."""

    def __init__(self, text: str, result: dict[str, Any]) -> None:
        super().__init__(text)
        self.result = result

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.result)


class DivergedError(CifarError):
    """The loss stopped being finite."""

    exit_code = 4


class ToleranceError(CifarError):
    """`report --check` found a run outside its tolerance."""

    exit_code = 5


class ChangedWeights(UserWarning):
    """A model's weights are not those that training wrote; the command line shows it as a line."""


def exit_code_of(stop: KeyboardInterrupt) -> int:
    """128 and the signal's number, as shells have it; a `KeyboardInterrupt` that says nothing is Ctrl-C's."""
    return int(getattr(stop, "exit_code", 130))


class RunInterrupted(KeyboardInterrupt):
    """Training was stopped by a signal; what was finished is saved. Without a folder the run had not begun."""

    def __init__(self, run_dir: Path | None, finished: int, epochs: int, cause: KeyboardInterrupt) -> None:
        text = "stopped before the run began"
        if run_dir is not None:
            text = f"stopped after {finished} of {epochs} epochs; resume({str(run_dir)!r}) goes on"
        super().__init__(text)
        self.run_dir, self.finished, self.epochs, self._cause = run_dir, finished, epochs, cause
        self.exit_code = exit_code_of(cause)

    def __reduce__(self) -> tuple[Any, ...]:  # from one process to another
        return type(self), (self.run_dir, self.finished, self.epochs, self._cause)


class DownloadInterrupted(KeyboardInterrupt):
    """A download was stopped by a signal; says what is kept, and how to go on."""

    def __init__(self, text: str, cause: KeyboardInterrupt) -> None:
        super().__init__(text)
        self._cause = cause
        self.exit_code = exit_code_of(cause)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self._cause)


class Terminated(KeyboardInterrupt):
    """SIGTERM, treated as Ctrl-C is."""

    exit_code = 143

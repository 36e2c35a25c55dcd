"""Figures, counts, times and paths as people read them."""

import shlex
import sys
from pathlib import Path

PROTOCOLS = {"best_test": "best on test", "best_val": "held-out", "last": "last"}  # how a figure was selected
SPLIT_OF = {"best_test": "test", "best_val": "val", "last": None}  # what `train.select` chooses the epoch on


def loss(value: float) -> str:
    """A loss with four digits behind the point, or with four in all where it has grown beyond reading."""
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.3e}"


def percent(fraction: float | None, digits: int = 2) -> str:
    """0.4426 as 44.26%."""
    return "-" if fraction is None else f"{100 * fraction:.{digits}f}%"


def points(difference: float | None) -> str:
    """0.0123, a difference of accuracies, as +1.23; +0.00 where it rounds to nothing."""
    return "-" if difference is None else f"{100 * difference:+z.2f}"


def spread(deviation: float | None) -> str:
    """What stands behind a figure in per cent, or in points; nothing where no deviation is known."""
    return "" if deviation is None else f" ±{100 * deviation:.2f}"


def expected(top1: float, runs: int | None, deviation: float | None = None) -> str:
    """What a preset of ours has reached, or what it is meant to reach where nobody has run it."""
    return f"{percent(top1)}{spread(deviation)} ({several(runs, 'run') if runs else 'a goal: not run yet'})"


def argument(path: str | Path) -> str:
    """A path as it can be given to a command, whatever is in it, and were it taken for an option."""
    text = str(path)
    text = f"./{text}" if text.startswith("-") else text
    if sys.platform != "win32":
        return shlex.quote(text)
    import subprocess

    return subprocess.list2cmdline([text])  # cmd.exe hands on single quotes as they are


def several(number: int, noun: str) -> str:
    """1 epoch, 2 epochs."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def duration(seconds: float) -> str:
    """42 s, 3:05, 2:03:05."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"

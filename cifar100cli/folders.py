"""Folders: what the user calls them, the variables that name them, and where they are if nobody says."""

import os
from dataclasses import dataclass
from pathlib import Path

from cifar100cli.errors import FolderError, UsageError

DATA_DIR, RUNS_DIR, CACHE_DIR = "CIFAR100_DATA_DIR", "CIFAR100_RUNS_DIR", "CIFAR100_CACHE_DIR"
DEFAULT_RUNS = "runs"  # in the folder that a command is called in


@dataclass(frozen=True)
class Where:
    """The folders and the device of a command: where data sets and runs are, and what is computed once is kept."""

    data_dir: Path
    runs_dir: Path
    cache_dir: Path
    device: str


def expand(path: Path, called: str = "") -> Path:
    """`~` as the user's home. Raises `UsageError`, with the path's name or what it is `called`, if there is none."""
    try:
        return path.expanduser()
    except RuntimeError:
        raise UsageError(f"{called or path}: there is no such user's home") from None


def named_by(variable: str) -> Path | None:
    """The folder that an environment variable names, if it is set to anything."""
    named = os.environ.get(variable)
    return expand(Path(named)) if named else None


def user_cache() -> Path:
    """Where data sets, and what is computed from them, are kept if nobody names a place.

    Raises `FolderError` for a user without a home, as in a container under any number.
    """
    from platformdirs import user_cache_path  # a moment that commands which read no data need not wait

    try:
        return user_cache_path("cifar100", appauthor=False)
    except RuntimeError:
        raise FolderError(f"no home folder is known here: set HOME, or {DATA_DIR} and {CACHE_DIR}") from None


def runs_dir() -> Path:
    """Where runs go, and are looked for, if no flag says otherwise."""
    return named_by(RUNS_DIR) or Path(DEFAULT_RUNS)


def cache_dir() -> Path:
    """Where a teacher's logits and a frozen network's features are kept."""
    return named_by(CACHE_DIR) or user_cache() / "computed"

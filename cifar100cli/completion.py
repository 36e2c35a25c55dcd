"""What a shell offers after Tab: presets, runs, keys and words. Nothing slow is imported, and nothing goes wrong aloud.

Typer leaves out what does not begin as the user's word does; where nothing is left, bash and zsh offer files.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

Complete = Callable[[], Sequence[str]]


def words(*known: str) -> Complete:
    """These words."""
    return lambda: known


def values(key: str) -> Complete:
    """What a preset's key may be, where these are a few words."""

    def complete() -> Sequence[str]:
        from cifar100cli.keys import choices

        return choices(key)

    return complete


def presets() -> Sequence[str]:
    """The shipped presets."""
    from cifar100cli.config import preset_names

    return preset_names()


def settings() -> Sequence[str]:
    """The keys of `--set`."""
    from cifar100cli.keys import settable

    return [f"{key}=" for key in settable()]


def trained() -> Sequence[str]:
    """The runs that have a model, the latest first."""
    from cifar100cli.runs import MODEL

    return [str(run) for run in _runs() if (run / MODEL).is_file()]


def unfinished() -> Sequence[str]:
    """`last`, and the runs that can be gone on with."""
    from cifar100cli.runs import CONFIG, RESULT

    begun = [run for run in _runs() if (run / CONFIG).is_file() and not (run / RESULT).is_file()]
    return ["last", *map(str, begun)]


def starts() -> Sequence[str]:
    """What `--init` takes."""
    return ["imagenet", "none", *trained()]


def _runs() -> list[Path]:
    """Those whose names mean nothing to a shell: bash puts any other on the line as it is, and zsh would run it."""
    from cifar100cli import folders
    from cifar100cli.runs import find_runs

    word = re.compile(r"[\w./:@%+=,\u0080-\U0010ffff-]+")
    runs = [run for run in find_runs(folders.runs_dir()) if word.fullmatch(run.as_posix()) and str(run).isprintable()]
    return sorted(runs, key=lambda run: run.name, reverse=True)  # a name begins with the time

"""Files that nobody vouches for, read within bounds: no pipe holds a reader up, and no file fills the memory."""

import json
import os
import stat
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from cifar100cli.errors import CifarError, DataError

DEEPEST_JSON = 20  # containers within containers
DEEPEST_FOLDER = 32  # folders within folders

Kind = Literal["file", "folder", "other"]


def one_line(text: object, most: int = 120) -> str:
    """The beginning of a text of any length, without line breaks, for a message."""
    return " ".join(str(text).split())[:most]


def printable(text: str) -> str:
    """Text from outside, with whatever could steer a terminal written out.

    Spaces of all scripts stay, and so do the joiners of Persian, Indic scripts and emoji: names of folders have them.
    """
    return "".join(c if _is_harmless(c) else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def _is_harmless(character: str) -> bool:
    return character.isprintable() or unicodedata.category(character) == "Zs" or character in "\u200c\u200d"


def not_text(path: Path) -> str | None:
    """The first part of a path that is not UTF-8, if any: safetensors opens no such file."""
    return next((printable(part) for part in path.parts if part.encode("utf-8", "ignore") != os.fsencode(part)), None)


def read_file(path: Path, most: int) -> bytes:
    """The content of a plain file of at most `most` bytes.

    Raises `FileNotFoundError` where nothing is, and `DataError` for a folder, a pipe, a socket or a device, for a
    larger file, and for one that cannot be read.
    """
    try:
        # Without waiting: whoever opens a pipe that nobody writes to would never come back.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise DataError(f"{path}: not a plain file")
            with open(handle, "rb", closefd=False) as file:
                content = file.read(min(status.st_size, most) + 1)
        finally:
            os.close(handle)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    if len(content) > most:
        raise DataError(f"{path}: larger than {most // 1024:,} KiB")
    return content


def parse_json(text: str | bytes) -> Any:
    """JSON that is not nested deeper than whoever walks over it can go. Raises `ValueError`."""
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level = [content]
    for _ in range(DEEPEST_JSON):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return content
    raise ValueError("nested too deeply")


def walk(
    root: Path, *, hidden: bool, links: bool = False, refused: Callable[[OSError], None] | None = None
) -> Iterator[tuple[Path, list[str]]]:
    """Each folder at and below `root` with the names of its files, in order; links are entered if `links`.

    No folder is entered twice. One that may not be read is told to `refused`, and left out.

    What lies deeper than DEEPEST_FOLDER is not looked at: `os.walk` calls itself for each level.
    """
    known = set()
    for name, subfolders, files in os.walk(root, onerror=refused, followlinks=links):
        folder = Path(name)
        if links:
            identity = os.path.realpath(folder)
            if identity in known:
                subfolders.clear()
                continue
            known.add(identity)
        deep = len(folder.parts) - len(root.parts) >= DEEPEST_FOLDER
        subfolders[:] = [] if deep else sorted(name for name in subfolders if hidden or not name.startswith("."))
        yield folder, sorted(files)


def kind_of(path: Path, called: str = "", error: type[CifarError] = DataError) -> Kind | None:
    """What is at `path`, or None where nothing is; a link counts as what it leads to.

    Raises `error`, with the path's name or what it is `called`, where one is kept from looking: is_file(), is_dir()
    and exists() hide that from Python 3.14 on.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as problem:  # the latter of a name that holds a null byte
        raise error(f"{called or path}: {getattr(problem, 'strerror', None) or problem}") from None
    return "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "other"

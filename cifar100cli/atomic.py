"""Files that are written whole or not at all."""

import contextlib
import errno
import functools
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PATIENCE = 3.0  # seconds for whoever has a file open that is to be replaced


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it becomes `path` in one step, else it goes.

    Whoever looks sees the old file or the whole new one, also after a crash: the bytes are on the disk
    before the name is. A link is followed, and a device such as /dev/stdout is written to as it is; where that leads to
    a file, behind what is in it, for others write there too.
    """
    stream = _stream(path)
    if stream is not None and path.is_file():
        with tempfile.TemporaryDirectory() as folder:
            written = Path(folder) / path.name
            yield written
            sys.stdout.flush()
            with written.open("rb") as source, open(stream, "wb", closefd=False) as target:
                shutil.copyfileobj(source, target)
        return
    named, path = path, path.resolve()
    if named.exists() and not named.is_file() and not named.is_dir():  # asked before: what a pipe leads to has no name
        try:
            yield named
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(named)) from None
        return
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(named)) from None
    temporary = Path(name)
    try:
        os.close(handle)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        with contextlib.suppress(PermissionError):  # shares of other systems keep modes of their own
            temporary.chmod(_mode(path))  # mkstemp made it private
        move(temporary, path)
    except OSError as error:
        remove_quietly(temporary)
        if error.errno and (error.filename is None or str(error.filename) == name):
            raise OSError(error.errno, error.strerror, str(named)) from None
        raise
    except BaseException:
        remove_quietly(temporary)
        raise


def move(source: Path, target: Path) -> None:
    """Let the file `source` become `target`, in whose place it is then; a folder becomes one that is not there yet.

    Windows refuses while either, or anything in it, is open, as it is for a virus scanner's moment.
    """
    until = time.monotonic() + PATIENCE
    while True:
        try:
            source.replace(target)
            return
        except PermissionError:
            if sys.platform != "win32" or time.monotonic() >= until:
                raise
            time.sleep(0.05)


def is_permitted(path: Path) -> bool:
    """Whether one may write by `replacing`: a file takes its folder's permission, too, since it is made anew there."""
    folder = os.access(path.resolve().parent, os.W_OK | os.X_OK)
    if not path.exists():
        return folder
    as_it_is = not path.is_file() or _stream(path) is not None
    return os.access(path, os.W_OK) and (folder or as_it_is)


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, content: object) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def remove_quietly(path: Path) -> None:
    """Remove a file where that is possible; what went wrong before is the thing to tell."""
    with contextlib.suppress(OSError):
        path.unlink()


def _stream(path: Path) -> int | None:
    """This process's descriptor that a name such as /dev/stdout means."""
    standard = {"/dev/stdout": 1, "/dev/stderr": 2}
    absolute = str(path.absolute())  # not resolved: what it leads to has a name of its own
    numbered = re.fullmatch(r"/(?:dev|proc/self)/fd/(\d{1,6})", absolute)
    return int(numbered[1]) if numbered else standard.get(absolute)


def _mode(path: Path) -> int:
    """Who may read and write a file that is there, or else what is made anew."""
    try:
        return path.stat().st_mode & 0o777
    except FileNotFoundError:
        return 0o666 & ~_umask()


@functools.cache  # what looks at it sets it for a moment, which other threads must not meet
def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

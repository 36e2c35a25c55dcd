"""What people see: lines and tables. This file and `display` alone know about terminals.

Results go to stdout; progress, logs and errors go to stderr. Rich is imported when it is first needed,
because `--help` and a usage error have no use for it.
"""

import codecs
import contextlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from cifar100cli.bounded import printable

if TYPE_CHECKING:
    from rich.console import Console

QUIET, NORMAL, VERBOSE = -1, 0, 1
NARROWEST = 6  # letters of a column of words in a table

_verbosity = NORMAL
_muted = False


def set_verbosity(level: int) -> None:
    """QUIET shows results and errors only; VERBOSE tells what goes on."""
    global _verbosity
    _verbosity = QUIET if _muted else level


def mute() -> None:
    """Show nothing but errors, whatever the options say: another process is talking."""
    global _muted
    _muted = True
    sys.stdout = open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115, PTH123 - for as long as the process lives
    set_verbosity(QUIET)


def verbosity() -> int:
    """The current level."""
    return _verbosity


def on_terminal() -> bool:
    """Whether progress may move: stderr is a terminal that can.

    A cell of a notebook (`!cifar100 train`) is none, though it passes for one: cursors do not go up there, and every
    drawing would be two more lines. Its kernel calls it xterm-color, and wants colours by FORCE_COLOR.
    """
    return sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "xterm-color")


def on(stream: Any) -> "Console":
    """Rich on a stream. The cursor stays to be seen: a process that is stopped or killed could not bring it back."""
    from rich.console import Console

    # Outside a terminal lines are as long as they are: they are read by scripts and cut by nobody.
    width = None if stream.isatty() or "COLUMNS" in os.environ else 200
    screen = Console(file=stream, width=width, highlight=False, soft_wrap=not stream.isatty())
    screen.show_cursor = lambda show=True: False  # type: ignore[method-assign]
    return screen


def _styled(text: str, style: str, stream: Any) -> None:
    """One line, in colour where that is wanted."""
    if not (stream.isatty() or os.environ.get("FORCE_COLOR")) or os.environ.get("NO_COLOR"):
        print(text, file=stream, flush=True)
        return
    from rich.text import Text

    on(stream).print(Text(text, style=style), soft_wrap=True)


def use_safe_streams() -> None:
    """Make sure that a line about what goes on is never what fails.

    Streams may be closed, know only ASCII, or lead to a full disk or a terminal that is gone. What is written to
    stdout is the result, and that it was lost is an error.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8", errors="backslashreplace"))  # noqa: SIM115, PTH123 - for as long as the process lives
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if not isinstance(sys.stderr, _Forgiving):
        sys.stderr = _Forgiving(sys.stderr)


class _Forgiving:
    """A stream whose lines may be lost: a run of a night does not end because nobody hears of it any more."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._lost = stream, False

    def write(self, text: str) -> int:
        """Write, or lose, a text."""
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Let the stream hand on what it holds, or lose it."""
        self._try(self._stream.flush)

    def _try(self, method: Callable[..., object], *arguments: str) -> None:
        if self._lost:
            return
        try:
            method(*arguments)
        except (OSError, ValueError):  # the latter of a stream that was closed
            self._lost = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def result(text: str = "") -> None:
    """Lines of the result, on stdout."""
    print("\n".join(map(printable, text.split("\n"))), flush=True)


def result_json(content: object) -> None:
    """The one JSON document of a command, on stdout."""
    print(json_text(content), flush=True)


def takes_unicode() -> bool:
    """Whether stdout takes every letter as it is, and as files of ours have it: in UTF-8."""
    return codecs.lookup(getattr(sys.stdout, "encoding", None) or "utf-8").name == "utf-8"


def json_text(content: object) -> str:
    """JSON as stdout takes it: what its encoding lacks, or what could steer a terminal, is in JSON's own escapes."""
    text = json.dumps(content, indent=2, ensure_ascii=not takes_unicode(), allow_nan=False)
    lines = text.replace("\n", "")
    if not lines.isprintable() and printable(lines) != lines:
        text = json.dumps(content, indent=2, allow_nan=False).replace("\x7f", "\\u007f")
    return text


class _Captured(io.StringIO):
    """In the place of stdout: a text for a file, which is no terminal whatever the environment says."""


@contextlib.contextmanager
def captured() -> Iterator[io.StringIO]:
    """Keep what would go to stdout, as plain text."""
    with contextlib.redirect_stdout(_Captured()) as written:
        yield written


def log(text: str) -> None:
    """Lines about what goes on, on stderr."""
    if _verbosity > QUIET:
        print("\n".join(map(printable, text.split("\n"))), file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """What is not to be missed, on stderr, under `-q` too."""
    if not _muted:
        print(printable(text), file=sys.stderr, flush=True)


def error(text: str) -> None:
    """What went wrong, in one line, on stderr."""
    _styled(f"error: {printable(' '.join(map(str.strip, text.splitlines())))}", "bold red", sys.stderr)


def last_word(text: str) -> None:
    """A line on stderr, written past Python's streams, before a process leaves in the middle of whatever it does."""
    if not _muted:
        clear = "\r\x1b[0J" if on_terminal() else ""  # of progress that moves
        with contextlib.suppress(OSError):
            os.write(2, f"{clear}error: {text}\n".encode())


def detail(text: str) -> None:
    """A line for `-v`."""
    if _verbosity >= VERBOSE:
        _styled(text, "dim", sys.stderr)


@contextlib.contextmanager
def waiting(text: str) -> Iterator[None]:
    """A turning wheel while something of unknown length goes on; elsewhere nothing."""
    if not on_terminal() or _verbosity == QUIET:
        yield
        return
    with on(sys.stderr).status(text):
        yield


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
    """A table on stdout; `right` names the columns that are numbers. Outside a terminal it is as wide as it is."""
    rows = [[printable(cell) for cell in row] for row in rows]
    terminal = sys.stdout.isatty() or os.environ.get("FORCE_COLOR") or "COLUMNS" in os.environ
    if not terminal or isinstance(sys.stdout, _Captured):
        result(plain_table(title, columns, rows, right))
        return
    from rich import box
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    drawn = Table(
        title=Text(title, style="bold") if title else None,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
    )
    least = 2 * (len(columns) - 1)
    for index, (name, cells) in enumerate(zip(columns, zip(*rows, strict=True) if rows else columns, strict=True)):
        figures = index in right  # of which one that is broken in two is none
        longest = max(map(cell_len, (name, *cells)))
        narrowest = longest if figures else min(longest, NARROWEST)
        drawn.add_column(
            Text(name), justify="right" if figures else "left", overflow="fold", no_wrap=figures, min_width=narrowest
        )
        least += narrowest
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))
    screen = on(sys.stdout)
    screen.width = max(screen.width, least)  # a terminal breaks lines that are too long, and cuts no figure
    with screen.capture() as capture:
        screen.print(drawn)
    lines = [line.rstrip() for line in capture.get().rstrip().splitlines()]
    print("\n".join([*lines, ""]), flush=True)


def plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int]) -> str:
    """A table as text, as wide as it is."""
    widths = [max(map(_width, column)) for column in zip(columns, *rows, strict=True)]
    lines = [
        "  ".join(
            " " * (width - _width(cell)) + cell if index in right else cell + " " * (width - _width(cell))
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (columns, ["-" * width for width in widths], *rows)
    ]
    return "\n".join([*([title] if title else []), *(line.rstrip() for line in lines), ""])


def _width(text: str) -> int:
    """Columns that a text takes where letters have one width: two for a Japanese one, none for a combining mark."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)

"""What people see: lines, tables and progress. The only file that knows about terminals.

Results go to stdout; progress, logs and errors go to stderr. Rich is imported when it is first needed,
because `--help` and a usage error have no use for it.
"""

import codecs
import contextlib
import io
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from cifar100cli.bounded import printable
from cifar100cli.watcher import StageRow, Watcher

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.progress import Progress

    from cifar100cli.schema import Config

QUIET, NORMAL, VERBOSE = -1, 0, 1
NARROWEST = 6  # letters of a column of words in a table
PROTOCOLS = {"best_test": "best on test", "best_val": "held-out", "last": "last"}  # how a figure was selected

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
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 - for as long as the process lives
    set_verbosity(QUIET)


def verbosity() -> int:
    """The current level."""
    return _verbosity


def on_terminal() -> bool:
    """Whether progress may move: stderr is a terminal that can."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def _console(stream: Any) -> "Console":
    from rich.console import Console

    # Outside a terminal lines are as long as they are: they are read by scripts and cut by nobody.
    width = None if stream.isatty() or "COLUMNS" in os.environ else 200
    return Console(file=stream, width=width, highlight=False, soft_wrap=not stream.isatty())


def _styled(text: str, style: str, stream: Any) -> None:
    """One line, in colour where that is wanted."""
    if not (stream.isatty() or os.environ.get("FORCE_COLOR")) or os.environ.get("NO_COLOR"):
        print(text, file=stream, flush=True)
        return
    from rich.text import Text

    _console(stream).print(Text(text, style=style), soft_wrap=True)


def use_safe_streams() -> None:
    """Make sure that a line about what goes on is never what fails.

    Streams may be closed, know only ASCII, or lead to a full disk or a terminal that is gone. What is written to
    stdout is the result, and that it was lost is an error.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, PTH123 - for as long as the process lives
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


def json_text(content: object) -> str:
    """JSON as stdout takes it: what its encoding lacks, or what could steer a terminal, is in JSON's own escapes."""
    encoding = codecs.lookup(getattr(sys.stdout, "encoding", None) or "utf-8").name
    text = json.dumps(content, indent=2, ensure_ascii=encoding != "utf-8", allow_nan=False)
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
        cursor = "\r\x1b[?25h\x1b[0J" if on_terminal() else ""  # progress may have hidden it
        with contextlib.suppress(OSError):
            os.write(2, f"{cursor}error: {text}\n".encode())


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
    with _console(sys.stderr).status(text):
        yield


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
    """A table on stdout; `right` names the columns that are numbers. Outside a terminal it is as wide as it is."""
    rows = [[printable(cell) for cell in row] for row in rows]
    terminal = sys.stdout.isatty() or os.environ.get("FORCE_COLOR") or "COLUMNS" in os.environ
    if not terminal or isinstance(sys.stdout, _Captured):
        result(_plain_table(title, columns, rows, right))
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
    screen = _console(sys.stdout)
    screen.width = max(screen.width, least)  # a terminal breaks lines that are too long, and cuts no figure
    with screen.capture() as capture:
        screen.print(drawn)
    lines = [line.rstrip() for line in capture.get().rstrip().splitlines()]
    print("\n".join([*lines, ""]), flush=True)


def _plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int]) -> str:
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    lines = [
        "  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in (columns, ["-" * width for width in widths], *rows)
    ]
    return "\n".join([*([title] if title else []), *(line.rstrip() for line in lines), ""])


def loss(value: float) -> str:
    """A loss with four digits behind the point, or with four in all where it has grown beyond reading."""
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.3e}"


def percent(fraction: float | None, digits: int = 2) -> str:
    """0.4426 as 44.26%."""
    return "-" if fraction is None else f"{100 * fraction:.{digits}f}%"


def expected(top1: float, runs: int | None, deviation: float | None = None) -> str:
    """What a preset of ours has reached, or what it is meant to reach where nobody has run it."""
    spread = f" ±{100 * deviation:.2f}" if deviation is not None else ""
    return f"{percent(top1)}{spread} ({several(runs, 'run') if runs else 'a goal: not run yet'})"


def argument(path: str | Path) -> str:
    """A path as it can be given to a command, whatever is in it, and were it taken for an option."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


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


# ------------------------------------------------------------------------------------------------ transfers


@contextlib.contextmanager
def transfer(title: str) -> Iterator[Callable[[int, int | None], None]]:
    """Progress of bytes: a bar with rate and time left, or a line for every tenth elsewhere."""
    if _verbosity == QUIET:
        yield lambda done, total: None
    elif on_terminal():
        from rich import progress

        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
            progress.TimeRemainingColumn(),
        )
        with progress.Progress(*columns, console=_console(sys.stderr), transient=True) as bar:
            task = bar.add_task(title, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
    else:
        yield _tenths(title)


def _tenths(title: str) -> Callable[[int, int | None], None]:
    """At most a line for every tenth and every two seconds, counted afresh when the bytes start again."""
    last_done, shown, at_start = 0, 0, 0
    started = last_line = time.monotonic()

    def show(done: int, total: int | None) -> None:
        nonlocal last_done, shown, at_start, started, last_line
        now = time.monotonic()
        if done < last_done or not last_done:
            shown, at_start, started, last_line = 0, done, now, now
        last_done = done
        tenth = 10 * done // total if total else done // 2**24
        if tenth > shown and now - last_line >= 2:
            shown, last_line = tenth, now
            of_total = f" of {total / 1e6:.1f}" if total else ""
            log(f"{title}: {done / 1e6:.1f}{of_total} MB, {(done - at_start) / (now - started) / 1e6:.1f} MB/s")

    return show


@contextlib.contextmanager
def counting(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Progress of a known number of things: a bar with time left, or a line for every tenth elsewhere.

    What is given takes how many were done since the last call.
    """
    if _verbosity > QUIET and on_terminal():
        from rich import progress

        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(),
        )
        with progress.Progress(*columns, console=_console(sys.stderr), transient=True) as bar:
            task = bar.add_task(title, total=total)
            yield lambda count: bar.advance(task, count)
        return
    done, shown, last_line = 0, 0, time.monotonic()

    def advance(count: int) -> None:
        nonlocal done, shown, last_line
        done += count
        if 10 * done // total > shown and time.monotonic() - last_line >= 2:
            shown, last_line = 10 * done // total, time.monotonic()
            log(f"{title}: {done:,} of {total:,}")

    yield advance


# ------------------------------------------------------------------------------------------------- training


_SPLITS = {"val": "held-out", "test": "test"}


class TrainingDisplay(Watcher):
    """Shows a run: two moving lines on a terminal, and everywhere one line an epoch."""

    def __init__(self, preset: str) -> None:
        self._preset = preset
        self._live: Live | None = None
        self._bar: Progress | None = None
        self._select = "last"
        self._epochs = self._first = self._epoch = self._steps = 0
        self._work: list[float] = []  # what each epoch of this process costs
        self._started = self._epoch_started = self._looked = 0.0
        self._measured = ""  # what the last epoch's measurement and the best one were

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Training is over, one way or another; the terminal is given back."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, text: str) -> None:
        """A line about what goes on."""
        log(text)

    def progress(self, title: str, total: int) -> contextlib.AbstractContextManager[Callable[[int], None]]:
        """Something of `total` steps begins."""
        return counting(title, total)

    def stages(self, rows: Sequence[StageRow]) -> None:
        """What of the network learns."""
        cells = [
            (
                row.name,
                f"{row.parameters:,}",
                "frozen" if row.rate is None else "learns",
                "-" if row.rate is None else f"{row.rate:g}",
                row.norm,
            )
            for row in rows
        ]
        log(_plain_table("", ("stage", "parameters", "weights", "rate", "batch norm"), cells, right=(1, 3)).rstrip())

    def begin(self, config: "Config", run: Path, first_epoch: int, steps_per_epoch: int, place: str) -> None:
        """Training starts in the run's folder, or goes on, with `first_epoch`."""
        self._select, self._epochs = config.train.select, config.train.epochs
        self._work = [config.work_in(epoch) for epoch in range(first_epoch, self._epochs + 1)]
        self._first = self._epoch = first_epoch
        self._steps = steps_per_epoch
        self._started = self._epoch_started = time.monotonic()
        weights = f", weights of {config.model.weights or 'timm'}" if config.model.pretrained else ""
        log(
            f"{self._preset}: {config.model.backbone}{weights} on {config.data.dataset} "
            f"at {config.data.image_size} pixels, {several(self._epochs, 'epoch')}, seed {config.seed}, on {place}"
        )
        if config.data.dataset == "synthetic":
            log("the data are synthetic: drawn shapes, whose figures say nothing about CIFAR-100")
        if first_epoch > self._epochs:
            log("every epoch is done: what is left is to measure the result")
        elif first_epoch > 1:
            log(f"{first_epoch - 1} of {self._epochs} epochs are done: going on with epoch {first_epoch}")
        if on_terminal() and _verbosity > QUIET and first_epoch <= self._epochs:
            self._begin_to_move()

    def _begin_to_move(self) -> None:
        from rich import progress
        from rich.live import Live

        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=None),
            progress.MofNCompleteColumn(),
            progress.TextColumn("steps{task.fields[left]}"),
            expand=True,
        )
        self._bar.add_task("", total=self._steps, left="")
        self._live = Live(console=_console(sys.stderr), transient=True, auto_refresh=False, redirect_stdout=False)
        self._live.start()
        self._show(0, "")

    def _show(self, taken: int, figures: str, left: str = "") -> None:
        """Draw both lines: how far the epoch is and how long the run will take, and the epoch's figures so far."""
        if self._live is None or self._bar is None:
            return
        from rich.console import Group
        from rich.text import Text

        what = f"epoch {self._epoch}/{self._epochs}" if self._epoch <= self._epochs else "the result"
        if self._epoch > self._epochs:
            taken = self._steps
        measuring = "measuring " if taken == self._steps else ""
        self._bar.update(self._bar.task_ids[0], completed=taken, description=measuring + what, left=left)
        self._live.update(Group(self._bar, Text(figures, no_wrap=True, overflow="ellipsis")), refresh=True)

    def step(self, taken: int, glance: Callable[[int], Any]) -> None:
        """A step was issued; now and then a look at how the epoch goes."""
        now = time.monotonic()
        if self._live is None or (now - self._looked < 0.2 and taken < self._steps):
            return
        self._looked = now
        known = glance(taken)
        parts = []
        if known is not None:
            parts += [f"loss {loss(known.loss)}", f"train {percent(known.top1)}"]
        parts += [self._measured] if self._measured else []
        if known is not None:
            parts.append(f"{known.images / (now - self._epoch_started):,.0f} images/s")
        self._show(taken, "  ".join(parts), f"  {self._left(self._epoch, taken / self._steps)} left")

    def _left(self, epoch: int, part: float) -> str:
        """How long the epochs still take, after this part of one, if they go on as they went."""
        before = epoch - self._first
        done = sum(self._work[:before]) + self._work[before] * part
        return duration((time.monotonic() - self._started) / done * (sum(self._work) - done))

    def epoch(self, row: Mapping[str, Any], state: Any) -> None:
        """An epoch is finished and measured."""
        if _verbosity == QUIET:
            return
        line = self._line(row, state)
        if _verbosity >= VERBOSE:
            line += f"  lr {row['lr']:.2g}  {row['seconds']:.1f} s"
        self._epoch, self._epoch_started = row["epoch"] + 1, time.monotonic()
        split = next((split for split in ("val", "test") if row.get(f"{split}_top1") is not None), None)
        self._measured = f"{_SPLITS[split]} {percent(row[f'{split}_top1'])}" if split else ""
        if self._select != "last":
            self._measured += f"  best {percent(state.best_top1)} @{state.best_epoch}"
        if self._live is None:
            log(line)
            return
        self._live.console.print(line, markup=False, soft_wrap=True)
        self._show(0, self._measured)

    def _line(self, row: Mapping[str, Any], state: Any) -> str:
        width = len(str(self._epochs))
        parts = [
            f"epoch {row['epoch']:{width}}/{self._epochs}",
            f"loss {loss(row['train_loss'])} train {percent(row['train_top1'])}",
        ]
        for split, name in _SPLITS.items():
            if row.get(f"{split}_top1") is not None:
                top5 = "" if self._live else f" top-5 {percent(row[f'{split}_top5'])}"
                parts.append(f"{name} {percent(row[f'{split}_top1'])}{top5}")
        if self._select != "last":
            parts.append(f"best {percent(state.best_top1)} @{state.best_epoch}")
        if self._live is not None:  # what moves below says the rest, and this has to fit 80 columns
            return "  ".join(parts)
        parts.append(f"{row['images_per_second']:,.0f} images/s")
        if row["epoch"] < self._epochs:
            parts.append(f"{self._left(row['epoch'], 1)} left")
        return "  ".join(parts)

"""Progress: of bytes, of countable things, and of a run. Moving lines on a terminal, elsewhere one now and then."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from cifar100cli import console
from cifar100cli.watcher import StageRow, Watcher
from cifar100cli.wording import SPLIT_OF, duration, loss, percent, several

if TYPE_CHECKING:
    from rich.live import Live
    from rich.progress import Progress

    from cifar100cli.schema import Config
    from cifar100cli.watcher import EpochProgress


@contextlib.contextmanager
def transfer(title: str) -> Iterator[Callable[[int, int | None], None]]:
    """Progress of bytes: a bar with rate and time left, or a line for every tenth elsewhere."""
    if console.verbosity() == console.QUIET:
        yield lambda done, total: None
    elif console.on_terminal():
        from rich import progress

        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
            progress.TimeRemainingColumn(),
        )
        with progress.Progress(*columns, console=console.on(sys.stderr), transient=True) as bar:
            task = bar.add_task(title, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
    else:
        yield _tenths(title)


def _tenths(title: str) -> Callable[[int, int | None], None]:
    """A line for every tenth, at most one in two seconds and at least one in thirty while bytes come.

    It is counted afresh when the bytes start again.
    """
    last_done, shown, at_start = 0, 0, 0
    started = last_line = time.monotonic()

    def show(done: int, total: int | None) -> None:
        nonlocal last_done, shown, at_start, started, last_line
        now = time.monotonic()
        if done < last_done or not last_done:
            shown, at_start, started, last_line = 0, done, now, now
        last_done = done
        tenth = 10 * done // total if total else done // 2**24
        if now - last_line >= (2 if tenth > shown else 30):
            shown, last_line = tenth, now
            of_total = f" of {total / 1e6:.1f}" if total else ""
            console.log(f"{title}: {done / 1e6:.1f}{of_total} MB, {(done - at_start) / (now - started) / 1e6:.1f} MB/s")

    return show


@contextlib.contextmanager
def counting(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Progress of a known number of things: a bar with time left, or a line for every tenth elsewhere.

    What is given takes how many were done since the last call.
    """
    if console.verbosity() > console.QUIET and console.on_terminal():
        from rich import progress

        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(),
        )
        with progress.Progress(*columns, console=console.on(sys.stderr), transient=True) as bar:
            task = bar.add_task(title, total=total)
            yield lambda count: bar.advance(task, count)
        return
    done, shown, last_line = 0, 0, time.monotonic()

    def advance(count: int) -> None:
        nonlocal done, shown, last_line
        done += count
        if 10 * done // total > shown and time.monotonic() - last_line >= 2:
            shown, last_line = 10 * done // total, time.monotonic()
            console.log(f"{title}: {done:,} of {total:,}")

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
        console.log(text)

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
        console.log(
            console.plain_table(
                "", ("stage", "parameters", "weights", "rate", "batch norm"), cells, right=(1, 3)
            ).rstrip()
        )

    def begin(self, config: "Config", run: Path, first_epoch: int, steps_per_epoch: int, place: str) -> None:
        """Training starts in the run's folder, or goes on, with `first_epoch`."""
        self._select, self._epochs = config.train.select, config.train.epochs
        self._work = [config.work_in(epoch) for epoch in range(first_epoch, self._epochs + 1)]
        self._first = self._epoch = first_epoch
        self._steps = steps_per_epoch
        self._started = self._epoch_started = time.monotonic()
        weights = f", weights of {config.model.weights or 'timm'}" if config.model.pretrained else ""
        console.log(
            f"{self._preset}: {config.model.backbone}{weights} on {config.data.dataset} "
            f"at {config.data.image_size} pixels, {several(self._epochs, 'epoch')}, seed {config.seed}, on {place}"
        )
        if config.data.dataset == "synthetic":
            console.log("the data are synthetic: drawn shapes, whose figures say nothing about CIFAR-100")
        if first_epoch > self._epochs:
            console.log("every epoch is done: what is left is to measure the result")
        elif first_epoch > 1:
            console.log(f"{first_epoch - 1} of {self._epochs} epochs are done: going on with epoch {first_epoch}")
        if console.on_terminal() and console.verbosity() > console.QUIET and first_epoch <= self._epochs:
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
        self._live = Live(console=console.on(sys.stderr), transient=True, auto_refresh=False, redirect_stdout=False)
        self._live.start()
        self._show(0, "")

    def _show(self, done: int, figures: str, left: str = "") -> None:
        """Draw both lines: how far the epoch is and how long the run will take, and the epoch's figures so far."""
        if self._live is None or self._bar is None:
            return
        from rich.console import Group
        from rich.text import Text

        what = f"epoch {self._epoch}/{self._epochs}" if self._epoch <= self._epochs else "the result"
        measuring = "measuring " if done == self._steps else ""
        self._bar.update(self._bar.task_ids[0], completed=done, description=measuring + what, left=left)
        self._live.update(Group(self._bar, Text(figures, no_wrap=True, overflow="ellipsis")), refresh=True)

    def step(self, taken: int, glance: Callable[[], Any]) -> None:
        """A step was issued; now and then a look at how the epoch goes."""
        if self._live is not None and time.monotonic() - self._looked >= 0.2:
            self._look(taken, glance())

    def _look(self, taken: int, known: "EpochProgress | None") -> None:
        """Draw what is known of an epoch of which `taken` steps were issued; a GPU is behind that."""
        self._looked = time.monotonic()
        done = taken if known is None else known.steps
        parts = [self._measured] if self._measured else []
        if known is not None and done:
            parts = [f"loss {loss(known.loss)}", f"train {percent(known.top1)}", *parts]
            seconds = max(known.at - self._epoch_started, 1e-3)
            parts.append(f"{known.images / seconds:,.0f} images/s")
        left = f"  {self._left(self._epoch, done / self._steps)} left" if done else ""
        self._show(done, "  ".join(parts), left)

    def measure(self, known: "EpochProgress") -> None:
        """All steps of the epoch are done."""
        if self._live is not None:
            self._look(self._steps, known)

    def _left(self, epoch: int, part: float) -> str:
        """How long the epochs still take, after this part of one, if they go on as they went."""
        before = epoch - self._first
        done = sum(self._work[:before]) + self._work[before] * part
        return duration((time.monotonic() - self._started) / done * (sum(self._work) - done))

    def epoch(self, row: Mapping[str, Any], state: Any) -> None:
        """An epoch is finished and measured."""
        if console.verbosity() == console.QUIET:
            return
        line = self._line(row, state)
        if console.verbosity() >= console.VERBOSE:
            line += f"  lr {row['lr']:.2g}  {row['seconds']:.1f} s"
        self._epoch, self._epoch_started = row["epoch"] + 1, time.monotonic()
        chosen_on = SPLIT_OF[self._select]  # beside the best of them stands an accuracy on the same images
        measured = [split for split in (chosen_on, "val", "test") if split and row.get(f"{split}_top1") is not None]
        split = measured[0] if measured else None
        self._measured = f"{_SPLITS[split]} {percent(row[f'{split}_top1'])}" if split else ""
        if self._select != "last":
            self._measured += f"  best {percent(state.best_top1)} @{state.best_epoch}"
        if self._live is None:
            console.log(line)
            return
        self._live.console.print(line, markup=False, soft_wrap=True)
        self._show(0 if self._epoch <= self._epochs else self._steps, self._measured)

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

"""Experiment trackers: a run's figures, written by TensorBoard's and Weights & Biases' own writers as well.

Importing this file imports neither torch nor a tracker, nor what reads presets, which `--help` has no use for; `check`
imports wandb, where it is asked for.
"""

import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from cifar100cli import extras
from cifar100cli.bounded import one_line
from cifar100cli.errors import UsageError, did_you_mean
from cifar100cli.watcher import EpochProgress, StageRow, TrainState, Watcher

if TYPE_CHECKING:
    from cifar100cli.schema import Config

_WANDB_FOLDER = re.compile(r"^(?:offline-)?run-(\d{8}_\d{6})-")  # wandb's own, and then the run's id
NOT_A_FIGURE = ("epoch",)


class Tracker(Protocol):
    """One library's writer."""

    def begin(self, config: "Config", run: Path, first_epoch: int) -> None:
        """A run begins, or goes on."""

    def epoch(self, row: Mapping[str, Any]) -> None:
        """A line of the run's metrics."""

    def finish(self, result: Mapping[str, Any]) -> None:
        """The run is complete."""

    def close(self) -> None:
        """Write out what there is. Comes after `finish`, or without it where the run was stopped."""


class TensorBoard:
    """Event files in the run's folder, under `tensorboard`."""

    def __init__(self) -> None:
        self._writer: Any = None
        self._excepthook = threading.excepthook

    def begin(self, config: "Config", run: Path, first_epoch: int) -> None:
        """Open the file; what an earlier process wrote of epochs that are run again is hidden."""
        from torch.utils.tensorboard import SummaryWriter

        from cifar100cli.runs import TENSORBOARD

        # Its thread's own last words of a full disk are a traceback; the next call raises the same.
        threading.excepthook = self._silent_of_disks
        self._writer = SummaryWriter(str(run / TENSORBOARD), purge_step=first_epoch)
        if first_epoch == 1:
            self._writer.add_text("config", f"```yaml\n{config.to_yaml()}```", 0)

    def epoch(self, row: Mapping[str, Any]) -> None:
        """A scalar for every figure; those of one kind in one chart."""
        for name, value in row.items():
            if value is not None and name not in NOT_A_FIGURE:
                split, _, kind = name.partition("_")
                tag = f"{kind}/{split}" if split in ("train", "val", "test") else name
                self._writer.add_scalar(tag, value, row["epoch"])
        self._writer.flush()

    def finish(self, result: Mapping[str, Any]) -> None:
        """The result's figures, at the epoch that was selected."""
        for name, value in result["test"].items():
            if value is not None:
                self._writer.add_scalar(f"result/test_{name}", value, result["best"]["epoch"])

    def close(self) -> None:
        """Close the file."""
        try:
            if self._writer is not None:
                self._writer.close()
        finally:
            threading.excepthook = self._excepthook

    def _silent_of_disks(self, what: threading.ExceptHookArgs) -> None:
        if not issubclass(what.exc_type, OSError):
            self._excepthook(what)


def drawn_id(run: Path) -> str | None:
    """The id of wandb's run whose files are in a run's folder: the latest one, if there are any."""
    from cifar100cli.runs import WANDB

    names = [path.name for path in (run / WANDB).glob("*run-*") if _WANDB_FOLDER.match(path.name)]
    return _WANDB_FOLDER.sub("", max(names, key=_WANDB_FOLDER.findall)) if names else None


class WeightsAndBiases:
    """A run of wandb, whose files are in the run's folder. wandb's own variables hold, as WANDB_MODE=offline does."""

    def __init__(self) -> None:
        self._run: Any = None
        self._complete = False

    def begin(self, config: "Config", run: Path, first_epoch: int) -> None:
        """Begin wandb's run under an id that it draws, or go on with the one whose files are in the folder."""
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "cifar100"),
            name=f"{run.parent.name}/{run.name}",
            id=drawn_id(run),
            dir=run,
            config=config.model_dump(mode="json"),
            resume="allow",
            settings=wandb.Settings(silent=True, console="off"),
        )

    def epoch(self, row: Mapping[str, Any]) -> None:
        """The figures of an epoch."""
        self._run.log({name: value for name, value in row.items() if value is not None}, step=row["epoch"])

    def finish(self, result: Mapping[str, Any]) -> None:
        """The result as the run's summary."""
        figures = {f"result/test_{name}": value for name, value in result["test"].items() if value is not None}
        self._run.summary.update({**figures, "result/best_epoch": result["best"]["epoch"]})
        self._complete = True

    def close(self) -> None:
        """Let wandb write, or send, what it has."""
        if self._run is not None:
            self._run.finish(exit_code=0 if self._complete else 1)


TRACKERS: Mapping[str, Callable[[], Tracker]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def check(names: Iterable[str]) -> None:
    """Raise `UsageError` for a tracker that is unknown, not installed, or would stop a run to ask who you are."""
    for name in names:
        if name not in TRACKERS:
            raise UsageError(f"--log {name}: must be one of {', '.join(TRACKERS)}{did_you_mean(name, TRACKERS)}")
        extras.check(f"--log {name}", name)
        if name == "wandb":
            _check_wandb()


def _check_wandb() -> None:
    """See now that wandb knows whose run it is: it would ask, and a run would wait for the answer."""
    import wandb

    settings = wandb.setup(settings=wandb.Settings(silent=True)).settings
    if settings.mode in ("offline", "disabled", "dryrun"):
        return
    try:
        known = wandb.login(prompt=False)
    except Exception as error:
        words = one_line(error, 200)
        raise UsageError(f"--log wandb: {words}; WANDB_MODE=offline writes without the network") from None
    if not known:
        raise UsageError("--log wandb: nobody is logged in; run `wandb login` first, or set WANDB_MODE=offline")


class Tracked(Watcher):
    """A watcher whose figures go to trackers as well. A tracker that fails is left out, and the run goes on."""

    def __init__(self, watcher: Watcher, names: Iterable[str]) -> None:
        self._watcher = watcher
        self._trackers = {name: TRACKERS[name]() for name in dict.fromkeys(names)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """The run is over, one way or another."""
        self._each(lambda tracker: tracker.close())

    def say(self, text: str) -> None:
        self._watcher.say(text)

    def progress(self, title: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        return self._watcher.progress(title, total)

    def stages(self, rows: Sequence[StageRow]) -> None:
        self._watcher.stages(rows)

    def step(self, taken: int, glance: Callable[[], EpochProgress | None]) -> None:
        self._watcher.step(taken, glance)

    def measure(self, known: EpochProgress) -> None:
        self._watcher.measure(known)

    def begin(self, config: "Config", run: Path, first_epoch: int, steps_per_epoch: int, place: str) -> None:
        """Training starts in the run's folder, or goes on, with `first_epoch`."""
        self._each(lambda tracker: tracker.begin(config, run, first_epoch))
        self._watcher.begin(config, run, first_epoch, steps_per_epoch, place)

    def epoch(self, row: Mapping[str, Any], state: TrainState) -> None:
        """An epoch is finished and measured."""
        self._watcher.epoch(row, state)
        self._each(lambda tracker: tracker.epoch(row))

    def finish(self, result: Mapping[str, Any]) -> None:
        """The run is complete, and this is its result."""
        self._watcher.finish(result)
        self._each(lambda tracker: tracker.finish(result))

    def _each(self, do: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                do(tracker)
            except Exception as error:  # whatever it is, it is not worth a night's training
                del self._trackers[name]
                words = one_line(error, 200) or type(error).__name__
                self._watcher.say(f"--log {name} stopped ({words[:200]}); the run goes on without it")

"""A run's folder and its files. No torch here."""

import contextlib
import csv
import errno
import io
import json
import os
import shutil
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from cifar100cli.atomic import remove_quietly, write_json, write_text
from cifar100cli.bounded import kind_of, not_text, parse_json, printable, read_file, walk
from cifar100cli.config import STEPS, TEACHER, having, read_config
from cifar100cli.errors import CifarError, DataError, FolderError, UsageError
from cifar100cli.folders import DATA_DIR, named_by
from cifar100cli.schema import Config
from cifar100cli.wording import SPLIT_OF, argument

FORMAT = 1  # of a run folder; a newer one is refused

CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"
TEACHER_DIGEST = "teacher_sha256"  # in it, of a run that is distilled
TEACHER_PLACE = "teacher"  # in it, where that lay when the run went on
DATA_DIGEST = "data_sha256"  # in it, of the images and labels of its data set
WEIGHTS_DIGEST = "weights_sha256"  # in it, of the file of weights that it began from, if it did
RESUMED = "resumed"  # in it, a list: of each time that the run went on, what was otherwise than at its beginning
MOST_RESUMED = 100  # of these that are kept, the last ones: a run that is requeued for ever must not outgrow its file
METRICS = "metrics.jsonl"
TABLE = "metrics.csv"  # the same once more, for spreadsheets
MODEL = "model.safetensors"
STATE = "state.safetensors"
PREDICTIONS = "predictions.csv"  # of the test images, by the selected weights
RESULT = "result.json"
DIVERGED = "diverged.json"  # why the run was given up, where its loss stopped being finite
LOCK = ".lock"
TENSORBOARD, WANDB = TRACKED = ("tensorboard", "wandb")  # folders of trackers' own files
FILES = (CONFIG, ENVIRONMENT, METRICS, TABLE, MODEL, STATE, PREDICTIONS, RESULT, DIVERGED)

LARGEST_JSON = 1 << 20  # bytes; ours are a few thousand
MOST_EPOCHS = 100_000
LARGEST_LINE = 1 << 16  # characters; ours have a few hundred
LARGEST_METRICS = 64 << 20  # bytes; 100,000 epochs, the most there can be, take half of it

_NUMBER = (int, float)
LARGEST = 1e15  # of any figure; a loss above is no more than an infinite one
RESULT_SHAPE: Mapping[str, Any] = {
    **dict.fromkeys(("preset", "dataset", "select", "device", "precision", "run_dir"), str),
    **dict.fromkeys(("seed", "epochs", "seconds", "images_per_second"), _NUMBER),
    "test": dict.fromkeys(("top1", "top5", "loss", "ece"), _NUMBER),
    "best": dict.fromkeys(("epoch", "top1"), _NUMBER),
}
LATER: Mapping[str, Any] = dict.fromkeys(("ranks", "peak_memory_bytes"), _NUMBER)  # which older results have not
ROW_SHAPE: Mapping[str, Any] = dict.fromkeys(("train_loss", "train_top1", "seconds", "images_per_second"), _NUMBER)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(read_file(path, LARGEST_JSON).decode("utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    except DataError:
        raise
    except ValueError:
        raise DataError(f"{path}: not valid JSON") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: not a JSON object")
    return content


def _misshapen(content: object, shape: Mapping[str, Any], place: str = "") -> str | None:
    """The first key that is missing or not what it should be; a run's files are input like any other."""
    for key, kind in shape.items():
        value = content.get(key) if isinstance(content, dict) else None
        if isinstance(kind, Mapping):
            inside = _misshapen(value, kind, f"{place}{key}.")
            if inside:
                return inside
        elif not isinstance(value, kind) or isinstance(value, bool):
            return f"{place}{key}"
        elif isinstance(value, str):
            if printable(value) != value:
                return f"{place}{key}"
        elif not abs(value) < LARGEST:  # which NaN is not either
            return f"{place}{key}"
    return None


@dataclass(frozen=True)
class RunDir:
    """One training run on disk."""

    path: Path

    @classmethod
    def create(cls, root: Path, preset: str, config: Config, environment: Mapping[str, object]) -> Self:
        """Make `<root>/<preset>/<YYYYmmdd-HHMMSS>-seed<N>`; a folder that is there is never reused."""
        stem = f"{datetime.now():%Y%m%d-%H%M%S}-seed{config.seed}"
        parent = root / preset
        try:
            parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(root, error.strerror) from None
        for name in (stem, *(f"{stem}-{number}" for number in range(2, 1000))):
            try:
                (parent / name).mkdir()
            except FileExistsError:  # another run began within this second
                continue
            except OSError as error:
                raise _unwritable(root, error.strerror) from None
            break
        run = cls(parent / name)
        try:
            write_json(run.path / ENVIRONMENT, {"format": FORMAT, "preset": preset, **environment})
            write_text(run.path / CONFIG, config.to_yaml())
        except BaseException as error:
            shutil.rmtree(run.path, ignore_errors=True)  # made by us a moment ago, and of no use to anyone
            if isinstance(error, OSError):
                raise _unwritable(root, error.strerror) from None
            raise
        return run

    @classmethod
    def open(cls, path: Path) -> Self:
        """An existing run. Raises `DataError` when the folder is none, shut, or of a newer format."""
        kind = kind_of(path)
        if kind == "file" and kind_of(path.parent / CONFIG) == "file":
            raise DataError(f"{path}: is a file of a run; name the run's folder: {path.parent}")
        if kind != "folder":
            raise DataError(f"{path}: there is no such run folder; `cifar100 report --json` names the runs")
        if kind_of(path / CONFIG) != "file":
            raise DataError(f"{path}: not a run folder: it has no {CONFIG}{_latest_below(path, CONFIG)}")
        for name in FILES:
            if kind_of(path / name) not in ("file", None):
                raise DataError(f"{path}: {name} is not a plain file")
        run = cls(path)
        found = run.environment().get("format")
        if not isinstance(found, int) or isinstance(found, bool) or found < 1:
            raise DataError(f"{path}: {ENVIRONMENT} has no format number")
        if found > FORMAT:
            raise DataError(f"{path}: written by a newer cifar100 (format {found}; this one reads up to {FORMAT})")
        return run

    def config(self) -> Config:
        """The resolved preset that the run was started with."""
        try:
            return read_config(self.path / CONFIG)
        except UsageError as error:
            raise DataError(str(error)) from None

    def settings(self) -> Config:
        """The `config`, with the teacher where it was last seen."""
        config = self.config()
        if config.distillation is None:
            return config
        teacher = self.last_place(TEACHER_PLACE, config.distillation.teacher) or self.latest(TEACHER_PLACE)
        return config if teacher is None else having(config, TEACHER, teacher)

    def environment(self) -> dict[str, Any]:
        """Versions, device, command, commit, and the name of the preset."""
        return _read_json(self.path / ENVIRONMENT)

    def recorded(self, key: str) -> str | None:
        """One line of text of the environment, if it can be had."""
        try:
            value = self.environment().get(key)
        except DataError:
            return None
        return value if isinstance(value, str) and printable(value) == value else None

    def times(self) -> list[Mapping[str, Any]]:
        """The environment at the beginning, and each time that the run went on, in order; none if it cannot be had."""
        try:
            environment = self.environment()
        except DataError:
            return []
        resumed = environment.pop(RESUMED, None)
        later = resumed[-MOST_RESUMED:] if isinstance(resumed, list) else []
        # Neither more of them nor copies: what a stranger's file lists may be many, and of a large environment.
        return [ChainMap(entry, environment) for entry in ({}, *later) if isinstance(entry, dict)]

    def each_time(self, key: str) -> list[str]:
        """What `recorded` gives, of the beginning and of every time that the run went on, in order."""
        values = [time.get(key) for time in self.times()]
        return [value for value in values if isinstance(value, str) and printable(value) == value]

    def latest(self, key: str) -> str | None:
        """As `recorded`, of the last time that the run began or went on."""
        return next(reversed(self.each_time(key)), None)

    def last_place(self, key: str, *first: str | None) -> str | None:
        """Where a file or folder of the run's is: the last of its places that is there, and `first` before them all."""
        for place in reversed([*first, *self.each_time(key)]):
            with contextlib.suppress(DataError):  # in somebody else's home, which may not be looked into
                if place is not None and kind_of(Path(place)) is not None:
                    return place
        return None

    def note_resumption(self, environment: Mapping[str, object]) -> None:
        """Add to the run's environment when it goes on, and what is otherwise than at its beginning."""
        first = self.environment()
        otherwise = {key: value for key, value in environment.items() if key == "started" or value != first.get(key)}
        before = first.get(RESUMED)
        resumed = [*(before if isinstance(before, list) else []), otherwise][-MOST_RESUMED:]
        write_json(self.path / ENVIRONMENT, {**first, RESUMED: resumed})

    @property
    def preset(self) -> str:
        """The name of the preset."""
        return self.recorded("preset") or self.path.parent.name

    def to_go_on(self) -> str:
        """The command that goes on with the run, with what must be said again: trackers, folder, device, its steps."""
        words = ["cifar100 train --resume", argument(self.path)]
        words += [f"--log {name}" for name in TRACKED if (self.path / name).is_dir()]
        named, own = named_by(DATA_DIR), self.latest("data_dir")
        if named is not None and own is not None and Path(own) != named.absolute():
            words += ["--data-dir", argument(own)]
        device = self.latest("device")
        if device is not None and device != self.recorded("device"):
            words += ["--device", argument(device)]
        steps = self.latest(STEPS)
        with contextlib.suppress(CifarError, OSError):  # told by what reads it next
            if steps is not None and steps != self.config().train.compile:
                words += ["--set", argument(f"{STEPS}={steps}")]
        return " ".join(words)

    @property
    def complete(self) -> bool:
        """Whether the run went to its end."""
        return (self.path / RESULT).is_file()

    @property
    def diverged(self) -> bool:
        """Whether the run was given up, as its loss stopped being finite."""
        return (self.path / DIVERGED).is_file()

    def note_divergence(self, reason: str) -> None:
        """Give the run up: the same steps would end alike."""
        write_json(self.path / DIVERGED, {"reason": reason})

    def forget_divergence(self) -> None:
        """Somebody goes on with it nevertheless."""
        (self.path / DIVERGED).unlink(missing_ok=True)

    def result(self) -> dict[str, Any]:
        """What the run measured; there once it is complete."""
        content = _read_json(self.path / RESULT)
        wrong = _misshapen(content, {**RESULT_SHAPE, **{key: kind for key, kind in LATER.items() if key in content}})
        if not wrong and content["select"] not in SPLIT_OF:
            wrong = "select"
        if wrong:
            raise DataError(f"{self.path / RESULT}: {wrong} is missing or not what it should be")
        return content

    def write_result(self, result: Mapping[str, object]) -> None:
        """Complete the run."""
        self._write_table()  # once more: it may have been open when the last epoch was written
        write_json(self.path / RESULT, result)

    def metrics(self) -> list[dict[str, Any]]:
        """The finished epochs, in order. A last line that a crash cut short is left out."""
        try:
            text = read_file(self.path / METRICS, LARGEST_METRICS).decode("utf-8", errors="replace")
        except FileNotFoundError:
            return []
        lines: list[dict[str, Any]] = []
        for line in text.splitlines()[:MOST_EPOCHS]:
            if len(line) > LARGEST_LINE:
                break
            try:
                row = parse_json(line)
            except ValueError:
                break
            if not isinstance(row, dict) or row.get("epoch") != len(lines) + 1 or _misshapen(row, ROW_SHAPE):
                break
            if any(isinstance(value, (dict, list)) for value in row.values()):
                break
            if any(isinstance(value, _NUMBER) and not abs(value) < LARGEST for value in row.values()):
                break
            lines.append(row)
        return lines

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add one epoch's line and bring it to the disk. Raises `DataError` when earlier lines have gone."""
        path = self.path / METRICS
        if not (self.path / CONFIG).is_file():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        if len(self.metrics()) != row["epoch"] - 1:
            raise self._lost_lines(row["epoch"])
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None
        self._write_table()

    def forget_after(self, epoch: int) -> None:
        """Drop the lines of epochs that were measured but whose training state was not saved."""
        kept = self.metrics()[:epoch]
        if len(kept) < epoch:
            raise self._lost_lines(epoch)
        write_text(self.path / METRICS, "".join(json.dumps(row) + "\n" for row in kept))
        self._write_table()

    def _lost_lines(self, epoch: int) -> DataError:
        return DataError(
            f"{self.path / METRICS}: lines are missing or broken before epoch {epoch}; bring them back, or train anew"
        )

    def _write_table(self) -> None:
        rows = self.metrics()
        buffer = io.StringIO()
        columns = dict.fromkeys(name for row in rows for name in row)
        writer = csv.DictWriter(buffer, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        with contextlib.suppress(PermissionError):  # open in a spreadsheet on Windows; the next epoch writes it whole
            write_text(self.path / TABLE, buffer.getvalue())

    @contextlib.contextmanager
    def exclusively(self, patience: float = 1.0) -> Iterator[None]:
        """Hold the run against other processes; raise `FolderError` when one has it already.

        Who only asks whether it is in use holds it for an instant too, which is waited for, at most for `patience`
        seconds. The lock's file is removed by whoever holds it; filelock sees when the file that it has locked is
        no longer the one of that name, and begins anew.
        """
        from filelock import FileLock, Timeout

        for name in (*FILES, LOCK, *TRACKED):
            if (self.path / name).is_symlink():
                raise DataError(f"{self.path}: {name} is a link; a run writes into its own folder alone")
        lock = FileLock(self.path / LOCK)
        try:
            lock.acquire(timeout=patience, poll_interval=0.02)
        except Timeout as timeout:
            # Where files cannot be locked, a mark is left in place of it, which a process that is killed leaves behind.
            _, _, holder = str(timeout).rstrip(".").partition(" held by ")
            gone = f": {printable(holder)}; if that job is gone, remove {self.path / LOCK}" if holder else ""
            raise FolderError(f"{self.path}: another process is training this run right now{gone}") from None
        try:
            if not (self.path / CONFIG).is_file():  # which it has had; filelock makes a folder anew that has gone
                raise FolderError(
                    f"{self.path}: the run's folder is gone; where it was moved to, --resume goes on with it"
                )
            for pattern in (".*.tmp", ".tmp*"):  # half-written by a process that was killed: ours, and safetensors'
                for left in self.path.glob(pattern):
                    left.unlink(missing_ok=True)
            yield
        finally:
            remove_quietly(self.path / LOCK)
            lock.release()
            with contextlib.suppress(OSError):
                self.path.rmdir()  # only if nothing is in it

    @property
    def in_use(self) -> bool:
        """Whether another process is training it."""
        if not (self.path / LOCK).exists():
            return False
        try:
            with self.exclusively(patience=0):
                return False
        except (CifarError, OSError):  # held, or no place to hold it, or another user's lock
            return True


def check_writable(root: Path) -> None:
    """Raise `FolderError` when runs cannot be made there; asked before the long preparations, changes nothing."""
    existing = root.absolute()
    if strange := not_text(existing):
        raise _unwritable(root, f"{strange} is not UTF-8, and no model can be kept there")
    while True:
        try:
            existing.lstat()
            break
        except (FileNotFoundError, NotADirectoryError):
            existing = existing.parent
        except OSError as error:
            raise _unwritable(root, error.strerror) from None
    if not existing.is_dir():
        kind = "a link that leads to no folder" if existing.is_symlink() else "not a folder"
        raise _unwritable(root, f"{existing} is {kind}")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise _unwritable(root, f"there is no permission to write to {existing}")


def _unwritable(root: Path, reason: str | None) -> FolderError:
    return FolderError(f"runs cannot be written to {root}: {reason}; --out or CIFAR100_RUNS_DIR names another place")


def find_runs(root: Path, refused: Callable[[OSError], None] | None = None) -> list[Path]:
    """Every folder under `root` that looks like a run, whole or broken, in order of path.

    Links to folders are followed, for runs take room and are moved to other disks; each run is found once. A folder
    that may not be read is told to `refused`. wandb's folder in a run has a `config.yaml` too, and is none.
    """
    marks = {CONFIG, METRICS, RESULT, MODEL}
    folders = walk(root, hidden=False, links=True, refused=refused)
    found = {folder for folder, files in folders if marks & set(files)}
    tracked = {run / name for run in found for name in TRACKED}
    return sorted(folder for folder in found if not tracked.intersection((folder, *folder.parents)))


def begun_at(path: Path) -> tuple[float, float]:
    """When a run was begun, in seconds since 1970, and when its first file was written.

    The first is what it says itself, for copying a folder begins no run; several may begin within one second.
    """
    written = (path / CONFIG).stat().st_mtime
    try:
        return datetime.fromisoformat(RunDir(path).recorded("started") or "").timestamp(), written
    except (ValueError, OverflowError, OSError):
        return written, written


def find_model(path: Path) -> Path:
    """The model's file of a run folder, or the file itself. Raises `DataError` where it cannot be had."""
    kind = kind_of(path)
    if kind == "folder":
        if kind_of(path / MODEL) != "file":
            hint = _latest_below(path, MODEL)
            raise DataError(f"{path}: has no {MODEL}: not a run folder, or no epoch of it is finished{hint}")
        return path / MODEL
    if kind != "file":
        raise DataError(f"{path}: there is no such run or checkpoint; `cifar100 report --json` names the runs")
    if path.name in FILES and path.suffix != ".safetensors" and kind_of(path.parent / CONFIG) == "file":
        raise DataError(f"{path}: is a file of a run, and no model; name the run's folder: {path.parent}")
    return path


def _latest_below(folder: Path, name: str) -> str:
    """The end of a sentence about a folder that is no run: the latest run in it that has a file of this name."""
    below = [run for run in find_runs(folder) if (run / name).is_file()]
    latest = max(below, key=lambda run: run.name, default=None)  # a name begins with the time
    return f"; the latest run below it is {latest}" if latest is not None else ""

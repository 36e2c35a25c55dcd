"""Runs beside the published figures: reads run folders only, and needs neither torch nor a GPU."""

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from cifar100cli import console
from cifar100cli.config import Config, differences, load_preset, preset_names
from cifar100cli.console import PROTOCOLS, percent
from cifar100cli.errors import CifarError, DataError, UsageError
from cifar100cli.runs import RunDir, find_runs

FORMATS = {".md": "markdown", ".csv": "csv", ".json": "json", ".txt": "table"}
TITLES = {"cifar100": "CIFAR-100", "cifar10": "CIFAR-10", "synthetic": "Synthetic (drawn) data"}
FIXED = "-fixed"  # ends the name of the preset that stands beside the tutorial's with the evident repairs
CURVES = tuple(f"{split}_{figure}" for split in ("train", "val", "test") for figure in ("loss", "top1"))
STUDY_COLUMNS = ("unfrozen", "epochs", "images", "published", "ours", "train loss", "test loss", "test by epoch")
CELL = {"finetune.unfreeze", "train.epochs"}  # what a published cell of the study is about
COLUMNS = ("preset", "published", "ours", "deviation", "difference", "n", "epochs", "chosen by", "data set")


@dataclass(frozen=True)
class Row:
    """The complete runs that share a preset and all settings but the seed.

    `changes` says where they depart from the shipped preset; figures of different settings are never
    averaged. `delta` is ours minus published, as a fraction, and only on the preset's own data set. `curves`
    has losses and accuracies by epoch, as means over the runs; what was not measured in every epoch is not there.
    """

    preset: str
    changes: dict[str, object]
    dataset: str
    published_top1: float | None
    published_epoch: int | None
    n: int
    top1_mean: float
    top1_std: float | None
    delta: float | None
    select: str
    epochs: int
    best_epochs: list[int]
    seeds: list[int]
    seconds_mean: float
    images_per_second_mean: float
    runs: list[str]
    unfreeze: str | None
    fraction: float
    curves: dict[str, list[float]]


@dataclass(frozen=True)
class Pair:
    """A preset that trains as the tutorial did, and the one beside it with the evident repairs, both run alike."""

    preset: str
    dataset: str
    changes: dict[str, object]
    top1: float
    fixed_top1: float
    gain: float
    select: str
    fixed_select: str


@dataclass(frozen=True)
class Unusable:
    """A folder that no figure was taken from, and why."""

    run: str
    reason: str
    finished_epochs: int = 0


@dataclass(frozen=True)
class Report:
    """What there is under the folders that were asked for."""

    rows: list[Row] = field(default_factory=list)
    unusable: list[Unusable] = field(default_factory=list)

    @property
    def pairs(self) -> list[Pair]:
        """Every two rows that differ only in being repaired: the same settings were changed in both."""
        found = []
        for row in self.rows:
            for fixed in self.rows:
                alike = (fixed.changes, fixed.dataset) == (row.changes, row.dataset)
                if fixed.preset == row.preset + FIXED and alike:
                    gain = fixed.top1_mean - row.top1_mean
                    means = (row.top1_mean, fixed.top1_mean, gain)
                    found.append(Pair(row.preset, row.dataset, row.changes, *means, row.select, fixed.select))
        return found


@dataclass(frozen=True)
class _Complete:
    path: Path
    preset: str
    config: Config
    result: dict[str, Any]


def format_of(out: Path | None) -> str:
    """The format that a file's name asks for."""
    if out is None:
        return "table"
    if out.suffix not in FORMATS:
        raise UsageError(f"--out {out}: say the --format, or end the name in one of {', '.join(FORMATS)}")
    return FORMATS[out.suffix]


def collect(folders: Sequence[Path]) -> Report:
    """Read every run under the folders. A broken one is listed with its reason and stops nothing."""
    paths: list[Path] = []
    for folder in folders:
        if not folder.is_dir():
            raise DataError(f"{folder}: there is no such folder; `cifar100 train` makes runs, --out says where")
        paths += [path for path in find_runs(folder) if path not in paths]
    groups: dict[str, list[_Complete]] = {}
    unusable = []
    for path in paths:
        try:
            run = _read(path)
        except (CifarError, OSError) as error:
            reason = str(error) if isinstance(error, CifarError) else (error.strerror or str(error))
            unusable.append(Unusable(str(path), reason.removeprefix(f"{path}: ")))
            continue
        if isinstance(run, Unusable):
            unusable.append(run)
        else:
            settings = run.config.model_copy(update={"seed": 0, "description": "", "published": None})
            groups.setdefault(f"{run.preset}\n{settings.to_yaml()}", []).append(run)
    ours = set(preset_names())

    def place(row: Row) -> tuple[bool, str, bool]:
        """Ours before the user's own; a repaired preset right behind the one that it repairs."""
        family = row.preset.removesuffix(FIXED)
        return row.preset not in ours, family, row.preset != family

    return Report(sorted(map(_row, groups.values()), key=place), unusable)


def _read(path: Path) -> _Complete | Unusable:
    run = RunDir.open(path)
    config = run.config()
    if not run.complete:
        finished = len(run.metrics())
        return Unusable(str(path), f"unfinished: {finished} of {config.train.epochs} epochs", finished)
    result = run.result()
    if not 0 <= result["test"]["top1"] <= 1:
        raise DataError(f"{path}: its accuracy is no fraction")
    return _Complete(path, run.preset, config, result)


def _shipped(name: str) -> Config | None:
    return load_preset(name).config if name in preset_names() else None


def _row(group: list[_Complete]) -> Row:
    first = group[0]
    config, shipped = first.config, _shipped(first.preset)
    changes = {}
    if shipped is not None:
        changes = {key: ours for key, (ours, _) in differences(config, shipped).items() if key != "seed"}
    published = config.published
    own_dataset = shipped.data.dataset if shipped is not None else "cifar100"
    top1 = [run.result["test"]["top1"] for run in group]
    mean = fmean(top1)
    comparable = config.data.dataset == own_dataset != "synthetic"
    return Row(
        preset=first.preset,
        changes=changes,
        dataset=config.data.dataset,
        published_top1=published.top1 if published else None,
        published_epoch=published.epoch if published else None,
        n=len(group),
        top1_mean=mean,
        top1_std=stdev(top1) if len(top1) > 1 else None,
        delta=mean - published.top1 if published and comparable else None,
        select=config.train.select,
        epochs=config.train.epochs,
        best_epochs=[run.result["best"]["epoch"] for run in group],
        seeds=[run.result["seed"] for run in group],
        seconds_mean=fmean(run.result["seconds"] for run in group),
        images_per_second_mean=fmean(run.result["images_per_second"] for run in group),
        runs=[str(run.path) for run in group],
        unfreeze=config.finetune.unfreeze if config.finetune else None,
        fraction=config.data.fraction,
        curves=_curves([RunDir(run.path).metrics() for run in group]),
    )


def _curves(runs: Sequence[Sequence[dict[str, Any]]]) -> dict[str, list[float]]:
    """What every run has of every epoch, as means over the runs."""
    found = {}
    for name in CURVES:
        lines = [[row.get(name) for row in rows] for rows in runs]
        if len({len(line) for line in lines}) == 1 and all(_is_number(value) for line in lines for value in line):
            found[name] = [fmean(values) for values in zip(*lines, strict=True)]
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def outside_tolerance(report: Report, tolerance: float) -> list[str]:
    """A phrase for every row whose mean is further than `tolerance` percentage points from its figure."""
    return [
        f"{row.preset}{_changed(row)}: {percent(row.top1_mean)} is {100 * row.delta:+.2f} points from the published "
        f"{percent(row.published_top1)}, outside {tolerance:g}"
        for row in report.rows
        if row.delta is not None and abs(100 * row.delta) > tolerance + 1e-9
    ]


# ------------------------------------------------------------------------------------------------- showing


def _changed(row: Row | Pair) -> str:
    """The settings that are not the preset's, for people."""
    if not row.changes:
        return ""
    return f" ({', '.join(f'{key}={_value(value)}' for key, value in row.changes.items())})"


def _value(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.preset + _changed(row),
        percent(row.published_top1),
        percent(row.top1_mean),
        "-" if row.top1_std is None else f"{100 * row.top1_std:.2f}",
        "-" if row.delta is None else f"{100 * row.delta:+.2f}",
        str(row.n),
        str(row.epochs),
        PROTOCOLS[row.select],
        "synthetic (drawn)" if row.dataset == "synthetic" else row.dataset,
    )


PAIR_COLUMNS = ("preset", "as in the tutorial", "repaired", "gain")


def _pair_cells(pair: Pair, changed: str) -> tuple[str, ...]:
    return (
        pair.preset + changed,
        f"{percent(pair.top1)}, {PROTOCOLS[pair.select]}",
        f"{percent(pair.fixed_top1)}, {PROTOCOLS[pair.fixed_select]}",
        f"{100 * pair.gain:+.2f}",
    )


def _study(report: Report) -> list[Row]:
    """The rows of fine-tuning, from the least that was unfrozen to the most."""
    depths = ["fc", "layer4", "layer3", "all"]
    rows = [row for row in report.rows if row.unfreeze is not None]
    return sorted(rows, key=lambda row: (row.dataset, _index(depths, row.unfreeze), row.epochs, row.fraction))


def _index(known: Sequence[str], name: str | None) -> int:
    return known.index(name) if name in known else len(known)


def _study_cells(row: Row, mark: str) -> tuple[str, ...]:
    deviation = "" if row.top1_std is None else f" ±{100 * row.top1_std:.2f}"
    last = {name: f"{values[-1]:.4f}" for name, values in row.curves.items() if values}
    return (
        f"{row.unfreeze}{mark}",
        str(row.epochs),
        f"{100 * row.fraction:g}%",
        percent(row.published_top1) if row.delta is not None and not row.changes.keys() & CELL else "-",
        percent(row.top1_mean) + deviation,
        last.get("train_loss", "-"),
        last.get("test_loss", "-"),
        sparkline(row.curves.get("test_top1", [])),
    )


def sparkline(values: Sequence[float], width: int = 16) -> str:
    """A curve in one line of text, from its lowest to its highest value."""
    if not values:
        return "-"
    step = max(1.0, len(values) / width)
    taken = [values[min(len(values) - 1, int((index + 1) * step) - 1)] for index in range(min(width, len(values)))]
    low, high = min(values), max(values)
    bars = "▁▂▃▄▅▆▇█"
    return "".join(bars[round((value - low) / ((high - low) or 1) * (len(bars) - 1))] for value in taken)


def _notes(report: Report) -> list[str]:
    notes = []
    if any(row.select == "best_test" for row in report.rows):
        notes.append("best on test: the epoch was chosen on the test set itself, as the tutorial does; it flatters.")
    if any(row.dataset == "synthetic" for row in report.rows):
        notes.append("synthetic: drawn shapes; these figures say nothing about CIFAR-100.")
    if any(row.changes for row in report.rows):
        notes.append("in brackets: settings that are not the preset's; the published figure is for the preset's.")
    return notes


def render(report: Report, form: str) -> str:
    """The report as Markdown, CSV, JSON, or a plain table."""
    if form == "json":
        content = {
            "rows": [asdict(row) for row in report.rows],
            "pairs": [asdict(pair) for pair in report.pairs],
            "unusable": [asdict(u) for u in report.unusable],
        }
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    if form == "csv":
        return _csv(report)
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "|".join(["---", *["---:"] * 6, "---", "---"]) + "|"]
    lines += ["| " + " | ".join(_escape(cell) for cell in _cells(row)) + " |" for row in report.rows]
    if report.pairs:
        lines += ["", "| " + " | ".join(PAIR_COLUMNS) + " |", "|---|---:|---:|---:|"]
        lines += [
            "| " + " | ".join(_escape(cell) for cell in _pair_cells(pair, _changed(pair))) + " |"
            for pair in report.pairs
        ]
    if study := _study(report):
        lines += ["", "| " + " | ".join(STUDY_COLUMNS) + " |", "|---|---:|---:|---:|---:|---:|---:|---|"]
        lines += ["| " + " | ".join(_escape(cell) for cell in _study_cells(row, _changed(row))) + " |" for row in study]
    lines += ["", *(f"- {note}" for note in _notes(report))]
    lines += [f"- not counted: `{_escape(u.run)}`: {_escape(u.reason)}" for u in report.unusable]
    return "\n".join(lines).rstrip() + "\n"


def _csv(report: Report) -> str:
    buffer = io.StringIO()
    lists = ("changes", "runs", "seeds", "best_epochs", "curves")
    names = [name for name in Row.__dataclass_fields__ if name not in lists]
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*names, "changes", "seeds", "best_epochs", "runs"])
    for row in report.rows:
        writer.writerow(
            [
                *("" if getattr(row, name) is None else getattr(row, name) for name in names),
                " ".join(f"{key}={_value(value)}" for key, value in row.changes.items()),
                *(" ".join(map(str, values)) for values in (row.seeds, row.best_epochs)),
                " ".join(row.runs),
            ]
        )
    return buffer.getvalue()


def _escape(cell: str) -> str:
    return console.printable(cell).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def show_table(report: Report) -> None:
    """Print the report for people: a table for each data set, narrow enough for 80 columns."""
    if not report.rows:
        console.result("there is no complete run here yet; `cifar100 train` makes one")
    changes = list(dict.fromkeys(_changed(row) for row in report.rows if row.changes))
    letters = {changed: _letters(index) for index, changed in enumerate(changes)}
    for dataset in dict.fromkeys(row.dataset for row in report.rows):
        console.table(
            f"{TITLES.get(dataset, dataset)}: top-1 on the test set, in %",
            ("preset", "published", "ours", "diff", "n", "epochs", "chosen by"),
            [_narrow(row, letters.get(_changed(row))) for row in report.rows if row.dataset == dataset],
            right=range(1, 6),
        )
    if report.pairs:
        console.table(
            "Side by side: normalised, cosine schedule, crop and flip, chosen on held-out images",
            PAIR_COLUMNS,
            [_pair_cells(pair, _bracketed(letters.get(_changed(pair)))) for pair in report.pairs],
            right=range(1, 4),
        )
    study = _study(report)
    for dataset in dict.fromkeys(row.dataset for row in study):
        console.table(
            f"How far to unfreeze, on {TITLES.get(dataset, dataset)}",
            STUDY_COLUMNS,
            [_study_cells(row, _bracketed(letters.get(_changed(row)))) for row in study if row.dataset == dataset],
            right=range(1, 7),
        )
    for changed, letter in letters.items():
        console.result(f"[{letter}] {changed.strip(' ()')}")
    for note in _notes(report):
        console.result(note)
    for unusable in report.unusable:
        console.result(f"not counted: {unusable.run}: {unusable.reason}")


def _bracketed(letter: str | None) -> str:
    return f" [{letter}]" if letter else ""


def _narrow(row: Row, letter: str | None) -> tuple[str, ...]:
    deviation = "" if row.top1_std is None else f" ±{100 * row.top1_std:.2f}"
    return (
        row.preset + _bracketed(letter),
        "-" if row.published_top1 is None else f"{100 * row.published_top1:.2f}",
        f"{100 * row.top1_mean:.2f}{deviation}",
        "-" if row.delta is None else f"{100 * row.delta:+.2f}",
        str(row.n),
        str(row.epochs),
        PROTOCOLS[row.select],
    )


def _letters(index: int) -> str:
    """a, b, ..., z, aa, ab, ..."""
    return (_letters(index // 26 - 1) if index >= 26 else "") + chr(ord("a") + index % 26)

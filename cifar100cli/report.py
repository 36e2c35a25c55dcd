"""Runs beside the published figures: reads run folders only, and needs neither torch nor a GPU."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from cifar100cli import ablation, noise
from cifar100cli.ablation import Ablation, Effect, Setting
from cifar100cli.bounded import kind_of, printable
from cifar100cli.config import (
    TEACHER,
    departures,
    effective,
    flat,
    having,
    preset_names,
    shipped,
    with_own_figures,
)
from cifar100cli.errors import CifarError, DataError
from cifar100cli.runs import DATA_DIGEST, TEACHER_DIGEST, WEIGHTS_DIGEST, RunDir, begun_at, find_runs
from cifar100cli.schema import Config
from cifar100cli.wording import SPLIT_OF, percent, points

SPLITS = {"train": "training", "val": "held-out", "test": "test"}
FIXED = "-fixed"  # ends the name of the preset that stands beside the tutorial's with the evident repairs
CURVES = tuple(f"{split}_{figure}" for split in ("train", "val", "test") for figure in ("loss", "top1"))
STUDY = "finetune-"  # begins the names of the presets of the study of unfreezing
CELL = {"finetune.unfreeze", "train.epochs"}  # what a published cell of the study is about


@dataclass(frozen=True)
class Row:
    """The complete runs that share a preset and all settings but the seed, and what does nothing with the others.

    - `changes`: where they depart from the shipped preset, which has `shipped` there; of a preset that is not ours,
      what tells its rows apart. Figures of different settings are never averaged.
    - `departs`: the figures beside them are of other settings or images. A teacher takes none away, and of a user's own
      preset only those runs have a figure whose settings it is of.
    - `n` counts seeds. Runs of one seed count as one, their mean, since no more than that is learned from them; `seeds`
      and `best_epochs` are those of `runs`.
    - `teacher`: what they were distilled from. Runs with the same weights for one are of one row, wherever these lay.
    - `expected_top1`: what a preset of ours reached in `expected_runs` runs, or with 0 of them is meant to reach.
    - `delta`: ours minus published, as a fraction, and only on the preset's own data set.
    - `noise`: how far a single run may lie from our mean by chance alone, as a fraction, once there are several seeds;
      `within_noise` judges `delta` by it where the row does not depart.
    - `test_loss_mean`: over the seeds, of the selected weights, whose accuracy is `top1_mean`.
    - `images`: the data set's digest.
    - `curves`: losses and accuracies by epoch, as means over the seeds, of what was measured in every epoch.
    """

    preset: str
    changes: dict[str, object]
    shipped: dict[str, object]
    departs: bool
    dataset: str
    published_top1: float | None
    published_epoch: int | None
    expected_top1: float | None
    expected_runs: int | None
    n: int
    top1_mean: float
    top1_std: float | None
    test_loss_mean: float
    delta: float | None
    noise: float | None
    within_noise: bool | None
    select: str
    epochs: int
    best_epochs: list[int]
    seeds: list[int]
    seconds_mean: float
    images_per_second_mean: float
    hardware: list[str]
    runs: list[str]
    unfreeze: str | None
    fraction: float
    teacher: str | None
    images: str | None
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
    ablations: list[Ablation] = field(default_factory=list)

    @property
    def pairs(self) -> list[Pair]:
        """Every two rows that differ only in being repaired: the same settings were changed in both."""

        ours = set(preset_names())  # of a user's own nobody knows that one is the other, repaired

        def settings(row: Row) -> tuple[object, ...]:
            # The teacher and the images are among the changes of a row only where the preset's rows have several.
            changes = {key: value for key, value in row.changes.items() if key != "data"}
            return {**changes, TEACHER: row.teacher}, row.dataset

        def alike(row: Row, other: Row) -> bool:
            same_images = row.images == other.images or None in (row.images, other.images)
            return same_images and settings(row) == settings(other)

        found = []
        for row in self.rows:
            for fixed in self.rows:
                if fixed.preset == row.preset + FIXED and {row.preset, fixed.preset} <= ours and alike(row, fixed):
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
    hardware: str
    metrics: list[dict[str, Any]]
    teacher: str | None
    """The digest of the teacher's weights, of a run that has one and says so."""
    images: str | None
    """The digest of its data set, which older runs do not tell."""
    weights: str | None
    """The digest of the file of weights that it began from, of a run that did and says so."""
    begun: tuple[float, float]
    """When it was, as `runs.begun_at` has it."""


def collect(folders: Sequence[Path]) -> Report:
    """Read every run under the folders. A broken one is listed with its reason and stops nothing."""
    paths: dict[Path, Path] = {}
    unusable = []
    for folder in folders:
        if kind_of(folder) != "folder":
            raise DataError(
                f"{folder}: there is no such folder of runs; `cifar100 train` makes them, and "
                "--runs-dir DIR names another folder"
            )
        shut: list[OSError] = []
        for path in find_runs(folder, shut.append):
            paths.setdefault(path.resolve(), path)  # links lead to runs that are known by another name
        unusable += [Unusable(str(error.filename), f"cannot be read: {error.strerror}") for error in shut]
    complete = []
    for path in paths.values():
        try:
            run = _read(path)
        except (CifarError, OSError) as error:
            reason = str(error) if isinstance(error, CifarError) else (error.strerror or str(error))
            unusable.append(Unusable(str(path), reason.removeprefix(f"{path}: ")))
            continue
        if isinstance(run, Unusable):
            unusable.append(run)
        else:
            complete.append(run)
    alike: dict[str, list[_Complete]] = {}
    for run in _with_named_files(complete):
        settings = effective(having(run.config, "seed", 0))
        alike.setdefault(f"{run.preset}\n{settings}", []).append(run)
    groups = [part for group in alike.values() for part in _by_images(group)]
    ours = set(preset_names())

    def place(row: Row) -> tuple[bool, str, bool]:
        """Ours before the user's own; a repaired preset right behind the one that it repairs."""
        family = row.preset.removesuffix(FIXED)
        return row.preset not in ours, family, row.preset != family

    measured = [
        ablation.setting_of(
            group[0].preset,
            group[0].config,
            [{**run.result, "run_dir": str(run.path)} for run in group],
            next((run.images for run in group if run.images is not None), None),
        )
        for _, group in groups
    ]
    apart = _apart([group for _, group in groups])
    rows = [_row(group, setting, apart, data) for (data, group), setting in zip(groups, measured, strict=True)]
    changes = {tuple(row.runs): row.changes for row in rows}  # by which the reader knows the row of an ablation's base
    ablations = [replace(found, changes=changes[tuple(found.runs)]) for found in ablation.find(measured)]
    return Report(sorted(rows, key=place), unusable, ablations)


def _read(path: Path) -> _Complete | Unusable:
    run = RunDir.open(path)
    config = run.config()
    if not run.complete:
        finished = len(run.metrics())
        what = "its loss stopped being finite" if run.diverged else "unfinished"
        return Unusable(str(path), f"{what}: {finished} of {config.train.epochs} epochs", finished)
    result = run.result()
    if not 0 <= result["test"]["top1"] <= 1:
        raise DataError(f"{path}: its accuracy is no fraction")
    ranks = result.get("ranks", 1)
    machines = [_machine(path, time.get("ranks", ranks), time.get("device_name")) for time in run.times()]
    known = dict.fromkeys(machine for machine in machines if machine is not None)
    last = run.latest("device") or result["device"]
    if not known or last != result["device"]:  # of an older run, which did not record that it went on
        known[_machine(path, ranks, result["device"]) or result["device"]] = None
    hardware = f"{', then '.join(known)}, {result['precision']}"
    return _Complete(
        path,
        run.preset,
        config,
        result,
        hardware,
        run.metrics(),
        run.recorded(TEACHER_DIGEST),
        run.recorded(DATA_DIGEST),
        run.recorded(WEIGHTS_DIGEST),
        begun_at(path),
    )


def _machine(path: Path, ranks: object, device: object) -> str | None:
    """What trained a run, or a part of it, in words; None where its name is none."""
    if not isinstance(ranks, int) or not 1 <= ranks < 1e6:
        raise DataError(f"{path}: its number of ranks is not right")
    if not isinstance(device, str) or printable(device) != device:
        return None
    return f"{f'{ranks} x ' if ranks != 1 else ''}{device}"


def _by_images(group: Sequence[_Complete]) -> list[tuple[dict[str, object], list[_Complete]]]:
    """Runs of the same settings on the same images, and where there are several, what tells their images apart."""
    parts = ablation.by_images(group)
    return [
        ({"data": f"images {(images or 'unknown')[:8]}"} if len(parts) > 1 else {}, runs)
        for images, runs in parts.items()
    ]


def _with_named_files(runs: Sequence[_Complete]) -> list[_Complete]:
    """The runs with one name for each teacher, and for each file of weights to begin from."""
    teachers, weights, named = _Names(), _Names(), []
    for run in runs:
        config = run.config
        if config.distillation is not None and run.teacher is not None:
            config = having(config, TEACHER, teachers.of(run.teacher, str(config.distillation.teacher)))
        if config.model.weights is not None and run.weights is not None:
            config = having(config, "model.weights", weights.of(run.weights, config.model.weights))
        named.append(replace(run, config=config))
    return named


class _Names:
    """One name for what has one digest: the same weights lie here and there, and others where they lay."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}

    def of(self, digest: str, place: str) -> str:
        """The place where they lay first, with the digest's beginning where others had lain there before."""
        taken = place in self._names.values()
        return self._names.setdefault(digest, f"{place} (weights {digest[:8]})" if taken else place)


def _apart(groups: Collection[list[_Complete]]) -> dict[str, list[str]]:
    """For each preset, the keys in which its rows differ: what is to be told of those that no preset of ours has."""
    settings: dict[str, list[dict[str, object]]] = {}
    for group in groups:
        settings.setdefault(group[0].preset, []).append(flat(group[0].config))
    return {
        preset: [key for key in found[0] if key != "seed" and any(one[key] != found[0][key] for one in found)]
        for preset, found in settings.items()
    }


def _row(
    group: list[_Complete], measured: Setting, apart: Mapping[str, Sequence[str]], data: Mapping[str, object]
) -> Row:
    first = group[0]
    ours = shipped(first.preset)
    config = first.config
    changed = departures(config, ours) if ours is not None else {}
    own = effective(config)
    told = [*changed, *(key for key in apart[first.preset] if ours is None or (key == TEACHER and key not in changed))]
    # Runs may share all settings, and not the figure that some of them were told to leave out, or that was put right.
    newest = sorted(group, key=lambda run: run.begun, reverse=True)
    figures = [run.config if ours is not None else with_own_figures(run.config) for run in newest]
    published = next((one.published for one in figures if one.published), None)
    expected = next((one.expected for one in figures if one.expected), None)
    if ours is not None:  # whose figures are its own: a run may be older than these, or be of a file of the same name
        published, expected = published and ours.published, expected and ours.expected
    own_dataset = (ours or config).data.dataset
    top1 = list(measured.top1.values())
    mean = fmean(top1)
    comparable = config.data.dataset == own_dataset != "synthetic"
    delta = mean - published.top1 if published and comparable else None
    spread = noise.of_one_more(top1)
    departs = bool(changed or data)
    return Row(
        preset=first.preset,
        changes={**data, **{key: own[key] for key in told if key in own}},
        shipped={key: there for key, (_, there) in changed.items()},
        departs=departs,
        dataset=config.data.dataset,
        published_top1=published.top1 if published else None,
        published_epoch=published.epoch if published else None,
        expected_top1=expected.top1 if expected else None,
        expected_runs=expected.runs if expected else None,
        n=len(top1),
        top1_mean=mean,
        top1_std=noise.deviation(top1),
        test_loss_mean=fmean(ablation.by_seed([run.result for run in group], "loss").values()),
        delta=delta,
        noise=spread,
        within_noise=abs(delta) <= spread if delta is not None and spread is not None and not departs else None,
        select=config.train.select,
        epochs=config.train.epochs,
        best_epochs=[int(run.result["best"]["epoch"]) for run in group],
        seeds=[int(run.result["seed"]) for run in group],
        seconds_mean=fmean(run.result["seconds"] for run in group),
        images_per_second_mean=fmean(run.result["images_per_second"] for run in group),
        hardware=list(dict.fromkeys(run.hardware for run in group)),
        runs=[str(run.path) for run in group],
        unfreeze=config.finetune.unfreeze if config.finetune else None,
        fraction=config.data.fraction,
        teacher=config.distillation.teacher if config.distillation is not None else None,
        images=measured.images,
        curves=_curves(group),
    )


def _curves(group: Sequence[_Complete]) -> dict[str, list[float]]:
    """What every run has of every epoch, as means over the seeds: the runs of one seed count as one, their mean."""
    seeds = [int(run.result["seed"]) for run in group]
    shares = [1 / seeds.count(seed) for seed in seeds]
    found = {}
    for name in CURVES:
        lines = [[row.get(name) for row in run.metrics] for run in group]
        alike = len({len(line) for line in lines}) == 1 and lines[0]
        if alike and all(_is_number(value) for line in lines for value in line):
            found[name] = [fmean(values, shares) for values in zip(*lines, strict=True)]
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def outside_tolerance(report: Report, tolerance: float) -> list[str]:
    """A phrase for every row whose mean is further than `tolerance` percentage points from its figure."""
    return [
        f"{row.preset}{changed(row)}: {percent(row.top1_mean)} is {points(row.delta)} points from the published "
        f"{percent(row.published_top1)}, outside {tolerance:g}"
        for row in report.rows
        if row.delta is not None and abs(100 * row.delta) > tolerance + 1e-9
    ]


# ------------------------------------------------------------------------------------------ words and choices


def published_beside(row: Row) -> float | None:
    """The published figure, where the runs are of the images that it is about."""
    return row.published_top1 if row.delta is not None else None


def changed(row: Row | Pair | Ablation) -> str:
    """The settings that are not the preset's, for people."""
    if not row.changes:
        return ""
    return f" ({', '.join(f'{key}={setting(value)}' for key, value in row.changes.items())})"


def setting(value: object) -> str:
    """The value of a preset's key, for people."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def effect_name(effect: Effect) -> str:
    """The setting beside the base, for people: what it lacks, or what it has instead."""
    if effect.without:
        return f"no {effect.block}"
    if len(effect.changes) == 1:
        return f"{effect.block} = {setting(next(iter(effect.changes.values())))}"
    return f"with {effect.block}"


def judged(row: Row) -> str | None:
    """The accuracy that a setting is judged by, of those that were measured in every epoch: a name in its curves."""
    names = [f"{split}_top1" for split in (SPLIT_OF[row.select], "test", "val", "train") if split]
    return next((name for name in names if name in row.curves), None)


def study_rows(report: Report) -> list[Row]:
    """The rows of fine-tuning, from the least that was unfrozen to the most."""
    depths = ["fc", "layer4", "layer3", "all"]
    rows = [row for row in report.rows if row.unfreeze is not None]
    return sorted(rows, key=lambda row: (row.dataset, _index(depths, row.unfreeze), row.epochs, row.fraction))


def unfrozen(row: Row) -> str:
    """What of the network learned, for people; of another preset than the study's own, with its name."""
    of_the_study = row.preset.startswith(STUDY) and row.preset in preset_names()
    return str(row.unfreeze) if of_the_study else f"{row.unfreeze} ({row.preset})"


def _index(known: Sequence[str], name: str | None) -> int:
    return known.index(name) if name in known else len(known)


def published_cell(row: Row) -> float | None:
    """The study's figure for this very depth and these epochs."""
    return published_beside(row) if not row.shipped.keys() & CELL else None

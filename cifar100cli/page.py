"""The report as one HTML page: tables, curves, and what single runs get right and wrong. No torch here."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cifar100cli import __version__, analysis, charts, datasets, wording
from cifar100cli.ablation import Ablation
from cifar100cli.analysis import Confusion, Predictions
from cifar100cli.bounded import printable, read_file
from cifar100cli.card import Card, read_card
from cifar100cli.catalog import TITLES
from cifar100cli.charts import Bar, Line
from cifar100cli.config import LARGEST_PRESET
from cifar100cli.datasets import Split
from cifar100cli.display import counting
from cifar100cli.errors import CifarError, DataError
from cifar100cli.report import (
    SPLITS,
    Report,
    Row,
    effect_name,
    judged,
    published_beside,
    published_cell,
    setting,
    study_rows,
    unfrozen,
)
from cifar100cli.runs import CONFIG, MODEL, PREDICTIONS, RunDir
from cifar100cli.wording import PROTOCOLS, SPLIT_OF

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

TEMPLATE = "page.html.jinja"
DETAILED = 12  # runs with all their pictures, and settings with curves: a page of more is looked at by nobody
COMPARED = charts.SERIES  # curves in one chart
SEEDS = 10  # faint lines in a chart
MISTAKES, PAIRS, EXAMPLES = 16, 9, 4
LABEL = 28  # letters beside a bar
CELL = 5  # pixels of a class in the large confusion matrix

COLOURS = {"train": 0, "val": 1, "test": 2}


def render(report: Report, data_dir: Path | None = None) -> str:
    """The whole page. Example images come from `data_dir`, or from where a run found its data; else there are none."""
    chosen = _to_detail(report)
    charted = [row for row in report.rows if row.curves][:DETAILED]
    pictures = _Pictures(data_dir)
    with counting("report", len(chosen) + len(charted)) as advance:
        drawn = []
        for row in charted:
            drawn.append(_chart_row(row))
            advance(1)
        details = []
        for number, (row, run) in enumerate(chosen, start=1):
            details.append(_detail(row, run, f"run-{number}", pictures))
            advance(1)
    anchors = {detail["path"]: detail["anchor"] for detail in details}
    environment = _environment()
    environment.filters["anchor"] = lambda row: next((anchors[run] for run in row.runs if run in anchors), None)
    names = [name for name in TITLES if any(row.dataset == name for row in report.rows)]
    return environment.get_template(TEMPLATE).render(
        report=report,
        tables=[_table(name, [row for row in report.rows if row.dataset == name]) for name in names],
        ablations=[(found, _gains(found)) for found in report.ablations],
        study=study_rows(report),
        comparisons=[found for name in names if (found := _comparison(name, report.rows)) is not None],
        charted=drawn,
        details=details,
        left_out=len(drawn) < len(report.rows) or len(details) < sum(len(row.runs) for row in report.rows),
        most=DETAILED,
        protocols=PROTOCOLS,
        expected=wording.expected,
        titles=TITLES,
        version=__version__,
        today=date.today().isoformat(),
    )


def _environment() -> "Environment":
    """Jinja2 that escapes everything, and writes out what could not be printed."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )
    environment.filters |= {
        "percent": wording.percent,
        "points": wording.points,
        "duration": wording.duration,
        "setting": setting,
        "effect_name": effect_name,
        "published_beside": published_beside,
        "published_cell": published_cell,
        "unfrozen": unfrozen,
        "judged": judged,
        "images": _images,
        "spark": lambda row, name: charts.sparkline(row.curves[name], _images(name)) if name in row.curves else "",
        "loss": wording.loss,
        "mean": lambda row: (
            wording.percent(row.top1_mean) + ("" if row.top1_std is None else f" ± {100 * row.top1_std:.2f}")
        ),
    }
    return environment


def _images(name: str) -> str:
    """Those that a curve of this name is about, for people."""
    return SPLITS[name.partition("_")[0]]


def _table(name: str, rows: Sequence[Row]) -> dict[str, Any]:
    published = any(row.delta is not None for row in rows)
    return {"name": name, "title": TITLES.get(name, name), "rows": rows, "published": published}


def _to_detail(report: Report) -> list[tuple[Row, str]]:
    """Every run, if they are few; else the last of each setting, as far as there is room."""
    runs = [(row, run) for row in report.rows for run in row.runs]
    if len(runs) > DETAILED:
        runs = [(row, row.runs[-1]) for row in report.rows]
    return runs[:DETAILED]


# -------------------------------------------------------------------------------------------------- curves


def _gains(found: Ablation) -> "Markup":
    """What the blocks bring, as a chart."""
    bars = [
        Bar(
            _short(effect.block if effect.without else effect_name(effect)),
            effect.gain,
            effect.interval,
            effect.within_noise is not False,
        )
        for effect in found.effects
    ]
    return charts.gains(bars, f"What each block brings: {_name(found)}")


def _short(name: str) -> str:
    name = printable(name)
    return name if len(name) <= LABEL else name[: LABEL - 1] + "…"


def _name(row: Row | Ablation) -> str:
    changed = ", ".join(f"{key} = {setting(value)}" for key, value in row.changes.items())
    return row.preset + (f" ({changed})" if changed else "")


def _comparison(dataset: str, rows: Sequence[Row]) -> dict[str, Any] | None:
    """The curves of several settings in one chart; None for a single one."""
    measured = [(row, name) for row in rows if row.dataset == dataset and (name := judged(row)) is not None]
    if len(measured) < 2:
        return None
    title = TITLES.get(dataset, dataset)
    shown = measured[:COMPARED]
    losses = [name.replace("top1", "loss") for _, name in shown]
    found = [
        (
            "Accuracy, on the images that the legend names.",
            charts.curves(
                [Line(row.curves[name], number, number) for number, (row, name) in enumerate(shown)],
                f"{title}: accuracy by epoch of {len(shown)} settings",
                percent=True,
            ),
        ),
        (
            "Loss on the same images.",
            charts.curves(
                [
                    Line(row.curves[loss], number, number)
                    for number, ((row, _), loss) in enumerate(zip(shown, losses, strict=True))
                    if loss in row.curves
                ],
                f"{title}: loss by epoch of {len(shown)} settings",
                percent=False,
            ),
        ),
    ]
    return {
        "title": title,
        "legend": [
            (charts.swatch(number, number), f"{_name(row)}, {_images(name)}")
            for number, (row, name) in enumerate(shown)
        ],
        "charts": found,
        "note": f"The first {COMPARED} of {len(measured)} settings." if len(measured) > COMPARED else None,
    }


def _chart_row(row: Row) -> dict[str, Any]:
    """Accuracy and loss of a setting: its mean over the seeds, and each run, with the epoch that was chosen, if any."""
    seeds = [RunDir(Path(run)).metrics() for run in row.runs[:SEEDS]]
    chosen_by = f"{SPLIT_OF[row.select]}_top1"  # of a last epoch, which nothing chose, the name of no curve
    title = _name(row)
    found = []
    for figure, words in (("top1", "accuracy"), ("loss", "loss")):
        lines = []
        for split, colour in COLOURS.items():
            name = f"{split}_{figure}"
            if name not in row.curves:
                continue
            chosen = row.best_epochs if name == chosen_by else []
            if len(row.runs) == 1:
                lines.append(Line(row.curves[name], colour, best=chosen))
                continue
            lines.append(Line(row.curves[name], colour))
            for number, metrics in enumerate(seeds):
                best = chosen[number : number + 1]
                lines.append(Line([line[name] for line in metrics], colour, faint=True, best=best))
        caption = f"{words.capitalize()} by epoch" + (" (thin: single runs)." if len(row.runs) > 1 else ".")
        if figure == "top1" and chosen_by in row.curves:
            caption += " A circle marks the epoch that was chosen."
        drawn = charts.curves(
            lines,
            f"{title}: {words} by epoch",
            percent=figure == "top1",
            published=published_beside(row) if figure == "top1" else None,
        )
        found.append((caption, drawn))
    present = [split for split in COLOURS if any(name.startswith(split) for name in row.curves)]
    return {
        "title": title,
        "legend": [(charts.swatch(COLOURS[split]), SPLITS[split]) for split in present],
        "charts": found,
    }


# ------------------------------------------------------------------------------------------ runs in detail


@dataclass(frozen=True)
class Example:
    """A test image that was taken for something else; `source` is a data URI, or None where the images are not."""

    index: int
    true: str
    predicted: str
    confidence: float
    source: str | None


class _Pictures:
    """Test images, read once for each folder; where they are not at hand, the reason why."""

    def __init__(self, data_dir: Path | None) -> None:
        self._data_dir = data_dir
        self._known: dict[tuple[str, str], Split | str] = {}

    def of(self, run: RunDir, card: Card, predictions: Predictions) -> Split | str:
        """The images that the predictions are about, or why there are none."""
        folder = self._data_dir or Path(run.last_place("data_dir") or run.latest("data_dir") or ".")
        key = (card.dataset, str(folder))
        if key not in self._known:
            try:
                self._known[key] = datasets.load(card.dataset, folder).test
            except CifarError as error:
                self._known[key] = f"no example images: {error}"
        found = self._known[key]
        if isinstance(found, Split) and not np.array_equal(found.labels, predictions.true):
            return f"no example images: {folder} has other test images than the run was measured on"
        return found


def _detail(row: Row, path: str, anchor: str, pictures: _Pictures) -> dict[str, Any]:
    from markupsafe import escape

    run = RunDir(Path(path))
    result = run.result()
    test = result["test"]
    figures = [
        ("Test top-1", wording.percent(test["top1"])),
        ("Test top-5", wording.percent(test["top5"])),
        ("Test loss", wording.loss(test["loss"])),
        ("Calibration error", f"{test['ece']:.4f}"),
        ("Epoch", f"{result['best']['epoch']} of {result['epochs']}"),
        ("Chosen by", PROTOCOLS[row.select]),
        ("Time", wording.duration(result["seconds"])),
        ("Images a second", f"{result['images_per_second']:,.0f}"),
    ]
    view, missing = None, None
    try:
        card = read_card(run.path / MODEL)
        predictions = analysis.read_predictions(run.path / PREDICTIONS, card.classes)
        view = _view(card, predictions, pictures.of(run, card, predictions), f"{row.preset}, {path}")
    except (DataError, OSError) as error:
        missing = f"Classes, confusions and mistakes are not shown: {error}."
        if not (run.path / PREDICTIONS).exists():
            missing += f" This makes them: cifar100 evaluate {wording.argument(run.path)} "
            missing += f"--predictions {wording.argument(run.path / PREDICTIONS)}"
    return {
        "anchor": anchor,
        "path": path,
        "preset": row.preset,
        "seed": result["seed"],
        "figures": figures,
        "changes": _changes(row),
        "config": escape(read_file(run.path / CONFIG, LARGEST_PRESET).decode("utf-8", errors="replace")),
        "environment": list(_flat(run.environment())),
        "view": view,
        "missing": missing,
    }


def _changes(row: Row) -> dict[str, tuple[object, object]]:
    return {key: (row.changes[key], value) for key, value in row.shipped.items()}


def _flat(content: Mapping[str, Any], prefix: str = "") -> Sequence[tuple[str, str]]:
    """Nested names with dots, and values as text; what a list nests is numbered."""
    found: list[tuple[str, str]] = []
    for key, value in content.items():
        if isinstance(value, list) and any(isinstance(one, Mapping) for one in value):
            value = {str(number): one for number, one in enumerate(value, start=1)}
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{key}.")
        elif value is not None:
            found.append((f"{prefix}{key}", " ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return found


def _view(card: Card, predictions: Predictions, images: Split | str, title: str) -> dict[str, Any]:
    """What a model gets right and wrong, ready to be shown."""
    matrix = analysis.confusion_matrix(predictions.true, predictions.predicted, len(card.classes))
    bins = analysis.calibration(predictions)
    superclasses: list[tuple[str, float | None]] = []
    names, coarse = card.classes, matrix
    if card.superclass_of:
        group = np.array(card.superclass_of)
        names = card.superclasses
        coarse = analysis.confusion_matrix(group[predictions.true], group[predictions.predicted], len(names))
        superclasses = _sorted(names, analysis.accuracies(coarse))

    def example(index: int) -> Example:
        return Example(
            index,
            card.classes[predictions.true[index]],
            card.classes[predictions.predicted[index]],
            float(predictions.confidence[index]),
            None if isinstance(images, str) else _png(images.images[index].transpose(1, 2, 0)),
        )

    def examples(true: int, predicted: int) -> list[Example]:
        return [example(index) for index in analysis.mistaken(predictions, true, predicted, EXAMPLES)]

    def pair(found: Confusion) -> dict[str, Any]:
        ways = [(found.first, found.second, found.forth), (found.second, found.first, found.back)]
        return {
            "first": card.classes[found.first],
            "second": card.classes[found.second],
            "count": found.count,
            "ways": [(card.classes[a], card.classes[b], count, examples(a, b)) for a, b, count in ways],
        }

    return {
        "note": images if isinstance(images, str) else None,
        "calibration": charts.calibration(bins, f"Calibration of {title}"),
        "ece": analysis.calibration_error(bins),
        "classes": _sorted(card.classes, analysis.accuracies(matrix)),
        "superclasses": superclasses,
        "matrix_names": names,
        "matrix": _shares(coarse).tolist(),
        "picture": _matrix_picture(matrix, card.superclass_of) if len(card.classes) > len(names) else None,
        "confused": [pair(found) for found in analysis.most_confused(matrix, PAIRS)],
        "mistakes": [example(index) for index in analysis.surest_mistakes(predictions, MISTAKES)],
    }


def _sorted(names: Sequence[str], shares: Sequence[float | None]) -> list[tuple[str, float | None]]:
    return sorted(zip(names, shares, strict=True), key=lambda one: (-(one[1] if one[1] is not None else -1), one[0]))


def _shares(matrix: NDArray[np.int64]) -> NDArray[np.float64]:
    """Of each row's images; zero where there are none."""
    shares: NDArray[np.float64] = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    return shares


def _matrix_picture(matrix: NDArray[np.int64], superclass_of: Sequence[int]) -> dict[str, Any]:
    """The matrix of all classes, in the order of their superclasses, with a line between two superclasses."""
    group = np.array(superclass_of)
    order = np.argsort(group, kind="stable")
    strength = np.sqrt(_shares(matrix)[np.ix_(order, order)])[..., None]  # a root, or rare mistakes would be invisible
    colours = (np.array([255, 255, 255]) * (1 - strength) + np.array([11, 60, 130]) * strength).round()
    large = colours.repeat(CELL, axis=0).repeat(CELL, axis=1)
    borders = CELL * (np.flatnonzero(np.diff(group[order])) + 1)
    large[borders] = large[:, borders] = [205, 211, 217]
    return {"source": _png(large.astype(np.uint8)), "side": len(large)}


def _png(pixels: NDArray[np.uint8]) -> str:
    """An image (height, width, 3) as a data URI."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

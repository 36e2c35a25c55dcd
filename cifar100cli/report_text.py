"""The report as text: for a terminal, as Markdown, CSV or JSON."""

import csv
import io
import re
from collections.abc import Container, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from cifar100cli import console, wording
from cifar100cli.ablation import Ablation, Effect
from cifar100cli.bounded import printable
from cifar100cli.catalog import TITLES
from cifar100cli.errors import UsageError
from cifar100cli.report import (
    SPLITS,
    Pair,
    Report,
    Row,
    changed,
    effect_name,
    judged,
    published_beside,
    published_cell,
    setting,
    study_rows,
    unfrozen,
)
from cifar100cli.wording import PROTOCOLS, percent, points, spread

FORMATS = {".html": "html", ".md": "markdown", ".csv": "csv", ".json": "json", ".txt": "table"}
COLUMNS = ("preset", "published", "ours", "deviation", "difference", "n", "epochs", "chosen by", "data set")
CURVE_COLUMNS = ("preset", "images", "first", "curve", "last", "best")
PAIR_COLUMNS = ("preset", "as in the tutorial", "repaired", "gain")
ABLATION_COLUMNS = ("setting", "n", "top-1", "gain", "95% interval", "")
STUDY_COLUMNS = ("unfrozen", "epochs", "images", "published", "ours", "train, last", "test loss", "test by epoch")
OPTIMISTIC = "best on test: the epoch was chosen on the test set itself, as the tutorial does: optimistic."


def format_of(out: Path | None, *, json: bool) -> str:
    """The format that a file's name asks for; with `json`, a name that asks for none is for JSON."""
    if json and (out is None or out.suffix.lower() not in FORMATS):
        return "json"
    if out is None:
        return "table"
    if out.suffix.lower() not in FORMATS:
        raise UsageError(f"--out {out}: say the --format, or end the name in one of {', '.join(FORMATS)}")
    return FORMATS[out.suffix.lower()]


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.preset + changed(row),
        percent(published_beside(row)),
        percent(row.top1_mean),
        "-" if row.top1_std is None else f"{100 * row.top1_std:.2f}",
        points(row.delta),
        str(row.n),
        str(row.epochs),
        PROTOCOLS[row.select],
        "synthetic (drawn)" if row.dataset == "synthetic" else row.dataset,
    )


def _pair_cells(pair: Pair, changed: str) -> tuple[str, ...]:
    return (
        pair.preset + changed,
        f"{percent(pair.top1)}, {PROTOCOLS[pair.select]}",
        f"{percent(pair.fixed_top1)}, {PROTOCOLS[pair.fixed_select]}",
        points(pair.gain),
    )


def _study_cells(row: Row, mark: str) -> tuple[str, ...]:
    chosen = f", {PROTOCOLS[row.select]}" if row.select == "best_test" else ""
    losses = row.curves.get("train_loss")
    return (
        unfrozen(row) + mark,
        str(row.epochs),
        f"{100 * row.fraction:g}%",
        percent(published_cell(row)),
        f"{percent(row.top1_mean)}{spread(row.top1_std)}{chosen}",
        wording.loss(losses[-1]) if losses else "-",
        wording.loss(row.test_loss_mean),
        sparkline(row.curves.get("test_top1", [])),
    )


def _ablation_cells(found: Ablation) -> list[tuple[str, ...]]:
    """The base and the settings around it; accuracies in per cent, gains in points."""
    base = ("as it is", str(found.n), _with_deviation(found.top1_mean, found.top1_std), "-", "-", "")
    return [base, *map(_effect_cells, found.effects)]


def _effect_cells(effect: Effect) -> tuple[str, ...]:
    low_high = "-" if effect.interval is None else " to ".join(map(points, effect.interval))
    unknown = "one seed" if effect.gain_error is None else "no spread"
    verdict = {True: "within noise", False: "", None: unknown}[effect.within_noise]
    return (
        effect_name(effect),
        str(effect.n),
        _with_deviation(effect.top1_mean, effect.top1_std),
        f"{points(effect.gain)}{spread(effect.gain_error)}",
        low_high,
        verdict,
    )


def _with_deviation(mean: float, deviation: float | None) -> str:
    return f"{100 * mean:.2f}{spread(deviation)}"


def _ablation_title(found: Ablation, changes: str) -> str:
    dataset = TITLES.get(found.dataset, found.dataset)
    return f"What each block brings: {found.preset}{changes}, {dataset} ({PROTOCOLS[found.select]})"


def _study_title(dataset: str) -> str:
    return f"How far to unfreeze, on {TITLES.get(dataset, dataset)}"


def show_ablation(found: Ablation, changes: str) -> None:
    """A table of what each block brings; `changes` says where the base is not the preset as shipped."""
    console.table(_ablation_title(found, changes), ABLATION_COLUMNS, _ablation_cells(found), right=range(1, 5))


def ablation_notes(ablations: Sequence[Ablation]) -> list[str]:
    """How to read such tables."""
    effects = [effect for found in ablations for effect in found.effects]
    if not effects:
        return []
    notes = [
        "gain: what a block, or the value that is named, adds to top-1, in points, ± its standard error"
        + (", from the differences within each seed." if all(e.paired for e in effects) else ".")
    ]
    if any(effect.paired and effect.seeds != found.seeds for found in ablations for effect in found.effects):
        notes.append("where two settings have not the same seeds, the gain is that of the seeds that both have.")
    if any(effect.within_noise for effect in effects):
        notes.append("within noise: the interval holds zero; more --seeds would tell.")
    if any(effect.interval is None and effect.gain_error is not None for effect in effects):
        notes.append("no spread: every seed gained the same number of images, which says nothing of noise.")
    if any(effect.gain_error is None for effect in effects):
        notes.append("one seed: nothing can be said of noise; --seeds 3 would tell.")
    return notes


def sparkline(values: Sequence[float], width: int = 16) -> str:
    """A curve in one line of text, from its lowest to its highest value; in digits where stdout is not in UTF-8."""
    if not values:
        return "-"
    step = max(1.0, len(values) / width)
    taken = [values[min(len(values) - 1, int((index + 1) * step) - 1)] for index in range(min(width, len(values)))]
    low, high = min(values), max(values)
    bars = "▁▂▃▄▅▆▇█" if console.takes_unicode() else "12345678"
    return "".join(bars[round((value - low) / ((high - low) or 1) * (len(bars) - 1))] for value in taken)


def _notes(report: Report) -> list[str]:
    notes = []
    if any(row.select == "best_test" for row in report.rows):
        notes.append(OPTIMISTIC)
    if any(row.dataset == "synthetic" for row in report.rows):
        notes.append("synthetic: drawn shapes; these figures say nothing about CIFAR-100.")
    notes += [
        f"{row.preset}: expected {wording.expected(row.expected_top1, row.expected_runs)}."
        for row in report.rows
        if row.expected_top1 is not None and not row.departs
    ]
    if any(len(row.runs) > row.n for row in report.rows):
        notes.append("n counts seeds: several runs of one seed, or copies of one run, count as one, their mean.")
    if any(row.changes for row in report.rows):
        notes.append(
            "in brackets: settings that differ from the preset's, or between rows; published figures are of the "
            "preset's own."
        )
    return notes + ablation_notes(report.ablations)


def render(report: Report, form: str) -> str:
    """The report as Markdown, CSV, JSON, or the table of a terminal."""
    if form == "table":
        with console.captured() as written:
            show_table(report)
        return written.getvalue()
    if form == "json":
        content = {
            "rows": [asdict(row) for row in report.rows],
            "pairs": [asdict(pair) for pair in report.pairs],
            "ablations": [asdict(found) for found in report.ablations],
            "unusable": [asdict(u) for u in report.unusable],
        }
        return console.json_text(content) + "\n"
    if form == "csv":
        return _csv(report)
    return _markdown(report)


def _markdown(report: Report) -> str:
    lines = _markdown_table(COLUMNS, map(_cells, report.rows), right=range(1, 7))
    if report.pairs:
        cells = [_pair_cells(pair, changed(pair)) for pair in report.pairs]
        lines += ["", *_markdown_table(PAIR_COLUMNS, cells, right=range(1, 4))]
    for found in report.ablations:
        lines += ["", _escape(_ablation_title(found, changed(found))), ""]
        lines += _markdown_table(ABLATION_COLUMNS, _ablation_cells(found), right=range(1, 5))
    for dataset, study in _by_dataset(study_rows(report)):
        cells = [_study_cells(row, changed(row)) for row in study]
        lines += ["", _escape(_study_title(dataset)), ""]
        lines += _markdown_table(STUDY_COLUMNS, cells, right=range(1, 7))
    notes = [*_notes(report), *(f"not counted: {u.run}: {u.reason}" for u in report.unusable)]
    lines += ["", *(f"- {_escape(note)}" for note in notes)]
    return "\n".join(lines).rstrip() + "\n"


def _markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]], right: Container[int]) -> list[str]:
    """Lines of a table; `right` says which columns stand at the right, as numbers do."""
    edges = ["---:" if index in right else "---" for index in range(len(columns))]
    body = ["| " + " | ".join(map(_escape, cells)) + " |" for cells in rows]
    return ["| " + " | ".join(columns) + " |", "|" + "|".join(edges) + "|", *body]


def _csv(report: Report) -> str:
    buffer = io.StringIO()
    lists = ("changes", "shipped", "runs", "seeds", "best_epochs", "curves", "hardware")
    names = [name for name in Row.__dataclass_fields__ if name not in lists]
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*names, "changes", "seeds", "best_epochs", "hardware", "runs"])
    for row in report.rows:
        cells = [
            *("" if getattr(row, name) is None else getattr(row, name) for name in names),
            " ".join(f"{key}={setting(value)}" for key, value in row.changes.items()),
            *(" ".join(map(str, values)) for values in (row.seeds, row.best_epochs)),
            "; ".join(row.hardware),
            "; ".join(row.runs),
        ]
        writer.writerow([_text(cell) if isinstance(cell, str) else cell for cell in cells])
    return buffer.getvalue()


def _text(cell: str) -> str:
    """Text that a spreadsheet takes for text, and for no formula."""
    return f"'{printable(cell)}" if cell.startswith(("=", "+", "-", "@")) else printable(cell)


def _escape(text: str) -> str:
    """Text from outside, in Markdown: it ends no cell, and is no HTML, picture, code, or link under a name."""
    return re.sub(r"([\\|\[`])", r"\\\1", printable(text)).replace("<", "&lt;")


def show_table(report: Report) -> None:
    """Print the report for people: a table for each data set, narrow enough for 80 columns."""
    if not report.rows:
        console.result("there is no complete run here yet; `cifar100 train` makes one")
    changes = list(dict.fromkeys(changed(row) for row in report.rows if row.changes))
    letters = {settings: _letters(index) for index, settings in enumerate(changes)}
    for dataset, rows in _by_dataset(report.rows):
        console.table(
            f"{TITLES.get(dataset, dataset)}: top-1 on the test set, in %",
            ("preset", "published", "ours", "diff", "n", "epochs", "chosen by"),
            [_narrow(row, letters.get(changed(row))) for row in rows],
            right=range(1, 6),
        )
    for dataset, rows in _by_dataset([row for row in report.rows if judged(row)]):
        cells = [_curve_cells(row, letters.get(changed(row))) for row in rows]
        console.table(f"{TITLES.get(dataset, dataset)}: accuracy by epoch", CURVE_COLUMNS, cells, right=(2, 4, 5))
    if report.pairs:
        console.table(
            "Side by side: normalised, cosine schedule, crop and flip, chosen on held-out images",
            PAIR_COLUMNS,
            [_pair_cells(pair, _bracketed(letters.get(changed(pair)))) for pair in report.pairs],
            right=range(1, 4),
        )
    for found in report.ablations:
        show_ablation(found, _bracketed(letters.get(changed(found))))
    for dataset, study in _by_dataset(study_rows(report)):
        console.table(
            _study_title(dataset),
            STUDY_COLUMNS,
            [_study_cells(row, _bracketed(letters.get(changed(row)))) for row in study],
            right=range(1, 7),
        )
    for settings, letter in letters.items():
        console.result(f"[{letter}] {settings[2:-1]}")
    for note in _notes(report):
        console.result(note)
    for unusable in report.unusable:
        console.result(f"not counted: {unusable.run}: {unusable.reason}")


def _by_dataset(rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    parts: dict[str, list[Row]] = {}
    for row in rows:
        parts.setdefault(row.dataset, []).append(row)
    return list(parts.items())


def _curve_cells(row: Row, letter: str | None) -> tuple[str, ...]:
    name = judged(row) or ""
    values = row.curves[name]
    best = max(range(len(values)), key=values.__getitem__)
    # The highest accuracy on the test set is no figure of a run that was not chosen by it.
    claimed = name != "test_top1" or row.select == "best_test"
    return (
        row.preset + _bracketed(letter),
        SPLITS[name.partition("_")[0]],
        f"{100 * values[0]:.2f}",
        sparkline(values),
        f"{100 * values[-1]:.2f}",
        f"{100 * values[best]:.2f} @{best + 1}" if claimed else "-",
    )


def _bracketed(letter: str | None) -> str:
    return f" [{letter}]" if letter else ""


def _narrow(row: Row, letter: str | None) -> tuple[str, ...]:
    return (
        row.preset + _bracketed(letter),
        "-" if (published := published_beside(row)) is None else f"{100 * published:.2f}",
        _with_deviation(row.top1_mean, row.top1_std),
        points(row.delta),
        str(row.n),
        str(row.epochs),
        PROTOCOLS[row.select],
    )


def _letters(index: int) -> str:
    """a, b, ..., z, aa, ab, ..."""
    return (_letters(index // 26 - 1) if index >= 26 else "") + chr(ord("a") + index % 26)

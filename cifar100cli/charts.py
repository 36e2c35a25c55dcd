"""Charts as SVG for the report's page. Their colours are CSS variables of the page, so that they follow its theme."""

import contextlib
import io
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from cifar100cli.analysis import Bin
from cifar100cli.bounded import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SERIES = 10  # colours that the page has for lines
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
INK, FAINT = "#010203", "#010204"  # stand-ins, which no colour of a chart is, for variables
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: it can be read aloud, found, and is small
    "text.parse_math": False,
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Line:
    """A curve by epoch, from epoch 1. `series` is its colour; `faint` is for single seeds; `best` are marked epochs."""

    values: Sequence[float]
    series: int
    dash: int = 0
    faint: bool = False
    best: Sequence[int] = ()


def swatch(series: int, dash: int = 0) -> Markup:
    """A piece of such a line, for a legend."""
    pattern = DASHES[dash % len(DASHES)]
    array = "" if isinstance(pattern, str) else ' stroke-dasharray="' + " ".join(str(2 * x) for x in pattern[1]) + '"'
    return Markup(
        '<svg class="swatch" width="28" height="8" viewBox="0 0 28 8" aria-hidden="true">'
        f'<path d="M1 4H27" style="stroke: var(--series-{series % SERIES})" stroke-width="2.5"{array}/></svg>'
    )


def sparkline(values: Sequence[float], images: str) -> Markup:
    """A curve of the accuracy on some images, without axes, as small as a word; nothing for fewer than two values."""
    if len(values) < 2:
        return Markup("")
    low, high = min(values), max(values)
    points = " ".join(
        f"{1 + 78 * index / (len(values) - 1):.1f},{17 - 14 * (value - low) / ((high - low) or 1):.1f}"
        for index, value in enumerate(values)
    )
    words = f"{images} accuracy from {100 * values[0]:.1f}% to {100 * values[-1]:.1f}% over {len(values)} epochs"
    return Markup(
        f'<svg class="spark" width="80" height="20" viewBox="0 0 80 20" role="img" aria-label="{words}">'
        f'<polyline points="{points}" fill="none" style="stroke: var(--accent)" stroke-width="1.5"/></svg>'
    )


def curves(lines: Sequence[Line], title: str, *, percent: bool, published: float | None = None) -> Markup:
    """Losses, or accuracies (fractions, shown in percent), by epoch."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _canvas()
    for line in lines:
        epochs = range(1, len(line.values) + 1)
        axes.plot(
            epochs,
            line.values,
            color=_series(line.series),
            linestyle=DASHES[line.dash % len(DASHES)],
            linewidth=0.6 if line.faint else 1.6,
            marker="o" if len(line.values) < 3 else None,
            markersize=3,
        )
        marked = [epoch for epoch in line.best if 1 <= epoch <= len(line.values)]
        axes.plot(
            marked,
            [line.values[epoch - 1] for epoch in marked],
            linestyle="",
            marker="o",
            markersize=6,
            markerfacecolor="none",
            markeredgecolor=_series(line.series),
            markeredgewidth=1.4,
        )
    if published is not None:
        axes.axhline(published, color=INK, linewidth=1, linestyle=(0, (2, 2)))
        axes.annotate(
            f"published {100 * published:.2f}%",
            (0, published),
            xycoords=("axes fraction", "data"),
            xytext=(3, 3),
            textcoords="offset points",
            fontsize=8,
            color=INK,
        )
        axes.margins(y=0.12)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.set_xlabel("epoch")
    if percent:
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    return _svg(figure, title)


@dataclass(frozen=True)
class Bar:
    """A gain (a fraction) under its name, with what it lies between; `faint` where that may be nothing."""

    name: str
    value: float
    interval: tuple[float, float] | None = None
    faint: bool = False


def gains(bars: Sequence[Bar], title: str) -> Markup:
    """Gains in percentage points as bars from top to bottom, with their intervals as whiskers."""
    figure, axes = _canvas(height=0.7 + 0.32 * len(bars))
    places = range(len(bars))
    # Pale enough for a whisker to be seen on it, in the dark theme too.
    colours = [FAINT if bar.faint else (_series(0), 0.65) for bar in bars]
    axes.barh(places, [100 * bar.value for bar in bars], height=0.62, color=colours)
    for place, bar in zip(places, bars, strict=True):
        if bar.interval is not None:
            low, high = (100 * edge for edge in bar.interval)
            axes.errorbar(
                100 * bar.value,
                place,
                xerr=[[100 * bar.value - low], [high - 100 * bar.value]],
                color=INK,
                linewidth=1.2,
                capsize=3,
            )
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_yticks(places, [bar.name for bar in bars])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("points of top-1")
    return _svg(figure, title)


def calibration(bins: Sequence[Bin], title: str) -> Markup:
    """The accuracy of predictions beside their confidence, with the share of images in each bin."""
    from matplotlib.ticker import PercentFormatter

    figure, axes = _canvas(height=3.0)
    total = sum(one.count for one in bins) or 1
    width = bins[0].high - bins[0].low
    middles = [(one.low + one.high) / 2 for one in bins]
    axes.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle=(0, (2, 2)))
    axes.bar(middles, [one.count / total for one in bins], width * 0.9, color=FAINT, label="share of images")
    known = [(middle, one.accuracy) for middle, one in zip(middles, bins, strict=True) if one.accuracy is not None]
    axes.plot(*zip(*known, strict=True), color=_series(0), linewidth=1.6, marker="o", markersize=4)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("confidence")
    axes.set_ylabel("accuracy")
    return _svg(figure, title)


def _canvas(height: float = 2.6) -> tuple[Any, "Axes"]:
    with _style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4.2, height), layout="constrained")
        return figure, figure.add_subplot()


@contextlib.contextmanager
def _style(salt: str = "") -> Iterator[None]:
    """Our look, whatever the user's matplotlibrc says; the salt makes the ids of two charts on a page differ."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells of font caches, which are nobody's business
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE | {"svg.hashsalt": salt})
        yield


def _series(number: int) -> str:
    return f"#0102{16 + number % SERIES:02x}"


def _svg(figure: Any, title: str) -> Markup:
    """Inline SVG with the page's colours; `title` is its text for those who do not see it."""
    buffer, title = io.StringIO(), printable(title)  # a folder's name need not be text
    with _style(salt=title):
        unsaid = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=unsaid)
    text = buffer.getvalue()
    text = re.sub(r"<(metadata|style|clipPath)\b.*?</\1>", "", text[text.index("<svg") :], flags=re.DOTALL)
    # Ids would have to be unique on the page; nothing is drawn outside its axes, so that nothing needs to be clipped.
    text = re.sub(r' xmlns:xlink="[^"]*"|(?<=<g) id="[^"]*"| clip-path="[^"]*"| font-family: [^;]*;', "", text)
    text = re.sub(r"#0102(\w\w)", lambda found: f"var({_variable(found[1])})", text)
    return Markup(text.replace("<svg ", f'<svg class="chart" role="img" aria-label="{escape(title)}" ', 1))


def _variable(code: str) -> str:
    named = {INK[-2:]: "--ink", FAINT[-2:]: "--faint"}
    return named.get(code) or f"--series-{int(code, 16) - 16}"

"""The report as a page: what it says, that it is one well-formed file, and what a browser makes of it."""

import base64
import io
import itertools
import json
import os
import re
import shlex
import shutil
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from cifar100cli import charts, page, report, runs, synthetic
from cifar100cli.datasets import load
from tests.conftest import TINY, Cli
from tests.test_report import make_run

VOID = {"meta", "link", "br", "img", "input"}


class Page(HTMLParser):
    """A page taken apart; refuses tags that do not match, and tables whose cells are not under their headers."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.table: list[list[str]] = []  # row by row, what a cell says it is; of the header, its words
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.table = []
        elif tag == "tr":
            self.table.append([])
        elif tag in ("td", "th"):
            self.table[-1].append(self.elements[-1][1].get("data-label", ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "table":
            heads, *rows = self.table
            for cells in rows:
                assert len(cells) == len(heads)
                assert all(label in ("", head) for label, head in zip(cells, heads, strict=True)), (heads, cells)

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)
        if "thead" in self.open and "th" in self.open:
            self.table[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def rendered(*folders: Path) -> Page:
    return Page(page.render(report.collect(folders)))


@pytest.fixture
def trained(run_cli: Cli, small_synthetic: synthetic.Drawn) -> dict[str, Any]:
    """A run on drawn images, and what `evaluate` says of it."""
    outcome = run_cli("train", *TINY, "--epochs", "2", "--set", "data.image_size=32", "--json")
    assert outcome.code == 0, outcome.err
    run = json.loads(outcome.out)["run_dir"]
    measured: dict[str, Any] = json.loads(run_cli("evaluate", run, "--predictions", "again.csv", "--json").out)
    return {"run": Path(run), **measured}


def test_a_run_keeps_its_predictions(trained: dict[str, Any]) -> None:
    assert (trained["run"] / runs.PREDICTIONS).read_bytes() == Path("again.csv").read_bytes()


def test_a_run_in_detail(trained: dict[str, Any], run_cli: Cli) -> None:
    outcome = run_cli("report", "--out", "report.html")
    assert (outcome.code, outcome.out) == (0, "")
    found = Page(Path("report.html").read_text(encoding="utf-8"))
    for figure in ("top1", "top5"):
        assert f"{100 * trained[figure]:.2f}%" in found.text
    for name, top1 in trained["per_class"].items():
        assert f"{name} {100 * top1:.1f}%" in found.text
    assert f"Calibration error (ECE): {trained['ece']:.4f}" in found.text
    first = trained["confusions"][0]
    assert f"{first['true']} taken for {first['predicted']}: {first['count']}" in found.text
    assert "train.epochs 2 10" in found.text, "what differs from the preset"
    assert "backbone: test_resnet" in found.text, "the resolved configuration"
    assert "say nothing about CIFAR-100" in found.text
    assert run_cli("report", "--format", "html").out == Path("report.html").read_text(encoding="utf-8")


def test_example_images_are_the_test_images(trained: dict[str, Any]) -> None:
    images = load("synthetic", Path()).test
    found = rendered(trained["run"])
    check_examples(found, images.images, least=10)


def check_examples(found: Page, images: NDArray[np.uint8], least: int) -> None:
    """Each example is the test image that it says it is, to the last bit."""
    examples = [image for image in found.all("img") if image["alt"].startswith("test image")]
    assert len(examples) >= least
    for example in examples:
        index = int(re.findall(r"\d+", example["alt"])[0])
        pixels = Image.open(io.BytesIO(base64.b64decode(example["src"].partition(",")[2])))
        assert np.array_equal(np.asarray(pixels), images[index].transpose(1, 2, 0))


def test_other_images_are_not_shown(
    trained: dict[str, Any], small_synthetic: synthetic.Drawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = small_synthetic.test
    others = replace(small_synthetic, test=(images[::-1], labels[::-1]))
    monkeypatch.setattr(synthetic, "draw", lambda: others)
    found = rendered(trained["run"])
    assert "other test images" in found.text
    assert not [image for image in found.all("img") if image["alt"].startswith("test image")]
    assert "taken for" in found.text


def test_without_predictions_it_says_how_to_get_them(trained: dict[str, Any], run_cli: Cli, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained["run"], tmp_path / "my runs" / "one"))
    predictions = run / runs.PREDICTIONS
    predictions.unlink()
    found = rendered(run)
    (command,) = re.findall(r"cifar100 (evaluate .* --predictions '.*?')", found.text)
    outcome = run_cli(*shlex.split(command))
    assert outcome.code == 0, outcome.err
    assert "taken for" in rendered(run).text
    predictions.write_text("index,true,predicted,confidence,correct\n0,x,y,0.5,0\n")
    assert "broken near line" in rendered(run).text


def check_form(found: Page) -> None:
    """Complete in itself and accessible: sizes, texts, headings in order, heads of tables, ids that are unique."""
    for tag, attributes in found.elements:
        for name in ("src", "href", "action", "data", "poster"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
    assert all(image["alt"] and int(image["width"]) and int(image["height"]) for image in found.all("img"))
    assert all(image.get("aria-label") or image.get("aria-hidden") for image in found.all("svg"))
    assert all(cell.get("scope") for cell in found.all("th"))
    levels = [int(tag[1]) for tag, _ in found.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    ids = Counter(attributes["id"] for tag, attributes in found.elements if "id" in attributes and tag != "path")
    assert set(ids.values()) <= {1}
    targets = {link["href"][1:] for link in found.all("a")}
    assert targets <= set(ids)


def test_form(trained: dict[str, Any], tmp_path: Path) -> None:
    root = trained["run"].parents[1]
    for seed in range(3):
        make_run(root, "resnet18-baseline", 0.44, seed=seed)
    make_run(root, "resnet18-baseline-fixed", 0.5)
    make_run(root, "finetune-layer4", 0.9)
    (root / "broken").mkdir()
    (root / "broken" / runs.RESULT).write_text("{")
    found = rendered(root)
    check_form(found)
    for words in ("As in the tutorial, and repaired", "How far to unfreeze", "91.33%", "not a run folder"):
        assert words in found.text


def test_everything_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('$x$')</script>&\"'"
    run = make_run(tmp_path, "resnet18-baseline", 0.44, model__weights=evil, model__pretrained=True)
    other = make_run(tmp_path, "resnet18-baseline", 0.44)
    environment = json.loads((run.path / runs.ENVIRONMENT).read_text())
    for one, device in ((run, evil), (other, "plain")):
        content = {**environment, "preset": evil, "device_name": device, evil: [evil], "command": {"a": evil}}
        content["resumed"] = [{"device": evil}]
        (one.path / runs.ENVIRONMENT).write_text(json.dumps(content))
    (tmp_path / "<b>x").mkdir()
    (tmp_path / "<b>x" / runs.RESULT).write_text("{}")
    found = rendered(tmp_path)
    check_form(found)
    assert len(found.all("script")) == 1
    assert not found.all("b")
    assert evil in found.text
    assert "resumed.1.device" in found.text
    assert "<b>x" in found.text


def test_within_noise(tmp_path: Path) -> None:
    """Against SciPy's Student's t; the published figure is that of one run."""
    from scipy import stats

    figures = [0.44, 0.45, 0.43]
    for seed, top1 in enumerate(figures):
        make_run(tmp_path, "resnet18-baseline", top1, seed)
    make_run(tmp_path, "resnet18-wd01", 0.2)
    for seed in range(2):
        make_run(tmp_path, "resnet18-lbsmooth", 0.45, seed)
    row, single, alike = (
        next(row for row in report.collect([tmp_path]).rows if row.preset == name)
        for name in ("resnet18-baseline", "resnet18-wd01", "resnet18-lbsmooth")
    )
    half = stats.t.ppf(0.975, 2) * np.std(figures, ddof=1) * np.sqrt(1 + 1 / 3)
    assert row.noise == pytest.approx(half, rel=1e-3)
    assert (row.within_noise, single.within_noise, single.noise) == (True, None, None)
    text = rendered(tmp_path).text
    assert f"within noise (± {100 * half:.2f})" in text.replace("\u202f", " ")
    assert "one seed: noise unknown" in text
    assert (alike.n, alike.within_noise, alike.noise) == (2, None, None)  # no interval is too narrow for anything else
    assert "no spread: noise unknown" in text


def test_only_what_was_chosen_is_a_best_epoch(tmp_path: Path) -> None:
    for select, told in (("last", False), ("best_test", True)):
        make_run(tmp_path / select, "resnet18-baseline", 0.44, train__select=select)
        assert ("200 best 7" in rendered(tmp_path / select).text) == told


@pytest.mark.parametrize(
    ("preset", "measured", "told"),
    [
        ("resnet18-baseline", ("test",), True),
        ("resnet18-baseline-fixed", ("val",), True),
        ("resnet18-baseline-fixed", (), False),
        ("finetune-layer4", ("test",), False),  # watched, and nothing chosen by it
    ],
)
def test_only_an_epoch_that_was_chosen_has_a_circle(
    tmp_path: Path, preset: str, measured: tuple[str, ...], told: bool
) -> None:
    run = make_run(tmp_path, preset, 0.5)
    run.forget_after(0)
    for epoch in range(1, 9):
        accuracies = {f"{split}_top1": epoch / 10 for split in ("train", *measured)}
        run.append_metrics({"epoch": epoch, "train_loss": 1, "seconds": 1, "images_per_second": 1, **accuracies})
    (row,) = report.collect([tmp_path]).rows
    (caption, chart), _ = page._chart_row(row)["charts"]
    assert ("A circle marks the epoch that was chosen" in caption) == told
    assert len(re.findall(r"<use [^>]*fill-opacity: 0;", chart)) == told


def test_a_curve_names_its_images(tmp_path: Path) -> None:
    """Beside the results those that a run was judged by; in the study of unfreezing those of the test set, or none."""
    measured: dict[str, dict[str, tuple[float, float]]] = {
        "finetune-layer4": {"test_top1": (0.2, 0.5)},
        "resnet18-baseline-fixed": {"val_top1": (0.3, 0.6)},
        "finetune-fc": {},
    }
    for preset, curves in measured.items():
        run = make_run(tmp_path, preset, 0.5)
        run.forget_after(0)
        for epoch, train in enumerate((0.7, 0.9)):
            line = {"epoch": epoch + 1, "train_loss": 1, "train_top1": train, "seconds": 1, "images_per_second": 1}
            run.append_metrics({**line, **{name: values[epoch] for name, values in curves.items()}})
    found = rendered(tmp_path)
    check_form(found)
    drawn = [svg["aria-label"].partition(" over ")[0] for svg in found.all("svg") if svg.get("class") == "spark"]
    test = "test accuracy from 20.0% to 50.0%"
    results = {test, "held-out accuracy from 30.0% to 60.0%", "training accuracy from 70.0% to 90.0%"}
    assert (set(drawn[:3]), drawn[3:]) == (results, [test]), "those of the results, and of the study"
    assert "The curve is by epoch, on the images that it names" in found.text


def test_many_runs_are_one_page(tmp_path: Path) -> None:
    for number in range(40):
        make_run(tmp_path, "resnet18-baseline", 0.44, train__epochs=number + 1)
    found = rendered(tmp_path)
    results = [table for table in found.all("table") if "results" in table.get("class", "")]
    assert len(results) == 1
    assert found.text.count("train.epochs =") >= 39
    assert len(found.all("article")) == page.DETAILED
    assert found.all("input")
    assert f"for {page.DETAILED} settings at most" in found.text


def test_runs_are_counted_and_those_without_details_told(tmp_path: Path) -> None:
    for seed in (*range(7), 0):
        make_run(tmp_path, "resnet18-baseline", 0.44, seed)
        make_run(tmp_path, "resnet18-augment", 0.40, seed)
    found = rendered(tmp_path)
    assert "16 complete runs in 2 settings" in found.text
    assert len(found.all("article")) == 2
    assert f"details of {page.DETAILED} runs, the last of each setting" in found.text


def test_no_runs(tmp_path: Path) -> None:
    found = rendered(tmp_path)
    check_form(found)
    assert "no complete run" in found.text


def test_lines_hold_their_numbers() -> None:
    """Where a point of a chart is, is where its number says, read off the axis' own ticks."""
    drawn = str(charts.curves([charts.Line([0.2, 0.6, 0.4], 1)], "A < B", percent=True))
    assert "A &lt; B" in drawn
    (path,) = re.findall(r'<path d="(M [^"]+)"[^>]*stroke: var\(--series-1\)', drawn)
    points = np.array(re.findall(r"[ML] (\S+) (\S+)", path), float)
    ticks = {
        float(text.rstrip("%")): float(y)
        for y, text in re.findall(r'<text [^>]*text-anchor: end[^>]* y="([^"]+)"[^>]*>([^<]+)</text>', drawn)
    }
    values, heights = np.array(sorted(ticks.items())).T
    slope = (heights[-1] - heights[0]) / (values[-1] - values[0])
    assert points[:, 1] - points[0, 1] == pytest.approx(slope * np.array([0, 40, 20]), abs=0.1)
    assert (points[1:, 0] > points[:-1, 0]).all()


def test_all_words_of_a_chart_follow_the_theme() -> None:
    """Black letters are not seen on the dark page."""
    drawn = str(charts.curves([charts.Line([0.2, 0.6], 0)], "title", percent=True, published=0.4426))
    words = re.findall(r"<text ([^>]*)>([^<]+)</text>", drawn)
    assert "published 44.26%" in [text for _, text in words]
    assert [text for style, text in words if "fill: var(--ink)" not in style] == []


def test_a_single_epoch_is_a_whole_number() -> None:
    drawn = str(charts.curves([charts.Line([0.5], 0)], "title", percent=True))
    assert re.findall(r"<text [^>]*text-anchor: middle[^>]*>([^<]+)</text>", drawn) == ["1", "epoch"]


def luminance(colour: tuple[float, ...]) -> float:
    """WCAG 2.2's relative luminance of sRGB."""
    parts = [part / 255 for part in colour]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_contrast(theme: int) -> None:
    """WCAG AA: 4.5 for text, also on a confusion matrix' darkest cell, and 3 for lines."""
    style = (Path(page.__file__).parent / page.TEMPLATE).read_text(encoding="utf-8")
    block = re.findall(r":root \{(.*?)\}", style, re.DOTALL)[theme]
    colours = {name: tuple(bytes.fromhex(code)) for name, code in re.findall(r"--([\w-]+): #(\w{6})", block)}

    def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)

    for text in ("ink", "dim", "accent", "good", "bad"):
        assert min(contrast(colours[text], colours[ground]) for ground in ("paper", "panel")) >= 4.5
    assert "calc(50% * var(--share))" in style
    cell = tuple((a + b) / 2 for a, b in zip(colours["accent"], colours["panel"], strict=True))
    assert contrast(colours["ink"], cell) >= 4.5
    series = [colour for name, colour in colours.items() if name.startswith("series-")]
    assert len(series) == charts.SERIES
    assert min(contrast(colour, colours["paper"]) for colour in series) >= 3


# ---------------------------------------------------------------------------------------------- in a browser

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [375, 900, 1280])
def test_in_a_browser(trained: dict[str, Any], width: int) -> None:
    """No error, no request, nothing wider than the screen; filter and order work."""
    from playwright.sync_api import sync_playwright

    root = trained["run"].parents[1]
    for number in range(9):
        make_run(root, "resnet18-baseline", 0.3 + 0.01 * (number * 4 % 9), train__epochs=number + 1)
    make_run(root, "finetune-layer4", 0.9)
    text = page.render(report.collect([root]))
    Path("report.html").write_text(text, encoding="utf-8")
    look_at(Path("report.html"), width)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": width, "height": 900})
        tab.goto(Path("report.html").absolute().as_uri())
        rows = tab.locator("#results-1 tbody tr:visible")
        assert rows.count() == 9
        tab.fill("input[type=search]", "epochs = 7")
        assert rows.count() == 1
        tab.fill("input[type=search]", "")
        tab.focus("#results-1 th button:text('Ours')")
        head = tab.locator("#results-1 thead").bounding_box()
        assert head is not None
        assert head["height"] > 10, "where rows are cards, the keyboard's place is seen, too"
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        tab.keyboard.press("Enter")
        shown = [float(text.rstrip("%")) for text in tab.locator("#results-1 .ours").all_inner_texts()]
        assert shown == sorted(shown, reverse=True)
        browser.close()


def look_at(path: Path, width: int) -> list[str]:
    """Load a page as a person would, and see that it is whole; returns the presets in its tables of results."""
    from playwright.sync_api import sync_playwright

    complaints: list[str] = []
    requests: list[str] = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": width, "height": 900})
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(path.absolute().as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        sizes = tab.evaluate("[...document.images].map(image => [image.naturalWidth, image.width])")
        assert all(natural > 0 and shown > 0 for natural, shown in sizes)
        rows: list[str] = tab.locator("table.results tbody th > a").all_inner_texts()
        folder = os.environ.get("CIFAR100_TEST_PICTURES")
        if folder:
            tab.screenshot(path=Path(folder) / f"report-{width}.png", full_page=True)
        browser.close()
    assert complaints == []
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    assert len([url for url in requests if url.startswith("file:")]) == 1
    return rows

"""What the README and its translation name exists: presets, keys, flags, files, links; commands are run elsewhere."""

import functools
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.distributed import run as torchrun

from cifar100cli import Classifier, export, keys, load_model, runs
from cifar100cli.config import load_preset, preset_names
from cifar100cli.schema import Expected, Published
from tests import readme
from tests.readme import ROOT

TEXT = readme.README.read_text(encoding="utf-8")
BLOCKS = readme.blocks(TEXT, "bash")
CLAIMS = ROOT / "tests" / "claims.md"
KEPT = ROOT / "tests" / "kept" / "run-format-1"
SCRIPTS = [
    *(ROOT / "tests").glob("*.py"),
    *(ROOT / "docker").glob("*.bash"),
    *(path for path in (ROOT / ".ci").glob("*") if not path.suffix),
]

documents = pytest.mark.parametrize("path", readme.DOCUMENTS, ids=lambda path: path.name)

# Flags of programs that are not ours: pip's, docker's, git's, uv's.
ELSEWHERE = {"--constraint", "--extra", "--file", "--gpus", "--python", "--rm", "--target", "--upgrade", "--with"}

# Endings by which `model.safetensors` is a file, and not a key.
ENDINGS = ("bash", "csv", "html", "json", "jsonl", "onnx", "pt", "pth", "py", "safetensors", "yaml")


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of an earlier version, exported."""
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    export.export(KEPT, path)
    return path


@pytest.mark.usefixtures("small_synthetic")
@pytest.mark.parametrize("example", readme.blocks(TEXT, "python"))
def test_examples_for_python_run(example: str, graph: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As they stand, in a folder with a picture and a model that was exported."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (300, 200), "orange").save("photo.jpg")
    shutil.copy(graph, "model.onnx")
    exec(example, {})  # noqa: S102 - our own


def test_the_example_for_onnx_sees_what_predict_does(
    graph: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of a photograph that is neither square nor upright."""
    (example,) = (block for block in readme.blocks(TEXT, "python") if "onnxruntime" in block)
    monkeypatch.chdir(tmp_path)
    shutil.copy(graph, "model.onnx")
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    Image.fromarray(pixels).save("photo.jpg", exif=exif)
    names: dict[str, Any] = {}
    exec(example, names)  # noqa: S102 - our own
    ((expected,),) = load_model(KEPT, device="cpu").predict(["photo.jpg"], top=1)
    (logits,) = names["logits"].astype(np.float64)
    assert names["classes"][logits.argmax()] == expected["class"]
    assert 1 / np.exp(logits - logits.max()).sum() == pytest.approx(expected["probability"], abs=1e-5)


def test_the_table_of_presets_is_complete_and_right() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| ([\d.]+%|-) \| ([^|]+) \|", TEXT, flags=re.MULTILINE)
    assert sorted(name for name, *_ in rows) == preset_names()
    for name, figure, hoped in rows:
        published, expected = load_preset(name).config.published, load_preset(name).config.expected
        assert figure == (f"{published.top1:.2%}" if published else "-")
        if expected is None:
            assert hoped == "-"
        elif expected.runs:
            spread = f" ±{100 * expected.deviation:.2f}" if expected.deviation is not None else ""
            assert hoped == f"{expected.top1:.2%}{spread}, n = {expected.runs}"
        else:
            assert hoped == f"{expected.top1:.1%}, not run"


def test_files_are_named_as_they_are() -> None:
    for name in runs.FILES:
        assert f"| `{name}` |" in TEXT


def test_both_commands_come_first_and_are_one_line_each() -> None:
    assert [block.count("\n") for block in BLOCKS[:2]] == [1, 1]
    assert "cifar100 train" in BLOCKS[0]
    assert "pytest" in BLOCKS[1]


def test_claims_are_the_readmes_and_their_tests_exist() -> None:
    """tests/claims.md: a quotation of it or of a file of records on the left, `file::test` on the right."""
    said = " ".join(" ".join(path.read_text(encoding="utf-8") for path in (readme.README, *readme.RECORDS)).split())
    rows = re.findall(r"^\| (?!claim )(\S.*?) \| (.+) \|$", CLAIMS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(rows) > 50
    for claim, behind in rows:
        assert claim.replace("\\|", "|") in said
        assert behind
        for name, test in re.findall(r"`(test_\w+)(?:::(test_\w+))?`", behind):
            source = (ROOT / "tests" / f"{name}.py").read_text(encoding="utf-8")
            assert (f"def {test}(" if test else "def test_") in source, f"{name}::{test}"


# ------------------------------------------------------------------------------------------- what is in backticks


@documents
def test_keys_exist(path: Path) -> None:
    described = [f"published.{key}" for key in Published.model_fields]
    known = {*keys.settable(), *described, *(f"expected.{key}" for key in Expected.model_fields)}
    sections = "|".join({key.split(".")[0] for key in known if "." in key})
    for span in readme.spans(path.read_text(encoding="utf-8")):
        for key in re.findall(rf"(?<![\w./-])(?:{sections})(?:\.\w+)+", span):
            of_model = hasattr(Classifier, key.removeprefix("model."))  # which the examples for Python call `model`
            assert key in known or key.endswith(ENDINGS) or of_model, span


@documents
def test_commands_presets_and_flags_exist(path: Path) -> None:
    """Flags of the command or script where one is named, else of any."""
    for span in readme.spans(path.read_text(encoding="utf-8")):
        known = _flags(span)
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", span):
            assert flag in known, f"{flag} in `{span}`"
        for preset in re.findall(r"--preset ([a-z][\w-]*)(?![\w.<])", span):
            assert preset in preset_names(), span


def _flags(span: str) -> set[str]:
    named = re.match(r"(cifar100 )?([a-z][\w-]*)(?= |$)", span)
    if named and named[2] in readme.APP.commands:
        return readme.flags(readme.APP.commands[named[2]])
    assert not (named and named[1]), f"`{span}`: there is no such command"
    if span.startswith("cifar100 -"):
        return readme.flags(readme.APP)
    script = re.match(r"(?:python -m )?tests\.(\w+)", span)
    if script:
        return flags_in(ROOT / "tests" / f"{script[1]}.py")
    return _all_flags()


@functools.cache
def _all_flags() -> set[str]:
    ours = {flag for command in readme.APP.commands.values() for flag in readme.flags(command)}
    torchruns = {flag for action in torchrun.get_args_parser()._actions for flag in action.option_strings}
    return ours.union(readme.flags(readme.APP), torchruns, ELSEWHERE, *map(flags_in, SCRIPTS))


def flags_in(script: Path) -> set[str]:
    """The flags that stand in a script's source."""
    assert script.is_file(), script
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", script.read_text(encoding="utf-8")))


@documents
def test_files_exist(path: Path) -> None:
    for span in readme.spans(path.read_text(encoding="utf-8")):
        for word in span.split():
            for file in re.findall(r"^(?:cifar100cli|docker|presets|tests|\.ci)/[\w./*-]*", word):
                assert list(ROOT.glob(file.rstrip("/."))), span
            for module in re.findall(r"^tests\.(\w+)$", word):
                assert (ROOT / "tests" / f"{module}.py").is_file(), span


@documents
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for link in readme.links(text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in readme.anchors(target.read_text(encoding="utf-8")), link


def test_anchors_are_githubs() -> None:
    """As its own pages have them."""
    text = "# What's `new`, in 3.11?\n## Nothing lost, nothing let in\n## Use\n"
    text += "```text\n# no\n```\n## Use\n## 速さと GPU（表）\n"
    assert readme.anchors(text) == {
        *("whats-new-in-311", "nothing-lost-nothing-let-in", "use", "use-1"),
        "速さと-gpu表",
    }


# -------------------------------------------------------------------------------------------------- help texts


@documents
def test_help_texts_are_what_is_printed(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert readme.with_help(text) == text, "python -m tests.readme writes them anew"


def test_help_texts_are_written_anew() -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "cifar100cli", "train", "--help"],
        env={**os.environ, "COLUMNS": "80"},
        capture_output=True,
        text=True,
        check=True,
    )
    before = "x\n```text\n$ cifar100 train --help\n{}```\ny\n```text\nz\n```\n```text\n$ cifar100 --help\n{}```\n"
    after = readme.with_help(before.format("", "old\n\ntext\n"))
    shown = readme.blocks(after, "text")
    assert shown[0] == f"$ cifar100 train --help\n{finished.stdout}"
    assert shown[2].startswith("$ cifar100 --help\nUsage: cifar100 [OPTIONS] COMMAND")
    assert after == before.format(finished.stdout, shown[2].partition("\n")[2])
    assert readme.with_help(after) == after


# --------------------------------------------------------------------------------------------- the translation


@pytest.fixture
def translation() -> str:
    if not readme.TRANSLATION.is_file():
        pytest.skip("there is no README.ja.md yet")
    return readme.TRANSLATION.read_text(encoding="utf-8")


def test_the_translation_has_the_same_commands(translation: str) -> None:
    ours, theirs = (
        [
            replace(command, needs_gpu=False)
            for block in readme.blocks(text, "bash")
            for command in readme.commands(block)
        ]
        for text in (TEXT, translation)
    )
    assert [str(command) for command in theirs if command not in ours] == []


def test_the_translation_has_the_same_figures(translation: str) -> None:
    ours = readme.figures(TEXT)
    theirs = [(name, numbers) for name, numbers in readme.figures(translation) if name in preset_names()]
    assert theirs
    assert [row for row in theirs if row not in ours] == []

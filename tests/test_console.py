"""What people see: a run on a terminal of 80 columns and in a pipe, and the report in both."""

import contextlib
import fcntl
import json
import math
import os
import pty
import re
import struct
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cifar100cli import console, report, report_text, wording, workflows
from cifar100cli.bounded import printable
from cifar100cli.display import TrainingDisplay, counting, transfer
from cifar100cli.watcher import EpochProgress
from tests.conftest import make_preset, where
from tests.test_report import make_run

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
COLOUR = re.compile(r"\x1b\[(?:\d+;)*[34]\d[;m]")  # of letters, and of what is behind them


@contextlib.contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """Both streams on a terminal of 80 columns; what is given returns what was written to it, escapes and all."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    stream = os.fdopen(theirs, "w", encoding="utf-8")
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    written = bytearray()

    def read() -> None:
        while True:
            try:
                written.extend(os.read(ours, 65536))
            except OSError:  # the other end is closed
                return

    reader = threading.Thread(target=read, daemon=True)
    reader.start()

    def written_to_it() -> str:
        if not stream.closed:
            stream.close()
            reader.join(timeout=10)
        return written.decode()

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        patch.setattr(sys, "stdout", stream)
        yield written_to_it
    written_to_it()
    os.close(ours)


@pytest.mark.usefixtures("small_synthetic")
def test_training_on_a_terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    preset = make_preset(data={"val_fraction": 0.1}, train={"select": "best_val"})
    with terminal(monkeypatch) as written, TrainingDisplay("mine") as display:
        workflows.train(preset, where(tmp_path), display)
    assert "\x1b[?25l" not in written(), "the cursor would be lost where the run is stopped by Ctrl-Z or killed"
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", ESCAPES.sub("", written()))]
    assert max(map(len, lines)) <= 80
    done = [line for line in lines if re.fullmatch(r"epoch \d/3  loss .*", line)]
    assert len(done) == 3
    assert all(re.search(r"train \S+%  held-out \S+%  best \S+% @\d$", line) for line in done)
    figures = r"loss \d\.\d{4}  train \S+%  held-out \S+%  best \S+% @\d  [\d,]+ images/s"
    assert any(re.fullmatch(figures, line) for line in lines), "the live line"
    assert any(re.match(r"(measuring )?epoch 2/3 [━╸╺]+ \d/5 steps  \d+ s left", line) for line in lines), (
        "how far it is"
    )


def test_a_gpu_is_behind_what_was_issued(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line tells what is done, and nothing of what is not known yet."""
    monkeypatch.setattr(time, "monotonic", iter(range(0, 1000, 10)).__next__)
    with terminal(monkeypatch) as written, TrainingDisplay("mine") as display:
        display.begin(make_preset().config, Path(), 1, 5, "cuda:0 in bf16")
        display.step(5, lambda: EpochProgress(0, 0, math.nan, math.nan, 5))
        display.step(5, lambda: EpochProgress(2, 100, 3.5, 0.25, 10))
        display.measure(EpochProgress(5, 250, 3.0, 0.5, 30))
    text = ESCAPES.sub("", written())
    drawn = re.findall(r"((?:measuring )?epoch 1/3) \S+ +(\d)/5 steps(  .* left)?", text)
    assert {(what, done, bool(left)) for what, done, left in drawn} == {
        ("epoch 1/3", "0", False),
        ("epoch 1/3", "2", True),
        ("measuring epoch 1/3", "5", True),
    }
    assert "nan" not in text
    assert "loss 3.5000  train 25.00%" in text


@pytest.mark.usefixtures("small_synthetic")
def test_training_in_a_pipe(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with TrainingDisplay("mine") as display:
        workflows.train(make_preset(data={"val_fraction": 0.1}, train={"select": "best_val"}), where(tmp_path), display)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "\x1b" not in captured.err
    assert "\r" not in captured.err
    assert [line[:11] for line in captured.err.splitlines()[-3:]] == [f"epoch {number}/3  " for number in (1, 2, 3)]


@pytest.mark.parametrize(
    ("rate", "expected"), [(20, [60, 100, 140, 180]), (0.1, [3.1, 6.1, 9.1, 12.1, 15.1, 18.1, 20])]
)
def test_a_slow_download_in_a_pipe_gives_signs_of_life(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, rate: float, expected: list[float]
) -> None:
    """Of 200 MB at so many MB/s: a line for a tenth, at most every two seconds and at least every thirty."""
    seconds = 0
    monkeypatch.setattr(time, "monotonic", lambda: seconds)
    with transfer("archive") as progress:
        for seconds in range(1, 201 if rate < 1 else 11):
            progress(round(1e6 * rate * seconds), 200_000_000)
    assert [float(line.split()[1]) for line in capsys.readouterr().err.splitlines()] == expected


def test_nothing_moves_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ipykernel's shell tells commands of its pseudo-terminal, which knows colours and no cursor."""
    row = {"epoch": 1, "train_loss": 1, "train_top1": 0.5, "images_per_second": 1}
    with terminal(monkeypatch) as written:
        for name, value in (("TERM", "xterm-color"), ("CLICOLOR_FORCE", "1"), ("FORCE_COLOR", "1")):
            monkeypatch.setenv(name, value)
        with TrainingDisplay("mine") as display, counting("images", 2) as advance:
            display.begin(make_preset().config, Path(), 1, 5, "cpu in fp32")
            display.step(1, lambda: EpochProgress(1, 50, 3.5, 0.25, 5))
            display.epoch(row, None)
            advance(1)
    assert [line[:9] for line in written().splitlines()] == ["mine: tes", "the data ", "epoch 1/3"]
    assert not ESCAPES.search(written())


@pytest.mark.parametrize(("first", "expected"), [(1, ["1:30 left", "1:20 left", "40 s left"]), (3, ["40 s left"])])
def test_time_left_while_images_grow(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, first: int, expected: list[str]
) -> None:
    """A quarter of the area is a quarter of the time, so that the first epochs do not promise too much."""
    growing = make_preset(data={"image_size": 32, "first_image_size": 16}, train={"epochs": 4}).config
    assert [growing.image_size_in(epoch) for epoch in range(1, 5)] == [16, 16, 32, 32]
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    display = TrainingDisplay("mine")
    display.begin(growing, Path(), first, 5, "cpu in fp32")
    for epoch, seconds in ((1, 10), (2, 10), (3, 40), (4, 40)):
        if epoch >= first:
            now += seconds
            display.epoch({"epoch": epoch, "train_loss": 1, "train_top1": 0.5, "images_per_second": 1}, None)
    lines = capsys.readouterr().err.splitlines()
    assert [line.rsplit("  ")[-1] for line in lines if "left" in line] == expected


def test_the_report_fits_80_columns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for preset in ("resnet18-arcface-224", "resnet18-arcface-224-fixed", "resnet18-baseline", "finetune-layer3-50"):
        for seed in range(3):
            run = make_run(tmp_path, preset, 0.4 + 0.01 * seed, seed, train__epochs=40)
            run.forget_after(0)
            for epoch in range(1, 41):
                figures = {"train_loss": 1 / epoch, "train_top1": epoch / 50, "seconds": 1, "images_per_second": 1}
                run.append_metrics({"epoch": epoch, **figures, "test_loss": 1 / epoch, "test_top1": epoch / 100})
    found = report.collect([tmp_path])
    with terminal(monkeypatch) as written:
        report_text.show_table(found)
    lines = ESCAPES.sub("", written()).splitlines()
    tables = [line for line in lines if not line.startswith(("[", "best on test:", "in brackets:"))]
    assert max(map(len, tables)) <= 80
    curves = [line for line in lines if re.search(r" 1\.00 +▁\S+█ +40\.00 ", line)]
    assert len(curves) == 4, "every setting has its curve"
    best = [line for line in curves if line.endswith(" 40.00 @40")]
    assert len(best) == 2, "and its best epoch, where one was chosen on these images"


@pytest.mark.parametrize("no_color", [None, "1"])
def test_no_colour_where_nobody_wants_one(monkeypatch: pytest.MonkeyPatch, no_color: str | None) -> None:
    """Neither in lines of our own, nor in Rich's tables and bars."""
    with terminal(monkeypatch) as written:
        if no_color is not None:
            monkeypatch.setenv("NO_COLOR", no_color)
        console.error("a mistake")
        console.table("title", ("a",), [("b",)])
        with counting("images", 2) as advance:
            advance(1)
    assert written().startswith("error: a mistake") == bool(no_color)
    assert "1/2" in written()
    assert bool(COLOUR.search(written())) != bool(no_color)


def test_differences_and_durations() -> None:
    assert [wording.points(gain) for gain in (0.0123, -0.0123, -0.00004, None)] == ["+1.23", "-1.23", "+0.00", "-"]
    assert [wording.duration(seconds) for seconds in (0.4, 59.4, 60, 3725)] == ["0 s", "59 s", "1:00", "1:02:05"]


@pytest.mark.parametrize(
    ("platform", "path", "typed"),
    [
        ("linux", "runs/mine", "runs/mine"),
        ("linux", "it's here", "'it'\"'\"'s here'"),
        ("linux", "-x", "./-x"),
        ("win32", r"C:\runs\mine", r"C:\runs\mine"),
        ("win32", r"C:\Users\My Name", r'"C:\Users\My Name"'),  # cmd.exe would hand on single quotes as they are
        ("win32", "-x y", '"./-x y"'),
    ],
)
def test_a_path_is_quoted_as_the_systems_shell_reads_it(
    monkeypatch: pytest.MonkeyPatch, platform: str, path: str, typed: str
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    assert wording.argument(path) == typed


def test_figures_stay_whole_in_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    console.table("", ("preset", "top-1"), [("resnet18-baseline-fixed", "44.26 ±0.12")], right=(1,))
    assert "44.26 ±0.12" in capsys.readouterr().out
    console.table("", ("setting", "top-1", "by epoch"), [("layer3", "44.26 ±0.12", "▁▂▃▄▅▆▇█")], right=(1,))
    written = capsys.readouterr().out
    assert "layer3" in written, "nor does a row lose its name"
    assert "44.26 ±0.12" in written


def test_a_table_for_a_file_is_plain_whatever_the_terminal_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "20")
    with console.captured() as written:
        console.table("title", ("a", "b"), [("resnet18-baseline-fixed", "x" * 30)])
    lines = written.getvalue().splitlines()
    assert lines == [
        "title",
        f"a{'b'.rjust(25)}",
        f"{'-' * 23}  {'-' * 30}",
        f"resnet18-baseline-fixed  {'x' * 30}",
        "",
    ]


def test_a_plain_table_stands_in_line_whatever_the_letters() -> None:
    """A Japanese letter has two columns, and a combining mark none (Unicode's annex 11)."""
    names = ["実験ガ", "e\u0301tude", "ＡＢＣ", "plain"]
    table = console.plain_table("", ("preset", "top-1"), [(name, "44.26") for name in names], right=(1,))
    assert table.splitlines()[1:] == [
        "------  -----",
        "実験ガ  44.26",
        "e\u0301tude   44.26",
        "ＡＢＣ  44.26",
        "plain   44.26",
    ]
    numbers = console.plain_table("", ("a",), [("実験",), ("1",)], right=(0,))
    assert numbers.splitlines()[2:] == ["実験", "   1"]


@pytest.mark.parametrize("text", ["\x9b2J", "\u202e", "\x7f", "\x1b[2J", "\udcff", "日本 \u00e9\u3000"])
def test_json_steers_no_terminal(text: str) -> None:
    written = console.json_text({"name": text})
    assert json.loads(written) == {"name": text}
    assert all(line == printable(line) for line in written.splitlines())
    assert ("日" in written) == ("日" in text), "what is harmless stays legible"


def test_tables_in_a_pipe_that_is_to_be_coloured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    console.table("title", ("a",), [("b",)])
    assert "\x1b" not in capsys.readouterr().out
    monkeypatch.setenv("FORCE_COLOR", "1")
    console.table("title", ("a",), [("b",)])
    assert "\x1b[1m" in capsys.readouterr().out

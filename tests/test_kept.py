"""Files that an earlier version wrote are read as that version meant them, or refused; never misread.

`tests/kept/run-format-1` was written by cifar100 0.1.0, with

    cifar100 train --backbone test_efficientnet --epochs 2 --optimizer sgd --lr 0.1 --set optimizer.momentum=0
        --set train.precision=fp32 --device cpu

and `run-format-1-averaged` by a later 0.1.0 with `--set train.ema=0.9` besides. They are as they were then, but for the
names of a machine in environment.json. Nobody changes these files: a version that cannot read them any more has a new
format number, and says so.
"""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cifar100cli import runs
from tests.conftest import Cli

KEPT = sorted((Path(__file__).parent / "kept").iterdir())
every_kept_run = pytest.mark.parametrize("kept", KEPT, ids=lambda path: path.name)


def result_of(kept: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((kept / runs.RESULT).read_text())
    return found


@every_kept_run
def test_the_model_is_what_it_was(run_cli: Cli, kept: Path) -> None:
    outcome = run_cli("evaluate", kept, "--predictions", "now.csv", "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert found["loss"] == pytest.approx(result_of(kept)["test"]["loss"], abs=1e-3)
    assert found["top1"] == pytest.approx(result_of(kept)["test"]["top1"], abs=2e-3)
    with Path("now.csv").open(newline="") as now, (kept / runs.PREDICTIONS).open(newline="") as then:
        pairs = list(zip(csv.DictReader(now), csv.DictReader(then), strict=True))
    same = sum(new["predicted"] == old["predicted"] for new, old in pairs)
    assert same > 0.99 * len(pairs)


@every_kept_run
def test_the_report_knows_it(run_cli: Cli, kept: Path) -> None:
    (row,) = json.loads(run_cli("report", kept, "--json").out)["rows"]
    assert row["top1_mean"] == result_of(kept)["test"]["top1"]
    assert row["changes"]["model.backbone"] == "test_efficientnet"
    assert len(row["curves"]["val_top1"]) == 2
    assert run_cli("report", kept, "--out", "report.html").code == 0
    assert "taken for" in Path("report.html").read_text(encoding="utf-8")


@every_kept_run
def test_it_goes_on(run_cli: Cli, tmp_path: Path, kept: Path) -> None:
    """From the state after its last epoch; what is left is to measure the result."""
    run = tmp_path / "runs" / "quickstart" / kept.name
    shutil.copytree(kept, run)
    (run / runs.RESULT).unlink()
    outcome = run_cli("train", "--resume", "last", "--json")
    assert outcome.code == 0, outcome.err
    assert "every epoch is done" in outcome.err
    assert json.loads(outcome.out)["test"]["loss"] == pytest.approx(result_of(kept)["test"]["loss"], abs=1e-3)


def test_a_newer_one_is_refused(run_cli: Cli, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "quickstart" / KEPT[0].name
    shutil.copytree(KEPT[0], run)
    environment = json.loads((run / runs.ENVIRONMENT).read_text())
    (run / runs.ENVIRONMENT).write_text(json.dumps({**environment, "format": runs.FORMAT + 1}))
    outcome = run_cli("train", "--resume", run)
    assert (outcome.code, len(outcome.err.splitlines())) == (3, 1)
    assert "newer cifar100" in outcome.err
    assert "newer cifar100" in run_cli("report").out

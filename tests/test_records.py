"""The script that makes records: what it keeps is what the run says of itself, and nothing is trained twice."""

import json
from pathlib import Path

import pytest

from tests import records


def test_records_are_kept_run_by_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out, runs = tmp_path / "out", tmp_path / "out-runs"
    options = ("--epochs", "1", "--set", "data.fraction=0.01", "--device", "cpu")
    command = [str(out), "--data-dir", str(tmp_path), "quickstart:1", "--", *options]
    assert records.main(["--seconds", "0", *command]) == 1
    assert (out / "records.md").read_text().splitlines() == list(records.HEAD)
    assert records.main(command) == 0
    (run,) = (runs / "quickstart").iterdir()
    kept = out / "quickstart" / run.name
    assert {file.name for file in kept.iterdir()} == set(records.SMALL)
    assert all((kept / name).read_bytes() == (run / name).read_bytes() for name in records.SMALL)
    result = json.loads((run / "result.json").read_text())
    cells = [cell.strip() for cell in (out / "records.md").read_text().splitlines()[-1].split("|")]
    assert cells[1:3] == ["quickstart", "0"]
    assert cells[3] == f"{result['test']['top1']:.2%}"
    assert cells[6] == "1 of 1"
    assert "$ cifar100 train --preset quickstart --seed 0 --epochs 1" in (out / "quickstart-seed0.log").read_text()
    assert records.main(["--seconds", "0", *command]) == 0, "it is there already"
    (run / "result.json").unlink()
    assert records.main(command) == 0, "gone on with"
    assert [path.name for path in (runs / "quickstart").iterdir()] == [run.name]
    assert json.loads((kept / "result.json").read_text())["test"] == result["test"]


def test_presets_are_named_with_their_seeds(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        records.main([str(tmp_path / "out"), "--data-dir", str(tmp_path), "speedrun-75:some"])
    assert leaving.value.code == 2
    assert "PRESET:SEEDS" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()

"""Where commands write: what an output must not cost, and what it may be."""

import csv
import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cifar100cli import devices, places
from cifar100cli.catalog import FOLDERS
from cifar100cli.errors import UsageError
from cifar100cli.runs import RunDir
from cifar100cli.schema import Config
from tests.conftest import Cli, train


@pytest.mark.usefixtures("small_synthetic")
def test_no_output_takes_the_place_of_what_was_work_to_make(run_cli: Cli, tmp_path: Path) -> None:
    run = Path(train(run_cli, epochs=1)["run_dir"])
    model = run / "model.safetensors"
    data = tmp_path / FOLDERS["cifar100"] / "test"
    data.parent.mkdir()
    data.write_text("images")
    copy, own = tmp_path / "copy.safetensors", tmp_path / "own.onnx"
    for path in (copy, own):
        path.write_bytes(model.read_bytes())
    for link, target in {"run.csv": model, "copy.csv": copy, "data.csv": data, "run.onnx": model}.items():
        (tmp_path / link).symlink_to(target)
    (tmp_path / "hard.onnx").hardlink_to(own)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for arguments, words in (
        (["evaluate", run, "--predictions", model], "what it is made from"),
        (["evaluate", own, "--predictions", own], "what it is made from"),
        (["evaluate", run, copy, "--predictions", "copy.csv"], "what it is made from"),
        (["evaluate", copy, "--predictions", "run.csv"], "a file of a run"),
        (["evaluate", run, "--predictions", "copy.csv"], "a model"),
        (["evaluate", run, "--predictions", data], "a file of a data set"),
        (["report", "--format", "csv", "--out", "run.csv"], "a file of a run"),
        (["report", "--format", "csv", "--out", "data.csv"], "a file of a data set"),
        (["report", "--format", "csv", "--out", copy], "a model"),
        (["export", own, "--out", own], "what it is made from"),
        (["export", own, "--out", "hard.onnx"], "what it is made from"),
        (["export", copy, "--out", "run.onnx"], "a file of a run"),
    ):
        outcome = run_cli(*arguments)
        assert outcome.code == 2, arguments
        assert f"would overwrite {words}; choose another name" in outcome.err
    assert {path: path.read_bytes() for path in before} == before
    for _ in range(2):  # its own, again, whatever its name is
        assert run_cli("report", "--out", "metrics.csv").code == 0
        assert run_cli("evaluate", run, "--predictions", "predictions.csv").code == 0


def test_the_data_folder_of_somebody_elses_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may lie in a home that may not be looked into, and the user's own cache has the data, too."""
    theirs, ours = tmp_path / "theirs" / "data", tmp_path / "cache"
    theirs.mkdir(parents=True)
    run = RunDir.create(tmp_path / "runs", "quickstart", Config(), {"data_dir": str(theirs)}).path
    monkeypatch.setenv("XDG_CACHE_HOME", str(ours))
    look = os.stat

    def shut(path: Any, **options: Any) -> os.stat_result:
        if Path(path) == theirs:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return look(path, **options)

    monkeypatch.setattr(os, "stat", shut)
    assert places.data_folder(None, run) == ours / "cifar100"


def test_the_data_folder_of_a_run_that_went_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the last one, as long as that is there."""
    monkeypatch.delenv("CIFAR100_DATA_DIR", raising=False)
    run = RunDir.create(tmp_path / "runs", "quickstart", Config(), {"data_dir": str(tmp_path)})
    later = tmp_path / "later"
    later.mkdir()
    run.note_resumption({"data_dir": str(later)})
    assert places.data_folder(None, run.path) == later
    later.rmdir()
    assert places.data_folder(None, run.path) == tmp_path


def test_a_run_of_another_gpu_goes_on_on_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its number was that of a machine, or of what a scheduler had given to a job."""
    run = RunDir.create(tmp_path, "quickstart", Config(), {"device": "cuda:1", "precision": "bf16"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(devices, "_try", lambda _: None)
    said: list[str] = []
    for gpus, device in ((2, "cuda:1"), (1, "cuda")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert places.own_device(run, "--device cpu", said.append) == device
    assert said == [f"{run.path} was begun on cuda:1, which is not here: it goes on on the first GPU"]


@pytest.mark.parametrize("device", ["cuda:1", "mps"])
def test_the_cpu_is_offered_where_it_can_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Not where `auto` means another precision there, in which the run would be refused."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    for asked, recorded, words in (
        ("auto", "bf16", "; --device cpu goes on without it$"),
        ("auto", "fp16", "; resume it where there is one, for `train.precision: auto` means bf16 on the CPU here$"),
        ("fp16", "fp16", "; --device cpu goes on without it$"),
    ):
        config = Config.model_validate({"train": {"precision": asked}})
        run = RunDir.create(tmp_path, "quickstart", config, {"device": device, "precision": recorded})
        with pytest.raises(UsageError, match=f"{run.path}: was begun on {device}, and PyTorch finds no .*{words}"):
            places.own_device(run, "--device cpu", pytest.fail)


def test_a_file_takes_the_permission_of_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is made anew there, and then takes the old one's place; what is opened as it is has no need of the folder."""
    shut, kept = tmp_path / "shut", tmp_path / "kept.csv"
    shut.mkdir()
    for path in (shut / "old.csv", kept):
        path.touch()
    os.mkfifo(shut / "pipe.csv")
    (tmp_path / "link.csv").symlink_to(shut / "old.csv")
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) not in (shut, kept))
    for refused in (shut / "old.csv", shut / "new.csv", tmp_path / "link.csv", kept):
        with pytest.raises(UsageError, match=r"csv: there is no permission to write it; choose another place"):
            places.check_output("--out", refused)
    with (shut / "old.csv").open("w") as file:  # a shell's `> old.csv`
        for taken in (shut / "pipe.csv", Path("/dev/null"), Path(f"/dev/fd/{file.fileno()}"), tmp_path / "new.csv"):
            assert places.check_output("--out", taken) == taken


def test_output_to_a_pipe_and_to_a_full_device(run_cli: Cli, tmp_path: Path) -> None:
    run_dir = train(run_cli, epochs=1)["run_dir"]
    (tmp_path / "round.csv").symlink_to(tmp_path / "round.csv")
    outcome = run_cli("report", "--out", "round.csv")
    assert (outcome.code, "cannot be written" in outcome.err) == (2, True)
    for arguments in (["evaluate", run_dir, "--predictions", "-"], ["report", "--format", "csv", "--out", "-"]):
        outcome = run_cli(*arguments)
        assert (outcome.code, "name a file" in outcome.err, Path("-").exists()) == (2, True, False)
    full = run_cli("evaluate", run_dir, "--predictions", "/dev/full", "-q")
    assert (full.code, full.err) == (1, "error: /dev/full: No space left on device\n")
    command = [sys.executable, "-m", "cifar100cli", "report", "--format", "csv", "--out", "/dev/stdout"]
    piped = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=True)
    assert [row["runs"] for row in csv.DictReader(piped.stdout.splitlines())] == [str(run_dir)]
    with (tmp_path / "all.csv").open("w") as file:  # a shell's `> all.csv`, which is kept open for what comes next
        file.write("before\n")
        file.flush()
        subprocess.run(command, cwd=tmp_path, stdout=file, check=True)
        file.seek(0, os.SEEK_END)
        file.write("behind\n")
    before, *lines, behind = (tmp_path / "all.csv").read_text().splitlines()
    assert (before, lines, behind) == ("before", piped.stdout.splitlines(), "behind")

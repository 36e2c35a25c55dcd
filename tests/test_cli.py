"""The command line as a user meets it: files, streams, exit codes, and the words for every mistake."""

import contextlib
import csv
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import pytest
import safetensors.torch
import torch
import yaml

from cifar100cli import __version__, checkpoint, keys, page, places, synthetic
from cifar100cli.card import KEY
from cifar100cli.catalog import FOLDERS
from cifar100cli.config import load_preset
from tests.conftest import TINY, Cli, train

pytestmark = pytest.mark.usefixtures("small_synthetic")


# ---------------------------------------------------------------------------------------- a run and its files


def test_a_run_leaves_the_files_of_the_contract(run_cli: Cli) -> None:
    result = train(run_cli, "--preset", "resnet18-baseline", "--seed", "5")
    run = Path(result["run_dir"])
    assert re.fullmatch(r"runs/resnet18-baseline/\d{8}-\d{6}-seed5", str(run))
    assert {path.name for path in run.iterdir()} == {
        *("config.yaml", "environment.json", "metrics.jsonl", "metrics.csv"),
        *("model.safetensors", "state.safetensors", "predictions.csv", "result.json"),
    }
    assert json.loads((run / "result.json").read_text()) == result
    assert set(result) >= {
        *("preset", "dataset", "seed", "run_dir", "complete", "epochs", "select", "test", "best", "last", "train"),
        *("parameters", "trainable_parameters", "seconds", "images_per_second", "device", "precision"),
    }
    assert set(result["test"]) == {"top1", "top5", "loss", "ece", "superclass_top1"}
    assert (result["preset"], result["dataset"], result["seed"]) == ("resnet18-baseline", "synthetic", 5)
    assert (result["complete"], result["select"], result["precision"]) == (True, "best_test", "fp32")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    for row in rows:
        assert set(row) >= {
            *("epoch", "lr", "train_loss", "train_top1", "test_loss", "test_top1", "test_top5"),
            *("seconds", "images_per_second"),
        }
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["epochs"] == 2
    environment = json.loads((run / "environment.json").read_text())
    assert environment["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert environment["command"][1] == "train"


def test_runs_are_never_overwritten(run_cli: Cli) -> None:
    assert len({train(run_cli, epochs=1)["run_dir"] for _ in range(3)}) == 3


def test_out_and_environment_say_where_runs_go(run_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIFAR100_RUNS_DIR", "from_environment")
    assert train(run_cli, epochs=1)["run_dir"].startswith("from_environment/quickstart/")
    assert train(run_cli, "--out", "from_flag", epochs=1)["run_dir"].startswith("from_flag/quickstart/")
    assert json.loads(run_cli("report", "--json").out)["rows"][0]["n"] == 1


def test_a_pipe_gets_plain_lines(run_cli: Cli) -> None:
    outcome = run_cli("train", *TINY, "--epochs", "2")
    lines = outcome.err.splitlines()
    assert sum(line.startswith("epoch ") for line in lines) == 2
    assert "synthetic" in outcome.err
    assert "synthetic" in outcome.out
    assert "\x1b" not in outcome.err + outcome.out
    assert "\r" not in outcome.err + outcome.out
    verbose = run_cli("-v", "train", *TINY, "--epochs", "1").err
    assert "data folder" in verbose
    assert f"PyTorch {torch.__version__} on cpu" in verbose
    assert "  lr " in verbose
    assert "data folder" not in outcome.err
    quiet = run_cli("train", *TINY, "--epochs", "1", "-q")
    assert quiet.err == ""
    assert quiet.out


def test_evaluate_agrees_with_the_run(run_cli: Cli, small_synthetic: synthetic.Drawn) -> None:
    result = train(run_cli, "--set", "data.val_fraction=0.25")
    outcome = run_cli("evaluate", result["run_dir"], "--json", "--device", "cpu", "--predictions", "p.csv")
    found = json.loads(outcome.out)
    assert set(found) >= {
        *("checkpoint", "dataset", "split", "count", "top1", "top5", "loss", "ece", "superclass_top1"),
        *("per_class", "confusions"),
    }
    assert {key: found[key] for key in result["test"]} == result["test"]
    assert (found["count"], found["split"], len(found["per_class"])) == (200, "test", 100)

    rows = list(csv.DictReader(Path("p.csv").read_text().splitlines()))
    labels = [small_synthetic.classes[label] for label in small_synthetic.test[1]]
    assert [row["true"] for row in rows] == labels
    assert np.mean([row["true"] == row["predicted"] for row in rows]) == pytest.approx(found["top1"])
    assert [row["correct"] for row in rows] == [str(int(row["true"] == row["predicted"])) for row in rows]
    wrong = [(row["true"], row["predicted"]) for row in rows if row["true"] != row["predicted"]]
    assert sum(pair["count"] for pair in found["confusions"]) == len(wrong)
    top = found["confusions"][0]
    assert wrong.count((top["true"], top["predicted"])) == top["count"]

    val = json.loads(run_cli("evaluate", result["run_dir"], "--split", "val", "--json", "--device", "cpu").out)
    assert (val["count"], val["top1"]) == (100, result["val"]["top1"])
    training = json.loads(run_cli("evaluate", result["run_dir"], "--split", "train", "--json", "--device", "cpu").out)
    assert training["count"] == 300


def test_a_bare_checkpoint_is_enough(run_cli: Cli, tmp_path: Path) -> None:
    result = train(run_cli)
    alone = tmp_path / "elsewhere.safetensors"
    alone.write_bytes((Path(result["run_dir"]) / "model.safetensors").read_bytes())
    assert json.loads(run_cli("evaluate", alone, "--json", "--device", "cpu").out)["top1"] == result["test"]["top1"]
    text = run_cli("evaluate", alone, "--device", "cpu").out
    assert "synthetic" in text
    assert "top-1" in text


def test_report_over_runs(run_cli: Cli) -> None:
    for seed in ("0", "1"):
        train(run_cli, "--preset", "resnet18-baseline", "--seed", seed, epochs=1)
    found = json.loads(run_cli("report", "--json").out)
    assert found == json.loads(run_cli("report", "--format", "json").out)
    (row,) = found["rows"]
    assert (row["preset"], row["n"], row["published_top1"], row["delta"]) == ("resnet18-baseline", 2, 0.4426, None)
    assert "resnet18-baseline" in run_cli("report").out
    assert run_cli("report", "--out", "report.md").code == 0
    assert Path("report.md").read_text() == run_cli("report", "--format", "markdown").out
    assert run_cli("report", "--check", "0.5").code == 3  # there is nothing that could be compared
    assert run_cli("report", "--out", "report.html").code == 0
    for text in (run_cli("report").out, Path("report.md").read_text(), Path("report.html").read_text()):
        assert "44.26" not in text, "it is published of other images"


def test_a_report_in_a_file_and_as_json(run_cli: Cli) -> None:
    """The name of the file says what it is, and stdout has the document that --json is for."""
    train(run_cli, epochs=1)
    document = json.loads(run_cli("report", "--json").out)
    for name, form in (("report.html", None), ("report.csv", None), ("report", "markdown"), ("report.json", None)):
        more = ("--format", form) if form else ()
        expected = run_cli("report", "--out", name, *more)
        assert (expected.code, expected.out) == (0, "")
        written = Path(name).read_text()
        outcome = run_cli("report", "--json", "--out", name, *more)
        assert outcome.code == 0
        assert json.loads(outcome.out) == document
        assert Path(name).read_text() == written
    assert run_cli("report", "--json", "--out", "report.dat").code == 0
    assert json.loads(Path("report.dat").read_text()) == document


def test_report_check(run_cli: Cli) -> None:
    run = Path(train(run_cli, "--preset", "resnet18-baseline", epochs=1)["run_dir"])
    for name in ("config.yaml", "result.json"):  # as if it had been trained on the real images
        (run / name).write_text((run / name).read_text().replace("synthetic", "cifar100"))
    outcome = run_cli("report", "--check", "0.5")
    assert outcome.code == 5
    assert "outside 0.5" in outcome.err
    passed = run_cli("report", "--check", "100")
    assert passed.code == 0
    others = "not with the settings that the figure was published for: resnet18-baseline ("
    assert others in passed.err
    assert "train.epochs=1" in passed.err.partition(others)[2]


def test_figures_come_before_what_cannot_be_written(run_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    result = train(run_cli, epochs=1)
    outcome = run_cli("evaluate", result["run_dir"], "--json", "--predictions", "/dev/full")
    assert (outcome.code, json.loads(outcome.out)["top1"]) == (1, result["test"]["top1"])
    monkeypatch.setattr(os, "access", lambda *_: False)
    for flags in (("evaluate", result["run_dir"], "--predictions", "p.csv"), ("report", "--out", "report.html")):
        outcome = run_cli(*flags)
        assert (outcome.code, outcome.out) == (2, "")
        assert "there is no permission to write it; choose another place" in outcome.err


def test_what_comes_next_is_what_would_be_found(run_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_cli("train", *TINY, "--epochs", "1").out.splitlines()[-1].strip() == "cifar100 report"
    monkeypatch.setenv("CIFAR100_RUNS_DIR", "mine")
    assert run_cli("train", *TINY, "--epochs", "1").out.splitlines()[-1].strip() == "cifar100 report"
    elsewhere = run_cli("train", *TINY, "--epochs", "1", "--out", "runs")
    assert elsewhere.out.splitlines()[-1].strip() == "cifar100 report runs"


def test_the_page_takes_its_images_from_the_data_folder(run_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def render(_: object, data_dir: Path | None) -> str:
        asked.append(data_dir)
        return ""

    monkeypatch.setattr(page, "render", render)
    Path("runs").mkdir()
    monkeypatch.setenv("CIFAR100_DATA_DIR", "there")
    run_cli("report", "--out", "report.html")
    run_cli("report", "--out", "report.html", "--data-dir", "here")
    assert asked == [Path("there"), Path("here")]


def test_dry_run_writes_nothing(run_cli: Cli, tmp_path: Path) -> None:
    outcome = run_cli("train", *TINY, "--dry-run", "--json")
    assert outcome.code == 0
    assert json.loads(outcome.out)["batch"] == [64, 3, 32, 32]
    told = run_cli("train", *TINY, "--dry-run", "--epochs", "1", "--batch-size", "100", "--set", "data.fraction=0.01")
    assert "in 1 step, 1 epoch, " in told.out
    assert list(tmp_path.iterdir()) == []


def test_print_config_round_trips(run_cli: Cli, tmp_path: Path) -> None:
    first = run_cli("train", "--preset", "resnet18-wd01", "--lr", "2e-3", "--print-config").out
    Path("mine.yaml").write_text(first)
    assert run_cli("train", "--preset", "mine.yaml", "--print-config").out == first
    assert yaml.safe_load(first)["optimizer"]["lr"] == 0.002
    assert "published" not in yaml.safe_load(first), "the tutorial's figure is not that of another rate"
    own = yaml.safe_load(run_cli("train", "--preset", "resnet18-wd01", "--seed", "5", "--print-config").out)
    assert own["published"]["top1"] == 0.4012
    as_json = json.loads(run_cli("train", "--preset", "mine.yaml", "--print-config", "--json").out)
    assert as_json["optimizer"]["lr"] == 0.002
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


def test_every_flag_reaches_its_key(run_cli: Cli) -> None:
    flags = {
        "--dataset": ("cifar10", "data.dataset"),
        "--backbone": ("resnet50", "model.backbone"),
        "--image-size": ("64", "data.image_size"),
        "--batch-size": ("128", "data.batch_size"),
        "--augment": ("flip", "augment.policy"),
        "--loss": ("cross_entropy", "loss.name"),
        "--label-smoothing": ("0.2", "loss.label_smoothing"),
        "--optimizer": ("sgd", "optimizer.name"),
        "--lr": ("0.5", "optimizer.lr"),
        "--weight-decay": ("5e-4", "optimizer.weight_decay"),
        "--epochs": ("7", "train.epochs"),
        "--seed": ("9", "seed"),
    }
    arguments = [part for flag, (value, _) in flags.items() for part in (flag, value)]
    by_flag = run_cli("train", *arguments, "--pretrained", "--print-config").out
    settings = [part for value, key in flags.values() for part in ("--set", f"{key}={value}")]
    assert by_flag == run_cli("train", *settings, "--set", "model.pretrained=yes", "--print-config").out
    found = yaml.safe_load(by_flag)
    for value, key in flags.values():
        inner = found
        for part in key.split("."):
            inner = inner[part]
        assert inner == yaml.safe_load(value) or inner == float(value)


def test_presets(run_cli: Cli) -> None:
    listed = run_cli("presets").out
    for name in ("quickstart", "resnet18-baseline", "resnet18-wd01", "resnet18-lbsmooth", "44.26%"):
        assert name in listed
    assert re.search(r"^wrn28-10-sam +- +86\.00%\? ", listed, re.MULTILINE), "a goal, and marked as such"
    names = [preset["name"] for preset in json.loads(run_cli("presets", "--json").out)["presets"]]
    assert "resnet18-baseline" in names
    assert yaml.safe_load(run_cli("presets", "resnet18-wd01").out)["optimizer"]["weight_decay"] == 0.1


def test_every_key_is_listed_with_what_it_is(run_cli: Cli) -> None:
    found = json.loads(run_cli("presets", "--keys", "--json").out)["keys"]
    assert [key["key"] for key in found] == keys.settable()
    for key in found:
        assert key["allowed"], key
        assert key["description"], key
    assert {
        "key": "optimizer.lr",
        "default": 0.001,
        "allowed": "a number, above 0 and at most 100",
        "description": "learning rate, at its highest",
    } in found
    shown = run_cli("presets", "--keys").out
    assert "--set optimizer.KEY=VALUE" in shown
    assert re.search(r"^nesterov +true +true or false +sgd and muon: look ahead", shown, re.MULTILINE)
    assert re.search(r"^betas +\[0.9, 0.999\] ", shown, re.MULTILINE)


def test_version_and_help(run_cli: Cli) -> None:
    assert run_cli("--version").out.strip() == f"cifar100 {__version__}"
    for arguments in (["--help"], [], ["train", "--help"], ["download", "-h"]):
        outcome = run_cli(*arguments)
        assert (outcome.code, outcome.err) == (0, "")
        assert "Usage" in outcome.out
    for command in ("train", "evaluate", "report", "download", "presets"):
        assert "Example: cifar100" in run_cli(command, "--help").out


# --------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["trian"], 2, "train"),
        (["train", "--presett", "x"], 2, "did you mean --preset?"),
        (["train", "--batchsize", "4"], 2, "did you mean --batch-size?"),
        (["train", "--gpu", "1"], 2, "No such option: --gpu (`cifar100 train --help`"),
        (["train", "--unfreeze", "fc"], 2, "--unfreeze, which `cifar100 finetune-cifar10` has"),
        (["train", "--teacher", "x"], 2, "--teacher, which `cifar100 distill` and `cifar100 bench` have"),
        (["train", "--log", "tensorbord"], 2, "did you mean tensorboard?"),
        (["download", "--dataset", "cifar-100"], 2, "did you mean cifar100?"),
        (["download", "--timeout", "inf"], 2, "--timeout"),
        (["download", "--timeout", "nan"], 2, "--timeout"),
        (["report", "--check", "nan"], 2, "'--check': must be at most 100"),
        (["train", "--seeds", "20261130"], 2, "'--seeds': must be at most 1000"),
        (["train", "--seeds", "0"], 2, "'--seeds': must be at least 1 (`cifar100"),
        (["train", "--seeds", "few"], 2, "'--seeds': must be a whole number (`cifar100"),
        (["train", "--minutes", "few"], 2, "'--minutes': must be a number (`cifar100"),
        (["bench", "--steps", "100000000000000"], 2, "--steps"),
        (["train", "--set", r'model.weights="a\0b"'], 2, "cannot hold a null byte"),
        (["train", "--set", f"description={'x' * 3000}"], 2, "must be text of at most 2,000 characters"),
        (["train", "--set", f"schedule.milestones={[*range(1, 2000)]}"], 2, "a list of at most 1,000, as in"),
        (["train", "--preset"], 2, "--preset"),
        (["train", "extra"], 2, "argument(s) (extra) (`cifar100 train --help` lists"),
        (["train", "resnet18-baseline", "--epochs", "3"], 2, "; did you mean --preset resnet18-baseline? (`cifar100"),
        (["train", "resnet18-basline"], 2, "; did you mean --preset resnet18-baseline?"),
        (["train", "cifar-10"], 2, "; did you mean --dataset cifar10?"),
        (["train", "resnet18"], 2, "argument(s) (resnet18) (`cifar100 train --help` lists"),
        (["train", "my/Own.yml"], 2, "; did you mean --preset my/Own.yml?"),
        (["train", "cifar10"], 2, "; did you mean --dataset cifar10?"),
        (["bench", "laptop"], 2, "; did you mean --preset laptop?"),
        (["download", "cifar10", "cifar100"], 2, "; did you mean --dataset cifar10?"),
        (["download", "laptop"], 2, "argument(s) (laptop) (`cifar100 download --help` lists"),
        (["distill", "."], 2, "; did you mean --teacher .?"),
        (["distill", "nowhere"], 2, "argument(s) (nowhere) (`cifar100 distill --help` lists"),
        (["train", "--preset", "resnet18-basline"], 2, "did you mean resnet18-baseline?"),
        (["train", "--preset", "./nothing.yaml"], 2, "no such file"),
        (["train", "--set", "optimzer.lr=1"], 2, "did you mean optimizer.lr?"),
        (["train", "--set", "optimizer.lr"], 2, "KEY=VALUE"),
        (["train", "--set", "=1"], 2, "KEY=VALUE"),
        (["train", "--set", "optimizer.lr=["], 2, "not valid YAML"),
        (["train", "--lr", "fast"], 2, "optimizer.lr = fast (--lr): must be a number"),
        (["train", "--lr", "1", "--set", "optimizer.lr=2"], 2, "leave one out"),
        (["train", "--epochs", "0"], 2, "train.epochs = 0 (--epochs)"),
        (["train", "--epochs", "1.5"], 2, "whole number"),
        (["train", "--dataset", "cifar"], 2, "did you mean cifar10?"),
        (["train", "--dataset", "synthetic", "--backbone", "resnet81"], 2, "timm has no such model; did you mean"),
        (["train", "--set", "model.backbone=ResNet-18"], 2, "did you mean resnet18"),
        (["train", "--resume"], 2, "(`cifar100 train --help` lists"),
        (["train", *TINY[:2], "--backbone", "test_resnet.nosuch", "--pretrained"], 2, "no weights 'nosuch'"),
        (["train", "--set", "DATA.FRACTION=0.1"], 2, "did you mean data.fraction?"),
        (["finetune-cifar10", "--init", "Imagenet"], 3, "did you mean imagenet?"),
        (["download", "--url", "http://me:secret@127.0.0.1:1/x"], 2, "--url: a name or password in an address"),
        (["distill", "--preset", "quickstart"], 2, "the preset quickstart has no teacher: name one with --teacher"),
        (["distill", "--teacher", "nowhere", "--data-dir", "nowhere"], 3, "no such run or checkpoint"),
        (["download", "--data-dir", "/dev/null"], 1, "data sets cannot be kept in /dev/null: it is not a folder"),
        (["train", "--out", "x" * 300], 1, "File name too long; --out or CIFAR100_RUNS_DIR names another place"),
        (["report", ".", "--out", "x" * 300 + ".md"], 2, "File name too long; choose another name"),
        (["train", "--device", "gpu"], 2, "auto, cpu, cuda, cuda:N or mps"),
        (["train", "--device", "cuda:01"], 2, "auto, cpu, cuda, cuda:N or mps"),
        (["train", "--device", "cuda:256"], 2, "auto, cpu, cuda, cuda:N or mps"),  # PyTorch would make 0 of it
        (["train", "--device", "cuda:\uff11"], 2, "auto, cpu, cuda, cuda:N or mps"),
        (["train", "--weights", "n" * 300], 3, "File name too long"),
        (["predict", "nowhere", "n" * 300], 3, "no such run or checkpoint"),
        (["report", "n" * 300], 3, "File name too long"),
        (["presets", "quickstart", "--keys"], 2, "leave the name out"),
        (["train", "--dry-run", "--resume", "last"], 2, "--dry-run"),
        (["train", "--resume", "last"], 3, "no unfinished run"),
        (["report", ".", "--check", "inf"], 2, "must be at most 100"),
        (["train", "--resume", "nowhere"], 3, "no such run folder"),
        (["train", "--preset", "resnet18-baseline", "--data-dir", "nowhere"], 3, "download --data-dir nowhere`"),
        (["train", "--dataset", "cifar10", "--data-dir", "nowhere"], 3, "download --dataset cifar10"),
        (["distill", "--data-dir", "nowhere"], 2, "distillation needs a teacher"),
        (["evaluate"], 2, "RUN|CHECKPOINT"),
        (["evaluate", "nowhere"], 3, "no such run or checkpoint"),
        (["evaluate", "."], 3, "no model.safetensors"),
        (["evaluate", "x", "--split", "tset"], 2, "tset"),
        (["report", "nowhere"], 3, "no such folder"),
        (["report", ".", "--out", "report.pdf"], 2, "report.pdf"),
        (["report", ".", "--out", "no/such/folder.md"], 2, "its folder does not exist"),
        (["report", ".", "--out", "."], 2, "is a folder"),
        (["report", ".", "--json", "--format", "csv"], 2, "exclude each other"),
        (["report", "~nobody-of-this-name"], 2, "no such user"),
        (["evaluate", "x", "--predictions", ""], 2, "--predictions is empty"),
        (["evaluate", ""], 2, "an argument is empty"),
        (["train", "--preset", ""], 2, "--preset is empty: give it a value"),
        (["train", "--data-dir="], 2, "--data-dir is empty"),
        (["train", "--preset", "./.hidden.yaml"], 2, "another name"),
        (["train", "--preset", "./...yaml"], 2, "another name"),
        (["train", "--set", "schedule.warmup_epochs=1e308"], 2, "at most 100000"),
        (["train", "--set", "seed=null"], 2, "seed = null"),
        (["train", "--dataset", "synthetic", "--batch-size", "1"], 2, "at least 2"),
        (["report", ".", "--check", "x"], 2, "check"),
        (["download", "--dataset", "cifar"], 2, "cifar100, cifar10"),
        (["download", "--sha256", "abc"], 2, "64 hexadecimal digits"),
        (["download", "--url", "ftp://127.0.0.1/x"], 2, "http"),
        (["download", "--from", "nothing.tar.gz"], 3, "nothing.tar.gz"),
        (["download", "--dataset", "cifar10", "--dataset", "cifar100", "--sha256", "none"], 2, "one archive"),
        (["presets", "nothing"], 2, "unknown preset"),
    ],
)
def test_mistakes_are_one_line(run_cli: Cli, tmp_path: Path, arguments: list[str], code: int, words: str) -> None:
    outcome = run_cli(*arguments)
    assert outcome.code == code, outcome.err
    assert outcome.out == ""
    (line,) = outcome.err.splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert not list(tmp_path.glob("runs/**/*"))


def test_a_runs_folder_that_cannot_be_made(run_cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    outcome = run_cli("train", *TINY, "--out", "file/runs")
    assert outcome.code == 1
    (line,) = outcome.err.splitlines()
    assert "runs cannot be written to file/runs" in line
    assert "--out" in line
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "quickstart").write_text("")
    outcome = run_cli("train", *TINY, "--out", "taken")
    assert outcome.code == 1
    assert "runs cannot be written to taken" in outcome.err.splitlines()[-1]


def test_corrupt_checkpoints_and_data(run_cli: Cli, tmp_path: Path) -> None:
    run = Path(train(run_cli, epochs=1)["run_dir"])
    content = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").write_bytes(content[:-10])
    outcome = run_cli("evaluate", run)
    assert (outcome.code, len(outcome.err.splitlines())) == (3, 1)
    folder = tmp_path / "data" / FOLDERS["cifar100"]
    folder.mkdir(parents=True)
    (folder / "meta").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    outcome = run_cli("train", "--preset", "resnet18-baseline", "--data-dir", "data")
    assert (outcome.code, len(outcome.err.splitlines())) == (3, 1)
    assert "refused: it asks for os.system" in outcome.err
    assert "`cifar100 download --data-dir data --force` fetches it again" in outcome.err
    assert not (tmp_path / "pwned").exists()


def test_a_split_that_was_not_held_out(run_cli: Cli) -> None:
    run = train(run_cli, "--set", "data.val_fraction=0", "--set", "train.select=last", epochs=1)["run_dir"]
    outcome = run_cli("evaluate", run, "--split", "val")
    assert outcome.code == 2
    assert "held nothing out" in outcome.err


def test_a_checkpoint_for_other_classes(run_cli: Cli) -> None:
    run = Path(train(run_cli, epochs=1)["run_dir"])
    saved = checkpoint.load_model(run)
    card = saved.card.model_copy(update={"classes": tuple(map(str, range(100)))})
    checkpoint.save_model(run / "model.safetensors", saved.model.state_dict(), card)
    outcome = run_cli("evaluate", run)
    assert outcome.code == 3
    assert "classes" in outcome.err


@pytest.mark.usefixtures("small_synthetic")
def test_a_folder_that_looks_like_an_option(run_cli: Cli) -> None:
    outcome = run_cli("train", *TINY, "--epochs", "1", "--out=-x")
    (line,) = [line for line in outcome.out.splitlines() if line.startswith("next: cifar100 ")]
    assert line.startswith("next: cifar100 evaluate ./-x/")
    assert run_cli(*line.removeprefix("next: cifar100 ").split()).code == 0


@pytest.mark.usefixtures("small_synthetic")
def test_a_warm_up_longer_than_the_run_is_told(run_cli: Cli) -> None:
    plan = ("train", *TINY, "--dry-run", "--epochs", "1")
    assert "to the last step" not in run_cli(*plan).err
    outcome = run_cli(*plan, "--set", "schedule.warmup_epochs=2")
    assert outcome.code == 0
    assert "more than train.epochs = 1: the learning rate rises to the last step" in outcome.err
    assert "1 epoch, fp32" in outcome.out


@pytest.mark.usefixtures("small_synthetic")
def test_a_name_that_timm_had_earlier_is_told(run_cli: Cli) -> None:
    outcome = run_cli("train", *TINY, "--dry-run", "--backbone", "mnasnet_b1", "--optimizer", "muon")
    told = [line for line in outcome.err.splitlines() if "mnasnet" in line]
    assert told == ["model.backbone = mnasnet_b1: timm calls it mnasnet_100 now, and that is what is built"]
    assert outcome.code == 0


def test_figures_of_other_settings_say_so(run_cli: Cli, pretend_cifar: Path) -> None:
    plan = ("--epochs", "1", "--batch-size", "2500", "--backbone", "test_resnet", "--set", "data.fraction=0.1")
    outcome = run_cli("train", "--preset", "resnet18-baseline", *plan, "--data-dir", pretend_cifar, "--device", "cpu")
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    (number,) = [number for number, line in enumerate(lines) if line.startswith("published: 44.26% at epoch 186")]
    assert lines[number - 1] == (
        "not the preset's own settings: data.batch_size = 2500 (not 250), data.fraction = 0.1 (not 1.0), "
        "model.backbone = test_resnet (not resnet18), train.epochs = 1 (not 200)"
    )
    outcome = run_cli(
        *("train", "--preset", "resnet18-baseline", *plan, "--dataset", "cifar10"),
        *("--data-dir", pretend_cifar, "--device", "cpu"),
    )
    assert outcome.code == 0, outcome.err
    assert "published" not in outcome.out, "which is of other images"


@pytest.mark.usefixtures("small_synthetic")
def test_a_folder_of_runs_is_no_run(run_cli: Cli) -> None:
    run = Path(train(run_cli, epochs=1)["run_dir"])
    outcome = run_cli("evaluate", run.parent)
    assert outcome.code == 3
    assert f"the latest run below it is {run}" in outcome.err


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ({"dataset": "mnist"}, "dataset"),
        ({"superclass_of": [0]}, "superclass_of"),
        ({"superclass_of": [99] * 100}, "superclass_of"),
        ({"std": [0, 0, 0]}, "std"),
        ({"mean": [float("nan")] * 3}, "mean"),
    ],
)
def test_checkpoints_that_describe_themselves_wrongly(run_cli: Cli, about: dict[str, Any], words: str) -> None:
    path = Path(train(run_cli, epochs=1)["run_dir"]) / "model.safetensors"
    saved = checkpoint.read(path)
    tensors, old = saved.tensors, saved.about
    safetensors.torch.save_file(tensors, path, {KEY: json.dumps({**old, **about})})
    outcome = run_cli("evaluate", path)
    assert (outcome.code, len(outcome.err.splitlines())) == (3, 1)
    assert words in outcome.err


@pytest.mark.usefixtures("small_synthetic")
def test_names_with_spaces_of_every_kind(run_cli: Cli, tmp_path: Path) -> None:
    """Two in a row, of Japanese, of macOS's screenshots; and the joiner of Persian. Lines to type next hold them."""
    folder = tmp_path / "two  spaces" / "実験\u3000一" / "9.41\u202fAM" / "می\u200cشود"
    folder.mkdir(parents=True)
    (folder / "\u202e.pt").touch()
    preset = tmp_path / "学習\u3000設定.yaml"
    preset.write_text(f"model:\n  pretrained: true\n  weights: {folder}/\u202e.pt\n", encoding="utf-8")
    shown = run_cli("train", "--preset", preset, "--print-config").out
    assert "\u202e" not in shown, "a terminal would write backwards"
    again = tmp_path / "again.yaml"
    again.write_text(shown, encoding="utf-8")
    assert run_cli("train", "--preset", again, "--print-config").out == shown
    assert load_preset(str(again)).config.model.weights == f"{folder}/\u202e.pt"

    own = ("--preset", preset, "--set", "model.pretrained=off")
    outcome = run_cli("train", *TINY, *own, "--epochs", "1", "--out", folder)
    assert outcome.code == 0, outcome.err
    (command,) = re.findall("cifar100 (evaluate .*)", outcome.err + outcome.out)
    assert run_cli(*shlex.split(command)).code == 0
    (row,) = json.loads(run_cli("report", folder, "--json").out)["rows"]
    (run,) = row["runs"]
    assert Path(run).is_dir()
    assert run_cli("train", "--resume", run).code == 0
    (Path(run) / "state.safetensors").write_text("broken")
    (Path(run) / "result.json").unlink()
    assert str(run) in run_cli("train", "--resume", run).err


def test_a_user_without_a_home(run_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(*arguments: object, **named: object) -> None:
        raise RuntimeError("could not determine the home directory")

    monkeypatch.setattr(platformdirs, "user_cache_path", nowhere)
    for command in (["download"], ["train", "--dry-run"], ["train", "--preset", "resnet18-baseline"]):
        outcome = run_cli(*command)
        assert (outcome.code, outcome.err.count("\n")) == (1, 1), outcome.err
        assert "no home folder is known here: set HOME, or CIFAR100_DATA_DIR and CIFAR100_CACHE_DIR" in outcome.err
    told = run_cli("train", "--preset", "resnet18-baseline", "--data-dir", "mine").err
    assert "`cifar100 download --data-dir mine`" in told
    for folder in ("CIFAR100_DATA_DIR", "CIFAR100_CACHE_DIR"):
        monkeypatch.setenv(folder, "mine")
    assert places.where("cpu").data_dir == Path("mine"), "predict and bench name no folder"


def test_too_little_memory_for_pytorch(run_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise ImportError("libtorch_cpu.so: failed to map segment from shared object")

    monkeypatch.setattr(places, "where", full)
    outcome = run_cli("train", "--dry-run")
    assert (outcome.code, outcome.err.count("\n")) == (1, 1)
    assert "too little memory to load a library (libtorch_cpu.so" in outcome.err


@pytest.mark.usefixtures("small_synthetic")
@pytest.mark.parametrize("kind", ["full disk", "closed pager"])
def test_a_run_goes_on_where_nobody_hears_of_it(run_cli: Cli, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """What happens under its log does not end a night's run."""
    place: str | int = "/dev/full"
    if kind == "closed pager":
        reader, place = os.pipe()
        os.close(reader)
    stream = open(place, "w")  # noqa: SIM115, PTH123 - it cannot be closed in peace
    monkeypatch.setattr(sys, "stderr", stream)
    outcome = run_cli("train", *TINY, "--epochs", "2")
    assert (outcome.code, outcome.err) == (0, "")
    assert "next: cifar100 evaluate" in outcome.out
    assert len(list(Path("runs").glob("*/*/result.json"))) == 1
    with contextlib.suppress(OSError):
        stream.close()


def test_weights_without_a_hub(run_cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("no_proxy", "*")
    outcome = run_cli("train", "--dataset", "synthetic", "--backbone", "resnet18", "--pretrained")
    assert (outcome.code, len(outcome.err.splitlines())) == (3, 1), outcome.err
    for words in ("timm/resnet18", "--weights FILE", "model.pretrained=false", "empty"):
        assert words in outcome.err
    assert not (tmp_path / "runs").exists()
    assert not constants.HF_HUB_OFFLINE, "the next one asks again"


def test_out_of_memory_says_what_to_lower(run_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """And leaves what was done whole: the same folder goes on to the end."""
    from cifar100cli import trainer

    train_epoch = trainer.train_epoch

    def exhausted(steps: Any, config: Any, epoch: int, observer: Any) -> Any:
        if epoch == 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return train_epoch(steps, config, epoch, observer)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_epoch", exhausted)
        outcome = run_cli("train", *TINY, "--epochs", "2")
    assert outcome.code == 1
    (line,) = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert "lower --batch-size" in line
    assert "last good checkpoint is" in line
    resumed = run_cli("train", "--resume", "last", "--json")
    assert resumed.code == 0, resumed.err
    assert json.loads(resumed.out)["epochs"] == 2


def test_a_device_that_fails_leaves_the_line_to_go_on(run_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from cifar100cli import metrics, trainer

    train_epoch = trainer.train_epoch

    def failing(steps: Any, config: Any, epoch: int, observer: Any) -> Any:
        if epoch == 2:
            raise torch.AcceleratorError("CUDA error: unspecified launch failure\nCompile with `TORCH_USE_CUDA_DSA`")
        return train_epoch(steps, config, epoch, observer)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_epoch", failing)
        outcome = run_cli("train", *TINY, "--epochs", "2")
    (run,) = Path("runs").glob("*/*")
    failure = "error: the device failed (CUDA error: unspecified launch failure)"
    assert (outcome.code, outcome.err.splitlines()[-1]) == (
        1,
        f"{failure}; 1 of 2 epochs are done and saved; resume with: cifar100 train --resume {run}",
    )
    monkeypatch.setattr(metrics, "logits_of", lambda *_, **__: failing(None, None, 2, None))
    measured = run_cli("evaluate", run)
    assert (measured.code, measured.err.splitlines()[-1]) == (
        1,
        f"{failure}; start the command again, or use --device cpu",
    )


def test_metrics_as_a_table(run_cli: Cli) -> None:
    run = Path(train(run_cli)["run_dir"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [{name: float(value) for name, value in row.items() if value} for row in rows] == [
        {name: value for name, value in line.items() if value is not None} for line in lines
    ]


def test_python_dash_m_is_the_same_program(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cifar100cli", "train", "--preset", "nope"]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert finished.stderr.startswith("error: unknown preset 'nope'")


def test_a_reader_that_goes_away(tmp_path: Path) -> None:
    command = f"{shlex.quote(sys.executable)} -m cifar100cli presets --json | head -c 1"
    finished = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (finished.stdout, finished.stderr) == ("{", "")


@pytest.mark.parametrize(
    ("command", "code"),
    [("presets >&-", 0), ("presets nope 2>&-", 2), ("report nowhere 2>/dev/full", 3), ("presets >/dev/full", 1)],
)
def test_streams_that_cannot_be_written(tmp_path: Path, command: str, code: int) -> None:
    full = f"{shlex.quote(sys.executable)} -m cifar100cli {command}"
    finished = subprocess.run(["bash", "-c", full], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert finished.returncode == code
    assert "Traceback" not in finished.stderr


def test_a_terminal_is_not_steered_by_names(run_cli: Cli) -> None:
    outcome = run_cli("train", "--preset", "x\x1b[31m\u202ey")
    assert outcome.code == 2
    assert "\x1b" not in outcome.err
    assert "\u202e" not in outcome.err

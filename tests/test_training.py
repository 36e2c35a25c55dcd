"""From a command that trains to its runs: one for each seed, and one that stopped and goes on."""

import errno
import json
import os
import shutil
import subprocess
import sys
import unittest.mock
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import yaml
from safetensors import SafetensorError

import cifar100cli
from cifar100cli import checkpoint, errors, execution, places, runs, tensors, time_limit, trainer
from cifar100cli.config import having, load_preset
from cifar100cli.runs import RunDir
from cifar100cli.whole_run import Rates
from tests.conftest import TINY, Cli, last_run, train

pytestmark = pytest.mark.usefixtures("small_synthetic")

# ------------------------------------------------------------------------------------------------- minutes


@pytest.fixture
def three_epochs(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A machine on which three epochs of drawn images fit in a minute, as often as it is asked."""
    asked: list[object] = []

    def rates(preset: object, *_: object) -> tuple[object, Rates]:
        asked.append(preset)
        return unittest.mock.Mock(takes_its_steps_otherwise=lambda _: False), Rates(550, 1000)

    monkeypatch.setattr(time_limit, "measure_rates", rates)
    return asked


TIMED = ("train", *TINY, "--set", "train.select=last", "--minutes", "1", "--json")


def test_minutes_are_as_many_epochs(run_cli: Cli, three_epochs: list[object]) -> None:
    """The run is that of `--epochs`, to the bit, in its folder as in its files."""
    outcome = run_cli(*TIMED)
    assert outcome.code == 0, outcome.err
    timed, counted = json.loads(outcome.out), train(run_cli, "--set", "train.select=last", epochs=3)
    assert timed["epochs"] == 3
    assert "--minutes 1: a run of --epochs 3 takes about 55 s here" in outcome.err
    files = [Path(result["run_dir"]) for result in (timed, counted)]
    for name in ("model.safetensors", "config.yaml"):
        assert len({(folder / name).read_bytes() for folder in files}) == 1
    assert len(three_epochs) == 1
    tried = run_cli(*TIMED, "--dry-run", "--out", "elsewhere")
    assert json.loads(tried.out)["epochs"] == 3
    assert not Path("elsewhere").exists()


def test_minutes_are_measured_once_for_all_runs(
    run_cli: Cli, three_epochs: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = json.loads(run_cli(*TIMED, "--seeds", "2").out)
    assert [run["epochs"] for run in together["runs"]] == [3, 3]
    assert len(three_epochs) == 1
    found = json.loads(run_cli(*TIMED, "--label-smoothing", "0.1", "--ablate", "label_smoothing").out)
    assert found["epochs"] == 3
    assert len(three_epochs) == 2

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "train_epoch", stopped)
    for more, told in (
        (("--seeds", "3"), "--seed 1 --seeds 2 (with --epochs 3 instead of --minutes)"),
        (("--weight-decay", "0.1", "--ablate", "weight_decay"), "again (with --epochs 3 instead of --minutes) takes"),
    ):
        outcome = run_cli(*TIMED, *more)
        assert outcome.code == 130
        assert told in outcome.err


def test_minutes_from_python(run_cli: Cli, three_epochs: list[object]) -> None:
    keys = {"data.dataset": "synthetic", "model.backbone": "test_resnet", "train.precision": "fp32"}
    preset = cifar100cli.load_preset("quickstart", {**keys, "train.select": "last", "data.val_fraction": 0})
    result = cifar100cli.train(preset, minutes=1, device="cpu")
    assert result["epochs"] == 3
    with pytest.raises(errors.UsageError, match="--minutes 0: must be a finite number above 0"):
        cifar100cli.train(preset, minutes=0, device="cpu")
    assert len(three_epochs) == 1


def test_minutes_that_are_refused(run_cli: Cli, three_epochs: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    for more, told in (
        (("--epochs", "3"), "--minutes and --epochs both say how long to train"),
        (("--set", "train.epochs=3"), "--minutes and --set train.epochs both say how long to train"),
        (("--resume", "last"), "leave --minutes out"),
        (("--print-config",), "say how many --epochs"),
        (("--minutes", "0"), "--minutes 0: must be a finite number above 0"),
        (("--minutes", "-2"), "--minutes -2: must be a finite number above 0"),
        (("--minutes", "nan"), "--minutes nan: must be a finite number above 0"),
        (("--minutes", "inf"), "--minutes inf: must be a finite number above 0"),
        (("--minutes", "soon"), "'--minutes': must be a number"),
        (("--set", "distillation.teacher=nowhere"), "how long the teacher will take is not known beforehand"),
        (("--minutes", "0.3"), "one epoch of quickstart takes about 20 s here"),
    ):
        outcome = run_cli(*TIMED, *more)
        assert (outcome.code, outcome.out) == (2, ""), (more, outcome.err)
        assert told in outcome.err
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    outcome = run_cli(*TIMED)
    assert outcome.code == 2
    assert "with torchrun, say how many --epochs" in outcome.err
    assert not Path("runs").exists()
    assert len(three_epochs) == 1  # for the epoch that did not fit


# ------------------------------------------------------------------------------------------------- seeds


def test_seeds_are_runs_in_turn(run_cli: Cli) -> None:
    """Each is the run of its seed, to the bit; mean and deviation are NumPy's."""
    together = train(run_cli, "--seed", "4", "--seeds", "3")
    alone = train(run_cli, "--seed", "5")
    assert (together["n"], together["seeds"]) == (3, [4, 5, 6])
    top1 = [result["test"]["top1"] for result in together["runs"]]
    assert together["top1_mean"] == pytest.approx(np.mean(top1))
    assert together["top1_std"] == pytest.approx(np.std(top1, ddof=1))
    files = [Path(result["run_dir"]) / "model.safetensors" for result in (together["runs"][1], alone)]
    assert files[0].read_bytes() == files[1].read_bytes()
    outcome = run_cli("train", *TINY, "--epochs", "1", "--seeds", "2")
    assert "over 2 seeds" in outcome.out
    assert run_cli("train", "--resume", "last", "--seeds", "2").code == 2
    assert run_cli("train", "--seeds", "0").code == 2
    beyond = run_cli("train", *TINY, "--out", "elsewhere", "--seed", str(2**32 - 2), "--seeds", "3")
    assert (beyond.code, Path("elsewhere").exists()) == (2, False)
    assert "seeds end at 4294967295" in beyond.err


def test_a_seed_that_diverges_does_not_keep_the_others(run_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    train_epoch = trainer.train_epoch

    def diverging(steps: Any, config: Any, *rest: Any) -> Any:
        if config.seed in lost:
            raise errors.DivergedError("the loss was nan")
        return train_epoch(steps, config, *rest)

    monkeypatch.setattr(trainer, "train_epoch", diverging)
    command = ("train", *TINY, "--epochs", "1", "--seeds", "3", "--json")
    lost = {1}
    outcome = run_cli(*command)
    assert outcome.code == 4
    found = json.loads(outcome.out)
    assert (found["n"], found["seeds"]) == (2, [0, 2])
    assert found["top1_mean"] == pytest.approx(np.mean([run["test"]["top1"] for run in found["runs"]]))
    assert "error: 1 of 3 runs not counted: seed 1: the loss was nan; no epoch was finished" in outcome.err
    lost = {0, 2}
    single = json.loads(run_cli(*command, "--out", "others").out)
    assert (single["n"], single["top1_std"]) == (1, None)
    lost = {0, 1, 2}
    none = run_cli(*command, "--out", "none")
    assert (none.code, none.out) == (4, "")


def test_seeds_that_are_left_when_stopped(run_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "train_epoch", stopped)
    outcome = run_cli("train", *TINY, "--seeds", "3")
    assert outcome.code == 130
    assert "still to do after this run: --seed 1 --seeds 2" in outcome.err


# ----------------------------------------------------------------------------------------------- going on


def test_resume_takes_the_runs_own_settings(run_cli: Cli) -> None:
    result = train(run_cli, "--seed", "3")
    run = Path(result["run_dir"])
    again = run_cli("train", "--resume", run, "--json")
    assert (again.code, json.loads(again.out)) == (0, result)
    (run / "result.json").unlink()
    outcome = run_cli("train", "--resume", "last", "--lr", "0.7")
    assert outcome.code == 2
    assert "optimizer.lr" in outcome.err
    outcome = run_cli("train", "--resume", "last", *TINY, "--epochs", "2", "--json", "--device", "cpu")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["test"] == result["test"]


def test_resume_of_a_preset(run_cli: Cli) -> None:
    """The preset says whose run is meant; its settings are the run's own, and that is told."""
    result = train(run_cli, "--preset", "quickstart", "--label-smoothing", "0.2")
    run = Path(result["run_dir"])
    (run / "result.json").unlink()
    other = run_cli("train", "--preset", "resnet18-baseline", "--resume", "last")
    assert (other.code, "no unfinished run of resnet18-baseline" in other.err) == (3, True)
    other = run_cli("train", "--preset", "resnet18-baseline", "--resume", run)
    assert (other.code, "a run of quickstart, and not of resnet18-baseline" in other.err) == (2, True)
    wrong = run_cli("train", "--preset", "quickstart", "--epochs", "3", "--resume", "last")
    assert (wrong.code, "has train.epochs = 2, not 3" in wrong.err) == (2, True)
    outcome = run_cli("train", "--preset", "quickstart", "--epochs", "2", "--resume", "last", "--json")
    assert outcome.code == 0, outcome.err
    assert "goes on with its own settings, which quickstart has not" in outcome.err
    assert "train.epochs" not in outcome.err, "it was asked for again"
    assert "loss.label_smoothing = 0.2" in outcome.err
    assert json.loads(outcome.out)["test"] == result["test"]


def test_how_steps_are_taken_may_change_as_a_run_goes_on(run_cli: Cli) -> None:
    """Where memory is short, `off` takes less. (No graph is possible on a CPU: that is how it is seen to be taken.)"""
    result = train(run_cli, "--preset", "quickstart")
    run = Path(result["run_dir"])
    (run / "result.json").unlink()
    again = ("train", "--resume", "last", "--json", "--set")
    graph = run_cli(*again, "train.compile=graph")
    assert (graph.code, "train.compile = graph is not possible" in graph.err) == (2, True), graph.err
    off = run_cli(*again, "train.compile=off", "--preset", "quickstart")
    assert (off.code, json.loads(off.out)["test"]) == (0, result["test"]), off.err
    assert f"{run} goes on with train.compile = off, and was begun with auto\n" in off.err
    assert "train.compile = auto" not in off.err
    complete = run_cli("train", "--resume", run, "--set", "train.compile=graph")
    assert (complete.code, "goes on" in complete.err) == (0, False), complete.err


def test_a_run_that_was_moved(run_cli: Cli) -> None:
    """Its name and its preset are what it says and where it is, and not where it was."""
    run = Path(train(run_cli)["run_dir"]).rename("moved here")
    outcome = run_cli("train", "--resume", run)
    assert outcome.out.count("moved here") == 2, outcome.out
    assert "quickstart/" not in outcome.out
    assert json.loads(run_cli("train", "--resume", run, "--json").out)["run_dir"] == "moved here"
    (run / "result.json").unlink()
    outcome = run_cli("train", "--resume", "last", "--preset", "quickstart", "--out", ".", "--json")
    assert (outcome.code, json.loads(outcome.out)["run_dir"]) == (0, "moved here")


def test_a_complete_run_is_only_read(run_cli: Cli) -> None:
    """Also where its device is not at hand; there is nothing to train."""
    result = train(run_cli)
    environment = Path(result["run_dir"]) / "environment.json"
    environment.write_text(environment.read_text().replace('"device": "cpu"', '"device": "cuda:9"'))
    outcome = run_cli("train", "--resume", result["run_dir"], "--json")
    assert (outcome.code, json.loads(outcome.out)) == (0, result), outcome.err


def test_a_preset_that_is_whole_with_the_flags_alone(run_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("mine.yaml").write_text(
        "{data: {dataset: synthetic, batch_size: 64}, model: {backbone: test_resnet}, "
        "train: {epochs: 2, precision: fp32, select: best_val}, published: {top1: 0.5}}"
    )
    whole = ("train", "--preset", "./mine.yaml", "--device", "cpu", "--set", "data.val_fraction=0.1")
    assert run_cli("train", "--preset", "./mine.yaml").code == 2
    printed = run_cli(*whole, "--print-config")
    assert printed.code == 0, printed.err
    assert "published" not in yaml.safe_load(printed.out)
    first = train(run_cli, *whole[1:])
    (Path(first["run_dir"]) / "result.json").unlink()
    again = run_cli(*whole, "--resume", "last", "--json")
    assert (again.code, json.loads(again.out)["test"]) == (0, first["test"]), again.err
    assert "goes on with its own settings" not in again.err


def test_answers_that_are_no_numbers_are_a_divergence(run_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last step can spoil weights that stay finite: no run is complete with figures that are none."""
    from cifar100cli import metrics

    predict = metrics.logits_of

    def spoilt(*arguments: Any, **more: Any) -> Any:
        logits, labels = predict(*arguments, **more)
        return logits * float("nan"), labels

    monkeypatch.setattr(metrics, "logits_of", spoilt)
    last = ("--set", "train.select=last", "--set", "data.val_fraction=0")
    for more, advice in (
        ((), "a smaller optimizer.grad_clip"),
        (("--set", "optimizer.grad_clip=0"), "--set optimizer.grad_clip=5"),
    ):
        outcome = run_cli("train", *TINY, "--epochs", "1", *last, *more, "--json")
        assert (outcome.code, outcome.out) == (4, "")
        line = outcome.err.splitlines()[-1]
        assert "error: the loss on the test images was nan with the weights of epoch 1; the run is" in line
        assert line.endswith(f"; try a lower --lr, or {advice}")
    assert not list(Path("runs").glob("*/*/result.json"))


@pytest.mark.parametrize(("loss", "code"), [(9e14, 0), (1.1e15, 4)])
def test_a_loss_beyond_measure(run_cli: Cli, monkeypatch: pytest.MonkeyPatch, loss: float, code: int) -> None:
    """What is written can be read again: a loss is as good as infinite before the reader refuses it."""
    train_epoch = trainer.train_epoch

    def exploded(*arguments: Any) -> dict[str, float]:
        return {**train_epoch(*arguments), "train_loss": loss}

    monkeypatch.setattr(trainer, "train_epoch", exploded)
    outcome = run_cli("train", *TINY, "--epochs", "2")
    assert outcome.code == code, outcome.err
    if code:
        assert "error: train_loss was 1.100e+15 after epoch 1" in outcome.err
        return
    assert "loss 9.000e+14" in outcome.err
    (run,) = Path("runs").glob("*/*")
    assert len(RunDir.open(run).metrics()) == 2
    assert run_cli("report").out.count("quickstart") >= 1


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("result.json", "{}", "result.json: preset is missing"),
        ("state.safetensors", None, "has no state.safetensors"),
        ("state.safetensors", "x", "state.safetensors: corrupt"),
        ("metrics.jsonl", '{"epoch": 1}', "metrics.jsonl: lines are missing"),
    ],
)
def test_resuming_a_damaged_run(run_cli: Cli, name: str, content: str | None, words: str) -> None:
    run = Path(train(run_cli, epochs=3)["run_dir"])
    if name != "result.json":
        (run / "result.json").unlink()
    (run / name).unlink()
    if content is not None:
        (run / name).write_text(content)
    outcome = run_cli("train", "--resume", run)
    assert outcome.code == 3, outcome.err
    assert words in outcome.err.splitlines()[-1]


def test_a_run_in_use_is_left_alone(run_cli: Cli) -> None:
    run = Path(train(run_cli, epochs=1)["run_dir"])
    (run / "result.json").unlink()
    with RunDir(run).exclusively():
        outcome = run_cli("train", "--resume", run)
        assert outcome.code == 1
        assert "another process is training" in outcome.err.splitlines()[-1]
        outcome = run_cli("train", "--resume", "last")
        assert outcome.code == 3
        assert f"there is no other unfinished run to resume: {run}: another process is training" in outcome.err


def test_a_full_disk(run_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """As safetensors reports it, from the second epoch on; then there is room again."""
    expected = train(run_cli, epochs=3)["test"]
    calls = 0
    save_file = safetensors.torch.save_file

    def full(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save_file(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(tensors, "save_file", full)
        outcome = run_cli("train", *TINY, "--epochs", "3")
    assert outcome.code == 1
    line = outcome.err.splitlines()[-1]
    assert "No space left on device" in line
    run = line.split("--resume ")[1]
    assert not list(Path(run).glob(".*"))
    assert json.loads(run_cli("train", "--resume", run, "--json").out)["test"] == expected


def _unfinished(run_cli: Cli, monkeypatch: pytest.MonkeyPatch, epochs: int = 3) -> Path:
    """A run that was stopped after its first epoch."""
    train_epoch = trainer.train_epoch

    def stopped(steps: Any, config: Any, epoch: int, observer: Any) -> Any:
        if epoch == 2:
            raise KeyboardInterrupt
        return train_epoch(steps, config, epoch, observer)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_epoch", stopped)
        assert run_cli("train", *TINY, "--epochs", str(epochs)).code == 130
    return max(Path("runs").glob("*/*"))


def test_a_resume_that_cannot_end_well_is_not_begun(
    run_cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = _unfinished(run_cli, monkeypatch)
    assert json.loads((run / "environment.json").read_text())["device"] == "cpu"

    def refused(file: str, content: bytes | None, code: int, words: str) -> None:
        before = (run / file).read_bytes()
        if content is None:
            (run / file).unlink()
        else:
            (run / file).write_bytes(content)
        outcome = run_cli("train", "--resume", run)
        assert (outcome.code, len(outcome.err.splitlines())) == (code, 1), outcome.err
        assert words in outcome.err
        (run / file).write_bytes(before)

    environment = (run / "environment.json").read_bytes()
    elsewhere = environment.replace(b'"device": "cpu"', b'"device": "cuda:9"')
    refused("environment.json", elsewhere, 2, f"{run}: was begun on cuda:9, and ")
    refused("environment.json", elsewhere, 2, "; --device cpu goes on without it")
    refused("environment.json", environment.replace(b'"precision"', b'"p"'), 3, "does not say in which precision")
    refused("metrics.jsonl", b"{", 3, "missing or broken before epoch 1; bring them back, or train anew")
    assert run_cli("train", "--resume", run).code == 0
    refused("result.json", b"{", 3, "without this file, --resume measures the run again and writes it")
    figures = json.loads((run / "result.json").read_text())["test"]
    (run / "result.json").unlink()
    assert run_cli("train", "--resume", run).code == 0
    assert json.loads((run / "result.json").read_text())["test"] == figures


def test_selected_weights_that_the_training_state_has_not_are_not_done_without(
    run_cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state of a later epoch that was no better cannot bring them back."""
    run = _unfinished(run_cli, monkeypatch)
    state = checkpoint.read_state(run / "state.safetensors")
    about = {**state.about, "epoch": 2, "best_epoch": 1}
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text() * 2)
    checkpoint.save_state(state.path, checkpoint.Snapshot(state.tensors, about))
    model = checkpoint.load_model(run)
    other = model.card.model_copy(update={"epoch": 2})
    checkpoint.save_model(run / "other.safetensors", model.model.state_dict(), other)
    for content, words in (
        (b"", "corrupt, or no safetensors file"),
        (None, "there is no such file"),
        ((run / "other.safetensors").read_bytes(), "holds epoch 2, not 1"),
    ):
        if content is None:
            model.path.unlink()
        else:
            model.path.write_bytes(content)
        outcome = run_cli("train", "--resume", run)
        assert (outcome.code, len(outcome.err.splitlines())) == (3, 1), outcome.err
        assert words in outcome.err
        assert "held the epoch that was the best so far" in outcome.err


def test_the_last_run_is_the_one_begun_last(run_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was copied or touched since."""
    older, newer = (_unfinished(run_cli, monkeypatch) for _ in range(2))
    for run, started in ((older, "2026-01-01T12:00:00+09:00"), (newer, "2026-01-01T04:00:00+00:00")):
        about = json.loads((run / "environment.json").read_text())
        (run / "environment.json").write_text(json.dumps({**about, "started": started}))
    os.utime(older / "config.yaml")
    assert last_run(Path("runs")).path == newer
    for run in (older, newer):  # two within one second
        about = json.loads((run / "environment.json").read_text())
        (run / "environment.json").write_text(json.dumps({**about, "started": "2026-01-01T12:00:00+00:00"}))
    assert last_run(Path("runs")).path == older, "whose file was written last"
    (newer / "environment.json").write_text(json.dumps({**about, "started": "2026-01-01T12:00:01+00:00"}))
    shutil.copytree(older, older.with_name("copy"))
    assert last_run(Path("runs")).path == newer


def test_the_last_run_of_a_command_is_of_its_kind(run_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is one: a run that was begun later with `train` is not what `finetune-cifar10` goes on with."""
    older, newer = (_unfinished(run_cli, monkeypatch) for _ in range(2))
    for run, hour in ((older, 4), (newer, 12)):
        about = json.loads((run / "environment.json").read_text())
        (run / "environment.json").write_text(json.dumps({**about, "started": f"2026-01-01T{hour:02}:00:00+00:00"}))
    outcome = run_cli("finetune-cifar10", "--resume", "last")
    assert outcome.code == 2
    assert f"finetune-cifar10: {newer} is a run of quickstart, which does not fine-tune" in outcome.err
    settings = yaml.safe_load((older / "config.yaml").read_text()) | {"finetune": {"unfreeze": "fc"}}
    (older / "config.yaml").write_text(yaml.safe_dump(settings))
    for command, told in (
        ("train", f"goes on with {newer}"),
        ("finetune-cifar10", f"goes on with {older}"),
        ("distill", f"{newer} is a run of quickstart, which has no teacher"),
    ):
        assert told in _last_word(run_cli, monkeypatch, command, "--resume", "last")
    (older / "config.yaml").write_text("no settings")
    assert f"{newer} is a run of" in _last_word(run_cli, monkeypatch, "finetune-cifar10", "--resume", "last")


def _last_word(run_cli: Cli, monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> str:
    """What a command ends with: the run that it would go on with, which it holds by then, or what is wrong."""

    def told(preset: object, request: object, where: object, run: RunDir, *_: object, **__: object) -> None:
        assert run.in_use
        raise errors.CifarError(f"goes on with {run.path}")

    with monkeypatch.context() as patch:
        patch.setattr(execution, "one", told)
        return run_cli(*arguments).err.splitlines()[-1]


def test_the_last_run_is_one_of_the_settings_that_are_given(run_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs for a seed each are requeued by their own commands, whichever of them began last."""
    chosen = load_preset("quickstart")
    third, fifth = (
        RunDir.create(Path("runs"), chosen.name, having(chosen.config, "seed", seed), {"started": started})
        for seed, started in ((3, "2026-01-01T04:00:00+00:00"), (5, "2026-01-01T12:00:00+00:00"))
    )
    last = ("train", "--preset", "quickstart", "--resume", "last", "--device", "cpu")
    for given, run in (((), fifth), (("--seed", "3"), third), (("--seed", "5", "--epochs", "10"), fifth)):
        assert _last_word(run_cli, monkeypatch, *last, *given) == f"error: goes on with {run.path}"
    assert f"{fifth.path} has seed = 5, not 4" in _last_word(run_cli, monkeypatch, *last, "--seed", "4")
    with third.exclusively():
        in_use = f"to resume: {third.path}: another process is training this run right now"
        assert in_use in _last_word(run_cli, monkeypatch, *last, "--seed", "3")
    with fifth.exclusively():
        outcome = run_cli(*last, "--epochs", "3")
    assert f"passed over: {fifth.path}: another process is training this run right now\n" in outcome.err
    (third.path / "config.yaml").write_text("no settings")
    assert f"{fifth.path} has seed = 5, not 3" in _last_word(run_cli, monkeypatch, *last, "--seed", "3")


def test_seeds_that_are_left_when_one_has_not_begun(run_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from cifar100cli import jobs, workflows

    prepare = jobs.prepare

    def stopped(preset: Any, *arguments: Any, **keys: Any) -> Any:
        if preset.config.seed == 4:
            raise KeyboardInterrupt
        return prepare(preset, *arguments, **keys)

    with monkeypatch.context() as patch:
        patch.setattr(workflows, "prepare", stopped)
        outcome = run_cli("train", *TINY, "--epochs", "1", "--seed", "3", "--seeds", "3")
    assert outcome.code == 130
    assert "still to do: --seed 4 --seeds 2" in outcome.err
    assert "the same command" not in outcome.err
    Path("broken.safetensors").write_bytes(b"none")
    outcome = run_cli("train", *TINY, "--weights", "broken.safetensors", "--seeds", "3")
    assert (outcome.code, "still to do: --seed 0 --seeds 3" in outcome.err) == (3, True)
    outcome = run_cli("train", *TINY, "--batch-size", "1", "--seeds", "3")
    assert (outcome.code, "still to do" in outcome.err) == (2, False)  # no seed is better off


def begun(root: Path, **environment: str) -> RunDir:
    chosen = load_preset("quickstart")
    return RunDir.create(root, chosen.name, chosen.config, environment)


def test_the_line_to_resume_says_what_the_run_does_not_remember(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CIFAR100_DATA_DIR", raising=False)
    run = begun(tmp_path, data_dir=str(tmp_path / "own data"))
    assert run.to_go_on() == f"cifar100 train --resume {run.path}"
    (run.path / "tensorboard").mkdir()
    assert run.to_go_on() == f"cifar100 train --resume {run.path} --log tensorboard"
    monkeypatch.setenv("CIFAR100_DATA_DIR", str(tmp_path / "own data"))
    assert "--data-dir" not in run.to_go_on()
    monkeypatch.setenv("CIFAR100_DATA_DIR", str(tmp_path / "other"))  # is above what the run recorded
    assert run.to_go_on().endswith(f"--log tensorboard --data-dir '{tmp_path / 'own data'}'")


def test_a_run_knows_where_it_went_on(run_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(_unfinished(run_cli, monkeypatch))
    about = {**run.environment(), "ranks": 2, "device_name": "Another CPU", "commit": "0123abc"}
    (run.path / "environment.json").write_text(json.dumps(about))
    Path("elsewhere").mkdir()
    monkeypatch.setenv("CIFAR100_DATA_DIR", "nowhere")
    train_epoch = trainer.train_epoch

    def stopped(steps: Any, config: Any, epoch: int, observer: Any) -> Any:
        if epoch == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return train_epoch(steps, config, epoch, observer)

    command = ("train", "--resume", run.path, "--data-dir", "elsewhere", "--device", "cpu")
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_epoch", stopped)
        outcome = run_cli(*command)
    assert "epochs of this run were trained by 2 ranks, and it goes on with 1: it ends with other bits" in outcome.err
    elsewhere = Path("elsewhere").absolute()
    go_on = f"cifar100 train --resume {run.path} --data-dir {elsewhere}"
    assert outcome.err.endswith(f"once there is room again, resume with: {go_on}\n")
    begun = run.environment()
    (entry,) = begun["resumed"]
    assert begun == {**about, "resumed": [entry]}, "what was at the beginning remains"
    assert entry["command"] == ["cifar100", *map(str, command)]
    assert (entry["data_dir"], entry["ranks"]) == (str(elsewhere), 1)
    assert {"started", "commit", "device_name"} <= entry.keys()
    assert not {"device", "versions", "precision", "threads", "teacher"} & entry.keys(), "they are as they were"
    assert entry["train.compile"] == "auto"
    monkeypatch.delenv("CIFAR100_DATA_DIR")
    assert run_cli(*go_on.split()[1:4]).code == 0
    assert run.each_time("data_dir")[1:] == [str(elsewhere)] * 2
    assert f"2 x Another CPU, then {entry['device_name']}, fp32" in run_cli("report", "--json").out


def test_the_line_to_resume_names_the_device_that_was_chosen_instead(tmp_path: Path) -> None:
    run = begun(tmp_path, device="cuda:0")
    run.note_resumption({"device": "cpu"})
    assert run.to_go_on() == f"cifar100 train --resume {run.path} --device cpu"
    run.note_resumption({"device": "cuda:0", "train.compile": "off"})  # auto would be out of memory again
    assert run.to_go_on() == f"cifar100 train --resume {run.path} --set train.compile=off"
    run.note_resumption({"device": "cuda:0", "train.compile": "auto"})
    assert run.to_go_on() == f"cifar100 train --resume {run.path}"


def test_a_models_file_finds_the_data_of_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CIFAR100_DATA_DIR", raising=False)
    (tmp_path / "data").mkdir()
    run = begun(tmp_path, data_dir=str(tmp_path / "data"))
    for place in (run.path, run.path / runs.MODEL):
        assert places.data_folder(None, place) == tmp_path / "data"
    assert places.data_folder(None, tmp_path / "elsewhere.safetensors") != tmp_path / "data"


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_a_printed_preset_is_read_back_whatever_stdout_speaks(tmp_path: Path, encoding: str) -> None:
    weights = tmp_path / "josé 日本.safetensors"
    weights.touch()
    command = [sys.executable, "-m", "cifar100cli", "train", "--set", f"model.weights={weights}", "--print-config"]
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0", "LC_ALL": "C.UTF-8"}
    printed = subprocess.run(command, capture_output=True, check=True, env=environment, cwd=tmp_path).stdout
    (tmp_path / "mine.yaml").write_bytes(printed)
    assert load_preset(str(tmp_path / "mine.yaml")).config.model.weights == str(weights)


def test_a_command_goes_on_with_runs_of_its_own_job(run_cli: Cli) -> None:
    run = Path(train(run_cli, epochs=1)["run_dir"])
    for command, words in (("distill", "has no teacher"), ("finetune-cifar10", "does not fine-tune")):
        outcome = run_cli(command, "--resume", run, "-q")
        assert outcome.code == 2
        assert f"{words}; resume it with: cifar100 train --resume {run}" in outcome.err
    assert f"{run} is complete already" in run_cli("train", "--resume", run).err


def test_another_data_set_than_the_commands_is_told(run_cli: Cli, tmp_path: Path) -> None:
    preset = tmp_path / "mine.yaml"
    preset.write_text(run_cli("train", "--print-config", *TINY[:-2]).out, encoding="utf-8")
    plan = ("finetune-cifar10", "--preset", preset, "--unfreeze", "fc", "--dry-run", "--device", "cpu")
    told = "the preset mine is on Synthetic (drawn) data, and so is this run"
    assert told in run_cli(*plan).err
    assert told not in run_cli(*plan, "--dataset", "synthetic").err

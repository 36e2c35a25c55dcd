"""Trackers: read back with TensorBoard's own reader, and from what wandb wrote while offline."""

import errno
import json
import sys
import threading
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cifar100cli import runs, trackers
from tests.conftest import TINY, Cli, StopAfter, make_preset, only_run, train, where

pytestmark = pytest.mark.usefixtures("small_synthetic")


def scalars(run: Path) -> dict[str, dict[int, float]]:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {tag: {one.step: one.value for one in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_tensorboard(run_cli: Cli) -> None:
    outcome = run_cli("train", *TINY, "--epochs", "3", "--log", "tensorboard", "--json")
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    run = Path(result["run_dir"])
    found = scalars(run)
    for tag, name in (("loss/train", "train_loss"), ("top1/val", "val_top1"), ("lr", "lr")):
        assert found[tag] == pytest.approx({row["epoch"]: row[name] for row in metrics(run)}, rel=1e-6)
    assert found["result/test_top1"] == pytest.approx({result["best"]["epoch"]: result["test"]["top1"]}, rel=1e-6)
    plain = json.loads(run_cli("train", *TINY, "--epochs", "3", "--json").out)
    assert not (Path(plain["run_dir"]) / "tensorboard").exists()
    assert (Path(plain["run_dir"]) / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()


def test_a_run_that_goes_on_has_each_epoch_once(run_cli: Cli, tmp_path: Path) -> None:
    from cifar100cli import workflows

    tracked = trackers.Tracked(StopAfter(15), ["tensorboard"])
    with pytest.raises(KeyboardInterrupt), tracked:
        workflows.train(make_preset(), where(tmp_path), tracked)
    run = only_run(tmp_path).path
    assert [row["epoch"] for row in metrics(run)] == [1, 2]
    # An epoch that was told and not saved, as after a power cut.
    lost = trackers.TensorBoard()
    lost.begin(make_preset().config, run, 3)
    lost.epoch({"epoch": 3, "train_loss": 99.0})
    lost.close()
    outcome = run_cli("train", "--resume", run, "--log", "tensorboard")
    assert outcome.code == 0, outcome.err
    assert scalars(run)["loss/train"] == pytest.approx({row["epoch"]: row["train_loss"] for row in metrics(run)})


class FakeRun:
    """What wandb.init gives, with its calls."""

    def __init__(self, **how: Any) -> None:
        self.how = how
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.summary: dict[str, float] = {}
        self.ended: int | None = None

    def log(self, row: dict[str, float], step: int) -> None:
        self.rows.append((step, row))

    def finish(self, exit_code: int) -> None:
        self.ended = exit_code


@pytest.fixture
def wandb_runs(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    """The runs that are begun from here on, with a wandb that remembers what it was told."""
    begun: list[FakeRun] = []

    def init(**how: Any) -> FakeRun:
        begun.append(FakeRun(**how))
        return begun[-1]

    fake = SimpleNamespace(init=init, Settings=lambda **settings: settings, __spec__=ModuleSpec("wandb", None))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(trackers, "_check_wandb", lambda: None)
    return begun


def test_wandb(run_cli: Cli, wandb_runs: list[FakeRun]) -> None:
    outcome = run_cli("train", *TINY, "--epochs", "2", "--log", "wandb", "--log", "tensorboard", "--json")
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    (begun,) = wandb_runs
    run = Path(result["run_dir"])
    assert begun.how["project"] == "cifar100"
    assert begun.how["name"] == f"quickstart/{run.name}"
    assert begun.how["config"]["train"]["epochs"] == 2
    expected = [{name: value for name, value in row.items() if value is not None} for row in metrics(run)]
    assert begun.rows == [(row["epoch"], row) for row in expected]
    assert begun.summary["result/test_top1"] == result["test"]["top1"]
    assert begun.ended == 0
    assert (run / "tensorboard").is_dir()


def test_a_stopped_run_is_not_complete_and_keeps_its_id(tmp_path: Path, wandb_runs: list[FakeRun]) -> None:
    from cifar100cli import workflows

    with (
        pytest.raises(KeyboardInterrupt),
        trackers.Tracked(StopAfter(15), ["wandb"]) as tracked,
    ):
        workflows.train(make_preset(), where(tmp_path), tracked)
    run = only_run(tmp_path)
    for name in ("run-20260102_000000-qrst5678", "offline-run-20260101_000000-abcd-1234"):  # wandb names them so
        (run.path / "wandb" / name).mkdir(parents=True)
    moved = runs.RunDir(run.path.rename(tmp_path / "moved"))
    with trackers.Tracked(StopAfter(1000), ["wandb"]) as tracked:
        workflows.resume(moved, where(tmp_path), tracked)
    first, second = wandb_runs
    assert (first.ended, second.ended) == (1, 0)
    assert (first.how["id"], second.how["id"]) == (None, "qrst5678"), "one that wandb draws, and then the latest"
    assert [step for step, _ in first.rows + second.rows] == [1, 2, 3]


def test_a_tracker_that_fails_costs_no_run(
    run_cli: Cli, wandb_runs: list[FakeRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("no space left\non it")

    monkeypatch.setattr(FakeRun, "log", full)
    outcome = run_cli("train", *TINY, "--epochs", "2", "--log", "wandb")
    assert outcome.code == 0, outcome.err
    assert outcome.err.count("--log wandb stopped (no space left on it); the run goes on without it") == 1


def test_a_writer_whose_disk_is_full_says_so_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorBoard writes in a thread of its own; what ends that is no traceback of ours, if it is a full disk."""
    others: list[object] = []
    monkeypatch.setattr(threading, "excepthook", others.append)
    tracker = trackers.TensorBoard()
    tracker.begin(make_preset().config, tmp_path, 1)

    def raises(error: Exception) -> None:
        def work() -> None:
            raise error

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    raises(OSError(errno.ENOSPC, "No space left on device"))
    assert others == []
    raises(RuntimeError("something else"))
    assert len(others) == 1
    tracker.close()
    assert threading.excepthook == others.append
    assert capsys.readouterr().err == ""


def test_a_linked_folder_of_a_tracker_is_not_written_through(run_cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "treasure").mkdir()
    run = Path(train(run_cli, epochs=1)["run_dir"])
    (run / "result.json").unlink()
    (run / "tensorboard").symlink_to(tmp_path / "treasure")
    outcome = run_cli("train", "--resume", run, "--log", "tensorboard")
    assert (outcome.code, "tensorboard is a link" in outcome.err) == (3, True), outcome.err
    assert list((tmp_path / "treasure").iterdir()) == []


def test_wandb_itself_offline(run_cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    outcome = run_cli("train", *TINY, "--epochs", "1", "--log", "wandb", "--json")
    assert outcome.code == 0, outcome.err
    run = Path(json.loads(outcome.out)["run_dir"])
    (folder,) = run.glob("wandb/offline-run-*")
    drawn = trackers.drawn_id(run)
    assert drawn is not None
    assert (folder / f"run-{drawn}.wandb").is_file()
    assert "goes on without" not in outcome.err


def test_what_cannot_be_logged_to_is_told_before_anything_is_written(
    run_cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    for command in ("train", "distill", "finetune-cifar10"):
        outcome = run_cli(command, "--log", "mlflow")
        assert (outcome.code, len(outcome.err.splitlines())) == (2, 1)
        assert "must be one of tensorboard, wandb" in outcome.err
    with monkeypatch.context() as patch:
        online = SimpleNamespace(settings=SimpleNamespace(mode="online"))
        patch.setattr("wandb.setup", lambda settings: online)  # it keeps what an earlier run here was told
        for answer, words in (
            (False, "run `wandb login` first"),
            (ValueError("no\nserver"), "no server; WANDB_MODE=off"),
        ):
            patch.setattr("wandb.login", lambda prompt, answer=answer: _give(answer))
            outcome = run_cli("train", *TINY, "--log", "wandb")
            assert (outcome.code, len(outcome.err.splitlines())) == (2, 1)
            assert words in outcome.err
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    outcome = run_cli("train", *TINY, "--log", "tensorboard")
    assert outcome.code == 2
    assert outcome.err.endswith("--log tensorboard needs tensorboard: pip install tensorboard\n")
    assert not Path("runs").exists()


def _give(answer: object) -> object:
    if isinstance(answer, Exception):
        raise answer
    return answer

"""Epochs that are saved while the next one trains."""

import errno
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cifar100cli import checkpoint, interrupts, runs, tensors
from cifar100cli.optim import MovingAverage
from cifar100cli.runs import RunDir
from cifar100cli.saving import Saver
from cifar100cli.watcher import TrainState
from tests.conftest import Trained
from tests.test_checkpoint import CONFIG, make_card, make_model, trained

ROW = {"epoch": 1, "train_loss": 1.0, "train_top1": 0.1, "seconds": 1.0, "images_per_second": 9.0}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path, "mine", CONFIG, {"device": "cpu"})


class Gate:
    """Holds files back until it is opened; then writes them, or fails."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error
        self.reached, self.opened = threading.Event(), threading.Event()

    def save_file(self, tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        self.reached.set()
        assert self.opened.wait(30)
        if self.error is not None:
            raise self.error
        save_file(tensors, path, metadata)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    monkeypatch.setattr(tensors, "save_file", gate.save_file)
    yield gate
    gate.opened.set()


def moved(saved: Trained) -> None:
    with torch.no_grad():
        for parameter in saved.model.parameters():
            parameter.add_(1)


def assert_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    found = load_file(path)
    assert {name: tensor for name, tensor in found.items() if name in tensors}.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_what_is_written_is_the_epoch_though_training_has_moved_on(run: RunDir, gate: Gate) -> None:
    """In the second epoch, too, whose copies take the memory of the first's."""
    training = trained(make_model())
    before = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
    with Saver(run, make_card()) as saver:
        state = TrainState(1, 1, 0.5)
        saver.save(ROW, state, training)
        assert gate.reached.wait(30)
        assert not (run.path / runs.STATE).exists()
        moved(training)
        state.epoch = 2
        gate.opened.set()
        saver.wait()
        assert_file(run.path / runs.MODEL, before)
        assert_file(run.path / runs.STATE, {f"model.{name}": tensor for name, tensor in before.items()})

        after = {f"model.{name}": tensor.clone() for name, tensor in training.model.state_dict().items()}
        saver.save({**ROW, "epoch": 2}, TrainState(2, 1, 0.5), training)  # the first is still the best
        moved(training)
        saver.wait()
    assert_file(run.path / runs.STATE, after)
    assert_file(run.path / runs.MODEL, before)
    assert checkpoint.load_model(run.path / runs.MODEL).card.epoch == 1
    assert checkpoint.finished_epochs(run.path / runs.STATE) == len(run.metrics()) == 2


def test_the_average_is_the_model_that_is_kept(run: RunDir) -> None:
    model = make_model()
    average = MovingAverage(model, 0.9)
    training = Trained(model, trained(model).optimizer, average)
    moved(training)
    with Saver(run, make_card()) as saver:
        saver.save(ROW, TrainState(1, 1, 0.5), training)
    assert_file(run.path / runs.MODEL, average.tensors)
    assert load_file(run.path / runs.MODEL).keys() == model.state_dict().keys()
    assert_file(run.path / runs.STATE, {f"model.{name}": tensor for name, tensor in model.state_dict().items()})


def test_leaving_waits_for_what_is_on_its_way(run: RunDir, gate: Gate) -> None:
    """So that the word on how to go on names the last epoch that was trained."""

    def interrupted() -> None:
        with Saver(run, make_card()) as saver:
            saver.save(ROW, TrainState(1, 1, 0.5), trained(make_model()))
            threading.Timer(0.05, gate.opened.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert checkpoint.finished_epochs(run.path / runs.STATE) == 1


def test_a_full_disk_is_told_in_place_of_an_interrupt(run: RunDir, gate: Gate) -> None:
    """Or the user would hear of it when the run is to go on."""
    gate.error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "where")

    def interrupted() -> None:
        with Saver(run, make_card()) as saver:
            saver.save(ROW, TrainState(1, 1, 0.5), trained(make_model()))
            gate.opened.set()
            raise KeyboardInterrupt

    with pytest.raises(OSError, match="No space left"):
        interrupted()


@pytest.mark.parametrize("ask", ["check", "wait", "save"])
def test_a_failure_is_told_at_the_next_occasion(run: RunDir, gate: Gate, ask: str) -> None:
    gate.error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "where")
    training = trained(make_model())

    def two_epochs() -> None:
        with Saver(run, make_card()) as saver:
            saver.save(ROW, TrainState(1, 1, 0.5), training)
            saver.check()  # nothing is known yet
            gate.opened.set()
            if ask == "save":
                saver.save({**ROW, "epoch": 2}, TrainState(2, 2, 0.6), training)
            while ask == "check":
                saver.check()
            saver.wait()

    with pytest.raises(OSError, match="No space left"):
        two_epochs()
    assert len(run.metrics()) == 1
    assert not (run.path / runs.STATE).exists()
    assert not list(run.path.glob(".*.tmp"))


def test_a_signal_is_held_back_in_the_main_thread_alone() -> None:
    """A signal that came meanwhile is raised where Python raises signals, and a thread must not take it away."""
    thread = threading.Thread(target=held_back_in_vain, args=(inside := threading.Event(), go_on := threading.Event()))
    thread.start()
    assert inside.wait(30)
    assert interrupts._held_back == 0
    with interrupts.held_back():
        go_on.set()
        thread.join()
        assert interrupts._held_back == 1


def held_back_in_vain(inside: threading.Event, go_on: threading.Event) -> None:
    with interrupts.held_back():
        inside.set()
        assert go_on.wait(30)

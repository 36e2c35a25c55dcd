"""The loop: against a plain loop of torch, stopped and resumed to the bit, and honest about the test set."""

import copy
import errno
import json
import math
import os
import re
import unittest.mock
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load, load_file

from cifar100cli import (
    checkpoint,
    devices,
    evaluation,
    jobs,
    loader,
    metrics,
    report,
    runs,
    steps,
    synthetic,
    trainer,
    workflows,
)
from cifar100cli.config import Preset
from cifar100cli.errors import CifarError, DataError, DivergedError, FolderError, RunInterrupted, UsageError
from cifar100cli.folders import Where
from cifar100cli.loader import Batch, DeviceLoader, Plan
from cifar100cli.optim import MovingAverage, everything
from cifar100cli.runs import RunDir
from cifar100cli.steps import Training
from cifar100cli.tasks import StepOutput
from cifar100cli.trainer import Job
from cifar100cli.watcher import EpochProgress, TrainState
from tests.conftest import EVERYTHING, Cli, Listening, StopAfter, last_run, make_preset, only_run, where

pytestmark = pytest.mark.usefixtures("small_synthetic")


def test_equals_a_plain_loop(tmp_path: Path, small_synthetic: synthetic.Drawn) -> None:
    preset = make_preset(optimizer={"weight_decay": 2.0}, loss={"label_smoothing": 0.1}, train={"select": "best_test"})
    result = workflows.train(preset, where(tmp_path), Listening())

    images, labels = (torch.from_numpy(array) for array in small_synthetic.train)
    test_images, test_labels = (torch.from_numpy(array) for array in small_synthetic.test)
    torch.manual_seed(0)
    # Channels last, as ours is: other kernels would round otherwise, and three epochs make much of a little.
    model = timm.create_model("test_resnet", num_classes=100).to(memory_format=torch.channels_last)
    images, test_images = (i.contiguous(memory_format=torch.channels_last) for i in (images, test_images))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.001, betas=(0.9, 0.999), weight_decay=2.0, fused=False, foreach=False
    )
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    curve, accuracies = [], []
    for epoch in (1, 2, 3):
        order = np.random.default_rng([0, epoch]).permutation(400)
        total = 0.0
        model.train()
        for start in range(0, 400, 64):
            chosen = torch.from_numpy(order[start : start + 64])
            loss = criterion(model(images[chosen] / 255), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            total += loss.item() * len(chosen)
        curve.append(total / 400)
        with torch.inference_mode():
            predicted = model.eval()(test_images / 255).argmax(1)
        accuracies.append((predicted == test_labels).double().mean().item())

    rows = only_run(tmp_path).metrics()
    assert [row["train_loss"] for row in rows] == pytest.approx(curve, rel=1e-3)
    assert [row["test_top1"] for row in rows] == pytest.approx(accuracies, abs=0.011)  # two images of 200
    assert result["best"]["top1"] == max(row["test_top1"] for row in rows) == result["test"]["top1"]


RECIPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {"train": {"precision": "bf16"}},
    "sgd, cosine, augmented": {
        "optimizer": {"name": "sgd", "lr": 0.05},
        "schedule": {"name": "cosine", "warmup_epochs": 1},
        "augment": {"policy": "crop_flip"},
    },
    "all augmentation": {"augment": EVERYTHING, "data": {"normalize": "dataset"}, "loss": {"label_smoothing": 0.1}},
    "held out": {"data": {"val_fraction": 0.25, "normalize": "dataset"}, "train": {"select": "best_val"}},
    "best on test": {"train": {"select": "best_test"}},
    "arcface": {"model": {"head": "cosine"}, "loss": {"name": "arcface"}},
    "averaged": {"train": {"ema": 0.9, "select": "best_test"}},
    "muon, one cycle": {"optimizer": {"name": "muon", "decay_norms": False}, "schedule": {"name": "one_cycle"}},
    "sam, muon and sgd, by layers": {
        "model": {"head": "cosine"},
        "optimizer": {"name": "muon", "auxiliary": "sgd", "auxiliary_lr": 0.02, "layer_decay": 0.7, "sam_rho": 0.05},
        "schedule": {"name": "multi_step", "milestones": [1, 2], "warmup_epochs": 0.5},
    },
    "adaptive sam, linear": {
        "optimizer": {"sam_rho": 0.5, "sam_adaptive": True},
        "schedule": {"name": "linear", "final": 0.1},
    },
    "drop-out, stochastic depth, growing images": {
        "model": {"drop_rate": 0.2, "drop_path_rate": 0.5},
        "data": {"first_image_size": 16},
    },
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_stopped_and_resumed_ends_with_the_same_bits(tmp_path: Path, recipe: str) -> None:
    """Stopped in the first of three epochs; in the last step of the second, before it is saved; and again in that one.

    An epoch has 7 steps. Where images are held out it has 5, and the last two stops are in the third.
    """
    preset = make_preset(**RECIPES[recipe])
    unbroken, broken = where(tmp_path / "unbroken"), where(tmp_path / "broken")
    workflows.train(preset, unbroken, Listening())

    with pytest.raises(RunInterrupted):
        workflows.train(preset, broken, StopAfter(3))
    for taken in (14, 3):
        with pytest.raises(RunInterrupted):
            workflows.resume(only_run(tmp_path / "broken"), broken, StopAfter(taken))
    workflows.resume(only_run(tmp_path / "broken"), broken, Listening())

    one, other = only_run(tmp_path / "unbroken"), only_run(tmp_path / "broken")
    assert (one.path / runs.MODEL).read_bytes() == (other.path / runs.MODEL).read_bytes()
    assert (one.path / runs.STATE).read_bytes() == (other.path / runs.STATE).read_bytes()

    def untimed(content: Mapping[str, Any]) -> dict[str, Any]:
        return {
            k: v
            for k, v in content.items()
            if k not in ("seconds", "images_per_second", "peak_memory_bytes", "run_dir")
        }

    assert [untimed(row) for row in one.metrics()] == [untimed(row) for row in other.metrics()]
    assert untimed(one.result()) == untimed(other.result())


def test_an_epoch_measured_but_not_saved_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a kill between the line of metrics and the training state."""
    preset = make_preset()
    workflows.train(preset, where(tmp_path / "unbroken"), Listening())

    save_state = checkpoint.save_state
    calls = 0

    def killed_in_the_second_epoch(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        save_state(*arguments)

    monkeypatch.setattr(checkpoint, "save_state", killed_in_the_second_epoch)
    with pytest.raises(RunInterrupted):
        workflows.train(preset, where(tmp_path), Listening())
    assert len(only_run(tmp_path).metrics()) == 2
    workflows.resume(only_run(tmp_path), where(tmp_path), Listening())
    assert [row["epoch"] for row in only_run(tmp_path).metrics()] == [1, 2, 3]
    same = [(only_run(folder).path / runs.MODEL).read_bytes() for folder in (tmp_path, tmp_path / "unbroken")]
    assert same[0] == same[1]
    run = only_run(tmp_path)
    (run.path / runs.STATE).unlink()
    run.forget_after(1)
    assert trainer._saved_state(run) is None, "as after a kill in the first epoch"


@pytest.mark.parametrize("sections", [{}, {"train": {"ema": 0.9}}])
def test_weights_that_were_selected_and_not_saved_are_those_of_the_training_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any]
) -> None:
    """As after a full disk, or a kill, behind the training state of an epoch that was the best so far.

    Nothing is trained again for them: on a device that adds in any order, the epoch might not be the best any more.
    """
    train = {"select": "best_test", "epochs": 1, **sections.get("train", {})}
    preset = make_preset(**{**sections, "train": train})
    unbroken = workflows.train(preset, where(tmp_path / "unbroken"), Listening())

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.safetensors")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_model", full)
        with pytest.raises(FolderError, match="1 of 1 epochs are done and saved"):
            workflows.train(preset, where(tmp_path), Listening())
    run = only_run(tmp_path)
    assert not (run.path / runs.MODEL).exists()
    monkeypatch.setattr(trainer, "train_epoch", lambda *_: pytest.fail("an epoch was trained again"))
    resumed = workflows.resume(run, where(tmp_path), Listening())
    assert (resumed["best"], resumed["test"]) == (unbroken["best"], unbroken["test"])
    same = [(only_run(folder).path / runs.MODEL).read_bytes() for folder in (tmp_path, tmp_path / "unbroken")]
    assert same[0] == same[1]


def test_a_peak_of_memory_that_is_not_known_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "peak_memory", lambda _: None)
    result = workflows.train(make_preset(train={"epochs": 1}), where(tmp_path), Listening())
    run = only_run(tmp_path)
    assert run.result() == json.loads(json.dumps(result))
    assert not any("peak_memory_bytes" in told for told in (result, *run.metrics()))


def test_the_line_that_tells_how_to_go_on_has_the_trackers_that_began_with_the_run(tmp_path: Path) -> None:
    preset = make_preset()
    run = RunDir.create(tmp_path, preset.name, preset.config, {})
    job = cast(Job, SimpleNamespace(config=preset.config))

    def fill_the_disk() -> None:
        with workflows._in_words(job, run):
            (run.path / runs.TENSORBOARD).mkdir()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "state.safetensors")

    with pytest.raises(FolderError, match=r"resume with: cifar100 train --resume \S+ --log tensorboard$"):
        fill_the_disk()


def test_drop_out_and_augmentation_do_not_draw_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mask that follows from what an image was moved by would not be random beside it."""
    seeds: dict[str, set[int]] = {}
    derived_seed = loader.derived_seed
    for module in (loader, trainer):

        def spy(*parts: int, user: str = module.__name__) -> int:
            seeds.setdefault(user, set()).add(derived_seed(*parts))
            return derived_seed(*parts)

        monkeypatch.setattr(module, "derived_seed", spy)
    workflows.train(make_preset(), where(tmp_path), Listening())
    augmentation, drop_out = seeds["cifar100cli.loader"], seeds["cifar100cli.trainer"]
    assert (len(augmentation), len(drop_out)) == (4, 3)  # three epochs, and what lasts for all of them
    assert not augmentation & drop_out


@pytest.mark.parametrize("select", ["best_test", "best_val", "last"])
def test_the_test_set_is_looked_at_once_unless_the_protocol_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, select: str
) -> None:
    looks = []
    plan_of = DeviceLoader.plan

    def spy(self: DeviceLoader, number: int) -> Plan:
        if self.count == 200:  # the size of the test set, and of nothing else here
            looks.append(number)
        return plan_of(self, number)

    monkeypatch.setattr(DeviceLoader, "plan", spy)
    preset = make_preset(data={"val_fraction": 0.25}, train={"select": select})
    result = workflows.train(preset, where(tmp_path), Listening())
    assert len(looks) == (4 if select == "best_test" else 1)
    rows = only_run(tmp_path).metrics()
    assert all((row["test_top1"] is None) == (select != "best_test") for row in rows)
    assert all(0 <= row["val_top1"] <= 1 for row in rows)
    best = result["best"]
    if select == "last":
        assert best["epoch"] == 3
    else:
        split = select.removeprefix("best_")
        figures = [row[f"{split}_top1"] for row in rows]
        assert (best["top1"], best["epoch"]) == (max(figures), figures.index(max(figures)) + 1)
        assert best["split"] == split
    assert load_file(only_run(tmp_path).path / runs.MODEL)


def test_the_selected_weights_are_the_best_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that stops at the best epoch ends with the weights that the longer run selected."""
    figures, score = iter((0.1, 0.3, 0.2, 0.3, 0.1)), metrics.score
    with monkeypatch.context() as patch:  # such small ones are not better than chance, and any epoch may be the best
        patch.setattr(metrics, "score", lambda *found: replace(score(*found), top1=next(figures, 0.0)))
        long = make_preset(train={"select": "best_test", "epochs": 5}, optimizer={"lr": 0.02})
        best = workflows.train(long, where(tmp_path / "long"), Listening())["best"]
    assert (best["epoch"], best["top1"]) == (2, 0.3), "the first of two"
    short = make_preset(train={"select": "last", "epochs": 2}, optimizer={"lr": 0.02})
    workflows.train(short, where(tmp_path / "short"), Listening())
    one, other = (load_file(only_run(tmp_path / name).path / runs.MODEL) for name in ("long", "short"))
    assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize("name", ["arcface", "cosface"])
def test_the_margin_is_in_the_loss_and_nowhere_else(tmp_path: Path, name: str) -> None:
    """At the same weights a larger margin raises the training loss and leaves every measure as it was."""

    def first_epoch(margin: float) -> dict[str, Any]:
        sections: dict[str, Any] = {"model": {"head": "cosine"}, "optimizer": {"lr": 1e-9}}
        preset = make_preset(
            **sections, loss={"name": name, "margin": margin}, train={"select": "best_test", "epochs": 1}
        )
        workflows.train(preset, where(tmp_path / str(margin)), Listening())
        return only_run(tmp_path / str(margin)).metrics()[0]

    plain, with_margin = first_epoch(0.0), first_epoch(0.4)
    assert with_margin["train_loss"] > plain["train_loss"] + 1
    for key in ("train_top1", "test_loss", "test_top1", "test_top5"):
        assert with_margin[key] == pytest.approx(plain[key], abs=1e-4), key


def test_seeds_differ_and_the_same_seed_does_not(tmp_path: Path) -> None:
    def losses(seed: int, folder: str) -> list[float]:
        config = make_preset().config.model_copy(update={"seed": seed})
        workflows.train(Preset("mine", config), where(tmp_path / folder), Listening())
        return [row["train_loss"] for row in only_run(tmp_path / folder).metrics()]

    assert losses(0, "a") == losses(0, "b") != losses(1, "c")


def test_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    preset = make_preset(optimizer={"name": "sgd", "lr": 100, "grad_clip": 0}, train={"epochs": 50})
    with pytest.raises(DivergedError, match=r"epoch \d+.*learning rate 100.*lower --lr"):
        workflows.train(preset, where(tmp_path), Listening())
    run = only_run(tmp_path)
    assert not run.complete
    if (run.path / runs.MODEL).exists():
        assert all(torch.isfinite(tensor).all() for tensor in load_file(run.path / runs.MODEL).values())


def diverge_after(taken: int, preset: Preset, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Train, with a weight that is no number after so many steps in all, and give what the user is told."""

    class Spoil(Listening):
        steps = 0

        def step(self, _: int, glance: Callable[[], EpochProgress | None]) -> None:
            self.steps += 1
            if self.steps == taken:
                with torch.no_grad():
                    next(made[0].model.parameters()).fill_(float("nan"))

    prepare = jobs.prepare

    def remember(*arguments: Any, **keywords: Any) -> trainer.Job:
        made.append(prepare(*arguments, **keywords))
        return made[0]

    made: list[trainer.Job] = []
    monkeypatch.setattr(workflows, "prepare", remember)
    with pytest.raises(DivergedError) as failure:
        workflows.train(preset, where(folder), Spoil())
    return str(failure.value)


def test_weights_spoilt_by_the_last_step_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = diverge_after(14, make_preset(), tmp_path, monkeypatch)
    assert re.search(r"weights stopped being finite in epoch 2.*last good checkpoint is", said)
    run = only_run(tmp_path)
    assert run.diverged
    assert [unusable.reason for unusable in report.collect([tmp_path]).unusable] == [
        "its loss stopped being finite: 1 of 3 epochs"
    ]
    with pytest.raises(DataError, match=f"no unfinished run to resume; the loss of {run.path} stopped being finite"):
        last_run(tmp_path)
    assert len(run.metrics()) == 1
    assert all(torch.isfinite(tensor).all() for tensor in load_file(run.path / runs.MODEL).values())
    assert workflows.resume(run, where(tmp_path), Listening())["complete"]
    assert not run.diverged


def test_shared_weights_have_one_average() -> None:
    """Layers of some networks share weights (timm's CoaT), which then have two names and are still one tensor."""
    torch.manual_seed(0)
    first, second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    second.weight = first.weight
    model = torch.nn.Sequential(first, second)
    average = MovingAverage(model, 0.9)
    expected = first.weight.detach().double().clone()
    for step in range(3):
        with torch.no_grad():
            first.weight.add_(1)
        average.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * first.weight.detach().double()
    assert average.tensors.keys() == model.state_dict().keys()
    before = first.weight.detach().clone()
    with average.in_use():
        for name in ("0.weight", "1.weight"):
            torch.testing.assert_close(model.state_dict()[name].double(), expected, rtol=1e-5, atol=1e-6)
            assert torch.equal(average.tensors[name], before)
    assert torch.equal(second.weight, before)
    torch.testing.assert_close(average.tensors["1.weight"].double(), expected, rtol=1e-5, atol=1e-6)


def test_the_average_is_what_is_measured_and_kept(tmp_path: Path) -> None:
    """Against an average in float64 over the weights after every step, batch statistics included."""
    weights: list[dict[str, torch.Tensor]] = []
    made: list[trainer.Job] = []

    class Collect(Listening):
        def step(self, taken: int, glance: Callable[[], EpochProgress | None]) -> None:
            weights.append({name: t.double().clone() for name, t in made[0].model.state_dict().items()})

    job = jobs.prepare(make_preset(train={"ema": 0.7}), where(tmp_path), Listening())
    made.append(job)
    average = {name: t.double().clone() for name, t in job.model.state_dict().items()}
    run = runs.RunDir.create(tmp_path / "runs", "mine", job.config, {})
    trainer.fit(job, run, Collect())
    assert len(weights) == 21
    for step, after in enumerate(weights):
        decay = min(0.7, (1 + step) / (10 + step))
        average = {name: decay * average[name] + (1 - decay) * after[name] for name in average}
    kept, live = load_file(run.path / runs.MODEL), job.model.state_dict()
    for name, tensor in kept.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor.double(), average[name], rtol=1e-4, atol=1e-6)
        else:
            assert torch.equal(tensor, live[name])
        assert torch.equal(live[name].double(), weights[-1][name]), "training goes on with the weights themselves"
    assert any(not torch.equal(kept[name], live[name]) for name in kept)


def test_the_figures_are_the_averages(tmp_path: Path) -> None:
    """What `evaluate` measures of the kept weights is what the epoch said."""
    preset = make_preset(train={"ema": 0.9, "select": "best_test", "epochs": 2})
    result = workflows.train(preset, where(tmp_path), Listening())
    measured = evaluation.measure([only_run(tmp_path).path], where(tmp_path), Listening()).result
    row = only_run(tmp_path).metrics()[result["best"]["epoch"] - 1]
    assert (measured["top1"], measured["loss"]) == (row["test_top1"], pytest.approx(row["test_loss"], rel=1e-6))


def dense(preset: Preset, tmp_path: Path) -> Training:
    """Steps of a network without convolutions, which a CPU is very slow at in fp16."""
    job = jobs.prepare(preset, where(tmp_path), Listening())
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(3072, 64), torch.nn.GELU(), torch.nn.Linear(64, 100)
    )
    return trainer.prepare_steps(replace(job, model=model, groups=everything(model)))


FP16: dict[str, Any] = {"train": {"precision": "fp16", "ema": 0.9}, "optimizer": {"name": "sgd", "lr": 0.01}}


def test_fp16_equals_a_plain_loop_with_a_scaler(tmp_path: Path, small_synthetic: synthetic.Drawn) -> None:
    """From a scale at which the first gradients overflow: the steps that torch leaves out, ours leaves out too."""
    preset = make_preset(**FP16)
    training = dense(preset, tmp_path)
    model = copy.deepcopy(training.model)
    training.scaler.load_state_dict({**training.scaler.state_dict(), "scale": 2.0**24})
    taken = steps.Steps(training)
    rows = [trainer.train_epoch(taken, preset.config, epoch, Listening().step) for epoch in (1, 2)]

    images, labels = (torch.from_numpy(array) for array in small_synthetic.train)
    plain = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-4)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    curve, skipped = [], 0
    for epoch in (1, 2):
        order = np.random.default_rng([0, epoch]).permutation(400)
        total = 0.0
        for start in range(0, 400, 64):
            chosen = torch.from_numpy(order[start : start + 64])
            with torch.autocast("cpu", torch.float16):
                logits = model(images[chosen] / 255)
            loss = torch.nn.functional.cross_entropy(logits.float(), labels[chosen])
            plain.zero_grad()
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            scaler.unscale_(plain)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            before = scaler.get_scale()
            scaler.step(plain)
            scaler.update()
            skipped += scaler.get_scale() < before
            total += loss.item() * len(chosen)
        curve.append(total / 400)
    assert skipped
    assert training.scaler.state_dict() == scaler.state_dict()
    assert [row["train_loss"] for row in rows] == pytest.approx(curve, rel=1e-3)


def test_fp16_and_the_average_go_on_with_the_same_bits(tmp_path: Path) -> None:
    """The scale halves at first and doubles every four steps here, so that all of it has to be kept."""
    preset = make_preset(**FP16)

    def trained(epochs: range, saved: checkpoint.Saved | None = None) -> Training:
        training = dense(preset, tmp_path)
        training.scaler.load_state_dict({**training.scaler.state_dict(), "scale": 2.0**24, "growth_interval": 4})
        if saved is not None:
            checkpoint.restore(saved, training)
        for epoch in epochs:
            trainer.train_epoch(steps.Steps(training), preset.config, epoch, Listening().step)
        return training

    unbroken = trained(range(1, 5))
    checkpoint.save_state(tmp_path / "state", checkpoint.snapshot(TrainState(2, 2, -1.0), trained(range(1, 3))))
    broken = trained(range(3, 5), checkpoint.read_state(tmp_path / "state"))
    assert broken.scaler.state_dict() == unbroken.scaler.state_dict()
    for ours, theirs in (
        (broken.model.state_dict(), unbroken.model.state_dict()),
        (broken.average.tensors, unbroken.average.tensors),
    ):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def overflowing(tmp_path: Path, precision: str, steps_of_seven: int) -> None:
    """An epoch in which the loss of the first steps is infinite."""
    training = dense(make_preset(train={"precision": precision}), tmp_path)
    left, usual = steps_of_seven, training.task

    def task(model: torch.nn.Module, batch: Batch) -> StepOutput:
        nonlocal left
        output = usual(model, batch)
        left -= 1
        return StepOutput(output.loss * (float("inf") if left >= 0 else 1), output.logits)

    taken = steps.Steps(replace(training, task=task))
    row = trainer.train_epoch(taken, make_preset().config, 1, Listening().step)
    assert 3 < row["train_loss"] < 6
    assert all(torch.isfinite(tensor).all() for tensor in training.model.state_dict().values())


def test_an_overflow_in_fp16_is_no_error(tmp_path: Path) -> None:
    overflowing(tmp_path, "fp16", 3)
    for precision, count in (("fp16", 4), ("fp32", 1)):
        with pytest.raises(DivergedError, match="the loss was inf in epoch 1, step 1 of 7"):
            overflowing(tmp_path, precision, count)


@pytest.mark.parametrize(
    ("precision", "advice"),
    [
        ("fp32", "try a lower --lr, or a smaller optimizer.grad_clip"),
        ("fp16", "try a lower --lr, or a smaller optimizer.grad_clip, or --set train.precision=fp32"),
    ],
)
def test_a_divergence_in_fp16_may_be_that_of_fp16(tmp_path: Path, precision: str, advice: str) -> None:
    job = replace(jobs.prepare(make_preset(), where(tmp_path), Listening()), precision=precision)
    with pytest.raises(DivergedError) as told, workflows._in_words(job, runs.RunDir(tmp_path)):
        raise DivergedError("the loss was nan in epoch 1")
    assert str(told.value).endswith(f"; {advice}")


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("off", "lower --batch-size or --image-size; no epoch"),
        ("graph", "or go on with --set train.compile=off, which takes less; no epoch"),
    ],
)
def test_out_of_memory_tells_what_takes_less(tmp_path: Path, name: str, remedy: str) -> None:
    """A captured step keeps its memory while the last batch and the held-out images are looked at."""
    job = replace(jobs.prepare(make_preset(), where(tmp_path), Listening()), step_mode=steps.StepMode(name, ""))
    with pytest.raises(CifarError, match=remedy), workflows._in_words(job, runs.RunDir(tmp_path)):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


@pytest.mark.parametrize(
    ("taken", "epoch", "step", "rate"),
    [(3, 1, 4, 0.1 * 4 / 7), (9, 2, 3, 0.05 * (1 + math.cos(math.pi * 2 / 343)))],
    ids=["warm-up", "cosine"],
)
def test_a_divergence_names_the_rate_of_its_step(
    taken: int, epoch: int, step: int, rate: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a schedule the rate of the epoch's last step is another. The formulas are those of torch's schedulers."""
    preset = make_preset(
        optimizer={"name": "sgd", "lr": 0.1},
        schedule={"name": "cosine", "warmup_epochs": 1},
        train={"epochs": 50},
    )
    said = diverge_after(taken, preset, tmp_path, monkeypatch)
    found = re.search(r"the loss was nan in epoch (\d+), step (\d+) of 7, at learning rate ([\d.]+)", said)
    assert found is not None, said
    assert (int(found[1]), int(found[2])) == (epoch, step)
    assert float(found[3]) == pytest.approx(rate, rel=1e-5)


def test_resuming_in_another_precision_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    preset = make_preset(train={"precision": "auto"})
    with pytest.raises(RunInterrupted):
        workflows.train(preset, where(tmp_path), StopAfter(9))
    assert json.loads((only_run(tmp_path).path / runs.ENVIRONMENT).read_text())["precision"] == "bf16"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False})
    with pytest.raises(UsageError, match="begun in bf16"):
        workflows.resume(only_run(tmp_path), where(tmp_path), Listening())


@pytest.mark.parametrize(
    ("capabilities", "expected"), [({}, "fp32"), ({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16")]
)
def test_auto_precision_asks_the_processor(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert devices.resolve_precision("auto", torch.device("cpu")) == expected
    assert devices.resolve_precision("fp32", torch.device("cpu")) == "fp32"


@pytest.mark.parametrize(
    ("name", "bf16", "capability", "expected"),
    [
        ("NVIDIA A100-SXM4-40GB", True, (8, 0), "bf16"),
        ("NVIDIA RTX 2000 Ada Generation", True, (8, 9), "bf16"),
        ("Tesla T4", False, (7, 5), "fp16"),
        ("Tesla V100-SXM2-16GB", False, (7, 0), "fp16"),
        ("NVIDIA TITAN RTX", False, (7, 5), "fp16"),
        ("Quadro RTX 4000", False, (7, 5), "fp16"),
        ("NVIDIA GeForce RTX 2060", False, (7, 5), "fp16"),
        ("NVIDIA GeForce GTX 1660 Ti", False, (7, 5), "fp32"),
        ("NVIDIA GeForce GTX 1650 with Max-Q Design", False, (7, 5), "fp32"),
        ("NVIDIA GeForce MX450", False, (7, 5), "fp32"),
        ("NVIDIA T500", False, (7, 5), "fp32"),
        ("NVIDIA T600 Laptop GPU", False, (7, 5), "fp32"),
        ("Quadro T1000", False, (7, 5), "fp32"),
        ("NVIDIA T1200 Laptop GPU", False, (7, 5), "fp32"),
        ("NVIDIA GeForce GTX 1080", False, (6, 1), "fp32"),
    ],
)
def test_auto_precision_asks_the_gpu(
    monkeypatch: pytest.MonkeyPatch, name: str, bf16: bool, capability: tuple[int, int], expected: str
) -> None:
    """By NVIDIA's names, where the compute capability of those with tensor cores is that of those without."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.version, "hip", None)
    device = torch.device("cuda", 0)
    assert devices.resolve_precision("auto", device) == expected
    adamw, muon = (make_preset(optimizer={"name": name}, train={"precision": "auto"}) for name in ("adamw", "muon"))
    assert devices.precision_of(adamw.config, device) == expected
    assert devices.precision_of(muon.config, device) == ("fp32" if expected == "fp16" else expected)  # skips no step


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("gfx90a:sramecc+:xnack-", "bf16"),
        ("gfx908", "bf16"),
        ("gfx942:sramecc+:xnack-", "bf16"),
        ("gfx950", "bf16"),
        ("gfx1100", "bf16"),
        ("gfx1201", "bf16"),
        ("gfx1030", "fp32"),
        ("gfx906", "fp32"),
        ("gfx900", "fp32"),
    ],
)
def test_auto_precision_asks_amds_gpus_by_their_architecture(
    monkeypatch: pytest.MonkeyPatch, architecture: str, expected: str
) -> None:
    """PyTorch says of each that it has bf16: an MI50 or an RX 6800 computes it slowly, without matrix units."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    properties = unittest.mock.Mock(gcnArchName=architecture)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert devices.resolve_precision("auto", torch.device("cuda", 0)) == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_here() -> None:
    with pytest.raises(UsageError, match="no CUDA device"):
        devices.select_device("cuda:1")
    assert devices.select_device("cpu") == torch.device("cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_an_epoch_on_cuda_never_waits_before_its_end(tmp_path: Path) -> None:
    preset = make_preset(augment=EVERYTHING, data={"normalize": "dataset"})
    job = jobs.prepare(preset, Where(tmp_path, tmp_path, tmp_path, "cuda"), Listening())
    training = trainer.prepare_steps(job)
    taken = steps.create_steps(training, job.step_mode)

    class Watch(Listening):
        steps = 0

        def step(self, taken: int, glance: Callable[[], EpochProgress | None]) -> None:
            self.steps = taken  # the last one again and again, until it is done
            glance()
            torch.cuda.set_sync_debug_mode("error")

    def epoch(number: int, observer: Listening) -> None:
        trainer.train_epoch(taken, job.config, number, observer.step)

    epoch(1, Listening())
    watch = Watch()
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):  # the one wait, for the sums, after every step is issued
            epoch(2, watch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert watch.steps == len(job.loaders.train)


@pytest.mark.parametrize(
    "augment",
    [{"policy": "none"}, {"policy": "crop_flip"}, {"policy": "one_of"}, EVERYTHING],
    ids=["none", "crop_flip", "one_of", "everything"],
)
def test_deterministic_mode(tmp_path: Path, augment: dict[str, Any]) -> None:
    """PyTorch itself refuses what has no deterministic kernel; on a CPU this changes no bit."""
    seen: list[bool] = []

    class Watch(Listening):
        def step(self, taken: int, glance: Callable[[], EpochProgress | None]) -> None:
            seen.append(torch.are_deterministic_algorithms_enabled())

    ends = []
    for wanted in (True, False):
        preset = make_preset(train={"deterministic": wanted, "epochs": 2}, augment=augment)
        result = workflows.train(preset, where(tmp_path), Watch())
        ends.append((Path(result["run_dir"]) / runs.MODEL).read_bytes())
    assert seen == [True] * (len(seen) // 2) + [False] * (len(seen) // 2)
    assert not torch.are_deterministic_algorithms_enabled()
    weights = [load(end) for end in ends]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_dry_run_finds_what_is_not_deterministic(run_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that PyTorch refuses in a run is refused in a try, too, and in words."""

    def step(*_: object) -> None:
        assert torch.are_deterministic_algorithms_enabled()
        raise RuntimeError("upsample_backward does not have a deterministic implementation, but you set '...'")

    monkeypatch.setattr(steps.Training, "step", step)
    for more in (("--dry-run",), ()):
        outcome = run_cli("train", "--epochs", "1", "--set", "train.deterministic=true", *more)
        assert outcome.code == 1
        assert "(train.deterministic = true), and PyTorch has no deterministic upsample_backward" in outcome.err
        assert "Traceback" not in outcome.err


def test_a_glance_is_what_the_epoch_says_in_the_end(tmp_path: Path) -> None:
    glances: list[EpochProgress | None] = []
    rows: list[Mapping[str, Any]] = []

    class Looking(Listening):
        def step(self, taken: int, glance: Callable[[], EpochProgress | None]) -> None:
            glances.append(glance())

        def epoch(self, row: Mapping[str, Any], state: TrainState) -> None:
            rows.append(row)

    workflows.train(make_preset(train={"epochs": 1}, data={"batch_size": 50}), where(tmp_path), Looking())
    known = [glance for glance in glances if glance is not None]
    assert [glance.images for glance in known] == list(range(50, rows[0]["images"] + 1, 50))
    assert known[-1].loss == pytest.approx(rows[0]["train_loss"], rel=1e-6)
    assert known[-1].top1 == pytest.approx(rows[0]["train_top1"])


def test_whoever_watches_sees_a_gpu_catch_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured steps are issued long before they are done, and only then is there something to measure."""
    left, seen = [3], list[int | str]()

    def all_done(_: steps.Steps) -> Callable[[], bool]:
        def asked() -> bool:
            left[0] -= 1
            return left[0] < 0

        return asked

    class Watching(Listening):
        def step(self, taken: int, glance: Callable[[], EpochProgress | None]) -> None:
            seen.append(taken)

        def measure(self, known: EpochProgress) -> None:
            seen.append(f"{known.steps} steps, {known.images} images")

    monkeypatch.setattr(steps.Steps, "all_done", all_done)
    clock = iter((100.0, 104.0, 109.1234))  # the epoch begins, is trained, and is measured
    pretended = SimpleNamespace(perf_counter=lambda: next(clock), monotonic=lambda: 0.0, sleep=lambda _: None)
    monkeypatch.setattr(trainer, "time", pretended)
    workflows.train(make_preset(train={"epochs": 1}, schedule={"name": "cosine"}), where(tmp_path), Watching())
    assert seen == [1, 2, 3, 4, 5, 6, 7, 7, 7, 7, "7 steps, 400 images"]
    (row,) = only_run(tmp_path).metrics()
    assert (row["seconds"], row["images_per_second"]) == (9.123, 100.0)
    assert row["lr"] == pytest.approx(0.0005 * (1 + math.cos(math.pi * 6 / 7))), "of its last step"


def test_images_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training sees small ones first; every look at the test set sees them whole, and so does the checkpoint."""
    seen: list[tuple[int, int]] = []
    batch = DeviceLoader.batch

    def spy(self: DeviceLoader, plan: Plan, rows: Any) -> Batch:
        made = batch(self, plan, rows)
        seen.append((self.count, made.inputs.shape[-1]))
        return made

    monkeypatch.setattr(DeviceLoader, "batch", spy)
    preset = make_preset(
        data={"image_size": 64, "first_image_size": 32, "grow_until": 0.8},
        train={"epochs": 5, "select": "best_test"},
    )
    workflows.train(preset, where(tmp_path), Listening())
    run = only_run(tmp_path)
    # 32 + 32 (e - 1) / 4, in steps of 16; after 0.8 of 5 epochs, and in the last epoch at any rate, 64
    assert [row["image_size"] for row in run.metrics()] == [32, 32, 48, 48, 64]
    assert [size for count, size in seen if count == 400] == [32] * 14 + [48] * 14 + [64] * 7
    assert {size for count, size in seen if count == 200} == {64}
    assert checkpoint.load_model(run.path).card.image_size == 64
    assert workflows.dry_run(preset, where(tmp_path), Listening())["batch"] == [64, 3, 64, 64]


def test_state_is_plain(tmp_path: Path) -> None:
    workflows.train(make_preset(), where(tmp_path), Listening())
    saved = checkpoint.read_state(only_run(tmp_path).path / runs.STATE)
    tensors, about = saved.tensors, saved.about
    assert TrainState(**{key: about[key] for key in ("epoch", "best_epoch", "best_top1")}) == TrainState(3, 3, -1.0)
    assert all(name.startswith(("model.", "optimizer.")) for name in tensors)

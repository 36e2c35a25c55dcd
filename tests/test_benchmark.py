"""`bench`: what it compares is the same training, what it counts is right, and what it prints adds up."""

import json
import pickle
import random
import unittest.mock
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

from cifar100cli import benchmark, erasing, flops, jobs, plain_loop, show, time_limit, timing
from cifar100cli.catalog import DATASETS, DatasetName
from cifar100cli.config import Override, Preset, differences, load_preset
from cifar100cli.datasets import Dataset, Split
from cifar100cli.errors import UsageError
from cifar100cli.schema import Augment, Config
from cifar100cli.steps import StepMode
from cifar100cli.timing import Sides, StepCost, without_files
from cifar100cli.whole_run import FrozenPart, Rates, full_run, images_of
from tests.conftest import EVERYTHING, Cli, Listening, epoch_of, make_preset, where


def sides_of(tmp_path: Path, **sections: dict[str, Any]) -> Sides:
    return Sides(make_preset(**sections), 50_000, where(tmp_path), Listening(), steps=1)


@pytest.mark.parametrize(
    ("sections", "tolerance"),
    [
        ({}, 1e-5),
        ({"data": {"normalize": "imagenet"}}, 1e-5),
        ({"model": {"head": "cosine"}, "loss": {"name": "arcface"}}, 1e-5),
        ({"data": {"image_size": 48}}, 1e-2),  # OpenCV resizes to whole grey levels
    ],
)
def test_the_plain_way_is_the_same_training(
    tmp_path: Path, sections: dict[str, dict[str, Any]], tolerance: float
) -> None:
    """With one batch of all images the order makes no difference: from the same weights, the same two losses."""
    sides = sides_of(tmp_path, **sections)
    plain_loop = sides.plain_loop()
    assert plain_loop is not None
    plain = [plain_loop.epoch() for _ in range(2)]
    losses = []
    for _ in range(2):
        sides.loop()
        losses.append(sides.loop_steps.losses.item())
    assert losses == pytest.approx(plain, rel=tolerance)
    assert losses[1] < losses[0]


@pytest.mark.parametrize(
    "augment",
    [
        {"policy": "flip", "flip": "alternating"},
        {"policy": "crop_flip"},
        {"policy": "crop_flip", "flip": "none", "padding_mode": "reflect", "crop_padding": 16},
        {"policy": "one_of"},
        {"auto": "randaugment"},
        {"auto": "trivialaugment", "policy": "flip"},
        {"cutout": 9},
        {"erasing": 0.5},
    ],
)
def test_the_plain_way_augments(tmp_path: Path, augment: dict[str, Any]) -> None:
    plain_loop = sides_of(tmp_path, augment=augment).plain_loop()
    assert plain_loop is not None
    images = plain_loop.batches.dataset
    random.seed(0)  # whose numbers the plain way takes, as most code does
    once, again = (torch.stack([images[index][0] for index in range(64)]) for _ in range(2))
    assert once.shape == (64, 3, 32, 32)
    assert 0 <= once.min() <= once.max() <= 1
    assert not torch.equal(once, again)


def test_the_plain_way_covers_what_ours_does() -> None:
    """A white image, with a square of the mean colour whose centre is on any pixel."""
    color = (124, 116, 104)
    (change,) = plain_loop.changes(Augment(cutout=9), color)
    found = np.stack([change(np.full((32, 32, 3), 255, np.uint8)) for _ in range(3000)])
    assert ((found == 255).all(3) | (found == color).all(3)).all()
    ours = erasing.cutout(9, color)
    white = torch.full((3000, 3, 32, 32), 255, dtype=torch.uint8)
    other = ours.apply(white, *ours.draw(epoch_of(3000))).permute(0, 2, 3, 1).numpy()
    shares = [(some == color).all(3).mean(0) for some in (found, other)]
    assert np.abs(shares[0] - shares[1]).max() < 5 * (2 * 0.08 / 3000) ** 0.5


def test_only_mixing_has_no_plain_way() -> None:
    """A block that is new and not known there would be compared with its absence."""
    for name, field in Augment.model_fields.items():
        if field.default in (0, "none"):
            changes = plain_loop.changes(Augment.model_validate({name: EVERYTHING[name]}), (0, 0, 0))
            assert bool(changes) == (name not in ("mixup", "cutmix")), name


@pytest.mark.parametrize("augment", [EVERYTHING, {"policy": "one_of"}, {"auto": "randaugment"}], ids=str)
def test_the_plain_way_goes_to_workers_that_are_not_forked(augment: dict[str, Any]) -> None:
    changes = plain_loop.changes(Augment.model_validate(augment), (0, 0, 0))
    picture = np.zeros((32, 32, 3), np.uint8)
    for change in pickle.loads(pickle.dumps(changes)):  # noqa: S301 - our own
        picture = change(picture)
    assert picture.shape == (32, 32, 3)
    assert picture.dtype == np.uint8


def test_mixing_has_no_plain_way(tmp_path: Path) -> None:
    preset = make_preset(augment={"cutmix": 1.0, "mixup": 0.2})
    result = benchmark.bench(preset, where(tmp_path), Listening(), steps=1, repeats=1)
    assert set(result["images_per_second"]) == {"loop", "bare", "evaluation", "bare_evaluation"}


def test_a_plain_way_without_memory_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is measured of the other sides is not lost."""
    full = unittest.mock.Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    monkeypatch.setattr(Sides, "plain_loop", full)
    watcher = Listening()
    result = benchmark.bench(make_preset(), where(tmp_path), watcher, steps=1, repeats=1)
    assert set(result["images_per_second"]) == {"loop", "bare", "evaluation", "bare_evaluation"}
    assert watcher.said[-1] == "the plain way is left out: cpu has no memory for it beside the other sides"


@pytest.mark.parametrize(("device", "taken"), [("cuda", 1), ("cpu", 0)])
def test_a_gpus_memory_is_tried_before_the_turns(device: str, taken: int) -> None:
    """What a step takes is not there yet when the plain way is made ready."""
    plain = unittest.mock.Mock()
    sides = unittest.mock.Mock(job=unittest.mock.Mock(device=torch.device(device)))
    sides.plain_loop.return_value = plain
    assert benchmark._plain_loop(sides, Listening()) is plain
    assert plain.epoch.call_count == taken
    plain.epoch.side_effect = RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
    assert benchmark._plain_loop(sides, Listening()) is (None if taken else plain)
    sides.plain_loop.side_effect = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="mat1"):
        benchmark._plain_loop(sides, Listening())


def test_the_plain_network_is_timms_in_its_usual_layout(tmp_path: Path) -> None:
    plain_loop = sides_of(tmp_path).plain_loop()
    assert plain_loop is not None
    theirs = timm.create_model("test_resnet", num_classes=100)
    ours = plain_loop.model
    assert [type(module) for module in ours.modules()] == [type(module) for module in theirs.modules()]
    assert all(parameter.is_contiguous() for parameter in ours.parameters())
    assert not plain_loop.optimizer.defaults["fused"]


def convolution_flops(model: nn.Module, size: int) -> float:
    """Two for every product of a weight with an input, by the sizes of the layers."""
    total = 0.0

    def count(module: Any, inputs: Any, output: torch.Tensor) -> None:
        nonlocal total
        total += 2 * module.weight.numel() * (output[0, 0].numel() if output.ndim == 4 else 1)

    handles = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, size, size))
    for handle in handles:
        handle.remove()
    return total


@pytest.mark.parametrize("backbone", ["test_resnet", "test_efficientnet"])
def test_operations_are_counted(tmp_path: Path, backbone: str) -> None:
    """At 128 pixels no output is a single pixel. A training step takes three forward ones, but for the first layer,
    whose input needs no gradient; depthwise convolutions count as one group a channel there, too."""
    sides = sides_of(tmp_path, data={"image_size": 128, "batch_size": 4}, model={"backbone": backbone})
    model = timm.create_model(backbone, num_classes=100)
    forward = convolution_flops(model, 128)
    first = convolution_flops(nn.Sequential(next(m for m in model.modules() if isinstance(m, nn.Conv2d))), 128)
    assert flops.forward_flops(sides.job.model, sides.job.loaders.train) == forward
    before = [parameter.clone() for parameter in sides.job.model.parameters()]
    assert flops.step_flops(sides.training) == 3 * forward - first
    assert all(torch.equal(one, other) for one, other in zip(before, sides.job.model.parameters(), strict=True))


@pytest.mark.usefixtures("fewest_synthetic")
def test_operations_behind_kept_features_are_counted_whatever_type_these_have(tmp_path: Path) -> None:
    """Under bf16 or fp16 a frozen part's features are no float32, as weights are, and on a GPU every run counts."""
    sections: dict[str, Any] = {"finetune": {"unfreeze": "fc"}, "augment": {"policy": "flip"}}
    job = jobs.prepare(make_preset(**sections, train={"precision": "bf16"}), where(tmp_path), Listening())
    features = job.loaders.train.features
    assert features is not None
    assert features.dtype == torch.bfloat16
    head = job.model.get_submodule("fc")
    assert isinstance(head, nn.Linear)
    assert flops.forward_flops(job.model, job.loaders.train) == 2 * head.in_features * head.out_features


def test_bench_needs_no_data_and_leaves_nothing(
    run_cli: Cli, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    outcome = run_cli(
        *("bench", "--backbone", "test_resnet", "--batch-size", "32", "--steps", "2", "--repeats", "3"),
        *("--device", "cpu", "--json"),
    )
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    assert (result["preset"], result["steps"], result["repeats"]) == ("resnet18-baseline", 2, 3)
    assert sum(share["low"] for share in result["shares"].values()) <= 1.001  # of each turn they are the whole
    assert sum(share["high"] for share in result["shares"].values()) >= 0.999
    for group in ("images_per_second", "ratios", "shares"):
        for spread in result[group].values():
            assert 0 < spread["low"] <= spread["median"] <= spread["high"]
    rates, run = result["images_per_second"], result["full_run"]
    assert set(rates) == {"loop", "bare", "plain", "evaluation", "bare_evaluation"}
    assert result["utilization"] == pytest.approx(
        result["flops_per_image"] * rates["loop"]["median"] / result["peak_flops_per_second"]
    )
    epoch = 50_000 / rates["loop"]["median"] + 10_000 / rates["evaluation"]["median"]
    assert run["seconds_per_epoch"] == pytest.approx(epoch)
    assert run["seconds"] == pytest.approx(200 * epoch, rel=0.01)
    assert result["peak_memory_bytes"] > 2**20
    assert list(tmp_path.iterdir()) == []
    show.bench({**result, "peak_memory_bytes": None}, json=False)
    assert "without data set and kept features: not known here;" in capfd.readouterr().out


def test_a_full_run_of_few_or_growing_images() -> None:
    """Each epoch by itself, as the loader would shuffle it; the result has both the test and the held-out images."""
    drawn = load_preset("quickstart").config
    run = full_run(drawn, Rates(100.0, 1000.0))
    kept = round(10_000 * (1 - drawn.data.val_fraction))
    assert run["training_images"] == kept
    held_out = 10_000 - kept
    assert run["seconds"] == pytest.approx(
        drawn.train.epochs * (kept / 100 + held_out / 1000) + (held_out + 2_000) / 1000
    )
    growing = load_preset("laptop").config
    sizes = [growing.image_size_in(epoch) for epoch in range(1, growing.train.epochs + 1)]
    assert sizes[0] < sizes[-1] == growing.data.image_size
    seconds = sum(50_000 / (58 * (sizes[-1] / size) ** 2) for size in sizes)
    assert full_run(growing, Rates(58.0, 1e9))["seconds"] == pytest.approx(seconds)


@pytest.mark.parametrize("dataset", ["cifar100", "synthetic"])
@pytest.mark.parametrize(("fraction", "held_out"), [(1, 0), (1e-5, 0), (0.001, 1e-5), (0.357, 0.1234), (0.5, 0.9)])
def test_a_full_run_is_of_the_images_that_the_run_takes(dataset: DatasetName, fraction: float, held_out: float) -> None:
    config = Config.model_validate({"data": {"dataset": dataset, "fraction": fraction, "val_fraction": held_out}})
    count = DATASETS[dataset].training_images
    labels = np.random.default_rng(0).permutation(np.arange(count) % 100)
    split = Split(np.zeros((count, 0), np.uint8), labels)
    training, kept = jobs.training_splits(Dataset(dataset, ("",) * 100, split, split), config)
    assert images_of(config) == (len(training), len(kept or ()))


def test_a_full_run_whose_frozen_part_is_run_once() -> None:
    """Both versions of each image and the images that are looked at go through the frozen part at 200 a second, once;
    a look at images in an epoch is then what else a forward pass takes, and the last one is the whole network's."""
    config = load_preset("finetune-layer4").config
    assert config.train.watch_test
    run = full_run(config, Rates(1000.0, 100.0, FrozenPart(2, 200.0)))
    assert run["seconds_of_frozen_part"] == pytest.approx(110_000 / 200)
    assert run["seconds_per_epoch"] == pytest.approx(50 + 10_000 * (1 / 100 - 1 / 200))
    assert run["seconds"] == pytest.approx(550 + 10 * 100 + 100)
    # Measured by turns, a part may seem to take longer than the whole.
    assert full_run(config, Rates(1000.0, 100.0, FrozenPart(2, 90.0)))["seconds_per_epoch"] == pytest.approx(50)


def test_bench_in_words(run_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    once = ("--steps", "1", "--repeats", "1", "--set", "train.epochs=1")
    outcome = run_cli("-v", "bench", "--preset", "quickstart", "--device", "cpu", *once)
    assert outcome.code == 0, outcome.err
    assert "1 turn of 1 step of each side" in outcome.err
    for said in (outcome.out, outcome.err):
        assert ", 1 thread, " in said
    for words in ("images a second", "plain way", "share of a step", "peak memory", "the full run, 1 epoch of"):
        assert words in outcome.out
    assert all(len(line) <= 100 for line in outcome.out.splitlines())


def test_fine_tuning_is_measured_with_its_cached_features(tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "finetune": {"unfreeze": "fc"},
        "augment": {"policy": "flip"},
        "data": {"image_size": 64},
    }
    preset = make_preset(**sections)
    result = benchmark.bench(preset, where(tmp_path), Listening(), steps=1, repeats=1)
    whole = benchmark.bench(make_preset(data={"image_size": 64}), where(tmp_path), Listening(), steps=1, repeats=1)
    assert result["flops_per_image"] < whole["flops_per_image"] / 20
    assert set(result["images_per_second"]) == {*whole["images_per_second"], "frozen_part"}
    run = result["full_run"]
    assert run["seconds_of_frozen_part"] == pytest.approx(
        2 * run["training_images"] / result["images_per_second"]["frozen_part"]["median"]
    )
    assert whole["full_run"]["seconds_of_frozen_part"] == 0


def test_fine_tuning_that_keeps_no_features_is_measured_without(tmp_path: Path) -> None:
    """As the run itself, whose images grow, looks at them in every epoch."""
    sections: dict[str, Any] = {"finetune": {"unfreeze": "fc"}, "augment": {"policy": "flip"}}
    growing = {"image_size": 64, "first_image_size": 32}
    for data, parted in ({"image_size": 64}, True), (growing, False):
        config = without_files(make_preset(**sections, data=data).config)
        assert (Sides(Preset("x", config), 50_000, where(tmp_path), Listening(), 1).job.parted is not None) == parted


def test_one_image_at_a_time(tmp_path: Path) -> None:
    """Without batch norm that is possible; a last batch of one joins the one before."""
    preset = make_preset(data={"batch_size": 1}, model={"backbone": "test_convnext"})
    result = benchmark.bench(preset, where(tmp_path), Listening(), steps=3, repeats=1)
    assert result["ratios"]["loop_to_bare_time"]["median"] > 0


def test_a_wrong_preset_and_torchrun_are_refused(run_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_cli("bench", "--preset", "nope").code == 2
    kd = run_cli("bench", "--preset", "resnet18-arcface-kd")
    assert kd.code == 2
    assert "--teacher" in kd.err
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    outcome = run_cli("bench")
    assert outcome.code == 2
    assert "without torchrun" in outcome.err


def test_weights_and_held_out_images_make_no_difference() -> None:
    preset = Preset("x", make_preset(model={"pretrained": True, "weights": "nowhere"}, data={"fraction": 0.1}).config)
    config = without_files(preset.config)
    assert not config.model.pretrained
    assert config.model.weights is None
    assert config.data.fraction == 1


ONE_WAY = unittest.mock.Mock(takes_its_steps_otherwise=lambda _: False)


def of_known_speed(monkeypatch: pytest.MonkeyPatch, training: float, evaluation: float) -> None:
    monkeypatch.setattr(time_limit, "measure_rates", lambda *_: (ONE_WAY, Rates(training, evaluation, None)))


@pytest.mark.parametrize(("minutes", "epochs"), [(0.17, 1), (0.3, 1), (1, 6), (2, 13), (60, 395)])
def test_as_many_epochs_as_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minutes: float, epochs: int) -> None:
    """An epoch of `quickstart` is 9,000 images to train on and 1,000 held out; the test set has 2,000, and both are
    looked at for the result."""
    of_known_speed(monkeypatch, 1000, 10_000)
    assert epochs == int((60 * minutes - 0.3) / 9.1)
    watcher, preset = Listening(), load_preset("quickstart")
    fitted = time_limit.within(preset, minutes, where(tmp_path), watcher)
    assert differences(fitted.config, preset.config) == {"train.epochs": (epochs, 10)}
    assert watcher.said[0].startswith(f"--minutes {minutes:g}: a run of --epochs {epochs} takes about ")
    assert load_preset("quickstart", [Override("train.epochs", epochs, "")]) == fitted


def test_growing_images_fit_more_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`laptop` begins with images of a quarter of the area for a quarter of its epochs."""
    of_known_speed(monkeypatch, 500, 1e9)
    fitted = time_limit.within(load_preset("laptop"), 30, where(tmp_path), Listening()).config
    sizes = [fitted.image_size_in(epoch) for epoch in range(1, fitted.train.epochs + 1)]
    assert sizes.count(16) * 100 / 4 + sizes.count(32) * 100 <= 1800 < (len(sizes) + 1) * 100 * (1 / 16 + 3 / 4)
    assert len(sizes) == 22


def test_compiling_is_counted_in_for_each_size_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, sizes in (("laptop", 2), ("cpu-amx", 1)):
        fitted = []
        for compiling in (0.0, 400.0 / (2 * sizes)):  # whole batches, and the last one
            measured = ONE_WAY, Rates(500, 1e9, None, compiling)
            monkeypatch.setattr(time_limit, "measure_rates", lambda *_, measured=measured: measured)
            fitted.append(time_limit.within(load_preset(name), 61, where(tmp_path), Listening()).config)
        without, with_it = (sum(config.work_in(n + 1) for n in range(config.train.epochs)) for config in fitted)
        assert without * 100 <= 3660 < (without + 1) * 100
        assert with_it * 100 <= 3260 < (with_it + 1) * 100


def test_epochs_whose_steps_are_taken_otherwise_are_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the preset's own epochs may pay for compiling, and those that fit may not."""
    asked: list[int] = []

    def measured(preset: Preset, *_: object) -> tuple[object, Rates]:
        asked.append(preset.config.train.epochs)
        otherwise = unittest.mock.Mock(takes_its_steps_otherwise=lambda epochs: epochs < 10)
        return otherwise, Rates(1000 if len(asked) == 1 else 500, 1e9, None)

    monkeypatch.setattr(time_limit, "measure_rates", measured)
    fitted = time_limit.within(load_preset("quickstart"), 1, where(tmp_path), Listening())
    assert (asked, fitted.config.train.epochs) == ([10, 6], 3)


def test_few_epochs_that_a_preset_cannot_have_are_told_before_they_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time_limit, "measure_rates", lambda *_: (unittest.mock.Mock(), Rates(1000, 1e9, None)))
    preset = make_preset(schedule={"name": "multi_step", "milestones": [20]}, train={"epochs": 30})
    with pytest.raises(UsageError, match=r"--minutes 0\.5.*schedule\.milestones|schedule\.milestones.*--minutes 0\.5"):
        time_limit.within(preset, 0.5, where(tmp_path), Listening())


def test_the_way_steps_are_taken_depends_on_the_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sides = sides_of(tmp_path)
    assert not sides.takes_its_steps_otherwise(1000)

    def chosen(config: Config, *_: object) -> StepMode:
        return StepMode("inductor" if config.train.epochs == 1000 else "off", "pays, or does not")

    monkeypatch.setattr("cifar100cli.timing.step_mode_of", chosen)
    assert sides.takes_its_steps_otherwise(1000)
    assert not sides.takes_its_steps_otherwise(10)


def test_what_the_first_turns_took_more_is_compiling(tmp_path: Path) -> None:
    sides = sides_of(tmp_path)
    seconds = {"loop": [1.0, 2.0, 9.0], "evaluation": [1.0]}
    assert sides.rates([30.0, 2.5], seconds).compiling == 0.0, "nothing is compiled here"
    sides.job = replace(sides.job, step_mode=StepMode("inductor", "asked for"))
    assert sides.rates([30.0, 2.5], seconds).compiling == pytest.approx(32.5 - 2 * 2.0)
    assert sides.rates([1.0], seconds).compiling == 0.0
    cold = StepCost(step=0.5, inputs=0.0, first=40.0)  # in this process, later steps are compiled from a cache
    assert sides.rates([30.0, 2.5], seconds, cold).compiling == pytest.approx(40.0 - 0.5)


def test_a_smaller_last_batch_is_compiled_too() -> None:
    config = load_preset("cpu-amx").config
    compiled, eager = (full_run(config, Rates(500, 1e9, None, seconds))["seconds"] for seconds in (7.0, 0.0))
    assert 50_000 % config.data.batch_size
    assert compiled - eager == pytest.approx(14.0)
    for alike in (500, 60_000):  # all batches, or the only one
        even = Config.model_validate(config.model_dump() | {"data": {**config.data.model_dump(), "batch_size": alike}})
        compiled, eager = (full_run(even, Rates(500, 1e9, None, seconds))["seconds"] for seconds in (7.0, 0.0))
        assert compiled - eager == pytest.approx(7.0)


def test_the_mode_of_steps_is_that_of_the_run_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured is few images, and on a GPU the real number decides whether compiling pays."""
    asked: list[int | None] = []
    prepare = jobs.prepare

    def spy(*arguments: Any, **more: Any) -> Any:
        asked.append(more["images"])
        return prepare(*arguments, **more)

    monkeypatch.setattr("cifar100cli.timing.prepare", spy)
    preset = make_preset(data={"dataset": "cifar100", "fraction": 0.1, "val_fraction": 0.2})
    time_limit.measure_rates(preset, where(tmp_path), Listening())
    assert asked == [4000, 4000]


def test_what_is_captured_is_warmed_up_before_it_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sides = sides_of(tmp_path)
    assert (sides.cold_steps, sides.warm_up(sides.loop)) == (1, [])
    monkeypatch.setattr("cifar100cli.timing.CapturedSteps", type(sides.loop_steps))
    assert sides.cold_steps == 4
    taken: list[int] = []
    for steps, turns in ((1, 4), (3, 2), (50, 1)):
        sides.steps = steps
        assert len(sides.warm_up(lambda: taken.append(1))) == turns
        assert [taken.pop() for _ in range(turns)] == [1] * turns


def test_minutes_that_are_too_few_or_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_known_speed(monkeypatch, 1000, 10_000)
    preset = load_preset("quickstart")
    with pytest.raises(UsageError, match=r"--minutes 0.15: one epoch of quickstart takes about 9 s here"):
        time_limit.within(preset, 0.15, where(tmp_path), Listening())
    assert time_limit.within(preset, 92.0 / 60, where(tmp_path), Listening()) is preset
    keys = preset.config.model_dump()
    keys["train"]["epochs"] = 40
    keys["schedule"] = {"name": "multi_step", "milestones": [20, 30]}
    stepped = Preset("quickstart", Config.model_validate(keys))
    with pytest.raises(UsageError, match=r"--minutes 2: schedule.milestones = .* below train.epochs = 13"):
        time_limit.within(stepped, 2, where(tmp_path), Listening())


def test_a_figure_is_not_that_of_other_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_known_speed(monkeypatch, 1000, 10_000)
    file = tmp_path / "mine.yaml"
    file.write_text(
        "published: {top1: 0.5, epoch: 3, source: mine}\ndata: {dataset: synthetic}\ntrain: {epochs: 6, select: last}\n"
    )
    preset = load_preset(str(file))
    assert preset.config.published is not None
    fitted = time_limit.within(preset, 2, where(tmp_path), Listening()).config
    assert (fitted.train.epochs, fitted.published) == (11, None)


@pytest.mark.parametrize("frozen", [False, True])
def test_how_fast_a_preset_is_in_some_seconds(tmp_path: Path, frozen: bool) -> None:
    """No time is asserted here; a frozen part is measured by itself, and leaves nothing in the user's cache."""
    sections: dict[str, Any] = {"augment": {"policy": "flip"}, "data": {"image_size": 64}}
    if frozen:
        sections["finetune"] = {"unfreeze": "fc"}
    preset = make_preset(**sections)
    _, rates = time_limit.measure_rates(preset, where(tmp_path), Listening())
    assert 0 < rates.training < 1e9
    assert 0 < rates.evaluation < 1e9
    assert (rates.frozen is not None) == frozen
    if rates.frozen is not None:
        assert rates.frozen.versions == 2
        assert 0 < rates.frozen.rate < 1e9
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("step", "inputs", "steps", "different"),
    [(0.1, 0.0, 30, 200), (9.0, 0.0, 1, 200), (1e-6, 0.0, 200, 200), (0.001, 1.5, 200, 2), (0.001, 70.0, 200, 1)],
)
def test_a_turn_takes_some_seconds_as_does_what_it_is_made_of(
    tmp_path: Path, step: float, inputs: float, steps: int, different: int
) -> None:
    """A step on features is short, and the features of its images may be long in coming."""
    cost = StepCost(step, inputs, first=step)
    assert (cost.steps_of_a_turn(where(tmp_path)), cost.different_steps(where(tmp_path))) == (steps, different)


def test_few_features_are_those_of_many_images(tmp_path: Path) -> None:
    """Seven steps on the features of two: every image comes as often, with its own features and label."""
    sections: dict[str, Any] = {"augment": {"policy": "flip"}, "finetune": {"unfreeze": "fc"}}
    made = Sides(make_preset(**sections), 50_000, where(tmp_path), Listening(), 7, different=2)
    loader = made.job.loaders.train
    assert (made.steps, len(loader), loader.count, len(made.dataset.train)) == (8, 8, 512, 128)
    assert loader.features is not None
    counts = torch.zeros(128, dtype=torch.int64)
    for batch in loader.epoch(1):
        own = batch.positions % 128
        counts += torch.bincount(own, minlength=128)
        assert batch.views is not None
        assert torch.equal(batch.inputs, loader.features.table[batch.views, own].float())
        assert batch.labels.tolist() == made.dataset.train.labels[own].tolist()
    assert counts.tolist() == [4] * 128
    made.loop()
    made.bare()
    assert len(Sides(make_preset(), 50_000, where(tmp_path), Listening(), 3, different=2).job.loaders.train) == 3


def test_what_a_frozen_part_costs_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here a second for the images of an evaluation; a step has 64 images, and an image two versions."""
    monkeypatch.setattr(timing, "take_turn", lambda parts: dict.fromkeys(parts, 1.0))
    sections: dict[str, Any] = {"augment": {"policy": "flip"}, "finetune": {"unfreeze": "fc"}}
    cost = timing.cost_of_a_step(make_preset(**sections), 50_000, where(tmp_path), Listening())
    tested = timing.TEST_BATCHES * 500
    assert cost == pytest.approx((1.0, 2 * 64 / tested, 1.0))
    assert timing.cost_of_a_step(make_preset(), 50_000, where(tmp_path), Listening()) == (1.0, 0.0, 1.0)

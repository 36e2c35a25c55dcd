"""Fine-tuning: kept features beside a frozen network that runs in every epoch, and the command line."""

import contextlib
import errno
import gc
import json
import os
import re
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from cifar100cli import checkpoint, datasets, evaluation, jobs, learning, memory, precomputed, runs, workflows
from cifar100cli.card import Card
from cifar100cli.config import Preset, load_preset
from cifar100cli.errors import CifarError, DataError, FolderError, RunInterrupted, UsageError
from cifar100cli.models import create_model
from cifar100cli.schema import Config
from tests.conftest import TINY, Cli, Listening, StopAfter, make_preset, only_run, where
from tests.test_checkpoint import make_card

pytestmark = pytest.mark.usefixtures("small_synthetic")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A network whose batch statistics are not those of its initialisation."""
    torch.manual_seed(3)
    model = create_model(Config.model_validate({"model": {"backbone": "test_resnet"}}), classes=5)
    model.train()
    for _ in range(3):
        model(torch.rand(16, 3, 32, 32))
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def preset(weights: Path, finetune: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Preset:
    settings: dict[str, dict[str, Any]] = {
        "augment": {"policy": "flip"},
        "model": {"pretrained": True, "weights": str(weights)},
        "optimizer": {"name": "adam", "lr": 0.01, "weight_decay": 0.0, "grad_clip": 0.0},
        "train": {"watch_test": True},
    }
    for name, keys in sections.items():
        settings[name] = {**settings.get(name, {}), **keys}
    return make_preset(finetune={"unfreeze": "layer4", "cache_dtype": "float32", **(finetune or {})}, **settings)


def curve(tmp_path: Path, figure: str = "train_loss") -> list[float]:
    return [row[figure] for row in only_run(tmp_path).metrics()]


@pytest.mark.parametrize("unfreeze", ["fc", "layer4", "layer3"])
def test_with_and_without_the_cache_training_is_the_same(tmp_path: Path, weights: Path, unfreeze: str) -> None:
    results = {}
    for cache in ("on", "off"):
        job = preset(weights, {"unfreeze": unfreeze, "cache": cache})
        results[cache] = workflows.train(job, where(tmp_path / cache), Listening())
    for figure in ("train_loss", "test_loss"):
        assert curve(tmp_path / "on", figure) == pytest.approx(curve(tmp_path / "off", figure), rel=1e-4)
    assert results["on"]["test"]["loss"] == pytest.approx(results["off"]["test"]["loss"], rel=1e-4)
    assert results["on"]["trainable_parameters"] == results["off"]["trainable_parameters"]


def test_features_are_those_of_the_network(tmp_path: Path) -> None:
    """A stem changes strides, and with a stem of three convolutions no weight, no name and no shape behind it."""
    keys: dict[str, Any] = {
        "finetune": {"unfreeze": "fc", "cache_dtype": "float32"},
        "data": {"image_size": 16},
        "optimizer": {"lr": 0.1},
        "train": {"epochs": 1},
    }
    losses = []
    for stem, cache in (("imagenet", "on"), ("cifar", "on"), ("cifar", "off")):
        model = {"backbone": "resnet10t", "stem": stem}
        keys["finetune"]["cache"] = cache
        losses.append(workflows.train(make_preset(model=model, **keys), where(tmp_path), Listening())["train"]["loss"])
    assert losses[1] == pytest.approx(losses[2], rel=1e-4)
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-3), ("bfloat16", 1e-2)])
def test_what_a_shorter_type_costs(tmp_path: Path, weights: Path, dtype: str, tolerance: float) -> None:
    for kind in ("float32", dtype):
        workflows.train(preset(weights, {"cache_dtype": kind}), where(tmp_path / kind), Listening())
    assert curve(tmp_path / dtype) == pytest.approx(curve(tmp_path / "float32"), rel=tolerance)


@pytest.mark.usefixtures("fewest_synthetic")
def test_features_under_bf16_are_kept_as_they_are(tmp_path: Path, weights: Path) -> None:
    """A network that computes in bfloat16 gives bfloat16, so that keeping it in that type changes no bit."""
    for kind in ("auto", "float32"):
        job = preset(weights, {"cache_dtype": kind}, train={"precision": "bf16"})
        workflows.train(job, where(tmp_path / kind), Listening())
    assert curve(tmp_path / "auto") == curve(tmp_path / "float32")


@pytest.mark.usefixtures("fewest_synthetic")
@pytest.mark.parametrize(
    ("backbone", "unfreeze"), [("test_resnet", "layer4"), ("preact_resnet18", "layer4"), ("test_nfnet", "layer3")]
)
def test_features_come_in_the_type_that_they_were_computed_in(tmp_path: Path, backbone: str, unfreeze: str) -> None:
    """What learns may begin with a norm or an activation, which computes in the type of what it is given."""
    for cache in ("on", "off"):
        sections: dict[str, Any] = {"model": {"backbone": backbone}, "train": {"precision": "bf16", "epochs": 1}}
        sections["data"] = {"image_size": 16}
        job = make_preset(finetune={"unfreeze": unfreeze, "cache": cache}, augment={"policy": "flip"}, **sections)
        workflows.train(job, where(tmp_path / cache), Listening())
    assert curve(tmp_path / "on") == curve(tmp_path / "off")


def test_features_that_are_too_large_are_refused(tmp_path: Path, weights: Path) -> None:
    """float16 ends at 65,504."""
    tensors = load_file(weights)
    tensors["layer3.0.bn3.bias"].fill_(2e5)
    save_file(tensors, tmp_path / "large.safetensors")
    job = preset(tmp_path / "large.safetensors", {"cache_dtype": "auto"}, train={"precision": "fp32"})
    with pytest.raises(CifarError, match=r"too large for float16: --set finetune.cache_dtype=float32 keeps them"):
        workflows.train(job, where(tmp_path), Listening())
    assert not list(tmp_path.rglob("part*.safetensors"))
    job = preset(tmp_path / "large.safetensors", {"cache_dtype": "float32"}, train={"precision": "fp32", "epochs": 1})
    assert workflows.train(job, where(tmp_path), Listening())["complete"]


@pytest.mark.parametrize("cache", ["on", "off"])
def test_the_frozen_part_is_the_files_to_the_bit(tmp_path: Path, weights: Path, cache: str) -> None:
    watcher = Listening()
    result = workflows.train(preset(weights, {"cache": cache}), where(tmp_path), watcher)
    before, after = load_file(weights), load_file(Path(result["run_dir"]) / runs.MODEL)
    assert before.keys() == after.keys()  # a whole network, whatever was run once
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) != name.startswith(("layer4", "fc")), name
    assert {row.name: row.rate for row in watcher.shown if row.rate} == pytest.approx({"layer4": 0.001, "fc": 0.01})
    assert result["trainable_parameters"] == sum(row.parameters for row in watcher.shown if row.rate)


def test_the_result_is_what_evaluate_measures(tmp_path: Path, weights: Path) -> None:
    job = preset(weights, {"cache_dtype": "bfloat16"}, data={"val_fraction": 0.25}, train={"select": "best_val"})
    result = workflows.train(job, where(tmp_path), Listening())
    measured = evaluation.measure([Path(result["run_dir"])], where(tmp_path), Listening()).result
    assert {key: measured[key] for key in result["test"]} == result["test"]


def test_frozen_random_weights_are_told(tmp_path: Path, weights: Path) -> None:
    def told(unfreeze: str, **model: Any) -> list[str]:
        watcher = Listening()
        job = make_preset(finetune={"unfreeze": unfreeze}, model={"backbone": "test_resnet", **model})
        workflows.dry_run(job, where(tmp_path), watcher)
        return [line for line in watcher.said if "random weights" in line]

    (line,) = told("layer4", pretrained=False)
    assert "in front of layer4" in line
    assert not told("all", pretrained=False)
    assert not told("layer4", pretrained=True, weights=str(weights))


def told_of_stages(tmp_path: Path, **keys: Any) -> list[str]:
    """What is said, at once, about stages of a transformer of six blocks that hardly learn."""
    watcher = Listening()
    vit = make_preset(finetune=keys, model={"backbone": "test_vit", "pretrained": False}, data={"image_size": 32})
    workflows.dry_run(vit, where(tmp_path), watcher)
    return [line for line in watcher.said if "practically zero" in line]


def test_stages_that_stand_still_are_told(tmp_path: Path) -> None:
    (line,) = told_of_stages(tmp_path, unfreeze="all")
    assert line.startswith("stem learns at 1e-07 of the head's rate")
    assert "--set finetune.stage_decay=0.75" in line
    assert not told_of_stages(tmp_path, unfreeze="all", stage_decay=0.75)
    assert not told_of_stages(tmp_path, unfreeze="layer3")


def test_moving_statistics_are_not_kept(tmp_path: Path, weights: Path) -> None:
    watcher = Listening()
    result = workflows.train(preset(weights, {"bn": "adapt"}), where(tmp_path), watcher)
    assert any("runs in every epoch, because the frozen stages' batch statistics move" in t for t in watcher.said)
    before, after = load_file(weights), load_file(Path(result["run_dir"]) / runs.MODEL)
    assert not torch.equal(before["bn1.running_mean"], after["bn1.running_mean"])
    assert torch.equal(before["bn1.weight"], after["bn1.weight"])
    with pytest.raises(UsageError, match=r"cache = on is not possible: the frozen stages' batch statistics move"):
        workflows.dry_run(preset(weights, {"bn": "adapt", "cache": "on"}), where(tmp_path), Listening())


@pytest.mark.parametrize(("backbone", "unfreeze"), [("convnext_atto", "layer4"), ("test_resnet", "all")])
def test_where_no_statistics_move_nothing_is_said_of_them(tmp_path: Path, backbone: str, unfreeze: str) -> None:
    watcher = Listening()
    plain = make_preset(finetune={"bn": "adapt", "unfreeze": unfreeze}, model={"backbone": backbone})
    parted = jobs.prepare(plain, where(tmp_path), watcher).parted
    assert (parted is None) == (unfreeze == "all")
    assert not any("in every epoch" in line for line in watcher.said)


@pytest.mark.parametrize("stops", [(3,), (9,), (16, 2)])
def test_stopped_and_resumed_ends_with_the_same_bits(tmp_path: Path, weights: Path, stops: tuple[int, ...]) -> None:
    job = preset(weights)
    workflows.train(job, where(tmp_path / "unbroken"), Listening())
    with pytest.raises(RunInterrupted):
        workflows.train(job, where(tmp_path / "broken"), StopAfter(stops[0]))
    for steps in stops[1:]:
        with pytest.raises(RunInterrupted):
            workflows.resume(only_run(tmp_path / "broken"), where(tmp_path / "broken"), StopAfter(steps))
    shutil.rmtree(tmp_path / "broken" / "cache")
    workflows.resume(only_run(tmp_path / "broken"), where(tmp_path / "broken"), Listening())
    models = [only_run(tmp_path / kind).path / runs.MODEL for kind in ("unbroken", "broken")]
    assert models[0].read_bytes() == models[1].read_bytes()


def test_features_are_kept_by_weights_stage_and_data(tmp_path: Path, weights: Path) -> None:
    def count(job: Preset) -> int:
        watcher = Listening()
        jobs.prepare(job, where(tmp_path), watcher)
        return sum(watcher.counted)

    assert count(preset(weights)) == 2 * 400 + 200
    assert count(preset(weights, {"stage_decay": 0.5}, train={"epochs": 9}, optimizer={"lr": 0.1})) == 0
    assert count(preset(weights, {"unfreeze": "fc"})) == 2 * 400 + 200
    assert count(preset(weights, data={"fraction": 0.5})) == 2 * 200  # the test images are the same
    assert count(preset(weights, data={"image_size": 40})) == 2 * 400 + 200
    state = load_file(weights)
    save_file({**state, "fc.bias": state["fc.bias"] + 1}, weights)
    assert count(preset(weights)) == 0  # the head is new anyway
    save_file({**state, "layer1.0.conv1.weight": state["layer1.0.conv1.weight"] * 1.01}, weights)
    assert count(preset(weights)) == 2 * 400 + 200


def test_a_table_too_large_for_memory_is_mapped(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workflows.train(preset(weights), where(tmp_path / "memory"), Listening())
    monkeypatch.setattr(memory, "available", lambda: 1000)
    monkeypatch.setattr(precomputed, "KEPT", 0)
    workflows.train(preset(weights), where(tmp_path / "mapped"), Listening())
    assert curve(tmp_path / "mapped") == curve(tmp_path / "memory")
    assert list((tmp_path / "mapped" / "cache").iterdir()) == []  # the file has no name
    monkeypatch.setattr(precomputed.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match=r"GB are needed, and there are 0\.0 GB of memory and 0\.0 GB in .*--no-cache"):
        jobs.prepare(preset(weights), where(tmp_path / "full"), Listening())


def mapped(disk: Path, *numbers: float) -> torch.Tensor:
    """A table that is too large for memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "available", lambda: 0)
        table = precomputed._room((len(numbers),), torch.float32, torch.device("cpu"), disk, "the features")
    return table.copy_(torch.tensor(numbers))


def test_a_mapped_table_stays_as_long_as_a_tensor_of_it_and_its_file_has_no_name(tmp_path: Path) -> None:
    last = mapped(tmp_path, 1.0, 2.0, 3.0)[2:]
    gc.collect()
    assert list(tmp_path.iterdir()) == []
    assert last.item() == 3.0


def test_where_no_room_can_be_asked_for_zeros_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS: a file with holes finds the disk full when it is too late."""
    monkeypatch.delattr(os, "posix_fallocate")
    monkeypatch.setattr(precomputed, "PIECE", 1000)
    with precomputed._mapped(tmp_path, 50_500) as table:
        assert table[:] == bytes(50_500)
    written: list[int] = []
    file = SimpleNamespace(write=lambda piece: written.append(len(piece)), flush=lambda: None, fileno=lambda: -1)
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: contextlib.nullcontext(file))  # noqa: A006
    precomputed._mapped(tmp_path, 2500).close()
    assert written == [1000, 1000, 500]


def test_a_file_that_cannot_be_had_is_told_with_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(FolderError) as told:
        mapped(tmp_path, 1.0)
    assert str(told.value).startswith(f"the features: a file of 0.0 GB is needed, and none can be had in {tmp_path} (")
    assert os.strerror(errno.EDQUOT) in str(told.value)
    assert str(told.value).endswith("name another disk with CIFAR100_CACHE_DIR, or use --no-cache")
    (tmp_path / "file").touch()
    with pytest.raises(FolderError, match="file/cache"):
        mapped(tmp_path / "file" / "cache", 1.0)


def test_what_is_not_known_of_the_memory_is_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda: None)
    monkeypatch.setattr(precomputed, "CAREFUL", 0)
    monkeypatch.setattr(precomputed.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match=r"are needed, and there are 0\.0 GB in "):
        precomputed._room((9,), torch.float32, torch.device("cpu"), tmp_path, "the features")


def test_ranks_ask_for_room_before_one_of_them_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the file of the first would be a reason to refuse the second; where one has none, all refuse."""
    monkeypatch.setattr(precomputed.ranks, "greatest", lambda _: 2)  # type: ignore[attr-defined]
    monkeypatch.delattr(precomputed, "_mapped")
    with pytest.raises(UsageError, match="GB are needed"):
        mapped(tmp_path, 1.0)


def test_growing_images_are_not_kept(tmp_path: Path, weights: Path) -> None:
    watcher = Listening()
    growing = preset(weights, {"cache": "auto"}, data={"first_image_size": 16})
    workflows.train(growing, where(tmp_path), watcher)
    assert any("the images grow" in line for line in watcher.said)
    assert [row["image_size"] for row in only_run(tmp_path).metrics()] == [16, 16, 32]


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (
            {"augment": {"policy": "crop_flip"}, "finetune": {"cache": "on"}},
            "no two views are the same under augment.policy",
        ),
        (
            {"augment": {"policy": "flip", "cutout": 8}, "finetune": {"cache": "on"}},
            "the same under augment.cutout = 8",
        ),
    ],
)
def test_caches_that_cannot_be(sections: dict[str, dict[str, Any]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_preset(**sections)


# -------------------------------------------------------------------------------------------- the command line

SMALL = [*TINY, "--image-size", "32", "--epochs", "1"]
FAST = ["--epochs", "1", "--batch-size", "64", "--device", "cpu", "--set", "train.precision=fp32"]


def test_the_studys_presets() -> None:
    expected = {
        "finetune-layer4": ("layer4", 10, 0.9133),
        "finetune-layer4-50": ("layer4", 50, 0.9201),
        "finetune-layer3": ("layer3", 10, 0.9230),
        "finetune-layer3-50": ("layer3", 50, 0.9335),
    }
    for name, (unfreeze, epochs, top1) in expected.items():
        config = load_preset(name).config
        assert config.finetune is not None
        assert config.published is not None
        assert (config.finetune.unfreeze, config.train.epochs, config.published.top1) == (unfreeze, epochs, top1)
        assert (config.data.dataset, config.data.image_size, config.augment.policy) == ("cifar10", 224, "flip")
        assert (config.optimizer.name, config.optimizer.lr, config.finetune.stage_decay) == ("adam", 0.001, 0.1)
        assert (config.model.backbone, config.model.pretrained) == ("resnet18", True)


@pytest.mark.parametrize(
    ("arguments", "unfreeze", "epochs", "published"),
    [
        ([], "layer4", 10, 0.9133),
        (["--unfreeze", "layer3", "--epochs", "50"], "layer3", 50, 0.9335),
        (["--unfreeze", "fc"], "fc", 10, None),
        (["--unfreeze", "layer4", "--epochs", "7"], "layer4", 7, None),
        (["--unfreeze", "layer2"], "layer2", 10, None),
        (["--set", "finetune.unfreeze=layer3"], "layer3", 10, 0.923),
        (["--unfreeze", "layer3", "--set", "train.epochs=50"], "layer3", 50, 0.9335),
    ],
)
def test_the_preset_follows_the_cell(
    run_cli: Cli, arguments: list[str], unfreeze: str, epochs: int, published: float | None
) -> None:
    found = yaml.safe_load(run_cli("finetune-cifar10", *arguments, "--print-config").out)
    assert (found["finetune"]["unfreeze"], found["train"]["epochs"]) == (unfreeze, epochs)
    assert found.get("published", {}).get("top1") == published


def test_flags_reach_their_keys(run_cli: Cli) -> None:
    arguments = ["--bn", "adapt", "--fraction", "0.1", "--no-cache", "--init", "none", "--dataset", "cifar100"]
    found = yaml.safe_load(run_cli("finetune-cifar10", *arguments, "--print-config").out)
    assert (found["finetune"]["bn"], found["finetune"]["cache"]) == ("adapt", "off")
    assert (found["data"]["fraction"], found["data"]["dataset"]) == (0.1, "cifar100")
    assert found["model"]["pretrained"] is False


@pytest.mark.parametrize(
    "asked",
    ["finetune-cifar10 --init imagenet", "finetune-cifar10 --init none", "train --no-pretrained"],
)
def test_what_to_start_from_is_above_the_presets_weights(run_cli: Cli, asked: str) -> None:
    first = json.loads(run_cli("train", *TINY, "--epochs", "1", "--loss", "cross_entropy", "--json").out)
    Path("mine.yaml").write_text(run_cli("finetune-cifar10", "--init", first["run_dir"], "--print-config").out)
    assert "model.safetensors" in Path("mine.yaml").read_text()
    found = yaml.safe_load(run_cli(*asked.split(), "--preset", "mine.yaml", "--print-config").out)
    assert "weights" not in found["model"]
    assert found["model"]["pretrained"] == ("imagenet" in asked)


def test_from_a_run_of_ours(run_cli: Cli, tmp_path: Path) -> None:
    first = json.loads(run_cli("train", *TINY, "--epochs", "1", "--loss", "cross_entropy", "--json").out)
    outcome = run_cli("finetune-cifar10", *SMALL, "--init", first["run_dir"], "--json")
    assert outcome.code == 0, outcome.err
    assert f"starting from {tmp_path / first['run_dir'] / 'model.safetensors'}; the head is a new one" in outcome.err
    assert re.search(r"layer3 .*frozen +- +frozen", outcome.err)
    assert re.search(r"layer4 .*learns +0.0001 +moves", outcome.err)
    result = json.loads(outcome.out)
    before, after = (load_file(Path(run["run_dir"]) / runs.MODEL) for run in (first, result))
    assert (
        torch.equal(before["layer3.0.conv1.0.weight"], after["layer3.0.conv1.0.weight"])
        if ("layer3.0.conv1.0.weight" in before)
        else torch.equal(before["conv1.0.weight"], after["conv1.0.weight"])
    )

    smallest = ["--dataset", "synthetic", "--image-size", "32", "--init", first["run_dir"]]
    taken = yaml.safe_load(run_cli("finetune-cifar10", *smallest, "--print-config").out)
    assert taken["model"]["backbone"] == "test_resnet"  # the run's, and not the preset's
    other = run_cli("finetune-cifar10", *SMALL, "--backbone", "resnet18", "--init", first["run_dir"])
    assert other.code == 3
    assert "holds test_resnet, and this run is of resnet18" in other.err.splitlines()[-1]

    shown = run_cli("report").out
    assert "How far to unfreeze" in shown
    assert re.search(r"layer4 \[\w\] +1 +100% +- +[\d.]+%", shown)
    (row,) = [r for r in json.loads(run_cli("report", "--json").out)["rows"] if r["unfreeze"]]
    assert len(row["curves"]["test_top1"]) == 1
    assert row["curves"].keys() == {"train_loss", "train_top1", "test_loss", "test_top1"}


@pytest.mark.usefixtures("small_synthetic")
@pytest.mark.parametrize(("normalize", "own"), [("none", "none"), ("dataset", "values"), ("backbone", "values")])
def test_pixels_are_normalised_as_in_the_run_that_is_begun_from(run_cli: Cli, normalize: str, own: str) -> None:
    """Frozen layers and statistics know no others. Weights that are named by a flag are no different."""
    first = json.loads(run_cli("train", *TINY, "--epochs", "1", "--set", f"data.normalize={normalize}", "--json").out)
    model = Path(first["run_dir"]).absolute() / runs.MODEL
    card = checkpoint.load_model(model).card
    for flags in (["--init", first["run_dir"]], ["--weights", model, "--backbone", "test_resnet"]):
        arguments = ["finetune-cifar10", "--dataset", "synthetic", "--image-size", "32", *flags]
        data = yaml.safe_load(run_cli(*arguments, "--print-config").out)["data"]
        assert data["normalize"] == own
        if own == "values":
            assert (tuple(data["mean"]), tuple(data["std"])) == (card.mean, card.std)
        chosen = yaml.safe_load(run_cli(*arguments, "--set", "data.normalize=imagenet", "--print-config").out)
        assert chosen["data"]["normalize"] == "imagenet", "unless the user says how"
    Path("mine.yaml").write_text("data: {normalize: values, mean: [0.1, 0.1, 0.1], std: [0.5, 0.5, 0.5]}\n")
    taken = run_cli(
        "train", "--preset", "./mine.yaml", "--weights", f"{first['run_dir']}/model.safetensors", "--print-config"
    )
    assert taken.code == 0, taken.err
    assert yaml.safe_load(taken.out)["data"]["normalize"] == own, "whatever values the preset has"
    plan = ("finetune-cifar10", "--dataset", "synthetic", "--image-size", "48", *FAST)
    second = run_cli(*plan, "--init", first["run_dir"])
    assert second.code == 0, second.err
    assert "normalised otherwise" not in second.err
    other = run_cli(*plan, "--init", first["run_dir"], "--set", "data.normalize=imagenet", "--dry-run")
    assert "the weights saw pixels normalised otherwise than by data.normalize = imagenet" in other.err
    found = checkpoint.load_model(next(Path("runs").glob("finetune-layer4/*"))).card
    assert (found.mean, found.std, found.image_size) == (card.mean, card.std, 48)


@pytest.mark.usefixtures("small_synthetic")
def test_no_epoch_is_chosen_on_images_that_the_weights_know(run_cli: Cli) -> None:
    first = json.loads(run_cli("train", *TINY, "--epochs", "1", "--json").out)["run_dir"]  # a tenth is held out
    plan = ("finetune-cifar10", "--dataset", "synthetic", "--image-size", "48", "--init", first, *FAST)
    choosing = ("--set", "train.select=best_val", "--set")
    refused = run_cli(*plan, *choosing, "data.val_fraction=0.3")
    assert refused.code == 2
    assert "with data.val_fraction = 0.1, and so on images that 0.3 holds out" in refused.err
    assert "hold out no more than that (--set data.val_fraction=0.1)" in refused.err
    assert not Path("runs/finetune-layer4").exists()
    smaller = run_cli(*plan, *choosing, "data.val_fraction=0.05", "--dry-run")
    assert smaller.code == 0, f"a tenth holds out the twentieth, too: {smaller.err}"
    taken = run_cli(*plan, *choosing, "data.val_fraction=0.1")
    assert taken.code == 0, taken.err
    assert "the weights saw images of 32 pixels, and see 48 now" in taken.err
    # What weights know, those that begin from them know too, whatever these hold out themselves.
    started = ("train", *TINY, "--epochs", "1", "--set", "train.select=last", "--weights")
    second = json.loads(
        run_cli(*started, f"{first}/model.safetensors", "--set", "data.val_fraction=0.3", "--json").out
    )["run_dir"]
    again = ("train", *TINY, "--dry-run", "--weights", f"{second}/model.safetensors", *choosing)
    assert run_cli(*again, "data.val_fraction=0.1").code == 0
    refused = run_cli(*again, "data.val_fraction=0.3")
    assert refused.code == 2
    assert "or begun from weights that were, with data.val_fraction = 0.1, and so on images" in refused.err


def test_images_are_known_beyond_another_data_set(tmp_path: Path, weights: Path) -> None:
    """Weights that went from one data set to another and come back have not forgotten the first."""
    first = workflows.train(preset(weights), where(tmp_path / "first"), Listening())["run_dir"]
    about = checkpoint.load_model(Path(first)).card
    assert about.unseen == {"synthetic": 0.0}
    elsewhere = about.model_copy(update={"dataset": "cifar10", "unseen": {"synthetic": 0.0, "cifar10": 0.2}})
    file = tmp_path / "elsewhere.safetensors"
    checkpoint.save_model(file, load_file(Path(first) / runs.MODEL), elsewhere)
    chosen: dict[str, Any] = {"data": {"val_fraction": 0.1}, "train": {"select": "best_val", "watch_test": False}}
    with pytest.raises(UsageError, match=r"with data.val_fraction = 0, and so on images that 0.1 holds out"):
        jobs.prepare(preset(file, **chosen), where(tmp_path), Listening())
    chosen["train"] = {}
    watcher = Listening()
    card = jobs.prepare(preset(file, **chosen), where(tmp_path), watcher).card
    assert card.unseen == {"synthetic": 0.0, "cifar10": 0.2}
    assert any("on images that 0.1 holds out: accuracies on these flatter" in line for line in watcher.said)
    second = Path(workflows.train(preset(file, **chosen), where(tmp_path), Listening())["run_dir"])
    for run, split, learned in ((second, "val", True), (second, "test", False), (second, "train", True)):
        assert evaluation.measure([run], where(tmp_path), Listening(), split).result["learned"] is learned
    third = elsewhere.model_copy(update={"unseen": {"cifar10": 0.2}})
    checkpoint.save_model(file, load_file(Path(first) / runs.MODEL), third)
    card = jobs.prepare(preset(file, **chosen), where(tmp_path), Listening()).card
    assert card.unseen == {"synthetic": 0.1, "cifar10": 0.2}


@pytest.mark.parametrize(
    ("unseen", "config", "found"),
    [(0.2, {"data": {"val_fraction": 0.3}}, 0.2), (None, {"data": {"val_fraction": 0.3}}, 0.3), (None, {}, 0.0)],
)
def test_older_models_tell_of_their_own_data_set(unseen: float | None, config: dict[str, Any], found: float) -> None:
    about = {"format": 1, "preset": "mine", "dataset": "cifar10", "classes": ["a", "b"], "image_size": 32}
    card = Card.model_validate({**about, "mean": [0] * 3, "std": [1] * 3, "unseen": unseen, "config": config})
    assert card.unseen == {"cifar10": found}


def test_a_resumed_run_knows_what_its_weights_had_learned(tmp_path: Path, weights: Path) -> None:
    """They may be gone by then; the model's file must not tell another story for that."""
    first = workflows.train(preset(weights, data={"val_fraction": 0.2}), where(tmp_path / "first"), Listening())[
        "run_dir"
    ]
    start = tmp_path / "start.safetensors"
    shutil.copy(Path(first) / runs.MODEL, start)
    second = preset(start, data={"val_fraction": 0.4})
    workflows.train(second, where(tmp_path / "unbroken"), Listening())
    with pytest.raises(RunInterrupted):
        workflows.train(second, where(tmp_path / "broken"), StopAfter(9))
    start.unlink()
    workflows.resume(only_run(tmp_path / "broken"), where(tmp_path / "broken"), Listening())
    unbroken, broken = (only_run(tmp_path / kind).path / runs.MODEL for kind in ("unbroken", "broken"))
    assert checkpoint.load_model(broken).card.unseen == {"synthetic": 0.2}
    assert unbroken.read_bytes() == broken.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--unfreeze", "layer9", *SMALL, "--init", "none"], 2, "it has fc, layer4, layer3, all"),
        (["--unfreeze", "layer5", "--data-dir", "nowhere"], 2, "resnet18 has no such stage; did you mean layer4?"),
        (["--data-dir", "nowhere"], 3, "nowhere: run `cifar100 download --dataset cifar10 --data-dir nowhere`"),
        (["--data-dir", "nowhere", "--init", "none", "--unfreeze", "al"], 2, "finetune.unfreeze = al"),
        (["--preset", "quickstart"], 2, "quickstart does not fine-tune: say with --unfreeze what is to be trained"),
        (["--init", "nowhere"], 3, "no such run or checkpoint"),
        (["--init", "none", "--weights", "x"], 2, "exclude each other"),
        (["--init", "imagenet", "--set", "model.pretrained=false"], 2, "leave one out"),
        (["--fraction", "0"], 2, "data.fraction = 0 (--fraction)"),
        (["--bn", "off"], 2, "frozen, adapt"),
        (["--cache", "--augment", "crop_flip"], 2, "no two views are the same"),
    ],
)
def test_mistakes(run_cli: Cli, arguments: list[str], code: int, words: str) -> None:
    outcome = run_cli("finetune-cifar10", *arguments)
    assert outcome.code == code, outcome.err
    assert words in outcome.err.splitlines()[-1]
    assert "Traceback" not in outcome.err


def test_dry_run_keeps_nothing(run_cli: Cli, tmp_path: Path) -> None:
    outcome = run_cli("finetune-cifar10", *SMALL, "--init", "none", "--dry-run")
    assert outcome.code == 0, outcome.err
    assert list(tmp_path.iterdir()) == []


def test_a_stem_of_our_own_is_taken_over(tmp_path: Path) -> None:
    """A run with the CIFAR stem has weights for that stem; ImageNet's have none, and it is new."""
    config = Config.model_validate({"model": {"backbone": "resnet18", "stem": "cifar"}})
    model = create_model(config, classes=10)
    card = Card.model_validate(
        {
            "format": 1,
            "preset": "mine",
            "dataset": "cifar10",
            "classes": tuple("abcdefghij"),
            "image_size": 32,
            "mean": (0, 0, 0),
            "std": (1, 1, 1),
            "config": config.model_dump(mode="json", exclude_none=True),
        }
    )
    checkpoint.save_model(tmp_path / "model.safetensors", model.state_dict(), card)
    section = {
        "backbone": "resnet18",
        "stem": "cifar",
        "pretrained": True,
        "weights": str(tmp_path / "model.safetensors"),
    }
    second = create_model(Config.model_validate({"model": section}), classes=3)
    assert torch.equal(second.state_dict()["conv1.weight"], model.state_dict()["conv1.weight"])


@pytest.mark.parametrize("backbone", ["resnet10t", "test_resnet"])
def test_a_network_is_not_taken_with_another_stem(run_cli: Cli, backbone: str) -> None:
    """A deep stem has the same weights with other strides, which no name and no shape would tell."""
    config = {"model": {"backbone": backbone, "stem": "cifar"}}
    first = create_model(Config.model_validate(config), classes=3)
    about = make_card(config=config)
    checkpoint.save_model(Path("first.safetensors"), first.state_dict(), about)
    plan = ("finetune-cifar10", "--dataset", "synthetic", "--image-size", "32")
    for flags in (["--init", "first.safetensors"], ["--init", "first.safetensors", "--backbone", backbone]):
        taken = yaml.safe_load(run_cli(*plan, *flags, "--print-config").out)["model"]
        assert (taken["backbone"], taken["stem"]) == (backbone, "cifar")
        chosen = run_cli(*plan, *flags, "--set", "model.stem=imagenet", "--print-config")
        assert yaml.safe_load(chosen.out)["model"]["stem"] == "imagenet", "the user is obeyed, and then refused"
    other = run_cli(*plan, "--init", "first.safetensors", "--backbone", "resnet18", "--print-config")
    assert yaml.safe_load(other.out)["model"]["stem"] == "imagenet"

    weights = str(Path("first.safetensors").absolute())
    asked = {"backbone": backbone, "pretrained": True, "weights": weights}
    with pytest.raises(DataError, match=rf"holds {backbone} with the stem for 32 pixels.*--set model.stem=cifar"):
        create_model(Config.model_validate({"model": asked}), classes=3)
    second = create_model(Config.model_validate({"model": {**asked, "stem": "cifar"}}), classes=3)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected, found = (model.eval().forward_features(images) for model in (first, second))  # type: ignore[operator]
    assert torch.equal(found, expected)


def test_a_new_stem_is_told(tmp_path: Path) -> None:
    def told(backbone: str) -> str:
        plain = create_model(Config.model_validate({"model": {"backbone": backbone}}), classes=10)
        save_file(plain.state_dict(), tmp_path / "weights.safetensors")
        watcher = Listening()
        model = {"backbone": backbone, "pretrained": True, "weights": str(tmp_path / "weights.safetensors")}
        jobs.prepare(make_preset(model={**model, "stem": "cifar"}), where(tmp_path), watcher, dry=True)
        (line,) = [said for said in watcher.said if said.startswith("starting from")]
        return line

    assert told("resnet18").endswith("; the head is a new one of 100 classes, and so is the stem")
    assert told("resnet10t").endswith("; the head is a new one of 100 classes"), "it has the weights that it had"


def test_a_run_goes_on_with_its_own_images_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set of the same shape may lie where its own did, or where a flag or a variable says now."""
    job = make_preset()
    with pytest.raises(RunInterrupted):
        workflows.train(job, where(tmp_path), StopAfter(9))
    own = datasets.load("synthetic", tmp_path)
    changed = own.test.images.copy()
    changed[0, 0, 0, 0] ^= 1
    other = replace(own, test=replace(own.test, images=changed))
    with monkeypatch.context() as context:
        context.setattr(datasets, "load", lambda *_: other)
        with pytest.raises(DataError, match=r"holds another synthetic than .* was begun with; --data-dir says where"):
            workflows.resume(only_run(tmp_path), where(tmp_path), Listening())
    assert workflows.resume(only_run(tmp_path), where(tmp_path), Listening())["complete"]


def test_a_cache_that_cannot_be_is_refused_by_a_dry_run_too(tmp_path: Path) -> None:
    def tried(dry: bool, **finetune: str) -> list[str]:
        watcher = Listening()
        job = make_preset(
            finetune=finetune, model={"backbone": "test_vit", "pretrained": False}, data={"image_size": 160}
        )
        jobs.prepare(job, where(tmp_path), watcher, dry=dry)
        return watcher.said

    for dry in (True, False):
        with pytest.raises(UsageError, match=r"cache = on is not possible: test_vit is no chain of stages"):
            tried(dry, unfreeze="layer4", cache="on")
        with pytest.raises(UsageError, match=r"cache = on is not possible: everything learns"):
            tried(dry, unfreeze="all", cache="on")
        assert any(
            "runs in every epoch, because test_vit is no chain" in said for said in tried(dry, unfreeze="layer4")
        )
        assert not any("every epoch" in said for said in tried(dry, unfreeze="all"))


def test_pixels_that_are_asked_for_are_above_those_of_the_weights(run_cli: Cli) -> None:
    first = json.loads(run_cli("train", *TINY, "--epochs", "1", "--json").out)["run_dir"]
    Path("mine.yaml").write_text("data: {normalize: values, mean: [0.1, 0.1, 0.1], std: [0.5, 0.5, 0.5]}\n")
    asked = ("--set", "data.mean=[0.2, 0.2, 0.2]", "--print-config")
    taken = run_cli("train", "--preset", "./mine.yaml", "--weights", f"{first}/model.safetensors", *asked)
    data = yaml.safe_load(taken.out)["data"]
    assert (data["mean"], data["std"]) == ([0.2] * 3, [0.5] * 3)


def test_a_run_from_weights_with_its_own_stem_goes_on_without_them(tmp_path: Path) -> None:
    model = {"stem": "cifar", "pretrained": False, "weights": None}
    first = workflows.train(make_preset(model=model, train={"epochs": 1}), where(tmp_path / "first"), Listening())
    start = tmp_path / "start.safetensors"
    shutil.copy(Path(first["run_dir"]) / runs.MODEL, start)
    second = make_preset(model={**model, "pretrained": True, "weights": str(start)}, finetune={"unfreeze": "layer4"})
    with pytest.raises(RunInterrupted):
        workflows.train(second, where(tmp_path), StopAfter(9))
    start.unlink()
    assert workflows.resume(only_run(tmp_path), where(tmp_path), Listening())["complete"]


def test_a_run_without_an_epoch_begins_again_from_its_own_weights_alone(tmp_path: Path) -> None:
    """Until its first epoch is saved it has no others, and another file may lie at the place of these by then."""
    start = tmp_path / "start.safetensors"
    network = create_model(make_preset(model={"pretrained": False}).config, classes=100)
    save_file(network.state_dict(), start)
    job = make_preset(model={"pretrained": True, "weights": str(start)})
    with pytest.raises(RunInterrupted):
        workflows.train(job, where(tmp_path), StopAfter(1))
    run, before = only_run(tmp_path), start.read_bytes()
    assert not (run.path / runs.STATE).exists()
    save_file({name: tensor * 2 for name, tensor in network.state_dict().items()}, start)
    with pytest.raises(DataError, match=rf"{start}: is not the file of weights that {run.path} was begun with"):
        workflows.resume(run, where(tmp_path), Listening())
    start.unlink()
    with pytest.raises(DataError, match=rf"{start}: there is no such file"):
        workflows.resume(run, where(tmp_path), Listening())
    start.write_bytes(before)
    assert workflows.resume(run, where(tmp_path), Listening())["complete"]


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"optimizer": {"name": "muon"}}, "no matrix of a hidden layer is among what learns"),
        ({"train": {"compile": "graph"}}, "CUDA graphs need a CUDA device"),
    ],
)
def test_what_cannot_be_is_refused_before_the_frozen_part_is_run(
    tmp_path: Path, weights: Path, sections: dict[str, dict[str, Any]], words: str
) -> None:
    watcher = Listening()
    with pytest.raises(UsageError, match=words):
        jobs.prepare(preset(weights, finetune={"unfreeze": "fc"}, **sections), where(tmp_path), watcher)
    assert not watcher.counted
    assert not (tmp_path / "cache").exists()


def test_a_new_stem_is_not_frozen(tmp_path: Path) -> None:
    """Behind random filters and their batch norm's foreign statistics nothing that is frozen means anything."""
    plain = create_model(Config.model_validate({"model": {"backbone": "resnet18"}}), classes=10)
    save_file(plain.state_dict(), tmp_path / "weights.safetensors")

    def tried(unfreeze: str, **model: Any) -> None:
        model = {"backbone": "resnet18", "pretrained": True, "weights": str(tmp_path / "weights.safetensors"), **model}
        job = make_preset(finetune={"unfreeze": unfreeze}, model=model)
        workflows.dry_run(job, where(tmp_path), Listening())

    with pytest.raises(UsageError, match=r"frozen, the new one stays random.*finetune.unfreeze=all"):
        tried("layer4", stem="cifar")
    tried("all", stem="cifar")
    tried("layer4")


@pytest.mark.parametrize(
    ("backbone", "rate", "head", "drops"),
    [
        ("resnet18", "drop_rate", "cosine", False),
        ("resnet18", "drop_path_rate", "linear", False),
        ("wrn16_4", "drop_rate", "linear", False),  # which has its drop-out in the blocks
        *(("resnet18", "drop_rate", "linear", True), ("convnext_atto", "drop_rate", "linear", True)),
    ],
)
def test_a_rate_at_which_nothing_drops_is_refused(backbone: str, rate: str, head: str, *, drops: bool) -> None:
    """Where the head learns alone; with the last stage, something does."""
    model = {"backbone": backbone, rate: 0.3, "head": head}

    def tried(unfreeze: str) -> None:
        config = Config.model_validate({"model": model, "finetune": {"unfreeze": unfreeze}})
        assert config.finetune is not None
        network = create_model(config, classes=10)
        learning.freeze_stages(config, config.finetune, network, Listening(), new_stem=False)

    tried("layer4")
    words = rf"model\.{rate} = 0\.3 does nothing with finetune\.unfreeze = fc: "
    with contextlib.nullcontext() if drops else pytest.raises(UsageError, match=words):
        tried("fc")

"""Several views of an image and several models, against torch, torchvision and torchmetrics by hand."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error
from torchvision.transforms.v2 import functional as reference

from cifar100cli import checkpoint, datasets, devices, metrics, synthetic
from cifar100cli.card import KEY
from cifar100cli.datasets import Split
from cifar100cli.jobs import evaluation_loader
from cifar100cli.loader import Preprocessing
from tests.conftest import TINY, Cli

CPU = torch.device("cpu")


def views_by_hand(model: Callable[[Tensor], Tensor], images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Mean logits over the six views, with torchvision's padding, cutting and mirroring."""
    padded = reference.pad(images, [1], padding_mode="reflect")
    height, width = images.shape[-2:]
    total = torch.zeros(())
    for view, weight in (
        (images, 0.5),
        (reference.crop(padded, 0, 0, height, width), 0.25),
        (reference.crop(padded, 2, 2, height, width), 0.25),
    ):
        for turned in (view, reference.horizontal_flip(view)):
            total = total + weight / 2 * model(preprocessing(turned))
    return total


@pytest.mark.parametrize("size", [32, 48])
def test_views_are_torchvisions(few_drawings: synthetic.Drawn, size: int) -> None:
    """Of the small images, before they are enlarged and normalised."""
    images, labels = few_drawings.test
    preprocessing = Preprocessing(size, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * size * size, 100))
    loader = evaluation_loader(Split(images, labels), CPU, preprocessing)
    seen: list[int] = []
    found, same = metrics.logits_of(model, loader, devices.autocast(CPU, "fp32"), tta=True, advance=seen.append)
    with torch.inference_mode():
        expected = views_by_hand(model, torch.from_numpy(images), preprocessing)
        plain = model(preprocessing(torch.from_numpy(images)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, plain, rtol=1e-2, atol=1e-2)
    assert torch.equal(same, torch.from_numpy(labels))
    assert sum(seen) == len(labels)


@pytest.fixture
def answers() -> tuple[list[Tensor], Tensor]:
    """Logits of three models that are right now and then, and the labels."""
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 100, (2000,), generator=random)
    members = [3 * torch.randn(2000, 100, generator=random) for _ in range(3)]
    for member in members:
        member[torch.arange(2000), labels] += 4
    return members, labels


def test_an_ensemble_has_the_mean_of_the_probabilities(answers: tuple[list[Tensor], Tensor]) -> None:
    members, labels = answers
    mean = sum((member.double().softmax(1) for member in members), torch.zeros(())) / 3
    together = metrics.ensemble(members)
    torch.testing.assert_close(together.exp(), mean)
    found = metrics.evaluate(together, labels, tuple(label % 20 for label in range(100)))
    for k, ours in ((1, found.top1), (5, found.top5)):
        theirs = multiclass_accuracy(mean, labels, num_classes=100, average="micro", top_k=k)
        assert ours == pytest.approx(theirs.item(), abs=1e-6)
    assert found.loss == pytest.approx(-mean[torch.arange(2000), labels].log().mean().item())
    ece = multiclass_calibration_error(mean, labels, num_classes=100, n_bins=15, norm="l1")
    assert found.ece == pytest.approx(ece.item(), abs=1e-5)
    assert found.superclass_top1 == pytest.approx((mean.argmax(1) % 20 == labels % 20).double().mean().item())
    assert found.top1 > max(metrics.score(member, labels).top1 for member in members)


def test_an_ensemble_of_one_is_the_model(answers: tuple[list[Tensor], Tensor]) -> None:
    (first, *_), labels = answers
    for together in (metrics.ensemble([first]), metrics.ensemble([first, first])):
        ours, plain = metrics.evaluate(together, labels), metrics.evaluate(first, labels)
        assert (ours.top1, ours.top5, ours.per_class) == (plain.top1, plain.top5, plain.per_class)
        assert (ours.loss, ours.ece) == pytest.approx((plain.loss, plain.ece))


def test_a_class_that_no_member_believes_in_has_a_finite_loss() -> None:
    certain = torch.tensor([[2000.0, 0.0]])
    assert metrics.score(metrics.ensemble([certain, certain]), torch.tensor([1])).loss == pytest.approx(2000)


# ----------------------------------------------------------------------------------------------- the command


def train(run_cli: Cli, *arguments: str) -> str:
    outcome = run_cli("train", *TINY, "--epochs", "2", "--json", *arguments)
    assert outcome.code == 0, outcome.err
    run: str = json.loads(outcome.out)["run_dir"]
    return run


def evaluate(run_cli: Cli, *arguments: str) -> dict[str, Any]:
    outcome = run_cli("evaluate", *arguments, "--device", "cpu", "--json")
    assert outcome.code == 0, outcome.err
    found: dict[str, Any] = json.loads(outcome.out)
    return found


@pytest.mark.usefixtures("small_synthetic")
def test_an_ensemble_by_the_command(run_cli: Cli) -> None:
    """Each member at its own size and normalisation; the figures are those of the mean, by hand."""
    runs = [train(run_cli), train(run_cli, "--seed", "1", "--image-size", "48", "--set", "data.normalize=none")]
    test = datasets.load("synthetic", Path()).test
    images, labels = torch.from_numpy(test.images), torch.from_numpy(test.labels)
    plain, averaged = [], []
    for run in runs:
        saved = checkpoint.load_model(Path(run))
        with torch.inference_mode():
            plain.append(saved.model.eval()(saved.preprocessing(images)).softmax(1))
            averaged.append(views_by_hand(saved.model, images, saved.preprocessing).softmax(1))
    alone = [evaluate(run_cli, run) for run in runs]
    assert all("members" not in one and one["tta"] is False for one in alone)

    found = evaluate(run_cli, *runs, "--predictions", "both.csv")
    mean = (plain[0] + plain[1]) / 2
    loss = -mean[torch.arange(len(labels)), labels].log().mean().item()
    assert found["top1"] == pytest.approx((mean.argmax(1) == labels).double().mean().item())
    assert found["loss"] == pytest.approx(loss, rel=1e-4)
    assert found["checkpoint"] == " + ".join(one["checkpoint"] for one in alone)
    assert found["members"] == [
        {key: one[key] for key in ("checkpoint", "preset", "epoch", "select", "top1", "loss")} for one in alone
    ]
    assert set(found) - set(alone[0]) == {"members"}
    rows = list(csv.DictReader(Path("both.csv").read_text().splitlines()))
    torch.testing.assert_close(
        torch.tensor([float(row["confidence"]) for row in rows]), mean.max(1).values, rtol=0, atol=1e-5
    )
    assert sum(int(row["correct"]) for row in rows) == round(found["top1"] * 200)

    with_views = evaluate(run_cli, *runs, "--tta")
    mean = (averaged[0] + averaged[1]) / 2
    loss = -mean[torch.arange(len(labels)), labels].log().mean().item()
    assert with_views["tta"] is True
    assert with_views["loss"] == pytest.approx(loss, rel=1e-4)
    one = evaluate(run_cli, runs[0], "--tta")
    loss = -averaged[0][torch.arange(len(labels)), labels].log().mean().item()
    assert one["loss"] == pytest.approx(loss, rel=1e-4)

    shown = run_cli("evaluate", *runs, "--tta", "--device", "cpu").out
    assert "An ensemble of 2" in shown
    assert all(run in shown for run in runs)
    assert "six views of each" in shown
    assert "test-time" not in run_cli("evaluate", runs[0], "--device", "cpu").out


def changed(run: str, name: str, **keys: Any) -> str:
    """A copy of a run's model whose card says something else."""
    source = Path(run) / "model.safetensors"
    with safe_open(source, framework="pt") as file:
        about = json.loads(file.metadata()[KEY])
    save_file(load_file(source), name, {KEY: json.dumps({**about, **keys})})
    return name


@pytest.mark.usefixtures("small_synthetic")
def test_what_cannot_be_averaged(run_cli: Cli) -> None:
    first = train(run_cli)
    classes = [f"class {index}" for index in range(100)]
    for arguments, code, words in (
        ([changed(first, "a.safetensors", dataset="cifar10")], 3, "knows cifar10, and"),
        ([changed(first, "b.safetensors", classes=classes)], 3, "its classes are not those of"),
        ([f"{first}/model.safetensors"], 2, "is named twice"),
        (["nowhere"], 3, "there is no such run or checkpoint"),
    ):
        outcome = run_cli("evaluate", first, *arguments)
        assert outcome.code == code, outcome.err
        assert words in outcome.err
        assert (outcome.out, len(outcome.err.splitlines())) == ("", 1)


@pytest.mark.usefixtures("small_synthetic")
def test_splits_that_members_share(run_cli: Cli) -> None:
    """Held-out images are the same whatever the seed; those of a fraction are not."""
    held, other_seed, more_held, part, other_part = (
        train(run_cli, *(word for setting in settings for word in ("--set", setting)))
        for settings in (
            ["data.val_fraction=0.25"],
            ["data.val_fraction=0.25", "seed=1"],
            ["data.val_fraction=0.5"],
            ["data.val_fraction=0.25", "data.fraction=0.5"],
            ["data.val_fraction=0.25", "data.fraction=0.5", "seed=1"],
        )
    )
    assert evaluate(run_cli, held, other_seed, part, "--split", "val")["count"] == 100
    assert evaluate(run_cli, held, other_seed, "--split", "train")["count"] == 300
    assert evaluate(run_cli, held, more_held)["count"] == 200
    for pair, split, words in (
        ((held, more_held), "val", "data.val_fraction = 0.25"),
        ((held, more_held), "train", "data.val_fraction = 0.25"),
        ((held, part), "train", "data.fraction = 1.0"),
        ((part, other_part), "train", "seed = 0"),
    ):
        outcome = run_cli("evaluate", *pair, "--split", split)
        assert outcome.code == 2
        assert words in outcome.err


@pytest.mark.usefixtures("small_synthetic")
def test_a_figure_on_images_that_chose_the_epoch_is_called_optimistic(run_cli: Cli) -> None:
    chosen = train(run_cli, "--set", "train.select=best_test")
    held_out = train(run_cli, "--set", "train.select=best_val", "--set", "data.val_fraction=0.2")
    for models, split, told in (
        ([chosen], "test", True),
        ([held_out], "test", False),
        ([held_out], "val", True),
        ([chosen], "train", False),
        ([chosen, held_out], "test", True),
    ):
        outcome = run_cli("evaluate", *models, "--split", split)
        assert outcome.code == 0, outcome.err
        assert ("chosen on these very images: optimistic" in outcome.out) is told
    found = json.loads(run_cli("evaluate", chosen, held_out, "--json").out)
    assert [member["select"] for member in found["members"]] == ["best_test", "best_val"]

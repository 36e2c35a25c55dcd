"""Every measure against torchmetrics, and by hand where a sum can be done by hand."""

import contextlib
import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
    multiclass_confusion_matrix,
)

from cifar100cli import evaluation, metrics
from cifar100cli.datasets import Split
from cifar100cli.devices import Portions, autocast
from cifar100cli.errors import DataError
from cifar100cli.loader import DeviceLoader, Preprocessing


@pytest.fixture
def answers() -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 100, (5000,), generator=random)
    logits = torch.randn(5000, 100, generator=random)
    logits[torch.arange(5000), labels] += 2
    return logits, labels


def test_scores(answers: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, labels = answers
    result = metrics.score(logits, labels)
    for k, ours in ((1, result.top1), (5, result.top5)):
        theirs = multiclass_accuracy(logits, labels, num_classes=100, average="micro", top_k=k)
        assert ours == pytest.approx(theirs.item(), abs=1e-6)
    assert result.loss == pytest.approx(-logits.double().log_softmax(1)[torch.arange(5000), labels].mean().item())
    assert result.count == 5000


def test_calibration_error(answers: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, labels = answers
    theirs = multiclass_calibration_error(logits.softmax(1), labels, num_classes=100, n_bins=15, norm="l1")
    assert metrics.evaluate(logits, labels).ece == pytest.approx(theirs.item(), abs=1e-5)


def test_calibration_error_of_the_certain() -> None:
    logits = torch.eye(4) * 1000
    assert metrics.evaluate(logits, torch.arange(4)).ece == 0
    assert metrics.evaluate(logits, torch.tensor([1, 2, 3, 0])).ece == 1


def test_classes_confusions_and_superclasses(answers: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, labels = answers
    superclass_of = tuple(label % 20 for label in range(100))
    result = metrics.evaluate(logits, labels, superclass_of)
    matrix = multiclass_confusion_matrix(logits, labels, num_classes=100)
    expected = multiclass_accuracy(logits, labels, num_classes=100, average="none")
    assert result.per_class == pytest.approx(expected.tolist(), abs=1e-6)
    assert all(matrix[true, predicted] == count for true, predicted, count in result.confusions)
    assert sum(count for *_, count in result.confusions) == 5000 - matrix.trace().item()
    counts = [count for *_, count in result.confusions]
    assert counts == sorted(counts, reverse=True)
    groups = multiclass_confusion_matrix(logits.argmax(1) % 20, labels % 20, num_classes=20)
    assert result.superclass_top1 == pytest.approx(groups.trace().item() / 5000)


def test_by_hand() -> None:
    logits = torch.tensor([[9.0, 0, 0], [0, 9, 0], [9, 0, 0], [9, 0, 0]])
    result = metrics.evaluate(logits, torch.tensor([0, 1, 1, 1]))
    assert (result.top1, result.top5, result.superclass_top1) == (0.5, 1.0, None)
    assert result.per_class == (1.0, 1 / 3, None)
    assert result.confusions == ((1, 0, 2),)
    once = metrics.evaluate(torch.eye(3), torch.tensor([2, 0, 1]))
    assert once.confusions == ((0, 1, 1), (1, 2, 1), (2, 0, 1)), "as often: in the order of the classes"


def test_equal_logits_are_predicted_alike_in_every_figure(tmp_path: Path) -> None:
    """In bf16 they are common, and PyTorch's ways to find the largest do not take the same one of them."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5000, 100, generator=generator).to(torch.bfloat16)
    tied = (logits == logits.amax(1, keepdim=True)).sum(1) > 1
    assert tied.sum() > 20
    labels = logits.argmax(1)
    labels[1::2] = torch.randint(100, (2500,), generator=generator)
    found = metrics.evaluate(logits, labels)
    images = np.bincount(labels.numpy(), minlength=100)
    by_class = sum(accuracy * count for accuracy, count in zip(found.per_class, images, strict=True) if accuracy)
    assert by_class == pytest.approx(found.top1 * 5000)
    assert sum(count for *_, count in found.confusions) == 5000 - round(found.top1 * 5000)
    evaluation.write_predictions(tmp_path / "predictions.csv", tuple(map(str, range(100))), logits, labels, range(5000))
    with (tmp_path / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert np.mean([row["true"] == row["predicted"] for row in rows]) == pytest.approx(found.top1)
    assert found.top1 == pytest.approx(metrics.score(logits, labels).top1)
    assert found.top5 >= found.top1
    alike = metrics.score(torch.zeros(3, 100), torch.zeros(3, dtype=torch.int64))
    assert (alike.top1, alike.top5) == (1, 1), "what is right is among five, whichever these are"


@pytest.mark.parametrize(
    ("precision", "reason"),
    [
        ("bf16", "its training diverged$"),
        ("fp16", "or it is too much for fp16: --set train.precision=fp32 for a teacher"),
    ],
)
def test_answers_that_are_no_numbers_are_refused(precision: str, reason: str) -> None:
    metrics.refuse_no_answer(torch.zeros(2, 3), Path("model"), precision)
    with pytest.raises(DataError, match=f"model: its outputs are NaN or infinite: .*{reason}"):
        metrics.refuse_no_answer(torch.tensor([[0.0, float("inf")]]), Path("model"), precision)


class Noting(torch.nn.Module):
    """The mean of each channel, and how it was asked."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.asked = (self.training, torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"))
        return inputs.mean((2, 3))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_is_looked_at_in_evaluation_mode_and_in_the_runs_precision(precision: str) -> None:
    split = Split(np.zeros((3, 3, 8, 8), np.uint8), np.arange(3))
    model, cpu = Noting(), torch.device("cpu")
    metrics.logits_of(model, DeviceLoader(split, 2, cpu, Preprocessing(8)), autocast(cpu, precision))
    assert model.asked == (False, True, precision == "bf16")
    assert model.training


class Narrow(torch.nn.Module):
    """The mean of each channel, of few images at once."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if len(inputs) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return inputs.mean((2, 3))


@pytest.mark.parametrize("tta", [False, True])
def test_images_that_do_not_fit_into_a_gpu_together_are_looked_at_in_portions(tta: bool) -> None:
    """A trained epoch is not lost for it, and `evaluate` has no batch size to lower."""
    random = np.random.default_rng(0)
    split = Split(random.integers(0, 256, (100, 3, 32, 32), np.uint8), np.arange(100))
    loader = DeviceLoader(split, 64, torch.device("cpu"), Preprocessing(32))
    advanced: list[int] = []
    loader.portions = Portions(torch.device("cuda"), loader.portions.most)
    logits, labels = metrics.logits_of(Narrow(), loader, contextlib.nullcontext, tta=tta, advance=advanced.append)
    assert labels.tolist() == list(range(100))
    assert loader.portions.most == 16
    assert advanced == [64, 36]
    if not tta:
        np.testing.assert_allclose(logits.numpy(), split.images.mean((2, 3)) / 255, rtol=1e-5)
    small = DeviceLoader(split, 20, torch.device("cpu"), Preprocessing(32))
    torch.testing.assert_close(logits, metrics.logits_of(Narrow(), small, contextlib.nullcontext, tta=tta)[0])

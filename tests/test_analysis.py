"""What predictions say: against torchmetrics and plain counting."""

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
    multiclass_confusion_matrix,
)

from cifar100cli import analysis
from cifar100cli.analysis import Confusion, Predictions
from cifar100cli.errors import DataError

CLASSES = 20


@pytest.fixture
def logits() -> torch.Tensor:
    found = torch.randn(3000, CLASSES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found[torch.arange(3000), torch.arange(3000) % CLASSES] += 2
    return found


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.arange(3000) % CLASSES


@pytest.fixture
def predictions(logits: torch.Tensor, labels: torch.Tensor) -> Predictions:
    confidence, predicted = logits.softmax(1).max(1)
    return Predictions(labels.numpy(), predicted.numpy(), confidence.numpy())


def test_matrix_and_classes(predictions: Predictions, logits: torch.Tensor, labels: torch.Tensor) -> None:
    matrix = analysis.confusion_matrix(predictions.true, predictions.predicted, CLASSES)
    assert np.array_equal(matrix, multiclass_confusion_matrix(logits, labels, num_classes=CLASSES).numpy())
    expected = multiclass_accuracy(logits, labels, num_classes=CLASSES, average="none")
    assert analysis.accuracies(matrix) == pytest.approx(expected.tolist(), abs=1e-6)
    assert analysis.accuracies(np.array([[0, 0], [1, 3]])) == [None, 0.75]


def test_calibration(predictions: Predictions, logits: torch.Tensor, labels: torch.Tensor) -> None:
    bins = analysis.calibration(predictions)
    assert sum(one.count for one in bins) == 3000
    expected = multiclass_calibration_error(logits.softmax(1), labels, num_classes=CLASSES, n_bins=15, norm="l1")
    assert analysis.calibration_error(bins) == pytest.approx(expected.item(), abs=1e-6)
    right = predictions.true == predictions.predicted
    for one in bins:
        here = (predictions.confidence > one.low) & (predictions.confidence <= one.high)
        assert one.count == here.sum()
        if one.count:
            assert one.accuracy == pytest.approx(right[here].mean())
            assert one.confidence == pytest.approx(predictions.confidence[here].mean())
        else:
            assert (one.accuracy, one.confidence) == (None, None)


def test_the_certain_are_in_the_last_bin() -> None:
    bins = analysis.calibration(Predictions(np.array([0, 1]), np.array([0, 0]), np.array([1.0, 0.0])))
    assert [bins[0].count, bins[-1].count] == [1, 1]
    assert analysis.calibration_error(bins) == 0


def test_a_bin_has_its_upper_edge_and_not_its_lower_one() -> None:
    edges = np.array([0.25, 0.5, 0.75, 1.0])
    bins = analysis.calibration(Predictions(np.zeros(4, int), np.zeros(4, int), edges), 4)
    assert [(one.high, one.count, one.confidence) for one in bins] == [(edge, 1, edge) for edge in edges]


def test_most_confused(predictions: Predictions) -> None:
    pairs = list(zip(predictions.true.tolist(), predictions.predicted.tolist(), strict=True))
    both = Counter(frozenset(pair) for pair in pairs if pair[0] != pair[1])
    matrix = analysis.confusion_matrix(predictions.true, predictions.predicted, CLASSES)
    found = analysis.most_confused(matrix, 10)
    assert [one.count for one in found] == [count for _, count in both.most_common(10)]
    for one in found:
        assert (one.forth, one.back) == (pairs.count((one.first, one.second)), pairs.count((one.second, one.first)))
        assert one.forth >= one.back
    assert analysis.most_confused(np.array([[5, 1], [2, 5]]), 10) == [Confusion(1, 0, 2, 1)]
    assert analysis.most_confused(np.array([[5, 2], [2, 5]]), 10) == [Confusion(0, 1, 2, 2)]
    assert analysis.most_confused(np.eye(3, dtype=np.int64), 10) == []


def test_mistakes_are_the_surest_first(predictions: Predictions) -> None:
    mistakes = analysis.surest_mistakes(predictions, 5)
    assert all(predictions.true[index] != predictions.predicted[index] for index in mistakes)
    wrong = np.sort(predictions.confidence[predictions.true != predictions.predicted])[::-1]
    assert predictions.confidence[mistakes].tolist() == wrong[:5].tolist()
    first = mistakes[0]
    true, predicted = int(predictions.true[first]), int(predictions.predicted[first])
    assert analysis.mistaken(predictions, true, predicted, 3)[0] == first


HEAD = "index,true,predicted,confidence,correct\n"


def test_read(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w", newline="") as file:
        csv.writer(file).writerows([HEAD.strip().split(","), [0, "a, b", "c", 0.5, 0], [1, "c", "c", 1, 1]])
    found = analysis.read_predictions(tmp_path / "file", ["c", "a, b"])
    assert (found.true.tolist(), found.predicted.tolist(), found.confidence.tolist()) == ([1, 0], [0, 0], [0.5, 1])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        HEAD.encode(),
        b"\xff\xfe\x00",
        b"a,b\n1,2\n",
        HEAD.encode() + b"0,c,x,0.5,0\n",
        HEAD.encode() + b"0,c,c,nan,1\n",
        HEAD.encode() + b"0,c,c,1.5,1\n",
        HEAD.encode() + b"1,c,c,0.5,1\n",
        HEAD.encode() + b"0,c\n",
        HEAD.encode() + b"0,c,c,0.5,1\n0,c,c,0.5,1\n",
        HEAD.encode() + b'0,"' + b"c" * 200_000 + b'",c,0.5,1\n',
    ],
)
def test_what_is_no_list_of_predictions(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(DataError, match="file"):
        analysis.read_predictions(tmp_path / "file", ["c"])


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(DataError):
            analysis.read_predictions(path, ["c"])

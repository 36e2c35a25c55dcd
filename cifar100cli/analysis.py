"""What predictions say about a model: confusions, calibration, classes, mistakes. NumPy only, for the report."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cifar100cli.bounded import read_file
from cifar100cli.errors import DataError

COLUMNS = ("index", "true", "predicted", "confidence", "correct")  # of predictions.csv
LARGEST = 16 << 20  # bytes; the 10,000 test images take less than half a million
BINS = 15  # of confidence, as in the paper

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Predictions:
    """True and predicted classes (N,) int64 and the confidence (N,) float64 of each test image, in their order."""

    true: Indices
    predicted: Indices
    confidence: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.true)


@dataclass(frozen=True)
class Bin:
    """The predictions whose confidence lies between `low` and `high`; means are None where there are none."""

    low: float
    high: float
    count: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Confusion:
    """Two classes that are taken for each other, and how often each way."""

    first: int
    second: int
    forth: int
    back: int

    @property
    def count(self) -> int:
        """Images on both sides."""
        return self.forth + self.back


def read_predictions(path: Path, classes: Sequence[str]) -> Predictions:
    """Read what a complete run writes, and `evaluate --predictions` of the test images.

    Raises `DataError` for a file that is missing or broken, or speaks of other classes.
    """
    number = {name: index for index, name in enumerate(classes)}
    rows: list[tuple[int, int, float]] = []
    try:
        lines = csv.reader(io.StringIO(read_file(path, LARGEST).decode("utf-8"), newline=""))
        if tuple(next(lines, ())) != COLUMNS:
            raise DataError(f"{path}: its columns are not {', '.join(COLUMNS)}")
        for index, (position, true_name, predicted_name, written, _) in enumerate(lines):
            if int(position) != index:
                raise DataError(f"{path}: line {index + 2} is not the image after the one before")
            confidence = float(written)
            if not 0 <= confidence <= 1:
                raise DataError(f"{path}: line {index + 2}: a confidence of {confidence:g}")
            rows.append((number[true_name], number[predicted_name], confidence))
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    except DataError:
        raise
    except (ValueError, KeyError, csv.Error) as error:
        words = str(error)[:100]
        raise DataError(f"{path}: broken near line {len(rows) + 2} ({type(error).__name__}: {words})") from None
    if not rows:
        raise DataError(f"{path}: there is no prediction in it")
    true, predicted, confidence_of = zip(*rows, strict=True)
    return Predictions(np.array(true), np.array(predicted), np.array(confidence_of))


def confusion_matrix(true: Indices, predicted: Indices, count: int) -> Indices:
    """How often class i was taken for class j, as (count, count) int64: rows are the true classes."""
    return np.bincount(true * count + predicted, minlength=count * count).reshape(count, count)


def accuracies(matrix: Indices) -> list[float | None]:
    """The share of each class's images that is right; None for a class without images."""
    images = matrix.sum(axis=1)
    return [float(matrix[i, i] / images[i]) if images[i] else None for i in range(len(matrix))]


def calibration(predictions: Predictions, bins: int = BINS) -> list[Bin]:
    """Confidence beside accuracy, in equal bins (Guo et al., arXiv 1706.04599): a bin has its upper edge."""
    edges = np.linspace(0, 1, bins + 1)
    place = np.digitize(predictions.confidence, edges[1:-1], right=True)
    right = predictions.true == predictions.predicted
    found = []
    for index in range(bins):
        here = place == index
        count = int(here.sum())
        means = (float(predictions.confidence[here].mean()), float(right[here].mean())) if count else (None, None)
        found.append(Bin(float(edges[index]), float(edges[index + 1]), count, *means))
    return found


def calibration_error(bins: Sequence[Bin]) -> float:
    """The mean gap between confidence and accuracy, weighted by images."""
    total = sum(one.count for one in bins)
    return sum(
        one.count * abs(one.accuracy - one.confidence)
        for one in bins
        if one.accuracy is not None and one.confidence is not None
    ) / (total or 1)


def most_confused(matrix: Indices, count: int) -> list[Confusion]:
    """The pairs of classes that are taken for each other most often, in whichever direction."""
    both = np.triu(matrix + matrix.T, k=1)
    order = np.argsort(-both, axis=None, kind="stable")[:count]
    found = []
    for first, second in zip(*np.unravel_index(order, both.shape), strict=True):
        if not both[first, second]:
            break
        ways = (int(matrix[first, second]), int(matrix[second, first]))
        pair = (int(first), int(second))
        found.append(Confusion(*pair, *ways) if ways[0] >= ways[1] else Confusion(*pair[::-1], *ways[::-1]))
    return found


def mistaken(predictions: Predictions, true: int, predicted: int, count: int) -> list[int]:
    """Images of one class that were taken for another, the surest first."""
    wrong = np.flatnonzero((predictions.true == true) & (predictions.predicted == predicted))
    return [int(index) for index in _surest(predictions, wrong)[:count]]


def surest_mistakes(predictions: Predictions, count: int) -> list[int]:
    """Images that the model was most certain of, and wrong about."""
    wrong = np.flatnonzero(predictions.true != predictions.predicted)
    return [int(index) for index in _surest(predictions, wrong)[:count]]


def _surest(predictions: Predictions, indices: NDArray[np.intp]) -> NDArray[np.intp]:
    return indices[np.argsort(-predictions.confidence[indices], kind="stable")]

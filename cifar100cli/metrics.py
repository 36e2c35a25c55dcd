"""How good a model is, or several together: top-1, top-5, loss, calibration, superclasses, classes, confusions."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cifar100cli import ranks
from cifar100cli.augment import mirrored, unchanged
from cifar100cli.devices import Cast
from cifar100cli.errors import DataError
from cifar100cli.loader import Batch, DeviceLoader

CALIBRATION_BINS = 15


@dataclass(frozen=True)
class Scores:
    """Accuracies as fractions; the mean cross-entropy in nats."""

    count: int
    top1: float
    top5: float
    loss: float


@dataclass(frozen=True)
class EvalResult(Scores):
    """Scores with all that `evaluate` shows. `confusions` has (true, predicted, count), most frequent first."""

    ece: float
    superclass_top1: float | None
    per_class: tuple[float | None, ...]
    confusions: tuple[tuple[int, int, int], ...]

    def figures(self) -> dict[str, float | None]:
        """What is one number, by the names of `result.json` and `evaluate --json`: all fields but counts and lists."""
        several = ("count", "per_class", "confusions")
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in several}


def shifted_up_left(images: Tensor) -> Tensor:
    """Images (N, C, H, W) one pixel further up and left; the pixels at the new edge are mirrored at the old one."""
    images = torch.cat((images[:, :, 1:], images[:, :, -2:-1]), dim=2)
    return torch.cat((images[:, :, :, 1:], images[:, :, :, -2:-1]), dim=3)


def shifted_down_right(images: Tensor) -> Tensor:
    """Images (N, C, H, W) one pixel further down and right, likewise."""
    images = torch.cat((images[:, :, 1:2], images[:, :, :-1]), dim=2)
    return torch.cat((images[:, :, :, 1:2], images[:, :, :, :-1]), dim=3)


# Test-time augmentation: what is done to an image and its mirror image, and the weight of the pair.
SHIFTS: tuple[tuple[Callable[[Tensor], Tensor], float], ...] = (
    (unchanged, 0.5),
    (shifted_up_left, 0.25),
    (shifted_down_right, 0.25),
)


def average_over_views(model: nn.Module, loader: DeviceLoader, batch: Batch) -> Tensor:
    """Logits (N, classes) float32 as weighted means over six views of each image.

    The image and its mirror image, as they are and shifted by a pixel, made of the uint8 images before they are
    enlarged: the `tta_level` 2 of Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", arXiv 2404.00498. As
    there, the means are of logits and not of probabilities, so that figures compare with those published that way.
    """
    assert batch.images is not None, "features that were computed before have no views"

    def pair(images: Tensor) -> Tensor:
        logits = (model(loader.preprocessing(view)).float() for view in (images, mirrored(images)))
        return torch.stack([*logits]).mean(0)

    return torch.stack([weight * pair(shift(batch.images)) for shift, weight in SHIFTS]).sum(0)


def predict(
    model: nn.Module,
    loader: DeviceLoader,
    cast: Cast,
    *,
    tta: bool = False,
    advance: Callable[[int], None] = lambda count: None,
) -> tuple[Tensor, Tensor]:
    """Logits (N, classes) float32 and labels (N,) int64 of a whole split, in its order, on the CPU.

    The model is in evaluation mode meanwhile, and afterwards as it was. The host waits once, at the end. Of several
    ranks each looks at its share of every batch, and all have all logits in the end. `tta` takes means over views of
    an image; `advance` is told how many images more were looked at.
    """
    training = model.training
    model.eval()
    parts = []
    try:
        with torch.inference_mode(), cast():
            for batch, size in zip(loader.epoch(1), loader.batch_sizes(), strict=True):
                parts.append(average_over_views(model, loader, batch) if tta else model(batch.inputs).float())
                advance(size)
    finally:
        model.train(training)
    logits = parts[0].new_zeros(loader.count, parts[0].shape[1])
    for share, part in zip(loader.shares, parts, strict=True):
        logits[share] = part
    ranks.sum_up(logits)  # each row was filled on one rank, and is zero on the others
    return logits.cpu(), loader.labels.cpu()


def refuse_no_answer(logits: Tensor, path: Path) -> None:
    """Raise `DataError` where what a model says of images is no number, as finite weights can be damaged to do."""
    if not torch.isfinite(logits).all():
        raise DataError(f"{path}: corrupt, or spoilt in training: what it says of images is no finite number")


def ensemble(members: Sequence[Tensor]) -> Tensor:
    """The logarithms (N, classes) float64 of the mean of several models' probabilities, from the logits of each.

    Lakshminarayanan et al., "Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles", arXiv
    1612.01474. Their softmax is the mean itself, so that they stand in for logits in everything here.
    """
    # By logarithms, or a class to which no member gives more than 1e-308 would have an infinite loss.
    probabilities = torch.stack([logits.double().log_softmax(1) for logits in members])
    return probabilities.logsumexp(0) - math.log(len(members))


def predictions(logits: Tensor) -> Tensor:
    """The predicted class (N,) int64 of each row of logits (N, classes).

    In bf16, logits are often the same, and a prediction must be the same one in every figure.
    """
    return logits.argmax(1)


def score(logits: Tensor, labels: Tensor) -> Scores:
    """Scores from logits (N, classes) and labels (N,)."""
    right = predictions(logits) == labels
    among_five = (logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]).any(1)
    return Scores(
        count=len(labels),
        top1=right.double().mean().item(),
        top5=(among_five | right).double().mean().item(),
        loss=F.cross_entropy(logits.double(), labels).item(),
    )


def evaluate(logits: Tensor, labels: Tensor, superclass_of: tuple[int, ...] = ()) -> EvalResult:
    """Everything from logits (N, classes) and labels (N,).

    A prediction's superclass is that of the predicted class. A class without images has no accuracy.
    """
    classes = logits.shape[1]
    scores = score(logits, labels)
    predicted = predictions(logits)
    counts = torch.bincount(labels * classes + predicted, minlength=classes * classes).view(classes, classes)
    images = counts.sum(1)
    superclass_top1 = None
    if superclass_of:
        group = torch.tensor(superclass_of)
        superclass_top1 = (group[predicted] == group[labels]).double().mean().item()
    off_diagonal = counts.clone().fill_diagonal_(0)
    pairs = [(int(true), int(guess), int(off_diagonal[true, guess])) for true, guess in off_diagonal.nonzero()]
    return EvalResult(
        **vars(scores),
        ece=expected_calibration_error(logits, labels),
        superclass_top1=superclass_top1,
        per_class=tuple(
            int(counts[label, label]) / int(images[label]) if images[label] else None for label in range(classes)
        ),
        confusions=tuple(sorted(pairs, key=lambda pair: (-pair[2], pair[0], pair[1]))),
    )


def expected_calibration_error(logits: Tensor, labels: Tensor, bins: int = CALIBRATION_BINS) -> float:
    """The mean gap between confidence and accuracy over equal bins of confidence, weighted by their images.

    Guo et al., "On Calibration of Modern Neural Networks", arXiv 1706.04599, with 15 bins.
    """
    confidence = logits.double().softmax(1).amax(1)
    correct = (predictions(logits) == labels).double()
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    index = torch.bucketize(confidence, edges[1:-1])
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, correct - confidence)
    return (gaps.abs().sum() / len(labels)).item()

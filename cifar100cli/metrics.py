"""How good a model is, or several together: top-1, top-5, loss, calibration, superclasses, classes, confusions."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cifar100cli import analysis, ranks
from cifar100cli.analysis import Predictions
from cifar100cli.augment import mirrored, pad
from cifar100cli.devices import Cast
from cifar100cli.errors import DataError
from cifar100cli.inference import evaluating
from cifar100cli.loader import Batch, DeviceLoader


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

    padded = pad(batch.images, 1, "reflect")
    views = ((batch.images, 0.5), (padded[:, :, 2:, 2:], 0.25), (padded[:, :, :-2, :-2], 0.25))
    return torch.stack([weight * pair(images) for images, weight in views]).sum(0)


def logits_of(
    model: nn.Module,
    loader: DeviceLoader,
    cast: Cast,
    *,
    tta: bool = False,
    advance: Callable[[int], None] = lambda count: None,
) -> tuple[Tensor, Tensor]:
    """Logits (N, classes) float32 and labels (N,) int64 of a whole split, in its order, on the CPU.

    The model is in evaluation mode meanwhile, and afterwards as it was. The host waits once, at the end. Of several
    ranks each looks at its share of every batch, and all have all logits in the end. A batch that a GPU has no memory
    for is looked at in portions. `tta` takes means over views of an image; `advance` is told how many images more were
    looked at.
    """
    answers: list[tuple[slice, Tensor]] = []
    with evaluating(model), torch.inference_mode(), cast():
        plan = loader.plan(1)

        def look(rows: slice) -> Tensor:
            batch = loader.batch(plan, rows)
            return average_over_views(model, loader, batch) if tta else model(batch.inputs).float()

        for share, size in zip(loader.shares, loader.batch_sizes(), strict=True):
            answers += loader.portions.of(share, look)
            advance(size)
    logits = answers[0][1].new_zeros(loader.count, answers[0][1].shape[1])
    for rows, answer in answers:
        logits[rows] = answer
    ranks.sum_up(logits)  # each row was filled on one rank, and is zero on the others
    return logits.cpu(), loader.labels.cpu()


def refuse_no_answer(logits: Tensor, path: Path, precision: str) -> None:
    """Raise `DataError` where what a model says of images is no number, as finite weights can be damaged to do."""
    if not torch.isfinite(logits).all():
        reason = "it is damaged, or its training diverged"
        if precision == "fp16":
            reason += ", or it is too much for fp16: --set train.precision=fp32 for a teacher, else --device cpu"
        raise DataError(f"{path}: its outputs are NaN or infinite: {reason}")


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


def with_confidence(logits: Tensor, labels: Tensor) -> Predictions:
    """The predictions of logits (N, classes), each with its confidence, beside the labels (N,); all on the CPU."""
    confidence = logits.double().softmax(1).amax(1)
    return Predictions(labels.numpy(), predictions(logits).numpy(), confidence.numpy())


def evaluate(logits: Tensor, labels: Tensor, superclass_of: tuple[int, ...] = ()) -> EvalResult:
    """Everything from logits (N, classes) and labels (N,), on the CPU.

    A prediction's superclass is that of the predicted class. A class without images has no accuracy.
    """
    found = with_confidence(logits, labels)
    matrix = analysis.confusion_matrix(found.true, found.predicted, logits.shape[1])
    group = np.array(superclass_of)
    pairs = [(int(true), int(guess), int(matrix[true, guess])) for true, guess in np.argwhere(matrix) if true != guess]
    return EvalResult(
        **vars(score(logits, labels)),
        ece=analysis.calibration_error(analysis.calibration(found)),
        superclass_top1=float((group[found.predicted] == group[found.true]).mean()) if superclass_of else None,
        per_class=tuple(analysis.accuracies(matrix)),
        confusions=tuple(sorted(pairs, key=lambda pair: -pair[2])),
    )

"""What a training step minimises: `(model, batch) -> StepOutput`. One loop serves every task."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from torch import Tensor, nn
from torch.nn import functional as F

from cifar100cli.config import Loss
from cifar100cli.loader import Batch
from cifar100cli.losses import arcface, cosface


@dataclass(frozen=True)
class StepOutput:
    """The loss (a scalar that has a gradient) and the logits (N, classes) that count for accuracy; float32."""

    loss: Tensor
    logits: Tensor


class Task(Protocol):
    """Something to train for."""

    def __call__(self, model: nn.Module, batch: Batch) -> StepOutput:
        """Run the model on a batch and compute the loss."""


@dataclass(frozen=True)
class ClassificationTask:
    """Cross-entropy, with smoothed labels if asked (Szegedy et al., arXiv 1512.00567)."""

    label_smoothing: float = 0.0

    def __call__(self, model: nn.Module, batch: Batch) -> StepOutput:
        logits = model(batch.inputs).float()
        return StepOutput(F.cross_entropy(logits, batch.labels, label_smoothing=self.label_smoothing), logits)


@dataclass(frozen=True)
class MarginTask:
    """A margin loss on the cosines behind the logits. The margin is in the loss alone: no accuracy sees it."""

    loss: Callable[..., Tensor]
    scale: float

    def __call__(self, model: nn.Module, batch: Batch) -> StepOutput:
        logits = model(batch.inputs).float()
        return StepOutput(self.loss(logits / self.scale, batch.labels, scale=self.scale), logits)


def create_task(config: Loss) -> Task:
    """The task that a preset's `loss` section asks for."""
    if config.name == "cross_entropy":
        return ClassificationTask(config.label_smoothing)
    margin, smoothing = config.margin, config.label_smoothing
    if config.name == "cosface":
        return MarginTask(partial(cosface, margin=margin, label_smoothing=smoothing), config.scale)
    straight_through = config.gradient == "straight_through"
    return MarginTask(
        partial(arcface, margin=margin, label_smoothing=smoothing, straight_through=straight_through), config.scale
    )

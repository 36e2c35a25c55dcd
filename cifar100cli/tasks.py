"""What a training step minimises: `(model, batch) -> StepOutput`. One loop serves every task."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn
from torch.nn import functional as F

from cifar100cli.loader import Batch


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

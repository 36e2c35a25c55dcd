"""What a training step minimises: `(model, batch) -> StepOutput`. One loop serves every task."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol, assert_never

from torch import Tensor, nn
from torch.nn import functional as F

from cifar100cli.loader import Batch
from cifar100cli.losses import arcface, cosface, decoupled_distillation, distillation, standardized
from cifar100cli.schema import Distillation, Loss


@dataclass(frozen=True)
class StepOutput:
    """The loss (a scalar that has a gradient) and the logits (N, classes) that count for accuracy; float32."""

    loss: Tensor
    logits: Tensor


class Task(Protocol):
    """Something to train for."""

    def __call__(self, model: nn.Module, batch: Batch) -> StepOutput:
        """Run the model on a batch and compute the loss."""


def of_labels(loss: Callable[..., Tensor], batch: Batch) -> Tensor:
    """The mean over a batch of a loss of labels; for a mixed image, that of both its labels in their shares.

    For cross-entropy, with smoothed labels too, this is the cross-entropy with the shares for probabilities.
    """
    if batch.mixture is None:
        return loss(batch.labels)
    weights = batch.mixture.weights
    own, others = (loss(labels, reduction="none") for labels in (batch.labels, batch.mixture.labels))
    return (weights * own + (1 - weights) * others).mean()


@dataclass(frozen=True)
class ClassificationTask:
    """Cross-entropy, with smoothed labels if asked (Szegedy et al., arXiv 1512.00567)."""

    label_smoothing: float = 0.0

    def __call__(self, model: nn.Module, batch: Batch) -> StepOutput:
        logits = model(batch.inputs).float()
        loss = partial(F.cross_entropy, logits, label_smoothing=self.label_smoothing)
        return StepOutput(of_labels(loss, batch), logits)


@dataclass(frozen=True)
class MarginTask:
    """A margin loss on the cosines behind the logits. The margin is in the loss alone: no accuracy sees it."""

    loss: Callable[..., Tensor]
    scale: float

    def __call__(self, model: nn.Module, batch: Batch) -> StepOutput:
        logits = model(batch.inputs).float()
        return StepOutput(of_labels(partial(self.loss, logits / self.scale, scale=self.scale), batch), logits)


Teacher = Callable[[Batch], Tensor]  # logits (N, classes) float32 for the images of a batch


@dataclass(frozen=True)
class DistillationTask:
    """(1 - alpha) of a task's own loss, and alpha of a distillation loss against a teacher.

    Both sides' logits are what the networks give: scaled cosines, where the head gives these, and no margin.
    """

    task: Task
    teacher: Teacher
    config: Distillation

    def __call__(self, model: nn.Module, batch: Batch) -> StepOutput:
        config, output, teacher = self.config, self.task(model, batch), self.teacher(batch)
        student = output.logits
        if config.standardize:
            student, teacher = standardized(student), standardized(teacher)
        if config.form == "decoupled":
            decoupled = partial(
                decoupled_distillation,
                student,
                teacher,
                temperature=config.temperature,
                target_weight=config.target_weight,
                nontarget_weight=config.nontarget_weight,
            )
            soft = of_labels(decoupled, batch)
        else:
            soft = distillation(student, teacher, config.temperature)
        return StepOutput((1 - config.alpha) * output.loss + config.alpha * soft, output.logits)


def create_task(config: Loss) -> Task:
    """The task that a preset's `loss` section asks for."""
    if config.name == "cross_entropy":
        return ClassificationTask(config.label_smoothing)
    margin, smoothing = config.margin, config.label_smoothing
    if config.name == "cosface":
        return MarginTask(partial(cosface, margin=margin, label_smoothing=smoothing), config.scale)
    if config.name == "arcface":
        straight_through = config.gradient == "straight_through"
        return MarginTask(
            partial(arcface, margin=margin, label_smoothing=smoothing, straight_through=straight_through), config.scale
        )
    assert_never(config.name)

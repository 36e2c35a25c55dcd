"""Margin losses on raw cosines, and losses between a student's and a teacher's logits, as functions.

Margin losses take cosines (N, classes) float32 between embeddings and class vectors, labels (N,) int64, and return
the mean cross-entropy of the scaled cosines after the margin was taken off the true class. Cosines of exactly
1 and -1, and beyond by rounding, give finite losses and finite gradients. What has a `reduction` gives the losses of
the images, (N,), with "none".
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

# Below this, 1 - cos^2 is rounding: the slope of the sine, which grows without bound there, is held.
_LEAST_SQUARED_SINE = torch.finfo(torch.float32).eps


def arcface(
    cosines: Tensor,
    labels: Tensor,
    *,
    scale: float,
    margin: float,
    straight_through: bool = False,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Additive angular margin: cos(angle + margin) in place of cos(angle) for the true class.

    Deng et al., "ArcFace", arXiv 1801.07698. Where angle + margin would pass pi, the target goes on as
    cos(angle) - margin * sin(margin), so that it still falls as the angle grows. With `straight_through` the
    backward pass takes the margin for a constant: what an in-place change under `no_grad` amounts to.
    """
    cosines = cosines.float()
    target = cosines.gather(1, labels[:, None])
    sine = (1 - target * target).clamp_min(_LEAST_SQUARED_SINE).sqrt()
    shifted = target * math.cos(margin) - sine * math.sin(margin)
    continued = target - margin * math.sin(margin)
    moved = torch.where(target > -math.cos(margin), shifted, continued)
    if straight_through:
        moved = target + (moved - target).detach()
    logits = scale * cosines.scatter(1, labels[:, None], moved)
    return F.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction=reduction)


def cosface(
    cosines: Tensor,
    labels: Tensor,
    *,
    scale: float,
    margin: float,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Additive cosine margin: cos(angle) - margin for the true class. Wang et al., arXiv 1801.09414."""
    cosines = cosines.float()
    margins = margin * F.one_hot(labels, cosines.shape[1])
    logits = scale * (cosines - margins)
    return F.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction=reduction)


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student), both softmaxes at logits / T, mean over images.

    Logits (N, classes). Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv 1503.02531: T^2
    keeps the gradient's size whatever the temperature.
    """
    ours = F.log_softmax(student.float() / temperature, dim=1)
    theirs = F.log_softmax(teacher.float() / temperature, dim=1)
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2


def decoupled_distillation(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    temperature: float,
    *,
    target_weight: float,
    nontarget_weight: float,
    reduction: str = "mean",
) -> Tensor:
    """T^2 (target_weight TCKD + nontarget_weight NCKD) of logits (N, classes) and labels (N,) int64, mean over images.

    Zhao et al., "Decoupled Knowledge Distillation", arXiv 2203.08679. TCKD is the divergence between the two
    ways of parting probability between the true class and all others, NCKD that among the others alone; plain
    distillation is TCKD + (1 - p) NCKD, with the teacher's p of the true class.
    """
    ours, theirs = student.float() / temperature, teacher.float() / temperature
    classes = ours.shape[1]
    true = labels[:, None]
    # Found by number and not by a mask, whose count of hits a host would have to wait for.
    others = (true + torch.arange(1, classes, device=labels.device)) % classes

    def parted(logits: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities (N, 2) of the true class and of the rest; (N, classes - 1) among the rest."""
        rest = logits.gather(1, others)
        both = torch.cat([logits.gather(1, true), rest.logsumexp(1, keepdim=True)], dim=1)
        return F.log_softmax(both, dim=1), F.log_softmax(rest, dim=1)

    (our_target, our_rest), (their_target, their_rest) = parted(ours), parted(theirs)
    target, rest = (
        F.kl_div(one, other, reduction="none", log_target=True).sum(1)
        if reduction == "none"
        else F.kl_div(one, other, reduction="batchmean", log_target=True)
        for one, other in ((our_target, their_target), (our_rest, their_rest))
    )
    return (target_weight * target + nontarget_weight * rest) * temperature**2


def standardized(logits: Tensor) -> Tensor:
    """Each image's logits (N, classes) brought to mean 0 and standard deviation 1 over the classes, float32.

    Sun et al., "Logit Standardization in Knowledge Distillation", arXiv 2403.01427: the student has to match
    the teacher's order and proportions, not its range.
    """
    logits = logits.float()
    deviation = logits.std(dim=1, keepdim=True, correction=0)
    return (logits - logits.mean(dim=1, keepdim=True)) / (deviation + 1e-7)

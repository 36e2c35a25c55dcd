"""Margin losses on raw cosines, as functions.

They take cosines (N, classes) float32 between embeddings and class vectors, labels (N,) int64, and return
the mean cross-entropy of the scaled cosines after the margin was taken off the true class. Cosines of exactly
1 and -1, and beyond by rounding, give finite losses and finite gradients.
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
) -> Tensor:
    """Additive angular margin: cos(angle + margin) in place of cos(angle) for the true class.

    Deng et al., "ArcFace", arXiv 1801.07698. Where angle + margin would pass pi, the target goes on as
    cos(angle) - margin * sin(margin), so that it still falls as the angle grows. With `straight_through` the
    backward pass takes the margin for a constant: what an in-place change under `no_grad` amounts to.
    """
    cosines = cosines.float()
    target = cosines.gather(1, labels[:, None]).clamp(-1, 1)
    sine = (1 - target * target).clamp_min(_LEAST_SQUARED_SINE).sqrt()
    shifted = target * math.cos(margin) - sine * math.sin(margin)
    continued = target - margin * math.sin(margin)
    moved = torch.where(target > -math.cos(margin), shifted, continued)
    if straight_through:
        moved = target + (moved - target).detach()
    logits = scale * cosines.scatter(1, labels[:, None], moved)
    return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)


def cosface(cosines: Tensor, labels: Tensor, *, scale: float, margin: float, label_smoothing: float = 0.0) -> Tensor:
    """Additive cosine margin: cos(angle) - margin for the true class. Wang et al., arXiv 1801.09414."""
    cosines = cosines.float()
    reduction = margin * F.one_hot(labels, cosines.shape[1])
    return F.cross_entropy(scale * (cosines - reduction), labels, label_smoothing=label_smoothing)

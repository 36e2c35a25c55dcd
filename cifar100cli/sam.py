"""Sharpness-Aware Minimisation: the gradient is taken where the loss is highest nearby.

Foret et al., arXiv 2010.01412; its adaptive form, which measures nearness by each weight's size: Kwon et al., arXiv
2102.11600.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

LEAST_SIZE = 0.01  # of a weight, in the adaptive form, so that one of 0 moves too: the paper's eta
SMALLEST_NORM = 1e-12


@contextmanager
def uphill(model: nn.Module, rho: float, *, adaptive: bool = False) -> Iterator[None]:
    """Within, the weights are `rho` further along their gradients; after, they are what they were, to the bit.

    So are the buffers: batch statistics, which have moved for this batch already, do not move a second time.
    """
    climbing = [(weight, weight.grad) for weight in model.parameters() if weight.grad is not None]
    before = [(tensor, tensor.detach().clone()) for tensor in (*(weight for weight, _ in climbing), *model.buffers())]
    with torch.no_grad():
        steps = [gradient for _, gradient in climbing]
        sizes = [weight.abs() + LEAST_SIZE for weight, _ in climbing] if adaptive else []
        if adaptive:  # lengths are measured in the weights' own sizes
            steps = [step * size for step, size in zip(steps, sizes, strict=True)]
        scale = rho / (nn.utils.get_total_norm(steps) + SMALLEST_NORM)
        if adaptive:
            steps = [step * size for step, size in zip(steps, sizes, strict=True)]
        for (weight, _), step in zip(climbing, steps, strict=True):
            weight.add_(step * scale)
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, copy in before:
                tensor.copy_(copy)

"""Sharpness-Aware Minimisation: the gradient is taken where the loss is highest nearby.

Foret et al., arXiv 2010.01412; its adaptive form, which measures nearness by each weight's size: Kwon et al., arXiv
2102.11600. Drop-out and stochastic depth draw anew where the loss is highest: the gradient there is of another thinned
network than the one that led there.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

LEAST_SIZE = 0.01  # of a weight, in the adaptive form, so that one of 0 moves too: the paper's eta
SMALLEST_NORM = 1e-12


@contextmanager
def uphill(model: nn.Module, rho: float, *, adaptive: bool = False) -> Iterator[None]:
    """Within, the weights are `rho` further along their gradients; after, they are what they were, to the bit.

    So are the buffers: batch statistics, which have moved for this batch already, do not move a second time.
    """
    climbing: list[Tensor] = [weight for weight in model.parameters() if weight.grad is not None]
    moved: list[Tensor] = [*climbing, *model.buffers()]
    kinds = {tensor.dtype for tensor in moved}
    alike = [[tensor for tensor in moved if tensor.dtype == kind] for kind in kinds]
    with torch.no_grad():
        # All tensors of a type at once: one by one, as those of several types go, they are hundreds of copies of a
        # microsecond, a tenth of a step on a GPU.
        before = [[torch.empty_like(tensor) for tensor in tensors] for tensors in alike]
        for kept, tensors in zip(before, alike, strict=True):
            torch._foreach_copy_(kept, tensors)
        steps: list[Tensor] | tuple[Tensor, ...] = [weight.grad for weight in climbing if weight.grad is not None]
        if adaptive:  # lengths are measured in the weights' own sizes
            sizes = torch._foreach_add(torch._foreach_abs(climbing), LEAST_SIZE)
            steps = torch._foreach_mul(steps, sizes)
        scale = rho / (nn.utils.get_total_norm(steps) + SMALLEST_NORM)
        if adaptive:
            steps = torch._foreach_mul(steps, sizes)
        torch._foreach_add_(climbing, torch._foreach_mul(steps, scale))
    try:
        yield
    finally:
        with torch.no_grad():
            for kept, tensors in zip(before, alike, strict=True):
                torch._foreach_copy_(tensors, kept)

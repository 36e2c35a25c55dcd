"""Muon: momentum, orthogonalised (Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024).

PyTorch has one for matrices alone, whose step waits for a learning rate that is on the device; this one takes the
filters of convolutions too, and can be captured in a CUDA graph.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

SMALLEST_NORM = 1e-7
# Of the polynomial a x + b x^3 + c x^5, which takes singular values from 0 to 1 to the neighbourhood of 1 in a few
# rounds: Jordan's, with the steepest rise at 0 that still stays there.
A, B, C = 3.4445, -4.7750, 2.0315


def orthogonalised(matrix: Tensor, steps: int) -> Tensor:
    """The matrix (rows, columns) with singular values near 1, between about 0.7 and 1.2, in its own dtype.

    A Newton-Schulz iteration of odd polynomials, which changes no singular vector. With 5 steps it lifts singular
    values from a thousandth of the matrix's norm upward; what is smaller stays smaller.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    found = matrix.mT if tall else matrix
    found = found / found.norm().clamp(min=SMALLEST_NORM)
    for _ in range(steps):
        gram = found @ found.mT
        found = torch.addmm(found, torch.addmm(gram, gram, gram, beta=B, alpha=C), found, beta=A)
    return found.mT if tall else found


def size_of_update(rows: int, columns: int, adjust: Literal["original", "match_rms_adamw"]) -> float:
    """What an orthogonalised update is multiplied by.

    `original` is Jordan's, with rates around 0.02; `match_rms_adamw` makes updates as large as AdamW's usually are,
    so that its rates and weight decay serve (Liu et al., arXiv 2502.16982).
    """
    return math.sqrt(max(1, rows / columns)) if adjust == "original" else 0.2 * math.sqrt(max(rows, columns))


class Muon(torch.optim.Optimizer):
    """Muon over weights of two and more dimensions; of filters, all dimensions but the first are the columns.

    `lr` may be a number, or a scalar tensor on the weights' device. `dtype` is what is orthogonalised in. Weight decay
    is decoupled, as AdamW's. With `fixed_norm`, the entries of every weight are first given the norm that those of an
    orthogonal matrix have, the root of its rows, as in airbench: the rate alone then says how far a step turns it. That
    is for weights whose size means nothing, as of convolutions that a norm follows.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        momentum: float,
        nesterov: bool,
        weight_decay: float,
        ns_steps: int,
        adjust_lr: Literal["original", "match_rms_adamw"],
        fixed_norm: bool,
        dtype: torch.dtype,
    ) -> None:
        self.momentum, self.nesterov, self.ns_steps = momentum, nesterov, ns_steps
        self.adjust_lr, self.fixed_norm, self.dtype = adjust_lr, fixed_norm, dtype
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move the weights that have a gradient."""
        assert closure is None
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._move(weight, weight.grad, group["lr"], group["weight_decay"])

    def _move(self, weight: Tensor, gradient: Tensor, rate: float | Tensor, weight_decay: float) -> None:
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        average = state["momentum_buffer"].lerp_(gradient, 1 - self.momentum)
        matrix = (gradient.lerp(average, self.momentum) if self.nesterov else average).flatten(1)
        update = orthogonalised(matrix.to(self.dtype), self.ns_steps).to(weight.dtype)
        if self.fixed_norm:
            weight.mul_(math.sqrt(matrix.shape[0]) / weight.norm().clamp(min=SMALLEST_NORM))
        if weight_decay:
            weight.mul_(1 - rate * weight_decay)
        weight.sub_(
            (update * (rate * size_of_update(matrix.shape[0], matrix.shape[1], self.adjust_lr))).view_as(weight)
        )

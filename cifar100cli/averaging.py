"""An exponential moving average of a network's weights, which is measured and kept in their place."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class MovingAverage:
    """The average of all weights and batch statistics over the steps of training.

    After step t, counted from 0, it moves towards the weights by 1 - min(decay, (1 + t) / (10 + t)): Polyak and
    Juditsky's averaging with the warm-up of TensorFlow's ExponentialMovingAverage, without which a short run would end
    with much of its first weights. Whole numbers, such as the count of batches, are those of the weights. With a
    decay of 0 there is no average, and nothing here does anything.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        weights = model.state_dict() if decay else {}  # shares its memory with the model
        firsts: dict[int, str] = {}  # layers may share weights, which then have several names and one average
        first = {name: firsts.setdefault(id(tensor), name) for name, tensor in model.state_dict(keep_vars=True).items()}
        self._weights = {name: tensor for name, tensor in weights.items() if first[name] == name}
        averages = {name: tensor.clone() for name, tensor in self._weights.items()}
        self.tensors = {name: averages[first[name]] for name in weights}
        floating = [name for name, tensor in self._weights.items() if tensor.is_floating_point()]
        self._floating = [self.tensors[n] for n in floating], [self._weights[n] for n in floating]
        whole = [name for name in self._weights if name not in set(floating)]
        self._whole = [self.tensors[n] for n in whole], [self._weights[n] for n in whole]

    def update(self, step: int) -> None:
        """Take the weights after step `step` of the run in. A device is not waited for."""
        if self.decay:
            torch._foreach_lerp_(*self._floating, 1 - min(self.decay, (1 + step) / (10 + step)))
            if self._whole[0]:
                torch._foreach_copy_(*self._whole)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """The network has the average for its weights meanwhile, in the same memory."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for name, weight in self._weights.items():
            _swap(weight, self.tensors[name])


def _swap(one: Tensor, other: Tensor) -> None:
    before = one.clone()
    one.copy_(other)
    other.copy_(before)

"""How many operations a network takes; a multiplication and an addition are two."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from cifar100cli.inference import evaluating
from cifar100cli.loader import DeviceLoader
from cifar100cli.steps import Training


def forward_flops(model: nn.Module, loader: DeviceLoader) -> float:
    """Floating-point operations of the matrix products and convolutions of one whole image's forward pass."""
    batch = loader.batch(replace(loader.plan(1), image_size=None), slice(0, 2))
    inputs = batch.inputs.float()  # features that are kept may be of half the precision
    with evaluating(model), torch.no_grad(), _counting() as counter:
        model(inputs)
    return float(counter.get_total_flops()) / len(inputs)


def step_flops(training: Training) -> float:
    """The same of one image in a training step, backward pass included; the weights stay as they are.

    What is computed is counted: a teacher, if it runs in the step, a frozen part only if it does, SAM's second pass.
    """
    with _counting() as counter:
        batch = training.loader.batch(replace(training.loader.plan(1), image_size=None), slice(0, 2))
        training.backward(training.forward(batch).loss)
        training.backward_uphill(batch)
    training.optimizer.zero_grad(set_to_none=True)
    return float(counter.get_total_flops()) / len(batch.labels)


def _counting() -> FlopCounterMode:
    """PyTorch's counter, with gradients of grouped convolutions as they are.

    Its own formula takes the gradient of a filter for one between all channels, as if there were one group:
    EfficientNet would be said to compute nine times what it does.
    """
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: _of_gradients})


def _of_gradients(
    gradient: Sequence[int],
    inputs: Sequence[int],
    weight: Sequence[int],
    _bias: object,
    _stride: object,
    _padding: object,
    _dilation: object,
    transposed: bool,
    _output_padding: object,
    _groups: int,
    needed: Sequence[bool],
    **_: Any,
) -> int:
    """Each of the two gradients takes as many operations as the convolution: in both, every product has its part."""
    forward = conv_flop_count(list(inputs), list(weight), list(gradient), transposed)
    return forward * sum(needed[:2])

"""How many operations a network takes; a multiplication and an addition are two."""

from dataclasses import replace

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cifar100cli.loader import DeviceLoader
from cifar100cli.steps import Training


def forward_flops(model: nn.Module, loader: DeviceLoader) -> float:
    """Floating-point operations of the matrix products and convolutions of one whole image's forward pass."""
    inputs = loader.batch(replace(loader.plan(1), image_size=None), slice(0, 2)).inputs
    training = model.training
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.eval()(inputs)
    finally:
        model.train(training)
    return float(counter.get_total_flops()) / len(inputs)


def step_flops(training: Training) -> float:
    """The same of one image in a training step, backward pass included; the weights stay as they are.

    What is computed is counted: a teacher, if it runs in the step, a frozen part only if it does, SAM's second pass.
    """
    with FlopCounterMode(display=False) as counter:
        batch = training.loader.batch(replace(training.loader.plan(1), image_size=None), slice(0, 2))
        training.backward(training.forward(batch).loss)
        training.backward_uphill(batch)
    training.optimizer.zero_grad(set_to_none=True)
    return float(counter.get_total_flops()) / len(batch.labels)

"""How many operations a network takes; a multiplication and an addition are two."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cifar100cli.loader import DeviceLoader


def forward_flops(model: nn.Module, loader: DeviceLoader) -> float:
    """Floating-point operations of the matrix products of one image's forward pass.

    Convolutions count with all of their taps, those over padding as well, as is the custom.
    """
    inputs = loader.batch(loader.plan(1), slice(0, 2)).inputs
    training = model.training
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.eval()(inputs)
    finally:
        model.train(training)
    return float(counter.get_total_flops()) / len(inputs)

"""The optimizer, and the learning rate as a pure function of the step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cifar100cli.config import Optimizer, Schedule


@dataclass(frozen=True)
class Group:
    """Weights that learn at `scale` times the rate of the others."""

    parameters: list[nn.Parameter]
    scale: float = 1.0


def everything(model: nn.Module) -> list[Group]:
    """All weights that are not frozen, at one rate."""
    return [Group([parameter for parameter in model.parameters() if parameter.requires_grad])]


def create_optimizer(config: Optimizer, groups: Sequence[Group]) -> torch.optim.Optimizer:
    """The fused optimizer over these weights; weight decay is on all of them, as in torch."""
    on_cuda = any(parameter.device.type == "cuda" for group in groups for parameter in group.parameters)

    def rate(scale: float) -> float | Tensor:
        # In a CUDA graph the rate is read from the device; on a CPU a plain number is quicker.
        return torch.tensor(config.lr * scale, device=groups[0].parameters[0].device) if on_cuda else config.lr * scale

    parameters = [{"params": group.parameters, "scale": group.scale, "lr": rate(group.scale)} for group in groups]
    if config.name == "sgd":
        sgd = torch.optim.SGD(
            parameters,
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.momentum > 0,
            weight_decay=config.weight_decay,
            fused=True,
        )
        if config.momentum:
            # torch makes it without a value in the first step, and fills it only if that is not left out, as in fp16.
            for parameter in (parameter for group in groups for parameter in group.parameters):
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return kind(
        parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True, capturable=on_cuda
    )


def learning_rate(peak: float, schedule: Schedule, step: int, steps_per_epoch: int, epochs: int) -> float:
    """The rate of training step `step`, counted from 0 over the whole run.

    It rises linearly to `peak` over the warm-up; then it stays, or falls to 0 along half a cosine
    (Loshchilov and Hutter, arXiv 1608.03983) that would reach 0 one step after the last.
    """
    total = epochs * steps_per_epoch
    warmup = min(total, round(schedule.warmup_epochs * steps_per_epoch))
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule.name == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use `rate`, times each group's scale, from the next step on."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate * group["scale"])
        else:
            group["lr"] = rate * group["scale"]

"""The optimizer over groups of weights, and the rate that it is given."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from cifar100cli.groups import Group
from cifar100cli.muon import Muon
from cifar100cli.schema import Optimizer


def create_optimizer(config: Optimizer, groups: Sequence[Group], precision: str = "fp32") -> torch.optim.Optimizer:
    """The optimizer over these weights, fused where PyTorch has it so; weight decay is on all groups that decay.

    Muon moves the hidden matrices, and its auxiliary optimizer the rest. It orthogonalises in bfloat16 where
    `precision`, the run's, is that.
    """
    if config.name != "muon":
        return _of_torch(config.name, config, _parameter_groups(config, config.lr, groups))
    hidden, others = ([group for group in groups if group.hidden == wanted] for wanted in (True, False))
    muon = Muon(
        _parameter_groups(config, config.lr, hidden),
        config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        ns_steps=config.ns_steps,
        adjust_lr=config.adjust_lr,
        fixed_norm=config.fixed_norm,
        dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
    )
    if not others:
        return muon
    rest = _parameter_groups(config, config.rate_of_others, others)
    return CombinedOptimizer([muon, _of_torch(config.auxiliary, config, rest)])


def _parameter_groups(config: Optimizer, rate: float, groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Groups as torch takes them. `scale` is what multiplies the run's rate, whose peak is `config.lr`."""

    def on_device(group: Group) -> float | Tensor:
        # In a CUDA graph the rate is read from the device; on a CPU a plain number is quicker.
        device = group.parameters[0].device
        return torch.tensor(rate * group.scale, device=device) if device.type == "cuda" else rate * group.scale

    return [
        {
            "params": group.parameters,
            "scale": group.scale * (rate / config.lr),
            "lr": on_device(group),
            "weight_decay": config.weight_decay if group.decay else 0.0,
        }
        for group in groups
    ]


def _of_torch(name: str, config: Optimizer, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if name == "sgd":
        nesterov = config.nesterov and config.momentum > 0
        sgd = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov, fused=True)
        if config.momentum:
            # torch makes it without a value in the first step, and fills it only if that is not left out, as in fp16.
            for parameter in (parameter for group in groups for parameter in group["params"]):
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    kind = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
    on_cuda = any(parameter.device.type == "cuda" for group in groups for parameter in group["params"])
    return kind(groups, lr=config.lr, betas=config.betas, fused=True, capturable=on_cuda)


class CombinedOptimizer(torch.optim.Optimizer):
    """Optimizers that step together, each over its own groups; their groups and their state are those of one."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let each part see its groups and its state here: they are the same objects."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Let each part move its weights."""
        assert closure is None
        for part in self.parts:
            part.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take on what `state_dict` gave."""
        super().load_state_dict(state_dict)
        self._share()


def keys_of_state(optimizer: torch.optim.Optimizer) -> Iterator[set[str]]:
    """What the optimizer keeps of each weight that it has moved, by name, in the order of its groups."""
    for part in optimizer.parts if isinstance(optimizer, CombinedOptimizer) else [optimizer]:
        for group in part.param_groups:
            if isinstance(part, torch.optim.Adam):  # and AdamW
                keys = {"step", "exp_avg", "exp_avg_sq"}
            else:
                keys = {"momentum_buffer"} if isinstance(part, Muon) or group["momentum"] else set()
            yield from (keys for _ in group["params"])


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use `rate`, times each group's scale, from the next step on."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate * group["scale"])
        else:
            group["lr"] = rate * group["scale"]

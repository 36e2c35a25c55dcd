"""What moves the weights: groups of them, the optimizer, the learning rate, and the average of the weights."""

import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from cifar100cli.errors import UsageError
from cifar100cli.muon import Muon
from cifar100cli.schema import Optimizer, Schedule

# ---------------------------------------------------------------------------------------------- groups


@dataclass(frozen=True)
class Group:
    """Weights that learn at `scale` times the rate of the others.

    Weight decay is on them where they `decay`. `hidden` ones are matrices, and filters that count as such.
    """

    parameters: list[nn.Parameter]
    scale: float = 1.0
    decay: bool = True
    hidden: bool = False


def everything(model: nn.Module) -> list[Group]:
    """All weights that are not frozen, at one rate."""
    return [Group([parameter for parameter in model.parameters() if parameter.requires_grad])]


def by_layer(model: nn.Module, name: str, decay: float) -> list[Group]:
    """A group for each layer of a network that `create_model` built on timm's `name`, from the stem to the head.

    The rate falls by the factor `decay` from each layer to the one before it, beginning at the head (Bao et al.,
    "BEiT", arXiv 2106.08254). Layers are timm's own, down to single blocks. Raises `UsageError` where it names none.
    """
    backbone = getattr(model, "backbone", model)
    matcher = getattr(backbone, "group_matcher", None)
    if matcher is None:
        raise UsageError(f"optimizer.layer_decay: timm names no layers of {name}; use a backbone such as resnet18")
    prefix = "" if backbone is model else "backbone."

    def as_in_timm(weight: str) -> str:
        # A head of ours is named as nothing of timm's, and so comes where timm puts heads.
        return weight.removeprefix(prefix) if weight.startswith(prefix) else f"(ours) {weight}"

    named = [(as_in_timm(weight), parameter) for weight, parameter in model.named_parameters()]
    layer_of = group_with_matcher(iter(named), matcher(coarse=False), reverse=True)
    head = max(layer_of.values())
    layers: dict[int, list[nn.Parameter]] = {}
    for weight, parameter in named:
        if parameter.requires_grad:
            layers.setdefault(layer_of[weight], []).append(parameter)
    return [Group(parameters, decay ** (head - layer)) for layer, parameters in sorted(layers.items())]


def divided(
    groups: Iterable[Group], *, exempt: Collection[nn.Parameter] = (), hidden: Collection[nn.Parameter] = ()
) -> list[Group]:
    """The groups, each parted into weights that decay and those `exempt` from it, and into `hidden` ones and others."""
    exempt, hidden, parts = set(exempt), set(hidden), []
    for group in groups:
        found: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for parameter in group.parameters:
            found.setdefault((parameter not in exempt, parameter in hidden), []).append(parameter)
        parts += [Group(weights, group.scale, *kind) for kind, weights in found.items()]
    return parts


def without_decay(model: nn.Module) -> list[nn.Parameter]:
    """Weights that regularisation is usually kept off.

    Biases, those of norms and all others of one dimension, and what timm itself exempts: class tokens, positions.
    """
    backbone = getattr(model, "backbone", model)
    prefix = "" if backbone is model else "backbone."
    named = [f"{prefix}{pattern}" for pattern in getattr(backbone, "no_weight_decay", set)()]  # `pos_embed.*` is one
    return [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim <= 1 or name.endswith(".bias") or any(fnmatchcase(name, pattern) for pattern in named)
    ]


def hidden_weights(model: nn.Module, head: Sequence[str]) -> list[nn.Parameter]:
    """The matrices between the stem and the head: weights of linear layers, and filters of convolutions.

    `head` names the modules of the head, and the first layer is the stem: it reads pixels. The filters of a
    convolution in groups are left out, because no matrix maps all of its inputs to all of its outputs.
    """
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear | _ConvNd)]
    weights = (
        layer.weight
        for name, layer in layers[1:]
        if not any(name == module or name.startswith(f"{module}.") for module in head)
        and not (isinstance(layer, _ConvNd) and (layer.groups > 1 or layer.transposed))
    )
    return [weight for weight in weights if isinstance(weight, nn.Parameter) and weight.requires_grad]


# --------------------------------------------------------------------------------------- the optimizer


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


# ----------------------------------------------------------------------------------- the learning rate


def learning_rate(peak: float, schedule: Schedule, step: int, steps_per_epoch: int, epochs: int) -> float:
    """The rate of training step `step`, counted from 0 over the whole run.

    It rises linearly to `peak` over the warm-up. Then it is constant; or falls to `schedule.final` times the peak,
    along half a cosine (Loshchilov and Hutter, arXiv 1608.03983) or a line that would reach it one step after the
    last; or is multiplied by `schedule.gamma` after each of the epochs in `schedule.milestones`. One cycle (Smith,
    arXiv 1708.07120) has its own rise, and ends with the last step. All but the warm-up are PyTorch's schedulers.
    """
    total = epochs * steps_per_epoch
    if schedule.name == "one_cycle":
        return peak * _one_cycle(schedule, step, total)
    warmup = min(total, round(schedule.warmup_epochs * steps_per_epoch))
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule.name == "constant":
        return peak
    if schedule.name == "multi_step":
        return peak * schedule.gamma ** sum(step >= epoch * steps_per_epoch for epoch in schedule.milestones)
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    left = _half_cosine(done) if schedule.name == "cosine" else 1 - done
    return peak * (schedule.final + (1 - schedule.final) * left)


def _half_cosine(done: float) -> float:
    """From 1 to 0, level at both ends."""
    return 0.5 * (1 + math.cos(math.pi * done))


def _one_cycle(schedule: Schedule, step: int, total: int) -> float:
    """From 1 / div_factor up to 1, and down to 1 / div_factor / final_div_factor in the last step, along cosines."""
    first = 1 / schedule.div_factor
    last = first / schedule.final_div_factor
    top = schedule.pct_start * total - 1
    if step < top:
        return 1 + (first - 1) * _half_cosine(step / top)
    return last + (1 - last) * _half_cosine(min(1.0, (step - top) / (total - 1 - top)))


# -------------------------------------------------------------------------- the average of the weights


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

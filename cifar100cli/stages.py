"""A network's stages, from the stem to the head: which of them learn, at which rate, and what runs before them.

Stages are timm's own groups of layers, for any network of timm's that has them. What is frozen keeps its
weights and, unless asked otherwise, its batch statistics; and where the network is a chain, the frozen part in
front can be run once, and the rest go on from its output.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MethodType

import torch
from timm.models import group_modules
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from cifar100cli.errors import UsageError, did_you_mean
from cifar100cli.inference import evaluating, fold
from cifar100cli.watcher import StageRow

HEAD, LAST, LAST_TWO, ALL = "fc", "layer4", "layer3", "all"  # as in ResNet-18, for any network


@dataclass(frozen=True)
class Stage:
    """A part of the network: its name, the module that it begins with, and those that hold its weights."""

    name: str
    start: str
    modules: tuple[str, ...]

    def parameters(self, model: nn.Module) -> Iterator[nn.Parameter]:
        """The weights, each once."""
        for name in self.modules:
            yield from model.get_submodule(name).parameters(recurse=False)

    def norms(self, model: nn.Module) -> list[_BatchNorm]:
        """The batch norms."""
        found = (model.get_submodule(name) for name in self.modules)
        return [module for module in found if isinstance(module, _BatchNorm)]


def stages_of(model: nn.Module, name: str, classifier: Sequence[str]) -> list[Stage]:
    """The stages of a network that `create_model` built on timm's `name`, in the order in which they run.

    `classifier` names the modules of timm's own head. Raises `UsageError` for a network without stages.
    """
    backbone = getattr(model, "backbone", model)
    matcher = getattr(backbone, "group_matcher", None)
    if matcher is None:
        raise UsageError(f"finetune: timm names no stages of {name}; use a backbone such as resnet18")
    prefix, head = ("backbone.", "head") if backbone is not model else ("", classifier[0])
    try:
        patterns = matcher(coarse=True)
        groups = group_modules(backbone, patterns)
    except Exception:  # each of timm's families has a way of its own to have none
        raise UsageError(f"finetune: timm names no stages of {name}; use a backbone such as resnet18") from None
    parts = [
        [f"{prefix}{module}" for module in modules if prefix or not _within(module, classifier)]
        for _, modules in sorted(groups.items())
    ]
    parts = [part for part in parts if part]
    if len(parts) > 2 and not _matches(parts[-1][0].removeprefix(prefix), patterns):
        # A norm or a last convolution between the last stage and the classifier belongs to that stage.
        parts[-2:] = [parts[-2] + parts[-1]]
    starts = [_own_start(part[0], [other[0] for other in parts if other is not part]) for part in parts]
    names = ["stem", *(start.removeprefix(prefix) for start in starts[1:])]
    if list(_own(backbone)):
        parts[0].insert(0, prefix.removesuffix("."))  # a class token, positions
    stages = [Stage(n, s, tuple(part)) for n, s, part in zip(names, starts, parts, strict=True)]
    heads = [f"{prefix}{n}" for n in classifier] if not prefix else ["head"]
    holding = [n for n, module in model.named_modules() if _within(n, heads) and list(_own(module))]
    found = [*stages, Stage(head, head, tuple(holding))]
    weights = [id(weight) for stage in found for weight in stage.parameters(model)]
    if len(weights) > len(set(weights)):
        raise UsageError(
            f"finetune: stages of {name} share weights, and none can be frozen alone; use another backbone"
        )
    return found


def _within(name: str, parents: Sequence[str]) -> bool:
    return any(name == parent or name.startswith(f"{parent}.") for parent in parents)


def _own(module: nn.Module) -> Iterator[nn.Parameter]:
    return module.parameters(recurse=False)


def _matches(name: str, patterns: dict[str, object] | Callable[[str], object]) -> bool:
    """Whether timm counts a module among its groups, or has it at the end because no group takes it."""
    if callable(patterns):  # a function of the name, which takes all
        return True
    found = []
    for pattern in patterns.values():
        found += [p[0] if isinstance(p, tuple) else p for p in (pattern if isinstance(pattern, list) else [pattern])]
    return any(re.match(str(pattern), f"{name}.weight") for pattern in found)


def _own_start(name: str, others: Sequence[str]) -> str:
    """The outermost module around `name` that holds the beginning of no other stage."""
    parts = name.split(".")
    for length in range(1, len(parts)):
        outer = ".".join(parts[:length])
        if not any(_within(other, [outer]) for other in others):
            return outer
    return name


def learning_stages(stages: Sequence[Stage], unfreeze: str, backbone: str) -> list[Stage]:
    """The stages that `unfreeze` leaves learning, in the order in which they run.

    `fc`, `layer4` and `layer3` are the head, the last stage too, and the last two too, whatever their names;
    `all` is everything; and another name of a stage is that stage and all behind it.
    """
    depth = {HEAD: 1, "head": 1, LAST: 2, LAST_TWO: 3, ALL: len(stages)}
    names = [stage.name for stage in stages]
    if unfreeze in names and unfreeze not in depth:
        return list(stages[names.index(unfreeze) :])
    if depth.get(unfreeze, len(stages) + 1) > len(stages):
        known = list(dict.fromkeys((HEAD, LAST, LAST_TWO, ALL, *reversed(names))))
        raise UsageError(
            f"finetune.unfreeze = {unfreeze}: {backbone} has no such stage{did_you_mean(unfreeze, known)} "
            f"(it has {', '.join(known)})"
        )
    return list(stages[-depth[unfreeze] :])


def freeze(model: nn.Module, stages: Sequence[Stage], kept: Sequence[Stage], *, adapt: bool) -> None:
    """Let only the stages `kept` learn. The others stay in evaluation mode; with `adapt`, all but their batch norms."""
    for stage in stages:
        for parameter in stage.parameters(model):
            if stage not in kept:  # what the network itself holds fixed, such as whitening, stays so
                parameter.requires_grad_(False)
    training = model.training
    for module in model.modules():
        weights = list(module.parameters())
        if weights and not any(weight.requires_grad for weight in weights):
            module.eval()
            # Whatever mode the network is put in, its frozen parts stay as they are.
            module.train = MethodType(_adapts if adapt else _stays, module)  # type: ignore[method-assign]
    model.train(training)  # and its batch norms that adapt


def _stays(module: nn.Module, mode: bool = True) -> nn.Module:
    return module


def _adapts(module: nn.Module, mode: bool = True) -> nn.Module:
    for norm in module.modules():
        if isinstance(norm, _BatchNorm):
            norm.training = mode
    return module


def stage_rows(model: nn.Module, stages: Sequence[Stage], rates: Mapping[str, float], bn: str) -> list[StageRow]:
    """A row for each stage; of the frozen ones, there are no rates."""
    rows = []
    for stage in stages:
        rate = rates.get(stage.name)
        state = "moves" if rate is not None else {"frozen": "frozen", "adapt": "adapts"}[bn]
        rows.append(
            StageRow(
                stage.name,
                sum(parameter.numel() for parameter in stage.parameters(model)),
                rate,
                state if stage.norms(model) else "none",
            )
        )
    return rows


class Parted:
    """A network parted before its first learning stage, so that the part in front can be run once.

    While the front is off, the network takes what the front would have given. Names and weights are those of
    the whole network all the time.
    """

    def __init__(self, model: nn.Module, start: str) -> None:
        self.model, self.start = model, start
        self._looking = model
        self._front: list[nn.Module] = []
        parts = start.split(".")
        for depth, part in enumerate(parts):
            parent = model.get_submodule(".".join(parts[:depth]))
            for name, module in parent.named_children():
                if name == part:
                    break
                if not isinstance(module, _DropoutNd):  # it varies features, and so comes after them
                    self._front.append(module)

    def fold(self, sample: Tensor) -> None:
        """From now on, `front` is computed by a copy with folded batch norms; the frozen part does not move.

        A norm that learns stays, even if it follows the front's last convolution.
        """
        self._looking = fold(self.model, sample, self._front)

    def front(self, inputs: Tensor) -> Tensor:
        """What the first learning stage is given for `inputs`, in evaluation mode, without gradients."""
        seen: list[Tensor] = []

        def keep(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            seen.append(given[0])
            raise _Enough

        handle = self._looking.get_submodule(self.start).register_forward_pre_hook(keep)
        try:
            with evaluating(self._looking), torch.no_grad(), contextlib.suppress(_Enough):
                self._looking(inputs)
        finally:
            handle.remove()
        return seen[0]

    def switch_front(self, *, on: bool) -> None:
        """With the front off, its modules hand on what they are given."""
        for module in self._front:
            if on:
                module.__dict__.pop("forward", None)
            else:
                module.forward = lambda given, *_, **__: given

    def is_exact(self, inputs: Tensor) -> bool:
        """Whether the network is a chain: whole, or on from the front's output, it computes the same."""
        try:
            with evaluating(self.model), torch.no_grad():
                whole = self.model(inputs)
                features: object = self.front(inputs)
                if not isinstance(features, Tensor) or len(features) != len(inputs):  # a list of branches, say
                    return False
                self.switch_front(on=False)
                rest = self.model(features)
        except Exception:  # each network has a way of its own to choke on what it does not expect
            return False
        finally:
            self.switch_front(on=True)
        return rest.shape == whole.shape and torch.allclose(rest, whole, rtol=1e-5, atol=1e-5)


class _Enough(Exception):  # noqa: N818
    """The front has given its output."""

"""What of a network learns, and at which rate: all of it, layer by layer, or some last stages behind frozen ones."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from cifar100cli.errors import UsageError
from cifar100cli.models import DROP_RATES, classifiers, drops
from cifar100cli.optim import Group, by_layer, divided, everything, hidden_weights, without_decay
from cifar100cli.schema import Config, Finetune
from cifar100cli.stages import Stage, freeze, learning_stages, stage_rows, stages_of
from cifar100cli.watcher import Watcher

STANDS_STILL = 5e-6  # of the head's rate; the stem of a ResNet, five stages before the head, is at 1e-5


@dataclass(frozen=True)
class FrozenStages:
    """The stages in front that keep their weights, and `first`, the one behind them."""

    stages: Sequence[Stage]
    first: Stage

    def hold(self, weight: str) -> bool:
        """Whether a name of the state dict belongs to one of them."""
        module = weight.rpartition(".")[0]
        return any(module in stage.modules for stage in self.stages)


def freeze_stages(
    config: Config, finetune: Finetune, model: nn.Module, watcher: Watcher, *, new_stem: bool
) -> tuple[list[Group], FrozenStages]:
    """Freeze what is not to learn; returns a group of weights, with its rate, for each stage that does.

    `new_stem` says that the stem is a random one in front of trained weights. Raises `UsageError` for settings that
    would leave it frozen, or do nothing.
    """
    name = config.model.backbone
    stages = stages_of(model, name, classifiers(model))
    kept = learning_stages(stages, finetune.unfreeze, name)
    frozen = FrozenStages(stages[: len(stages) - len(kept)], kept[0])
    freeze(model, stages, kept, adapt=finetune.bn == "adapt")
    scales = {stage.name: finetune.stage_decay**depth for depth, stage in enumerate(reversed(kept))}
    groups = [Group([p for p in stage.parameters(model) if p.requires_grad], scales[stage.name]) for stage in kept]
    matrices = set(_matrices(model, config))
    rates = {
        stage.name: scales[stage.name]
        * (config.optimizer.rate_of_others if matrices.isdisjoint(stage.parameters(model)) else config.optimizer.lr)
        for stage in kept
    }
    watcher.stages(stage_rows(model, stages, rates, finetune.bn))
    if frozen.stages and new_stem:
        raise UsageError(
            "model.stem = cifar: the weights to start from have another stem, and frozen, the new one stays random: "
            "leave it at imagenet, --init a run that has this stem, or let it learn with --set finetune.unfreeze=all"
        )
    for key in DROP_RATES:
        rate = getattr(config.model, key)
        if rate and not drops(model, key):
            raise UsageError(
                f"model.{key} = {rate:g} does nothing with finetune.unfreeze = {finetune.unfreeze}: what would drop is "
                "frozen; leave it at 0, or let more of the network learn"
            )
    first = frozen.first.name
    if frozen.stages and not config.model.pretrained:
        watcher.say(
            f"the frozen stages in front of {first} have random weights, which say little about images: name trained "
            "ones with --weights FILE, or let everything learn with --set finetune.unfreeze=all"
        )
    if scales[first] < STANDS_STILL:
        watcher.say(
            f"{first} learns at {scales[first]:.0e} of the head's rate, which is practically zero: finetune.stage_decay"
            f" = {finetune.stage_decay:g} is for networks of few stages, and {name} has {len(stages)}; "
            "--set finetune.stage_decay=0.75 lets all of them learn"
        )
    return groups, frozen


def grouped(
    groups: list[Group] | None, model: nn.Module, config: Config, watcher: Watcher, *, new_stem: bool
) -> list[Group]:
    """The weights that learn, as the optimizer wants them grouped: those of `groups`, or without them all.

    Raises `UsageError` for layers that timm does not name, and where Muon finds no matrix.
    """
    optimizer, name = config.optimizer, config.model.backbone
    if optimizer.layer_decay < 1:
        groups = by_layer(model, name, optimizer.layer_decay)
        rate = optimizer.rate_of_others
        watcher.say(
            f"layers: {len(groups)}; the rate falls from {rate:g} at the head "
            f"to {rate * min(group.scale for group in groups):.2g} at the stem"
            + (", which is new: model.stem = cifar has no trained weights" if new_stem else "")
        )
    if optimizer.rate_of_others != optimizer.lr:
        watcher.say(
            f"optimizer.auxiliary_lr: biases and norms, the head and the stem learn at "
            f"{optimizer.rate_of_others / optimizer.lr:.3g} times the rate of the matrices between them"
        )
    hidden = _matrices(model, config)
    if optimizer.name == "muon" and not hidden:
        raise UsageError("optimizer.name = muon: no matrix of a hidden layer is among what learns; use adamw")
    exempt = [] if optimizer.decay_norms else without_decay(model)
    return divided(groups if groups is not None else everything(model), exempt=exempt, hidden=hidden)


def _matrices(model: nn.Module, config: Config) -> list[nn.Parameter]:
    """What Muon moves, if it is the optimizer."""
    if config.optimizer.name != "muon":
        return []
    return hidden_weights(model, classifiers(model) if config.model.head == "linear" else ("head",))

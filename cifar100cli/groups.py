"""Groups of weights: which of them learn at which rate, whether they decay, and which are a hidden layer's matrices."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from timm.models._manipulate import group_with_matcher
from torch import nn
from torch.nn.modules.conv import _ConvNd

from cifar100cli.errors import UsageError


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

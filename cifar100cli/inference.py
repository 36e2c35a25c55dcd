"""A network that only looks: in evaluation mode, and with fewer passes over its maps.

In evaluation mode a batch norm is a factor and a term for each channel, and the convolution before it can have both
among its weights (Jacob et al., arXiv 1712.05877, section 3.2). But for rounding, the result is the same.
"""

import contextlib
import copy
from collections.abc import Iterable, Iterator

import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

ROUNDING = 1e-4  # of the largest output; what is computed wrongly is further off


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The network in evaluation mode; afterwards each of its modules is as it was."""
    before = [(module, module.training) for module in model.modules()]
    try:
        yield model.eval()
    finally:
        for module, training in before:  # one after that which it is in, whose mode it was given
            module.train(training)


def fold(model: nn.Module, sample: Tensor, parts: Iterable[nn.Module] | None = None) -> nn.Module:
    """A copy of a network in evaluation mode, without the batch norms (within `parts`) that follow a convolution.

    Which do is seen when it is given `sample`, inputs (N, C, H, W) in float32. A network that would compute something
    else, because what a convolution gives goes elsewhere too, is returned as it is.
    """
    folded = copy.deepcopy(model).eval()
    within = {id(module) for part in parts or [model] for module in part.modules()}
    names = [name for name, module in model.named_modules() if id(module) in within]
    with torch.no_grad():
        expected = folded(sample)
        for norm, convolution in _followed(folded, sample, names).items():
            _fold(folded, convolution, norm)
        found = folded(sample)
    same = (found - expected).abs().max() <= ROUNDING * expected.abs().max()
    return folded if same else model


def _followed(model: nn.Module, sample: Tensor, among: Iterable[str]) -> dict[str, str]:
    """The batch norms that are given what a convolution gives, both `among` these modules, by their names."""
    last: tuple[Tensor, str] | None = None
    pairs = {}

    def keep(name: str, output: Tensor) -> None:
        nonlocal last
        last = output, name

    def find(name: str, given: Tensor) -> None:
        if last is not None and last[0] is given:
            pairs[name] = last[1]

    handles = []
    for name in among:
        module = model.get_submodule(name)
        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(lambda _, __, output, name=name: keep(name, output)))
        elif type(module) in (nn.BatchNorm2d, BatchNormAct2d) and module.track_running_stats:
            handles.append(module.register_forward_pre_hook(lambda _, given, name=name: find(name, given[0])))
    try:
        model(sample)
    finally:
        for handle in handles:
            handle.remove()
    return pairs


def _fold(model: nn.Module, convolution: str, norm: str) -> None:
    before, after = model.get_submodule(convolution), model.get_submodule(norm)
    assert isinstance(before, nn.Conv2d)
    assert isinstance(after, nn.BatchNorm2d)
    left = after.act if isinstance(after, BatchNormAct2d) else nn.Identity()
    model.set_submodule(convolution, fuse_conv_bn_eval(before, after))
    model.set_submodule(norm, left.eval())

"""Batch norm over the images of all ranks, so that several devices train as one does."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import timm.layers
import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from cifar100cli.devices import Cast


def synchronised(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with PyTorch's own synchronised batch norm where that works, on CUDA; elsewhere as it is."""
    if device.type == "cuda":
        converted: nn.Module = timm.layers.convert_sync_batchnorm(model)  # type: ignore[attr-defined,no-untyped-call]
        return converted
    return model


def synchronised_on_host(cast: Cast) -> Cast:
    """The context for a forward pass, with batch norm over all ranks in it."""

    @contextlib.contextmanager
    def both() -> Iterator[None]:
        with cast(), _Synchronised():
            yield

    return both


class _Synchronised(TorchFunctionMode):
    """Within this context every training-mode batch norm takes its statistics over all ranks, on any device.

    PyTorch's `SyncBatchNorm` knows only accelerators. Here `torch.nn.functional.batch_norm` is what is replaced, so
    that it does not matter which of timm's modules calls it.
    """

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.batch_norm:
            return _batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _batch_norm(
    input: Tensor,  # noqa: A002 - as torch names it
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.batch_norm`, with the statistics of all ranks while training."""
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    channels = input.shape[1]
    weight = torch.ones(channels, device=input.device) if weight is None else weight
    bias = torch.zeros(channels, device=input.device) if bias is None else bias
    output, mean, variance, count = _BatchNorm.apply(input, weight, bias, eps)
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((variance * (count / (count - 1))).to(running_var.dtype), momentum)
    result: Tensor = output
    return result


def _over(input: Tensor) -> list[int]:  # noqa: A002
    """The dimensions that are summed over: all but the channels."""
    return [0, *range(2, input.ndim)]


class _BatchNorm(torch.autograd.Function):
    """Normalise (N, C, ...) by mean and variance of all ranks' images; sums are float32.

    Ioffe and Szegedy, arXiv 1502.03167. Ranks may have different numbers of images.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        input: Tensor,  # noqa: A002
        weight: Tensor,
        bias: Tensor,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        own, over = input.numel() // input.shape[1], _over(input)
        variance, mean = torch.var_mean(input.float(), over, correction=0)
        here = torch.cat([mean, variance, mean.new_tensor([own])])
        gathered = [torch.empty_like(here) for _ in range(distributed.get_world_size())]
        distributed.all_gather(gathered, here)
        # Chan et al., "Algorithms for computing the sample variance", 1983: no digits are lost in large squares.
        everywhere = torch.stack(gathered)
        counts, (means, variances) = everywhere[:, -1:], everywhere[:, :-1].chunk(2, dim=1)
        count = counts.sum()
        mean = (counts * means).sum(0) / count
        squares = (counts * (variances + (means - mean) ** 2)).sum(0)
        variance = squares / count
        scale = (variance + eps).rsqrt()
        ctx.save_for_backward(input, weight, mean, scale, count)
        output = F.batch_norm(input, mean, variance, weight.float(), bias.float(), False, 0.0, eps)
        ctx.mark_non_differentiable(mean, variance, count)
        return output, mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        input, weight, mean, scale, count = ctx.saved_tensors  # noqa: A001
        shape = (1, -1, *(1 for _ in input.shape[2:]))
        gradient = gradients[0].float()
        centred = input.float() - mean.view(shape)
        to_bias = gradient.sum(_over(input))
        to_weight = (gradient * centred).sum(_over(input)) * scale
        sums = torch.cat([to_bias, to_weight])
        distributed.all_reduce(sums)  # those of the parameters stay this rank's own: they are averaged later
        all_bias, all_weight = (sums / count).chunk(2)
        centred.mul_((all_weight * scale).view(shape)).add_(all_bias.view(shape))
        to_input = (gradient - centred).mul_((weight * scale).view(shape))
        return to_input.to(input.dtype), to_weight.to(weight.dtype), to_bias.to(weight.dtype), None

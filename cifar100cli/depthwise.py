"""Depthwise convolutions in bfloat16 on a CPU, with gradients that are not the slowest part of a step.

oneDNN has quick kernels for them forward and, with a stride of 1, backward. For a stride of 2, and for the gradient of
kernels larger than 3x3, PyTorch falls to ones that are up to a hundred times slower; EfficientNets and MobileNets
spend most of a step there. `cifar100 bench --backbone tf_efficientnet_lite0` shows what a step takes.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight
from torch.overrides import TorchFunctionMode


@contextlib.contextmanager
def bf16_on_cpu() -> Iterator[None]:
    """The context of a forward pass in bfloat16 on a CPU, whose depthwise convolutions have quick gradients."""
    with torch.autocast("cpu", torch.bfloat16), _Quick():
        yield


class _Quick(TorchFunctionMode):
    """Within this context `torch.nn.functional.conv2d` is replaced, whichever of timm's modules calls it."""

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.conv2d:
            return _convolution(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _convolution(
    input: Tensor,  # noqa: A002 - as torch names it
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    """`torch.nn.functional.conv2d`; the gradients of those with slow kernels are computed by quick ones."""
    strides, paddings = _pair(stride), _pair(padding) if not isinstance(padding, str) else None
    depthwise = input.ndim == 4 and groups > 1 and groups == input.shape[1] == len(weight) and _pair(dilation) == (1, 1)
    slow = strides != (1, 1) or weight[0, 0].numel() > 9
    fits = paddings is not None and all(p < k for p, k in zip(paddings, weight.shape[2:], strict=True))
    if not (depthwise and slow and fits and torch.is_grad_enabled() and input.device.type == "cpu"):
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    output: Tensor = _Depthwise.apply(input.bfloat16(), weight.bfloat16(), strides, paddings)
    return output if bias is None else output + bias.bfloat16().view(-1, 1, 1)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """As modules give it, or as functions do."""
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


class _Depthwise(torch.autograd.Function):
    """A filter of its own for each channel: (N, C, H, W) and (C, 1, k, l), both bfloat16, to (N, C, h, w)."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,  # noqa: A002
        weight: Tensor,
        stride: tuple[int, int],
        padding: tuple[int, int],
    ) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(input, weight, None, stride, padding, 1, len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        input, weight = ctx.saved_tensors  # type: ignore[attr-defined]  # noqa: A001
        needed: tuple[bool, ...] = ctx.needs_input_grad  # type: ignore[attr-defined]
        stride, padding = ctx.stride, ctx.padding  # type: ignore[attr-defined]
        to_input = _to_input(gradients[0], input, weight, stride, padding) if needed[0] else None
        to_weight = _to_weight(gradients[0], input, weight, stride, padding) if needed[1] else None
        return to_input, to_weight, None, None


def _to_input(
    gradient: Tensor,
    input: Tensor,  # noqa: A002
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> Tensor:
    """The flipped filters over the gradient, with zeros between what the stride had left out.

    Dumoulin and Visin, "A guide to convolution arithmetic for deep learning", arXiv 1603.07285, 4.6.
    """
    kernel = weight.shape[2:]
    sides = [side + 2 * p - k + 1 for side, p, k in zip(input.shape[2:], padding, kernel, strict=True)]
    spread = input.new_zeros((*input.shape[:2], *sides)).contiguous(memory_format=torch.channels_last)
    spread[:, :, :: stride[0], :: stride[1]] = gradient
    around = [k - 1 - p for p, k in zip(padding, kernel, strict=True)]
    return F.conv2d(spread, weight.flip(2, 3), None, 1, around, 1, len(weight))


def _to_weight(
    gradient: Tensor,
    input: Tensor,  # noqa: A002
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> Tensor:
    """By kernels for 3x3, which are quick: of a larger filter, one part of this size after the other."""
    height, width = weight.shape[2:]
    if height <= 3 and width <= 3:
        to_weight: Tensor = conv2d_weight(  # type: ignore[no-untyped-call]
            input, weight.shape, gradient, stride, padding, 1, len(weight)
        )
        return to_weight
    whole = torch.empty_like(weight)
    padded = F.pad(input, (padding[1], padding[1], padding[0], padding[0]))
    rows, columns = gradient.shape[2:]
    for top in _parts(height):
        for left in _parts(width):
            part = whole[:, :, top : top + 3, left : left + 3]
            below = top + (rows - 1) * stride[0] + part.shape[2]
            right = left + (columns - 1) * stride[1] + part.shape[3]
            seen = padded[:, :, top:below, left:right].contiguous(memory_format=torch.channels_last)
            part.copy_(
                conv2d_weight(seen, part.shape, gradient, stride, 0, 1, len(weight))  # type: ignore[no-untyped-call]
            )
    return whole


def _parts(size: int) -> list[int]:
    """Where parts of three begin that cover so many; the last two may overlap."""
    return sorted({max(0, min(start, size - 3)) for start in range(0, size, 3)})

"""Depthwise convolutions on a CPU, with gradients that are not the slowest part of a step.

oneDNN has quick kernels for them forward and for most gradients. In bfloat16, for a stride of 2 and for the gradient of
filters larger than 3x3, and in float32 for the gradient of a filter that is wider than three columns or larger than
the maps it makes, PyTorch falls to ones that are up to a hundred times slower; EfficientNets, MobileNets and ConvNeXts
spend much of a step there, with small images above all. `cifar100 bench --backbone tf_efficientnet_lite0` shows what a
step takes.
"""

import contextlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight
from torch.overrides import TorchFunctionMode

# In float32, where oneDNN's own gradient of a filter is slow, and what else is quick:
WIDEST = 3  # columns of a filter for which it has a quick kernel
SHORT = 8  # outputs in a row for which the other one is slow even where a stride leaves much to copy
FEW = 9  # outputs of a filter that are multiplied sooner one weight after the other


def fp32_on_cpu() -> AbstractContextManager[object]:
    """The context of a forward pass in float32 on a CPU, whose depthwise convolutions have quick gradients."""
    return _Quick()


@contextlib.contextmanager
def bf16_on_cpu() -> Iterator[None]:
    """The same in bfloat16."""
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
    precision = torch.bfloat16 if torch.is_autocast_enabled("cpu") else input.dtype
    depthwise = input.ndim == 4 and groups > 1 and groups == input.shape[1] == len(weight) and _pair(dilation) == (1, 1)
    if (
        not (depthwise and torch.is_grad_enabled() and input.device.type == "cpu")
        or isinstance(padding, str)
        or not _is_slow(input, weight, _pair(stride), _pair(padding), precision)
    ):
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    output: Tensor = _Depthwise.apply(input.to(precision), weight.to(precision), _pair(stride), _pair(padding))
    return output if bias is None else output + bias.to(precision).view(-1, 1, 1)


def _is_slow(
    input: Tensor,  # noqa: A002
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    precision: torch.dtype,
) -> bool:
    """Whether PyTorch's own gradients are, and ours hold: not for more padding than the filter is wide."""
    kernel = weight.shape[2:]
    if any(p >= k for p, k in zip(padding, kernel, strict=True)):
        return False
    if precision == torch.bfloat16:
        return stride != (1, 1) or kernel.numel() > 9
    sides = zip(input.shape[2:], kernel, stride, padding, strict=True)
    outputs = [(side + 2 * p - k) // s + 1 for side, k, s, p in sides]
    larger = any(output < k for output, k in zip(outputs, kernel, strict=True))
    return larger or (kernel[1] > WIDEST and (stride[1] == 1 or outputs[1] < SHORT))


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """As modules give it, or as functions do."""
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


class _Depthwise(torch.autograd.Function):
    """A filter of its own for each channel: (N, C, H, W) and (C, 1, k, l), both of one dtype, to (N, C, h, w)."""

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
        passed = _Passed(gradients[0], input, weight, ctx.stride, ctx.padding)  # type: ignore[attr-defined]
        in_bf16 = weight.dtype == torch.bfloat16
        to_input, to_weight = None, None
        if needed[0]:
            to_input = _bf16_to_input(passed) if in_bf16 else _to_input(passed)
        if needed[1]:
            to_weight = _bf16_to_weight(passed) if in_bf16 else _to_weight(passed)
        return to_input, to_weight, None, None


class _Passed(NamedTuple):
    """What a gradient is made of: that of the output, what the forward pass took, and how."""

    gradient: Tensor
    input: Tensor
    weight: Tensor
    stride: tuple[int, int]
    padding: tuple[int, int]


def _to_input(passed: _Passed) -> Tensor:
    """PyTorch's own: this one is quick in float32."""
    gradient, input, weight, stride, padding = passed  # noqa: A001
    return conv2d_input(  # type: ignore[no-untyped-call, no-any-return]
        input.shape, weight, gradient, stride, padding, 1, len(weight)
    )


def _to_weight(passed: _Passed) -> Tensor:
    return _by_weights(passed) if passed.gradient[0, 0].numel() <= FEW else _by_columns(passed)


def _by_weights(passed: _Passed) -> Tensor:
    """One weight of all filters after the other: where it met the image, and what came of it."""
    gradient, input, weight, stride, padding = passed  # noqa: A001
    whole = torch.zeros_like(weight)
    for row in range(weight.shape[2]):
        rows_in, rows_out = _met(range(row, row + 1), stride[0], padding[0], input.shape[2], gradient.shape[2])
        for column in range(weight.shape[3]):
            columns_in, columns_out = _met(
                range(column, column + 1), stride[1], padding[1], input.shape[3], gradient.shape[3]
            )
            seen = input[:, :, rows_in.start : rows_in.stop : stride[0], columns_in.start : columns_in.stop : stride[1]]
            products = seen * gradient[:, :, rows_out.start : rows_out.stop, columns_out.start : columns_out.stop]
            whole[:, 0, row, column] = products.sum((0, 2, 3))
    return whole


def _by_columns(passed: _Passed) -> Tensor:
    """By kernels for three columns, which are quick where the map is no lower than the filter.

    So a lower map is made higher with zeros, and of a wider filter it is one part of its columns after the other.
    """
    gradient, input, weight, stride, padding = passed  # noqa: A001
    height = max(input.shape[2], weight.shape[2])
    rows = (height + 2 * padding[0] - weight.shape[2]) // stride[0] + 1
    input = _last(F.pad(input, (0, 0, 0, height - input.shape[2])))  # noqa: A001
    gradient = _last(F.pad(gradient, (0, 0, 0, rows - gradient.shape[2])))
    whole = torch.zeros_like(weight)
    for part in _columns(weight.shape[3], padding[1]):
        seen, met = _met(part, stride[1], padding[1], input.shape[3], gradient.shape[3])
        if not met:
            continue
        before, after = max(0, -seen.start), max(0, seen.stop - input.shape[3])
        columns = input[..., max(0, seen.start) : seen.stop]
        if before != after:
            columns, before = F.pad(columns, (before, after)), 0
        filters = whole[..., part.start : part.stop]
        filters.copy_(
            conv2d_weight(  # type: ignore[no-untyped-call]
                _last(columns),
                filters.shape,
                _last(gradient[..., met.start : met.stop]),
                stride,
                (padding[0], before),
                1,
                len(weight),
            )
        )
    return whole


def _last(maps: Tensor) -> Tensor:
    return maps.contiguous(memory_format=torch.channels_last)


def _columns(width: int, padding: int) -> list[range]:
    """A filter's columns by threes; those in the middle, which need no more than one of padding, together."""
    middle = max(0, padding - 1)
    last = min(width, middle + 3)
    parts = [range(start, min(start + 3, middle)) for start in range(0, middle, 3)]
    return [*parts, range(middle, last), *(range(start, min(start + 3, width)) for start in range(last, width, 3))]


def _met(part: range, stride: int, padding: int, inputs: int, outputs: int) -> tuple[range, range]:
    """Along one side, the inputs that a part of a filter sees, and the outputs that any of them has a share in.

    The first and the last may lie in the padding. Both ranges are empty where all of them do.
    """
    first = max(0, -((part.stop - 1 - padding) // stride))
    last = max(first, min(outputs, (inputs - 1 + padding - part.start) // stride + 1))
    begin = stride * first + part.start - padding
    return range(begin, begin + stride * (last - first - 1) + len(part) if last > first else begin), range(first, last)


def _bf16_to_input(passed: _Passed) -> Tensor:
    """The flipped filters over the gradient, with zeros between what the stride had left out.

    Dumoulin and Visin, "A guide to convolution arithmetic for deep learning", arXiv 1603.07285, 4.6.
    """
    gradient, input, weight, stride, padding = passed  # noqa: A001
    kernel = weight.shape[2:]
    sides = [side + 2 * p - k + 1 for side, p, k in zip(input.shape[2:], padding, kernel, strict=True)]
    spread = input.new_zeros((*input.shape[:2], *sides)).contiguous(memory_format=torch.channels_last)
    spread[:, :, :: stride[0], :: stride[1]] = gradient
    around = [k - 1 - p for p, k in zip(padding, kernel, strict=True)]
    return F.conv2d(spread, weight.flip(2, 3), None, 1, around, 1, len(weight))


def _bf16_to_weight(passed: _Passed) -> Tensor:
    """By kernels for 3x3, which are quick: of a larger filter, one part of this size after the other."""
    gradient, input, weight, stride, padding = passed  # noqa: A001
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

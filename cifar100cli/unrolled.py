"""Convolutions over maps of few pixels, each as one product with a matrix.

Deep in a network a small image has shrunk to a pixel or four, and many of a filter's taps meet padding alone. PyTorch
multiplies by them all, and is slow at it on a CPU: in a ResNet-18 at 32x32 pixels, these layers would take two thirds
of a step. `cifar100 bench --preset resnet18-baseline` shows what a step takes.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable


class UnrolledConv2d(nn.Conv2d):
    """A convolution that multiplies a whole map at once, where that takes no more multiplications than its taps do.

    The parameters and, but for rounding, the result are those of `nn.Conv2d`.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as torch names it
        """(N, C, H, W) to (N, channels out, H', W')."""
        meeting = self._meeting(input)
        if meeting is None:
            return super().forward(input)
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        pixels = input.permute(0, 2, 3, 1).flatten(1, 2)
        if len(meeting.pixels) < pixels.shape[1]:
            pixels = torch.stack([pixels[:, pixel] for pixel in meeting.pixels], 1)
        product: Tensor = _Unrolled.apply(pixels.flatten(1).to(dtype), self.weight, meeting.taps)
        output = product.view(-1, self.out_channels, meeting.height, meeting.width)
        if self.bias is not None:
            output = output + self.bias.to(dtype)[:, None, None]
        return output.contiguous(memory_format=torch.channels_last)

    def _meeting(self, input: Tensor) -> "_Meeting | None":  # noqa: A002
        """What is multiplied with what, or None where PyTorch is the quicker."""
        (height, width), (down, across) = input.shape[-2:], self.kernel_size
        (above, left), (stride_down, stride_across) = _pair(self.padding), _pair(self.stride)
        rows = (height + 2 * above - down) // stride_down + 1
        columns = (width + 2 * left - across) // stride_across + 1
        # Away from a CPU, only where the multiplications with padding are most of all.
        most = down * across if input.device.type == "cpu" else 1
        if not 0 < rows * columns <= most:
            return None
        vertical = _met_along(height, rows, down, stride_down, above)
        horizontal = _met_along(width, columns, across, stride_across, left)
        if len(vertical) * len(horizontal) > down * across:
            return None
        return _Meeting(
            rows,
            columns,
            [row * width + column for row in vertical for column in horizontal],
            [
                [
                    _tap(by_row[row], by_column[column], across)
                    for by_row in vertical.values()
                    for by_column in horizontal.values()
                ]
                for row in range(rows)
                for column in range(columns)
            ],
        )


class _Meeting(NamedTuple):
    """Which tap meets which pixel of the input for which pixel of the output.

    `taps` has a row of taps for each pixel of the output, for each of the `pixels` of the input that any tap meets; a
    tap is None where the pixel has no part in the output. `height` and `width` are the output's.
    """

    height: int
    width: int
    pixels: list[int]
    taps: list[list[int | None]]


def _tap(down: int | None, across: int | None, width: int) -> int | None:
    """A filter's tap by its row and its column, if it meets the pixel in both."""
    return None if down is None or across is None else down * width + across


def _met_along(size: int, places: int, kernel: int, stride: int, padding: int) -> dict[int, list[int | None]]:
    """Along one side, the pixels that a filter meets: for each, its tap there in each of the filter's places."""
    met = {}
    for pixel in range(size):
        taps = [pixel - place * stride + padding for place in range(places)]
        if any(0 <= tap < kernel for tap in taps):
            met[pixel] = [tap if 0 <= tap < kernel else None for tap in taps]
    return met


class _Unrolled(torch.autograd.Function):
    """Rows (N, pixels x C) of images, by a convolution's weight (O, C, h, w), to (N, O x pixels out).

    The matrix is made of the weight's taps, and its gradient is summed up into them in float32, or float64.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, weight: Tensor, taps: Sequence[Sequence[int | None]]) -> Tensor:
        by_tap = weight.permute(0, 2, 3, 1).flatten(1, 2).to(rows.dtype)  # (O, h x w, C)
        nothing = torch.zeros_like(by_tap[:, 0])
        blocks = [nothing if tap is None else by_tap[:, tap] for meets in taps for tap in meets]
        matrix = torch.stack(blocks, 1).view(-1, rows.shape[1])
        ctx.save_for_backward(rows, matrix)
        ctx.taps, ctx.shape, ctx.dtype = taps, weight.shape, weight.dtype  # type: ignore[attr-defined]
        return rows @ matrix.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (gradient,) = gradients
        rows, matrix = ctx.saved_tensors
        to_rows = gradient @ matrix if ctx.needs_input_grad[0] else None
        to_weight = None
        if ctx.needs_input_grad[1]:
            channels_out, channels, down, across = ctx.shape
            blocks = (gradient.T @ rows).view(channels_out, -1, channels)
            dtype = torch.promote_types(rows.dtype, torch.float32)
            by_tap = torch.zeros(channels_out, down * across, channels, dtype=dtype, device=rows.device)
            for number, tap in enumerate(tap for meets in ctx.taps for tap in meets):
                if tap is not None:
                    by_tap[:, tap] += blocks[:, number]
            to_weight = by_tap.view(-1, down, across, channels).permute(0, 3, 1, 2).to(ctx.dtype)
        return to_rows, to_weight, None


def _pair(value: str | tuple[int, ...]) -> tuple[int, int]:
    assert not isinstance(value, str)
    return value[0], value[1]


def unroll(model: nn.Module) -> None:
    """Compute the network's ordinary convolutions as `UnrolledConv2d` does; nothing else about them changes."""
    for module in model.modules():
        plain = type(module) is nn.Conv2d and module.groups == 1 and module.padding_mode == "zeros"
        if plain and not isinstance(module.padding, str) and module.dilation == (1, 1):
            module.__class__ = UnrolledConv2d


def as_pytorch_computes(model: nn.Module) -> None:
    """Compute the network's convolutions as PyTorch does, to compare with."""
    for module in model.modules():
        if type(module) is UnrolledConv2d:
            setattr(module, "__class__", nn.Conv2d)  # noqa: B010 - a plain assignment would narrow the type

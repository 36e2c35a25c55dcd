"""Convolutions over maps of few pixels, against PyTorch's."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight
from torch.utils.flop_counter import FlopCounterMode

from cifar100cli.unrolled import UnrolledConv2d, unroll


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 2), (3, 3), (2, 5)])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (1, 2, 0), (5, 4, 2), (7, 2, 3), (2, 2, 0)]
)
def test_is_torchs_convolution(size: tuple[int, int], kernel: int, stride: int, padding: int) -> None:
    """Output and gradients against torch's in float64, where an output is one pixel and where it is not."""
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Conv2d(4, 6, kernel, stride, padding).to(memory_format=torch.channels_last))
    unroll(ours)
    assert isinstance(ours[0], UnrolledConv2d)
    inputs = torch.randn(5, 4, *size).contiguous(memory_format=torch.channels_last).requires_grad_()
    if min(size) + 2 * padding < kernel:
        with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
            ours(inputs)
        return
    output = ours(inputs)
    wanted = torch.randn_like(output)
    output.backward(wanted)

    tensors = [inputs, *ours.parameters()]
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    expected = F.conv2d(exact[0], exact[1], exact[2], stride, padding)
    expected.backward(wanted.double())  # type: ignore[no-untyped-call]
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    for tensor, reference in zip(tensors, exact, strict=True):
        assert tensor.grad is not None
        assert reference.grad is not None
        torch.testing.assert_close(tensor.grad.double(), reference.grad, rtol=1e-5, atol=1e-5)


def test_only_ordinary_convolutions_are_computed_in_another_way() -> None:
    kinds = [
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, dilation=2),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
    ]
    model = nn.Sequential(*kinds)
    unroll(model)
    assert all(type(module) is nn.Conv2d for module in model)


def test_in_bfloat16_no_digits_are_lost() -> None:
    """Output and gradients are as near to those of float64 as PyTorch's own, and the gradients laid out as the weights.

    Of four pixels by nine taps, each tap's gradient is a sum of up to four products.
    """
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Conv2d(64, 32, 3, padding=1, bias=False)).to(memory_format=torch.channels_last)
    theirs = copy.deepcopy(ours)
    unroll(ours)
    images, wanted = torch.randn(100, 64, 2, 2).to(memory_format=torch.channels_last), torch.randn(100, 32, 2, 2)
    exact = images.double().requires_grad_(), ours.get_parameter("0.weight").detach().double().requires_grad_()
    F.conv2d(*exact, padding=1).backward(wanted.double())  # type: ignore[no-untyped-call]

    def errors(network: nn.Sequential) -> list[float]:
        inputs = images.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            output = network(inputs)
        assert output.dtype == torch.bfloat16
        output.backward(wanted.bfloat16())
        weight = network[0].weight
        assert isinstance(weight, nn.Parameter)
        assert weight.grad is not None
        assert weight.grad.dtype == torch.float32
        assert weight.grad.stride() == weight.stride()
        return [
            float((found.grad.double() - true.grad).norm() / true.grad.norm())  # type: ignore[union-attr, operator]
            for found, true in zip((inputs, weight), exact, strict=True)
        ]

    for mine, reference in zip(errors(ours), errors(theirs), strict=True):
        assert mine < 1.3 * reference + 1e-6


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "unrolled"),
    [
        *((1, 3, 1, True), (2, 3, 1, True), (2, 3, 2, True), (3, 3, 1, True), (1, 1, 1, True), (2, 1, 2, True)),
        *((4, 3, 1, False), (4, 3, 2, False), (2, 1, 1, False), (32, 3, 1, False), (32, 7, 2, False)),
    ],
)
def test_only_where_it_takes_no_more_multiplications(size: int, kernel: int, stride: int, unrolled: bool) -> None:
    layer = nn.Conv2d(4, 8, kernel, stride, kernel // 2)
    unroll(layer)
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(2, 4, size, size))
    kinds = {str(kind).split(".")[-1] for kind in counter.get_flop_counts()["Global"]}
    assert kinds == ({"mm"} if unrolled else {"convolution"})
    out = (size - 1) // stride + 1
    assert counter.get_total_flops() <= 2 * 2 * 4 * 8 * kernel**2 * out**2


def test_in_float64_gradients_are_as_exact() -> None:
    """And whatever the default type is, by which a sum would be rounded."""
    layer = nn.Conv2d(3, 4, 3, padding=1).double()
    unroll(layer)
    images = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.autograd.gradcheck(lambda x, _: layer(x), (images, layer.weight))
    finally:
        torch.set_default_dtype(torch.float32)


def test_without_a_gradient_for_the_images() -> None:
    layer = nn.Conv2d(3, 4, 3, padding=1)
    unroll(layer)
    images = torch.randn(2, 3, 2, 2)
    layer(images).sum().backward()
    expected = conv2d_weight(images, layer.weight.shape, torch.ones(2, 4, 2, 2), padding=1)  # type: ignore[no-untyped-call]
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, expected)
    layer.weight.requires_grad_(False)
    layer(images.requires_grad_()).sum().backward()
    assert images.grad is not None

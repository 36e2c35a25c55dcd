"""Depthwise convolutions in bfloat16 on a CPU: output and gradients beside PyTorch's own in float64."""

import pytest
import timm
import torch
from torch import Tensor, nn

from cifar100cli import depthwise, devices

CPU = torch.device("cpu")


def distance(ours: Tensor | None, reference: Tensor | None) -> float:
    assert ours is not None
    assert reference is not None
    ours, reference = ours.detach().double(), reference.detach()
    return float((ours - reference).norm() / reference.norm())


def both_ways(layer: nn.Conv2d, images: Tensor) -> list[tuple[Tensor | None, Tensor | None]]:
    """Output and gradients of a layer in the context, and in float64 from the same rounded numbers."""
    layer.weight.data = layer.weight.data.bfloat16().float()
    exact = nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,  # type: ignore[arg-type]
        layer.stride,  # type: ignore[arg-type]
        layer.padding,  # type: ignore[arg-type]
        layer.dilation,  # type: ignore[arg-type]
        layer.groups,
        layer.bias is not None,
        dtype=torch.float64,
    )
    exact.load_state_dict(layer.state_dict())
    ours, reference = images.clone().requires_grad_(), images.double().requires_grad_()
    with depthwise.bf16_on_cpu():
        output = layer(ours.contiguous(memory_format=torch.channels_last))
    expected = exact(reference)
    gradient = torch.randn_like(output)
    output.backward(gradient)
    expected.backward(gradient.double())
    assert output.dtype == torch.bfloat16
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32
    pairs = [(output, expected), (ours.grad, reference.grad), (layer.weight.grad, exact.weight.grad)]
    return pairs if layer.bias is None else [*pairs, (layer.bias.grad, exact.bias.grad)]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "side", "dilation", "bias"),
    [
        (3, 1, 1, 8, 1, False),
        (3, 2, 1, 16, 1, True),
        (3, 2, 1, 17, 1, False),
        (3, 2, 0, 9, 1, False),
        (4, 2, 1, 12, 1, False),
        (5, 1, 2, 8, 1, True),
        (5, 2, 2, 16, 1, False),
        (5, 2, 0, 11, 1, False),
        (7, 1, 3, 9, 1, True),
        (7, 2, 3, 19, 1, False),
        (5, 2, "valid", 12, 1, False),
        (5, 1, "same", 8, 1, False),
        (5, 1, 4, 16, 2, False),
        (3, 2, 3, 8, 1, False),  # more padding than the filter is wide
    ],
)
def test_gradients_are_those_of_pytorch(
    kernel: int, stride: int, padding: int | str, side: int, dilation: int, bias: bool
) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 6, kernel, stride, padding, dilation, groups=6, bias=bias)
    images = torch.randn(3, 6, side, side).bfloat16().float()
    for ours, reference in both_ways(layer, images):
        assert distance(ours, reference) < 2**-8


@pytest.mark.parametrize(("before", "width", "groups"), [(6, 6, 1), (6, 12, 6), (6, 6, 2), (1, 1, 1)])
def test_what_is_not_depthwise_is_left_to_pytorch(before: int, width: int, groups: int) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(before, width, 5, 2, 2, groups=groups)
    images = torch.randn(3, before, 12, 12)
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(images)
    with depthwise.bf16_on_cpu():
        output = layer(images)
    assert torch.equal(output, expected)
    assert output.grad_fn is not None
    assert "Depthwise" not in output.grad_fn.name()


def test_frozen_parts_and_forward_passes_alone() -> None:
    layer = nn.Conv2d(6, 6, 5, 2, 2, groups=6, bias=False)
    images = torch.randn(2, 6, 12, 12)
    with torch.no_grad(), depthwise.bf16_on_cpu():
        alone = layer(images)
    with depthwise.bf16_on_cpu():
        output = layer(images)
    assert torch.equal(alone, output)
    output.float().sum().backward()
    assert images.grad is None
    assert layer.weight.grad is not None
    layer.weight.requires_grad_(False)
    images.requires_grad_()
    with depthwise.bf16_on_cpu():
        layer(images).float().sum().backward()
    assert images.grad is not None


def test_a_network_learns_the_same_in_it() -> None:
    """The whole gradient of an EfficientNet is as far from float32's as that of PyTorch's own kernels."""
    torch.manual_seed(0)
    model = timm.create_model("tf_efficientnet_lite0", num_classes=10).eval()
    images = torch.randn(4, 3, 64, 64).contiguous(memory_format=torch.channels_last)

    def gradient(cast: devices.Cast) -> Tensor:
        model.zero_grad()
        with cast():
            logits = model(images)
        logits.float().square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()

    exact = gradient(devices.autocast(CPU, "fp32"))
    ours = distance(gradient(devices.autocast(CPU, "bf16")), exact)
    theirs = distance(gradient(lambda: torch.autocast("cpu", torch.bfloat16)), exact)
    assert ours < 1.1 * theirs

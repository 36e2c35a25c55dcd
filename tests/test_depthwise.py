"""Depthwise convolutions on a CPU: output and gradients beside PyTorch's own in float64."""

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


def both_ways(layer: nn.Conv2d, images: Tensor, precision: str) -> list[tuple[Tensor | None, Tensor | None]]:
    """Output and gradients of a layer in the context, and in float64 from the same numbers, rounded to bfloat16."""
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
    with devices.autocast(CPU, precision)():
        output = layer(ours.contiguous(memory_format=torch.channels_last))
    expected = exact(reference)
    gradient = torch.randn_like(output)
    output.backward(gradient)
    expected.backward(gradient.double())
    assert output.dtype == devices.DTYPES[precision]
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32
    pairs = [(output, expected), (ours.grad, reference.grad), (layer.weight.grad, exact.weight.grad)]
    return pairs if layer.bias is None else [*pairs, (layer.bias.grad, exact.bias.grad)]  # type: ignore[union-attr]


# On a CPU without bfloat16 PyTorch's own kernels, to which some of these are left, round between sums.
@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 2**-7), ("fp32", 2**-20)])
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
        (3, 1, 1, 2, 1, True),  # from here on, filters that are larger than the maps
        (5, 1, 2, 1, 1, False),
        (5, 1, 2, 4, 1, False),
        (5, 2, 2, 7, 1, True),
        (7, 2, 2, 4, 1, False),
        (9, 1, 4, 3, 1, False),
        (9, 3, 4, 7, 1, False),
        (5, 3, 1, 9, 1, True),
        (3, 2, 3, 8, 1, False),  # more padding than the filter is wide
    ],
)
def test_gradients_are_those_of_pytorch(
    precision: str, tolerance: float, kernel: int, stride: int, padding: int | str, side: int, dilation: int, bias: bool
) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 6, kernel, stride, padding, dilation, groups=6, bias=bias)
    images = torch.randn(3, 6, side, side).bfloat16().float()
    for ours, reference in both_ways(layer, images, precision):
        assert distance(ours, reference) < tolerance


@pytest.mark.parametrize(
    ("kernel", "stride", "height", "width", "ours"),
    [
        (3, 1, 2, 9, True),
        (5, 1, 9, 4, True),
        (5, 2, 8, 8, True),
        (5, 1, 5, 5, True),
        (7, 1, 12, 12, True),
        (5, 2, 14, 14, True),
        (5, 2, 16, 16, False),
        (3, 2, 5, 6, False),
        (3, 1, 3, 3, False),
    ],
)
def test_in_float32_only_wide_filters_and_those_larger_than_their_maps_are_ours(
    kernel: int, stride: int, height: int, width: int, ours: bool
) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 4, kernel, stride, kernel // 2, groups=4)
    images = torch.randn(2, 4, height, width, requires_grad=True)
    with depthwise.fp32_on_cpu():
        output = layer(images)
        with torch.no_grad():
            alone = layer(images)
    weights = torch.randn_like(output)
    exact = layer.weight.double(), layer.bias.double()  # type: ignore[union-attr]
    in_float64 = nn.functional.conv2d(images.double(), *exact, stride, kernel // 2, 1, 4)
    found = torch.autograd.grad((output * weights).sum(), [images, *layer.parameters()])
    expected = torch.autograd.grad((in_float64 * weights.double()).sum(), [images, *layer.parameters()])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output, alone)
    assert output.grad_fn is not None
    nodes = [output.grad_fn, *(node for node, _ in output.grad_fn.next_functions if node is not None)]
    assert any("Depthwise" in node.name() for node in nodes) == ours


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

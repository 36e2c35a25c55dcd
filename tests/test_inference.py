"""Networks whose batch norms are folded away, beside the whole ones in float64."""

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

from cifar100cli.inference import fold
from cifar100cli.networks import NAMES


def network(name: str) -> nn.Module:
    """With batch norms as training leaves them: no two channels alike, and some of their factors negative."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            if module.affine:
                nn.init.normal_(module.weight, 1.0, 0.7)
                nn.init.normal_(module.bias, std=0.3)
    return model


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize(
    "name",
    ["resnet18", "test_efficientnet", "tf_efficientnet_lite0", "mobilenetv3_small_050", "regnetx_002", "resnet9"],
)
def test_no_batch_norm_is_left_and_the_result_is_the_same(name: str) -> None:
    model = network(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    folded = fold(model, torch.randn(2, 3, 64, 64))
    assert norms(model) > norms(folded) == 0
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        expected, found = copy.deepcopy(model).double()(images.double()), folded(images)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=float(1e-5 * expected.abs().max()))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", [*NAMES, "test_vit", "densenet121", "test_convnext"])
def test_whatever_the_network_nothing_else_comes_out(name: str) -> None:
    model = network(name)
    side = 160 if name == "test_vit" else 32
    images = torch.randn(2, 3, side, side)
    folded = fold(model, images)
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(folded(images), expected, rtol=0, atol=float(1e-4 * expected.abs().max()))


class Shared(nn.Module):
    """What the convolution gives is normalised, and added as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.convolution(images)
        normalised: Tensor = self.norm(maps)
        return maps + normalised


def test_a_network_that_cannot_do_without_is_left_alone() -> None:
    model = Shared().eval()
    nn.init.uniform_(model.norm.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    assert fold(model, torch.randn(2, 3, 8, 8)) is model

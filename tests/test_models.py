"""Networks: the stem, the head, the refusals."""

import pytest
import timm
import torch
from torch import nn

from cifar100cli.config import Model
from cifar100cli.errors import UsageError
from cifar100cli.models import count_parameters, create_model


def test_is_timms_model() -> None:
    torch.manual_seed(0)
    ours = create_model(Model(), classes=100, image_size=32)
    torch.manual_seed(0)
    theirs = timm.create_model("resnet18", num_classes=100)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    assert count_parameters(ours) == 11_227_812  # as counted for torchvision's ResNet-18 with 100 classes
    assert ours.training


def test_cifar_stem_keeps_the_resolution() -> None:
    model = create_model(Model(stem="cifar"), classes=10, image_size=32)
    assert isinstance(model.conv1, nn.Conv2d)
    assert (model.conv1.kernel_size, model.conv1.stride) == ((3, 3), (1, 1))
    with torch.inference_mode():
        features = model.eval().forward_features(torch.zeros(1, 3, 32, 32))  # type: ignore[operator]
    assert features.shape == (1, 512, 4, 4)


def test_what_is_frozen_does_not_count_as_trainable() -> None:
    model = create_model(Model(), classes=10, image_size=32)
    assert count_parameters(model, trainable=True) == count_parameters(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert count_parameters(model, trainable=True) == 0


@pytest.mark.parametrize(
    ("config", "image_size", "words"),
    [
        (Model(backbone="resnet81"), 32, "timm has no such model; did you mean"),
        (Model(backbone="zzzzzzzzzz"), 32, "list_models"),
        (Model(backbone="vit_tiny_patch16_224"), 32, "data.image_size = 32"),
        (Model(backbone="mobilenetv3_small_050", stem="cifar"), 32, "model.stem"),
    ],
)
def test_refused(config: Model, image_size: int, words: str) -> None:
    with pytest.raises(UsageError, match=words) as refusal:
        create_model(config, classes=10, image_size=image_size)
    assert "\n" not in str(refusal.value)

"""Networks: the stem, the head, the refusals."""

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from cifar100cli import models
from cifar100cli.config import Config
from cifar100cli.errors import UsageError
from cifar100cli.models import CosineHead, count_parameters, create_model


def make_config(**keys: object) -> Config:
    return Config.model_validate({"model": keys})


def test_is_timms_model() -> None:
    torch.manual_seed(0)
    ours = create_model(Config(), classes=100)
    torch.manual_seed(0)
    theirs = timm.create_model("resnet18", num_classes=100)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    assert count_parameters(ours) == 11_227_812  # as counted for torchvision's ResNet-18 with 100 classes
    assert ours.training


def test_cifar_stem_keeps_the_resolution() -> None:
    model = create_model(make_config(stem="cifar"), classes=10)
    assert isinstance(model.conv1, nn.Conv2d)
    assert (model.conv1.kernel_size, model.conv1.stride) == ((3, 3), (1, 1))
    with torch.inference_mode():
        features = model.eval().forward_features(torch.zeros(1, 3, 32, 32))  # type: ignore[operator]
    assert features.shape == (1, 512, 4, 4)


def test_what_is_frozen_does_not_count_as_trainable() -> None:
    model = create_model(Config(), classes=10)
    assert count_parameters(model, trainable=True) == count_parameters(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert count_parameters(model, trainable=True) == 0


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"backbone": "resnet81"}, "timm has no such model; did you mean"),
        ({"backbone": "zzzzzzzzzz"}, "list_models"),
        ({"backbone": "vit_tiny_patch16_224"}, "data.image_size = 32"),
        ({"backbone": "mobilenetv3_small_050", "stem": "cifar"}, "model.stem"),
    ],
)
def test_refused(keys: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words) as refusal:
        create_model(make_config(**keys), classes=10)
    assert "\n" not in str(refusal.value)


def test_cosine_head_gives_scaled_cosines_whatever_the_autocast() -> None:
    config = Config.model_validate(
        {"model": {"backbone": "test_resnet", "head": "cosine", "embedding_dim": 64}, "loss": {"scale": 16}}
    )
    model = create_model(config, classes=10).eval()
    inputs = torch.randn(4, 3, 32, 32)
    with torch.inference_mode():
        features = model.backbone(inputs)  # type: ignore[operator]
        head = model.head
        assert isinstance(head, CosineHead)
        embedding = torch.nn.functional.batch_norm(
            features @ head.embed.weight.T, head.norm.running_mean, head.norm.running_var, head.norm.weight
        )
        expected = torch.nn.functional.cosine_similarity(embedding[:, None], head.class_vectors[None], dim=2)
        torch.testing.assert_close(model(inputs), 16 * expected, atol=1e-4, rtol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(inputs)
    assert logits.dtype == torch.float32
    assert logits.abs().max() <= 16.001
    assert head.class_vectors.std().item() == pytest.approx(0.01, rel=0.15)
    assert head.embed.bias is None


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 2), (3, 3), (2, 5)])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (1, 2, 0), (5, 4, 2), (7, 2, 3), (2, 2, 0)]
)
def test_small_convolutions_are_torchs(size: tuple[int, int], kernel: int, stride: int, padding: int) -> None:
    """Output and gradients against torch's in float64, where an output is one pixel and where it is not."""
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Conv2d(4, 6, kernel, stride, padding).to(memory_format=torch.channels_last))
    models._use_small_convolutions(ours)
    assert isinstance(ours[0], models.SmallConv2d)
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
    models._use_small_convolutions(model)
    assert all(type(module) is nn.Conv2d for module in model)

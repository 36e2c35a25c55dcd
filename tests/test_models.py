"""Networks: the stem, the head, the refusals."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from timm.layers import DropPath  # type: ignore[attr-defined]
from timm.models import _registry
from torch import Tensor, nn

from cifar100cli import backbones, models
from cifar100cli.errors import DataError, UsageError
from cifar100cli.learning import grouped
from cifar100cli.models import CosineHead, check_backbone, classifiers, count_parameters, create_model, outline
from cifar100cli.schema import Config
from cifar100cli.watcher import Watcher


class OwnNetwork(nn.Module):
    """A network of a user's own, of which timm knows its name alone."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem, self.body, self.answer = nn.Conv2d(3, 8, 3), nn.Linear(8, 8), nn.Linear(8, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        answer: Tensor = self.answer(self.body(self.stem(images).mean((2, 3))))
        return answer


class OwnNetworkThatSays(OwnNetwork):
    def get_classifier(self) -> nn.Module:
        return self.answer


def register(patch: pytest.MonkeyPatch, network: Callable[[int], nn.Module]) -> None:
    """As `timm.register_model` does, until the end of the test."""
    patch.setitem(_registry._model_entrypoints, "own_network", lambda num_classes=1000, **_: network(num_classes))


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


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        *(("resnet18", 64), ("resnet34", 64), ("resnet50", 64), ("resnext50_32x4d", 64), ("wide_resnet50_2", 64)),
        *(("resnet18d", 64), ("resnet26t", 64), ("seresnet50", 64), ("resnetaa50d", 64), ("test_resnet", 32)),
    ],
)
def test_the_cifar_stem_of_resnets(name: str, channels: int) -> None:
    model = create_model(make_config(backbone=name, stem="cifar"), classes=10).eval()
    seen: list[torch.Size] = []
    model.get_submodule("layer1").register_forward_pre_hook(lambda _, given: seen.append(given[0].shape))
    with torch.inference_mode():
        model(torch.zeros(1, 3, 32, 32))
    assert seen == [(1, channels, 32, 32)]


def test_the_cifar_stem_begins_as_timms_stem_does() -> None:
    """He's initialisation by the outputs: a deviation of the root of 2 / (64 x 3 x 3)."""
    stem = create_model(make_config(stem="cifar"), classes=10).get_submodule("conv1").weight
    assert isinstance(stem, Tensor)
    assert stem.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.1)


def test_the_cifar_stem_is_counted() -> None:
    """A 7x7 convolution of 3 and 64 channels less, a 3x3 more."""
    assert count_parameters(create_model(make_config(stem="cifar"), classes=100)) == 11_220_132
    assert 11_220_132 == 11_227_812 - 64 * 3 * 7 * 7 + 64 * 3 * 3 * 3


@pytest.mark.parametrize(("name", "new"), [("resnet18", {"conv1.weight"}), ("resnet18d", set())])
def test_the_cifar_stem_keeps_the_weights_of_the_rest(tmp_path: Path, name: str, new: set[str]) -> None:
    torch.manual_seed(0)
    weights = timm.create_model(name, num_classes=1000).state_dict()
    save_file(weights, tmp_path / "weights.safetensors")
    config = make_config(backbone=name, stem="cifar", pretrained=True, weights=str(tmp_path / "weights.safetensors"))
    found = create_model(config, classes=10).state_dict()
    body = {key for key in weights if not key.startswith("fc.")}
    assert {key for key in body if not torch.equal(found[key], weights[key])} == new


def test_drop_rates_reach_the_network() -> None:
    model = create_model(make_config(drop_rate=0.2, drop_path_rate=0.7), classes=10)
    assert model.drop_rate == 0.2
    rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.1 * block for block in range(1, 8)])  # and 0 in the first of eight blocks
    inputs = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert not torch.equal(model(inputs), model(inputs))
        assert torch.equal(model.eval()(inputs), model(inputs))


@pytest.mark.parametrize(
    ("name", "size"),
    [
        # By default timm has 0.2 of drop-out in the first two, and stochastic depth in the third.
        *(("ghostnet_050", 32), ("rexnet_100", 32), ("swin_tiny_patch4_window7_224", 64)),
        ("resnet9", 32),  # takes no drop_path_rate, be it 0; nor does GhostNet
    ],
)
def test_a_rate_of_0_drops_nothing(name: str, size: int) -> None:
    config = Config.model_validate({"model": {"backbone": name}, "data": {"image_size": size}})
    model = create_model(config, classes=10).train()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):  # and one image has no variance
            norm.eval()
    image = torch.randn(1, 3, size, size)
    with torch.no_grad():
        assert torch.equal(model(image), model(image))


@pytest.mark.parametrize(
    ("backbone", "keys", "words"),
    [
        ("vgg11", {"drop_path_rate": 0.1}, r"model\.drop_path_rate = 0\.1: vgg11 has no stochastic depth"),
        ("resnet9", {"drop_path_rate": 0.2}, r"model\.drop_path_rate = 0\.2: resnet9 has no stochastic depth"),
    ],
)
def test_drop_rates_that_a_network_does_not_take(backbone: str, keys: dict[str, float], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        create_model(make_config(backbone=backbone, **keys), classes=10)


def test_a_rate_that_is_swallowed_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    build = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **more: build(name, num_classes=more["num_classes"]))
    for key in ("drop_rate", "drop_path_rate"):
        with pytest.raises(UsageError, match=rf"model\.{key} = 0\.1: resnet18 has no"):
            create_model(make_config(**{key: 0.1}), classes=10)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *(("resnet18", 32), ("test_vit", 160), ("convnext_atto", 32), ("mobilenetv3_small_050", 32), ("wrn16_4", 32)),
        *(("airbench94", 32), ("swin_tiny_patch4_window7_224", 224), ("tf_efficientnet_lite0", 32)),
        *(("test_vit", 96), ("swin_tiny_patch4_window7_224", 64), ("beit_base_patch16_224", 32)),
    ],
)
@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_the_outline_is_the_networks(name: str, size: int, head: str) -> None:
    config = Config.model_validate(
        {"model": {"backbone": name, "head": head, "embedding_dim": 16}, "data": {"image_size": size}}
    )
    network = create_model(config, classes=7)
    found, expected = (
        {key: (tensor.shape, tensor.dtype) for key, tensor in tensors.items()}
        for tensors in (outline(config, 7), network.state_dict())
    )
    assert found == expected


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("vit_tiny_patch16_224", {"img_size": 64}),
        # Windows keep their share of the image, as in the paper's networks for 224 and 384 pixels.
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 2}),
        ("xcit_nano_12_p16_224", {}),  # takes any size as it is
    ],
)
def test_a_network_for_one_size_is_fitted_to_another(name: str, told: dict[str, Any]) -> None:
    """As timm builds it, when it is told the size to begin with."""
    config = Config.model_validate({"model": {"backbone": name}, "data": {"image_size": 64}})
    ours = create_model(config, classes=10).eval()
    theirs = timm.create_model(name, num_classes=10, **told).eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)


def test_growing_images_are_tried_before_training() -> None:
    sizes = {"image_size": 224, "first_image_size": 208}
    config = Config.model_validate({"model": {"backbone": "vit_tiny_patch16_224"}, "data": sizes})
    with pytest.raises(UsageError, match=r"data\.first_image_size = 208: vit_tiny_patch16_224 cannot take it"):
        create_model(config, classes=10)


@pytest.mark.parametrize(
    ("name", "classifier"),
    [
        *(("resnet18", "fc"), ("vgg11", "head.fc"), ("airbench94", "fc")),
        *(("mnasnet_b1", "classifier"), ("swsl_resnet18", "fc")),  # timm's earlier names
    ],
)
def test_the_classifier_is_known(name: str, classifier: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(backbones.present_name(name))
    assert classifiers(model) == (classifier,)


def test_the_classifier_of_a_network_of_the_users_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is not moved by Muon, and a file for other classes fits all the rest."""
    register(monkeypatch, OwnNetworkThatSays)
    own = OwnNetworkThatSays(1000)
    save_file(own.state_dict(), tmp_path / "weights.safetensors")
    about = {"backbone": "own_network", "pretrained": True, "weights": str(tmp_path / "weights.safetensors")}
    config = Config.model_validate({"model": about, "optimizer": {"name": "muon"}})
    model = create_model(config, classes=10)
    assert torch.equal(model.get_parameter("body.weight"), own.body.weight)
    moved = [group for group in grouped(None, model, config, Watcher(), new_stem=False) if group.hidden]
    assert [group.parameters for group in moved] == [[model.get_parameter("body.weight")]]


def test_a_network_that_does_not_say_which_layer_classifies(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, OwnNetwork)
    config = Config.model_validate({"model": {"backbone": "own_network"}, "optimizer": {"name": "muon"}})
    model = create_model(config, classes=10)
    with pytest.raises(UsageError, match=r"OwnNetwork does not say which of its layers .* needs a get_classifier\(\)"):
        grouped(None, model, config, Watcher(), new_stem=False)


def test_an_earlier_name_whose_present_one_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of two ViTs in timm 1.0.31."""
    monkeypatch.setitem(_registry._deprecated_models, "swsl_resnet18", "resnet18.a1_in2k")
    with pytest.raises(UsageError, match=r"swsl_resnet18: timm has no weights 'a1_in2k' of resnet18; did you mean a1_"):
        check_backbone("swsl_resnet18")


class Encoder(nn.Conv2d):
    """It gives a map, whatever the number of classes, as the encoders among timm's networks do."""

    def __init__(self, _: int) -> None:
        super().__init__(3, 8, 4, 4)


class Embedder(OwnNetwork):
    """It gives 8 numbers, whatever the number of classes."""

    def __init__(self, _: int) -> None:
        super().__init__(8)


@pytest.mark.parametrize(
    ("network", "head", "shape"),
    [
        *((Encoder, "linear", "8x8x8"), (Encoder, "cosine", "8x8x8")),
        (Embedder, "linear", "8"),
    ],
)
def test_a_network_that_classifies_nothing(
    monkeypatch: pytest.MonkeyPatch, network: Callable[[int], nn.Module], head: str, shape: str
) -> None:
    register(monkeypatch, network)
    words = rf"^model\.backbone = own_network: makes {shape} numbers of an image, and classifies nothing; .* resnet18$"
    with pytest.raises(UsageError, match=words):
        create_model(make_config(backbone="own_network", head=head), classes=10)


def test_features_are_enough_for_a_head_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, Embedder)
    model = create_model(make_config(backbone="own_network", head="cosine"), classes=10)
    with torch.inference_mode():
        assert model.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_weights_that_nobody_published_are_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[None] = []
    monkeypatch.setattr(models, "_hub_answers", lambda: asked.append(None))
    with pytest.raises(DataError, match=r"no weights of resnet9 are published; .*pretrained=false, .* --weights FILE$"):
        create_model(make_config(backbone="resnet9", pretrained=True), classes=10)
    assert not asked


def test_why_weights_cannot_be_had_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a proxy the hub is asked; its own words are long, and the reason is in what they were raised from."""

    def fail(*_: object, **__: object) -> None:
        try:
            raise ConnectionRefusedError("the proxy refused")
        except OSError as cause:
            raise FileNotFoundError("please look at your connection " * 10) from cause

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(models, "_hub_answers", lambda: True)
    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(DataError, match=r"the proxy refused; fetch .*--weights FILE.*model.pretrained=false"):
        create_model(make_config(backbone="resnet18", pretrained=True), 100)


def test_what_is_frozen_does_not_count_as_trainable() -> None:
    model = create_model(Config(), classes=10)
    assert count_parameters(model, trainable=True) == count_parameters(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert count_parameters(model, trainable=True) == 0
    assert count_parameters(model) == 11_227_812 - 90 * 513  # of 100 classes less those of 90


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"backbone": "resnet81"}, "timm has no such model; did you mean"),
        ({"backbone": "zzzzzzzzzz"}, "list_models"),
        ({"backbone": "mixer_s16_224"}, "data.image_size = 32: mixer_s16_224 cannot take it"),
        ({"backbone": "eva02_tiny_patch14_224"}, "squares of 14 pixels; use a multiple"),
        ({"backbone": "mobilenetv3_small_050", "stem": "cifar"}, "model.stem"),
        ({"backbone": "resnet9", "stem": "cifar"}, "model.stem"),
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
        for tensor in (head.norm.running_mean, head.norm.running_var, head.norm.weight, head.norm.bias):
            assert tensor is not None
            tensor.uniform_(0.5, 2)
        embedding = torch.nn.functional.batch_norm(
            features @ head.embed.weight.T,
            head.norm.running_mean,
            head.norm.running_var,
            head.norm.weight,
            head.norm.bias,
        )
        expected = torch.nn.functional.cosine_similarity(embedding[:, None], head.class_vectors[None], dim=2)
        torch.testing.assert_close(model(inputs), 16 * expected, atol=1e-4, rtol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(inputs)
    assert logits.dtype == torch.float32
    assert logits.abs().max() <= 16.001
    assert head.class_vectors.std().item() == pytest.approx(0.01, rel=0.15)
    assert head.embed.bias is None


@pytest.mark.parametrize(
    ("dtype", "tolerance", "logits"),
    [
        (torch.float64, 1e-12, torch.float64),
        (torch.float16, 0.05, torch.float32),
        (torch.bfloat16, 0.3, torch.float32),
    ],
)
def test_cosines_of_a_head_in_another_type(dtype: torch.dtype, tolerance: float, logits: torch.dtype) -> None:
    """As `half()` and `double()` make it; the reference is float64 all through."""
    torch.manual_seed(0)
    head, features = CosineHead(24, 16, classes=10, scale=16).eval().to(dtype), torch.randn(5, 24, dtype=dtype)
    embedding = features.double() @ head.embed.weight.double().T / (1 + head.norm.eps) ** 0.5
    expected = torch.nn.functional.cosine_similarity(embedding[:, None], head.class_vectors.double()[None], dim=2)
    with torch.inference_mode():
        found = head(features)
    assert found.dtype == logits
    torch.testing.assert_close(found.double(), 16 * expected, atol=tolerance, rtol=0)

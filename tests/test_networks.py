"""Networks of our own: counted from the papers' tables, computed by formulas, and taken by timm and PyTorch."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.layers import DropPath  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.nn import functional as F

from cifar100cli import jobs, networks, trainer, workflows
from cifar100cli.errors import UsageError
from cifar100cli.models import check_backbone, create_model, initialize
from cifar100cli.networks import NAMES, Airbench, WideResNet
from cifar100cli.schema import Config
from cifar100cli.steps import create_steps
from tests.conftest import Listening, StopAfter, make_preset, only_run, where

# ------------------------------------------------------------------------------------------------ counting


def wide_resnet_weights(depth: int, width: int, classes: int) -> int:
    """From table 1 of the paper: a 3x3 convolution of 16, three groups of blocks, a norm, a layer of the classes."""
    total, before = 3 * 9 * 16, 16
    for group in (16, 32, 64):
        for _ in range((depth - 4) // 6):
            after = group * width
            norms = 2 * before + 2 * after
            shortcut = before * after if before != after else 0
            total += norms + 9 * before * after + 9 * after * after + shortcut
            before = after
    return total + 2 * before + (before + 1) * classes


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("depth", "width", "millions"),  # table 4 of the paper, for the ten classes of CIFAR-10; and 16-4 from table 6
    [
        *((40, 1, 0.6), (40, 2, 2.2), (40, 4, 8.9), (40, 8, 35.7), (28, 10, 36.5), (28, 12, 52.5)),
        *((22, 8, 17.2), (22, 10, 26.8), (16, 8, 11.0), (16, 10, 17.1), (16, 4, 2.8)),
    ],
)
def test_wide_resnets_have_the_papers_weights(depth: int, width: int, millions: float) -> None:
    with torch.device("meta"):
        model = WideResNet(depth, width, num_classes=10)
    assert count(model) == wide_resnet_weights(depth, width, 10)
    assert count(model) / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize(("name", "depth", "width"), [("wrn16_4", 16, 4), ("wrn28_10", 28, 10), ("wrn40_2", 40, 2)])
def test_wide_resnets_by_name(name: str, depth: int, width: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=100)
    assert count(model) == wide_resnet_weights(depth, width, 100)
    assert count(model) == {"wrn16_4": 2_772_020, "wrn28_10": 36_536_884, "wrn40_2": 2_255_156}[name]


def conv(before: int, after: int, kernel: int = 3) -> int:
    return before * after * kernel * kernel


def with_norm(before: int, after: int) -> int:
    return conv(before, after) + 2 * after


OTHERS = {
    "resnet9": with_norm(3, 64)
    + (with_norm(64, 128) + 2 * with_norm(128, 128))
    + with_norm(128, 256)
    + (with_norm(256, 512) + 2 * with_norm(512, 512))
    + 512 * 100,
    "airbench94": conv(3, 24, 2)
    + 24
    + sum(with_norm(a, b) + with_norm(b, b) for a, b in ((24, 64), (64, 256), (256, 256)))
    + 256 * 100,
    "airbench94_512": conv(3, 24, 2)
    + 24
    + sum(with_norm(a, b) + with_norm(b, b) for a, b in ((24, 64), (64, 256), (256, 512)))
    + 512 * 100,
    "airbench95": conv(3, 24, 2)
    + 24
    + sum(with_norm(a, b) + with_norm(b, b) for a, b in ((24, 128), (128, 384), (384, 384)))
    + 384 * 100,
    "airbench96": conv(3, 24, 2)
    + 24
    + sum(with_norm(a, b) + 2 * with_norm(b, b) for a, b in ((24, 128), (128, 512), (512, 512)))
    + 512 * 100,
    # ResNet-18 with the CIFAR stem has 11,220,132. Here the first norm of a stage is of the channels before it,
    # shortcuts and the stem have none, and there is one more at the end.
    "preact_resnet18": 11_220_132 - 2 * (128 - 64 + 256 - 128 + 512 - 256) - 2 * (128 + 256 + 512) - 2 * 64 + 2 * 512,
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_networks_are_counted(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=100)
    assert count(model) == OTHERS[name]


SHAPES = {
    "wrn16_4": [(16, 32), (64, 32), (128, 16), (256, 8)],
    "wrn28_10": [(16, 32), (160, 32), (320, 16), (640, 8)],
    "wrn40_2": [(16, 32), (32, 32), (64, 16), (128, 8)],
    "preact_resnet18": [(64, 32), (64, 32), (128, 16), (256, 8), (512, 4)],
    "resnet9": [(64, 32), (128, 16), (256, 8), (512, 4)],
    "airbench94": [(24, 31), (64, 15), (256, 7), (256, 3)],
    "airbench94_512": [(24, 31), (64, 15), (256, 7), (512, 3)],
    "airbench95": [(24, 31), (128, 15), (384, 7), (384, 3)],
    "airbench96": [(24, 31), (128, 15), (512, 7), (512, 3)],
}


@pytest.mark.parametrize("name", NAMES)
def test_shapes_of_the_stages(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=7)
        found: list[tuple[int, ...]] = []
        for part in ("stem", *(n for n, _ in model.named_children() if n.startswith("layer"))):
            model.get_submodule(part).register_forward_hook(lambda *about: found.append(tuple(about[2].shape)))
        logits = model(torch.zeros(2, 3, 32, 32))
    assert found == [(2, channels, side, side) for channels, side in SHAPES[name]]
    assert logits.shape == (2, 7)


# ------------------------------------------------------------------------- the same, computed by the formulas


def randomised(name: str) -> nn.Module:
    """A small network in evaluation mode, in float64, with norms that are not the identity."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).double().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.2)  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
                module.bias.normal_(std=0.2)
                if not name.startswith("airbench"):
                    module.weight.uniform_(0.5, 2)
    return model


class Formula:
    """A network written out over the weights by name."""

    def __init__(self, model: nn.Module) -> None:
        self.weights: dict[str, Tensor] = dict(model.state_dict())

    def norm(self, x: Tensor, name: str) -> Tensor:
        mean, variance, weight, bias = (
            self.weights[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (variance + 1e-5).sqrt() * weight + bias

    def conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    def linear(self, x: Tensor) -> Tensor:
        return x @ self.weights["fc.weight"].T + self.weights.get("fc.bias", torch.zeros(()))

    def pre_activation(self, x: Tensor, blocks: list[int]) -> Tensor:
        x = self.conv(x, "stem")
        for stage, number in enumerate(blocks, 1):
            for block in range(number):
                name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
                active = F.relu(self.norm(x, f"{name}.norm1"))
                residual = self.conv(active, f"{name}.conv1", stride)
                residual = self.conv(F.relu(self.norm(residual, f"{name}.norm2")), f"{name}.conv2")
                reshaped = f"{name}.shortcut.weight" in self.weights
                x = residual + (self.conv(active, f"{name}.shortcut", stride) if reshaped else x)
        return self.linear(F.relu(self.norm(x, "norm.norm")).mean((2, 3)))

    def resnet9(self, x: Tensor) -> Tensor:
        def layer(x: Tensor, name: str) -> Tensor:
            return F.relu(self.norm(self.conv(x, f"{name}.0"), f"{name}.1"))

        def residual(x: Tensor, name: str) -> Tensor:
            return x + layer(layer(x, f"{name}.parts.0"), f"{name}.parts.1")

        x = layer(x, "stem")
        x = residual(F.max_pool2d(layer(x, "layer1.0"), 2), "layer1.1")
        x = F.max_pool2d(layer(x, "layer2"), 2)
        x = residual(F.max_pool2d(layer(x, "layer3.0"), 2), "layer3.1")
        return 0.125 * self.linear(F.max_pool2d(x, 4).flatten(1))

    def airbench(self, x: Tensor, *, deep: bool) -> Tensor:
        x = F.gelu(F.conv2d(x, self.weights["stem.conv.weight"], self.weights["stem.conv.bias"]))
        for name in ("layer1", "layer2", "layer3"):
            x = first = F.gelu(self.norm(F.max_pool2d(self.conv(x, f"{name}.conv1"), 2), f"{name}.norm1"))
            x = F.gelu(self.norm(self.conv(x, f"{name}.conv2"), f"{name}.norm2"))
            if deep:
                x = F.gelu(self.norm(self.conv(x, f"{name}.conv3"), f"{name}.norm3") + first)
        return self.linear(F.max_pool2d(x, 3).flatten(1)) / 9


@pytest.mark.parametrize("name", ["wrn16_4", "preact_resnet18", "resnet9", "airbench94", "airbench96"])
def test_networks_are_their_formulas(name: str) -> None:
    model = randomised(name)
    inputs = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    formula = Formula(model)
    with torch.no_grad():
        if name == "resnet9":
            expected = formula.resnet9(inputs)
        elif name.startswith("airbench"):
            expected = formula.airbench(inputs, deep=name == "airbench96")
        else:
            expected = formula.pre_activation(inputs, [2, 2, 2] if name == "wrn16_4" else [2, 2, 2, 2])
        torch.testing.assert_close(model(inputs), expected, rtol=1e-9, atol=1e-9)


# -------------------------------------------------------------------------------------- drop-out in networks


def test_drop_out_is_in_the_blocks_of_a_wide_resnet() -> None:
    model: Any = timm.create_model("wrn16_4", num_classes=10, drop_rate=0.3, drop_path_rate=0.5)
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.3] * 6
    rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])  # and 0 in the first block
    maps = torch.randn(1, 256, 8, 8)
    assert torch.equal(model.train().forward_head(maps), model.eval().forward_head(maps)), "none before the classifier"


@pytest.mark.parametrize("name", ["preact_resnet18", "resnet9", "airbench94"])
def test_drop_out_is_before_the_classifier_of_others(name: str) -> None:
    model: Any = timm.create_model(name, num_classes=0, drop_rate=0.25)
    maps = torch.ones(50, model.num_features, 4, 4)
    features = model.train().forward_head(maps)
    assert features.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert (features == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert torch.equal(model.eval().forward_head(maps), torch.ones(50, model.num_features))


# ----------------------------------------------------------------------------------------------- whitening


def test_whitening_against_numpy() -> None:
    images = torch.rand(20, 3, 9, 9, generator=torch.Generator().manual_seed(0)) + torch.rand(20, 1, 1, 1)
    model = create_model(Config.model_validate({"model": {"backbone": "airbench94"}}), classes=10)
    initialize(model, images)
    weight = model.get_submodule("stem.conv").weight
    assert isinstance(weight, nn.Parameter)
    assert not weight.requires_grad

    windows = np.lib.stride_tricks.sliding_window_view(images.double().numpy(), (2, 2), axis=(2, 3))
    patches = windows.transpose(0, 2, 3, 1, 4, 5).reshape(-1, 12)
    moments = patches.T @ patches / len(patches)
    filters = weight.detach().double().numpy().reshape(24, 12)
    assert np.array_equal(filters[12:], -filters[:12])
    values = np.sort(np.linalg.eigvalsh(moments))[::-1]
    # Each filter's output has moment 1, but for the small number in the denominator, and no two go together.
    expected = np.diag(values / (values + 5e-4))
    assert filters[:12] @ moments @ filters[:12].T == pytest.approx(expected, abs=1e-4)
    with torch.no_grad():
        output = F.conv2d(images, weight)[:, 0].square().mean().item()
    assert output == pytest.approx(expected[0, 0], rel=1e-4)


def test_blank_images_do_not_spoil_the_whitening() -> None:
    model = Airbench((8, 8, 8), deep=False, momentum=0.1)
    model.initialize(torch.zeros(2, 3, 32, 32))
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())


def test_convolutions_begin_as_identities() -> None:
    """A group's second convolution hands everything on; its first does as far as there are channels."""
    model = timm.create_model("airbench96", num_classes=10)
    group = model.get_submodule("layer2")
    maps = torch.randn(2, 128, 5, 5)
    with torch.no_grad():
        first: Tensor = group.get_submodule("conv1")(maps)
        assert torch.equal(first[:, :128], maps)
        assert torch.equal(group.get_submodule("conv3")(first), first)


@pytest.mark.usefixtures("small_synthetic")
def test_a_run_whitens_once(tmp_path: Path) -> None:
    """From its own training images, before the first step; a run that goes on has its weights from the state."""
    preset = make_preset(model={"backbone": "airbench94"}, data={"fraction": 0.25}, train={"epochs": 2})
    job = jobs.prepare(preset, where(tmp_path), Listening())
    images = job.loaders.train.preprocessing(job.loaders.train.images)
    with torch.no_grad():
        output = F.conv2d(images, job.model.get_submodule("stem.conv").weight)[:, :12]  # type: ignore[arg-type]
    moments = torch.einsum("nahw,nbhw->ab", output, output) / output[:, 0].numel()
    off_diagonal = moments - moments.diag().diag()
    assert off_diagonal.abs().max() < 1e-3
    assert moments[0, 0].item() == pytest.approx(1, abs=1e-2)

    with pytest.raises(KeyboardInterrupt):
        workflows.train(preset, where(tmp_path / "broken"), StopAfter(3))
    workflows.resume(only_run(tmp_path / "broken"), where(tmp_path / "broken"), Listening())
    result = workflows.train(preset, where(tmp_path / "unbroken"), Listening())
    ends = [only_run(tmp_path / name).path / "model.safetensors" for name in ("broken", "unbroken")]
    assert ends[0].read_bytes() == ends[1].read_bytes()
    assert result["parameters"] - result["trainable_parameters"] == 24 * 12 + 2 * (64 + 256 + 256)


# ------------------------------------------------------------------------------- as timm and PyTorch want them


@pytest.mark.parametrize("name", NAMES)
def test_timm_takes_them_as_its_own(name: str) -> None:
    model: Any
    assert timm.is_model(name)
    assert name in timm.list_models()
    check_backbone(name)
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=100)
        assert (model.get_classifier().out_features, model.get_classifier().in_features) == (100, model.num_features)
        model.reset_classifier(3)
        inputs = torch.zeros(2, 3, 48, 48)
        maps = model.forward_features(inputs)
        assert model(inputs).shape == model.forward_head(maps).shape == (2, 3)
        assert model.forward_head(maps, pre_logits=True).shape == (2, model.num_features)
        model.reset_classifier(0)
        pooled = timm.create_model(name, num_classes=0)
        assert model(inputs).shape == pooled(inputs).shape == (2, model.num_features)


def test_a_slip_of_the_finger() -> None:
    with pytest.raises(UsageError, match=r"did you mean .*wrn28_10"):
        check_backbone("wrn28_1O")
    with pytest.raises(UsageError, match=r"model\.drop_path_rate = 0\.1: resnet9 has no stochastic depth"):
        create_model(Config.model_validate({"model": {"backbone": "resnet9", "drop_path_rate": 0.1}}), classes=10)


@pytest.mark.parametrize("name", ["wrn16_4", "preact_resnet18", "resnet9", "airbench94", "airbench96"])
def test_bf16_channels_last_and_one_graph(name: str) -> None:
    """Under autocast near float32, gradients for all that learns; traced whole by the compiler, the same numbers."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).to(memory_format=torch.channels_last)
    inputs = torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    maps: list[Tensor] = []
    hook = model.get_submodule("layer2").register_forward_hook(lambda *about: maps.append(about[2]))
    exact = model(inputs)
    hook.remove()
    assert maps[0].is_contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(inputs)
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).abs().max() < 0.1 * exact.abs().max()
    rough.float().square().sum().backward()
    for parameter in model.parameters():
        assert (parameter.grad is not None) == parameter.requires_grad

    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(inputs), exact)


@pytest.mark.usefixtures("small_synthetic")
@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_they_learn(tmp_path: Path, head: str) -> None:
    """One batch, again and again: the loss falls."""
    preset = make_preset(model={"backbone": "airbench94", "head": head}, data={"fraction": 0.25, "batch_size": 100})
    job = jobs.prepare(preset, where(tmp_path), Listening())
    training = trainer.prepare_steps(job)
    taken = create_steps(training, job.step_mode)
    losses = [trainer.train_epoch(taken, job.config, epoch, Listening().step)["train_loss"] for epoch in range(1, 7)]
    assert losses[-1] < 0.9 * losses[0]


def test_normalisation_is_that_of_the_data_set() -> None:
    """`data.normalize: backbone` has no weights to go by."""
    cfg = timm.get_pretrained_cfg("wrn16_4")
    assert cfg is not None
    assert (tuple(cfg.mean), tuple(cfg.std)) == (networks.CIFAR_MEAN, networks.CIFAR_STD)

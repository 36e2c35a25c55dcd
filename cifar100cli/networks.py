"""Small networks for images of 32 pixels, registered with timm, so that they are built by name as timm's own are.

Wide ResNets and the ResNet with pre-activation, the ResNet-9 of the DAWNBench races, and the network of airbench. All
are a stem, stages `layer1`, `layer2`, ..., a norm where they end in one, pooling over what is left of the image
(of any size), and a linear classifier.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath  # type: ignore[attr-defined]
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

CIFAR_MEAN, CIFAR_STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)  # of CIFAR-100's pixels from 0 to 1


# --------------------------------------------------------------------------------------------- common parts


class GlobalPool(nn.Module):
    """The mean or the largest value of each channel: (N, C, H, W) to (N, C)."""

    def __init__(self, *, largest: bool = False) -> None:
        super().__init__()
        self.largest = largest

    def forward(self, maps: Tensor) -> Tensor:
        """Unlike `nn.AdaptiveMaxPool2d`, it has a deterministic gradient on CUDA devices."""
        return maps.amax((2, 3)) if self.largest else maps.mean((2, 3))


class ScaledLinear(nn.Linear):
    """A classifier without bias whose logits are multiplied by `scale`: a softer softmax at the beginning."""

    def __init__(self, features: int, classes: int, scale: float) -> None:
        super().__init__(features, classes, bias=False)
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as torch names it
        """(N, features) to (N, classes)."""
        return super().forward(input) * self.scale


class SmallNetwork(nn.Module):
    """What timm and the commands here expect of an image network.

    `logit_scale` 1 is the ordinary classifier with a bias. `num_classes=0` gives the pooled features. `drop_rate` is
    that of the drop-out before the classifier.
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[nn.Module],
        norm: nn.Module,
        features: int,
        *,
        num_classes: int,
        drop_rate: float = 0.0,
        max_pool: bool = False,
        logit_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.num_features = self.head_hidden_size = features
        self.drop_rate, self.logit_scale = drop_rate, logit_scale
        self.stem = stem
        self.stages = [f"layer{number}" for number in range(1, len(stages) + 1)]
        for name, stage in zip(self.stages, stages, strict=True):
            self.add_module(name, stage)
        self.norm = norm
        self.global_pool = GlobalPool(largest=max_pool)
        self.reset_classifier(num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, classes), or to (N, num_features) where there is no classifier."""
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) to the last stage's maps (N, num_features, h, w)."""
        maps: Tensor = self.stem(images)
        for name in self.stages:
            maps = self.get_submodule(name)(maps)
        normed: Tensor = self.norm(maps)
        return normed

    def forward_head(self, maps: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool the maps and classify, or pool them alone."""
        features: Tensor = self.global_pool(maps)
        if self.drop_rate:
            features = F.dropout(features, self.drop_rate, self.training)
        return features if pre_logits else self.fc(features)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier for so many classes, or none for 0."""
        assert global_pool is None, "the pooling is part of these networks"
        self.num_classes = num_classes
        fc: nn.Module = nn.Identity()
        if num_classes and self.logit_scale == 1:
            fc = nn.Linear(self.num_features, num_classes)
            nn.init.zeros_(fc.bias)
        elif num_classes:
            fc = ScaledLinear(self.num_features, num_classes, self.logit_scale)
        self.fc = fc.to(next(self.parameters()).device)

    def get_classifier(self) -> nn.Module:
        """The classifier."""
        return self.fc

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's groups of layers, as patterns of names: the stem, then stages, or the blocks of those in blocks."""
        return {"stem": r"^stem", "blocks": r"^layer(\d+)" if coarse else [*map(self._layers_of, self.stages)]}

    def _layers_of(self, stage: str) -> tuple[str, None]:
        parts, number = self.get_submodule(stage), stage.removeprefix("layer")
        in_blocks = isinstance(parts, nn.Sequential) and all(list(part.children()) for part in parts)
        return rf"^layer({number})" + (r"\.(\d+)" if in_blocks else ""), None


def convolution(before: int, width: int, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    """A convolution without bias that keeps the image's size, but for its stride."""
    return nn.Conv2d(before, width, kernel, stride, padding=kernel // 2, bias=False)


def initialize_for_relu(model: nn.Module) -> None:
    """Normal weights that keep the size of gradients (He et al., "Delving Deep into Rectifiers", arXiv 1502.01852)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


# --------------------------------------------------------------------------------- ResNets with pre-activation


class PreActBlock(nn.Module):
    """Norm, ReLU, convolution, twice, and the input added (He et al., arXiv 1603.05027).

    Where the shape changes, a 1x1 convolution of what the first ReLU gives takes the place of the input. Drop-out is
    between the convolutions, as in Wide ResNets; `drop_path` is the share of images that skip the block.
    """

    def __init__(self, before: int, width: int, stride: int, drop_rate: float, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(before), convolution(before, width, stride=stride)
        self.norm2, self.conv2 = nn.BatchNorm2d(width), convolution(width, width)
        self.dropout = nn.Dropout(drop_rate)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        reshapes = stride != 1 or before != width
        self.shortcut = convolution(before, width, kernel=1, stride=stride) if reshapes else None

    def forward(self, maps: Tensor) -> Tensor:
        """(N, C, H, W) to (N, width, H / stride, W / stride)."""
        active = F.relu(self.norm1(maps), inplace=True)
        kept = maps if self.shortcut is None else self.shortcut(active)
        active = F.relu(self.norm2(self.conv1(active)), inplace=True)
        change: Tensor = self.drop_path(self.conv2(self.dropout(active)))
        return kept + change


class PreActResNet(SmallNetwork):
    """Stages of `PreActBlock`s after one 3x3 convolution; all but the first halve the image's side.

    Stochastic depth (Huang et al., arXiv 1603.09382) grows linearly from 0 in the first block to `drop_path_rate` in
    the last, as in timm's ResNets. `drop_rate` is before the classifier, or with `drop_in_blocks` in every block.
    """

    def __init__(
        self,
        stem_width: int,
        widths: Sequence[int],
        blocks: int,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        drop_in_blocks: bool = False,
    ) -> None:
        in_block, at_head = (drop_rate, 0.0) if drop_in_blocks else (0.0, drop_rate)
        last = max(1, len(widths) * blocks - 1)
        stages, before = [], stem_width
        for stage, width in enumerate(widths):
            parts = []
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                drop_path = drop_path_rate * (stage * blocks + block) / last
                parts.append(PreActBlock(before, width, stride, in_block, drop_path))
                before = width
            stages.append(nn.Sequential(*parts))
        norm = nn.Sequential(OrderedDict(norm=nn.BatchNorm2d(before), act=nn.ReLU(inplace=True)))
        stem = convolution(in_chans, stem_width)
        super().__init__(stem, stages, norm, before, num_classes=num_classes, drop_rate=at_head)
        initialize_for_relu(self)


class WideResNet(PreActResNet):
    """WRN-`depth`-`width` (Zagoruyko and Komodakis, "Wide Residual Networks", arXiv 1605.07146).

    Three stages of (depth - 4) / 6 blocks, of 16, 32 and 64 times `width` channels. `drop_rate` is the paper's, between
    the convolutions of every block.
    """

    def __init__(self, depth: int, width: int, **more: Any) -> None:
        assert depth > 4 and (depth - 4) % 6 == 0, "the depth is 6 n + 4"  # noqa: PT018 - one rule
        super().__init__(16, [16 * width, 32 * width, 64 * width], (depth - 4) // 6, drop_in_blocks=True, **more)


# --------------------------------------------------------------------------------------------------- ResNet-9


def _convolved(before: int, width: int, *, pool: bool = False) -> nn.Sequential:
    """Convolution, norm, ReLU, and a pooling that halves the image's side."""
    parts: list[nn.Module] = [convolution(before, width), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*parts, *([nn.MaxPool2d(2)] if pool else []))


class Residual(nn.Module):
    """The input, and what two convolutions make of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.parts = nn.Sequential(_convolved(width, width), _convolved(width, width))

    def forward(self, maps: Tensor) -> Tensor:
        """(N, C, H, W) to the same."""
        changed: Tensor = self.parts(maps)
        return maps + changed


class ResNet9(SmallNetwork):
    """The network of the fast entries to DAWNBench (Page, "How to Train Your ResNet", 4: Architecture, 2018).

    Eight convolutions and a classifier. As there, the classifier has no bias and its logits are multiplied by 1/8: at
    the high rates that the network is made for, the first steps would else make it too sure of itself.
    """

    def __init__(self, *, num_classes: int = 1000, in_chans: int = 3, drop_rate: float = 0.0) -> None:
        stages = [
            nn.Sequential(_convolved(64, 128, pool=True), Residual(128)),
            _convolved(128, 256, pool=True),
            nn.Sequential(_convolved(256, 512, pool=True), Residual(512)),
        ]
        super().__init__(
            _convolved(in_chans, 64),
            stages,
            nn.Identity(),
            512,
            num_classes=num_classes,
            drop_rate=drop_rate,
            max_pool=True,
            logit_scale=1 / 8,
        )


# --------------------------------------------------------------------------------------------------- airbench


class BiasOnlyBatchNorm(nn.BatchNorm2d):
    """Batch norm whose scale stays 1: a frozen weight, and not none, as cuDNN and PyTorch's SyncBatchNorm want it."""

    def __init__(self, channels: int, momentum: float) -> None:
        super().__init__(channels, momentum=momentum)
        self.weight.requires_grad_(False)


class ConvolutionGroup(nn.Module):
    """Two convolutions, the first followed by a pooling that halves the side; `deep` has a third, and a residual."""

    def __init__(self, before: int, width: int, *, deep: bool, momentum: float) -> None:
        super().__init__()
        self.conv1, self.norm1 = convolution(before, width), BiasOnlyBatchNorm(width, momentum)
        self.conv2, self.norm2 = convolution(width, width), BiasOnlyBatchNorm(width, momentum)
        self.pool = nn.MaxPool2d(2)
        self.deep = deep
        if deep:
            self.conv3, self.norm3 = convolution(width, width), BiasOnlyBatchNorm(width, momentum)

    def forward(self, maps: Tensor) -> Tensor:
        """(N, C, H, W) to (N, width, H // 2, W // 2)."""
        first = F.gelu(self.norm1(self.pool(self.conv1(maps))))
        second = F.gelu(self.norm2(self.conv2(first)))
        return F.gelu(self.norm3(self.conv3(second)) + first) if self.deep else second


class Airbench(SmallNetwork):
    """The networks of airbench (Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", arXiv 2404.00498).

    A frozen 2x2 convolution that whitens patches, which `initialize` sets from training images; three groups of
    convolutions that begin as identities as far as there are channels; norms that learn no scale; the largest value of
    each channel, which for 32 pixels is that of 3x3; logits without bias, multiplied by 1/9.
    """

    def __init__(
        self,
        widths: Sequence[int],
        *,
        deep: bool,
        momentum: float,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
    ) -> None:
        whitened = 2 * in_chans * 2 * 2  # each direction, and its opposite
        whiten = nn.Conv2d(in_chans, whitened, 2)
        whiten.weight.requires_grad_(False)
        assert whiten.bias is not None
        nn.init.zeros_(whiten.bias)
        before = [whitened, *widths[:-1]]
        stages = [
            ConvolutionGroup(b, width, deep=deep, momentum=momentum) for b, width in zip(before, widths, strict=True)
        ]
        super().__init__(
            nn.Sequential(OrderedDict(conv=whiten, act=nn.GELU())),
            stages,
            nn.Identity(),
            widths[-1],
            num_classes=num_classes,
            drop_rate=drop_rate,
            max_pool=True,
            logit_scale=1 / 9,
        )
        for stage in stages:
            for module in stage.children():
                if isinstance(module, nn.Conv2d):  # what is not identity stays as PyTorch draws it
                    nn.init.dirac_(module.weight.data[: module.in_channels])

    @torch.no_grad()
    def initialize(self, images: Tensor) -> None:
        """Make the first convolution whiten patches of images (N, 3, H, W) float32, prepared as in training.

        Its filters are the eigenvectors of the patches' second moments, each divided by the root of its eigenvalue, and
        the opposites of these. A small number is added to the eigenvalues, so that noise is not made large.
        """
        conv = self.get_submodule("stem.conv")
        assert isinstance(conv, nn.Conv2d)
        size = conv.weight[0].numel()
        moments, count = torch.zeros(size, size, dtype=torch.float64), 0
        for some in torch.split(images, 100):
            patches = F.unfold(some, (2, 2)).transpose(1, 2).reshape(-1, size).double()
            moments += patches.T @ patches
            count += len(patches)
        values, vectors = torch.linalg.eigh(moments / count)
        largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
        vectors = vectors * largest.sign()  # an eigenvector's sign is left open: the same one on every machine
        filters = (vectors / (values + 5e-4).sqrt()).T.flip(0)
        conv.weight.copy_(torch.cat([filters, -filters]).view_as(conv.weight))


# ---------------------------------------------------------------------------------------------------- by name

NAMES = (
    *("wrn16_4", "wrn28_10", "wrn40_2", "preact_resnet18", "resnet9"),
    *("airbench94", "airbench94_512", "airbench95", "airbench96"),
)
default_cfgs = generate_default_cfgs(
    {
        name: {
            "url": "",
            "num_classes": 100,
            "input_size": (3, 32, 32),
            "mean": CIFAR_MEAN,
            "std": CIFAR_STD,
            "classifier": "fc",
        }
        for name in NAMES
    }
)


def _build(kind: type[SmallNetwork], name: str, pretrained: bool, **arguments: Any) -> nn.Module:
    network: nn.Module = build_model_with_cfg(kind, name, pretrained, **arguments)
    return network


@register_model
def wrn16_4(pretrained: bool = False, **more: Any) -> nn.Module:
    """WRN-16-4: 2.8 million weights."""
    return _build(WideResNet, "wrn16_4", pretrained, depth=16, width=4, **more)


@register_model
def wrn28_10(pretrained: bool = False, **more: Any) -> nn.Module:
    """WRN-28-10: 36.5 million weights."""
    return _build(WideResNet, "wrn28_10", pretrained, depth=28, width=10, **more)


@register_model
def wrn40_2(pretrained: bool = False, **more: Any) -> nn.Module:
    """WRN-40-2: 2.2 million weights."""
    return _build(WideResNet, "wrn40_2", pretrained, depth=40, width=2, **more)


@register_model
def preact_resnet18(pretrained: bool = False, **more: Any) -> nn.Module:
    """ResNet-18 with pre-activation and a stem for 32 pixels: 11.2 million weights."""
    return _build(
        PreActResNet, "preact_resnet18", pretrained, stem_width=64, widths=(64, 128, 256, 512), blocks=2, **more
    )


@register_model
def resnet9(pretrained: bool = False, **more: Any) -> nn.Module:
    """ResNet-9: 6.6 million weights."""
    return _build(ResNet9, "resnet9", pretrained, **more)


@register_model
def airbench94(pretrained: bool = False, **more: Any) -> nn.Module:
    """airbench's small network: 2.0 million weights. Its batch statistics move quickly, for runs of ten epochs."""
    return _build(Airbench, "airbench94", pretrained, widths=(64, 256, 256), deep=False, momentum=0.4, **more)


@register_model
def airbench94_512(pretrained: bool = False, **more: Any) -> nn.Module:
    """airbench94 with a last group of twice the width, for 100 classes: 4.4 million weights."""
    return _build(Airbench, "airbench94_512", pretrained, widths=(64, 256, 512), deep=False, momentum=0.3, **more)


@register_model
def airbench95(pretrained: bool = False, **more: Any) -> nn.Module:
    """airbench's network between the two, wider than airbench94 and as deep: 4.6 million weights."""
    return _build(Airbench, "airbench95", pretrained, widths=(128, 384, 384), deep=False, momentum=0.3, **more)


@register_model
def airbench96(pretrained: bool = False, **more: Any) -> nn.Module:
    """airbench's larger network, with residuals: 12.8 million weights."""
    return _build(Airbench, "airbench96", pretrained, widths=(128, 512, 512), deep=True, momentum=0.1, **more)

"""Networks: a backbone of timm's or ours with the stem and head that a preset asks for. No training here."""

import socket
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import timm
import torch
from huggingface_hub import constants
from timm.models import PretrainedCfg
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.dropout import _DropoutNd

from cifar100cli import backbones, networks
from cifar100cli.bounded import one_line
from cifar100cli.card import our_network
from cifar100cli.errors import DataError, UsageError, did_you_mean
from cifar100cli.inference import evaluating
from cifar100cli.schema import Config
from cifar100cli.unrolled import unroll
from cifar100cli.weights import WithoutMemory, load_backbone


def check_backbone(name: str) -> None:
    """Raise `UsageError`, with the nearest name, for a backbone that timm does not know."""
    if not timm.is_model(name):
        raise backbones.unknown(name, timm.list_models())
    architecture, _, weights = backbones.present_name(name).partition(".")
    known = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")] if weights else []
    if weights and weights not in known:
        hint = f"{did_you_mean(weights, known)} (there are {', '.join(known)})" if known else ""
        raise UsageError(f"model.backbone = {name}: timm has no weights {weights!r} of {architecture}{hint}")


class CosineHead(nn.Module):
    """Features to an embedding, and its cosine to a learned vector of each class, times `scale`.

    A linear layer without bias, batch norm, then cosines in float32 whatever the autocast (of a network in float64, in
    that). The output is logits (N, classes) of this type; a margin loss divides the scale out again.
    """

    def __init__(self, features: int, embedding_dim: int, classes: int, scale: float) -> None:
        super().__init__()
        self.embed = nn.Linear(features, embedding_dim, bias=False)
        self.norm = nn.BatchNorm1d(embedding_dim)
        self.class_vectors = nn.Parameter(torch.empty(classes, embedding_dim))
        self.scale = scale
        nn.init.normal_(self.class_vectors, std=0.01)

    def forward(self, features: Tensor) -> Tensor:
        """(N, features) to (N, classes)."""
        embedding = self.norm(self.embed(features))
        with torch.autocast(embedding.device.type, enabled=False):
            dtype = torch.promote_types(self.class_vectors.dtype, torch.float32)
            cosines = F.linear(F.normalize(embedding.to(dtype)), F.normalize(self.class_vectors.to(dtype)))
            return self.scale * cosines


def create_model(config: Config, classes: int, *, pretrained: bool | None = None) -> nn.Module:
    """Build the network for `classes` classes, with random weights, timm's ImageNet weights, or those of a file.

    `pretrained=False` leaves out the weights that the preset asks for, for a caller that loads its own.
    Raises `UsageError` for a backbone, stem or image size that do not go together, `DataError` when the
    weights cannot be had or do not fit.
    """
    name = config.model.backbone
    check_backbone(name)
    wants_weights = config.model.pretrained if pretrained is None else pretrained
    file = config.model.weights if wants_weights else None
    from_timm = wants_weights and file is None
    if from_timm and ((source := _described(name)) is None or not source.has_weights):
        raise DataError(
            f"model.pretrained = true: no weights of {name} are published; start from random ones with "
            "--set model.pretrained=false, or name a file of your own with --weights FILE"
        )
    with _hub_asked_once() if from_timm else nullcontext():
        model = _backbone(config, classes, from_timm=from_timm)
    # ImageNet's weights have ImageNet's stem; a checkpoint of ours has its own.
    ours = our_network(Path(file)) if file is not None else None
    stem_is_in_the_file = ours is not None and ours.stem == config.model.stem
    if ours is not None and ours.backbone == name and ours.stem == "cifar" and not stem_is_in_the_file:
        raise DataError(
            f"{file}: holds {name} with the stem for 32 pixels, and this run has it with ImageNet's; "
            "--set model.stem=cifar takes the same network"
        )
    if config.model.stem == "cifar" and stem_is_in_the_file:
        _use_cifar_stem(model, name)
    if ours is not None and ours.backbone == name:
        _use_image_size(model, name, ours.image_size)
    if file is not None:
        load_backbone(model, Path(file), name, classifiers(model))
    if config.model.stem == "cifar" and not stem_is_in_the_file:
        _use_cifar_stem(model, name)
    _use_image_size(model, name, config.data.image_size)
    output = _check_image_size(model, name, config.data.image_size)
    if output.ndim != 2 or (config.model.head == "linear" and output.shape[1] != classes):
        raise UsageError(
            f"model.backbone = {name}: makes {'x'.join(map(str, output.shape[1:]))} numbers of an image, and "
            "classifies nothing; use another backbone, such as resnet18"
        )
    if config.data.first_image_size is not None:
        for size in sorted({config.image_size_in(epoch) for epoch in range(1, config.train.epochs)}):
            _check_image_size(model, name, size, key="first_image_size")
    model = _with_head(model, output.shape[1], config, classes)
    unroll(model)
    return model


def _backbone(config: Config, classes: int, *, from_timm: bool) -> nn.Module:
    """timm's network, with the classifier if it is to have timm's; `from_timm` with its ImageNet weights."""
    name = config.model.backbone
    rates = {key: getattr(config.model, key) for key in DROP_RATES}
    try:
        outputs = classes if config.model.head == "linear" else 0  # 0: timm gives the pooled features
        model = _with_rates(name, rates, pretrained=from_timm, num_classes=outputs)
    except UsageError:
        raise
    except Exception as error:
        if from_timm:
            raise DataError(_no_weights(name, error)) from None
        reason = one_line(error, 200)
        raise UsageError(f"model.backbone = {name}: timm cannot build it here: {reason}") from None
    for key, rate in rates.items():
        if rate and not drops(model, key):
            raise UsageError(_takes_no(key, rate, name))
    return model


def _with_rates(name: str, rates: Mapping[str, Any], **keys: Any) -> nn.Module:
    """timm's network with these drop-out rates. Zeros are passed, too: many networks drop something by default."""
    try:
        return timm.create_model(backbones.present_name(name), **keys, **rates)
    except TypeError as error:
        unknown = next((key for key in rates if f"'{key}'" in str(error)), None)
        if unknown is None:
            raise
        if rates[unknown]:
            raise UsageError(_takes_no(unknown, rates[unknown], name)) from None
        return _with_rates(name, {key: rate for key, rate in rates.items() if key != unknown}, **keys)


def _with_head(model: nn.Module, features: int, config: Config, classes: int) -> nn.Module:
    """The backbone, and behind it the cosine head if there is to be one."""
    if config.model.head == "linear":
        return model
    head = CosineHead(features, config.model.embedding_dim, classes, config.loss.scale)
    return nn.Sequential(OrderedDict(backbone=model, head=head))


def outline(config: Config, classes: int) -> dict[str, Tensor]:
    """The tensors of the network that `create_model` builds, by name, without memory for what is in them.

    Raises `UsageError` for a backbone or stem that there is not.
    """
    check_backbone(config.model.backbone)
    with WithoutMemory():
        model = _backbone(config, classes, from_timm=False)
        if config.model.stem == "cifar":
            _use_cifar_stem(model, config.model.backbone)
        _use_image_size(model, config.model.backbone, config.data.image_size)
        model = _with_head(model, getattr(model, "head_hidden_size", 0), config, classes)
    tensors: dict[str, Tensor] = model.state_dict()
    return tensors


def initialize(model: nn.Module, images: Tensor) -> None:
    """Set the weights that some networks compute from training images (airbench's whitening).

    `images` are some of these, (N, 3, S, S) float32, as the network will see them.
    """
    backbone = getattr(model, "backbone", model)
    if isinstance(backbone, networks.Airbench):
        backbone.initialize(images)


DROP_RATES = ("drop_rate", "drop_path_rate")


def drops(model: nn.Module, key: str) -> bool:
    """Whether a drop-out rate has reached any part of the network that is in training mode.

    Some of timm's networks swallow what they do not know, and what is frozen drops nothing.
    """
    training = [module for module in model.modules() if module.training]
    if key == "drop_path_rate":
        return any(getattr(module, "drop_prob", 0) for module in training)
    return any(getattr(m, "drop_rate", 0) or (isinstance(m, _DropoutNd) and m.p) for m in training)


def _takes_no(key: str, rate: float, name: str) -> str:
    what = {"drop_rate": "drop-out", "drop_path_rate": "stochastic depth"}[key]
    return f"model.{key} = {rate:g}: {name} has no {what}; leave it at 0, or use another backbone, such as resnet18"


def _no_weights(name: str, error: BaseException) -> str:
    """Why timm's weights cannot be had, and what to do."""
    source = _described(name)
    place = source and (source.hf_hub_id or source.url)
    while error.__cause__ is not None:  # the hub's own words are general advice
        error = error.__cause__
    reason = one_line(error, 200)
    if constants.HF_HUB_OFFLINE:
        reason = "they are not in the cache and the model hub cannot be reached from here"
    return (
        f"the ImageNet weights of {name} cannot be had ({place}): {reason}; fetch them elsewhere and name the file "
        f"with --weights FILE, or copy the cache folder {constants.HF_HUB_CACHE} here, or start from random weights "
        "with --set model.pretrained=false"
    )


def _described(name: str) -> PretrainedCfg | None:
    """What timm knows of a network's weights; of networks of a user's own, it is nothing."""
    return timm.get_pretrained_cfg(backbones.present_name(name), allow_unregistered=True)


def classifiers(model: nn.Module) -> tuple[str, ...]:
    """The modules of timm's network that give the classes: what is new for new classes.

    `model` is one that `create_model` built. Raises `UsageError` for a network of a user's own that does not say.
    """
    backbone: Any = getattr(model, "backbone", model)
    named = (getattr(backbone, "pretrained_cfg", None) or {}).get("classifier")
    if named:
        return (named,) if isinstance(named, str) else tuple(named)
    given = backbone.get_classifier() if hasattr(backbone, "get_classifier") else None
    found = tuple(name for name, module in backbone.named_modules() if name and module is given)
    if not found:
        raise UsageError(
            f"model.backbone: {type(backbone).__name__} does not say which of its layers gives the classes; it needs a "
            "get_classifier(), as timm's networks have"
        )
    return found


Colour = tuple[float, float, float]


def backbone_normalization(name: str) -> tuple[Colour, Colour]:
    """Mean and deviation of pixels from 0 to 1 that timm's weights of this network were trained with."""
    check_backbone(name)
    source = _described(name)
    if source is None:
        raise UsageError(f"data.normalize = backbone: timm knows no mean and deviation for {name}; use dataset")
    (red, green, blue), (r, g, b) = source.mean, source.std
    return (float(red), float(green), float(blue)), (float(r), float(g), float(b))


@contextmanager
def _hub_asked_once() -> Iterator[None]:
    """Spare the user a minute of retries: where the hub does not answer, only its cache is looked at."""
    offline = constants.HF_HUB_OFFLINE
    if not offline and not _hub_answers():
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline


def _hub_answers() -> bool:
    """Whether the model hub takes a connection within 5 s; taken for granted behind a proxy."""
    address = urlsplit(constants.ENDPOINT)
    if address.scheme in getproxies() and not proxy_bypass(address.hostname or ""):
        return True
    try:
        port = address.port or (443 if address.scheme == "https" else 80)
        socket.create_connection((address.hostname or "", port), timeout=5).close()
    except OSError:
        return False
    return True


def _use_cifar_stem(model: nn.Module, name: str) -> None:
    """Replace the 7x7 stride-2 convolution and the pooling by one 3x3 convolution of stride 1.

    As in the CIFAR experiments of "Deep Residual Learning" (He et al., 2015): 32x32 images keep their
    resolution until the first strided stage. A deep stem has 3x3 convolutions already, and takes no stride.
    """
    conv1 = getattr(model, "conv1", None)
    first: object = conv1[0] if isinstance(conv1, nn.Sequential) else conv1
    if not isinstance(first, nn.Conv2d) or not hasattr(model, "maxpool"):
        raise UsageError(
            f"model.stem = cifar: {name} has no ResNet stem to replace; use model.stem=imagenet, or a ResNet"
        )
    if isinstance(conv1, nn.Conv2d):
        model.conv1 = nn.Conv2d(3, conv1.out_channels, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    else:
        first.stride = (1, 1)
    model.maxpool = nn.Identity()


def _use_image_size(model: nn.Module, name: str, image_size: int) -> None:
    """Fit a network that is made for one size of image to another; most take any, and are left alone.

    A transformer's position embeddings are resampled to the new grid of patches, as timm does.
    """
    fit, patches = getattr(model, "set_input_size", None), getattr(model, "patch_embed", None)
    if fit is None or getattr(patches, "img_size", None) == (image_size, image_size):
        return
    patch = getattr(patches, "patch_size", None)
    side = patch[0] if isinstance(patch, tuple) else 1
    if image_size % side:
        raise UsageError(
            f"data.image_size = {image_size}: {name} cuts images into squares of {side} pixels; use a multiple of that"
        )
    try:
        with warnings.catch_warnings(action="ignore"):  # timm's, on its way to the relative positions of a small grid
            fit(img_size=image_size)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UsageError(_cannot_take("image_size", image_size, name, error)) from None


def _cannot_take(key: str, image_size: int, name: str, error: Exception) -> str:
    hint = "try a larger one, or a multiple of the network's patch or stride"
    return f"data.{key} = {image_size}: {name} cannot take it ({one_line(error)}); {hint}"


def _check_image_size(model: nn.Module, name: str, image_size: int, key: str = "image_size") -> Tensor:
    """Try one blank image, so that a size that the network cannot take is a word and not a traceback."""
    try:
        with evaluating(model), torch.inference_mode():
            output: Tensor = model(torch.zeros(1, 3, image_size, image_size))
            return output
    except (RuntimeError, AssertionError, ValueError, IndexError) as error:
        raise UsageError(_cannot_take(key, image_size, name, error)) from None


def count_parameters(model: nn.Module, *, trainable: bool = False) -> int:
    """How many numbers the network has, or of those, how many training moves."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)

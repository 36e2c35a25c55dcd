"""Groups of weights against timm's own, and the matrices that are a network's hidden layers."""

import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.optim._param_groups import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from cifar100cli import jobs, trainer
from cifar100cli.errors import UsageError
from cifar100cli.models import CosineHead, classifiers
from cifar100cli.optim import Group, by_layer, create_optimizer, divided, everything, hidden_weights, without_decay
from tests.conftest import Listening, make_preset, where

NETWORKS = ("resnet18", "test_vit", "test_convnext", "test_efficientnet", "test_vit2")
PATTERNS = "xcit_nano_12_p16_224"  # names what does not decay by patterns


def network(name: str, classes: int = 10) -> nn.Module:
    return timm.create_model(name, num_classes=classes)


def cosine(name: str) -> nn.Module:
    model = nn.Sequential()
    model.backbone = network(name, 0)
    model.head = CosineHead(8, 4, 10, 8.0)
    return model


def named(model: nn.Module, groups: list[Group]) -> dict[str, Group]:
    group_of = {parameter: group for group in groups for parameter in group.parameters}
    assert len(group_of) == sum(len(group.parameters) for group in groups), "every weight once"
    return {name: group_of[p] for name, p in model.named_parameters() if p in group_of}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_rates_of_layers_are_timms(name: str) -> None:
    model = network(name)
    expected = {
        parameter: group["lr_scale"]
        for group in param_groups_layer_decay(model, layer_decay=0.7)
        for parameter in group["params"]
    }
    found = named(model, by_layer(model, name, 0.7))
    assert len(set(expected.values())) > 3
    for weight, parameter in model.named_parameters():
        assert found[weight].scale == pytest.approx(expected[parameter]), weight
    for weight, parameter in model.get_submodule(classifiers(model)[0]).named_parameters():
        assert expected[parameter] == 1, weight


@pytest.mark.parametrize("name", NETWORKS)
def test_a_head_of_ours_is_a_layer_behind_timms(name: str) -> None:
    plain, model = network(name), cosine(name)
    ours = named(model, by_layer(model, name, 0.7))
    theirs = named(plain, by_layer(plain, name, 0.7))
    for weight, group in ours.items():
        inside = weight.startswith("backbone.")
        assert group.scale == pytest.approx(theirs[weight.removeprefix("backbone.")].scale if inside else 1), weight


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("airbench94", ["stem", "layer1", "layer2", "layer3", "fc"]),
        ("airbench96", ["stem", "layer1", "layer2", "layer3", "fc"]),
        ("resnet9", ["stem", "layer1.0", "layer1.1", "layer2", "layer3.0", "layer3.1", "fc"]),
        ("wrn16_4", ["stem", *(f"layer{stage}.{block}" for stage in (1, 2, 3) for block in (0, 1)), "fc"]),
    ],
)
def test_the_rates_of_our_own_networks_fall_from_layer_to_layer(name: str, layers: list[str]) -> None:
    """A convolution learns as fast as its norm, and each layer slower than the one behind it."""
    model = network(name)
    for weight, group in named(model, by_layer(model, name, 0.5)).items():
        layer = next((number for number, start in enumerate(layers) if weight.startswith(f"{start}.")), len(layers) - 1)
        assert group.scale == 0.5 ** (len(layers) - 1 - layer), weight


def test_frozen_weights_are_in_no_layer() -> None:
    model = network("resnet18")
    model.get_submodule("layer1").requires_grad_(False)
    found = named(model, by_layer(model, "resnet18", 0.5))
    assert not any(weight.startswith("layer1") for weight in found)
    whole = network("resnet18")
    assert found["conv1.weight"].scale == named(whole, by_layer(whole, "resnet18", 0.5))["conv1.weight"].scale


def test_a_network_without_layers() -> None:
    with pytest.raises(UsageError, match=r"optimizer\.layer_decay: timm names no layers of mine"):
        by_layer(nn.Linear(2, 2), "mine", 0.5)


@pytest.mark.parametrize("name", [*NETWORKS, PATTERNS])
def test_what_does_not_decay_is_timms(name: str) -> None:
    model = network(name)
    exempt: Any = getattr(model, "no_weight_decay", set)()
    without, decaying = param_groups_weight_decay(model, 0.1, no_weight_decay_list=exempt)
    assert (without["weight_decay"], decaying["weight_decay"]) == (0, 0.1)
    groups = divided(everything(model), exempt=without_decay(model))
    for decay, expected in ((False, without), (True, decaying)):
        found = {parameter for group in groups if group.decay == decay for parameter in group.parameters}
        assert found == set(expected["params"])


def test_a_bias_decays_in_no_shape() -> None:
    """As timm has it."""
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].bias = nn.Parameter(torch.zeros(1, 3))
    without, _ = param_groups_weight_decay(model, 0.1)
    assert without_decay(model) == without["params"] == [model[0].bias]


def test_groups_that_need_no_parting_stay_as_they_are() -> None:
    model = network("resnet18")
    groups = [Group(list(model.get_submodule(part).parameters()), 0.1) for part in ("layer1", "fc")]
    assert divided(groups) == groups


def names_of(model: nn.Module, weights: list[nn.Parameter]) -> list[str]:
    return [name for name, parameter in model.named_parameters() if any(parameter is weight for weight in weights)]


def test_hidden_weights_of_a_resnet() -> None:
    model = network("resnet18")
    found = names_of(model, hidden_weights(model, ["fc"]))
    assert found == [name for name, p in model.named_parameters() if p.ndim == 4 and name != "conv1.weight"]
    assert len(found) == 19


def test_hidden_weights_of_a_transformer() -> None:
    name = "test_vit"
    model = cosine(name)
    found = names_of(model, hidden_weights(model, ["head"]))
    parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert found == [f"backbone.blocks.{block}.{part}.weight" for block in range(6) for part in parts]


def test_filters_in_groups_are_no_matrices() -> None:
    model = network("test_efficientnet")
    found = names_of(model, hidden_weights(model, ["classifier"]))
    assert found
    assert not any("conv_dw" in name or name.startswith(("conv_stem", "classifier")) for name in found)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_first_layer_is_timms_stem(name: str) -> None:
    model = network(name)
    configuration: Any = model.pretrained_cfg
    stem = model.get_submodule(configuration["first_conv"]).weight
    hidden = hidden_weights(model, classifiers(model))
    assert hidden
    assert all(weight is not stem for weight in hidden)


def test_frozen_weights_are_not_hidden() -> None:
    model = network("resnet18").requires_grad_(False)
    assert hidden_weights(model, ["fc"]) == []


# ---------------------------------------------------------------------------------------------------- in a run


def prepared(tmp_path: Path, **sections: dict[str, Any]) -> tuple[trainer.Job, Listening]:
    watcher = Listening()
    return jobs.prepare(make_preset(**sections), where(tmp_path), watcher), watcher


@pytest.mark.usefixtures("small_synthetic")
@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_a_run_has_all_kinds_of_groups(tmp_path: Path, head: str) -> None:
    optimizer = {"name": "muon", "lr": 0.1, "layer_decay": 0.5, "decay_norms": False}
    job, watcher = prepared(tmp_path, optimizer=optimizer, model={"head": head})
    found = named(job.model, job.groups)
    assert set(found) == {name for name, _ in job.model.named_parameters()}
    for name, parameter in job.model.named_parameters():
        in_head = name.startswith(("fc", "head"))
        assert found[name].decay == (parameter.ndim > 1), name
        reads_pixels = name.removeprefix("backbone.") == "conv1.0.weight"
        assert found[name].hidden == (parameter.ndim == 4 and not reads_pixels), name
        assert (found[name].scale == 1) == in_head, name
    depth = -math.log2(min(group.scale for group in job.groups))
    rate = f"{0.1 * 0.5**depth:.2g}"
    assert watcher.said == [f"layers: {depth + 1:.0f}; the rate falls from 0.1 at the head to {rate} at the stem"]


@pytest.mark.usefixtures("small_synthetic")
def test_a_run_as_ever_has_one_group(tmp_path: Path) -> None:
    job, watcher = prepared(tmp_path)
    assert job.groups == everything(job.model)
    assert watcher.said == []


@pytest.mark.usefixtures("small_synthetic")
def test_stages_keep_their_rates_when_they_are_parted(tmp_path: Path) -> None:
    finetune = {"unfreeze": "layer4", "stage_decay": 0.1}
    job, _ = prepared(tmp_path, optimizer={"name": "muon", "decay_norms": False}, finetune=finetune)
    found = named(job.model, job.groups)
    assert {name for name, group in found.items() if group.scale == 1} == {"fc.weight", "fc.bias"}
    assert {group.scale for group in job.groups} == {1, 0.1}
    assert {group.hidden for group in job.groups if group.scale == 0.1} == {True, False}


@pytest.mark.usefixtures("small_synthetic")
def test_muon_without_a_matrix(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"optimizer\.name = muon: no matrix of a hidden layer.*use adamw"):
        prepared(tmp_path, optimizer={"name": "muon"}, finetune={"unfreeze": "fc"})


@pytest.mark.usefixtures("small_synthetic")
@pytest.mark.parametrize("sections", [{"finetune": {"unfreeze": "layer3", "cache": "off"}}, {}])
def test_rates_are_told_as_they_are(tmp_path: Path, sections: dict[str, Any]) -> None:
    """Muon moves the matrices; the head, the stem, norms and biases have a rate of their own."""
    decay = {} if sections else {"layer_decay": 0.5}
    optimizer = {"name": "muon", "lr": 0.02, "auxiliary_lr": 0.001, "adjust_lr": "original", **decay}
    job, watcher = prepared(tmp_path, optimizer=optimizer, **sections)
    made = create_optimizer(job.config.optimizer, job.groups)
    rates = {p: group["lr"] for group in made.param_groups for p in group["params"]}
    rate_of = {name: rates[p] for name, p in job.model.named_parameters() if p in rates}
    assert "norms, the head and the stem learn at 0.05 times the rate of the matrices" in watcher.said[-1]
    matrix, norm = (rate_of[f"layer4.0.{name}.weight"] for name in ("conv1", "bn1"))
    assert norm == pytest.approx(0.05 * matrix)
    if sections:
        told = {row.name: row.rate for row in watcher.shown}
        assert (told["fc"], told["layer4"]) == pytest.approx((rate_of["fc.weight"], matrix))
    else:
        stem = rate_of["conv1.0.weight"]
        assert f"from {rate_of['fc.weight']:g} at the head to {stem:.2g} at the stem" in watcher.said[-2]

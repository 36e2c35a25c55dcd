"""Stages of timm's networks: what is frozen stays, what learns has its rate, and the parted network is the whole."""

import copy
from typing import Any

import pytest
import torch
from timm.layers import DropPath  # type: ignore[attr-defined]
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cifar100cli import schema
from cifar100cli.errors import UsageError
from cifar100cli.models import classifiers, create_model
from cifar100cli.optim import Group, create_optimizer, set_learning_rate
from cifar100cli.schema import Config
from cifar100cli.stages import Parted, Stage, freeze, learning_stages, stage_rows, stages_of


def build(name: str, head: str = "linear", size: int = 64, **more: Any) -> tuple[nn.Module, list[Stage]]:
    torch.manual_seed(0)
    config = Config.model_validate(
        {"model": {"backbone": name, "head": head, "embedding_dim": 16, **more}, "data": {"image_size": size}}
    )
    model = create_model(config, classes=10)
    return model, stages_of(model, name, classifiers(model))


NAMES = {
    "resnet18": ["stem", "layer1", "layer2", "layer3", "layer4", "fc"],
    "tf_efficientnet_lite0": ["stem", *(f"blocks.{index}" for index in range(7)), "classifier"],
    "convnext_atto": ["stem", *(f"stages.{index}" for index in range(4)), "head.fc"],
    "regnety_002": ["stem", "s1", "s2", "s3", "s4", "head.fc"],
    "mobilenetv3_small_050": ["stem", *(f"blocks.{index}" for index in range(6)), "classifier"],
    "wrn16_4": ["stem", "layer1", "layer2", "layer3", "fc"],
    "resnet9": ["stem", "layer1", "layer2", "layer3", "fc"],
    "airbench94": ["stem", "layer1", "layer2", "layer3", "fc"],
    "densenet121": ["stem", *(f"features.denseblock{number}" for number in range(1, 5)), "classifier"],
}


def test_the_study_and_its_kin_are_known_without_pytorch() -> None:
    for name in schema.RESNETS:
        _, stages = build(name)
        assert {*("head", "all"), *(stage.name for stage in stages)} == set(schema.DEPTHS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_every_weight_is_in_one_stage(name: str, head: str) -> None:
    model, stages = build(name, head)
    expected = NAMES[name] if head == "linear" else [*NAMES[name][:-1], "head"]
    assert [stage.name for stage in stages] == expected
    found = [id(parameter) for stage in stages for parameter in stage.parameters(model)]
    assert sorted(found) == sorted(id(parameter) for parameter in model.parameters())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("unfreeze", ["fc", "layer4", "layer3"])
def test_the_parted_network_is_the_whole_one(name: str, unfreeze: str) -> None:
    model, stages = build(name)
    kept = learning_stages(stages, unfreeze, name)
    parted = Parted(model, kept[0].start)
    inputs = torch.randn(2, 3, 64, 64)
    assert parted.is_exact(inputs)
    model.eval()
    with torch.no_grad():
        whole, features = model(inputs), parted.front(inputs)
        parted.switch_front(on=False)
        torch.testing.assert_close(model(features), whole, rtol=1e-5, atol=1e-5)
        parted.switch_front(on=True)
        assert torch.equal(model(inputs), whole)


@pytest.mark.parametrize(
    ("name", "unfreeze"), [("vgg11_bn", "layer4"), ("wrn16_4", "layer1"), ("resnet18", "layer4"), ("resnet9", "fc")]
)
def test_a_norm_that_learns_is_not_folded_into_what_is_frozen(name: str, unfreeze: str) -> None:
    """Even if it is the norm of the frozen part's last convolution."""
    model, stages = build(name, size=32)
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        nn.init.normal_(norm.running_mean, std=0.3)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
        nn.init.normal_(norm.weight, 1.0, 0.7)
        nn.init.normal_(norm.bias, std=0.3)
    parted = Parted(model, learning_stages(stages, unfreeze, name)[0].start)
    inputs = torch.randn(2, 3, 32, 32)
    whole = parted.front(inputs)
    parted.fold(inputs)
    torch.testing.assert_close(parted.front(inputs), whole, rtol=0, atol=float(1e-5 * whole.abs().max()))


def test_a_network_that_is_no_chain_is_found_out() -> None:
    """A vision transformer adds its positions to whatever it is given."""
    model, stages = build("test_vit", size=160)
    inputs = torch.randn(2, 3, 160, 160)
    assert not Parted(model, learning_stages(stages, "layer4", "test_vit")[0].start).is_exact(inputs)
    assert torch.isfinite(model(inputs)).all()


@pytest.mark.parametrize(
    ("name", "unfreeze", "size"),
    [("hrnet_w18_small", "layer4", 64), ("crossvit_tiny_240", "layer4", 240), ("selecsls42b", "layer3", 64)],
)
def test_stages_that_hand_on_a_list_are_no_chain(name: str, unfreeze: str, size: int) -> None:
    model, stages = build(name, size=size)
    parted = Parted(model, learning_stages(stages, unfreeze, name)[0].start)
    assert not parted.is_exact(torch.randn(2, 3, size, size))
    assert torch.isfinite(model(torch.randn(2, 3, size, size))).all()


@pytest.mark.parametrize(
    ("unfreeze", "expected"),
    [
        ("fc", ["fc"]),
        ("head", ["fc"]),
        ("layer4", ["layer4", "fc"]),
        ("layer3", ["layer3", "layer4", "fc"]),
        ("layer1", ["layer1", "layer2", "layer3", "layer4", "fc"]),
        ("all", ["stem", "layer1", "layer2", "layer3", "layer4", "fc"]),
    ],
)
def test_what_learns(unfreeze: str, expected: list[str]) -> None:
    _, stages = build("resnet18")
    assert [stage.name for stage in learning_stages(stages, unfreeze, "resnet18")] == expected


def test_names_of_any_network() -> None:
    _, stages = build("tf_efficientnet_lite0")
    assert [s.name for s in learning_stages(stages, "layer3", "x")] == ["blocks.5", "blocks.6", "classifier"]
    assert [s.name for s in learning_stages(stages, "blocks.6", "x")] == ["blocks.6", "classifier"]
    with pytest.raises(
        UsageError, match=r"lite0 has no such stage; did you mean layer\d\? \(it has fc, layer4, .*blocks.6"
    ):
        learning_stages(stages, "layer9", "tf_efficientnet_lite0")


@pytest.mark.parametrize("name", ["airbench94", "resnet9", "wrn16_4"])
def test_depths_of_networks_with_three_stages(name: str) -> None:
    """`layer3` is how deep to unfreeze, in every network, and not the last stage where it happens to be named so."""
    _, stages = build(name)
    assert [s.name for s in learning_stages(stages, "layer4", name)] == ["layer3", "fc"]
    assert [s.name for s in learning_stages(stages, "layer3", name)] == ["layer2", "layer3", "fc"]
    assert [s.name for s in learning_stages(stages, "layer1", name)] == ["layer1", "layer2", "layer3", "fc"]


@pytest.mark.parametrize("name", ["inception_v3", "inception_resnet_v2"])
def test_groups_that_are_a_function_of_the_name(name: str) -> None:
    """All weights are in a stage, each in one."""
    model, stages = build(name, size=96)
    found = [id(weight) for stage in stages for weight in stage.parameters(model)]
    assert sorted(found) == sorted(id(weight) for weight in model.parameters())


@pytest.mark.parametrize(("name", "words"), [("rdnet_tiny", "timm names no stages"), ("coat_tiny", "share weights")])
def test_networks_without_stages_of_their_own(name: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        build(name, size=224)


def state(model: nn.Module, stages: list[Stage]) -> dict[str, dict[str, torch.Tensor]]:
    """The weights and statistics of each stage."""
    content = copy.deepcopy(model.state_dict())
    return {s.name: {n: t for n, t in content.items() if n.rpartition(".")[0] in s.modules} for s in stages}


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0", "densenet121"])
@pytest.mark.parametrize("adapt", [False, True])
def test_frozen_means_frozen(name: str, adapt: bool) -> None:
    """Compared by bytes after three steps; with `adapt` the statistics, and they alone, move."""
    model, stages = build(name)
    kept = learning_stages(stages, "layer4", name)
    freeze(model, stages, kept, adapt=adapt)
    groups = [Group(list(stage.parameters(model))) for stage in kept]
    optimizer = create_optimizer(Config().optimizer, groups)
    before = state(model, stages)
    for _ in range(3):
        model.train()
        model(torch.randn(4, 3, 64, 64)).square().mean().backward()
        optimizer.step()
    after = state(model, stages)
    for stage in stages:
        moved = {n for n, t in before[stage.name].items() if not torch.equal(t, after[stage.name][n])}
        statistics = {n for n in before[stage.name] if n.endswith(("running_mean", "running_var", "tracked"))}
        if stage in kept:
            assert moved >= {n for n in before[stage.name] if n.endswith("weight")}
        else:
            assert moved == (statistics if adapt else set())


def test_what_a_network_holds_fixed_stays_so() -> None:
    model, stages = build("airbench94", size=32)
    fixed = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert fixed == {"stem.conv.weight", *(f"layer{n}.norm{m}.weight" for n in (1, 2, 3) for m in (1, 2))}
    freeze(model, stages, learning_stages(stages, "all", "airbench94"), adapt=False)
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == fixed


@pytest.mark.parametrize("name", ["convnext_atto", "resnet18", "tf_efficientnet_lite0"])
@pytest.mark.parametrize("adapt", [False, True])
def test_drop_out_in_a_frozen_stage_is_off(name: str, adapt: bool) -> None:
    """And stochastic depth; the batch norms alone are in the network's mode, where their statistics may move."""
    model, stages = build(name, drop_path_rate=0.5)
    freeze(model, stages, learning_stages(stages, "fc", name), adapt=adapt)
    copied = copy.deepcopy(model)
    for mode in (True, False, True):
        model.train(mode)
        norms = {module.training for module in model.modules() if isinstance(module, _BatchNorm)}
        assert norms <= {mode and adapt}
        depth = {module.training for module in model.modules() if isinstance(module, DropPath)}
        assert depth == {False}
        assert model.get_submodule(classifiers(model)[0]).training is mode
    copied.eval()
    assert model.training, "a copy has modes of its own"
    assert {m.training for m in model.modules() if isinstance(m, _BatchNorm)} <= {adapt}


def test_rates_fall_from_the_head() -> None:
    model, stages = build("resnet18")
    kept = learning_stages(stages, "layer3", "resnet18")
    scales = {stage.name: 0.1**depth for depth, stage in enumerate(reversed(kept))}
    optimizer = create_optimizer(
        Config.model_validate({"optimizer": {"name": "adam", "lr": 0.001}}).optimizer,
        [Group(list(stage.parameters(model)), scales[stage.name]) for stage in kept],
    )
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-5, 1e-4, 1e-3])
    set_learning_rate(optimizer, 0.01)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-4, 1e-3, 1e-2])
    rows = {
        row.name: row
        for row in stage_rows(model, stages, {name: 0.001 * scale for name, scale in scales.items()}, "frozen")
    }
    assert (rows["layer3"].rate, rows["layer4"].rate, rows["fc"].rate) == pytest.approx((1e-5, 1e-4, 1e-3))
    assert rows["layer2"].rate is None
    assert [rows[name].norm for name in ("layer2", "layer3", "fc")] == ["frozen", "moves", "none"]
    assert sum(row.parameters for row in rows.values()) == sum(p.numel() for p in model.parameters())


def test_rates_equal_torchs_own_groups() -> None:
    """Five steps of Adam with a rate for each stage, against torch's plain Adam with the same groups."""
    ours, stages = build("test_resnet", size=32)
    theirs = copy.deepcopy(ours)
    kept = learning_stages(stages, "layer3", "test_resnet")
    freeze(ours, stages, kept, adapt=False)
    config: dict[str, Any] = {"optimizer": {"name": "adam", "lr": 0.01, "weight_decay": 0.0}}
    scales = [0.01, 0.1, 1.0]
    groups = [Group(list(stage.parameters(ours)), scale) for stage, scale in zip(kept, scales, strict=True)]
    optimizer = create_optimizer(Config.model_validate(config).optimizer, groups)
    reference = torch.optim.Adam(
        [
            {"params": list(stage.parameters(theirs)), "lr": 0.01 * scale}
            for stage, scale in zip(kept, scales, strict=True)
        ],
        foreach=False,
    )
    ours.train()
    theirs.train()
    for stage in stages:
        if stage not in kept:
            for module in stage.norms(theirs):
                module.eval()
    for step in range(5):
        inputs = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(step))
        for model, one in ((ours, optimizer), (theirs, reference)):
            one.zero_grad()
            model(inputs).square().mean().backward()
            one.step()
    for stage in stages:
        for mine, other in zip(stage.parameters(ours), stage.parameters(theirs), strict=True):
            torch.testing.assert_close(mine, other)

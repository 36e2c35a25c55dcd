"""Names of networks, read from sources, against timm's own registry."""

import subprocess
import sys

import pytest
import timm

from cifar100cli import backbones
from cifar100cli.errors import UsageError
from cifar100cli.networks import __name__ as _ours  # registers our networks with timm  # noqa: F401

ALL = [*timm.list_models(), *timm.list_models(pretrained=True), "resnet18.a1_in1k"]


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As before timm is loaded."""
    monkeypatch.delitem(sys.modules, "timm")


def test_names_are_timms() -> None:
    assert backbones.names() == sorted(timm.list_models())


@pytest.mark.usefixtures("unloaded")
def test_every_name_that_timm_knows_passes() -> None:
    from timm.models import _registry

    for name in {*ALL, *_registry._model_entrypoints}:  # names of earlier versions are in the latter alone
        backbones.check(name, "--backbone")


def test_earlier_names_have_present_ones() -> None:
    from timm.models import _registry

    present = {*timm.list_models(), *timm.list_models(include_tags=True)}
    earlier = _registry._model_entrypoints.keys() - present
    assert len(earlier) > 100
    unheard_of = {backbones.present_name(name) for name in earlier} - present
    assert unheard_of <= {"vit_base_patch16_224.sam", "vit_base_patch32_224.sam"}, "two slips of timm 1.0.31's"
    assert backbones.present_name("mnasnet_b1") == "mnasnet_100"
    assert [backbones.present_name(name) for name in ALL] == ALL


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    ("name", "near"),
    [("resnet1888", "resnet18"), ("ResNet18.", "resnet18"), ("airbench_94", "airbench94"), ("effnet(", "")],
)
def test_a_slip_is_told(name: str, near: str) -> None:
    with pytest.raises(UsageError, match=r"\(--backbone\): timm has no such model") as raised:
        backbones.check(name, "--backbone")
    assert near in str(raised.value)


@pytest.mark.usefixtures("unloaded")
def test_sources_that_are_not_there_refuse_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbones, "_sources", lambda: "")
    backbones.check("resnet18", "--backbone")


def test_networks_of_the_callers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where timm is loaded it knows more than its files say."""
    backbones.check("a_network_of_my_own", "overrides")


def test_neither_timm_nor_torch_is_imported() -> None:
    script = "import sys; from cifar100cli import backbones; backbones.check('resnet18', ''); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "timm"} & set(loaded)

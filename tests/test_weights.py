"""Files of pretrained weights: both formats, both libraries' names, and every way in which one may not fit."""

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from cifar100cli import checkpoint
from cifar100cli.errors import ChangedWeights, DataError, UsageError
from cifar100cli.models import create_model
from cifar100cli.schema import Config
from cifar100cli.weights import load_backbone, read_weights
from tests.conftest import TINY, Cli

State = dict[str, Tensor]


def config(path: Path, backbone: str = "test_resnet", **model: object) -> Config:
    return Config.model_validate({"model": {"backbone": backbone, "pretrained": True, "weights": str(path), **model}})


def trained_state(name: str = "test_resnet") -> State:
    """Weights that no initialisation gives, so that what was not loaded shows."""
    torch.manual_seed(7)
    model = timm.create_model(name)
    return {key: t + 0.1 * torch.rand_like(t) if t.is_floating_point() else t for key, t in model.state_dict().items()}


def save_safetensors(state: State, path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)


SAVERS: dict[str, Callable[[State, Path], None]] = {
    "safetensors": save_safetensors,
    "PyTorch": torch.save,
    "PyTorch, legacy": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    "a training checkpoint": lambda state, path: torch.save({"epoch": 3, "state_dict": state}, path),
    "of DataParallel": lambda state, path: torch.save({f"module.{k}": t for k, t in state.items()}, path),
    "of compiled DataParallel": lambda state, path: torch.save(
        {f"_orig_mod.module.{k}": t for k, t in state.items()}, path
    ),
    "of Lightning, compiled": lambda state, path: torch.save(
        {"state_dict": {f"model._orig_mod.{k}": t for k, t in state.items()}}, path
    ),
    "of an AveragedModel": lambda state, path: torch.save(
        {"n_averaged": torch.tensor(5), **{f"module.{k}": t for k, t in state.items()}}, path
    ),
    "of torch.compile": lambda state, path: torch.save({f"_orig_mod.{k}": t for k, t in state.items()}, path),
    "without counters": lambda state, path: save_safetensors(
        {k: t for k, t in state.items() if "num_batches" not in k}, path
    ),
}


@pytest.mark.parametrize("kind", SAVERS)
def test_what_is_in_the_file_is_in_the_network(tmp_path: Path, kind: str) -> None:
    state = trained_state()
    SAVERS[kind](state, tmp_path / "weights")
    model = create_model(config(tmp_path / "weights"), classes=7)
    loaded = model.state_dict()
    for name, tensor in state.items():
        if not name.startswith("fc.") and "num_batches" not in name:
            assert torch.equal(loaded[name], tensor), name
    assert loaded["fc.weight"].shape[0] == 7  # the head is new

    theirs = timm.create_model("test_resnet", num_classes=0)
    theirs.load_state_dict({name: tensor for name, tensor in state.items() if not name.startswith("fc.")})
    cosine = create_model(config(tmp_path / "weights", head="cosine"), classes=7)
    inputs = torch.randn(2, 3, 32, 32)
    cosine.eval()
    torch.testing.assert_close(cosine.backbone(inputs), theirs.eval()(inputs))  # type: ignore[operator]


def test_our_own_checkpoint_gives_its_backbone(tmp_path: Path) -> None:
    first = create_model(Config.model_validate({"model": {"backbone": "test_resnet", "head": "cosine"}}), classes=5)
    save_safetensors(first.state_dict(), tmp_path / "model.safetensors")
    second = create_model(config(tmp_path / "model.safetensors"), classes=9)
    inputs = torch.randn(2, 3, 32, 32)
    first.eval()
    assert torch.equal(features(second, inputs), first.backbone(inputs))  # type: ignore[operator]


def test_damaged_weights_are_not_begun_from_without_a_word(tmp_path: Path) -> None:
    """A checkpoint of ours has a checksum, which whoever reads it looks at."""
    from tests.test_checkpoint import flip_a_bit, make_card, make_model

    path = tmp_path / "model.safetensors"
    checkpoint.save_model(path, make_model().state_dict(), make_card())
    create_model(config(path), classes=9)
    flip_a_bit(path)
    with pytest.warns(ChangedWeights, match="they were changed since, or damaged"):
        create_model(config(path), classes=9)


class Tabled(nn.Linear):
    """With a table of places of its own, as timm's EfficientFormer has."""

    def __init__(self) -> None:
        super().__init__(3, 2)
        self.register_buffer("table", torch.arange(4))


def test_tables_of_whole_numbers_are_no_weights(tmp_path: Path) -> None:
    """A network makes them for itself: those that it has are taken where they fit, and others are left."""
    path, weights = tmp_path / "weights.safetensors", {"weight": torch.rand(2, 3), "bias": torch.rand(2)}
    own = torch.arange(4)
    for more, expected in (
        ({}, own),
        ({"offsets": torch.arange(3), "mask": torch.ones(2, dtype=torch.bool), "table": own.flip(0)}, own.flip(0)),
        ({"table": torch.zeros(3, dtype=torch.int64)}, own),
        ({"table": own.flip(0).int()}, own),
    ):
        save_safetensors({**weights, **more}, path)
        model = Tabled()
        load_backbone(model, path, "resnet18", head=())
        assert torch.equal(model.weight, weights["weight"])
        assert torch.equal(model.get_buffer("table"), expected)


def test_a_table_of_places_that_there_are_not_is_refused(tmp_path: Path) -> None:
    name, table = "efficientformer_l1", "stages.3.blocks.4.token_mixer.attention_bias_idxs"
    path = tmp_path / "weights.safetensors"
    state = timm.create_model(name).state_dict()
    save_safetensors({**state, table: state[table] + 1000}, path)
    about = config(path, name).model_dump(include={"model"})
    with pytest.raises(UsageError, match="efficientformer_l1 cannot take it"):
        create_model(Config.model_validate({**about, "data": {"image_size": 224}}), classes=7)


def test_position_embeddings_are_resampled_as_timm_does(tmp_path: Path) -> None:
    """From a file for timm's own size, and from there by a checkpoint of ours for another size."""

    def at(size: int, weights: str) -> Config:
        model = {"backbone": "test_vit", "pretrained": True, "weights": str(tmp_path / weights)}
        return Config.model_validate({"model": model, "data": {"image_size": size}})

    state = trained_state("test_vit")
    save_safetensors(state, tmp_path / "160")
    ours = create_model(at(96, "160"), classes=10)
    theirs = timm.create_model("test_vit", img_size=96)
    theirs.load_state_dict(checkpoint_filter_fn(dict(state), theirs))  # type: ignore[arg-type]
    images = torch.randn(2, 3, 96, 96)
    theirs.eval().reset_classifier(0)  # type: ignore[operator]
    with torch.inference_mode():
        torch.testing.assert_close(features(ours, images), theirs(images))

    pixels = {"image_size": 96, "mean": [0, 0, 0], "std": [1, 1, 1]}
    about = {"format": 1, "preset": "x", "dataset": "cifar100", "classes": ["a", "b"], **pixels}
    about["config"] = at(96, "160").model_dump(mode="json", exclude_none=True)
    save_file(ours.state_dict(), tmp_path / "96.safetensors", metadata={"cifar100": json.dumps(about)})
    again = create_model(at(96, "96.safetensors"), classes=7)
    assert torch.equal(features(again, images), features(ours, images))
    larger = create_model(at(192, "96.safetensors"), classes=7)
    assert larger.get_parameter("pos_embed").shape[1] == 144 + 1


@pytest.mark.parametrize(
    ("builder", "name"),
    [
        *(("resnet18", "resnet18"), ("efficientnet_b0", "efficientnet_b0"), ("mobilenet_v2", "mobilenetv2_100")),
        *(("densenet121", "densenet121"), ("mobilenet_v3_small", "mobilenetv3_small_100")),
        *(("mnasnet0_5", "mnasnet_050"), ("mnasnet1_0", "mnasnet_b1")),
    ],
)
def test_torchvisions_names(tmp_path: Path, builder: str, name: str) -> None:
    """The network with torchvision's weights computes what torchvision's network computes.

    Of MobileNetV3 a linear layer is a convolution in timm's; and DenseNet's names are older in the published files.
    `mnasnet_b1` is what timm once called a network.
    """
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(builder, weights=None)
    with torch.no_grad():
        for module in theirs.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.1, 0.1)  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
                module.weight.uniform_(0.8, 1.2)
    published = {re.sub(r"(denselayer\d+\.(norm|conv))", r"\1.", n): t for n, t in theirs.state_dict().items()}
    torch.save(published, tmp_path / "weights.pth")
    ours = create_model(config(tmp_path / "weights.pth", name), classes=100)
    head = [module for module in theirs.modules() if isinstance(module, nn.Linear)][-1]
    seen: list[Tensor] = []
    head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    inputs = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        theirs.eval()(inputs)
    torch.testing.assert_close(features(ours, inputs), seen[0], rtol=1e-4, atol=1e-4)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("pwned",))


def features(model: nn.Module, inputs: Tensor) -> Tensor:
    """What timm's network gives to its classifier."""
    with torch.inference_mode():
        found: Tensor = model.forward_head(model.eval().forward_features(inputs), pre_logits=True)  # type: ignore[operator]
        return found


def refusal(path: Path, backbone: str = "test_resnet") -> str:
    with pytest.raises(DataError) as refused:
        create_model(config(path, backbone), classes=10)
    message = str(refused.value)
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 400 + len(str(path))
    return message


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    state = trained_state()
    save_safetensors({name: t for name, t in state.items() if name != "layer2.0.conv1.weight"}, path)
    assert "does not fit test_resnet: it lacks layer2.0.conv1.weight" in refusal(path)
    save_safetensors({**state, "layer9.weight": torch.zeros(3)}, path)
    assert "has besides layer9.weight" in refusal(path)
    save_safetensors({**state, "bn1.bias": torch.zeros(1, 2)}, path)
    assert "another shape for bn1.bias (1x2, not " in refusal(path)
    save_safetensors({**state, "bn1.weight": torch.full_like(state["bn1.weight"], torch.nan)}, path)
    assert "bn1.weight holds numbers that are not finite" in refusal(path)
    counters = {name: torch.zeros(3, dtype=torch.int64) for name in state if name.endswith("num_batches_tracked")}
    assert counters
    save_safetensors({**state, **counters}, path)  # of no use, and of no harm
    create_model(config(path, "test_resnet"), classes=10)
    save_safetensors(trained_state("test_vit"), path)
    message = refusal(path)
    assert "it lacks conv1" in message
    assert "more" in message
    torch.save(torchvision.models.get_model("mobilenet_v3_small").state_dict(), path)
    assert "MobileNetV3 of torchvision's, which computes something else" in refusal(path, "tf_mobilenetv3_small_100")
    assert "MobileNetV3 of torchvision's, which cannot be translated" in refusal(path, "mobilenetv3_small_075")


def test_a_network_of_torchvisions_is_looked_for_by_shapes_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of RegNets, which compute with tensors as they are built, the largest has 640 million weights to be drawn."""
    path = tmp_path / "weights.pth"
    torch.save(torchvision.models.get_model("regnet_y_400mf").state_dict(), path)
    build, drawn = torchvision.models.get_model, []

    def noted(name: str, **more: Any) -> nn.Module:
        model: nn.Module = build(name, **more)
        if next(model.parameters()).device.type == "cpu":
            drawn.append(name)
        return model

    monkeypatch.setattr(torchvision.models, "get_model", noted)
    monkeypatch.setattr(torchvision.models, "list_models", lambda module: ["regnet_y_800mf", "regnet_y_400mf"])
    assert "RegNet of torchvision's, which computes something else" in refusal(path, "regnety_004")
    assert drawn == ["regnet_y_400mf"]


def test_what_is_no_file_of_weights(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "weights.pth"
    assert "no such file" in refusal(path)
    state = trained_state()
    torch.save(state, path)
    whole = path.read_bytes()
    for content in (b"", b"<html>404</html>", whole[:1000], whole[:-100], b"\x80\x02}q\x00.", b"\x10" * 8 + b"{" * 50):
        path.write_bytes(content)
        refusal(path)
    path.write_bytes(pickle.dumps({"conv1.weight": Evil()}))
    assert "refused" in refusal(path)
    torch.save({"state_dict": {"conv1.weight": Evil()}}, path)
    assert "refused" in refusal(path)
    torch.save(timm.create_model("test_resnet"), path)
    assert "refused" in refusal(path)
    torch.save({"conv1.weight": 3}, path)
    assert "conv1.weight" in refusal(path)
    torch.save([1, 2], path)
    assert "state dict" in refusal(path)
    assert "pwned" not in capfd.readouterr().out


def test_weights_of_a_wrapper_are_not_mistaken(tmp_path: Path) -> None:
    """A network whose own parts are called model.* keeps its names when something stands beside them."""
    save_safetensors({"model.weight": torch.zeros(1), "other.weight": torch.zeros(1)}, tmp_path / "w.safetensors")
    assert set(read_weights(tmp_path / "w.safetensors")) == {"model.weight", "other.weight"}


@pytest.mark.usefixtures("small_synthetic")
def test_on_the_command_line(run_cli: Cli, tmp_path: Path) -> None:
    save_safetensors(trained_state(), tmp_path / "good.safetensors")
    save_safetensors(trained_state("test_vit"), tmp_path / "other.safetensors")
    outcome = run_cli("train", *TINY, "--epochs", "1", "--weights", "good.safetensors")
    assert outcome.code == 0, outcome.err
    assert f"weights of {tmp_path / 'good.safetensors'}" in outcome.err
    for arguments, code, words in (
        (["--weights", "none.safetensors"], 3, "no such file"),
        (["--weights", "other.safetensors"], 3, "does not fit test_resnet: it lacks conv1"),
        (
            ["--weights", "good.safetensors", "--no-pretrained"],
            2,
            "model.pretrained = false: they exclude each other",
        ),
    ):
        outcome = run_cli("train", *TINY, *arguments)
        assert (outcome.code, len(outcome.err.splitlines())) == (code, 1), outcome.err
        assert words in outcome.err


@pytest.mark.usefixtures("small_synthetic")
def test_a_run_that_has_an_epoch_needs_the_file_no_more(run_cli: Cli, tmp_path: Path) -> None:
    save_safetensors(trained_state(), tmp_path / "good.safetensors")
    run = run_cli("train", *TINY, "--epochs", "2", "--weights", "good.safetensors", "--json")
    (folder,) = (tmp_path / "runs" / "quickstart").iterdir()
    (folder / "result.json").unlink()
    (tmp_path / "good.safetensors").unlink()
    again = run_cli("train", "--resume", "last", "--json")
    assert (again.code, again.out) == (0, run.out), again.err

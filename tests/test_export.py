"""ONNX files: computed by ONNX Runtime, against the model in PyTorch."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from cifar100cli import checkpoint, export, extras, synthetic
from cifar100cli.card import Card
from cifar100cli.classifier import ImagesToLogits
from cifar100cli.models import create_model
from cifar100cli.schema import Config
from tests.conftest import TINY, Cli


@pytest.fixture(params=["plain", "enlarged, with a margin"])
def run(request: pytest.FixtureRequest, run_cli: Cli, small_synthetic: synthetic.Drawn) -> str:
    """A run on drawn images, normalised and at 32 or 48 pixels."""
    more = ("--loss", "arcface", "--set", "model.head=cosine", "--image-size", "48") if request.param != "plain" else ()
    outcome = run_cli("train", *TINY, "--epochs", "1", *more, "--json")
    assert outcome.code == 0, outcome.err
    run_dir: str = json.loads(outcome.out)["run_dir"]
    return run_dir


def test_the_graph_computes_what_the_model_does(run: str, run_cli: Cli) -> None:
    outcome = run_cli("export", run, "--out", "model.onnx", "--json")
    assert outcome.code == 0, outcome.err
    result: dict[str, Any] = json.loads(outcome.out)
    assert result["largest_difference"] < 1e-4
    assert sorted(path.name for path in Path().glob("*.onnx*")) == ["model.onnx"], "one file, weights and all"
    assert result["bytes"] == Path("model.onnx").stat().st_size
    onnx.checker.check_model("model.onnx", full_check=True)

    saved = checkpoint.load_model(Path(run))
    session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    random = np.random.default_rng(1)
    for count in (1, 5):  # others than it was exported and checked with
        images = random.integers(0, 256, (count, 3, 32, 32), np.uint8)
        (found,) = session.run(None, {"images": images})
        pixels = torch.from_numpy(images).double() / 255
        mean, std = (
            torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (saved.card.mean, saved.card.std)
        )
        side = saved.card.image_size
        inputs = nn.functional.interpolate((pixels - mean) / std, (side, side), mode="bilinear")
        with torch.inference_mode():
            expected = saved.model.eval()(inputs.float())
        assert found == pytest.approx(expected.numpy(), abs=1e-4)

    about = {entry.key: entry.value for entry in onnx.load("model.onnx").metadata_props}
    assert tuple(json.loads(about["classes"])) == saved.card.classes
    assert len(json.loads(about["superclasses"])) == len(saved.card.classes)
    assert (about["preset"], about["image_size"]) == ("quickstart", str(saved.card.image_size))
    (given,) = session.get_inputs()
    assert (given.name, given.type, given.shape[1:]) == ("images", "tensor(uint8)", [3, 32, 32])
    assert isinstance(given.shape[0], str), "a batch of any size"


@pytest.mark.parametrize("name", ["resnet9", "airbench94", "wrn16_4", "test_vit"])
def test_networks_of_our_own_and_a_transformer(tmp_path: Path, name: str) -> None:
    """Untrained, with batch statistics of noise."""
    torch.manual_seed(0)
    config = Config.model_validate({"data": {"image_size": 32}, "model": {"backbone": name, "drop_rate": 0.3}})
    model = create_model(config, classes=3)
    with torch.no_grad():
        model(torch.randn(16, 3, 32, 32))
    card = Card(
        format=1,
        preset="mine",
        dataset="cifar10",
        classes=("a", "b", "c"),
        image_size=32,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        unseen={"cifar10": 0.0},
        config=config.model_dump(mode="json"),
    )
    checkpoint.save_model(tmp_path / "model.safetensors", model.state_dict(), card)
    export.export(tmp_path / "model.safetensors", tmp_path / "model.onnx")
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), np.uint8)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": images})
    with torch.inference_mode():
        expected = model.eval()((torch.from_numpy(images) / 255 - 0.5) / 0.25)
    assert found == pytest.approx(expected.numpy(), abs=1e-4)


@pytest.fixture
def plain(run_cli: Cli, small_synthetic: synthetic.Drawn) -> str:
    outcome = run_cli("train", *TINY, "--epochs", "1", "--json")
    run_dir: str = json.loads(outcome.out)["run_dir"]
    return run_dir


def test_a_graph_that_is_wrong_gets_no_name(plain: str, run_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    written = export._written

    def other_weights(network: ImagesToLogits, card: Card) -> tuple[bytes, int]:
        content, opset = written(network, card)
        with torch.no_grad():
            next(network.parameters()).add_(0.01)
        return content, opset

    monkeypatch.setattr(export, "_written", other_weights)
    Path("model.onnx").write_text("what was there before")
    outcome = run_cli("export", plain, "--out", "model.onnx")
    assert (outcome.code, len(outcome.err.splitlines())) == (1, 1)
    assert "differs from the model" in outcome.err
    assert Path("model.onnx").read_text() == "what was there before"
    assert sorted(path.name for path in Path().iterdir()) == ["model.onnx", "runs"]


@pytest.mark.parametrize(
    ("part", "words"), [("_written", "cannot write test_resnet as ONNX"), ("_check", "ONNX Runtime cannot compute")]
)
def test_what_the_exporter_cannot_take_is_told_in_words(
    plain: str, run_cli: Cli, monkeypatch: pytest.MonkeyPatch, part: str, words: str
) -> None:
    """Its errors, and the runtime's, are of many kinds."""

    def fail(*_: object) -> None:
        try:
            raise ArithmeticError("Constraints violated (batch)!\nFor more information, run with TORCH_LOGS")
        except ArithmeticError as error:
            raise LookupError("Failed to export the model. This is step 1/3. Next steps: ...") from error

    monkeypatch.setattr(export, part, fail)
    outcome = run_cli("export", plain, "--out", "model.onnx")
    assert (outcome.code, len(outcome.err.splitlines())) == (1, 1)
    assert words in outcome.err
    assert "Constraints violated (batch)!" in outcome.err, "and not the advice around it"
    assert not Path("model.onnx").exists()


def test_large_weights_are_in_the_file_or_refused(plain: str, run_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch puts those above a threshold of its own into a second file; more than 2 GiB there cannot be in one."""
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 0)
    outcome = run_cli("export", plain, "--out", "model.onnx")
    assert outcome.code == 0, outcome.err
    assert sorted(path.name for path in Path().iterdir()) == ["model.onnx", "runs"]
    onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    Path("model.onnx").unlink()

    weights = sum(tensor.nbytes for tensor in checkpoint.load_model(Path(plain)).model.state_dict().values())
    monkeypatch.setattr(export, "MOST_BYTES", weights - 1)
    outcome = run_cli("export", plain, "--out", "model.onnx")
    assert (outcome.code, len(outcome.err.splitlines())) == (1, 1)
    assert "GB of weights, and an ONNX file holds at most 2" in outcome.err
    assert not Path("model.onnx").exists()


def test_what_cannot_be_exported_is_told_at_once(plain: str, run_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, code, words in (
        ((plain, "--out", "model.pt"), 2, "must end in .onnx"),
        ((plain, "--out", "nowhere/model.onnx"), 2, "its folder does not exist"),
        ((plain,), 2, "--out"),
        (("nowhere", "--out", "model.onnx"), 3, "no such run"),
    ):
        outcome = run_cli("export", *arguments)
        assert (outcome.code, len(outcome.err.splitlines())) == (code, 1), outcome.err
        assert words in outcome.err
    monkeypatch.setattr(extras, "EXPORT", ("onnx", "not_installed"))
    outcome = run_cli("export", plain, "--out", "model.onnx")
    assert outcome.code == 2
    assert "export needs not_installed: pip install not_installed" in outcome.err

"""Files of weights and training state: what comes back, and what is refused."""

import json
import math
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cifar100cli import checkpoint, devices, runs, tensors
from cifar100cli.card import KEY, Card
from cifar100cli.errors import ChangedWeights, DataError
from cifar100cli.models import create_model
from cifar100cli.optim import MovingAverage, create_optimizer, everything
from cifar100cli.schema import Config
from cifar100cli.tensors import checksum
from cifar100cli.watcher import TrainState
from tests.conftest import Cli, Trained

CONFIG = Config.model_validate({"model": {"backbone": "test_resnet"}})


def make_card(**changes: object) -> Card:
    content = {
        "format": 1,
        "preset": "mine",
        "dataset": "cifar10",
        "classes": tuple("abc"),
        "image_size": 32,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.25, 0.25, 0.25),
        "config": CONFIG.model_dump(mode="json"),
    }
    return Card.model_validate(content | changes)


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return create_model(CONFIG, classes=3).to(memory_format=torch.channels_last)


def trained(model: nn.Module) -> Trained:
    return Trained(model, create_optimizer(CONFIG.optimizer, everything(model)))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    checkpoint.save_model(path, make_model().state_dict(), make_card())
    return path


def test_a_file_is_enough(saved: Path) -> None:
    found = checkpoint.load_model(saved)
    assert found.card == make_card()
    assert found.preprocessing.mean == (0.5, 0.5, 0.5)
    inputs = torch.randn(2, 3, 32, 32)
    model = found.model.to(memory_format=torch.channels_last)  # as the other is, so that the same kernels run
    assert torch.equal(model.eval()(inputs), make_model().eval()(inputs))
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]  # no temporary file is left


def edit(path: Path, *, about: dict[str, object] | None = None, tensors: dict[str, torch.Tensor] | None = None) -> None:
    """Write the file again with something changed."""
    saved = checkpoint.read(path)
    old_tensors, old_about = saved.tensors, saved.about
    content = {**old_tensors, **(tensors or {})}
    metadata = {KEY: json.dumps({**old_about, "crc32": checksum(content), **(about or {})})}
    save_file(content, path, metadata)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) - 1000] ^= 1
    path.write_bytes(content)


def test_a_bit_that_fell_over(saved: Path, tmp_path: Path, run_cli: Cli) -> None:
    """Weights that were changed since are told, and may be meant so; a run does not go on from them."""
    written = checkpoint.read(saved)
    assert written.about["crc32"] == zlib.crc32(
        b"".join(name.encode() + written.tensors[name].numpy().tobytes() for name in sorted(written.tensors))
    )
    flip_a_bit(saved)
    told = f"{saved}: its weights are not those that training wrote: they were changed since, or damaged"
    with pytest.warns(ChangedWeights, match=re.escape(told)):
        checkpoint.load_model(saved)
    assert run_cli("export", saved, "--out", "a.onnx").err.splitlines().count(told) == 1
    assert told in run_cli("export", saved, "--out", "b.onnx", "--quiet").err
    state = tmp_path / "state.safetensors"
    checkpoint.save_state(state, checkpoint.snapshot(TrainState(1, 1, 0.5), trained(make_model())))
    checkpoint.read_state(state)
    flip_a_bit(state)
    with pytest.raises(DataError, match="its numbers are not those that were written"):
        checkpoint.read_state(state)


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ({"format": 2}, "newer cifar100"),
        ({"format": "x"}, "format number"),
        ({"format": 0}, "format number"),
        ({"classes": ["only one"]}, "not right at 'classes'"),
        ({"classes": ["a", "b", "c", "d"]}, "another shape for fc"),
        ({"mean": [0.0]}, "'mean"),
        ({"image_size": -1}, "'image_size'"),
        ({"config": {"model": {"backbone": "resnet18"}}}, "does not fit the model"),
        ({"config": {"model": {"backbone": "nothing"}}}, "no such model"),
        ({"config": {"modle": {}}}, "unknown key"),
        ({"config": {"train": {"epochs": "many"}}}, "train.epochs"),
    ],
)
def test_descriptions_that_are_not_right(saved: Path, about: dict[str, object], words: str) -> None:
    edit(saved, about=about)
    with pytest.raises(DataError, match=words) as refusal:
        checkpoint.load_model(saved)
    assert str(saved) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_huge_network_of_a_few_bytes_takes_no_memory(tmp_path: Path) -> None:
    """Each has gigabytes of weights by its name: refused in a process that takes less than a quarter of one for all."""
    names = ("vit_giant_patch14_224", "eva_giant_patch14_224", "resnetv2_152x4_bit")
    for name in names:
        config = {"model": {"backbone": name}, "data": {"image_size": 224}}
        about = make_card(image_size=224, config=config).model_dump(mode="json")
        save_file({"fc.weight": torch.zeros(3, 64)}, tmp_path / f"{name}.safetensors", {KEY: json.dumps(about)})
    script = """
import sys, torch
from cifar100cli import checkpoint, cli, devices
cpu = torch.device("cpu")
before = devices.peak_memory(cpu)
for name in sys.argv[1:]:
    sys.argv = ["cifar100", "evaluate", f"{name}.safetensors", "--device", "cpu"]
    try:
        cli.main()
    except SystemExit as leaving:
        print(leaving.code, devices.peak_memory(cpu) - before)
"""
    command = [sys.executable, "-c", script, *names]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    lines = finished.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["3"] * len(names), finished.stderr
    assert finished.stderr.count("does not fit the model: it lacks") == len(names)
    assert int(lines[-1].split()[1]) < 2**28


def test_a_card_of_other_images_than_its_preset(saved: Path) -> None:
    edit(saved, about={"image_size": 96})
    with pytest.raises(DataError, match="its description is not right at 'image_size'"):
        checkpoint.load_model(saved)


def test_weights_that_do_not_fit(saved: Path) -> None:
    edit(saved, tensors={"extra.weight": torch.zeros(1)})
    with pytest.raises(DataError, match=r"has besides what the model has extra\.weight"):
        checkpoint.load_model(saved)


def test_weights_that_are_not_finite(saved: Path) -> None:
    edit(saved, tensors={"fc.bias": torch.tensor([0.0, float("nan"), 0.0])})
    with pytest.raises(DataError, match=r"fc\.bias holds numbers that are not finite"):
        checkpoint.load_model(saved)


def test_a_table_that_is_not_the_networks_own(saved: Path) -> None:
    """As of relative positions, which would be looked up beyond what is there."""
    model = make_model()
    model.register_buffer("places", torch.tensor([[0, 1], [1, 0]]))
    own = model.state_dict()
    checkpoint.load_weights(model, {**own, "bn1.num_batches_tracked": torch.tensor(7)}, saved)
    with pytest.raises(DataError, match="corrupt: places is not the table that its network makes for itself"):
        checkpoint.load_weights(model, {**own, "places": own["places"] + 1}, saved)


@pytest.mark.parametrize("content", [b"", b"x", b"\xff" * 100, b"\x08\0\0\0\0\0\0\0{}      ", b"<html></html>" * 50])
def test_files_that_are_no_checkpoint(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"model\.safetensors"):
        checkpoint.load_model(path)


def test_every_truncation_is_refused(saved: Path) -> None:
    content = saved.read_bytes()
    for length in (7, 8, 100, len(content) // 2, len(content) - 1):
        saved.write_bytes(content[:length])
        with pytest.raises(DataError, match="corrupt"):
            checkpoint.load_model(saved)


def test_a_foreign_safetensors_file(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(DataError, match="not written by cifar100"):
        checkpoint.load_model(tmp_path / "other.safetensors")


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_training_state_comes_back_to_the_bit(tmp_path: Path, name: str) -> None:
    config = Config.model_validate({"optimizer": {"name": name}}).optimizer

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
        for seed in seeds:
            optimizer.zero_grad()
            model(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
            optimizer.step()

    model = make_model()
    optimizer = create_optimizer(config, everything(model))
    steps(model, optimizer, range(3))
    checkpoint.save_state(tmp_path / "state", checkpoint.snapshot(TrainState(3, 2, 0.5), Trained(model, optimizer)))
    steps(model, optimizer, range(3, 6))

    other = make_model(seed=1)
    optimizer = create_optimizer(config, everything(other))
    found = checkpoint.restore(checkpoint.read_state(tmp_path / "state"), Trained(other, optimizer))
    assert found == TrainState(3, 2, 0.5)
    steps(other, optimizer, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_state_of_a_network_with_a_weight_that_nothing_uses(tmp_path: Path, name: str) -> None:
    """An optimizer may keep nothing of what has no gradient."""
    model = make_model()
    model.register_parameter("unused", nn.Parameter(torch.ones(2)))
    config = Config.model_validate({"optimizer": {"name": name}}).optimizer
    state = Trained(model, create_optimizer(config, everything(model)))
    model(torch.randn(4, 3, 32, 32)).square().mean().backward()
    state.optimizer.step()
    checkpoint.save_state(tmp_path / "state", checkpoint.snapshot(TrainState(1, 1, 0.5), state))
    assert checkpoint.restore(checkpoint.read_state(tmp_path / "state"), state) == TrainState(1, 1, 0.5)


def test_a_state_of_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An older one would go on with other batches than it began with."""
    model = create_model(CONFIG, 4, pretrained=False)
    optimizer = create_optimizer(CONFIG.optimizer, everything(model))
    for number, words in ((1, "older cifar100.*train anew"), (3, "newer cifar100")):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "STATE_FORMAT", number)
            checkpoint.save_state(tmp_path / "state", checkpoint.snapshot(TrainState(), Trained(model, optimizer)))
        with pytest.raises(DataError, match=words):
            checkpoint.read_state(tmp_path / "state")


def test_a_state_is_no_model_and_a_model_no_state(saved: Path, tmp_path: Path) -> None:
    checkpoint.save_state(tmp_path / "state", checkpoint.snapshot(TrainState(), trained(make_model())))
    with pytest.raises(DataError, match=r"is a training state.*the model is .*model\.safetensors"):
        checkpoint.load_model(tmp_path / "state")
    with pytest.raises(DataError, match="holds a model"):
        checkpoint.read_state(saved)


def test_a_state_of_another_model(tmp_path: Path) -> None:
    checkpoint.save_state(tmp_path / "state", checkpoint.snapshot(TrainState(), trained(make_model())))
    other = trained(create_model(CONFIG, classes=4))
    with pytest.raises(DataError, match="does not fit"):
        checkpoint.restore(checkpoint.read_state(tmp_path / "state"), other)


@pytest.mark.parametrize("shape", [(), (2,), (7, 7)])
@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_a_state_whose_optimizer_has_other_shapes(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    """PyTorch's fused optimizers believe the state, and would write beyond its end."""
    config = Config.model_validate({"optimizer": {"name": name}}).optimizer
    model = make_model()
    optimizer = create_optimizer(config, everything(model))
    model(torch.randn(4, 3, 32, 32)).square().mean().backward()
    optimizer.step()
    state = Trained(model, optimizer)
    checkpoint.save_state(tmp_path / "state", checkpoint.snapshot(TrainState(1, 1, 0.5), state))
    sound = checkpoint.read_state(tmp_path / "state")
    checkpoint.restore(sound, state)
    moments = [key for key in sound.tensors if key.endswith(("exp_avg", "momentum_buffer"))]
    assert moments
    edit(tmp_path / "state", tensors={moments[0]: torch.zeros(shape)})
    with pytest.raises(DataError, match=f"training state of this run .*{re.escape(moments[0])} has another shape"):
        checkpoint.restore(checkpoint.read_state(tmp_path / "state"), state)


@pytest.mark.parametrize(("name", "other"), [("sgd", "adamw"), ("adamw", "sgd"), ("adam", "sgd")])
def test_a_state_of_another_optimizer(tmp_path: Path, name: str, other: str) -> None:
    """PyTorch's Adam would miss its moments, and SGD would go on without momentum and say nothing."""
    model = make_model()
    optimizers = [
        create_optimizer(Config.model_validate({"optimizer": {"name": one}}).optimizer, everything(model))
        for one in (name, other)
    ]
    model(torch.randn(4, 3, 32, 32)).square().mean().backward()
    optimizers[0].step()
    checkpoint.save_state(tmp_path / "state", checkpoint.snapshot(TrainState(1, 1, 0.5), Trained(model, optimizers[0])))
    saved = checkpoint.read_state(tmp_path / "state")
    with pytest.raises(DataError, match=r"not a training state of this run .*as of another optimizer"):
        checkpoint.restore(saved, Trained(model, optimizers[1]))
    checkpoint.restore(saved, Trained(model, optimizers[0]))


@pytest.mark.parametrize("state", [(0, 0, 0.5), (-1, -1, 0.5), (2, 3, 0.5), (2, 0, 0.5), (1, 1, 1e300), (1, 1, 1.5)])
def test_a_state_of_epochs_that_cannot_be(tmp_path: Path, state: tuple[int, int, float]) -> None:
    trains = trained(make_model())
    checkpoint.save_state(tmp_path / "s", checkpoint.snapshot(TrainState(*state), trains))
    with pytest.raises(DataError, match=r"not a training state of this run .*the best epoch"):
        checkpoint.restore(checkpoint.read_state(tmp_path / "s"), trains)


@pytest.mark.parametrize("about", [{"epoch": math.inf, "best_epoch": math.inf}, {"best_top1": 10**400}])
def test_a_state_of_numbers_without_end(tmp_path: Path, about: dict[str, object]) -> None:
    trains = trained(make_model())
    checkpoint.save_state(tmp_path / "s", checkpoint.snapshot(TrainState(1, 1, 0.5), trains))
    edit(tmp_path / "s", about=about)
    with pytest.raises(DataError, match="not a training state of this run"):
        checkpoint.restore(checkpoint.read_state(tmp_path / "s"), trains)
    assert checkpoint.finished_epochs(tmp_path / "s") == int("epoch" not in about)


def test_what_was_read_is_no_view_of_the_file(tmp_path: Path) -> None:
    """Windows replaces no file that is mapped, and a run that goes on replaces the one that it has read."""
    path, model = tmp_path / "model.safetensors", make_model().state_dict()
    checkpoint.save_model(path, model, make_card())
    saved = checkpoint.read(path)
    with path.open("rb+") as file:
        file.write(bytes(path.stat().st_size))
    assert all(torch.equal(saved.tensors[name], tensor) for name, tensor in model.items())


def test_a_file_larger_than_there_is_room_to_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise RuntimeError("unable to mmap 200000004616 bytes from file: Cannot allocate memory (12)")

    path = tmp_path / "model.safetensors"
    checkpoint.save_model(path, make_model().state_dict(), make_card())
    monkeypatch.setattr(tensors, "safe_open", full)
    with pytest.raises(DataError, match=r"cannot be read \(unable to mmap"):
        checkpoint.read(path)
    assert devices.is_out_of_memory(RuntimeError("Cannot allocate memory (12)"))


def test_a_state_without_the_average_or_the_scale_that_the_run_has(tmp_path: Path) -> None:
    model = make_model()
    optimizer = create_optimizer(CONFIG.optimizer, everything(model))
    checkpoint.save_state(tmp_path / "state", checkpoint.snapshot(TrainState(), Trained(model, optimizer)))
    saved = checkpoint.read_state(tmp_path / "state")
    with pytest.raises(DataError, match=r"does not fit the model: it lacks conv1\."):
        checkpoint.restore(saved, Trained(model, optimizer, average=MovingAverage(model, 0.9)))
    with pytest.raises(DataError, match="not a training state of this run"):
        checkpoint.restore(saved, Trained(model, optimizer, scaler=torch.amp.GradScaler("cpu")))


def test_files_hold_no_pickle(saved: Path) -> None:
    assert load_file(saved)  # safetensors' own reader takes all of it
    assert b"torch.storage" not in saved.read_bytes()


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such run or checkpoint"):
        runs.find_model(tmp_path / "none")
    with pytest.raises(DataError, match=r"has no model\.safetensors"):
        runs.find_model(tmp_path)

"""The library: what the commands do, to the same bits, in silence, with exceptions in place of exit codes."""

import copy
import gc
import inspect
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import traceback
import unittest.mock
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import cifar100cli
from cifar100cli import (
    CifarError,
    Classifier,
    DataError,
    Preset,
    RunInterrupted,
    UsageError,
    api,
    augment,
    devices,
    errors,
    evaluate,
    jobs,
    load_model,
    load_preset,
    loader,
    preset_names,
    resume,
    starting_weights,
    synthetic,
    train,
    workflows,
)
from cifar100cli.config import read_config
from cifar100cli.models import create_model
from cifar100cli.trainer import Job
from cifar100cli.watcher import EpochProgress, Watcher
from tests.conftest import TINY, Cli, StopAfter

OVERRIDES: dict[str, object] = {
    "data.dataset": "synthetic",
    "model.backbone": "test_resnet",
    "data.batch_size": 64,
    "train.precision": "fp32",
    "train.epochs": 2,
}


@pytest.fixture
def run(run_cli: Cli, small_synthetic: synthetic.Drawn) -> Path:
    """A run that the command line made, normalised and at 48 pixels, in the folder that is current."""
    outcome = run_cli("train", *TINY, "--epochs", "2", "--image-size", "48", "--json")
    assert outcome.code == 0, outcome.err
    return Path(json.loads(outcome.out)["run_dir"])


def picture(width: int, height: int) -> Image.Image:
    random = np.random.default_rng(width)
    small = random.integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def lasting(result: dict[str, Any]) -> dict[str, Any]:
    """What of a result is the same whenever and wherever it was made."""
    changing = ("run_dir", "seconds", "images_per_second", "peak_memory_bytes", "checkpoint")
    return {key: value for key, value in result.items() if key not in changing}


# ------------------------------------------------------------------------------------------------ the names


def test_every_name_can_be_had_and_says_what_it_is() -> None:
    for name in cifar100cli.__all__:
        found = getattr(cifar100cli, name)
        assert len(inspect.getdoc(found) or "") > 20, name
        assert name in dir(cifar100cli)
    for function in (train, resume, evaluate, load_model, load_preset):
        assert "Raises" in (inspect.getdoc(function) or "")
        assert function.__module__ == api.__name__
    assert sorted(cifar100cli.__all__, key=lambda name: (name[0].islower(), name)) == cifar100cli.__all__


def test_other_names_are_no_attributes() -> None:
    with pytest.raises(AttributeError, match="nothing_such"):
        _ = cifar100cli.nothing_such  # type: ignore[attr-defined]
    assert not hasattr(cifar100cli, "torch")


def test_importing_the_package_imports_no_torch(tmp_path: Path) -> None:
    script = """
import sys
import unittest.mock
import cifar100cli
from cifar100cli import CifarError, Preset, preset_names
assert "quickstart" in preset_names() and "train" in dir(cifar100cli)
assert not {"torch", "timm", "torchvision", "typer", "rich"} & set(sys.modules)
from cifar100cli import *
assert "torch" in sys.modules and load_model and train
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    finished = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout + finished.stderr == ""


# ---------------------------------------------------------------------------------------------- the presets


def test_presets_are_those_of_the_command_line(run_cli: Cli, tmp_path: Path) -> None:
    assert preset_names() == sorted(row["name"] for row in json.loads(run_cli("presets", "--json").out)["presets"])
    printed = run_cli("train", "--preset", "resnet18-cosface", "--lr", "3e-4", "--epochs", "10", "--print-config").out
    ours = load_preset("resnet18-cosface", {"optimizer.lr": 3e-4, "train.epochs": 10})
    assert isinstance(ours, Preset)
    assert ours.config.to_yaml().strip() == printed.strip()
    file = tmp_path / "mine.yaml"
    file.write_text(printed)
    for path in (file, str(file)):
        assert load_preset(path) == Preset("mine", ours.config)
    assert load_preset().name == "quickstart"


def test_naming_weights_means_starting_from_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = load_preset("resnet18-baseline", {"model.weights": Path("w.safetensors")}).config.model
    assert (model.pretrained, model.weights) == (True, str(tmp_path / "w.safetensors"))


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("resnet18-basline", {}, "did you mean resnet18-baseline"),
        ("nowhere.yaml", {}, "no such file"),
        ("quickstart", {"lr": 1}, r"unknown key 'lr' in overrides; did you mean optimizer\.lr"),
        ("quickstart", {"optimizer.lr": -1}, r"optimizer\.lr = -1 \(overrides\): must be a number, above 0"),
        ("quickstart", {"train.epochs": True}, "a whole number"),
        ("quickstart", {"optimizer.betas": object()}, "two numbers"),
    ],
)
def test_mistakes_in_presets_are_value_errors(name: str, overrides: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words) as raised:
        load_preset(name, overrides)
    assert isinstance(raised.value, CifarError)
    assert isinstance(raised.value, ValueError)


# --------------------------------------------------------------------------------------- training, measuring


def test_train_is_the_commands_to_the_byte_and_silent(
    run_cli: Cli, small_synthetic: synthetic.Drawn, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    commands = json.loads(run_cli("train", *TINY, "--epochs", "2", "--json").out)
    capfd.readouterr()
    ours = train(load_preset("quickstart", OVERRIDES), runs_dir=tmp_path / "ours", device="cpu")
    assert capfd.readouterr() == ("", "")
    for name in ("model.safetensors", "state.safetensors", "predictions.csv", "config.yaml"):
        assert (Path(ours["run_dir"]) / name).read_bytes() == (Path(commands["run_dir"]) / name).read_bytes(), name
    assert lasting(ours) == lasting(commands)
    assert ours == json.loads((Path(ours["run_dir"]) / "result.json").read_text())
    assert Path(ours["run_dir"]).parent == tmp_path / "ours" / "quickstart"


@pytest.mark.usefixtures("small_synthetic")
def test_random_numbers_are_the_callers(tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    result = train(load_preset("quickstart", OVERRIDES), runs_dir=tmp_path, device="cpu")
    load_model(result["run_dir"], device="cpu")
    evaluate(result["run_dir"], device="cpu")
    assert torch.equal(torch.rand(3), expected)


def test_progress_is_what_the_command_shows(
    run_cli: Cli, small_synthetic: synthetic.Drawn, capfd: pytest.CaptureFixture[str]
) -> None:
    result = train(load_preset("quickstart", OVERRIDES), device="cpu", progress=True)
    shown = capfd.readouterr()
    assert shown.out == ""
    assert [line[:9] for line in shown.err.splitlines() if line.startswith("epoch")] == ["epoch 1/2", "epoch 2/2"]
    assert Path(result["run_dir"]).parts[0] == "runs"


def test_folders_of_the_environment(
    run_cli: Cli, small_synthetic: synthetic.Drawn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CIFAR100_RUNS_DIR", "elsewhere")
    result = train(load_preset("quickstart", OVERRIDES | {"train.epochs": 1}), device="cpu")
    assert Path(result["run_dir"]).parts[0] == "elsewhere"
    monkeypatch.setenv("CIFAR100_DATA_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="nowhere"):
        train(load_preset("resnet18-baseline"), device="cpu")


def test_a_run_that_is_stopped_goes_on_to_the_same_bits(
    run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    preset = Preset("quickstart", read_config(run / "config.yaml"))
    with monkeypatch.context() as patched:
        patched.setattr(api, "Watcher", lambda: StopAfter(9))  # seven steps an epoch
        with pytest.raises(RunInterrupted) as stopped:
            train(preset, runs_dir=str(tmp_path / "ours"), device="cpu")
    begun = stopped.value.run_dir
    assert begun is not None
    assert stopped.value.finished == 1
    assert str(stopped.value) == f"stopped after 1 of 2 epochs; resume({str(begun)!r}) goes on"
    capfd.readouterr()
    result = resume(begun)
    assert capfd.readouterr() == ("", "")
    assert (begun / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
    assert resume(str(begun)) == result
    assert lasting(result) == lasting(json.loads((run / "result.json").read_text()))


def test_a_run_that_is_stopped_before_it_began_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(workflows, "prepare", unittest.mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(RunInterrupted, match=r"stopped before the run began$") as stopped:
        train("quickstart", runs_dir=tmp_path, device="cpu")
    assert stopped.value.run_dir is None


@pytest.mark.usefixtures("small_synthetic")
@pytest.mark.parametrize("stop", [KeyboardInterrupt, torch.OutOfMemoryError, RuntimeError])
def test_what_ends_a_run_holds_nothing_of_it(
    stop: type[BaseException], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A notebook keeps the last exception, and the next cell needs the memory."""
    models: list[weakref.ref[torch.nn.Module]] = []

    def prepare(*arguments: Any, **more: Any) -> Job:
        job = jobs.prepare(*arguments, **more)
        models.append(weakref.ref(job.model))
        return job

    class Ends(Watcher):
        def step(self, taken: int, glance: Callable[[], EpochProgress | None]) -> None:
            raise stop

    monkeypatch.setattr(workflows, "prepare", prepare)
    monkeypatch.setattr(api, "Watcher", Ends)
    with pytest.raises((RunInterrupted, CifarError, RuntimeError)) as held:
        train(load_preset("quickstart", OVERRIDES), runs_dir=tmp_path, device="cpu")
    gc.collect()
    assert [model() for model in models] == [None]
    assert held.value.__traceback__ is not None, "all the while"


def test_what_the_caller_handles_keeps_its_frames() -> None:
    def fails() -> None:
        kept = "for a look at what went wrong"
        raise LookupError(kept)

    try:
        fails()
    except LookupError as error:
        with pytest.raises(DataError, match="nowhere"):
            load_model("nowhere")
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    assert frames[-1].f_locals == {"kept": "for a look at what went wrong"}


def test_evaluate_agrees_with_the_result_and_the_command(
    run: Path, run_cli: Cli, capfd: pytest.CaptureFixture[str]
) -> None:
    found = evaluate(run, predictions="test.csv", device="cpu")
    assert capfd.readouterr() == ("", "")
    result = json.loads((run / "result.json").read_text())
    assert {key: found[key] for key in result["test"]} == result["test"]
    assert Path("test.csv").read_bytes() == (run / "predictions.csv").read_bytes()
    assert found == json.loads(run_cli("evaluate", run, "--device", "cpu", "--json").out)
    both = evaluate([run / "model.safetensors"], split="train", tta=True, device="cpu")
    asked = run_cli("evaluate", run / "model.safetensors", "--split", "train", "--tta", "--device", "cpu", "--json")
    assert both == json.loads(asked.out)


# ------------------------------------------------------------------------------------------------- the model


def test_a_loaded_model_computes_what_torch_does(run: Path, small_synthetic: synthetic.Drawn) -> None:
    """The network, built and filled by hand, on pixels prepared by hand."""
    model = load_model(run, device="cpu")
    assert isinstance(model, Classifier)
    assert not model.training
    assert model.classes == small_synthetic.classes
    images = torch.from_numpy(small_synthetic.test[0][:32])
    config = read_config(run / "config.yaml")
    network = create_model(config, 100, pretrained=False).eval()
    network.load_state_dict(load_file(run / "model.safetensors"))
    mean, std = (torch.tensor(values)[:, None, None] for values in (model.card.mean, model.card.std))
    inputs = F.interpolate((images / 255 - mean) / std, size=(48, 48), mode="bilinear", align_corners=False)
    with torch.inference_mode():
        expected = network(inputs)
        logits = model(images)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_predictions_are_those_of_the_command(run: Path, run_cli: Cli, capfd: pytest.CaptureFixture[str]) -> None:
    pictures = [picture(32, 32), picture(200, 120), picture(24, 56)]
    names = [Path(f"{number}.png") for number in range(len(pictures))]
    for one, name in zip(pictures, names, strict=True):
        one.save(name)
    commands = json.loads(run_cli("predict", run, *names, "--top", "3", "--device", "cpu", "--json").out)
    capfd.readouterr()
    model = load_model(run / "model.safetensors", device="cpu")
    from_files, from_memory = model.predict(names, top=3), model.predict(pictures, top=3)
    assert capfd.readouterr() == ("", "")
    assert from_files == from_memory == [one["top"] for one in commands["images"]]
    # As arrays, too: of any size, and each as if it were alone.
    for one, expected in zip(pictures, from_files, strict=True):
        pixels = torch.from_numpy(np.array(one)).permute(2, 0, 1)[None]
        with torch.inference_mode():
            shares = model(pixels).softmax(1)
        assert model.classes[int(shares.argmax(1))] == expected[0]["class"]
        assert shares.max().item() == pytest.approx(expected[0]["probability"], rel=1e-4)
    assert [[guess["class"] for guess in top] for top in model.predict([str(names[0])], top=1)] == [
        [from_files[0][0]["class"]]
    ]
    assert model.predict([]) == []
    assert len(model.predict([pictures[0]] * 70, top=1000)) == 70
    assert len(model.predict(pictures, top=1000)[0]) == 100


def test_a_model_that_is_trained_on_answers_as_it_does_in_evaluation_mode(kept: Classifier) -> None:
    """Its running means stay as they are, and so does the mode of each of its modules."""
    pictures = [picture(32, 32)]
    expected = kept.predict(pictures)
    before = copy.deepcopy(kept.state_dict())
    kept.train()
    norm = next(module for module in kept.modules() if isinstance(module, torch.nn.BatchNorm2d)).eval()
    assert kept.predict(pictures) == expected
    assert [module for module in kept.modules() if not module.training] == [*norm.modules()]
    assert all(torch.equal(tensor, before[name]) for name, tensor in kept.state_dict().items())


@pytest.mark.parametrize(("image_size", "batches"), [(32, [64, 6]), (160, [40, 30]), (480, [25, 25, 20])])
def test_fewer_large_pictures_are_looked_at_at_once(kept: Classifier, image_size: int, batches: list[int]) -> None:
    """As many as `evaluate` takes, for the same memory: 1,024,000 pixels on a CPU, or 25 images."""
    kept.card = kept.card.model_copy(update={"image_size": image_size})
    seen: list[int] = []
    kept.model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    assert len(kept.predict([picture(32, 32)] * 70)) == 70
    assert seen == batches


def test_a_model_is_a_module(run: Path) -> None:
    """Gradients flow, and it can be copied and pickled."""
    model = load_model(run, device="cpu")
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    logits = model(images)
    logits.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301 - our own
        assert torch.equal(other(images), logits)
        assert other.classes == model.classes


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float16, 0.01), (torch.bfloat16, 0.05)])
def test_a_model_computes_in_the_type_it_was_given(
    kept: Classifier, dtype: torch.dtype, tolerance: float, precision: str
) -> None:
    """Against the bare network in float64, on pixels prepared by hand."""
    training = kept._config.train.model_copy(update={"precision": precision})
    kept._config = kept._config.model_copy(update={"train": training})
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (kept.card.mean, kept.card.std))
    with torch.inference_mode():
        expected = copy.deepcopy(kept.model).double()((images / 255 - mean) / std)
        logits = kept.to(dtype)(images)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=tolerance * float(expected.abs().max()))
    guesses = kept.predict([picture(64, 48)], top=3)[0]
    assert len(guesses) == 3


def test_the_copies_that_data_parallel_makes_answer(kept: Classifier) -> None:
    """As `replicate` makes them, but for the broadcast, which needs several GPUs: parameters are plain tensors."""
    network = copy.deepcopy(kept)
    for module in network.model.modules():
        tensors = {**module._parameters, **module._buffers}  # of the latter, other networks have none
        module._parameters.clear()
        module._buffers.clear()
        for name, tensor in tensors.items():
            setattr(module, name, tensor if tensor is None else tensor.detach())
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert not list(network.parameters())
    assert torch.equal(network(images), kept(images))
    assert network.device == kept.device


def test_where_a_model_is_stands_in_no_state_dict(kept: Classifier) -> None:
    assert kept.state_dict().keys() == {f"model.{name}" for name in kept.model.state_dict()}
    assert kept.to("meta").device.type == "meta"


def test_a_model_that_is_traced_leaves_others_alone(run: Path) -> None:
    """What stands for the mean of pixels while a graph is made is no number that another model could compute with."""
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before = load_model(run)(images)
    for trace in (torch.export.export, torch.jit.trace):
        augment._KEPT.clear()
        model = load_model(run)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, of what it replaces these by
            trace(model, (images,))
        assert torch.equal(load_model(run)(images), before)
    augment._KEPT.clear()
    preprocessing = loader.Preprocessing(32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    with FakeTensorMode() as fake:
        preprocessing(fake.from_tensor(images))
    assert augment._KEPT == {}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_model_is_one_graph_and_answers_the_same(kept: Classifier, precision: str) -> None:
    training = kept._config.train.model_copy(update={"precision": precision})
    kept._config = kept._config.model_copy(update={"train": training})
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = kept(images)
    assert torch.equal(torch.compile(kept, backend="eager", fullgraph=True)(images), expected)


@pytest.mark.usefixtures("small_synthetic")
def test_the_callers_settings_of_torch_are_not_the_runs_and_are_kept(tmp_path: Path) -> None:
    """Autocast, default types and devices, and what is switched off."""

    def figures(folder: str) -> Any:
        preset = load_preset("quickstart", OVERRIDES)
        result = train(preset, runs_dir=tmp_path / folder)
        return result["test"], evaluate(result["run_dir"])["loss"]

    expected = figures("plain")
    with torch.autocast("cpu", torch.bfloat16):
        assert figures("autocast") == expected
        assert torch.is_autocast_enabled("cpu")
    with torch.no_grad(), torch.device("meta"):
        assert figures("meta") == expected
        assert torch.zeros(1).device.type == "meta"
    with torch.inference_mode():
        assert figures("inference") == expected
    torch.set_float32_matmul_precision("medium")  # bf16, on CPUs that multiply it
    try:
        assert figures("medium") == expected
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            augment._KEPT.clear()
            assert figures(str(dtype)) == expected
            assert torch.get_default_dtype() == dtype
        finally:
            torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("warn_only", [False, True])
def test_the_callers_choice_of_kernels_is_not_the_runs_and_is_kept(
    kept: Classifier, warn_only: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor would it say by itself which ones a deterministic run may take."""

    def chosen() -> tuple[bool, ...]:
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.backends.cudnn.benchmark,
            torch.backends.cudnn.deterministic,
        )

    def watcher() -> Watcher:
        seen.append(chosen())
        with devices.deterministic(True):
            seen.append(chosen())
        return Watcher()

    seen: list[tuple[bool, ...]] = []
    as_it_begins = chosen()
    monkeypatch.setattr(api, "Watcher", watcher)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        load_model(kept.path, device="cpu")
        assert chosen() == (True, warn_only, True, True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [as_it_begins, (True, False, False, False)]
    assert as_it_begins == (False, False, False, False)


def test_a_model_answers_as_it_was_measured(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the caller lets products of float32 round to, when it is asked."""
    model = load_model(run)
    seen: list[str] = []

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        seen.append(torch.get_float32_matmul_precision())
        return inputs.mean((2, 3))

    monkeypatch.setattr(model.model, "forward", forward)
    torch.set_float32_matmul_precision("medium")
    try:
        model(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == ["highest"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_callers_autocast_changes_no_answer(run: Path, precision: str) -> None:
    model = load_model(run, device="cpu")
    model._config = model._config.model_copy(
        update={"train": model._config.train.model_copy(update={"precision": precision})}
    )
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        expected = model(images)
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                assert torch.equal(model(images), expected)


def test_figures_are_in_the_error_of_a_file_that_cannot_be_written(run: Path) -> None:
    with pytest.raises(CifarError, match=r"/dev/full: No space left on device") as failure:
        evaluate(run, predictions="/dev/full", device="cpu")
    assert failure.value.result == evaluate(run, device="cpu")  # type: ignore[attr-defined]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_run_of_a_device_that_is_not_here_says_what_goes_on(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    about = json.loads((copy / "environment.json").read_text())
    (copy / "environment.json").write_text(json.dumps({**about, "device": "cuda:0"}))
    assert resume(copy)["complete"], "it is only read"
    (copy / "result.json").unlink()
    with pytest.raises(UsageError, match=r"was begun on cuda:0, and .*; device='cpu' goes on without it"):
        resume(copy)
    assert resume(copy, device="cpu")["complete"]


@pytest.mark.usefixtures("small_synthetic")
def test_threads_take_turns(tmp_path: Path) -> None:
    """There is one generator of random numbers for all of them."""
    presets = [load_preset("quickstart", {**OVERRIDES, "seed": seed, "model.drop_rate": 0.3}) for seed in (0, 1)]
    alone = [train(preset, runs_dir=tmp_path / "alone")["test"] for preset in presets]
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda preset: train(preset, runs_dir=tmp_path / "beside")["test"], presets)
        assert list(results) == alone


def test_what_stops_a_run_goes_from_one_process_to_another() -> None:
    for stop in (
        RunInterrupted(Path("runs/x"), 3, 10, errors.Terminated()),
        errors.DownloadInterrupted("kept", KeyboardInterrupt()),
    ):
        for other in (pickle.loads(pickle.dumps(stop)), copy.copy(stop)):  # noqa: S301 - our own
            kept = {key: value for key, value in vars(stop).items() if key != "_cause"}
            assert (str(other), {key: vars(other)[key] for key in kept}) == (str(stop), kept)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda _: train("quickstart", device=None), "--device None: must be auto"),  # type: ignore[arg-type]
        (lambda _: train("quickstart", minutes="1"), "must be a finite number"),  # type: ignore[arg-type]
        (lambda _: evaluate(None), "must be a path"),  # type: ignore[arg-type]
        (evaluate, "must be a path, such as .*and not Classifier"),
        (lambda _: evaluate("x", split=["test"]), "must be one of"),  # type: ignore[arg-type]
        (lambda _: load_preset("quickstart", ["train.epochs=3"]), "by their keys"),  # type: ignore[arg-type]
        (lambda kept: kept.predict(np.zeros((2, 32, 32, 3), np.uint8)), "not ndarray: Image.fromarray"),
        (lambda kept: kept.predict(None), "pictures are a list"),
        (lambda kept: kept.predict([], top=2.0), "must be a whole number"),
    ],
)
def test_arguments_of_another_kind_are_told(kept: Classifier, call: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        call(kept)


def test_a_device_of_torchs_is_one(run: Path) -> None:
    assert load_model(run, device=torch.device("cpu")).device.type == "cpu"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1, 3, 32, 32),
        torch.zeros(3, 32, 32, dtype=torch.uint8),
        torch.zeros(1, 32, 32, 3, dtype=torch.uint8),
        torch.zeros(0, 3, 32, 32, dtype=torch.uint8),
        torch.zeros(1, 3, 0, 32, dtype=torch.uint8),
    ],
)
def test_other_tensors_are_refused(kept: Classifier, images: torch.Tensor) -> None:
    with pytest.raises(UsageError, match=r"images are uint8 \(N, 3, H, W\), and not torch\."):
        kept(images)
    with pytest.raises(UsageError, match=r"images are a tensor of uint8 \(N, 3, H, W\), and not of ndarray"):
        kept(images.numpy())


@pytest.fixture
def kept() -> Classifier:
    """A model of an earlier version; its data set is not here, and not needed."""
    return load_model(Path(__file__).parent / "kept" / "run-format-1", device="cpu")


def test_mistakes_are_raised(kept: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    preset = load_preset()
    Path("notes.txt").write_text("no image")
    Path("file").write_text("no folder")
    with pytest.raises(UsageError, match="device"):
        train(preset, device="gpu")
    with pytest.raises(UsageError, match="cuda:99"):
        load_model(kept.path, device="cuda:99")
    with pytest.raises(CifarError, match="not a folder"):
        train(preset, runs_dir="file", device="cpu")
    for missing in (load_model, evaluate, resume):
        with pytest.raises(DataError, match="nowhere"):
            missing("nowhere")
    with pytest.raises(UsageError, match="dev"):
        evaluate(kept.path, split="dev")
    with pytest.raises(UsageError, match="at least one"):
        evaluate([])
    with pytest.raises(UsageError, match="its folder does not exist"):
        evaluate(kept.path, predictions="nowhere/x.csv")
    with pytest.raises(DataError, match=r"notes\.txt: no image"):
        kept.predict(["notes.txt"])
    with pytest.raises(DataError, match=r"none\.png: No such file"):
        kept.predict([Path("none.png")])
    whole = io.BytesIO()
    picture(64, 64).save(whole, "png")
    with pytest.raises(DataError, match="a picture: broken"):
        kept.predict([Image.open(io.BytesIO(whole.getvalue()[:-40]))])
    with pytest.raises(UsageError, match="a list"):
        kept.predict("notes.txt")
    full = unittest.mock.Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory"))
    with monkeypatch.context() as patch:
        patch.setattr(starting_weights, "create_model", full)
        with pytest.raises(CifarError, match="out of memory: lower --batch-size"):
            train(load_preset("quickstart", {"model.backbone": "resnet18"}), device="cpu")
        full.side_effect = torch.AcceleratorError("CUDA error: unspecified launch failure")
        with pytest.raises(CifarError, match="the device failed"):
            train(load_preset("quickstart", {"model.backbone": "resnet18"}), device="cpu")
    with pytest.raises(UsageError, match=r"not ndarray: Image\.fromarray makes one"):
        kept.predict([np.zeros((32, 32, 3), np.uint8)])  # type: ignore[list-item]
    for reader in (load_model, evaluate, resume):
        with pytest.raises(UsageError, match="is empty: name a run folder"):
            reader("")
    with pytest.raises(UsageError, match=r"must be a path, such as result\['run_dir'\], and not dict"):
        evaluate({"run_dir": "x"})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="unknown preset 'quickstrt'; did you mean quickstart"):
        train("quickstrt")
    with pytest.raises(UsageError, match="unknown key '3' in overrides"):
        load_preset("quickstart", {3: 1})  # type: ignore[dict-item]
    with pytest.raises(UsageError, match="top = 0"):
        kept.predict([picture(32, 32)], top=0)
    for top in (np.int64(1), True):  # a whole number to Python, whatever its type
        assert kept.predict([picture(32, 32)], top=top) == kept.predict([picture(32, 32)], top=1)  # type: ignore[arg-type]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "notes.txt"]

"""Steps: captured, compiled and as they are, all the same training; and nothing in them that a host would wait for."""

import contextlib
import copy
import functools
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from cifar100cli import augment, jobs, steps, teachers, trainer
from cifar100cli.config import Preset
from cifar100cli.errors import CifarError, UsageError
from cifar100cli.folders import Where
from cifar100cli.loader import DeviceLoader, Plan
from cifar100cli.optim import everything, set_learning_rate
from cifar100cli.schema import Distillation
from cifar100cli.steps import CapturedSteps, StepMode, Steps, Training
from cifar100cli.tasks import DistillationTask
from tests.conftest import EVERYTHING, Listening, make_preset, where

pytestmark = pytest.mark.usefixtures("small_synthetic")


def training_of(preset: Preset, tmp_path: Path, network: torch.nn.Module | None = None) -> Training:
    """Of the preset's network, or of another one in its place."""
    job = jobs.prepare(preset, where(tmp_path), Listening())
    if network is not None:
        job = replace(job, model=network, groups=everything(network))
    return trainer.prepare_steps(job)


def quick_network() -> torch.nn.Module:
    """One that takes images of any size, and a compiler no time."""
    torch.manual_seed(0)
    convolution, norm = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)
    return torch.nn.Sequential(
        *(convolution, norm, torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten()),
        torch.nn.Linear(32, 100),
    )


def epochs(taken: Steps, preset: Preset, count: int) -> list[dict[str, float]]:
    return [trainer.train_epoch(taken, preset.config, epoch, Listening().step) for epoch in range(1, count + 1)]


class PretendGraph:
    """A CUDA graph for a machine that has none: what was captured runs again at each replay."""

    def __init__(self) -> None:
        self.captured: CapturedSteps | None = None
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        assert self.captured is not None
        if self.replays > 1:  # here, unlike on a GPU, capturing has already taken the first step
            self.captured.whole_step()


class PretendStream:
    def __init__(self, device: object = None) -> None: ...
    def wait_stream(self, other: object) -> None: ...


@pytest.fixture
def pretend_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def graph(graph: PretendGraph, stream: object, capture_error_mode: str) -> Iterator[None]:
        failed = True
        try:
            yield
            failed = False
        finally:
            if failed:
                raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "Stream", PretendStream)
    monkeypatch.setattr(steps, "_stream", functools.cache(steps._stream.__wrapped__))
    monkeypatch.setattr(torch.cuda, "current_stream", PretendStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", PretendGraph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    capture = CapturedSteps._capture

    def remember(self: CapturedSteps) -> Any:
        made: Any = capture(self)
        made.captured = self
        return made

    monkeypatch.setattr(CapturedSteps, "_capture", remember)


FEW = {"fraction": 0.25, "batch_size": 16}  # as many steps, of fewer images: for bf16 on CPUs that do not multiply it

RECIPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "augmented, sgd, cosine": {
        "augment": {"policy": "crop_flip"},
        "optimizer": {"name": "sgd", "lr": 0.01},
        "schedule": {"name": "cosine", "warmup_epochs": 1},
    },
    "one of five": {"augment": {"policy": "one_of"}},
    "all augmentation": {"augment": EVERYTHING, "data": {"normalize": "dataset"}},
    "two operations, alternating, arcface, mixed": {
        "augment": {"policy": "flip", "flip": "alternating", "auto": "randaugment", "mixup": 1.0},
        "model": {"head": "cosine"},
        "loss": {"name": "arcface"},
    },
    "arcface": {"model": {"head": "cosine"}, "loss": {"name": "arcface", "label_smoothing": 0.1}},
    "larger, normalised": {"data": {"image_size": 48, "normalize": "dataset"}},
    "averaged": {"train": {"ema": 0.9}},
    "muon, one cycle": {"optimizer": {"name": "muon", "decay_norms": False}, "schedule": {"name": "one_cycle"}},
    "sam, sgd by layers": {"optimizer": {"name": "sgd", "lr": 0.01, "layer_decay": 0.7, "sam_rho": 0.05}},
    "adaptive sam, muon in bf16": {
        "optimizer": {"name": "muon", "auxiliary": "sgd", "fixed_norm": True, "sam_rho": 0.5, "sam_adaptive": True},
        "data": FEW,
        "train": {"precision": "bf16"},
    },
    "drop-out, stochastic depth": {"model": {"drop_rate": 0.2, "drop_path_rate": 0.5}},
    "fine-tuned on features that are kept, in bf16": {
        "finetune": {"unfreeze": "layer4", "cache": "on"},
        "augment": {"policy": "flip"},
        "data": FEW,
        "train": {"precision": "bf16"},
    },
    "growing": {"data": {"image_size": 48, "first_image_size": 32, "grow_until": 0.3}},
}


@pytest.mark.usefixtures("pretend_cuda")
@pytest.mark.parametrize("recipe", RECIPES)
def test_captured_steps_train_as_steps_one_by_one_do(tmp_path: Path, recipe: str) -> None:
    """Over two epochs of seven steps, the last of them of another size than the captured one."""
    preset = make_preset(**RECIPES[recipe])
    plain, captured = (training_of(preset, tmp_path) for _ in range(2))
    one, other = Steps(plain), CapturedSteps(captured)
    assert epochs(one, preset, 2) == epochs(other, preset, 2)
    assert other.graph is not None
    assert isinstance(other.graph, PretendGraph)
    # The second epoch's larger images have a graph of their own, and the first one's is gone.
    assert other.graph.replays == (6 if recipe == "growing" else 12) - steps.WARM_UP
    for ours, theirs in zip(captured.model.state_dict().values(), plain.model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_glance_counts_what_is_done(tmp_path: Path) -> None:
    """A GPU is asked while it works: what is -1 is not done yet, whatever stands behind it."""
    taken = Steps(training_of(make_preset(), tmp_path))
    for epoch in (1, 2):
        taken.begin(epoch)
        nothing = taken.glance()
        assert nothing is not None
        assert (nothing.steps, nothing.images, math.isnan(nothing.loss)) == (0, 0, True)
        taken.take(0)
        taken.take(1)
        known = taken.glance()
        assert known is not None
        assert (known.steps, known.images) == (2, 128)
    losses, correct = torch.tensor([4.0, 2.0, 0.0, 9.0]), torch.tensor([16, 32, -1, 64])
    known = taken._known(losses, correct, 7.0)
    assert (known.steps, known.images, known.loss, known.top1, known.at) == (2, 128, 3.0, 48 / 128, 7.0)


@pytest.mark.usefixtures("pretend_cuda")
def test_runs_of_a_process_share_the_stream_that_captures(tmp_path: Path) -> None:
    """cuBLAS keeps memory for each stream, which would count for the next run's."""
    one, other = (CapturedSteps(training_of(make_preset(), tmp_path)) for _ in range(2))
    assert one.stream is other.stream


@pytest.mark.usefixtures("pretend_cuda")
@pytest.mark.parametrize(
    ("said", "words"),
    [("operation not permitted when stream is capturing\nand more", "train.compile=off"), ("out of memory", "memory")],
)
def test_a_step_that_cannot_be_captured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, words: str) -> None:
    def whole_step(*_: object) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(CapturedSteps, "whole_step", whole_step)
    preset = make_preset(**RECIPES["growing"])
    with pytest.raises(RuntimeError if "memory" in said else CifarError, match=words):
        epochs(CapturedSteps(training_of(preset, tmp_path)), preset, 2)


class NoWaiting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses what would make the host wait for a GPU, and what a CUDA graph cannot hold."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "unique", "is_nonzero", "equal.default")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = "index" in str(func) and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool
            for several in args[1:2]
            for index in (several if isinstance(several, list | tuple) else ())
        )
        assert not by_mask, f"{func} by a mask waits for the device"
        assert not any(word in str(func) for word in self.WAITS), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recipe", RECIPES)
def test_nothing_in_a_step_waits_for_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str) -> None:
    monkeypatch.setattr(augment, "apply_in_parts", augment.apply_to_all)  # the former is for CPUs
    preset = make_preset(**RECIPES[recipe])
    taken = Steps(training_of(preset, tmp_path))
    taken.begin(1)
    taken.take(0)  # which makes what is kept
    with NoWaiting():  # type: ignore[no-untyped-call]
        for index in range(1, 7):
            set_learning_rate(taken.training.optimizer, 0.001)
            taken.take(index)


def test_nothing_waits_in_fp16(tmp_path: Path) -> None:
    """With a network that a CPU can train in fp16."""
    job = jobs.prepare(make_preset(optimizer={"name": "sgd"}, train={"ema": 0.9}), where(tmp_path), Listening())
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 100))
    job = replace(job, model=network, groups=everything(network), precision="fp16")
    taken = Steps(trainer.prepare_steps(job))
    taken.begin(1)
    taken.take(0)
    with NoWaiting():  # type: ignore[no-untyped-call]
        taken.take(1)


@pytest.mark.parametrize("form", ["plain", "decoupled"])
def test_no_distillation_waits(tmp_path: Path, form: Literal["plain", "decoupled"]) -> None:
    """With a teacher that runs in every step, on images that are mixed."""
    training = training_of(make_preset(augment={"mixup": 1.0}), tmp_path)
    teacher = teachers.OnlineTeacher(copy.deepcopy(training.model), training.loader.preprocessing, training.cast)
    task = DistillationTask(training.task, teacher, Distillation(form=form, standardize=True))
    taken = Steps(replace(training, task=task))
    taken.begin(1)
    taken.take(0)
    with NoWaiting():  # type: ignore[no-untyped-call]
        taken.take(1)


def test_the_check_for_waiting_works() -> None:
    for waits in (
        lambda: torch.ones(1).item(),
        lambda: torch.ones(3).nonzero(),
        lambda: torch.tensor([1.0]),
        lambda: torch.ones(2)[torch.ones(2) > 0],
    ):
        with pytest.raises(AssertionError, match="waits for the device"), NoWaiting():  # type: ignore[no-untyped-call]
            waits()


def test_a_compiled_network_trains_as_an_eager_one(tmp_path: Path) -> None:
    preset = make_preset(optimizer={"lr": 1e-4})
    eager, compiled = (training_of(preset, tmp_path, quick_network()) for _ in range(2))
    torch._dynamo.reset()
    one = epochs(Steps(eager), preset, 1)
    # The same graphs that the compiler makes, without a C++ compiler's half minute.
    network: Any = torch.compile(compiled.network, backend="aot_eager")
    other = epochs(Steps(Training(**{**vars(compiled), "network": network})), preset, 1)
    assert other[0]["train_loss"] == pytest.approx(one[0]["train_loss"], rel=1e-4)


def test_every_size_of_images_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five of them, each in whole batches and in the last of an epoch, are more than PyTorch compiles by itself."""
    growing = {"image_size": 80, "first_image_size": 16, "grow_until": 0.8}
    preset = make_preset(data=growing, train={"epochs": 5, "compile": "inductor"})
    assert len({preset.config.image_size_in(epoch) for epoch in range(1, 6)}) == 5
    job = training_of(preset, tmp_path, quick_network())
    counter = CompileCounter()
    compile_as_ever = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network, **more: compile_as_ever(network, backend=counter, **more))
    taken = steps.create_steps(job, StepMode("inductor", ""))
    epochs(taken, preset, 5)
    assert counter.frame_count == 10


def loader_on(device: str, policy: Any = None) -> DeviceLoader:
    """A loader that says that it is on a device, and holds nothing."""
    made = DeviceLoader.__new__(DeviceLoader)
    made.device, made.features = torch.device(device), None
    drawn = (torch.zeros(1, device="meta" if policy is None else policy),)
    made.plan = lambda epoch: Plan(torch.zeros(1), drawn)  # type: ignore[method-assign]
    return made


@pytest.mark.parametrize(
    ("asked", "device", "flops", "ranks", "expected"),
    [
        ("auto", "cpu", 1e20, 1, "off"),
        ("auto", "cuda", 1e15, 1, "graph"),
        ("auto", "cuda", 1e17, 1, "inductor"),
        ("auto", "cuda", 1e17, 2, "off"),
        ("off", "cuda", 1e17, 1, "off"),
        ("graph", "cuda", 1e10, 1, "graph"),
        ("inductor", "cpu", 0.0, 1, "inductor"),
    ],
)
def test_auto_asks_how_long_the_run_is(
    monkeypatch: pytest.MonkeyPatch, asked: str, device: str, flops: float, ranks: int, expected: str
) -> None:
    monkeypatch.setattr(steps, "_obstacle_to_compiling", lambda device: None)
    monkeypatch.setattr(steps, "_on_device", lambda tensor: True)
    step_mode = steps.choose(asked, flops, loader_on(device), ranks)
    assert step_mode.name == expected
    assert step_mode.reason


def test_without_a_compiler_auto_captures_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "_obstacle_to_compiling", lambda device: "compiling kernels needs a C++ compiler")
    monkeypatch.setattr(steps, "_on_device", lambda tensor: True)
    step_mode = steps.choose("auto", 1e17, loader_on("cuda"), 1)
    assert step_mode == StepMode("graph", "compiling kernels needs a C++ compiler")
    with pytest.raises(UsageError, match=r"inductor is not possible: .*a C\+\+ compiler; use auto or off"):
        steps.choose("inductor", 1e17, loader_on("cpu"), 1)


def test_what_compiling_needs_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton builds a module for this Python in C, when the first kernel is launched."""
    device = torch.device("cuda")
    (tmp_path / "Python.h").touch()
    found, capability, folder, failure = {"g++", "gcc"}, (9, 0), tmp_path, None
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: name if name in found else None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(folder))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(steps, "_failure_to_compile", lambda _: failure)
    assert steps._obstacle_to_compiling(device) is None
    failure = "a small kernel could not be compiled here (libcuda.so cannot be found)"
    assert steps._obstacle_to_compiling(device) == failure
    assert steps._obstacle_to_compiling(torch.device("cpu")) is None
    failure, found = None, {"g++"}
    assert "a C compiler" in str(steps._obstacle_to_compiling(device))
    found = {"gcc"}
    assert "a C++ compiler" in str(steps._obstacle_to_compiling(device))
    found, capability = {"clang", "clang++"}, (6, 1)
    assert "a device that Triton knows" in str(steps._obstacle_to_compiling(device))
    capability, folder = (7, 0), tmp_path / "none"
    assert "Python.h" in str(steps._obstacle_to_compiling(device))


def test_whether_kernels_can_be_compiled_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here without a C++ compiler's half minute; what fails is told in one line."""
    tried, works = [], torch.compile

    def breaks(function: Any) -> Any:
        tried.append(function)
        raise OSError("libcuda.so cannot be found!\nPossible files are located at []")

    monkeypatch.setattr(steps, "_failure_to_compile", functools.cache(steps._failure_to_compile.__wrapped__))
    monkeypatch.setattr(torch, "compile", breaks)
    for _ in range(2):
        assert steps._failure_to_compile(torch.device("cpu")) == (
            "a small kernel could not be compiled here (libcuda.so cannot be found! Possible files are located at [])"
        )
    assert len(tried) == 1
    steps._failure_to_compile.cache_clear()
    monkeypatch.setattr(torch, "compile", functools.partial(works, backend="eager"))
    assert steps._failure_to_compile(torch.device("cpu")) is None


@pytest.mark.parametrize(("device", "otherwise"), [("cuda", "graph"), ("cpu", "off")])
def test_a_network_whose_kernels_cannot_be_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, otherwise: str
) -> None:
    """A GPU is left with what costs least of the speed."""
    monkeypatch.setattr(steps, "_on_device", lambda tensor: True)
    taken = Steps(training_of(make_preset(), tmp_path))
    taken.training = replace(taken.training, loader=loader_on(device))

    def issue(index: int) -> None:
        raise torch._dynamo.exc.TorchDynamoException("no such header")

    monkeypatch.setattr(taken, "_issue", issue)
    with pytest.raises(CifarError, match=rf"cannot be compiled here.*--set train\.compile={otherwise} launches"):
        taken.take(0)


@pytest.mark.parametrize(
    ("asked", "device", "ranks", "message"),
    [("graph", "cpu", 1, "need a CUDA device"), ("graph", "cuda", 2, "several devices"), ("inductor", "cpu", 2, "one")],
)
def test_what_is_not_possible_is_refused(asked: str, device: str, ranks: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        steps.choose(asked, 0.0, loader_on(device), ranks)


def test_augmentation_on_the_host_is_not_captured() -> None:
    assert steps.choose("auto", 0.0, loader_on("cuda", "cpu"), 1) == StepMode(
        "off", "the augmentation runs on the host"
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_captured_run_on_cuda_is_the_eager_one(tmp_path: Path, recipe: str) -> None:
    preset = make_preset(**RECIPES[recipe])

    def curve(step_mode: str) -> list[float]:
        job = jobs.prepare(preset, Where(tmp_path, tmp_path, tmp_path, "cuda"), Listening())
        training = trainer.prepare_steps(job)
        return [row["train_loss"] for row in epochs(steps.create_steps(training, StepMode(step_mode, "")), preset, 2)]

    # Sums of many threads come out in another order each time, and training grows the difference: 2e-4 were seen.
    assert curve("graph") == pytest.approx(curve("off"), rel=1e-3)

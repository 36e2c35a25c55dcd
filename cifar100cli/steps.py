"""Training steps, data included: launched one operation at a time, compiled, or captured as one CUDA graph."""

import functools
import importlib.util
import math
import os
import shutil
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cifar100cli.bounded import one_line, printable
from cifar100cli.devices import TENSOR_CORES, Cast, in_words, is_out_of_memory
from cifar100cli.errors import CifarError, UsageError
from cifar100cli.loader import Batch, DeviceLoader, Plan
from cifar100cli.optim import MovingAverage
from cifar100cli.sam import uphill
from cifar100cli.tasks import StepOutput, Task
from cifar100cli.watcher import EpochProgress

WARM_UP = 3  # steps that are taken one operation at a time before one is captured: libraries set themselves up in them
MOST_SHAPES = 256  # of batches, for which a network is compiled


@dataclass(frozen=True)
class Training:
    """What a step is made of. `network` is the model, or the model with what its gradients need on several ranks.

    In fp16, `scaler` multiplies the loss, so that small gradients do not become 0, and leaves steps out whose gradients
    are not finite. In other precisions it does nothing.
    """

    model: nn.Module
    network: nn.Module
    task: Task
    loader: DeviceLoader
    optimizer: torch.optim.Optimizer
    grad_clip: float
    cast: Cast
    average: MovingAverage
    scaler: torch.amp.GradScaler
    sam_rho: float = 0.0
    sam_adaptive: bool = False

    def step(self, plan: Plan, rows: slice | Tensor, weight: float = 1.0) -> tuple[Tensor, Tensor]:
        """One step; its loss, times its `weight` among all ranks, and how many were right: scalars on the device."""
        batch = self.loader.batch(plan, rows)
        output = self.forward(batch)
        loss = output.loss if weight == 1 else output.loss * weight
        self.backward(loss)
        self.backward_uphill(batch, weight)
        self.move()
        return loss.detach(), (output.logits.detach().argmax(1) == batch.leading_labels).sum()

    def forward(self, batch: Batch) -> StepOutput:
        """Run the network and compute the loss."""
        with self.cast():
            return self.task(self.network, batch)

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def backward_uphill(self, batch: Batch, weight: float = 1.0) -> None:
        """With SAM, replace the gradients by those of the same images at the weights `sam_rho` further up."""
        if self.sam_rho:
            with uphill(self.model, self.sam_rho, adaptive=self.sam_adaptive):
                self.backward(self.forward(batch).loss * weight)

    def move(self) -> None:
        """Clip the gradients and move the weights."""
        if self.grad_clip:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()


class Steps:
    """The steps of an epoch, as they are: every operation is launched by itself."""

    def __init__(self, training: Training) -> None:
        loader = training.loader
        self.training = training
        self.plan = Plan(torch.empty(0), ())
        self.taken = 0  # steps of the run before this epoch
        self.losses = torch.zeros(len(loader), device=loader.device)
        self.correct = torch.zeros(len(loader), dtype=torch.int64, device=loader.device)
        self._begun: torch.cuda.Event | None = None
        self._copies: _Copies | None = None
        self._last = EpochProgress(0, 0, math.nan, math.nan, 0.0)

    def begin(self, epoch: int) -> None:
        """Lay out an epoch."""
        self.taken = (epoch - 1) * len(self.training.loader)
        self.correct.fill_(-1)  # what is not done yet
        self._copies, self._last = None, EpochProgress(0, 0, math.nan, math.nan, time.monotonic())
        if self.losses.device.type == "cuda":
            self._begun = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._begun.record()
        self._lay_out(self.training.loader.plan(epoch))

    def _lay_out(self, plan: Plan) -> None:
        self.plan = plan

    def take(self, index: int) -> None:
        """Take a step, and note its loss and its right predictions without looking at them."""
        try:
            self._issue(index)
        except RuntimeError as error:
            if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                otherwise = "graph" if _obstacle_to_capture(self.training.loader, ranks=1) is None else "off"
                raise CifarError(
                    f"this network's kernels cannot be compiled here ({one_line(error)}): "
                    f"--set train.compile={otherwise} launches PyTorch's own"
                ) from None
            raise
        self.training.average.update(self.taken + index)

    def _issue(self, index: int) -> None:
        loader = self.training.loader
        self.losses[index], self.correct[index] = self.training.step(
            self.plan, loader.shares[index], loader.loss_weights[index]
        )

    def glance(self) -> EpochProgress | None:
        """How the epoch goes, as far as it is known without waiting for the device.

        A CUDA device is asked for a copy, and what the last copy that has arrived says is returned. None where a device
        cannot be asked.
        """
        if self.losses.device.type == "cpu":
            return self._known(self.losses, self.correct, time.monotonic())
        if self._begun is None:
            return None
        if self._copies is None or self._copies.arrived.query():  # type: ignore[no-untyped-call]
            if self._copies is not None:
                self._last = self._known(self._copies.losses, self._copies.correct, self._copies.asked)
            self._copies = _Copies.ask(self.losses, self.correct, self._begun)
        return self._last

    def _known(self, losses: Tensor, correct: Tensor, at: float) -> EpochProgress:
        """What is known from the losses and right predictions on the host; of a step that is not done, these are -1."""
        done = int((correct >= 0).cumprod(0).sum())
        if not done:
            return EpochProgress(0, 0, math.nan, math.nan, at)
        loader = self.training.loader
        own = sum(share.stop - share.start for share in loader.shares[:done])
        top1 = correct[:done].sum().item() / own
        return EpochProgress(done, loader.bounds[done - 1][1], losses[:done].mean().item(), top1, at)

    def all_done(self) -> Callable[[], bool]:
        """What asks the device, without waiting for it, whether all that was issued until now is done."""
        if self.losses.device.type != "cuda":
            return lambda: True
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        asked: Callable[[], bool] = event.query
        return asked


@dataclass(frozen=True)
class _Copies:
    """Losses and right predictions on their way to the host, and when they were asked for."""

    losses: Tensor
    correct: Tensor
    asked: float
    arrived: torch.cuda.Event

    @classmethod
    def ask(cls, losses: Tensor, correct: Tensor, begun: torch.cuda.Event) -> "_Copies":
        """By a stream of their own, which waits for what was `begun` alone, and not for all that was issued since.

        A step notes its loss first: what has the one, by then, has the other.
        """

        def copy(tensor: Tensor) -> Tensor:
            return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)

        stream = _stream(losses.device, "glance")
        stream.wait_event(begun)
        with torch.cuda.stream(stream):
            correct, losses = copy(correct), copy(losses)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record(stream)
        return cls(losses, correct, time.monotonic(), arrived)


class CapturedSteps(Steps):
    """Steps of a whole batch as one CUDA graph, which the host launches at once; a smaller last batch as it is.

    The graph holds everything: looking images up, augmentation, forward, backward, clipping, optimizer. It reads the
    epoch's plan, the row that a batch begins at and the learning rate where it found them when it was captured, so
    that these are all that is written between two steps. The first steps of a run are taken as they are: nothing is
    computed for the sake of the capture.
    """

    def __init__(self, training: Training) -> None:
        super().__init__(training)
        device = training.loader.device
        start, end = training.loader.bounds[0]
        self.size = end - start
        self.first_row = torch.zeros(1, dtype=torch.int64, device=device)
        self.offsets = torch.arange(self.size, device=device)
        self.stream = _stream(device, "capture")
        self.graph: torch.cuda.CUDAGraph | None = None
        self.left = WARM_UP

    def _lay_out(self, plan: Plan) -> None:
        """In the memory that the graph knows."""
        if not self.plan.drawn or plan.image_size != self.plan.image_size:
            # Images that have grown need a graph of their own. They never shrink: the last one's memory is free again.
            self.plan, self.graph, self.left = plan, None, WARM_UP
            return
        self.plan.positions.copy_(plan.positions)
        for ours, new in zip(self.plan.drawn, plan.drawn, strict=True):
            ours.copy_(new)

    def _issue(self, index: int) -> None:
        start, end = self.training.loader.bounds[index]
        if end - start != self.size:
            super()._issue(index)
            return
        if self.left:
            self.left -= 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                super()._issue(index)
            torch.cuda.current_stream().wait_stream(self.stream)
            return
        self.first_row.fill_(start)
        if self.graph is None:
            self.graph = self._capture()
        self.graph.replay()

    def _capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        self.training.optimizer.zero_grad(set_to_none=True)
        try:
            # What other threads ask of the device meanwhile is theirs, and no part of it.
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self.whole_step()
        except RuntimeError as error:
            first: BaseException = error  # ending a capture that has failed fails too, in words that say nothing
            while first.__context__ is not None:
                first = first.__context__
            if in_words(first):
                raise first from None
            reason = next(iter(str(first).splitlines()), type(first).__name__)
            raise CifarError(
                f"a step of this network cannot be captured as a CUDA graph ({printable(reason)}): "
                "--set train.compile=off launches its operations one by one"
            ) from error
        return graph

    def whole_step(self) -> None:
        """What is captured: the step of the batch that begins at `first_row`, and the note of its outcome."""
        loss, correct = self.training.step(self.plan, self.first_row + self.offsets)
        step = self.first_row // self.size
        self.losses.index_copy_(0, step, loss[None])
        self.correct.index_copy_(0, step, correct[None])


@functools.cache
def _stream(device: torch.device, purpose: str) -> torch.cuda.Stream:
    """One for all runs of the process: cuBLAS keeps memory to work in for every stream that it has been called on."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


# ------------------------------------------------------------------------------------------------- choosing


@dataclass(frozen=True)
class StepMode:
    """How steps are taken (off, graph or inductor), and why."""

    name: str
    reason: str


PAYS_FROM = 2e16  # floating-point operations of a run: some minutes of a data-centre GPU, several times a compilation


def choose(asked: str, training_flops: float, loader: DeviceLoader, ranks: int) -> StepMode:
    """What `train.compile` means for this run: a function of the preset and of what the machine can do, of no clock.

    So a run that goes on takes its steps as it took them before. Raises `UsageError` for what is not possible here.
    """
    obstacle = _obstacle_to_capture(loader, ranks)
    if asked == "auto":
        if loader.device.type != "cuda":
            return StepMode("off", f"compiled steps are no faster on {loader.device.type}")
        if obstacle is not None:
            return StepMode("off", obstacle)
        if training_flops < PAYS_FROM:
            return StepMode("graph", f"{training_flops:.1e} operations are too few to pay for compiling kernels")
        if (lacking := _obstacle_to_compiling(loader.device)) is not None:
            return StepMode("graph", lacking)
        return StepMode("inductor", f"{training_flops:.1e} operations pay for compiling kernels")
    if asked == "graph" and obstacle is not None:
        raise UsageError(f"train.compile = graph is not possible: {obstacle}; use auto or off")
    if asked == "inductor" and ranks > 1:
        raise UsageError("train.compile = inductor is for one device; use auto or off with torchrun")
    if asked == "inductor" and (lacking := _obstacle_to_compiling(loader.device)) is not None:
        raise UsageError(f"train.compile = inductor is not possible: {lacking}; use auto or off")
    return StepMode(asked, "as the preset says")


def _obstacle_to_compiling(device: torch.device) -> str | None:
    """Why `torch.compile` cannot make kernels for a device.

    On a CUDA device it makes them with Triton, which compiles a module for this Python in C when it is first used, and
    knows no device without tensor cores. That all of it is there says not yet that it works.
    """
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        return "compiling kernels needs a C++ compiler"
    if device.type != "cuda":
        return None
    if (
        importlib.util.find_spec("triton") is None
        or not any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang"))
        or not Path(sysconfig.get_path("include"), "Python.h").is_file()
        or torch.cuda.get_device_capability(device) < TENSOR_CORES
    ):
        return "compiling kernels needs Triton, a C compiler, Python.h and a device that Triton knows"
    return _failure_to_compile(device)


@functools.cache
def _failure_to_compile(device: torch.device) -> str | None:
    """Why a small kernel cannot be compiled, or not run, if it cannot: a run of hours must not find out.

    It may be a folder for temporary files that nothing can be run from, a driver's library that Triton does not find,
    or a compiler without its own headers.
    """

    def small(numbers: Tensor) -> Tensor:
        return numbers.sin() + 1

    try:
        torch.compile(small)(torch.ones(2, device=device)).sum().item()
    except Exception as error:  # each of these tools has its own
        if is_out_of_memory(error):  # which may pass
            raise
        return f"a small kernel could not be compiled here ({printable(one_line(error))})"
    return None


def _on_device(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda"


def _obstacle_to_capture(loader: DeviceLoader, ranks: int) -> str | None:
    """Why steps over this loader cannot be one CUDA graph."""
    if loader.device.type != "cuda":
        return f"CUDA graphs need a CUDA device, not {loader.device.type}"
    if ranks > 1:
        return "several devices wait for each other within a step"
    if loader.features is not None and not _on_device(loader.features.table):
        return "the features are not in the device's memory"
    if not all(map(_on_device, loader.plan(1).drawn)):
        return "the augmentation runs on the host"
    return None


def create_steps(training: Training, step_mode: StepMode) -> Steps:
    """Steps of that kind."""
    if step_mode.name == "inductor":
        # The kernels of one size of images do not depend on what was compiled before: a run that is gone on with would
        # have others, and other bits.
        torch.compiler.reset()
        # Each size of images, and of batches, is compiled: past its limit of 8, PyTorch would run the rest uncompiled.
        torch._dynamo.config.recompile_limit = MOST_SHAPES
        compiled: Any = torch.compile(training.network, dynamic=False)
        training = replace(training, network=compiled)
    if step_mode.name != "off" and _obstacle_to_capture(training.loader, ranks=1) is None:
        return CapturedSteps(training)
    return Steps(training)

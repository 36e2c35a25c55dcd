"""The one training loop. It knows neither data sets nor terminals; whoever watches is an `Observer`."""

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cifar100cli import checkpoint, metrics
from cifar100cli.checkpoint import Card, TrainState
from cifar100cli.config import Config
from cifar100cli.errors import DataError, DivergedError, UsageError
from cifar100cli.loader import DeviceLoader, derived_seed
from cifar100cli.optim import Group, create_optimizer, learning_rate, set_learning_rate
from cifar100cli.runs import MODEL, STATE, RunDir
from cifar100cli.tasks import Task

SPLIT_OF = {"best_test": "test", "best_val": "val", "last": None}  # what the best epoch is chosen on


class Observer(Protocol):
    """Whoever shows the progress of a run."""

    def begin(self, config: Config, first_epoch: int, steps_per_epoch: int) -> None:
        """Training starts, or goes on, with `first_epoch`."""

    def step(self) -> None:
        """A step was issued. Nothing of it may be looked at: that would make the device wait."""

    def epoch(self, row: Mapping[str, Any], state: TrainState) -> None:
        """An epoch is finished, measured and saved."""


# ------------------------------------------------------------------------------------ device and precision


def select_device(name: str) -> torch.device:
    """`auto` is CUDA, then Apple's MPS, then the CPU. Raises `UsageError` for a device that is not here."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda:0")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UsageError(f"--device {name}: PyTorch finds no CUDA device here; --device auto takes what there is")
        if (device.index or 0) >= torch.cuda.device_count():
            raise UsageError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
        return torch.device("cuda", device.index or 0)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps: PyTorch finds no Apple GPU here; --device auto takes what there is")
    return device


def resolve_precision(name: str, device: torch.device) -> str:
    """`auto` is bf16 where the hardware multiplies it (CUDA, or a CPU with AVX512-BF16 or AMX), else fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"
    return "fp32"


def autocast(device: torch.device, precision: str) -> Callable[[], AbstractContextManager[object]]:
    """A context for the forward pass: matrix products in `precision`, weights and sums in float32."""
    if precision == "fp32":
        return contextlib.nullcontext
    return lambda: torch.autocast(device.type, torch.bfloat16)


# ----------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Loaders:
    """What is trained on, and what each epoch is measured on: the held-out and the test split, if any."""

    train: DeviceLoader
    evaluation: Mapping[str, DeviceLoader]


def train_step(
    model: nn.Module,
    task: Task,
    batch: Any,
    optimizer: torch.optim.Optimizer,
    grad_clip: float,
    cast: Callable[[], AbstractContextManager[object]],
) -> tuple[Tensor, Tensor]:
    """One step; returns the loss and the number of right predictions, both still on the device."""
    with cast():
        output = task(model, batch)
    optimizer.zero_grad(set_to_none=True)
    output.loss.backward()  # type: ignore[no-untyped-call]
    if grad_clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    optimizer.step()
    return output.loss.detach(), (output.logits.detach().argmax(1) == batch.labels).sum()


def fit(
    model: nn.Module,
    task: Task,
    loaders: Loaders,
    config: Config,
    run: RunDir,
    card: Card,
    *,
    groups: Sequence[Group],
    precision: str,
    observer: Observer,
) -> TrainState:
    """Train `model` to the end of its run, from wherever the run folder says that it is.

    After every epoch the metrics, the selected weights and the training state are on the disk, in this
    order, so that a run that is killed anywhere goes on from the last epoch that it finished, and ends with
    the same bits. Raises `DivergedError` when loss or weights stop being finite.
    """
    device = loaders.train.device
    cast = autocast(device, precision)
    optimizer = create_optimizer(config.optimizer, groups)
    state = TrainState()
    if (run.path / STATE).is_file():
        state = checkpoint.load_state(run.path / STATE, model, optimizer)
    elif len(run.metrics()) > 1:  # one epoch may have been measured and not yet saved
        raise DataError(f"{run.path}: has no {STATE}, so it cannot go on; start a new run")
    run.forget_after(state.epoch)
    observer.begin(config, state.epoch + 1, len(loaders.train))

    for epoch in range(state.epoch + 1, config.train.epochs + 1):
        started = time.perf_counter()
        torch.manual_seed(derived_seed(config.seed, epoch))  # drop-out and the like, without a past
        trained = train_epoch(model, task, loaders.train, optimizer, config, epoch, cast, observer)
        train_seconds = time.perf_counter() - started
        row: dict[str, Any] = {"epoch": epoch, **trained} | dict.fromkeys(("test_loss", "test_top1", "test_top5"))
        for split, loader in loaders.evaluation.items():
            scores = metrics.score(*metrics.predict(model, loader, cast))
            row |= {f"{split}_loss": scores.loss, f"{split}_top1": scores.top1, f"{split}_top5": scores.top5}
        _refuse_infinite(row, model, run, state)

        state.epoch = epoch
        chosen_on = SPLIT_OF[config.train.select]
        if chosen_on is None or row[f"{chosen_on}_top1"] > state.best_top1:
            state.best_epoch, state.best_top1 = epoch, row[f"{chosen_on}_top1"] if chosen_on else -1.0
        row["seconds"] = round(time.perf_counter() - started, 3)
        row["images_per_second"] = round(loaders.train.count / train_seconds, 1)
        run.append_metrics(row)
        if state.best_epoch == epoch:
            checkpoint.save_model(run.path / MODEL, model, card.model_copy(update={"epoch": epoch}))
        checkpoint.save_state(run.path / STATE, state, model, optimizer)
        observer.epoch(row, TrainState(**asdict(state)))
    return state


def train_epoch(
    model: nn.Module,
    task: Task,
    loader: DeviceLoader,
    optimizer: torch.optim.Optimizer,
    config: Config,
    epoch: int,
    cast: Callable[[], AbstractContextManager[object]],
    observer: Observer,
) -> dict[str, float]:
    """One pass over the training images. The host waits for the device once, at the end, for the sums."""
    model.train()
    steps = len(loader)
    losses = torch.zeros(steps, device=loader.device)
    correct = torch.zeros(steps, dtype=torch.int64, device=loader.device)
    rate = math.nan
    for index, batch in enumerate(loader.epoch(epoch)):
        rate = learning_rate(
            config.optimizer.lr, config.schedule, (epoch - 1) * steps + index, steps, config.train.epochs
        )
        set_learning_rate(optimizer, rate)
        losses[index], correct[index] = train_step(model, task, batch, optimizer, config.optimizer.grad_clip, cast)
        observer.step()

    step_losses = losses.cpu()
    bad = (~torch.isfinite(step_losses)).nonzero()
    if len(bad):
        raise DivergedError(
            f"the loss was {step_losses[bad[0]].item()} in epoch {epoch}, step {bad[0].item() + 1} of {steps}, "
            f"at learning rate {rate:g}"
        )
    sizes = torch.tensor(loader.batch_sizes(), dtype=torch.float64)
    return {
        "lr": rate,
        "train_loss": ((step_losses.double() * sizes).sum() / sizes.sum()).item(),
        "train_top1": correct.sum().item() / loader.count,
    }


def _refuse_infinite(row: Mapping[str, Any], model: nn.Module, run: RunDir, state: TrainState) -> None:
    """An epoch's last step can spoil the weights after its loss was taken."""
    for name, value in row.items():
        if name.endswith("_loss") and value is not None and not math.isfinite(value):
            raise DivergedError(f"{name} was {value} after epoch {row['epoch']}, at learning rate {row['lr']:g}")
    if not all(torch.isfinite(p).all() for p in model.state_dict().values()):
        raise DivergedError(f"weights stopped being finite in epoch {row['epoch']}, at learning rate {row['lr']:g}")

"""The one training loop. It knows neither data sets nor terminals; whoever watches is a `Watcher`."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from cifar100cli import batch_norm, checkpoint, metrics, ranks, wording
from cifar100cli.card import Card
from cifar100cli.devices import Cast, autocast, peak_memory
from cifar100cli.errors import DataError, DivergedError
from cifar100cli.loader import DeviceLoader, derived_seed
from cifar100cli.optim import Group, MovingAverage, create_optimizer, learning_rate, set_learning_rate
from cifar100cli.runs import LARGEST, STATE, RunDir
from cifar100cli.saving import Saver
from cifar100cli.schema import Config
from cifar100cli.stages import Parted
from cifar100cli.steps import StepMode, Steps, Training, create_steps
from cifar100cli.tasks import Task
from cifar100cli.watcher import EpochProgress, TrainState, Watcher

GLANCE = 0.001  # seconds between two looks at a GPU that is behind
TOLERATED_OVERFLOWS = 0.5  # of an epoch's steps, in fp16


# ----------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Loaders:
    """What is trained on, and what each epoch is measured on: the held-out and the test split, if any."""

    train: DeviceLoader
    evaluation: Mapping[str, DeviceLoader]


@dataclass(frozen=True)
class Job:
    """A training run, ready to go: everything but its folder."""

    config: Config
    preset: str
    model: nn.Module
    task: Task
    loaders: Loaders
    test: DeviceLoader
    card: Card
    device: torch.device
    precision: str
    groups: list[Group]
    parted: Parted | None
    step_mode: StepMode
    digests: Mapping[str, str]
    """Of a new run, what tells its data set, teacher and file of weights from others, by the names that it records."""

    @property
    def cast(self) -> Cast:
        """What computes in the run's precision."""
        return autocast(self.device, self.precision)


def fit(job: Job, run: RunDir, watcher: Watcher) -> TrainState:
    """Train the job's model to the end of its run, from wherever the run folder says that it is.

    After every epoch the metrics, the selected weights and the training state go to the disk, so that a run
    that is killed anywhere goes on from the last epoch that is there, and ends with the same bits. Raises
    `DivergedError` when loss or weights stop being finite, and `OSError` when an epoch cannot be saved.
    """
    config, model, loaders = job.config, job.model, job.loaders
    training = prepare_steps(job)
    state = TrainState()
    saved = ranks.on_first(lambda: _saved_state(run))
    if saved is not None:
        state = checkpoint.restore(saved, training)
    ranks.on_first(lambda: run.forget_after(state.epoch))
    steps = create_steps(training, job.step_mode)
    device = str(job.device) if ranks.count() == 1 else f"{ranks.count()} x {job.device.type}"
    watcher.begin(config, run.path, state.epoch + 1, len(loaders.train), f"{device} in {job.precision}")

    with Saver(run, job.card) as saver:
        if saved is not None:
            ranks.on_first(partial(saver.catch_up, saved, state))
            saved = None  # it is as large as all that is trained

        def on_step(taken: int, glance: Callable[[], EpochProgress | None]) -> None:
            if ranks.count() == 1:  # several ranks end together, after the epoch
                saver.check()  # raises what went wrong with saving the one before
            watcher.step(taken, glance)

        for epoch in range(state.epoch + 1, config.train.epochs + 1):
            started = time.perf_counter()
            trained = train_epoch(steps, config, epoch, on_step)
            train_seconds = time.perf_counter() - started
            loss, top1, now = trained["train_loss"], trained["train_top1"], time.monotonic()
            watcher.measure(EpochProgress(len(loaders.train), loaders.train.count, loss, top1, now))
            row: dict[str, Any] = {"epoch": epoch, **trained} | dict.fromkeys(("test_loss", "test_top1", "test_top5"))
            if not config.train.sync_batch_norm:
                _agree_on_statistics(training)
            with training.average.in_use():
                for split, loader in loaders.evaluation.items():
                    scores = metrics.score(*metrics.logits_of(model, loader, job.cast))
                    row |= {f"{split}_loss": scores.loss, f"{split}_top1": scores.top1, f"{split}_top5": scores.top5}
                _refuse_infinite(row, model)

            state.epoch = epoch
            chosen_on = wording.SPLIT_OF[config.train.select]
            if chosen_on is None or row[f"{chosen_on}_top1"] > state.best_top1:
                state.best_epoch, state.best_top1 = epoch, row[f"{chosen_on}_top1"] if chosen_on else -1.0
            if config.data.first_image_size is not None:
                row["image_size"] = config.image_size_in(epoch)
            row["seconds"] = round(time.perf_counter() - started, 3)
            speed = loaders.train.count / train_seconds
            row["images_per_second"] = round(speed, 1 if speed >= 10 else 4)
            if (peak := peak_memory(job.device)) is not None:
                row["peak_memory_bytes"] = peak
            ranks.on_first(lambda: saver.save(row, state, training))  # noqa: B023 - called at once
            watcher.epoch(row, replace(state))
        ranks.on_first(saver.wait)
    return state


def prepare_steps(job: Job) -> Training:
    """All that steps are made of, on one device or on many."""
    cast, optimizer, together = job.cast, job.config.optimizer, job.config.train.sync_batch_norm
    if ranks.count() > 1 and together and job.device.type != "cuda":
        cast = batch_norm.synchronised_on_host(cast)
    return Training(
        model=job.model,
        network=ranks.parallel(job.model, job.device, buffers=not together),
        task=job.task,
        loader=job.loaders.train,
        optimizer=create_optimizer(optimizer, job.groups, job.precision),
        grad_clip=optimizer.grad_clip,
        cast=cast,
        average=MovingAverage(job.model, job.config.train.ema),
        scaler=torch.amp.GradScaler(job.device.type, enabled=job.precision == "fp16"),
        sam_rho=optimizer.sam_rho,
        sam_adaptive=optimizer.sam_adaptive,
    )


def train_epoch(
    steps: Steps, config: Config, epoch: int, on_step: Callable[[int, Callable[[], EpochProgress | None]], None]
) -> dict[str, float]:
    """One pass over the training images. The host waits for the device once, at the end, for the sums.

    `on_step` is called as `Watcher.step` is.
    """
    training, loader = steps.training, steps.training.loader
    training.model.train()
    # Drop-out and the like, without a past, on every rank its own, and not what the loader draws the epoch from.
    torch.manual_seed(derived_seed(config.seed, epoch, 1 + ranks.rank()))
    steps.begin(epoch)
    count = len(loader)

    def rate(index: int) -> float:
        step = (epoch - 1) * count + index
        return learning_rate(config.optimizer.lr, config.schedule, step, count, config.train.epochs)

    for index in range(count):
        set_learning_rate(training.optimizer, rate(index))
        steps.take(index)
        on_step(index + 1, steps.glance)
    all_done = steps.all_done()
    while not all_done():  # captured steps are issued long before a GPU has done them, and somebody may be watching
        on_step(count, steps.glance)
        time.sleep(GLANCE)

    images = torch.tensor(sum(share.stop - share.start for share in loader.shares), device=loader.device)
    ranks.sum_up(steps.losses, steps.correct, images)
    step_losses = steps.losses.cpu().double() / ranks.count()
    finite = torch.isfinite(step_losses)
    # A step that overflows in fp16 moves nothing. Where it is not the exception, training does not go anywhere.
    bearable = TOLERATED_OVERFLOWS * count if training.scaler.is_enabled() else 0
    if (~finite).sum() > bearable:
        bad = int((~finite).nonzero()[0])
        raise DivergedError(
            f"the loss was {step_losses[bad].item()} in epoch {epoch}, step {bad + 1} of {count}, "
            f"at learning rate {rate(bad):g}"
        )
    sizes = torch.tensor(loader.batch_sizes(), dtype=torch.float64) * finite
    return {
        "lr": rate(count - 1),
        "images": int(images.item()),
        "train_loss": (step_losses.nan_to_num(0, 0, 0) * sizes).sum().item() / sizes.sum().item(),
        "train_top1": steps.correct.sum().item() / loader.count,
    }


def _saved_state(run: RunDir) -> checkpoint.Saved | None:
    """What the run can go on from, if it has finished an epoch."""
    if (run.path / STATE).is_file():
        return checkpoint.read_state(run.path / STATE)
    if len(run.metrics()) > 1:  # one epoch may have been measured and not yet saved
        raise DataError(f"{run.path}: has no {STATE}, so it cannot go on; start a new run")
    return None


def _agree_on_statistics(training: Training) -> None:
    """Take rank 0's batch statistics on every rank: they are kept, and so they are what is measured."""
    persistent = training.model.state_dict().keys()
    for name, buffer in training.model.named_buffers():
        if name in persistent:
            ranks.hand_out(buffer, owner=0)
            if name in training.average.tensors:
                ranks.hand_out(training.average.tensors[name], owner=0)


def _refuse_infinite(row: Mapping[str, Any], model: nn.Module) -> None:
    """An epoch's last step can spoil the weights after its loss was taken. A loss beyond measure is an infinite one."""
    for name, value in row.items():
        if name.endswith("_loss") and value is not None and not abs(value) < LARGEST:
            told = wording.loss(value)
            raise DivergedError(f"{name} was {told} after epoch {row['epoch']}, at learning rate {row['lr']:g}")
    if not all(torch.isfinite(p).all() for p in model.state_dict().values()):
        raise DivergedError(f"weights stopped being finite in epoch {row['epoch']}, at learning rate {row['lr']:g}")

"""What the commands do: train, go on, try, predict."""

import contextlib
import errno
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from cifar100cli import checkpoint, devices, evaluation, images, machine, metrics, ranks, trainer
from cifar100cli.card import read_card
from cifar100cli.choosing import begun_by
from cifar100cli.classifier import PICTURES, Classifier
from cifar100cli.config import STEPS, TEACHER, Preset, having
from cifar100cli.errors import CifarError, DataError, DivergedError, FolderError, RunInterrupted
from cifar100cli.folders import Where
from cifar100cli.jobs import Begun, prepare
from cifar100cli.models import count_parameters
from cifar100cli.runs import (
    CONFIG,
    DATA_DIGEST,
    LARGEST,
    MODEL,
    PREDICTIONS,
    STATE,
    TEACHER_DIGEST,
    TEACHER_PLACE,
    WEIGHTS_DIGEST,
    RunDir,
)
from cifar100cli.schema import Config
from cifar100cli.trainer import Job
from cifar100cli.watcher import TrainState, Watcher
from cifar100cli.wording import SPLIT_OF, several

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# ------------------------------------------------------------------------------------------------ training


def train(preset: Preset, where: Where, watcher: Watcher) -> dict[str, Any]:
    """Train a preset from the start in a new run folder; returns what `result.json` holds.

    Where torchrun has started the ranks again after one of them had failed, the run that they had begun goes on.
    """
    begun = None
    if restarts := ranks.restarts():
        begun = ranks.on_first(lambda: begun_by(where.runs_dir, preset.name, preset.config, ranks.launch()))
    if begun is not None:
        watcher.say(f"started again by torchrun (restart {restarts})")
        return resume(begun, where, watcher)
    run = None
    try:
        with devices.deterministic(preset.config.train.deterministic):
            job = prepare(preset, where, watcher)
            environment = {**machine.environment(job.device, job.precision, where.data_dir), **job.digests}
            run = ranks.on_first(lambda: RunDir.create(where.runs_dir, job.preset, job.config, environment))
            return _fit(job, run, watcher)
    except KeyboardInterrupt as stop:
        raise _interrupted(run, preset.config, stop) from None


def resume(
    run: RunDir,
    where: Where,
    watcher: Watcher,
    teacher: str | None = None,
    steps: str | None = None,
    *,
    held: bool = False,
) -> dict[str, Any]:
    """Go on with a run that was stopped; a complete one is only read.

    `teacher` is where the run's teacher is now, and `steps` what `train.compile` is from here on. `held` tells that the
    caller has the run for itself already; else it is held from the first step on.
    """
    left = ranks.on_first(lambda: _what_is_left(run))
    if left.result is not None:
        return {**left.result, "run_dir": str(run.path)}  # which may have been moved since
    config = left.config if teacher is None else having(left.config, TEACHER, teacher)
    if steps is not None:
        config = having(config, STEPS, steps)
    try:
        with devices.deterministic(config.train.deterministic):
            job = prepare(Preset(run.preset, config), where, watcher, begun=left.begun)
            if others := [count for count in left.ranks if count != ranks.count()]:
                watcher.say(
                    f"epochs of this run were trained by {several(others[0], 'rank')}, and it goes on with "
                    f"{ranks.count()}: it ends with other bits than one of as many throughout"
                )
            del left  # which holds the training state once more
            resumed = machine.environment(job.device, job.precision, where.data_dir)
            resumed[STEPS] = config.train.compile
            if config.distillation is not None:
                resumed[TEACHER_PLACE] = config.distillation.teacher
            return _fit(job, run, watcher, held=held, resumed=resumed)
    except KeyboardInterrupt as stop:
        raise _interrupted(run, config, stop) from None


def _interrupted(run: RunDir | None, config: Config, stop: KeyboardInterrupt) -> RunInterrupted:
    """A signal's exception, with what is saved by now: an epoch counts once its training state is whole."""
    finished = checkpoint.finished_epochs(run.path / STATE) if run is not None else 0
    return RunInterrupted(run.path if run is not None else None, finished, config.train.epochs, stop)


class _Left(NamedTuple):
    """What is in a run's folder: a result, if it is complete, and else what it can go on from."""

    result: dict[str, Any] | None
    config: Config
    begun: Begun
    ranks: Sequence[int]
    """All numbers of ranks that trained it."""


def _what_is_left(run: RunDir) -> _Left:
    path = run.path / STATE
    result, config = run.result() if run.complete else None, run.settings()
    state = checkpoint.read_state(path) if result is None and path.is_file() else None
    if state is not None and (best := state.about.get("best_epoch")) != state.about.get("epoch"):
        try:
            kept = checkpoint.read(run.path / MODEL).about.get("epoch")
            if kept != best:
                raise DataError(f"{run.path / MODEL}: holds epoch {kept}, not {best}")
        except DataError as error:
            raise DataError(
                f"{error}; it held the epoch that was the best so far, and the run cannot end without: bring the file "
                "back, or train anew"
            ) from None
    unseen = None
    if state is not None:
        with contextlib.suppress(DataError):  # where the last epoch is the best, the file is written anew
            unseen = read_card(run.path / MODEL).unseen
    keys = ("precision", DATA_DIGEST, TEACHER_DIGEST, WEIGHTS_DIGEST)
    precision, images, teacher, weights = (run.recorded(key) for key in keys)
    counts = {time["ranks"] for time in run.times() if isinstance(time.get("ranks"), int)} if state is not None else {}
    return _Left(result, config, Begun(run.path, precision, images, teacher, weights, state, unseen), sorted(counts))


def _fit(
    job: Job, run: RunDir, watcher: Watcher, *, held: bool = False, resumed: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Train in the run's folder, which goes on with what `resumed` says of the machine, if it does; its result."""
    try:
        with _in_words(job, run), contextlib.nullcontext() if held else _alone(run):
            if resumed is not None:
                ranks.on_first(lambda: run.note_resumption(resumed))
            ranks.on_first(run.forget_divergence)
            state = trainer.fit(job, run, watcher)
            result = _result(job, run, state)
            ranks.on_first(lambda: run.write_result(result))  # the last file: from now on the run is complete
            watcher.finish(result)
    except CifarError as error:
        error.run_dir = run.path
        raise
    return result


@contextlib.contextmanager
def _alone(run: RunDir) -> Iterator[None]:
    """Rank 0 holds the run against other commands."""
    with contextlib.ExitStack() as held:
        ranks.on_first(lambda: held.enter_context(run.exclusively()))
        yield


class _NoAnswer(DivergedError):  # noqa: N818
    """The selected weights are finite, and what they say of images is not."""


@contextlib.contextmanager
def _in_words(job: Job, run: RunDir) -> Iterator[None]:
    """What ends a run, with what is left of it and what to do.

    What is left only the first rank can see: the others may be on machines that the run's folder is not on.
    """
    try:
        yield
    except DivergedError as error:
        kept = f"the run is {run.path}"
        if not isinstance(error, _NoAnswer):
            kept = _last_good(run)
            if ranks.rank() == 0:
                with contextlib.suppress(OSError):
                    run.note_divergence(str(error))
        clip = "a smaller optimizer.grad_clip" if job.config.optimizer.grad_clip else "--set optimizer.grad_clip=5"
        wider = ", or --set train.precision=fp32" if job.precision == "fp16" else ""
        raise DivergedError(f"{error}; {kept}; try a lower --lr, or {clip}{wider}") from None
    except (RuntimeError, MemoryError) as error:
        if devices.is_out_of_memory(error):
            data, what = job.config.data, devices.out_of_memory(error)
            eager = ", or go on with --set train.compile=off, which takes less" if job.step_mode.name != "off" else ""
            raise CifarError(
                f"{what} with {data.batch_size} images of {data.image_size} pixels a step: lower --batch-size or "
                f"--image-size{eager}; {_last_good(run)}"
            ) from None
        if ranks.is_lost(error):
            words = f"another rank failed, or could not be reached, so this one stops too ({ranks.words_of(error)})"
            raise CifarError(
                f"{words}; torchrun --max-restarts goes on by itself; {_last_epoch(job, run, 'by hand, ')}"
            ) from None
        if failure := devices.failure(error):
            raise CifarError(f"{failure}; {_last_epoch(job, run)}") from error
        raise
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        if ranks.rank() == 0 and not (run.path / CONFIG).is_file():
            left = f"the run's folder {run.path} is gone; where it was moved to, --resume goes on with it"
        else:
            mended = "there is room again" if error.errno in NO_ROOM else "that is mended"
            left = _last_epoch(job, run, f"once {mended}, ")
        raise FolderError(f"{where}{error.strerror or error}; {left}") from None


def _last_epoch(job: Job, run: RunDir, how: str = "") -> str:
    """What is saved, and how it is gone on with; of other ranks than the first, where the run is."""
    if ranks.rank() > 0:
        return f"the run is {run.path}"
    finished = checkpoint.finished_epochs(run.path / STATE)
    return f"{finished} of {job.config.train.epochs} epochs are done and saved; {how}resume with: {run.to_go_on()}"


def _last_good(run: RunDir) -> str:
    if ranks.rank() > 0:
        return f"the run is {run.path}"
    if not (run.path / MODEL).is_file():
        return f"no epoch was finished (the run is {run.path})"
    return f"the last good checkpoint is {run.path / MODEL}"


def _result(job: Job, run: RunDir, state: TrainState) -> dict[str, Any]:
    """Measure the test set with the selected weights, and gather the run's figures."""
    saved = ranks.on_first(lambda: checkpoint.read(run.path / MODEL))
    checkpoint.load_weights(job.model, saved.tensors, saved.path)
    if job.parted is not None:  # the result is the whole network's, on images
        job.parted.switch_front(on=True)
        for loader in (job.loaders.train, *job.loaders.evaluation.values()):
            loader.features = None
    logits, labels = metrics.logits_of(job.model, job.test, job.cast)
    test = metrics.evaluate(logits, labels, job.card.superclass_of)
    _refuse_no_answer("test", test.loss, state)
    classes, every = job.card.classes, range(len(labels))
    ranks.on_first(lambda: evaluation.write_predictions(run.path / PREDICTIONS, classes, logits, labels, every))
    rows = ranks.on_first(run.metrics)
    split = SPLIT_OF[job.config.train.select]
    held_out = job.loaders.evaluation.get("val")
    result = {
        "preset": job.preset,
        "dataset": job.card.dataset,
        "seed": job.config.seed,
        "run_dir": str(run.path),
        "complete": True,
        "epochs": job.config.train.epochs,
        "select": job.config.train.select,
        "test": test.figures(),
        "best": {
            "epoch": state.best_epoch,
            "top1": state.best_top1 if split else test.top1,
            "split": split or "test",
        },
        "last": {"epoch": state.epoch, "top1": rows[-1][f"{split}_top1"] if split else test.top1},
        "train": {"loss": rows[-1]["train_loss"], "top1": rows[-1]["train_top1"]},
        "parameters": count_parameters(job.model),
        "trainable_parameters": count_parameters(job.model, trainable=True),
        "seconds": round(sum(row["seconds"] for row in rows), 3),
        "images_per_second": round(len(rows) / sum(1 / row["images_per_second"] for row in rows), 1),
        "device": str(job.device),
        "precision": job.precision,
        "compile": job.step_mode.name,
        "ranks": ranks.count(),
    }
    if peaks := [row["peak_memory_bytes"] for row in rows if "peak_memory_bytes" in row]:
        result["peak_memory_bytes"] = max(peaks)
    if held_out is not None:
        val = metrics.score(*metrics.logits_of(job.model, held_out, job.cast))
        _refuse_no_answer("held-out", val.loss, state)
        result["val"] = {"top1": val.top1, "top5": val.top5, "loss": val.loss}
    return result


def _refuse_no_answer(images: str, loss: float, state: TrainState) -> None:
    if not abs(loss) < LARGEST:
        raise _NoAnswer(f"the loss on the {images} images was {loss:g} with the weights of epoch {state.best_epoch}")


def dry_run(preset: Preset, where: Where, watcher: Watcher) -> dict[str, Any]:
    """Build everything and take one training step; nothing is written."""
    job = prepare(preset, where, watcher, dry=True)
    loader = job.loaders.train
    training = trainer.prepare_steps(job)
    job.model.train()
    plan = replace(loader.plan(1), image_size=None)  # the images as large as they get
    with devices.deterministic(job.config.train.deterministic):  # as the run, which would refuse what has none
        loss, _ = training.step(plan, loader.shares[0], loader.loss_weights[0])
    ranks.sum_up(loss)  # as that of an epoch's steps, so that all ranks refuse it, or none
    loss /= ranks.count()
    if not abs(loss.item()) < LARGEST:
        raise DivergedError(f"the loss of the first step was {loss.item():g}: look at the weights to start from")
    return {
        "dry_run": True,
        "preset": job.preset,
        "dataset": job.card.dataset,
        "training_images": job.loaders.train.count,
        "held_out_images": job.loaders.evaluation["val"].count if "val" in job.loaders.evaluation else 0,
        "test_images": job.test.count,
        "backbone": job.config.model.backbone,
        "parameters": count_parameters(job.model),
        "trainable_parameters": count_parameters(job.model, trainable=True),
        "batch": list(loader.batch(plan, loader.shares[0]).inputs.shape),
        "steps_per_epoch": len(job.loaders.train),
        "epochs": job.config.train.epochs,
        "loss": loss.item(),
        "device": str(job.device),
        "precision": job.precision,
    }


# ---------------------------------------------------------------------------------------------- predicting


def predict(path: Path, files: Sequence[Path], where: Where, watcher: Watcher, top: int = 5) -> dict[str, Any]:
    """The `top` most likely classes of files of pictures; returns what `predict --json` prints.

    A file that is no image is skipped, and stands under `skipped` with the reason.
    """
    classifier = Classifier(checkpoint.load_model(path), where)
    found: list[dict[str, Any]] = []
    skipped = []
    with watcher.progress("pictures", len(files)) as advance:
        for start in range(0, len(files), PICTURES):
            names, pixels = [], []
            for file in files[start : start + PICTURES]:
                try:
                    pixels.append(images.read_image(file))
                    names.append(str(file))
                except DataError as error:
                    skipped.append({"image": str(file), "reason": str(error)})
                advance(1)
            if names:
                guesses = classifier.guesses(torch.from_numpy(np.stack(pixels)), top)
                found += [{"image": name, "top": best} for name, best in zip(names, guesses, strict=True)]
    return {
        "checkpoint": str(classifier.path),
        "preset": classifier.card.preset,
        "dataset": classifier.card.dataset,
        "images": found,
        "skipped": skipped,
    }

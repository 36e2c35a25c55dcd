"""The composition root: data, model, task and loop put together for each command."""

import csv
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cifar100cli import __version__, checkpoint, computed, datasets, metrics, teachers, trainer
from cifar100cli.albumentations_backend import AlbumentationsOneOf
from cifar100cli.augment import POLICIES, Policy, Views
from cifar100cli.checkpoint import Card, Checkpoint, TrainState
from cifar100cli.computed import Speaker
from cifar100cli.config import Augment, Config, Distillation, Finetune, Preset, differences
from cifar100cli.datasets import Dataset, Split
from cifar100cli.errors import CifarError, DataError, DivergedError, RunInterrupted, UsageError
from cifar100cli.loader import DeviceLoader, Features, Preprocessing, evaluation_batch_size, preprocessing_for
from cifar100cli.models import check_backbone, classifiers, count_parameters, create_model
from cifar100cli.one_of import one_of
from cifar100cli.optim import Group, create_optimizer, everything
from cifar100cli.runs import MODEL, STATE, RunDir, replacing
from cifar100cli.stages import Parted, Stage, StageRow, freeze, learning, stage_rows, stages_of
from cifar100cli.tasks import DistillationTask, Task, Teacher, create_task
from cifar100cli.trainer import Loaders, Observer


@dataclass(frozen=True)
class Where:
    """Folders and device of a command."""

    data_dir: Path
    runs_dir: Path
    cache_dir: Path
    device: str = "auto"


class Watcher(Observer, Speaker, Protocol):
    """Whoever shows what a command does, before the epochs too."""

    def stages(self, rows: Sequence[StageRow]) -> None:
        """What of the network learns."""


@dataclass(frozen=True)
class Job:
    """A training run, ready to go: everything but its folder."""

    config: Config
    preset: str
    dataset: Dataset
    model: nn.Module
    task: Task
    loaders: Loaders
    test: DeviceLoader
    card: Card
    device: torch.device
    precision: str
    groups: list[Group]
    split: Parted | None = None


# ------------------------------------------------------------------------------------------------ training


def train(preset: Preset, where: Where, watcher: Watcher) -> dict[str, Any]:
    """Train a preset from the start in a new run folder; returns what `result.json` holds."""
    job = prepare(preset, where, watcher)
    run = RunDir.create(where.runs_dir, job.preset, job.config, environment(job, where))
    return _fit(job, run, watcher)


def resume(run: RunDir, where: Where, watcher: Watcher) -> dict[str, Any]:
    """Go on with a run that was stopped; a complete one is only read."""
    if run.complete:
        return run.result()
    state = run.path / STATE
    job = prepare(Preset(run.preset, run.config()), where, watcher, state=state if state.is_file() else None)
    began_in = run.environment().get("precision")
    if job.config.train.precision == "auto" and began_in != job.precision:
        raise UsageError(
            f"{run.path}: was begun in {began_in}, and here `train.precision: auto` means {job.precision}; "
            "resume it on the kind of machine that it was begun on"
        )
    return _fit(job, run, watcher)


def refuse_other_settings(run: RunDir, asked: Config) -> None:
    """A run goes on as it was begun: raise `UsageError` for a setting that is not the run's own."""
    changed = differences(asked, run.config())
    if changed:
        key, (wanted, has) = next(iter(changed.items()))
        raise UsageError(
            f"--resume goes on with the run's own settings, and {run.path} has {key} = {has}, not {wanted}; "
            "leave the flag out, or start a new run"
        )


def _fit(job: Job, run: RunDir, watcher: Watcher) -> dict[str, Any]:
    try:
        with run.exclusively():
            state = trainer.fit(
                job.model,
                job.task,
                job.loaders,
                job.config,
                run,
                job.card,
                groups=job.groups,
                precision=job.precision,
                observer=watcher,
            )
            result = _result(job, run, state)
            run.write_result(result)
    except DivergedError as error:
        raise DivergedError(f"{error}; {_last_good(run)}; try a lower --lr, or a smaller optimizer.grad_clip") from None
    except KeyboardInterrupt as stop:
        raise RunInterrupted(run.path, len(run.metrics()), job.config.train.epochs, stop) from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise CifarError(
            f"{where}{error.strerror or error}; finished epochs are saved; once there is room again, go on with: "
            f"cifar100 train --resume {shlex.quote(str(run.path))}"
        ) from None
    return result


def _last_good(run: RunDir) -> str:
    if not (run.path / MODEL).is_file():
        return f"no epoch was finished (the run is {run.path})"
    return f"the last good checkpoint is {run.path / MODEL}"


def _result(job: Job, run: RunDir, state: TrainState) -> dict[str, Any]:
    """Measure the test set with the selected weights, and gather the run's figures."""
    tensors, _ = checkpoint.read(run.path / MODEL)
    checkpoint.load_weights(job.model, tensors, run.path / MODEL)
    if job.split is not None:  # the result is the whole network's, on images
        job.split.switch_front(on=True)
        for loader in (job.loaders.train, *job.loaders.evaluation.values()):
            loader.features = None
    test = _evaluate(job.model, job.test, job.card, job.device, job.precision)
    rows = run.metrics()
    split = trainer.SPLIT_OF[job.config.train.select]
    held_out = job.loaders.evaluation.get("val")
    result = {
        "preset": job.preset,
        "dataset": job.dataset.name,
        "seed": job.config.seed,
        "run_dir": str(run.path),
        "complete": True,
        "epochs": job.config.train.epochs,
        "select": job.config.train.select,
        "test": {key: getattr(test, key) for key in ("top1", "top5", "loss", "ece", "superclass_top1")},
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
    }
    if held_out is not None:
        val = _evaluate(job.model, held_out, job.card, job.device, job.precision)
        result["val"] = {"top1": val.top1, "top5": val.top5, "loss": val.loss}
    return result


def prepare(preset: Preset, where: Where, watcher: Watcher, *, state: Path | None = None, dry: bool = False) -> Job:
    """Check everything and load everything; nothing is written but what is computed once, and not that if `dry`.

    A run that goes on has its network's weights in `state`, and needs those that it began from no more.
    """
    config = preset.config
    check_backbone(config.model.backbone)
    device = trainer.select_device(where.device)
    precision = trainer.resolve_precision(config.train.precision, device)
    dataset = datasets.load(config.data.dataset, where.data_dir)
    training, held_out = training_splits(dataset, config)
    preprocessing = preprocessing_for(config.data.normalize, config.data.image_size, training, config.model.backbone)
    saved_teacher = None
    if config.distillation is not None:
        saved_teacher = _load_teacher(config.distillation, dataset)
    torch.manual_seed(config.seed)
    model = create_model(config, len(dataset.classes), pretrained=None if state is None else False)
    if state is not None:
        checkpoint.load_weights_of_state(state, model)
    elif config.model.weights is not None:
        watcher.say(f"starting from {config.model.weights}; the head is a new one of {len(dataset.classes)} classes")
    model = model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    train_loader = DeviceLoader(
        training,
        config.data.batch_size,
        device,
        preprocessing,
        shuffle=True,
        policy=_policy(config.augment),
        seed=config.seed,
    )
    if 1 in train_loader.batch_sizes() and any(isinstance(module, _BatchNorm) for module in model.modules()):
        raise UsageError("data.batch_size = 1: batch norm cannot train on one image at a time; use at least 2")
    test_loader = _evaluation_loader(dataset.test, device, preprocessing)
    evaluation = {}
    if held_out is not None:
        evaluation["val"] = _evaluation_loader(held_out, device, preprocessing)
    if config.train.select == "best_test" or config.train.watch_test:  # else the test set is looked at once, at the end
        evaluation["test"] = test_loader
    card = Card(
        format=checkpoint.FORMAT,
        preset=preset.name,
        dataset=dataset.name,
        classes=dataset.classes,
        superclasses=dataset.superclasses,
        superclass_of=dataset.superclass_of,
        image_size=preprocessing.image_size,
        mean=preprocessing.mean,
        std=preprocessing.std,
        config=config.model_dump(mode="json", exclude_none=True),
    )
    task = create_task(config.loss)
    if config.distillation is not None and saved_teacher is not None:
        teacher = _teacher(saved_teacher, train_loader, precision, where, watcher, config, dry=dry)
        task = DistillationTask(task, teacher, config.distillation)
    loaders = Loaders(train_loader, evaluation)
    groups, split = everything(model), None
    if config.finetune is not None:
        groups, split = _finetune(config, config.finetune, model, loaders, precision, where, watcher, dry=dry)
    return Job(config, preset.name, dataset, model, task, loaders, test_loader, card, device, precision, groups, split)


def _policy(config: Augment) -> Policy:
    if config.policy == "one_of":
        return AlbumentationsOneOf() if config.backend == "albumentations" else one_of
    return POLICIES[config.policy]


# ------------------------------------------------------------------------------------------------ teachers


def _load_teacher(config: Distillation, dataset: Dataset) -> Checkpoint:
    """Read the teacher and see that it knows the same classes."""
    saved = checkpoint.load_model(Path(config.required_teacher()))
    if saved.card.classes != dataset.classes:
        kind = "other" if len(saved.card.classes) == len(dataset.classes) else f"{len(saved.card.classes)}"
        raise DataError(
            f"--teacher {config.teacher}: knows {kind} classes, of {saved.card.dataset}, and the student is to learn "
            f"the {len(dataset.classes)} of {dataset.name}; name a teacher that was trained on {dataset.name}"
        )
    return saved


def _teacher(
    saved: Checkpoint,
    loader: DeviceLoader,
    precision: str,
    where: Where,
    watcher: Watcher,
    config: Config,
    *,
    dry: bool,
) -> Teacher:
    """The teacher of a run: looked up where an image has few versions, else run in every step."""
    device = loader.device
    folder = where.cache_dir / teachers.key(saved, loader, precision)
    model = saved.model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    online = teachers.OnlineTeacher(model, saved.card.preprocessing, trainer.autocast(device, precision))
    if dry:
        return online
    if isinstance(loader.policy, Views):
        logits = computed.table(
            "the teacher's logits",
            online.logits,
            loader,
            batch_size=online.batch_size,
            dtype=torch.float32,
            folder=folder,
            speaker=watcher,
        )
        return teachers.CachedTeacher(logits.to(device))
    seconds = online.seconds(next(iter(loader.epoch(1)))) * len(loader)
    watcher.say(
        f"the teacher runs in every step, because no two views are the same under {config.augment.policy}: it adds "
        f"about {seconds:.1f} s an epoch here, {seconds * config.train.epochs / 3600:.1f} h in all; "
        "with --augment none or flip it would look at each image once or twice"
    )
    return online


# --------------------------------------------------------------------------------------------- fine-tuning


def _finetune(
    config: Config,
    finetune: Finetune,
    model: nn.Module,
    loaders: Loaders,
    precision: str,
    where: Where,
    watcher: Watcher,
    *,
    dry: bool,
) -> tuple[list[Group], Parted | None]:
    """Freeze what is not to learn, and compute once what it gives; returns the rates, and the parted network."""
    name = config.model.backbone
    stages = stages_of(model, name, classifiers(name))
    kept = learning(stages, finetune.unfreeze, name)
    freeze(model, stages, kept, adapt=finetune.bn == "adapt")
    scales = {stage.name: finetune.stage_decay**depth for depth, stage in enumerate(reversed(kept))}
    groups = [Group(list(stage.parameters(model)), scales[stage.name]) for stage in kept]
    watcher.stages(stage_rows(model, stages, scales, config.optimizer.lr, finetune.bn))
    if dry or finetune.cache == "off" or len(kept) == len(stages):
        return groups, None
    split = Parted(model, kept[0].start)
    sample = loaders.train.preprocessing(loaders.train.images[:2])
    obstacle = None
    if not isinstance(loaders.train.policy, Views):
        obstacle = f"no two views are the same under {config.augment.policy}"
    elif finetune.bn == "adapt":
        obstacle = "the frozen stages' batch statistics move (--bn adapt)"
    elif config.distillation is not None:
        obstacle = "a teacher wants to see the images"
    elif not split.is_exact(sample):
        obstacle = f"{name} is no chain of stages that could be entered at {kept[0].name}"
    if obstacle is not None:
        if finetune.cache == "on":
            raise UsageError(f"finetune.cache = on is not possible: {obstacle}; leave --cache out")
        watcher.say(f"the frozen part runs in every epoch, because {obstacle}")
        return groups, None
    dtype = _features_type(finetune.cache_dtype, precision)
    about = {
        "what": "features",
        "backbone": name,
        "start": kept[0].start,
        "preprocessing": asdict(loaders.train.preprocessing),
        "precision": precision,
        "dtype": str(dtype),
    }
    frozen = [(n, t) for n, t in model.state_dict().items() if _is_frozen(n, stages, kept)]
    cast = trainer.autocast(loaders.train.device, precision)

    def front(images: torch.Tensor) -> torch.Tensor:
        with cast():
            features = split.front(loaders.train.preprocessing(images))
        return features.permute(0, 2, 3, 1) if features.ndim == 4 else features

    for title, loader in {"training": loaders.train, **loaders.evaluation}.items():
        found = computed.table(
            f"features of the {title} images",
            front,
            loader,
            batch_size=evaluation_batch_size(config.data.image_size),
            dtype=dtype,
            folder=where.cache_dir / computed.key(about, frozen, loader),
            speaker=watcher,
        )
        loader.features = Features(found, loader.device)
    split.switch_front(on=False)
    return groups, split


def _features_type(name: str, precision: str) -> torch.dtype:
    """`auto` is what loses nothing or next to nothing: bfloat16 where the network computes in it, else float16."""
    if name == "auto":
        name = "bfloat16" if precision == "bf16" else "float16"
    found: torch.dtype = getattr(torch, name)
    return found


def _is_frozen(weight: str, stages: Sequence[Stage], kept: Sequence[Stage]) -> bool:
    """Whether a name of the state dict belongs to a stage in front of the learning ones."""
    module = weight.rpartition(".")[0]
    return any(module in stage.modules for stage in stages if stage not in kept)


def training_splits(dataset: Dataset, config: Config) -> tuple[Split, Split | None]:
    """What a preset trains on and what it holds out: first held out, then a fraction of the rest."""
    training, held_out = datasets.hold_out(dataset.train, config.data.val_fraction)
    training = datasets.subset(training, config.data.fraction, config.seed)
    if len(training) < 2:
        raise UsageError(f"data.fraction = {config.data.fraction} leaves fewer than two images to train on")
    return training, held_out


def _evaluation_loader(split: Split, device: torch.device, preprocessing: Preprocessing) -> DeviceLoader:
    return DeviceLoader(split, evaluation_batch_size(preprocessing.image_size), device, preprocessing)


def dry_run(preset: Preset, where: Where, watcher: Watcher) -> dict[str, Any]:
    """Build everything and take one training step; nothing is written."""
    job = prepare(preset, where, watcher, dry=True)
    optimizer = create_optimizer(job.config.optimizer, job.groups)
    batch = next(iter(job.loaders.train.epoch(1)))
    job.model.train()
    loss, _ = trainer.train_step(
        job.model,
        job.task,
        batch,
        optimizer,
        job.config.optimizer.grad_clip,
        trainer.autocast(job.device, job.precision),
    )
    return {
        "dry_run": True,
        "preset": job.preset,
        "dataset": job.dataset.name,
        "training_images": job.loaders.train.count,
        "held_out_images": job.loaders.evaluation["val"].count if "val" in job.loaders.evaluation else 0,
        "test_images": job.test.count,
        "backbone": job.config.model.backbone,
        "parameters": count_parameters(job.model),
        "trainable_parameters": count_parameters(job.model, trainable=True),
        "batch": list(batch.inputs.shape),
        "steps_per_epoch": len(job.loaders.train),
        "epochs": job.config.train.epochs,
        "loss": loss.item(),
        "device": str(job.device),
        "precision": job.precision,
    }


def environment(job: Job, where: Where) -> dict[str, Any]:
    """What a run was made with and on."""
    device_name = torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else _processor()
    versions = {name: metadata.version(name) for name in ("torch", "torchvision", "timm", "numpy", "safetensors")}
    return {
        "cifar100": __version__,
        "command": sys.argv,
        "commit": _commit(),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "data_dir": str(where.data_dir.absolute()),
        "device": str(job.device),
        "device_name": device_name,
        "precision": job.precision,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cuda": torch.version.cuda,
        "versions": versions,
    }


def machine(device: str) -> str:
    """PyTorch and the device that it would use, in one line."""
    chosen = trainer.select_device(device)
    name = torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else _processor()
    precision = trainer.resolve_precision("auto", chosen)
    return f"PyTorch {torch.__version__} on {chosen} ({name}), {torch.get_num_threads()} threads, precision {precision}"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit that this code is at, when it runs from a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


# ---------------------------------------------------------------------------------------------- evaluating


def evaluate(path: Path, where: Where, split: str = "test", predictions: Path | None = None) -> dict[str, Any]:
    """Measure a run or checkpoint on a split of its data set; returns what `evaluate --json` prints.

    `predictions` names a CSV file for one line an image: index in the split, true class, predicted class,
    confidence, and whether it is right.
    """
    saved = checkpoint.load_model(path)
    device = trainer.select_device(where.device)
    precision = trainer.resolve_precision(saved.config.train.precision, device)
    dataset = datasets.load(saved.card.dataset, where.data_dir)
    if dataset.classes != saved.card.classes:
        raise DataError(f"{saved.path}: its classes are not those of {dataset.name} in {where.data_dir}")
    model = saved.model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    loader = _evaluation_loader(_split_of(saved, dataset, split), device, saved.card.preprocessing)
    logits, labels = metrics.predict(model, loader, trainer.autocast(device, precision))
    result = metrics.evaluate(logits, labels, saved.card.superclass_of)
    classes = saved.card.classes
    if predictions is not None:
        _write_predictions(predictions, classes, logits, labels)
    return {
        "checkpoint": str(saved.path),
        "preset": saved.card.preset,
        "epoch": saved.card.epoch,
        "dataset": dataset.name,
        "split": split,
        **{key: getattr(result, key) for key in ("count", "top1", "top5", "loss", "ece", "superclass_top1")},
        "per_class": dict(zip(classes, result.per_class, strict=True)),
        "confusions": [
            {"true": classes[true], "predicted": classes[predicted], "count": count}
            for true, predicted, count in result.confusions
        ],
    }


def _split_of(saved: Checkpoint, dataset: Dataset, split: str) -> Split:
    """The very images that the checkpoint's run trained on, held out, or tested on."""
    if split == "test":
        return dataset.test
    training, held_out = training_splits(dataset, saved.config)
    if split == "train":
        return training
    if held_out is None:
        raise UsageError(f"--split val: {saved.path} comes from a run that held nothing out (data.val_fraction is 0)")
    return held_out


def _evaluate(
    model: nn.Module, loader: DeviceLoader, card: Card, device: torch.device, precision: str
) -> metrics.EvalResult:
    logits, labels = metrics.predict(model, loader, trainer.autocast(device, precision))
    return metrics.evaluate(logits, labels, card.superclass_of)


def _write_predictions(path: Path, classes: tuple[str, ...], logits: torch.Tensor, labels: torch.Tensor) -> None:
    confidences, predicted = logits.double().softmax(1).max(1)
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["index", "true", "predicted", "confidence", "correct"])
        for index, (true, guess, confidence) in enumerate(
            zip(labels.tolist(), predicted.tolist(), confidences.tolist(), strict=True)
        ):
            writer.writerow([index, classes[true], classes[guess], f"{confidence:.6f}", int(true == guess)])

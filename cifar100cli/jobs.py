"""A training run made ready: data, model, task, teacher and frozen features, from a preset."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cifar100cli import (
    __version__,
    backbones,
    batch_norm,
    checkpoint,
    datasets,
    devices,
    features,
    learning,
    ranks,
    starting_weights,
    steps,
    teachers,
)
from cifar100cli.bounded import kind_of
from cifar100cli.card import Card
from cifar100cli.catalog import DatasetName
from cifar100cli.checkpoint import Checkpoint, Saved
from cifar100cli.config import TEACHER, WEIGHTS, Preset, flat
from cifar100cli.datasets import Dataset, Split
from cifar100cli.errors import DataError, UsageError
from cifar100cli.flops import forward_flops
from cifar100cli.folders import Where
from cifar100cli.loader import DeviceLoader, Preprocessing, evaluation_batch_size, preprocessing_for
from cifar100cli.models import check_backbone
from cifar100cli.policies import create_policy
from cifar100cli.runs import DATA_DIGEST, ENVIRONMENT, TEACHER_DIGEST, WEIGHTS_DIGEST
from cifar100cli.schema import Config
from cifar100cli.steps import StepMode
from cifar100cli.tasks import DistillationTask, create_task
from cifar100cli.trainer import Job, Loaders
from cifar100cli.watcher import Watcher


@dataclass(frozen=True)
class Begun:
    """What a run that goes on was begun with, and its network's weights in `state` once an epoch is saved.

    The `weights` that it began from are not read again then: `unseen`, of its card, says which images these had not
    learned. Older runs do not know the digests of their `images`, of their `teacher`, and of these.
    """

    run: Path
    precision: str | None
    images: str | None
    teacher: str | None
    weights: str | None
    state: Saved | None
    unseen: Mapping[DatasetName, float] | None

    def refuse_other_precision(self, config: Config, precision: str) -> None:
        """Raise `UsageError` where the machine would go on in another precision."""
        if self.precision is None:
            raise DataError(f"{self.run / ENVIRONMENT}: does not say in which precision the run was begun")
        if config.train.precision == "auto" and self.precision != precision:
            raise UsageError(
                f"{self.run}: was begun in {self.precision}, and here `train.precision: auto` means "
                f"{precision}; resume it on the kind of machine that it was begun on"
            )

    def refuse_other_images(self, name: str, digest: str, data_dir: Path) -> None:
        """Raise `DataError` where the data set is another of the same name."""
        if self.images not in (None, digest):
            raise DataError(
                f"{data_dir}: holds another {name} than {self.run} was begun with; --data-dir says where that one is, "
                "or train anew"
            )

    def refuse_other_teacher(self, path: str, digest: str) -> None:
        """Raise `DataError` where what is at the teacher's place now is not what the run was begun with."""
        if self.teacher not in (None, digest):
            raise DataError(
                f"{path}: is not the teacher that {self.run} was begun with: other weights are there now; bring those "
                "back, or distil anew"
            )

    def refuse_other_weights(self, path: str) -> None:
        """Raise `DataError` where the file of weights, from which it begins again, is another of the same name."""
        if self.weights is None or kind_of(Path(path)) != "file":
            return
        with contextlib.suppress(OSError):  # of one that cannot be read, told where its weights are
            if self.weights != starting_weights.digest(Path(path)):
                raise DataError(
                    f"{path}: is not the file of weights that {self.run} was begun with: another is there now; bring "
                    "that one back, or train anew"
                )


def prepare(
    preset: Preset,
    where: Where,
    watcher: Watcher,
    *,
    begun: Begun | None = None,
    dataset: Dataset | None = None,
    images: int | None = None,
    dry: bool = False,
) -> Job:
    """Check everything and load everything; nothing is written but what is computed once, and not that if `dry`.

    `dataset` is used in place of the one in the data folder; `images` is how many the run itself trains on where that
    differs, which decides whether compiling pays.
    """
    state = begun.state if begun is not None else None
    config = preset.config
    # A file may lie elsewhere on each machine: what is in it is asked below.
    settings = {key: value for key, value in flat(config).items() if key not in (WEIGHTS, TEACHER)}
    ranks.refuse_differences({"cifar100": __version__, **settings})
    check_backbone(config.model.backbone)
    device = devices.select_device(where.device)
    devices.forget_peak_memory(device)  # of the runs before, in this process
    precision = ranks.on_first(lambda: devices.precision_of(config, device))
    _refuse_impossible(config, precision, device, watcher)
    if begun is not None:
        begun.refuse_other_precision(config, precision)
    if state is None:
        _tell_of_earlier_name(config.model.backbone, watcher)
        starting_weights.check_known_images(config, watcher)
        _tell_of_warmup(config, watcher)
        if begun is not None and config.model.weights is not None:
            begun.refuse_other_weights(config.model.weights)
    dataset = dataset or datasets.load(config.data.dataset, where.data_dir)
    images_digest = datasets.digest(dataset)
    if begun is not None:
        begun.refuse_other_images(dataset.name, images_digest, where.data_dir)
    training, held_out = training_splits(dataset, config)
    preprocessing = preprocessing_for(config.data, training, config.model.backbone)
    saved_teacher = None
    if config.distillation is not None:
        saved_teacher = teachers.load(config, config.distillation, dataset, watcher)
        if begun is not None:
            begun.refuse_other_teacher(config.distillation.required_teacher(), teachers.digest(saved_teacher))
    model = starting_weights.build(config, len(dataset.classes), preprocessing, training, state, watcher)
    digests = digests_of(config, images_digest, saved_teacher) if begun is None else {}
    ranks.refuse_differences(digests)
    if ranks.count() > 1 and config.train.sync_batch_norm:
        model = batch_norm.synchronised(model, device)
    model = model.to(device=device, memory_format=devices.memory_format(device))  # type: ignore[call-overload]
    train_loader = _train_loader(config, training, preprocessing, device, model)
    test_loader = evaluation_loader(dataset.test, device, preprocessing)
    # All that is refused is refused before the long work of a teacher and a frozen part.
    new_stem = begun is None and starting_weights.stem_is_new(config, model)
    groups, frozen = None, None
    if config.finetune is not None:
        groups, frozen = learning.freeze_stages(config, config.finetune, model, watcher, new_stem=new_stem)
    groups = learning.grouped(groups, model, config, watcher, new_stem=new_stem)
    if config.train.compile != "auto":
        steps.choose(config.train.compile, 0.0, train_loader, ranks.count())
    evaluation = {}
    if held_out is not None:
        evaluation["val"] = evaluation_loader(held_out, device, preprocessing)
    if config.train.measures_test:  # else the test set is looked at once, at the end
        evaluation["test"] = test_loader
    loaders = Loaders(train_loader, evaluation)
    task = create_task(config.loss)
    if config.distillation is not None and saved_teacher is not None:
        teacher = teachers.make_ready(saved_teacher, train_loader, precision, config, where.cache_dir, watcher, dry=dry)
        task = DistillationTask(task, teacher, config.distillation)
    parted = None
    if config.finetune is not None and frozen is not None:
        parted = features.keep(
            config, config.finetune, model, frozen, loaders, precision, where.cache_dir, watcher, dry=dry
        )
    step_mode = step_mode_of(config, model, train_loader, images or train_loader.count)
    if device.type == "cuda" or step_mode.name != "off":
        watcher.say(f"steps: {step_mode.name} ({step_mode.reason})")
    return Job(
        config=config,
        preset=preset.name,
        model=model,
        task=task,
        loaders=loaders,
        test=test_loader,
        card=_card(preset, dataset, preprocessing, _unseen(config, begun, saved_teacher)),
        device=device,
        precision=precision,
        groups=groups,
        parted=parted,
        step_mode=step_mode,
        digests=digests,
    )


def digests_of(config: Config, images: str, teacher: Checkpoint | None) -> dict[str, str]:
    """What tells a new run's data set, teacher and weights from others, by the names under which it records them."""
    digests = {DATA_DIGEST: images}
    if teacher is not None:
        digests[TEACHER_DIGEST] = teachers.digest(teacher)
    if config.model.weights is not None:
        digests[WEIGHTS_DIGEST] = starting_weights.digest(Path(config.model.weights))
    return digests


def _refuse_impossible(config: Config, precision: str, device: torch.device, watcher: Watcher) -> None:
    """Raise `UsageError` for what the number of ranks or the precision rules out; tell what is merely slow."""
    if config.data.batch_size < ranks.count():
        raise UsageError(
            f"data.batch_size = {config.data.batch_size} leaves some of {ranks.count()} ranks without images"
        )
    if precision == "fp16" and device.type == "cpu":
        watcher.say("train.precision = fp16 is very slow on a CPU, whose convolutions are made for fp32 and bf16")
    if precision == "fp16" and not config.takes_fp16:
        raise UsageError(
            "optimizer.name = muon: cannot skip a step, as fp16 must; use --set train.precision=fp32, or adamw"
        )


def _tell_of_earlier_name(backbone: str, watcher: Watcher) -> None:
    present = backbones.present_name(backbone)
    if present != backbone:
        watcher.say(f"model.backbone = {backbone}: timm calls it {present} now, and that is what is built")


def _tell_of_warmup(config: Config, watcher: Watcher) -> None:
    if config.schedule.warmup_epochs > config.train.epochs:
        epochs, warmup = config.train.epochs, config.schedule.warmup_epochs
        watcher.say(
            f"schedule.warmup_epochs = {warmup:g}, more than train.epochs = {epochs}: the learning rate rises to the "
            f"last step, and only there is {config.optimizer.lr:g}"
        )


def _train_loader(
    config: Config, training: Split, preprocessing: Preprocessing, device: torch.device, model: nn.Module
) -> DeviceLoader:
    """This rank's share of the training images. Raises `UsageError` for batches that batch norm cannot train on."""
    apart = 1 if config.train.sync_batch_norm else ranks.count()  # how many take statistics of their own
    loader = DeviceLoader(
        training,
        config.data.batch_size,
        device,
        preprocessing,
        shuffle=True,
        policy=create_policy(config.augment, preprocessing.mean),
        seed=config.seed,
        image_size_in=config.image_size_in if config.data.first_image_size is not None else lambda epoch: None,
        rank=ranks.rank(),
        ranks=ranks.count(),
        smallest_batch=max(2 * apart, ranks.count()),
    )
    if min(loader.batch_sizes()) < 2 * apart and any(isinstance(m, _BatchNorm) for m in model.modules()):
        raise UsageError(
            f"data.batch_size = {config.data.batch_size}: batch norm cannot train on one image at a time; "
            f"use at least {2 * apart}"
        )
    return loader


def _unseen(config: Config, begun: Begun | None, teacher: Checkpoint | None) -> dict[DatasetName, float]:
    """The `unseen` of the run's card: what its teacher had learned, it may learn from that."""
    own = begun.unseen if begun is not None else None
    unseen = dict(starting_weights.unseen_images(config) if own is None else own)
    for name, share in teacher.card.unseen.items() if teacher is not None else ():
        unseen[name] = min(unseen.get(name, 1.0), share)
    return unseen


def _card(preset: Preset, dataset: Dataset, preprocessing: Preprocessing, unseen: dict[DatasetName, float]) -> Card:
    """What the files of the run's models say of them."""
    return Card(
        format=checkpoint.FORMAT,
        preset=preset.name,
        dataset=dataset.name,
        classes=dataset.classes,
        superclasses=dataset.superclasses,
        superclass_of=dataset.superclass_of,
        image_size=preprocessing.image_size,
        mean=preprocessing.mean,
        std=preprocessing.std,
        unseen=unseen,
        config=preset.config.model_dump(mode="json", exclude_none=True),
    )


def step_mode_of(config: Config, model: nn.Module, loader: DeviceLoader, images: int) -> StepMode:
    """How steps are launched on the loader's device, in a run on so many images."""
    flops = 0.0  # which decide nothing on a CPU
    if loader.device.type == "cuda":  # a backward pass is about two forward ones, and SAM takes both twice
        passes = 3 if config.optimizer.sam_rho == 0 else 6
        flops = passes * forward_flops(model, loader) * images * config.train.epochs
    return steps.choose(config.train.compile, flops, loader, ranks.count())


def training_splits(dataset: Dataset, config: Config) -> tuple[Split, Split | None]:
    """What a preset trains on and what it holds out: first held out, then a fraction of the rest."""
    training, held_out = datasets.hold_out(dataset.train, config.data.val_fraction)
    training = datasets.subset(training, config.data.fraction, config.seed)
    if len(training) < 2:
        raise UsageError(f"data.fraction = {config.data.fraction} leaves fewer than two images to train on")
    return training, held_out


def evaluation_loader(split: Split, device: torch.device, preprocessing: Preprocessing) -> DeviceLoader:
    """The images of a split in its order, in batches that fill a device."""
    return DeviceLoader(
        split,
        evaluation_batch_size(preprocessing.image_size, device),
        device,
        preprocessing,
        rank=ranks.rank(),
        ranks=ranks.count(),
    )

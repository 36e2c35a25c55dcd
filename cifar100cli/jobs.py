"""A training run made ready: data, model, task, teacher and frozen features, from a preset."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cifar100cli import batch_norm, checkpoint, computed, datasets, devices, metrics, ranks, steps, teachers
from cifar100cli.augment import Views
from cifar100cli.card import Card, our_network
from cifar100cli.catalog import DATASETS, DatasetName
from cifar100cli.checkpoint import Checkpoint, Saved
from cifar100cli.config import Preset
from cifar100cli.datasets import Dataset, Split
from cifar100cli.errors import DataError, UsageError
from cifar100cli.flops import forward_flops
from cifar100cli.folded import fold
from cifar100cli.groups import Group, by_layer, divided, everything, hidden_weights, without_decay
from cifar100cli.loader import DeviceLoader, Features, Preprocessing, evaluation_batch_size, preprocessing_for
from cifar100cli.models import check_backbone, classifiers, create_model, initialize
from cifar100cli.policies import create_policy
from cifar100cli.runs import RunDir
from cifar100cli.schema import Config, Distillation, Finetune
from cifar100cli.stages import Parted, Stage, freeze, learning, stage_rows, stages_of
from cifar100cli.steps import StepMode
from cifar100cli.tasks import DistillationTask, Teacher, create_task
from cifar100cli.trainer import Job, Loaders
from cifar100cli.watcher import Watcher


@dataclass(frozen=True)
class Where:
    """Folders and device of a command."""

    data_dir: Path
    runs_dir: Path
    cache_dir: Path
    device: str = "auto"


def prepare(
    preset: Preset,
    where: Where,
    watcher: Watcher,
    *,
    state: Saved | None = None,
    unseen: Mapping[DatasetName, float] | None = None,
    dataset: Dataset | None = None,
    images: int | None = None,
    dry: bool = False,
) -> Job:
    """Check everything and load everything; nothing is written but what is computed once, and not that if `dry`.

    A run that goes on has its network's weights in `state`, and needs those that it began from no more: what images
    these had not learned stands in its card, `unseen`. `dataset` is used in place of the one in the data folder;
    `images` is how many the run itself trains on where that differs, which decides whether compiling pays.
    """
    config = preset.config
    check_backbone(config.model.backbone)
    device = devices.select_device(where.device)
    devices.forget_peak_memory(device)  # of the runs before, in this process
    precision = ranks.on_first(lambda: devices.resolve_precision(config.train.precision, device))
    _refuse_impossible(config, precision, device, watcher)
    if state is None:
        _refuse_known_images(config)
    dataset = dataset or datasets.load(config.data.dataset, where.data_dir)
    training, held_out = training_splits(dataset, config)
    preprocessing = preprocessing_for(config.data, training, config.model.backbone)
    saved_teacher = None
    if config.distillation is not None:
        saved_teacher = _load_teacher(config, config.distillation, dataset, watcher)
    model = _network(config, len(dataset.classes), preprocessing, training, state, watcher)
    if ranks.count() > 1 and config.train.sync_batch_norm:
        model = batch_norm.synchronised(model, device)
    model = model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    train_loader = _train_loader(config, training, preprocessing, device, model)
    test_loader = evaluation_loader(dataset.test, device, preprocessing)
    evaluation = {}
    if held_out is not None:
        evaluation["val"] = evaluation_loader(held_out, device, preprocessing)
    if config.train.measures_test:  # else the test set is looked at once, at the end
        evaluation["test"] = test_loader
    loaders = Loaders(train_loader, evaluation)
    task = create_task(config.loss)
    if config.distillation is not None and saved_teacher is not None:
        teacher = _teacher(saved_teacher, train_loader, precision, where, watcher, config, dry=dry)
        task = DistillationTask(task, teacher, config.distillation)
    groups, parted = everything(model), None
    if config.finetune is not None:
        groups, parted = _finetune(config, config.finetune, model, loaders, precision, where, watcher, dry=dry)
    return Job(
        config=config,
        preset=preset.name,
        model=model,
        task=task,
        loaders=loaders,
        test=test_loader,
        card=_card(preset, dataset, preprocessing, unseen),
        device=device,
        precision=precision,
        groups=_grouped(groups, model, config, watcher),
        parted=parted,
        step_mode=_step_mode(config, model, train_loader, images or train_loader.count, watcher),
        teacher=teachers.digest(saved_teacher) if saved_teacher is not None else None,
        images=datasets.digest(dataset),
    )


def _refuse_impossible(config: Config, precision: str, device: torch.device, watcher: Watcher) -> None:
    """Raise `UsageError` for what the number of ranks or the precision rules out; tell what is merely slow."""
    if config.data.batch_size < ranks.count():
        raise UsageError(
            f"data.batch_size = {config.data.batch_size} leaves some of {ranks.count()} ranks without images"
        )
    if precision == "fp16" and device.type == "cpu":
        watcher.say("train.precision = fp16 is very slow on a CPU, whose convolutions are made for fp32 and bf16")
    if precision == "fp16" and config.optimizer.name == "muon":
        raise UsageError(
            "optimizer.name = muon: cannot skip a step, as fp16 must; use --set train.precision=fp32, or adamw"
        )


def _network(
    config: Config,
    classes: int,
    preprocessing: Preprocessing,
    training: Split,
    state: Saved | None,
    watcher: Watcher,
) -> nn.Module:
    """The network as its first step finds it: with the weights of `state`, of a file, of timm, or random ones."""
    torch.manual_seed(config.seed)
    with ranks.one_ahead():  # the model hub is asked once
        model = create_model(config, classes, pretrained=None if state is None else False)
    if state is not None:
        checkpoint.restore_model(state, model)
        return model
    if config.model.weights is not None:
        watcher.say(_starting_point(config, preprocessing, classes))
    if config.schedule.warmup_epochs > config.train.epochs:
        epochs, warmup = config.train.epochs, config.schedule.warmup_epochs
        watcher.say(
            f"schedule.warmup_epochs = {warmup:g}, more than train.epochs = {epochs}: the learning rate rises to the "
            f"last step, and only there is {config.optimizer.lr:g}"
        )
    if not config.model.pretrained:
        initialize(model, _sample(training, preprocessing))
    return model


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


def _card(
    preset: Preset, dataset: Dataset, preprocessing: Preprocessing, unseen: Mapping[DatasetName, float] | None
) -> Card:
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
        unseen=dict(unseen) if unseen is not None else _unseen(preset.config),
        config=preset.config.model_dump(mode="json", exclude_none=True),
    )


def _step_mode(config: Config, model: nn.Module, loader: DeviceLoader, images: int, watcher: Watcher) -> StepMode:
    """How steps are launched on the loader's device, in a run on so many images."""
    flops = 0.0  # which decide nothing on a CPU
    if loader.device.type == "cuda":  # a backward pass is about two forward ones, and SAM takes both twice
        passes = 3 if config.optimizer.sam_rho == 0 else 6
        flops = passes * forward_flops(model, loader) * images * config.train.epochs
    step_mode = steps.choose(config.train.compile, flops, loader, ranks.count())
    if loader.device.type == "cuda" or step_mode.name != "off":
        watcher.say(f"steps: {step_mode.name} ({step_mode.reason})")
    return step_mode


def _starting_point(config: Config, preprocessing: Preprocessing, classes: int) -> str:
    """What a run begins with, and where its images will not be those that the weights were made for."""
    assert config.model.weights is not None
    told = f"starting from {config.model.weights}; the head is a new one of {classes} classes"
    network = our_network(Path(config.model.weights))
    if network is not None and (network.mean, network.std) != (preprocessing.mean, preprocessing.std):
        told += f"; the weights saw pixels normalised otherwise than by data.normalize = {config.data.normalize}"
    if network is not None and network.image_size != config.data.image_size:
        told += f"; the weights saw images of {network.image_size} pixels, and see {config.data.image_size} now"
    return told


def _refuse_known_images(config: Config) -> None:
    """Raise `UsageError` where an epoch would be chosen on images that the weights to start from were trained on."""
    network = our_network(Path(config.model.weights)) if config.model.weights is not None else None
    if network is None or config.train.select != "best_val":
        return
    unseen = network.unseen.get(config.data.dataset, 1.0)
    if unseen < config.data.val_fraction:  # a larger share holds out what a smaller one does, and more
        raise UsageError(
            f"{config.model.weights}: was trained, or began from weights that were, with data.val_fraction = "
            f"{unseen:g}, and so on images that {config.data.val_fraction:g} holds out: an epoch chosen on "
            f"these would flatter; {_no_more_than(unseen)}use --set train.select=last"
        )


def _no_more_than(unseen: float) -> str:
    return f"hold out no more than that (--set data.val_fraction={unseen:g}), or " if unseen else ""


def _unseen(config: Config) -> dict[DatasetName, float]:
    """The `unseen` of the run's card. Of weights that are there no more it is not known what they had learned."""
    name, held_out, weights = config.data.dataset, config.data.val_fraction, config.model.weights
    if weights is not None and not Path(weights).is_file():
        return dict.fromkeys(DATASETS, 0.0)
    network = our_network(Path(weights)) if weights is not None else None
    known = network.unseen if network is not None else {}
    return {**known, name: min(held_out, known.get(name, 1.0))}


def _stem_is_new(config: Config, model: nn.Module) -> bool:
    """Whether the stem is a random one in front of trained weights. A deep one keeps those that it had."""
    if config.model.stem != "cifar" or not config.model.pretrained:
        return False
    network = our_network(Path(config.model.weights)) if config.model.weights is not None else None
    stem = getattr(getattr(model, "backbone", model), "conv1", None)
    return (network is None or network.stem != "cifar") and isinstance(stem, nn.Conv2d)


def _sample(split: Split, preprocessing: Preprocessing) -> torch.Tensor:
    """Some images of a split, evenly from all of it, as the network will see them: 5,000 of 32 pixels, fewer larger."""
    count = max(1, min(len(split), 5000 * 32 * 32 // preprocessing.image_size**2))
    chosen = [index * len(split) // count for index in range(count)]
    return preprocessing(torch.from_numpy(split.images[chosen]))


def _grouped(groups: list[Group], model: nn.Module, config: Config, watcher: Watcher) -> list[Group]:
    """The weights that learn, as the optimizer wants them grouped."""
    optimizer, name = config.optimizer, config.model.backbone
    if optimizer.layer_decay < 1:
        groups = by_layer(model, name, optimizer.layer_decay)
        rate = optimizer.rate_of_others
        watcher.say(
            f"layers: {len(groups)}; the rate falls from {rate:g} at the head "
            f"to {rate * min(group.scale for group in groups):.2g} at the stem"
            + (", which is new: model.stem = cifar has no trained weights" if _stem_is_new(config, model) else "")
        )
    if optimizer.rate_of_others != optimizer.lr:
        watcher.say(
            f"optimizer.auxiliary_lr: biases and norms, the head and the stem learn at "
            f"{optimizer.rate_of_others / optimizer.lr:.3g} times the rate of the matrices between them"
        )
    hidden = _matrices(model, config)
    if optimizer.name == "muon" and not hidden:
        raise UsageError("optimizer.name = muon: no matrix of a hidden layer is among what learns; use adamw")
    exempt = [] if optimizer.decay_norms else without_decay(model)
    return divided(groups, exempt=exempt, hidden=hidden)


def _matrices(model: nn.Module, config: Config) -> list[nn.Parameter]:
    """What Muon moves, if it is the optimizer."""
    if config.optimizer.name != "muon":
        return []
    return hidden_weights(model, classifiers(config.model.backbone) if config.model.head == "linear" else ("head",))


# ------------------------------------------------------------------------------------------------ teachers


def _load_teacher(config: Config, distillation: Distillation, dataset: Dataset, watcher: Watcher) -> Checkpoint:
    """Read the teacher and see that it knows the same classes."""
    path = Path(distillation.required_teacher())
    saved = checkpoint.load_model(path)
    if path.is_dir() and not RunDir(path).complete:
        watcher.say(f"the teacher's run is not complete: its weights are those of epoch {saved.card.epoch}")
    if saved.card.classes != dataset.classes:
        kind = "other" if len(saved.card.classes) == len(dataset.classes) else f"{len(saved.card.classes)}"
        raise DataError(
            f"--teacher {path}: knows {kind} classes, of {saved.card.dataset}, and the student is to learn "
            f"the {len(dataset.classes)} of {dataset.name}; name a teacher that was trained on {dataset.name}"
        )
    unseen = saved.card.unseen.get(config.data.dataset, 1.0)
    if config.train.select == "best_val" and unseen < config.data.val_fraction:
        watcher.say(
            f"the teacher was trained with data.val_fraction = {unseen:g}, and so on images that are held out of the "
            "student's: what is found on these may be optimistic; the test figure is not"
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
    model = saved.model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if precision == "fp32":
        model = fold(model, saved.preprocessing(loader.images[:2]))
    online = teachers.OnlineTeacher(model, saved.preprocessing, devices.autocast(device, precision))
    metrics.refuse_no_answer(online.logits(loader.images[:2]), saved.path)
    if dry:
        return online
    if isinstance(loader.policy, Views):
        logits = computed.table(
            "the teacher's logits",
            online.logits,
            loader,
            batch_size=online.batch_size,
            dtype=torch.float32,
            folder=where.cache_dir / teachers.key(saved, loader, precision),
            watcher=watcher,
        )
        return teachers.CachedTeacher(logits.to(device))
    seconds = online.seconds(next(iter(loader.epoch(1)))) * len(loader)
    watcher.say(
        f"the teacher runs in every step, because no two views are the same under {config.augment.unbounded()}: "
        f"it adds about {seconds:.1f} s an epoch here, {seconds * config.train.epochs / 3600:.1f} h in all; "
        "with --augment none or flip and no more it would look at each image once or twice"
    )
    return online


# --------------------------------------------------------------------------------------------- fine-tuning


STANDS_STILL = 5e-6  # of the head's rate; the stem of a ResNet, five stages before the head, is at 1e-5


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
    groups = [Group([p for p in stage.parameters(model) if p.requires_grad], scales[stage.name]) for stage in kept]
    matrices = set(_matrices(model, config))
    rates = {
        stage.name: scales[stage.name]
        * (config.optimizer.rate_of_others if matrices.isdisjoint(stage.parameters(model)) else config.optimizer.lr)
        for stage in kept
    }
    watcher.stages(stage_rows(model, stages, rates, finetune.bn))
    first = kept[0].name
    if len(kept) < len(stages) and _stem_is_new(config, model):
        raise UsageError(
            "model.stem = cifar: the weights to start from have another stem, and frozen, the new one stays random: "
            "leave it at imagenet, --init a run that has this stem, or let it learn with --set finetune.unfreeze=all"
        )
    if len(kept) == 1 and config.model.head == "cosine" and config.model.drop_rate:
        raise UsageError(
            f"model.drop_rate = {config.model.drop_rate:g} does nothing where a cosine head learns alone: it drops in "
            "the frozen network behind it; leave it at 0"
        )
    if len(kept) < len(stages) and not config.model.pretrained:
        watcher.say(
            f"the frozen stages in front of {first} have random weights, which say little about images: name trained "
            "ones with --weights FILE, or let everything learn with --set finetune.unfreeze=all"
        )
    if scales[first] < STANDS_STILL:
        watcher.say(
            f"{first} learns at {scales[first]:.0e} of the head's rate, which is practically zero: finetune.stage_decay"
            f" = {finetune.stage_decay:g} is for networks of few stages, and {name} has {len(stages)}; "
            "--set finetune.stage_decay=0.75 lets all of them learn"
        )
    if finetune.cache == "off" or (finetune.cache == "auto" and len(kept) == len(stages)):
        return groups, None
    parted = Parted(model, kept[0].start)
    sample = loaders.train.preprocessing(loaders.train.images[:2])
    obstacle = config.obstacle_to_kept_features()
    if len(kept) == len(stages):
        obstacle = "everything learns, and nothing is frozen"
    elif obstacle is None and not parted.is_exact(sample):
        obstacle = f"{name} is no chain of stages that could be entered at {first}"
    if obstacle is not None:
        if finetune.cache == "on":
            raise UsageError(f"finetune.cache = on is not possible: {obstacle}; leave --cache out")
        watcher.say(f"the frozen part runs in every epoch, because {obstacle}")
        return groups, None
    if dry:
        return groups, None
    cast = devices.autocast(loaders.train.device, precision)
    if precision == "fp32":  # in others, a folded weight is rounded otherwise than the two that it is made of
        parted.fold(sample)

    def front(images: torch.Tensor) -> torch.Tensor:
        with cast():
            features = parted.front(loaders.train.preprocessing(images))
        return features.permute(0, 2, 3, 1) if features.ndim == 4 else features

    computed_in = front(loaders.train.images[:1]).dtype
    dtype = _features_type(finetune.cache_dtype, computed_in)
    about = {
        "what": "features",
        "model": config.model.model_dump(mode="json", exclude={"pretrained", "weights"}),  # what the weights do not say
        "start": kept[0].start,
        "preprocessing": asdict(loaders.train.preprocessing),
        "precision": precision,
        "dtype": str(dtype),
    }
    frozen = [(n, t) for n, t in model.state_dict().items() if _is_frozen(n, stages, kept)]
    for title, loader in {"training": loaders.train, **loaders.evaluation}.items():
        found = computed.table(
            f"features of the {title} images",
            front,
            loader,
            batch_size=evaluation_batch_size(config.data.image_size, loader.device),
            dtype=dtype,
            folder=where.cache_dir / computed.key(about, frozen, loader),
            watcher=watcher,
        )
        loader.features = Features(found, loader.device, computed_in)
    parted.switch_front(on=False)
    return groups, parted


def _features_type(name: str, computed_in: torch.dtype) -> torch.dtype:
    """`auto` is what loses nothing or next to nothing: bfloat16 where the features come in it, else float16."""
    if name == "auto":
        return computed_in if computed_in == torch.bfloat16 else torch.float16
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

"""The schema of a preset, and how a preset, its file and the user's overrides become one `Config`.

A preset is YAML read by a safe loader with YAML 1.2's idea of a scalar (`1e-3` is a number, `off` is
text), checked by a strict schema. Whatever is wrong raises `UsageError` with the key, the value, what
is allowed and the nearest name. No torch here: this runs before anything else.
"""

import difflib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

import annotated_types
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from cifar100cli.bounded import read_file
from cifar100cli.errors import UsageError

DEFAULT_PRESET = "quickstart"
SPLIT_OF = {"best_test": "test", "best_val": "val", "last": None}  # what `train.select` chooses the epoch on
MOST_SEEDS = 2**32
LARGEST_PRESET = 64 * 1024  # bytes; ours are under two thousand


def _refuse_bool(value: object) -> object:
    if isinstance(value, bool):  # or `epochs: true` would mean one epoch
        raise ValueError("a truth value is not a number")
    return value


Integer = Annotated[int, BeforeValidator(_refuse_bool)]
Number = Annotated[float, BeforeValidator(_refuse_bool)]


class Section(BaseModel):
    """A frozen mapping that refuses keys which it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Published(Section):
    """A figure that a document reports for this preset."""

    top1: Number = Field(ge=0, le=1, description="test accuracy, as a fraction")
    epoch: Integer | None = Field(None, ge=1, description="the epoch that it was reached in")
    source: str = Field("", description="where it stands")


class Data(Section):
    """Which images the model sees."""

    dataset: Literal["cifar100", "cifar10", "synthetic"] = "cifar100"
    image_size: Integer = Field(32, ge=16, le=1024, description="side in pixels; images are resized to it")
    batch_size: Integer = Field(250, ge=1, le=65536, description="images in a training step")
    fraction: Number = Field(1.0, gt=0, le=1, description="share of each class's training images that is used")
    val_fraction: Number = Field(0.0, ge=0, le=0.9, description="share of the training set that is held out")
    normalize: Literal["none", "dataset", "imagenet", "backbone"] = Field(
        "none", description="after dividing by 255: nothing, or the mean and deviation of ..."
    )
    first_image_size: Integer | None = Field(
        None, ge=16, le=1024, multiple_of=16, description="begin with images this small, and grow to image_size"
    )
    grow_until: Number = Field(0.5, gt=0, lt=1, description="share of the epochs after which images are whole")


class Augment(Section):
    """How training images are varied."""

    policy: Literal["none", "flip", "crop_flip", "one_of"] = Field(
        "none", description="one_of: shift-scale-rotate, dropout, colours, or a mirror image, as in the tutorial"
    )
    flip: Literal["random", "alternating", "none"] = Field(
        "random", description="of flip and crop_flip; alternating: an image is mirrored in every other epoch"
    )
    crop_padding: Integer = Field(4, ge=0, le=16, description="of crop_flip: pixels on each side")
    padding_mode: Literal["black", "reflect"] = Field("black", description="of crop_flip: what is on these pixels")
    backend: Literal["batched", "albumentations"] = Field("batched", description="of one_of: ours, or the reference")
    auto: Literal["none", "randaugment", "trivialaugment"] = Field("none", description="drawn operations, after policy")
    randaugment_ops: Integer = Field(2, ge=1, le=8, description="of randaugment: operations, one after the other")
    randaugment_magnitude: Integer = Field(9, ge=0, le=30, description="of randaugment: strength of each")
    cutout: Integer = Field(0, ge=0, le=64, description="side in pixels of a square that is covered")
    erasing: Number = Field(0.0, ge=0, le=1, description="probability that a rectangle is covered")
    mixup: Number = Field(0.0, ge=0, le=100, description="alpha: mix each image with another; 0 does not")
    cutmix: Number = Field(0.0, ge=0, le=100, description="alpha: put a part of another image into each; 0 does not")

    def unbounded(self) -> str:
        """The keys under which no two views of an image are the same, in words; empty where it has few versions."""
        blocks = ("auto", "cutout", "erasing", "mixup", "cutmix")
        keys = [key for key in blocks if getattr(self, key) not in (0, "none")]
        if self.policy == "one_of" or (self.policy == "crop_flip" and self.crop_padding):
            keys.insert(0, "policy")
        return " and ".join(f"augment.{key} = {getattr(self, key)}" for key in keys)

    def idle(self) -> str | None:
        """What is set and has no part in this policy, in words."""
        if self.backend != "batched" and self.policy != "one_of":
            return f"augment.backend = {self.backend} is for augment.policy = one_of, not {self.policy}"
        if self.policy == "flip" and self.flip == "none":
            return "augment.flip = none leaves nothing of augment.policy = flip; use augment.policy = none"
        return None


class Model(Section):
    """The network."""

    backbone: str = Field("resnet18", min_length=1, description="any image model that timm knows, or one of ours")
    pretrained: bool = Field(False, description="start from ImageNet weights: timm's, or those of `weights`")
    weights: str | None = Field(None, min_length=1, description="a file of weights for the backbone")
    stem: Literal["imagenet", "cifar"] = Field("imagenet", description="cifar: 3x3, stride 1, no pooling")
    head: Literal["linear", "cosine"] = Field("linear", description="cosine: an embedding against class vectors")
    embedding_dim: Integer = Field(512, ge=2, le=8192, description="of the cosine head")
    drop_rate: Number = Field(0.0, ge=0, lt=1, description="drop-out before the head; in a Wide ResNet, in its blocks")
    drop_path_rate: Number = Field(0.0, ge=0, lt=1, description="stochastic depth: of the last block, growing to it")


class Loss(Section):
    """What training minimises."""

    name: Literal["cross_entropy", "arcface", "cosface"] = "cross_entropy"
    label_smoothing: Number = Field(0.0, ge=0, lt=1)
    scale: Number = Field(8.0, gt=0, le=1000, description="of the cosines that a cosine head gives")
    margin: Number = Field(0.35, ge=0, le=1.5, description="radians for arcface; a cosine for cosface")
    gradient: Literal["exact", "straight_through"] = Field("exact", description="of arcface's margin")


class Distillation(Section):
    """How a teacher's logits are learned from, beside the labels."""

    teacher: str | None = Field(None, min_length=1, description="a run or checkpoint of the same classes")
    alpha: Number = Field(0.7, ge=0, le=1, description="weight of the teacher's term; the labels' is 1 - alpha")
    temperature: Number = Field(4.0, gt=0, le=100, description="both softmaxes are taken at logits / temperature")
    form: Literal["plain", "decoupled"] = "plain"
    target_weight: Number = Field(1.0, ge=0, le=1000, description="decoupled: of the true class against the rest")
    nontarget_weight: Number = Field(8.0, ge=0, le=1000, description="decoupled: among the other classes")
    standardize: bool = Field(False, description="first bring each image's logits to mean 0 and deviation 1")

    def required_teacher(self) -> str:
        """The teacher's run or checkpoint; raises `UsageError` where none is named."""
        if self.teacher is None:
            raise UsageError("distillation needs a teacher: cifar100 distill --teacher RUN|CHECKPOINT")
        return self.teacher


class Finetune(Section):
    """What of a trained network goes on learning, and at which rates."""

    unfreeze: str = Field("layer4", min_length=1, description="fc, layer4 (fc and the last stage), layer3, or all")
    bn: Literal["frozen", "adapt"] = Field("frozen", description="whether frozen stages' batch statistics move")
    stage_decay: Number = Field(0.1, gt=0, le=1, description="of the rate, from each stage to the one before it")
    cache: Literal["auto", "on", "off"] = Field("auto", description="run the frozen part once for each version")
    cache_dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field("auto", description="of kept features")


class Optimizer(Section):
    """How the weights move."""

    name: Literal["adamw", "adam", "sgd", "muon"] = Field(
        "adamw", description="muon: for hidden layers' matrices and filters, and an auxiliary one for the rest"
    )
    lr: Number = Field(0.001, gt=0, le=100, description="learning rate, at its highest")
    weight_decay: Number = Field(0.0001, ge=0, le=10)
    decay_norms: bool = Field(True, description="weight decay on biases, norms and all that has one dimension, too")
    layer_decay: Number = Field(1.0, gt=0, le=1, description="of the rate, from each layer to the one before it")
    betas: tuple[
        Annotated[Number, Field(ge=0, lt=1)],
        Annotated[Number, Field(ge=0, lt=1)],
    ] = Field((0.9, 0.999), description="of adamw and adam")
    momentum: Number = Field(0.9, ge=0, lt=1, description="of sgd and muon")
    nesterov: bool = Field(True, description="sgd and muon: look ahead along the momentum")
    auxiliary: Literal["adamw", "sgd"] = Field("adamw", description="muon: for head, stem, biases, norms, embeddings")
    auxiliary_lr: Number | None = Field(None, gt=0, le=100, description="muon: the auxiliary one's rate; else lr")
    adjust_lr: Literal["match_rms_adamw", "original"] = Field(
        "match_rms_adamw", description="muon: updates as large as adamw's, or as Jordan's, with lr around 0.02"
    )
    ns_steps: Integer = Field(5, ge=1, le=20, description="muon: Newton-Schulz iterations")
    grad_clip: Number = Field(5.0, ge=0, description="largest norm of the gradient; 0 leaves it as it is")
    sam_rho: Number = Field(0.0, ge=0, le=100, description="sharpness-aware: how far up gradients are taken; 0 is off")
    sam_adaptive: bool = Field(False, description="measure sam_rho in the weights' sizes (then it is around 1)")


class Schedule(Section):
    """How the learning rate changes."""

    name: Literal["constant", "cosine", "linear", "one_cycle", "multi_step"] = Field(
        "constant", description="one_cycle: up and down along cosines; the momentum stays"
    )
    warmup_epochs: Number = Field(0, ge=0, le=100_000, description="the rate rises linearly over these")
    final: Number = Field(0.0, ge=0, le=1, description="cosine and linear: the share of the highest rate they end at")
    milestones: tuple[Annotated[Integer, annotated_types.Ge(1)], ...] = Field(
        (), description="multi_step: the epochs after which the rate is multiplied by gamma"
    )
    gamma: Number = Field(0.1, gt=0, le=1, description="of multi_step")
    pct_start: Number = Field(0.3, ge=0, lt=1, description="one_cycle: the share of the steps in which the rate rises")
    div_factor: Number = Field(25.0, ge=1, le=1e9, description="one_cycle: the highest rate over the first")
    final_div_factor: Number = Field(10_000.0, ge=1, le=1e12, description="one_cycle: the first rate over the last")


class Train(Section):
    """How long, in which precision, and which epoch's weights are kept."""

    epochs: Integer = Field(200, ge=1, le=100_000)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="of matrix products; fp16 scales the loss by itself, so that gradients do not vanish"
    )
    ema: Number = Field(0.0, ge=0, lt=1, description="decay of a moving average of the weights, kept in their place")
    select: Literal["best_test", "best_val", "last"] = "last"
    watch_test: bool = Field(False, description="measure the test set in every epoch, and choose nothing by it")
    compile: Literal["auto", "off", "graph", "inductor"] = Field(
        "auto", description="steps as one CUDA graph; inductor: with kernels compiled by torch.compile besides"
    )
    deterministic: bool = Field(False, description="only kernels that give the same bits every time, if slower")
    sync_batch_norm: bool = Field(True, description="with torchrun: batch statistics of all ranks, as on one device")


class Config(Section):
    """A whole preset, resolved."""

    description: str = ""
    published: Published | None = None
    seed: Integer = Field(0, ge=0, lt=MOST_SEEDS)
    data: Data = Data()
    augment: Augment = Augment()
    model: Model = Model()
    loss: Loss = Loss()
    distillation: Distillation | None = None
    finetune: Finetune | None = None
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    train: Train = Train()

    @model_validator(mode="after")
    def _keys_go_together(self) -> Self:
        if self.loss.name in ("arcface", "cosface") and self.model.head != "cosine":
            raise ValueError(f"loss.name = {self.loss.name} works on cosines: set model.head to cosine as well")
        if self.model.weights is not None and not self.model.pretrained:
            raise ValueError("model.weights names weights to start from: set model.pretrained to true, or leave it out")
        idle = self.augment.idle()
        if idle is not None:
            raise ValueError(idle)
        if self.finetune is not None and self.finetune.cache == "on":
            unbounded = self.augment.unbounded()
            if unbounded:
                raise ValueError(
                    f"finetune.cache = on needs few versions of an image: {unbounded} makes no two views the same; "
                    "use augment.policy none or flip and no more, or leave the cache out"
                )
            if self.finetune.bn == "adapt":
                raise ValueError("finetune.cache = on keeps features, and finetune.bn = adapt changes them; choose one")
            if self.distillation is not None:
                raise ValueError("finetune.cache = on does not go together with distillation")
            if self.data.first_image_size is not None:
                raise ValueError(
                    "finetune.cache = on keeps features of images of one size: leave out data.first_image_size, "
                    "or the cache"
                )
        if self.data.first_image_size is not None and self.data.first_image_size >= self.data.image_size:
            raise ValueError(
                f"data.first_image_size = {self.data.first_image_size} must be smaller than "
                f"data.image_size = {self.data.image_size}, which the images grow to"
            )
        if self.train.select == "best_val" and self.data.val_fraction == 0:
            raise ValueError(
                "train.select = best_val needs a held-out split: "
                "set data.val_fraction above 0 (for example 0.1), or train.select to last"
            )
        return self

    @model_validator(mode="after")
    def _rates_go_together(self) -> Self:
        optimizer, schedule = self.optimizer, self.schedule
        if self.finetune is not None and optimizer.layer_decay < 1:
            raise ValueError(
                f"optimizer.layer_decay = {optimizer.layer_decay:g} does not go together with finetune, which has "
                "finetune.stage_decay: use that"
            )
        if optimizer.auxiliary_lr is not None and optimizer.name != "muon":
            raise ValueError(
                f"optimizer.auxiliary_lr = {optimizer.auxiliary_lr:g} is for optimizer.name = muon, "
                f"not {optimizer.name}"
            )
        if optimizer.sam_adaptive and optimizer.sam_rho == 0:
            raise ValueError("optimizer.sam_adaptive = true needs optimizer.sam_rho above 0 (for example 1)")
        if schedule.name == "one_cycle" and schedule.warmup_epochs > 0:
            raise ValueError(
                f"schedule.warmup_epochs = {schedule.warmup_epochs:g}: one_cycle has a rise of its own; "
                "set it to 0, and the rise's share of the epochs in schedule.pct_start"
            )
        if schedule.final > 0 and schedule.name not in ("cosine", "linear"):
            raise ValueError(
                f"schedule.final = {schedule.final:g} is for schedule.name = cosine or linear, not {schedule.name}"
            )
        milestones = list(schedule.milestones)
        if bool(milestones) != (schedule.name == "multi_step"):
            raise ValueError(
                f"schedule.milestones = {milestones} is for schedule.name = multi_step, not {schedule.name}"
                if milestones
                else "schedule.name = multi_step needs schedule.milestones, as in [60, 120, 160]"
            )
        if any(later <= sooner for sooner, later in itertools.pairwise(milestones)):
            raise ValueError(f"schedule.milestones = {milestones}: each must be above the one before it")
        if milestones and milestones[-1] >= self.train.epochs:
            raise ValueError(
                f"schedule.milestones = {milestones}: each must be below train.epochs = {self.train.epochs}"
            )
        return self

    def image_size_in(self, epoch: int) -> int:
        """The side in pixels of the training images of an epoch, counted from 1; the last epoch's are whole.

        Progressive resizing, as in "EfficientNetV2" (Tan and Le, arXiv 2104.00298): from `data.first_image_size` it
        grows by 16 pixels at a time, evenly over the epochs, and after `data.grow_until` of them it is whole.
        """
        first, whole = self.data.first_image_size, self.data.image_size
        done = (epoch - 1) / (self.data.grow_until * self.train.epochs)
        if first is None or done >= 1 or epoch >= self.train.epochs:
            return whole
        return first + 16 * int(done * (whole - first) / 16)

    def to_yaml(self) -> str:
        """The preset as YAML that `load_preset` reads back to an equal `Config`."""
        keys = self.model_dump(mode="json", exclude_none=True)
        return yaml.dump(keys, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


@dataclass(frozen=True)
class Override:
    """One key that the user set, and where, for the error message (`--lr`, `--set optimizer.lr`)."""

    key: str
    value: object
    origin: str


@dataclass(frozen=True)
class Preset:
    """A name for the run folder and the report, and the configuration that it stands for."""

    name: str
    config: Config


# --------------------------------------------------------------------------------------------- YAML


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2 scalars, without aliases and without repeated keys.

    The Python parser and not libyaml's: nested without end, it raises RecursionError, not a signal.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - as PyYAML declares it

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not allowed", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                problem = "a key must be plain text"
            elif key_node.value in seen:
                problem = f"the key {key_node.value!r} stands twice"
            else:
                seen.add(key_node.value)
                continue
            raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


class _QuickLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """For our own presets alone, which are well formed: libyaml's parser, where there is one, is ten times as fast."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - as PyYAML declares it


class _Dumper(yaml.SafeDumper):
    """Puts quotes around text that either idea of a scalar would take for something else, such as `1e3`."""

    yaml_implicit_resolvers: dict[str, Any] = {  # noqa: RUF012 - as PyYAML declares it
        first: list(known) for first, known in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }


# The core schema of YAML 1.2, where PyYAML follows 1.1: no `off` for false, no `1:30` for 90, and `1e-3` a number.
for _tag, _pattern, _first in (
    ("null", r"null|Null|NULL|~|", "nN~"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
):
    for _class in (_Loader, _QuickLoader, _Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}",
            re.compile(rf"^(?:{_pattern})$"),
            [*_first, ""] if _tag == "null" else [*_first],
        )
for _loader in (_Loader, _QuickLoader):  # PyYAML would read `010` as eight and stumble over `1e5`
    _loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
    _loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: float(node.value))


def _parse_yaml(text: str, where: str, loader: Any = _Loader) -> object:
    try:
        return yaml.load(text, loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise UsageError(f"{where}: not valid YAML: {_short(error.problem or error.context)}{line}") from None
    except (yaml.YAMLError, ValueError, OverflowError, LookupError, AttributeError, TypeError) as error:
        # PyYAML's own readers of tagged values (`!!timestamp x`, `!!bool x`) have errors of every kind.
        raise UsageError(f"{where}: not valid YAML: {_short(error)}") from None
    except RecursionError:
        raise UsageError(f"{where}: not a preset: nested too deeply") from None


def _short(text: object) -> str:
    return " ".join(str(text).split())[:150]


def parse_value(text: str, key: str) -> object:
    """The value of `--set KEY=VALUE`, read as a preset's YAML would be."""
    return _parse_yaml(text, f"--set {key}")


# ------------------------------------------------------------------------------------- finding presets


def presets_folder() -> Path:
    """The folder of the shipped presets: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "presets"
    return inside if inside.is_dir() else package.parent / "presets"


def preset_names() -> list[str]:
    """The names of the shipped presets, in alphabetical order."""
    return sorted(path.stem for path in presets_folder().glob("*.yaml"))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about a name that does not exist: the nearest one that does, if any is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def _read_preset(name: str) -> tuple[str, dict[str, object]]:
    """The preset's short name and its keys as they stand in the file."""
    shipped = presets_folder() / f"{name}.yaml"
    if "/" not in name and "\\" not in name and shipped.is_file():
        path = shipped
    elif name.endswith((".yaml", ".yml")) or "/" in name or "\\" in name:
        path = Path(name)
        if path.stem.startswith(".") or not path.stem.isprintable():  # it becomes the name of a folder
            raise UsageError(f"--preset {name}: give the file another name: this one cannot name a run")
        if not path.is_file():
            raise UsageError(f"--preset {name}: there is no such file; `cifar100 presets` lists the presets by name")
    else:
        raise UsageError(
            f"unknown preset {name!r}{did_you_mean(name, preset_names())} "
            "(`cifar100 presets` lists them; a file is given as ./FILE.yaml)"
        )
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_PRESET + 1)
        text = content.decode("utf-8")
    except OSError as error:
        raise UsageError(f"--preset {name}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"--preset {name}: not a preset: not UTF-8 text") from None
    if len(content) > LARGEST_PRESET:
        raise UsageError(f"--preset {name}: not a preset: larger than {LARGEST_PRESET // 1024} KiB")
    keys = _parse_yaml(text, f"--preset {name}", _QuickLoader if path == shipped else _Loader)
    if not isinstance(keys, dict):
        raise UsageError(f"--preset {name}: not a preset: it has no keys; `--print-config` shows how one looks")
    return path.stem, keys


def shipped(name: str) -> Config | None:
    """The preset of ours of this name, if there is one."""
    return load_preset(name).config if name in preset_names() else None


def shipped_presets() -> Iterator[tuple[str, Config]]:
    """Every shipped preset, by name."""
    for name in preset_names():
        yield name, load_preset(name).config


def load_preset(name: str = DEFAULT_PRESET, overrides: Iterable[Override] = ()) -> Preset:
    """Read the preset `name` (one of ours, or a file), apply `overrides` in order, and check it all.

    Raises `UsageError` for a name, file, key, type or value that is not right.
    """
    stem, keys = _read_preset(name)
    origins: dict[str, str] = {}
    keys = {key: dict(value) if isinstance(value, dict) else value for key, value in keys.items()}
    for override in overrides:
        _apply(keys, override)
        origins[override.key] = override.origin
    return Preset(stem, _validate(keys, name, origins))


def parse_config(keys: object, where: str) -> Config:
    """Check keys that come from elsewhere than a preset file: a run folder, a checkpoint's metadata."""
    if not isinstance(keys, dict):
        raise UsageError(f"{where}: holds no configuration")
    return _validate(keys, where, {})


def read_config(path: Path) -> Config:
    """The `config.yaml` of a run folder."""
    text = read_file(path, LARGEST_PRESET).decode("utf-8", errors="replace")
    return parse_config(_parse_yaml(text, str(path)), str(path))


def differences(config: Config, other: Config) -> dict[str, tuple[object, object]]:
    """The dotted keys at which two configurations differ, with both values; what only describes is left out.

    A section that only one has differs in its first key, and elsewhere where it is not the default.
    """
    ours, theirs = flat(config), flat(other)
    return {key: (ours[key], theirs[key]) for key in ours if ours[key] != theirs[key]}


def flat(config: Config) -> dict[str, object]:
    """Every setting by its dotted key; what only describes is left out.

    A section that may be missing and is, stands there with its defaults, but for its first key, which is None.
    """
    describing = ("description", "published")
    return {
        key: value for key, value in _leaves(_with_sections(config.model_dump())) if key.split(".")[0] not in describing
    }


def optional_sections() -> list[str]:
    """The sections that a configuration may leave out."""
    return [
        name
        for name, field in Config.model_fields.items()
        if field.default is None and _section_of(field.annotation) is not None and name != "published"
    ]


def _with_sections(keys: dict[str, Any]) -> dict[str, Any]:
    """Optional sections that are not there as their defaults, without the first key."""
    for name, field in Config.model_fields.items():
        section = _section_of(field.annotation)
        if section is not None and keys[name] is None and name != "published":
            keys[name] = {**section().model_dump(), next(iter(section.model_fields)): None}
    return keys


def _leaves(keys: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in keys.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# ------------------------------------------------------------------------------------------ checking


def _apply(keys: dict[str, Any], override: Override) -> None:
    """Set one dotted key. Keys that do not exist are refused here, where their origin is known."""
    field = _field(override.key)
    if field is None:
        raise UsageError(f"unknown key {override.key!r} in {override.origin}{_nearest_key(override.key)}")
    *sections, last = override.key.split(".")
    for section in sections:
        inner = keys.get(section)
        keys[section] = inner if isinstance(inner, dict) else {}
        keys = keys[section]
    keys[last] = override.value


def _section_of(annotation: object) -> type[Section] | None:
    """The section that a field holds, `X | None` included."""
    candidates = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)


def _fields(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key of the schema by its dotted name, sections left out."""
    for name, field in section.model_fields.items():
        inner = _section_of(field.annotation)
        if inner is None:
            yield f"{prefix}{name}", field
        else:
            yield from _fields(inner, f"{prefix}{name}.")


def _field(key: str) -> FieldInfo | None:
    return dict(_fields()).get(key)


def _nearest_key(key: str) -> str:
    known = [name for name, _ in _fields()]
    sections = [name for name, field in Config.model_fields.items() if _section_of(field.annotation)]
    if key in sections:
        inside = [name for name in known if name.startswith(f"{key}.")]
        return f": it is a section; its keys are {', '.join(inside)}"
    leaves: dict[str, str] = {}
    for name in known:
        leaves.setdefault(name.split(".")[-1], name)
    leaf = key.split(".")[-1]
    # A slip of the finger in the whole name, then the right name without its section, then a far guess.
    guesses = (
        difflib.get_close_matches(key, sections + known, n=1, cutoff=0.8)
        or [leaves[near] for near in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.6)]
        or difflib.get_close_matches(key, sections + known, n=1, cutoff=0.5)
    )
    return f"; did you mean {guesses[0]}?" if guesses else "; `cifar100 train --print-config` shows every key"


def _show(value: object) -> str:
    if value is None:
        return "null"
    text = str(value).lower() if isinstance(value, bool) else value if isinstance(value, str) and value else repr(value)
    text = text.encode("unicode_escape").decode() if not text.isprintable() else text
    return text if len(text) <= 60 else f"{text[:57]}..."


def _allowed(annotation: object, metadata: Iterable[object]) -> str:
    """What a field takes, in words: from its annotation and its bounds."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"a list, as in [60, 120, 160], each {_allowed(arguments[0], ())}"
    if origin is tuple:
        return "two numbers, as in [0.9, 0.999]"
    if origin in (Union, UnionType):
        return _allowed(next(a for a in arguments if a is not type(None)), metadata)
    if origin is Annotated:
        return _allowed(arguments[0], [*arguments[1:], *metadata])
    if annotation is bool:
        return "true or false"
    if annotation is str:
        return "text"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return f"a section with the keys {', '.join(annotation.model_fields)}"
    kind, words = "a whole number" if annotation is int else "a number", []
    for bound in metadata:
        if isinstance(bound, annotated_types.Ge):
            words.append(f"at least {bound.ge}")
        elif isinstance(bound, annotated_types.Gt):
            words.append(f"above {bound.gt}")
        elif isinstance(bound, annotated_types.Le):
            words.append(f"at most {bound.le}")
        elif isinstance(bound, annotated_types.Lt):
            words.append(f"below {bound.lt}")
        elif isinstance(bound, annotated_types.MultipleOf):
            words.append(f"a multiple of {bound.multiple_of}")
    return f"{kind}, {' and '.join(words)}" if words else kind


def _validate(keys: dict[str, Any], where: str, origins: Mapping[str, str]) -> Config:
    try:
        return Config.model_validate(keys)
    except ValidationError as error:
        raise UsageError(_explain(error, where, origins)) from None


def _explain(error: ValidationError, where: str, origins: Mapping[str, str]) -> str:
    """The first thing wrong, in one line: key, value, origin, what is allowed, the nearest name."""
    first, more = error.errors()[0], error.error_count() - 1
    if not first["loc"]:  # a rule between keys, which says it all itself, or a key that is no text
        return f"{where}: {first.get('ctx', {}).get('error', 'one of its keys is no text')}"
    *parents, last = [str(part) for part in first["loc"]]
    key = ".".join([*parents, last])
    rest = f" ({more} more {'mistake' if more == 1 else 'mistakes'})" if more else ""
    if first["type"] in ("extra_forbidden", "invalid_key"):
        return f"unknown key {_show(key)!r} in {where}{_nearest_key(key)}{rest}"
    while (field := _section_or_field(key)) is None:  # inside a list: name the list
        key = key.rpartition(".")[0]
    origin = origins.get(key, where)
    if first["type"] == "missing" and key == ".".join([*parents, last]):
        return f"{key} is missing in {origin}: {_allowed(field.annotation, field.metadata)}{rest}"
    value = first["input"]
    near = ""
    if isinstance(value, str) and get_origin(field.annotation) is Literal:
        near = did_you_mean(value, map(str, get_args(field.annotation)))
    allowed = _allowed(field.annotation, field.metadata)
    return f"{key} = {_show(value)} ({origin}): must be {allowed}{near}{rest}"


def _section_or_field(key: str) -> FieldInfo | None:
    section: type[Section] | None = Config
    field = None
    for part in key.split("."):
        field = section.model_fields.get(part) if section else None
        section = _section_of(field.annotation) if field else None
    return field

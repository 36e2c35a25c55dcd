"""The schema of a preset: every key, what it may be, and which go together. No torch here."""

import itertools
from pathlib import Path
from typing import Annotated, Literal, Self

import annotated_types
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from cifar100cli import safe_yaml
from cifar100cli.catalog import DatasetName
from cifar100cli.errors import UsageError, did_you_mean

MOST_SEEDS = 2**32
DESCRIBING = ("description", "published", "expected")  # the keys that say what a preset is, and set nothing


def _refuse_bool(value: object) -> object:
    if isinstance(value, bool):  # or `epochs: true` would mean one epoch
        raise ValueError("true and false are not numbers")
    return value


def _whole(path: str) -> str:
    """A path from the root on: a run can be gone on with from any folder, and finds what it was begun with."""
    if "\0" in path:
        raise UsageError("a path cannot hold a null byte")
    try:
        return str(Path(path).expanduser().absolute())
    except RuntimeError:
        raise UsageError("there is no such user's home") from None


Integer = Annotated[int, BeforeValidator(_refuse_bool)]
Number = Annotated[float, BeforeValidator(_refuse_bool)]


Text = Annotated[str, Field(max_length=2000)]
FilePath = Annotated[str, Field(min_length=1), AfterValidator(_whole)]
_Level = Annotated[Number, Field(ge=0, le=1)]
_Spread = Annotated[Number, Field(gt=0, le=1)]
Colours = tuple[_Level, _Level, _Level]
Deviations = tuple[_Spread, _Spread, _Spread]


class Section(BaseModel):
    """A frozen mapping that refuses keys which it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Published(Section):
    """A figure that a document reports for this preset."""

    top1: Number = Field(ge=0, le=1, description="test accuracy, as a fraction")
    epoch: Integer | None = Field(None, ge=1, description="the epoch that it was reached in")
    source: Text = Field("", description="where it stands")


class Expected(Section):
    """What a preset of ours reaches, or is meant to reach where it has not been run."""

    top1: Number = Field(ge=0, le=1, description="test accuracy, as a fraction: the mean of the runs, or the goal")
    deviation: Number | None = Field(None, ge=0, le=1, description="of the runs, as a fraction")
    runs: Integer = Field(0, ge=0, description="so many have shown it; 0: it is a goal, and has not been run")
    time: Text = Field("", description="how long a run takes, and on what")
    source: Text = Field("", description="where the recipe is from")


class Data(Section):
    """Which images the model sees."""

    dataset: DatasetName = Field("cifar100", description="what is trained on; synthetic: drawn shapes")
    image_size: Integer = Field(32, ge=16, le=1024, description="side in pixels; images are resized to it")
    batch_size: Integer = Field(250, ge=1, le=65536, description="images in a training step")
    fraction: Number = Field(1.0, gt=0, le=1, description="share of each class's training images that is used")
    val_fraction: Number = Field(0.0, ge=0, le=0.9, description="share of the training set that is held out")
    normalize: Literal["none", "dataset", "imagenet", "backbone", "values"] = Field(
        "none", description="after dividing by 255: nothing, or the mean and deviation of ...; values: those below"
    )
    mean: Colours | None = Field(None, description="of values: of red, green and blue, from 0 to 1")
    std: Deviations | None = Field(None, description="of values: likewise; weights of a run bring their own")
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
        # Whatever is off by default draws anew for every view, but the policy, which knows better.
        blocks = [name for name, field in Augment.model_fields.items() if field.default in (0, "none")]
        keys = [key for key in blocks if key != "policy" and getattr(self, key) not in (0, "none")]
        if self.policy == "one_of" or (self.policy == "crop_flip" and self.crop_padding):
            keys.insert(0, "policy")
        return " and ".join(f"augment.{key} = {getattr(self, key)}" for key in keys)

    def contradiction(self) -> str | None:
        """What is set and cannot be meant with this policy, in words."""
        if self.backend != "batched" and self.policy != "one_of":
            return f"augment.backend = {self.backend} is for augment.policy = one_of, not {self.policy}"
        if self.policy == "flip" and self.flip == "none":
            return "augment.flip = none leaves nothing of augment.policy = flip; use augment.policy = none"
        return None


class Model(Section):
    """The network."""

    backbone: str = Field("resnet18", min_length=1, description="any image model that timm knows, or one of ours")
    pretrained: bool = Field(False, description="start from ImageNet weights: timm's, or those of `weights`")
    weights: FilePath | None = Field(None, description="a file of weights for the backbone")
    stem: Literal["imagenet", "cifar"] = Field("imagenet", description="cifar: 3x3, stride 1, no pooling")
    head: Literal["linear", "cosine"] = Field("linear", description="cosine: an embedding against class vectors")
    embedding_dim: Integer = Field(512, ge=2, le=8192, description="of the cosine head")
    drop_rate: Number = Field(0.0, ge=0, lt=1, description="drop-out before the head; in a Wide ResNet, in its blocks")
    drop_path_rate: Number = Field(0.0, ge=0, lt=1, description="stochastic depth: of the last block, growing to it")


class Loss(Section):
    """What training minimises."""

    name: Literal["cross_entropy", "arcface", "cosface"] = Field(
        "cross_entropy", description="arcface and cosface: with a margin between classes, on a cosine head"
    )
    label_smoothing: Number = Field(0.0, ge=0, lt=1, description="share of a label that is spread over all classes")
    scale: Number = Field(8.0, gt=0, le=1000, description="of the cosines that a cosine head gives")
    margin: Number = Field(0.35, ge=0, le=1.5, description="radians for arcface; a cosine for cosface")
    gradient: Literal["exact", "straight_through"] = Field("exact", description="of arcface's margin")


class Distillation(Section):
    """How a teacher's logits are learned from, beside the labels."""

    teacher: FilePath | None = Field(None, description="a run or checkpoint of the same classes")
    alpha: Number = Field(0.7, ge=0, le=1, description="weight of the teacher's term; the labels' is 1 - alpha")
    temperature: Number = Field(4.0, gt=0, le=100, description="both softmaxes are taken at logits / temperature")
    form: Literal["plain", "decoupled"] = Field(
        "plain", description="decoupled: the true class, and the others among themselves, each with a weight"
    )
    target_weight: Number = Field(1.0, ge=0, le=1000, description="decoupled: of the true class against the rest")
    nontarget_weight: Number = Field(8.0, ge=0, le=1000, description="decoupled: among the other classes")
    standardize: bool = Field(False, description="first bring each image's logits to mean 0 and deviation 1")

    def required_teacher(self) -> str:
        """The teacher's run or checkpoint; raises `UsageError` where none is named."""
        if self.teacher is None:
            raise UsageError(
                "distillation needs a teacher: cifar100 distill --teacher RUN|CHECKPOINT (bench takes one, too)"
            )
        return self.teacher


# What may be unfrozen of the study's network and its kin, so that a misspelt name is told without loading PyTorch.
RESNETS = {"resnet18", "resnet34", "resnet50", "resnet101", "resnet152"}
DEPTHS = ("fc", "layer4", "layer3", "all", "layer2", "layer1", "stem", "head")


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
    weight_decay: Number = Field(
        0.0001, ge=0, le=10, description="adamw and muon's matrices: decoupled from the gradient"
    )
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
    fixed_norm: bool = Field(
        False, description="muon: hold each matrix's norm at the root of its rows; for convolutions that a norm follows"
    )
    grad_clip: Number = Field(5.0, ge=0, description="largest norm of the gradient; 0 leaves it as it is")
    sam_rho: Number = Field(0.0, ge=0, le=100, description="sharpness-aware: how far up gradients are taken; 0 is off")
    sam_adaptive: bool = Field(False, description="measure sam_rho in the weights' sizes (then it is around 1)")

    @property
    def rate_of_others(self) -> float:
        """The highest rate of what is no hidden layer's matrix: the head, the stem, biases and norms."""
        return self.lr if self.auxiliary_lr is None else self.auxiliary_lr


class Schedule(Section):
    """How the learning rate changes."""

    name: Literal["constant", "cosine", "linear", "one_cycle", "multi_step"] = Field(
        "constant", description="one_cycle: up and down along cosines; the momentum stays"
    )
    warmup_epochs: Number = Field(0, ge=0, le=100_000, description="the rate rises linearly over these")
    final: Number = Field(0.0, ge=0, le=1, description="cosine and linear: the share of the highest rate they end at")
    milestones: tuple[Annotated[Integer, annotated_types.Ge(1)], ...] = Field(
        (), max_length=1000, description="multi_step: the epochs after which the rate is multiplied by gamma"
    )
    gamma: Number = Field(0.1, gt=0, le=1, description="of multi_step")
    pct_start: Number = Field(0.3, ge=0, lt=1, description="one_cycle: the share of the steps in which the rate rises")
    div_factor: Number = Field(25.0, ge=1, le=1e9, description="one_cycle: the highest rate over the first")
    final_div_factor: Number = Field(10_000.0, ge=1, le=1e12, description="one_cycle: the first rate over the last")


class Train(Section):
    """How long, in which precision, and which epoch's weights are kept."""

    epochs: Integer = Field(200, ge=1, le=100_000, description="passes over the training images")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="of matrix products; fp16 scales the loss by itself, so that gradients do not vanish"
    )
    ema: Number = Field(0.0, ge=0, lt=1, description="decay of a moving average of the weights, kept in their place")
    select: Literal["best_test", "best_val", "last"] = Field(
        "last", description="whose weights are kept: the epoch best on the test set, on held-out images, or the last"
    )
    watch_test: bool = Field(False, description="measure the test set in every epoch, and choose nothing by it")
    compile: Literal["auto", "off", "graph", "inductor"] = Field(
        "auto", description="steps as one CUDA graph; inductor: with kernels compiled by torch.compile besides"
    )
    deterministic: bool = Field(False, description="only kernels that give the same bits every time, if slower")
    sync_batch_norm: bool = Field(True, description="with torchrun: batch statistics of all ranks, as on one device")

    @property
    def measures_test(self) -> bool:
        """Whether every epoch is measured on the test set: to choose by it, as the tutorial does, or to watch it."""
        return self.select == "best_test" or self.watch_test


# Keys that say how another key's work is done: that key, its values at which it does any (None: any but null), and
# they. At others they do nothing, and stay as they are: a preset's own must not be in the way of one flag.
_TUNED: tuple[tuple[str, frozenset[str] | None, tuple[str, ...]], ...] = (
    ("data.first_image_size", None, ("data.grow_until",)),
    ("augment.policy", frozenset({"flip", "crop_flip"}), ("augment.flip",)),
    ("augment.policy", frozenset({"crop_flip"}), ("augment.crop_padding", "augment.padding_mode")),
    ("augment.auto", frozenset({"randaugment"}), ("augment.randaugment_ops", "augment.randaugment_magnitude")),
    ("model.head", frozenset({"cosine"}), ("model.embedding_dim", "loss.scale")),
    ("loss.name", frozenset({"arcface", "cosface"}), ("loss.margin",)),
    ("loss.name", frozenset({"arcface"}), ("loss.gradient",)),
    ("distillation.form", frozenset({"decoupled"}), ("distillation.target_weight", "distillation.nontarget_weight")),
    ("finetune.cache", frozenset({"auto", "on"}), ("finetune.cache_dtype",)),
    ("optimizer.name", frozenset({"adamw", "adam", "muon"}), ("optimizer.betas",)),
    ("optimizer.auxiliary", frozenset({"adamw"}), ("optimizer.betas",)),
    ("optimizer.name", frozenset({"sgd", "muon"}), ("optimizer.momentum", "optimizer.nesterov")),
    ("optimizer.name", frozenset({"muon"}), ("optimizer.auxiliary", "optimizer.adjust_lr", "optimizer.ns_steps")),
    ("schedule.name", frozenset({"multi_step"}), ("schedule.gamma",)),
    (
        "schedule.name",
        frozenset({"one_cycle"}),
        ("schedule.pct_start", "schedule.div_factor", "schedule.final_div_factor"),
    ),
)
TUNING = {
    key: [(other, values) for other, values, tuned in _TUNED if key in tuned] for _, _, keys in _TUNED for key in keys
}


class Config(Section):
    """A whole preset, resolved."""

    description: Text = ""
    published: Published | None = None
    expected: Expected | None = None
    seed: Integer = Field(0, ge=0, lt=MOST_SEEDS, description="of all that is random")
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
    def _normalisation_is_whole(self) -> Self:
        data = self.data
        for key, value in (("mean", data.mean), ("std", data.std)):
            if data.normalize == "values" and value is None:
                raise ValueError(f"data.normalize = values needs data.{key}, as in [0.5, 0.5, 0.5]")
            if data.normalize != "values" and value is not None:
                raise ValueError(f"data.{key} is for data.normalize = values, not {data.normalize}; leave one out")
        return self

    @property
    def takes_fp16(self) -> bool:
        """Whether a step can be skipped, as fp16 must where its scaled loss overflows; Muon cannot."""
        return self.optimizer.name != "muon"

    def obstacle_to_kept_features(self) -> str | None:
        """Why a frozen part, whatever it is, must run in every epoch, and not once for all of them, or None."""
        if unbounded := self.augment.unbounded():
            return f"no two views are the same under {unbounded}"
        if self.distillation is not None:
            return "a teacher wants to see the images"
        if self.data.first_image_size is not None:
            return "the images grow (data.first_image_size)"
        return None

    @model_validator(mode="after")
    def _keys_go_together(self) -> Self:
        if self.loss.name in ("arcface", "cosface") and self.model.head != "cosine":
            raise ValueError(f"loss.name = {self.loss.name} works on cosines: set model.head to cosine as well")
        if self.model.weights is not None and not self.model.pretrained:
            raise ValueError("model.weights names weights to start from: set model.pretrained to true, or leave it out")
        contradiction = self.augment.contradiction()
        if contradiction is not None:
            raise ValueError(contradiction)
        if self.finetune is not None and self.model.backbone in RESNETS and self.finetune.unfreeze not in DEPTHS:
            raise ValueError(
                f"finetune.unfreeze = {self.finetune.unfreeze}: {self.model.backbone} has no such stage"
                f"{did_you_mean(self.finetune.unfreeze, DEPTHS)} (it has {', '.join(DEPTHS)})"
            )
        if self.finetune is not None and self.finetune.cache == "on":
            obstacle = self.obstacle_to_kept_features()
            if obstacle is not None:
                raise ValueError(
                    f"finetune.cache = on is not possible: {obstacle}; change that, or leave the cache out"
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
        if optimizer.name != "muon":
            muons = [] if optimizer.auxiliary_lr is None else [("auxiliary_lr", f"{optimizer.auxiliary_lr:g}", "null")]
            muons += [("fixed_norm", "true", "false")] if optimizer.fixed_norm else []
            if muons:
                named = " and ".join(f"optimizer.{key} = {value}" for key, value, _ in muons)
                without = " ".join(f"--set optimizer.{key}={off}" for key, _, off in muons)
                raise ValueError(f"{named}: for optimizer.name = muon, not {optimizer.name} ({without})")
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
        done = (epoch - 1) / (self.data.grow_until * self.train.epochs) + 1e-9  # 0.55 * 100 is more than 55 in floats
        if first is None or done >= 1 or epoch >= self.train.epochs:
            return whole
        return first + 16 * int(done * (whole - first) / 16)

    def work_in(self, epoch: int) -> float:
        """What an epoch costs, of one with whole images: smaller ones are taken to cost as their area says."""
        return (self.image_size_in(epoch) / self.data.image_size) ** 2

    def to_yaml(self, *, ascii_only: bool = False) -> str:
        """The preset as YAML that `load_preset` reads back to an equal `Config`; in ASCII for where UTF-8 is not."""
        return safe_yaml.dump(self.model_dump(mode="json", exclude_none=True), ascii_only=ascii_only)

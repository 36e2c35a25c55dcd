"""The options that commands share: declared once, with the key of a preset that each of them sets.

An option that sets a key is text here, and read and checked as a preset's YAML is: one message for one mistake.
`readable=False`: a file that is shut is told of where it is opened, as one that is not there is, and not by Typer.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from cifar100cli import completion, console, folders
from cifar100cli.catalog import DATASETS
from cifar100cli.errors import DataError, UsageError, did_you_mean
from cifar100cli.folders import expand

if TYPE_CHECKING:
    from cifar100cli.config import Override


def _verbosity(level: int) -> Callable[[bool], None]:
    def set_level(wanted: bool) -> None:
        if wanted:
            console.set_verbosity(level)

    return set_level


def _text(metavar: str, description: str, complete: completion.Complete | None = None) -> Any:
    return typer.Option(metavar=metavar, help=description, autocompletion=complete, readable=False)


def _either(words: Iterable[str]) -> str:
    """All of them in words: a, b or c."""
    *others, last = words
    return f"{', '.join(others)} or {last}"


# Of every command.
Quiet = Annotated[
    bool,
    typer.Option(
        "-q", "--quiet", callback=_verbosity(console.QUIET), is_eager=True, help="Show results and errors only."
    ),
]
Verbose = Annotated[
    bool,
    typer.Option("-v", "--verbose", callback=_verbosity(console.VERBOSE), is_eager=True, help="Show more detail."),
]
Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON document on stdout.")]
DataDir = Annotated[
    Path | None,
    typer.Option(
        envvar=folders.DATA_DIR,
        metavar="DIR",
        help="Where data sets are; default: the user's cache.",
        readable=False,
    ),
]
RunsDir = Annotated[
    Path,
    typer.Option("--out", envvar=folders.RUNS_DIR, metavar="DIR", help="Where run folders go.", readable=False),
]
Device = Annotated[
    str, _text("NAME", "auto, cpu, cuda, cuda:N or mps.", completion.words("auto", "cpu", "cuda", "mps"))
]

# Of the commands that use a trained model.
Model = Annotated[
    Path,
    typer.Argument(
        metavar="RUN|CHECKPOINT",
        help="A run folder, or a .safetensors file.",
        autocompletion=completion.trained,
        readable=False,
    ),
]

# Of the commands that train.
Preset = Annotated[str | None, _text("NAME|FILE", "One of `cifar100 presets`, or a YAML file.", completion.presets)]
Dataset = Annotated[str | None, _text("NAME", f"{_either(DATASETS)}.", completion.values("data.dataset"))]
Backbone = Annotated[str | None, _text("NAME", "Any image model of timm's, or one of ours (airbench94, ...).")]
Pretrained = Annotated[
    bool | None, typer.Option("--pretrained/--no-pretrained", help="Start from ImageNet weights, or do not.")
]
Weights = Annotated[
    Path | None, _text("FILE", "Weights to start from: a file (safetensors or PyTorch), in place of timm's.")
]
ImageSize = Annotated[str | None, _text("N", "Side in pixels.")]
BatchSize = Annotated[str | None, _text("N", "Images in a training step.")]
AugmentPolicy = Annotated[
    str | None,
    _text(
        "POLICY",
        "none, flip, crop_flip or one_of; --set augment.KEY=VALUE adds more.",
        completion.values("augment.policy"),
    ),
]
LossName = Annotated[str | None, _text("NAME", "cross_entropy, arcface or cosface.", completion.values("loss.name"))]
LabelSmoothing = Annotated[str | None, _text("X", "Share of a label spread over all classes, from 0 to below 1.")]
OptimizerName = Annotated[str | None, _text("NAME", "adamw, adam, sgd or muon.", completion.values("optimizer.name"))]
LearningRate = Annotated[str | None, _text("X", "Learning rate.")]
WeightDecay = Annotated[str | None, _text("X", "Weight decay.")]
Teacher = Annotated[
    Path | None, _text("RUN|CHECKPOINT", "A trained model of ours with the same classes.", completion.trained)
]
Alpha = Annotated[
    str | None, _text("A", "Weight of the teacher; the labels have 1 - A. [default: the preset's, mostly 0.7]")
]
Temperature = Annotated[str | None, _text("T", "Both softmaxes are taken at logits / T. [preset: 4]")]
Unfreeze = Annotated[
    str | None,
    _text(
        "STAGE",
        "fc, layer4 (and fc), layer3 (and both), all, or a stage's own name.",
        completion.words("fc", "layer4", "layer3", "all"),
    ),
]
Init = Annotated[
    str | None,
    _text(
        "imagenet|none|RUN|CHECKPOINT",
        "What to start from; a run's head is replaced. [preset: imagenet]",
        completion.starts,
    ),
]
BatchNorm = Annotated[
    str | None,
    _text(
        "frozen|adapt",
        "Batch statistics of frozen stages: kept, or adapted. [preset: frozen]",
        completion.values("finetune.bn"),
    ),
]
Fraction = Annotated[str | None, _text("F", "Share of each class's training images, above 0 up to 1.")]
Cache = Annotated[
    bool | None, typer.Option("--cache/--no-cache", help="Run the frozen part once. [preset: where possible]")
]
Epochs = Annotated[str | None, _text("N", "Passes over the training images.")]
Minutes = Annotated[
    float | None,
    typer.Option(
        metavar="N", help="In place of --epochs: as many as fit in N minutes on this machine, which is timed first."
    ),
]
Seed = Annotated[str | None, _text("N", "Random seed of weights, data order and augmentation.")]
Seeds = Annotated[
    int, typer.Option(min=1, max=1000, metavar="N", help="How many runs to train in turn, with consecutive seeds.")
]
Ablate = Annotated[
    list[str] | None,
    _text("BLOCK,BLOCK", "Train the preset whole and without each of these blocks (augment, ema, ...), and compare."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Set any key of `presets --keys`; may be repeated.",
        autocompletion=completion.settings,
    ),
]
Log = Annotated[
    list[str] | None,
    typer.Option(
        "--log",
        metavar="tensorboard|wandb",
        help="Write the figures there too; may be repeated.",
        autocompletion=completion.words("tensorboard", "wandb"),
    ),
]
Resume = Annotated[str | None, _text("RUN|last", "Go on with a run that was stopped.", completion.unfinished)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check it all, take one step, write nothing.")]
PrintConfig = Annotated[bool, typer.Option("--print-config", help="Print the resolved preset as YAML and exit.")]

KEYS = {
    "dataset": "data.dataset",
    "backbone": "model.backbone",
    "pretrained": "model.pretrained",
    "weights": "model.weights",
    "image_size": "data.image_size",
    "batch_size": "data.batch_size",
    "augment": "augment.policy",
    "loss": "loss.name",
    "label_smoothing": "loss.label_smoothing",
    "optimizer": "optimizer.name",
    "lr": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "teacher": "distillation.teacher",
    "alpha": "distillation.alpha",
    "temperature": "distillation.temperature",
    "unfreeze": "finetune.unfreeze",
    "bn": "finetune.bn",
    "fraction": "data.fraction",
    "cache": "finetune.cache",
    "epochs": "train.epochs",
    "seed": "seed",
}


@dataclass(frozen=True)
class Request:
    """What a command that trains is asked for, beside the keys of a preset."""

    preset: str | None
    data_dir: Path | None
    out: Path
    device: str
    seeds: int
    ablate: Sequence[str]
    minutes: float | None
    log: Sequence[str]
    resume: str | None
    dry_run: bool
    print_config: bool
    json: bool

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """From a command's parameters by name; what a command has no option for is not asked for."""
        several = {"ablate": given.get("ablate") or (), "log": given.get("log") or ()}
        return cls(**{field.name: given.get(field.name) for field in fields(cls)} | several)


def overrides(given: Mapping[str, Any]) -> list["Override"]:
    """What `--set` and the options say, as overrides of a preset, from a command's parameters.

    Both for one key is a mistake.
    """
    from cifar100cli.config import Override, parse_value

    found: dict[str, Override] = {}
    for setting in given.get("settings") or []:
        key, equals, value = setting.partition("=")
        key = key.strip()
        if not equals or not key:
            raise UsageError(f"--set {setting}: must be KEY=VALUE, as in --set optimizer.lr=0.01")
        found[key] = Override(key, parse_value(value, key), f"--set {key}")
    for name, key in KEYS.items():
        value = given.get(name)
        if value is None:
            continue
        flag = f"--{name.replace('_', '-')}" if value is not False else f"--no-{name}"
        if key in found:
            raise UsageError(f"{flag} and --set {key} both say what {key} is; leave one out")
        if name == "cache":
            value = "on" if value else "off"
        elif isinstance(value, Path):
            value = str(expand(value))
        elif isinstance(value, str):
            value = parse_value(value, key)
        found[key] = Override(key, value, flag)
    if given.get("init") is not None:
        _start_from(given["init"], found)
    return with_pretrained(found)


def _start_from(init: str, found: dict[str, "Override"]) -> None:
    """`--init`: ImageNet weights, none, or the network of a run of ours."""
    from cifar100cli.card import our_network
    from cifar100cli.config import Override
    from cifar100cli.runs import find_model

    flag = f"--init {init}"
    if "model.pretrained" in found:
        raise UsageError(f"--init and {found['model.pretrained'].origin} both say what to start from; leave one out")
    if init in ("imagenet", "none"):
        found["model.pretrained"] = Override("model.pretrained", init == "imagenet", flag)
        if init == "imagenet":
            found.setdefault("model.weights", Override("model.weights", None, flag))  # and not those of the preset
        return
    if "model.weights" in found:
        raise UsageError(f"--init and {found['model.weights'].origin} both name weights; leave one out")
    try:
        path = find_model(expand(Path(init))).absolute()
    except DataError as error:
        raise DataError(f"{error}{did_you_mean(init, ('imagenet', 'none'))}") from None
    found["model.weights"] = Override("model.weights", str(path), flag)
    network = our_network(path)  # none where the file is of another kind, which is judged when it is loaded
    if network is None:
        return
    backbone = found.setdefault("model.backbone", Override("model.backbone", network.backbone, flag))
    if backbone.value == network.backbone:
        found.setdefault("model.stem", Override("model.stem", network.stem, flag))


def _means_no(value: object) -> bool:
    """Whether a preset takes the value for false: `off` and `no` are, too."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return not TypeAdapter(bool).validate_python(value)
    except ValidationError:
        return False


def with_pretrained(found: dict[str, "Override"]) -> list["Override"]:
    """Naming weights means starting from them; those of a run of ours go on seeing pixels as they were trained to."""
    from cifar100cli.card import our_network
    from cifar100cli.config import Override

    pretrained = found.get("model.pretrained")
    if pretrained is not None and _means_no(pretrained.value):
        found.setdefault("model.weights", Override("model.weights", None, pretrained.origin))
    if "model.weights" in found and found["model.weights"].value is not None:
        weights = found["model.weights"]
        network = our_network(expand(Path(weights.value))) if isinstance(weights.value, str) else None
        if network is not None and not found.keys() & {"data.normalize", "data.mean", "data.std"}:
            untouched = not any(network.mean) and set(network.std) == {1.0}
            pixels = {
                "normalize": "none" if untouched else "values",
                "mean": None if untouched else list(network.mean),
                "std": None if untouched else list(network.std),
            }
            for key, value in pixels.items():
                found[f"data.{key}"] = Override(f"data.{key}", value, weights.origin)
        pretrained = found.setdefault("model.pretrained", Override("model.pretrained", True, "--weights"))
        if _means_no(pretrained.value):
            raise UsageError(
                f"{weights.origin} names model.weights, and {pretrained.origin} says model.pretrained = false: "
                "they exclude each other"
            )
    return list(found.values())

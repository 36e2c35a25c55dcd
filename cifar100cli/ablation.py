"""What each part of a preset brings: the settings without it, and the gain with its noise. No torch here.

A block is a part of a preset that can be put to a value at which it does nothing. Whatever the schema has by default
switched off is one, so that new keys are blocks without a word here.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Protocol, TypeVar

from cifar100cli import noise
from cifar100cli.config import departures, effective_differences, flat, idle, parse_config, shipped
from cifar100cli.errors import UsageError, did_you_mean
from cifar100cli.keys import optional_sections
from cifar100cli.schema import Config

OFF = (0, False, "none", "off", "constant")  # a default that is one of these does nothing
# Keys that do something by default, with the value at which they do not.
NEUTRAL: Mapping[str, object] = {
    "optimizer.weight_decay": 0.0,
    "optimizer.grad_clip": 0.0,
    "data.first_image_size": None,
    "model.stem": "imagenet",
    "loss.name": "cross_entropy",
}
# How, on what and for how long a setting is run: no part of it, and the same wherever two are compared.
HOW = frozenset(
    {
        "seed",
        *(f"data.{key}" for key in ("dataset", "fraction", "val_fraction")),
        *(f"finetune.{key}" for key in ("unfreeze", "cache", "cache_dtype")),
        *(f"train.{key}" for key in ("epochs", "precision", "select", "watch_test", "compile", "deterministic")),
        "train.sync_batch_norm",
    }
)
SHORT: Mapping[str, str] = {"schedule.warmup_epochs": "warmup", "loss.name": "loss"}
# What goes with its first key alone, and could not stay without it.
TOGETHER: Mapping[str, Mapping[str, object]] = {
    "pretrained": {"model.pretrained": False, "model.weights": None},
    "normalize": {"data.normalize": "none", "data.mean": None, "data.std": None},
    "schedule": {"schedule.name": "constant", "schedule.final": 0.0, "schedule.milestones": ()},
    "sam_rho": {"optimizer.sam_rho": 0.0, "optimizer.sam_adaptive": False},
}


@dataclass(frozen=True)
class Block:
    """Keys that together do nothing at these values, under the name that a user gives them."""

    name: str
    values: Mapping[str, object]

    @property
    def leaves_nothing(self) -> bool:
        """Whether at its values there is nothing of it; else a default stands in its place, such as random flips."""
        value = next(iter(self.values.values()))
        return value is None or value in OFF

    @property
    def left_out(self) -> str:
        """What is said of a setting that does without it."""
        value = next(iter(self.values.values()))
        return f"no {self.name}" if self.leaves_nothing else f"{self.name} = {value}"

    def is_off(self, settings: Mapping[str, object]) -> bool:
        """Whether a setting (`config.flat`) does without it."""
        return all(settings[key] == value or idle(key, settings) for key, value in self.values.items())

    def taken_from(self, config: Config) -> Config:
        """The configuration without it. Raises `UsageError` where what is left does not go together."""
        keys = config.model_dump()
        if self.name in optional_sections():
            keys[self.name] = None
        else:
            for key, value in self.values.items():
                section, _, last = key.rpartition(".")
                keys[section][last] = value
        return parse_config(keys, f"--ablate {self.name}")


def blocks() -> list[Block]:
    """Every block there is: those of several keys first, then those of one."""
    defaults = flat(Config())
    off = {key: value for key, value in defaults.items() if key.startswith("augment.") or value in OFF}
    off = {key: value for key, value in {**off, **NEUTRAL}.items() if key in defaults and key not in HOW}
    several = {
        name: {key: value for key, value in defaults.items() if key.startswith(f"{name}.")}
        for name in ["augment", *optional_sections()]
    }
    several = {name: values for name, values in several.items() if not HOW & values.keys()}
    several |= {name: dict(values) for name, values in TOGETHER.items()}
    first = {next(iter(values)) for values in TOGETHER.values()}
    leaves = [key.rpartition(".")[2] for key in off]

    def short(key: str) -> str:
        leaf = key.rpartition(".")[2]
        return SHORT.get(key) or (leaf if leaves.count(leaf) == 1 and leaf not in several else key)

    return [
        *(Block(name, values) for name, values in several.items()),
        *(Block(short(key), {key: value}) for key, value in off.items() if key not in first),
    ]


def without(config: Config, names: Iterable[str]) -> dict[str, Config]:
    """The configuration without each named block, in the order of the names.

    Raises `UsageError` for a name that is unknown or stands twice, and for a block that `config` does not have.
    """
    known = {block.name: block for block in blocks()}
    for block in sorted(known.values(), key=lambda block: len(block.values)):  # the key alone is first
        known.setdefault(next(iter(block.values)), block)
    found: dict[str, Config] = {}
    for name in names:
        if name not in known:
            raise UsageError(
                f"--ablate: there is no block {name!r}{did_you_mean(name, known)} (this preset has {_have(config)})"
            )
        block = known[name]
        settings = flat(config)
        if block.is_off(settings):
            key, value = next(iter(block.values.items()))
            state = f"{key} is {value} already" if len(block.values) == 1 else "it is off already"
            if not block.leaves_nothing:
                state = f"{key} is {value}, the default that it would be put to"
            if len(block.values) == 1 and (reason := idle(key, settings)):
                state = f"{key} does nothing, for {reason}"
            raise UsageError(f"--ablate {name}: {state}, and nothing would change (this preset has {_have(config)})")
        left = block.taken_from(config)
        same = next((other for other, earlier in found.items() if not _parted(flat(earlier), flat(left))), None)
        if same is not None:
            raise UsageError(f"--ablate {name}: is the same setting as without {same}; name it once")
        found[block.name] = left
    if not found:
        raise UsageError(f"--ablate: name blocks, with commas between them (this preset has {_have(config)})")
    return found


def _have(config: Config) -> str:
    """The blocks that a configuration has; keys of a larger one are not told beside it."""
    settings = flat(config)
    told: set[str] = set()
    names = []
    for block in blocks():
        if not block.is_off(settings) and not told >= block.values.keys():
            names.append(block.name)
            told |= block.values.keys()
    return ", ".join(names) or "none"


# --------------------------------------------------------------------------------------- what a block brings


@dataclass(frozen=True)
class Setting:
    """What the complete runs of one setting reached: top-1 on the test images, as fractions, by seed."""

    preset: str
    config: Config
    top1: Mapping[int, float]
    runs: Sequence[str] = ()
    images: str | None = None
    """The digest of the data set, which older runs do not tell."""


def setting_of(preset: str, config: Config, results: Sequence[Mapping[str, Any]], images: str | None = None) -> Setting:
    """A setting from its runs' results. Several of one seed count as one, their mean: they are no further evidence."""
    return Setting(preset, config, by_seed(results, "top1"), [str(result["run_dir"]) for result in results], images)


def by_seed(results: Sequence[Mapping[str, Any]], figure: str) -> dict[int, float]:
    """A figure on the test images by seed, in order: the mean of the runs of each."""
    found: dict[int, list[float]] = {}
    for result in results:
        found.setdefault(int(result["seed"]), []).append(result["test"][figure])
    return {seed: fmean(found[seed]) for seed in sorted(found)}


@dataclass(frozen=True)
class Effect:
    """A setting that differs from the base in one block, and what the block brings.

    With `without` there is nothing of the block in the setting, and `gain` is the base's mean less its mean; else it
    has what the base has not, and `gain` is its mean less the base's. Fractions; `gain_std`, `gain_error` and
    `interval` are those of `noise.Difference`.
    """

    block: str
    without: bool
    changes: dict[str, object]
    n: int
    seeds: list[int]
    top1_mean: float
    top1_std: float | None
    gain: float
    gain_std: float | None
    gain_error: float | None
    interval: tuple[float, float] | None
    paired: bool
    within_noise: bool | None
    runs: list[str]


@dataclass(frozen=True)
class Ablation:
    """A setting of a preset, and those around it that were run alike.

    `changes` are from the preset as shipped; in a report, those of the row of the same runs.
    """

    preset: str
    dataset: str
    select: str
    epochs: int
    changes: dict[str, object]
    n: int
    seeds: list[int]
    top1_mean: float
    top1_std: float | None
    runs: list[str]
    effects: list[Effect]


def compare(base: Setting, others: Sequence[tuple[str, bool, Setting]]) -> Ablation:
    """The base beside other settings, each with its block's name and whether there is nothing of it."""
    ours = shipped(base.preset)
    changes = departures(base.config, ours) if ours is not None else {}
    values = list(base.top1.values())
    return Ablation(
        preset=base.preset,
        dataset=base.config.data.dataset,
        select=base.config.train.select,
        epochs=base.config.train.epochs,
        changes={key: value for key, (value, _) in changes.items()},
        n=len(values),
        seeds=list(base.top1),
        top1_mean=fmean(values),
        top1_std=noise.deviation(values),
        runs=list(base.runs),
        effects=[_effect(base, *other) for other in others],
    )


def _effect(base: Setting, block: str, lacks: bool, other: Setting) -> Effect:
    gain = noise.difference(base.top1, other.top1) if lacks else noise.difference(other.top1, base.top1)
    changes = effective_differences(other.config, base.config)
    values = list(other.top1.values())
    return Effect(
        block=block,
        without=lacks,
        changes={key: value for key, (value, _) in changes.items() if key != "seed"},
        n=len(values),
        seeds=list(other.top1),
        top1_mean=fmean(values),
        top1_std=noise.deviation(values),
        gain=gain.mean,
        gain_std=gain.deviation,
        gain_error=gain.error,
        interval=gain.interval,
        paired=gain.paired,
        within_noise=gain.within_noise,
        runs=list(other.runs),
    )


def find(settings: Sequence[Setting]) -> list[Ablation]:
    """The ablations among settings: of each preset, what was run alike and differs in one block.

    Beside the preset as shipped every difference of one key or block counts; around other settings only what lacks a
    block of theirs. The base is the one with the most around it, and among equals the preset as shipped.
    """
    families: dict[tuple[object, ...], list[Setting]] = {}
    for setting in settings:
        values = flat(setting.config)
        how = tuple(values.get(key) for key in sorted(HOW - {"seed"}))
        families.setdefault((setting.preset, *how), []).append(setting)
    known, ablations = blocks(), []
    for family in families.values():
        for part in by_images(family).values():
            ablations += _of_family(part, known)
    return ablations


class _OnImages(Protocol):
    @property
    def images(self) -> str | None: ...


_Some = TypeVar("_Some", bound=_OnImages)


def by_images(family: Sequence[_Some]) -> dict[str | None, list[_Some]]:
    """Runs or settings by the digest of their images; older ones, which do not tell, are with the first that do."""
    first = next((one.images for one in family if one.images is not None), None)
    parts: dict[str | None, list[_Some]] = {}
    for one in family:
        parts.setdefault(one.images or first, []).append(one)
    return parts


def _of_family(family: Sequence[Setting], known: Sequence[Block]) -> list[Ablation]:
    values = [flat(setting.config) for setting in family]
    ours = shipped(family[0].preset)

    def is_shipped(number: int) -> bool:
        if ours is None:
            return False
        return not departures(family[number].config, ours).keys() - HOW

    around: list[list[tuple[int, Block, bool]]] = []
    for number, base in enumerate(values):
        apart = [(other, _apart(base, values[other], known)) for other in range(len(family)) if other != number]
        near = [(other, *found) for other, found in apart if found is not None]
        if not is_shipped(number):
            near = [one for one in near if one[2]]
        around.append(near)

    def rank(number: int) -> tuple[int, bool, int]:
        return len(around[number]), is_shipped(number), len(family[number].top1)

    found = []
    told: set[int] = set()
    for number in sorted(range(len(family)), key=rank, reverse=True):
        others = [one for one in around[number] if one[0] not in told]
        if others:
            told |= {number, *(other for other, *_ in others)}  # a pair is not told from both sides
            found.append(
                compare(
                    family[number],
                    [(block.name, lacks and block.leaves_nothing, family[other]) for other, block, lacks in others],
                )
            )
    return found


def _parted(base: Mapping[str, object], other: Mapping[str, object]) -> set[str]:
    """The keys in which two settings do something else."""
    differ = {key for key in base if base[key] != other[key] and key not in HOW}
    return {key for key in differ if not (idle(key, base) and idle(key, other))}


def _apart(
    base: Mapping[str, object], other: Mapping[str, object], known: Sequence[Block]
) -> tuple[Block, bool] | None:
    """The one block that two settings differ in, a key at least, and whether the other does without it; else None."""
    keys = _parted(base, other)
    if not keys:
        return None
    for block in known:
        if keys <= block.values.keys():
            if block.is_off(other):
                return block, True
            if block.is_off(base):
                return block, False
    if len(keys) > 1:
        return None
    (key,) = keys
    return Block(key, {key: base[key]}), False

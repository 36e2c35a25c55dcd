"""How a preset, its file and the user's overrides become one `Config`.

Whatever is wrong raises `UsageError` with the key, the value, what is allowed and the nearest name. No torch here: this
runs before anything else.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from cifar100cli import backbones, safe_yaml
from cifar100cli.bounded import kind_of, printable, read_file
from cifar100cli.errors import UsageError, did_you_mean
from cifar100cli.folders import expand
from cifar100cli.schema import DESCRIBING, TUNING, Config, Section

DEFAULT_PRESET = "quickstart"
TEACHER = "distillation.teacher"
LARGEST_PRESET = 64 * 1024  # bytes; ours are under two thousand


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


def parse_value(text: str, key: str) -> object:
    """The value of `--set KEY=VALUE`, read as a preset's YAML would be."""
    return safe_yaml.parse(text, f"--set {key}")


# ------------------------------------------------------------------------------------- finding presets


def presets_folder() -> Path:
    """The folder of the shipped presets: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "presets"
    return inside if inside.is_dir() else package.parent / "presets"


def preset_names() -> list[str]:
    """The names of the shipped presets, in alphabetical order."""
    return sorted(path.stem for path in presets_folder().glob("*.yaml"))


def _read_preset(name: str) -> tuple[str, dict[str, object]]:
    """The preset's short name and its keys as they stand in the file."""
    shipped = presets_folder() / f"{name}.yaml"
    if name in preset_names():
        path = shipped
    elif name.lower().endswith((".yaml", ".yml")) or "/" in name or "\\" in name:
        path = expand(Path(name), f"--preset {name}")
        if path.stem.startswith(".") or printable(path.stem) != path.stem:  # it becomes the name of a folder
            raise UsageError(f"--preset {name}: give the file another name: this one cannot name a run")
        kind = kind_of(path, f"--preset {name}: cannot be read", UsageError)
        if kind is None:
            raise UsageError(f"--preset {name}: there is no such file; `cifar100 presets` lists the presets by name")
        if kind != "file":
            raise UsageError(
                f"--preset {name}: is {'a folder' if kind == 'folder' else 'not a plain file'}; name a file"
            )
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
    keys = safe_yaml.parse(text, f"--preset {name}", safe_yaml.QuickLoader if path == shipped else safe_yaml.Loader)
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
    original, keys = keys, {key: dict(value) if isinstance(value, dict) else value for key, value in keys.items()}
    for override in overrides:
        _apply(keys, override)
        origins[override.key] = override.origin
    config = _validate(keys, name, origins)
    if "model.backbone" in origins or name not in preset_names():
        backbones.check(config.model.backbone, origins.get("model.backbone", name))
    if stem not in preset_names():
        own = with_own_figures(config)
        before, now = _set_in(original), _set_in(keys)
        changed = before != now and before != {key: value for key, value in now.items() if key != TEACHER}
        config = without_figures(config) if changed else own
    return Preset(stem, config)


def without_figures(config: Config) -> Config:
    """Settings of which no figure is published or expected."""
    return config.model_copy(update={"published": None, "expected": None})


def with_teacher(config: Config, teacher: str) -> Config:
    """Settings of a distillation, with its teacher at another place."""
    assert config.distillation is not None
    return config.model_copy(update={"distillation": config.distillation.model_copy(update={"teacher": teacher})})


def with_own_figures(config: Config) -> Config:
    """A figure is that of the settings that it was reached with: a shipped preset's goes where others are beside it."""
    if config.published is None and config.expected is None:
        return config
    theirs = [
        ours
        for _, ours in shipped_presets()
        if (config.published and config.published == ours.published)
        or (config.expected and config.expected == ours.expected)
    ]
    if not theirs or not all(departures(config, ours) for ours in theirs):
        return config
    return without_figures(config)


def parse_config(keys: object, where: str) -> Config:
    """Check keys that come from elsewhere than a preset file: a run folder, a checkpoint's metadata."""
    if not isinstance(keys, dict):
        raise UsageError(f"{where}: holds no configuration")
    return _validate(keys, where, {})


def read_config(path: Path) -> Config:
    """The `config.yaml` of a run folder."""
    text = read_file(path, LARGEST_PRESET).decode("utf-8", errors="replace")
    return parse_config(safe_yaml.parse(text, str(path)), str(path))


def differences(config: Config, other: Config) -> dict[str, tuple[object, object]]:
    """The dotted keys at which two configurations differ, with both values; what only describes is left out.

    A section that only one has differs in its first key, and elsewhere where it is not the default.
    """
    ours, theirs = flat(config), flat(other)
    return {key: (ours[key], theirs[key]) for key in ours if ours[key] != theirs[key]}


def departures(config: Config, preset: Config) -> dict[str, tuple[object, object]]:
    """The settings that are not a preset's, with both values. A preset leaves the seed and the teacher to be named."""
    found = differences(config, preset)
    found.pop("seed", None)
    if config.distillation is not None and preset.distillation is not None and preset.distillation.teacher is None:
        found.pop(TEACHER, None)
    return found


def flat(config: Config) -> dict[str, object]:
    """Every setting by its dotted key; what only describes is left out.

    A section that may be missing and is, stands there with its defaults, but for its first key, which is None.
    """
    return {
        key: value for key, value in _leaves(_with_sections(config.model_dump())) if key.split(".")[0] not in DESCRIBING
    }


def idle(key: str, settings: Mapping[str, object]) -> str | None:
    """Why a key does nothing among these settings (`flat`), in words, or None where it does something."""
    if key not in TUNING:
        return None
    other, values = TUNING[key]
    value = settings[other]
    works = value is not None if values is None else value in values
    return None if works else f"{other} is {'null' if value is None else value}"


def _set_in(keys: Mapping[str, object]) -> dict[str, object]:
    """What a preset's keys set, by dotted names, but for the seed and what only describes."""
    return {key: value for key, value in _leaves(keys) if key.split(".")[0] not in {*DESCRIBING, "seed"}}


def optional_sections() -> list[str]:
    """The sections that a configuration may leave out, but for those that only describe."""
    return [name for name in _optional_sections() if name not in DESCRIBING]


def _with_sections(keys: dict[str, Any]) -> dict[str, Any]:
    """Optional sections that are not there as their defaults, without the first key."""
    for name, field in Config.model_fields.items():
        section = _section_of(field.annotation)
        if section is not None and keys[name] is None and name not in DESCRIBING:
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
    """Set one dotted key. Keys that do not exist are refused here, where their origin is known.

    A section that a preset need not have is dropped by null.
    """
    if override.value is None and override.key in _optional_sections():
        keys[override.key] = None
        return
    if _field(override.key) is None:
        raise UsageError(f"unknown key {override.key!r} in {override.origin}{_nearest_key(override.key)}")
    *sections, last = override.key.split(".")
    for section in sections:
        if keys.get(section) is None:
            keys[section] = {}
        keys = keys[section]
        if not isinstance(keys, dict):
            return  # no section: refused when all is checked
    keys[last] = override.value


def _section_of(annotation: object) -> type[Section] | None:
    """The section that a field holds, `X | None` included."""
    candidates = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)


def _optional_sections() -> list[str]:
    fields = Config.model_fields.items()
    return [name for name, field in fields if field.default is None and _section_of(field.annotation) is not None]


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


def keys() -> list[str]:
    """Every key that `--set` takes; what only describes is left out."""
    return [key for key, _ in _fields() if key.split(".")[0] not in DESCRIBING]


@dataclass(frozen=True)
class Key:
    """A key of a preset, for people: what it is unless a preset says otherwise, what it may be, and what it is for."""

    key: str
    default: object
    allowed: str
    description: str


def described_keys() -> list[Key]:
    """Every key that `--set` takes, with what the schema says of it."""
    return [
        Key(key, field.default, _allowed(field.annotation, field.metadata), field.description or "")
        for key, field in _fields()
        if key.split(".")[0] not in DESCRIBING
    ]


def choices(key: str) -> tuple[str, ...]:
    """The words that a key may be, where it is one of a few."""
    field = _field(key)
    assert field is not None
    assert get_origin(field.annotation) is Literal
    return get_args(field.annotation)


OTHER_NAMES = {  # of keys, in other tools
    "arch": "model.backbone",
    "dropout": "model.drop_rate",
    "learning_rate": "optimizer.lr",
    "smoothing": "loss.label_smoothing",
    "wd": "optimizer.weight_decay",
}


def _nearest_key(key: str) -> str:
    known = [name for name, _ in _fields()]
    sections = [name for name, field in Config.model_fields.items() if _section_of(field.annotation)]
    if key in sections:
        inside = [name for name in known if name.startswith(f"{key}.")]
        drop = ", and null drops it" if key in _optional_sections() else ""
        return f": it is a section; its keys are {', '.join(inside)}{drop}"
    leaves: dict[str, str] = {}
    for name in known:
        leaves.setdefault(name.split(".")[-1], name)
    key = key.lower()
    leaf = key.split(".")[-1]
    if leaf in OTHER_NAMES:
        return f"; did you mean {OTHER_NAMES[leaf]}?"
    # A slip of the finger in the whole name, then the right name without its section, then a far guess.
    guesses = (
        difflib.get_close_matches(key, sections + known, n=1, cutoff=0.8)
        or [leaves[near] for near in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.6)]
        or difflib.get_close_matches(key, sections + known, n=1, cutoff=0.5)
    )
    return f"; did you mean {guesses[0]}?" if guesses else "; `cifar100 presets --keys` lists all keys"


def _show(value: object) -> str:
    if value is None:
        return "null"
    text = str(value).lower() if isinstance(value, bool) else value if isinstance(value, str) and value else repr(value)
    text = printable(text)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _allowed(annotation: object, metadata: Iterable[object]) -> str:
    """What a field takes, in words: from its annotation and its bounds."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"a list{_at_most(metadata, '')}, as in [60, 120, 160], each {_allowed(arguments[0], ())}"
    if origin is tuple:
        several = "two numbers, as in [0.9, 0.999]" if len(arguments) == 2 else "three numbers, as in [0.5, 0.5, 0.5]"
        _, _, bounds = _allowed(arguments[0], ()).partition(", ")
        return f"{several}, each {bounds}" if bounds else several
    if origin in (Union, UnionType):
        return _allowed(next(a for a in arguments if a is not type(None)), metadata)
    if origin is Annotated:
        inner = [one for bound in arguments[1:] for one in getattr(bound, "metadata", [bound])]
        return _allowed(arguments[0], [*inner, *metadata])
    if annotation is bool:
        return "true or false"
    if annotation is str:
        return f"text{_at_most(metadata, ' characters')}"
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


def _at_most(metadata: Iterable[object], unit: str) -> str:
    longest = [bound.max_length for bound in metadata if isinstance(bound, annotated_types.MaxLen)]
    return f" of at most {longest[0]:,}{unit}" if longest else ""


def _validate(keys: dict[str, Any], where: str, origins: Mapping[str, str]) -> Config:
    try:
        return Config.model_validate(keys)
    except ValidationError as error:
        raise UsageError(_explain(error, where, origins)) from None


def _explain(error: ValidationError, where: str, origins: Mapping[str, str]) -> str:
    """The first thing wrong, in one line: key, value, origin, what is allowed, the nearest name."""
    first, more = error.errors()[0], error.error_count() - 1
    if not first["loc"]:  # a rule between keys, which says it all itself, or a key that is no text
        message = str(first.get("ctx", {}).get("error", "one of its keys is not text"))
        flags = [origin for key, origin in origins.items() if re.search(rf"\b{re.escape(key)}\b", message)]
        return f"{', '.join(dict.fromkeys(flags)) or where}: {message}"
    *parents, last = [str(part) for part in first["loc"]]
    key = ".".join([*parents, last])
    rest = f" ({more} more {'mistake' if more == 1 else 'mistakes'})" if more else ""
    if first["type"] in ("extra_forbidden", "invalid_key"):
        if _field(key) is not None:  # as --set has it
            section, _, leaf = key.rpartition(".")
            return f"unknown key {_show(key)!r} in {where}: in a file, write {section}: {{{leaf}: ...}}{rest}"
        return f"unknown key {_show(key)!r} in {where}{_nearest_key(key)}{rest}"
    while (field := _section_or_field(key)) is None:  # inside a list: name the list
        key = key.rpartition(".")[0]
    origin = origins.get(key, where)
    if first["type"] == "missing" and key == ".".join([*parents, last]):
        return f"{key} is missing in {origin}: {_allowed(field.annotation, field.metadata)}{rest}"
    value = first["input"]
    reason = first.get("ctx", {}).get("error")
    if isinstance(reason, UsageError):  # which says it all
        return f"{key} = {_show(value)} ({origin}): {reason}{rest}"
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

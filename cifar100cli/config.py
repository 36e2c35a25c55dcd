"""How a preset, its file and the user's overrides become one `Config`.

Whatever is wrong raises `UsageError` with the key, the value, what is allowed and the nearest name. No torch here: this
runs before anything else.
"""

import codecs
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cifar100cli import backbones, safe_yaml
from cifar100cli.bounded import kind_of, not_text, printable, read_file
from cifar100cli.errors import UsageError, did_you_mean
from cifar100cli.folders import expand
from cifar100cli.keys import explain, field_of, nearest_key, optional_sections, section_of
from cifar100cli.schema import DESCRIBING, TUNING, Config

DEFAULT_PRESET = "quickstart"
TEACHER = "distillation.teacher"
WEIGHTS = "model.weights"
STEPS = "train.compile"
TO_BE_NAMED = "one to be named"  # in place of the teacher that a preset leaves to the user
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
        # It becomes the name of a folder, in which a model is kept.
        if path.stem.startswith(".") or printable(path.stem) != path.stem or not_text(Path(path.stem)):
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
        in_16_bits = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # as PowerShell's `>` writes it
        text = content.decode("utf-16" if in_16_bits else "utf-8")
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
        if stem in preset_names():
            _refuse_other_figures(stem, override)
        _apply(keys, override)
        origins[override.key] = override.origin
    config = _validate(keys, name, origins)
    if "model.backbone" in origins or name not in preset_names():
        backbones.check(config.model.backbone, origins.get("model.backbone", name))
    if stem not in preset_names():
        own = with_own_figures(config)
        before, now = _set_in(original), _set_in(keys)
        left_to_name = {TEACHER} if isinstance(original.get("distillation"), dict) else set()
        changed = before != now and before != {key: value for key, value in now.items() if key not in left_to_name}
        config = without_figures(config) if changed else own
    return Preset(stem, config)


def without_figures(config: Config) -> Config:
    """Settings of which no figure is published or expected."""
    return config.model_copy(update={"published": None, "expected": None})


def having(config: Config, key: str, value: object) -> Config:
    """The settings with another value, unchecked, of one key: `seed`, or `section.key`."""
    section, _, name = key.rpartition(".")
    if not section:
        return config.model_copy(update={name: value})
    return config.model_copy(update={section: getattr(config, section).model_copy(update={name: value})})


def with_own_figures(config: Config) -> Config:
    """A figure is that of the settings that it was reached with: a shipped preset's goes where others are beside it.

    What is published and what is expected are judged apart: one may be the user's own.
    """
    figures = {name: getattr(config, name) for name in ("published", "expected") if getattr(config, name) is not None}
    presets = [preset for _, preset in shipped_presets()] if figures else []
    for name, figure in figures.items():
        theirs = [preset for preset in presets if getattr(preset, name) == figure]
        if theirs and all(departures(config, preset) for preset in theirs):
            config = having(config, name, None)
    return config


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

    A section that only one has differs in its first key alone.
    """
    ours, theirs = flat(config), flat(other)
    alone = {name for name in optional_sections() if (getattr(config, name) is None) != (getattr(other, name) is None)}
    return {
        key: (ours[key], theirs[key])
        for key in ours
        if ours[key] != theirs[key] and not (key.partition(".")[0] in alone and None not in (ours[key], theirs[key]))
    }


def effective_differences(config: Config, other: Config) -> dict[str, tuple[object, object]]:
    """The `differences` but for what does nothing in `config`: with none, both train alike."""
    settings = flat(config)
    return {key: values for key, values in differences(config, other).items() if not idle(key, settings)}


def departures(config: Config, preset: Config) -> dict[str, tuple[object, object]]:
    """The settings that are not a preset's, and do something, with both values.

    A preset leaves the seed and the teacher to be named.
    """
    found = effective_differences(config, preset)
    found.pop("seed", None)
    if config.distillation is not None and preset.distillation is not None and preset.distillation.teacher is None:
        found.pop(TEACHER, None)
    return found


def flat(config: Config) -> dict[str, object]:
    """Every setting by its dotted key; what only describes is left out.

    A section that may be missing and is, stands there with its defaults, but for its first key, which is None.
    """
    found = {
        key: value for key, value in _leaves(_with_sections(config.model_dump())) if key.split(".")[0] not in DESCRIBING
    }
    if config.distillation is not None and config.distillation.teacher is None:
        found[TEACHER] = TO_BE_NAMED
    return found


def effective(config: Config) -> dict[str, object]:
    """The settings (`flat`) that do something: runs that share them have trained alike."""
    settings = flat(config)
    return {key: value for key, value in settings.items() if not idle(key, settings)}


def idle(key: str, settings: Mapping[str, object]) -> str | None:
    """Why a key does nothing among these settings (`flat`), in words, or None where it does something."""
    for other, values in TUNING.get(key, ()):
        value = settings[other]
        works = value is not None if values is None else value in values
        # What does nothing itself rules nothing out: adamw has betas, whatever muon's auxiliary optimizer would be.
        if not works and idle(other, settings) is None:
            return f"{other} is {'null' if value is None else value}"
    return None


def _set_in(keys: Mapping[str, object]) -> dict[str, object]:
    """What a preset's keys set, by dotted names, but for the seed and what only describes."""
    return {key: value for key, value in _leaves(keys) if key.split(".")[0] not in {*DESCRIBING, "seed"}}


def _with_sections(keys: dict[str, Any]) -> dict[str, Any]:
    """Optional sections that are not there as their defaults, without the first key."""
    for name, field in Config.model_fields.items():
        section = section_of(field.annotation)
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
    if override.value is None and override.key in optional_sections(describing=True):
        keys[override.key] = None
        return
    if field_of(override.key) is None:
        raise UsageError(f"unknown key {override.key!r} in {override.origin}{nearest_key(override.key)}")
    *sections, last = override.key.split(".")
    for section in sections:
        if keys.get(section) is None:
            keys[section] = {}
        keys = keys[section]
        if not isinstance(keys, dict):
            return  # no section: refused when all is checked
    keys[last] = override.value


def _refuse_other_figures(preset: str, override: Override) -> None:
    """Raise `UsageError` for a figure in the place of that of a preset of ours; null, which drops it, is none."""
    section, _, figure = override.key.partition(".")
    if figure and section in DESCRIBING:
        raise UsageError(
            f"{override.origin}: what is {section} of {preset} is not a run's to say; leave it out, or say it in a "
            "preset file of your own, under another name"
        )


def _validate(keys: dict[str, Any], where: str, origins: Mapping[str, str]) -> Config:
    try:
        return Config.model_validate(keys)
    except ValidationError as error:
        raise UsageError(explain(error, where, origins)) from None

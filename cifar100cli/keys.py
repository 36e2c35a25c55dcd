"""The keys of a preset, by dotted names: what each may be, in words, and what is wrong with one that is not right."""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from cifar100cli.bounded import printable
from cifar100cli.errors import UsageError, did_you_mean
from cifar100cli.schema import DESCRIBING, Config, Section


def section_of(annotation: object) -> type[Section] | None:
    """The section that a field holds, `X | None` included."""
    candidates = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)


def optional_sections(*, describing: bool = False) -> list[str]:
    """The sections that a configuration may leave out; those that only describe are left out if not `describing`."""
    return [
        name
        for name, field in Config.model_fields.items()
        if field.default is None and section_of(field.annotation) and (describing or name not in DESCRIBING)
    ]


def _fields(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key of the schema by its dotted name, sections left out."""
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        if inner is None:
            yield f"{prefix}{name}", field
        else:
            yield from _fields(inner, f"{prefix}{name}.")


def field_of(key: str) -> FieldInfo | None:
    """What the schema says of a key, or None where it has none of this name."""
    return dict(_fields()).get(key)


def settable() -> list[str]:
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
    field = field_of(key)
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


def nearest_key(key: str) -> str:
    """The end of a sentence about a key that does not exist."""
    known = [name for name, _ in _fields()]
    sections = [name for name, field in Config.model_fields.items() if section_of(field.annotation)]
    if key in sections:
        inside = [name for name in known if name.startswith(f"{key}.")]
        drop = ", and null drops it" if key in optional_sections(describing=True) else ""
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


def explain(error: ValidationError, where: str, origins: Mapping[str, str]) -> str:
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
        if field_of(key) is not None:  # as --set has it
            section, _, leaf = key.rpartition(".")
            return f"unknown key {_show(key)!r} in {where}: in a file, write {section}: {{{leaf}: ...}}{rest}"
        return f"unknown key {_show(key)!r} in {where}{nearest_key(key)}{rest}"
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
        section = section_of(field.annotation) if field else None
    return field

"""YAML that nobody vouches for: PyYAML's safe loader with YAML 1.2's idea of a scalar.

`1e-3` is a number, and `off` is text. Aliases and repeated keys are refused.
"""

import re
from typing import Any

import yaml

from cifar100cli.bounded import one_line, printable
from cifar100cli.errors import UsageError


class Loader(yaml.SafeLoader):
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


class QuickLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
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
    for _class in (Loader, QuickLoader, _Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}",
            re.compile(rf"^(?:{_pattern})$"),
            [*_first, ""] if _tag == "null" else [*_first],
        )
for _loader in (Loader, QuickLoader):  # PyYAML would read `010` as eight and stumble over `1e5`
    _loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
    _loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: float(node.value))


def parse(text: str, where: str, loader: Any = Loader) -> object:
    """What a YAML text holds. Raises `UsageError` that begins with `where` for one that is not valid."""
    try:
        return yaml.load(text, loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise UsageError(f"{where}: not valid YAML: {one_line(error.problem or error.context, 150)}{line}") from None
    except (yaml.YAMLError, ValueError, OverflowError, LookupError, AttributeError, TypeError) as error:
        # PyYAML's own readers of tagged values (`!!timestamp x`, `!!bool x`) have errors of every kind.
        raise UsageError(f"{where}: not valid YAML: {one_line(error, 150)}") from None
    except RecursionError:
        raise UsageError(f"{where}: not a preset: nested too deeply") from None


def dump(keys: object, *, ascii_only: bool = False) -> str:
    """YAML that `parse` reads back to the same, also from a terminal, which shows no character that could steer it."""

    def written(*, allow_unicode: bool) -> str:
        return yaml.dump(keys, Dumper=_Dumper, sort_keys=False, allow_unicode=allow_unicode, width=110)

    text = written(allow_unicode=True)
    harmless = all(printable(line) == line for line in text.split("\n"))
    return text if harmless and not ascii_only else written(allow_unicode=False)

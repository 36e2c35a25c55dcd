"""The names of networks, read from where they are written down: importing timm, and torch with it, takes seconds."""

import difflib
import functools
import importlib.util
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from cifar100cli.errors import UsageError


@functools.cache
def _sources() -> str:
    """The text of timm's models and of ours."""
    timm = importlib.util.find_spec("timm")
    assert timm is not None
    folders = [Path(place) / "models" for place in timm.submodule_search_locations or ()]
    files = [Path(__file__).with_name("networks.py"), *(path for folder in folders for path in folder.glob("*.py"))]
    return "\n".join(path.read_text(encoding="utf-8") for path in files)


def names() -> list[str]:
    """Every network of timm's and ours that a preset may name, in alphabetical order."""
    return sorted(re.findall(r"^@register_model\ndef (\w+)\(", _sources(), re.MULTILINE))


def present_name(name: str) -> str:
    """What timm calls a network now that its earlier versions called `name`; other names are as they are."""
    from timm.models import get_deprecated_models

    return get_deprecated_models().get(name) or name


def unknown(name: str, known: Iterable[str], origin: str = "") -> UsageError:
    """What is to be told of a backbone that there is not, with the nearest names of those that there are."""
    near = difflib.get_close_matches(name.lower(), list(known), n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else "; timm.list_models() lists what there is"
    place = f" ({origin})" if origin else ""
    return UsageError(f"model.backbone = {name}{place}: timm has no such model{hint}")


def check(name: str, origin: str) -> None:
    """Raise `UsageError` for a backbone that cannot be one, because its name stands nowhere in timm's models or ours.

    What passes is asked of timm itself when it is built; so is everything where timm is loaded already, and may know
    networks of the caller's own, or where its sources are not there to be read.
    """
    if "timm" in sys.modules or "def resnet18(" not in _sources():
        return
    architecture = name.partition(".")[0]  # behind the first full stop is the name of weights
    places = (f"def {architecture}(", f"'{architecture}'", f'"{architecture}"')  # a function's name, or an earlier one
    if not any(place in _sources() for place in places):
        raise unknown(name, names(), origin)

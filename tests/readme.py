"""The README and its translation, taken apart. `python -m tests.readme` writes their `--help` texts anew.

Such a text is a block of the kind ```text whose first line is `$ cifar100 ... --help`; what follows is what the command
prints where a terminal has 80 columns.
"""

import contextlib
import io
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import typer

from cifar100cli import cli

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
TRANSLATION = ROOT / "README.ja.md"
RECORDS = [ROOT / "presets" / "MEASURED.md", ROOT / "cifar100cli" / "SPEED.md", ROOT / "tests" / "RELIABILITY.md"]
DOCUMENTS = [path for path in (README, TRANSLATION, *RECORDS) if path.is_file()]

GPU = "# needs a GPU"  # at the end of a line: it is read by the tests, and not run
_UV = (".uv/bin/uv", "run")
_ENDS = ("&&", "||", "|", ";")
_HELP = re.compile(r"(^```text\n\$ cifar100 ([^\n]*--help)\n)(.*?)(?=^```$)", flags=re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Command:
    """A command of a bash block, as a shell would part it; `.uv/bin/uv run` in front of it is left out."""

    words: tuple[str, ...]
    variables: Mapping[str, str] = field(default_factory=dict)
    output: str | None = None  # the file that it is sent to
    needs_gpu: bool = False

    def __str__(self) -> str:
        return " ".join(self.words)


def blocks(text: str, kind: str) -> list[str]:
    """The fenced blocks of a kind."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def prose(text: str) -> str:
    """What is in no fenced block."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def spans(text: str) -> list[str]:
    """What stands in backticks, blocks left out."""
    return re.findall(r"`([^`\n]+)`", prose(text))


def commands(block: str) -> Iterator[Command]:
    """The commands of a bash block, in their order."""
    for line in block.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in (*lexer, ";"):
            if word not in _ENDS:
                words.append(word)
            elif words:
                yield _command(words, line.rstrip().endswith(GPU))
                words = []


def _command(words: list[str], needs_gpu: bool) -> Command:
    variables, output = {}, None
    while words and re.match(r"[A-Z_0-9]+=", words[0]):
        name, _, value = words.pop(0).partition("=")
        variables[name] = value
    if ">" in words:
        output = words[words.index(">") + 1]
        words = words[: words.index(">")]
    if tuple(words[:2]) == _UV:
        words = words[2:]
    if words[:3] == ["python", "-m", "cifar100cli"]:
        words = ["cifar100", *words[3:]]
    return Command(tuple(words), variables, output, needs_gpu)


def anchors(text: str) -> set[str]:
    """What `#...` may name: headings, as GitHub writes them in addresses, and explicit marks."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#{1,6} +(.*?)[ #]*$", prose(text), flags=re.MULTILINE):
        shown = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        number = found[slug] = found.get(slug, -1) + 1
        if number:
            found[f"{slug}-{number}"] = 0
    return {*found, *re.findall(r"<a (?:id|name)=\"([^\"]+)\"", text)}


def links(text: str) -> list[str]:
    """The targets of links and pictures."""
    text = re.sub(r"`[^`\n]*`", "", prose(text))
    patterns = (r"\]\(([^()\s]+)", r"^\[[^\]]+\]: +(\S+)", r"(?:href|src|srcset)=\"([^\"\s]+)")
    return [target for pattern in patterns for target in re.findall(pattern, text, flags=re.MULTILINE)]


def figures(text: str) -> list[tuple[str, list[list[str]]]]:
    """Of every row of a table that begins with a name in backticks: the name, and the numbers of some columns.

    These are the columns that stand on the right (`---:`).
    """
    found, right = [], [False]
    for line in prose(text).splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if re.fullmatch(r"\|[-:| ]+\|", line):
            right = [cell.endswith(":") for cell in cells]
        name = re.match(r"\| `([^`]+)` \|", line)
        if name:
            numbers = [
                re.findall(r"\d+(?:[.,]\d+)*", cell) for cell, wanted in zip(cells, right, strict=True) if wanted
            ]
            found.append((name[1], numbers))
    return found


# -------------------------------------------------------------------------------------- what the commands take

APP: Any = typer.main.get_command(cli.app)


def flags(command: Any) -> set[str]:
    """The flags of one of our commands, or of `cifar100` itself."""
    own = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    return {flag for flag in own if flag.startswith("-")} | {"--help", "-h"}


def help_text(arguments: str) -> str:
    """What `cifar100 ARGUMENTS` prints where a terminal has 80 columns."""
    printed = io.StringIO()
    with patch.dict(os.environ, COLUMNS="80"), contextlib.redirect_stdout(printed):
        cli.app(shlex.split(arguments), prog_name="cifar100", standalone_mode=False)
    return printed.getvalue()


def with_help(text: str) -> str:
    """The document with its `--help` texts as they are now."""
    return _HELP.sub(lambda match: f"{match[1]}{help_text(match[2]).rstrip()}\n", text)


if __name__ == "__main__":
    for path in DOCUMENTS:
        path.write_text(with_help(path.read_text(encoding="utf-8")), encoding="utf-8")

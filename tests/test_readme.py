"""What the README says exists: commands, flags, presets, files."""

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from cifar100cli import runs
from cifar100cli.config import load_preset, preset_names
from tests.conftest import Cli

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.startswith("cifar100 ")]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_and_flags_exist(run_cli: Cli, command: str) -> None:
    _, name, *arguments = shlex.split(command)
    shown = run_cli(name, "--help")
    assert shown.code == 0
    for argument in arguments:
        if argument.startswith("--"):
            assert re.search(rf"{argument}\b", shown.out), argument
    if "--preset" in arguments:
        load_preset(arguments[arguments.index("--preset") + 1])


@pytest.mark.usefixtures("small_synthetic")
@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_for_python_run(example: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As they stand, in a folder with a picture."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (300, 200), "orange").save("photo.jpg")
    exec(example, {})  # noqa: S102 - our own


def test_the_table_of_presets_is_complete_and_right() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| ([\d.]+%|-) \| ([^|]+) \|", README, flags=re.MULTILINE)
    assert sorted(name for name, *_ in rows) == preset_names()
    for name, figure, hoped in rows:
        published, expected = load_preset(name).config.published, load_preset(name).config.expected
        assert figure == (f"{published.top1:.2%}" if published else "-")
        if expected is None:
            assert hoped == "-"
        elif expected.runs:
            spread = f" ±{100 * expected.deviation:.2f}" if expected.deviation is not None else ""
            assert hoped == f"{expected.top1:.2%}{spread}, n = {expected.runs}"
        else:
            assert hoped == f"{expected.top1:.1%}, not run"


def test_files_are_named_as_they_are() -> None:
    for name in runs.FILES:
        assert f"| `{name}` |" in README


def test_both_commands_come_first_and_are_one_line_each() -> None:
    assert [block.count("\n") for block in BLOCKS[:2]] == [1, 1]
    assert "cifar100 train" in BLOCKS[0]
    assert "pytest" in BLOCKS[1]

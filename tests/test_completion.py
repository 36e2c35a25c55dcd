"""What Tab gives: through Typer's protocol for every shell, and in the shells that are here."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cifar100cli import completion
from cifar100cli.catalog import FOLDERS
from cifar100cli.config import load_preset, preset_names
from cifar100cli.runs import CONFIG, MODEL, RESULT
from tests.conftest import Cli

HERE = Path(sys.executable).parent  # where the installed command is


@pytest.fixture
def complete(run_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> "Complete":
    return Complete(run_cli, monkeypatch)


class Complete:
    """What bash would offer for the last word of a line."""

    def __init__(self, run_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
        self._run_cli, self._monkeypatch = run_cli, monkeypatch

    def __call__(self, line: str) -> list[str]:
        before, _, last = line.rpartition(" ")
        words = [*before.split(), last]
        self._monkeypatch.setenv("_CIFAR100_COMPLETE", "complete_bash")
        self._monkeypatch.setenv("COMP_WORDS", "\n".join(words))
        self._monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
        outcome = self._run_cli()
        assert outcome.code == 0
        assert outcome.err == ""
        return outcome.out.split()


def make_run(path: Path, *files: str) -> None:
    path.mkdir(parents=True)
    for name in files:
        (path / name).touch()


def test_commands_options_and_presets(complete: Complete) -> None:
    assert complete("cifar100 ev") == ["evaluate"]
    assert complete("cifar100 train --pre") == ["--preset", "--pretrained"]
    assert complete("cifar100 train --preset ") == preset_names()
    for command in ("train --preset", "bench --steps 3 --preset", "presets"):
        assert complete(f"cifar100 {command} resnet18-wd") == ["resnet18-wd01"]
    assert complete("cifar100 train --preset ./mine") == []  # which leaves files to the shell


@pytest.mark.parametrize(
    ("option", "key"),
    [
        ("--dataset", "data.dataset"),
        ("--augment", "augment.policy"),
        ("--loss", "loss.name"),
        ("--optimizer", "optimizer.name"),
        ("--bn", "finetune.bn"),
    ],
)
def test_words_that_a_key_may_be(complete: Complete, option: str, key: str) -> None:
    """Each that is offered is one that the schema takes."""
    command = "finetune-cifar10" if option == "--bn" else "train"
    offered = complete(f"cifar100 {command} {option} ")
    assert len(offered) > 1
    section, name = key.split(".")
    for word in offered:
        preset = load_preset("finetune-layer4" if section == "finetune" else "quickstart")
        part = getattr(preset.config, section)
        assert getattr(type(part).model_validate({**part.model_dump(), name: word}), name) == word


def test_other_words(complete: Complete) -> None:
    assert complete("cifar100 evaluate --split ") == ["test", "val", "train"]
    assert complete("cifar100 evaluate --device c") == ["cpu", "cuda"]
    assert complete("cifar100 train --log w") == ["wandb"]
    assert complete("cifar100 finetune-cifar10 --unfreeze lay") == ["layer4", "layer3"]
    assert complete("cifar100 download --dataset ") == list(FOLDERS)
    assert complete("cifar100 train --set optimizer.l") == ["optimizer.lr=", "optimizer.layer_decay="]
    assert complete("cifar100 train --set descr") == []


def test_runs(complete: Complete, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The latest first; to be used those with a model, to be resumed those without a result."""
    old, new, begun = "a/20260101-000000-seed0", "b/20260303-000000-seed0", "a/20260202-000000-seed0"
    for root in ("runs", "elsewhere"):
        make_run(tmp_path / root / old, CONFIG, MODEL, RESULT)
        make_run(tmp_path / root / new, CONFIG, MODEL)
        make_run(tmp_path / root / begun, CONFIG)
    for command in ("evaluate", "predict", "export", "distill --teacher", f"evaluate runs/{old}"):
        assert complete(f"cifar100 {command} ") == [f"runs/{new}", f"runs/{old}"]
    assert complete("cifar100 evaluate runs/a") == [f"runs/{old}"]
    assert complete("cifar100 finetune-cifar10 --init ") == ["imagenet", "none", f"runs/{new}", f"runs/{old}"]
    assert complete("cifar100 train --resume ") == ["last", f"runs/{new}", f"runs/{begun}"]
    monkeypatch.setenv("CIFAR100_RUNS_DIR", "elsewhere")
    assert complete("cifar100 export ") == [f"elsewhere/{new}", f"elsewhere/{old}"]
    monkeypatch.setenv("CIFAR100_RUNS_DIR", "nowhere")
    assert complete("cifar100 export ") == []
    assert completion.unfinished() == ["last"]


def test_a_run_whose_name_means_something_to_a_shell(complete: Complete, tmp_path: Path) -> None:
    """Typer's script for zsh evaluates what it is offered, and bash puts it on the line unquoted."""
    harmless = "größer-ผู้ใช้_1"  # letters of some scripts have marks, which `\w` does not know
    for name in ("a\\$(b)", "$(b)", "`b`", "a;b", "a b", "a'b", 'a"b', "a\u3000b", harmless):
        make_run(tmp_path / "runs" / "a" / name, CONFIG, MODEL)
    assert complete("cifar100 evaluate ") == [f"runs/a/{harmless}"]
    assert complete("cifar100 train --resume ") == ["last", f"runs/a/{harmless}"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_are_answered_in_their_words(shell: str, run_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_CIFAR100_COMPLETE", f"complete_{shell}")
    monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", "cifar100 train --preset quick")
    expected = {"zsh": "_arguments '*: :((\"quickstart\"))'", "fish": "quickstart"}
    assert run_cli().out.strip() == expected[shell]


def test_completing_imports_no_torch(tmp_path: Path) -> None:
    script = """
import os, sys
from cifar100cli import cli
os.environ["_CIFAR100_COMPLETE"] = "complete_bash"
for line in ("train --preset ", "evaluate ", "train --resume ", "train --loss ", "train --set ", "presets ", "tr"):
    words = ["cifar100", *line.split(" ")]
    os.environ["COMP_WORDS"], os.environ["COMP_CWORD"] = chr(10).join(words), str(len(words) - 1)
    try:
        cli.main()
    except SystemExit as leaving:
        assert not leaving.code
    assert not {"torch", "timm", "torchvision", "numpy", "rich"} & set(sys.modules), line
"""
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "quickstart" in finished.stdout


# ------------------------------------------------------------------------------------------------ the shells


def in_shell(home: Path, shell: str, script: str, *flags: str) -> list[str]:
    """The lines that a script prints in a shell whose user's folder is empty but for what is installed."""
    path = shutil.which(shell)
    if path is None or not (HERE / "cifar100").exists():
        pytest.skip(f"no {shell}, or the command is not installed here")
    finished = subprocess.run(
        [path, *flags, "-c", script],
        capture_output=True,
        text=True,
        cwd=home,
        env={"HOME": str(home), "PATH": f"{HERE}:{Path(path).parent}:/usr/bin:/bin"},
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    return finished.stdout.splitlines()


def test_bash(tmp_path: Path) -> None:
    first, second = in_shell(tmp_path, "bash", "cifar100 --install-completion; true")
    assert first.startswith("bash completion installed in")
    assert "restart the terminal" in second
    script = """
source ~/.bashrc
complete -p cifar100
COMP_WORDS=(cifar100 train --preset resnet18-wd); COMP_CWORD=3
_cifar100_completion cifar100
printf '%s\\n' "${COMPREPLY[@]}"
"""
    assert in_shell(tmp_path, "bash", script) == [
        "complete -o default -F _cifar100_completion cifar100",
        "resnet18-wd01",
    ]
    shown = in_shell(tmp_path, "bash", "cifar100 --show-completion; true")
    assert shown == (tmp_path / ".bash_completions" / "cifar100.sh").read_text().splitlines()


def test_zsh(tmp_path: Path) -> None:
    in_shell(tmp_path, "zsh", "cifar100 --install-completion; true", "-f")
    assert "compinit" in (tmp_path / ".zshrc").read_text()
    script = """
compdef() { print -r -- "$@" }
_arguments() { print -r -- "$@" }
source ~/.zfunc/_cifar100
words=(cifar100 train --preset resnet18-wd); CURRENT=4
_cifar100_completion
"""
    assert in_shell(tmp_path, "zsh", script, "-f") == [
        "_cifar100_completion cifar100",
        '*: :(("resnet18-wd01"))',
    ]


def test_fish(tmp_path: Path) -> None:
    in_shell(tmp_path, "fish", "cifar100 --install-completion; true")
    script = "source ~/.config/fish/completions/cifar100.fish; complete -C 'cifar100 train --preset resnet18-wd'"
    assert in_shell(tmp_path, "fish", script) == ["resnet18-wd01"]

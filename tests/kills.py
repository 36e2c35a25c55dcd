"""Kills training again and again, at any moment, and sees that nothing is lost.

    python -m tests.kills --kills 100

Each recipe is run once undisturbed. Then it is begun again, killed with SIGKILL (at a random time, or just before a
random one of the operations on the run's files), gone on with by `--resume last`, perhaps killed again, until it
ends. Its weights must be those of the undisturbed run to the bit, and its metrics must have each epoch once.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar100cli import cli, synthetic

SMALL = (
    *("--dataset", "synthetic", "--batch-size", "64", "--device", "cpu", "--epochs", "4"),
    *("--set", "data.normalize=dataset"),
)
RECIPES: dict[str, tuple[str, ...]] = {
    "train, fp32, no augmentation": ("train", "--set", "train.precision=fp32", "--augment", "none"),
    "train, bf16, flip, held-out": ("train", "--set", "train.precision=bf16", "--augment", "flip"),
    "train, fp32, crop_flip, SGD, last": (
        *("train", "--set", "train.precision=fp32", "--augment", "crop_flip", "--optimizer", "sgd"),
        *("--set", "train.select=last", "--set", "schedule.name=constant"),
    ),
    "train, bf16, one_of, best on test": (
        *("train", "--set", "train.precision=bf16", "--augment", "one_of", "--set", "train.select=best_test"),
    ),
    "distill, cached logits": ("distill", "--preset", "quickstart", "--teacher", "TEACHER", "--augment", "flip"),
    "finetune, cached features": ("finetune-cifar10", "--unfreeze", "layer4", "--image-size", "32"),
}


@dataclass
class Tally:
    """What happened."""

    kills: int = 0
    before_files: int = 0
    runs: int = 0

    def __str__(self) -> str:
        return (
            f"{self.kills} kills ({self.before_files} before an operation on files, {self.kills - self.before_files} "
            f"at a random time) of {self.runs} runs: all ended with the bits of the undisturbed run"
        )


def started(arguments: Sequence[str], folder: Path, fatal: int | None = None) -> int:
    """Begin a command in a process of its own, as a fork of this one, which has the libraries loaded already.

    It kills itself before its `fatal`-th operation on files of runs.
    """
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        log = os.open(folder / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(folder)
        for name in ("CIFAR100_DATA_DIR", "CIFAR100_RUNS_DIR"):
            os.environ.pop(name, None)
        os.environ["CIFAR100_CACHE_DIR"] = str(folder.parent / "cache")
        if fatal is not None:
            sys.addaudithook(_killer(folder / "runs", fatal))
        sys.argv = ["cifar100", *arguments]
        cli.main()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _killer(runs: Path, fatal: int) -> Callable[[str, tuple[Any, ...]], None]:
    left = fatal

    def hook(event: str, details: tuple[Any, ...]) -> None:
        nonlocal left
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.chmod") and "runs" in str(details[0]):
            if not str(Path(os.fsdecode(details[0])).absolute()).startswith(str(runs)):
                return
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    return hook


def ended(child: int) -> int:
    """Wait for a process; its exit code, or minus the signal that killed it."""
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def only_run(folder: Path) -> Path:
    """The one run of a folder."""
    (config,) = folder.glob("runs/*/*/config.yaml")
    return config.parent


def disturb(
    recipe: Sequence[str], folder: Path, seconds: float, chance: random.Random, tally: Tally, most: int
) -> None:
    """Run a recipe to its end through `most` kills, or fewer where it ends before."""
    tally.runs += 1
    fresh = True
    for attempt in range(100):
        command = list(recipe) if fresh else ["train", "--resume", "last"]
        fatal = None
        if attempt < most and chance.random() < 0.5:
            fatal = chance.randint(1, 60)
        child = started(command, folder, fatal)
        if fatal is None and attempt < most:
            time.sleep(chance.uniform(0, seconds))
            os.kill(child, signal.SIGKILL)
        code = ended(child)
        if code == 0:
            return
        assert code == -signal.SIGKILL, f"exit code {code}: {(folder / 'log').read_text()[-2000:]}"
        tally.kills += 1
        tally.before_files += fatal is not None
        # Whoever is killed before the run can be gone on with begins anew, as a user would.
        begun = [path for path in folder.glob("runs/*/*") if (path / "config.yaml").exists()]
        fresh = not begun
    raise AssertionError("does not end")


def check(folder: Path, reference: Path) -> None:
    """The end is that of the undisturbed run."""
    run, whole = only_run(folder), only_run(reference)
    for name in ("model.safetensors", "predictions.csv"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), f"{name} differs"
    rows, expected = ([json.loads(line) for line in (path / "metrics.jsonl").open()] for path in (run, whole))
    assert [row["epoch"] for row in rows] == [row["epoch"] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        timed = {"seconds", "images_per_second", "peak_memory_bytes"}
        assert {k: v for k, v in row.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}
    left_over = {path.name for path in run.iterdir()} ^ {path.name for path in whole.iterdir()}
    assert not left_over, f"left over: {left_over}"


def torment(kills: int, most: int, seed: int, root: Path, say: Callable[[str], None]) -> Tally:
    """Kill runs of the recipes in turn, so often in all, and each at most so often."""
    import torch

    from cifar100cli import benchmark, workflows  # noqa: F401 - loaded here, so that no child has to

    torch.set_num_threads(1)  # a fork keeps no other threads
    drawn = synthetic.draw(train_per_class=4, test_per_class=2)
    draw, synthetic.draw = synthetic.draw, lambda *_: drawn
    chance = random.Random(seed)
    tally = Tally()
    references: dict[str, tuple[Path, float]] = {}
    try:
        teacher = root / "teacher"
        teacher.mkdir()
        assert ended(started(["train", *_small("train")], teacher)) == 0, (teacher / "log").read_text()
        commands = {
            name: [str(only_run(teacher)) if word == "TEACHER" else word for word in (*RECIPES[name], *_small(name))]
            for name in RECIPES
        }
        for name, command in commands.items():
            reference = root / f"whole-{len(references)}"
            reference.mkdir()
            ended(started(command, reference))  # which fills the caches
            began = time.monotonic()
            reference = root / f"reference-{len(references)}"
            reference.mkdir()
            assert ended(started(command, reference)) == 0, (reference / "log").read_text()
            references[name] = reference, time.monotonic() - began
        while tally.kills < kills:
            for name, command in commands.items():
                folder = root / f"run-{tally.runs}"
                folder.mkdir()
                before = tally.kills
                disturb(command, folder, references[name][1], chance, tally, most)
                check(folder, references[name][0])
                say(f"{name}: {tally.kills - before} kills, and the same bits")
                if tally.kills >= kills:
                    break
    finally:
        synthetic.draw = draw
    return tally


def _small(name: str) -> tuple[str, ...]:
    """Flags that make a recipe quick."""
    if name.startswith("finetune"):
        return *SMALL, "--backbone", "resnet10t", "--init", "none"
    return *SMALL, "--backbone", "test_resnet", "--no-pretrained"


def main() -> None:
    """Kill as often as is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--most", type=int, default=4, help="kills of one run")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        print(torment(options.kills, options.most, options.seed, Path(root), print))


if __name__ == "__main__":
    main()

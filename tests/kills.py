"""Kills training again and again, at any moment, and sees that nothing is lost.

    python -m tests.kills --kills 100
    python -m tests.kills --kills 100 --signals
    python -m tests.kills --kills 20 --ranks 2

Each recipe is run once undisturbed. Then it is begun again, killed with SIGKILL (at a random time, or just before a
random one of the operations on the run's files), gone on with by `--resume last`, perhaps killed again, until it
ends. Its weights must be those of the undisturbed run to the bit, and its metrics must have each epoch once.

With `--signals` it is stopped by SIGINT, SIGTERM or two SIGINT instead, must say in one line how to go on, and is gone
on with by the words of that line. With `--ranks` torchrun's own agent starts so many processes, and one of them is
killed (or, with `--signals`, the agent is told to stop); then the agent starts them again, or we do.
"""

import argparse
import contextlib
import functools
import json
import os
import random
import re
import shlex
import signal
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar100cli import __main__, synthetic

SMALL = (
    *("--dataset", "synthetic", "--batch-size", "64", "--device", "cpu", "--epochs", "4"),
    *("--image-size", "16", "--set", "data.normalize=dataset"),  # bf16 is slow on CPUs that do not multiply it
)
COSINE = ("--set", "schedule.name=cosine", "--set", "schedule.warmup_epochs=2")
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
    "train, fp32, one_of of albumentations, Adam, cosine and warm-up": (
        *("train", "--set", "train.precision=fp32", "--augment", "one_of", "--set", "augment.backend=albumentations"),
        *("--optimizer", "adam", *COSINE),
    ),
    "train, bf16, crop_flip, ArcFace, cosine and warm-up": (
        *("train", "--set", "train.precision=bf16", "--augment", "crop_flip", "--loss", "arcface"),
        *("--set", "model.head=cosine", *COSINE),
    ),
    "train, fp32, flip, averaged weights": (
        *("train", "--set", "train.precision=fp32", "--augment", "flip", "--set", "train.ema=0.9"),
    ),
    "train, bf16, crop_flip, averaged weights, SGD, cosine": (
        *("train", "--set", "train.precision=bf16", "--augment", "crop_flip", "--set", "train.ema=0.99"),
        *("--optimizer", "sgd", "--lr", "0.05", *COSINE),
    ),
    "distill, cached logits": ("distill", "--preset", "quickstart", "--teacher", "TEACHER", "--augment", "flip"),
    "distill, the teacher in every step, bf16, crop_flip": (
        *("distill", "--preset", "quickstart", "--teacher", "TEACHER", "--augment", "crop_flip"),
        *("--set", "train.precision=bf16"),
    ),
    "finetune, cached features": ("finetune-cifar10", "--unfreeze", "layer4"),
    "finetune, bf16, cached features, cosine": (
        *("finetune-cifar10", "--unfreeze", "layer3", "--set", "train.precision=bf16", *COSINE),
    ),
}
WITH_RANKS = ("train, fp32, no augmentation", "train, fp32, crop_flip, SGD, last")  # of fp32, to the same bits
GO_ON = re.compile(r"resume with: (cifar100 train --resume \S+)$")
STOPS = (signal.SIGINT, signal.SIGTERM)
STOPPED = {128 + signal.SIGINT, 128 + signal.SIGTERM}


@dataclass
class Tally:
    """What happened."""

    kills: int = 0
    before_files: int = 0
    twice: int = 0
    runs: int = 0
    signals: bool = False
    ranks: int = 1

    def __str__(self) -> str:
        if self.signals:
            what, how = "stops", f"{self.twice} by a second signal, {self.kills - self.twice} by the first"
        else:
            what = "kills"
            how = f"{self.before_files} before an operation on files, {self.kills - self.before_files} at a random time"
        of = f" of {self.ranks} ranks" if self.ranks > 1 else ""
        return f"{self.kills} {what} ({how}) of {self.runs} runs{of}: all ended with the bits of the undisturbed run"


# ----------------------------------------------------------------------------------------------- processes


def started(
    arguments: Sequence[str], folder: Path, prepare: Callable[[], object] = lambda: None, data_dir: Path | None = None
) -> int:
    """Begin a command in a process of its own, as a fork of this one, which has the libraries loaded already.

    `prepare` is called in it first. What it says is in the folder's `log`. No signal is lost on the way.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    sys.stdout.flush()  # or the child writes once more what waits here
    child = os.fork()
    if child:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        return child
    code = 70
    try:
        _settle(folder, data_dir)
        prepare()
        code = _command(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _settle(folder: Path, data_dir: Path | None = None) -> None:
    log = os.open(folder / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(folder)
    for name in ("CIFAR100_DATA_DIR", "CIFAR100_RUNS_DIR"):
        os.environ.pop(name, None)
    if data_dir is not None:
        os.environ["CIFAR100_DATA_DIR"] = str(data_dir)
    os.environ["CIFAR100_CACHE_DIR"] = str(folder.parent / "cache")


def _command(arguments: Sequence[str]) -> int:
    sys.argv = ["cifar100", *arguments]
    for number in STOPS:
        signal.signal(number, lambda number, _: os._exit(128 + number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    try:
        __main__.main()
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 1


def started_ranks(arguments: Sequence[str], folder: Path, ranks: int, restarts: int, fatal: int | None) -> int:
    """Begin a command in so many processes under torchrun's agent; each leaves its process id in `folder`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    sys.stdout.flush()  # or the child writes once more what waits here
    child = os.fork()
    if child:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        return child
    code = 1
    try:
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        _settle(folder)
        config = LaunchConfig(
            *(1, 1, ranks),
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=restarts,
            monitor_interval=0.1,
            start_method="fork",
        )
        for number in STOPS:  # until the agent has its own
            signal.signal(number, lambda number, _: os._exit(128 + number))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        elastic_launch(config, _as_rank)(arguments, folder, fatal)
        code = 0
    except BaseException as error:
        print(f"torchrun: {type(error).__name__}", file=sys.stderr)
    finally:
        os._exit(code)


def _as_rank(arguments: Sequence[str], folder: Path, fatal: int | None) -> None:
    rank = os.environ["RANK"]
    (folder / f"rank{rank}").write_text(str(os.getpid()))
    if fatal is not None and rank == "0" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        sys.addaudithook(killer(folder / "runs", fatal))
    code = _command(arguments)
    if code:
        os._exit(code)
    for number in STOPS:  # which a rank ignores at its end, where torch's processes wait for the agent
        signal.signal(number, signal.SIG_DFL)


def killer(runs: Path, fatal: int) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook that kills this process before its `fatal`-th operation on files of runs."""
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


def ended(child: int, patience: float = 120.0) -> int:
    """Wait for a process; its exit code, or minus the signal that killed it. It may take `patience` seconds."""
    deadline = time.monotonic() + patience
    while True:
        gone, status = os.waitpid(child, os.WNOHANG)
        if gone:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise AssertionError(f"does not end in {patience:.0f} s")
        time.sleep(0.005)


def only_run(folder: Path) -> Path:
    """The one run of a folder."""
    (config,) = folder.glob("runs/*/*/config.yaml")
    return config.parent


def last_words(folder: Path) -> str:
    """The last line of what was said."""
    return ((folder / "log").read_text().splitlines() or [""])[-1]


# --------------------------------------------------------------------------------------------- disturbing


@dataclass(frozen=True)
class StepMode:
    """How runs are disturbed: each at most `most` times; by signals that can be heard, or by SIGKILL."""

    most: int
    signals: bool = False
    ranks: int = 1


def disturb(
    recipe: Sequence[str], folder: Path, seconds: float, chance: random.Random, tally: Tally, how: StepMode
) -> None:
    """Run a recipe to its end through at most `how.most` kills, or fewer where it ends before."""
    tally.runs += 1
    command = list(recipe)
    for attempt in range(100):
        disturbing = attempt < how.most
        fatal = chance.randint(1, 60) if disturbing and not how.signals and chance.random() < 0.5 else None
        if how.ranks > 1:
            restarts = 0 if how.signals else chance.choice((0, 2))
            child = started_ranks(command, folder, how.ranks, restarts, fatal)
        else:
            child = started(command, folder, functools.partial(_before, folder, fatal, how))
        twice = False
        if disturbing and fatal is None:
            time.sleep(chance.uniform(0, seconds))
            if how.signals:
                number = chance.choice(STOPS)
                twice = how.ranks == 1 and chance.random() < 0.3
                os.kill(child, number)
                if twice:
                    time.sleep(chance.uniform(0, 0.02))
                    os.kill(child, number)
            elif how.ranks > 1:
                tally.kills += _kill_a_rank(folder, chance)
            else:
                os.kill(child, signal.SIGKILL)
        code = ended(child)
        for left in folder.glob("rank*"):
            left.unlink()
        if code == 0:
            return
        tally.kills += how.ranks == 1 or how.signals or fatal is not None
        tally.before_files += fatal is not None
        begun = [path for path in folder.glob("runs/*/*") if (path / "config.yaml").exists()]
        if list(folder.glob("runs/*/*/result.json")):  # it was complete, and nothing is left to go on with
            (only_run(folder) / ".lock").unlink(missing_ok=True)
            return
        # Whoever is killed before the run can be gone on with begins anew, as a user would.
        command = ["train", "--resume", "last"] if begun else list(recipe)
        if how.signals and how.ranks == 1:
            tally.twice += "left at once" in last_words(folder)
            go_on = _stopped_well(folder, code, bool(begun), twice=twice)
            command = go_on or command
        elif how.ranks == 1:
            assert code == -signal.SIGKILL, f"exit code {code}: {(folder / 'log').read_text()[-2000:]}"
        else:
            text = (folder / "log").read_text()
            assert "cifar100cli/" not in text, text[-3000:]
            if how.signals:  # one line at most, and nothing where a signal came before there was a run
                told = [line for line in text.splitlines() if line.startswith("error: interrupted: ")]
                assert all(GO_ON.search(line) for line in told), text[-3000:]
                assert len(told) <= attempt + 1, text[-3000:]
    raise AssertionError(f"does not end: {(folder / 'log').read_text()[-2000:]}")


def _before(folder: Path, fatal: int | None, how: StepMode) -> None:
    if fatal is not None:
        sys.addaudithook(killer(folder / "runs", fatal))
    if how.signals:  # tables are computed, and this can be stopped too
        os.environ["CIFAR100_CACHE_DIR"] = str(folder / "cache")


def _kill_a_rank(folder: Path, chance: random.Random) -> bool:
    """SIGKILL for one of the ranks; whether it was there."""
    deadline = time.monotonic() + 30
    while not (begun := sorted(folder.glob("rank*"))) and time.monotonic() < deadline:
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError, ValueError):  # has ended, or is about to write its number
        os.kill(int(chance.choice(begun).read_text()), signal.SIGKILL)
        return True
    return False


def _stopped_well(folder: Path, code: int, begun: bool, *, twice: bool) -> list[str] | None:
    """See that a signal was answered in one line; returns the command that the line names."""
    text, line = (folder / "log").read_text(), last_words(folder)
    assert code in STOPPED, f"exit code {code}: {text[-2000:]}"
    assert "Traceback" not in text, text[-3000:]
    assert "Exception ignored" not in text, text[-3000:]
    if found := GO_ON.search(line):
        # Nothing half-written is left by one signal; by a second one, only what a resume removes.
        assert twice or not list(folder.glob("runs/*/*/.*")), list(folder.glob("runs/*/*/.*"))
        return shlex.split(found[1])[1:]
    assert twice or not begun or "before the run began" not in line, line
    return None


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


# ---------------------------------------------------------------------------------------------- references


def load() -> None:
    """Load the libraries, so that no child has to, and make the drawn data set small, for good."""
    import torch

    from cifar100cli import albumentations_backend, time_limit, workflows  # noqa: F401

    torch.set_num_threads(1)  # a fork keeps no other threads
    drawn = synthetic.draw(train_per_class=4, test_per_class=2)
    synthetic.draw = lambda *_, **__: drawn


def commands(root: Path, names: Sequence[str]) -> dict[str, list[str]]:
    """The commands of recipes, after training the teacher that some need."""
    teacher = root / "teacher"
    teacher.mkdir()
    assert ended(started(["train", *_small("train")], teacher)) == 0, (teacher / "log").read_text()
    where = str(only_run(teacher))
    return {name: [where if word == "TEACHER" else word for word in (*RECIPES[name], *_small(name))] for name in names}


def reference(command: Sequence[str], root: Path, ranks: int = 1) -> tuple[Path, float]:
    """The undisturbed run, and the seconds that it takes once the caches are filled."""
    began = 0.0
    for _ in range(1 if command[0] == "train" else 2):
        folder = Path(tempfile.mkdtemp(prefix="reference-", dir=root))
        began = time.monotonic()
        child = started(command, folder) if ranks == 1 else started_ranks(command, folder, ranks, 0, None)
        assert ended(child) == 0, (folder / "log").read_text()
    return folder, time.monotonic() - began


def torment(kills: int, how: StepMode, seed: int, root: Path, say: Callable[[str], None]) -> Tally:
    """Kill runs of the recipes in turn, so often in all."""
    load()
    chance = random.Random(seed)
    tally = Tally(signals=how.signals, ranks=how.ranks)
    all_of_them = commands(root, WITH_RANKS if how.ranks > 1 else list(RECIPES))
    references: dict[str, tuple[Path, float]] = {}
    while tally.kills < kills:
        for name, command in all_of_them.items():
            if name not in references:
                references[name] = reference(command, root, how.ranks)
            folder = root / f"run-{tally.runs}"
            folder.mkdir()
            before = tally.kills
            disturb(command, folder, references[name][1], chance, tally, how)
            check(folder, references[name][0])
            say(f"{name}: {tally.kills - before} {'stops' if how.signals else 'kills'}, and the same bits")
            if tally.kills >= kills:
                break
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
    parser.add_argument("--signals", action="store_true", help="SIGINT, SIGTERM and two SIGINT in place of SIGKILL")
    parser.add_argument("--ranks", type=int, default=1, help="processes of each run, under torchrun's agent")
    options = parser.parse_args()
    how = StepMode(options.most, options.signals, options.ranks)
    with tempfile.TemporaryDirectory() as root:
        print(torment(options.kills, how, options.seed, Path(root), print))


if __name__ == "__main__":
    main()

"""Lets several processes do the same at the same time, and sees that none spoils the other's work.

    python -m tests.together --rounds 10

Runs of one preset and seed that begin in the same second; one run that several want to go on with; several runs that
fill one cache with a teacher's logits, or with a frozen network's features.
"""

import argparse
import os
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests import kills
from tests.kills import SMALL, check, ended, only_run, started

TINY = ("--backbone", "test_resnet", "--no-pretrained", "--set", "train.precision=fp32")


def gone_on_by_one(command: Sequence[str], whole: Path, root: Path, count: int) -> None:
    """Of several that go on with one run at once, one does, and the others say why not."""
    folder = Path(tempfile.mkdtemp(prefix="resumed-", dir=root))
    child = started(command, folder)
    while not list(folder.glob("runs/*/*/state.safetensors")):
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    assert ended(child) == -signal.SIGKILL
    run = only_run(folder)
    (folder / "log").unlink()
    codes = [ended(child) for child in [started(["train", "--resume", str(run)], folder) for _ in range(count)]]
    text = (folder / "log").read_text()
    assert "Traceback" not in text, text
    assert codes.count(0) >= 1, text  # who comes when it is complete reads the result
    assert set(codes) <= {0, 1}, text
    assert text.count("error: ") == text.count("another process is training this run right now") == codes.count(1), text
    check(folder, whole)


def begun_at_once(command: Sequence[str], whole: Path, root: Path, count: int) -> None:
    """Runs of one preset and seed at once have folders of their own, and all end as one alone does."""
    folder = Path(tempfile.mkdtemp(prefix="at-once-", dir=root))
    children = [started(command, folder) for _ in range(count)]
    assert [ended(child) for child in children] == [0] * count, (folder / "log").read_text()
    runs = list(folder.glob("runs/*/*/config.yaml"))
    assert len(runs) == count
    for number, config in enumerate(runs):
        alone = root / f"{folder.name}-{number}" / "runs" / config.parent.parent.name
        alone.mkdir(parents=True)
        config.parent.rename(alone / config.parent.name)
        check(alone.parents[1], whole)


def one_cache(command: Sequence[str], whole: Path, root: Path, count: int) -> None:
    """Runs at once that compute the same table: all end as one alone does, and the next finds it whole."""
    inside = Path(tempfile.mkdtemp(prefix="cache-", dir=root))  # whose `cache` nobody has filled
    folder = inside / "runs of all"
    folder.mkdir()
    children = [started(command, folder) for _ in range(count)]
    assert [ended(child) for child in children] == [0] * count, (folder / "log").read_text()
    assert not list((inside / "cache").rglob(".*")), "left over"
    after = inside / "after"
    after.mkdir()
    assert ended(started(command, after)) == 0
    assert "nothing to compute" in (after / "log").read_text()
    check(after, whole)
    for config in folder.glob("runs/*/*/config.yaml"):
        model = (config.parent / "model.safetensors").read_bytes()
        assert model == (only_run(whole) / "model.safetensors").read_bytes()


def meet(rounds: int, names: Sequence[str], root: Path, say: Callable[[str], None]) -> None:
    """All of it, so often."""
    kills.load()
    plain = ["train", *SMALL, *TINY]
    cached = kills.commands(root, names)
    whole = {name: kills.reference(command, root)[0] for name, command in {**cached, "plain": plain}.items()}
    for number in range(rounds):
        gone_on_by_one(plain, whole["plain"], root, 2 + number % 3)
        begun_at_once(plain, whole["plain"], root, 2 + number % 3)
        for name, command in cached.items():
            one_cache(command, whole[name], root, 2)
        say(f"round {number + 1}: nobody was in another's way")


def main() -> None:
    """As many rounds as are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--recipe", action="append", help="with a cache; default: two of tests.kills")
    options = parser.parse_args()
    names = options.recipe or ("distill, cached logits", "finetune, cached features")
    with tempfile.TemporaryDirectory() as root:
        meet(options.rounds, names, Path(root), print)


if __name__ == "__main__":
    main()

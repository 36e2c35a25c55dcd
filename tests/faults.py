"""Lets the disk fail at every operation in turn, and sees that nothing is lost and nothing half is left.

    python -m tests.faults
    python -m tests.faults --every 7 --scene train

A scene is a command and a folder that it writes into. It is run once to count the operations on files of that folder
(opening for writing, syncing, renaming, removing, making folders). Then it is run again for each of them and each kind
of fault: the disk is full from there on, or read-only from there on, or that one operation fails with an input/output
error, or somebody removes the run's folder. The command must end with one line and exit code 1, or do without;
earlier files must be whole; and once the disk is well again, the run must go on to the bits of the undisturbed one.
"""

import argparse
import contextlib
import errno
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import safe_open

from cifar100cli import checkpoint, cli, download, tensors
from tests import kills
from tests.kills import GO_ON, SMALL, check, ended, last_words, only_run, started

KINDS = {"full": errno.ENOSPC, "read-only": errno.EROFS, "broken": errno.EIO, "vanished": 0}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
SHORT = ("--epochs", "2", "--set", "train.precision=fp32")


@dataclass
class Tally:
    """What happened."""

    scenes: int = 0
    injected: Counter[str] = field(default_factory=Counter)
    failed: int = 0

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.injected.items())
        return (
            f"{self.injected.total()} faults ({kinds}) in {self.scenes} scenes: {self.failed} commands said so in one "
            f"line, {self.injected.total() - self.failed} did without; all went on to the same bits"
        )


def inject(folder: Path, kind: str | None, at: int) -> None:
    """From its `at`-th operation on files of `folder` on, let this process meet a fault. Operations are counted."""
    counted = os.open(folder.parent / "operations", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    count, busy = 0, False

    def operation(path: object, room: bool) -> None:
        nonlocal count, busy
        if busy or (isinstance(path, str | bytes | os.PathLike) and not _inside(os.fsdecode(path), folder)):
            return
        count += 1
        os.write(counted, b".")
        if (
            kind is None
            or count < at
            or (kind in ("broken", "vanished") and count > at)
            or (kind == "full" and not room)
        ):
            return
        if kind == "vanished":
            busy = True
            for run in folder.glob("*/*"):
                shutil.rmtree(run)
            busy = False
            return
        raise OSError(KINDS[kind], os.strerror(KINDS[kind]), path)

    def hook(event: str, details: tuple[Any, ...]) -> None:
        if event == "os.mkdir" or (event == "open" and isinstance(details[2], int) and details[2] & WRITING):
            operation(details[0], room=True)
        elif event in ("os.rename", "os.remove", "os.chmod", "os.rmdir"):
            operation(details[0], room=False)

    fsync, save_file = os.fsync, safetensors.torch.save_file

    def failing_fsync(handle: Any) -> None:
        operation(Path(f"/proc/self/fd/{handle}").readlink(), room=True)
        fsync(handle)

    def failing_save(content: Any, path: Path, *rest: Any) -> None:
        path.write_bytes(b"half")  # which is there when the disk is full
        operation(path, room=True)
        save_file(content, path, *rest)

    sys.addaudithook(hook)
    os.fsync = failing_fsync  # type: ignore[assignment]
    tensors.save_file = failing_save  # type: ignore[attr-defined,assignment]


def _inside(path: str, folder: Path) -> bool:
    return os.path.abspath(path).startswith(f"{folder}{os.sep}")  # noqa: PTH100 - which asks the disk for nothing


# ------------------------------------------------------------------------------------------------- scenes


@dataclass(frozen=True)
class Scene:
    """A command, the folder that fails under it, and what must hold afterwards, in words or in an exception."""

    command: Sequence[str]
    folder: str
    prepare: Callable[[Path], object]
    after: Callable[[Path, int], None]
    kinds: Sequence[str] = ("full", "read-only", "broken")


def trained(command: Sequence[str], root: Path) -> Scene:
    """A training run whose runs folder fails."""
    whole, _ = kills.reference(command, root)

    def after(folder: Path, code: int) -> None:
        line = last_words(folder)
        begun = [path.parent for path in folder.glob("runs/*/*/config.yaml")]
        for run in begun:
            _whole_files(run)
        if code and begun:
            found = GO_ON.search(line)
            assert found, line
            saved = checkpoint.finished_epochs(begun[0] / "state.safetensors")
            assert f"{saved} of 2 epochs are done and saved" in line, line
            again = ["train", "--resume", found[1].split()[-1]]
        else:
            again = ["train", "--resume", "last"] if begun else list(command)
        if not list(folder.glob("runs/*/*/result.json")):
            assert ended(started(again, folder)) == 0, (folder / "log").read_text()[-2000:]
        elif (lock := only_run(folder) / ".lock").exists():  # a disk that lets nothing be removed keeps it
            lock.unlink()
        check(folder, whole)

    return Scene(command, "runs", lambda folder: None, after, (*KINDS,))


def cached(command: Sequence[str], root: Path) -> Scene:
    """A training run whose cache fails: it says so and goes on."""
    whole, _ = kills.reference(command, root)

    def after(folder: Path, code: int) -> None:
        text = (folder / "log").read_text()
        assert code == 0, text
        check(folder, whole)
        for part in folder.glob("own cache/**/*.safetensors"):
            with safe_open(part, "pt") as file:
                assert file.keys()
        if "cannot be written to" not in text:
            assert "nothing to compute" in text or list(folder.glob("own cache/**/*.safetensors")), text

    def own_cache(folder: Path) -> None:
        os.environ["CIFAR100_CACHE_DIR"] = str(folder / "own cache")

    return Scene(command, "own cache", own_cache, after)


def written(command: Sequence[str], name: str) -> Scene:
    """A command that writes one file, over an old one."""

    def put_old(folder: Path) -> None:
        (folder / "out").mkdir(exist_ok=True)
        (folder / "out" / name).write_text("old")

    def after(folder: Path, code: int) -> None:
        content = (folder / "out" / name).read_bytes()
        assert (content == b"old") == (code != 0)
        if code:
            assert name in last_words(folder), last_words(folder)
            assert ended(started([*command, f"out/{name}"], folder)) == 0, (folder / "log").read_text()
        assert not list((folder / "out").glob(".*")) or code, "left over"

    return Scene([*command, f"out/{name}"], "out", put_old, after)


def downloaded(root: Path) -> Scene:
    """An archive put in the place of an older data set."""
    from tests.weather import ARCHIVE, BODY, FILES, FOLDER, KEPT

    (root / "archive.tar.gz").write_bytes(BODY)
    command = ("download", "--from", str(root / "archive.tar.gz"), "--data-dir", "data", "--force")

    def put_old(folder: Path) -> None:
        download.ARCHIVES["cifar100"] = ARCHIVE  # type: ignore[index]
        cli._check_dataset = lambda *_: None
        (folder / "data" / FOLDER).mkdir(parents=True, exist_ok=True)
        for name in FILES:
            (folder / "data" / FOLDER / name).write_text("old")

    def after(folder: Path, code: int) -> None:
        def contents(place: Path) -> dict[str, bytes]:
            return {name: (place / name).read_bytes() for name in FILES}

        places = [place for place in (folder / "data" / FOLDER, folder / "data" / KEPT) if place.is_dir()]
        expected = dict.fromkeys(FILES, b"old") if code else FILES
        assert any(contents(place) in (expected, FILES) for place in places), "neither the old nor the new data set"
        assert ended(started(command, folder, lambda: put_nothing())) == 0, (folder / "log").read_text()
        assert contents(folder / "data" / FOLDER) == FILES
        assert {path.name for path in (folder / "data").iterdir()} - {".download-cifar100.lock", KEPT} == {FOLDER}

    def put_nothing() -> None:
        download.ARCHIVES["cifar100"] = ARCHIVE  # type: ignore[index]
        cli._check_dataset = lambda *_: None

    return Scene(command, "data", put_old, after)


def _whole_files(run: Path) -> None:
    """Every file that has its name is whole; of the metrics, all lines but the last."""
    for name in ("environment.json", "result.json"):
        if (run / name).exists():
            json.loads((run / name).read_text())
    for name in ("model.safetensors", "state.safetensors"):
        if (run / name).exists():
            assert checkpoint.read(run / name).tensors
    if (run / "predictions.csv").exists():
        assert len((run / "predictions.csv").read_text().splitlines()) == 201


def scenes(root: Path) -> Iterator[tuple[str, Scene]]:
    """All of them, made when they are wanted."""
    tiny = ("--backbone", "test_resnet", "--no-pretrained", *SHORT)
    yield "train", trained(["train", *SMALL, *tiny], root)
    (root / "teacher").mkdir()
    assert ended(started(["train", *SMALL, *tiny], root / "teacher")) == 0, (root / "teacher" / "log").read_text()
    teacher = str(only_run(root / "teacher"))
    yield (
        "distill, cache",
        cached(["distill", "--preset", "quickstart", "--teacher", teacher, "--augment", "flip", *SMALL, *tiny], root),
    )
    features = ("--unfreeze", "layer4", "--backbone", "resnet10t", "--init", "none")
    yield "finetune, cache", cached(["finetune-cifar10", *features, *SMALL, *SHORT], root)
    yield "predictions", written(["evaluate", teacher, "--device", "cpu", "--predictions"], "p.csv")
    yield "report", written(["report", teacher, "--out"], "report.html")
    yield "export", written(["export", teacher, "--out"], "model.onnx")
    yield "download", downloaded(root)


def sweep(
    name: str, scene: Scene, root: Path, every: int, tally: Tally, say: Callable[[str], None], first: int = 1
) -> None:
    """Let every `every`-th operation of a scene fail, in each way."""

    def run(kind: str | None, at: int) -> tuple[Path, int]:
        folder = Path(tempfile.mkdtemp(prefix="scene-", dir=root))

        def prepare() -> None:
            scene.prepare(folder)
            inject(folder / scene.folder, kind, at)

        return folder, ended(started(scene.command, folder, prepare))

    folder, code = run(None, 0)
    assert code == 0, (folder / "log").read_text()
    operations = (folder / "operations").stat().st_size
    tally.scenes += 1
    for kind in scene.kinds:
        for at in range(first, operations + 1, every):
            folder, code = run(kind, at)
            place = f"{name}: {kind} at operation {at} of {operations}"
            text = (folder / "log").read_text()
            try:
                assert code in (0, 1), f"exit code {code}"
                assert "Traceback" not in text
                assert "Exception ignored" not in text
                assert text.count("error: ") == code
                assert not code or last_words(folder).startswith("error: ")
                tally.injected[kind] += 1
                tally.failed += code
                scene.after(folder, code)
            except Exception as error:
                raise AssertionError(f"{place}: {error}\n{text[-2000:]}") from error
            shutil.rmtree(folder)
        say(f"{name}: {kind} at every {every}. of {operations} operations")


# ------------------------------------------------------------------------------------- a real file system


def really(count: int, root: Path, chance: random.Random, tally: Tally, say: Callable[[str], None]) -> None:
    """Train on a small file system that another file fills at a random moment, or that is mounted read-only then."""
    tiny = ("--backbone", "test_resnet", "--no-pretrained", *SHORT)
    scene = trained(["train", *SMALL, *tiny], root)
    seconds = 1.0
    for number in range(count):
        folder = Path(tempfile.mkdtemp(prefix="mounted-", dir=root))
        runs = folder / "runs"
        runs.mkdir()
        if not mounted(runs, "size=16m"):
            say("skipped: nothing can be mounted here")
            return
        try:
            began = time.monotonic()
            child = started(scene.command, folder)
            time.sleep(chance.uniform(0, seconds))
            kind = ("really full", "really read-only")[number % 2]
            if kind == "really full":
                ballast = fill(runs, leave=chance.choice((0, 5_000, 300_000, 2_000_000)))
            else:
                while not mounted(runs, "remount,ro"):  # a file is being written
                    time.sleep(0.001)
            code = ended(child)
            if code == 0:
                seconds = 0.8 * (time.monotonic() - began)
            text = (folder / "log").read_text()
            assert code in (0, 1), text
            assert "Traceback" not in text, text
            assert text.count("error: ") == code, text
            tally.injected[kind] += code
            tally.failed += code
            line = last_words(folder)
            if kind == "really full":
                assert not list(runs.glob("*/*/.*")), "left over"
                ballast.unlink()
            else:
                assert mounted(runs, "remount,rw")
            scene.after(folder, code)
            say(f"{kind}: {line if code else 'too late'}")
        finally:
            subprocess.run(["umount", str(runs)], check=True)
    tally.scenes += 1


def mounted(folder: Path, options: str) -> bool:
    """Mount a file system in memory, or mount it anew with other options."""
    if shutil.which("mount") is None:
        return False
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def fill(folder: Path, leave: int) -> Path:
    """A file that takes all the room of a file system but `leave` bytes."""
    ballast = folder / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        left = shutil.disk_usage(folder).free - leave
        if left > 0:
            os.posix_fallocate(file.fileno(), 0, left)
    return ballast


def main() -> None:
    """Sweep all scenes, or one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--scene", action="append", help="only this one")
    parser.add_argument("--mounted", type=int, default=20, help="runs on a small file system of their own")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    kills.load()
    tally = Tally()
    with tempfile.TemporaryDirectory() as root:
        if options.mounted:
            really(options.mounted, Path(root), random.Random(options.seed), tally, print)
        for name, scene in scenes(Path(root)):
            if not options.scene or name in options.scene:
                sweep(name, scene, Path(root), options.every, tally, print, options.first)
    print(tally)


if __name__ == "__main__":
    main()

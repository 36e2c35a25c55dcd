"""One run on real images that goes through it all: killed five times, with a disk that is truly full once.

    python -m tests.ordeal --data-dir DIR

It needs CIFAR-100 in the folder, and the right to mount a small file system in memory (root, on Linux).
"""

import argparse
import hashlib
import os
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.faults import fill, mounted
from tests.kills import GO_ON, ended, last_words, only_run, started

ROOM = 320  # MiB of the file system: four times a model's weights, twice


def command(precision: str, backbone: str, fraction: float, epochs: int) -> list[str]:
    """A training run on real images, with augmentation and a schedule."""
    settings = (
        *(f"train.precision={precision}", f"data.fraction={fraction}", "data.normalize=dataset"),
        *("schedule.name=cosine", "schedule.warmup_epochs=1", "train.select=last"),
    )
    return [
        *("train", "--preset", "resnet18-baseline", "--backbone", backbone, "--augment", "crop_flip"),
        *("--epochs", str(epochs), "--device", "cpu", *(part for each in settings for part in ("--set", each))),
    ]


def suffer(arguments: Sequence[str], folder: Path, data_dir: Path, seconds: float, kills: int, seed: int) -> None:
    """Run the command through so many kills and one full disk, an epoch of `seconds` apart or so; say what happens."""
    chance = random.Random(seed)
    todo, killed, was_full = list(arguments), 0, False
    patience = 600 + 100 * seconds  # without bf16 in its hardware, a machine takes a quarter of an hour
    runs = folder / "runs"
    while True:
        (folder / "log").unlink(missing_ok=True)
        began = time.monotonic()
        child = started(todo, folder, data_dir=data_dir)
        if killed < kills and (was_full or killed < kills // 2):
            _wait_for_training(folder)
            time.sleep(chance.uniform(0, 1.2) * seconds)
            os.kill(child, signal.SIGKILL)
            code = ended(child, patience)
            assert code in (0, -signal.SIGKILL), last_words(folder)
            if code == -signal.SIGKILL:
                killed += 1
                print(f"  SIGKILL {killed} after {time.monotonic() - began:.1f} s", flush=True)
        elif not was_full:
            _wait_for_training(folder)
            time.sleep(chance.uniform(0, 1.2) * seconds)
            ballast = fill(runs, leave=300_000)
            code = ended(child, patience)
            print(f"  the disk was full after {time.monotonic() - began:.1f} s: exit code {code}")
            print(f"    {last_words(folder)}", flush=True)
            assert code == 1, "it was over before the disk was full; give it more --epochs"
            assert "No space left on device" in last_words(folder)
            assert not list(runs.glob("*/*/.*")), "left over"
            ballast.unlink()
            was_full = True
        else:
            code = ended(child, patience)
            assert code == 0, last_words(folder)
        if code == 0:
            assert (was_full, killed) == (True, kills), f"over after {killed} kills; give it more --epochs"
            return
        begun = list(runs.glob("*/*/config.yaml"))
        found = GO_ON.search(last_words(folder))
        todo = ["train", "--resume", found[1].split()[-1] if found else "last"] if begun else list(arguments)
        todo += ["--device", "cpu"] if begun else []


def _wait_for_training(folder: Path) -> None:
    """Until the process that has begun last is about to train."""
    log = folder / "log"
    while not log.exists() or "seed 0\n" not in log.read_text():
        time.sleep(0.01)


def sha256(path: Path) -> str:
    """The digest of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    """Both precisions, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--backbone", default="resnet10t")
    parser.add_argument("--fraction", type=float, default=0.05)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    import torch

    from cifar100cli import time_limit, workflows  # noqa: F401 - loaded here, so that no child has to

    torch.set_num_threads(1)  # a fork keeps no other threads
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for precision in ("fp32", "bf16"):
            arguments = command(precision, options.backbone, options.fraction, options.epochs)
            print(f"cifar100 {' '.join(arguments)}", flush=True)
            whole, hurt = root / f"whole-{precision}", root / f"hurt-{precision}"
            for folder in (whole, hurt):
                (folder / "runs").mkdir(parents=True)
            began = time.monotonic()
            assert ended(started(arguments, whole, data_dir=options.data_dir.absolute()), 3600) == 0, last_words(whole)
            seconds = time.monotonic() - began
            print(f"  undisturbed: {seconds:.1f} s", flush=True)
            assert mounted(hurt / "runs", f"size={ROOM}m"), "a file system cannot be mounted here"
            try:
                data_dir = options.data_dir.absolute()
                suffer(arguments, hurt, data_dir, seconds / options.epochs, options.kills, options.seed)
                same = True
                for file in ("model.safetensors", "state.safetensors", "predictions.csv"):
                    left, right = (sha256(only_run(folder) / file) for folder in (whole, hurt))
                    print(f"  {file}: {left} undisturbed\n  {' ' * len(file)}  {right} after it all")
                    same = same and left == right
                assert same, "the bits differ"
                print("  the same bits", flush=True)
            finally:
                subprocess.run(["umount", str(hurt / "runs")], check=True)


if __name__ == "__main__":
    main()

"""A shortened run of every preset beyond the tutorial, on real images, to see that it learns: a table in Markdown.

    .uv/bin/uv run python -m tests.shortened --data-dir DIR [PRESET...]

Few images, small batches and few epochs, so that a CPU carries it; the rest is the preset's, but for what
SMALLER_IMAGES and SETTINGS say of the largest networks. Where no weights are given by --weights, presets that begin
with weights from a hub begin with random ones. A preset learns when the training loss of the last epoch is below the
first one's, and under the loss of guessing.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

# Share of the images, batch size, epochs: some minutes on two cores. A step with a large network needs seconds there.
SIZES = {
    "resnet18-cifar": (0.04, 64, 6),
    "resnet18-cifar-kd": (0.04, 64, 6),
    "wrn28-10-sam": (0.04, 32, 6),
    "resnet50-imagenet-224": (0.01, 32, 4),
    "vit-imagenet21k-224": (0.02, 32, 8),
    "speedrun-75": (0.06, 125, 4),
    "speedrun-cifar10-94": (0.2, 250, 3),
    "speedrun-cifar10-96": (0.06, 125, 4),
    "laptop": (0.2, 250, 3),
    "cpu-amx": (0.2, 250, 3),
    "laptop-pretrained": (0.05, 64, 2),
}
# Where the 10,000 test images alone would take half an hour or more.
SMALLER_IMAGES = {"wrn28-10-sam": 16, "vit-imagenet21k-224": 32}
# Of CIFAR-10: with ten classes a few hundred steps show something. The rate is in proportion to the batch.
SETTINGS = {"wrn28-10-sam": ("data.dataset=cifar10", "optimizer.lr=0.025", "schedule.warmup_epochs=0.5")}
HEAD = "| preset | images | batch | epochs | training loss, first and last epoch | training top-1 | test top-1 |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; exit code 1 when a preset does not learn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", metavar="PRESET", help=f"of {', '.join(SIZES)}; default: all")
    parser.add_argument("--data-dir", type=Path, required=True, help="where `cifar100 download` put both data sets")
    parser.add_argument("--teacher", type=Path, help="a run, for presets that distil")
    parser.add_argument("--weights", type=Path, help="a file of weights for tf_efficientnet_lite0")
    asked = parser.parse_args(arguments)
    unknown = [name for name in asked.presets if name not in SIZES]
    if unknown:
        parser.error(f"{', '.join(unknown)}: not among {', '.join(SIZES)}")
    print(HEAD, "|---|---:|---:|---:|---:|---:|---:|", sep="\n", flush=True)
    learns = True
    for name in asked.presets or SIZES:
        with tempfile.TemporaryDirectory() as folder:
            row, well = _shortened(name, Path(folder), asked)
        print(row, flush=True)
        learns &= well
    return 0 if learns else 1


def _shortened(name: str, folder: Path, asked: argparse.Namespace) -> tuple[str, bool]:
    fraction, batch, epochs = SIZES[name]
    command = ["train", "--preset", name]
    if name.endswith("-kd"):
        if asked.teacher is None:
            return f"| `{name}` | needs --teacher | | | | | |", True
        command = ["distill", "--preset", name, "--teacher", str(asked.teacher)]
    command += ["--epochs", str(epochs), "--batch-size", str(batch), "--set", f"data.fraction={fraction}"]
    for setting in SETTINGS.get(name, ()):
        command += ["--set", setting]
    if name in SMALLER_IMAGES:
        command += ["--image-size", str(SMALLER_IMAGES[name])]
    if name == "laptop-pretrained" and asked.weights is not None:
        command += ["--weights", str(asked.weights)]
    elif name in ("resnet50-imagenet-224", "vit-imagenet21k-224", "laptop-pretrained"):
        command += ["--set", "model.pretrained=false"]
    where = ["--data-dir", str(asked.data_dir), "--out", str(folder), "--quiet", "--json"]
    finished = subprocess.run(
        [sys.executable, "-m", "cifar100cli", *command, *where], stdout=subprocess.PIPE, text=True, check=False
    )
    if finished.returncode:
        return f"| `{name}` | exit code {finished.returncode} | | | | | |", False
    result = json.loads(finished.stdout)
    lines = (Path(result["run_dir"]) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    first, last = json.loads(lines[0]), json.loads(lines[-1])
    classes = 10 if result["dataset"] == "cifar10" else 100
    well = last["train_loss"] < min(first["train_loss"], math.log(classes))
    return (
        f"| `{name}` | {round(fraction * 50_000):,} | {batch} | {epochs} | "
        f"{first['train_loss']:.3f}, {last['train_loss']:.3f} | "
        f"{first['train_top1']:.1%}, {last['train_top1']:.1%} | {result['test']['top1']:.2%} |",
        well,
    )


if __name__ == "__main__":
    sys.exit(main())

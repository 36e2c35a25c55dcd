"""Runs of presets in full, as records: each is kept as soon as it is there, until the time is up.

    .uv/bin/uv run python -m tests.records OUT --data-dir DIR [--seconds N] [PRESET[:SEEDS]...] [-- OPTIONS OF TRAIN]

For a machine with a fast device that is there for some minutes. Without names it is what no GPU has shown yet, the
quickest first. OUT gets, of each run, what is small: preset, environment, metrics, result and what was said; and
`records.md`, a table that is whole after every run. A run that is stopped by the time goes on with the same command
and folder `--runs`, and is in the table with what it had reached.
"""

import argparse
import contextlib
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cifar100cli.runs import CONFIG, ENVIRONMENT, METRICS, RESULT, RunDir, find_runs
from cifar100cli.wording import duration, percent

WANTED = (
    *("speedrun-75:3", "speedrun-cifar10-94:3", "speedrun-cifar10-96:1", "resnet18-cifar:1"),
    *("resnet18-baseline:1", "resnet18-augment:1", "resnet18-wd01:1", "resnet18-lbsmooth:1"),
)
SMALL = (CONFIG, ENVIRONMENT, METRICS, RESULT)
GRACE = 60  # seconds that a stopped run has to save what it has
HEAD = (
    "| preset | seed | test top-1 | top-5 | training top-1 | epochs | time | images/s | peak memory | device |",
    "|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; exit code 1 when not all of it is complete."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    own, options = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="a folder for the records")
    parser.add_argument("presets", nargs="*", metavar="PRESET[:SEEDS]", help=f"default: {' '.join(WANTED)}")
    parser.add_argument("--data-dir", type=Path, required=True, help="where `cifar100 download` put both data sets")
    parser.add_argument("--runs", type=Path, help="where the runs themselves are; default: beside OUT")
    parser.add_argument("--seconds", type=float, default=540, help="when to stop (default: 540)")
    asked = parser.parse_intermixed_args(own)
    wanted = [re.fullmatch(r"([\w-]+)(?::(\d+))?", word) for word in asked.presets or WANTED]
    if None in wanted:
        parser.error("a preset is PRESET or PRESET:SEEDS, as in speedrun-75:3")
    until = time.monotonic() + asked.seconds
    runs = (asked.runs or asked.out.with_name(f"{asked.out.name}-runs")).absolute()
    asked.out.mkdir(parents=True, exist_ok=True)
    runs.mkdir(parents=True, exist_ok=True)
    _keep(runs, asked.out)
    complete = True
    for match in wanted:
        assert match is not None
        for seed in range(int(match[2] or 1)):
            if _find(runs, match[1], seed, whole=True) is None:
                left = until - time.monotonic()
                if left < 1:
                    complete = False
                    continue
                _train(match[1], seed, runs, asked.data_dir, options, asked.out / f"{match[1]}-seed{seed}.log", left)
            complete &= _find(runs, match[1], seed, whole=True) is not None
            _keep(runs, asked.out)
    print((asked.out / "records.md").read_text(encoding="utf-8"), end="")
    return 0 if complete else 1


def _find(runs: Path, preset: str, seed: int, *, whole: bool) -> RunDir | None:
    found = [RunDir(path) for path in find_runs(runs / preset) if (path / CONFIG).is_file()]
    return next((run for run in found if run.config().seed == seed and run.complete == whole), None)


def _train(preset: str, seed: int, runs: Path, data_dir: Path, options: Sequence[str], log: Path, left: float) -> None:
    """One run, from its beginning or from where it was stopped; stopped when the time is up."""
    begun = _find(runs, preset, seed, whole=False)
    what = ["--preset", preset, "--seed", str(seed), *options] if begun is None else ["--resume", str(begun.path)]
    command = [sys.executable, "-m", "cifar100cli", "train", *what, "--data-dir", str(data_dir), "--out", str(runs)]
    print(f"{preset}, seed {seed}: {left:.0f} s are left", flush=True)
    with log.open("a") as file:
        file.write(f"$ cifar100 train {' '.join(what)}\n")
        file.flush()
        child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        try:
            child.wait(left)
        except subprocess.TimeoutExpired:
            child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(GRACE)
            child.kill()
            child.wait()


def _keep(runs: Path, out: Path) -> None:
    """What is small of every run, and the table of them all."""
    rows = []
    for path in find_runs(runs):
        folder = out / path.relative_to(runs)
        folder.mkdir(parents=True, exist_ok=True)
        for name in SMALL:
            if (path / name).is_file():
                shutil.copy(path / name, folder / name)
        rows.append(_row(RunDir(path)))
    (out / "records.md").write_text("\n".join([*HEAD, *rows]) + "\n", encoding="utf-8")


def _row(run: RunDir) -> str:
    """A line of the table; of a run that is not complete, what its last epoch was."""
    about, config, lines = run.environment(), run.config(), run.metrics()
    device = f"{about['device_name']}, {about['precision']}, PyTorch {about['versions']['torch']}"
    result: dict[str, Any] = run.result() if run.complete else {}
    test, last = result.get("test", {}), lines[-1] if lines else {}
    cells = (
        about["preset"],
        str(config.seed),
        percent(test.get("top1")) if run.complete else "stopped",
        percent(test.get("top5")),
        percent(last.get("train_top1")),
        f"{len(lines)} of {config.train.epochs}",
        duration(sum(line["seconds"] for line in lines)),
        f"{result.get('images_per_second', last.get('images_per_second', 0)):,.0f}",
        f"{max((line.get('peak_memory_bytes', 0) for line in lines), default=0) / 2**30:.1f} GiB",
        device,
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())

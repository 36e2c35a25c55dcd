"""PyTorch's own CUDA code on a machine without a GPU: over a CUDA runtime that computes nothing (`hollow.c`).

`python -m tests.hollow` takes the steps of every recipe of `test_steps`, captured as a graph, and runs the commands
that train and measure. No figure means anything; what is found is a tensor on the wrong device or of the wrong type, a
step that cannot be captured, and one that waits for the device or copies to it from memory that is not pinned.

cuDNN, which is no part of the runtime, is switched off; NCCL, kernels of Triton's and results are left to a GPU.
"""

import contextlib
import ctypes
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

SOURCE = Path(__file__).with_suffix(".c")
CUDA = "13"  # whose functions it has


def _headers() -> Path:
    triton = importlib.util.find_spec("triton")
    return Path(triton.origin if triton is not None and triton.origin else "nowhere").parent / "backends/nvidia/include"


FLAGS = ("-w", "-O1", "-fPIC", "-shared", "-pthread", "-Wl,-soname,libcuda.so.1", f"-I{_headers()}", str(SOURCE))


def obstacle() -> str | None:
    """Why the runtime cannot be built here, if it cannot."""
    if sys.platform != "linux" or (torch.version.cuda or "").partition(".")[0] != CUDA:
        return f"needs a PyTorch for CUDA {CUDA} on Linux"
    header = _headers() / "cuda_runtime_api.h"
    if not header.is_file() or f"#define CUDART_VERSION {CUDA}" not in " ".join(header.read_text().split()):
        return f"needs the headers of CUDA {CUDA}, as Triton has them"
    if shutil.which("cc") is None or subprocess.run(["cc", "-E", *FLAGS], capture_output=True, check=False).returncode:
        return "needs a C compiler, and the C library's headers"
    if os.statvfs(tempfile.gettempdir()).f_flag & os.ST_NOEXEC:
        return "needs a folder for temporary files that is not mounted noexec (TMPDIR)"
    return None


def over_it(*arguments: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    """Run Python over the runtime, which is built in the folder: under the driver's name, for what looks for that."""
    subprocess.run(["cc", *FLAGS, "-o", str(folder / "libcuda.so.1")], check=True)
    own = ("CIFAR100_", "CUDA_", "PYTORCH_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    # By a path without spaces and colons, at which the loader would cut it.
    environment |= {"LD_PRELOAD": "./libcuda.so.1", "CIFAR100_CACHE_DIR": str(folder / "cache")}
    return subprocess.run(
        [sys.executable, "-u", "-X", "faulthandler", *arguments],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def main() -> None:
    """Build the runtime and try everything over it."""
    if (reason := obstacle()) is not None:
        sys.exit(f"tests.hollow: {reason}")
    with tempfile.TemporaryDirectory() as folder:
        script = (
            f"import sys; sys.path.insert(0, {str(SOURCE.parents[1])!r}); from tests import hollow; hollow.everything()"
        )
        found = over_it("-c", script, folder=Path(folder))
    print(found.stdout + found.stderr, end="")
    sys.exit(found.returncode)


# --------------------------------------------------------------------------------------------------- over it


def everything() -> None:
    """All recipes and commands; exit code 1 where one failed."""
    from cifar100cli import synthetic, time_limit
    from tests.test_steps import RECIPES

    assert torch.cuda.get_device_name() == "a hollow GPU"
    few = synthetic.draw(train_per_class=4, test_per_class=2)
    synthetic.draw = lambda *_: few
    time_limit.MOST_EPOCHS = 2  # type: ignore[attr-defined]
    _ask_no_device_what_is_finite()
    failed = 0
    tried: dict[str, Callable[[], None]] = {
        f"steps: {name}": partial(_steps, sections) for name, sections in RECIPES.items()
    }
    for name, trial in {**tried, **_commands()}.items():
        try:
            trial()
            print(f"{name}: ok")
        except Exception:
            failed += 1
            print(f"{name}:\n{traceback.format_exc()}")
    sys.exit(1 if failed else 0)


def _ask_no_device_what_is_finite() -> None:
    """Nor whether a network that is entered in its middle computes the same: it would say 0, that is no."""
    from cifar100cli import metrics, trainer
    from cifar100cli.stages import Parted

    torch.backends.cudnn.enabled = False
    trainer._refuse_infinite = lambda *_: None
    metrics.refuse_no_answer = lambda *_: None
    Parted.is_exact = lambda *_: True  # type: ignore[method-assign]


def _counted() -> tuple[int, int]:
    """How often the host has waited for the device, and copied to it from memory that is not pinned."""
    runtime = ctypes.CDLL(None)
    return runtime.hollow_waits(), runtime.hollow_pageable()


def _steps(sections: dict[str, Any]) -> None:
    """Three epochs of captured steps; in the last, where nothing is captured any more, no step waits."""
    from cifar100cli import jobs, steps, trainer
    from cifar100cli.folders import Where
    from tests.conftest import Listening, make_preset

    here = Path.cwd()
    preset = make_preset(**sections)
    job = jobs.prepare(preset, Where(here, here, here / "cache", "cuda"), Listening())
    taken = steps.create_steps(trainer.prepare_steps(job), steps.StepMode("graph", ""))
    for epoch in (1, 2, 3):
        before = _counted()
        seen: list[tuple[int, int]] = []

        def look(index: int, glance: Callable[[], Any], seen: list[tuple[int, int]] = seen) -> None:
            glance()
            seen.append(_counted())

        trainer.train_epoch(taken, preset.config, epoch, look)
    assert isinstance(taken, steps.CapturedSteps)
    assert taken.graph is not None, "nothing was captured"
    assert seen[-1] == before, f"{seen[-1][0] - before[0]} waits, {seen[-1][1] - before[1]} copies from pageable memory"


def _commands() -> dict[str, Callable[[], None]]:
    """What a user types; RUN is the first one's run."""
    small = ("--dataset", "synthetic", "--backbone", "test_resnet")
    short = ("--epochs", "2", *small, "--batch-size", "100")
    tuned = ("--epochs", "2", *small, "--init", "none", "--image-size", "32", "--set", "data.batch_size=100")
    timed = ("--steps", "2", "--repeats", "1", "--image-size", "32", *small[2:])
    return {
        " ".join(arguments[:3]): partial(_command, *arguments)
        for arguments in (
            ("train", "--preset", "quickstart", *short, "--seeds", "2", "--out", "runs"),
            ("train", "--resume", "RUN"),
            ("train", "--preset", "resnet18-baseline", *short, "--set", "train.precision=fp16"),
            ("train", "--minutes", "1", *short[2:], "--set", "train.ema=0.9"),
            ("distill", "--augment", "flip", "--teacher", "RUN", "--preset", "resnet18-baseline", *short),
            ("distill", "--augment", "crop_flip", "--teacher", "RUN", "--preset", "resnet18-baseline", *short),
            ("finetune-cifar10", "--unfreeze", "layer3", *tuned),
            ("finetune-cifar10", "--no-cache", "--unfreeze", "fc", *tuned, "--bn", "adapt"),
            ("evaluate", "--tta", "RUN"),
            ("bench", "--preset", "finetune-layer4", *timed),
        )
    }


def _command(*arguments: str) -> None:
    from cifar100cli import cli

    runs = sorted(Path("runs/quickstart").glob("*-seed0"))
    if "--resume" in arguments:
        (runs[0] / "result.json").unlink()  # as if it had been stopped before that
    sys.argv = ["cifar100", *(str(runs[0]) if argument == "RUN" else argument for argument in arguments)]
    told, code = io.StringIO(), None
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        try:
            cli.main()
        except SystemExit as leaving:
            code = leaving.code
    assert code == 0, told.getvalue()[-600:]
    assert "cuda:0" in told.getvalue() or arguments[0] == "evaluate", told.getvalue()[-600:]


if __name__ == "__main__":
    main()

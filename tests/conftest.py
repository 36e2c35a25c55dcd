"""Shared fixtures: a small drawn data set, the command line in-process, and full-size pretend CIFAR files."""

import contextlib
import json
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cifar100cli import choosing, cli, console, devices, fetch, interrupts, runs, synthetic
from cifar100cli.augment import Epoch, Policy, flip, in_turn, random_crop
from cifar100cli.config import Preset
from cifar100cli.folders import Where
from cifar100cli.optim import MovingAverage
from cifar100cli.runs import RunDir
from cifar100cli.schema import Config
from cifar100cli.watcher import EpochProgress, StageRow, Watcher
from tests.weather import Server

TINY = (
    *("--dataset", "synthetic", "--backbone", "test_resnet", "--batch-size", "64"),
    *("--set", "train.precision=fp32", "--device", "cpu"),
)

CROP_FLIP = in_turn(random_crop(), flip)  # the usual recipe for CIFAR

# All that augments, at once.
EVERYTHING: dict[str, Any] = {
    "policy": "crop_flip",
    "flip": "alternating",
    "padding_mode": "reflect",
    "auto": "trivialaugment",
    "cutout": 8,
    "erasing": 0.25,
    "mixup": 0.2,
    "cutmix": 1.0,
}


def pytest_configure() -> None:
    """The user's folders and terminal are not for tests, nor for the processes that tests start."""
    folders = ("CIFAR100_DATA_DIR", "CIFAR100_RUNS_DIR", "CIFAR100_CACHE_DIR")
    for name in (*folders, "NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES"):
        os.environ.pop(name, None)
    os.environ["TERM"] = "xterm"  # of a dumb one, Rich knows no colours
    # Tests side by side share the cores, and so do the processes that they start.
    if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
        threads = max(1, _cores() // workers)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)


def _cores() -> int:
    """Those that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes go by parameter and number: what they hold may differ between processes that collect (gzip tells time)."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture(scope="session", autouse=True)
def auto_is_the_cpu() -> Iterator[Callable[[str], torch.device]]:
    """Here `auto` is the CPU, so that the tests see the same bits on every machine; gives what chooses for users.

    Most runs of tests name no device, as users do, and would find a GPU where there is one: other bits each time, and
    a CUDA context for each worker. What `torch.cuda` says of the machine stays as it is, for the tests that name cuda.
    For the whole session, as fixtures of modules train, too. A process that a test starts is told `--device cpu`.
    """
    choose = devices._select
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "_select", lambda name: choose("cpu" if name == "auto" else name))
        yield choose


@pytest.fixture
def auto_is_auto(auto_is_the_cpu: Callable[[str], torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what `auto` is, on a machine that they pretend."""
    monkeypatch.setattr(devices, "_select", auto_is_the_cpu)


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str


Cli = Callable[..., Outcome]


@pytest.fixture(scope="session")
def few_drawings() -> synthetic.Drawn:
    """400 training and 200 test images."""
    return synthetic.draw(train_per_class=4, test_per_class=2)


@pytest.fixture
def small_synthetic(few_drawings: synthetic.Drawn, monkeypatch: pytest.MonkeyPatch) -> synthetic.Drawn:
    """The drawn data set made small, so that a run takes a second."""
    monkeypatch.setattr(synthetic, "draw", lambda: few_drawings)
    return few_drawings


@pytest.fixture
def fewest_synthetic(small_synthetic: synthetic.Drawn, monkeypatch: pytest.MonkeyPatch) -> synthetic.Drawn:
    """32 training and 10 test images, for bf16: a CPU that does not multiply it takes twenty times as long."""
    (images, labels), (test_images, test_labels) = small_synthetic.train, small_synthetic.test
    fewest = replace(small_synthetic, train=(images[:32], labels[:32]), test=(test_images[:10], test_labels[:10]))
    monkeypatch.setattr(synthetic, "draw", lambda: fewest)
    return fewest


@pytest.fixture
def run_cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Cli]:
    """The command line in this process, in an empty folder."""
    handlers = {number: signal.getsignal(number) for number in interrupts.SIGNALS}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["cifar100", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as leaving:
            cli.main()
        captured = capfd.readouterr()
        code = leaving.value.code
        assert isinstance(code, int)
        return Outcome(code, captured.out, captured.err)

    yield run
    console.set_verbosity(console.NORMAL)  # the last command may have been a quiet one
    for number, handler in handlers.items():  # a rank ignores signals on its way out, and so would whom we start
        signal.signal(number, handler)
    wandb = sys.modules.get("wandb")
    if isinstance(wandb, ModuleType):  # the real one keeps what it was told for the rest of the process
        wandb.teardown()


def train(run_cli: Cli, *arguments: str, epochs: int = 2) -> dict[str, Any]:
    """Train a small network on the data set at hand; what `train --json` prints."""
    outcome = run_cli("train", *TINY, "--epochs", str(epochs), "--json", *arguments)
    assert outcome.code == 0, outcome.err
    result: dict[str, Any] = json.loads(outcome.out)
    return result


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    running = Server()
    yield running
    running.close()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits between attempts, which are noted instead of waited."""
    noted: list[float] = []
    monkeypatch.setattr(fetch, "_sleep", noted.append)
    return noted


def make_preset(**sections: dict[str, Any]) -> Preset:
    content: dict[str, Any] = {
        "data": {"dataset": "synthetic", "batch_size": 64},
        "model": {"backbone": "test_resnet"},
        "train": {"epochs": 3, "precision": "fp32"},
    }
    for name, keys in sections.items():
        content[name] = {**content.get(name, {}), **keys}
    return Preset("mine", Config.model_validate(content))


@dataclass(frozen=True)
class Trained:
    """What training moves, without an average and without fp16."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: MovingAverage = field(default_factory=lambda: MovingAverage(nn.Identity(), 0))
    scaler: torch.amp.GradScaler = field(default_factory=lambda: torch.amp.GradScaler("cpu", enabled=False))


def where(tmp_path: Path) -> Where:
    return Where(tmp_path / "data", tmp_path / "runs", tmp_path / "cache", "cpu")


def only_run(tmp_path: Path) -> RunDir:
    (path,) = runs.find_runs(tmp_path / "runs")
    return RunDir.open(path)


def last_run(root: Path, preset: str | None = None) -> RunDir:
    """The run that `--resume last` goes on with; held by nobody any more."""
    with choosing.latest_unfinished(root, preset) as run:
        return run


def epoch_of(count: int, height: int = 32, width: int = 32, generator: torch.Generator | None = None) -> Epoch:
    """An epoch of so many images in their order, to draw for; without a generator, from 0."""
    generator = generator or torch.Generator().manual_seed(0)
    lasting = torch.Generator().manual_seed(generator.initial_seed())
    host = np.random.default_rng(generator.initial_seed())
    return Epoch(torch.arange(count), height, width, 1, generator, lasting, host)


def varied(policy: Policy, images: Tensor, generator: torch.Generator) -> Tensor:
    """The images as a policy changes them."""
    count, _, height, width = images.shape
    return policy.apply(images, *policy.draw(epoch_of(count, height, width, generator)))


def distance_of_distributions(ours: NDArray[Any], theirs: NDArray[Any]) -> float:
    """Kolmogorov and Smirnov's: the largest gap between the two shares of values up to a point."""
    points = np.concatenate([ours, theirs])
    shares = [np.searchsorted(np.sort(values), points, side="right") / len(values) for values in (ours, theirs)]
    return float(np.abs(shares[0] - shares[1]).max())


class Listening(Watcher):
    """A watcher that shows nothing and remembers what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.counted: list[int] = []
        self.shown: list[StageRow] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    @contextlib.contextmanager
    def progress(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        before = sum(self.counted)
        yield self.counted.append
        assert sum(self.counted) - before == total

    def stages(self, rows: Sequence[StageRow]) -> None:
        self.shown = list(rows)


class StopAfter(Listening):
    """Presses Ctrl-C after so many steps."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.left = steps

    def step(self, taken: int, glance: Callable[[], EpochProgress | None]) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.fixture(scope="session")
def pretend_cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with CIFAR-100 and CIFAR-10 of the official format and size, and random content."""
    root = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    fine = [f"class {i:02}" for i in range(100)]

    def write(path: Path, content: object) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(pickle.dumps(content, protocol=2))

    folder = root / "cifar-100-python"
    write(folder / "meta", {"fine_label_names": fine, "coarse_label_names": [f"super {i:02}" for i in range(20)]})
    for name, count in (("train", 50_000), ("test", 10_000)):
        labels = random.permutation(np.arange(count) % 100)
        write(
            folder / name,
            {
                "batch_label": "",
                "filenames": ["x.png"] * count,
                "fine_labels": labels.tolist(),
                "coarse_labels": (labels // 5).tolist(),
                "data": random.integers(0, 256, (count, 3072), np.uint8),
            },
        )
    folder = root / "cifar-10-batches-py"
    write(folder / "batches.meta", {"label_names": fine[:10], "num_vis": 3072, "num_cases_per_batch": 10_000})
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        labels = random.permutation(np.arange(10_000) % 10)
        write(
            folder / name,
            {
                "batch_label": "",
                "labels": labels.tolist(),
                "filenames": ["x.png"] * 10_000,
                "data": random.integers(0, 256, (10_000, 3072), np.uint8),
            },
        )
    return root

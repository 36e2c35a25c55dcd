"""Several processes train as one: shares of batches, batch statistics, whole runs, and a rank that dies."""

import errno
import importlib
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import distributed
from torch.nn import functional as F

from cifar100cli import devices, ranks, runs, workflows
from cifar100cli.datasets import Split
from cifar100cli.errors import CifarError, DivergedError, UsageError
from cifar100cli.loader import DeviceLoader, Preprocessing
from cifar100cli.steps import StepMode
from cifar100cli.trainer import Job
from tests.conftest import CROP_FLIP, Cli, make_preset

CPU = torch.device("cpu")
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}

# ------------------------------------------------------------------------------------------ without processes


@pytest.mark.parametrize(
    ("count", "batch_size", "number", "sizes"),
    [(40, 10, 2, [10] * 4), (43, 10, 3, [10] * 4 + [3]), (42, 10, 3, [10] * 3 + [12]), (9, 100, 4, [9])],
)
def test_shares_make_the_batches_of_one(count: int, batch_size: int, number: int, sizes: list[int]) -> None:
    """To the bit, augmentation included; every image once; a last batch too small for all joins the one before."""
    random = np.random.default_rng(0)
    split = Split(random.integers(0, 256, (count, 3, 32, 32), np.uint8), np.arange(count))

    def loader(**keys: Any) -> DeviceLoader:
        return DeviceLoader(
            split, batch_size, CPU, Preprocessing(32), shuffle=True, policy=CROP_FLIP, smallest_batch=number, **keys
        )

    alone, parts = loader(), [loader(rank=rank, ranks=number) for rank in range(number)]
    assert alone.batch_sizes() == sizes
    for epoch in (1, 2):
        seen = []
        for index, whole in enumerate(alone.epoch(epoch)):
            shares = [list(part.epoch(epoch))[index] for part in parts]
            for name in ("inputs", "labels", "images", "positions"):
                together = torch.cat([getattr(share, name) for share in shares])
                assert torch.equal(together, getattr(whole, name)), name
            weights = [part.loss_weights[index] for part in parts]
            assert weights == [len(share.labels) * number / len(whole.labels) for share in shares]
            seen += whole.labels.tolist()
        assert sorted(seen) == list(range(count))


def test_without_torchrun_there_is_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*TORCHRUN, "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    assert (ranks.rank(), ranks.count(), ranks.local_rank(), ranks.local_count()) == (0, 1, 0, 1)
    assert (ranks.launch(), ranks.restarts()) == (None, 0)
    assert ranks.on_first(lambda: "here") == "here"
    assert not ranks.is_lost(RuntimeError("connection closed by peer"))


def test_what_torch_distributed_says_is_one_line() -> None:
    error = RuntimeError("NCCL error in: x.cpp:1, invalid usage\nLast error:\nDuplicate GPU detected\x1b[31m")
    assert ranks.words_of(error).startswith("NCCL error in: x.cpp:1, invalid usage Last error: Duplicate GPU detected")
    assert "\x1b" not in ranks.words_of(error)
    long = ranks.words_of(RuntimeError("word " * 1000 + "Last error: no room in /dev/shm"))
    assert len(long) <= 600
    assert long.endswith("Last error: no room in /dev/shm")


def test_torchruns_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**TORCHRUN, "TORCHELASTIC_RUN_ID": "mine", "TORCHELASTIC_RESTART_COUNT": "3"}.items():
        monkeypatch.setenv(name, value)
    assert (ranks.rank(), ranks.count(), ranks.local_rank(), ranks.local_count()) == (1, 2, 1, 2)
    assert ranks.launch() == "mine"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # torchrun's word for every launch without a name
    assert str(os.getppid()) in str(ranks.launch())
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UsageError, match="WORLD_SIZE = two"):
        ranks.count()


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "LOCAL_RANK"])
def test_variables_that_are_no_numbers_end_any_command_in_a_line(
    run_cli: Cli, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for key, value in {**TORCHRUN, name: "2(x2)"}.items():
        monkeypatch.setenv(key, value)
    outcome = run_cli("presets")
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert f"{name} = 2(x2): torchrun sets this to a whole number" in outcome.err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"MASTER_PORT": "abc"}, "MASTER_PORT|invalid literal"),
        ({"MASTER_PORT": "99999"}, "99999|port"),
        ({"MASTER_PORT": ""}, "MASTER_PORT|invalid literal"),
        ({"RANK": "5"}, "RANK = 5 of WORLD_SIZE = 2"),
        ({"WORLD_SIZE": "0"}, "RANK = 0 of WORLD_SIZE = 0"),
    ],
)
def test_variables_that_are_not_torchruns(monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], words: str) -> None:
    for name, value in {**TORCHRUN, "RANK": "0", "LOCAL_RANK": "0", **changes}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=words):
        ranks.start()


@pytest.mark.parametrize(
    ("gpus", "backend"), [(0, "gloo"), (1, "gloo"), (2, "cpu:gloo,cuda:nccl"), (8, "cpu:gloo,cuda:nccl")]
)
def test_nccl_is_for_machines_with_a_gpu_for_each_rank(
    monkeypatch: pytest.MonkeyPatch, gpus: int, backend: str
) -> None:
    """It begins as the ranks meet, and on GPUs that are not there it fails, also where all ranks share the CPU."""
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    asked: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(distributed, "is_nccl_available", lambda: True)
    module = importlib.import_module("torch.distributed.rendezvous")  # hidden by its function of this name
    store = distributed.HashStore()  # type: ignore[attr-defined]
    monkeypatch.setattr(module, "rendezvous", lambda *_, **__: iter([(store, 0, 1)]))
    monkeypatch.setattr(distributed, "init_process_group", lambda backend, **_: asked.append(backend))
    ranks.start()
    assert asked == [backend]


def test_ranks_meet_under_a_prefix_of_their_start_alone() -> None:
    """In one store, where the last start's answers still are, and whoever comes first."""
    store = distributed.HashStore()  # type: ignore[attr-defined]
    for start, first in enumerate((0, 1, 2, 0)):
        with ThreadPoolExecutor(3) as pool:
            early = pool.submit(ranks._of_this_start, store, first, 3)
            with pytest.raises(TimeoutError):
                early.result(0.1)
            others = [pool.submit(ranks._of_this_start, store, number, 3) for number in {0, 1, 2} - {first}]
            met = [future.result(10) for future in (early, *others)]
        assert not any(each.check(["address"]) for each in met), "that of an earlier start"
        met[start % 3].set("address", str(start))
        assert [each.get("address") for each in met] == [str(start).encode()] * 3


@pytest.mark.usefixtures("auto_is_auto")
def test_every_rank_has_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.select_device("auto") == devices.select_device("cpu") == CPU
    with pytest.raises(UsageError, match="2 ranks on this machine and 0 CUDA devices"):
        devices.select_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(devices, "_try", lambda device: None)
    assert devices.select_device("auto") == devices.select_device("cuda") == torch.device("cuda:1")
    for name in ("cuda:0", "mps"):
        with pytest.raises(UsageError, match="every rank has a device of its own"):
            devices.select_device(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match="--nproc-per-node 1"):
        devices.select_device("auto")


@pytest.mark.parametrize("arguments", [("train", "--preset", "nope"), ("presets",), ("report", "nowhere")])
def test_other_ranks_leave_the_talking_to_the_first(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "cifar100cli", *arguments],
        env={**os.environ, **TORCHRUN},
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
        check=False,
    )
    assert (finished.stdout, finished.stderr) == ("", "")
    assert finished.returncode == (2 if arguments[0] == "train" else 0)


LEAVE = """
from cifar100cli import errors, exits

def fail(**_):
    raise errors.DivergedError("the loss was nan")

exits.leave_with(fail)
"""


@pytest.mark.parametrize(("rank", "told"), [("0", "error: the loss was nan\n"), ("2", "")])
def test_a_loss_that_is_no_number_is_told_once(tmp_path: Path, rank: str, told: str) -> None:
    """By the first of all ranks; the third is the first of its machine."""
    finished = subprocess.run(
        [sys.executable, "-c", LEAVE],
        env={**os.environ, **TORCHRUN, "RANK": rank, "LOCAL_RANK": "0", "WORLD_SIZE": "4"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert (finished.returncode, finished.stderr) == (4, told)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (DivergedError("the loss was nan"), r"the loss was nan; the run is \S+; try a lower --lr, .*"),
        (MemoryError(), r"out of memory with 64 images .*; the run is \S+"),
        (OSError(errno.ENOSPC, "No space left", "file"), r"file: No space left; the run is \S+"),
        (
            RuntimeError("Connection closed by peer"),
            r"another rank failed, .*; torchrun --max-restarts goes on by itself; the run is \S+",
        ),
    ],
)
def test_other_ranks_say_nothing_of_what_is_in_the_runs_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    """Which is not there on their machine: nothing is gone, and no epoch is lost."""
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    config = make_preset(data={"batch_size": 64}).config
    job = cast(Job, SimpleNamespace(config=config, precision="fp32", step_mode=StepMode("off", "")))
    with (
        pytest.raises(CifarError) as told,
        workflows._in_words(job, runs.RunDir(tmp_path / "elsewhere")),
    ):
        raise error
    assert re.fullmatch(words, str(told.value))


# --------------------------------------------------------------------------------------------- two processes


def launch(tmp_path: Path, script: str, *arguments: str, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    (tmp_path / "driver.py").write_text(script)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CIFAR100_")}
    environment |= {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *("--max-restarts", str(restarts), str(tmp_path / "driver.py"), *arguments),
        ],
        env=environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=200,
        check=False,
    )


CHECKS = """
import contextlib
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

from cifar100cli import batch_norm, ranks
from cifar100cli.errors import DataError

folder, rank = Path(sys.argv[1]), ranks.rank()
found = {"value": ranks.on_first(lambda: {"rank": ranks.rank()})}

def fail():
    raise DataError("broken")

try:
    ranks.on_first(fail)
except DataError as error:
    found["error"] = str(error)
with ranks.one_ahead():
    found["was there"] = (folder / "fetched").exists()
    (folder / "fetched").touch()
total = torch.tensor([rank + 1.0])
ranks.sum_up(total)
found["sum"] = total
handed = torch.full((2,), float(rank))
ranks.hand_out(handed, owner=1)
found["handed out"] = handed
found["greatest"] = ranks.greatest(5 - rank)

norms = []
for case in torch.load(folder / "cases"):
    share = slice(0, 5) if rank == 0 else slice(5, None)
    tensors = [case["input"][share], case["weight"], case["bias"]]
    inputs, weight, bias = (tensor.clone().requires_grad_() for tensor in tensors)
    mean, variance = torch.zeros(len(weight)), torch.ones(len(weight))
    with batch_norm.synchronised_on_host(contextlib.nullcontext)():
        output = F.batch_norm(inputs, mean, variance, weight, bias, True, 0.1, 1e-5)
        still = F.batch_norm(inputs, mean, variance, weight, bias, False, 0.1, 1e-5)
    output.backward(case["gradient"][share])
    norms.append([output.detach(), mean, variance, inputs.grad, weight.grad, bias.grad, still.detach()])
found["norms"] = norms
torch.save(found, folder / f"found{rank}")
ranks.leave()
"""


@pytest.fixture(scope="module")
def cases() -> list[dict[str, torch.Tensor]]:
    """Inputs whose mean is far from 0, where the squares of values would lose every digit of the variance."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for shape in ((12, 5), (12, 5, 4, 4)):
        inputs = torch.randn(shape, generator=generator) + 1000
        weight, bias = torch.rand(5, generator=generator) + 0.5, torch.randn(5, generator=generator)
        gradient = torch.randn(shape, generator=generator)
        inputs[:, 0] = 0  # of a unit that is silent: no variance to divide by
        made.append({"input": inputs, "weight": weight, "bias": bias, "gradient": gradient})
    return made


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, cases: list[dict[str, torch.Tensor]]) -> list[dict[str, Any]]:
    """What each of two ranks saw."""
    folder = tmp_path_factory.mktemp("checks")
    torch.save(cases, folder / "cases")
    finished = launch(folder, CHECKS, str(folder))
    assert finished.returncode == 0, finished.stderr
    return [torch.load(folder / f"found{rank}") for rank in range(2)]


def test_ranks_hear_the_first_and_each_other(found: list[dict[str, Any]]) -> None:
    assert [each["value"] for each in found] == [{"rank": 0}] * 2
    assert [each["error"] for each in found] == ["broken"] * 2
    assert [each["was there"] for each in found] == [False, True]
    assert [each["sum"].item() for each in found] == [3.0, 3.0]
    assert [each["handed out"].tolist() for each in found] == [[1.0, 1.0]] * 2
    assert [each["greatest"] for each in found] == [5, 5]


def test_batch_norm_over_ranks_is_batch_norm(found: list[dict[str, Any]], cases: list[dict[str, torch.Tensor]]) -> None:
    """Against float64 on the whole batch; the ranks have 5 and 7 of its 12 images."""
    for index, case in enumerate(cases):
        inputs, weight, bias = (case[name].double().requires_grad_() for name in ("input", "weight", "bias"))
        mean, variance = (made(5, dtype=torch.float64) for made in (torch.zeros, torch.ones))
        output = F.batch_norm(inputs, mean, variance, weight, bias, True, 0.1, 1e-5)
        still = F.batch_norm(inputs, mean, variance, weight, bias, False, 0.1, 1e-5)
        output.backward(case["gradient"].double())  # type: ignore[no-untyped-call]
        one, other = (each["norms"][index] for each in found)
        expected = [output, mean, variance, inputs.grad, weight.grad, bias.grad, still]
        for name, reference, ours, theirs in zip(
            ("output", "mean", "variance", "gradient", "of weight", "of bias", "eval"),
            expected,
            one,
            other,
            strict=True,
        ):
            assert reference is not None
            if name in ("output", "gradient", "eval"):
                together = torch.cat([ours, theirs])
            elif name in ("of weight", "of bias"):
                together = ours + theirs
            else:
                assert torch.equal(ours, theirs)
                together = ours
            # The inputs themselves, around 1,000, have a rounding of 6e-5.
            torch.testing.assert_close(together.double(), reference.detach(), rtol=1e-3, atol=1e-3)


TRAIN = """
import os
import sys
import time
from dataclasses import replace

from cifar100cli import cli, synthetic, trainer

drawn = synthetic.draw(train_per_class=4, test_per_class=2)
synthetic.draw = lambda: drawn
train_epoch = trainer.train_epoch

def dying(steps, config, epoch, observer):
    if epoch == 2:
        os._exit(9)
    return train_epoch(steps, config, epoch, observer)

fate = sys.argv.pop(1)
if fate == "other rate" and os.environ["RANK"] == "1":
    sys.argv += ["--lr", "0.5"]
elif fate == "other images" and os.environ["RANK"] == "1":
    drawn = replace(drawn, train=(255 - drawn.train[0], drawn.train[1]))
elif fate == "die" and os.environ["RANK"] == "1":
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        trainer.train_epoch = dying
    else:  # late, so that rank 0 looks for the address of this rank while there is only that of the dead one
        time.sleep(2)
elif os.environ["RANK"] == "0":  # as on another machine, which may not count a failure on that one
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "0"
cli.main()
"""

ARGUMENTS = (
    *("train", "--dataset", "synthetic", "--backbone", "test_resnet", "--batch-size", "64", "--epochs", "3"),
    *("--lr", "1e-4", "--augment", "crop_flip", "--device", "cpu", "--out", "runs", "--json"),
    *("--set", "train.precision=fp32", "--set", "train.select=best_test"),
    *("--set", "data.val_fraction=0"),
)


@dataclass(frozen=True)
class Trained:
    """What a launch left behind."""

    code: int
    out: str
    err: str
    folder: Path

    @property
    def run(self) -> runs.RunDir:
        (path,) = runs.find_runs(self.folder / "runs")
        return runs.RunDir.open(path)


def trained(folder: Path, fate: str, *more: str, restarts: int = 0) -> Trained:
    finished = launch(folder, TRAIN, fate, *ARGUMENTS, *more, restarts=restarts)
    return Trained(finished.returncode, finished.stdout, finished.stderr, folder)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run of two ranks."""
    return trained(tmp_path_factory.mktemp("unbroken"), "live")


@pytest.mark.usefixtures("small_synthetic")
def test_two_ranks_train_as_one(unbroken: Trained, run_cli: Cli, tmp_path: Path) -> None:
    assert unbroken.code == 0, unbroken.err
    result = json.loads(unbroken.out)  # and nothing else on stdout
    assert result["ranks"] == 2
    alone = run_cli(*ARGUMENTS)
    assert alone.code == 0, alone.err
    (path,) = runs.find_runs(tmp_path / "runs")
    ours, theirs = unbroken.run.metrics(), runs.RunDir(path).metrics()
    assert [row["images"] for row in ours] == [row["images"] for row in theirs] == [400] * 3
    for key in ("train_loss", "test_loss"):
        assert [row[key] for row in ours] == pytest.approx([row[key] for row in theirs], rel=1e-4), key
    for key in ("train_top1", "test_top1", "test_top5"):
        assert [row[key] for row in ours] == pytest.approx([row[key] for row in theirs], abs=0.011), key
    single = json.loads(alone.out)
    assert result["test"]["loss"] == pytest.approx(single["test"]["loss"], rel=1e-4)
    assert {file.name for file in unbroken.run.path.iterdir()} == set(runs.FILES) - {runs.DIVERGED}


@pytest.mark.usefixtures("small_synthetic")
def test_two_ranks_climb_as_one(run_cli: Cli, tmp_path: Path) -> None:
    """SAM's way up is that of all ranks' gradients, and Muon orthogonalises their mean."""
    more = ("--optimizer", "muon", "--set", "optimizer.sam_rho=0.1", "--epochs", "2")
    (tmp_path / "together").mkdir()
    together = trained(tmp_path / "together", "live", *more)
    assert together.code == 0, together.err
    alone = run_cli(*ARGUMENTS, *more)
    assert alone.code == 0, alone.err
    (path,) = runs.find_runs(tmp_path / "runs")
    ours, theirs = together.run.metrics(), runs.RunDir(path).metrics()
    assert len(ours) == 2
    for key in ("train_loss", "test_loss"):
        assert [row[key] for row in ours] == pytest.approx([row[key] for row in theirs], rel=1e-4), key


def test_what_is_measured_is_what_is_kept(tmp_path: Path) -> None:
    """Where each rank has batch statistics of its own, too, and an average of them."""
    apart = ("--set", "train.sync_batch_norm=false", "--epochs", "2", "--set", "train.ema=0.9")
    ended = trained(tmp_path, "live", *apart)
    assert ended.code == 0, ended.err
    result = json.loads(ended.out)
    row = ended.run.metrics()[result["best"]["epoch"] - 1]
    assert row["test_loss"] == pytest.approx(result["test"]["loss"], rel=1e-6)
    assert (row["test_top1"], row["test_top5"]) == (result["test"]["top1"], result["test"]["top5"])


def test_one_image_for_batch_norm_is_refused(tmp_path: Path) -> None:
    ended = trained(tmp_path, "live", "--batch-size", "3", "--set", "train.sync_batch_norm=false")
    assert ended.code != 0
    assert "batch norm cannot train on one image at a time; use at least 4" in ended.err
    assert ended.err.count("Traceback") == 1  # torchrun's own


@pytest.mark.parametrize(
    ("fate", "words"),
    [
        ("other rate", r"error: rank 1 has optimizer\.lr = 0\.5, and rank 0 0\.0001: ranks train one model, .*"),
        (
            "other images",
            r"error: rank 1 has data_sha256 = (\w{64}), and rank 0 (?!\1)\w{64}: ranks train one model, .*",
        ),
    ],
)
def test_ranks_that_were_started_otherwise_are_refused(tmp_path: Path, fate: str, words: str) -> None:
    """As by a preset's file, or a data set, that a machine has another version of: it would be nobody's run."""
    ended = trained(tmp_path, fate)
    assert ended.code != 0
    (told,) = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert re.fullmatch(words, told)
    assert not runs.find_runs(tmp_path / "runs")


def test_a_rank_that_dies_ends_the_others_with_a_word(tmp_path: Path) -> None:
    dead = trained(tmp_path, "die")
    assert dead.code != 0
    told = [line for line in dead.err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    # Of the lost connection; or, on a busy machine, of the signal by which torchrun ends the others.
    assert "another rank failed" in told[0] or "interrupted" in told[0]
    assert "1 of 3 epochs are done" in told[0]
    assert f"--resume runs/quickstart/{dead.run.path.name}" in told[0]
    assert "cifar100cli/" not in dead.err, "no traceback through our code"
    assert len(dead.run.metrics()) == 1
    assert load_file(dead.run.path / runs.MODEL)


def test_torchrun_starts_again_and_the_run_goes_on(tmp_path: Path, unbroken: Trained) -> None:
    """In the same folder, and to the bits of the run in which nobody died."""
    broken = trained(tmp_path, "die", restarts=1)
    assert broken.code == 0, broken.err
    assert "started again by torchrun (restart 1)" in broken.err
    assert "going on with epoch 2" in broken.err
    assert [row["epoch"] for row in broken.run.metrics()] == [1, 2, 3]
    assert broken.run.complete
    for name in (runs.MODEL, runs.STATE):
        assert (broken.run.path / name).read_bytes() == (unbroken.run.path / name).read_bytes(), name

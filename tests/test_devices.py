"""What a device is chosen for, and what the process does then."""

import ctypes
import functools
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cifar100cli import devices, evaluation, jobs, machine
from cifar100cli.checkpoint import Checkpoint
from cifar100cli.errors import CifarError, UsageError
from cifar100cli.loader import Features, Preprocessing
from cifar100cli.models import create_model
from tests.conftest import Listening, make_preset, where

KEPT = """
import sys, torch
from cifar100cli import devices

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

if sys.argv[1] == "selected":
    devices.select_device("cpu")
blocks = [torch.ones(4 << 20) for _ in range(8)]
full = resident()
del blocks
print(full - resident())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc's alone")
def test_freed_memory_stays_with_the_process() -> None:
    """Of 128 MB in blocks of 16, hardly any goes back once the CPU was chosen, and without that nearly all."""
    given_back = {
        how: int(subprocess.run([sys.executable, "-c", KEPT, how], capture_output=True, check=True, text=True).stdout)
        for how in ("selected", "plain")
    }
    assert given_back["selected"] < 10e6
    assert given_back["plain"] > 80e6


FORGOTTEN = """
import torch
from cifar100cli import devices

cpu = devices.select_device("cpu")
block = torch.ones(64 << 20)
del block
before = devices.peak_memory(cpu)
devices.forget_peak_memory(cpu)
print(before - devices.peak_memory(cpu))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak is the process's own")
def test_the_peak_of_a_run_is_not_that_of_the_one_before() -> None:
    """Of 268 MB in use before, most are forgotten."""
    run = subprocess.run([sys.executable, "-c", FORGOTTEN], capture_output=True, check=True, text=True)
    assert int(run.stdout) > 200e6


def test_the_peak_on_a_gpu_is_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured step holds what it computes in, which nothing else can use; what a run before left is given back."""
    held = {"run before": 5, "run": 3}
    peak = [sum(held.values())]
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: held.pop("run before"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peak.append(sum(held.values())))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: peak[-1])
    gpu = torch.device("cuda")
    assert devices.peak_memory(gpu) == 8
    devices.forget_peak_memory(gpu)
    assert devices.peak_memory(gpu) == 3


def test_a_peak_that_the_system_does_not_tell_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an Apple GPU, whose memory is not the process's; and on Windows, which has neither /proc nor getrusage."""
    assert devices.peak_memory(torch.device("mps")) is None
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "")
    monkeypatch.setitem(sys.modules, "resource", None)
    assert devices.peak_memory(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("cpu", torch.channels_last), ("cuda", torch.channels_last), ("mps", torch.contiguous_format)],
)
def test_apples_gpu_alone_takes_images_plane_by_plane(kind: str, expected: torch.memory_format) -> None:
    """PyTorch's gradients of batch norms are wrong there in the other layout (pytorch#175189)."""
    assert devices.memory_format(torch.device(kind)) is expected


@pytest.mark.usefixtures("small_synthetic")
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_weights_and_images_lie_as_the_device_takes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: torch.memory_format
) -> None:
    monkeypatch.setattr(devices, "memory_format", lambda _: layout)
    preset = make_preset(data={"image_size": 48})
    job = jobs.prepare(preset, where(tmp_path), Listening())
    saved = Checkpoint(tmp_path, create_model(preset.config, classes=3), job.card, preset.config)
    model, *_ = evaluation.ready(saved, where(tmp_path))
    enlarged, as_they_are = next(iter(job.loaders.train.epoch(1))).inputs, Preprocessing(32)(torch.zeros(2, 3, 32, 32))
    weights = [weight for network in (job.model, model) for weight in network.parameters() if weight.ndim == 4]
    kept = Features(torch.zeros(1, 3, 4, 4, 8), torch.device("cpu"), torch.float32)
    looked_up = kept(torch.zeros(2, dtype=torch.int64), torch.arange(2))
    assert looked_up.shape == (2, 8, 4, 4)
    inputs = (enlarged, as_they_are, looked_up)
    assert all(tensor.is_contiguous(memory_format=layout) for tensor in (*inputs, *weights))


@pytest.mark.parametrize(("status", "expected"), [(0, "Apple M5 of -n machdep.cpu.brand_string"), (1, None)])
def test_apples_processors_have_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, expected: str | None
) -> None:
    (tmp_path / "sysctl").write_text(f'#!/bin/sh\necho "Apple M5 of $*"\nexit {status}\n')
    (tmp_path / "sysctl").chmod(0o755)
    otherwise = machine.device_name(torch.device("cpu"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "darwin")
    assert machine.device_name(torch.device("cpu")) == (expected or otherwise)


def test_what_git_says_may_be_in_any_encoding() -> None:
    """With core.quotePath off, as where names are Japanese, it tells names of files as they are."""
    program = r"import sys; sys.stdout.buffer.write(b'?? \xff.md\n')"
    assert machine._said_by(sys.executable, "-c", program) == "?? \ufffd.md"


@pytest.mark.usefixtures("auto_is_auto")
@pytest.mark.parametrize(("apple", "expected"), [(False, "cpu"), (True, "mps")])
def test_without_cuda_auto_is_apples_gpu_or_the_cpu(
    monkeypatch: pytest.MonkeyPatch, apple: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: apple)
    assert devices.select_device("auto") == torch.device(expected)


@pytest.mark.usefixtures("auto_is_auto")
def test_the_chosen_gpu_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose streams, events and waits PyTorch takes where none is named."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(devices, "_try", lambda device: None)
    for name in ("auto", "cuda", "cuda:1"):
        assert devices.select_device(name) == current[-1]
    assert current == [torch.device("cuda:0"), torch.device("cuda:0"), torch.device("cuda:1")]


@pytest.fixture
def old_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """A GPU on which every kernel fails as it is told to; gives the kernels that were asked for."""

    def fails_with(words: str) -> list[str]:
        tried: list[str] = []

        def ones(*_: object, device: torch.device) -> None:
            tried.append(str(device))
            raise RuntimeError(words)

        monkeypatch.setattr(torch, "ones", ones)
        return tried

    monkeypatch.setattr(devices, "_try", functools.cache(devices._try.__wrapped__))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce GTX 1080")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    return fails_with


@pytest.mark.usefixtures("auto_is_auto")
@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_a_gpu_that_pytorch_has_no_kernels_for_is_told(old_gpu: Callable[[str], list[str]], name: str) -> None:
    """In one line, with what is there and what to do, before anything is loaded."""
    old_gpu("CUDA error: no kernel image is available for execution on the device\nCompile with `TORCH_USE_CUDA_DSA`")
    with pytest.raises(CifarError) as refusal:
        devices.select_device(name)
    assert str(refusal.value) == (
        f"PyTorch {torch.__version__} cannot compute on cuda:0 (NVIDIA GeForce GTX 1080, compute capability 6.1): CUDA "
        "error: no kernel image is available for execution on the device; install one that is built for this GPU "
        "(README, Installing), or use --device cpu"
    )


def test_a_full_gpu_is_not_taken_for_an_old_one(old_gpu: Callable[[str], list[str]]) -> None:
    old_gpu("CUDA error: out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        devices.select_device("cuda")


def test_a_gpu_is_tried_once(old_gpu: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """And after a failure again: it may be another program's, and over."""
    tried, zeros, waits = old_gpu("CUDA error: the device is busy"), torch.zeros(1), list[torch.device]()
    with pytest.raises(RuntimeError, match="the device is busy"):  # no other PyTorch would help
        devices.select_device("cuda")
    assert tried == ["cuda:0"]
    monkeypatch.setattr(torch, "ones", lambda *_, device: zeros)
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    for _ in range(2):
        devices.select_device("cuda")
    assert waits == [torch.device("cuda:0")]


@pytest.mark.parametrize(
    ("cuda", "hip", "words"),
    [
        (None, None, "is built without CUDA (README, Installing, says where one with it is)"),
        ("13.0", None, "PyTorch finds no CUDA device here (is there a GPU, and is its driver recent enough?)"),
        (None, "7.0", "PyTorch finds no CUDA device here (is there a GPU, and is its driver recent enough?)"),
    ],
)
def test_why_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch, cuda: str | None, hip: str | None, words: str) -> None:
    """PyPI's wheels for Windows have no CUDA; a driver that is too old looks like none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    with pytest.raises(UsageError) as refusal:
        devices.select_device("cuda")
    assert words in str(refusal.value)
    assert str(refusal.value).endswith("; --device auto takes what there is")


def products() -> list[object]:
    """How PyTorch multiplies float32, by the newer names and, where it tells, by the older ones."""

    def told(read: Callable[[], object]) -> object:
        try:
            return read()
        except RuntimeError:  # set by the newer names
            return "unknown"

    backends: Any = torch.backends
    newer = (
        *(backends, backends.cuda.matmul, backends.cudnn, backends.cudnn.conv),
        *(backends.mkldnn.matmul, backends.mkldnn.conv),
    )
    older = (
        torch.get_float32_matmul_precision,
        lambda: torch.backends.cudnn.allow_tf32,
        lambda: torch.backends.cuda.matmul.allow_tf32,
    )
    return [one.fp32_precision for one in newer] + [told(read) for read in older]


BACKENDS: Any = torch.backends


@pytest.fixture
def untouched() -> Iterator[None]:
    """As PyTorch begins, but that convolutions are no exception; and so again afterwards, for the next tests."""
    begin()
    yield
    begin()


def begin() -> None:
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    for one in (*(BACKENDS, BACKENDS.cuda.matmul, BACKENDS.cudnn), *(BACKENDS.mkldnn.matmul, BACKENDS.mkldnn.conv)):
        one.fp32_precision = "none"
    torch._C._set_fp32_precision_setter("mkldnn", "all", "none")  # what `torch.backends.mkldnn.flags` leaves written


def set_for_all() -> None:
    BACKENDS.fp32_precision = "tf32"


def set_for_some() -> None:
    BACKENDS.cudnn.conv.fp32_precision = "tf32"
    torch.set_float32_matmul_precision("medium")


def set_by_an_older_name() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(
    "set_before",
    [
        lambda: None,
        lambda: torch.set_float32_matmul_precision("high"),
        set_for_all,
        set_for_some,
        set_by_an_older_name,
    ],
)
def test_float32_is_float32_whatever_was_set_before(set_before: Callable[[], None]) -> None:
    """TF32 has 10 bits of 23. No name contradicts another, for the compiler reads the older ones."""
    exact = ["ieee"] * 6 + ["highest", False, False]
    set_before()
    before = products()
    with devices.exact_float32:
        assert products() == exact
        with devices.exact_float32:
            assert products() == exact
        assert products() == exact
    assert products() == before
    devices.select_device("cpu")  # for good: a command is the only one in its process
    assert products() == exact


@pytest.mark.usefixtures("untouched")
def test_what_follows_the_setting_for_all_follows_it_afterwards() -> None:
    set_for_all()
    with devices.exact_float32:
        pass
    for value in ("ieee", "tf32"):
        BACKENDS.fp32_precision = value
        assert (BACKENDS.mkldnn.matmul.fp32_precision, BACKENDS.mkldnn.conv.fp32_precision) == (value, value)


@pytest.mark.usefixtures("untouched")
def test_of_several_threads_the_last_one_brings_the_settings_back() -> None:
    torch.set_float32_matmul_precision("high")
    entered, may_leave = threading.Event(), threading.Event()

    def other() -> None:
        with devices.exact_float32:
            entered.set()
            may_leave.wait(10)

    thread = threading.Thread(target=other)
    with devices.exact_float32:
        thread.start()
        assert entered.wait(10)
    assert torch.get_float32_matmul_precision() == "highest"
    may_leave.set()
    thread.join()
    assert torch.get_float32_matmul_precision() == "high"


def test_float32_is_float32_under_nvidias_variable() -> None:
    script = (
        "import torch; from cifar100cli import devices; print(torch.backends.cuda.matmul.allow_tf32); "
        "devices.select_device('cpu'); print(torch.backends.cuda.matmul.allow_tf32)"
    )
    told = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"},
        capture_output=True,
        check=True,
        text=True,
    )
    assert told.stdout.split() == ["True", "False"]


@pytest.mark.parametrize("before", [[], [0], [2]])
def test_the_current_gpu_is_as_before(monkeypatch: pytest.MonkeyPatch, before: list[int]) -> None:
    """Or the first, where CUDA begins within."""
    current = list(before)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: bool(current))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    with devices.current_gpu_kept():
        pass
    assert current == before * 2
    with devices.current_gpu_kept():
        torch.cuda.set_device(1)
    assert current[-1] == (before or [0])[0]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            MemoryError(),
            "out of memory: lower --batch-size or --image-size where the command has them, or name another",
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "out of memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
            "out of memory, or a library that does not work (CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling",
        ),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "out of memory"),
        (RuntimeError("CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`"), "out of memory"),
        (RuntimeError("miopenStatusAllocFailed"), "out of memory"),
        (RuntimeError("Unable to find a valid cuDNN algorithm to run convolution"), "out of memory"),
        (
            NotImplementedError(
                "The operator 'aten::cummin' is not currently implemented for the MPS device. If you want this op ..."
            ),
            "PyTorch has no aten::cummin for Apple's GPUs: use --device cpu, or set",
        ),
        (
            RuntimeError("x_backward_cuda does not have a deterministic implementation, but you set 'torch.use_...'"),
            "deterministic kernels are asked for (train.deterministic = true), and PyTorch has no deterministic x_back",
        ),
    ],
)
def test_what_a_user_can_do_about(error: BaseException, words: str) -> None:
    assert str(devices.in_words(error)).startswith(words)


def test_what_is_a_mistake_of_ours_has_no_words() -> None:
    mistake = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    assert devices.in_words(mistake) is None
    assert devices.failure(mistake) is None


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            torch.AcceleratorError("CUDA error: unspecified launch failure\nadvice"),
            "CUDA error: unspecified launch failure",
        ),
        (torch.AcceleratorError(""), "AcceleratorError"),
        (RuntimeError("HIP error: invalid device function"), "HIP error: invalid device function"),
        (torch.AcceleratorError("CUDA error: out of memory"), None),
    ],
)
def test_a_device_that_fails_says_so(error: RuntimeError, words: str | None) -> None:
    assert devices.failure(error) == (words and f"the device failed ({words})")


def with_room_for(rows: int, asked: list[int]) -> Callable[[slice], torch.Tensor]:
    """Twice what stands in each row, from a GPU that has no memory for more rows at once."""

    def compute(portion: slice) -> torch.Tensor:
        asked.append(portion.stop - portion.start)
        if asked[-1] > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return 2 * torch.arange(100)[portion]

    return compute


def test_what_a_gpu_has_no_memory_for_is_halved_until_it_has() -> None:
    """And what fits is remembered."""
    portions, asked = devices.Portions(torch.device("cuda"), 60), list[int]()
    for rows, tried in (
        (slice(0, 60), [60, 30, 15, 15, 15, 15]),
        (slice(60, 100), [15, 15, 10]),
        (slice(7, 7), [0]),  # a rank's share of few images
    ):
        asked.clear()
        found = [*portions.of(rows, with_room_for(20, asked))]
        assert asked == tried
        expected = [*range(rows.start, rows.stop)]
        assert [row for portion, _ in found for row in range(portion.start, portion.stop)] == expected
        assert torch.cat([values for _, values in found]).tolist() == [2 * row for row in expected]


@pytest.mark.parametrize(("device", "room", "tried"), [("cuda", 0, [4, 2, 1]), ("cpu", 3, [4])])
def test_what_no_portion_fits_into_is_out_of_memory(device: str, room: int, tried: list[int]) -> None:
    """On a CPU at once: a run's bits hang on the size of its products."""
    asked: list[int] = []
    with pytest.raises(torch.OutOfMemoryError):
        [*devices.Portions(torch.device(device), 4).of(slice(0, 8), with_room_for(room, asked))]
    assert asked == tried


def test_other_errors_are_no_lack_of_memory() -> None:
    asked: list[slice] = []

    def compute(rows: slice) -> torch.Tensor:
        asked.append(rows)
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        [*devices.Portions(torch.device("cuda"), 4).of(slice(0, 8), compute)]
    assert asked == [slice(0, 4)]

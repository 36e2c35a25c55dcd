"""What a run computes on, in which precision, and how much memory it takes there."""

import contextlib
import ctypes
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cifar100cli import depthwise, ranks
from cifar100cli.bounded import one_line
from cifar100cli.errors import CifarError, UsageError
from cifar100cli.schema import Config
from cifar100cli.shared import Shared

Cast = Callable[[], AbstractContextManager[object]]  # a context for a forward pass

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of `train.precision`
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h
TENSOR_CORES = (7, 0)  # the compute capability from which on CUDA devices have some for fp16
# But for the small ones of 7.5, on which fp16 is slow, and convolutions are known to give NaN.
_WITHOUT_TENSOR_CORES = re.compile(r"\b(GTX 16\d\d|MX[45]50|T[456]00|T550|T[12]000|T1200)\b")
_BF16_OF_AMD = re.compile("gfx(908|90a|94|95|11|12)")  # MI100 and newer, RX 7000 and newer


def select_device(name: str) -> torch.device:
    """`auto` is CUDA, then Apple's MPS, then the CPU.

    Raises `UsageError` for a device that is not here, and `CifarError` for one that this PyTorch cannot compute on.
    Where it is the CPU, the process keeps the memory that tensors leave, for the next ones. From here on, float32 is
    float32 on every device.
    """
    device = _select(name)
    _round_nowhere()
    if device.type == "cpu":
        _keep_memory()
    if device.type == "cuda":
        # Read once, at the first matrix product of the process: too late for a deterministic run after another one.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.cuda.set_device(device)  # streams, events and waits are those of the current device
        _try(device)
    return device


_NO_KERNELS = re.compile("no kernel image|invalid device function|not compatible")


@functools.cache
def _try(device: torch.device) -> None:
    """Run a kernel on a CUDA device, once: whether PyTorch was built with any for it, no question to it tells."""
    try:
        torch.ones(1, device=device).add_(1)
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        if not _NO_KERNELS.search(str(error)):
            raise
        major, minor = torch.cuda.get_device_capability(device)
        gpu = f"{device} ({torch.cuda.get_device_name(device)}, compute capability {major}.{minor})"
        raise CifarError(  # and no `UsageError`, of which the first rank alone tells: each has a GPU of its own
            f"PyTorch {torch.__version__} cannot compute on {gpu}: {_first_line(error)}; install one that is built for "
            "this GPU (README, Installing), or use --device cpu"
        ) from None


def _first_line(error: BaseException) -> str:
    """What PyTorch says of a device, without its advice to programmers on the lines behind it."""
    return one_line(next(iter(str(error).splitlines()), type(error).__name__))


# What says how float32 is multiplied, each alone and all together; PyTorch's older names are written besides, for one
# that contradicts these is refused when somebody reads it, as the compiler does.
_BACKENDS: Any = torch.backends  # whose attributes are made as it is imported
_PRODUCTS = (
    _BACKENDS,
    _BACKENDS.cuda.matmul,
    _BACKENDS.cudnn,  # read by the compiler's own convolutions
    _BACKENDS.cudnn.conv,
    _BACKENDS.cudnn.rnn,
    _BACKENDS.mkldnn.matmul,
    _BACKENDS.mkldnn.conv,
)


def _round_nowhere() -> None:
    """Let no product of float32 round to TF32's 10 bits, or to bf16's 7, whatever environment and caller say."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    for products in _PRODUCTS:
        products.fp32_precision = "ieee"


@contextlib.contextmanager
def _rounding_nowhere() -> Iterator[None]:
    """Within, no product of float32 rounds; afterwards it is as caller and environment had it."""
    precision: str | None = None
    convolutions: bool | None = None
    with contextlib.suppress(RuntimeError):  # refused where they were set by the newer names, which are enough then
        precision = torch.get_float32_matmul_precision()
    with contextlib.suppress(RuntimeError):
        convolutions = torch.backends.cudnn.allow_tf32
    for_all, *others = _PRODUCTS
    general = for_all.fp32_precision
    for_all.fp32_precision = "none"  # else others tell as their own what they take from it
    products = [general, *(one.fp32_precision for one in others)]
    _round_nowhere()
    try:
        yield
    finally:
        if precision is not None:
            torch.set_float32_matmul_precision(precision)
        if convolutions is not None:
            torch.backends.cudnn.allow_tf32 = convolutions
        for one, before in zip(_PRODUCTS, products, strict=True):
            one.fp32_precision = before


exact_float32 = Shared(_rounding_nowhere)  # these settings are the process's


@contextlib.contextmanager
def current_gpu_kept() -> Iterator[None]:
    """Leave the process's current CUDA device afterwards as it was; as CUDA begins, it is the first."""
    current = torch.cuda.current_device() if torch.cuda.is_initialized() else 0  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.set_device(current)


def _select(name: str) -> torch.device:
    if ranks.local_count() > 1:
        return _device_of_rank(name)
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda:0")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UsageError(f"--device {name}: {_why_none()}; --device auto takes what there is")
        if (device.index or 0) >= torch.cuda.device_count():
            raise UsageError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
        return torch.device("cuda", device.index or 0)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps: PyTorch finds no Apple GPU here; --device auto takes what there is")
    return device


def _why_none() -> str:
    """Why there is no CUDA device, as far as that is known."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"PyTorch {torch.__version__} is built without CUDA (README, Installing, says where one with it is)"
    return "PyTorch finds no CUDA device here (is there a GPU, and is its driver recent enough?)"


def _keep_memory() -> None:
    """Let glibc hold on to memory that was freed, up to the most that was ever in use.

    As it comes, it gives what is large back to the system, and every step begins by getting the same pages anew, one
    by one: a tenth of the time of a ResNet-18 at 32 pixels. Other C libraries have no such call.
    """
    mallopt = _of_libc("mallopt")
    if mallopt is not None:
        for parameter, value in ((M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 64 << 20), (M_MMAP_THRESHOLD, 32 << 20)):
            mallopt(parameter, value)


def _of_libc(name: str) -> Callable[..., int] | None:
    """A function of the C library's own, on a Linux whose library has it."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def _device_of_rank(name: str) -> torch.device:
    """Each rank of a machine has a CUDA device of its own, or all share the CPU."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if name not in ("auto", "cuda"):
        raise UsageError(f"--device {name}: with torchrun every rank has a device of its own: use auto, cuda or cpu")
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if there < ranks.local_count():
        raise UsageError(
            f"--device {name}: {ranks.local_count()} ranks on this machine and {there} CUDA devices: "
            f"use torchrun --nproc-per-node {max(1, there)}, or --device cpu"
        )
    return torch.device("cuda", ranks.local_rank())


def memory_format(device: torch.device) -> torch.memory_format:
    """How images and weights (N, C, H, W) lie in memory: channels last, for which the kernels are the quickest.

    But on MPS, where the backward pass of batch norms fails on these, or is wrong without a word (pytorch#175189).
    """
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def resolve_precision(name: str, device: torch.device, *, fp16: bool = True) -> str:
    """`auto` is bf16 where the hardware multiplies it (CUDA, or a CPU with AVX512-BF16 or AMX), else fp32.

    A CUDA device that has tensor cores, but none for bf16, such as a T4, takes fp16, unless that is ruled out.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        if torch.version.hip is not None:  # of whose devices PyTorch says that all have bf16
            architecture = torch.cuda.get_device_properties(device).gcnArchName
            return "bf16" if _BF16_OF_AMD.match(architecture) else "fp32"
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16"
        return "fp16" if fp16 and _multiplies_fp16(device) else "fp32"
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"
    return "fp32"


def _multiplies_fp16(device: torch.device) -> bool:
    name = torch.cuda.get_device_name(device)
    return torch.cuda.get_device_capability(device) >= TENSOR_CORES and not _WITHOUT_TENSOR_CORES.search(name)


def precision_of(config: Config, device: torch.device) -> str:
    """In which precision a preset computes on a device, to train and to measure: one that its optimizer can take."""
    return resolve_precision(config.train.precision, device, fp16=config.takes_fp16)


def autocast(device: torch.device, precision: str) -> Cast:
    """A context for the forward pass: matrix products in `precision`, weights and sums in float32."""
    if precision == "fp32":
        return depthwise.fp32_on_cpu if device.type == "cpu" else contextlib.nullcontext
    if precision == "bf16" and device.type == "cpu":
        return depthwise.bf16_on_cpu
    return lambda: torch.autocast(device.type, DTYPES[precision])


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Where it is wanted, let PyTorch use only kernels that give the same bits every time, and refuse the others.

    Else it takes those that it takes by itself, whatever the caller has set, which is as it was afterwards.
    """
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = _BACKENDS.cudnn
    tried, same = cudnn.benchmark, cudnn.deterministic
    torch.use_deterministic_algorithms(wanted)
    cudnn.benchmark = cudnn.deterministic = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
        cudnn.benchmark, cudnn.deterministic = tried, same


_NO_MEMORY = re.compile(
    "out of memory|(can't|cannot) allocate memory|(CU|HIP)(BLAS|DNN)_STATUS_(ALLOC_FAILED|NOT_INITIALIZED)"
    "|miopenStatusAllocFailed|valid cuDNN algorithm",
    re.IGNORECASE,
)
_NOT_DETERMINISTIC = re.compile(r"(\S+) does not have a deterministic implementation")
_NOT_ON_MPS = re.compile(r"operator '(\S+)' is not currently implemented for the MPS device")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is what PyTorch or Python say when there is no more memory, on any device."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or _NO_MEMORY.search(str(error)) is not None


def out_of_memory(error: BaseException) -> str:
    """That there is no more memory, with what a library said instead: a broken installation may say the same."""
    plain = isinstance(error, MemoryError) or re.search("memory|alloc", str(error), re.IGNORECASE)
    return "out of memory" if plain else f"out of memory, or a library that does not work ({_first_line(error)})"


def failure(error: BaseException) -> str | None:
    """That a GPU, or its driver, has failed, in its own words, where that is so: it computes nothing any more."""
    failed = isinstance(error, torch.AcceleratorError) or str(error).startswith(("CUDA error:", "HIP error:"))
    return f"the device failed ({_first_line(error)})" if failed and not is_out_of_memory(error) else None


def in_words(error: BaseException) -> str | None:
    """What a user can do about an error of PyTorch's, where that is known."""
    if is_out_of_memory(error):
        advice = "lower --batch-size or --image-size where the command has them, or name another --device"
        return f"{out_of_memory(error)}: {advice}"
    if found := _NOT_DETERMINISTIC.search(str(error)):
        return (
            "deterministic kernels are asked for (train.deterministic = true), and PyTorch has no deterministic "
            f"{found[1]} for this device; leave that out"
        )
    if found := _NOT_ON_MPS.search(str(error)):
        return (
            f"PyTorch has no {found[1]} for Apple's GPUs: use --device cpu, or set PYTORCH_ENABLE_MPS_FALLBACK=1, and "
            "the CPU does that part"
        )
    return None


class Portions:
    """How many rows a device has memory for at once: `most`, and each time that it runs out, half as many."""

    def __init__(self, device: torch.device, most: int) -> None:
        self.device, self.most = device, most

    def of(self, rows: slice, compute: Callable[[slice], Tensor]) -> Iterator[tuple[slice, Tensor]]:
        """What `compute` makes of rows that do not depend on each other, portion by portion.

        Raises what PyTorch raises where there is no memory for a single row. So it does on a CPU for more of them:
        there a run's bits are those of the same products, and these have other ones in other sizes.
        """
        first = rows.start
        while True:
            portion = slice(first, min(first + self.most, rows.stop))
            count = portion.stop - first
            try:
                values = compute(portion)
            except RuntimeError as error:
                if count == 1 or self.device.type == "cpu" or not is_out_of_memory(error):
                    raise
                self.most = (count + 1) // 2
                continue
            yield portion, values
            first = portion.stop
            if first >= rows.stop:
                return


def forget_peak_memory(device: torch.device) -> None:
    """Begin anew with what `peak_memory` says, where that can be done: on CUDA devices, and on Linux."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what is free counts until it is given back
        torch.cuda.reset_peak_memory_stats(device)
        return
    if (trim := _of_libc("malloc_trim")) is not None:
        trim(0)  # likewise
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): from here on, the peak is what is in use now


def peak_memory(device: torch.device) -> int | None:
    """Bytes held at most: by PyTorch on a CUDA device, with the CPU by the whole process in the machine's memory.

    Since `forget_peak_memory`, where that works; None where the system keeps no such figure. What a captured step
    computes in is held, though free, between two.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    if device.type != "cpu":
        return None
    with contextlib.suppress(OSError):  # Linux's own; what it tells of rusage may be the peak of who began the process
        if found := re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()):
            return int(found[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

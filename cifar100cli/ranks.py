"""The processes that train one model together, as torchrun starts them; without torchrun, the one that there is.

Rank 0 alone touches run folders and talks; what it reads there, it hands to the others. They trust each
other and the network between them, as torch.distributed does.
"""

import contextlib
import inspect
import os
import platform
import secrets
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from cifar100cli.bounded import printable
from cifar100cli.errors import CifarError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

T = TypeVar("T")

PATIENCE = timedelta(minutes=30)  # for a rank that is busy with something that only one can do
COLLECTIVE_ERRORS = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "broken pipe")


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, "")
    if not value:
        return default
    if not value.isdecimal():
        raise UsageError(f"{name} = {value}: torchrun sets this to a whole number; unset it, or use torchrun")
    return int(value)


def rank() -> int:
    """This process among all, from 0."""
    return _number("RANK", 0) if count() > 1 else 0


def count() -> int:
    """How many processes there are."""
    return _number("WORLD_SIZE", 1) if "MASTER_ADDR" in os.environ and "RANK" in os.environ else 1


def local_rank() -> int:
    """This process among those on this machine, from 0."""
    return _number("LOCAL_RANK", rank()) if count() > 1 else 0


def local_count() -> int:
    """How many processes there are on this machine."""
    return _number("LOCAL_WORLD_SIZE", count()) if count() > 1 else 1


def launch() -> str | None:
    """A name for the torchrun command that started this process, the same after it has started it again."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    name = os.environ["TORCHELASTIC_RUN_ID"]
    return f"{name} of process {os.getppid()} on {platform.node()}" if name == "none" else name


def restarts() -> int:
    """How many times torchrun has started all ranks again, because one of them had failed.

    Each machine counts for itself, and may leave out a failure on another one.
    """
    return greatest(_number("TORCHELASTIC_RESTART_COUNT", 0))


def start() -> Any:
    """PyTorch's `distributed`, once the other ranks are met; happens by itself when it is first needed."""
    import torch
    from torch import distributed
    from torch.distributed.rendezvous import rendezvous

    if distributed.is_initialized():
        return distributed
    # NCCL begins at once, on a GPU for each rank of the machine: ranks that share the CPU may be more than these.
    enough = torch.cuda.is_available() and torch.cuda.device_count() >= local_count()
    backend = "cpu:gloo,cuda:nccl" if enough and distributed.is_nccl_available() else "gloo"
    if not rank() < count():
        raise UsageError(f"RANK = {rank()} of WORLD_SIZE = {count()}: torchrun sets these; unset them, or use torchrun")
    try:
        store, number, world_size = next(rendezvous("env://", timeout=PATIENCE))
    except (ValueError, OverflowError) as error:
        words = str(error).splitlines()[0]
        raise UsageError(f"torchrun's variables are not right ({words}); unset them, or use torchrun") from None
    store = _of_this_start(store, number, world_size)
    distributed.init_process_group(backend, store=store, rank=number, world_size=world_size, timeout=PATIENCE)
    return distributed


def _of_this_start(store: Any, number: int, world_size: int) -> Any:
    """The store under a prefix that the ranks of this start share, once all are there.

    torchrun keeps one store for all its restarts, and with it the addresses of ranks that are dead, and the prefixes of
    earlier starts: rank 0 draws one, and the others take the one under which they are answered.
    """
    from torch import distributed

    own = secrets.token_hex(8)
    if number == 0:
        prefix = own
        store.set("prefix", prefix)
        for other in range(1, world_size):
            store.set(f"{prefix} answers {store.get(f'{prefix} rank {other}').decode()}", "")
    else:
        while True:
            prefix = store.get("prefix").decode()
            store.set(f"{prefix} rank {number}", own)
            if store.check([f"{prefix} answers {own}"]):
                break
            time.sleep(0.05)
    return distributed.PrefixStore(prefix, store)  # type: ignore[attr-defined]


def leave() -> None:
    """Part from the other ranks, at the end of the program."""
    if count() > 1:
        from torch import distributed

        if distributed.is_initialized():
            distributed.destroy_process_group()


def on_first(function: Callable[[], T]) -> T:
    """What `function` gives on rank 0, on every rank; what it raises there is raised on all."""
    if count() == 1:
        return function()
    distributed = start()
    outcome: list[object] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = function()
        except (CifarError, OSError) as error:
            outcome[1] = error
    distributed.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[1], Exception):
        raise outcome[1]
    return outcome[0]  # type: ignore[return-value]


@contextlib.contextmanager
def one_ahead() -> Iterator[None]:
    """The first rank of each machine goes ahead; the others follow, and find what it has fetched."""
    if count() == 1:
        yield
        return
    distributed = start()
    if local_rank() > 0:
        distributed.barrier()
    yield
    if local_rank() == 0:
        distributed.barrier()


def sum_up(*tensors: "Tensor") -> None:
    """Replace each tensor by its sum over all ranks."""
    if count() > 1:
        for tensor in tensors:
            start().all_reduce(tensor)


def everyones(value: T) -> list[T]:
    """What each rank has, in their order."""
    values = [value] * count()
    if count() > 1:
        start().all_gather_object(values, value)
    return values


def greatest(value: int) -> int:
    """The greatest of what the ranks have."""
    return max(everyones(value))


def refuse_differences(about: Mapping[str, object]) -> None:
    """Raise `UsageError`, on all ranks alike, where one was started with other settings or files than the first."""
    first, *others = everyones(about)
    for number, other in enumerate(others, start=1):
        for key in {**first, **other}:
            if first.get(key) != other.get(key):
                raise UsageError(
                    f"rank {number} has {key} = {other.get(key)}, and rank 0 {first.get(key)}: ranks train one model, "
                    "and need the same settings, data and version on all machines"
                )


def hand_out(tensor: "Tensor", owner: int) -> None:
    """Fill the tensor on every rank with what it is on the rank `owner`."""
    if count() > 1:
        start().broadcast(tensor, src=owner)


def parallel(model: "nn.Module", device: "torch.device", *, buffers: bool) -> "nn.Module":
    """The model with gradients that are averaged over all ranks; `buffers` are taken from rank 0 in every step."""
    if count() == 1 or not any(parameter.requires_grad for parameter in model.parameters()):
        return model
    from torch.nn.parallel import DistributedDataParallel

    start()
    # Where a weight has a side of 1, its gradient's strides may be written in two ways, and both are right.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides", category=UserWarning)
    new_name = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    how: dict[str, Any] = {"forward_sync_buffers" if new_name else "broadcast_buffers": buffers}
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None, **how)


def is_lost(error: Exception) -> bool:
    """Whether this is what happens here when another rank has gone."""
    if count() == 1:
        return False
    from torch import distributed

    text = str(error).lower()
    return isinstance(error, distributed.DistError) or any(word in text for word in COLLECTIVE_ERRORS)


def words_of(error: Exception) -> str:
    """What torch.distributed says, in one line; NCCL's last words tell most (a full /dev/shm, one device for two)."""
    words = printable(" ".join(str(error).split()))
    return words if len(words) <= 600 else f"{words[:200]} ... {words[-395:]}"

"""Finished epochs on their way to the disk, beside the training of the next one."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from cifar100cli import checkpoint, interrupts
from cifar100cli.card import Card
from cifar100cli.checkpoint import Snapshot, Trained
from cifar100cli.runs import MODEL, STATE, RunDir
from cifar100cli.watcher import TrainState


class Saver:
    """Writes epochs in a thread of its own: on a fast device, it would otherwise wait for the disk half of the time.

    What is written is a copy in the host's memory, so that training may move on. The order on the disk is metrics,
    selected weights, training state: a process that is killed anywhere goes on from the last epoch that is whole there.
    Used as a context, it leaves with nothing on its way.
    """

    def __init__(self, run: RunDir, card: Card) -> None:
        self._run, self._card = run, card
        self._host: dict[str, Tensor] = {}  # the same memory in every epoch
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saving")
        self._last: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with interrupts.held_back():  # who asks next which epochs there are is told of this one, too
            self._thread.shutdown()
        if isinstance(error, KeyboardInterrupt):  # a full disk is told, though it was seen too late
            self.wait()

    def save(self, row: Mapping[str, Any], state: TrainState, trained: Trained) -> None:
        """Begin to save an epoch, once the one before is saved. Raises what went wrong with that, such as `OSError`."""
        self.wait()
        snapshot = checkpoint.snapshot(state, trained)
        snapshot = replace(snapshot, tensors=self._on_host(snapshot.tensors))
        with interrupts.held_back():
            self._last = self._thread.submit(self._write, row, snapshot, state.best_epoch == state.epoch)

    def check(self) -> None:
        """Raise what went wrong with the last epoch, if that is known by now."""
        if self._last is not None and self._last.done():
            self.wait()

    def wait(self) -> None:
        """Wait until all epochs are on the disk. Raises what went wrong with the last one."""
        if self._last is not None:
            self._last.result()
            self._last = None

    def _on_host(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for name, tensor in tensors.items():
            if name not in self._host:  # page-locked where it comes from a GPU, which is several times as fast
                self._host[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._host[name].copy_(tensor, non_blocking=tensor.is_cuda)
        for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
            torch.cuda.synchronize(device)
        return {name: self._host[name] for name in tensors}

    def _write(self, row: Mapping[str, Any], snapshot: Snapshot, selected: bool) -> None:
        self._run.append_metrics(row)
        if selected:
            card = self._card.model_copy(update={"epoch": row["epoch"]})
            checkpoint.save_model(self._run.path / MODEL, snapshot.weights, card)
        checkpoint.save_state(self._run.path / STATE, snapshot)

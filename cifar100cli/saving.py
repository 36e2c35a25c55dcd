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
from cifar100cli.checkpoint import Saved, Snapshot, Trained
from cifar100cli.runs import MODEL, STATE, RunDir
from cifar100cli.watcher import TrainState


class Saver:
    """Writes epochs in a thread of its own: on a fast device, it would otherwise wait for the disk half of the time.

    What is written is a copy in the host's memory, so that training may move on. The order on the disk is metrics,
    training state, selected weights: a process that is killed anywhere goes on from the last epoch whose state is
    there, and weights that it had no time for are in that state, where `catch_up` finds them. Used as a context, it
    leaves with nothing on its way.
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
        state = replace(state)  # training moves that one on
        with interrupts.held_back():
            self._last = self._thread.submit(self._write, row, snapshot, state)

    def check(self) -> None:
        """Raise what went wrong with the last epoch, if that is known by now."""
        if self._last is not None and self._last.done():
            self.wait()

    def wait(self) -> None:
        """Wait until all epochs are on the disk. Raises what went wrong with the last one."""
        if self._last is not None:
            self._last.result()

    def _on_host(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for name, tensor in tensors.items():
            if name not in self._host:  # page-locked where it comes from a GPU, which is several times as fast
                self._host[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._host[name].copy_(tensor, non_blocking=tensor.is_cuda)
        for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
            torch.cuda.synchronize(device)
        return {name: self._host[name] for name in tensors}

    def _write(self, row: Mapping[str, Any], snapshot: Snapshot, state: TrainState) -> None:
        self._run.append_metrics(row)
        checkpoint.save_state(self._run.path / STATE, snapshot)
        self._select(snapshot, state)

    def catch_up(self, saved: Saved, state: TrainState) -> None:
        """Write the selected weights of a state that is on the disk, where they are its own.

        A process that was killed may have written the state alone. The epoch cannot be repeated for them: where kernels
        add in any order, it might not be the best one again.
        """
        self._select(Snapshot(saved.tensors, saved.about), state)

    def _select(self, snapshot: Snapshot, state: TrainState) -> None:
        if state.best_epoch == state.epoch:
            card = self._card.model_copy(update={"epoch": state.epoch})
            checkpoint.save_model(self._run.path / MODEL, snapshot.weights, card)

"""What is told of a run as it goes, and to whom: who shows it, or keeps a record of it elsewhere.

Nothing slow is imported here.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cifar100cli.schema import Config


@dataclass(frozen=True)
class StageRow:
    """What a user is told about a stage. `norm` says what its batch statistics do, where it has any."""

    name: str
    parameters: int
    rate: float | None
    norm: str


@dataclass(frozen=True)
class EpochProgress:
    """What is known of an epoch while it runs: steps and images so far, and this rank's mean loss and accuracy of them.

    A GPU is behind what was issued. Before its first step, loss and accuracy are NaN. `at` says when it was so, by
    `time.monotonic`.
    """

    steps: int
    images: int
    loss: float
    top1: float
    at: float


@dataclass
class TrainState:
    """Where a run is, between two epochs."""

    epoch: int = 0
    best_epoch: int = 0
    best_top1: float = -1.0


class Watcher:
    """One that shows nothing; others take what they want to know."""

    def say(self, text: str) -> None:
        """A line about what goes on."""

    def progress(self, title: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Something of `total` steps begins; what is given takes how many were done since the last call."""
        return nullcontext(lambda count: None)

    def stages(self, rows: Sequence[StageRow]) -> None:
        """What of the network learns."""

    def begin(self, config: "Config", run: Path, first_epoch: int, steps_per_epoch: int, place: str) -> None:
        """Training starts in the run's folder, or goes on, with `first_epoch`; `place` is device and precision."""

    def step(self, taken: int, glance: Callable[[], EpochProgress | None]) -> None:
        """The epoch's `taken`-th step was issued. `glance()` tells what is known by now, and waits for nothing.

        After the last one it is called on and on until a GPU has done them all.
        """

    def measure(self, known: EpochProgress) -> None:
        """All steps of the epoch are done, and what they led to is measured."""

    def epoch(self, row: Mapping[str, Any], state: TrainState) -> None:
        """An epoch is finished and measured, and on its way to the disk."""

    def finish(self, result: Mapping[str, Any]) -> None:
        """The run is complete, and this is its result."""

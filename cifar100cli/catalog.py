"""The data sets that there are, and what more than one file has to know of each. Nothing slow is imported here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

SIDE = 32  # of CIFAR's images, in pixels
DatasetName = Literal["cifar100", "cifar10", "synthetic"]


@dataclass(frozen=True)
class About:
    """A data set in a few words; `folder` is its place in the data folder, or None where there is nothing to fetch."""

    title: str
    classes: int
    training_images: int
    test_images: int
    folder: str | None


DATASETS: Mapping[DatasetName, About] = {
    "cifar100": About("CIFAR-100", 100, 50_000, 10_000, "cifar-100-python"),
    "cifar10": About("CIFAR-10", 10, 50_000, 10_000, "cifar-10-batches-py"),
    "synthetic": About("Synthetic (drawn) data", 100, 10_000, 2_000, None),
}
TITLES: Mapping[str, str] = {name: about.title for name, about in DATASETS.items()}
FOLDERS: Mapping[str, str] = {name: about.folder for name, about in DATASETS.items() if about.folder is not None}


def share_of(images: int, share: float) -> int:
    """How many of a class's images a share of a data set takes: of any but 0, at least one."""
    return min(images, max(1, round(images * share))) if share else 0

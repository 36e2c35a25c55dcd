"""What a model's file says about the model: enough to use it without the folder that it came from. No torch here."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from cifar100cli import interrupts
from cifar100cli.bounded import kind_of, one_line, parse_json
from cifar100cli.catalog import DatasetName
from cifar100cli.errors import DataError, UsageError

KEY = "cifar100"  # of the metadata of our own safetensors files

LARGEST_HEADER = 16 << 20  # bytes; a network of a thousand tensors takes a hundred thousand
LARGEST_CARD = 1 << 20
MOST_CLASSES = 1000

Deviation = Annotated[FiniteFloat, Field(gt=0)]
Share = Annotated[FiniteFloat, Field(ge=0, le=1)]


class Card(BaseModel):
    """Architecture, classes and preprocessing of a model, and the whole preset that it was trained with."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    format: int
    preset: str
    dataset: DatasetName
    classes: tuple[str, ...] = Field(min_length=2, max_length=MOST_CLASSES)
    superclasses: tuple[str, ...] = Field((), max_length=MOST_CLASSES)
    superclass_of: tuple[int, ...] = ()
    image_size: int = Field(ge=16, le=1024)
    mean: tuple[FiniteFloat, FiniteFloat, FiniteFloat]
    std: tuple[Deviation, Deviation, Deviation]
    epoch: int = 0
    # For each data set, the data.val_fraction whose held-out images these weights have never learned, nor those that
    # they began from, nor a teacher; of one that is not here, they have never seen an image.
    unseen: dict[DatasetName, Share]
    config: dict[str, Any]

    @model_validator(mode="before")
    @classmethod
    def _of_one_data_set(cls, about: Any) -> Any:
        """Older models tell one number, or none, which is that of `config`."""
        if not isinstance(about, dict) or not isinstance(about.get("dataset"), str):
            return about
        share = about.get("unseen")
        if share is None:
            config = about.get("config")
            data = config.get("data") if isinstance(config, dict) else None
            share = data.get("val_fraction", 0.0) if isinstance(data, dict) else 0.0
        return about if isinstance(share, dict) else {**about, "unseen": {about["dataset"]: share}}

    @property
    def chosen_on(self) -> DatasetName | None:
        """The data set whose test images chose the epoch, if any did."""
        train = self.config.get("train")
        return self.dataset if isinstance(train, dict) and train.get("select") == "best_test" else None

    @model_validator(mode="after")
    def _superclasses_fit(self) -> Self:
        if self.superclass_of and (
            len(self.superclass_of) != len(self.classes)
            or not all(0 <= index < len(self.superclasses) for index in self.superclass_of)
        ):
            raise ValueError("superclass_of")
        return self


def parse_card(about: object, path: Path) -> Card:
    """The card that stands in a file's metadata. Raises `DataError` naming what is not right in it."""
    try:
        return Card.model_validate(about)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or str(first.get("ctx", {}).get("error", "its keys"))
        raise DataError(f"{path}: its description is not right at {place!r}") from None


def parse_metadata(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """What one of our own files says of itself. Raises `KeyError` for another's file, `ValueError` for nonsense."""
    text = (metadata or {})[KEY]
    about = parse_json(text) if len(text) <= LARGEST_CARD else None
    if not isinstance(about, dict):
        raise ValueError("its description is no JSON object of a sensible size")
    return about


def check_header(path: Path) -> None:
    """Refuse a safetensors file whose header alone would fill the memory. Raises `DataError`."""
    if kind_of(path) != "file":
        raise DataError(f"{path}: there is no such file")
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    if length > LARGEST_HEADER:
        raise DataError(f"{path}: corrupt, or no safetensors file (its header claims {length:,} bytes)")


@interrupts.held_back()
def read_about(path: Path) -> dict[str, Any]:
    """What a file of ours says of itself; its tensors are left where they are.

    Raises `DataError` for a file that is missing, broken or foreign.
    """
    from safetensors import SafetensorError, safe_open

    check_header(path)
    try:
        with safe_open(path, framework="np") as file:
            return parse_metadata(file.metadata())
    except (SafetensorError, OSError, ValueError, KeyError):
        raise DataError(f"{path}: not a model's file of ours") from None


def read_card(path: Path) -> Card:
    """The card of a model's file. Raises `DataError` as `read_about` does, and for a card that is not right."""
    return parse_card(read_about(path), path)


def check_models(paths: Sequence[Path], split: str) -> None:
    """Raise `UsageError` for a model that is named twice, and where `split` is val and a run held nothing out."""
    for number, path in enumerate(paths):
        if any(path.samefile(earlier) for earlier in paths[:number]):
            raise UsageError(f"{path}: is named twice; an ensemble has each model once")
        with contextlib.suppress(DataError):  # whoever reads the weights tells what is wrong
            data = read_card(path).config.get("data")
            if split == "val" and isinstance(data, dict) and not data.get("val_fraction"):
                raise UsageError(f"--split val: {path} comes from a run that held nothing out (data.val_fraction is 0)")


@dataclass(frozen=True)
class Network:
    """What a checkpoint of ours says of its network. `unseen` and `chosen_on` are the card's."""

    backbone: str
    stem: str
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    unseen: Mapping[DatasetName, float]
    chosen_on: DatasetName | None


def our_network(path: Path) -> Network | None:
    """What a checkpoint of ours says of its network, or None for a file of another kind."""
    try:
        card = read_card(path)
        model = card.config["model"]
        names = one_line(model["backbone"]), one_line(model["stem"])
        return Network(*names, card.image_size, card.mean, card.std, card.unseen, card.chosen_on)
    except (KeyError, ValueError, TypeError, AttributeError, OSError):  # whoever reads its weights tells what is wrong
        return None

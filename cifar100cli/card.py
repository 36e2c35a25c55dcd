"""What a model's file says about the model: enough to use it without the folder that it came from. No torch here."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from cifar100cli.errors import DataError

KEY = "cifar100"  # of the metadata of our own safetensors files

Deviation = Annotated[FiniteFloat, Field(gt=0)]


class Card(BaseModel):
    """Architecture, classes and preprocessing of a model, and the whole preset that it was trained with."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    format: int
    preset: str
    dataset: Literal["cifar100", "cifar10", "synthetic"]
    classes: tuple[str, ...] = Field(min_length=2)
    superclasses: tuple[str, ...] = ()
    superclass_of: tuple[int, ...] = ()
    image_size: int = Field(ge=16, le=1024)
    mean: tuple[FiniteFloat, FiniteFloat, FiniteFloat]
    std: tuple[Deviation, Deviation, Deviation]
    epoch: int = 0
    config: dict[str, Any]

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


def read_card(path: Path) -> Card:
    """The card of a model's file; its weights are left where they are.

    Raises `DataError` for a file that is missing, broken or foreign.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    try:
        with safe_open(path, framework="np") as file:
            about = json.loads((file.metadata() or {})[KEY])
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError):
        raise DataError(f"{path}: not a model's file of ours") from None
    return parse_card(about, path)

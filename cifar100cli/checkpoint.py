"""Weights and training state as safetensors with JSON inside: nothing is pickled, nothing half-written.

A model's file describes itself: architecture, classes, preprocessing and the whole preset stand in its
metadata, so that it can be used without the folder that it came from.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cifar100cli.bounded import one_line
from cifar100cli.card import KEY, Card, parse_card, parse_metadata, read_about
from cifar100cli.config import parse_config
from cifar100cli.errors import DataError, UsageError
from cifar100cli.loader import Preprocessing
from cifar100cli.models import create_model, outline
from cifar100cli.optim import MovingAverage, keys_of_state
from cifar100cli.runs import MODEL, find_model
from cifar100cli.schema import Config
from cifar100cli.tensors import are_as_written, load_tensors, save_tensors
from cifar100cli.watcher import TrainState
from cifar100cli.weights import is_table, warn_of_change

FORMAT = 1  # of a model's file; a newer one is refused
# Of a training state. Going on from one of another format would draw other batches than the run began with.
STATE_FORMAT = 2


@dataclass(frozen=True)
class Checkpoint:
    """A model's file, read: the network with its weights, and what it says about itself."""

    path: Path
    model: nn.Module
    card: Card
    config: Config

    @property
    def preprocessing(self) -> Preprocessing:
        """From uint8 images to the model's inputs."""
        return Preprocessing(self.card.image_size, self.card.mean, self.card.std)


def save_model(path: Path, weights: Mapping[str, Tensor], card: Card) -> None:
    """Write weights, as a model's `state_dict` has them, and card to `path`, whole or not at all."""
    save_tensors(path, weights, card.model_dump(mode="json"))


def load_model(path: Path) -> Checkpoint:
    """Build the network that a model's file describes, with its weights.

    Raises `DataError` for a file that is missing, broken, foreign, newer, or whose weights do not fit.
    """
    path = find_model(path)
    saved = read(path)
    if _is_state(saved.about):
        raise DataError(f"{path}: is a training state, which --resume goes on from; the model is {path.parent / MODEL}")
    try:
        card = parse_card(saved.about, path)
        config = parse_config(card.config, str(path))
        if card.image_size != config.data.image_size:
            raise DataError(f"{path}: its description is not right at 'image_size'")
        # A few bytes may call themselves a network of gigabytes: these are for weights that fit.
        _check_fit(outline(config, len(card.classes)), saved.tensors, path)
        model = create_model(config, len(card.classes), pretrained=False)
    except UsageError as error:
        raise DataError(f"{path}: its description is not right: {error}") from None
    load_weights(model, saved.tensors, path)
    return Checkpoint(path, model, card, config)


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy the weights of a file into a model of the very same shape, or raise `DataError` naming what differs."""
    own = model.state_dict()
    _check_fit(own, tensors, path)
    for name, table in own.items():  # of places, say, which may not lead beyond what is there
        if is_table(name, table) and not torch.equal(table.cpu(), tensors[name]):
            raise DataError(f"{path}: corrupt: {name[:60]} is not the table that its network makes for itself")
    model.load_state_dict(dict(tensors))


def _check_fit(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise `DataError` where a file's tensors are not those of a model: names, shapes, kinds, and finite numbers."""
    for problem, names in (
        ("lacks", [name for name in expected if name not in tensors]),
        ("has besides what the model has", [name for name in tensors if name not in expected]),
        ("has another shape for", [n for n in expected if n in tensors and expected[n].shape != tensors[n].shape]),
        (
            "has another kind of number for",
            [n for n in tensors if n in expected and not _alike(tensors[n], expected[n])],
        ),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise DataError(
                f"{path}: does not fit the model: it {problem} {', '.join(n[:60] for n in names[:3])}{more}"
            )
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise DataError(f"{path}: {broken[0]} holds numbers that are not finite")


def _alike(tensor: Tensor, expected: Tensor) -> bool:
    """Whether both hold floating-point numbers, of whatever common width, or else the same kind."""
    floating = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return tensor.dtype in floating if expected.dtype in floating else tensor.dtype == expected.dtype


@dataclass(frozen=True)
class Saved:
    """A file of ours: its tensors, and what it says about itself."""

    path: Path
    tensors: dict[str, Tensor]
    about: dict[str, Any]


class Trained(Protocol):
    """All that training moves."""

    @property
    def model(self) -> nn.Module:
        """The network."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """What moves its weights."""

    @property
    def average(self) -> MovingAverage:
        """Their average."""

    @property
    def scaler(self) -> torch.amp.GradScaler:
        """The scale of the loss in fp16."""


@dataclass(frozen=True)
class Snapshot:
    """All that the next epoch needs, with the tensors that training moves or with copies of them."""

    tensors: Mapping[str, Tensor]
    about: Mapping[str, Any]

    @property
    def weights(self) -> dict[str, Tensor]:
        """Those of the network as it is measured and kept: averaged, where there is an average."""
        return _of(self.tensors, "average.") or _of(self.tensors, "model.")


def snapshot(state: TrainState, trained: Trained) -> Snapshot:
    """Where training is, without a copy."""
    tensors = {f"model.{name}": tensor for name, tensor in trained.model.state_dict().items()}
    tensors |= {f"average.{name}": tensor for name, tensor in trained.average.tensors.items()}
    for index, values in trained.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": v for name, v in values.items() if isinstance(v, Tensor)}
    scaling = {"scaler": trained.scaler.state_dict()} if trained.scaler.is_enabled() else {}
    return Snapshot(tensors, {"format": STATE_FORMAT, **asdict(state), **scaling})


def save_state(path: Path, snapshot: Snapshot) -> None:
    """Write all that the next epoch needs, whole or not at all."""
    save_tensors(path, snapshot.tensors, snapshot.about)


def restore_model(saved: Saved, model: nn.Module) -> None:
    """Put the model alone back to where `snapshot` found it."""
    load_weights(model, _of(saved.tensors, "model."), saved.path)


def _of(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def restore(saved: Saved, trained: Trained) -> TrainState:
    """Put everything back to where `snapshot` found it."""
    path, tensors, about = saved.path, saved.tensors, saved.about
    optimizer, average, scaler = trained.optimizer, trained.average, trained.scaler
    restore_model(saved, trained.model)
    averages = _of(tensors, "average.")
    _check_fit(average.tensors, averages, path)
    for name, tensor in average.tensors.items():
        tensor.copy_(averages[name])
    try:
        if scaler.is_enabled():
            scaler.load_state_dict({name: type(v)(about["scaler"][name]) for name, v in scaler.state_dict().items()})
        state = TrainState(int(about["epoch"]), int(about["best_epoch"]), float(about["best_top1"]))
        if not (0 < state.best_epoch <= state.epoch and -1 <= state.best_top1 <= 1):
            raise ValueError(f"the best epoch {state.best_epoch} of {state.epoch}, with {state.best_top1:g}")
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        kept: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, number, key = name.split(".")
                parameter = parameters[int(number)]
                if tensor.shape == parameter.shape:
                    # The memory layout of the parameter, so that the same kernel runs as before the stop.
                    tensor = torch.empty_like(parameter).copy_(tensor)
                elif tensor.shape != () or key != "step":  # a fused optimizer would write beyond what is there
                    raise ValueError(f"{name} has another shape than its weights")
                kept.setdefault(int(number), {})[key] = tensor
        for index, expected in enumerate(keys_of_state(optimizer)):
            if index in kept and kept[index].keys() != expected:
                raise ValueError(f"optimizer.{index} holds {', '.join(sorted(kept[index]))}, as of another optimizer")
        optimizer.load_state_dict({**optimizer.state_dict(), "state": kept})
    except (KeyError, IndexError, ValueError, TypeError, OverflowError) as error:
        raise DataError(f"{path}: not a training state of this run ({type(error).__name__}: {error})") from None
    return state


def read_state(path: Path) -> Saved:
    """Read a training state. Raises `DataError` as `read` does, and for one that an older version wrote."""
    saved = read(path)
    if not _is_state(saved.about):
        raise DataError(f"{path}: holds a model, and not the training state that a run goes on from")
    if saved.about["format"] < STATE_FORMAT:
        raise DataError(
            f"{path}: written by an older cifar100, whose order of images this one does not draw: go on with that "
            "version, or train anew; the model beside it can be used as it is"
        )
    return saved


def finished_epochs(path: Path) -> int:
    """How many epochs of a run a training state has in it; 0 where there is none that could be gone on from."""
    try:
        return int(read_about(path)["epoch"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return 0


def _is_state(about: Mapping[str, Any]) -> bool:
    """Whether a file of ours holds a training state, or else a model."""
    return "best_epoch" in about


def read(path: Path) -> Saved:
    """Read a file of ours. Raises `DataError` for one that is missing, broken, foreign or newer than this version."""
    found, metadata = load_tensors(path)
    if KEY not in metadata:
        raise DataError(f"{path}: not written by cifar100: it does not say which model it holds")
    try:
        about = parse_metadata(metadata)
        written = about["format"]
    except (ValueError, KeyError) as error:
        raise DataError(f"{path}: corrupt, or no safetensors file ({one_line(error)})") from None
    if not isinstance(written, int) or written < 1:
        raise DataError(f"{path}: its format number is not right")
    newest = STATE_FORMAT if _is_state(about) else FORMAT
    if written > newest:
        raise DataError(f"{path}: written by a newer cifar100 (format {written}; this one reads up to {newest})")
    if not _is_state(about):
        warn_of_change(path, about, found)
    elif not are_as_written(found, about):
        raise DataError(f"{path}: corrupt: its numbers are not those that were written; train anew")
    # Until here they are views of the file, and Windows refuses to replace one that is mapped, as the next epoch does.
    return Saved(path, {name: tensor.clone() for name, tensor in found.items()}, about)

"""What a run begins from: random weights, timm's, a file's or another run's, and which images these had learned."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from cifar100cli import checkpoint, ranks
from cifar100cli.bounded import kind_of
from cifar100cli.card import Network, our_network
from cifar100cli.catalog import DATASETS, DatasetName
from cifar100cli.checkpoint import Saved
from cifar100cli.datasets import Split
from cifar100cli.errors import DataError, UsageError
from cifar100cli.loader import Preprocessing
from cifar100cli.models import create_model, initialize
from cifar100cli.schema import Config
from cifar100cli.watcher import Watcher


def build(
    config: Config,
    classes: int,
    preprocessing: Preprocessing,
    training: Split,
    state: Saved | None,
    watcher: Watcher,
) -> nn.Module:
    """The network as its first step finds it: with the weights of `state`, of a file, of timm, or random ones."""
    torch.manual_seed(config.seed)
    with ranks.one_ahead():  # the model hub is asked once
        model = create_model(config, classes, pretrained=None if state is None else False)
    if state is not None:
        checkpoint.restore_model(state, model)
        return model
    if config.model.weights is not None:
        watcher.say(_told(config, model, preprocessing, classes))
    if not config.model.pretrained:
        initialize(model, _sample(training, preprocessing))
    return model


def digest(path: Path) -> str:
    """What tells a file of weights from all others: the sha256 of its bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_known_images(config: Config, watcher: Watcher) -> None:
    """Tell where what is held out was learned by the weights to start from; `UsageError` if it chose the epoch.

    And where the test images chose the epoch of these weights, unless they choose the run's as well.
    """
    network = _named(config)
    if network is not None and network.chosen_on == config.data.dataset and config.train.select != "best_test":
        watcher.say(
            f"{config.model.weights}: their epoch was chosen on the test images: the test figure may be optimistic"
        )
    unseen = network.unseen.get(config.data.dataset, 1.0) if network is not None else 1.0
    if unseen >= config.data.val_fraction:  # a larger share holds out what a smaller one does, and more
        return
    known = (
        f"{config.model.weights}: was trained, taught, or begun from weights that were, with data.val_fraction = "
        f"{unseen:g}, and so on images that {config.data.val_fraction:g} holds out"
    )
    if config.train.select != "best_val":
        watcher.say(f"{known}: accuracies on these flatter")
        return
    smaller = f"hold out no more than that (--set data.val_fraction={unseen:g}), or " if unseen else ""
    raise UsageError(
        f"{known}: an epoch chosen on these would flatter; {smaller}use --set train.select=last "
        "--set data.val_fraction=0"
    )


def unseen_images(config: Config) -> Mapping[DatasetName, float]:
    """The `unseen` of the run's card. Of weights that are there no more it is not known what they had learned."""
    name, weights = config.data.dataset, config.model.weights
    if weights is not None and not _is_there(Path(weights)):
        return dict.fromkeys(DATASETS, 0.0)
    network = _named(config)
    known = network.unseen if network is not None else {}
    return {**known, name: min(config.data.val_fraction, known.get(name, 1.0))}


def may_know(config: Config) -> bool:
    """Whether the weights that a run began from had learned images of its data set, or are there no more to tell."""
    network = _named(config)
    if network is not None:
        return config.data.dataset in network.unseen
    return config.model.weights is not None and not _is_there(Path(config.model.weights))


def stem_is_new(config: Config, model: nn.Module) -> bool:
    """Whether the stem is a random one in front of trained weights. A deep one keeps those that it had."""
    if config.model.stem != "cifar" or not config.model.pretrained:
        return False
    network = _named(config)
    stem = getattr(getattr(model, "backbone", model), "conv1", None)
    return (network is None or network.stem != "cifar") and isinstance(stem, nn.Conv2d)


def _named(config: Config) -> Network | None:
    """What the file of weights says of its network, where one is named and it is ours."""
    return our_network(Path(config.model.weights)) if config.model.weights is not None else None


def _is_there(weights: Path) -> bool:
    try:
        return kind_of(weights) == "file"
    except DataError:  # a run that goes on has no need of them
        return False


def _told(config: Config, model: nn.Module, preprocessing: Preprocessing, classes: int) -> str:
    """What a run begins with, and where its images will not be those that the weights were made for."""
    told = f"starting from {config.model.weights}; the head is a new one of {classes} classes"
    if stem_is_new(config, model):
        told += ", and so is the stem"
    network = _named(config)
    if network is not None and (network.mean, network.std) != (preprocessing.mean, preprocessing.std):
        told += f"; the weights saw pixels normalised otherwise than by data.normalize = {config.data.normalize}"
    if network is not None and network.image_size != config.data.image_size:
        told += f"; the weights saw images of {network.image_size} pixels, and see {config.data.image_size} now"
    return told


def _sample(split: Split, preprocessing: Preprocessing) -> torch.Tensor:
    """Some images of a split, evenly from all of it, as the network will see them: 5,000 of 32 pixels, fewer larger."""
    count = max(1, min(len(split), 5000 * 32 * 32 // preprocessing.image_size**2))
    chosen = [index * len(split) // count for index in range(count)]
    return preprocessing(torch.from_numpy(split.images[chosen]))

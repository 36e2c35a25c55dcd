"""Trained models measured on a split of their data set: one, or several as an ensemble."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from cifar100cli import checkpoint, datasets, devices, duplicates, metrics, ranks, starting_weights
from cifar100cli.analysis import COLUMNS
from cifar100cli.atomic import replacing
from cifar100cli.card import check_models
from cifar100cli.checkpoint import Checkpoint
from cifar100cli.datasets import Dataset, Split
from cifar100cli.errors import DataError, UsageError
from cifar100cli.folders import Where
from cifar100cli.jobs import evaluation_loader, training_splits
from cifar100cli.runs import find_model
from cifar100cli.watcher import Watcher

# What decides which images a split holds, beside the data set.
PARTING = {"test": (), "val": ("val_fraction",), "train": ("val_fraction", "fraction")}


class Measured(NamedTuple):
    """What was found: what `evaluate --json` prints, and what it comes from: logits (N, classes), labels (N,), images.

    `pairs` (P, 2, 3, 32, 32) uint8 are near-duplicates, each with its training image, where these were looked for.
    """

    result: dict[str, Any]
    classes: tuple[str, ...]
    logits: Tensor
    labels: Tensor
    images: Split
    pairs: NDArray[np.uint8] | None = None

    def write(self, path: Path) -> None:
        """A CSV file with one line an image: index, true class, predicted class, confidence, and whether it is right.

        An index is the image's place among the data set's own test or training images. Of several ranks, the first
        writes it.
        """
        if ranks.rank() == 0:
            write_predictions(path, self.classes, self.logits, self.labels, self.images.positions)

    def draw_near_duplicates(self, path: Path) -> None:
        """A PNG file with the near-duplicates that were found, if any. Of several ranks, the first writes it."""
        assert self.pairs is not None
        if ranks.rank() == 0 and len(self.pairs):
            other_class = [not pair["same_class"] for pair in self.result["near_duplicates"]["pairs"]]
            drawn = Image.fromarray(duplicates.picture(self.pairs, other_class))
            with replacing(path) as temporary:
                drawn.save(temporary, "PNG", optimize=True)


def measure(
    paths: Sequence[Path],
    where: Where,
    watcher: Watcher,
    split: str = "test",
    *,
    tta: bool = False,
    near_duplicates: bool = False,
) -> Measured:
    """Measure a run or checkpoint, or the mean of several models' probabilities.

    Each model sees the images at its own size and normalisation; `tta` shows it six views of each. With
    `near_duplicates`, images that are nearly one of those that were trained on, by the run, its teacher or the weights
    that it began from, are looked for, and measured apart.
    Raises `DataError` for models of different data sets or classes, and `UsageError` where these were not trained and
    held out on the same images and `split` is not the test set.
    """
    check_models([find_model(path) for path in paths], split)
    members = [checkpoint.load_model(path) for path in paths]
    _check_alike(members, split)
    first = members[0]
    dataset = datasets.load(first.card.dataset, where.data_dir)
    if dataset.classes != first.card.classes:
        raise DataError(f"{first.path}: its classes are not those of {dataset.name} in {where.data_dir}")
    images = _split_of(first, dataset, split)
    answers, labels = [], torch.empty(0)
    with watcher.progress("evaluate", len(images) * len(members)) as advance:
        for member in members:
            model, device, cast = ready(member, where)
            loader = evaluation_loader(images, device, member.preprocessing)
            logits, labels = metrics.logits_of(model, loader, cast, tta=tta, advance=advance)
            metrics.refuse_no_answer(logits, member.path, devices.precision_of(member.config, device))
            answers.append(logits)
            model.cpu()  # one at a time on the device
    together = answers[0] if len(answers) == 1 else metrics.ensemble(answers)
    result = metrics.evaluate(together, labels, first.card.superclass_of)
    classes = first.card.classes
    figures = {
        **_names(members, answers, labels),
        "dataset": dataset.name,
        "split": split,
        "tta": tta,
        "learned": split == "train" or (split == "val" and any(map(_learned_what_it_holds_out, members))),
        "count": result.count,
        **result.figures(),
        "per_class": dict(zip(classes, result.per_class, strict=True)),
        "confusions": [
            {"true": classes[true], "predicted": classes[predicted], "count": count}
            for true, predicted, count in result.confusions
        ],
    }
    if not near_duplicates:
        return Measured(figures, classes, together, labels, images)
    known = _trained_on(members, dataset)
    if split == "val":  # what earlier weights or a teacher had learned holds these images themselves
        known = known.take(np.flatnonzero(~np.isin(known.positions, images.positions)))
    device = devices.select_device(where.device)
    with watcher.progress("near-duplicates", len(images)) as advance:
        twins = ranks.on_first(lambda: duplicates.find(images.images, known.images, device, advance))
    right = (metrics.predictions(together) == labels).numpy()
    figures["near_duplicates"] = twins.figures(images, known, right)
    pairs = np.stack([images.images[twins.images], known.images[twins.twins]], 1)
    return Measured(figures, classes, together, labels, images, pairs)


def _learned_what_it_holds_out(member: Checkpoint) -> bool:
    """Whether weights that the run began from, or a teacher, had been trained on images that it held out."""
    return member.card.unseen.get(member.card.dataset, 1.0) < member.config.data.val_fraction


def _names(members: Sequence[Checkpoint], answers: Sequence[Tensor], labels: Tensor) -> dict[str, Any]:
    """Which model it was; of several, each with what it can do alone."""
    alone = [
        {
            "checkpoint": str(member.path),
            "preset": member.card.preset,
            "epoch": member.card.epoch,
            "select": member.config.train.select,
        }
        for member in members
    ]
    if len(members) == 1:
        return alone[0]
    scores = [metrics.score(logits, labels) for logits in answers]
    return {
        "checkpoint": " + ".join(str(member.path) for member in members),
        "preset": " + ".join(dict.fromkeys(member.card.preset for member in members)),
        "epoch": None,
        "select": None,
        "members": [{**one, "top1": s.top1, "loss": s.loss} for one, s in zip(alone, scores, strict=True)],
    }


def _check_alike(members: Sequence[Checkpoint], split: str) -> None:
    """Models can be averaged when they answer the same question, and about images that are as new to each of them."""
    first = members[0]
    for other in members[1:]:
        if other.card.dataset != first.card.dataset:
            raise DataError(
                f"{other.path}: knows {other.card.dataset}, and {first.path} {first.card.dataset}; "
                "the models of an ensemble have one data set"
            )
        if other.card.classes != first.card.classes:
            raise DataError(
                f"{other.path}: its classes are not those of {first.path} "
                f"({len(other.card.classes)} and {len(first.card.classes)} of {first.card.dataset})"
            )
        keys = [f"data.{key}" for key in PARTING[split]]
        if split == "train" and (first.config.data.fraction, other.config.data.fraction) != (1, 1):
            keys.append("seed")  # it chooses the images of the fraction
        for key in keys:
            ours, theirs = (_value(member, key) for member in (first, other))
            if ours != theirs:
                raise UsageError(
                    f"--split {split}: {first.path} has {key} = {ours}, and {other.path} {theirs}: these are not the "
                    "same images, and one model may have learned those of the other; --split test is there for all"
                )


def _value(member: Checkpoint, key: str) -> object:
    return member.config.seed if key == "seed" else getattr(member.config.data, key.removeprefix("data."))


def ready(saved: Checkpoint, where: Where) -> tuple[nn.Module, torch.device, devices.Cast]:
    """The model on the device that is asked for, in its preset's precision: where that is `auto`, the device's."""
    device = devices.select_device(where.device)
    model = saved.model.to(device=device, memory_format=devices.memory_format(device))  # type: ignore[call-overload]
    return model.eval(), device, devices.autocast(device, devices.precision_of(saved.config, device))


def _split_of(saved: Checkpoint, dataset: Dataset, split: str) -> Split:
    """The very images that the checkpoint's run trained on, held out, or tested on."""
    if split == "test":
        return dataset.test
    training, held_out = training_splits(dataset, saved.config)
    if split == "train":
        return training
    assert held_out is not None
    return held_out


def _trained_on(members: Sequence[Checkpoint], dataset: Dataset) -> Split:
    """The images that a model has learned; of several that had different ones, all that one of them may have had."""
    learned = {_learned(member) for member in members}
    share, fraction, seed = min(learned)
    training, _ = datasets.hold_out(dataset.train, share)  # and with it what a larger share leaves
    return training if len(learned) > 1 else datasets.subset(training, fraction, seed)


def _learned(member: Checkpoint) -> tuple[float, float, int]:
    """Which images a model has learned, or may have from what went before: share held out, fraction of the rest, seed.

    Of earlier runs and of teachers it is known what they had held out, and not which fraction they were given.
    """
    config = member.config
    before = config.distillation is not None or starting_weights.may_know(config)
    if before or _learned_what_it_holds_out(member):
        unseen = member.card.unseen.get(member.card.dataset, 1.0)
        return min(config.data.val_fraction, unseen), 1.0, config.seed
    return config.data.val_fraction, config.data.fraction, config.seed


def write_predictions(
    path: Path, classes: tuple[str, ...], logits: Tensor, labels: Tensor, indices: Iterable[int]
) -> None:
    """A line an image, from logits (N, classes), labels (N,) and what each image's index is."""
    found = metrics.with_confidence(logits, labels)
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        rows = zip(indices, found.true, found.predicted, found.confidence, strict=True)
        for index, true, guess, confidence in rows:
            writer.writerow([index, classes[true], classes[guess], f"{confidence:.6f}", int(true == guess)])

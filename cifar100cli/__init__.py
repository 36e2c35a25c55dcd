"""Train image classifiers on CIFAR-100 and CIFAR-10: reproduce the published figures, believe them, beat them.

The command line is `cifar100`. For Python, these names do what its commands do:

    from cifar100cli import evaluate, load_model, load_preset, train

    result = train(load_preset("quickstart", {"train.epochs": 2}))
    figures = evaluate(result["run_dir"])
    model = load_model(result["run_dir"])
    guesses = model.predict(["photo.jpg"])

Nothing is printed unless `progress=True`. What goes wrong is raised as a `CifarError`, which is a `ValueError`.
"""

import importlib
from typing import TYPE_CHECKING

from cifar100cli.errors import (
    ChangedWeights,
    CifarError,
    DataError,
    DivergedError,
    NotWrittenError,
    RunInterrupted,
    UsageError,
)

if TYPE_CHECKING:
    from cifar100cli.api import evaluate, load_model, load_preset, resume, train
    from cifar100cli.classifier import Classifier
    from cifar100cli.config import Preset, preset_names

__version__ = "0.1.0"

__all__ = [
    "ChangedWeights",
    "CifarError",
    "Classifier",
    "DataError",
    "DivergedError",
    "NotWrittenError",
    "Preset",
    "RunInterrupted",
    "UsageError",
    "evaluate",
    "load_model",
    "load_preset",
    "preset_names",
    "resume",
    "train",
]

_ELSEWHERE = {"Classifier": "classifier", "Preset": "config", "preset_names": "config"}  # the others are in `api`


if not TYPE_CHECKING:  # which would take every name for one of ours

    def __getattr__(name: str) -> object:
        """What is in `__all__`, imported when it is first asked for: PyTorch takes seconds, which `--help` has not."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"cifar100cli.{_ELSEWHERE.get(name, 'api')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""What the commands do, for Python; `cifar100cli` itself gives these names.

Paths are strings or `Path`s. The folders are those of the commands: an argument, else `CIFAR100_RUNS_DIR` and
`CIFAR100_DATA_DIR`, else `runs` here and the user's cache. Nothing is printed unless `progress` is true, and then to
stderr. What goes wrong is raised: a `CifarError`, whose message names options as the command line does.
"""

import sys
import threading
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cifar100cli import (
    checkpoint,
    config,
    devices,
    evaluation,
    folders,
    places,
    ranks,
    runs,
    time_limit,
    workflows,
)
from cifar100cli.classifier import Classifier
from cifar100cli.config import DEFAULT_PRESET, Override, Preset
from cifar100cli.display import TrainingDisplay
from cifar100cli.errors import CifarError, NotWrittenError, UsageError
from cifar100cli.folders import Where, expand
from cifar100cli.options import with_pretrained
from cifar100cli.runs import RunDir
from cifar100cli.watcher import Watcher

AnyPath = str | Path


def load_preset(name: AnyPath = DEFAULT_PRESET, overrides: Mapping[str, object] | None = None) -> Preset:
    """A shipped preset by its name, or one of a YAML file, with `overrides` by the keys of `--set`.

    As in `load_preset("resnet18-baseline", {"train.epochs": 10, "optimizer.lr": 3e-4})`. `preset.config` has all of
    it, frozen; `preset.config.to_yaml()` is YAML that it reads back.

    Raises `UsageError` for a name, key, type or value that is not right.
    """
    if overrides is not None and not isinstance(overrides, Mapping):
        kind = type(overrides).__name__
        raise UsageError(f"overrides are values by their keys, as in {{'train.epochs': 3}}, and no {kind}")
    found = {str(key): Override(str(key), _plain(value), "overrides") for key, value in (overrides or {}).items()}
    return config.load_preset(str(name), with_pretrained(found))


def train(
    preset: Preset | AnyPath,
    *,
    minutes: float | None = None,
    runs_dir: AnyPath | None = None,
    data_dir: AnyPath | None = None,
    device: str = "auto",
    progress: bool = False,
) -> dict[str, Any]:
    """Train a preset in a new run folder, as `cifar100 train` does, to the same bits.

    `preset` is what `load_preset` gives, or what it takes: the name of a shipped preset, or of a YAML file. Returns
    the content of the run's `result.json`: `["run_dir"]` is the folder, `["test"]["top1"]` the accuracy as a
    fraction. With `minutes` it has as many epochs as fit in this time here, which is measured first, in place of its
    own; not where it distils. `device` is auto, cpu, cuda, cuda:N or mps. Presets that distil or fine-tune train here
    too. Of several threads, one trains at a time; what another draws from PyTorch's generator on the host meanwhile
    changes the run, and is drawn again afterwards.

    Raises `UsageError` for a device or settings that cannot be, `DataError` for images or weights that are missing or
    broken, `DivergedError` where the loss stops being finite, `CifarError` where there is no memory or room, and on
    Ctrl-C `RunInterrupted`, a `KeyboardInterrupt`, whose `run_dir` can be given to `resume`.
    """
    if not isinstance(preset, Preset):
        preset = load_preset(preset)
    where = _where(device, data_dir, runs_dir=runs_dir)
    runs.check_writable(where.runs_dir)
    if minutes is not None:
        places.check_minutes(minutes, preset.config)
    with _watcher(preset.name, progress) as watcher:
        if minutes is not None:
            preset = time_limit.within(preset, minutes, where, watcher)
        return workflows.train(preset, where, watcher)


def resume(
    run: AnyPath,
    *,
    teacher: AnyPath | None = None,
    data_dir: AnyPath | None = None,
    device: str = "auto",
    progress: bool = False,
) -> dict[str, Any]:
    """Go on with a run that was stopped, to the bits of one that was not; returns what `train` does.

    The data folder is the one that it was last trained from, and the device the one that it began with, unless others
    are named; `teacher` is where that of a distillation is now. A complete run is only read. Raises what `train` does,
    and `DataError` for a folder that is no run of ours or cannot be gone on with.
    """
    opened = RunDir.open(_path("run", run))
    path = _path("teacher", teacher) if teacher is not None else None
    if path is not None and opened.recorded(runs.TEACHER_DIGEST) is None:
        raise UsageError(f"teacher={path}: {opened.path} has none, or does not know it by its weights; leave it out")
    where = _where(device, data_dir, run=opened.path)
    with _watcher(opened.preset, progress) as watcher:
        if where.device == "auto" and ranks.count() == 1 and not opened.complete:  # which is only read
            where = replace(where, device=places.own_device(opened, "device='cpu'", watcher.say))
        return workflows.resume(opened, where, watcher, str(path.absolute()) if path is not None else None)


def evaluate(
    models: AnyPath | Sequence[AnyPath],
    *,
    split: str = "test",
    tta: bool = False,
    predictions: AnyPath | None = None,
    near_duplicates: AnyPath | None = None,
    data_dir: AnyPath | None = None,
    device: str = "auto",
    progress: bool = False,
) -> dict[str, Any]:
    """Measure a run folder or .safetensors file, or several as an ensemble, as `cifar100 evaluate` does.

    Returns what `evaluate --json` prints: `count`, `top1`, `top5`, `loss`, `ece`, `superclass_top1`,
    `per_class` {name: top1}, `confusions`, ..., accuracies as fractions. `split` is test, val (what the run held out)
    or train. `tta` averages over six views of each image. `predictions` names a CSV file to be written, a line an
    image; `near_duplicates` a PNG file, with the pairs of a training image and one that is nearly the same, which are
    measured apart, too, under a key of this name.

    Raises `UsageError` for a split that there is not, `DataError` for models or images that are missing, broken, or
    do not go together, and `CifarError` where a file cannot be written; what was measured is its `result`.
    """
    if not isinstance(split, str) or split not in evaluation.PARTING:
        raise UsageError(f"split = {split}: must be one of {', '.join(evaluation.PARTING)}")
    several = isinstance(models, Iterable) and not isinstance(models, str | Mapping)
    given: list[object] = [*models] if several else [models]  # type: ignore[misc]
    paths = [_path("models", model) for model in given]
    if not paths:
        raise UsageError("models: name at least one run folder or .safetensors file")
    files = [runs.find_model(path) for path in paths]
    table = places.check_output("predictions", Path(predictions), files) if predictions is not None else None
    drawing = None
    if near_duplicates is not None:
        drawing = places.check_pairs("near_duplicates", Path(near_duplicates), split, files, table)
    where = _where(device, data_dir, run=paths[0])
    with _watcher("evaluate", progress) as watcher:
        measured = evaluation.measure(paths, where, watcher, split, tta=tta, near_duplicates=drawing is not None)
    try:
        if table is not None:
            measured.write(table)
        if drawing is not None:
            measured.draw_near_duplicates(drawing)
    except OSError as error:
        place = error.filename or table or drawing
        raise NotWrittenError(f"{place}: {error.strerror or error}", measured.result) from None
    return measured.result


def load_model(run: AnyPath, *, device: str = "auto") -> Classifier:
    """The trained model of a run folder or .safetensors file, ready for use.

    `model(images)` takes uint8 RGB images (N, 3, H, W) and gives logits (N, classes) in float32; `model.classes` names
    them; `model.predict(pictures)` says what is in files or pictures of Pillow's. No data set is needed.

    Raises `DataError` for a file that is missing, broken or foreign, `UsageError` for a device that is not here.
    """
    where = _where(device)
    with _watcher("load_model", progress=False):
        return Classifier(checkpoint.load_model(_path("run", run)), where)


# ------------------------------------------------------------------------------------------------ within


def _path(argument: str, given: object) -> Path:
    """Raises `UsageError` for what is no path, and for an empty one: it would be the current folder."""
    if not isinstance(given, str | Path):
        raise UsageError(f"{argument}: must be a path, such as result['run_dir'], and not {type(given).__name__}")
    if not str(given):
        raise UsageError(f"{argument} is empty: name a run folder or .safetensors file")
    return expand(Path(given))


def _plain(value: object) -> object:
    """A value as a preset's YAML could have it; a file is named by its whole path, as the options do."""
    return str(expand(value).absolute()) if isinstance(value, Path) else value


def _where(
    device: str, data_dir: AnyPath | None = None, *, runs_dir: AnyPath | None = None, run: Path | None = None
) -> Where:
    device = places.check_device(str(device) if isinstance(device, torch.device) else device)
    return Where(
        places.data_folder(Path(data_dir) if data_dir else None, run),
        expand(Path(runs_dir)) if runs_dir else folders.runs_dir(),
        folders.cache_dir(),
        device,
    )


@contextmanager
def _watcher(name: str, progress: bool) -> Iterator[Watcher]:
    """What the commands show, or nothing; what PyTorch refuses is told as they tell it."""
    callers = sys.exception()
    try:
        with (
            _alone(),
            TrainingDisplay(name) if progress else nullcontext(Watcher()) as watcher,
        ):
            yield watcher
    except BaseException as error:
        _let_go(error, callers)
        if isinstance(error, RuntimeError | MemoryError) and (words := devices.in_words(error)):
            raise CifarError(words) from None
        if words := devices.failure(error):
            raise CifarError(words) from error
        raise


def _let_go(error: BaseException, callers: BaseException | None) -> None:
    """Empty the frames that have ended with an error, and with those that led to it, but for what the caller handles.

    A notebook keeps its last exception, and this one network, images and the step's graph: the next run would find no
    memory.
    """
    chain = [error]
    for one in chain:  # which grows
        traceback.clear_frames(one.__traceback__)
        for led in (one.__context__, one.__cause__):
            if led is not None and led not in (callers, *chain):
                chain.append(led)


_TURN = threading.RLock()


@contextmanager
def _alone() -> Iterator[None]:
    """PyTorch as a command finds it, whatever the caller has set, which is as it was afterwards.

    Threads take turns: the random numbers of the host, and these settings, are those of all.
    """
    with _TURN, ExitStack() as settings:
        settings.enter_context(torch.random.fork_rng(devices=[]))
        settings.enter_context(devices.current_gpu_kept())
        settings.enter_context(devices.exact_float32)
        settings.enter_context(devices.deterministic(False))
        settings.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        if torch.get_default_device().type != "cpu":
            settings.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda", "mps"):
            if torch.is_autocast_enabled(kind):
                # Weights that are cast within would be kept, however they move, until the caller's own context ends.
                settings.enter_context(torch.autocast(kind, enabled=False, cache_enabled=False))
        settings.enter_context(torch.inference_mode(False))
        settings.enter_context(torch.enable_grad())
        yield

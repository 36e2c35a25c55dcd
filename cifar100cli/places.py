"""Where a command reads and writes, what it computes on, and for how long: folders, output files, the device."""

import contextlib
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cifar100cli import atomic, console, interrupts
from cifar100cli.bounded import kind_of
from cifar100cli.catalog import FOLDERS
from cifar100cli.errors import UsageError
from cifar100cli.folders import DATA_DIR, Where, cache_dir, expand, named_by, user_cache

if TYPE_CHECKING:
    from cifar100cli.runs import RunDir
    from cifar100cli.schema import Config


def check_output(flag: str, path: Path, inputs: Sequence[Path] = ()) -> Path:
    """Check, before the work for it begins, that a file can be written, and that nothing is lost that was work to make.

    Raises `UsageError` where it could not be written, and where it would take the place of one of `inputs` (which the
    command reads), of a file of a run or a data set, or of a model; a link counts as what it leads to.
    """
    if str(path) == "-":
        raise UsageError(f"{flag} -: cannot be standard output; name a file")
    path = expand(path)
    try:
        with contextlib.suppress(FileNotFoundError):
            path.stat()  # tells of names that are too long, links that go round in circles, and folders that are shut
        if path.is_dir():
            raise UsageError(f"{flag} {path}: is a folder; name a file")
        target = path.resolve()
        if not target.parent.is_dir():
            raise UsageError(f"{flag} {path}: its folder does not exist")
        if not atomic.is_permitted(path):
            raise UsageError(f"{flag} {path}: there is no permission to write it; choose another place")
        lost = _would_be_lost(path, target, inputs) if target.exists() else None
    except OSError as error:
        raise UsageError(f"{flag} {path}: cannot be written: {error.strerror}; choose another name") from None
    if lost is not None:
        raise UsageError(f"{flag} {path}: would overwrite {lost}; choose another name")
    return path


def check_pairs(flag: str, path: Path, split: str, inputs: Sequence[Path], taken: Path | None) -> Path:
    """A file for a picture of near-duplicates, as `check_output`; of the training images all are their own.

    `taken` is where the predictions go, if they are written: one file cannot be both.
    """
    if split == "train":
        raise UsageError(f"{flag}: looks for images that are nearly training images, and so not with the train split")
    if path.suffix.lower() != ".png":
        raise UsageError(f"{flag} {path}: the picture is a PNG file; give it a name that ends in .png")
    path = check_output(flag, path, inputs)
    if taken is not None and path.resolve() == taken.resolve():
        raise UsageError(f"{flag} {path}: the predictions go there; choose another name")
    return path


def _would_be_lost(path: Path, target: Path, inputs: Sequence[Path]) -> str | None:
    """What an existing file is that must not be written over, in words; `target` is what `path` leads to."""
    from cifar100cli.runs import CONFIG, FILES

    if any(target.samefile(given) for given in inputs):
        return "what it is made from"
    if any(one.name in FILES and kind_of(one.parent / CONFIG) == "file" for one in (path, target)):
        return "a file of a run"
    if target.parent.name in FOLDERS.values():
        return "a file of a data set"
    if target.suffix == ".safetensors":
        return "a model"
    return None


def data_folder(given: Path | None, run: Path | None = None) -> Path:
    """The folder that the user or the variable names; else the run's own, as it was last; else the user's cache."""
    named = expand(given) if given is not None else named_by(DATA_DIR)
    if named is not None:
        return named
    if run is not None:
        from cifar100cli.runs import RunDir

        place = RunDir(run if run.is_dir() else run.parent).last_place("data_dir")
        if place is not None:
            return Path(place)
    return user_cache()


def check_minutes(minutes: float, config: "Config") -> None:
    """Raise `UsageError` for a time that is none, and for a run whose time is not known beforehand."""
    if not isinstance(minutes, int | float) or not 0 < minutes < math.inf:
        told = f"{minutes:g}" if isinstance(minutes, int | float) else minutes
        raise UsageError(f"--minutes {told}: must be a finite number above 0")
    if config.distillation is not None:
        raise UsageError("--minutes: how long the teacher will take is not known beforehand; say how many --epochs")


def check_device(name: str) -> str:
    """A device by its name, or `UsageError`. Whether there is one is asked later."""
    if not isinstance(name, str) or not re.fullmatch(r"auto|cpu|cuda(:(0|[1-9][0-9]?))?|mps", name):
        raise UsageError(f"--device {name}: must be auto, cpu, cuda, cuda:N or mps")
    return name


def own_device(run: "RunDir", on_cpu: str, tell: Callable[[str], None]) -> str:
    """The device that a run was begun on, by its name here; `auto` where the run does not say.

    The number of a GPU is that of a machine, or of what a scheduler gave to a job: where there are others, it goes on
    on the first of these, and `tell` hears of it. Raises `UsageError` where there is none, with `on_cpu`, which says
    that it be the CPU, where the run can go on there.
    """
    import torch

    from cifar100cli import devices

    name = check_device(run.recorded("device") or "auto")
    try:
        devices.select_device(name)
    except UsageError as error:
        if name.startswith("cuda") and torch.cuda.is_available():
            tell(f"{run.path} was begun on {name}, which is not here: it goes on on the first GPU")
            return "cuda"
        config, reason = run.config(), str(error).partition(": ")[2].partition(";")[0]
        here, precision = devices.precision_of(config, torch.device("cpu")), run.recorded("precision")
        remedy = f"{on_cpu} goes on without it"
        if config.train.precision == "auto" and here != precision:
            remedy = f"resume it where there is one, for `train.precision: auto` means {here} on the CPU here"
        raise UsageError(f"{run.path}: was begun on {name}, and {reason}; {remedy}") from None
    return name


def start_pytorch() -> None:
    """Bring torch in, with all that a workflow needs of it, which takes a moment."""
    with console.waiting("starting PyTorch ..."), interrupts.at_once():
        from cifar100cli import machine, workflows  # noqa: F401 - for the command, where all is imported


def where(device: str, data_dir: Path | None = None, runs_dir: Path | None = None, run: Path | None = None) -> Where:
    """Folders and device for a workflow, with torch started."""
    check_device(device)
    start_pytorch()
    from cifar100cli import machine

    found = Where(data_folder(data_dir, run), expand(runs_dir or Path("runs")), cache_dir(), device)
    runs = f", runs folder {found.runs_dir.absolute()}" if runs_dir is not None else ""
    console.detail(f"data folder {found.data_dir.absolute()}{runs}")
    console.detail(machine.in_one_line(device))
    return found

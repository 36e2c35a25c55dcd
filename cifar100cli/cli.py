"""The command line: a command parses, calls one function of a lower level, and prints.

Everything slow (torch, Rich, the data) is imported by the command that needs it, so that `--help`,
`presets` and a usage error answer at once.
"""

import os
import re
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from typer.core import TyperGroup

from cifar100cli import __version__, console, show
from cifar100cli.errors import CifarError, DataError, RunInterrupted, Terminated, ToleranceError, UsageError

if TYPE_CHECKING:
    from cifar100cli.config import Override
    from cifar100cli.workflows import Where

ClickUsageError: Any = typer.BadParameter.__mro__[1]  # Typer carries its own copy of Click and does not export it


class _Stopped(Exception):  # noqa: N818
    """A KeyboardInterrupt on its way past Typer, which would make a plain exit of it."""

    def __init__(self, cause: KeyboardInterrupt) -> None:
        super().__init__(str(cause))
        self.cause = cause


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise _Stopped(stop) from None


app = typer.Typer(
    name="cifar100",
    cls=_Commands,
    help="Train image classifiers on CIFAR-100: reproduce the published figures, believe them, beat them.\n\n"
    "A first run, without a download: cifar100 train",
    rich_markup_mode=None,  # Rich's boxes would double the time that `--help` takes
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def main() -> NoReturn:
    """Run the command line and leave with the exit code of the contract."""
    signal.signal(signal.SIGTERM, _terminate)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background jobs start with it ignored
    console.use_safe_streams()
    console.set_verbosity(console.NORMAL)
    try:
        code = app(prog_name="cifar100", standalone_mode=False)
        sys.stdout.flush()
        if code == 130:  # Typer's word for Ctrl-C while it was still parsing
            console.error("interrupted")
    except _Stopped as stopped:
        code = _report_stop(stopped.cause)
    except KeyboardInterrupt as stop:
        code = _report_stop(stop)
    except CifarError as error:
        console.error(str(error))
        code = error.exit_code
    except ClickUsageError as error:
        console.error(_usage_message(error))
        code = error.exit_code
    except typer.Abort:
        code = 130
    except BrokenPipeError:  # `cifar100 report | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as error:
        if console.verbosity() >= console.VERBOSE:
            raise
        console.error(_os_message(error))
        code = 1
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, MemoryError) or re.search("out of memory|allocate memory", str(error))):
            raise
        console.error("out of memory: lower --batch-size or --image-size")
        code = 1
    sys.exit(code or 0)


def _terminate(*_: object) -> NoReturn:
    raise Terminated("terminated")


def _report_stop(stop: KeyboardInterrupt) -> int:
    if isinstance(stop, RunInterrupted):
        saved = f"{stop.finished} of {stop.epochs} epochs are done and saved" if stop.finished else "no epoch was done"
        console.error(f"interrupted: {saved}; go on with: cifar100 train --resume {shlex.quote(str(stop.run_dir))}")
        return stop.exit_code
    console.error("interrupted")
    return stop.exit_code if isinstance(stop, Terminated) else 130


def _usage_message(error: Any) -> str:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "cifar100"
    near = getattr(error, "possibilities", None)
    message = f"{error.message}; did you mean {sorted(near)[0]}?" if near else error.format_message()
    return f"{message.rstrip('.')} (`{command} --help` lists what there is)"


def _os_message(error: OSError) -> str:
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{error.strerror or error}"


# ----------------------------------------------------------------------------------------- shared options


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"cifar100 {__version__}")
        raise typer.Exit


def _verbosity(level: int) -> Callable[[bool], None]:
    def set_level(wanted: bool) -> None:
        if wanted:
            console.set_verbosity(level)

    return set_level


Quiet = Annotated[
    bool,
    typer.Option(
        "-q",
        "--quiet",
        callback=_verbosity(console.QUIET),
        is_eager=True,
        help="Show results and errors only.",
    ),
]
Verbose = Annotated[
    bool,
    typer.Option("-v", "--verbose", callback=_verbosity(console.VERBOSE), is_eager=True, help="Tell what goes on."),
]
Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON document on stdout.")]
DataDir = Annotated[
    Path | None,
    typer.Option(envvar="CIFAR100_DATA_DIR", metavar="DIR", help="Where data sets are; default: the user's cache."),
]
RunsDir = Annotated[
    Path,
    typer.Option("--out", envvar="CIFAR100_RUNS_DIR", metavar="DIR", help="Where run folders go."),
]
Device = Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda, cuda:N or mps.")]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help(), end="")


def _expand(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:
        raise UsageError(f"{path}: there is no such user's home") from None


def _check_output(flag: str, path: Path) -> Path:
    """A file to be written must be possible before the work for it begins."""
    path = _expand(path)
    if path.is_dir():
        raise UsageError(f"{flag} {path}: is a folder; name a file")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{flag} {path}: there is no such folder to write it in")
    from cifar100cli.runs import FILES

    if path.name in FILES and path.exists():
        raise UsageError(f"{flag} {path}: would overwrite a file of a run; choose another name")
    return path


def _data_dir(given: Path | None, run: Path | None = None) -> Path:
    """The folder that the user names; else the one that the run was trained from; else the user's cache."""
    if given is not None:
        return _expand(given)
    if run is not None and run.is_dir():
        from cifar100cli.runs import RunDir

        recorded = RunDir(run).recorded("data_dir")
        if recorded is not None and Path(recorded).is_dir():
            return Path(recorded)
    from platformdirs import user_cache_path

    return user_cache_path("cifar100", appauthor=False)


def _check_device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?|mps", name):
        raise UsageError(f"--device {name}: must be auto, cpu, cuda, cuda:N or mps")
    return name


def _where(data_dir: Path | None, runs_dir: Path, device: str, run: Path | None = None) -> "Where":
    """Folders and device for a workflow. Importing it brings torch in, which takes a moment."""
    _check_device(device)
    with console.waiting("starting PyTorch ..."):
        from cifar100cli import workflows
    where = workflows.Where(_data_dir(data_dir, run), _expand(runs_dir), device)
    console.detail(f"data folder {where.data_dir.absolute()}, runs folder {where.runs_dir.absolute()}")
    console.detail(workflows.machine(device))
    return where


def _overrides(settings: list[str], flags: dict[str, tuple[str, object]]) -> list["Override"]:
    """What `--set` and the flags say, as overrides of the preset. Both for one key is a mistake."""
    from cifar100cli.config import Override, parse_value

    overrides: dict[str, Override] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        key = key.strip()
        if not equals or not key:
            raise UsageError(f"--set {setting}: must be KEY=VALUE, as in --set optimizer.lr=0.01")
        overrides[key] = Override(key, parse_value(value, key), f"--set {key}")
    for key, (flag, given) in flags.items():
        if given is None:
            continue
        if key in overrides:
            raise UsageError(f"{flag} and --set {key} both say what {key} is; leave one out")
        overrides[key] = Override(key, parse_value(given, key) if isinstance(given, str) else given, flag)
    return list(overrides.values())


# ------------------------------------------------------------------------------------------------ commands


@app.command()
def download(
    dataset: Annotated[
        list[str] | None, typer.Option(metavar="cifar100|cifar10", help="May be repeated; default: cifar100.")
    ] = None,
    data_dir: DataDir = None,
    url: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="Mirrors to try in turn; default: the official page."),
    ] = None,
    from_file: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="An archive that is already on this machine."),
    ] = None,
    sha256: Annotated[
        str,
        typer.Option(metavar="HEX|none", help="What the archive's digest must be.", show_default="official"),
    ] = "official",
    force: Annotated[bool, typer.Option("--force", help="Fetch again what is already there.")] = False,
    retries: Annotated[int, typer.Option(min=0, help="Attempts in a row without progress before giving up.")] = 5,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds without a byte before an attempt fails.")] = 30.0,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Fetch and verify CIFAR-100 or CIFAR-10.

    A download that was broken off goes on where it stopped.

    Example: cifar100 download --dataset cifar100 --dataset cifar10
    """
    names = list(dict.fromkeys(dataset or ["cifar100"]))
    if len(names) > 1 and (url or from_file or sha256 != "official"):
        raise UsageError("--url, --from and --sha256 are about one archive: name one --dataset with them")
    if url and from_file:
        raise UsageError("--url and --from exclude each other")
    from cifar100cli.download import ARCHIVES, install

    unknown = [name for name in names if name not in ARCHIVES]
    if unknown:
        raise UsageError(f"--dataset {unknown[0]}: must be one of {', '.join(ARCHIVES)}")
    reports = []
    for name in names:
        archive = ARCHIVES[name]
        with console.transfer(archive.folder) as progress:
            installed = install(
                archive,
                _data_dir(data_dir),
                urls=url or (),
                source=_expand(from_file) if from_file else None,
                sha256=_digest(sha256, archive.sha256),
                force=force,
                check=lambda folder, name=name: _check_dataset(name, folder),  # type: ignore[misc]
                progress=progress,
                log=console.log,
                retries=retries,
                timeout=timeout,
            )
        reports.append(
            {
                "dataset": name,
                "path": str(installed.path),
                "official": installed.official,
                "sha256": installed.sha256,
                "already_there": installed.already_there,
                "fetched_bytes": installed.fetched_bytes,
                "resumed_bytes": installed.resumed_bytes,
            }
        )
        if not json:
            state = "is already in place" if installed.already_there else "is in place"
            kind = "the official files" if installed.official else "not the official files, but of the right shape"
            console.result(f"{name} {state}: {installed.path} ({kind})")
    if json:
        console.result_json(reports[0] if len(reports) == 1 else reports)


def _check_dataset(name: str, folder: Path) -> None:
    from cifar100cli import datasets

    datasets.READERS[name](folder)


def _digest(given: str, official: str) -> str | None:
    if given == "official":
        return official
    if given.lower() == "none":
        return None
    if not re.fullmatch(r"[0-9a-fA-F]{64}", given):
        raise UsageError(f"--sha256 {given}: must be 64 hexadecimal digits, or none")
    return given.lower()


@app.command()
def train(
    preset: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="One of `cifar100 presets`, or a YAML file.")
    ] = None,
    dataset: Annotated[str | None, typer.Option(metavar="NAME", help="cifar100, cifar10 or synthetic.")] = None,
    backbone: Annotated[str | None, typer.Option(metavar="NAME", help="Any image model that timm knows.")] = None,
    pretrained: Annotated[
        bool | None, typer.Option("--pretrained/--no-pretrained", help="Start from ImageNet weights.")
    ] = None,
    image_size: Annotated[str | None, typer.Option(metavar="N", help="Side in pixels.")] = None,
    batch_size: Annotated[str | None, typer.Option(metavar="N", help="Images in a training step.")] = None,
    augment: Annotated[str | None, typer.Option(metavar="POLICY", help="none, flip or crop_flip.")] = None,
    loss: Annotated[str | None, typer.Option(metavar="NAME", help="cross_entropy, arcface or cosface.")] = None,
    label_smoothing: Annotated[str | None, typer.Option(metavar="X", help="From 0 to below 1.")] = None,
    optimizer: Annotated[str | None, typer.Option(metavar="NAME", help="adamw, adam or sgd.")] = None,
    lr: Annotated[str | None, typer.Option(metavar="X", help="Learning rate.")] = None,
    weight_decay: Annotated[str | None, typer.Option(metavar="X", help="Weight decay.")] = None,
    epochs: Annotated[str | None, typer.Option(metavar="N", help="Passes over the training images.")] = None,
    seed: Annotated[str | None, typer.Option(metavar="N", help="Of weights, order and augmentation.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set any key; may be repeated.")
    ] = None,
    data_dir: DataDir = None,
    device: Device = "auto",
    out: RunsDir = Path("runs"),
    resume: Annotated[str | None, typer.Option(metavar="RUN|last", help="Go on with a run that was stopped.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check it all, take one step, write nothing.")] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the resolved preset as YAML and exit.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train a preset, with flags that override it.

    Without a preset it runs `quickstart`, on drawn images that need no download.

    Example: cifar100 train --preset resnet18-baseline --epochs 10 --seed 1
    """
    from cifar100cli.config import DEFAULT_PRESET, Preset, load_preset

    flags: dict[str, tuple[str, object]] = {
        "data.dataset": ("--dataset", dataset),
        "model.backbone": ("--backbone", backbone),
        "model.pretrained": ("--pretrained", pretrained),
        "data.image_size": ("--image-size", image_size),
        "data.batch_size": ("--batch-size", batch_size),
        "augment.policy": ("--augment", augment),
        "loss.name": ("--loss", loss),
        "loss.label_smoothing": ("--label-smoothing", label_smoothing),
        "optimizer.name": ("--optimizer", optimizer),
        "optimizer.lr": ("--lr", lr),
        "optimizer.weight_decay": ("--weight-decay", weight_decay),
        "train.epochs": ("--epochs", epochs),
        "seed": ("--seed", seed),
    }
    overrides = _overrides(settings or [], flags)
    _check_device(device)
    if resume is not None:
        _resume(resume, preset, overrides, data_dir, out, device, json, dry_run or print_config)
        return
    chosen: Preset = load_preset(preset or DEFAULT_PRESET, overrides)
    if print_config:
        if json:
            console.result_json(chosen.config.model_dump(mode="json"))
        else:
            console.result(chosen.config.to_yaml().rstrip())
        return
    if not dry_run:
        from cifar100cli.runs import check_writable

        check_writable(_expand(out))
    if chosen.config.data.dataset != "synthetic":
        from cifar100cli import datasets

        datasets.find(chosen.config.data.dataset, _data_dir(data_dir))  # before PyTorch, which takes seconds to load
    where = _where(data_dir, out, device)
    from cifar100cli import workflows

    if dry_run:
        show.dry_run(workflows.dry_run(chosen, where), json)
        return
    display = console.TrainingDisplay(chosen.name)
    try:
        result = workflows.train(chosen, where, display)
    finally:
        display.close()
    show.training(result, chosen.config.published, json)


def _resume(
    name: str,
    preset: str | None,
    overrides: list["Override"],
    data_dir: Path | None,
    runs_dir: Path,
    device: str,
    json: bool,
    no_training: bool,
) -> None:
    from cifar100cli.config import Override, load_preset
    from cifar100cli.runs import CONFIG, RunDir, latest_unfinished

    if no_training:
        raise UsageError("--resume trains on: it does not go together with --dry-run or --print-config")
    stem = load_preset(preset).name if preset else None
    run = latest_unfinished(_expand(runs_dir), stem) if name == "last" else RunDir.open(_expand(Path(name)))
    if preset or overrides:
        # A seed that is not given again is the run's.
        if not any(override.key == "seed" for override in overrides):
            overrides = [*overrides, Override("seed", run.config().seed, "the run")]
        asked = load_preset(preset or str(run.path / CONFIG), overrides).config
    else:
        asked = run.config()
    if device == "auto":
        device = run.recorded("device") or device
    where = _where(data_dir, runs_dir, device, run.path)
    from cifar100cli import workflows

    workflows.refuse_other_settings(run, asked)
    display = console.TrainingDisplay(run.preset)
    try:
        result = workflows.resume(run, where, display)
    finally:
        display.close()
    show.training(result, run.config().published, json)


@app.command()
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(metavar="RUN|CHECKPOINT", help="A run folder, or a .safetensors file.")],
    split: Annotated[Literal["test", "val", "train"], typer.Option(help="Which images to measure on.")] = "test",
    predictions: Annotated[
        Path | None, typer.Option(metavar="FILE.csv", help="Write every image's prediction.")
    ] = None,
    data_dir: DataDir = None,
    device: Device = "auto",
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure a trained model on one of its splits.

    Accuracy, loss, calibration, classes and confusions.

    Example: cifar100 evaluate runs/resnet18-baseline/20260101-120000-seed0 --predictions test.csv
    """
    from cifar100cli.runs import find_model

    csv_file = _check_output("--predictions", predictions) if predictions is not None else None
    find_model(_expand(checkpoint))
    where = _where(data_dir, Path("runs"), device, _expand(checkpoint))
    from cifar100cli import workflows

    with console.waiting("evaluating ..."):
        result = workflows.evaluate(_expand(checkpoint), where, split, csv_file)
    show.evaluation(result, json)
    if csv_file is not None:
        console.log(f"predictions are in {csv_file}")


@app.command()
def presets(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Show this one as YAML.")] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """List the presets, or show one as YAML.

    Example: cifar100 presets resnet18-baseline > mine.yaml
    """
    from cifar100cli.config import load_preset, shipped_presets

    if name is not None:
        config = load_preset(name).config
        if json:
            console.result_json({"name": name, **config.model_dump(mode="json")})
        else:
            console.result(config.to_yaml().rstrip())
        return
    show.presets(dict(shipped_presets()), json)


@app.command()
def report(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[RUN|DIR]...", help="Runs, or folders of runs; default: all."),
    ] = None,
    out_format: Annotated[
        Literal["table", "markdown", "csv", "json"] | None,
        typer.Option("--format", help="Default: by the name of --out, else table."),
    ] = None,
    json: Json = False,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write it to a file.")] = None,
    check: Annotated[
        float | None,
        typer.Option(min=0, metavar="POINTS", help="Exit 5 when a mean is further from its published figure."),
    ] = None,
    runs_dir: Annotated[
        Path,
        typer.Option("--runs-dir", envvar="CIFAR100_RUNS_DIR", metavar="DIR", help="Where run folders are."),
    ] = Path("runs"),
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Set every run beside its published figure.

    Example: cifar100 report --format markdown --out report.md
    """
    from cifar100cli import report as reports

    if json and out_format not in (None, "json"):
        raise UsageError(f"--json and --format {out_format} exclude each other")
    if out is not None:
        out = _check_output("--out", out)
    chosen = "json" if json else out_format or reports.format_of(out)
    found = reports.collect([_expand(folder) for folder in folders or [runs_dir]])
    text = reports.render(found, chosen)
    if out is not None:
        from cifar100cli.runs import write_text

        write_text(out, text)
        console.log(f"the report is in {out}")
    elif chosen == "table":
        reports.show_table(found)
    else:
        sys.stdout.write(text)
    if check is not None:
        _check_tolerance(found, check)


def _check_tolerance(found: Any, tolerance: float) -> None:
    from cifar100cli import report as reports

    outside = reports.outside_tolerance(found, tolerance)
    if outside:
        raise ToleranceError("; ".join(outside))
    if not any(row.delta is not None for row in found.rows):
        raise DataError("--check: there is no complete run with a published figure to compare with")
    console.log(f"every mean is within {tolerance:g} points of its published figure")

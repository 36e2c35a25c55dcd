"""The command line: a command parses, calls one function of a lower level, and prints.

Everything slow (torch, Rich, the data) is imported by the command that needs it, so that `--help`,
`presets` and a usage error answer at once.
"""

import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from cifar100cli import __version__, completion, console, exits, extras, options, places, ranks, show, training
from cifar100cli.catalog import FOLDERS
from cifar100cli.display import TrainingDisplay, transfer
from cifar100cli.errors import DataError, ToleranceError, UsageError, did_you_mean
from cifar100cli.folders import DATA_DIR, DEFAULT_RUNS, RUNS_DIR, expand

app = typer.Typer(
    name="cifar100",
    cls=exits.Commands,
    help="Train image classifiers on CIFAR-100 and CIFAR-10: reproduce the published figures, believe them, beat "
    "them.\n\nA first run, without a download: cifar100 train",
    rich_markup_mode=None,  # Rich's boxes would double the time that `--help` takes
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def main() -> NoReturn:
    """Run the command line and leave with the exit code of the contract."""
    exits.leave_with(app)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"cifar100 {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


def _one_process() -> None:
    """With torchrun, the first rank of each machine does what several could only do twice."""
    if ranks.local_rank() > 0:
        raise typer.Exit


# ------------------------------------------------------------------------------------------------ commands


@app.command()
def download(
    dataset: Annotated[
        list[str] | None,
        typer.Option(
            metavar="|".join(FOLDERS),
            help="May be repeated; default: cifar100.",
            autocompletion=completion.words(*FOLDERS),
        ),
    ] = None,
    data_dir: options.DataDir = None,
    url: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="Mirrors to try in turn; default: the official page."),
    ] = None,
    from_file: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="An archive that is already on this machine.", readable=False),
    ] = None,
    sha256: Annotated[
        str,
        typer.Option(metavar="HEX|none", help="What the archive's digest must be.", show_default="official"),
    ] = "official",
    force: Annotated[bool, typer.Option("--force", help="Fetch again what is already there.")] = False,
    retries: Annotated[int, typer.Option(min=0, metavar="N", help="Attempts in a row without progress.")] = 5,
    timeout: Annotated[
        float,
        typer.Option(min=0.1, max=86400, metavar="SECONDS", help="How long without a byte is a failed attempt."),
    ] = 30.0,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Fetch and verify CIFAR-100 or CIFAR-10.

    A download that was broken off goes on where it stopped.

    Example: cifar100 download --dataset cifar100 --dataset cifar10
    """
    _one_process()
    names = list(dict.fromkeys(dataset or ["cifar100"]))
    if len(names) > 1 and (url or from_file or sha256 != "official"):
        raise UsageError("--url, --from and --sha256 are about one archive: name one --dataset with them")
    if url and from_file:
        raise UsageError("--url and --from exclude each other")
    from cifar100cli.download import ARCHIVES, install

    unknown = [name for name in names if name not in ARCHIVES]
    if unknown:
        raise UsageError(
            f"--dataset {unknown[0]}: must be one of {', '.join(ARCHIVES)}{did_you_mean(unknown[0], ARCHIVES)}"
        )
    reports = []
    for name in names:
        archive = ARCHIVES[name]
        with transfer(archive.folder) as progress:
            installed = install(
                archive,
                places.data_folder(data_dir),
                urls=url or (),
                source=expand(from_file) if from_file else None,
                sha256=None if sha256.lower() == "none" else sha256,
                force=force,
                check=lambda folder, name=name: _check_dataset(name, folder),  # type: ignore[misc]
                progress=progress,
                log=console.log,
                retries=retries,
                timeout=timeout,
            )
        reports.append({**asdict(installed), "path": str(installed.path)})
        if not json:
            state = "is already in place" if installed.already_there else "is in place"
            kind = "the official files" if installed.official else "not the official files, but of the right shape"
            console.result(f"{name} {state}: {installed.path} ({kind})")
    if json:
        console.result_json(reports[0] if len(reports) == 1 else reports)


def _check_dataset(name: str, folder: Path) -> None:
    from cifar100cli import datasets

    datasets.READERS[name](folder)


@app.command()
def train(
    context: typer.Context,
    preset: options.Preset = None,
    dataset: options.Dataset = None,
    backbone: options.Backbone = None,
    pretrained: options.Pretrained = None,
    weights: options.Weights = None,
    image_size: options.ImageSize = None,
    batch_size: options.BatchSize = None,
    augment: options.AugmentPolicy = None,
    loss: options.LossName = None,
    label_smoothing: options.LabelSmoothing = None,
    optimizer: options.OptimizerName = None,
    lr: options.LearningRate = None,
    weight_decay: options.WeightDecay = None,
    epochs: options.Epochs = None,
    minutes: options.Minutes = None,
    seed: options.Seed = None,
    seeds: options.Seeds = 1,
    ablate: options.Ablate = None,
    settings: options.Settings = None,
    data_dir: options.DataDir = None,
    device: options.Device = "auto",
    out: options.RunsDir = Path(DEFAULT_RUNS),
    log: options.Log = None,
    resume: options.Resume = None,
    dry_run: options.DryRun = False,
    print_config: options.PrintConfig = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Train a preset, with flags that override it.

    Without a preset it runs `quickstart`, on drawn images that need no download.

    Example: cifar100 train --preset resnet18-baseline --epochs 10 --seeds 3
    """
    from cifar100cli.config import DEFAULT_PRESET

    training.train(context.params, DEFAULT_PRESET)


@app.command()
def distill(
    context: typer.Context,
    teacher: options.Teacher = None,
    alpha: options.Alpha = None,
    temperature: options.Temperature = None,
    preset: options.Preset = None,
    dataset: options.Dataset = None,
    backbone: options.Backbone = None,
    pretrained: options.Pretrained = None,
    weights: options.Weights = None,
    image_size: options.ImageSize = None,
    batch_size: options.BatchSize = None,
    augment: options.AugmentPolicy = None,
    loss: options.LossName = None,
    label_smoothing: options.LabelSmoothing = None,
    optimizer: options.OptimizerName = None,
    lr: options.LearningRate = None,
    weight_decay: options.WeightDecay = None,
    epochs: options.Epochs = None,
    seed: options.Seed = None,
    seeds: options.Seeds = 1,
    ablate: options.Ablate = None,
    settings: options.Settings = None,
    data_dir: options.DataDir = None,
    device: options.Device = "auto",
    out: options.RunsDir = Path(DEFAULT_RUNS),
    log: options.Log = None,
    resume: options.Resume = None,
    dry_run: options.DryRun = False,
    print_config: options.PrintConfig = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Train a student on labels and a teacher's logits.

    Without a preset it runs `resnet18-arcface-kd`. Under --augment none or flip the teacher looks at each image
    once, and its logits are kept for the next run. Newer forms: --set distillation.form=decoupled and
    --set distillation.standardize=true.

    Example: cifar100 distill --teacher runs/resnet50-arcface-224/20260101-120000-seed0
    """
    training.train(context.params, "resnet18-arcface-kd", "distill")


@app.command("finetune-cifar10")
def finetune_cifar10(
    context: typer.Context,
    unfreeze: options.Unfreeze = None,
    init: options.Init = None,
    bn: options.BatchNorm = None,
    fraction: options.Fraction = None,
    cache: options.Cache = None,
    preset: options.Preset = None,
    dataset: options.Dataset = None,
    backbone: options.Backbone = None,
    weights: options.Weights = None,
    image_size: options.ImageSize = None,
    batch_size: options.BatchSize = None,
    augment: options.AugmentPolicy = None,
    optimizer: options.OptimizerName = None,
    lr: options.LearningRate = None,
    weight_decay: options.WeightDecay = None,
    epochs: options.Epochs = None,
    minutes: options.Minutes = None,
    seed: options.Seed = None,
    seeds: options.Seeds = 1,
    ablate: options.Ablate = None,
    settings: options.Settings = None,
    data_dir: options.DataDir = None,
    device: options.Device = "auto",
    out: options.RunsDir = Path(DEFAULT_RUNS),
    log: options.Log = None,
    resume: options.Resume = None,
    dry_run: options.DryRun = False,
    print_config: options.PrintConfig = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Fine-tune a pretrained network, most of it frozen.

    The frozen part runs once for each image and its mirror image, and the epochs train the rest. Without options it is
    ResNet-18 with ImageNet weights on CIFAR-10 at 224x224, fc and layer4 unfrozen, for 10 epochs.

    Example: cifar100 finetune-cifar10 --unfreeze layer3 --epochs 50
    """
    training.train(context.params, _study_preset(context.params), "finetune-cifar10")


def _study_preset(given: Mapping[str, Any]) -> str:
    """The preset of the study's cell, if it has one for the depth and the epochs that are asked for."""
    from cifar100cli.config import preset_names

    asked = {override.key: override.value for override in options.overrides(given)}
    depth, epochs = f"finetune-{asked.get('finetune.unfreeze', 'layer4')}", asked.get("train.epochs")
    names = preset_names()
    return next((name for name in (f"{depth}-{epochs}", depth) if name in names), "finetune-layer4")


@app.command()
def evaluate(
    checkpoints: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN|CHECKPOINT",
            help="Run folders or .safetensors files; several are an ensemble.",
            autocompletion=completion.trained,
            readable=False,
        ),
    ],
    split: Annotated[Literal["test", "val", "train"], typer.Option(help="Which images to measure on.")] = "test",
    tta: Annotated[
        bool, typer.Option("--tta", help="Average over six views of each image: mirrored, and shifted by a pixel.")
    ] = False,
    predictions: Annotated[
        Path | None, typer.Option(metavar="FILE.csv", help="Write every image's prediction.", readable=False)
    ] = None,
    near_duplicates: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png",
            help="Find images that are nearly training images, measure without them, and draw the pairs.",
            readable=False,
        ),
    ] = None,
    data_dir: options.DataDir = None,
    device: options.Device = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure a trained model, or several as an ensemble.

    Accuracy, loss, calibration, classes and confusions. Several models answer with the mean of their probabilities.

    Example: cifar100 evaluate runs/resnet18-baseline/20260101-120000-seed0 --predictions test.csv
    """
    from cifar100cli.card import check_models
    from cifar100cli.runs import find_model

    models = [expand(checkpoint) for checkpoint in checkpoints]
    files = [find_model(model) for model in models]
    check_models(files, split)
    csv_file = places.check_output("--predictions", predictions, files) if predictions is not None else None
    drawing = None
    if near_duplicates is not None:
        drawing = places.check_pairs("--near-duplicates", near_duplicates, split, files, csv_file)
    where = places.where(device, data_dir, run=models[0])
    from cifar100cli import evaluation

    with TrainingDisplay("evaluate") as display:
        measured = evaluation.measure(models, where, display, split, tta=tta, near_duplicates=drawing is not None)
    show.evaluation(measured.result, json)
    if csv_file is not None:
        measured.write(csv_file)  # last, so that a full disk costs no figures
        console.log(f"predictions are in {csv_file}")
    if drawing is not None:
        measured.draw_near_duplicates(drawing)
        if measured.result["near_duplicates"]["count"]:
            console.log(f"the pairs are in {drawing}, the closest first; those of two classes have a red frame")
        else:
            console.log(f"no image is nearly one that was trained on: {drawing} is not written")


@app.command()
def predict(
    checkpoint: options.Model,
    images: Annotated[
        list[Path],
        typer.Argument(metavar="IMAGE", help="Pictures, folders of pictures, or - for standard input.", readable=False),
    ],
    top: Annotated[int, typer.Option(min=1, metavar="K", help="How many classes to show for each picture.")] = 5,
    device: options.Device = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Classify pictures of your own.

    Any size and kind: the middle square is made as small as the images that the model knows. A file that is no image
    is named and skipped, and the exit code is then 3.

    Example: cifar100 predict runs/resnet18-arcface-224/20260101-120000-seed0 cat.jpg holidays/ --top 3
    """
    _one_process()
    from cifar100cli.images import find_images
    from cifar100cli.runs import find_model

    model = find_model(expand(checkpoint))  # what is not there is told before PyTorch is loaded
    pictures = find_images([expand(image) for image in images])
    where = places.where(device)
    from cifar100cli import workflows

    with TrainingDisplay("predict") as display:
        result = workflows.predict(model, pictures, where, display, top)
    show.prediction(result, json)
    skipped = [f"{show.source(skip['image'])}: {skip['reason']}" for skip in result["skipped"]]
    for line in skipped[1:]:
        console.log(f"skipped: {line}")
    if skipped:
        more = f" (and {len(skipped) - 1} more)" if len(skipped) > 1 else ""
        raise DataError(f"skipped: {skipped[0]}{more}")


@app.command()
def export(
    checkpoint: options.Model,
    out: Annotated[Path, typer.Option(metavar="FILE.onnx", help="Where to write the graph.", readable=False)],
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Write a trained model as an ONNX file.

    Resizing and normalisation are inside: uint8 RGB images (N, 3, 32, 32) go in, logits come out, and class names are
    in the metadata. The file is checked under ONNX Runtime before it gets its name. This needs an extra:
    pip install onnx onnxruntime onnxscript

    Example: cifar100 export runs/resnet18-baseline/20260101-120000-seed0 --out model.onnx
    """
    _one_process()
    if out.suffix.lower() != ".onnx":
        raise UsageError(f"--out {out}: must end in .onnx")
    from cifar100cli.runs import find_model

    out = places.check_output("--out", out, [find_model(expand(checkpoint))])
    extras.check("export", *extras.EXPORT)
    with console.waiting("starting PyTorch ..."):
        from cifar100cli import export as exporting
    with console.waiting("exporting ..."):
        result = exporting.export(expand(checkpoint), out)
    show.export(result, json)


@app.command()
def bench(
    context: typer.Context,
    preset: options.Preset = None,
    teacher: options.Teacher = None,
    backbone: options.Backbone = None,
    image_size: options.ImageSize = None,
    batch_size: options.BatchSize = None,
    augment: options.AugmentPolicy = None,
    settings: options.Settings = None,
    device: options.Device = "auto",
    steps: Annotated[
        int | None,
        typer.Option(min=1, max=1000, metavar="N", help="Steps per measurement; default: some seconds of them."),
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option(min=1, max=1000, metavar="N", help="Measurements of each; default: 7, or 3 long ones."),
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure how fast a preset trains on this machine.

    The real training loop, the bare step without a data path, and the plain way (a DataLoader of single images,
    float32), in turn in one process, on images of noise: no data set is needed.

    Example: cifar100 bench --preset resnet18-baseline
    """
    from cifar100cli.config import load_preset

    chosen = load_preset(preset or "resnet18-baseline", options.overrides(context.params))
    if ranks.count() > 1:
        raise UsageError("bench measures one device: run it without torchrun")
    if chosen.config.distillation is not None:
        from cifar100cli.runs import find_model

        find_model(Path(chosen.config.distillation.required_teacher()))
    where = places.where(device)
    from cifar100cli import benchmark

    with TrainingDisplay(chosen.name) as display:
        result = benchmark.bench(chosen, where, display, steps=steps, repeats=repeats)
    show.bench(result, json)


@app.command()
def presets(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Show this one as YAML.", autocompletion=completion.presets)
    ] = None,
    keys: Annotated[bool, typer.Option("--keys", help="List every key that a preset may have.")] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """List the presets or their keys, or show one as YAML.

    Example: cifar100 presets resnet18-baseline > mine.yaml
    """
    _one_process()
    from cifar100cli.config import load_preset, shipped_presets
    from cifar100cli.keys import described_keys

    if keys:
        if name is not None:
            raise UsageError("presets --keys lists the keys of every preset: leave the name out")
        show.keys(described_keys(), json)
        return
    if name is not None:
        config = load_preset(name).config
        if json:
            console.result_json({"name": name, **config.model_dump(mode="json")})
        else:
            console.result(config.to_yaml(ascii_only=not console.takes_unicode()).rstrip())
        return
    show.presets(dict(shipped_presets()), json)


@app.command()
def report(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="RUN|DIR", help="Runs, or folders of runs; default: all of --runs-dir.", readable=False),
    ] = None,
    out_format: Annotated[
        Literal["table", "markdown", "csv", "json", "html"] | None,
        typer.Option("--format", help="Default: by the name of --out, else table."),
    ] = None,
    json: options.Json = False,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write it to a file.", readable=False)
    ] = None,
    check: Annotated[
        float | None,
        typer.Option(
            min=0, max=100, metavar="POINTS", help="Exit 5 when a mean is further than this from its published figure."
        ),
    ] = None,
    runs_dir: Annotated[
        Path,
        typer.Option("--runs-dir", envvar=RUNS_DIR, metavar="DIR", help="Where run folders are.", readable=False),
    ] = Path(DEFAULT_RUNS),
    data_dir: Annotated[
        Path | None,
        typer.Option(
            envvar=DATA_DIR,
            metavar="DIR",
            help="Where example images for the page are; default: where a run found them.",
            readable=False,
        ),
    ] = None,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Set every run beside its published figure.

    With the name of an HTML file it is a page to look at: tables, learning curves, calibration, confusions, mistakes.

    Example: cifar100 report --out report.html
    """
    _one_process()
    from cifar100cli import report as reports
    from cifar100cli import report_text

    if json and out is None and out_format not in (None, "json"):
        raise UsageError(f"--json and --format {out_format} exclude each other where no --out takes one of them")
    if out is not None:
        out = places.check_output("--out", out)
    chosen = out_format or report_text.format_of(out, json=json)
    found = reports.collect([expand(folder) for folder in folders or [runs_dir]])
    if chosen == "table" and out is None:
        report_text.show_table(found)
    else:
        if chosen == "html":
            from cifar100cli import page

            text = page.render(found, expand(data_dir) if data_dir is not None else None)
        else:
            text = report_text.render(found, chosen)
        if out is None:
            if chosen == "html" and not console.takes_unicode():
                text = text.encode("ascii", "xmlcharrefreplace").decode()
            sys.stdout.write(text)
        else:
            from cifar100cli.atomic import write_text

            write_text(out, text)
            console.log(f"the report is in {out}")
    if json and out is not None:
        sys.stdout.write(report_text.render(found, "json"))
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
    others = [f"{row.preset}{reports.changed(row)}" for row in found.rows if row.delta is not None and row.departs]
    if others:
        console.log(f"of these, not with the settings that the figure was published for: {'; '.join(others)}")

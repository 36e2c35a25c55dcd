"""From the options of a command that trains to what it does: what does not go together is refused beforehand."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar100cli import console, execution, options, places, ranks, resuming, show, trackers
from cifar100cli.bounded import kind_of
from cifar100cli.catalog import TITLES
from cifar100cli.display import TrainingDisplay
from cifar100cli.errors import DataError, UsageError
from cifar100cli.folders import expand
from cifar100cli.options import Request
from cifar100cli.resuming import SECTIONS

if TYPE_CHECKING:
    from cifar100cli.config import Override, Preset
    from cifar100cli.schema import Config


def train(given: Mapping[str, Any], default_preset: str, command: str = "train") -> None:
    """Do what a command that trains is asked for by its options, `given` by their names, and show the result."""
    from cifar100cli import ablation
    from cifar100cli.config import flat, idle, load_preset

    request, overrides = Request.of(given), options.overrides(given)
    places.check_device(request.device)
    trackers.check(request.log)
    if request.resume is not None:
        resuming.resume(request, overrides, command)
        return
    _check_together(request, overrides)
    chosen = load_preset(request.preset or default_preset, overrides)
    _check_command(command, chosen, overrides)
    for override in overrides:
        if reason := idle(override.key, flat(chosen.config)):
            console.log(f"{override.origin} does nothing here, for {reason}")
    if request.minutes is not None:
        places.check_minutes(request.minutes, chosen.config)
    blocks = [name.strip() for name in ",".join(request.ablate).split(",") if name.strip()]
    left_out = ablation.without(chosen.config, blocks) if request.ablate else {}
    in_turn = _in_turn(chosen, request.seeds)
    if request.print_config:
        config = _as_a_preset(chosen, request.preset or default_preset)
        if request.json:
            console.result_json(config.model_dump(mode="json"))
        else:
            console.result(config.to_yaml(ascii_only=not console.takes_unicode()).rstrip())
        return
    if not request.dry_run:
        from cifar100cli.runs import check_writable

        ranks.on_first(lambda: check_writable(expand(request.out)))
    _check_inputs(chosen.config, request.data_dir)
    where = places.where(request.device, request.data_dir, request.out)
    if request.minutes is not None:
        from cifar100cli.time_limit import within

        with TrainingDisplay(chosen.name) as display:
            chosen = within(chosen, request.minutes, where, display)
        left_out = ablation.without(chosen.config, blocks) if request.ablate else {}
        in_turn = _in_turn(chosen, request.seeds)
    if request.dry_run:
        from cifar100cli import workflows

        with TrainingDisplay(chosen.name) as display:
            show.dry_run(workflows.dry_run(chosen, where, display), request.json)
        return
    if left_out:
        execution.ablate(in_turn, left_out, request, where)
    elif len(in_turn) > 1:
        execution.seeds(in_turn, request, where)
    else:
        show.training(execution.one(chosen, request, where), chosen.config, request.json)


def _check_together(request: Request, overrides: Sequence["Override"]) -> None:
    """Raise `UsageError` for options that do not go together, and for those that do not go with torchrun."""
    if request.ablate and (request.dry_run or request.print_config):
        raise UsageError("--ablate trains several settings: it does not go together with --dry-run or --print-config")
    if request.minutes is not None:
        for override in overrides:
            if override.key == "train.epochs":
                raise UsageError(f"--minutes and {override.origin} both say how long to train; leave one out")
        if request.print_config:
            raise UsageError(
                "--minutes measures this machine, and --print-config measures nothing: say how many --epochs"
            )
    if ranks.count() > 1:
        if request.seeds > 1:
            raise UsageError("--seeds trains one run after another; with torchrun, give a command for each --seed")
        if request.ablate:
            raise UsageError("--ablate trains one run after another, and not under torchrun")
        if request.minutes is not None:
            raise UsageError("--minutes measures one device: with torchrun, say how many --epochs")


def _as_a_preset(chosen: "Preset", name: str) -> "Config":
    """A configuration to be kept in a file; a figure of the preset that it comes from is not that of other settings."""
    from cifar100cli.config import departures, load_preset, without_figures

    try:
        changed = departures(chosen.config, load_preset(name).config)
    except UsageError:  # it is whole with the flags alone
        return without_figures(chosen.config)
    return without_figures(chosen.config) if changed else chosen.config


def _check_command(command: str, chosen: "Preset", overrides: Sequence["Override"]) -> None:
    """A command's name says what it does: settings that are of another job are refused, another data set is told."""
    if command not in SECTIONS:
        return
    section, lacks, remedy = SECTIONS[command]
    if getattr(chosen.config, section) is None:
        raise UsageError(f"{command}: the preset {chosen.name} {lacks}: {remedy}, or use `cifar100 train`")
    dataset = chosen.config.data.dataset
    asked_for = any(override.key == "data.dataset" for override in overrides)
    if command == "finetune-cifar10" and dataset != "cifar10" and not asked_for:
        console.log(
            f"the preset {chosen.name} is on {TITLES[dataset]}, and so is this run; --dataset cifar10 changes it"
        )


def _in_turn(preset: "Preset", count: int) -> list["Preset"]:
    """The preset with its own seed and those that follow it."""
    from cifar100cli.config import having
    from cifar100cli.schema import MOST_SEEDS

    first = preset.config.seed
    if first + count > MOST_SEEDS:
        raise UsageError(f"--seeds {count}: seeds end at {MOST_SEEDS - 1}, and the first is {first}")
    return [replace(preset, config=having(preset.config, "seed", first + n)) for n in range(count)]


def _check_inputs(config: "Config", data_dir: Path | None) -> None:
    """What a run reads must be there, and is asked for before PyTorch, which takes seconds to load."""
    from cifar100cli import datasets
    from cifar100cli.runs import find_model

    if config.distillation is not None:
        find_model(Path(config.distillation.required_teacher()))
    if config.model.weights is not None:
        _check_weights(Path(config.model.weights))
    if config.data.dataset != "synthetic":
        datasets.find(config.data.dataset, places.data_folder(data_dir))


def _check_weights(path: Path) -> None:
    from cifar100cli.runs import MODEL

    kind = kind_of(path, f"--weights {path}")
    if kind == "folder":
        example = path / (MODEL if kind_of(path / MODEL) == "file" else "weights.safetensors")
        raise DataError(f"--weights {path}: is a folder; name the file in it, as in {example}")
    if kind != "file":
        raise DataError(f"--weights {path}: there is no such file")

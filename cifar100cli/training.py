"""From the options of a command that trains to its runs: one, one gone on with, one for each seed, or an ablation."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cifar100cli import console, options, places, ranks, show, trackers
from cifar100cli.bounded import look
from cifar100cli.catalog import TITLES
from cifar100cli.errors import CifarError, DataError, DivergedError, RunInterrupted, UsageError
from cifar100cli.options import expand

if TYPE_CHECKING:
    from cifar100cli.config import Override, Preset
    from cifar100cli.jobs import Where
    from cifar100cli.runs import RunDir
    from cifar100cli.schema import Config


# The section that a command's settings must have, and what is to be told where they have it not.
SECTIONS = {
    "distill": ("distillation", "has no teacher", "name one with --teacher RUN|CHECKPOINT"),
    "finetune-cifar10": ("finetune", "does not fine-tune", "say with --unfreeze what is to be trained"),
}


def train(given: Mapping[str, Any], default_preset: str, command: str = "train") -> None:
    """Do what a command that trains is asked for by its options, `given` by their names, and show the result."""
    from cifar100cli import ablation
    from cifar100cli.config import flat, idle, load_preset

    json, dry_run = given["json"], given["dry_run"]
    overrides = options.overrides(given)
    places.check_device(given["device"])
    trackers.check(given["log"] or ())
    if given["resume"] is not None:
        if given["seeds"] > 1 or given["ablate"]:
            flag = "--seeds" if given["seeds"] > 1 else "--ablate"
            raise UsageError(f"--resume goes on with one run: leave {flag} out")
        if given.get("minutes") is not None:
            raise UsageError("--resume goes on to the epochs that the run has: leave --minutes out")
        _resume(given, overrides, command)
        return
    if given["seeds"] > 1 and ranks.count() > 1:
        raise UsageError("--seeds trains one run after another; with torchrun, give a command for each --seed")
    chosen = load_preset(given["preset"] or default_preset, overrides)
    _check_command(command, chosen, overrides)
    for override in overrides:
        if reason := idle(override.key, flat(chosen.config)):
            console.log(f"{override.origin} does nothing here, for {reason}")
    minutes: float | None = given.get("minutes")
    if minutes is not None:
        _check_minutes(given, overrides)
        places.check_minutes(minutes, chosen.config)
    left_out = {}
    blocks = [name.strip() for name in ",".join(given["ablate"] or ()).split(",") if name.strip()]
    if given["ablate"]:
        if dry_run or given["print_config"]:
            raise UsageError(
                "--ablate trains several settings: it does not go together with --dry-run or --print-config"
            )
        if ranks.count() > 1:
            raise UsageError("--ablate trains one run after another, and not under torchrun")
        left_out = ablation.without(chosen.config, blocks)
    in_turn = _in_turn(chosen, given["seeds"])
    if given["print_config"]:
        config = _as_a_preset(chosen, given["preset"] or default_preset)
        if json:
            console.result_json(config.model_dump(mode="json"))
        else:
            console.result(config.to_yaml().rstrip())
        return
    if not dry_run:
        from cifar100cli.runs import check_writable

        ranks.on_first(lambda: check_writable(expand(given["out"])))
    _check_inputs(chosen.config, given["data_dir"])
    where = places.where(given["data_dir"], given["out"], given["device"])
    if minutes is not None:
        from cifar100cli.time_limit import within

        with console.TrainingDisplay(chosen.name) as display:
            chosen = within(chosen, minutes, where, display)
        left_out = ablation.without(chosen.config, blocks) if blocks else {}
        in_turn = _in_turn(chosen, given["seeds"])
    if dry_run:
        from cifar100cli import workflows

        with console.TrainingDisplay(chosen.name) as display:
            show.dry_run(workflows.dry_run(chosen, where, display), json)
        return
    if left_out:
        _ablate(in_turn, left_out, given, where)
    elif len(in_turn) > 1:
        _seeds(in_turn, given, where)
    else:
        show.training(_trained(chosen, given, where), chosen.config, json)


def _check_minutes(given: Mapping[str, Any], overrides: Sequence["Override"]) -> None:
    """Raise `UsageError` for what does not go together with `--minutes`."""
    for override in overrides:
        if override.key == "train.epochs":
            raise UsageError(f"--minutes and {override.origin} both say how long to train; leave one out")
    if given["print_config"]:
        raise UsageError("--minutes measures this machine, and --print-config measures nothing: say how many --epochs")
    if ranks.count() > 1:
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


def _trained(one: "Preset", given: Mapping[str, Any], where: "Where", run: "RunDir | None" = None) -> dict[str, Any]:
    """A run from its beginning, or from where `run` stopped."""
    from cifar100cli import workflows

    with console.TrainingDisplay(one.name) as display, _tracked(display, given["log"]) as watcher:
        return workflows.train(one, where, watcher) if run is None else workflows.resume(run, where, watcher)


def _seeds(in_turn: Sequence["Preset"], given: Mapping[str, Any], where: "Where") -> None:
    """Train the preset with one seed after another. One whose loss stops being finite does not keep the others."""
    results, lost = [], _NotCounted(len(in_turn))
    for done, one in enumerate(in_turn, start=1):
        try:
            results.append(_trained(one, given, where))
        except DivergedError as error:
            lost.add(f"seed {one.config.seed}", error)
        except (KeyboardInterrupt, CifarError) as stop:
            begun = not (isinstance(stop, RunInterrupted) and stop.run_dir is None)
            if rest := in_turn[done if begun else done - 1 :]:
                seeds = f"--seed {rest[0].config.seed} --seeds {len(rest)}"
                console.log(f"still to do{' after this run' if begun else ''}: {seeds}{_instead(given, one)}")
            raise
    if results:
        show.seeds(results, in_turn[0].config, given["json"])
    lost.tell()


def _instead(given: Mapping[str, Any], one: "Preset") -> str:
    """What a command that goes on must say otherwise: measured again, a machine may have time for other epochs."""
    return (
        f" (with --epochs {one.config.train.epochs} instead of --minutes)" if given.get("minutes") is not None else ""
    )


def _ablate(
    in_turn: Sequence["Preset"], left_out: Mapping[str, "Config"], given: Mapping[str, Any], where: "Where"
) -> None:
    """Train the preset as it is and without each block, with every seed in turn; what is complete is not done again.

    Seed after seed, so that what is there when it is stopped can be compared. A run whose loss stops being finite does
    not keep the others: that may be just what a block is for.
    """
    from cifar100cli import ablation, checkpoint, teachers
    from cifar100cli.config import shipped, without_figures
    from cifar100cli.runs import same_run

    chosen, teacher = in_turn[0], None
    if chosen.config.distillation is not None:
        teacher = teachers.digest(checkpoint.load_model(Path(chosen.config.distillation.required_teacher())))
    if shipped(chosen.name) is None:  # a figure of the user's own preset is not that of other settings
        left_out = {name: without_figures(config) for name, config in left_out.items()}
    settings = {"": chosen.config, **left_out}
    plan = [(name, preset.config.seed) for preset in in_turn for name in settings]
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in settings}
    lost = _NotCounted(len(plan))
    console.log(f"{console.several(len(plan), 'run')}: {chosen.name} as it is, and without {', '.join(left_out)}")
    for number, (name, seed) in enumerate(plan, start=1):
        one = replace(chosen, config=settings[name].model_copy(update={"seed": seed}))
        setting = f"{f'no {name}' if name else 'as it is'}, seed {seed}"
        what = f"run {number} of {len(plan)}: {setting}"
        run = same_run(where.runs_dir, one.name, one.config, teacher)
        if run is not None and run.complete:
            console.log(f"{what}: taken from {run.path}, complete and of the same settings")
            results[name].append({**run.result(), "run_dir": str(run.path)})
            continue
        console.log(what if run is None else f"{what}: going on with {run.path}, of the same settings")
        try:
            results[name].append(_trained(one, given, where, run))
        except DivergedError as error:
            lost.add(setting, error)
        except (KeyboardInterrupt, CifarError):
            rest = len(plan) - number
            console.log(
                f"still to do after this run: {rest} of {len(plan)}; the same command again{_instead(given, one)} "
                "takes what is complete, and goes on with this one"
            )
            raise
    measured = {
        name: ablation.setting_of(chosen.name, settings[name], found) for name, found in results.items() if found
    }
    if "" in measured:
        others = [(name, True, measured[name]) for name in left_out if name in measured]
        show.ablation(ablation.compare(measured[""], others), given["json"])
    lost.tell()


class _NotCounted:
    """Those of several runs whose loss stopped being finite, for a last word when the others are done."""

    def __init__(self, runs: int) -> None:
        self.runs = runs
        self.errors: dict[str, DivergedError] = {}

    def add(self, name: str, error: DivergedError) -> None:
        """A run that is not counted."""
        self.errors[name] = error
        console.log(f"{name} is not counted: {error}")

    def tell(self) -> None:
        """Raise `DivergedError` with all of them, if there are any."""
        if self.errors:
            told = " | ".join(f"{name}: {error}" for name, error in self.errors.items())
            raise DivergedError(f"{len(self.errors)} of {console.several(self.runs, 'run')} not counted: {told}")


def _tracked(display: console.TrainingDisplay, log: list[str] | None) -> trackers.Tracked:
    """The display, and the trackers that are asked for: once, however many ranks there are."""
    return trackers.Tracked(display, (log or ()) if ranks.rank() == 0 else ())


def _in_turn(preset: "Preset", count: int) -> list["Preset"]:
    """The preset with its own seed and those that follow it."""
    from cifar100cli.schema import MOST_SEEDS

    first = preset.config.seed
    if first + count > MOST_SEEDS:
        raise UsageError(f"--seeds {count}: seeds end at {MOST_SEEDS - 1}, and the first is {first}")
    return [replace(preset, config=preset.config.model_copy(update={"seed": first + n})) for n in range(count)]


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

    try:
        look(path)
        if path.is_dir():
            example = path / MODEL if (path / MODEL).is_file() else path / "weights.safetensors"
            raise DataError(f"--weights {path}: is a folder; name the file in it, as in {example}")
        if not path.is_file():
            raise DataError(f"--weights {path}: there is no such file")
    except OSError as error:
        raise DataError(f"--weights {path}: {error.strerror}") from None


def _resume(given: Mapping[str, Any], overrides: list["Override"], command: str) -> None:
    if given["dry_run"] or given["print_config"]:
        raise UsageError("--resume trains on: it does not go together with --dry-run or --print-config")
    from cifar100cli.runs import refuse_other_settings

    meant = ranks.on_first(lambda: _run_to_resume(given, overrides, SECTIONS.get(command, (None,))[0]))
    run, own = meant.run, meant.own
    if command in SECTIONS and getattr(own, SECTIONS[command][0]) is None:
        raise UsageError(
            f"{command}: {run.path} is a run of {run.preset}, which {SECTIONS[command][1]}; "
            f"resume it with: cifar100 train --resume {console.argument(run.path)}"
        )
    refuse_other_settings(run, meant.asked, own)
    if run.complete:
        _check_result(run)
        console.log(f"{run.path} is complete already; nothing is left to train")
        show.training({**run.result(), "run_dir": str(run.path)}, own, given["json"])  # it may have been moved since
        return
    try:
        where = places.where(meant.data_dir, given["out"], meant.device)
    except UsageError as error:
        if meant.device == given["device"]:
            raise
        reason = str(error).partition(": ")[2].partition(";")[0]
        raise UsageError(
            f"{run.path}: was begun on {meant.device}, and {reason}; --device cpu goes on without it"
        ) from None
    from cifar100cli import workflows

    with console.TrainingDisplay(run.preset) as display, _tracked(display, given["log"]) as watcher:
        result = workflows.resume(run, where, watcher, own.distillation.teacher if own.distillation else None)
    show.training(result, own, given["json"])


def _check_result(run: "RunDir") -> None:
    try:
        run.result()
    except DataError as error:
        raise DataError(f"{error}; without this file, --resume measures the run again and writes it") from None


class _Meant(NamedTuple):
    """The run to go on with: the settings that are asked for, those that it has, its data folder and its device."""

    run: "RunDir"
    asked: "Config"
    own: "Config"
    data_dir: Path
    device: str


def _run_to_resume(given: Mapping[str, Any], overrides: list["Override"], section: str | None) -> _Meant:
    from cifar100cli.config import Override, differences, load_preset, with_teacher
    from cifar100cli.runs import CONFIG, TEACHER_DIGEST, RunDir, latest_unfinished

    name, device = given["resume"], given["device"]
    preset = load_preset(given["preset"], overrides) if given["preset"] else None
    if name == "last":
        run = latest_unfinished(expand(given["out"]), preset.name if preset else None, section)
    else:
        run = RunDir.open(expand(Path(name)))
    own = asked = run.config()
    if preset is not None:
        if run.preset != preset.name:
            raise UsageError(
                f"--resume {run.path}: a run of {run.preset}, and not of {preset.name}; leave --preset out"
            )
        apart = {key: mine for key, (mine, _) in differences(own, preset.config).items() if key != "seed"}
        if apart:
            told = ", ".join(f"{key} = {value}" for key, value in apart.items())
            console.log(f"{run.path} goes on with its own settings, which {preset.name} has not: {told}")
    if overrides:
        # A seed that is not given again is the run's.
        if not any(override.key == "seed" for override in overrides):
            overrides = [*overrides, Override("seed", own.seed, "the run")]
        asked = load_preset(str(run.path / CONFIG), overrides).config
    if own.distillation is not None and asked.distillation is not None and not run.complete:
        known = run.recorded(TEACHER_DIGEST) is not None  # by which it is known wherever it is now
        teacher = (asked.distillation if known else own.distillation).required_teacher()
        own = with_teacher(own, teacher)
        try:
            look(Path(teacher))
        except OSError as error:
            raise DataError(f"{teacher}: {error.strerror}") from None
        if not Path(teacher).exists():
            raise DataError(f"{teacher}: the run's teacher is not there: --teacher says where it is now")
    if device == "auto" and ranks.count() == 1:
        device = run.recorded("device") or device
    return _Meant(run, asked, own, places.data_folder(given["data_dir"], run.path), device)

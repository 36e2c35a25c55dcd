"""What a command that trains does with its presets: one run, one for each seed, or an ablation; shown as they go."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar100cli import console, ranks, show, trackers, wording
from cifar100cli.display import TrainingDisplay
from cifar100cli.errors import CifarError, DataError, DivergedError, UsageError
from cifar100cli.folders import Where
from cifar100cli.options import Request

if TYPE_CHECKING:
    from cifar100cli.config import Preset
    from cifar100cli.runs import RunDir
    from cifar100cli.schema import Config


def one(
    preset: "Preset",
    request: Request,
    where: Where,
    run: "RunDir | None" = None,
    teacher: str | None = None,
    *,
    held: bool = False,
) -> dict[str, Any]:
    """A run from its beginning, or from where `run` stopped, with its `teacher` where that is now; its result."""
    from cifar100cli import workflows

    log = request.log if ranks.rank() == 0 else ()  # once, however many ranks there are
    with TrainingDisplay(preset.name) as display, trackers.Tracked(display, log) as watcher:
        if run is None:
            return workflows.train(preset, where, watcher)
        return workflows.resume(run, where, watcher, teacher, preset.config.train.compile, held=held)


def seeds(in_turn: Sequence["Preset"], request: Request, where: Where) -> None:
    """Train the preset with one seed after another. One whose loss stops being finite does not keep the others."""
    results, lost = [], _NotCounted(len(in_turn))
    for done, preset in enumerate(in_turn, start=1):
        try:
            results.append(one(preset, request, where))
        except DivergedError as error:
            lost.add(f"seed {preset.config.seed}", error)
        except (KeyboardInterrupt, CifarError) as stop:
            begun = getattr(stop, "run_dir", None) is not None
            rest = in_turn[done if begun else done - 1 :]
            if rest and not isinstance(stop, UsageError):  # which all of them share
                left = f"--seed {rest[0].config.seed} --seeds {len(rest)}"
                console.warn(f"still to do{' after this run' if begun else ''}: {left}{_instead(request, preset)}")
            raise
    if results:
        show.seeds(results, in_turn[0].config, request.json)
    lost.tell()


def ablate(in_turn: Sequence["Preset"], left_out: Mapping[str, "Config"], request: Request, where: Where) -> None:
    """Train the preset as it is and without each block, with every seed in turn; what is complete is not done again.

    Seed after seed, so that what is there when it is stopped can be compared. A run whose loss stops being finite does
    not keep the others: that may be just what a block is for. One that was stopped and cannot go on is left as it is.
    """
    from cifar100cli import ablation, checkpoint, datasets, jobs
    from cifar100cli.choosing import same_run
    from cifar100cli.config import having, shipped, without_figures

    chosen = in_turn[0]
    distillation = chosen.config.distillation
    teacher = checkpoint.load_model(Path(distillation.required_teacher())) if distillation is not None else None
    images = datasets.digest(datasets.load(chosen.config.data.dataset, where.data_dir))
    digests = jobs.digests_of(chosen.config, images, teacher)
    if shipped(chosen.name) is None:  # a figure of the user's own preset is not that of other settings
        left_out = {name: without_figures(config) for name, config in left_out.items()}
    settings = {"": chosen.config, **left_out}
    blocks = {block.name: block for block in ablation.blocks() if block.name in left_out}
    words = {"": "as it is", **{name: blocks[name].left_out for name in left_out}}
    plan = [(name, turn.config.seed) for turn in in_turn for name in settings]
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in settings}
    lost = _NotCounted(len(plan))
    console.log(f"{wording.several(len(plan), 'run')}: {chosen.name} {', '.join(words.values())}")
    for number, (name, seed) in enumerate(plan, start=1):
        preset = replace(chosen, config=having(settings[name], "seed", seed))
        setting = f"{words[name]}, seed {seed}"
        what = f"run {number} of {len(plan)}: {setting}"
        run = same_run(where.runs_dir, preset.name, preset.config, digests)
        if run is not None and run.complete:
            console.log(f"{what}: taken from {run.path}, complete and of the same settings")
            results[name].append({**run.result(), "run_dir": str(run.path)})
            continue
        console.log(what if run is None else f"{what}: going on with {run.path}, of the same settings")
        try:
            results[name].append(_go_on(preset, request, where, run))
        except DivergedError as error:
            lost.add(setting, error)
        except (KeyboardInterrupt, CifarError) as stop:
            begun = getattr(stop, "run_dir", None) is not None
            rest = len(plan) - number if begun else len(plan) - number + 1
            after, and_then = (" after this run", ", and goes on with this one") if begun else ("", "")
            if not isinstance(stop, UsageError):  # which would be told of this setting again
                console.warn(
                    f"still to do{after}: {rest} of {len(plan)}; the same command again{_instead(request, preset)} "
                    f"takes what is complete{and_then}"
                )
            raise
    measured = {
        name: ablation.setting_of(chosen.name, settings[name], found) for name, found in results.items() if found
    }
    if "" in measured:
        others = [(name, blocks[name].leaves_nothing, measured[name]) for name in left_out if name in measured]
        show.ablation(ablation.compare(measured[""], others), request.json)
    lost.tell()


def _go_on(preset: "Preset", request: Request, where: Where, run: "RunDir | None") -> dict[str, Any]:
    """A run of an ablation, from where `run` stopped; from its beginning where that cannot go on, and never will."""
    if run is not None:
        try:
            distillation = preset.config.distillation
            return one(preset, request, where, run, distillation.teacher if distillation is not None else None)
        except (UsageError, DataError) as error:
            console.log(f"it cannot go on, and the setting is trained anew: {error}")
    return one(preset, request, where)


def _instead(request: Request, preset: "Preset") -> str:
    """What a command that goes on must say otherwise: measured again, a machine may have time for other epochs."""
    return f" (with --epochs {preset.config.train.epochs} instead of --minutes)" if request.minutes is not None else ""


class _NotCounted:
    """Those of several runs whose loss stopped being finite, for a last word when the others are done."""

    def __init__(self, runs: int) -> None:
        self.runs = runs
        self.errors: dict[str, str] = {}  # their words alone: an error holds all that its run had in memory

    def add(self, name: str, error: DivergedError) -> None:
        """A run that is not counted."""
        self.errors[name] = str(error)
        console.log(f"{name} is not counted: {error}")

    def tell(self) -> None:
        """Raise `DivergedError` with all of them, if there are any."""
        if self.errors:
            told = " | ".join(f"{name}: {error}" for name, error in self.errors.items())
            raise DivergedError(f"{len(self.errors)} of {wording.several(self.runs, 'run')} not counted: {told}")

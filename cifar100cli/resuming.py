"""A run that was stopped: which one is meant, whether it can go on as it is asked to, and on it goes."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cifar100cli import console, execution, places, ranks, show, wording
from cifar100cli.bounded import kind_of
from cifar100cli.errors import CifarError, DataError, FolderError, UsageError
from cifar100cli.folders import expand
from cifar100cli.options import Request

if TYPE_CHECKING:
    from cifar100cli.config import Override
    from cifar100cli.runs import RunDir
    from cifar100cli.schema import Config


# The section that a command's settings must have, and what is to be told where they have it not.
SECTIONS = {
    "distill": ("distillation", "has no teacher", "name one with --teacher RUN|CHECKPOINT"),
    "finetune-cifar10": ("finetune", "does not fine-tune", "say with --unfreeze what is to be trained"),
}


def resume(request: Request, overrides: list["Override"], command: str) -> None:
    """Go on with the run that `--resume` names, and show its result; of a complete one, show it alone."""
    if request.seeds > 1 or request.ablate:
        flag = "--seeds" if request.seeds > 1 else "--ablate"
        raise UsageError(f"--resume goes on with one run: leave {flag} out")
    if request.minutes is not None:
        raise UsageError("--resume goes on to the epochs that the run has: leave --minutes out")
    if request.dry_run or request.print_config:
        raise UsageError("--resume trains on: it does not go together with --dry-run or --print-config")
    with contextlib.ExitStack() as held:  # from here to the end: what is chosen is nobody else's meanwhile
        _go_on(request, overrides, command, held)


def _go_on(request: Request, overrides: list["Override"], command: str, held: contextlib.ExitStack) -> None:
    from cifar100cli.choosing import refuse_other_settings

    meant = ranks.on_first(lambda: _run_to_resume(request, overrides, SECTIONS.get(command, (None,))[0], held))
    run, own = meant.run, meant.own
    if command in SECTIONS and getattr(own, SECTIONS[command][0]) is None:
        raise UsageError(
            f"{command}: {run.path} is a run of {run.preset}, which {SECTIONS[command][1]}; "
            f"resume it with: cifar100 train --resume {wording.argument(run.path)}"
        )
    refuse_other_settings(run, meant.asked, own)
    if meant.result is not None:
        console.log(f"{run.path} is complete already; nothing is left to train")
        show.training({**meant.result, "run_dir": str(run.path)}, own, request.json)  # it may have been moved since
        return
    device = places.check_device(request.device)
    if device == "auto" and ranks.count() == 1:
        places.start_pytorch()
        device = places.own_device(run, "--device cpu", console.log)
    where = places.where(device, meant.data_dir, request.out)
    from cifar100cli.config import Preset

    teacher = own.distillation.teacher if own.distillation is not None else None
    preset = Preset(run.preset, own)
    show.training(execution.one(preset, request, where, run, teacher, held=True), own, request.json)


def _result_of(run: "RunDir") -> dict[str, Any]:
    try:
        return run.result()
    except DataError as error:
        raise DataError(f"{error}; without this file, --resume measures the run again and writes it") from None


class _Meant(NamedTuple):
    """The run to go on with: its result if it is complete, the settings that are asked for and those that it has.

    And its data folder.
    """

    run: "RunDir"
    result: dict[str, Any] | None
    asked: "Config"
    own: "Config"
    data_dir: Path


def _run_to_resume(
    request: Request, overrides: list["Override"], section: str | None, held: contextlib.ExitStack
) -> _Meant:
    """The run that is meant, and what it is asked for. Unless it is complete, `held` holds it from now on."""
    from cifar100cli.choosing import latest_unfinished
    from cifar100cli.config import STEPS, TEACHER, differences, having, load_preset
    from cifar100cli.runs import TEACHER_DIGEST, RunDir

    name = request.resume
    assert name is not None
    preset = load_preset(request.preset, overrides) if request.preset else None

    def fit(run: RunDir) -> tuple[bool, ...]:
        try:
            asked, own = _settings(run, overrides)
        except (CifarError, OSError):  # told when it is opened, if it is
            return False, False, False
        apart = differences(asked, own).keys() - {STEPS}
        of_its_kind = section is None or getattr(own, section) is not None
        return of_its_kind, not apart - {TEACHER}, not apart  # a teacher may have been moved

    if name == "last":
        chosen = fit if section is not None or overrides else None
        of_preset = preset.name if preset else None
        run = held.enter_context(latest_unfinished(expand(request.out), of_preset, chosen, console.log))
    else:
        run = RunDir.open(expand(Path(name)))
        if not run.complete:
            try:
                held.enter_context(run.exclusively())
            except OSError as error:
                reason = error.strerror or error
                raise FolderError(f"{run.path}: {reason}; a run that goes on writes into its folder") from None
    asked, own = _settings(run, overrides)
    if preset is not None:
        if run.preset != preset.name:
            raise UsageError(
                f"--resume {run.path}: a run of {run.preset}, and not of {preset.name}; leave --preset out"
            )
        apart = differences(run.config(), preset.config)
        if keys := apart.keys() - {"seed", STEPS}:
            told = ", ".join(f"{key} = {mine}" for key, (mine, _) in apart.items() if key in keys)
            console.log(f"{run.path} goes on with its own settings, which {preset.name} has not: {told}")
    steps = asked.train.compile
    if steps != own.train.compile and not run.complete:  # only rounding depends on it, and how much memory is needed
        console.log(f"{run.path} goes on with {STEPS} = {steps}, and was begun with {own.train.compile}")
    own = having(own, STEPS, steps)
    if own.distillation is not None and asked.distillation is not None:
        known = run.recorded(TEACHER_DIGEST) is not None  # by which it is known wherever it is now
        teacher = (asked.distillation if known else own.distillation).required_teacher()
        own = having(own, TEACHER, teacher)
        if not run.complete and kind_of(Path(teacher)) is None:
            where = "--teacher says where it is now" if known else "bring it back, or distil anew"
            raise DataError(f"{teacher}: the run's teacher is not there: {where}")
    result = _result_of(run) if run.complete else None
    return _Meant(run, result, asked, own, places.data_folder(request.data_dir, run.path))


def _settings(run: "RunDir", overrides: list["Override"]) -> tuple["Config", "Config"]:
    """The settings that are asked for, and the run's own; its teacher is where it was last.

    A seed or a teacher that is not given again is the run's.
    """
    from cifar100cli.config import TEACHER, Override, load_preset
    from cifar100cli.runs import CONFIG

    own = run.settings()
    if not overrides:
        return own, own
    given = {override.key for override in overrides}
    if "seed" not in given:
        overrides = [*overrides, Override("seed", own.seed, "the run")]
    if own.distillation is not None and not given & {TEACHER, "distillation"}:
        overrides = [*overrides, Override(TEACHER, own.distillation.teacher, "the run")]
    return load_preset(str(run.path / CONFIG), overrides).config, own

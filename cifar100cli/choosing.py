"""Which of the runs is meant: the last unfinished one, one of the same settings, or the one that a launch began."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from cifar100cli.config import TEACHER, WEIGHTS, differences, effective_differences
from cifar100cli.errors import CifarError, DataError, UsageError
from cifar100cli.runs import (
    CONFIG,
    ENVIRONMENT,
    RESULT,
    STATE,
    TEACHER_DIGEST,
    WEIGHTS_DIGEST,
    RunDir,
    begun_at,
    find_runs,
)
from cifar100cli.schema import Config
from cifar100cli.wording import several


@contextlib.contextmanager
def latest_unfinished(
    root: Path,
    preset: str | None = None,
    fit: Callable[[RunDir], tuple[bool, ...]] | None = None,
    passed_over: Callable[[str], None] | None = None,
) -> Iterator[RunDir]:
    """Hold the run that `--resume last` means: begun last, of that preset if one is named, and not complete.

    One whose loss stopped being finite would only do so again: it is gone on with by its name alone. Of the others,
    those that `fit` best are meant, if it is asked, and of these the last that can be held: jobs that are started
    together go on with a run each. Newer ones, which are in use, are told to `passed_over`. Raises `DataError` where
    no run is left.
    """
    begun = [path for path in find_runs(root) if (path / CONFIG).is_file() and (path / ENVIRONMENT).is_file()]
    folders = [path for path in begun if not (path / RESULT).is_file()]
    if preset is not None:
        folders = [path for path in folders if RunDir(path).preset == preset]
    hopeful = [path for path in folders if not RunDir(path).diverged]
    if fit is not None:
        fits = {path: fit(RunDir(path)) for path in hopeful}
        hopeful = [path for path in hopeful if fits[path] == max(fits.values())]
    reasons: list[str] = []
    for path in sorted(hopeful, key=begun_at, reverse=True):
        run = RunDir.open(path)
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(run.exclusively(patience=0.1))
            except CifarError as error:
                reasons.append(str(error))
                continue
            except OSError as error:  # another user's lock, say
                reasons.append(f"{path}: {error.strerror or error}")
                continue
            if run.complete or run.diverged:  # by now: whoever held it a moment ago has come to its end
                continue
            if reasons and passed_over is not None:
                passed_over(_and_others("passed over", reasons))
            yield run
            return
    of_preset = f" of {preset}" if preset else ""
    if reasons:
        raise DataError(_and_others(f"{root}: there is no other unfinished run{of_preset} to resume", reasons))
    lost = f"; the loss of {max(folders, key=begun_at)} stopped being finite" if folders else ""
    raise DataError(f"{root}: there is no unfinished run{of_preset} to resume{lost}")


def _and_others(what: str, reasons: Sequence[str]) -> str:
    """What is said of several runs, with the first of them: on a cluster dozens may be in use."""
    others = f" (and {several(len(reasons) - 1, 'other')})" if len(reasons) > 1 else ""
    return f"{what}: {reasons[0]}{others}"


def same_run(root: Path, preset: str, config: Config, digests: Mapping[str, str]) -> RunDir | None:
    """The latest run of this preset with the same settings and seed: a complete one, or else one to go on with.

    What does nothing with the other settings may differ. One that had another teacher, data set or file of weights is
    another run, and one that had the same is the same, wherever these lay: `digests` has theirs by the names under
    which runs record them.
    """
    found = []
    for path in find_runs(root / preset):
        with contextlib.suppress(CifarError, OSError):  # what is broken is nothing to build on
            run = RunDir.open(path)
            apart = effective_differences(run.config(), config)
            for key, name in {WEIGHTS: WEIGHTS_DIGEST, TEACHER: TEACHER_DIGEST}.items():
                if None not in apart.get(key, (None,)) and run.recorded(name) == digests.get(name, ""):
                    del apart[key]
            if apart:
                continue
            if any(run.recorded(name) not in (None, digest) for name, digest in digests.items()):
                continue
            if run.complete:
                run.result()
                found.append(run)
            elif not run.in_use and ((path / STATE).is_file() or not run.metrics()):  # without an epoch, from the start
                found.append(run)
    return max(found, key=lambda run: (run.complete, (run.path / CONFIG).stat().st_mtime_ns), default=None)


def refuse_other_settings(run: RunDir, asked: Config, own: Config) -> None:
    """A run goes on as it was begun: raise `UsageError` for a setting that is not the run's own."""
    changed = differences(asked, own)
    if changed:
        key, (wanted, has) = next(iter(changed.items()))
        raise UsageError(
            f"--resume goes on with the run's own settings, and {run.path} has {key} = {has}, not {wanted}; "
            "leave the flag out, or start a new run"
        )


def begun_by(root: Path, preset: str, config: Config, launch: str | None) -> RunDir | None:
    """The run of this preset and of these settings that this torchrun command began last, if it has begun one.

    The settings count, too: a name of a launch may be used again, and in containers those of processes and hosts are.
    """
    ours = []
    for path in find_runs(root / preset) if launch is not None else []:
        with contextlib.suppress(CifarError, OSError):  # what is broken is not gone on with
            run = RunDir.open(path)
            if run.recorded("launch") == launch and not differences(run.config(), config):
                ours.append(run)
    return max(ours, key=lambda run: (run.path / CONFIG).stat().st_mtime_ns, default=None)

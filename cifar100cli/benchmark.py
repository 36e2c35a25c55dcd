"""How fast a preset trains on the device at hand, and how much of what is possible that is.

All sides are measured in one process and in turn, so that a machine whose speed changes changes them alike; ratios
are taken within a turn.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from cifar100cli import __version__, devices, machine, wording
from cifar100cli.config import Preset
from cifar100cli.flops import step_flops
from cifar100cli.folders import Where
from cifar100cli.plain_loop import PlainLoop
from cifar100cli.tasks import DistillationTask
from cifar100cli.teachers import CachedTeacher
from cifar100cli.timing import Sides, StepCost, cost_of_a_step, take_turn, take_turns, without_files
from cifar100cli.watcher import Watcher
from cifar100cli.whole_run import full_run, images_of

REPEATS = 7
SHORT_REPEATS = 3


def bench(preset: Preset, where: Where, watcher: Watcher, *, steps: int | None, repeats: int | None) -> dict[str, Any]:
    """Measure a preset; returns what `bench --json` prints.

    `steps` are the training steps of each side in a turn and `repeats` the turns; None takes what gives steady
    figures in some minutes.
    """
    config = without_files(preset.config)
    images, _ = images_of(preset.config)
    with tempfile.TemporaryDirectory() as cache, devices.deterministic(config.train.deterministic):
        where, cost = replace(where, cache_dir=Path(cache)), None
        if steps is None or repeats is None:
            cost = cost_of_a_step(Preset(preset.name, config), images, where, watcher)
            steps = steps or min(cost.steps_of_a_turn(where), cost.different_steps(where))
            repeats = repeats or (REPEATS if steps * cost.step < 5 else SHORT_REPEATS)
        sides = Sides(Preset(preset.name, config), images, where, watcher, steps)
        return _measure(preset, sides, watcher, repeats, cost)


@dataclass(frozen=True)
class Spread:
    """The median of several measurements, and between what they lay."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(median(values), min(values), max(values))


class PeakProduct:
    """A large matrix product in the run's precision: the most operations a second that a network could hope for."""

    def __init__(self, device: torch.device, precision: str) -> None:
        side = 8192 if device.type == "cuda" else 2048
        dtype = devices.DTYPES[precision]
        self.left, self.right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        self.flops, self.device = 2.0 * side**3, device

    def __call__(self) -> None:
        torch.mm(self.left, self.right)
        if self.device.type != "cpu":
            torch.accelerator.synchronize()


def _plain_loop(sides: Sides, watcher: Watcher) -> PlainLoop | None:
    """The plain way, if there is one, and if a GPU has memory for it beside the other sides."""
    try:
        plain = sides.plain_loop()
        if plain is not None and sides.job.device.type != "cpu":
            plain.epoch()  # only as steps are taken is it seen
    except RuntimeError as error:
        if not devices.is_out_of_memory(error):
            raise
        watcher.say(f"the plain way is left out: {sides.job.device} has no memory for it beside the other sides")
        return None
    return plain


def _measure(preset: Preset, sides: Sides, watcher: Watcher, repeats: int, cost: StepCost | None) -> dict[str, Any]:
    job, steps = sides.job, sides.steps
    extent = f"{wording.several(repeats, 'turn')} of {wording.several(steps, 'step')}"
    watcher.say(f"measuring {preset.name} on {job.device}: {extent} of each side")
    if job.step_mode.name != "off":
        watcher.say(f"steps: {job.step_mode.name} ({job.step_mode.reason})")
    started = time.perf_counter()
    with watcher.progress("the run alone", 2) as advance:
        began = [*sides.warm_up(sides.loop), take_turn({"loop": sides.loop})["loop"]]
        advance(1)
        sides.evaluation()
        advance(1)
    memory = devices.peak_memory(job.device)  # from here on there is more beside it than in a run
    sides.warm_up(sides.bare)
    peak = PeakProduct(job.device, job.precision)
    parts: dict[str, Callable[[], object]] = {
        "loop": sides.loop,
        "bare": sides.bare,
        "evaluation": sides.evaluation,
        "bare_evaluation": sides.bare_evaluation,
        "peak": peak,
    }
    if job.parted is not None:
        parts["front"] = sides.front
    plain = _plain_loop(sides, watcher)
    if plain is not None:
        parts["plain"] = plain.epoch
    taken, phases = [], []
    with closing(take_turns(parts, repeats, watcher, "turns, after a first one that warms up")) as turns:
        next(turns)
        warm_up = time.perf_counter() - started
        for turn in turns:
            taken.append(turn)
            phases.append(sides.phases())
    seconds = {name: [turn[name] for turn in taken] for name in parts}
    shares = {name: [spent[name] / sum(spent.values()) for spent in phases] for name in phases[0]}
    images, tested = steps * job.config.data.batch_size, sides.test.count

    def rate(name: str, count: int) -> dict[str, float]:
        return vars(Spread.of([count / value for value in seconds[name]]))

    def ratio(over: str, under: str) -> dict[str, float]:
        pairs = zip(seconds[over], seconds[under], strict=True)
        return vars(Spread.of([one / other for one, other in pairs]))

    flops = step_flops(sides.training)
    loop = rate("loop", images)
    highest = peak.flops / median(seconds["peak"])
    by_heart = isinstance(job.task, DistillationTask) and isinstance(job.task.teacher, CachedTeacher)
    result: dict[str, Any] = {
        "preset": preset.name,
        "backbone": job.config.model.backbone,
        "image_size": job.config.data.image_size,
        "batch_size": job.config.data.batch_size,
        "device": str(job.device),
        "device_name": machine.device_name(job.device),
        "threads": torch.get_num_threads(),
        "precision": job.precision,
        "compile": job.step_mode.name,
        "versions": {"cifar100": __version__, "torch": torch.__version__},
        "steps": steps,
        "repeats": repeats,
        "warm_up_seconds": round(warm_up, 3),
        "images_per_second": {
            "loop": loop,
            "bare": rate("bare", images),
            "evaluation": rate("evaluation", tested),
            "bare_evaluation": rate("bare_evaluation", tested),
        },
        "ratios": {
            "loop_to_bare_time": ratio("loop", "bare"),
            "evaluation_to_bare_time": ratio("evaluation", "bare_evaluation"),
        },
        "shares": {name: vars(Spread.of(values)) for name, values in shares.items()},
        "flops_per_image": flops,
        "peak_flops_per_second": highest,
        "utilization": flops * loop["median"] / highest,
        "full_run": {**full_run(preset.config, sides.rates(began, seconds, cost)), "teacher_not_counted": by_heart},
        "peak_memory_bytes": memory,
    }
    if job.parted is not None:
        result["images_per_second"]["frozen_part"] = rate("front", tested)
    if plain is not None:
        result["images_per_second"]["plain"] = rate("plain", images)
        result["ratios"]["speedup_over_plain"] = ratio("plain", "loop")
        result["plain_workers"] = plain.workers
    return result

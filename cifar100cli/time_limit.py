"""How many epochs of a preset fit in so many minutes."""

import tempfile
from bisect import bisect_right
from dataclasses import replace
from pathlib import Path

from cifar100cli import devices
from cifar100cli.config import Preset, having, parse_config, shipped, without_figures
from cifar100cli.errors import UsageError
from cifar100cli.folders import Where
from cifar100cli.runs import MOST_EPOCHS
from cifar100cli.timing import Sides, cost_of_a_step, take_turns, without_files
from cifar100cli.watcher import Watcher
from cifar100cli.whole_run import Rates, full_run, images_of
from cifar100cli.wording import duration

TURNS = 3  # whose median counts


def within(preset: Preset, minutes: float, where: Where, watcher: Watcher) -> Preset:
    """The preset with as many epochs as fit in so many minutes on the device at hand, by steps on images of noise.

    What a frozen part takes before the first epoch, and the result's figures after the last, are counted in.
    Raises `UsageError` where not even one epoch fits.
    """
    sides, rates = measure_rates(preset, where, watcher)

    def seconds(epochs: int) -> float:
        return full_run(having(preset.config, "train.epochs", epochs), rates)["seconds"]

    def of(epochs: int) -> Preset:
        fitted = parse_config(having(preset.config, "train.epochs", epochs).model_dump(), f"--minutes {minutes:g}")
        return replace(preset, config=fitted if shipped(preset.name) is not None else without_figures(fitted))

    def most() -> int:
        return bisect_right(range(1, MOST_EPOCHS + 1), 60 * minutes, key=seconds)

    epochs = most()
    if epochs and sides.takes_its_steps_otherwise(epochs):  # as a longer or shorter run than the preset's own
        _, rates = measure_rates(of(epochs), where, watcher)
        epochs = min(epochs, most())
    if not epochs:
        raise UsageError(
            f"--minutes {minutes:g}: one epoch of {preset.name} takes about {duration(seconds(1))} here, with the look "
            "at the test set; give it more minutes, or take a smaller --image-size or --set data.fraction=0.1"
        )
    watcher.say(f"--minutes {minutes:g}: a run of --epochs {epochs} takes about {duration(seconds(epochs))} here")
    return preset if epochs == preset.config.train.epochs else of(epochs)


def measure_rates(preset: Preset, where: Where, watcher: Watcher) -> tuple[Sides, Rates]:
    """In some seconds, what decides how long a run takes."""
    images, _ = images_of(preset.config)
    preset = Preset(preset.name, without_files(preset.config))
    with tempfile.TemporaryDirectory() as cache, devices.deterministic(preset.config.train.deterministic):
        where = replace(where, cache_dir=Path(cache))
        cost = cost_of_a_step(preset, images, where, watcher)
        steps, different = cost.steps_of_a_turn(where), cost.different_steps(where)
        sides = Sides(preset, images, where, watcher, steps, different=different)
        parts = {"loop": sides.loop, "evaluation": sides.evaluation}
        if sides.job.parted is not None:
            parts["front"] = sides.front
        began = sides.warm_up(sides.loop)
        first, *turns = take_turns(parts, TURNS, watcher, "how long an epoch takes")
    began.append(first["loop"])
    seconds = {name: [turn[name] for turn in turns] for name in parts}
    return sides, sides.rates(began, seconds, cost)

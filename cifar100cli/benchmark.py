"""How fast a preset trains on the device at hand, and how much of what is possible that is.

All sides are measured in one process and in turn, so that a machine whose speed changes changes them alike; ratios
are taken within a turn. The images are noise: what they show makes no difference to the time.
"""

import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import numpy as np
import torch

from cifar100cli import __version__, devices, machine, metrics, trainer
from cifar100cli.augment import Views
from cifar100cli.card import read_card
from cifar100cli.catalog import DATASETS
from cifar100cli.config import Preset, parse_config, shipped, without_figures
from cifar100cli.console import duration
from cifar100cli.datasets import Dataset, Split
from cifar100cli.errors import UsageError
from cifar100cli.flops import step_flops
from cifar100cli.jobs import Job, Where, evaluation_loader, prepare
from cifar100cli.loader import Batch, DeviceLoader, Plan, evaluation_batch_size
from cifar100cli.plain import PlainLoop
from cifar100cli.runs import MOST_EPOCHS, find_model
from cifar100cli.schema import Config
from cifar100cli.steps import WARM_UP, CapturedSteps, Steps, create_steps
from cifar100cli.watcher import Watcher

TURN = {"cpu": 3.0, "cuda": 0.5}  # about so many seconds of each side in a turn
REPEATS = 7
SHORT_REPEATS = 3
TEST_BATCHES = 3


def bench(preset: Preset, where: Where, watcher: Watcher, *, steps: int | None, repeats: int | None) -> dict[str, Any]:
    """Measure a preset; returns what `bench --json` prints.

    `steps` are the training steps of each side in a turn and `repeats` the turns; None takes what gives steady
    figures in some minutes.
    """
    config = _without_files(preset.config)
    images, _ = _images(preset.config)
    with tempfile.TemporaryDirectory() as cache, devices.deterministic(config.train.deterministic):
        where = replace(where, cache_dir=Path(cache))
        if steps is None or repeats is None:
            seconds = _seconds_of_a_step(Preset(preset.name, config), images, where, watcher)
            steps = steps or _steps_of_a_turn(seconds, where)
            repeats = repeats or (REPEATS if steps * seconds < 5 else SHORT_REPEATS)
        sides = Sides(Preset(preset.name, config), images, where, watcher, steps)
        return _measure(preset, sides, watcher, repeats)


def within(preset: Preset, minutes: float, where: Where, watcher: Watcher) -> Preset:
    """The preset with as many epochs as fit in so many minutes on the device at hand, by steps on images of noise.

    What a frozen part takes before the first epoch, and the result's figures after the last, are counted in.
    Raises `UsageError` where not even one epoch fits.
    """
    config = preset.config
    rates = _rates(preset, where, watcher)

    def seconds(epochs: int) -> float:
        train = config.train.model_copy(update={"epochs": epochs})
        return _full_run(config.model_copy(update={"train": train}), *rates)["seconds"]

    if seconds(1) > 60 * minutes:
        raise UsageError(
            f"--minutes {minutes:g}: one epoch of {preset.name} takes about {duration(seconds(1))} here, with the look "
            "at the test set; give it more minutes, or take a smaller --image-size or --set data.fraction=0.1"
        )
    epochs = bisect_right(range(1, MOST_EPOCHS + 1), 60 * minutes, key=seconds)
    watcher.say(f"--minutes {minutes:g}: a run of --epochs {epochs} takes about {duration(seconds(epochs))} here")
    if epochs == config.train.epochs:
        return preset
    keys = config.model_dump()
    keys["train"]["epochs"] = epochs
    fitted = parse_config(keys, f"--minutes {minutes:g}")
    return replace(preset, config=fitted if shipped(preset.name) is not None else without_figures(fitted))


def _rates(preset: Preset, where: Where, watcher: Watcher) -> "_Rates":
    """In some seconds, what decides how long a run takes."""
    images, _ = _images(preset.config)
    preset = Preset(preset.name, _without_files(preset.config))
    with tempfile.TemporaryDirectory() as cache, devices.deterministic(preset.config.train.deterministic):
        where = replace(where, cache_dir=Path(cache))
        steps = _steps_of_a_turn(_seconds_of_a_step(preset, images, where, watcher), where)
        sides = Sides(preset, images, where, watcher, steps, beside_plain=False)
        parts = {"loop": sides.loop, "evaluation": sides.evaluation}
        if sides.job.parted is not None:
            parts["front"] = sides.front
        seconds: dict[str, list[float]] = {name: [] for name in parts}
        with watcher.progress("how long an epoch takes", SHORT_REPEATS + 1) as advance:
            began = sides.warm_up()
            for turn in range(SHORT_REPEATS + 1):
                taken = _turn(parts)
                if turn:
                    for name, value in taken.items():
                        seconds[name].append(value)
                else:  # it warms up what is not yet
                    began = [*began, taken["loop"]]
                advance(1)
    rates = sides.rates(seconds)
    if sides.job.step_mode.name != "inductor":
        return rates
    compiling = sum(began) - len(began) * median(seconds["loop"])
    return rates._replace(compiling=max(0.0, compiling))


def _turn(parts: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of each part, one after the other."""
    taken = {}
    for name, part in parts.items():
        started = time.perf_counter()
        part()
        taken[name] = time.perf_counter() - started
    return taken


def _steps_of_a_turn(seconds: float, where: Where) -> int:
    """How many steps of so many seconds each side takes in a turn."""
    return max(1, min(200, round(TURN.get(devices.select_device(where.device).type, 3.0) / seconds)))


def _without_files(config: Config) -> Config:
    """The preset with the same work and nothing to fetch: weights change no time, and all images train, grown up."""
    keys = config.model_dump()
    keys["model"] |= {"pretrained": False, "weights": None}
    keys["data"] |= {"fraction": 1.0, "val_fraction": 0.0, "first_image_size": None}
    keys["train"] |= {"select": "last", "watch_test": False}
    return Config.model_validate(keys)


def noise_dataset(config: Config, train: int, test: int) -> Dataset:
    """Images that show nothing, of the preset's data set's classes."""
    classes = tuple(f"class {index}" for index in range(DATASETS[config.data.dataset].classes))
    if config.distillation is not None:
        classes = read_card(find_model(Path(config.distillation.required_teacher()))).classes
    random = np.random.default_rng(0)

    def split(count: int) -> Split:
        return Split(random.integers(0, 256, (count, 3, 32, 32), np.uint8), np.arange(count) % len(classes))

    return Dataset(config.data.dataset, classes, split(train), split(test))


def _seconds_of_a_step(preset: Preset, images: int, where: Where, watcher: Watcher) -> float:
    """Roughly, from one step after those that warm up."""
    sides = Sides(preset, images, where, _Quiet(watcher), 1, beside_plain=False)
    for _ in range(sides.cold_steps + 1):
        started = time.perf_counter()
        sides.bare()
        seconds = time.perf_counter() - started
    return seconds


class _Quiet(Watcher):
    """A watcher of what is no run: it shows how far long computations are, and nothing else."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher

    def progress(self, title: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        return self._watcher.progress(title, total)


class OneBatch(DeviceLoader):
    """A loader whose batch is always the same and ready: what is left of a step is the bare step."""

    def __init__(self, loader: DeviceLoader) -> None:
        self.__dict__.update(loader.__dict__)
        self.ready = loader.batch(loader.plan(1), loader.shares[0])

    def batch(self, plan: Plan, rows: Any) -> Batch:
        """The batch, whatever is asked for."""
        return self.ready


class Sides:
    """What is measured: each method does `steps` steps, or one evaluation, and waits for the device."""

    def __init__(
        self, preset: Preset, images: int, where: Where, watcher: Watcher, steps: int, *, beside_plain: bool = True
    ) -> None:
        config, count = preset.config, preset.config.data.batch_size * steps
        self.dataset = noise_dataset(
            config,
            count,
            TEST_BATCHES * evaluation_batch_size(config.data.image_size, devices.select_device(where.device)),
        )
        self.steps = steps
        self.job: Job = prepare(preset, where, _Quiet(watcher), dataset=self.dataset, images=images)
        job = self.job
        self.training = trainer.prepare_steps(
            job.model, job.task, job.loaders.train, job.groups, job.config, job.precision
        )
        resident = replace(self.training, loader=OneBatch(job.loaders.train))
        self.loop_steps: Steps = create_steps(self.training, job.step_mode)
        self.bare_steps: Steps = create_steps(resident, job.step_mode)
        self.bare_steps.begin(1)
        self.test = evaluation_loader(self.dataset.test, job.device, job.loaders.train.preprocessing)
        self.test_inputs = [batch.inputs for batch in self.test.epoch(1)]
        self.epoch = 0
        self.quiet = _Quiet(watcher)
        self.plain_loop: PlainLoop | None = None
        mixed = config.augment.mixup or config.augment.cutmix
        of_its_own = config.optimizer.name == "muon" or config.optimizer.sam_rho
        more = config.distillation is not None or mixed or of_its_own  # than most code does
        if beside_plain and not more:
            self.plain_loop = self._plain(preset, where)

    def _plain(self, preset: Preset, where: Where) -> PlainLoop:
        keys = preset.config.model_dump()
        if preset.config.finetune is not None:
            keys["finetune"]["cache"] = "off"
        keys["train"] |= {"precision": "fp32", "compile": "off"}
        config = Config.model_validate(keys)
        job = prepare(Preset(preset.name, config), where, self.quiet, dataset=self.dataset)
        return PlainLoop(job.model, job.task, job.loaders.train, config.augment, config.optimizer, list(job.groups))

    def _wait(self) -> None:
        if self.job.device.type != "cpu":
            torch.accelerator.synchronize()

    @property
    def cold_steps(self) -> int:
        """How many steps come before those that are like all others: what is captured comes after some that are not."""
        return WARM_UP + 1 if isinstance(self.loop_steps, CapturedSteps) else 1

    def warm_up(self) -> list[float]:
        """Take the steps that are captured, if any, and tell how many seconds each turn of the loop took."""
        turns = -(-self.cold_steps // self.steps) if isinstance(self.loop_steps, CapturedSteps) else 0
        taken = [_turn({"loop": self.loop, "bare": self.bare}) for _ in range(turns)]
        return [turn["loop"] for turn in taken]

    def loop(self) -> None:
        """The real loop: an epoch of the trainer."""
        self.epoch += 1
        trainer.train_epoch(self.loop_steps, self.job.config, self.epoch, self.quiet.step)

    def bare(self) -> None:
        """The same steps on one batch that is ready."""
        self.job.model.train()
        for index in range(self.steps):
            self.bare_steps.take(index)
        self._wait()

    def plain(self) -> None:
        """The same training in the plain way."""
        assert self.plain_loop is not None
        self.plain_loop.epoch()

    def evaluation(self) -> None:
        """The real evaluation."""
        with self._whole_network():
            metrics.predict(self.job.model, self.test, self.training.cast)

    def front(self) -> None:
        """The frozen part alone, as it is run once for all epochs."""
        assert self.job.parted is not None
        with self._whole_network(), self.training.cast():
            for inputs in self.test_inputs:
                self.job.parted.front(inputs)
        self._wait()

    def bare_evaluation(self) -> None:
        """Forward passes of the same images that are ready."""
        with self._whole_network(), torch.inference_mode(), self.training.cast():
            model = self.job.model.eval()
            torch.cat([model(inputs).float() for inputs in self.test_inputs]).cpu()
        self.job.model.train()

    @contextmanager
    def _whole_network(self) -> Iterator[None]:
        """Evaluate on images, where the frozen front is switched off while the rest trains."""
        parted = self.job.parted
        if parted is None:
            yield
            return
        parted.switch_front(on=True)
        yield
        parted.switch_front(on=False)

    def rates(self, seconds: Mapping[str, Sequence[float]]) -> "_Rates":
        """Medians, from what each call of `loop`, `evaluation` and, with a frozen part, `front` took."""
        tested, once = self.test.count, None
        if self.job.parted is not None:
            policy = self.job.loaders.train.policy
            assert isinstance(policy, Views)
            once = _Once(len(policy.versions), tested / median(seconds["front"]))
        trained = self.steps * self.job.config.data.batch_size
        return _Rates(trained / median(seconds["loop"]), tested / median(seconds["evaluation"]), once)

    def phases(self) -> dict[str, float]:
        """Seconds of each part of the steps of an epoch, launched one by one and waited for."""
        training, spent = self.training, dict.fromkeys(("data", "forward", "backward", "optimizer"), 0.0)
        training.model.train()

        def timed(part: str, function: Callable[..., Any], *arguments: Any) -> Any:
            started = time.perf_counter()
            result = function(*arguments)
            self._wait()
            spent[part] += time.perf_counter() - started
            return result

        plan = timed("data", training.loader.plan, 1)
        for share in training.loader.shares:
            batch = timed("data", training.loader.batch, plan, share)
            output = timed("forward", training.forward, batch)
            timed("backward", training.backward, output.loss)
            timed("backward", training.backward_uphill, batch)
            timed("optimizer", training.move)
        return spent


# ------------------------------------------------------------------------------------------------ measuring


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


def _measure(preset: Preset, sides: Sides, watcher: Watcher, repeats: int) -> dict[str, Any]:
    job, steps = sides.job, sides.steps
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
    if sides.plain_loop is not None:
        parts["plain"] = sides.plain
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    phases: dict[str, list[float]] = {}
    watcher.say(f"measuring {preset.name} on {job.device}: {repeats} turns of {steps} steps of each side")
    if job.step_mode.name != "off":
        watcher.say(f"steps: {job.step_mode.name} ({job.step_mode.reason})")
    began = time.perf_counter()
    with watcher.progress("turns, after a first one that warms up", repeats + 1) as advance:
        sides.warm_up()
        for turn in range(repeats + 1):
            taken = _turn(parts)
            if turn:
                for name, value in taken.items():
                    seconds[name].append(value)
                spent = sides.phases()
                for name, value in spent.items():
                    phases.setdefault(name, []).append(value / sum(spent.values()))
            else:
                warm_up = time.perf_counter() - began
            advance(1)
    images, tested = steps * job.config.data.batch_size, sides.test.count

    def rate(name: str, count: int) -> dict[str, float]:
        return vars(Spread.of([count / value for value in seconds[name]]))

    def ratio(over: str, under: str) -> dict[str, float]:
        pairs = zip(seconds[over], seconds[under], strict=True)
        return vars(Spread.of([one / other for one, other in pairs]))

    flops = step_flops(sides.training)
    loop = rate("loop", images)
    highest = peak.flops / median(seconds["peak"])
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
        "shares": {name: vars(Spread.of(values)) for name, values in phases.items()},
        "flops_per_image": flops,
        "peak_flops_per_second": highest,
        "utilization": flops * loop["median"] / highest,
        "full_run": _full_run(preset.config, *sides.rates(seconds)),
        "peak_memory_bytes": devices.peak_memory(job.device),
    }
    if job.parted is not None:
        result["images_per_second"]["frozen_part"] = rate("front", tested)
    if sides.plain_loop is not None:
        result["images_per_second"]["plain"] = rate("plain", images)
        result["ratios"]["speedup_over_plain"] = ratio("plain", "loop")
        result["plain_workers"] = sides.plain_loop.workers
    return result


class _Once(NamedTuple):
    """A frozen part that is run once: on how many versions of each training image, and images a second."""

    versions: int
    rate: float


class _Rates(NamedTuple):
    """Images a second, as large as they get; what is run once, if anything; and the seconds of compiling steps."""

    training: float
    evaluation: float
    once: _Once | None
    compiling: float = 0.0


def _images(config: Config) -> tuple[int, int]:
    """How many images are trained on, and how many are held out."""
    training = DATASETS[config.data.dataset].training_images
    held_out = round(training * config.data.val_fraction)
    return round((training - held_out) * config.data.fraction), held_out


def _full_run(
    config: Config,
    training_rate: float,
    evaluation_rate: float,
    once: _Once | None = None,
    compiling: float = 0.0,
) -> dict[str, float]:
    """What the preset's whole run comes to, on all of its images.

    Rates are those of images as large as they get. What was run `once` is not run again to look at images in an epoch;
    the result is the whole network's. Steps are compiled anew for each size of images.
    """
    (images, held_out), tested = _images(config), DATASETS[config.data.dataset].test_images
    looks = held_out + (tested if config.train.select == "best_test" or config.train.watch_test else 0)
    epochs = config.train.epochs
    work = fmean(config.work_in(epoch) for epoch in range(1, epochs + 1))
    sizes = {config.image_size_in(epoch) for epoch in range(1, epochs + 1)}
    look, before = 1 / evaluation_rate, 0.0
    if once is not None:
        look = max(0.0, look - 1 / once.rate)
        before = (once.versions * images + looks) / once.rate
    epoch = work * images / training_rate + looks * look
    return {
        "epochs": epochs,
        "training_images": images,
        "seconds_of_frozen_part": before,
        "seconds_per_epoch": epoch,
        "seconds": before + compiling * len(sizes) + epochs * epoch + (held_out + tested) / evaluation_rate,
    }

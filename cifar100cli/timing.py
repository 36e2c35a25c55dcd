"""What `bench` and `--minutes` time: the real loop and evaluation, the same steps on one batch that is ready (the bare
step), and the plain way.

The images are noise: what they show makes no difference to the time.
"""

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cifar100cli import devices, metrics, trainer
from cifar100cli.augment import Views
from cifar100cli.card import read_card
from cifar100cli.catalog import DATASETS
from cifar100cli.config import Preset, having
from cifar100cli.datasets import Dataset, Split
from cifar100cli.folders import Where
from cifar100cli.jobs import evaluation_loader, prepare, step_mode_of
from cifar100cli.loader import Batch, DeviceLoader, Features, Plan, evaluation_batch_size
from cifar100cli.plain_loop import PlainLoop
from cifar100cli.runs import find_model
from cifar100cli.schema import Config
from cifar100cli.steps import WARM_UP, CapturedSteps, Steps, create_steps
from cifar100cli.trainer import Job
from cifar100cli.watcher import Watcher
from cifar100cli.whole_run import FrozenPart, Rates

TURN = {"cpu": 3.0, "cuda": 0.5}  # about so many seconds of each side in a turn
TEST_BATCHES = 3


class StepCost(NamedTuple):
    """Roughly, the seconds of a step, those in which a frozen part makes its inputs ready, and those of the first step.

    The first one compiles, where steps are compiled: what is compiled after it in this process comes from a cache.
    """

    step: float
    inputs: float
    first: float

    def steps_of_a_turn(self, where: Where) -> int:
        """How many steps each side takes in a turn."""
        return _in_a_turn(self.step, where)

    def different_steps(self, where: Where) -> int:
        """For how many of them inputs are made ready: no longer than a turn may that take."""
        return _in_a_turn(self.inputs, where)


def _in_a_turn(seconds: float, where: Where) -> int:
    turn = TURN.get(devices.select_device(where.device).type, 3.0)
    return max(1, round(min(200.0, turn / max(seconds, 1e-9))))


def cost_of_a_step(preset: Preset, images: int, where: Where, watcher: Watcher) -> StepCost:
    """From one step after those that warm up."""
    sides = Sides(preset, images, where, Quiet(watcher), 1)
    first, *_, step = (take_turn({"step": sides.bare})["step"] for _ in range(sides.cold_steps + 1))
    inputs = 0.0
    if sides.job.parted is not None:
        share = sides.versions * preset.config.data.batch_size / sides.test.count
        inputs = share * take_turn({"front": sides.front})["front"]
    return StepCost(step, inputs, first)


def take_turn(parts: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of each part, one after the other."""
    taken = {}
    for name, part in parts.items():
        started = time.perf_counter()
        part()
        taken[name] = time.perf_counter() - started
    return taken


def take_turns(
    parts: Mapping[str, Callable[[], object]], count: int, watcher: Watcher, title: str
) -> Generator[dict[str, float]]:
    """Seconds of each part in a first turn, which warms up what is not yet, and in each of `count` after that."""
    with watcher.progress(title, count + 1) as advance:
        for _ in range(count + 1):
            yield take_turn(parts)
            advance(1)


def without_files(config: Config) -> Config:
    """The preset with the same work and nothing to fetch: weights change no time, and all images train, grown up.

    What forbids a run to keep features, as images that grow do, forbids it here.
    """
    keys = config.model_dump()
    if config.finetune is not None and config.obstacle_to_kept_features() is not None:
        keys["finetune"]["cache"] = "off"
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


class Quiet(Watcher):
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


class FewFeatures(Features):
    """Kept features of few images, which are those of the many others, too."""

    def __init__(self, features: Features) -> None:
        super().__init__(features.table, features.device, features.dtype)

    def __call__(self, views: Tensor, positions: Tensor) -> Tensor:
        """As `Features` does it."""
        return super().__call__(views, positions % self.table.shape[1])


class Repeated(DeviceLoader):
    """A loader of features whose images come so many times in an epoch."""

    def __init__(self, loader: DeviceLoader, times: int) -> None:
        assert loader.features is not None
        self.__dict__.update(loader.__dict__)
        self.features = FewFeatures(loader.features)
        self.labels = loader.labels.repeat(times)
        starts = [loader.count * time for time in range(times)]
        self.bounds = [(start + first, start + last) for start in starts for first, last in loader.bounds]
        self.shares = [slice(start + share.start, start + share.stop) for start in starts for share in loader.shares]
        self.loss_weights = loader.loss_weights * times


class Sides:
    """What is measured: each method does `steps` steps, or one evaluation, and waits for the device.

    Inputs that a frozen part makes ready are those of `different` steps alone, where these are fewer.
    """

    def __init__(
        self,
        preset: Preset,
        images: int,
        where: Where,
        watcher: Watcher,
        steps: int,
        *,
        different: int | None = None,
    ) -> None:
        config = preset.config
        self.preset, self.where, self.images = preset, where, images
        different = steps if different is None or config.finetune is None else min(steps, different)
        steps = different * -(-steps // different)
        count = config.data.batch_size * different
        self.dataset = noise_dataset(
            config,
            count,
            TEST_BATCHES * evaluation_batch_size(config.data.image_size, devices.select_device(where.device)),
        )
        self.steps = steps
        self.job: Job = prepare(preset, where, Quiet(watcher), dataset=self.dataset, images=images)
        if steps > different:
            repeated = Repeated(self.job.loaders.train, steps // different)
            self.job = replace(self.job, loaders=replace(self.job.loaders, train=repeated))
        job = self.job
        self.training = trainer.prepare_steps(job)
        resident = replace(self.training, loader=OneBatch(job.loaders.train))
        self.loop_steps: Steps = create_steps(self.training, job.step_mode)
        self.bare_steps: Steps = create_steps(resident, job.step_mode)
        self.bare_steps.begin(1)
        self.test = evaluation_loader(self.dataset.test, job.device, job.loaders.train.preprocessing)
        self.epoch = 0
        self.quiet = Quiet(watcher)

    def plain_loop(self) -> PlainLoop | None:
        """The same training in the plain way, made ready; None where it does more than most code does."""
        config = self.preset.config
        mixed = config.augment.mixup or config.augment.cutmix
        of_its_own = config.optimizer.name == "muon" or config.optimizer.sam_rho
        if config.distillation is not None or mixed or of_its_own:
            return None
        keys = config.model_dump()
        if config.finetune is not None:
            keys["finetune"]["cache"] = "off"
        keys["train"] |= {"precision": "fp32", "compile": "off"}
        config = Config.model_validate(keys)
        job = prepare(Preset(self.preset.name, config), self.where, self.quiet, dataset=self.dataset)
        return PlainLoop(job.model, job.task, job.loaders.train, config.augment, config.optimizer, list(job.groups))

    def takes_its_steps_otherwise(self, epochs: int) -> bool:
        """Whether a run of so many epochs would launch its steps in another way: a long one pays for compiling."""
        config = having(self.job.config, "train.epochs", epochs)
        mode = step_mode_of(config, self.job.model, self.job.loaders.train, self.images)
        return mode.name != self.job.step_mode.name

    def _wait(self) -> None:
        if self.job.device.type != "cpu":
            torch.accelerator.synchronize()

    @property
    def cold_steps(self) -> int:
        """How many steps come before those that are like all others: what is captured comes after some that are not."""
        return WARM_UP + 1 if isinstance(self.loop_steps, CapturedSteps) else 1

    @property
    def versions(self) -> int:
        """How many versions of an image a frozen part sees."""
        policy = self.job.loaders.train.policy
        assert isinstance(policy, Views)
        return len(policy.versions)

    def warm_up(self, part: Callable[[], None]) -> list[float]:
        """Take the steps of `loop` or `bare` that are captured, if any; how many seconds each turn of them took."""
        turns = -(-self.cold_steps // self.steps) if isinstance(self.loop_steps, CapturedSteps) else 0
        return [take_turn({"part": part})["part"] for _ in range(turns)]

    def loop(self) -> None:
        """The real loop: an epoch of the trainer."""
        self.epoch += 1
        trainer.train_epoch(self.loop_steps, self.job.config, self.epoch, self.quiet.step)

    def bare(self) -> None:
        """The same steps on one batch that is ready."""
        self.job.model.train()
        for index in range(len(self.job.loaders.train)):
            self.bare_steps.take(index)
        self._wait()

    def evaluation(self) -> None:
        """The real evaluation."""
        with self._whole_network():
            metrics.logits_of(self.job.model, self.test, self.training.cast)

    def front(self) -> None:
        """The frozen part alone, as it is run once for all epochs."""
        assert self.job.parted is not None
        with self._whole_network(), self.training.cast():
            for _ in self._answers(self.job.parted.front):
                pass
        self._wait()

    def bare_evaluation(self) -> None:
        """Forward passes of the same images that are ready."""
        with self._whole_network(), torch.inference_mode(), self.training.cast():
            model = self.job.model.eval()
            torch.cat([answers.float() for answers in self._answers(model)]).cpu()
        self.job.model.train()

    @cached_property
    def test_inputs(self) -> list[Tensor]:
        """What the network sees of the test images, ready on the device."""
        return [batch.inputs for batch in self.test.epoch(1)]

    def _answers(self, network: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
        """What a network makes of the test images that are ready: of as many at once as in the run's evaluation."""
        for inputs in self.test_inputs:

            def look(rows: slice, inputs: Tensor = inputs) -> Tensor:
                return network(inputs[rows])

            for _, answers in self.test.portions.of(slice(0, len(inputs)), look):
                yield answers

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

    def rates(
        self, began: Sequence[float], seconds: Mapping[str, Sequence[float]], cost: StepCost | None = None
    ) -> Rates:
        """Medians, from what each call of `loop`, `evaluation` and, with a frozen part, `front` took.

        What the first turns of the loop, `began`, took more is the time of compiling, where steps are compiled; or what
        the very first step took more, in `cost`.
        """
        tested, frozen, compiling = self.test.count, None, 0.0
        if self.job.step_mode.name == "inductor":
            compiling = max(0.0, sum(began) - len(began) * median(seconds["loop"]))
            if cost is not None:
                compiling = max(compiling, cost.first - cost.step)
        if self.job.parted is not None:
            frozen = FrozenPart(self.versions, tested / median(seconds["front"]))
        trained = self.steps * self.job.config.data.batch_size
        return Rates(trained / median(seconds["loop"]), tested / median(seconds["evaluation"]), frozen, compiling)

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

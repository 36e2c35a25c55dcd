"""The learning rate against torch's schedulers, at every step."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from cifar100cli.optim import learning_rate
from cifar100cli.schema import Schedule

PEAK, PER_EPOCH, EPOCHS = 0.3, 10, 6


def rates(epochs: int = EPOCHS, **keys: Any) -> list[float]:
    schedule = Schedule(**keys)
    return [learning_rate(PEAK, schedule, step, PER_EPOCH, epochs) for step in range(epochs * PER_EPOCH)]


def reference(kind: type[LRScheduler], count: int = EPOCHS * PER_EPOCH, every: int = 1, **keys: Any) -> list[float]:
    """What torch's scheduler gives, `every` so many steps taken once."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = kind(optimizer, **keys)
    found = []
    for step in range(count):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if (step + 1) % every == 0 and step + 1 < count:
            scheduler.step()
    return found


def test_constant() -> None:
    assert set(rates()) == {PEAK}


@pytest.mark.parametrize("final", [0.0, 0.2, 1.0])
def test_cosine_is_torchs(final: float) -> None:
    expected = reference(lr_scheduler.CosineAnnealingLR, T_max=EPOCHS * PER_EPOCH, eta_min=final * PEAK)
    assert rates(name="cosine", final=final) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("final", [0.0, 0.2, 1.0])
def test_linear_is_torchs(final: float) -> None:
    total = EPOCHS * PER_EPOCH
    expected = reference(lr_scheduler.LinearLR, start_factor=1.0, end_factor=final, total_iters=total)
    assert rates(name="linear", final=final) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("gamma", [0.1, 0.5])
def test_multi_step_is_torchs(gamma: float) -> None:
    milestones = [1, 3, 4]
    expected = reference(lr_scheduler.MultiStepLR, every=PER_EPOCH, milestones=milestones, gamma=gamma)
    assert rates(name="multi_step", milestones=milestones, gamma=gamma) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"pct_start": 0.0},
        {"pct_start": 0.25, "div_factor": 10.0, "final_div_factor": 100.0},
        {"pct_start": 0.99},
        {"pct_start": 0.01},  # under a single step
    ],
)
@pytest.mark.parametrize("epochs", [1, 6])
def test_one_cycle_is_torchs(keys: dict[str, Any], epochs: int) -> None:
    total = epochs * PER_EPOCH
    expected = reference(
        lr_scheduler.OneCycleLR, total, max_lr=PEAK, total_steps=total, cycle_momentum=False, three_phase=False, **keys
    )
    assert rates(epochs, name="one_cycle", **keys) == pytest.approx(expected, abs=1e-12)


def test_one_cycle_of_a_rise_of_one_step_begins_at_the_peak() -> None:
    """Where PyTorch divides by zero."""
    found = rates(1, name="one_cycle", pct_start=0.1)
    assert found[0] == PEAK
    assert all(a > b for a, b in itertools.pairwise(found))
    assert learning_rate(PEAK, Schedule(name="one_cycle"), 0, 1, 1) == pytest.approx(PEAK / 25 / 1e4)


def test_warm_up_rises_to_the_peak() -> None:
    found = [learning_rate(1.0, Schedule(warmup_epochs=2), step, 4, 5) for step in range(20)]
    assert found == [0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0] + [1.0] * 12
    found = [learning_rate(1.0, Schedule(warmup_epochs=0.7), step, 4, 5) for step in range(4)]
    assert found == [1 / 3, 2 / 3, 1, 1], "2.8 steps are three"


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_after_the_warm_up_it_falls(name: Any) -> None:
    found = [learning_rate(1.0, Schedule(name=name, warmup_epochs=2), step, 4, 5) for step in range(20)]
    assert found[:9] == [0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0, 1.0]
    assert all(a > b > 0 for a, b in itertools.pairwise(found[8:]))
    alone = [learning_rate(1.0, Schedule(name=name), step, 4, 3) for step in range(12)]
    assert found[8:] == alone


def test_milestones_count_the_warm_up() -> None:
    schedule = Schedule(name="multi_step", warmup_epochs=1, milestones=(2,), gamma=0.5)
    assert [learning_rate(1.0, schedule, step, 2, 4) for step in range(8)] == [0.5, 1, 1, 1, 0.5, 0.5, 0.5, 0.5]


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_warm_up_longer_than_the_run(name: Any) -> None:
    found = [learning_rate(1.0, Schedule(name=name, warmup_epochs=9), step, 4, 2) for step in range(8)]
    assert found == [(step + 1) / 8 for step in range(8)]
    assert learning_rate(1.0, Schedule(name=name, warmup_epochs=9), 999, 4, 2) == 0, "where a benchmark goes"


def test_beyond_the_end_it_stays() -> None:
    """Where a benchmark goes."""
    for name, end in (("cosine", 0.1), ("linear", 0.1), ("one_cycle", 1 / 25 / 1e4)):
        schedule = Schedule.model_validate({"name": name, "final": 0.1 if name != "one_cycle" else 0})
        for step in (20, 25, 999):  # among them one at which a cosine that went on would be low again
            assert math.isclose(learning_rate(1.0, schedule, step, 4, 5), end)

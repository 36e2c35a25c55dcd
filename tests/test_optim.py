"""Optimizers against plain torch, and the learning rate against torch's schedulers."""

import itertools
import math
from typing import Literal

import pytest
import torch
from torch import nn

from cifar100cli.config import Optimizer, Schedule
from cifar100cli.groups import everything
from cifar100cli.optim import create_optimizer, set_learning_rate
from cifar100cli.schedule import learning_rate


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5))


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_steps_are_torchs_own(name: Literal["adamw", "adam", "sgd"]) -> None:
    config = Optimizer(name=name, lr=0.01, weight_decay=0.1)
    ours, theirs = make_model(), make_model()
    parameters, plain = theirs.parameters(), {"lr": 0.01, "weight_decay": 0.1, "fused": False, "foreach": False}
    reference: torch.optim.Optimizer
    if name == "sgd":
        reference = torch.optim.SGD(parameters, momentum=0.9, nesterov=True, **plain)  # type: ignore[arg-type]
    else:
        kind = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
        reference = kind(parameters, betas=(0.9, 0.999), **plain)  # type: ignore[arg-type]
    optimizer = create_optimizer(config, everything(ours))
    for step in range(5):
        inputs = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        for model, one in ((ours, optimizer), (theirs, reference)):
            one.zero_grad()
            model(inputs).square().mean().backward()
            one.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other)


def test_what_is_frozen_is_left_out() -> None:
    model = make_model()
    model[0].requires_grad_(False)  # type: ignore[index]
    groups = create_optimizer(Optimizer(), everything(model)).param_groups
    assert sum(p.numel() for group in groups for p in group["params"]) == 4 * 36 * 5 + 5


def test_constant() -> None:
    assert {learning_rate(0.3, Schedule(), step, 10, 5) for step in range(50)} == {0.3}


def test_cosine_is_torchs() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50)
    for step in range(50):
        assert math.isclose(
            learning_rate(0.3, Schedule(name="cosine"), step, 10, 5), optimizer.param_groups[0]["lr"], abs_tol=1e-12
        )
        optimizer.step()
        scheduler.step()


def test_warm_up_rises_to_the_peak() -> None:
    rates = [learning_rate(1.0, Schedule(warmup_epochs=2), step, 4, 5) for step in range(20)]
    assert rates == [0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0] + [1.0] * 12
    cosine = [learning_rate(1.0, Schedule(name="cosine", warmup_epochs=2), step, 4, 5) for step in range(20)]
    assert cosine[:8] == rates[:8]
    assert cosine[8] == 1.0
    assert all(a > b > 0 for a, b in itertools.pairwise(cosine[8:]))


def test_warm_up_longer_than_the_run() -> None:
    rates = [learning_rate(1.0, Schedule(name="cosine", warmup_epochs=9), step, 4, 2) for step in range(8)]
    assert rates == [(step + 1) / 8 for step in range(8)]


def test_set_learning_rate() -> None:
    optimizer = create_optimizer(Optimizer(), everything(make_model()))
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5]

"""Optimizers against plain torch, and Muon against torch's own and against singular values in float64."""

import copy
import math
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cifar100cli.muon import Muon, orthogonalised
from cifar100cli.optim import (
    Group,
    create_optimizer,
    divided,
    everything,
    hidden_weights,
    set_learning_rate,
    without_decay,
)
from cifar100cli.schema import Optimizer


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5))


def backward(model: nn.Module, step: int) -> None:
    inputs = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(step))
    model.zero_grad()
    model(inputs.to(next(model.parameters()).dtype)).square().mean().backward()


def assert_equal_weights(model: nn.Module, other: nn.Module) -> None:
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


# --------------------------------------------------------------------------------------------- torch's own


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_steps_are_torchs_own(name: Literal["adamw", "adam", "sgd"], nesterov: bool) -> None:
    config = Optimizer(name=name, lr=0.01, weight_decay=0.1, nesterov=nesterov)
    ours, theirs = make_model(), make_model()
    parameters, plain = theirs.parameters(), {"lr": 0.01, "weight_decay": 0.1, "fused": False, "foreach": False}
    reference: torch.optim.Optimizer
    if name == "sgd":
        reference = torch.optim.SGD(parameters, momentum=0.9, nesterov=nesterov, **plain)  # type: ignore[arg-type]
    else:
        kind = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
        reference = kind(parameters, betas=(0.9, 0.999), **plain)  # type: ignore[arg-type]
    optimizer = create_optimizer(config, everything(ours))
    for step in range(5):
        for model, one in ((ours, optimizer), (theirs, reference)):
            backward(model, step)
            one.step()
    assert_equal_weights(ours, theirs)


def test_sgd_without_momentum_has_nothing_to_look_ahead_along() -> None:
    optimizer = create_optimizer(Optimizer(name="sgd", momentum=0), everything(make_model()))
    assert not optimizer.param_groups[0]["nesterov"]


def test_what_is_frozen_is_left_out() -> None:
    model = make_model()
    model[0].requires_grad_(False)  # type: ignore[index]
    groups = create_optimizer(Optimizer(), everything(model)).param_groups
    assert sum(p.numel() for group in groups for p in group["params"]) == 4 * 36 * 5 + 5


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_rates_and_decay_of_groups_are_torchs(name: Literal["adamw", "adam", "sgd"]) -> None:
    ours, theirs = make_model(), make_model()
    first, second = list(ours.parameters())[:2], list(ours.parameters())[2:]
    groups = divided([Group(first, 0.1), Group(second)], exempt=without_decay(ours))
    optimizer = create_optimizer(Optimizer(name=name, lr=0.5, weight_decay=0.1), groups)
    parameters = [
        {"params": [p], "lr": 0.02 * (0.1 if index < 2 else 1), "weight_decay": 0.1 if p.ndim > 1 else 0.0}
        for index, p in enumerate(theirs.parameters())
    ]
    reference: torch.optim.Optimizer
    if name == "sgd":
        reference = torch.optim.SGD(parameters, lr=1, momentum=0.9, nesterov=True)
    else:
        reference = (torch.optim.AdamW if name == "adamw" else torch.optim.Adam)(parameters)
    for step in range(4):
        set_learning_rate(optimizer, 0.02)
        for model, one in ((ours, optimizer), (theirs, reference)):
            backward(model, step)
            one.step()
    assert_equal_weights(ours, theirs)


def test_set_learning_rate() -> None:
    optimizer = create_optimizer(Optimizer(), everything(make_model()))
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5]


# ---------------------------------------------------------------------------------------------------- Muon


def of_singular_values(matrix: NDArray[np.float64], steps: int) -> NDArray[np.float64]:
    """What the iteration comes to: each singular value s of the normed matrix becomes p(p(... p(s)))."""
    left, values, right = np.linalg.svd(matrix / np.linalg.norm(matrix), full_matrices=False)
    for _ in range(steps):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return np.asarray(left @ np.diag(values) @ right)


@pytest.mark.parametrize("shape", [(6, 6), (4, 30), (30, 4), (1, 7), (7, 1)])
@pytest.mark.parametrize("steps", [1, 5])
def test_the_iteration_moves_singular_values_alone(shape: tuple[int, int], steps: int) -> None:
    matrix = np.random.default_rng(0).normal(size=shape)
    found = orthogonalised(torch.from_numpy(matrix), steps)
    np.testing.assert_allclose(found.numpy(), of_singular_values(matrix, steps), atol=1e-12)


@pytest.mark.parametrize("shape", [(64, 64), (32, 288), (288, 32)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_five_steps_are_nearly_orthogonal(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Singular values over two orders of magnitude end between 0.65 and 1.25, and the directions are the SVD's."""
    random = np.random.default_rng(1)
    left, _, right = np.linalg.svd(random.normal(size=shape), full_matrices=False)
    matrix = torch.from_numpy(left @ np.diag(np.geomspace(0.05, 5, min(shape))) @ right)
    found = orthogonalised(matrix.to(dtype), 5)
    assert found.dtype == dtype
    values = np.linalg.svd(found.double().numpy(), compute_uv=False)
    assert 0.65 < values.min() <= values.max() < 1.25
    # Of the polar factor: its inner product with U V^T is the sum of the singular values.
    assert np.sum(found.double().numpy() * (left @ right)) == pytest.approx(values.sum(), rel=2e-2)


def test_a_matrix_of_zeros_stays() -> None:
    assert not orthogonalised(torch.zeros(3, 4), 5).any()


def matrices() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(192, 24, False), nn.Linear(24, 24, False), nn.Linear(24, 60, False))


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_muon_on_matrices_is_torchs(nesterov: bool, adjust: Literal["original", "match_rms_adamw"]) -> None:
    ours, theirs = matrices(), matrices()
    keys: dict[str, Any] = {"momentum": 0.8, "nesterov": nesterov, "weight_decay": 0.1, "ns_steps": 5}
    reference = torch.optim.Muon(theirs.parameters(), 0.02, adjust_lr_fn=adjust, **keys)
    optimizer = Muon(ours.parameters(), 0.02, adjust_lr=adjust, fixed_norm=False, dtype=torch.bfloat16, **keys)
    for _ in range(5):
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.grad = torch.randn(mine.shape)
            other.grad = mine.grad.clone()
        optimizer.step()
        reference.step()  # type: ignore[no-untyped-call]
    assert_equal_weights(ours, theirs)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("fixed_norm", [True, False])
def test_muon_is_the_papers_in_float64(
    nesterov: bool, adjust: Literal["original", "match_rms_adamw"], fixed_norm: bool
) -> None:
    """Filters included; with the momentum as Jordan writes it, of which the iteration sees the direction.

    A fixed norm is airbench's: the root of the rows, before the step.
    """
    random, shapes = np.random.default_rng(0), [(5, 3, 3, 3), (40, 2, 3, 3), (6, 9), (12, 4)]
    weights = [random.normal(size=shape) for shape in shapes]
    parameters = [nn.Parameter(torch.from_numpy(weight.copy())) for weight in weights]
    optimizer = Muon(
        parameters,
        0.02,
        momentum=0.8,
        nesterov=nesterov,
        weight_decay=0.1,
        ns_steps=5,
        adjust_lr=adjust,
        fixed_norm=fixed_norm,
        dtype=torch.float64,
    )
    sums = [np.zeros(shape) for shape in shapes]
    for step in range(4):
        rate = 0.02 / (step + 1)
        for group in optimizer.param_groups:
            # As a number and, as on a CUDA device, a tensor.
            group["lr"] = torch.tensor(rate, dtype=torch.float64) if step % 2 else rate
        for index, shape in enumerate(shapes):
            gradient = random.normal(size=shape)
            parameters[index].grad = torch.from_numpy(gradient)
            sums[index] = 0.8 * sums[index] + gradient
            momentum = gradient + 0.8 * sums[index] if nesterov else sums[index]
            rows, columns = shape[0], math.prod(shape[1:])
            update = of_singular_values(momentum.reshape(rows, columns), 5).reshape(shape)
            size = max(1, rows / columns) ** 0.5 if adjust == "original" else 0.2 * max(rows, columns) ** 0.5
            if fixed_norm:
                weights[index] *= (rows / np.sum(weights[index] ** 2)) ** 0.5
            weights[index] = weights[index] * (1 - rate * 0.1) - rate * size * update
        optimizer.step()
    for found, expected in zip(parameters, weights, strict=True):
        np.testing.assert_allclose(found.detach().numpy(), expected, atol=1e-9)


def test_a_weight_of_zeros_has_no_norm_that_could_be_fixed() -> None:
    """As the last convolution of a branch may begin; its gradient moves it as any other."""
    weight = nn.Parameter(torch.zeros(3, 4))
    weight.grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    keys: dict[str, Any] = {"momentum": 0.9, "nesterov": False, "weight_decay": 0.0, "ns_steps": 5}
    optimizer = Muon([weight], 0.1, adjust_lr="original", fixed_norm=True, dtype=torch.float32, **keys)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), -0.1 * orthogonalised(weight.grad, 5))


def deep_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 6, 3),
        nn.Flatten(),
        nn.Linear(96, 7),
        nn.Linear(7, 5),
    )


def of_muon(model: nn.Module, **keys: Any) -> torch.optim.Optimizer:
    config = Optimizer.model_validate({"name": "muon", "lr": 0.01, "weight_decay": 0.1, **keys})
    groups = divided(everything(model), exempt=without_decay(model), hidden=hidden_weights(model, ["5"]))
    return create_optimizer(config, groups)


@pytest.mark.parametrize("auxiliary", ["adamw", "sgd"])
@pytest.mark.parametrize("auxiliary_lr", [None, 0.004])
@pytest.mark.parametrize("fixed_norm", [True, False])
def test_the_auxiliary_optimizer_moves_the_rest(auxiliary: str, auxiliary_lr: float | None, fixed_norm: bool) -> None:
    model = deep_model()
    optimizer = of_muon(model, auxiliary=auxiliary, auxiliary_lr=auxiliary_lr, fixed_norm=fixed_norm)
    reference = copy.deepcopy(model)
    named = dict(reference.named_parameters())
    hidden = {name: named.pop(name) for name in ("2.weight", "4.weight")}
    rest = [{"params": [p], "weight_decay": 0.1 if p.ndim > 1 else 0.0} for p in named.values()]
    rate = auxiliary_lr or 0.01
    other: torch.optim.Optimizer
    if auxiliary == "adamw":
        other = torch.optim.AdamW(rest, rate, betas=(0.9, 0.999))
    else:
        other = torch.optim.SGD(rest, rate, momentum=0.9, nesterov=True)
    muon = Muon(
        hidden.values(),
        0.01,
        momentum=0.9,
        nesterov=True,
        weight_decay=0.1,
        ns_steps=5,
        adjust_lr="match_rms_adamw",
        fixed_norm=fixed_norm,
        dtype=torch.float32,
    )
    for step in range(4):
        share = 1 / (step + 1)
        set_learning_rate(optimizer, 0.01 * share)
        parts: list[tuple[torch.optim.Optimizer, float]] = [(other, rate), (muon, 0.01)]
        for one, highest in parts:
            for group in one.param_groups:
                group["lr"] = highest * share
        for network in (model, reference):
            backward(network, step)
        optimizer.step()
        other.step()
        muon.step()
    assert_equal_weights(model, reference)


def test_parts_go_on_from_a_state_to_the_bit() -> None:
    model = deep_model()
    optimizer = of_muon(model)
    for step in range(2):
        backward(model, step)
        optimizer.step()
    other = copy.deepcopy(model)
    resumed = of_muon(other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(2, 4):
        for network, one in ((model, optimizer), (other, resumed)):
            set_learning_rate(one, 0.005)
            backward(network, step)
            one.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))

    def numbers(state: dict[str, Any]) -> list[Tensor]:
        return [value for entry in state["state"].values() for value in entry.values()]

    kept, again = numbers(optimizer.state_dict()), numbers(resumed.state_dict())
    assert len(kept) == 2 + 3 * 7  # a momentum of each matrix; both moments and the step of all else
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def test_muon_alone() -> None:
    """Where all that learns is hidden."""
    model = matrices()
    groups = divided(everything(model), hidden=list(model.parameters()))
    optimizer = create_optimizer(Optimizer(name="muon"), groups)
    assert isinstance(optimizer, Muon)
    optimizer.step()
    assert_equal_weights(model, matrices())  # what has no gradient stays


def test_muon_computes_in_bfloat16_where_the_run_does() -> None:
    model = matrices()
    groups = divided(everything(model), hidden=list(model.parameters()))
    for precision, expected in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        optimizer = create_optimizer(Optimizer(name="muon"), groups, precision)
        assert isinstance(optimizer, Muon)
        assert optimizer.dtype == expected

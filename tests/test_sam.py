"""SAM in the training step, against the paper's formulas written out in float64."""

import contextlib
import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from cifar100cli.loader import Batch, DeviceLoader, Mixture, Plan
from cifar100cli.optim import MovingAverage
from cifar100cli.sam import uphill
from cifar100cli.steps import Training
from cifar100cli.tasks import StepOutput

PLAN = Plan(torch.empty(0), ())


class Ready(DeviceLoader):
    """A loader of the batches that it is given."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def batch(self, plan: Plan, rows: Any) -> Batch:
        found: Batch = self.batches[rows.start]
        return found


def batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(16, 6, generator=generator, dtype=torch.float64) for _ in range(count)]
    labels = [torch.randint(0, 3, (16,), generator=generator) for _ in range(count)]
    return [Batch(i, one, None, one, None) for i, one in zip(inputs, labels, strict=True)]


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 3))
    model[3].requires_grad_(False)
    return model.double()


def in_float64(model: nn.Module, batch: Batch) -> StepOutput:
    logits = model(batch.inputs)
    return StepOutput(F.cross_entropy(logits, batch.labels), logits)


def training(model: nn.Module, optimizer: torch.optim.Optimizer, ready: list[Batch], **keys: Any) -> Training:
    return Training(
        model=model,
        network=model,
        task=in_float64,
        loader=Ready(ready),
        optimizer=optimizer,
        cast=contextlib.nullcontext,
        average=MovingAverage(model, 0),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        **{"grad_clip": 0.0, **keys},
    )


def norm(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors]).square().sum().sqrt()


def test_copies_are_of_one_type_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several types, PyTorch copies one by one on a GPU; batch norms count batches in whole numbers."""
    copied: list[set[torch.dtype]] = []
    copy = torch._foreach_copy_

    def spy(targets: list[Tensor], sources: list[Tensor]) -> None:
        copied.append({tensor.dtype for tensor in (*targets, *sources)})
        copy(targets, sources)

    monkeypatch.setattr(torch, "_foreach_copy_", spy)
    model = network()
    model(batches(1)[0].inputs).sum().backward()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with uphill(model, 0.1):
        assert not torch.equal(model.state_dict()["0.weight"], before["0.weight"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert sorted(map(len, copied)) == [1] * 4


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("grad_clip", [0.0, 0.3])
@pytest.mark.parametrize("weight", [1.0, 0.6])
def test_steps_are_the_papers(adaptive: bool, grad_clip: float, weight: float) -> None:
    rho, rate = 0.4, 0.1
    model, ready = network(), batches(4)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate, momentum=0.9)
    sam = training(model, optimizer, ready, grad_clip=grad_clip, sam_rho=rho, sam_adaptive=adaptive)

    reference = network()
    names = [name for name, p in reference.named_parameters() if p.requires_grad]
    weights = {name: p.detach().clone() for name, p in reference.named_parameters()}
    mean, variance = torch.zeros(8, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
    momentum = {name: torch.zeros_like(weights[name]) for name in names}

    def gradients(at: dict[str, Tensor], batch: Batch) -> tuple[Tensor, list[Tensor]]:
        leaves = {name: value.clone().requires_grad_() for name, value in at.items()}
        loss = F.cross_entropy(functional_call(reference, leaves, (batch.inputs,)), batch.labels) * weight
        return loss.detach(), list(torch.autograd.grad(loss, [leaves[name] for name in names]))

    for index, batch in enumerate(ready):
        noted, right = sam.step(PLAN, slice(index, index + 1), weight)
        expected, slope = gradients(weights, batch)
        assert noted.item() == pytest.approx(expected.item(), rel=1e-12)
        logits = functional_call(reference, weights, (batch.inputs,))
        assert right == (logits.argmax(1) == batch.labels).sum()
        hidden = F.linear(batch.inputs, weights["0.weight"], weights["0.bias"])
        mean = 0.9 * mean + 0.1 * hidden.mean(0)
        variance = 0.9 * variance + 0.1 * hidden.var(0)
        if adaptive:  # epsilon = rho T^2 g / ||T g||, with T = |w| + eta
            sizes = [weights[name].abs() + 0.01 for name in names]
            length = norm([t * g for t, g in zip(sizes, slope, strict=True)])
            up = [rho * t**2 * g / length for t, g in zip(sizes, slope, strict=True)]
        else:
            up = [rho * g / norm(slope) for g in slope]
        _, slope = gradients({**weights, **{n: weights[n] + e for n, e in zip(names, up, strict=True)}}, batch)
        clip = min(1.0, grad_clip / (norm(slope).item() + 1e-6)) if grad_clip else 1.0
        for name, gradient in zip(names, slope, strict=True):
            momentum[name] = 0.9 * momentum[name] + clip * gradient
            weights[name] = weights[name] - rate * momentum[name]

    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), weights[name], rtol=1e-9, atol=1e-12)
    buffers = dict(model.named_buffers())
    torch.testing.assert_close(buffers["1.running_mean"], mean, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(buffers["1.running_var"], variance, rtol=1e-9, atol=1e-12)
    assert buffers["1.num_batches_tracked"] == 4


def test_the_weights_come_back_to_the_bit() -> None:
    """With a rate of 0, nothing of the climb is left."""
    model, ready = network().float(), batches(1)
    ready = [Batch(ready[0].inputs.float(), ready[0].labels, None, ready[0].labels, None)]
    before = [p.detach().clone() for p in model.parameters()]
    training(model, torch.optim.SGD(model.parameters(), lr=0.0), ready, sam_rho=3.0).step(PLAN, slice(0, 1))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_step_that_fails_on_the_way_leaves_the_weights_below() -> None:
    """As one that is interrupted: the training state may be written after it."""
    model = network()
    model(batches(1)[0].inputs).sum().backward()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt), uphill(model, 0.1):
        raise KeyboardInterrupt
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_right_predictions_of_mixed_images_are_of_the_larger_share() -> None:
    model, (batch,) = network(), batches(1)
    predicted = copy.deepcopy(model)(batch.inputs).argmax(1)
    wrong = (predicted + 1) % 3
    mixed = replace(batch, labels=wrong, mixture=Mixture(predicted, torch.linspace(0, 1, 16, dtype=torch.float64)))
    _, right = training(model, torch.optim.SGD(model.parameters(), lr=0.1), [mixed]).step(PLAN, slice(0, 1))
    assert right == 8, "the half in which the others' share is the larger one"


def test_without_a_gradient_there_is_no_way_up() -> None:
    model, ready = network(), batches(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    ready = [Batch(ready[0].inputs[:3], torch.arange(3), None, torch.arange(3), None)]
    training(model, torch.optim.SGD(model.parameters(), lr=0.1), ready, sam_rho=1.0).step(PLAN, slice(0, 1))
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_off_is_one_pass() -> None:
    model, ready = network(), batches(1)
    passes = 0

    def counting(model: nn.Module, batch: Batch) -> StepOutput:
        nonlocal passes
        passes += 1
        return in_float64(model, batch)

    for rho in (0.0, 0.1):
        one = training(model, torch.optim.SGD(model.parameters(), lr=0.1), ready, sam_rho=rho)
        Training(**{**vars(one), "task": counting}).step(PLAN, slice(0, 1))
    assert passes == 1 + 2

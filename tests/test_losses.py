"""Margin losses against float64 NumPy and finite differences, and finite at the ends of the cosine."""

import itertools
import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cifar100cli import losses

Array = NDArray[np.float64]


def reference(
    cosines: Array, labels: NDArray[np.int64], scale: float, margin: float, kind: str, smoothing: float
) -> float:
    """The papers' formulas, angle by angle."""
    logits = cosines.copy()
    for row, label in enumerate(labels):
        angle = math.acos(cosines[row, label])
        if kind == "cosface":
            logits[row, label] -= margin
        elif angle + margin < math.pi:
            logits[row, label] = math.cos(angle + margin)
        else:
            logits[row, label] -= margin * math.sin(margin)
    logits *= scale
    shifted = logits - logits.max(1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    of_the_true = log_probabilities[np.arange(len(labels)), labels]
    return float(-((1 - smoothing) * of_the_true + smoothing * log_probabilities.mean(1)).mean())


def numerical_gradient(cosines: Array, labels: NDArray[np.int64], *arguments: object) -> Array:
    gradient = np.zeros_like(cosines)
    for index in np.ndindex(*cosines.shape):
        step = np.zeros_like(cosines)
        step[index] = 1e-6
        up, down = (reference(cosines + s, labels, *arguments) for s in (step, -step))  # type: ignore[arg-type]
        gradient[index] = (up - down) / 2e-6
    return gradient


def call(
    kind: str, cosines: torch.Tensor, labels: torch.Tensor, scale: float, margin: float, smoothing: float = 0.0
) -> torch.Tensor:
    loss = {"arcface": losses.arcface, "cosface": losses.cosface}[kind]
    return loss(cosines, labels, scale=scale, margin=margin, label_smoothing=smoothing)


@pytest.mark.parametrize(
    ("kind", "scale", "margin", "smoothing"),
    [
        ("arcface", 8.0, 0.35, 0.0),
        ("arcface", 64.0, 0.5, 0.0),
        ("arcface", 8.0, 0.0, 0.0),
        ("arcface", 8.0, 0.35, 0.1),
        ("cosface", 8.0, 0.3, 0.0),
        ("cosface", 64.0, 0.4, 0.0),
        ("cosface", 8.0, 0.3, 0.1),
    ],
)
def test_values_and_gradients(kind: str, scale: float, margin: float, smoothing: float) -> None:
    random = np.random.default_rng(0)
    exact = random.uniform(-0.98, 0.98, (12, 7))
    labels = random.integers(0, 7, 12)
    exact[0, labels[0]] = -0.97  # beyond pi - margin, where the continuation holds
    cosines = torch.tensor(exact, dtype=torch.float32, requires_grad=True)
    loss = call(kind, cosines, torch.from_numpy(labels), scale, margin, smoothing)
    loss.backward()  # type: ignore[no-untyped-call]
    exact = cosines.detach().numpy().astype(np.float64)
    assert loss.item() == pytest.approx(reference(exact, labels, scale, margin, kind, smoothing), rel=2e-5, abs=1e-6)
    assert cosines.grad is not None
    expected = numerical_gradient(exact, labels, scale, margin, kind, smoothing)
    np.testing.assert_allclose(cosines.grad.numpy(), expected, rtol=2e-4, atol=2e-5)


def test_straight_through_has_the_gradient_of_the_logits_alone() -> None:
    random = torch.Generator().manual_seed(0)
    cosines = (torch.rand(12, 7, generator=random) * 1.9 - 0.95).requires_grad_()
    labels = torch.randint(0, 7, (12,), generator=random)
    loss = losses.arcface(cosines, labels, scale=8, margin=0.35, straight_through=True)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(losses.arcface(cosines, labels, scale=8, margin=0.35).item())
    # The tutorial's way: the margin is added in place, outside of what is differentiated.
    with torch.no_grad():
        margins = torch.zeros_like(cosines)
        target = cosines.gather(1, labels[:, None])
        margins.scatter_(1, labels[:, None], torch.cos(torch.acos(target) + 0.35) - target)
    other = cosines.detach().clone().requires_grad_()
    torch.nn.functional.cross_entropy(8 * (other + margins), labels).backward()  # type: ignore[no-untyped-call]
    inside = target[:, 0] > -math.cos(0.35)  # beyond, the tutorial's target rises again and ours does not
    assert cosines.grad is not None
    assert other.grad is not None
    torch.testing.assert_close(cosines.grad[inside], other.grad[inside])


@pytest.mark.parametrize("kind", ["arcface", "cosface"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [8.0, 64.0])
@pytest.mark.parametrize("value", [1.0, -1.0, 1.0 + 1e-6, -1.0 - 1e-6, 0.0])
def test_finite_at_the_ends(kind: str, dtype: torch.dtype, scale: float, value: float) -> None:
    cosines = torch.full((4, 10), 0.1)
    labels = torch.arange(4)
    cosines[labels, labels] = value
    cosines = cosines.to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = call(kind, cosines, labels, scale, 0.35)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, call(kind, cosines.float(), labels, scale, 0.35)), "nothing is rounded on the way"
    loss.backward()  # type: ignore[no-untyped-call]
    assert torch.isfinite(loss)
    assert cosines.grad is not None
    assert torch.isfinite(cosines.grad).all()


@pytest.mark.parametrize(("value", "straight_through"), [(1.0, True), (-1.0, True), (-1.0, False)])
def test_at_the_ends_the_target_still_has_its_gradient(value: float, *, straight_through: bool) -> None:
    """Its slope is 1 there, so that the gradient is cross-entropy's: the probabilities less the truth, scaled."""
    labels = torch.arange(4)
    cosines = torch.full((4, 10), 0.1)
    cosines[labels, labels] = value
    cosines.requires_grad_()
    loss = losses.arcface(cosines, labels, scale=8, margin=0.35, straight_through=straight_through)
    loss.backward()  # type: ignore[no-untyped-call]
    logits = cosines.detach().clone()
    logits[labels, labels] = math.cos(0.35) if value > 0 else -1 - 0.35 * math.sin(0.35)
    expected = 8 * ((8 * logits).softmax(1) - torch.eye(4, 10)) / 4
    torch.testing.assert_close(cosines.grad, expected, rtol=2e-3, atol=0)


def test_the_target_falls_as_the_angle_grows() -> None:
    angles = torch.linspace(0.01, math.pi - 0.01, 400)
    values = [
        losses.arcface(torch.tensor([[math.cos(a), 0.0]]), torch.tensor([0]), scale=8, margin=0.35).item()
        for a in angles.tolist()
    ]
    assert all(a < b for a, b in itertools.pairwise(values))

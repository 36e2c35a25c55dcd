"""MixUp and CutMix: pixels, labels and losses against torchvision, weights and boxes against timm."""

import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm.data.mixup
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

from cifar100cli import losses, mixing
from cifar100cli.augment import none
from cifar100cli.datasets import Split
from cifar100cli.loader import Batch, DeviceLoader, Mixture, Preprocessing
from cifar100cli.mixing import Mixed
from cifar100cli.policies import create_policy
from cifar100cli.schema import Augment, Distillation, Loss
from cifar100cli.tasks import DistillationTask, create_task
from tests.conftest import distance_of_distributions, epoch_of

CPU = torch.device("cpu")
CLASSES = 7


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (60, 3, 24, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def labels() -> Tensor:
    return torch.randint(0, CLASSES, (60,), generator=torch.Generator().manual_seed(1))


def library(kind: Any, parameters: dict[str, Any], images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """torchvision's images and soft labels, with parameters of our own."""
    transform = kind(num_classes=CLASSES)
    given = {"labels": labels, "batch_size": len(labels), **parameters}
    return transform.transform(images, given), transform.transform(labels, given)


# ---------------------------------------------------------------------------------------------- pixels


@pytest.mark.parametrize("weight", [0.0, 0.1, 0.5, 0.731, 1.0])
def test_mixed_images_are_torchvisions_to_the_nearest_level(images: Tensor, labels: Tensor, weight: float) -> None:
    ours = mixing.mix(images, torch.full((60,), weight), torch.zeros(60, 1, 4, dtype=torch.int64))
    theirs, _ = library(v2.MixUp, {"lam": weight}, images.double(), labels)
    assert ours.dtype == torch.uint8
    assert (ours - theirs).abs().max() <= 0.5 + 1e-4


@pytest.mark.parametrize("box", [(3, 5, 20, 11), (0, 0, 40, 24), (38, 0, 40, 1), (7, 7, 7, 20)])
def test_cut_images_are_torchvisions(images: Tensor, labels: Tensor, box: tuple[int, int, int, int]) -> None:
    share = 1 - (box[2] - box[0]) * (box[3] - box[1]) / (24 * 40)
    ours = mixing.mix(images, torch.full((60,), share), torch.tensor(box).expand(60, 1, 4))
    theirs, _ = library(v2.CutMix, {"box": box, "lam_adjusted": share}, images, labels)
    assert torch.equal(ours, theirs)


def test_each_image_has_its_own_weight_and_kind(images: Tensor) -> None:
    policy = Mixed(none, 0.4, 1.0)
    drawn = policy.draw(epoch_of(60, 24, 40))
    assert len(drawn) == policy.draws == 3
    together = policy.apply(images, *drawn)
    others = images.roll(1, 0)
    kinds = set()
    for index, (weight, box) in enumerate(zip(drawn[1].tolist(), drawn[2][:, 0].tolist(), strict=True)):
        left, top, right, bottom = box
        if right > left and bottom > top:
            expected = images[index].clone()
            expected[:, top:bottom, left:right] = others[index, :, top:bottom, left:right]
            assert torch.equal(together[index], expected)
        else:
            expected = weight * images[index].double() + (1 - weight) * others[index].double()
            assert (together[index] - expected).abs().max() <= 0.5 + 1e-4
        kinds.add(right > left)
    assert kinds == {True, False}


def test_mixing_and_then_enlarging_and_normalising_is_as_good(images: Tensor) -> None:
    preprocessing = Preprocessing(48, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    weights = torch.linspace(0, 1, 60)
    mixed = mixing.mix(images, weights, torch.zeros(60, 1, 4, dtype=torch.int64))
    share = weights[:, None, None, None]
    after = share * preprocessing(images) + (1 - share) * preprocessing(images.roll(1, 0))
    assert (preprocessing(mixed) - after).abs().max() <= 0.5 / 255 / 0.2 + 1e-4  # half a level


# ---------------------------------------------------------------------------------------------- drawing


def drawn(mixup: float, cutmix: float, count: int = 4000) -> tuple[NDArray[Any], NDArray[Any]]:
    weights, boxes = mixing.draw_mixture(np.random.default_rng(0), count, 24, 40, mixup, cutmix)
    assert weights.dtype == np.float32
    assert boxes.shape == (count, 1, 4)
    return weights, boxes[:, 0]


LIMIT = 2.7 * math.sqrt(2 / 4000)  # exceeded once in a million times if the distributions are the same


@pytest.mark.parametrize("alpha", [0.1, 1.0, 4.0])
def test_weights_follow_the_beta_distribution(alpha: float) -> None:
    weights, boxes = drawn(alpha, 0)
    torch.manual_seed(0)
    exact = torch.tensor(alpha, dtype=torch.float64)
    theirs = torch.distributions.Beta(exact, exact).sample((4000,)).float().numpy()
    assert distance_of_distributions(weights, theirs) < LIMIT
    assert not boxes.any()


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_boxes_follow_timms(alpha: float) -> None:
    weights, boxes = drawn(0, alpha)
    bbox_and_weight: Any = timm.data.mixup.cutmix_bbox_and_lam
    random = np.random.default_rng(1)
    state = np.random.get_state()  # noqa: NPY002 - what timm draws from
    np.random.seed(0)  # noqa: NPY002
    theirs = [bbox_and_weight((3, 24, 40), random.beta(alpha, alpha)) for _ in range(4000)]
    np.random.set_state(state)  # noqa: NPY002
    columns = np.array([[left, top, right, bottom, weight] for (top, bottom, left, right), weight in theirs])
    for index in range(4):
        assert distance_of_distributions(boxes[:, index].astype(np.float64), columns[:, index]) < LIMIT
    assert distance_of_distributions(weights.astype(np.float64), columns[:, 4]) < LIMIT


def test_a_box_has_the_sides_that_its_share_of_the_area_says() -> None:
    """To the pixel: timm, whose boxes ours resemble closely, makes odd sides a pixel shorter."""
    sides = np.arange(24)
    left = 1 - ((sides + 0.5) / 24) ** 2  # of the image to itself
    drawing: Any = SimpleNamespace(random=np.zeros, beta=lambda *_: left, integers=lambda *_: np.array([[20, 12]] * 24))
    _, boxes = mixing.draw_mixture(drawing, 24, 24, 40, 0, 1.0)
    assert (boxes[:, 0, 3] - boxes[:, 0, 1]).tolist() == sides.tolist()
    assert (boxes[:, 0, 2] - boxes[:, 0, 0]).tolist() == [(2 * side + 1) * 40 // 48 for side in range(24)]


def test_a_cut_images_weight_is_what_is_left_of_it() -> None:
    weights, boxes = drawn(0, 1.0)
    white = torch.zeros(2, 1, 24, 40, dtype=torch.uint8)
    white[1] = 255
    for weight, box in zip(weights[:200].tolist(), boxes[:200], strict=True):
        cut = mixing.mix(white, torch.tensor([weight] * 2), torch.from_numpy(box).expand(2, 1, 4))
        assert (cut[1] == 255).float().mean().item() == pytest.approx(weight, abs=1e-6)


def test_with_both_half_of_the_images_are_cut() -> None:
    weights, boxes = drawn(0.8, 1.0)
    cut = boxes.any(1)
    assert abs(cut.mean() - 0.5) < 0.06  # boxes of no area are not seen here
    for kind, (mixup, cutmix) in ((cut, (0, 1.0)), (~cut, (0.8, 0))):
        alone, alone_boxes = drawn(mixup, cutmix)
        alone = alone[alone_boxes.any(1)] if cutmix else alone
        limit = 2.7 * math.sqrt(1 / kind.sum() + 1 / len(alone))
        assert distance_of_distributions(weights[kind].astype(np.float64), alone.astype(np.float64)) < limit


@pytest.mark.parametrize("alpha", [1e-6, 100.0])
def test_weights_are_weights_at_any_alpha(alpha: float) -> None:
    for pair in ((alpha, 0), (0, alpha), (alpha, alpha)):
        weights, boxes = drawn(*pair)
        assert np.isfinite(weights).all()
        assert 0 <= weights.min() <= weights.max() <= 1
        assert (boxes[:, :2] <= boxes[:, 2:]).all()
        assert (boxes >= 0).all()
        assert (boxes <= [40, 24, 40, 24]).all()


# ------------------------------------------------------------------------------------------- in training


def test_a_batch_says_what_it_was_mixed_from(images: Tensor, labels: Tensor) -> None:
    split = Split(images.numpy(), labels.numpy())
    for policy in ("none", "flip", "crop_flip"):
        settings = Augment.model_validate({"policy": policy, "mixup": 0.5, "cutmix": 1})
        mixed = create_policy(settings, (0, 0, 0))
        assert isinstance(mixed, Mixed)
        loader, plain = (
            DeviceLoader(split, 25, CPU, Preprocessing(32), shuffle=True, policy=one, seed=3)
            for one in (mixed, mixed.policy)
        )
        for batch, before in zip(loader.epoch(2), plain.epoch(2), strict=True):
            assert batch.images is not None
            assert before.images is not None
            assert batch.mixture is not None
            assert (before.mixture, batch.views) == (None, None)
            assert torch.equal(batch.labels, before.labels)
            assert torch.equal(batch.mixture.labels, before.labels.roll(1))
            assert len(set(batch.mixture.weights.tolist())) > 5
            for index, weight in enumerate(batch.mixture.weights.tolist()):
                own, other = before.images[index].double(), before.images[index - 1].double()
                blend = (batch.images[index] - (weight * own + (1 - weight) * other)).abs().max() <= 0.5 + 1e-4
                cut = ((batch.images[index] == own) | (batch.images[index] == other)).all()
                assert blend or cut
                leading = batch.labels[index] if weight >= 0.5 else batch.labels[index - 1]
                assert batch.leading_labels[index] == leading
            assert torch.equal(batch.inputs, Preprocessing(32)(batch.images))


class Cosines(nn.Module):
    """Gives what it is given."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs


def batch_of(logits: Tensor, labels: Tensor, weights: Tensor | None) -> Batch:
    mixture = None if weights is None else Mixture(labels.roll(1), weights)
    return Batch(logits, labels, logits, torch.arange(len(labels)), None, mixture)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_cross_entropy_is_that_of_torchvisions_soft_labels(labels: Tensor, smoothing: float, weight: float) -> None:
    logits = torch.randn(60, CLASSES, generator=torch.Generator().manual_seed(0), requires_grad=True)
    other = logits.detach().clone().requires_grad_()
    _, soft = library(v2.MixUp, {"lam": weight}, torch.zeros(60, 3, 4, 4), labels)
    expected = F.cross_entropy(other, soft, label_smoothing=smoothing)
    task = create_task(Loss(label_smoothing=smoothing))
    loss = task(Cosines(), batch_of(logits, labels, torch.full((60,), weight))).loss
    torch.testing.assert_close(loss, expected)
    for value in (loss, expected):
        value.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(logits.grad, other.grad)


@pytest.mark.parametrize("name", ["cross_entropy", "arcface", "cosface"])
def test_losses_are_mixed_image_by_image(labels: Tensor, name: str) -> None:
    """With a weight for each image, against the loss of every image alone."""
    cosines = torch.rand(60, CLASSES, generator=torch.Generator().manual_seed(0)) * 1.8 - 0.9
    weights = torch.rand(60, generator=torch.Generator().manual_seed(1))
    task = create_task(Loss(name=name, scale=8.0, margin=0.3, label_smoothing=0.1))

    def alone(index: int, labels: Tensor) -> float:
        one = slice(index, index + 1)
        return task(Cosines(), batch_of(8 * cosines[one], labels[one], None)).loss.item()

    expected = [
        weight * alone(index, labels) + (1 - weight) * alone(index, labels.roll(1))
        for index, weight in enumerate(weights.tolist())
    ]
    found = task(Cosines(), batch_of(8 * cosines, labels, weights)).loss.item()
    assert found == pytest.approx(np.mean(expected), rel=1e-5)
    whole = task(Cosines(), batch_of(8 * cosines, labels, torch.ones(60))).loss.item()
    assert whole == pytest.approx(task(Cosines(), batch_of(8 * cosines, labels, None)).loss.item(), rel=1e-6)


@pytest.mark.parametrize("form", ["plain", "decoupled"])
def test_distillation_of_mixed_images(images: Tensor, labels: Tensor, form: Any) -> None:
    """The teacher is asked about the mixed images; the decoupled form parts its term by both labels."""
    random = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(60, CLASSES, generator=random) for _ in range(2))
    weights = torch.rand(60, generator=random)
    batch = Batch(ours, labels, images, torch.arange(60), None, Mixture(labels.roll(1), weights))
    config = Distillation(form=form, alpha=0.5, temperature=2.0)

    def teacher(seen: Batch) -> Tensor:
        assert seen.images is images
        return theirs

    found = DistillationTask(create_task(Loss()), teacher, config)(Cosines(), batch).loss.item()
    hard = create_task(Loss())(Cosines(), batch).loss.item()
    if form == "plain":
        soft = losses.distillation(ours, theirs, 2.0).item()
    else:
        parted = partial(
            losses.decoupled_distillation, temperature=2.0, target_weight=1.0, nontarget_weight=8.0, reduction="mean"
        )
        both = [
            weight * parted(ours[i : i + 1], theirs[i : i + 1], labels[i : i + 1]).item()
            + (1 - weight) * parted(ours[i : i + 1], theirs[i : i + 1], labels.roll(1)[i : i + 1]).item()
            for i, weight in enumerate(weights.tolist())
        ]
        soft = float(np.mean(both))
    assert found == pytest.approx(0.5 * hard + 0.5 * soft, rel=1e-5)

"""One of five transforms, held to albumentations: how often, with which parameters, and pixel by pixel."""

import importlib
import importlib.metadata
import itertools
import math
import os
import runpy
import sys
from collections import Counter
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from cifar100cli import albumentations_backend, augment, one_of, synthetic
from cifar100cli.albumentations_backend import AlbumentationsOneOf
from cifar100cli.errors import UsageError
from tests.conftest import distance_of_distributions, epoch_of, varied

Array = NDArray[np.float64]
SHAPES = [(32, 32), (24, 40)]
DRAWS = 3000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def reference() -> AlbumentationsOneOf:
    return AlbumentationsOneOf()


@pytest.fixture(scope="module")
def library(reference: AlbumentationsOneOf) -> list[Any]:
    """The library's five transforms in their order, freshly seeded."""
    reference.choice.set_random_seed(0)
    transforms: list[Any] = reference.choice.transforms
    return transforms


@pytest.fixture(scope="module")
def images(few_drawings: synthetic.Drawn) -> Tensor:
    """(400, 3, 32, 32): pictures with edges and texture, and a quarter of them noise."""
    pictures = torch.from_numpy(few_drawings.train[0]).clone()
    pictures[300:] = torch.randint(0, 256, (100, 3, 32, 32), dtype=torch.uint8, generator=generator())
    return pictures


def picture(image: Tensor) -> NDArray[np.uint8]:
    """(3, H, W) as the library takes it, (H, W, 3)."""
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy())


def batch(pictures: list[NDArray[np.uint8]]) -> Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def difference(ours: Tensor, theirs: Tensor) -> Array:
    assert ours.dtype == theirs.dtype == torch.uint8
    assert ours.shape == theirs.shape
    off: Array = np.abs(ours.numpy().astype(np.float64) - theirs.numpy())
    return off


def within_five_deviations(count: int, draws: int, probability: float) -> bool:
    return abs(count - draws * probability) < 5 * math.sqrt(draws * probability * (1 - probability))


# How often each is drawn.


def identified(before: Tensor, after: Tensor) -> list[int]:
    """Which transform was applied to each image; these have no blue, and no pixel without red and green."""
    same = (before == after).all(1)
    black = (after == 0).all(1)
    is_left_right = (after == before.flip(-1)).flatten(1).all(1)
    is_top_bottom = (after == before.flip(-2)).flatten(1).all(1)
    has_holes = (same | black).flatten(1).all(1)
    has_blue = (after[:, 2] > 0).flatten(1).any(1)
    kinds = torch.zeros(len(before), dtype=torch.int64)
    for kind, where in ((2, has_blue), (1, has_holes), (4, is_top_bottom), (3, is_left_right)):
        kinds[where] = kind
    return torch.bincount(kinds, minlength=5).tolist()


@pytest.mark.parametrize("backend", ["batched", "albumentations"])
def test_each_transform_is_applied_to_a_fifth(backend: str, reference: AlbumentationsOneOf) -> None:
    before = torch.randint(1, 256, (DRAWS, 3, 32, 32), dtype=torch.uint8, generator=generator())
    before[:, 2] = 0
    policy = one_of.one_of if backend == "batched" else reference
    counts = identified(before, varied(policy, before, generator(1)))
    assert all(within_five_deviations(count, DRAWS, 1 / 5) for count in counts), counts


def test_each_transform_is_drawn_equally_often() -> None:
    chosen, *_ = one_of.draw(epoch_of(20_000))
    counts = torch.bincount(chosen).tolist()
    assert len(counts) == len(one_of.TRANSFORMS) == 5
    assert all(within_five_deviations(count, 20_000, 1 / 5) for count in counts), counts


# With which parameters.


def library_shift_scale_rotate(transform: Any, height: int, width: int) -> tuple[Array, Array]:
    """What the library draws, (shift x, shift y, scale x, scale y, angle), and its matrix (3, 3)."""
    drawn = transform.get_params_dependent_on_data({"shape": (height, width, 3)}, {})
    middle = np.array([(width - 1) / 2, (height - 1) / 2, 1])
    shift = np.rint(drawn["matrix"] @ middle - middle)[:2]
    return np.array([*shift, drawn["scale"]["x"], drawn["scale"]["y"], drawn["rotate"]]), drawn["matrix"]


def library_holes(transform: Any, height: int, width: int) -> NDArray[np.int64]:
    """(2, 4), the second box empty where the library cuts one hole."""
    holes = transform.get_params_dependent_on_data({"shape": (height, width, 3)}, {})["holes"]
    return np.concatenate([holes, np.zeros((2 - len(holes), 4), np.int64)])


def assert_same_distribution(ours: Array, theirs: Array, least: list[float], most: list[float]) -> None:
    """Columns, one for each parameter: as many draws on both sides, and the limits that both keep and come near."""
    assert ours.shape == theirs.shape
    limit = 2.7 * math.sqrt(2 / len(ours))  # exceeded once in a million times if the distributions are the same
    for column, (low, high) in enumerate(zip(least, most, strict=True)):
        near = 0.01 * (high - low)
        for drawn in (ours[:, column], theirs[:, column]):
            assert low - 1e-6 <= drawn.min() <= low + near, column
            assert high - near <= drawn.max() <= high + 1e-6, column
        assert distance_of_distributions(ours[:, column], theirs[:, column]) < limit, column


def assert_unrelated(columns: Array) -> None:
    correlations = np.corrcoef(columns, rowvar=False) - np.eye(columns.shape[1])
    assert np.abs(correlations).max() < 5 / math.sqrt(len(columns))


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_parameters_of_shift_scale_rotate(height: int, width: int, library: list[Any]) -> None:
    ours = torch.cat(
        [drawn.view(DRAWS, -1) for drawn in one_of.draw_shift_scale_rotate(epoch_of(DRAWS, height, width))], 1
    )
    theirs = np.stack([library_shift_scale_rotate(library[0], height, width)[0] for _ in range(DRAWS)])
    shift_x, shift_y = ({32: 1.0, 24: 1.0, 40: 2.0}[side] for side in (width, height))
    high = [shift_x, shift_y, 1.1, 1.1, 45.0]
    assert_same_distribution(ours.double().numpy(), theirs, [-shift_x, -shift_y, 0.9, 0.9, -45.0], high)
    assert_unrelated(ours.double().numpy())
    if width == 32:
        assert within_five_deviations(int((ours[:, 0] == 0).sum()), DRAWS, 1 / 2)


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_parameters_of_holes(height: int, width: int, library: list[Any]) -> None:
    ours = one_of.draw_holes(epoch_of(DRAWS, height, width))[0].double().numpy()
    theirs = np.stack([library_holes(library[1], height, width) for _ in range(DRAWS)]).astype(np.float64)
    sides = [boxes[..., 2:] - boxes[..., :2] for boxes in (ours, theirs)]
    single = [(size == 0).all(2)[:, 1] for size in sides]
    assert all(within_five_deviations(int(one.sum()), DRAWS, 1 / 2) for one in single)
    for hole in (0, 1):
        # The same number of holes of both: those that there are.
        present = [np.flatnonzero(size[:, hole].all(1))[: DRAWS // 3] for size in sides]
        columns = [
            np.concatenate([boxes[there, hole, :2], size[there, hole]], 1)
            for boxes, size, there in zip((ours, theirs), sides, present, strict=True)
        ]
        least = [int(0.1 * width), int(0.1 * height)]
        # A side of exactly 0.2 is never drawn: at 40 pixels the largest hole is 7 across.
        most = [math.ceil(0.2 * width) - 1, math.ceil(0.2 * height) - 1]
        corner = [width - least[0], height - least[1]]
        assert_same_distribution(columns[0], columns[1], [0, 0, *least], [*corner, *most])
    first = ours[:, 0]
    assert_unrelated(np.concatenate([sides[0][:, 0], first[:, :2] / (np.array([width, height]) - sides[0][:, 0])], 1))


def test_parameters_of_jitter(library: list[Any]) -> None:
    *ours, orders = one_of.draw_jitter(epoch_of(DRAWS))
    drawn = [library[2].get_params() for _ in range(DRAWS)]
    theirs = np.array([[one[name] for name in ("brightness", "contrast", "saturation", "hue")] for one in drawn])
    columns = torch.stack(ours, 1).double().numpy()
    assert_same_distribution(columns, theirs, [0.8, 0.8, 0.8, -0.5], [1.2, 1.2, 1.2, 0.5])
    assert_unrelated(np.column_stack([columns, orders[:, 0]]))
    for some in (orders.tolist(), [one["order"] for one in drawn]):
        counts = Counter(map(tuple, some))
        assert set(counts) == set(itertools.permutations(range(4)))
        assert all(within_five_deviations(count, DRAWS, 1 / 24) for count in counts.values())


# Pixel by pixel.


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_shift_scale_rotate_is_the_librarys(height: int, width: int, images: Tensor, library: list[Any]) -> None:
    images = images[:, :, :height, :].repeat(1, 1, 1, 2)[..., :width]
    drawn = [library_shift_scale_rotate(library[0], height, width) for _ in images]
    columns = torch.from_numpy(np.stack([one for one, _ in drawn])).float()
    parameters = (columns[:, :2], columns[:, 2:4], columns[:, 4])
    inverses = np.linalg.inv(np.stack([matrix for _, matrix in drawn]))[:, :2]
    np.testing.assert_allclose(one_of.inverse_matrices(*parameters, height, width), inverses, atol=1e-5)
    theirs = batch(
        [
            library[0].apply(picture(image), matrix=matrix, output_shape=(height, width))
            for image, (_, matrix) in zip(images, drawn, strict=True)
        ]
    )
    for ours in (
        one_of.shift_scale_rotate(images, *parameters),
        one_of.warp(images, torch.from_numpy(inverses).float()),
    ):
        off = difference(ours, theirs)
        if int(cv2.__version__.split(".")[0]) >= 5:
            assert off.max() <= 1
            assert off.mean() < 0.001
        else:  # coordinates in 1/32 pixel
            assert off.max() <= 8
            assert (off > 1).mean() < 0.06
            assert off.mean() < 0.4


def test_warp_without_a_change_is_exact(images: Tensor) -> None:
    for height, width in ((32, 32), (31, 27)):
        cut = images[:, :, :height, :width]
        none, one = torch.zeros(len(images), 2), torch.ones(len(images), 2)
        assert torch.equal(one_of.shift_scale_rotate(cut, none, one, none[:, 0]), cut)
        shifted = one_of.shift_scale_rotate(cut, none + torch.tensor([1.0, -1.0]), one, none[:, 0])
        assert torch.equal(shifted[:, :, :-1, 1:], cut[:, :, 1:, :-1])
        assert not shifted[:, :, -1].any()
        assert not shifted[..., 0].any()


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_holes_are_the_librarys(height: int, width: int, images: Tensor, library: list[Any]) -> None:
    images = images[:, :, :height, :].repeat(1, 1, 1, 2)[..., :width]
    boxes = np.stack([library_holes(library[1], height, width) for _ in images])
    theirs = batch(
        [library[1].apply(picture(image), holes=box, seed=0) for image, box in zip(images, boxes, strict=True)]
    )
    assert torch.equal(one_of.cut_holes(images, torch.from_numpy(boxes)), theirs)


def jittered(transform: Any, images: Tensor, steps: list[int] | None = None) -> tuple[Tensor, Tensor]:
    """Ours and the library's, with parameters that the library draws; those not in `steps` do nothing."""
    pictures, columns, orders = [], [], []
    for image in images:
        drawn = transform.get_params()
        if steps is not None:
            for step, name in enumerate(("brightness", "contrast", "saturation", "hue")):
                if step not in steps:
                    drawn[name] = 0.0 if step == one_of.HUE else 1.0
        pictures.append(transform.apply(picture(image), **drawn))
        columns.append([drawn[name] for name in ("brightness", "contrast", "saturation", "hue")])
        orders.append(drawn["order"])
    brightness, contrast, saturation, hue = torch.tensor(columns).unbind(1)
    return one_of.jitter(images, brightness, contrast, saturation, hue, torch.tensor(orders)), batch(pictures)


@pytest.mark.parametrize("step", [one_of.BRIGHTNESS, one_of.CONTRAST, one_of.SATURATION])
def test_blends_are_the_librarys(step: int, images: Tensor, library: list[Any]) -> None:
    off = difference(*jittered(library[2], images, [step]))
    assert off.max() <= 1
    assert (off > 0).mean() < 0.0005


def test_turned_hues_are_the_librarys(images: Tensor, library: list[Any]) -> None:
    off = difference(*jittered(library[2], images, [one_of.HUE]))
    assert off.max() <= 1
    assert (off > 0).mean() < 0.02


def test_jitter_is_the_librarys(images: Tensor, library: list[Any]) -> None:
    """All four steps: a level that the hue is off by can become several in later steps."""
    off = difference(*jittered(library[2], images))
    assert off.max() <= 8
    assert (off > 0).mean() < 0.02
    assert (off > 2).mean() < 0.0002


def test_jitter_that_does_nothing(images: Tensor) -> None:
    one, orders = torch.ones(len(images)), one_of.draw_jitter(epoch_of(len(images)))[-1]
    assert torch.equal(one_of.jitter(images, one, one, one, 0 * one, orders), images)


def test_mirror_images_are_the_librarys(images: Tensor, library: list[Any]) -> None:
    for ours, transform in ((augment.mirrored, library[3]), (one_of.mirror_top_bottom, library[4])):
        assert torch.equal(ours(images), batch([transform.apply(picture(image)) for image in images]))


# The whole.


def both_ways(images: Tensor, chosen: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
    """In parts, and all at once."""
    drawn = augment.drawn_by(one_of.TRANSFORMS, parameters)
    in_parts, to_all = (
        way(one_of.TRANSFORMS, images, chosen, drawn) for way in (augment.apply_in_parts, augment.apply_to_all)
    )
    return in_parts, to_all


@pytest.fixture(params=["batched", "albumentations"])
def policy(request: pytest.FixtureRequest, reference: AlbumentationsOneOf) -> Any:
    return one_of.one_of if request.param == "batched" else reference


def test_follows_the_images_and_the_generator_alone(policy: Any, images: Tensor) -> None:
    before = images.clone()
    once = varied(policy, images, generator(1))
    other = varied(policy, images.flip(0), generator(2))
    assert torch.equal(varied(policy, images, generator(1)), once)
    assert torch.equal(images, before), "the images are not changed in place"
    assert (once.shape, once.dtype) == (images.shape, torch.uint8)
    assert not torch.equal(once, other.flip(0))
    going_on = generator(1)
    assert torch.equal(varied(policy, images, going_on), once)
    assert not torch.equal(varied(policy, images, going_on), once), "the generator moves on"


@pytest.mark.parametrize("shape", [(7, 3, 24, 40), (2, 3, 5, 4), (1, 3, 32, 32), (0, 3, 32, 32), (3, 3, 64, 64)])
def test_takes_any_size(shape: tuple[int, int, int, int], policy: Any) -> None:
    some = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator())
    changed = varied(policy, some, generator())
    assert (changed.shape, changed.dtype) == (some.shape, torch.uint8)
    count, _, height, width = shape
    drawn = one_of.draw(epoch_of(count, height, width))
    assert torch.equal(*both_ways(some, *drawn))


def test_takes_any_layout(policy: Any, images: Tensor) -> None:
    expected = varied(policy, images, generator())
    assert torch.equal(varied(policy, images.contiguous(memory_format=torch.channels_last), generator()), expected)
    turned = images.transpose(2, 3).contiguous().transpose(2, 3)
    assert not turned.is_contiguous()
    assert torch.equal(varied(policy, turned, generator()), expected)


def test_in_parts_and_all_at_once_are_the_same(images: Tensor) -> None:
    for seed in range(3):
        expected, at_once = both_ways(images, *one_of.draw(epoch_of(len(images), generator=generator(seed))))
        assert torch.equal(at_once, expected)
        assert torch.equal(varied(one_of.one_of, images, generator(seed)), expected)


# The library, or its absence.


def test_another_pipeline_gives_the_same(reference: AlbumentationsOneOf, images: Tensor) -> None:
    assert torch.equal(varied(AlbumentationsOneOf(), images, generator(1)), varied(reference, images, generator(1)))


def test_the_choice_says_nothing_about_the_parameters(reference: AlbumentationsOneOf) -> None:
    """With members that are seeded alike, a batch that starts with a hole would have one of 3 or 4 rows there."""
    white = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    heights = set()
    for seed in range(400):
        result = varied(reference, white, generator(seed))[0, 0]
        hole = result == 0
        rows, columns = int(hole.any(1).sum()), int(hole.any(0).sum())
        if (hole | (result == 255)).all() and hole.sum() == rows * columns > 0:
            heights.add(rows)
    assert heights == {3, 4, 5, 6}


def test_importing_leaves_the_library_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "albumentations", raising=False)
    for module in (albumentations_backend, one_of):
        assert module.__file__
        runpy.run_path(module.__file__)
        assert "albumentations" not in sys.modules


def test_no_library_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    def broken(name: str) -> ModuleType:
        assert os.environ["NO_ALBUMENTATIONS_UPDATE"] == "1", "the import would ask the network"
        raise ImportError("libGL.so.1: cannot open shared object file")

    monkeypatch.setenv("NO_ALBUMENTATIONS_UPDATE", "0")
    monkeypatch.delenv("NO_ALBUMENTATIONS_UPDATE")
    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "version", missing)
        assert_one_line_of_advice("is not installed")
        patch.setattr(importlib.metadata, "version", lambda _: "1.4.24")
        assert_one_line_of_advice("is 1.4.24, not 2.0.8")
    with monkeypatch.context() as patch:
        patch.setattr(importlib, "import_module", broken)
        assert_one_line_of_advice("libGL")


def assert_one_line_of_advice(reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        AlbumentationsOneOf()
    message = str(caught.value)
    assert reason in message
    assert "pip install albumentations==2.0.8" in message
    assert "augment.backend=batched" in message
    assert "\n" not in message

"""Batches: order, exact coverage, resizing as OpenCV's, normalising as torchvision's."""

import cv2
import numpy as np
import pytest
import timm.data
import torch
from torchvision.transforms.v2 import functional as reference

from cifar100cli import augment
from cifar100cli.datasets import Split
from cifar100cli.loader import DeviceLoader, Preprocessing, derived_seed, preprocessing_for
from cifar100cli.models import Colour
from cifar100cli.schema import Data
from tests.conftest import CROP_FLIP

CPU = torch.device("cpu")


def make_split(count: int) -> Split:
    random = np.random.default_rng(0)
    return Split(random.integers(0, 256, (count, 3, 32, 32), np.uint8), np.arange(count))


@pytest.mark.parametrize(
    ("count", "batch_size", "sizes"),
    [
        (10, 5, [5, 5]),
        (12, 5, [5, 5, 2]),
        (11, 5, [5, 6]),
        (3, 5, [3]),
        (1, 5, [1]),
        (2, 1, [2]),
        (6, 1, [1] * 4 + [2]),
    ],
)
def test_every_image_once_and_no_last_batch_of_one(count: int, batch_size: int, sizes: list[int]) -> None:
    loader = DeviceLoader(make_split(count), batch_size, CPU, Preprocessing(32), shuffle=True)
    for epoch in (1, 2):
        labels = [batch.labels for batch in loader.epoch(epoch)]
        assert [len(part) for part in labels] == loader.batch_sizes() == sizes
        assert sorted(torch.cat(labels).tolist()) == list(range(count))


def test_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        loader = DeviceLoader(make_split(50), 20, CPU, Preprocessing(32), shuffle=True, seed=seed)
        return torch.cat([batch.labels for batch in loader.epoch(epoch)]).tolist()

    assert order(1, 3) == order(1, 3)
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (1, 2)}) == 4
    assert order(1, 3) == np.random.default_rng([1, 3]).permutation(50).tolist(), "as runs that go on have begun"
    assert derived_seed(1, 3) == np.random.SeedSequence([1, 3]).generate_state(1, np.uint64)[0] // 2


def test_augmentation_can_be_had_again_without_the_epochs_before() -> None:
    def inputs(epochs: list[int]) -> torch.Tensor:
        loader = DeviceLoader(make_split(50), 20, CPU, Preprocessing(32), shuffle=True, policy=CROP_FLIP, seed=1)
        return [torch.cat([batch.inputs for batch in loader.epoch(epoch)]) for epoch in epochs][-1]

    assert torch.equal(inputs([1, 2, 3]), inputs([3]))
    assert not torch.equal(inputs([2]), inputs([3]))


def test_images_keep_their_labels() -> None:
    split = make_split(30)
    loader = DeviceLoader(split, 7, CPU, Preprocessing(32), shuffle=True)
    for batch in loader.epoch(1):
        expected = torch.from_numpy(split.images[batch.labels.numpy()]).float() / 255
        assert torch.equal(batch.inputs, expected)
        assert batch.inputs.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [16, 48, 64, 224])
def test_resizing_agrees_with_opencv_to_one_grey_level(size: int) -> None:
    images = make_split(8).images
    ours = Preprocessing(size)(torch.from_numpy(images)) * 255
    for image, resized in zip(images, ours, strict=True):
        theirs = cv2.resize(image.transpose(1, 2, 0), (size, size), interpolation=cv2.INTER_LINEAR)
        assert np.abs(resized.permute(1, 2, 0).numpy() - theirs).max() <= 1


def test_normalising_is_torchvisions() -> None:
    images = torch.from_numpy(make_split(8).images)
    for name in ("imagenet", "dataset", "backbone"):
        preprocessing = preprocessing_for(Data(normalize=name), make_split(8), "tf_efficientnet_lite0")
        theirs = reference.normalize(
            reference.to_dtype(images, torch.float32, scale=True), list(preprocessing.mean), list(preprocessing.std)
        )
        torch.testing.assert_close(preprocessing(images), theirs, rtol=0, atol=1e-6)


def test_mean_and_deviation_of_the_training_set() -> None:
    split = make_split(100)
    preprocessing = preprocessing_for(Data(normalize="dataset"), split, "resnet18")
    pixels = split.images.astype(np.float64) / 255
    np.testing.assert_allclose(preprocessing.mean, pixels.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(preprocessing.std, pixels.std((0, 2, 3)), rtol=1e-12)


def test_a_blank_channel_is_divided_by_no_zero() -> None:
    split = make_split(4)
    split.images[:, 1] = 7
    preprocessing = preprocessing_for(Data(normalize="dataset"), split, "resnet18")
    assert preprocessing.std[1] > 0
    assert torch.isfinite(preprocessing(torch.from_numpy(split.images))).all()


@pytest.mark.parametrize(("mean", "std"), [((0.0,) * 3, (0.5, 0.25, 0.2)), ((0.5, 0.4, 0.3), (1.0,) * 3)])
def test_a_mean_or_a_deviation_alone_is_normalised_by(mean: Colour, std: Colour) -> None:
    images = torch.from_numpy(make_split(4).images)
    theirs = reference.normalize(images.float() / 255, list(mean), list(std))
    torch.testing.assert_close(Preprocessing(32, mean, std)(images), theirs)


def test_no_normalising_divides_by_255_and_no_more() -> None:
    split = make_split(4)
    inputs = preprocessing_for(Data(), split, "resnet18")(torch.from_numpy(split.images))
    assert torch.equal(inputs, torch.from_numpy(split.images).float() / 255)


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0", "vit_base_patch16_clip_224"])
def test_the_backbones_own_mean_and_deviation_are_timms(name: str) -> None:
    theirs = timm.data.resolve_data_config(model=timm.create_model(name))  # type: ignore[attr-defined,no-untyped-call]
    preprocessing = preprocessing_for(Data(normalize="backbone"), make_split(2), name)
    assert (preprocessing.mean, preprocessing.std) == (theirs["mean"], theirs["std"])


def test_a_batch_says_what_it_was_made_of() -> None:
    split = make_split(50)
    loader = DeviceLoader(split, 20, CPU, Preprocessing(64), shuffle=True, policy=augment.flip)
    images = torch.from_numpy(split.images)
    for batch in loader.epoch(3):
        assert batch.views is not None
        assert set(batch.views.tolist()) == {0, 1}
        expected = images[batch.positions]
        expected = torch.where(batch.views[:, None, None, None] == 1, reference.horizontal_flip(expected), expected)
        assert batch.images is not None
        assert torch.equal(batch.images, expected)
        assert torch.equal(batch.inputs, Preprocessing(64)(expected))
        assert torch.equal(batch.labels, torch.from_numpy(split.labels)[batch.positions])

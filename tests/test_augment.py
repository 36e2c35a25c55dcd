"""Augmentation on whole batches, held to torchvision image by image."""

import pytest
import torch
from torchvision.transforms.v2 import functional as reference

from cifar100cli import augment
from tests.conftest import varied


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (400, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_flip_mirrors_about_half_and_changes_nothing_else(images: torch.Tensor) -> None:
    flipped = varied(augment.flip, images, generator())
    mirrored = 0
    for before, after in zip(images, flipped, strict=True):
        if not torch.equal(before, after):
            assert torch.equal(after, reference.horizontal_flip(before))
            mirrored += 1
    assert 150 < mirrored < 250  # five deviations of a fair coin


def test_crop_is_torchvisions_crop_of_the_padded_image(images: torch.Tensor) -> None:
    cropped = augment.crop(images, *augment.draw_offsets(len(images), 32, 32, generator()))
    padded = reference.pad(images, [4])
    corners = set()
    for before, after in zip(padded, cropped, strict=True):
        found = [
            (top, left)
            for top in range(9)
            for left in range(9)
            if torch.equal(after, reference.crop(before, top, left, 32, 32))
        ]
        assert len(found) == 1
        corners |= set(found)
    assert {top for top, _ in corners} == {left for _, left in corners} == set(range(9))


@pytest.mark.parametrize("name", [name for name in augment.POLICIES if name != "none"])
def test_policies_keep_shape_and_type_and_follow_the_generator(name: str, images: torch.Tensor) -> None:
    policy = augment.POLICIES[name]
    once, again, other = (varied(policy, images, generator(seed)) for seed in (1, 1, 2))
    assert (once.shape, once.dtype) == (images.shape, torch.uint8)
    assert torch.equal(once, again)
    assert not torch.equal(once, other)

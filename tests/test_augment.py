"""Augmentation on whole batches, held to torchvision image by image, and put together as a preset asks for it."""

import itertools
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as reference

from cifar100cli import augment
from cifar100cli.augment import Border, Epoch, Views
from cifar100cli.datasets import Split
from cifar100cli.loader import DeviceLoader, Preprocessing
from cifar100cli.policies import color_of, create_policy
from cifar100cli.schema import Augment
from tests.conftest import EVERYTHING, epoch_of, varied

CPU = torch.device("cpu")


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


def views(epoch: int, seed: int = 0, count: int = 1000, *, shuffle: bool = True) -> torch.Tensor:
    """The version of each image of a split, by its position."""
    split = Split(np.zeros((count, 3, 2, 2), np.uint8), np.zeros(count, np.int64))
    policy = create_policy(Augment(policy="flip", flip="alternating"), (0, 0, 0))
    plan = DeviceLoader(split, 100, CPU, Preprocessing(2), shuffle=shuffle, policy=policy, seed=seed).plan(epoch)
    found = torch.empty(count, dtype=torch.int64)
    found[plan.positions] = plan.drawn[0]
    return found


def test_alternating_flip_shows_both_sides_in_any_two_epochs() -> None:
    first = views(1)
    assert 420 < first.sum() < 580  # five deviations of a fair coin
    for epoch in range(1, 6):
        assert torch.equal(views(epoch) + views(epoch + 1), torch.ones(1000, dtype=torch.int64))
        assert torch.equal(views(epoch), (first + epoch - 1) % 2)


def test_alternating_flip_follows_seed_position_and_epoch_alone() -> None:
    assert torch.equal(views(3), views(3, shuffle=False))
    agree = (views(3, seed=0) == views(3, seed=1)).sum()
    assert 420 < agree < 580


def test_other_blocks_leave_the_geometry_as_it_is(images: torch.Tensor) -> None:
    """What a policy draws does not depend on what comes after it."""
    for policy in ("flip", "crop_flip", "one_of"):
        alone = create_policy(Augment(policy=policy), (0, 0, 0))
        more = create_policy(Augment.model_validate({"policy": policy, "auto": "randaugment", "mixup": 1}), (0, 0, 0))
        once, again = (one.draw(epoch_of(len(images))) for one in (alone, more))
        assert all(torch.equal(one, other) for one, other in zip(once, again, strict=False))
        assert len(again) == more.draws == alone.draws + 4


@pytest.mark.parametrize("padding", [1, 4, 16])
@pytest.mark.parametrize("border", get_args(Border))
def test_crop_is_torchvisions_crop_of_the_padded_image(images: torch.Tensor, padding: int, border: Border) -> None:
    (offsets,) = augment.draw_offsets(epoch_of(4000), padding)
    for column in offsets.T:
        counts = torch.bincount(column)
        expected = 4000 / (2 * padding + 1)
        assert len(counts) == 2 * padding + 1
        assert ((counts - expected).abs() < 5 * expected**0.5).all()
    cropped = augment.crop(images, offsets[: len(images)], padding, border)
    crop = v2.RandomCrop(32, padding=padding, padding_mode="constant" if border == "black" else border)
    for before, after, (top, left) in zip(images, cropped, offsets.tolist(), strict=False):
        theirs = {"needs_crop": True, "top": top, "left": left, "height": 32, "width": 32}
        theirs |= {"needs_pad": True, "padding": [padding] * 4}
        assert torch.equal(after, crop.transform(before, theirs))


def test_crops_without_mirror_images_and_mirror_images_without_crops(images: torch.Tensor) -> None:
    crops = create_policy(Augment(policy="crop_flip", flip="none"), (0, 0, 0))
    assert crops.draws == 1
    offsets = augment.draw_offsets(epoch_of(len(images)))[0]
    assert torch.equal(varied(crops, images, generator()), augment.crop(images, offsets))
    flips = create_policy(Augment(policy="crop_flip", crop_padding=0), (0, 0, 0))
    assert torch.equal(varied(flips, images, generator()), varied(augment.flip, images, generator()))


POLICIES: dict[str, dict[str, Any]] = {
    "flip": {"policy": "flip"},
    "crop_flip": {"policy": "crop_flip"},
    "one_of": {"policy": "one_of"},
    "randaugment": {"auto": "randaugment"},
    "trivialaugment": {"auto": "trivialaugment"},
    "cutout": {"cutout": 9},
    "erasing": {"erasing": 0.5},
    "mixup": {"mixup": 0.3},
    "cutmix": {"cutmix": 1.0},
    "everything": EVERYTHING,
}


@pytest.mark.parametrize("name", POLICIES)
def test_policies_keep_shape_and_type_and_follow_the_generator(name: str, images: torch.Tensor) -> None:
    policy = create_policy(Augment.model_validate(POLICIES[name]), (0.1, 0.2, 0.3))
    before = images.clone()
    once, again, other = (varied(policy, images, generator(seed)) for seed in (1, 1, 2))
    assert (once.shape, once.dtype) == (images.shape, torch.uint8)
    assert torch.equal(images, before), "the images are not changed in place"
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    assert all(len(drawn) == len(images) for drawn in policy.draw(epoch_of(len(images))))


@pytest.mark.parametrize("shape", [(7, 3, 24, 40), (2, 3, 5, 4), (1, 3, 32, 32), (3, 3, 1, 2), (3, 3, 64, 64)])
def test_takes_any_size(shape: tuple[int, int, int, int]) -> None:
    some = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator())
    for keys in POLICIES.values():
        settings = Augment.model_validate({**keys, "padding_mode": "black"} if "padding_mode" in keys else keys)
        policy = create_policy(settings, (0, 0, 0))
        changed = varied(policy, some, generator())
        assert (changed.shape, changed.dtype) == (some.shape, torch.uint8)
        other_layout = some.contiguous(memory_format=torch.channels_last)
        assert torch.equal(varied(policy, other_layout, generator()), changed)


def test_few_versions_are_told_from_many() -> None:
    """`Views` decides what is computed once; the configuration says the same, in words."""
    keys = {
        "policy": ("none", "flip", "crop_flip", "one_of"),
        "crop_padding": (4, 0),
        "auto": ("none", "randaugment", "trivialaugment"),
        **{name: (0, 1) for name, field in Augment.model_fields.items() if field.default == 0},
    }
    few = 0
    for values in itertools.product(*keys.values()):
        section = dict(zip(keys, values, strict=True))
        config = Augment.model_validate(section)
        bounded = isinstance(create_policy(config, (0, 0, 0)), Views)
        assert bounded == (not config.unbounded())
        few += bounded
    assert few == 5, "nothing and mirror images, whatever the padding, and crop_flip without padding"
    words = Augment.model_validate(EVERYTHING).unbounded()
    shapes = ("flip", "padding_mode")
    assert words == " and ".join(f"augment.{key} = {value}" for key, value in EVERYTHING.items() if key not in shapes)


def test_the_colour_is_the_one_that_normalising_makes_zero() -> None:
    assert color_of((0, 0, 0)) == (0, 0, 0)
    assert color_of((0.485, 0.456, 0.406)) == (124, 116, 104)


def test_all_an_epoch_is_drawn_from() -> None:
    """The lasting generator gives the same in every epoch, the others do not."""
    seen: list[tuple[int, int, int]] = []

    class Spy:
        draws = 0

        def draw(self, epoch: Epoch) -> tuple[()]:
            words = [int(torch.randint(2**40, (1,), generator=g)) for g in (epoch.generator, epoch.lasting)]
            seen.append((words[0], words[1], int(epoch.host.integers(2**40))))
            return ()

        def apply(self, images: torch.Tensor, *drawn: torch.Tensor) -> torch.Tensor:
            return images

    split = Split(np.zeros((10, 3, 2, 2), np.uint8), np.zeros(10, np.int64))
    for seed, epoch in ((0, 1), (0, 2), (0, 1), (1, 1)):
        DeviceLoader(split, 5, CPU, Preprocessing(2), shuffle=True, policy=Spy(), seed=seed).plan(epoch)
    assert seen[0] == seen[2]
    assert seen[0][1] == seen[1][1]
    assert not {one[0] for one in seen} & {one[1] for one in seen}, "no epoch's draws are those of all epochs"
    assert len({one[0] for one in seen}) == len({one[2] for one in seen}) == 3
    assert len({one[1] for one in seen}) == 2


class Copies(TorchFunctionMode):
    """Notes copies to a device, and makes none: there need not be such a device."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[str, bool, bool]] = []  # to where, from pinned memory, and whether nobody waits
        self.pinned = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.pin_memory:
            self.pinned = True
            return args[0]
        if func is torch.Tensor.to:
            self.noted.append((args[1].type, self.pinned, (kwargs or {}).get("non_blocking", False)))
            return args[0]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("device", "unwaited"), [("cuda", True), ("mps", False)])
def test_only_a_copy_from_pinned_memory_is_not_waited_for(device: str, unwaited: bool) -> None:
    """MPS reads other memory when it comes to it, which is nobody's any more: an epoch's order, say, would be noise."""
    with Copies() as copies:
        augment.on_device(np.arange(3), torch.device(device))
    assert copies.noted == [(device, unwaited, unwaited)]

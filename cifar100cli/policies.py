"""The policy that a preset's `augment` section asks for, put together from its parts."""

from collections.abc import Sequence

from cifar100cli.albumentations_backend import AlbumentationsOneOf
from cifar100cli.augment import Policy, alternating_flip, flip, in_turn, none, random_crop
from cifar100cli.auto_augment import rand_augment, trivial_augment
from cifar100cli.erasing import Color, cutout, random_erasing
from cifar100cli.mixing import Mixed
from cifar100cli.one_of import one_of
from cifar100cli.schema import Augment


def create_policy(config: Augment, mean: Sequence[float]) -> Policy:
    """Geometry, then drawn operations, then what covers parts of an image, then mixing.

    `mean` is the colour, from 0 to 1, that normalising makes zero: what is covered has it. Where an image has few
    versions this is a `Views`.
    """
    parts = _geometry(config)
    if config.auto == "randaugment":
        parts.append(rand_augment(config.randaugment_ops, config.randaugment_magnitude))
    elif config.auto == "trivialaugment":
        parts.append(trivial_augment())
    if config.cutout:
        parts.append(cutout(config.cutout, color_of(mean)))
    if config.erasing:
        parts.append(random_erasing(config.erasing, color_of(mean)))
    policy = in_turn(*parts) if len(parts) > 1 else parts[0] if parts else none
    return Mixed(policy, config.mixup, config.cutmix) if config.mixup or config.cutmix else policy


def _geometry(config: Augment) -> list[Policy]:
    if config.policy == "none":
        return []
    if config.policy == "one_of":
        return [AlbumentationsOneOf() if config.backend == "albumentations" else one_of]
    parts: list[Policy] = []
    if config.policy == "crop_flip" and config.crop_padding:
        parts.append(random_crop(config.crop_padding, config.padding_mode))
    if config.flip != "none":
        parts.append(alternating_flip if config.flip == "alternating" else flip)
    return parts


def color_of(mean: Sequence[float]) -> Color:
    """The level that is nearest to the mean of each channel."""
    red, green, blue = (round(255 * value) for value in mean)
    return red, green, blue

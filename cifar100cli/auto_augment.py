"""RandAugment and TrivialAugment for whole batches on their device: drawn operations, in drawn strengths.

Cubuk et al., "RandAugment", arXiv 1909.13719; Müller and Hutter, "TrivialAugment", arXiv 2103.10158. Operations,
strengths in 31 bins, nearest pixels and black outside are those of torchvision's `v2.RandAugment` and
`v2.TrivialAugmentWide` for uint8 tensors. Images are uint8 (N, 3, H, W), red first. For each image `ops` (N,) int64 has
an operation, and `magnitudes` (N,) float32 its strength, with the sign, as `strengths` explains.
"""

import functools

import torch
from torch import Tensor

from cifar100cli.augment import Drawn, Epoch, Transform, apply_chosen, constant, draw_nothing, unchanged

OPERATIONS = (
    *("identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness"),
    *("color", "contrast", "sharpness", "posterize", "solarize", "autocontrast", "equalize"),
)
IDENTITY, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y, ROTATE, BRIGHTNESS = range(7)
COLOR, CONTRAST, SHARPNESS, POSTERIZE, SOLARIZE, AUTOCONTRAST, EQUALIZE = range(7, 14)
BINS = 31  # of strengths


# ---------------------------------------------------------------------------------------------- drawing


def strengths(height: int, width: int, *, wide: bool) -> Tensor:
    """(operations, bins, 2) float32: the magnitude in each bin, and with the other sign where it has one.

    `wide` is TrivialAugment's space, else RandAugment's. Shears are slopes; translations are pixels, turns degrees;
    brightness, color, contrast and sharpness are what is added to a factor of 1; posterize keeps so many bits,
    and solarize inverts from that share of white on.
    """
    most = {
        SHEAR_X: 0.99 if wide else 0.3,
        SHEAR_Y: 0.99 if wide else 0.3,
        TRANSLATE_X: 32.0 if wide else 150 / 331 * width,
        TRANSLATE_Y: 32.0 if wide else 150 / 331 * height,
        ROTATE: 135.0 if wide else 30.0,
        **dict.fromkeys((BRIGHTNESS, COLOR, CONTRAST, SHARPNESS), 0.99 if wide else 0.9),
    }
    table = torch.zeros(len(OPERATIONS), BINS, 2)
    for operation, largest in most.items():
        table[operation] = torch.linspace(0, largest, BINS)[:, None] * torch.tensor([1, -1])
    table[POSTERIZE] = (8 - torch.arange(BINS) / ((BINS - 1) / (6 if wide else 4))).round()[:, None]
    table[SOLARIZE] = torch.linspace(1, 0, BINS)[:, None]
    return table


@functools.lru_cache(maxsize=8)
def _strengths(height: int, width: int, wide: bool, device: torch.device) -> Tensor:
    return strengths(height, width, wide=wide).to(device)


def draw(epoch: Epoch, *, count: int, magnitude: int | None, wide: bool) -> Drawn:
    """Operations (N, count) int64 and magnitudes (N, count) float32, from the bin `magnitude` or from any."""
    shape = (epoch.count, count)

    def below(limit: int) -> Tensor:
        return torch.randint(0, limit, shape, generator=epoch.generator, device=epoch.device)

    ops, signs = below(len(OPERATIONS)), below(2)
    bins = below(BINS) if magnitude is None else torch.full_like(ops, magnitude)
    return ops, _strengths(epoch.height, epoch.width, wide, epoch.device)[ops, bins, signs]


# ------------------------------------------------------------------------------------- colours, by tables


def look_up(images: Tensor, tables: Tensor) -> Tensor:
    """Every level replaced by what the image's and channel's table (N, 3, 256) uint8 has for it."""
    return tables.gather(2, images.flatten(2).long()).view(images.shape)


def change_levels(images: Tensor, ops: Tensor, magnitudes: Tensor) -> Tensor:
    """Brightness, contrast, posterize, solarize and autocontrast: a level becomes another, wherever it stands."""
    levels = torch.arange(256, dtype=torch.float32, device=images.device).expand(len(images), 3, 256)
    magnitude = magnitudes[:, None, None]
    brighter = levels * (1 + magnitude)
    contrasted = torch.addcmul(brighter, grey(images).mean((1, 2, 3))[:, None, None], -magnitude)
    lost = 8 - magnitude.int()  # bits; some number where the operation is another
    coarse = (levels.int() >> lost.clamp(0, 8) << lost.clamp(0, 8)).float()
    inverted = torch.where(levels >= 255 * magnitude, 255 - levels, levels)
    darkest, lightest = (extreme[:, :, None].float() for extreme in images.flatten(2).aminmax(dim=2))
    span = lightest - darkest
    stretched = torch.where(span > 0, (levels - darkest) / (span * (1 / 255)), levels)
    tables = levels
    for operation, table in (
        (BRIGHTNESS, brighter),
        (CONTRAST, contrasted),
        (POSTERIZE, coarse),
        (SOLARIZE, inverted),
        (AUTOCONTRAST, stretched),
    ):
        tables = torch.where((ops == operation)[:, None, None], table, tables)
    return look_up(images, tables.clamp(0, 255).to(torch.uint8))


def equalize(images: Tensor, ops: Tensor, magnitudes: Tensor) -> Tensor:
    """All levels equally often, as far as that goes, in each channel: Pillow's way, in whole numbers."""
    levels = images.flatten(2).long()
    counts = torch.zeros(len(images), 3, 256, dtype=torch.int32, device=images.device)
    counts.scatter_add_(2, levels, counts.new_ones(1).expand_as(levels))
    of_highest = counts.gather(2, levels.amax(2, keepdim=True))
    step = (levels.shape[2] - of_highest).div(255, rounding_mode="floor")
    below = counts.cumsum(2) - counts
    tables = (below + step // 2).div(step.clamp(min=1), rounding_mode="floor").clamp(0, 255)
    tables = torch.where(step > 0, tables, torch.arange(256, device=images.device))
    return look_up(images, tables.to(torch.uint8))


# ------------------------------------------------------------------------------------ colours, by blending


def grey(images: Tensor) -> Tensor:
    """(N, 1, H, W) float32 of whole levels."""
    red, green, blue = images[:, 0:1], images[:, 1:2], images[:, 2:3]
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_()


def change_color(images: Tensor, ops: Tensor, magnitudes: Tensor) -> Tensor:
    """The images blended with their grey ones, or away from these, cut to whole levels."""
    magnitude = magnitudes[:, None, None, None]
    return torch.addcmul(images * (1 + magnitude), grey(images), -magnitude).clamp_(0, 255).to(torch.uint8)


def sharpen(images: Tensor, ops: Tensor, magnitudes: Tensor) -> Tensor:
    """The images blended with blurred ones, or away from these; the outermost pixels stay as they are."""
    height, width = images.shape[-2:]
    if height <= 2 or width <= 2:
        return images
    pixels = images.float()
    middle = pixels[..., 1:-1, 1:-1]
    # Sums of whole numbers are exact in any order, which a convolution on a GPU, in reduced precision, is not.
    of_three = pixels[..., :-2] + pixels[..., 1:-1] + pixels[..., 2:]
    sums = of_three[..., :-2, :] + of_three[..., 1:-1, :] + of_three[..., 2:, :]
    blurred = sums.add_(middle, alpha=4).mul_(1 / 13).round_()
    changed = torch.addcmul(middle, blurred.sub_(middle), -magnitudes[:, None, None, None])
    middle.copy_(changed)
    return pixels.clamp_(0, 255).to(torch.uint8)


# ---------------------------------------------------------------------------------------------- geometry


def matrices(ops: Tensor, magnitudes: Tensor, height: int, width: int) -> Tensor:
    """(N, 2, 3) float32, which times (x, y, 1) in the result is (x, y) in the image, both counted from the middle.

    Shears leave the outer edges of the first row and column where they are.
    """

    def of(operation: int) -> Tensor:
        return torch.where(ops == operation, magnitudes, 0)

    shear_x, shear_y, turn = of(SHEAR_X), of(SHEAR_Y), torch.deg2rad(of(ROTATE))
    shift_x, shift_y = of(TRANSLATE_X).trunc(), of(TRANSLATE_Y).trunc()
    cosine, sine = turn.cos(), turn.sin()
    row_x = [cosine, shear_x - sine, shear_x * (height / 2) - shift_x]
    row_y = [shear_y + sine, cosine, shear_y * (width / 2) - shift_y]
    return torch.stack(row_x + row_y, 1).view(-1, 2, 3)


def read_nearest(images: Tensor, matrices: Tensor) -> Tensor:
    """The images read at `matrices` (N, 2, 3) times (x, y, 1), at the nearest pixel, black outside.

    Of two pixels that are as near, which one it is is decided by rounding errors; these are `grid_sample`'s, as far as
    the arithmetic is the same.
    """
    height, width = images.shape[-2:]
    size = constant((width, height), images.device)[:, None, None]
    columns = torch.arange(width, dtype=torch.float32, device=images.device) - (width - 1) / 2
    rows = (torch.arange(height, dtype=torch.float32, device=images.device) - (height - 1) / 2)[:, None]
    of_column, of_row, middle = (matrices[:, :, :, None, None] / (size[:, None] / 2)).unbind(2)
    grid = (of_column * columns).addcmul(of_row, rows) + middle  # (N, 2, H, W), from -1 to 1
    places = ((grid + 1) * (size / 2) - 0.5).round_()
    outside = ((places < 0) | (places >= size)).any(1, keepdim=True)
    x, y = places.clamp_(min=0).minimum(size - 1).unbind(1)
    index = (y * width + x).long().flatten(1)[:, None].expand(-1, 3, -1)
    return images.flatten(2).gather(2, index).view(images.shape).masked_fill_(outside, 0)


def move(images: Tensor, ops: Tensor, magnitudes: Tensor) -> Tensor:
    """Shears, translations and turns."""
    return read_nearest(images, matrices(ops, magnitudes, *images.shape[-2:]))


# ---------------------------------------------------------------------------------------------- the whole


def leave(images: Tensor, ops: Tensor, magnitudes: Tensor) -> Tensor:
    """The images as they are."""
    return unchanged(images)


# What is done together, and for each operation where it is done.
KINDS = tuple(
    Transform(2, draw_nothing, apply_kind)
    for apply_kind in (leave, move, change_levels, change_color, sharpen, equalize)
)
KIND_OF = (0, 1, 1, 1, 1, 1, 2, 3, 2, 4, 2, 2, 2, 5)


def operate(images: Tensor, ops: Tensor, magnitudes: Tensor) -> Tensor:
    """Each image changed by its one operation."""
    kinds = constant(KIND_OF, images.device, torch.int64)[ops]
    return apply_chosen(KINDS, images, kinds, [(ops, magnitudes)] * len(KINDS))


def apply(images: Tensor, ops: Tensor, magnitudes: Tensor) -> Tensor:
    """Each image changed by its operations (N, count), one after the other."""
    for op, magnitude in zip(ops.unbind(1), magnitudes.unbind(1), strict=True):
        images = operate(images, op, magnitude)
    return images


def rand_augment(count: int, magnitude: int) -> Transform:
    """`count` operations for each image, all in the bin `magnitude` from 0 to 30."""
    return Transform(2, functools.partial(draw, count=count, magnitude=magnitude, wide=False), apply)


def trivial_augment() -> Transform:
    """One operation for each image, in any strength."""
    return Transform(2, functools.partial(draw, count=1, magnitude=None, wide=True), apply)

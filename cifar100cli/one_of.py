"""One of five transforms for every image, drawn and applied for whole batches on their device.

In distribution this is albumentations 2.0.8's `OneOf([ShiftScaleRotate(), CoarseDropout(), ColorJitter(),
HorizontalFlip(), VerticalFlip()], p=1)` with every argument at its default; `albumentations_backend` is that
library itself. Images are uint8 (N, 3, H, W), red first. For each transform one function draws parameters,
(N, ...) each, and another applies given ones and draws nothing. On a GPU nothing makes the host wait, and all
shapes follow from that of the images.
"""

import itertools

import torch
from torch import Tensor

from cifar100cli.augment import (
    Drawn,
    Epoch,
    Transform,
    apply_chosen,
    constant,
    draw_nothing,
    drawn_by,
    inside,
    mirrored,
)

SHIFT_LIMIT, SCALE_LIMIT, ANGLE_LIMIT = 0.0625, 0.1, 45.0  # of the side; from 1; degrees
LEAST_SIDE, MOST_SIDE = 0.1, 0.2  # of a hole, in sides of the image
FACTOR_LIMIT, HUE_LIMIT = 0.2, 0.5  # from 1; of the circle of hues
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # the steps of the jitter, as its order names them


def draw_shift_scale_rotate(epoch: Epoch) -> tuple[Tensor, Tensor, Tensor]:
    """Shifts (N, 2) in whole pixels, scales (N, 2), both x before y, and angles (N,) in degrees; float32.

    The two directions are scaled independently. Shifts are cut to whole pixels towards 0: at 32 pixels half of
    them are 0, and the others 1 to either side.
    """
    uniform = torch.rand(epoch.count, 5, generator=epoch.generator, device=epoch.device) * 2 - 1
    limits = constant((SHIFT_LIMIT * epoch.width, SHIFT_LIMIT * epoch.height), epoch.device)
    return (uniform[:, :2] * limits).trunc_(), uniform[:, 2:4] * SCALE_LIMIT + 1, uniform[:, 4] * ANGLE_LIMIT


def shift_scale_rotate(images: Tensor, shifts: Tensor, scales: Tensor, angles: Tensor) -> Tensor:
    """Scale, then turn anticlockwise, both about the centre, then shift; what comes in from outside is black."""
    height, width = images.shape[-2:]
    return warp(images, inverse_matrices(shifts, scales, angles, height, width))


def inverse_matrices(shifts: Tensor, scales: Tensor, angles: Tensor, height: int, width: int) -> Tensor:
    """(N, 2, 3) float32, which times (x, y, 1) in the result is (x, y) in the image."""
    radians = torch.deg2rad(angles)
    cosines, sines = radians.cos(), radians.sin()
    turned_back = torch.stack([cosines, -sines, sines, cosines], 1).view(-1, 2, 2) / scales[:, :, None]
    middle = constant(((width - 1) / 2, (height - 1) / 2), angles.device)
    # The middle, shifted, comes from the middle. Products are summed here and in `warp` without the matrix
    # multiplication, which a GPU may be set to do in reduced precision.
    offset = middle - (turned_back * (middle + shifts)[:, None]).sum(2)
    return torch.cat([turned_back, offset[:, :, None]], 2)


def warp(images: Tensor, matrices: Tensor) -> Tensor:
    """The images read at `matrices` (N, 2, 3) times (x, y, 1), where the centres of pixels are whole numbers.

    Bilinear, rounded to the nearest level, black outside: `cv2.warpAffine` with INTER_LINEAR of OpenCV 5.
    OpenCV 4 first rounds the coordinates to 1/32 pixel, which moves one value in four, mostly by one level.
    """
    height, width = images.shape[-2:]
    columns = torch.arange(width, dtype=torch.float32, device=images.device)[:, None]
    rows = torch.arange(height, dtype=torch.float32, device=images.device)[:, None, None]
    of_column, of_row, offset = matrices[:, None, None].unbind(-1)
    points = offset.addcmul(of_column, columns).addcmul(of_row, rows)  # (N, H, W, 2)
    # grid_sample counts from -1 at the outer edge of the first pixel to 1 at that of the last.
    to_grid = constant((2 / width, 2 / height), images.device)
    edge = constant((1 / width - 1, 1 / height - 1), images.device)
    grid = torch.addcmul(edge, points, to_grid, out=points)
    warped = torch.nn.functional.grid_sample(
        images.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False
    )
    return warped.round_().to(torch.uint8)


def draw_holes(epoch: Epoch) -> tuple[Tensor]:
    """Boxes (N, 2, 4) int64, as `inside` takes them.

    One hole or two, equally often: half of the second boxes are empty.
    """
    uniform = torch.rand(epoch.count, 2, 5, generator=epoch.generator, device=epoch.device)
    size = constant((epoch.width, epoch.height), epoch.device)
    chances = constant((1.0, 0.5), epoch.device)[:, None]
    sides = (size * (uniform[:, :, :2] * (MOST_SIDE - LEAST_SIDE) + LEAST_SIDE)).floor_()
    sides = sides * (uniform[:, :, 4:] < chances)
    corners = (uniform[:, :, 2:4] * (size + 1 - sides)).floor_()
    return (torch.cat([corners, corners + sides], 2).long(),)


def cut_holes(images: Tensor, boxes: Tensor) -> Tensor:
    """The images, black inside of any of their boxes (N, boxes, 4), which are as `draw_holes` gives them."""
    return images.masked_fill(inside(boxes, *images.shape[-2:]), 0)


def draw_jitter(epoch: Epoch) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Factors of brightness, contrast and saturation, turns of the hue, (N,) each, and orders (N, 4) int64."""
    uniform = torch.rand(epoch.count, 8, generator=epoch.generator, device=epoch.device)
    brightness, contrast, saturation, hue = (uniform[:, :4] * 2 - 1).unbind(1)
    factors = [deviation * FACTOR_LIMIT + 1 for deviation in (brightness, contrast, saturation)]
    return factors[0], factors[1], factors[2], hue * HUE_LIMIT, uniform[:, 4:].argsort(1)


def jitter(
    images: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor, hue: Tensor, order: Tensor
) -> Tensor:
    """The four steps, of which order[n, 0] is image n's first, each to whole levels as the library's are.

    The hue has its turn at one of four places. It is the longest step, and so done once, for all images, amid
    three blends before and three after it: of these, an image takes the ones that are due.
    Values differ from the library's in one of a hundred, by one level, as hues are turned here in other
    arithmetic; where later steps enlarge that, one in 10,000 differs by more than 2.
    """
    none, one = torch.zeros_like(hue), torch.ones_like(hue)
    # For each step (brightness, contrast, saturation, and nothing instead of hue) what `_blend` takes.
    # The library cuts to whole levels after brightness and contrast; after saturation it rounds, which is to add
    # half a level and cut.
    table = torch.stack(
        [
            *(brightness, contrast, saturation, one),
            *(none, 1 - contrast, none, none),
            *(none, none, 1 - saturation, none),
            *(none, none, one / 2, none),
        ]
    ).view(4, 4, -1)
    turned = (order == HUE).cumsum(1)
    due = torch.cat([turned[:, :3] == 0, turned[:, 1:] == 1], 1)
    step = torch.where(due, torch.cat([order[:, :3], order[:, 1:]], 1), HUE).T
    blends = table.gather(1, step.expand(4, -1, -1))[..., None, None, None].unbind(1)

    pixels = images.float()
    for blend in blends[:3]:
        _blend(pixels, *blend)
    pixels = turn_hue(pixels, hue)
    for blend in blends[3:]:
        _blend(pixels, *blend)
    return pixels.to(torch.uint8)


def _blend(pixels: Tensor, factor: Tensor, of_mean: Tensor, of_grey: Tensor, more: Tensor) -> None:
    """Multiply float32 images of whole levels by `factor`, and add shares of their mean grey and each pixel's grey.

    The numbers, (N, 1, 1, 1), leave an image as it is where they are 1, 0, 0 and 0.
    """
    # OpenCV's weights in 15 bits: with them every sum here is exact in float32, in any order.
    red, green, blue = pixels.tensor_split(3, dim=1)
    grey = (red * (9798 / 2**15)).add_(green, alpha=19235 / 2**15).add_(blue, alpha=3735 / 2**15).round_()
    shares = torch.addcmul(more.addcmul(of_mean, grey.mean((2, 3), keepdim=True)), of_grey, grey, out=grey)
    # In place: on a CPU, half the time of a large new tensor is that of getting its memory.
    torch.addcmul(shares, pixels, factor, out=pixels).clamp_(0, 255).floor_()


def turn_hue(pixels: Tensor, turns: Tensor) -> Tensor:
    """Float32 images of whole levels, their hue turned by `turns` (N,) of the circle, from -1/2 to 1/2.

    This goes by way of OpenCV's hue, saturation and value in 8 bits, with 180 steps of hue, and the turn is cut
    to whole steps. It would change pixels with no turn, too; a turn of exactly 0 leaves the image alone.
    """
    value = pixels.amax(1, keepdim=True)
    span = value - pixels.amin(1, keepdim=True)
    red, green, blue = (pixels[:, channel : channel + 1] for channel in range(3))
    # Between a weight of 0 and one of 1, `lerp` is `where`, to the bit, and four times as fast on a CPU.
    sixths = (red - green).add_(span, alpha=4).lerp_((blue - red).add_(span, alpha=2), (value == green).float())
    sixths = sixths.lerp_(green - blue, (value == red).float())
    # OpenCV divides by multiplying with reciprocals in 12 bits; products with them are exact in float32.
    saturation = (span * _reciprocal(255, value)).add_(0.5).floor_()
    hue = (sixths * _reciprocal(30, span)).add_(0.5).floor_()
    # A channel is at its lowest in the third of the circle that is opposite to it, around the steps 90 for red,
    # 150 for green and 30 for blue, at its highest in its own third, and goes evenly in between.
    opposite = constant((90, 150, 30), pixels.device)[:, None, None]
    distance = hue + ((180 * turns).floor_()[:, None, None, None] - opposite)
    distance = distance.sub_((distance * (1 / 180)).round_(), alpha=180).abs_()
    lowered = distance.neg_().add_(60).clamp_(0, 30).mul_(saturation).div_(30 * 255)
    # OpenCV cuts here too. (In columns at the end that do not fill its vectors, it rounds.)
    turned = lowered.neg_().add_(1).mul_(value).floor_()
    return turned.lerp_(pixels, (turns[:, None, None, None] == 0).float())


def _reciprocal(numerator: int, denominator: Tensor) -> Tensor:
    """numerator / denominator to the nearest 2^-12; some number where the denominator is 0."""
    return (numerator * 2**12 / denominator.clamp(min=1)).round_().mul_(2**-12)


def mirror_top_bottom(images: Tensor) -> Tensor:
    """The images with top and bottom exchanged."""
    return images.flip(-2)


TRANSFORMS = (
    Transform(3, draw_shift_scale_rotate, shift_scale_rotate),
    Transform(1, draw_holes, cut_holes),
    Transform(5, draw_jitter, jitter),
    Transform(0, draw_nothing, mirrored),
    Transform(0, draw_nothing, mirror_top_bottom),
)


def draw(epoch: Epoch) -> Drawn:
    """Which of TRANSFORMS each image gets, (N,) int64, all equally likely, and every image's parameters for each."""
    chosen = torch.randint(0, len(TRANSFORMS), (epoch.count,), generator=epoch.generator, device=epoch.device)
    return chosen, *itertools.chain.from_iterable(transform.draw(epoch) for transform in TRANSFORMS)


def apply(images: Tensor, chosen: Tensor, *parameters: Tensor) -> Tensor:
    """Each image (N, 3, H, W) uint8 changed by the one of TRANSFORMS that was drawn for it."""
    return apply_chosen(TRANSFORMS, images, chosen, drawn_by(TRANSFORMS, parameters))


one_of = Transform(1 + sum(transform.draws for transform in TRANSFORMS), draw, apply)

"""A trained model for use: uint8 images in, logits or classes in words out."""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from itertools import chain
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image as Picture
from torch import Tensor, nn

from cifar100cli import devices, evaluation, images, metrics
from cifar100cli.catalog import SIDE
from cifar100cli.checkpoint import Checkpoint
from cifar100cli.errors import DataError, UsageError
from cifar100cli.folders import Where, expand
from cifar100cli.inference import evaluating
from cifar100cli.loader import Preprocessing, evaluation_batch_size

PICTURES = 64  # at a time: large ones are decoded one by one, and only small squares are kept


class ImagesToLogits(nn.Module):
    """A network with its preprocessing: (N, 3, 32, 32) uint8 in RGB to (N, classes) float32."""

    def __init__(self, model: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.model = model
        self.preprocessing = preprocessing

    @property
    def held(self) -> Tensor:
        """The first of its tensors: where that is and of which type, all of it is."""
        return next(chain(self.parameters(), self.buffers()))

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images, computed in the network's type."""
        logits: Tensor = self.model(self.preprocessing(images).to(self.held.dtype))
        return logits.float()


class Classifier(ImagesToLogits):
    """A trained model, in evaluation mode, on its device, in the precision that it was trained in.

    After `half()`, `double()` or the like it computes in that type.
    `model(images)` gives logits: resizing and normalisation are inside, and gradients flow as in any module.
    `model.predict(pictures)` says what is in pictures. `model.model` is the bare network.
    """

    def __init__(self, saved: Checkpoint, where: Where) -> None:
        network, device, _ = evaluation.ready(saved, where)
        super().__init__(network, saved.preprocessing)
        self.path, self.card = saved.path, saved.card
        self._config = saved.config
        # It holds nothing, and says where it is: copies that `DataParallel` makes have buffers, and no parameters.
        self.register_buffer("_place", torch.empty(0, device=device), persistent=False)
        self.eval()
        # What it keeps for its device is made now: `torch.jit.trace` would find two graphs, with it and without.
        self.preprocessing(torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8, device=self.device))

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the logits."""
        return self.card.classes

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.held.device

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 in RGB, on any device, to logits (N, classes) float32 on the model's device.

        The model has seen images of 32x32 pixels. Of others the middle square is made so small, as `predict` does it,
        one by one on the host. Raises `UsageError` for another type or shape.
        """
        if not isinstance(images, Tensor):
            raise UsageError(f"images are a tensor of uint8 (N, 3, H, W), and not of {type(images).__name__}")
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
            raise UsageError(f"images are uint8 (N, 3, H, W), and not {images.dtype} {tuple(images.shape)}")
        if images.shape[-2:] != (SIDE, SIDE):
            images = _small(images)
        device = self.device
        as_trained = devices.autocast(device, devices.precision_of(self._config, device))
        cast = as_trained if self.held.dtype == torch.float32 else nullcontext
        own = torch.autocast(device.type, enabled=False, cache_enabled=False)  # none of the caller's
        outer = own if torch.is_autocast_enabled(device.type) else nullcontext()
        logits = super().forward  # named out here: `torch.compile` fails at a `super` within contexts
        with nullcontext() if torch.compiler.is_compiling() else devices.exact_float32, outer, cast():
            return logits(images.to(device))

    def predict(self, pictures: Sequence[str | Path | Picture], top: int = 5) -> list[list[dict[str, Any]]]:
        """The `top` most likely classes of each picture: files, or pictures of Pillow's, of any size and kind.

        Each class is `{"class": its name, "probability": 0 to 1, "superclass": its name or None}`, the likeliest first.
        Raises `DataError` for a file that is missing, broken or no image, and for a model whose answers are not finite;
        `UsageError` for one name in place of a list, what is no picture, and a `top` that is no number from 1. The
        model answers in evaluation mode, whatever mode it is in.
        """
        if isinstance(pictures, str | Path | Picture) or not isinstance(pictures, Iterable):
            raise UsageError("pictures are a list: predict([picture])")
        if not isinstance(top, Integral) or top < 1:  # NumPy's are whole numbers, too
            raise UsageError(f"top = {top}: must be a whole number, at least 1")
        pixels = [_pixels(picture) for picture in pictures]
        return self.guesses(torch.from_numpy(np.stack(pixels)), int(top)) if pixels else []

    def guesses(self, images: Tensor, top: int) -> list[list[dict[str, Any]]]:
        """The `top` most likely classes of images as `forward` takes them, in `predict`'s form."""
        at_once = min(PICTURES, evaluation_batch_size(self.card.image_size, self.device))
        portions = devices.Portions(self.device, at_once)
        with evaluating(self), torch.inference_mode():
            found = list(portions.of(slice(0, len(images)), lambda rows: self(images[rows]).cpu()))
        logits = torch.cat([answers for _, answers in found])
        metrics.refuse_no_answer(logits, self.path, devices.precision_of(self._config, self.device))
        probabilities, order = logits.double().softmax(1).topk(min(top, len(self.classes)), dim=1)
        return [
            [self._guess(label, share) for label, share in zip(labels, shares, strict=True)]
            for labels, shares in zip(order.tolist(), probabilities.tolist(), strict=True)
        ]

    def _guess(self, label: int, probability: float) -> dict[str, Any]:
        card = self.card
        superclass = card.superclasses[card.superclass_of[label]] if card.superclass_of else None
        return {"class": card.classes[label], "probability": probability, "superclass": superclass}


def _small(pixels: Tensor) -> Tensor:
    """(N, 3, H, W) uint8 as (N, 3, 32, 32)."""
    from PIL import Image

    found = [images.small_square(Image.fromarray(one)) for one in pixels.permute(0, 2, 3, 1).cpu().numpy()]
    return torch.from_numpy(np.stack(found))


def _pixels(picture: str | Path | Picture) -> NDArray[np.uint8]:
    """(3, 32, 32) uint8."""
    if not isinstance(picture, str | Path | Picture):
        raise UsageError(
            f"pictures are files, or Pillow's, and not {type(picture).__name__}: Image.fromarray makes one of an array"
        )
    name = "a picture" if isinstance(picture, Picture) else str(picture)
    try:
        if isinstance(picture, Picture):
            return images.small_square(picture)
        return images.read_image(expand(Path(picture)))
    except DataError as error:
        raise DataError(f"{name}: {error}") from None

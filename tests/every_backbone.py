"""Every network that timm knows, built and shown an image: `python -m tests.every_backbone [PART OF]`, ten minutes.

Each is built with a linear head and with a cosine head, for images of the size that its weights were made for, and
parted into stages. But for the few in `CONCRETE`, the weights take no memory.
"""

import sys
import warnings
from contextlib import nullcontext
from fnmatch import fnmatchcase

import timm

from cifar100cli.errors import CifarError
from cifar100cli.models import classifiers, create_model
from cifar100cli.schema import Config
from cifar100cli.stages import LAST, freeze, learning_stages, stages_of
from cifar100cli.weights import WithoutMemory

CLASSES = 100
CONCRETE = ("csatv2*", "hgnetv2*", "pit_*", "vit_*_rope_mixed*")  # they mix in tensors that are no weights


def build(name: str) -> None:
    """Build it with both heads, and freeze all but its last stage. Raises `CifarError` for what is refused."""
    known = timm.get_pretrained_cfg(name)
    size = known.input_size[1] if known is not None else 32  # those of ours
    concrete = any(fnmatchcase(name, pattern) for pattern in CONCRETE)
    for head, loss in (("cosine", "arcface"), ("linear", "cross_entropy")):
        sections = {"model": {"backbone": name, "head": head}, "loss": {"name": loss}, "data": {"image_size": size}}
        with nullcontext() if concrete else WithoutMemory():
            model = create_model(Config.model_validate(sections), CLASSES)
    stages = stages_of(model, name, classifiers(model))
    freeze(model, stages, learning_stages(stages, LAST, name), adapt=False)


def main(part: int = 0, of: int = 1) -> None:
    """Tell each network that is refused, and why; anything but a refusal in words ends it."""
    names, refused = timm.list_models()[part::of], 0
    for name in names:
        try:
            build(name)
        except CifarError as error:
            refused += 1
            print(f"{name}: {error}")
    print(f"{len(names)} networks of timm {timm.__version__}: {len(names) - refused} built, {refused} refused")


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # timm's own
    main(*map(int, sys.argv[1:]))

"""What a frozen network makes of every image is computed once, and training goes on from there."""

from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from cifar100cli import devices, precomputed
from cifar100cli.errors import UsageError
from cifar100cli.learning import FrozenStages
from cifar100cli.loader import Features, evaluation_batch_size
from cifar100cli.schema import Config, Finetune
from cifar100cli.stages import Parted
from cifar100cli.trainer import Loaders
from cifar100cli.watcher import Watcher


def keep(
    config: Config,
    finetune: Finetune,
    model: nn.Module,
    frozen: FrozenStages,
    loaders: Loaders,
    precision: str,
    cache_dir: Path,
    watcher: Watcher,
    *,
    dry: bool,
) -> Parted | None:
    """Give the loaders what the frozen stages make of their images; returns the network, parted behind these.

    None where that is not wanted, not possible, or `dry`. Raises `UsageError` where it is demanded and not possible.
    """
    if finetune.cache == "off" or (finetune.cache == "auto" and not frozen.stages):
        return None
    parted = Parted(model, frozen.first.start)
    sample = loaders.train.preprocessing(loaders.train.images[:2])
    obstacle = _obstacle(config, finetune, parted, frozen, sample)
    if obstacle is not None:
        if finetune.cache == "on":
            raise UsageError(f"finetune.cache = on is not possible: {obstacle}; leave --cache out")
        watcher.say(f"the frozen part runs in every epoch, because {obstacle}")
        return None
    if dry:
        return None
    cast = devices.autocast(loaders.train.device, precision)
    if precision == "fp32":  # in others, a folded weight is rounded otherwise than the two that it is made of
        parted.fold(sample)

    def front(images: Tensor) -> Tensor:
        with cast():
            features = parted.front(loaders.train.preprocessing(images))
        return features.permute(0, 2, 3, 1) if features.ndim == 4 else features

    computed_in = front(loaders.train.images[:1]).dtype
    dtype = _dtype(finetune.cache_dtype, computed_in)
    about = {
        "what": "features",
        "model": config.model.model_dump(mode="json", exclude={"pretrained", "weights"}),  # what the weights do not say
        "start": frozen.first.start,
        "preprocessing": asdict(loaders.train.preprocessing),
        "precision": precision,
        "dtype": str(dtype),
    }
    weights = [(name, tensor) for name, tensor in model.state_dict().items() if frozen.hold(name)]
    for title, loader in {"training": loaders.train, **loaders.evaluation}.items():
        found = precomputed.table(
            f"features of the {title} images",
            front,
            loader,
            batch_size=evaluation_batch_size(config.data.image_size, loader.device),
            dtype=dtype,
            folder=cache_dir / precomputed.key(about, weights, loader),
            watcher=watcher,
        )
        loader.features = Features(found, loader.device, computed_in)
    parted.switch_front(on=False)
    return parted


def _obstacle(config: Config, finetune: Finetune, parted: Parted, frozen: FrozenStages, sample: Tensor) -> str | None:
    """Why features cannot be kept, in words, if they cannot."""
    if not frozen.stages:
        return "everything learns, and nothing is frozen"
    if (obstacle := config.obstacle_to_kept_features()) is not None:
        return obstacle
    if finetune.bn == "adapt" and any(stage.norms(parted.model) for stage in frozen.stages):
        return "the frozen stages' batch statistics move (--bn adapt)"
    if not parted.is_exact(sample):
        return f"{config.model.backbone} is no chain of stages that could be entered at {frozen.first.name}"
    return None


def _dtype(name: str, computed_in: torch.dtype) -> torch.dtype:
    """`auto` is what loses nothing or next to nothing: bfloat16 where the features come in it, else float16."""
    if name == "auto":
        return computed_in if computed_in == torch.bfloat16 else torch.float16
    found: torch.dtype = getattr(torch, name)
    return found

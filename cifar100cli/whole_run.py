"""What a preset's whole run comes to, from how many images a second are trained on and looked at."""

from statistics import fmean
from typing import NamedTuple

from cifar100cli.catalog import DATASETS, share_of
from cifar100cli.schema import Config


class FrozenPart(NamedTuple):
    """What is run once, before the first epoch: on how many versions of each training image, and images a second."""

    versions: int
    rate: float


class Rates(NamedTuple):
    """Images a second, as large as they get; the frozen part, if there is one; and the seconds of compiling steps."""

    training: float
    evaluation: float
    frozen: FrozenPart | None = None
    compiling: float = 0.0


def images_of(config: Config) -> tuple[int, int]:
    """How many images are trained on, and how many are held out: of each class as many."""
    about = DATASETS[config.data.dataset]
    of_a_class = about.training_images // about.classes
    held_out = share_of(of_a_class, config.data.val_fraction)
    return about.classes * share_of(of_a_class - held_out, config.data.fraction), about.classes * held_out


def full_run(config: Config, rates: Rates) -> dict[str, float]:
    """What the preset's whole run comes to, on all of its images.

    What is frozen was run already, and is not run again to look at images in an epoch; the result is the whole
    network's. Steps are compiled anew for each size of images, and for an epoch's last batch where it is a smaller one.
    """
    (images, held_out), tested = images_of(config), DATASETS[config.data.dataset].test_images
    looks = held_out + (tested if config.train.measures_test else 0)
    epochs = config.train.epochs
    work = fmean(config.work_in(epoch) for epoch in range(1, epochs + 1))
    sizes = {config.image_size_in(epoch) for epoch in range(1, epochs + 1)}
    shapes = len(sizes) * (2 if images > config.data.batch_size and images % config.data.batch_size else 1)
    look, before = 1 / rates.evaluation, 0.0
    if rates.frozen is not None:
        look = max(0.0, look - 1 / rates.frozen.rate)
        before = (rates.frozen.versions * images + looks) / rates.frozen.rate
    epoch = work * images / rates.training + looks * look
    return {
        "epochs": epochs,
        "training_images": images,
        "seconds_of_frozen_part": before,
        "seconds_per_epoch": epoch,
        "seconds": before + rates.compiling * shapes + epochs * epoch + (held_out + tested) / rates.evaluation,
    }

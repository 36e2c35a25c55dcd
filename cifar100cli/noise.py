"""How far chance alone may carry figures that come from a few seeds: deviations, intervals, differences."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev, variance

# The 97.5% quantiles of Student's t for 1 to 30 degrees of freedom.
STUDENT = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


NO_SPREAD = 1e-9  # less than any number of images makes; what is left of rounding


def quantile(freedom: float) -> float:
    """Student's t at 97.5%, for at least one degree of freedom; rounded down to a whole number of them, 30 at most."""
    return STUDENT[min(int(freedom + NO_SPREAD), len(STUDENT)) - 1]


def deviation(values: Sequence[float]) -> float | None:
    """The sample deviation, which a single value does not have."""
    return stdev(values) if len(values) > 1 else None


def of_one_more(values: Sequence[float]) -> float | None:
    """Half the 95% prediction interval of one more run: what a published figure, a single run, is held against.

    None for a single value, and where all are the same: of no width, it would call chance a certainty.
    """
    if len(values) < 2 or stdev(values) < NO_SPREAD:
        return None
    return quantile(len(values) - 1) * stdev(values) * math.sqrt(1 + 1 / len(values))


@dataclass(frozen=True)
class Difference:
    """One mean less another, in the unit of the values.

    `paired` says that seeds are compared with themselves. Then `deviation` is that of the differences within a
    seed, and `error`, the standard error of `mean`, is that divided by the root of their number. Else `error` is the
    root of the summed variances of the two means, with the degrees of freedom of Welch and Satterthwaite, and there is
    no `deviation`. `interval` is the 95% interval (Student's t) around `mean`. A single seed on either side has none of
    these; and where a few seeds happen to differ by the very same number of images there is no interval: an empty one
    would call chance a certainty.
    """

    mean: float
    paired: bool
    deviation: float | None
    error: float | None
    interval: tuple[float, float] | None

    @property
    def within_noise(self) -> bool | None:
        """Whether no difference at all is among what the interval holds."""
        return None if self.interval is None else self.interval[0] <= 0 <= self.interval[1]


def difference(minuend: Mapping[int, float], subtrahend: Mapping[int, float]) -> Difference:
    """The mean of one side less the mean of the other, from each side's values by their seeds.

    Where one side has some of the other's seeds and no more, as while they are still being run, these alone count.
    """
    paired = minuend.keys() <= subtrahend.keys() or subtrahend.keys() <= minuend.keys()
    if paired:
        minuend = {seed: top1 for seed, top1 in minuend.items() if seed in subtrahend}
        subtrahend = {seed: subtrahend[seed] for seed in minuend}
    mean = fmean(minuend.values()) - fmean(subtrahend.values())
    if min(len(minuend), len(subtrahend)) < 2:
        return Difference(mean, paired, None, None, None)
    if paired:
        spread = stdev([minuend[seed] - subtrahend[seed] for seed in minuend])
        error, freedom = spread / math.sqrt(len(minuend)), float(len(minuend) - 1)
    else:
        spread = None
        shares = [(variance(side.values()) / len(side), len(side) - 1) for side in (minuend, subtrahend)]
        total = sum(share for share, _ in shares)
        error = math.sqrt(total)
        freedom = total**2 / sum(share**2 / free for share, free in shares) if total else 1.0
    if error < NO_SPREAD:
        return Difference(mean, paired, spread, error, None)
    half = quantile(freedom) * error
    return Difference(mean, paired, spread, error, (mean - half, mean + half))

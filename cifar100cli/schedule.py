"""The learning rate as a pure function of the step."""

import math

from cifar100cli.schema import Schedule


def learning_rate(peak: float, schedule: Schedule, step: int, steps_per_epoch: int, epochs: int) -> float:
    """The rate of training step `step`, counted from 0 over the whole run.

    It rises linearly to `peak` over the warm-up. Then it is constant; or falls to `schedule.final` times the peak,
    along half a cosine (Loshchilov and Hutter, arXiv 1608.03983) or a line that would reach it one step after the
    last; or is multiplied by `schedule.gamma` after each of the epochs in `schedule.milestones`. One cycle (Smith,
    arXiv 1708.07120) has its own rise, and ends with the last step. All but the warm-up are PyTorch's schedulers.
    """
    total = epochs * steps_per_epoch
    if schedule.name == "one_cycle":
        return peak * _one_cycle(schedule, step, total)
    warmup = min(total, round(schedule.warmup_epochs * steps_per_epoch))
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule.name == "constant":
        return peak
    if schedule.name == "multi_step":
        return peak * schedule.gamma ** sum(step >= epoch * steps_per_epoch for epoch in schedule.milestones)
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    left = _half_cosine(done) if schedule.name == "cosine" else 1 - done
    return peak * (schedule.final + (1 - schedule.final) * left)


def _half_cosine(done: float) -> float:
    """From 1 to 0, level at both ends."""
    return 0.5 * (1 + math.cos(math.pi * done))


def _one_cycle(schedule: Schedule, step: int, total: int) -> float:
    """From 1 / div_factor up to 1, and down to 1 / div_factor / final_div_factor in the last step, along cosines."""
    first = 1 / schedule.div_factor
    last = first / schedule.final_div_factor
    top = schedule.pct_start * total - 1
    if step < top:
        return 1 + (first - 1) * _half_cosine(step / top)
    return last + (1 - last) * _half_cosine(min(1.0, (step - top) / (total - 1 - top)))

"""The learning rate of each step, and how a batch is cut into parts."""

import math

from gptfast.config import TrainConfig
from gptfast.errors import ConfigError


def is_constant(config: TrainConfig) -> bool:
    """Whether all steps have the learning rate `config.lr`."""
    return config.schedule == "constant" and not config.warmup_steps


def learning_rate(config: TrainConfig, step: int, total: int | None) -> float:
    """Computes the learning rate of a step.

    With W = warmup_steps, the first W steps have lr (step + 1) / (W + 1). What follows is, with x
    from 0 to 1 between the step W and the last one, or between the first and the last of the
    decaying steps of "wsd" (warm-up, stable, decay; Hu et al., MiniCPM, 2024):

        cosine        min_lr + (lr - min_lr) (1 + cos(pi x)) / 2   (Loshchilov and Hutter, 2017)
        linear, wsd   min_lr + (lr - min_lr) (1 - x)

    Args:
        config: The schedule.
        step: The number of the step, from 0 on.
        total: The number of steps of the run; None if it has no end, as in a user's own loop.

    Raises:
        ConfigError: The schedule has an end and the run has none.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return config.lr
    if total is None:
        raise ConfigError(f"schedule {config.schedule!r} needs the number of steps, got none")
    last, first = total - 1, config.warmup_steps
    if config.schedule == "wsd":
        decaying = math.ceil(total / 10) if config.decay_steps is None else config.decay_steps
        first = max(first, last - decaying)  # the last one of the stable steps
    x = min(1.0, max(0.0, (step - first) / max(1, last - first)))
    kept = (1.0 + math.cos(math.pi * x)) / 2 if config.schedule == "cosine" else 1.0 - x
    return config.min_lr + (config.lr - config.min_lr) * kept


def part_sizes(rows: int, parts: int) -> list[int]:
    """Cuts a batch of `rows` into parts as equal as possible, the larger ones first."""
    size, larger = divmod(rows, parts)
    return [size + 1] * larger + [size] * (parts - larger)

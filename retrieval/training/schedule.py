"""The learning rate of each step."""

import math
from typing import Literal

__all__ = ["Schedule", "learning_rate_at"]

Schedule = Literal["constant", "cosine", "linear"]


def learning_rate_at(step: int, steps: int, peak: float, schedule: Schedule, warmup_steps: int) -> float:
    """Rate of a step, counted from 0 of `steps` in all.

    It rises linearly to `peak`, which step `warmup_steps` is the first to have. Then it stays (constant) or falls,
    along half a cosine (Loshchilov, Hutter: "SGDR", ICLR 2017) or a line, to reach 0 just after the last step.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    if schedule == "cosine":
        return peak * (1 + math.cos(math.pi * done)) / 2
    return peak * (1 - done) if schedule == "linear" else peak

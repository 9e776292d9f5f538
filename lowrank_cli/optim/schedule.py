"""Learning-rate schedules as a factor of the peak.

The formulas are transformers' (a test compares them), written out: importing its schedules costs two seconds and tens
of megabytes in every run.
"""

from __future__ import annotations

import math
from collections.abc import Callable


def build(
    name: str, *, warmup_steps: int, total_steps: int, min_lr_ratio: float, num_cycles: int
) -> Callable[[int], float]:
    """The factor of the peak learning rate as a function of the update's number, counted from 1.

    The warm-up counts the update that is made, so that the first one is not wasted at a learning rate of zero; the
    decay counts those that have been made since, as transformers does, so that neither is the last one.

    Args:
        name: linear, cosine, cosine_restarts or constant.
        warmup_steps: updates of linear warm-up from 0.
        total_steps: updates of the run.
        min_lr_ratio: the floor, as a share of the peak.
        num_cycles: cosine_restarts only: cycles after the warm-up, each from the peak to the floor.
    """

    def after_warmup(step: int) -> float:
        return min(1.0, max(0, step - 1 - warmup_steps) / max(1, total_steps - warmup_steps))

    def linear(step: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps
        return 1 - (1 - min_lr_ratio) * after_warmup(step)

    def cosine(step: int, cycles: int = 1) -> float:
        if step < warmup_steps:
            return step / warmup_steps
        progress = after_warmup(step)
        phase = 1.0 if progress >= 1 else (progress * cycles) % 1
        return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * phase))

    return {
        "linear": linear,
        "cosine": cosine,
        "cosine_restarts": lambda step: cosine(step, num_cycles),
        "constant": lambda step: min(1.0, step / max(1, warmup_steps)),
    }[name]

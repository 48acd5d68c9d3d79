"""How often to save within epochs: a pure function of what a snapshot costs and of how often runs are interrupted.

Young's rule: the time that an interruption costs on average (half an interval) and the time that snapshots cost are
together least if the interval is sqrt(2 C M): C the time that one snapshot takes from training, M the mean time between
interruptions (J. W. Young, "A first order approximation to the optimum checkpoint interval", 1974; J. T. Daly, 2006,
gives terms of higher order, which matter only where C is not small against M). Free of torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

from resumable_trainer.metrics.goodput import duration

ASSUMED_SECONDS = 24 * 3600.0  # between interruptions, while none has been seen: one machine lost a day
FIRST_SECONDS = 60.0  # until a snapshot has been taken, and its cost is known
REMEMBERED = 20  # snapshots, whose median cost counts
_LEAST_SECONDS = 1.0


@dataclass(frozen=True)
class Interruptions:
    """What is known of a run's interruptions.

    Attributes:
        number: How often a launch ended before the run did.
        seconds: How long all launches together have run.
        stalls: What the newest snapshots took from training, in seconds.
    """

    number: int = 0
    seconds: float = 0.0
    stalls: tuple[float, ...] = ()

    @property
    def mean_seconds(self) -> float:
        """Mean time between interruptions; one a day is assumed before the first, and weighs less with each."""
        return (self.seconds + ASSUMED_SECONDS) / (self.number + 1)

    def __str__(self) -> str:
        if not self.number:
            return "no interruption seen yet, one a day assumed"
        return f"{self.number} interruption{'s' if self.number > 1 else ''} seen in {duration(self.seconds)}"


def interval_seconds(stall_seconds: float, mean_seconds: float, max_overhead: float) -> float:
    """Seconds between snapshots: Young's rule, but no more of the training's time than allowed.

    Args:
        stall_seconds: What one snapshot takes from training.
        mean_seconds: Mean time between interruptions.
        max_overhead: Largest share of the training's time that snapshots may take, above 0.
    """
    return max(sqrt(2 * stall_seconds * mean_seconds), stall_seconds / max_overhead, _LEAST_SECONDS)

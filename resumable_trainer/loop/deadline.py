"""How long before a machine's end it must be left: a pure function of what the run knows of itself.

To finish what the training thread is at, then to save, with the measured time of a snapshot counted twice. At least
half a minute: what clouds promise is their best effort, so of so little nothing is spent on training.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

UNKNOWN_SECONDS = 60.0  # for a run that has not saved yet, in any launch
_AT_LEAST_SECONDS = 30.0
_SPARE_SECONDS = 5.0


def seconds_needed(costs: Collection[float], longest_silence_seconds: float) -> float:
    """Seconds before the end at which to begin to leave; finite, as an end that is known days ahead must be waited for.

    Args:
        costs: Seconds from capture to durable of the newest snapshots.
        longest_silence_seconds: The longest time between two places at which a notice is followed.
    """
    if not costs:
        return UNKNOWN_SECONDS + longest_silence_seconds
    return max(_AT_LEAST_SECONDS, _SPARE_SECONDS + 2 * percentile_95(costs) + longest_silence_seconds)


def longer_than(seconds_left: float | None, costs: Collection[float]) -> float | None:
    """How long a snapshot usually takes, if that is longer than what is left.

    Args:
        seconds_left: Until the end; None if no end is known.
        costs: Seconds from capture to durable of the newest snapshots.
    """
    if seconds_left is None or not costs:
        return None
    usual = percentile_95(costs)
    return usual if seconds_left < usual else None


def percentile_95(values: Collection[float]) -> float:
    """The smallest value that at least 95 of 100 do not exceed."""
    ordered = sorted(values)
    return ordered[math.ceil(0.95 * len(ordered)) - 1]

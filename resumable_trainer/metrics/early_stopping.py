"""Early stopping: settings that decide, and counters that remember.

The two are kept apart on purpose. *Settings* (`EarlyStopping`) are what the script says now; they
are never saved over the script's. *Counters* (`StoppingCounters`) are what has happened; they come
back from the snapshot. So a changed `patience` takes effect on a resume, and the epochs already
waited stay counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from resumable_trainer.errors import SettingsError


@dataclass(frozen=True)
class StoppingCounters:
    """What early stopping remembers.

    Attributes:
        reference: The last value that counted as an improvement; None before the first.
        wait: Epochs since then.
    """

    reference: float | None = None
    wait: int = 0


@dataclass(frozen=True)
class EarlyStopping:
    """Stop when a metric of the epoch rows has not improved for `patience` epochs.

    Args:
        metric: Name of the metric in the epoch rows, `"test_accuracy"` say.
        mode: `"max"` if larger is better, `"min"` if smaller is.
        patience: Epochs without improvement after which the run ends; at least 1.
        min_delta: What a value must be better by to count as an improvement (Prechelt 1998 calls the
            idea "generalisation loss"; the rule here is that of Keras and Lightning: strictly more
            than `min_delta`). Not negative.

    Raises:
        SettingsError: Any of them illegal; all problems in one message.
    """

    metric: str
    mode: Literal["max", "min"] = "max"
    patience: int = 10
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        problems = []
        if not isinstance(self.metric, str) or not self.metric:
            problems.append(f"metric is {self.metric!r}, it must name a metric of the epoch rows")
        if self.mode not in ("max", "min"):
            problems.append(f'mode is {self.mode!r}, it must be "max" or "min"')
        if not isinstance(self.patience, int) or isinstance(self.patience, bool) or self.patience < 1:
            problems.append(f"patience is {self.patience!r}, it must be an int of at least 1")
        if not isinstance(self.min_delta, int | float) or not 0.0 <= self.min_delta < math.inf:
            problems.append(f"min_delta is {self.min_delta!r}, it must be a finite number of at least 0")
        if problems:
            raise SettingsError(f"EarlyStopping: {'; '.join(problems)}", found=problems)

    def improves(self, value: float, reference: float | None) -> bool:
        """Whether `value` counts as better than `reference`; NaN never does."""
        if math.isnan(value):
            return False
        if reference is None:
            return True
        if self.mode == "max":
            return value > reference + self.min_delta
        return value < reference - self.min_delta

    def updated(self, counters: StoppingCounters, value: float) -> StoppingCounters:
        """The counters after one more epoch with this value."""
        if self.improves(value, counters.reference):
            return StoppingCounters(reference=value, wait=0)
        return StoppingCounters(reference=counters.reference, wait=counters.wait + 1)

    def should_stop(self, counters: StoppingCounters) -> bool:
        """Whether patience is used up."""
        return counters.wait >= self.patience


@dataclass(frozen=True)
class BestValue:
    """The best value so far, and where it was reached.

    Attributes:
        metric: Which metric.
        value: Its best value.
        epoch: The epoch (from 0) whose row holds it.
        step: Training batches finished by the end of that epoch.
    """

    metric: str
    value: float
    epoch: int
    step: int


def better(settings: EarlyStopping, best: BestValue | None, candidate: BestValue) -> BestValue | None:
    """The better of the two, the earlier one on a tie; what another metric has set does not count."""
    if best is not None and best.metric != settings.metric:
        best = None
    if math.isnan(candidate.value):
        return best
    if best is None:
        return candidate
    ahead = candidate.value > best.value if settings.mode == "max" else candidate.value < best.value
    return candidate if ahead else best

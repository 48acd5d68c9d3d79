"""When to save and what to keep: pure policies over plain values.

The clock is handed in, so that tests need not sleep.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from resumable_trainer.errors import SettingsError


@dataclass(frozen=True)
class SnapshotPolicy:
    """When a run takes snapshots, and which it keeps.

    The last epoch always gets a snapshot, and so does a notice (SIGTERM, SIGINT, SIGUSR1).

    Args:
        every: "auto": after each epoch, and within epochs as often as pays: from what a snapshot costs and how often
            the run has been interrupted (`loop/interval.py`). It is said at the start, with its reasons.
        max_overhead: With "auto", the largest share of the training's time that snapshots within epochs may take.
        every_epochs: A snapshot after each so many epochs; None for none.
        every_steps: A snapshot after each so many training batches of the run; None for none.
        every_seconds: A snapshot at the first boundary so many seconds after the last; None for none.
        keep_last: How many of the newest stay; at least 2, so that a damaged one has a forerunner.
        keep_best: How many of the best by the early-stopping metric stay besides.
        keep_every: Each N-th epoch's snapshot stays for ever; None for none.
        background: Write in a background thread (one snapshot in flight, a second waits) or wait
            until each is durable.
        staging: "copy": training waits for one copy of the state in memory. "overlapped": it waits for less; what
            only the optimizers among the parts change is copied during the next forward and backward. Exact only if
            parameters and optimizer state change in `step()` alone (`state/overlap.py` has the conditions, and what of
            a violation is found).

    Raises:
        SettingsError: Any of them illegal; all problems in one message.
    """

    every_epochs: int | None = 1
    every_steps: int | None = None
    every_seconds: float | None = None
    keep_last: int = 3
    keep_best: int = 1
    keep_every: int | None = None
    background: bool = True
    staging: Literal["copy", "overlapped"] = "copy"
    every: Literal["auto"] | None = None
    max_overhead: float = 0.01

    def __post_init__(self) -> None:
        problems = []
        for name in ("every_epochs", "every_steps", "keep_every"):
            value = getattr(self, name)
            if value is not None and not _is_int(value, at_least=1):
                problems.append(f"{name} is {value!r}, it must be None or an int of at least 1")
        if self.every_seconds is not None and not (
            isinstance(self.every_seconds, int | float) and self.every_seconds > 0
        ):
            problems.append(f"every_seconds is {self.every_seconds!r}, it must be None or more than 0")
        if not _is_int(self.keep_last, at_least=2):
            problems.append(f"keep_last is {self.keep_last!r}, it must be an int of at least 2")
        if not _is_int(self.keep_best, at_least=0):
            problems.append(f"keep_best is {self.keep_best!r}, it must be an int of at least 0")
        if self.staging not in ("copy", "overlapped"):
            problems.append(f"staging is {self.staging!r}, it must be 'copy' or 'overlapped'")
        if self.every not in (None, "auto"):
            problems.append(f"every is {self.every!r}, it must be None or 'auto'")
        if self.every == "auto":
            others = [name for name in ("every_steps", "every_seconds") if getattr(self, name) is not None]
            problems += [f"{name} is {getattr(self, name)!r}, which every='auto' finds by itself" for name in others]
            if self.every_epochs != 1:
                problems.append(f"every_epochs is {self.every_epochs!r}, with every='auto' each epoch is saved")
        if not (isinstance(self.max_overhead, int | float) and 0 < self.max_overhead <= 1):
            problems.append(f"max_overhead is {self.max_overhead!r}, it must be above 0 and at most 1")
        if problems:
            raise SettingsError(f"SnapshotPolicy: {'; '.join(problems)}", found=problems)

    @property
    def looks_at_batches(self) -> bool:
        """Whether a snapshot may be due within an epoch."""
        return self.is_auto or self.every_steps is not None or self.every_seconds is not None

    @property
    def is_auto(self) -> bool:
        """Whether it is to be found out how often pays."""
        return self.every == "auto"

    def due_after_batch(self, step: int, seconds_since_last: float) -> bool:
        """Whether to save now that `step` batches of the run are finished."""
        if self.every_steps is not None and step % self.every_steps == 0:
            return True
        return self.every_seconds is not None and seconds_since_last >= self.every_seconds

    def due_after_epoch(self, epochs: int, seconds_since_last: float) -> bool:
        """Whether to save now that `epochs` epochs of the run are finished."""
        if self.every_epochs is not None and epochs % self.every_epochs == 0:
            return True
        return self.every_seconds is not None and seconds_since_last >= self.every_seconds


def _is_int(value: object, *, at_least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least

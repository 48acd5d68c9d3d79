"""Retention: which snapshots stay, as a pure function of what there is. Free of torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from resumable_trainer.snapshot.layout import Position

if TYPE_CHECKING:
    from collections.abc import Sequence

    from resumable_trainer.snapshot.manifest import Manifest


@dataclass(frozen=True)
class Kept:
    """What retention knows of a snapshot.

    Attributes:
        name: Its name.
        position: Where the run stood.
        epoch_complete: Whether it was taken after an epoch's body.
        value: Its value of the early-stopping metric; None within an epoch or without such a metric.
    """

    name: str
    position: Position
    epoch_complete: bool
    value: float | None


def kept_of(manifest: Manifest) -> Kept:
    """What retention knows of a snapshot on disk."""
    best = manifest.best
    value = manifest.metric_values.get(best.metric) if best is not None and manifest.epoch_complete else None
    at = manifest.position
    position = Position(at.epoch, at.batch, at.step)
    return Kept(name=manifest.name, position=position, epoch_complete=manifest.epoch_complete, value=value)


@dataclass(frozen=True)
class Retention:
    """Which snapshots stay; see `to_delete` for the meaning of each."""

    keep_last: int = 3
    keep_best: int = 1
    keep_every: int | None = None
    keep_every_steps: int | None = None
    mode: Literal["max", "min"] = "max"

    def to_delete(self, snapshots: Sequence[Kept]) -> list[str]:
        """Names of the snapshots that need not stay, of all valid ones, oldest first."""
        return to_delete(snapshots, **vars(self))

    def __str__(self) -> str:
        words = [f"the last {self.keep_last}", f"the best {self.keep_best}"]
        words += [f"each {self.keep_every}. epoch"] if self.keep_every else []
        words += [f"each {self.keep_every_steps}. step"] if self.keep_every_steps else []
        return ", ".join(words)


def to_delete(
    snapshots: Sequence[Kept],
    *,
    keep_last: int,
    keep_best: int,
    keep_every: int | None,
    keep_every_steps: int | None = None,
    mode: Literal["max", "min"] = "max",
) -> list[str]:
    """Names of the snapshots that need not stay.

    Args:
        snapshots: All valid snapshots of the current line, oldest first.
        keep_last: How many of the newest stay; the newest always does.
        keep_best: How many of the best by `value` stay besides; the earlier one wins a tie.
        keep_every: Snapshots after each N-th epoch stay.
        keep_every_steps: Snapshots within an epoch at each N-th step stay.
        mode: Whether larger ("max") or smaller values are better.
    """
    if len(snapshots) <= keep_last:
        return []
    stay = {snapshot.name for snapshot in snapshots[-max(1, keep_last) :]}
    stay.update(snapshot.name for snapshot in best_of(snapshots, mode=mode)[:keep_best])
    for snapshot in snapshots if keep_every or keep_every_steps else ():
        if keep_every and snapshot.epoch_complete and snapshot.position.epoch % keep_every == 0:
            stay.add(snapshot.name)
        if keep_every_steps and not snapshot.epoch_complete and snapshot.position.step % keep_every_steps == 0:
            stay.add(snapshot.name)
    return [snapshot.name for snapshot in snapshots if snapshot.name not in stay]


def best_of(snapshots: Sequence[Kept], *, mode: Literal["max", "min"]) -> list[Kept]:
    """Snapshots that have a value, the best first; NaN is none."""
    sign = -1.0 if mode == "max" else 1.0
    rated = [s for s in snapshots if s.value is not None and not math.isnan(s.value)]
    return sorted(rated, key=lambda s: (sign * (s.value or 0.0), s.position.step))

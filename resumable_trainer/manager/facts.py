"""What a manifest says beside the state: where the run stands, how well it does, what it depends on."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol

from resumable_trainer.manager import held
from resumable_trainer.snapshot.layout import snapshot_name
from resumable_trainer.snapshot.retention import Kept

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from resumable_trainer.durable.journal import Mark
    from resumable_trainer.metrics.early_stopping import BestValue
    from resumable_trainer.snapshot.layout import Position

Outcome = Literal["finished", "stopped_early"]


@dataclass(frozen=True)
class Facts:
    """What a manifest says beside the state.

    Attributes:
        position: Where the run stands.
        epoch_complete: Whether `position.epoch` epochs are finished, nothing of the next begun.
        journal: Mark in the metric journal up to which rows belong to this snapshot.
        outcome: Set on the snapshot with which the run ended.
        best: Best value so far, and where.
        metrics: Values of the newest epoch row; NaN and infinities may be the words of `json_values`.
        settings: Settings of optimizers and schedulers as the script builds them.
        depends_on: What the numbers depend on (drift facts).
        saved_by: Versions.
        taken: When the state was captured (ISO 8601, UTC); for the events alone.
        stall_seconds: How long training stood still for capturing and copying it; for the events alone.
    """

    position: Position
    epoch_complete: bool = False
    journal: Mark | None = None
    outcome: Outcome | None = None
    best: BestValue | None = None
    metrics: Mapping[str, float | str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    depends_on: Mapping[str, Any] = field(default_factory=dict)
    saved_by: Mapping[str, str] = field(default_factory=dict)
    taken: str = field(default_factory=lambda: held.now())
    stall_seconds: float = 0.0

    @cached_property
    def name(self) -> str:
        """Name of the snapshot's directory."""
        return snapshot_name(self.position, epoch_complete=self.epoch_complete)

    @property
    def kept(self) -> Kept:
        """What retention will know of it."""
        return Kept(self.name, self.position, self.epoch_complete, self.value)

    @property
    def value(self) -> float | None:
        """Value of the early-stopping metric after the epoch; what retention keeps the best by."""
        value = self.metrics.get(self.best.metric) if self.best is not None and self.epoch_complete else None
        return None if value is None else float(value)

    def fields(self) -> dict[str, Any]:
        """What of this stands in the manifest, as plain values."""
        return {
            "name": self.name,
            "position": vars(self.position),
            "epoch_complete": self.epoch_complete,
            "journal": None if self.journal is None else vars(self.journal),
            "outcome": self.outcome,
            "best": None if self.best is None else vars(self.best),
            "metrics": dict(self.metrics),
            "settings": dict(self.settings),
            "depends_on": dict(self.depends_on),
            "saved_by": dict(self.saved_by),
        }


class Rows(Protocol):
    """The metric journal, as far as saving goes."""

    @property
    def whole_file(self) -> Path | None:
        """Its file, if syncing it is all that makes every row durable; None if only `sync` can."""

    def sync(self) -> None:
        """Make every row so far durable; called by the thread that writes snapshots."""

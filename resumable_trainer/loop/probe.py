"""What examines a run from inside: told at every place where something could differ, able to shorten it.

`doctor` and `verify --replay` put one into the handover; a training has none. Free of torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    from resumable_trainer.loop.run import Run
    from resumable_trainer.loop.triggers import SnapshotPolicy

Place = Literal["batch", "step", "batches", "evaluating", "logged", "epoch"]
"""Where a run tells its probe:

- `batch`: a batch is about to be given to the loop's body.
- `step`: the body is finished, and the boundary after it passed.
- `batches`: a loop over batches is over.
- `evaluating`: a batch of an evaluation is about to be given.
- `logged`: the body has called `log_epoch`.
- `epoch`: an epoch is finished, with its row and snapshot.
"""


class Probe(Protocol):
    """Looks on, and says how a run is to differ from what its script asks for."""

    num_batches: int | None
    """At most so many batches of each loop; None for all."""

    def directory(self, named: Path) -> Path:
        """Where a run takes place instead of in the directory that the script names."""

    def policy(self, asked: SnapshotPolicy) -> SnapshotPolicy:
        """When to take snapshots instead of when the script asks for them."""

    def total(self, asked: int) -> int:
        """How many epochs to train instead."""

    def opened(self, run: Run) -> None:
        """The run is open, and restored."""

    def at(self, place: Place, run: Run, batch: Any = None) -> None:
        """The run has come to a place; may end the process."""

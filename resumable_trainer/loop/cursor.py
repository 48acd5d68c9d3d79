"""Where a run stands, finer than a position: which loops over batches the epoch has run so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from resumable_trainer.snapshot.layout import Position

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass
class BatchLoop:
    """One `run.batches(...)` loop of the epoch under way.

    Attributes:
        done: Batches whose body is finished.
        over: Whether the loop has ended, at its data's end or by `break`.
    """

    done: int = 0
    over: bool = False


@dataclass
class Cursor:
    """Counts of the run.

    Attributes:
        epoch: Epochs finished.
        batch: Batches finished in the epoch under way.
        step: Batches finished since the start of the run.
        loops: Loops over batches that the epoch under way has begun, in order.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    loops: list[BatchLoop] = field(default_factory=list)

    @property
    def position(self) -> Position:
        """The position in the words of the contract."""
        return Position(self.epoch, self.batch, self.step)

    def next_epoch(self) -> None:
        """An epoch's body is finished."""
        self.epoch += 1
        self.batch = 0
        self.loops = []

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "step": self.step,
            "loops": [[loop.done, loop.over] for loop in self.loops],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The way back of `state_dict`."""
        self.epoch, self.batch, self.step = state["epoch"], state["batch"], state["step"]
        self.loops = [BatchLoop(done, over) for done, over in state["loops"]]

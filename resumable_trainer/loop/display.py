"""What is shown while a run trains: the bars' values, the rows so far, the status line, a loss that is no number."""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING

from resumable_trainer.loop import opening, screen

if TYPE_CHECKING:
    from resumable_trainer.loop.keeper import Keeper

_SHOW_ROWS_SECONDS = 1.0


class Display:
    """Shows one entering of a run to people, and to who looks on from outside.

    Args:
        keeper: The run's state, open.

    Attributes:
        total_epochs: How many epochs the run is to have; None if it is not known yet.
    """

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self.total_epochs: int | None = None
        self._opened_at, self._opened_epoch = keeper.clock(), keeper.cursor.epoch
        self._rows_shown_at = self._opened_at
        self._has_warned = False

    def show(self, batches: int) -> None:
        """Show the epoch under way, so many batches of its loop done; never waits for a device or the disk."""
        keeper, record, cursor = self._keeper, self._keeper.record, self._keeper.cursor
        keeper.saver.poll()
        record.flush_what_is_here()
        means = record.averages.means()
        if keeper.settings.on_divergence is None and not self._has_warned and not isfinite(means.get("loss", 0.0)):
            self._has_warned = True
            keeper.screen.say([screen.not_finite(means["loss"], cursor.epoch)])
        keeper.screen.refresh(cursor.epoch, cursor.step, batches, means, screen.best_and_latest(record, keeper.manager))
        keeper.heart.beat(self._status)
        now = keeper.clock()
        if now - self._rows_shown_at >= _SHOW_ROWS_SECONDS:
            self._rows_shown_at = now
            record.show_rows()
            keeper.manager.lock.note_step(cursor.step)

    def _status(self) -> str:
        """Where the run is, for who watches it."""
        keeper, epoch = self._keeper, self._keeper.cursor.epoch
        done, seconds = epoch - self._opened_epoch, keeper.clock() - self._opened_at
        left = (self.total_epochs or 0) - epoch
        latest = keeper.manager.latest
        return screen.status(
            keeper.cursor, self.total_epochs, keeper.record, latest, seconds / done * left if done else None
        )

    def epoch_done(self, epoch: int, values: dict[str, float]) -> None:
        """An epoch is over; its row's values."""
        keeper = self._keeper
        keeper.screen.epoch_done(epoch, values, screen.best_and_latest(keeper.record, keeper.manager))

    def ending(self) -> list[str]:
        """What is said when the run is left in order."""
        keeper, directory = self._keeper, self._keeper.settings.directory
        lines = screen.ending(directory, keeper.outcome, keeper.cursor, keeper.record, keeper.manager.latest)
        return [*lines, *opening.goodput(directory)]

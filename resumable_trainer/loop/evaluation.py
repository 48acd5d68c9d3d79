"""Evaluations: a notice is followed between their batches, with the state as it was before they began.

One that asks to leave is, and so is one that asks to save and go on, as an evaluation may take an hour. Where that
state cannot be had, the next boundary follows the notice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from resumable_trainer.loop.held import HeldState
from resumable_trainer.loop.notices import WaitBroken, notices

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Iterator

    from resumable_trainer.loop.keeper import Keeper
    from resumable_trainer.loop.leaving import Leaving


class Evaluation:
    """The evaluations of one entering of a run.

    Args:
        keeper: The run's state.
        leaving: Follows a notice.
    """

    def __init__(self, keeper: Keeper, leaving: Leaving) -> None:
        self._keeper, self._leaving = keeper, leaving
        self._held: HeldState | None = None
        self._is_in_vain = False  # to ask for what is held, in this evaluation
        self._is_expected = True  # until an epoch has shown that it does not evaluate
        self._has_begun = True  # in the epoch under way

    def epoch_begins(self) -> None:
        """An epoch's body is about to run; it evaluates if the one before did."""
        self._is_expected, self._has_begun = self._has_begun, False

    def batches_begin(self) -> None:
        """Training goes on: what was held is no more the state of now."""
        self._held = None

    def batches_end(self) -> None:
        """A loop over training batches is over; an evaluation may follow."""
        if self._is_expected:
            self._held = HeldState(self._keeper.capture(epoch_complete=False, under_way=None))

    def epoch_ends(self) -> None:
        """The epoch's body has ended."""
        self._held = None

    def counts_for_nothing(self) -> None:
        """The run goes back: what the epoch's body still does is not to be saved."""
        self._held, self._is_expected = None, False

    def begins_again(self) -> None:
        """The run has gone back: nothing is known of its epochs."""
        self._has_begun = True

    def begin(self, *, counts: bool) -> None:
        """The body asks for an evaluation; whether it counts for anything."""
        self._is_expected = self._has_begun = counts
        self._is_in_vain = False

    def served(
        self,
        batches: Iterator[Any],
        *,
        finds_place: bool,
        is_between_batches: Callable[[], bool],
        tell: Callable[[Any], None],
    ) -> Iterator[Any]:
        """The same batches, with notices followed between them.

        Args:
            batches: Of the evaluation.
            finds_place: Whether its data are found by position: then a notice does not wait for the next batch either.
            is_between_batches: Whether no training batch is under way.
            tell: Told each batch that is about to be given.
        """
        breaks = finds_place and self._held is not None and is_between_batches()
        while True:
            is_over, was_broken, batch = False, False, None
            try:
                notices.waits = breaks
                batch = next(batches)
            except StopIteration:
                is_over = True
            except WaitBroken:
                was_broken = True  # followed when the exception is gone
            notices.waits = False
            if is_over:
                return
            if not was_broken:
                tell(batch)
            self._keeper.heart.beat()
            is_good = is_between_batches() and self._keeper.record.watch.found is None
            if notices.leave is not None and (was_broken or is_good):
                self._leave(notices.leave)
            elif notices.save and is_good:
                self._save()
            yield batch

    def _save(self) -> None:
        """Save the state as it was before evaluation began, and go on; a notice that is not served stays."""
        # Before an epoch's first batch there is nothing new to save, and no position for it.
        if self._held is not None and self._keeper.cursor.batch and not self._is_in_vain:
            self._is_in_vain = not self._keeper.save_held(self._held)

    def _leave(self, number: signal.Signals) -> None:
        """Save the state as it was before evaluation began; if it is gone, the last snapshot stands.

        Where none was held (an evaluation at the top of an epoch, or one that not every epoch has),
        training since the last snapshot would be lost: then the next boundary follows the notice.
        """
        if self._held is None and not self._keeper.all_is_durable():
            return
        self._leaving.save_begins()
        if self._held is not None and self._keeper.save_held(self._held):
            self._leaving.leave(number, "in evaluation")
        self._leaving.leave(number, "in evaluation, whose start cannot be had again: the last durable snapshot stands")

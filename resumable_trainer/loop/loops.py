"""The loops over epochs, batches and evaluations: where their boundaries are, and what happens at each.

A snapshot is taken only at *boundaries*: before an epoch's first batch, after a batch's body, after
an epoch's body. Between them the loop's own code runs, and after a resume it runs again from the
boundary: that is why the state is put back at three places (on entering, before the first epoch's
body, and where the batches go on), and the generators last at each of them.
"""

from __future__ import annotations

from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from resumable_trainer.errors import Preempted, UsageError
from resumable_trainer.loop import screen
from resumable_trainer.loop.cursor import BatchLoop
from resumable_trainer.loop.display import Display
from resumable_trainer.loop.evaluation import Evaluation
from resumable_trainer.loop.going_back import go_back
from resumable_trainer.loop.leaving import Leaving
from resumable_trainer.loop.notices import WaitBroken, notices

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from resumable_trainer.data.sources import Source
    from resumable_trainer.loop.keeper import Keeper
    from resumable_trainer.loop.probe import Place
    from resumable_trainer.manager import Outcome
    from resumable_trainer.snapshot.tree import Flat


class Loops:
    """The loops of one entering of a run; a loop that outlives it is refused.

    Args:
        keeper: The run's state.
        tell: Told of each place that the loops come to; None for nobody.

    Attributes:
        values: What the batch under way has logged; None outside a batch.
        number: How many loops over batches the epoch under way has begun.
        in_epoch: Whether an epoch's body is under way.
        is_open: Whether the run is.
        snapshot_wanted: Whether a snapshot was asked for.
    """

    def __init__(self, keeper: Keeper, *, tell: Callable[[Place, Any], None] | None = None) -> None:
        self._keeper, self._tell = keeper, tell
        self._cursor, self._screen = keeper.cursor, keeper.screen
        self.leaving = Leaving(keeper)
        self._evaluation = Evaluation(keeper, self.leaving)
        self.is_open = self.in_epoch = self.snapshot_wanted = False
        self.values: dict[str, Any] | None = None
        self.number = 0
        self._weight = 0  # samples of the batch under way
        self._loop: BatchLoop | None = None
        self._total: int | None = None
        self._epochs_left_by_break = False
        self._went_back = False  # within the body of an epoch that is not to be counted
        self._has_trained = False  # in this launch, or since it has gone back

    def open(self) -> None:
        """The run's state is there: the loops may begin."""
        self.display = Display(self._keeper)
        self._record = self._keeper.record
        self._add_row = self._record.add_step
        self.leaving.watch()
        self.is_open = True

    def close(self) -> None:
        """Nothing runs from here on."""
        self.is_open = self.in_epoch = False
        self._loop = self.values = None
        self.leaving.close()

    # -- epochs -----------------------------------------------------------------------------------

    def epochs(self, total: int) -> Iterator[int]:
        """Numbers of the epochs up to `total` that are still to be trained."""
        self.settle()
        if self.in_epoch:
            raise UsageError("epochs: this run is within an epoch already", hint="one loop over epochs at a time")
        probe = self._keeper.settings.probe
        self._total = self.display.total_epochs = total if probe is None else probe.total(total)
        return self._epochs(self._total)

    def _epochs(self, total: int) -> Iterator[int]:
        self._refuse_if_closed()
        self._screen.begin_epochs(total, self._cursor.epoch)
        if self._is_over(total):
            self._end_without_training(total)
            return
        keeper = self._keeper
        self._screen.say(screen.remaining(self._cursor, total, keeper.settings.early_stopping, self._record))
        keeper.user_code_runs()
        if keeper.settings.may_go_back and self._cursor.step == 0 and keeper.restored is None:
            self._save(epoch_complete=True)  # what a divergence in the first epoch goes back to
        while not self._is_over(total):
            self._begin_epoch()
            try:
                yield self._cursor.epoch
            except GeneratorExit:
                # `break`, or an exception on its way: the next call on this run, or leaving it, tells which.
                self._epochs_left_by_break = self.is_open
                raise
            self._refuse_if_closed()
            if self._went_back or not self._end_epoch(total, left=False):
                self._begin_again(total)

    def _is_over(self, total: int) -> bool:
        if self._cursor.epoch >= total:
            return True
        left_at = self._keeper.ended_by_break_at
        if left_at is not None and total <= left_at:
            return True
        within_epoch = bool(self._cursor.loops)
        return not within_epoch and self._record.should_stop

    def _end_without_training(self, total: int) -> None:
        """Nothing to do: finished before, or what the script says now has made it so."""
        outcome: Outcome = "stopped_early" if self._record.should_stop and self._cursor.epoch < total else "finished"
        if self._keeper.outcome != outcome:
            self._keeper.note("finished", outcome=outcome)
        self._keeper.outcome = outcome

    def _begin_epoch(self) -> None:
        self._keeper.outcome = None
        self._keeper.heart.beat()
        self.in_epoch = True
        self.number, self._loop = 0, None
        self._evaluation.epoch_begins()
        self._keeper.take_up_epoch()

    def _end_epoch(self, total: int, *, left: bool) -> bool:
        """After the body: row, early stopping, snapshot; `left` if the loop was left by `break`.

        False if the epoch does not count, because the run has diverged and goes back.
        """
        keeper = self._keeper
        self._end_open_batches()
        self._record.look_at_epoch(self._cursor.position)
        if self._record.watch.found is not None:
            self._diverge(may_go_back=not left)
            return False
        self.in_epoch = False
        self._evaluation.epoch_ends()
        keeper.restored = None  # of a resumed epoch whose body never came to its batches again
        values = self._record.end_epoch(self._cursor.position)
        epoch = self._cursor.epoch
        self._cursor.next_epoch()
        keeper.outcome = self._outcome_after_epoch(total, left=left)
        self.display.epoch_done(epoch, values)
        due = keeper.saver.is_due_after_epoch(self._cursor.epoch)
        if keeper.outcome is not None or due or self.snapshot_wanted or notices.pending:
            self._save(epoch_complete=True)
        keeper.heart.epoch_ends()
        self._come_to("epoch")
        if keeper.outcome is None and notices.leave is not None:
            self.leaving.leave(notices.leave, f"after epoch {self._cursor.epoch}")
        return True

    def _outcome_after_epoch(self, total: int, *, left: bool) -> Outcome | None:
        if left:
            self._keeper.ended_by_break_at = total
            return "finished"
        if self._cursor.epoch >= total:
            return "finished"
        return "stopped_early" if self._record.should_stop else None

    def settle(self) -> None:
        """Whoever calls on the run after its loops were left by `break` finds them ended in order.

        Raises:
            UsageError: The run is not open.
            Stopped: It has been left already, and the script goes on all the same.
        """
        if not self.is_open:
            raise UsageError("this run is not open", hint="use it in a with statement: with Run(...) as run:")
        if self.leaving.stopped is not None:
            raise self.leaving.stopped
        if self._epochs_left_by_break and self._went_back:
            self.leaving.stop(Preempted(screen.left_while_going_back(self._keeper.manager.latest)))
        if self._epochs_left_by_break:
            self._epochs_left_by_break = False
            assert self._total is not None
            self._end_epoch(self._total, left=True)

    def settle_at_exit(self) -> None:
        """As `settle`, when the run is left in order; the iterator of its epochs may still be referred to."""
        self._epochs_left_by_break |= self.in_epoch
        self.settle()

    def _refuse_if_closed(self) -> None:
        if not self.is_open:
            raise UsageError(
                "this loop belongs to a run that has been left",
                hint="ask for a new one within the with statement: for epoch in run.epochs(n):",
            )

    # -- batches ----------------------------------------------------------------------------------

    def batches(self, data: Any, **settings: Any) -> Iterator[Any]:
        """Batches of this epoch that are not done yet."""
        self.settle()
        if not self.in_epoch:
            raise UsageError(
                "batches: not within an epoch", hint="for epoch in run.epochs(n): for x in run.batches(...)"
            )
        self._end_open_batches()
        source = self._keeper.shelf.source(data, salt="train", **settings)
        number, self.number = self.number, self.number + 1
        self._keeper.shelf.take_up(source, number)
        self._keeper.depends.on_data(number, source)
        return self._batches(source, number)

    def _batches(self, source: Source, number: int) -> Iterator[Any]:
        self._refuse_if_closed()
        if self._loop is not None or number + 1 != self.number:
            raise UsageError(
                "batches: another loop over batches has been asked for before this one began or ended; two at the same"
                " time have no position to come back to",
                hint="loop over one after the other, or over both data at once: a DataLoader over a StackDataset, say",
            )
        cursor = self._cursor
        if self._went_back:
            return  # the epoch begins again when its body has ended
        if number + 1 < len(cursor.loops):
            return  # done before the snapshot; what follows it in the body runs again
        if number == len(cursor.loops):
            cursor.loops.append(BatchLoop())
        loop = self._loop = cursor.loops[number]
        self._evaluation.batches_begin()
        iterator = self._iterator(source, loop)
        if self._keeper.restored is not None:
            # Invariant: after what skipping drew, and after what the body's beginning has changed.
            self._keeper.restore_again()
        self._screen.begin_batches(cursor.epoch, source.num_batches(), loop.done)
        self._boundary()
        while not self._went_back:
            try:
                yield from self._each(iterator, loop, breaks=source.finds_place)
                break
            except WaitBroken:
                del iterator  # what it has put aside is put back when the exception is gone, too
            self._boundary()
            if not self._went_back:
                iterator = self._iterator(source, loop)  # there is nothing to save yet: the wait goes on
        if not self._went_back:
            self._look_for_divergence()
        if not self._went_back:
            self._end_batches(loop)
            self._come_to("batches")

    def _each(self, batches: Iterator[tuple[Any, int]], loop: BatchLoop, *, breaks: bool) -> Iterator[Any]:
        """The batches themselves: between two of them only what is needed, in as few calls as can be.

        A call that takes 0.1 us in a benchmark of it takes 1 us here: the step between has emptied the caches.
        """
        keeper, cursor, watch = self._keeper, self._cursor, self._record.watch
        forget_steps = keeper.watch.stepped.clear
        is_due = keeper.saver.is_due_after_batch if keeper.settings.snapshots.looks_at_batches else None
        left_out = watch.left_out(cursor.epoch)
        # Where what was trained last is not saved yet, and cannot be any more, the first batch is waited for.
        notices.waits = breaks and (cursor.batch > 0 or keeper.epoch_start_is_saved())
        if not self._has_trained:
            batches = self._noting_the_first(batches)
        for batch, weight in batches:
            notices.waits = False
            if left_out and cursor.batch in left_out:
                loop.done += 1
                cursor.batch += 1
                notices.waits = breaks
                continue
            if self._tell is not None:
                self._tell("batch", batch)
            forget_steps()
            self.values, self._weight = {}, weight
            try:
                yield batch
            except GeneratorExit:
                if self._loop is loop:  # else it has been ended before its iterator went
                    self._end_open_batches()
                raise
            if self._loop is not loop:
                self._refuse_ended()
            self._end_batch(loop)
            if watch.found is not None:
                self._diverge()
                return
            notices.waits = breaks  # before the flag is looked at: a notice between the two is not slept through
            if notices.pending or self.snapshot_wanted or (is_due is not None and is_due(cursor.step)):
                notices.waits = False
                self._boundary()
                if self._went_back:
                    return
                notices.waits = breaks
            if self._tell is not None:
                notices.waits = False
                self._tell("step", None)
                notices.waits = breaks
        notices.waits = False

    def _noting_the_first(self, batches: Iterator[tuple[Any, int]]) -> Iterator[tuple[Any, int]]:
        """The same batches; when the first of this launch (or after going back) is there, setting up is over."""
        waits = notices.waits
        first = next(batches, None)
        notices.waits = False
        if first is None:
            return batches
        self._has_trained = True
        self._keeper.note("training")
        notices.waits = waits
        return chain([first], batches)

    def _iterator(self, source: Source, loop: BatchLoop) -> Iterator[tuple[Any, int]]:
        """Batches that are not done yet, each with its weight."""
        if loop.over:
            return iter(())
        if loop.done and source.skip_cost:
            self._screen.say([f"resume  {source.skip_cost} ({loop.done} here)"])
            source.passed_over = self._passed_over
        return self._shortened(source.weighed(epoch=self._cursor.epoch, start=loop.done), done=loop.done)

    def _passed_over(self) -> None:
        """A batch before the place was read again: a sign of life, and nothing that a notice must wait for."""
        self._keeper.heart.beat()
        if notices.leave is not None and self._keeper.all_is_durable():
            self.leaving.leave(notices.leave, "on the way to its place in the data")

    def _shortened(self, batches: Iterator[Any], *, done: int = 0) -> Iterator[Any]:
        probe = self._keeper.settings.probe
        if probe is None or probe.num_batches is None:
            return batches
        return islice(batches, max(0, probe.num_batches - done))

    def _come_to(self, place: Place, batch: Any = None) -> None:
        if self._tell is not None:
            self._tell(place, batch)

    def _refuse_ended(self) -> None:
        self._refuse_if_closed()
        raise UsageError(
            "batches: another loop over batches has begun, or the epoch has ended, since this one gave its last batch",
            hint="one loop over batches at a time",
        )

    def _end_batch(self, loop: BatchLoop) -> None:
        values, cursor = self.values, self._cursor
        if values:
            self._add_row(cursor.step, cursor.epoch, cursor.batch, self._weight, values)
        self.values = None
        loop.done += 1
        cursor.batch += 1
        cursor.step += 1
        if self._screen.clock() >= self._screen.due_at:
            self.display.show(loop.done)

    def _end_batches(self, loop: BatchLoop) -> None:
        """The loop is over, at its data's end or by `break`."""
        loop.over = True
        self._loop = None
        self._keeper.manager.let_go()  # evaluation may put other weights in, if only for a while
        self._screen.end_batches(loop.done)
        self._evaluation.batches_end()

    def _end_open_batches(self) -> None:
        """A loop left by `break`, whether or not its iterator is still referred to somewhere."""
        if self._loop is not None:
            if self.values is not None:
                self._end_batch(self._loop)
            self._end_batches(self._loop)

    def log_epoch(self, values: Mapping[str, object]) -> None:
        """Values for the row of the epoch under way."""
        self._record.add_epoch_values(values)
        self._come_to("logged")

    # -- boundaries -------------------------------------------------------------------------------

    def _boundary(self) -> None:
        """A place within the epoch at which the state is whole.

        Before the first batch nothing is saved: what the body's beginning has done belongs to no
        position. If the state before it is durable, a notice is followed at once.
        """
        self._look_for_divergence()
        if self._went_back:
            return
        cursor = self._cursor
        if not cursor.batch:
            if notices.leave is not None and self._keeper.epoch_start_is_durable():
                self.leaving.leave(notices.leave, f"before the first batch of epoch {cursor.epoch + 1}")
        elif notices.leave is not None:
            self._save(epoch_complete=False)
            self.leaving.leave(notices.leave, f"after step {cursor.step}")
        elif notices.save or self.snapshot_wanted or self._keeper.saver.is_due_after_batch(cursor.step):
            self._save(epoch_complete=False)

    def _save(self, *, epoch_complete: bool) -> None:
        if notices.leave is not None:
            self.leaving.save_begins()
        self._keeper.save(epoch_complete=epoch_complete, under_way=self._under_way())
        self.snapshot_wanted = False

    def captured(self) -> Flat:
        """The whole state as a snapshot would hold it now, tensors live."""
        return self._keeper.capture(epoch_complete=not self.in_epoch, under_way=self._under_way())

    def _under_way(self) -> int | None:
        """Number of the loop over batches that has batches left."""
        return None if self._loop is None or self._loop.over else self.number - 1

    # -- divergence -------------------------------------------------------------------------------

    def _look_for_divergence(self) -> None:
        """No snapshot is taken behind a step that has diverged: what is still to be read is read first."""
        if self._keeper.settings.on_divergence is not None and self._cursor.batch:
            self._record.flush()
            if self._record.watch.found is not None:
                self._diverge()

    def _diverge(self, *, may_go_back: bool = True) -> None:
        line = go_back(self._keeper, may_go_back=may_go_back)
        # What the epoch's body still does counts for nothing.
        self._loop = self.values = None
        self._evaluation.counts_for_nothing()
        self.snapshot_wanted = False
        self._went_back = True
        self._screen.end_batches()
        self._screen.say([line])

    def _begin_again(self, total: int) -> None:
        """The body in which the run has gone back has ended: let the epoch begin."""
        self._went_back = self.in_epoch = self._has_trained = False
        self._keeper.begin_again()
        self._evaluation.begins_again()
        self._screen.go_back(total, self._cursor.epoch)

    # -- evaluation -------------------------------------------------------------------------------

    def evaluating(self, data: Any, **settings: Any) -> Iterator[Any]:
        """Batches for an evaluation; a notice is served between them."""
        self.settle()
        self._evaluation.begin(counts=not self._went_back)
        return self._evaluating(self._keeper.shelf.source(data, salt="evaluating", **settings))

    def _evaluating(self, source: Source) -> Iterator[Any]:
        yield from self._evaluation.served(
            self._shortened(source.batches(epoch=self._cursor.epoch)),
            finds_place=source.finds_place,
            is_between_batches=lambda: self.values is None,
            tell=lambda batch: self._come_to("evaluating", batch),
        )

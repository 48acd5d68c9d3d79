"""A run's snapshots on their way to the disk, and what happens when the disk does not take them.

Policy: a snapshot that fails costs the run nothing but itself. It is said, training goes on, and the next
trigger tries again with new files. Only the last state of a process (the run's end, or a notice to
leave) must get through: that of the run's end is tried once more on leaving, then it is an error.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict
from math import inf
from typing import TYPE_CHECKING

from resumable_trainer.errors import SnapshotWriteError
from resumable_trainer.loop import screen
from resumable_trainer.loop.interval import FIRST_SECONDS, REMEMBERED, Interruptions, interval_seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from resumable_trainer.loop.triggers import SnapshotPolicy
    from resumable_trainer.manager import Facts, Rows, StateManager
    from resumable_trainer.snapshot.tree import Flat


class Saver:
    """Saves states of one run, one at a time.

    Args:
        manager: Writes and commits.
        policy: When to save, and whether in the background.
        rows: What manifests speak of (the metric journal).
        clock: Seconds, for `every_seconds`.
        say: Shows lines to a person.
        interruptions: What is known of the run's interruptions, for "auto".
    """

    def __init__(
        self,
        manager: StateManager,
        policy: SnapshotPolicy,
        *,
        rows: Rows,
        clock: Callable[[], float],
        say: Callable[[Sequence[str]], None],
        interruptions: Interruptions | None = None,
    ) -> None:
        self._manager = manager
        self._policy = policy
        self._rows = rows
        self._clock = clock
        self._say = say
        self._last_at = clock()
        self._interruptions = interruptions if interruptions is not None else Interruptions()
        self._stalls = list(self._interruptions.stalls)
        self._auto_seconds = FIRST_SECONDS
        self._said_seconds = inf  # whatever is found first is said
        if policy.is_auto:
            self._find_interval()
            say([screen.automatic_at_first(self._interruptions)] if not self._stalls else [])
        self._failed: SnapshotWriteError | None = None  # the newest snapshot, if it failed
        self._num_failed = 0
        self._owed: tuple[Flat, Facts] | None = None

    def is_due_after_batch(self, step: int) -> bool:
        """Whether the policy wants a snapshot now that `step` batches of the run are finished."""
        policy, seconds = self._policy, self._clock() - self._last_at
        if policy.is_auto:
            return seconds >= self._auto_seconds
        return policy.looks_at_batches and policy.due_after_batch(step, seconds)

    def is_due_after_epoch(self, epochs: int) -> bool:
        """Whether the policy wants a snapshot now that `epochs` epochs are finished."""
        return self._policy.due_after_epoch(epochs, self._clock() - self._last_at)

    def save(self, staged: Flat, facts: Facts) -> None:
        """Save, in the background if the policy says so; a failure is said, no error."""
        try:
            self._write(staged, facts, background=self._policy.background)
        except SnapshotWriteError as error:
            self._take_note_of(error)

    def save_now(self, staged: Flat, facts: Facts) -> None:
        """Save before leaving; durable on return.

        Raises:
            SnapshotWriteError: It could not be made durable.
        """
        self._write(staged, facts, background=False)

    def save_last(self, staged: Flat, facts: Facts) -> None:
        """Save the run's end, and note in its events that it has ended; if that fails, `close` tries again."""
        try:
            self._write(staged, facts, background=False)
        except SnapshotWriteError as error:
            self._take_note_of(error)
            self._owed = (staged, facts)
        else:
            self._note_end(facts)

    def poll(self) -> None:
        """Take up how the snapshot in flight has ended, if it has; never blocks."""
        try:
            self._manager.poll()
        except SnapshotWriteError as error:
            self._take_note_of(error)
        self._say_recovered()

    def settle(self) -> None:
        """Wait for the snapshot in flight; a failure is said, no error."""
        try:
            self._manager.wait()
        except SnapshotWriteError as error:
            self._take_note_of(error)
        self._say_recovered()

    def close(self) -> None:
        """Wait, and make good what is owed.

        Raises:
            SnapshotWriteError: The newest state that was to be saved is not durable.
        """
        self.settle()
        if self._owed is not None:
            staged, facts = self._owed
            self.save_now(staged, facts)
            self._note_end(facts)
        elif self._failed is not None:
            raise self._failed

    def _write(self, staged: Flat, facts: Facts, *, background: bool) -> None:
        self._learn(facts.stall_seconds)
        self.settle()
        self._owed = None  # a newer state takes its place
        self._last_at = self._clock()  # also if it fails: the next attempt is the next trigger's
        self._manager.write(staged, facts, background=background, rows=self._rows)
        self._failed = None
        if not background:
            self._say_recovered()

    def _learn(self, stall_seconds: float) -> None:
        """One more snapshot has shown what it costs."""
        if self._policy.is_auto and stall_seconds > 0:
            self._stalls = [*self._stalls[1 - REMEMBERED :], stall_seconds]
            self._find_interval()

    def _find_interval(self) -> None:
        """With "auto": how often pays, by what is known now; said when it has changed much."""
        if not self._stalls:
            return
        cost, known = statistics.median(self._stalls), self._interruptions
        overhead = self._policy.max_overhead
        self._auto_seconds = interval_seconds(cost, known.mean_seconds, overhead)
        if not 0.5 < self._auto_seconds / self._said_seconds < 2:
            self._said_seconds = self._auto_seconds
            self._say([screen.automatic(cost, self._auto_seconds, known, overhead)])

    def _note_end(self, facts: Facts) -> None:
        """The run has ended, and its end is durable."""
        best = None if facts.best is None else asdict(facts.best)
        self._manager.note("finished", outcome=facts.outcome, best=best, **asdict(facts.position))

    def _take_note_of(self, error: SnapshotWriteError) -> None:
        self._failed = error
        self._num_failed += 1
        self._manager.note("not_saved", reason=error.message)
        self._say([f"warning {error.message}; training goes on, and the next snapshot tries again"])

    def _say_recovered(self) -> None:
        if self._num_failed and self._failed is None and not self._manager.is_writing:
            self._say([f"saved   {self._manager.latest}, after {self._num_failed} that failed"])
            self._num_failed = 0

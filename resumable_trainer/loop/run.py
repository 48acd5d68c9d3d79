"""Run: the user's own loop, made resumable.

A snapshot is taken only at *boundaries*: before an epoch's first batch, after a batch's body, after
an epoch's body. Between them the loop's own code runs, and after a resume it runs again from the
boundary: that is why the state is put back at three places (on entering, before the first epoch's
body, and where the batches go on), and the generators last at each of them.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import asdict, replace
from itertools import chain, islice
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Self

from resumable_trainer.data.randomness import switching
from resumable_trainer.durable import filesystem
from resumable_trainer.errors import (
    DamagedSnapshotError,
    DivergedError,
    DriftError,
    Interrupted,
    Preempted,
    ResumableTrainerError,
    SettingsError,
    SnapshotGoneError,
    Stopped,
    UsageError,
)
from resumable_trainer.loop import clouds, deadline, identity, launch, opening, screen
from resumable_trainer.loop.cursor import BatchLoop, Cursor
from resumable_trainer.loop.divergence import OnDivergence, blamed, stretches
from resumable_trainer.loop.held import HeldState
from resumable_trainer.loop.notices import WaitBroken, install_excepthook, notices
from resumable_trainer.loop.progress import Progress
from resumable_trainer.loop.record import Record
from resumable_trainer.loop.saver import Saver
from resumable_trainer.loop.scalars import take
from resumable_trainer.loop.shelf import Shelf
from resumable_trainer.loop.triggers import SnapshotPolicy
from resumable_trainer.manager import Facts, Outcome, RestoreReport, StateManager, usable
from resumable_trainer.metrics.history import History
from resumable_trainer.snapshot.layout import METRICS, snapshot_name
from resumable_trainer.snapshot.retention import Retention
from resumable_trainer.state import generators
from resumable_trainer.state.modes import StepWatch
from resumable_trainer.state.parts import check_parts, has_finite_parameters, scalar_settings, undriven_schedulers

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Iterator, Mapping
    from types import TracebackType

    from resumable_trainer.data.sources import Source
    from resumable_trainer.loop.divergence import Divergence, Row
    from resumable_trainer.loop.probe import Place
    from resumable_trainer.metrics.early_stopping import EarlyStopping
    from resumable_trainer.snapshot.manifest import Manifest
    from resumable_trainer.snapshot.tree import Flat

_SHOW_ROWS_SECONDS = 1.0


class Run:
    """A training that can be killed at any instant and continues as if nothing had happened.

    Use it as a context manager: entering takes the run's lock and restores the newest valid snapshot.

    Args:
        directory: The run directory. None: the one that the command line hands over, or
            `runs/<name of the script>`.
        state: Parts by name: model, optimizer, scheduler, scaler, EMA model, random generators,
            anything with `state_dict()` and `load_state_dict()`.
        seed: Seed of the order of data; a fresh run also seeds the global generators with it.
        snapshots: When to save and what to keep.
        early_stopping: When to stop; None never does.
        progress: None: bars on a terminal, lines elsewhere; True: bars; False: nothing.
        strict: Refuse to continue if something that the numbers depend on has changed.
        on_divergence: What to do when the logged loss is no finite number: "stop" (exit code 79), "rollback" (back to
            the last good snapshot, without the batches that are blamed), or `OnDivergence(...)`; None trains on.

    Raises:
        SettingsError: Illegal settings, all problems at once.

    What lives in the script's local variables across batches is not captured: hand it over as a part.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | None = None,
        *,
        state: Mapping[str, object],
        seed: int = 0,
        snapshots: SnapshotPolicy | None = None,
        early_stopping: EarlyStopping | None = None,
        progress: bool | None = None,
        strict: bool = False,
        on_divergence: OnDivergence | Literal["stop", "rollback"] | None = None,
    ) -> None:
        check_parts(state)
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
            raise SettingsError(f"Run: seed is {seed!r}, it must be an int from 0 to 2**63 - 1")
        self._command = launch.process.handover.command or launch.Command.current()
        self.directory = launch.directory_for(directory, self._command)
        self._state = dict(state)
        self._seed = seed
        self._policy = snapshots if snapshots is not None else SnapshotPolicy()
        probe = launch.process.handover.probe
        self._probe = None if probe is None else probe()
        if self._probe is not None:
            self._policy = self._probe.policy(self._policy)
        self._early_stopping = early_stopping
        self._on_divergence = OnDivergence.of(on_divergence)
        self._screen = Progress.for_choice(progress)
        self._strict = strict or launch.process.handover.strict
        self._clock: Callable[[], float] = time.monotonic
        self.says_how_it_steps = False  # a Trainer that compiles its steps does, when it knows
        self._reset()

    def _reset(self) -> None:
        """Nothing is known yet: entering reads it from the run directory, each time anew."""
        self.outcome: Outcome | None = None
        self.resumed_from: str | None = None
        self._cursor = Cursor()
        self._total: int | None = None
        self._ended_by_break_at: int | None = None  # the total that held when the epoch loop was left by break
        self._entered = self._closed = False
        self._session = object()  # a loop of an earlier entering that still lives must not count in this one
        self._stopped: Stopped | None = None  # the notice that was followed
        self._has_trained = False  # in this launch
        self._clouds: clouds.Watch | None = None
        self._told_when_saved: Callable[[], None] | None = None
        self._saved_last = ""  # name of the snapshot that was taken last; it may still be on its way
        self._has_warned = False  # that the loss is no number
        self._went_back = False  # within the body of an epoch that is not to be counted
        # Between two boundaries:
        self._values: dict[str, Any] | None = None  # what the batch under way has logged; None outside a batch
        self._weight = 0  # samples of the batch under way
        self._loop: BatchLoop | None = None
        self._loop_number = 0
        self._in_epoch = self._epochs_left_by_break = False
        self._snapshot_wanted = False
        self._held: HeldState | None = None
        self._evaluates = True  # until an epoch has shown that it does not go through run.evaluating
        self._has_evaluated = True  # in the epoch under way
        # After a resume, until the loop has caught up:
        self._report: RestoreReport | None = None
        self._epoch_generators: Any = None
        self._generators_now: Any = None  # as captured after an epoch, until code of the user's runs again
        self._shelf = Shelf(self._seed, remembers=self._may_go_back)
        self._facts: dict[str, Any] = {}
        self._saved_facts: Mapping[str, Any] = {}
        self._settings: dict[str, Any] = {}
        self._rows_shown_at = 0.0

    # -- opening ----------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._reset()
        notices.begin()
        install_excepthook(launch.process.note_failure)
        self._manager = StateManager(
            self.directory,
            staging=self._policy.staging,
            state=self._state,
            retain=self._retention().to_delete,
            lock=launch.process.handover.locks.pop(self.directory.resolve(), None),
            command=str(self._command),
        )
        self._manager.on_event = launch.process.handover.on_event
        try:
            self._manager.open()
            self._open()
        except BaseException:
            notices.end()
            self._manager.close()
            raise
        return self

    def _open(self) -> None:
        launch.process.note_opened(self.directory, self._manager.lock.generation)
        with usable(self.directory):
            opening.identify(self._manager, self._command, self._seed)
            opening.note_launch(self._manager, self._command, self._retention())
            self._record = Record(
                self.directory / METRICS,
                self._early_stopping,
                files=self._manager.files,
                on_divergence=self._on_divergence,
            )
        self._add_row = self._record.add_step
        self._watch = StepWatch(self._state)
        self._manager.watch_gradients(self._watch)
        self._heart = opening.heartbeat(self._manager)
        self._heart.loading("restoring")
        settings = {name: opening.json_values(scalar_settings(part)) for name, part in self._state.items()}
        self._settings = {name: found for name, found in settings.items() if found}
        self._versions = identity.versions()
        self._facts = identity.current_facts(self._command, seed=self._seed, state=self._state)
        which = opening.begin_line(self._manager, self._record, self.directory)
        report = self._manager.find(which, reading_next=True)
        lines = screen.swept(self._manager.swept) + screen.quarantined(report)
        lines += [f"warning {line}" for line in filesystem.warnings(self.directory)]
        if report.manifest is None:
            lines += opening.lost_snapshots(self.directory)
            opening.start_afresh(self._record, self._seed)
            lines += screen.banner(self.directory, self._state, self._facts)
            self._screen.say(lines + ([] if self.says_how_it_steps else screen.advice(self._state)))
        else:
            self._screen.say(lines)
            self._resume(report)
        self._screen.say(screen.missing_schedulers(undriven_schedulers(self._state)))
        self._rows_shown_at = self._clock()
        known = opening.interruptions(self.directory) if self._policy.is_auto else None
        self._saver = Saver(
            self._manager,
            self._policy,
            rows=self._record,
            clock=self._clock,
            say=self._screen.say,
            interruptions=known,
        )
        self._heart.ready()
        self._notice_clouds()
        self._opened_at, self._opened_epoch = self._clock(), self._cursor.epoch
        self._entered = True
        if self._probe is not None:
            self._probe.opened(self)

    def _notice_clouds(self) -> None:
        """Ask the clouds, where there is one, from now on."""
        notices.may_break = lambda: not switching.now
        sources = clouds.found_here(os.environ) if self._probe is None else []
        if sources:
            self._manager.costs.extend(opening.snapshot_costs(self.directory))
            self._clouds = clouds.Watch(
                sources,
                tell=self._asked,
                seconds_needed=self._seconds_needed,
                say=lambda line: self._screen.say([line]),
            )

    def _asked(self, asked: clouds.Asked, end: float | None) -> None:
        self._told_when_saved = asked.saved or self._told_when_saved
        notices.ask(leave=asked.leave, source=asked.source, deadline=end)

    def _seconds_needed(self) -> float:
        """How long before its end a machine must be left."""
        return deadline.seconds_needed(list(self._manager.costs), self._heart.longest_seconds)

    def _resume(self, found: RestoreReport) -> None:
        """Restore the chosen snapshot, and say what was found."""
        assert found.manifest is not None
        drift = self._drift_since(found.manifest)
        applied = self._manager.apply_or_fall_back(found)
        assert applied.manifest is not None
        manifest = applied.manifest
        if manifest is not found.manifest:  # that one was damaged
            self._screen.say(screen.quarantined(applied))
            drift = self._drift_since(manifest)
        report, lines = self._continue_from(applied, reason=f"going back to {applied.snapshot}")
        self.resumed_from = report.snapshot
        self.outcome = manifest.outcome
        self._screen.say(screen.banner(self.directory, self._state, self._facts))
        lines = screen.begins_anew(applied, self._seed) + lines
        self._screen.say([*screen.resumed(report, self._record), *lines, *screen.drift(drift), *report.notes])

    def _continue_from(self, applied: RestoreReport, *, reason: str) -> tuple[RestoreReport, list[str]]:
        """The parts are restored: take up the loop's own state, and cut the rows back; lines for a person."""
        assert applied.manifest is not None
        report = self._report = opening.with_loop(applied, self._record, self._seed)
        self._manager.set_aside(report.set_aside, reason=reason)
        lines = opening.rewind(self._manager, self._record, applied.manifest)
        self._load_loop(report.sections["loop"])
        position = self._cursor.position
        self._manager.lock.note_step(position.step)
        self._manager.note("resumed", snapshot=report.snapshot, **vars_of(position))
        return report, lines

    def _drift_since(self, manifest: Manifest) -> list[str]:
        """What the run depends on and has changed since a snapshot; refused if `strict` is set."""
        self._saved_facts = {**identity.EAGER, **manifest.depends_on}
        facts = self._facts if self.says_how_it_steps else identity.EAGER | self._facts
        drift = identity.drift(self._saved_facts, facts)
        drift += identity.settings_drift(manifest.settings, self._settings)
        self._refuse_drift(drift)
        return drift

    def _refuse_drift(self, lines: list[str]) -> None:
        if lines and self._strict:
            raise DriftError(
                f"run {self.directory} depends on things that have changed since its snapshot:\n  "
                + "\n  ".join(lines)
                + "\n",
                path=self.directory,
                found=lines,
                hint="put them back, or start without --strict",
            )

    def _retention(self) -> Retention:
        policy = self._policy
        every_steps = None
        if policy.keep_every is not None and policy.every_steps is not None:
            every_steps = policy.keep_every * policy.every_steps
        return Retention(
            keep_last=policy.keep_last,
            keep_best=policy.keep_best if self._early_stopping else 0,
            keep_every=policy.keep_every,
            keep_every_steps=every_steps,
            mode=self._early_stopping.mode if self._early_stopping else "max",
        )

    # -- the loop over epochs ---------------------------------------------------------------------

    def epochs(self, total: int) -> Iterator[int]:
        """Epoch numbers still to be trained, from 0 to `total - 1`.

        After each body: the epoch's row, early stopping, a snapshot, retention. `break` ends the run
        there, and a resume does not redo the rest.

        Args:
            total: Total for the whole run, not "more epochs".

        Raises:
            SettingsError: `total` is no int of at least 0.
        """
        if not isinstance(total, int) or isinstance(total, bool) or total < 0:
            raise SettingsError(f"epochs: total is {total!r}, it must be an int of at least 0")
        self._settle()
        if self._in_epoch:
            raise UsageError("epochs: this run is within an epoch already", hint="one loop over epochs at a time")
        self._total = total if self._probe is None else self._probe.total(total)
        return self._epochs(self._total, self._session)

    def _epochs(self, total: int, session: object) -> Iterator[int]:
        self._check_session(session)
        self._screen.begin_epochs(total, self._cursor.epoch)
        if self._is_over(total):
            self._end_without_training(total)
            return
        self._screen.say(screen.remaining(self._cursor, total, self._early_stopping, self._record))
        self._generators_now = None
        if self._may_go_back and self._cursor.step == 0 and self._report is None:
            self._save(epoch_complete=True)  # what a divergence in the first epoch goes back to
        while not self._is_over(total):
            self._begin_epoch()
            try:
                yield self._cursor.epoch
            except GeneratorExit:
                # `break`, or an exception on its way: the next call on this run, or leaving it, tells which.
                self._epochs_left_by_break = self._is_open(session)
                raise
            self._check_session(session)
            if self._went_back or not self._end_epoch(total, left=False):
                self._begin_again(total)

    def _is_over(self, total: int) -> bool:
        if self._cursor.epoch >= total:
            return True
        if self._ended_by_break_at is not None and total <= self._ended_by_break_at:
            return True
        within_epoch = bool(self._cursor.loops)
        return not within_epoch and self._record.should_stop

    def _end_without_training(self, total: int) -> None:
        """Nothing to do: finished before, or what the script says now has made it so."""
        outcome: Outcome = "stopped_early" if self._record.should_stop and self._cursor.epoch < total else "finished"
        if self.outcome != outcome:
            self._manager.note("finished", outcome=outcome, **vars_of(self._cursor.position))
        self.outcome = outcome

    def _begin_epoch(self) -> None:
        self.outcome = None
        self._heart.beat()
        self._in_epoch = True
        self._loop_number, self._loop, self._held = 0, None, None
        self._evaluates, self._has_evaluated = self._has_evaluated, False
        if self._report is None:
            # Nothing has drawn since the snapshot after the last epoch, if there was one.
            self._epoch_generators, self._generators_now = self._generators_now or generators.capture_global(), None
        elif self._cursor.loops:
            # Within an epoch: its body's beginning runs again, and must draw what it drew then.
            generators.restore_global(self._epoch_generators)
        else:
            self._restore_again()
            self._epoch_generators = generators.capture_global()

    def _end_epoch(self, total: int, *, left: bool) -> bool:
        """After the body: row, early stopping, snapshot; `left` if the loop was left by `break`.

        False if the epoch does not count, because the run has diverged and goes back.
        """
        self._end_open_batches()
        self._record.look_at_epoch(self._cursor.position)
        if self._record.watch.found is not None:
            self._diverge(may_go_back=not left)
            return False
        self._in_epoch = False
        if self._report is not None:
            self._report = None  # a resumed epoch whose body never came to its batches again
        values = self._record.end_epoch(self._cursor.position)
        epoch = self._cursor.epoch
        self._cursor.next_epoch()
        self.outcome = self._outcome_after_epoch(total, left=left)
        self._screen.epoch_done(epoch, values, screen.best_and_latest(self._record, self._manager))
        due = self._saver.is_due_after_epoch(self._cursor.epoch)
        if self.outcome is not None or due or self._snapshot_wanted or notices.pending:
            self._save(epoch_complete=True)
        self._heart.epoch_ends()
        self._tell("epoch")
        if self.outcome is None and notices.leave is not None:
            self._leave(notices.leave, f"after epoch {self._cursor.epoch}")
        return True

    def _outcome_after_epoch(self, total: int, *, left: bool) -> Outcome | None:
        if left:
            self._ended_by_break_at = total
            return "finished"
        if self._cursor.epoch >= total:
            return "finished"
        return "stopped_early" if self._record.should_stop else None

    def _settle(self) -> None:
        """Whoever calls on the run after its loops were left by `break` finds them ended in order."""
        if not self._entered:
            raise UsageError("this run is not open", hint="use it in a with statement: with Run(...) as run:")
        if self._stopped is not None:
            raise self._stopped  # the script has caught it; it is still to leave
        if self._epochs_left_by_break and self._went_back:
            self._stopped = Preempted(screen.left_while_going_back(self._manager.latest))
            raise self._stopped
        if self._epochs_left_by_break:
            self._epochs_left_by_break = False
            assert self._total is not None
            self._end_epoch(self._total, left=True)

    def _is_open(self, session: object) -> bool:
        return self._entered and session is self._session

    def _check_session(self, session: object) -> None:
        if not self._is_open(session):
            raise UsageError(
                "this loop belongs to a run that has been left",
                hint="ask for a new one within the with statement: for epoch in run.epochs(n):",
            )

    # -- the loop over batches --------------------------------------------------------------------

    def batches(
        self, data: Any, *, batch_size: int | None = None, shuffle: bool = False, drop_last: bool = False
    ) -> Iterator[Any]:
        """Batches of this epoch that are not done yet.

        A batch counts as done when the next one is asked for. `break` ends the epoch's batches there.

        Args:
            data: A DataLoader, unchanged; tensors or a TensorDataset (with `batch_size`); a sequence;
                an iterable with `state_dict()`; any other iterable.
            batch_size: Samples per batch; for tensors.
            shuffle: Whether each epoch has an order of its own; for tensors.
            drop_last: Whether a short last batch is left out; for tensors.

        Raises:
            SettingsError: Data or settings that give no batches.
            UsageError: Not within an epoch, or within another loop over batches.
            DriftError: The data have changed since the snapshot, and `strict` is set.
        """
        self._settle()
        if not self._in_epoch:
            raise UsageError(
                "batches: not within an epoch", hint="for epoch in run.epochs(n): for x in run.batches(...)"
            )
        self._end_open_batches()
        source = self._shelf.source(data, salt="train", batch_size=batch_size, shuffle=shuffle, drop_last=drop_last)
        number, self._loop_number = self._loop_number, self._loop_number + 1
        self._shelf.take_up(source, number)
        self._check_data(number, source)
        return self._batches(source, number, self._session)

    def _batches(self, source: Source, number: int, session: object) -> Iterator[Any]:
        self._check_session(session)
        if self._loop is not None or number + 1 != self._loop_number:
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
        self._held = None
        iterator = self._iterator(source, loop)
        if self._report is not None:
            # Invariant: after what skipping drew, and after what the body's beginning has changed.
            self._restore_again()
        self._screen.begin_batches(cursor.epoch, source.num_batches(), loop.done)
        self._boundary()
        while True:
            try:
                yield from self._each(iterator, loop, session, breaks=source.finds_place)
                break
            except WaitBroken:
                del iterator  # what it has put aside is put back when the exception is gone, too
            self._boundary()
            iterator = self._iterator(source, loop)  # there is nothing to save yet: the wait goes on
        if not self._went_back:
            self._look_for_divergence()
        if not self._went_back:
            self._end_batches(loop)
            self._tell("batches")

    def _noting_the_first(self, batches: Iterator[tuple[Any, int]]) -> Iterator[tuple[Any, int]]:
        """The same batches; when the first of this launch (or after going back) is there, setting up is over."""
        waits = notices.waits
        first = next(batches, None)
        notices.waits = False
        if first is None:
            return batches
        self._has_trained = True
        self._manager.note("training", **vars_of(self._cursor.position))
        notices.waits = waits
        return chain([first], batches)

    def _each(
        self, batches: Iterator[tuple[Any, int]], loop: BatchLoop, session: object, *, breaks: bool
    ) -> Iterator[Any]:
        """The batches themselves: between two of them only what is needed, in as few calls as can be.

        A call that takes 0.1 us in a benchmark of it takes 1 us here: the step between has emptied the caches.
        """
        tell = None if self._probe is None else self._tell
        forget_steps, cursor = self._watch.stepped.clear, self._cursor
        is_due = self._saver.is_due_after_batch if self._policy.looks_at_batches else None
        watch = self._record.watch
        left_out = watch.left_out(cursor.epoch)
        # Where what was trained last is not saved yet, and cannot be any more, the first batch is waited for.
        notices.waits = breaks and (cursor.batch > 0 or self._epoch_start_is_saved())
        if not self._has_trained:
            batches = self._noting_the_first(batches)
        for batch, weight in batches:
            notices.waits = False
            if left_out and cursor.batch in left_out:
                loop.done += 1
                cursor.batch += 1
                notices.waits = breaks
                continue
            if tell is not None:
                tell("batch", batch)
            forget_steps()
            self._values, self._weight = {}, weight
            try:
                yield batch
            except GeneratorExit:
                if self._loop is loop:  # else it has been ended before its iterator went
                    self._end_open_batches()
                raise
            if self._loop is not loop:
                self._refuse_ended(session)
            self._end_batch(loop)
            if watch.found is not None:
                self._diverge()
                return
            notices.waits = breaks  # before the flag is looked at: a notice between the two is not slept through
            if notices.pending or self._snapshot_wanted or (is_due is not None and is_due(cursor.step)):
                notices.waits = False
                self._boundary()
                if self._went_back:
                    return
                notices.waits = breaks
            if tell is not None:
                notices.waits = False
                tell("step")
                notices.waits = breaks
        notices.waits = False

    def _iterator(self, source: Source, loop: BatchLoop) -> Iterator[tuple[Any, int]]:
        """Batches that are not done yet, each with its weight."""
        if loop.over:
            return iter(())
        if loop.done and source.skip_cost:
            self._screen.say([f"resume  {source.skip_cost} ({loop.done} here)"])
        return self._shortened(source.weighed(epoch=self._cursor.epoch, start=loop.done), done=loop.done)

    def _shortened(self, batches: Iterator[Any], *, done: int = 0) -> Iterator[Any]:
        if self._probe is None or self._probe.num_batches is None:
            return batches
        return islice(batches, max(0, self._probe.num_batches - done))

    def _tell(self, place: Place, batch: Any = None) -> None:
        if self._probe is not None:
            self._probe.at(place, self, batch)

    def _refuse_ended(self, session: object) -> None:
        self._check_session(session)
        raise UsageError(
            "batches: another loop over batches has begun, or the epoch has ended, since this one gave its last batch",
            hint="one loop over batches at a time",
        )

    def _end_batch(self, loop: BatchLoop) -> None:
        values, cursor = self._values, self._cursor
        if values:
            self._add_row(cursor.step, cursor.epoch, cursor.batch, self._weight, values)
        self._values = None
        loop.done += 1
        cursor.batch += 1
        cursor.step += 1
        if self._screen.clock() >= self._screen.due_at:
            self._show(loop)

    def _end_batches(self, loop: BatchLoop) -> None:
        """The loop is over, at its data's end or by `break`."""
        loop.over = True
        self._loop = None
        self._manager.settle()  # evaluation may put other weights in, if only for a while
        self._screen.end_batches(loop.done)
        if self._evaluates:
            self._held = HeldState(self._capture(epoch_complete=False))

    def _end_open_batches(self) -> None:
        """A loop left by `break`, whether or not its iterator is still referred to somewhere."""
        if self._loop is not None:
            if self._values is not None:
                self._end_batch(self._loop)
            self._end_batches(self._loop)

    def _snapshot_due(self) -> bool:
        return self._snapshot_wanted or self._saver.is_due_after_batch(self._cursor.step)

    def _boundary(self) -> None:
        """A place within the epoch at which the state is whole.

        Before the first batch nothing is saved: what the body's beginning has done belongs to no
        position. If the state before it is durable, a notice is followed at once.
        """
        self._look_for_divergence()
        if self._went_back:
            return
        if not self._cursor.batch:
            if notices.leave is not None and self._epoch_start_is_durable():
                self._leave(notices.leave, f"before the first batch of epoch {self._cursor.epoch + 1}")
        elif notices.leave is not None:
            self._save(epoch_complete=False)
            self._leave(notices.leave, f"after step {self._cursor.step}")
        elif notices.save or self._snapshot_due():
            self._save(epoch_complete=False)

    # -- divergence -------------------------------------------------------------------------------

    @property
    def _may_go_back(self) -> bool:
        return self._on_divergence is not None and self._on_divergence.action == "rollback" and self._probe is None

    def _look_for_divergence(self) -> None:
        """No snapshot is taken behind a step that has diverged: what is still to be read is read first."""
        if self._on_divergence is not None and self._cursor.batch:
            self._record.flush()
            if self._record.watch.found is not None:
                self._diverge()

    def _diverge(self, *, may_go_back: bool = True) -> None:
        """Go back to the last good snapshot, without the batches that are blamed; or stop.

        The parts are good again on return, so that the rest of the epoch's body (an evaluation, say) runs on a model
        of finite numbers. What it does counts for nothing: the epoch begins again when it has ended.

        Raises:
            DivergedError: The run may not go back, or cannot.
        """
        watch, settings = self._record.watch, self._on_divergence
        assert watch.found is not None
        assert settings is not None
        self._saver.settle()
        if not self._may_go_back or not may_go_back or watch.num_rollbacks >= settings.max_rollbacks:
            self._stop_diverged(watch.found, settings)
        found, watch = watch.found, replace(watch)
        number, rows = watch.num_blamed(found), self._record.step_rows()
        restored = self._restore_last_good(found, rows, number)
        if restored is None:
            self._stop_diverged(found, settings, "; no snapshot from before it is good")
        batches, back_to = restored
        watch.rolled_back(found, skips := stretches(batches), number)
        self._record.watch.keep_decisions_of(watch)
        self._manager.note(
            "diverged", **asdict(found), action="rollback", back_to=back_to, skip=[list(skip) for skip in skips]
        )
        self._end_this_body()
        self._screen.say([screen.rolled_back(found, back_to, skips, watch.num_rollbacks, settings)])

    def _restore_last_good(self, found: Divergence, rows: list[Row], number: int) -> tuple[list[Row], str] | None:
        """Restore the newest snapshot from before the blamed batches whose parameters are all finite.

        One whose parameters are not finite was taken after the batch that spoilt them: then the batches before it are
        blamed, and the ones that only showed it are innocent. None if there is no such snapshot.
        """
        batches = blamed(rows, until=found.step, number=number)
        for name in reversed(self._manager.store.names()):
            try:
                at = self._manager.store.manifest(name).position
            except (DamagedSnapshotError, SnapshotGoneError):
                continue
            if not batches or (at.epoch, at.batch) > batches[0][1:]:
                continue
            try:
                applied = self._manager.apply(self._manager.find(name))
            except DamagedSnapshotError as error:
                self._manager.quarantine(name, error.message)
                continue
            if has_finite_parameters(self._state):
                self._continue_from(applied, reason=f"the run has diverged, going back to {name}")
                return batches, name
            batches = blamed(rows, until=at.step - 1, number=number)
        return None

    def _stop_diverged(self, found: Divergence, settings: OnDivergence, why: str = "") -> NoReturn:
        watch, latest = self._record.watch, self._manager.latest
        if self._may_go_back and watch.num_rollbacks >= settings.max_rollbacks:
            why += f"; it has gone back {watch.num_rollbacks} times already (max_rollbacks)"
        self._manager.note("diverged", **asdict(found), action="stop", back_to=latest, skip=[])
        kept = f"the state of before is kept as {latest}" if latest else "there is no snapshot of before"
        raise DivergedError(
            f"run {self.directory} has diverged: {found}{why}; {kept}",
            path=self.directory,
            step=found.step,
            found=found.value,
            expected="a finite value" if found.median is None else f"at most {settings.spike} x {found.median:.4g}",
            hint="look at that batch and the ones before it, lower the learning rate or clip gradients; or let it go"
            " back and leave them out: on_divergence='rollback'",
        )

    def _end_this_body(self) -> None:
        """What the epoch's body still does counts for nothing."""
        self._loop = self._values = self._held = None
        self._snapshot_wanted = self._evaluates = False
        self._went_back = True
        self._screen.end_batches()

    def _begin_again(self, total: int) -> None:
        """The body has ended: put the snapshot's state back once more, and let the epoch begin."""
        self._went_back = self._in_epoch = self._has_trained = False
        self._shelf.begin_again()
        assert self._report is not None
        decided = replace(self._record.watch)
        self._manager.apply(self._report, strictly=False)
        self._load_loop(self._report.sections["loop"])
        self._record.watch.keep_decisions_of(decided)
        self._has_evaluated = True
        self._screen.go_back(total, self._cursor.epoch)

    # -- what is durable ---------------------------------------------------------------------------

    def _epoch_start_is_saved(self) -> bool:
        """Whether the state before the epoch's first batch is durable, or on its way; never blocks."""
        start = snapshot_name(self._cursor.position, epoch_complete=True)
        return self._cursor.step == 0 or start in (self._manager.latest, self._saved_last)

    def _epoch_start_is_durable(self) -> bool:
        self._saver.settle()
        start = snapshot_name(self._cursor.position, epoch_complete=True)
        return self._cursor.step == 0 or self._manager.latest == start

    def _is_saved(self) -> bool:
        """Whether every batch trained so far is in a durable snapshot."""
        here = snapshot_name(self._cursor.position, epoch_complete=False)
        return self._report is not None or self._epoch_start_is_durable() or self._manager.latest == here

    # -- evaluation -------------------------------------------------------------------------------

    def evaluating(self, data: Any, *, batch_size: int | None = None) -> Iterator[Any]:
        """Batches for an evaluation; a notice is served between them.

        Args:
            data: As for `batches`; tensors without `batch_size` come as one batch.
            batch_size: Samples per batch; for tensors.

        Raises:
            SettingsError: Data or settings that give no batches.
        """
        self._settle()
        self._evaluates = self._has_evaluated = not self._went_back
        source = self._shelf.source(data, salt="evaluating", batch_size=batch_size)
        return self._evaluating(source)

    def _evaluating(self, source: Source) -> Iterator[Any]:
        batches = self._shortened(source.batches(epoch=self._cursor.epoch))
        breaks = source.finds_place and self._values is None and self._held is not None
        while True:
            is_over, batch = False, None
            try:
                notices.waits = breaks
                batch = next(batches)
            except StopIteration:
                is_over = True
            except WaitBroken:
                pass
            notices.waits = False
            if is_over:
                return
            if batch is None and breaks and notices.leave is not None:
                self._leave_from_evaluation(notices.leave)
            self._tell("evaluating", batch)
            self._heart.beat()
            if notices.leave is not None and self._values is None and self._record.watch.found is None:
                self._leave_from_evaluation(notices.leave)
            yield batch

    def _leave_from_evaluation(self, number: signal.Signals) -> None:
        """Save the state as it was before evaluation began; if it is gone, the last snapshot stands.

        Where none was held (an evaluation at the top of an epoch, or one that not every epoch has),
        training since the last snapshot would be lost: then the next boundary follows the notice.
        """
        if self._held is None and not self._is_saved():
            return
        state = self._held.again() if self._held is not None else None
        if state is not None and self._in_epoch:
            self._saver.save_now(state, self._snapshot_facts(epoch_complete=False))
            self._leave(number, "in evaluation")
        self._leave(number, "in evaluation, whose start cannot be had again: the last durable snapshot stands")

    # -- numbers ----------------------------------------------------------------------------------

    def log(self, **values: object) -> None:
        """Put values into this batch's row: floats, ints or tensors of one element.

        Never waits for a device. The epoch's means of them, weighted by samples, come into its row.

        Raises:
            UsageError: Outside a batch, a reserved name, a value that is no number.
        """
        if self._values is None:
            raise UsageError("log: no batch is under way", hint="values of a whole epoch go into run.log_epoch(...)")
        take(values, self._values)

    def log_epoch(self, **values: object) -> None:
        """Put values into this epoch's row; they stand before means of the same name.

        Raises:
            UsageError: Outside an epoch, a reserved name, a value that is no number.
        """
        if not self._in_epoch:
            raise UsageError("log_epoch: no epoch is under way")
        self._record.add_epoch_values(values)
        self._tell("logged")

    @property
    def history(self) -> History:
        """All rows so far, as columns by name; reads the journal."""
        if self._closed:
            return History.read(self.directory / METRICS)
        self._settle()
        return self._record.history()

    @property
    def step(self) -> int:
        """Training batches finished since the start of the run."""
        return self._cursor.step

    @property
    def epoch(self) -> int:
        """Index of the epoch under way; epochs finished outside of one."""
        return self._cursor.epoch

    @property
    def batch(self) -> int:
        """Batches finished in the epoch under way."""
        return self._cursor.batch

    @property
    def averages(self) -> dict[str, float]:
        """Means of the step values over the epoch so far; reads device tensors."""
        self._record.flush()
        return self._record.averages.means()

    # -- snapshots --------------------------------------------------------------------------------

    def snapshot(self) -> None:
        """One more snapshot, at the next boundary: the end of this batch, else of this epoch.

        Between boundaries the state belongs to no position, so that a resume could not be exact.
        """
        self._settle()
        self._snapshot_wanted = True

    def captured(self) -> Flat:
        """The whole state as a snapshot would hold it now, tensors live; for those who examine a run."""
        return self._capture(epoch_complete=not self._in_epoch)

    def _capture(self, *, epoch_complete: bool) -> Flat:
        now = generators.capture_global()
        self._generators_now = now if epoch_complete and self._probe is None else None
        return self._manager.capture({"generators": now, "loop": self._loop_state(epoch_complete=epoch_complete)})

    def _loop_state(self, *, epoch_complete: bool) -> dict[str, Any]:
        return {
            "cursor": self._cursor.state_dict(),
            "record": self._record.state_dict(),
            "epoch_generators": None if epoch_complete else self._epoch_generators,
            "sources": self._shelf.state(under_way=None if epoch_complete else self._loop_under_way()),
            "ended_by_break_at": self._ended_by_break_at,
        }

    def _loop_under_way(self) -> int | None:
        """Number of the loop over batches that has batches left."""
        return None if self._loop is None or self._loop.over else self._loop_number - 1

    def _load_loop(self, state: Mapping[str, Any]) -> None:
        self._cursor = Cursor.from_state(state["cursor"])
        self._record.load_state_dict(state["record"])
        self._epoch_generators = state["epoch_generators"]
        self._shelf.load_state(state["sources"])
        self._ended_by_break_at = state["ended_by_break_at"]

    def _restore_again(self) -> None:
        """Put the snapshot's state back once more: code since then has run on it."""
        assert self._report is not None
        report, self._report = self._report, None
        self._manager.apply(report, strictly=False)
        # What the body's beginning has logged anew was logged before the snapshot, from the state of then.
        decided = replace(self._record.watch)
        self._record.load_state_dict(report.sections["loop"]["record"])
        self._record.watch.keep_decisions_of(decided)

    def _save(self, *, epoch_complete: bool) -> None:
        began = self._clock()
        if notices.leave is not None:
            self._heart.stopping()
            self._say_if_late()
        self._saver.settle()  # the memory that is staged into is the snapshot's before
        staged = self._manager.stage(self._capture(epoch_complete=epoch_complete))
        facts = replace(self._snapshot_facts(epoch_complete=epoch_complete), stall_seconds=self._clock() - began)
        if self.outcome is not None:
            self._saver.save_last(staged, facts)
        elif notices.leave is not None:
            self._saver.save_now(staged, facts)
        else:
            self._saver.save(staged, facts)
        self._saved_last = facts.name
        self._snapshot_wanted = False
        self._heart.beat()
        notices.served()

    def _snapshot_facts(self, *, epoch_complete: bool) -> Facts:
        return Facts(
            position=self._cursor.position,
            epoch_complete=epoch_complete,
            journal=self._record.mark(),
            outcome=self.outcome if epoch_complete else None,
            best=self._record.best,
            metrics=opening.json_values(self._record.last_epoch_values),
            settings=self._settings,
            depends_on=self._facts if not self.says_how_it_steps else self._said_before() | self._facts,
            saved_by=self._versions,
        )

    # -- data -------------------------------------------------------------------------------------

    def _check_data(self, number: int, source: Source) -> None:
        """Compare the data with what the snapshot saw; once per loop over batches."""
        name = "data" if number == 0 else f"data {number + 1}"
        if name in self._facts:
            return
        self._screen.say([f"data    {source.describe()}"])
        self.depend_on(name, source.fingerprint())

    def depend_on(self, name: str, value: object) -> None:
        """Record a fact that the numbers depend on; what it was in the snapshot is compared once per launch.

        Raises:
            DriftError: It has changed since the snapshot, and `strict` is set.
        """
        first = name not in self._facts
        self._facts[name] = value
        if first and name in self._saved_facts:
            drift = identity.drift({name: self._saved_facts[name]}, self._facts)
            self._refuse_drift(drift)
            self._screen.say(screen.drift(drift))

    def remembered(self, name: str) -> Any:
        """A fact as the snapshot has it; None if it has none, or if the data are others now."""
        data = [fact for fact in self._saved_facts if fact == "data" or fact.startswith("data ")]
        same = all(self._facts.get(fact, self._saved_facts[fact]) == self._saved_facts[fact] for fact in data)
        return self._saved_facts.get(name) if same else None

    def _said_before(self) -> dict[str, Any]:
        """How the run stepped before: of a launch that has not trained a batch yet, nothing else is known."""
        return {name: self._saved_facts[name] for name in identity.OF_STEPS if name in self._saved_facts}

    def leave_if_asked(self, where: str) -> None:
        """Follow a notice within a batch's body; what was trained since the last snapshot is trained again.

        For code that a notice may have broken: a Trainer's compiler gets the signals of the terminal, too.
        """
        if notices.leave is not None:
            self._leave(notices.leave, where)

    def say(self, line: str) -> None:
        """Show a line for a person, above the bars."""
        self._screen.say([line])

    # -- people and endings -----------------------------------------------------------------------

    def _show(self, loop: BatchLoop) -> None:
        self._saver.poll()
        self._record.flush_what_is_here()
        extra = screen.best_and_latest(self._record, self._manager)
        means = self._record.averages.means()
        if self._on_divergence is None and not self._has_warned and not isfinite(means.get("loss", 0.0)):
            self._has_warned = True
            self._screen.say([screen.not_finite(means["loss"], self._cursor.epoch)])
        self._screen.refresh(self._cursor.epoch, self._cursor.step, loop.done, means, extra)
        self._heart.beat(self._status)
        now = self._clock()
        if now - self._rows_shown_at >= _SHOW_ROWS_SECONDS:
            self._rows_shown_at = now
            self._record.show_rows()
            self._manager.lock.note_step(self._cursor.step)

    def _say_if_late(self) -> None:
        left = None if notices.deadline is None else notices.deadline - time.monotonic()
        if left is not None and self._manager.costs and left < max(self._manager.costs):
            self._screen.say([screen.late(left, max(self._manager.costs), self._manager.latest)])

    def _status(self) -> str:
        """Where the run is, for who watches it."""
        done, seconds = self._cursor.epoch - self._opened_epoch, self._clock() - self._opened_at
        left = (self._total or 0) - self._cursor.epoch
        return screen.status(
            self._cursor, self._total, self._record, self._manager.latest, seconds / done * left if done else None
        )

    def _leave(self, number: signal.Signals, where: str) -> None:
        """Unwind the user's loops with the exit code of the notice; the state is durable by now."""
        self._heart.stopping()
        self._saver.settle()
        kind = Interrupted if number.name == "SIGINT" else Preempted
        event = "interrupted" if kind is Interrupted else "preempted"
        latest = self._manager.latest
        told: dict[str, Any] = {"source": notices.source} if notices.source else {}
        if notices.deadline is not None:
            told["seconds_left"] = round(notices.deadline - time.monotonic(), 3)
        self._manager.note(event, signal=number.name, snapshot=latest, **told, **vars_of(self._cursor.position))
        if self._told_when_saved is not None:
            with contextlib.suppress(OSError, ValueError):  # the state is saved, whatever the cloud makes of that
                self._told_when_saved()
        self._stopped = kind(screen.left(notices.source or number.name, where, latest, int(kind.exit_code)))
        raise self._stopped

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        swallowed = self._stopped if error is None else None
        error = error or swallowed
        try:
            if error is None:
                self._epochs_left_by_break |= self._in_epoch  # its iterator may still be referred to
                self._settle()
            elif not isinstance(error, Stopped):
                self._note_failure(error)
            self._close_saver(error)
        finally:
            self._close(error)
        if error is None or isinstance(error, Stopped):
            self._screen.say([error.message] if isinstance(error, Stopped) else self._ending())
        if swallowed is not None:
            raise swallowed

    def _close_saver(self, error: BaseException | None) -> None:
        try:
            self._saver.close()
        except ResumableTrainerError as late:
            if error is None or isinstance(error, Stopped):
                self._note_failure(late)
                raise

    def _note_failure(self, error: BaseException) -> None:
        fields = vars_of(self._cursor.position)
        self._manager.note("failed", error=f"{type(error).__name__}: {error}"[:500], **fields)

    def _close(self, error: BaseException | None) -> None:
        self._entered = self._in_epoch = False
        self._closed = True
        self._loop = self._values = None
        self._screen.close()
        self._shelf.close()
        self._watch.close()
        if self._clouds is not None:
            self._clouds.stop()
        notices.end()
        if isinstance(error, Interrupted):
            notices.reset()  # in a notebook the process lives on, and the cell may be run again
        try:
            self._manager.close()
        except ResumableTrainerError:
            if error is None or isinstance(error, Stopped):
                raise
        finally:
            self._record.close()

    def _ending(self) -> list[str]:
        lines = screen.ending(self.directory, self.outcome, self._cursor, self._record, self._manager.latest)
        return [*lines, *opening.goodput(self.directory)]


def vars_of(position: Any) -> dict[str, int]:
    """A position as fields of an event."""
    return {"step": position.step, "epoch": position.epoch, "batch": position.batch}

"""The whole state of an open run: restored on entering, captured, saved, and put back where the loop goes on.

It owns the run's lock (in its state manager), its rows and its place. Which state is captured, and when, say the loops.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from resumable_trainer.durable import filesystem
from resumable_trainer.loop import identity, launch, opening, screen
from resumable_trainer.loop.cursor import Cursor
from resumable_trainer.loop.dependence import Dependence
from resumable_trainer.loop.lean import LeanOptimizers
from resumable_trainer.loop.notices import notices
from resumable_trainer.loop.record import Record
from resumable_trainer.loop.saver import Saver
from resumable_trainer.loop.scalars import json_values
from resumable_trainer.loop.shelf import Shelf
from resumable_trainer.manager import Facts, Outcome, RestoreReport, StateManager, usable
from resumable_trainer.snapshot.layout import METRICS, snapshot_name
from resumable_trainer.state import generators
from resumable_trainer.state.modes import StepWatch
from resumable_trainer.state.parts import undriven_schedulers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from resumable_trainer.loop.heartbeat import Heartbeat
    from resumable_trainer.loop.held import HeldState
    from resumable_trainer.loop.progress import Progress
    from resumable_trainer.loop.settings import RunSettings
    from resumable_trainer.snapshot.tree import Flat


class Keeper:
    """One entering of a run, from taking its lock to giving it back.

    Args:
        settings: Of the run.
        screen: What a person sees.

    Attributes:
        cursor: Where the loops are; one object for as long as the run is open.
        outcome: How the run has ended; None as long as it has not.
        resumed_from: Name of the snapshot that it continued from.
        ended_by_break_at: The total of epochs that held when their loop was left by `break`.
        restored: What was restored and is to be put back once more where the loops go on: code since then runs on it.
        epoch_generators: Global generators as they were before the body of the epoch under way.
    """

    def __init__(self, settings: RunSettings, screen: Progress) -> None:
        self.settings, self.screen = settings, screen
        self.clock = time.monotonic
        self.cursor = Cursor()
        self.shelf = Shelf(settings.seed, remembers=settings.may_go_back)
        self.outcome: Outcome | None = None
        self.resumed_from: str | None = None
        self.ended_by_break_at: int | None = None
        self.restored: RestoreReport | None = None
        self.epoch_generators: Any = None
        self._generators_after_epoch: Any = None  # as captured then, until code of the user's runs again
        self._generators_of_last_epoch: Any = None  # as captured then, for as long as it is
        self._on_optimizers = contextlib.ExitStack()  # takes from them what is put on them while the run is open
        self._saved_last = ""  # name of the snapshot that was taken last; it may still be on its way
        self.manager: StateManager
        self.record: Record
        self.saver: Saver
        self.heart: Heartbeat
        self.watch: StepWatch
        self.depends: Dependence

    # -- opening ----------------------------------------------------------------------------------

    def open(self, *, says_how_it_steps: bool) -> None:
        """Take the lock, and restore the newest valid snapshot, or the one that was asked for; says what was found.

        Raises:
            ResumableTrainerError: The run is held, or damaged, or has changed and is strict, ...
        """
        settings, handover = self.settings, launch.process.handover
        self.manager = StateManager(
            settings.directory,
            staging=settings.snapshots.staging,
            state=settings.state,
            retain=settings.retention.to_delete,
            lock=handover.locks.pop(settings.directory.resolve(), None),
            command=str(settings.command),
        )
        self.manager.on_event = handover.on_event
        try:
            self.manager.open()
            self._open(says_how_it_steps)
        except BaseException:
            self._on_optimizers.close()
            self.manager.close()
            raise

    def _open(self, says_how_it_steps: bool) -> None:
        settings, manager, say = self.settings, self.manager, self.screen.say
        launch.process.note_opened(settings.directory, manager.lock.generation)
        with usable(settings.directory):
            opening.identify(manager, settings.command, settings.seed)
            opening.note_launch(manager, settings.command, settings.retention)
            self.record = Record(
                settings.directory / METRICS,
                settings.early_stopping,
                files=manager.files,
                on_divergence=settings.on_divergence,
            )
        self.watch = StepWatch(settings.state)
        self._on_optimizers.callback(self.watch.close)
        if settings.probe is None:
            self._on_optimizers.callback(LeanOptimizers(settings.state, self.watch).close)
        manager.watch_gradients(self.watch)
        self.heart = opening.heartbeat(manager)
        self.heart.loading("restoring")
        self._versions = identity.versions()
        self.depends = Dependence(settings, say=say, says_how_it_steps=says_how_it_steps)
        report = manager.find(opening.begin_line(manager, self.record, settings.directory), reading_next=True)
        say(screen.swept(manager.swept) + screen.quarantined(report))
        say([f"warning {line}" for line in filesystem.warnings(settings.directory)])
        if report.manifest is None:
            say(opening.lost_snapshots(settings.directory))
            opening.start_afresh(self.record, settings.seed)
            say(screen.banner(settings.directory, settings.state, self.depends.facts))
            say([] if says_how_it_steps else screen.advice(settings.state))
        else:
            self._resume(report)
        say(screen.missing_schedulers(undriven_schedulers(settings.state)))
        self.saver = Saver(
            manager,
            settings.snapshots,
            rows=self.record,
            clock=self.clock,
            say=say,
            interruptions=opening.interruptions(settings.directory) if settings.snapshots.is_auto else None,
        )
        self.heart.ready()

    def _resume(self, found: RestoreReport) -> None:
        """Restore the chosen snapshot, and say what was found."""
        assert found.manifest is not None
        drift = self.depends.changed_since(found.manifest)
        applied = self.manager.apply_or_fall_back(found)
        assert applied.manifest is not None
        if applied.manifest is not found.manifest:  # that one was damaged
            self.screen.say(screen.quarantined(applied))
            drift = self.depends.changed_since(applied.manifest)
        lines = self.continue_from(applied, reason=f"going back to {applied.snapshot}")
        report = self.restored
        assert report is not None
        self.resumed_from, self.outcome = report.snapshot, applied.manifest.outcome
        self.screen.say(screen.banner(self.settings.directory, self.settings.state, self.depends.facts))
        lines = screen.begins_anew(applied, self.settings.seed) + lines
        self.screen.say([*screen.resumed(report, self.record), *lines, *screen.drift(drift), *report.notes])

    def continue_from(self, applied: RestoreReport, *, reason: str) -> list[str]:
        """The parts are restored: take up the loop's own state, and cut the rows back; lines for a person."""
        assert applied.manifest is not None
        report = self.restored = opening.with_loop(applied, self.record, self.settings.seed)
        self.manager.set_aside(report.set_aside, reason=reason)
        lines = opening.rewind(self.manager, self.record, applied.manifest)
        self._load_loop(report.sections["loop"])
        self.manager.lock.note_step(self.cursor.step)
        self.note("resumed", snapshot=report.snapshot)
        return lines

    # -- putting back -----------------------------------------------------------------------------

    def restore_again(self) -> None:
        """Put the snapshot's state back where the loops go on: code since then has run on it."""
        assert self.restored is not None
        report, self.restored = self.restored, None
        self.manager.apply(report, strictly=False)
        # What the body's beginning has logged anew was logged before the snapshot, from the state of then.
        decided = replace(self.record.watch)
        self.record.load_state_dict(report.sections["loop"]["record"])
        self.record.watch.keep_decisions_of(decided)

    def begin_again(self) -> None:
        """Put the state that the run has gone back to in place of what the body has done since then."""
        assert self.restored is not None
        self.shelf.begin_again()
        decided = replace(self.record.watch)
        self.manager.apply(self.restored, strictly=False)
        self._load_loop(self.restored.sections["loop"])
        self.record.watch.keep_decisions_of(decided)

    def take_up_epoch(self) -> None:
        """An epoch's body is about to run: its generators are as they were when it ran for the first time."""
        if self.restored is None:
            # Nothing has drawn since the snapshot after the last epoch, if there was one.
            self.epoch_generators = self._generators_after_epoch or generators.capture_global()
            self._generators_after_epoch = None
        elif self.cursor.loops:
            # Within an epoch: its body's beginning runs again, and must draw what it drew then.
            generators.restore_global(self.epoch_generators)
        else:
            self.restore_again()
            self.epoch_generators = generators.capture_global()

    def user_code_runs(self) -> None:
        """Code of the user's may have drawn since the last epoch."""
        self._generators_after_epoch = None

    def _load_loop(self, state: Mapping[str, Any]) -> None:
        self.cursor.load_state_dict(state["cursor"])
        self.record.load_state_dict(state["record"])
        self.epoch_generators = state["epoch_generators"]
        self.shelf.load_state(state["sources"])
        self.ended_by_break_at = state["ended_by_break_at"]

    # -- saving -----------------------------------------------------------------------------------

    def capture(self, *, epoch_complete: bool, under_way: int | None) -> Flat:
        """The whole state as it is now, tensors live.

        Args:
            epoch_complete: Whether the epoch's body has ended.
            under_way: Number of the epoch's loop over batches that has batches left; None for none.
        """
        # Never the very object that `epoch_generators` is, where that is saved, too: a resumed run has two.
        now = generators.capture_global(self._generators_of_last_epoch if epoch_complete else None)
        if epoch_complete:
            self._generators_of_last_epoch = now
        self._generators_after_epoch = now if epoch_complete and self.settings.probe is None else None
        loop = {
            "cursor": self.cursor.state_dict(),
            "record": self.record.state_dict(),
            "epoch_generators": None if epoch_complete else self.epoch_generators,
            "sources": self.shelf.state(under_way=None if epoch_complete else under_way),
            "ended_by_break_at": self.ended_by_break_at,
        }
        return self.manager.capture({"generators": now, "loop": loop})

    def save(self, *, epoch_complete: bool, under_way: int | None) -> None:
        """Take a snapshot; waits until it is durable at the run's end, and if the process is to leave."""
        began = self.clock()
        self.saver.settle()  # the memory that is staged into is the snapshot's before
        staged = self.manager.stage(self.capture(epoch_complete=epoch_complete, under_way=under_way))
        facts = self._facts(epoch_complete=epoch_complete, stall_seconds=self.clock() - began)
        if self.outcome is not None:
            self.saver.save_last(staged, facts)
        elif notices.leave is not None:
            self.saver.save_now(staged, facts)
        else:
            self.saver.save(staged, facts)
        self._saved_last = facts.name
        self.heart.beat()
        notices.served()

    def save_held(self, held: HeldState) -> bool:
        """Save what was held when the epoch's batches were done; durable on return if the process is to leave.

        False if it cannot be had again: then nothing is saved.
        """
        began = self.clock()
        self.saver.settle()  # the memory that is staged into is the snapshot's before
        facts = self._facts(epoch_complete=False)
        if self.manager.latest != facts.name:
            state = held.again(self._copied)
            if state is None:
                return False
            facts = replace(facts, taken=held.taken, stall_seconds=self.clock() - began)
            (self.saver.save if notices.leave is None else self.saver.save_now)(state, facts)
        self.heart.beat()
        notices.served()
        return True

    def _copied(self, captured: Flat) -> Flat:
        staged = self.manager.stage(captured)
        self.manager.let_go()  # evaluation may change what it likes
        return staged

    def _facts(self, *, epoch_complete: bool, stall_seconds: float = 0.0) -> Facts:
        return Facts(
            position=self.cursor.position,
            epoch_complete=epoch_complete,
            journal=self.record.mark(),
            outcome=self.outcome if epoch_complete else None,
            best=self.record.best,
            metrics=json_values(self.record.last_epoch_values),
            settings=self.depends.part_settings,
            depends_on=self.depends.for_manifest(),
            saved_by=self._versions,
            stall_seconds=stall_seconds,
        )

    def epoch_start_is_saved(self) -> bool:
        """Whether the state before the epoch's first batch is durable, or on its way; never blocks."""
        start = snapshot_name(self.cursor.position, epoch_complete=True)
        return self.cursor.step == 0 or start in (self.manager.latest, self._saved_last)

    def epoch_start_is_durable(self) -> bool:
        """Whether the state before the epoch's first batch is durable; waits for the snapshot in flight."""
        self.saver.settle()
        start = snapshot_name(self.cursor.position, epoch_complete=True)
        return self.cursor.step == 0 or self.manager.latest == start

    def all_is_durable(self) -> bool:
        """Whether every batch trained so far is in a durable snapshot; waits for the one in flight."""
        here = snapshot_name(self.cursor.position, epoch_complete=False)
        return self.restored is not None or self.epoch_start_is_durable() or self.manager.latest == here

    # -- events and the end -----------------------------------------------------------------------

    def note(self, event: str, **fields: Any) -> None:
        """An event of the run, with the place where it happened."""
        at = self.cursor
        self.manager.note(event, **fields, step=at.step, epoch=at.epoch, batch=at.batch)

    def note_failure(self, error: BaseException) -> None:
        """The run is left because of an error."""
        self.note("failed", error=f"{type(error).__name__}: {error}"[:500])

    def close(self) -> None:
        """End workers, give the lock back.

        Raises:
            SnapshotWriteError: The snapshot in flight could not be made durable.
        """
        self.shelf.close()
        self._on_optimizers.close()
        try:
            self.manager.close()
        finally:
            self.record.close()

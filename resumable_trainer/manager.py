"""StateManager: the live state of a training, and its snapshots on disk.

Knows parts and snapshots, and nothing of loops: it serves `Run`, and people whose loop is somebody
else's. Holds the run's lock while open, and is the only place where `state/` and `snapshot/` meet.

What a snapshot costs the training thread: one copy of the state in memory (`stage`). Files, digests,
syncs, the commit and retention happen in a background thread, one snapshot at a time; a second one
waits. An error there is raised at the next call and at close.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import time
from collections import deque
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

import torch
from torch import nn
from torch.optim import Optimizer

from resumable_trainer.durable.files import Files, make_directories
from resumable_trainer.durable.filesystem import refuse_links
from resumable_trainer.durable.journal import Journal, Mark
from resumable_trainer.durable.lock import RunLock
from resumable_trainer.durable.priority import yield_to_training
from resumable_trainer.errors import (
    DamagedSnapshotError,
    NotFoundError,
    ResumableTrainerError,
    RunHeldError,
    SettingsError,
    SnapshotGoneError,
    SnapshotWriteError,
    StateMismatchError,
    UsageError,
)
from resumable_trainer.snapshot.committer import Committer, Hooks, Newest
from resumable_trainer.snapshot.dictation import Dictation, Draft
from resumable_trainer.snapshot.layout import EVENTS, FROZEN, OWN_NAMES, RUN_LOCK, Position, parse_name, snapshot_name
from resumable_trainer.snapshot.manifest import Manifest
from resumable_trainer.snapshot.opened import OpenSnapshot
from resumable_trainer.snapshot.pending import PendingSnapshot
from resumable_trainer.snapshot.plan import Planner
from resumable_trainer.snapshot.retention import Kept, to_delete
from resumable_trainer.snapshot.store import Store
from resumable_trainer.snapshot.tree import BAD_VALUES, Flat, Plain, references
from resumable_trainer.snapshot.unchanged import WORTH_BYTES
from resumable_trainer.snapshot.writer import StateFiles, Worked
from resumable_trainer.state import filling, generators, modes
from resumable_trainer.state.overlap import Fence, changed_by_steps_alone
from resumable_trainer.state.parts import (
    RESERVED_NAMES,
    capture_part,
    check_parts,
    live_tensors,
    mismatches,
    restore_part,
    unfaithful,
)
from resumable_trainer.state.staging import Arena

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
    from types import TracebackType

    from resumable_trainer.metrics.early_stopping import BestValue
    from resumable_trainer.snapshot.manifest import FileEntry

Staging = Literal["copy", "overlapped"]
Outcome = Literal["finished", "stopped_early"]
_NOTE_STEP_SECONDS = 1.0  # the step in the lock's record is for people


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
    taken: str = field(default_factory=lambda: _now())
    stall_seconds: float = 0.0

    @property
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


class Rows(Protocol):
    """The metric journal, as far as saving goes."""

    @property
    def whole_file(self) -> Path | None:
        """Its file, if syncing it is all that makes every row durable; None if only `sync` can."""

    def sync(self) -> None:
        """Make every row so far durable; called by the thread that writes snapshots."""


@dataclass(frozen=True)
class RestoreReport:
    """What `restore` found and did.

    Attributes:
        snapshot: Name of the snapshot that was restored; None if there is none yet.
        manifest: Its manifest.
        sections: Sections beside the parts that were saved with it (the loop's own).
        quarantined: Damaged snapshots put aside on the way, with the reason for each.
        set_aside: Newer snapshots set aside because an older one was asked for.
        absent: What a snapshot holds beside the parts, and this one does not (it was imported): it is as
            the script left it.
        notes: Lines for a person: what could not be restored exactly.
        is_verified: Whether every byte of it was checked before any was used; else tensors are checked while they
            are read into the parts.
    """

    snapshot: str | None = None
    manifest: Manifest | None = None
    sections: Mapping[str, Any] = field(default_factory=dict)
    quarantined: Mapping[str, str] = field(default_factory=dict)
    set_aside: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    is_verified: bool = True


class StateManager:
    """Captures, saves and restores a set of named parts in one run directory.

    Use it as a context manager, or call `open()` and `close()`.

    Args:
        directory: The run directory; made if it is not there.
        state: Parts by name: modules, optimizers, schedulers, scalers, anything with `state_dict()`
            and `load_state_dict()`, and random generators.
        retain: Which snapshots to delete, given all of them, oldest first. Default: keep the last 3.
        staging: "copy": a snapshot's state is copied before the call returns. "overlapped": what only the optimizers
            among the parts change is copied while the next forward and backward run; see `state.overlap` for the
            conditions under which that is exact.
        lock: A lock of this directory that the caller has taken already.
        command: What to tell others who find the run held.
        files: Primitive file operations.

    Raises:
        SettingsError: A part that could not be captured.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        state: Mapping[str, object],
        retain: Callable[[Sequence[Kept]], list[str]] | None = None,
        staging: Staging = "copy",
        lock: RunLock | None = None,
        command: str = "",
        files: Files | None = None,
    ) -> None:
        check_parts(state)
        self.directory = Path(directory)
        self.state = dict(state)
        self.run_id = ""
        self.files = files if files is not None else Files()
        self.store = Store(self.directory, files=self.files)
        self.swept: list[str] = []
        retain = retain or partial(to_delete, keep_last=3, keep_best=0, keep_every=None)
        self._committer = Committer(self.store, files=self.files, retain=retain)
        self._dictation = Dictation(self.directory, committer=self._committer, files=self.files, note=self.note)
        self._lock = lock
        self._command = command
        self._events: Journal | None = None
        self.on_event: Callable[[Path, Mapping[str, Any]], None] | None = None  # is told what is noted
        self._in_flight: PendingSnapshot | None = None
        self._planner = Planner()
        self._arena = Arena()
        self._staging = staging
        self._fence: Fence | None = None
        self._worked = Worked()
        self._step_noted_at = -math.inf
        self._watch: modes.StepWatch | None = None
        self._is_half_restored = False
        self.costs: deque[float] = deque(maxlen=50)  # seconds from capture to durable of the newest snapshots

    # -- life -------------------------------------------------------------------------------------

    def open(self) -> Self:
        """Take the lock, and sweep what dead processes left unfinished.

        Raises:
            RunHeldError: Another process holds the run.
            SettingsError: A link stands where the run keeps a file of its own.
            SnapshotWriteError: The directory cannot be written to.
        """
        try:
            with usable(self.directory):
                self._open()
        except BaseException:
            if self._lock is not None:
                self._lock.release()
            raise
        return self

    def _open(self) -> None:
        make_directories(self.files, self.directory)
        refuse_links(self.directory, OWN_NAMES)
        if self._lock is None:
            self._lock = RunLock(self.directory / RUN_LOCK)
        if not self._lock.is_held:
            self._lock.acquire(known_generation=self._newest_generation(), command=self._command)
        self._events = Journal.open(self.directory / EVENTS, files=self.files)
        if self._staging == "overlapped":
            self._fence = Fence(self.state, self.settle)
        # Crash here: nothing but unfinished directories is gone; the sweep begins anew at the next start.
        self.swept = self.store.sweep()

    def close(self) -> None:
        """Wait for the snapshot in flight and release the lock.

        Raises:
            SnapshotWriteError: The snapshot in flight could not be made durable.
        """
        try:
            self.wait()
            self.settle()
        finally:
            if self._fence is not None:
                self._fence.close()
                self._fence = None
            try:
                self._dictation.close()
                if self._events is not None:
                    self._events.close()
            finally:
                self._events = None
                if self._lock is not None:
                    self._lock.release()
                    self._lock = None

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def latest(self) -> str | None:
        """Name of the newest snapshot that this process knows to be durable."""
        newest = self._committer.newest
        return None if newest is None else newest.name

    @property
    def is_writing(self) -> bool:
        """Whether a snapshot is in flight: neither known to be durable nor to have failed."""
        return self._in_flight is not None

    @property
    def lock(self) -> RunLock:
        """The run's lock, held while the manager is open."""
        if self._lock is None or self._events is None:
            raise UsageError(
                f"the state manager of {self.directory} is not open",
                path=self.directory,
                hint="use it in a with statement, or call open()",
            )
        return self._lock

    def note(self, event: str, **fields: Any) -> None:
        """Append a row to the run's events, with the time and the generation."""
        generation = self.lock.generation
        assert self._events is not None
        row = {"event": event, "time": _now(), "generation": generation, **fields}
        self._events.append(row)
        self._events.flush()
        if self.on_event is not None:
            self.on_event(self.directory, row)

    def _newest_generation(self) -> int:
        """Generation of the newest readable manifest: the lock file itself may have been lost."""
        for name in reversed(self.store.names()):
            try:
                return self.store.manifest(name).generation
            except (DamagedSnapshotError, SnapshotGoneError):
                continue
        return 0

    # -- saving -----------------------------------------------------------------------------------

    def watch_gradients(self, watch: modes.StepWatch) -> None:
        """Let `watch` say whose gradients an optimizer step has used; without one all are saved."""
        self._watch = watch

    def capture(self, sections: Mapping[str, object] | None = None) -> Flat:
        """The whole state taken apart: values as they are now, tensors live, not copied.

        Args:
            sections: Trees to be saved beside the parts. `"generators"`, if given, stands in for the
                global generators as they are now.

        Raises:
            UnsafeValueError: A value of the state has no safe form on disk.
        """
        used = self._watch.used_gradients() if self._watch is not None else set()
        gradients = modes.capture_gradients(self.state, used=used)
        trees: dict[str, object] = {name: _tree_of(part) for name, part in self.state.items()}
        trees["modes"] = modes.capture_modes(self.state)
        trees["gradients"] = gradients
        trees.update(sections or {})
        if "generators" not in trees:
            trees["generators"] = generators.capture_global()
        return self._planner.flatten(trees, self._lying_apart(trees))

    def _lying_apart(self, trees: Mapping[str, Any]) -> dict[str, list[str]]:
        """Tensors of each module that get a file of their own: those that are not trained, if they are worth it."""
        frozen = {name: found["frozen"] for name, found in trees["modes"].items() if name + FROZEN not in trees}
        return {name: keys for name, keys in frozen.items() if keys and _num_bytes(trees[name], keys) >= WORTH_BYTES}

    def stage(self, captured: Flat) -> Flat:
        """A copy of a captured state that later training cannot change; blocks for one memory copy.

        It lies in memory that is used again: good until the next call, which first waits for the snapshot in flight.
        With overlapped staging it is there when the next step of an optimizer begins, and no sooner.

        Raises:
            SnapshotWriteError: The snapshot in flight could not be made durable.
        """
        self.wait()
        later = self._changed_by_steps_alone(captured) if self._fence is not None else set()
        tensors = self._arena.stage(captured.tensors, structure=captured.structure, later=later)
        return Flat(captured.values, tensors, captured.structure)

    def settle(self) -> None:
        """Block until the state that was staged last is copied; with the default staging it always is.

        Raises:
            UsageError: It was changed meanwhile by something else than an optimizer's step.
        """
        self._arena.settle()

    def _changed_by_steps_alone(self, captured: Flat) -> set[tuple[str, str]]:
        kinds = (nn.Module, Optimizer)
        others = [values for name, values in captured.values.items() if not isinstance(self.state.get(name), kinds)]
        return changed_by_steps_alone(self.state, captured.tensors, {*references(others)})

    def write(
        self,
        staged: Flat,
        facts: Facts,
        *,
        background: bool = True,
        rows: Rows | None = None,
    ) -> PendingSnapshot:
        """Write a staged state and commit it.

        Args:
            staged: What `stage` gave.
            facts: What the manifest is to say.
            background: Return at once and write beside the training; waits first for a snapshot in flight.
            rows: What the manifest speaks of (the metric journal): made durable before the manifest is written.

        Raises:
            SnapshotWriteError: This one (if not in the background) or the one before it could not
                be made durable.
        """
        _ = self.lock
        self.wait()
        content = StateFiles(staged, self._worked)
        write = partial(self._write_and_commit, content, facts, rows)
        # What is staged while training goes on is not there yet to be dictated.
        pending = self._dictated(content, facts, rows, write) if background and self._fence is None else None
        if pending is None:
            whole = partial(_one_after_the_other, self._arena.ready(), yield_to_training if background else int, write)
            pending = PendingSnapshot(facts.name, whole, background=background)
        self._in_flight = pending
        return pending

    def _dictated(
        self, content: StateFiles, facts: Facts, rows: Rows | None, write: Callable[[], None]
    ) -> PendingSnapshot | None:
        file = None if rows is None else rows.whole_file
        if rows is not None and file is None:
            return None
        draft = Draft(
            kept=facts.kept,
            content=content,
            fields=partial(self._manifest_fields, facts),
            rows=file,
            committed=partial(self._note_committed, facts),
            otherwise=write,
        )
        return self._dictation.take(draft, self.lock)

    def snapshot(
        self,
        *,
        epoch: int,
        batch: int,
        step: int,
        metrics: Mapping[str, float] | None = None,
        background: bool = True,
    ) -> PendingSnapshot:
        """Save the whole state as it is now, at the given position.

        `batch=0` with `epoch>0` means that `epoch` epochs are complete. Blocks for one memory copy
        of the state, and for the snapshot before it.

        Raises:
            SettingsError: A position that cannot be.
            SnapshotWriteError: The snapshot before this one could not be made durable.
            UnsafeValueError: A value of the state has no safe form on disk.
            UsageError: A restore has failed half-way, and none has succeeded since.
        """
        if min(epoch, batch, step) < 0:
            raise SettingsError(f"snapshot: position epoch={epoch} batch={batch} step={step} is negative")
        if self._is_half_restored:
            raise UsageError(
                f"snapshot: a restore from {self.directory} has failed while it wrote into the parts, so that they hold"
                " no state of the training",
                path=self.directory,
                hint="restore a snapshot that is valid, or start again",
            )
        position = Position(epoch=epoch, batch=batch, step=step)
        complete = batch == 0 and epoch > 0
        facts = Facts(position=position, epoch_complete=complete, metrics=dict(metrics or {}))
        return self.write(self.stage(self.capture()), facts, background=background)

    def wait(self) -> None:
        """Block until the snapshot in flight is durable; raise what went wrong with it."""
        pending, self._in_flight = self._in_flight, None
        if pending is not None:
            pending.wait()

    def poll(self) -> None:
        """Raise the error of a snapshot that has failed meanwhile; never blocks."""
        if self._in_flight is not None and self._in_flight.done:
            self.wait()

    def _write_and_commit(self, content: StateFiles, facts: Facts, rows: Rows | None) -> None:
        started = time.monotonic()
        retained = facts.kept
        hooks = Hooks(
            check=self.lock.check,
            before_manifest=rows.sync if rows is not None else (lambda: None),
            manifest=partial(self._manifest, facts),
            note=self.note,
        )
        try:
            manifest = self._committer.commit(content, retained, hooks)
        except RunHeldError:
            raise
        except OSError as error:
            raise self._write_error(facts.name, error) from error
        if manifest is None:
            return
        self._worked.unchanged.committed(self.store.path(facts.name), manifest.files)
        self._note_committed(facts, manifest.total_bytes, time.monotonic() - started)
        self._committer.retire(retained, self.note)

    def _note_committed(self, facts: Facts, num_bytes: int, seconds: float) -> None:
        self.note(
            "committed",
            snapshot=facts.name,
            step=facts.position.step,
            bytes=num_bytes,
            seconds=round(seconds, 6),
            taken=facts.taken,
            stall_seconds=round(facts.stall_seconds, 6),
        )
        self.costs.append(seconds + facts.stall_seconds)
        now = time.monotonic()
        if now - self._step_noted_at >= _NOTE_STEP_SECONDS:
            self._step_noted_at = now
            self.lock.note_step(facts.position.step)

    def _write_error(self, name: str, error: OSError) -> SnapshotWriteError:
        last = self.latest
        reason = error.message if isinstance(error, ResumableTrainerError) else str(error)
        return SnapshotWriteError(
            f"snapshot {name} in {self.directory} was NOT saved: {reason}; "
            + (f"the last durable one is {last}" if last else "there is no durable one yet"),
            path=self.directory,
            hint="free space or repair the disk, then start the same command again",
        )

    def _manifest(self, facts: Facts, entries: Mapping[str, FileEntry]) -> Manifest:
        return Manifest.model_validate({**self._manifest_fields(facts), "files": dict(entries)})

    def _manifest_fields(self, facts: Facts) -> dict[str, Any]:
        """All fields of the manifest but `files`, as plain values."""
        best, parent = facts.best, self._committer.newest
        return {
            "run_id": self.run_id,
            "generation": self.lock.generation,
            "name": facts.name,
            "position": vars(facts.position),
            "epoch_complete": facts.epoch_complete,
            "parent": parent.name if parent else None,
            "parent_digest": parent.own_digest if parent else None,
            "created": _now(),
            "journal": None if facts.journal is None else vars(facts.journal),
            "outcome": facts.outcome,
            "best": None if best is None else vars(best),
            "metrics": dict(facts.metrics),
            "settings": dict(facts.settings),
            "depends_on": dict(facts.depends_on),
            "saved_by": dict(facts.saved_by),
        }

    # -- restoring --------------------------------------------------------------------------------

    def restore(self, which: str = "latest") -> RestoreReport:
        """Put a snapshot's state into the parts.

        Args:
            which: "latest" (the newest that verifies), "best", a step ("400"), "epoch:N", or a name.
                Choosing an older one sets newer ones aside; nothing is deleted.

        Returns:
            A report; `report.snapshot` is None if the run has no snapshots yet.

        Raises:
            NoValidSnapshotError: There are snapshots and none is valid. Nothing was touched, unless there are several
                and the newest was found to be damaged only when its tensors had been read: the parts must not be
                used then, and `snapshot` refuses to save them.
            NotFoundError: The snapshot asked for is not there.
            StateMismatchError: What was saved does not fit the parts; nothing was touched.
        """
        found = self.find(which, reading_next=True)
        if found.manifest is None:
            return found
        report = self.apply_or_fall_back(found)
        self.set_aside(report.set_aside, reason=f"going back to {report.snapshot}")
        return report

    def find(self, which: str = "latest", *, reading_next: bool = False) -> RestoreReport:
        """Choose and verify a snapshot, quarantine damaged ones, and restore nothing yet.

        Args:
            which: See `restore`.
            reading_next: Where there is an older one to fall back to, leave the tensors of the newest to be checked
                while they are read: `apply_or_fall_back` is called next.
        """
        self.wait()
        self.settle()
        _ = self.lock
        self._dictation.close()  # a scribe knows the line that is left
        with usable(self.directory):
            return self._find(which, reading_next=reading_next)

    def _find(self, which: str, *, reading_next: bool) -> RestoreReport:
        quarantined: dict[str, str] = {}
        unread = self.store.newest_to_read() if reading_next and which == "latest" else None
        newer: list[str] = []
        if unread is not None:
            manifest: Manifest | None = unread
        elif which == "latest":
            manifest = self.store.newest_valid(on_damage=lambda name, e: quarantined.update({name: e.message}))
            for name, reason in quarantined.items():
                self.quarantine(name, reason)
        else:
            if not self.store.names():
                raise NotFoundError(
                    f"{self.directory} has no snapshots, so none is {which!r}",
                    path=self.directory,
                    found=which,
                )
            name = self.store.select(which)
            manifest = self.store.verify(name)
            newer = [other for other in self.store.names() if _order(other) > _order(name)]
        self._committer.continue_from(Newest.of(manifest))
        if manifest is None:
            self._worked.unchanged.start_from(None, {})
            return RestoreReport()
        self._worked.unchanged.start_from(self.store.path(manifest.name), manifest.files)
        if self.run_id and manifest.run_id and manifest.run_id != self.run_id:
            raise StateMismatchError(
                f"snapshot {manifest.name} in {self.directory} belongs to run {manifest.run_id}, not {self.run_id}",
                path=self.directory,
                found=manifest.run_id,
                expected=self.run_id,
            )
        return RestoreReport(
            snapshot=manifest.name,
            manifest=manifest,
            quarantined=quarantined,
            set_aside=tuple(newer),
            is_verified=unread is None,
        )

    def quarantine(self, name: str, reason: str) -> None:
        """Move a damaged snapshot aside, with the reason; nothing is deleted."""
        self.store.quarantine(name, reason)
        self.note("quarantined", snapshot=name, reason=reason)

    def set_aside(self, names: Sequence[str], *, reason: str) -> None:
        """Move valid snapshots of an abandoned line aside; nothing is deleted."""
        if names:
            with usable(self.directory):
                target = self.store.set_aside(names, reason)
            self.note("set_aside", snapshots=list(names), to=str(target), reason=reason)
            self._committer.continue_from(self._committer.newest)

    def apply_or_fall_back(self, found: RestoreReport) -> RestoreReport:
        """`apply` what was found; if it turns out to be damaged while it is read, the newest valid one instead.

        All that the damaged one has left in the parts is written over: every part is restored whole.
        """
        try:
            return self.apply(found)
        except DamagedSnapshotError:
            if found.is_verified:
                raise
        return self.apply(self.find())

    def apply(self, found: RestoreReport, *, strictly: bool = True) -> RestoreReport:
        """Put the chosen snapshot into the parts, and the global generators last.

        Args:
            found: What `find` gave.
            strictly: Compare all parts first, and each afterwards with what was put in.

        Returns:
            The report with the other sections that were saved, and notes for a person.
        """
        assert found.manifest is not None
        self.settle()
        name = found.manifest.name
        with (
            filling.without_collections(),
            OpenSnapshot(self.store.path(name), found.manifest, is_verified=found.is_verified) as snapshot,
        ):
            with usable(self.directory):
                fillings, sections = self._read(snapshot, name, strictly=strictly)
            own = {part: sections.pop(part) for part in list(sections) if part in self.state}
            notes = self._restore_parts(snapshot, fillings, own, strictly=strictly)
        try:
            notes += self._apply_own(sections)
        except BAD_VALUES as error:
            raise DamagedSnapshotError(
                f"snapshot {found.manifest.name} in {self.directory} holds generators, gradients or modes that this"
                f" version does not write: {error}",
                path=self.store.path(found.manifest.name),
            ) from error
        self._is_half_restored = False
        return replace(
            found,
            sections=sections,
            is_verified=True,
            absent=tuple(name for name in ("generators", "gradients", "modes") if name not in sections),
            notes=tuple(notes),
        )

    def _read(
        self, snapshot: OpenSnapshot, name: str, *, strictly: bool
    ) -> tuple[dict[str, filling.Filling], dict[str, Any]]:
        """Which parts are to be filled, and all else that was saved; nothing is touched.

        Raises:
            StateMismatchError: The parts are compared, and do not fit.
        """
        parts = [part for part in self.state if part in snapshot.names]
        outlined = [part for part in parts if filling.can_plan(self.state[part])]
        trees = snapshot.outlines(outlined, filling.Stored)
        plans = {part: filling.plan(part, self.state[part], tree) for part, tree in trees.items()}
        fitting = {part: plan for part, plan in plans.items() if plan is not None}
        if strictly:
            self._check_fit(snapshot, name, {part: trees.get(part) for part in parts}, fitting=fitting)
        fillings = filling.without_overlaps(
            {part: plan for part, plan in fitting.items() if snapshot.fills(part, plan.targets)}
        )
        snapshot.check(but=fillings)
        sections, shared = snapshot.sections(but=fillings)
        if any(fillings[part].keeps_targets for part in shared):  # two parts are to hold the very same tensor again
            fillings = {}
            snapshot.check()
            sections, _ = snapshot.sections()
        return fillings, sections

    def _restore_parts(
        self,
        snapshot: OpenSnapshot,
        fillings: Mapping[str, filling.Filling],
        own: Mapping[str, Any],
        *,
        strictly: bool,
    ) -> list[str]:
        """Put the saved state into each part in turn; notes for a person."""
        notes = []
        for name, part in self.state.items():
            if name in fillings:
                self._is_half_restored = True
                with usable(self.directory):
                    snapshot.fill(name, fillings[name].targets)
                self._is_half_restored = False
                wrong = fillings[name].filled()
            else:
                restore_part(name, part, own[name])
                wrong = unfaithful(name, part, own[name]) if strictly else []
            if wrong and strictly:
                notes.append(
                    f"part {name!r} does not give back what was put in, so it may not resume exactly: {wrong[0]}"
                )
        return notes

    def _apply_own(self, sections: Mapping[str, Any]) -> list[str]:
        """Put back what is saved beside the parts; notes for a person."""
        if "modes" in sections:
            modes.restore_modes(self.state, sections["modes"])
        used = modes.restore_gradients(self.state, sections["gradients"]) if "gradients" in sections else set()
        if self._watch is not None:
            self._watch.resume(used)
        # Invariant: generators come last, so that nothing above can draw from what was restored.
        return generators.restore_global(sections["generators"]) if "generators" in sections else []

    def _check_fit(
        self,
        snapshot: OpenSnapshot,
        name: str,
        saved: Mapping[str, object],
        *,
        fitting: Collection[str],
    ) -> None:
        """Every mismatch in one error, before anything is touched; `fitting` are parts that are known to fit."""
        unknown = [other for other in snapshot.names if other not in self.state and other not in RESERVED_NAMES]
        lines = [f"part {part!r} is not in the snapshot" for part in self.state if part not in saved]
        lines += [f"part {other!r} is in the snapshot, the script hands over none" for other in unknown]
        for part in self.state:
            if part in saved and part not in fitting:
                lines += mismatches(part, self.state[part], saved[part])
        if lines:
            snapshot.check()  # what is damaged may be taken for what does not fit
            raise StateMismatchError(
                f"snapshot {name} in {self.directory} does not fit the script:\n  " + "\n  ".join(lines) + "\n",
                path=self.directory,
                found=lines,
                hint="restore the script's old model, or start a new line with: resumable-trainer run --fresh ...",
            )


@contextlib.contextmanager
def usable(directory: Path) -> Iterator[None]:
    """An error of the disk in this block is said as one about the run directory.

    Raises:
        SnapshotWriteError: The directory cannot be read or written as a run needs it.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, ResumableTrainerError):
            raise
        raise SnapshotWriteError(
            f"run directory {directory} cannot be used: {error}",
            path=directory,
            hint="make it readable and writable, or repair its disk; then start the same command again",
        ) from error


def _tree_of(part: object) -> object:
    tensors = live_tensors(part) if isinstance(part, nn.Module) else None
    return capture_part(part) if tensors is None else Plain(tensors)


def _num_bytes(tree: Mapping[str, Any], keys: Sequence[str]) -> int:
    tensors = [tree[key] for key in keys if isinstance(tree.get(key), torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _one_after_the_other(*steps: Callable[[], object]) -> None:
    for step in steps:
        step()


def _order(name: str) -> tuple[int, bool, int]:
    parsed = parse_name(name)
    assert parsed is not None
    return parsed.order


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")

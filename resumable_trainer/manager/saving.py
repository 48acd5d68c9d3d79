"""From a staged state to a durable snapshot: beside the training, one at a time.

Small ones that come often are dictated to another process, all others are written by a thread of this one.
"""

from __future__ import annotations

import math
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

from resumable_trainer.durable.priority import yield_to_training
from resumable_trainer.errors import ResumableTrainerError, RunHeldError, SnapshotWriteError
from resumable_trainer.manager import held
from resumable_trainer.snapshot.committer import Committer, Hooks, Newest
from resumable_trainer.snapshot.dictation import Dictation, Draft
from resumable_trainer.snapshot.manifest import Manifest
from resumable_trainer.snapshot.pending import PendingSnapshot
from resumable_trainer.snapshot.writer import StateFiles, Worked

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from resumable_trainer.manager.facts import Facts, Rows
    from resumable_trainer.snapshot.manifest import FileEntry
    from resumable_trainer.snapshot.retention import Kept
    from resumable_trainer.snapshot.tree import Flat

_NOTE_STEP_SECONDS = 1.0  # the step in the lock's record is for people


class Saving:
    """Commits staged states of one run, one at a time.

    Args:
        run: The run, held while anything is written.
        retain: Which snapshots to delete, given all of them, oldest first.

    Attributes:
        costs: Seconds from capture to durable of the newest snapshots.
    """

    def __init__(self, run: held.HeldRun, *, retain: Callable[[Sequence[Kept]], list[str]]) -> None:
        self.costs: deque[float] = deque(maxlen=50)
        self._run = run
        self._committer = Committer(run.store, files=run.files, retain=retain)
        self._dictation = Dictation(run.directory, committer=self._committer, files=run.files, note=run.note)
        self._worked = Worked()
        self._in_flight: PendingSnapshot | None = None
        self._step_noted_at = -math.inf

    @property
    def latest(self) -> str | None:
        """Name of the newest snapshot that is known to be durable."""
        newest = self._committer.newest
        return None if newest is None else newest.name

    @property
    def is_writing(self) -> bool:
        """Whether a snapshot is in flight: neither known to be durable nor to have failed."""
        return self._in_flight is not None

    def continue_from(self, manifest: Manifest | None) -> None:
        """The snapshot that the next one follows; nothing is known of any other. None is in flight."""
        self.close()  # a scribe knows the line that was
        self._committer.continue_from(Newest.of(manifest))
        if manifest is None:
            self._worked.unchanged.start_from(None, {})
        else:
            self._worked.unchanged.start_from(self._run.store.path(manifest.name), manifest.files)

    def look_again(self) -> None:
        """Snapshots were taken away; the newest is as before."""
        self._committer.continue_from(self._committer.newest)

    def write(
        self,
        staged: Flat,
        facts: Facts,
        *,
        arrival: Callable[[], object] | None,
        background: bool,
        rows: Rows | None,
    ) -> PendingSnapshot:
        """Write a staged state and commit it.

        Args:
            staged: The state.
            facts: What the manifest is to say.
            arrival: Blocks until all of the state is there; None if it is.
            background: Return at once and write beside the training; waits first for a snapshot in flight.
            rows: What the manifest speaks of: made durable before the manifest is written.
        """
        self.wait()
        content = StateFiles(staged, self._worked)
        commit = partial(self._commit, content, facts, rows)
        pending = self._dictated(content, facts, rows, commit) if background and arrival is None else None
        if pending is None:
            write = partial(self._write_here, facts, arrival, commit, background=background)
            pending = PendingSnapshot(facts.name, write, background=background)
        self._in_flight = pending
        return pending

    def wait(self) -> None:
        """Block until the snapshot in flight is durable; raise what went wrong with it."""
        pending, self._in_flight = self._in_flight, None
        if pending is not None:
            pending.wait()

    def poll(self) -> None:
        """Raise the error of a snapshot that has failed meanwhile; never blocks."""
        if self._in_flight is not None and self._in_flight.done:
            self.wait()

    def close(self) -> None:
        """End the process that is dictated to; no snapshot may be in flight."""
        self._dictation.close()

    def _dictated(
        self, content: StateFiles, facts: Facts, rows: Rows | None, commit: Callable[[], None]
    ) -> PendingSnapshot | None:
        """None if it is to be written in this process."""
        file = None if rows is None else rows.whole_file
        if rows is not None and file is None:
            return None
        draft = Draft(
            kept=facts.kept,
            content=content,
            fields=partial(self._manifest_fields, facts),
            rows=file,
            committed=partial(self._note_committed, facts),
            otherwise=commit,
        )
        return self._dictation.take(draft, self._run.lock)

    def _write_here(
        self, facts: Facts, arrival: Callable[[], object] | None, commit: Callable[[], None], *, background: bool
    ) -> None:
        if arrival is not None:
            try:
                arrival()
            except SnapshotWriteError as error:
                raise self._not_saved(facts.name, error) from error
        if background:
            yield_to_training()
        commit()

    def _commit(self, content: StateFiles, facts: Facts, rows: Rows | None) -> None:
        started = time.monotonic()
        retained = facts.kept
        hooks = Hooks(
            check=self._run.lock.check,
            before_manifest=rows.sync if rows is not None else (lambda: None),
            manifest=partial(self._manifest, facts),
            note=self._run.note,
        )
        try:
            manifest = self._committer.commit(content, retained, hooks)
        except RunHeldError:
            raise
        except OSError as error:
            raise self._not_saved(facts.name, error) from error
        if manifest is None:
            return
        self._worked.unchanged.committed(self._run.store.path(facts.name), manifest.files)
        self._note_committed(facts, manifest.total_bytes, time.monotonic() - started)
        self._committer.retire(retained, self._run.note)

    def _note_committed(self, facts: Facts, num_bytes: int, seconds: float) -> None:
        self._run.note(
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
            self._run.lock.note_step(facts.position.step)

    def _not_saved(self, name: str, error: OSError) -> SnapshotWriteError:
        last = self.latest
        reason, hint = (error.message, error.hint) if isinstance(error, ResumableTrainerError) else (str(error), None)
        return SnapshotWriteError(
            f"snapshot {name} in {self._run.directory} was NOT saved: {reason}; "
            + (f"the last durable one is {last}" if last else "there is no durable one yet"),
            path=self._run.directory,
            hint=hint or "free space or repair the disk, then start the same command again",
        )

    def _manifest(self, facts: Facts, entries: Mapping[str, FileEntry]) -> Manifest:
        return Manifest.model_validate({**self._manifest_fields(facts), "files": dict(entries)})

    def _manifest_fields(self, facts: Facts) -> dict[str, Any]:
        """All fields of the manifest but `files`, as plain values."""
        parent = self._committer.newest
        return {
            "run_id": self._run.run_id,
            "generation": self._run.lock.generation,
            "parent": parent.name if parent else None,
            "parent_digest": parent.own_digest if parent else None,
            "created": held.now(),
            **facts.fields(),
        }

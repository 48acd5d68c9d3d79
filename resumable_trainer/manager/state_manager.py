"""StateManager: capture, save and restore the parts of a training, in one run directory."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal, Self

from resumable_trainer.data.worker_deaths import told_afterwards
from resumable_trainer.errors import DamagedSnapshotError, SettingsError, UsageError
from resumable_trainer.manager.applying import Applying
from resumable_trainer.manager.capturing import Capturing
from resumable_trainer.manager.facts import Facts
from resumable_trainer.manager.held import HeldRun
from resumable_trainer.manager.line import Line
from resumable_trainer.manager.saving import Saving
from resumable_trainer.snapshot.layout import Position
from resumable_trainer.snapshot.retention import to_delete
from resumable_trainer.state.parts import check_parts

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence

    from resumable_trainer.durable.files import Files
    from resumable_trainer.durable.lock import RunLock
    from resumable_trainer.manager.facts import Rows
    from resumable_trainer.manager.line import RestoreReport
    from resumable_trainer.snapshot.pending import PendingSnapshot
    from resumable_trainer.snapshot.retention import Kept
    from resumable_trainer.snapshot.tree import Flat
    from resumable_trainer.state.modes import StepWatch

Staging = Literal["copy", "overlapped"]


class StateManager(HeldRun):
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

    Attributes:
        state: Parts by name.
        costs: Seconds from capture to durable of the newest snapshots.

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
        super().__init__(directory, lock=lock, command=command, files=files)
        self.state = dict(state)
        self._capturing = Capturing(self.state)
        self._saving = Saving(self, retain=retain or partial(to_delete, keep_last=3, keep_best=0, keep_every=None))
        self._line = Line(self, self._saving)
        self._applying = Applying(self, self.state)
        self._staging = staging
        self._watch: StepWatch | None = None
        self.costs = self._saving.costs

    # -- life -------------------------------------------------------------------------------------

    def open(self) -> Self:
        """Take the lock, and sweep what dead processes left unfinished.

        Raises:
            RunHeldError: Another process holds the run.
            SettingsError: A link stands where the run keeps a file of its own.
            SnapshotWriteError: The directory cannot be written to.
        """
        super().open()
        if self._staging == "overlapped":
            self._capturing.overlap()
        return self

    def close(self) -> None:
        """Wait for the snapshot in flight and release the lock.

        Raises:
            SnapshotWriteError: The snapshot in flight could not be made durable.
        """
        try:
            self.wait()
            self.settle()
        finally:
            self._capturing.close()
            try:
                self._saving.close()
            finally:
                super().close()

    @property
    def latest(self) -> str | None:
        """Name of the newest snapshot that this process knows to be durable."""
        return self._saving.latest

    @property
    def is_writing(self) -> bool:
        """Whether a snapshot is in flight: neither known to be durable nor to have failed."""
        return self._saving.is_writing

    # -- saving -----------------------------------------------------------------------------------

    def watch_gradients(self, watch: StepWatch) -> None:
        """Let `watch` say whose gradients an optimizer step has used; without one all are saved."""
        self._watch = watch

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
        of the state on the CPU, and for the snapshot before it; what is on CUDA devices arrives beside the training.

        Raises:
            SettingsError: A position that cannot be.
            SnapshotWriteError: The snapshot before this one could not be made durable.
            UnsafeValueError: A value of the state has no safe form on disk.
            UsageError: A restore has failed half-way, and none has succeeded since.
        """
        if min(epoch, batch, step) < 0:
            raise SettingsError(f"snapshot: position epoch={epoch} batch={batch} step={step} is negative")
        if self._applying.is_half_done:
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

    @told_afterwards
    def capture(self, sections: Mapping[str, object] | None = None) -> Flat:
        """The whole state taken apart: values as they are now, tensors live, not copied.

        Args:
            sections: Trees to be saved beside the parts. `"generators"`, if given, stands in for the
                global generators as they are now.

        Raises:
            UnsafeValueError: A value of the state has no safe form on disk.
        """
        return self._capturing.capture(sections or {}, self._watch)

    @told_afterwards
    def stage(self, captured: Flat) -> Flat:
        """A copy of a captured state that later training cannot change; blocks for one memory copy.

        It lies in memory that is used again: good until the next call, which first waits for the snapshot in flight.
        With overlapped staging it is there when the next step of an optimizer begins, and no sooner. What is on CUDA
        devices is copied there, as their current streams have it, and is there after `settle`; `write` waits by itself.

        Raises:
            SnapshotWriteError: The snapshot in flight could not be made durable.
        """
        self.wait()
        return self._capturing.stage(captured)

    def let_go(self) -> None:
        """Block until training may change what was staged last; with the default staging it always may.

        Raises:
            UsageError: It was changed meanwhile by something else than an optimizer's step.
        """
        self._capturing.let_go()

    def settle(self) -> None:
        """Block until the state that was staged last is copied; from the CPU, with the default staging, it always is.

        Raises:
            SnapshotWriteError: It could not be copied from a device.
            UsageError: It was changed meanwhile by something else than an optimizer's step.
        """
        self._capturing.settle()

    @told_afterwards
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
        return self._saving.write(staged, facts, arrival=self._capturing.arrival(), background=background, rows=rows)

    @told_afterwards
    def wait(self) -> None:
        """Block until the snapshot in flight is durable; raise what went wrong with it."""
        self._saving.wait()

    def poll(self) -> None:
        """Raise the error of a snapshot that has failed meanwhile; never blocks."""
        self._saving.poll()

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

    @told_afterwards
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
        return self._line.find(which, reading_next=reading_next)

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

    @told_afterwards
    def apply(self, found: RestoreReport, *, strictly: bool = True) -> RestoreReport:
        """Put the chosen snapshot into the parts, and the global generators last.

        Args:
            found: What `find` gave.
            strictly: Compare all parts first, and each afterwards with what was put in.

        Returns:
            The report with the other sections that were saved, and notes for a person.
        """
        self.settle()
        return self._applying.apply(found, strictly=strictly, watch=self._watch)

    @told_afterwards
    def quarantine(self, name: str, reason: str) -> None:
        """Move a damaged snapshot aside, with the reason; nothing is deleted."""
        self._line.quarantine(name, reason)

    @told_afterwards
    def set_aside(self, names: Sequence[str], *, reason: str) -> None:
        """Move valid snapshots of an abandoned line aside; nothing is deleted."""
        self._line.set_aside(names, reason)

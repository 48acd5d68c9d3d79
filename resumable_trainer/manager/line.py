"""The line of snapshots that a run goes on from: one is chosen and verified, others leave the line, none is deleted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from resumable_trainer.errors import NotFoundError, StateMismatchError
from resumable_trainer.manager.held import usable
from resumable_trainer.snapshot.layout import parse_name

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from resumable_trainer.manager.held import HeldRun
    from resumable_trainer.manager.saving import Saving
    from resumable_trainer.snapshot.manifest import Manifest


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


class Line:
    """Chooses where a run goes on.

    Args:
        run: The run, held.
        saving: Is told what the next snapshot follows.
    """

    def __init__(self, run: HeldRun, saving: Saving) -> None:
        self._run = run
        self._saving = saving

    def find(self, which: str, *, reading_next: bool) -> RestoreReport:
        """Choose and verify a snapshot, and quarantine damaged ones; the next one that is saved follows it.

        Args:
            which: "latest" (the newest that verifies), "best", a step ("400"), "epoch:N", or a name.
            reading_next: Where there is an older one to fall back to, leave the tensors of the newest to be checked
                while they are read.
        """
        with usable(self._run.directory):
            found = self._latest(reading_next=reading_next) if which == "latest" else self._named(which)
            self._saving.continue_from(found.manifest)
        manifest = found.manifest
        if manifest is not None and not self._is_ours(manifest):
            raise StateMismatchError(
                f"snapshot {manifest.name} in {self._run.directory} belongs to run {manifest.run_id},"
                f" not {self._run.run_id}",
                path=self._run.directory,
                found=manifest.run_id,
                expected=self._run.run_id,
            )
        return found

    def _is_ours(self, manifest: Manifest) -> bool:
        """Whether it belongs to this run; where one of the two does not say, it does."""
        return not (self._run.run_id and manifest.run_id) or manifest.run_id == self._run.run_id

    def _latest(self, *, reading_next: bool) -> RestoreReport:
        unread = self._run.store.newest_to_read() if reading_next else None
        if unread is not None:
            return RestoreReport(snapshot=unread.name, manifest=unread, is_verified=False)
        damaged: dict[str, str] = {}
        manifest = self._run.store.newest_valid(on_damage=lambda name, e: damaged.update({name: e.message}))
        for name, reason in damaged.items():
            self.quarantine(name, reason)
        if manifest is None:
            return RestoreReport()
        return RestoreReport(snapshot=manifest.name, manifest=manifest, quarantined=damaged)

    def _named(self, which: str) -> RestoreReport:
        store = self._run.store
        if not store.names():
            raise NotFoundError(
                f"{self._run.directory} has no snapshots, so none is {which!r}",
                path=self._run.directory,
                found=which,
            )
        name = store.select(which)
        manifest = store.verify(name)
        newer = tuple(other for other in store.names() if _order(other) > _order(name))
        return RestoreReport(snapshot=manifest.name, manifest=manifest, set_aside=newer)

    def quarantine(self, name: str, reason: str) -> None:
        """Move a damaged snapshot aside, with the reason; nothing is deleted."""
        self._run.store.quarantine(name, reason)
        self._run.note("quarantined", snapshot=name, reason=reason)

    def set_aside(self, names: Sequence[str], reason: str) -> None:
        """Move valid snapshots of an abandoned line aside; nothing is deleted."""
        if names:
            with usable(self._run.directory):
                target = self._run.store.set_aside(names, reason)
            self._run.note("set_aside", snapshots=list(names), to=str(target), reason=reason)
            self._saving.look_again()


def _order(name: str) -> tuple[int, bool, int]:
    parsed = parse_name(name)
    assert parsed is not None
    return parsed.order

"""From a state taken apart to a durable snapshot: room, attempts, commit, retention.

Policy: an attempt that meets an error is thrown away whole, and the next one writes new files; a file
whose sync failed is never synced again. What may pass (an I/O error) is tried again at once, what stays
(a full or read-only disk, a directory that is gone) is left to the next snapshot. Nothing old goes for
a new one but what retention would delete once the new one is there, and that only when room is short;
the newest durable snapshot always stays.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from resumable_trainer.durable.files import remove_tree
from resumable_trainer.durable.filesystem import room, shortage
from resumable_trainer.errors import DamagedSnapshotError, RunHeldError, SnapshotGoneError
from resumable_trainer.snapshot.manifest import from_bytes
from resumable_trainer.snapshot.retention import kept_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from resumable_trainer.durable.files import Files
    from resumable_trainer.snapshot.manifest import FileEntry, Manifest
    from resumable_trainer.snapshot.retention import Kept
    from resumable_trainer.snapshot.store import Store

_ATTEMPTS = 3
_LASTING = frozenset(
    (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
        errno.ENOENT,
        errno.ENOTDIR,
    )
)


class Content(Protocol):
    """What a snapshot holds beside its manifest."""

    def size(self) -> tuple[int, int]:
        """Bytes that it takes, the manifest included, and how many new files and directories."""

    def writing(self, files: Files, directory: Path) -> AbstractContextManager[Mapping[str, FileEntry]]:
        """Write every file; what the manifest is to say of each. All are synced when the block has been left."""


@dataclass(frozen=True)
class Newest:
    """The newest durable snapshot.

    Attributes:
        name: Its name.
        own_digest: Digest of its manifest.
    """

    name: str
    own_digest: str

    @classmethod
    def of(cls, manifest: Manifest | None) -> Newest | None:
        """The one that a manifest describes."""
        return None if manifest is None else cls(manifest.name, manifest.own_digest)


@dataclass(frozen=True)
class Hooks:
    """What a committer asks of its owner.

    Attributes:
        check: Raises if the right to publish is lost.
        before_manifest: Makes durable what the manifest speaks of (the metric journal).
        begin_before_manifest: Lets the disk begin with that; a hint.
        manifest: The manifest, given what was written.
        note: Appends to the run's events.
    """

    check: Callable[[], None]
    before_manifest: Callable[[], None]
    manifest: Callable[[Mapping[str, FileEntry]], Manifest]
    note: Callable[..., None]
    begin_before_manifest: Callable[[], None] = lambda: None


class Committer:
    """Commits snapshots of one line, one at a time.

    Args:
        store: The run's snapshots.
        files: Primitive operations.
        retain: Which snapshots to delete, given all of them, oldest first.
    """

    def __init__(self, store: Store, *, files: Files, retain: Callable[[Sequence[Kept]], list[str]]) -> None:
        self.newest: Newest | None = None
        self._store = store
        self._files = files
        self._retain = retain
        self._kept: dict[str, Kept] | None = None  # by name, oldest first

    def continue_from(self, newest: Newest | None) -> None:
        """The newest durable snapshot from now on; what else there is, is looked up anew."""
        self.newest, self._kept = newest, None

    def commit(self, content: Content, facts: Kept, hooks: Hooks) -> Manifest | None:
        """Make a snapshot durable; retention is applied by `retire`.

        Args:
            content: All files but the manifest.
            facts: What retention will know of it.
            hooks: See there.

        Returns:
            Its manifest; None if this very snapshot is the newest durable one already.

        Raises:
            OSError: It could not be made durable; what was durable before still is.
            RunHeldError: The right to publish is lost.
        """
        if self.newest is not None and self.newest.name == facts.name:
            return None
        if self._store.path(facts.name).exists():
            # Never taken for this state: it was found here and not continued from.
            self._store.set_aside([facts.name], "another state was saved at the same position")
        num_bytes, num_files = content.size()
        self._make_room(facts, hooks, num_bytes=num_bytes, num_files=num_files)
        attempt = 1
        while True:
            try:
                manifest = self._attempt(content, facts.name, hooks)
            except RunHeldError:
                raise
            except OSError as error:
                hooks.note("attempt_failed", snapshot=facts.name, attempt=attempt, reason=str(error))
                if attempt == _ATTEMPTS or error.errno in _LASTING:
                    raise
                attempt += 1
            else:
                # Crash here: the snapshot is durable; only old ones that retention would delete are still there.
                self.newest = Newest.of(manifest)
                return manifest

    def _attempt(self, content: Content, name: str, hooks: Hooks) -> Manifest:
        temporary = self._store.begin(name, token=secrets.token_hex(6))
        try:
            with self._store.manifest_file(temporary) as manifest:
                with content.writing(self._files, temporary) as entries:
                    data = hooks.manifest(entries).to_bytes()
                    manifest.write(data)
                    # Before the first is synced the disk has all, in one transaction of the file system's journal:
                    # half as many requests, and interrupts of the training.
                    manifest.start_writeback()
                    hooks.begin_before_manifest()
                # Invariant: files and rows are durable before the manifest that speaks of them is synced.
                hooks.before_manifest()
            self._store.commit(temporary, name, check=hooks.check)
        except BaseException:
            with contextlib.suppress(OSError):  # what stays of it is swept at the next start
                remove_tree(self._files, temporary)
            raise
        return from_bytes(data)

    # -- room and retention -----------------------------------------------------------------------

    def _make_room(self, facts: Kept, hooks: Hooks, *, num_bytes: int, num_files: int) -> None:
        """Look before writing: a disk filled to the brim by an attempt that fails hurts everybody on it.

        Raises:
            OSError: There is not enough room (ENOSPC), and retention has nothing to give.
        """
        directory = self._store.run_directory
        if room(directory).holds(num_bytes=num_bytes, files=num_files):
            return
        hooks.check()
        self._store.sweep()
        for name in self.doomed(facts):
            if room(directory).holds(num_bytes=num_bytes, files=num_files):
                return
            self._store.delete(name)
            self._forget(name)
            hooks.note("deleted_early", snapshot=name, reason=f"room for {facts.name}")
        found = room(directory)
        if not found.holds(num_bytes=num_bytes, files=num_files):
            missing = shortage(directory, found, num_bytes=num_bytes, files=num_files)
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {missing}")

    def doomed(self, new: Kept) -> list[str]:
        """What retention deletes once the new snapshot is there; never the newest durable one."""
        stays = {new.name, self.newest.name if self.newest is not None else new.name}
        kept = self._all_kept()
        # It may be found on disk already.
        others = (
            [snapshot for name, snapshot in kept.items() if name != new.name] if new.name in kept else kept.values()
        )
        return [name for name in self._retain([*others, new]) if name not in stays]

    def retire(self, new: Kept, note: Callable[..., None]) -> None:
        """Apply retention; only now, when the new snapshot is durable. What cannot be deleted stays."""
        try:
            doomed = self.doomed(new)
            self._keep(new, doomed)
        except OSError as error:
            note("not_deleted", reason=str(error))
            return
        delete_each(doomed, self._store.delete, note)

    def took(self, new: Kept, own_digest: str, doomed: Sequence[str]) -> None:
        """Somebody else has committed a snapshot, and deleted those that are doomed by it."""
        self._keep(new, doomed)
        self.newest = Newest(new.name, own_digest)

    def _keep(self, new: Kept, doomed: Sequence[str]) -> None:
        kept = self._all_kept()
        for name in (new.name, *doomed):
            kept.pop(name, None)
        kept[new.name] = new

    def _forget(self, name: str) -> None:
        self._all_kept().pop(name, None)

    def _all_kept(self) -> dict[str, Kept]:
        """Facts for retention of every committed snapshot, read from disk once and then kept."""
        if self._kept is None:
            kept = {}
            for name in self._store.names():
                try:
                    kept[name] = kept_of(self._store.manifest(name))
                except (DamagedSnapshotError, SnapshotGoneError):
                    continue  # stays where it is: retention deletes only what it can read
            self._kept = kept
        return self._kept


def delete_each(names: Iterable[str], delete: Callable[[str], None], note: Callable[..., None]) -> None:
    """Delete snapshots; one that cannot be deleted is noted, and no reason to stop."""
    for name in names:
        try:
            delete(name)
        except OSError as error:
            note("not_deleted", snapshot=name, reason=str(error))

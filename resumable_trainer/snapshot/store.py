"""The store: all snapshots of a run, and the one meaning of "exists". Free of torch.

A directory below `snapshots/` with a snapshot's name exists; nothing else does. Whether it is
*valid* is what `verify` says. Nothing is chosen by modification time, and nothing valid is deleted
but by retention: damaged snapshots move to quarantine, abandoned ones are set aside.

Everything that changes the store belongs to the holder of the run's lock.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from typing import TYPE_CHECKING

from resumable_trainer.durable.files import (
    TEMPORARY_PREFIX,
    TRASH_PREFIX,
    Files,
    NewFile,
    commit_directory,
    move_directory,
    remove_tree,
    take_name_away,
    write_new_file,
)
from resumable_trainer.errors import DamagedSnapshotError, NotFoundError, NoValidSnapshotError, SnapshotGoneError
from resumable_trainer.snapshot.layout import (
    MANIFEST,
    METRICS,
    QUARANTINE,
    SET_ASIDE,
    SNAPSHOTS,
    ParsedName,
    parse_name,
)
from resumable_trainer.snapshot.verify import read_manifest, verify, verify_files, verify_outline

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from resumable_trainer.snapshot.manifest import Manifest

_COPY_BYTES = 1 << 23


class Store:
    """The snapshots of one run directory.

    Args:
        directory: The run directory.
        files: Primitive operations.
    """

    def __init__(self, directory: Path, *, files: Files | None = None) -> None:
        self.run_directory = directory
        self._root = directory / SNAPSHOTS
        self._files = files if files is not None else Files()

    # -- looking ----------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """Names of all committed snapshots, oldest first.

        Raises:
            OSError: The directory cannot be read; that is not "none".
        """
        try:
            with os.scandir(self._root) as found_there:
                entries = [entry.name for entry in found_there]
        except FileNotFoundError:
            return []
        parsed = {name: found for name in entries if (found := parse_name(name)) is not None}
        return sorted(parsed, key=lambda name: parsed[name].order)

    def path(self, name: str) -> Path:
        """Where a snapshot lies."""
        return self._root / name

    def verify(self, name: str) -> Manifest:
        """A snapshot's manifest, after every byte of the snapshot was checked.

        Raises:
            DamagedSnapshotError: It is not exactly what was committed.
            SnapshotGoneError: It was deleted meanwhile.
        """
        with still_there(self.path(name)):
            return verify(self.path(name))

    def verify_files(self, manifest: Manifest) -> None:
        """Check every byte that a snapshot's manifest speaks of.

        Raises:
            DamagedSnapshotError: They are not exactly what was committed.
            SnapshotGoneError: It was deleted meanwhile.
        """
        with still_there(self.path(manifest.name)):
            verify_files(self.path(manifest.name), manifest)

    def newest_to_read(self) -> Manifest | None:
        """The newest snapshot, all of it checked but the digests of its tensor files, if there is one to fall back to.

        For who hashes those files while reading them into place, and takes an older snapshot where one is damaged.
        None if this one is damaged already, or the only one: then `newest_valid` says what there is.
        """
        names = self.names()
        if len(names) < 2:
            return None
        try:
            return verify_outline(self.path(names[-1]))
        except (DamagedSnapshotError, FileNotFoundError):
            return None

    def newest_readable(self) -> Manifest | None:
        """The newest manifest that is valid itself, whatever became of its other files; None if there is none."""
        for name in reversed(self.names()):
            with contextlib.suppress(DamagedSnapshotError, SnapshotGoneError):
                return self.manifest(name)
        return None

    def newest_generation(self) -> int:
        """Of the launch that wrote the newest readable manifest; 0 for none. For when the lock file has been lost."""
        newest = self.newest_readable()
        return 0 if newest is None else newest.generation

    def manifest(self, name: str) -> Manifest:
        """A snapshot's manifest, verified itself; the other files are not read.

        Raises:
            DamagedSnapshotError: The manifest is missing or damaged.
            SnapshotGoneError: It was deleted meanwhile.
        """
        with still_there(self.path(name)):
            return read_manifest(self.path(name))

    def newest_valid(self, *, on_damage: Callable[[str, DamagedSnapshotError], None]) -> Manifest | None:
        """The newest snapshot that verifies; None only if there are none at all.

        Moves nothing: `on_damage` learns of every newer one that does not verify.

        Raises:
            NoValidSnapshotError: There are snapshots, and none is valid.
            SnapshotGoneError: One was deleted meanwhile, and of the others none is valid.
        """
        gone: SnapshotGoneError | None = None
        damaged: list[tuple[str, DamagedSnapshotError]] = []
        for name in reversed(self.names()):
            try:
                manifest = self.verify(name)
            except DamagedSnapshotError as error:
                damaged.append((name, error))
                continue
            except SnapshotGoneError as error:
                gone = error
                continue
            for bad, reason in damaged:
                on_damage(bad, reason)
            return manifest
        if gone is not None:
            raise gone
        if damaged:
            raise self._none_valid(damaged)
        return None

    def _none_valid(self, damaged: list[tuple[str, DamagedSnapshotError]]) -> NoValidSnapshotError:
        lines = "".join(f"\n  {name}: {error.message}" for name, error in damaged)
        return NoValidSnapshotError(
            f"run {self.run_directory} has {len(damaged)} snapshots and none is valid:{lines}\n"
            "nothing was changed and nothing started over",
            path=self.run_directory,
            found=[name for name, _ in damaged],
            hint="restore one from a copy, or set all aside and start over with: resumable-trainer run --fresh ...",
        )

    def select(self, which: str) -> str:
        """The name of the snapshot meant by "latest", "best", a step ("700"), "epoch:10" or a name.

        A step means the newer of two snapshots at that step. "latest" is the newest by name: whether
        it is valid is another question. "best" is the valid one with the best value of the
        early-stopping metric.

        Raises:
            NotFoundError: There is none such; the message lists what there is.
        """
        names = self.names()
        parsed = {name: found for name in names if (found := parse_name(name)) is not None}
        if which == "latest" and names:
            return names[-1]
        chosen: str | None
        if which == "best":
            chosen = self._best(names)
        elif which in parsed:
            chosen = which
        else:
            chosen = next((name for name in reversed(names) if _matches(which, parsed[name])), None)
        if chosen is None:
            raise NotFoundError(
                f"run {self.run_directory} has no snapshot {which!r}",
                path=self.run_directory,
                found=which,
                expected=names,
                hint="there are: " + (", ".join(names) or "none"),
            )
        return chosen

    def _best(self, names: Sequence[str]) -> str | None:
        """The snapshot of the best epoch: the newest readable manifest knows its step, if it is still there."""
        newest = self.newest_readable()
        if newest is None or newest.best is None:
            return None
        wanted = ParsedName(newest.best.step, newest.best.epoch + 1)
        return next((name for name in names if parse_name(name) == wanted), None)

    # -- changing (under the lock) ----------------------------------------------------------------

    def begin(self, name: str, *, token: str) -> Path:
        """A temporary directory in which a snapshot is written; it does not count."""
        if not self._root.exists():
            self._files.make_directory(self._root)
            self._files.sync_directory(self.run_directory)
        temporary = self._root / f"{TEMPORARY_PREFIX}{name}-{token}"
        self._files.make_directory(temporary)
        return temporary

    def manifest_file(self, temporary: Path) -> NewFile:
        """The file for `Manifest.to_bytes()`, not made yet; it must be the last that is synced."""
        return NewFile(temporary / MANIFEST, files=self._files)

    def write_manifest(self, temporary: Path, manifest: Manifest) -> Manifest:
        """Write the manifest, the last file of a snapshot; the same with the digest that it has now."""
        from resumable_trainer.snapshot.manifest import from_bytes

        data = manifest.to_bytes()
        with self.manifest_file(temporary) as file:
            file.write(data)
        return from_bytes(data)

    def commit(self, temporary: Path, name: str, *, check: Callable[[], None]) -> None:
        """Give a finished snapshot its name; durable on return."""
        commit_directory(self._files, temporary, self.path(name), check=check)

    def quarantine(self, name: str, reason: str) -> Path:
        """Move a damaged snapshot away from those that count, with the reason beside it."""
        target = self._free_path(self._below(QUARANTINE), name)
        # The reason first: a kill between the two leaves a reason without a snapshot, never the reverse.
        reason_file = self._free_path(target.parent, f"{target.name}.reason.txt")
        write_new_file(self._files, reason_file, f"{name}: {reason}\n".encode())
        move_directory(self._files, self.path(name), target)
        return target

    def set_aside(self, names: Sequence[str], reason: str) -> Path:
        """Move valid snapshots of an abandoned line to a directory of their own.

        The metric journal as it is now is copied beside them: the rows of the abandoned line are
        about to be cut from it.
        """
        line = self._free_path(self._below(SET_ASIDE), "line-1")
        self._files.make_directory(line)
        write_new_file(self._files, line / "reason.txt", f"{reason}\n".encode())
        metrics = self.run_directory / METRICS
        if metrics.exists():
            with metrics.open("rb") as rows, NewFile(line / METRICS, files=self._files) as copy:
                shutil.copyfileobj(rows, copy, _COPY_BYTES)
        self._files.sync_directory(line)
        self._files.sync_directory(line.parent)
        # Newest first. Crash here: those not yet moved are an older, still valid end of the old line.
        for name in sorted(names, key=_order, reverse=True):
            move_directory(self._files, self.path(name), line / name)
        return line

    def delete(self, name: str) -> None:
        """Remove a snapshot that retention does not keep."""
        remove_tree(self._files, self.path(name))

    def discard(self, name: str) -> Path:
        """Take the name away from a snapshot that retention does not keep; where it lies now.

        It may be removed when the directory has been synced, as the next commit does; until then power loss may bring
        it back, and it must be whole.
        """
        return take_name_away(self._files, self.path(name))

    def sweep(self) -> list[str]:
        """Remove what dead processes left unfinished; names of the snapshots that never came to be."""
        swept = []
        for root in (self._root, self.run_directory):
            if not root.exists():
                continue
            with os.scandir(root) as entries:
                names = [entry.name for entry in entries if entry.name.startswith((TEMPORARY_PREFIX, TRASH_PREFIX))]
            for name in sorted(names):
                remove_tree(self._files, root / name)
                if root == self._root and name.startswith(TEMPORARY_PREFIX):
                    swept.append(name.removeprefix(TEMPORARY_PREFIX))
        return swept

    def _below(self, name: str) -> Path:
        path = self.run_directory / name
        if not path.exists():
            self._files.make_directory(path)
            self._files.sync_directory(self.run_directory)
        return path

    def _free_path(self, parent: Path, name: str) -> Path:
        """`name`, or `name.2` and so on if it is taken; "line-1" counts on as "line-2"."""
        path, number = parent / name, 2
        while path.exists() or path.is_symlink():
            path = parent / (f"line-{number}" if name == "line-1" else f"{name}.{number}")
            number += 1
        return path


@contextlib.contextmanager
def still_there(path: Path) -> Iterator[None]:
    """Tell a snapshot that was deleted while it is read from a damaged one.

    Who only looks holds no lock, and retention takes a snapshot's name away at once: then files are missing that
    were there a moment ago, and nothing is damaged.

    Raises:
        SnapshotGoneError: Something was missing, and the whole snapshot is.
    """
    try:
        yield
    except (FileNotFoundError, DamagedSnapshotError) as error:
        if os.path.lexists(path):
            raise
        gone = SnapshotGoneError(
            f"{path} was deleted while it was read",
            path=path,
            hint="its run is training, and keeps newer ones; ask again",
        )
        gone.errno = errno.ENOENT
        raise gone from error


def _order(name: str) -> tuple[int, bool, int]:
    parsed = parse_name(name)
    return parsed.order if parsed is not None else (-1, False, 0)


def _matches(which: str, parsed: ParsedName) -> bool:
    kind, _, number = which.rpartition(":")
    if not number.isdecimal():
        return False
    return parsed.epochs_complete == int(number) if kind == "epoch" else (not kind and parsed.step == int(number))

"""A run directory that comes to be all at once: forks and imports. Free of torch.

Everything is written below a temporary name beside the final one, synced, and then renamed. A kill at any
point leaves either a whole run or a directory that nobody takes for one; the next attempt at the same
name removes it, unless the process that is at it still lives.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import secrets
from typing import TYPE_CHECKING, Any

from resumable_trainer.durable.digest import digest_bytes
from resumable_trainer.durable.files import (
    TEMPORARY_PREFIX,
    Files,
    commit_directory,
    make_directories,
    remove_tree,
    write_new_file,
)
from resumable_trainer.durable.filesystem import room, shortage
from resumable_trainer.durable.lock import RunLock, held_as_it_is
from resumable_trainer.errors import ResumableTrainerError, SnapshotWriteError, UsageError
from resumable_trainer.snapshot.layout import EVENTS, METRICS, RUN_JSON, RUN_LOCK
from resumable_trainer.snapshot.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from resumable_trainer.snapshot.manifest import FileEntry, Manifest

_NUM_FILES = 8  # beside those of the snapshot: the run's own, and the directories
_RUN_BYTES = 1 << 16
_LONG_NAME_BYTES = 200


class NewRun:
    """A run directory in the making; see `new_run`.

    Attributes:
        path: Its temporary name.
        files: Primitive operations.
    """

    def __init__(self, path: Path, files: Files) -> None:
        self.path = path
        self.files = files

    def write_identity(self, fields: Mapping[str, Any], event: Mapping[str, Any]) -> None:
        """Write `run.json`, and the first of its events."""
        identity = json.dumps({"format": 1, **fields, "created": now("seconds")}, indent=2)
        write_new_file(self.files, self.path / RUN_JSON, f"{identity}\n".encode())
        row = json.dumps({**event, "time": now("milliseconds")}, separators=(",", ":"))
        write_new_file(self.files, self.path / EVENTS, f"{row}\n".encode())

    def write_metrics(self, data: bytes) -> None:
        """Write the metric journal."""
        write_new_file(self.files, self.path / METRICS, data)

    def write_snapshot(
        self, name: str, write: Callable[[Path], dict[str, FileEntry]], manifest: Callable[..., Manifest]
    ) -> Manifest:
        """Write the first snapshot, and read all of it again.

        Args:
            name: Its name.
            write: Writes all files but the manifest into a directory, and says what they are.
            manifest: The manifest, given what was written.

        Returns:
            The manifest as it was read back.
        """
        store = Store(self.path, files=self.files)
        temporary = store.begin(name, token=secrets.token_hex(6))
        store.write_manifest(temporary, manifest(write(temporary)))
        store.commit(temporary, name, check=lambda: None)
        return store.verify(name)


@contextlib.contextmanager
def new_run(directory: Path, *, num_bytes: int, files: Files | None = None) -> Iterator[NewRun]:
    """Fill a run directory; it gets its name, durably, on leaving the block without an error.

    Args:
        directory: Its final name, which must be free.
        num_bytes: What is going to be written, to look for room first.
        files: Primitive operations.

    Raises:
        UsageError: The name is taken.
        SnapshotWriteError: There is no room for it, or the disk does not take it.
    """
    files = files if files is not None else Files()
    final = directory.absolute()
    refuse_taken(final)
    temporary = final.with_name(f"{_stem(final)}{secrets.token_hex(6)}")
    try:
        make_directories(files, final.parent)
        _sweep(files, final)
        _look_for_room(final, num_bytes)
        files.make_directory(temporary)
        # Held under both names: nobody sweeps it meanwhile, and nobody starts it before it is whole.
        with RunLock(temporary / RUN_LOCK, files=files).held_again(), _removed_after_an_error(files, temporary):
            yield NewRun(temporary, files)
            commit_directory(files, temporary, final, check=lambda: refuse_taken(final))
    except OSError as error:
        if isinstance(error, ResumableTrainerError):
            raise
        raise _not_made(final, str(error)) from error


@contextlib.contextmanager
def _removed_after_an_error(files: Files, temporary: Path) -> Iterator[None]:
    """Nothing stays of an attempt that fails; removed under its lock, or a sweep would get in the way."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # what stays of it is swept by the next attempt
            remove_tree(files, temporary)
        raise


def now(precision: str) -> str:
    """The time in UTC, a label for people."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec=precision)


def refuse_taken(final: Path) -> None:
    """Make sure that the name of a new run is free.

    Raises:
        UsageError: It is taken.
    """
    if os.path.lexists(final):
        raise UsageError(
            f"{final} is there already, and a new run needs a directory of its own",
            path=final,
            hint="choose a name that is free; nothing was changed",
        )


def _sweep(files: Files, final: Path) -> None:
    """Remove what killed attempts at the same name have left."""
    pattern = re.compile(re.escape(_stem(final)) + "[0-9a-f]{12}")
    for entry in sorted(final.parent.iterdir()):
        if pattern.fullmatch(entry.name) and entry.is_dir() and not entry.is_symlink():
            # One that fails makes its own away at this moment, or another sweeps it too: then there is nothing to do.
            with contextlib.suppress(OSError):
                _remove_if_nobody_holds_it(files, entry)


def _remove_if_nobody_holds_it(files: Files, entry: Path) -> None:
    if not (entry / RUN_LOCK).exists():
        # Being removed, or killed in that. A maker that has no lock yet makes the directory again.
        remove_tree(files, entry)
        return
    with held_as_it_is(entry / RUN_LOCK):
        remove_tree(files, entry)


def _stem(final: Path) -> str:
    """What the temporary names of a run begin with; a long name stays within the limit of file systems."""
    name = final.name
    is_long = len(os.fsencode(name)) > _LONG_NAME_BYTES
    return f"{TEMPORARY_PREFIX}{digest_bytes(os.fsencode(name)) if is_long else name}-"


def _look_for_room(final: Path, num_bytes: int) -> None:
    found, needed = room(final.parent), num_bytes + _RUN_BYTES
    if not found.holds(num_bytes=needed, files=_NUM_FILES):
        raise _not_made(final, shortage(final.parent, found, num_bytes=needed, files=_NUM_FILES))


def _not_made(final: Path, reason: str) -> SnapshotWriteError:
    return SnapshotWriteError(
        f"{final} was NOT made: {reason}", path=final, hint="free space there, or put it somewhere else"
    )

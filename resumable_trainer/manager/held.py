"""A run directory as the process holds it that has its lock: the lock, the run's events, its store of snapshots."""

from __future__ import annotations

import contextlib
import datetime
import time
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from resumable_trainer.durable.files import Files, make_directories
from resumable_trainer.durable.filesystem import refuse_links
from resumable_trainer.durable.journal import Journal
from resumable_trainer.durable.lock import RunLock
from resumable_trainer.errors import (
    ResumableTrainerError,
    SnapshotWriteError,
    UsageError,
)
from resumable_trainer.snapshot.layout import EVENTS, OWN_NAMES, RUN_LOCK
from resumable_trainer.snapshot.store import Store

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping
    from types import TracebackType


class HeldRun:
    """A run directory, held while it is open; a context manager.

    Args:
        directory: The run directory; made if it is not there.
        lock: A lock of this directory that the caller has taken already.
        command: What to tell others who find the run held.
        files: Primitive file operations.

    Attributes:
        directory: The run directory.
        files: Primitive file operations.
        store: The run's snapshots.
        run_id: Which run it is; empty where nobody has said.
        swept: Names of what dead processes had left unfinished, and is gone since the opening.
        on_event: Told of each event after it was written: the directory, and the row.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        lock: RunLock | None,
        command: str,
        files: Files | None,
    ) -> None:
        self.directory = Path(directory)
        self.files = files if files is not None else Files()
        self.store = Store(self.directory, files=self.files)
        self.run_id = ""
        self.swept: list[str] = []
        self.on_event: Callable[[Path, Mapping[str, Any]], None] | None = None
        self._lock = lock
        self._command = command
        self._events: Journal | None = None

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
            self._lock.acquire(known_generation=self.store.newest_generation(), command=self._command)
        self._events = Journal.open(self.directory / EVENTS, files=self.files)
        # Crash here: nothing but unfinished directories is gone; the sweep begins anew at the next start.
        self.swept = self.store.sweep()

    def close(self) -> None:
        """Release the lock."""
        try:
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
    def lock(self) -> RunLock:
        """The run's lock, held while this is open."""
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
        row = {"event": event, "time": now(), "generation": generation, **fields}
        self._events.append(row)
        self._events.flush()
        if self.on_event is not None:
            self.on_event(self.directory, row)


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


def now() -> str:
    """The time as events and manifests have it: ISO 8601, UTC, to the millisecond."""
    milliseconds = time.time_ns() // 1_000_000
    return f"{_second(milliseconds // 1000)}.{milliseconds % 1000:03}+00:00"


@lru_cache(maxsize=1)  # three times in each snapshot, of which many are taken in a second
def _second(since_epoch: int) -> str:
    return datetime.datetime.fromtimestamp(since_epoch, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S")

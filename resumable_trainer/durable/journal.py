"""Journals: append-only files of rows, one JSON object a line.

Policy: rows are buffered, written in large pieces, and synced when a snapshot counts them. A torn
last line (a kill in the middle of a write) is cut when the journal is opened. `rewind` cuts it back
to a mark that a snapshot holds, after checking that the bytes before it are the ones it counted.

Cost: appending is encoding the row; the digest runs along, so a mark costs nothing however long the
journal is. Opening reads the file once.

JSON knows no NaN and no infinities: such floats are written as the strings "NaN", "Infinity" and
"-Infinity".
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from resumable_trainer.durable.digest import Digest, FileDigest, open_regular
from resumable_trainer.durable.files import Files
from resumable_trainer.errors import SnapshotWriteError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

_CHUNK_BYTES = 1 << 20
_BUFFER_BYTES = 1 << 16
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode
_escape = json.JSONEncoder(ensure_ascii=True, separators=(",", ":"), allow_nan=False).encode


@dataclass(frozen=True)
class Mark:
    """A place in a journal.

    Attributes:
        num_bytes: Length up to here.
        digest: xxh3-128 of all bytes before.
        rows: Number of rows before.
    """

    num_bytes: int
    digest: str
    rows: int


class Journal:
    """One append-only file of rows, with one writer (the holder of the run's lock).

    `append` belongs to one thread; `sync` may be called from another. An error while writing, syncing
    or cutting *poisons* the journal: what of it is on disk is unknown, so every later call that would
    write or sync raises, until the file is opened and rewound anew.
    """

    def __init__(self, path: Path, fd: int, files: Files) -> None:
        self._path = path
        self._fd = fd
        self._files = files
        self._lock = threading.Lock()
        # Taken before `_lock`, and held during the sync alone: rows go on being appended meanwhile.
        self._sync_lock = threading.Lock()
        self._buffer: list[bytes] = []
        self._buffered_bytes = 0
        self._digest = Digest()
        self._rows = 0
        self._failed: str | None = None

    @classmethod
    def open(cls, path: Path, *, files: Files | None = None) -> Journal:
        """Open a journal, made if it is not there; a torn last line is cut."""
        files = files if files is not None else Files()
        journal = cls(path, files.open_append(path), files)
        try:
            journal._take_in(limit=None)
            # Also if it was there: whoever made it may have been killed before its name was durable.
            files.sync_directory(path.parent)
        except BaseException:
            files.close(journal._fd)
            raise
        return journal

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row; buffered until `flush`, `mark` or `sync`, or until the buffer is full."""
        line = _encode_row(row)
        with self._lock:
            self._buffer.append(line)
            self._buffered_bytes += len(line)
            if self._buffered_bytes >= _BUFFER_BYTES:
                self._write_buffer()

    def flush(self) -> None:
        """Hand buffered rows to the operating system, for readers to see."""
        with self._lock:
            self._write_buffer()

    def mark(self) -> Mark:
        """Where the journal stands now, buffered rows included."""
        with self._lock:
            self._write_buffer()
            so_far = self._digest.value()
            return Mark(so_far.num_bytes, so_far.digest, self._rows)

    def sync(self) -> None:
        """Make every row appended so far durable.

        Raises:
            SnapshotWriteError: It could not, now or at an earlier call: a sync is never retried, as
                a second one may report success for bytes that were lost.
        """
        # Invariant: one sync at a time. The kernel tells of lost bytes once; a second sync that runs beside
        # the failing one would report success for them.
        with self._sync_lock:
            with self._lock:
                self._write_buffer()
            with self._poisoning():
                self._files.sync(self._fd)

    def rewind(self, mark: Mark) -> bool:
        """Cut the journal back to a mark; False if it does not hold the bytes that the mark counts.

        In that case nothing is touched.

        Raises:
            SnapshotWriteError: It could not be cut.
        """
        with self._sync_lock, self._lock:
            self._write_buffer()
            if self._digest.num_bytes < mark.num_bytes:
                return False
            if self._digest_of(mark.num_bytes) != FileDigest(mark.num_bytes, mark.digest):
                return False
            if self._digest.num_bytes > mark.num_bytes:
                # Crash here: the next start rewinds to the same mark again.
                with self._poisoning():
                    self._files.truncate(self._fd, mark.num_bytes)
                    self._files.sync(self._fd)
            self._take_in(limit=mark.num_bytes)
            return True

    def close(self) -> None:
        """Write what is buffered and close; a second call does nothing.

        Raises:
            SnapshotWriteError: Rows could not be written, now or at an earlier call. It is closed all the same.
        """
        with self._sync_lock, self._lock:
            if self._fd < 0:
                return
            try:
                self._write_buffer()
            finally:
                fd, self._fd = self._fd, -1
                self._files.close(fd)

    def _write_buffer(self) -> None:
        if self._failed is not None:
            raise self._write_error()
        if not self._buffer:
            return
        data = b"".join(self._buffer)
        view = memoryview(data)
        with self._poisoning():
            while view.nbytes:
                view = view[self._files.write(self._fd, view) :]
        self._digest.update(data)
        self._rows += len(self._buffer)
        self._buffer.clear()
        self._buffered_bytes = 0

    @contextlib.contextmanager
    def _poisoning(self) -> Iterator[None]:
        """After any error in here nothing is believed of this file: half a row may have been written."""
        try:
            yield
        except OSError as error:
            self._failed = f"{self._path} could not be written: {error}"
            raise self._write_error() from error
        except BaseException:  # an interrupt between a write and its accounting: the row must not go out twice
            self._failed = f"{self._path} could not be written: interrupted in the middle"
            raise

    def _write_error(self) -> SnapshotWriteError:
        hint = "free space or repair the disk, then start it again"
        return SnapshotWriteError(str(self._failed), path=self._path, hint=hint)

    def _digest_of(self, num_bytes: int) -> FileDigest:
        digest = Digest()
        for chunk in _chunks(self._fd, num_bytes):
            digest.update(chunk)
        return digest.value()

    def _take_in(self, limit: int | None) -> None:
        """Read the file once: running digest and number of rows, up to its last full line."""
        size = os.fstat(self._fd).st_size if limit is None else limit
        full = _length_of_full_lines(self._fd, size)
        if full < size:
            self._files.truncate(self._fd, full)
        self._digest, self._rows = Digest(), 0
        for chunk in _chunks(self._fd, full):
            self._digest.update(chunk)
            self._rows += chunk.count(b"\n")


def _encode_row(row: Mapping[str, Any]) -> bytes:
    try:
        text = _encode(row)
    except ValueError:
        text = _encode({name: _without_special_floats(value) for name, value in row.items()})
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair: an argument or file name that is not UTF-8
        return _escape(json.loads(text)).encode() + b"\n"


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


_decode = json.JSONDecoder(parse_constant=_refuse_constant).decode


def _without_special_floats(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _without_special_floats(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_special_floats(inner) for inner in value]
    return value


def _chunks(fd: int, num_bytes: int) -> Iterator[bytes]:
    offset = 0
    while offset < num_bytes:
        chunk = os.pread(fd, min(_CHUNK_BYTES, num_bytes - offset), offset)
        if not chunk:
            return
        yield chunk
        offset += len(chunk)


def _length_of_full_lines(fd: int, size: int) -> int:
    """Offset behind the last newline within the first `size` bytes."""
    end = size
    while end > 0:
        start = max(0, end - _CHUNK_BYTES)
        found = os.pread(fd, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a journal, oldest first; a torn last line is left out.

    Raises:
        ValueError: A line in the middle is damaged; the message names it.
        OSError: It cannot be read.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                row = _decode(line.decode())
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path} line {number} is damaged: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path} line {number} is damaged: it is no object")
            yield row

"""Journals: append-only files of rows, one JSON object a line.

Policy: rows are buffered, written in large pieces, and synced when a snapshot counts them. What the
disk refuses stays in memory until it takes it. A torn last line (a kill in the middle of a write) is
cut when the journal is opened. `rewind` cuts it back to a mark that a snapshot holds, after checking
that the bytes before it are the ones it counted.

Cost: appending is encoding the row; the digest runs along, so a mark costs nothing however long the
journal is. What was there before is read once: by `rewind`, which only hashes it (10 ms for a million rows), or
before the first row is written.

JSON knows no NaN and no infinities: such floats are written as the strings "NaN", "Infinity" and
"-Infinity".
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import secrets
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from resumable_trainer.durable.digest import Digest, FileDigest, reading
from resumable_trainer.durable.files import TEMPORARY_PREFIX, Files, NewFile
from resumable_trainer.errors import SnapshotWriteError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path

_CHUNK_BYTES = 1 << 19
_BUFFER_BYTES = 1 << 16
_BLOCK_BYTES = 1 << 16  # read at once from the end: some hundred events
_SHOWN_BYTES = 60
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

    `append` belongs to one thread; `sync` may be called from another. A disk that fails loses no rows
    of a living process: `append`, `flush` and `mark` go on in memory, `sync` raises, and the next one
    tries again. After a failed write the torn piece is cut off first; after a failed sync the whole
    journal is written to a new file, since a second sync of the old one may report success for bytes
    that were lost.
    """

    def __init__(self, path: Path, fd: int, files: Files) -> None:
        self._path = path
        self._fd = fd
        self._files = files
        self._lock = threading.Lock()
        # Taken before `_lock`, and held during the sync alone: rows go on being appended meanwhile.
        self._sync_lock = threading.Lock()
        self._buffer: list[bytes] = []
        self._buffered_bytes = self._buffered_rows = 0
        self._unwritten = b""  # counted in digest and rows, not handed to the operating system yet
        self._num_bytes = 0  # of the file as it was opened; counts until `_digest` does
        self._is_counted = False  # digest and rows know of what the file held when it was opened
        self._digest = Digest()
        self._rows = 0
        self._is_torn = False  # a write began and is not known to have ended
        self._is_lost = False  # a sync failed: what the file holds on disk is unknown
        self._was_replaced = False
        self._error: OSError | None = None

    @classmethod
    def open(cls, path: Path, *, files: Files | None = None) -> Journal:
        """Open a journal, made if it is not there; a torn last line is cut."""
        files = files if files is not None else Files()
        journal = cls(path, files.open_append(path), files)
        try:
            journal._cut_torn_line(os.fstat(journal._fd).st_size)
            # Also if it was there: whoever made it may have been killed before its name was durable.
            files.sync_directory(path.parent)
        except BaseException:
            files.close(journal._fd)
            raise
        return journal

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row; buffered until `flush`, `mark` or `sync`, or until the buffer is full."""
        self.append_lines(encode_row(row), 1)

    def append_lines(self, lines: bytes, rows: int) -> None:
        """Add rows that are encoded already, as `encode_row` does it.

        Args:
            lines: Full lines.
            rows: How many.
        """
        with self._lock:
            self._buffer.append(lines)
            self._buffered_rows += rows
            self._buffered_bytes += len(lines)
            if self._buffered_bytes >= _BUFFER_BYTES:
                self._hand_over()

    def flush(self) -> None:
        """Hand buffered rows to the operating system, for readers to see."""
        with self._lock:
            self._hand_over()

    def mark(self) -> Mark:
        """Where the journal stands now, buffered rows included."""
        with self._lock:
            self._count()
            self._hand_over()
            so_far = self._digest.value()
            return Mark(so_far.num_bytes, so_far.digest, self._rows)

    @property
    def whole_file(self) -> Path | None:
        """The file, if the operating system has every row of it: then whoever syncs it makes them durable.

        None if rows are buffered or were refused, or if some may be lost: then only `sync` knows what to do. None for
        good once the file was replaced: others may have the old one open.
        """
        with self._lock:
            is_whole = not (self._buffer or self._unwritten or self._is_torn or self._is_lost or self._was_replaced)
            return self._path if is_whole else None

    def sync(self) -> None:
        """Make every row appended so far durable.

        Raises:
            SnapshotWriteError: It could not; the rows are kept, and the next call tries anew.
        """
        # Invariant: one sync at a time. The kernel tells of lost bytes once; a second sync that runs beside
        # the failing one would report success for them.
        with self._sync_lock:
            with self._lock:
                self._count()  # before what is in memory alone may be lost
                self._hand_over()
                if self._is_lost:
                    self._renew()
                elif self._error is not None:
                    raise self._failure(self._error)
            self._sync_file()

    def rewind(self, mark: Mark) -> bool:
        """Cut the journal back to a mark; False if it does not hold the bytes that the mark counts.

        In that case nothing is touched.

        Raises:
            SnapshotWriteError: It could not be cut; the next start does it.
        """
        with self._sync_lock, self._lock:
            self._hand_over()
            if self._error is not None:
                raise self._failure(self._error)
            num_bytes = self._digest.num_bytes if self._is_counted else self._num_bytes
            if num_bytes < mark.num_bytes:
                return False
            digest = self._digest_of(mark.num_bytes)
            if digest.value() != FileDigest(mark.num_bytes, mark.digest):
                return False
            if num_bytes > mark.num_bytes:
                self._cut(mark.num_bytes)
            # The very bytes that the mark counts: the digest goes on from here, and their rows are counted already.
            self._digest, self._rows, self._is_counted = digest, mark.rows, True
            if not self._is_plausible(mark):
                self._cut_torn_line(mark.num_bytes)
                self._is_counted = False
                self._count()
            return True

    def close(self) -> None:
        """Hand over what is buffered and close; a second call does nothing.

        Never fails: a row is durable when `sync` has returned, and no other was promised.
        """
        with self._sync_lock, self._lock:
            if self._fd < 0:
                return
            self._hand_over()
            fd, self._fd = self._fd, -1
            with contextlib.suppress(OSError):
                self._files.close(fd)

    def _hand_over(self) -> None:
        """Count the buffered rows, and give the operating system all that it does not have.

        What it does not take is kept; the error is remembered for `sync`.
        """
        if self._buffer:
            self._count()
            self._unwritten += (rows := b"".join(self._buffer))
            self._digest.update(rows)
            self._rows += self._buffered_rows
            self._buffer.clear()
            self._buffered_bytes = self._buffered_rows = 0
        if not self._unwritten or self._is_lost:
            return
        try:
            if self._is_torn:
                self._files.truncate(self._fd, self._digest.num_bytes - len(self._unwritten))
            self._is_torn = True
            view = memoryview(self._unwritten)
            while view.nbytes:
                view = view[self._files.write(self._fd, view) :]
        except OSError as error:
            self._error = error
            return
        # One assignment: an interrupt before it writes the same bytes again in place of these.
        self._unwritten = b""
        self._is_torn, self._error = False, None

    def _sync_file(self) -> None:
        try:
            self._files.sync(self._fd)
        except BaseException as error:
            self._is_lost = True
            if isinstance(error, OSError):
                raise self._failure(error) from error
            raise

    def _renew(self) -> None:
        """Write the journal to a new file, after a sync of the old one has failed.

        The old file's bytes may come from memory alone; the running digest tells whether they are right.
        """
        temporary = self._path.with_name(f"{TEMPORARY_PREFIX}{self._path.name}-{secrets.token_hex(4)}")
        try:
            with NewFile(temporary, files=self._files) as file:
                for chunk in _chunks(self._fd, self._digest.num_bytes - len(self._unwritten)):
                    file.write(chunk)
                file.write(self._unwritten)
            if file.digest != self._digest.value():
                raise OSError(errno.EIO, "rows that were written before are lost", str(self._path))
            # Crash here: the old file stands, good up to the last mark that a snapshot holds; the new one is swept.
            self._files.replace(temporary, self._path)
            self._was_replaced = True
            old, self._fd = self._fd, self._files.open_append(self._path)
            self._unwritten, self._is_torn, self._error = b"", False, None
            with contextlib.suppress(OSError):  # nothing in it is needed any more
                self._files.close(old)
            self._files.sync_directory(self._path.parent)
        except OSError as error:
            with contextlib.suppress(OSError):
                self._files.remove_file(temporary)
            raise self._failure(error) from error
        self._is_lost = False

    def _cut(self, num_bytes: int) -> None:
        # Crash here: the next start rewinds to the same mark again.
        try:
            self._files.truncate(self._fd, num_bytes)
        except OSError as error:
            raise self._failure(error) from error
        self._sync_file()

    def _failure(self, error: OSError) -> SnapshotWriteError:
        failure = SnapshotWriteError(
            f"{self._path} could not be written: {error.strerror or error}",
            path=self._path,
            hint="free space or repair the disk, then start it again",
        )
        failure.errno = error.errno
        return failure

    def _digest_of(self, num_bytes: int) -> Digest:
        digest = Digest()
        for chunk in _chunks(self._fd, num_bytes):
            digest.update(chunk)
        return digest

    def _is_plausible(self, mark: Mark) -> bool:
        """Whether a mark could be one that `mark` gave: at the end of a line, with no more rows than bytes."""
        if not mark.num_bytes:
            return not mark.rows
        return mark.rows <= mark.num_bytes and os.pread(self._fd, 1, mark.num_bytes - 1) == b"\n"

    def _cut_torn_line(self, size: int) -> None:
        self._num_bytes = _length_of_full_lines(self._fd, size)
        if self._num_bytes < size:
            self._files.truncate(self._fd, self._num_bytes)

    def _count(self) -> None:
        """Read the file as it was opened, if nothing has yet: running digest and number of rows."""
        if not self._is_counted:
            digest, rows = Digest(), 0
            for chunk in _chunks(self._fd, self._num_bytes):
                digest.update(chunk)
                rows += chunk.count(b"\n")
            self._digest, self._rows, self._is_counted = digest, rows, True


def encode_row(row: Mapping[str, Any]) -> bytes:
    """One line of a journal, its end included."""
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


def _chunks(fd: int, num_bytes: int) -> Iterator[bytearray]:
    """The file's first bytes in pieces; each is good until the next is asked for."""
    buffer = bytearray(min(_CHUNK_BYTES, num_bytes))
    offset = 0
    while offset < num_bytes:
        if num_bytes - offset < len(buffer):
            buffer = bytearray(num_bytes - offset)
        count = os.preadv(fd, [buffer], offset)
        if not count:
            return
        yield buffer if count == len(buffer) else buffer[:count]
        offset += count


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
    return (row for _, row in rows_after(path, 0))


def rows_after(path: Path, offset: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows behind a place, oldest first, each with the offset of its end.

    Args:
        path: The journal.
        offset: 0, or where some row ends, in bytes.

    Raises:
        ValueError: A line in the middle is damaged; the message names it.
        OSError: It cannot be read.
    """
    after = (f"after byte {offset}",) if offset else ()
    with reading(path) as file:
        file.seek(offset)
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield offset, _parsed(line, path, "line", number, *after)


def read_rows_from_end(path: Path, *, holding: Collection[bytes] = ()) -> Iterator[dict[str, Any]]:
    """The rows of a journal, newest first; a torn last line is left out. Reads in blocks, no further than asked for.

    Args:
        path: The journal.
        holding: Only rows whose line holds one of these are parsed and given; all rows if there are none.

    Raises:
        ValueError: The line that is next is damaged; the message shows it.
        OSError: It cannot be read.
    """
    with reading(path) as file:
        for line in _lines_from_end(file.fileno(), os.fstat(file.fileno()).st_size, holding):
            if _holds(line, holding):
                yield _parsed(line, path, "line", repr(line[:_SHOWN_BYTES]))


def _parsed(line: bytes, *where: object) -> dict[str, Any]:
    try:
        row = _decode(line.decode())
        if not isinstance(row, dict):
            raise ValueError("it is no object")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{' '.join(map(str, where))} is damaged: {error}") from error
    return row


def _holds(data: bytes, pieces: Collection[bytes]) -> bool:
    return not pieces or any(piece in data for piece in pieces)


def _lines_from_end(fd: int, size: int, holding: Collection[bytes]) -> Iterator[bytes]:
    """Full lines, the last first; of a block that holds none of the pieces only those that go on beyond it."""
    end = _length_of_full_lines(fd, size) - 1  # without the last newline, newlines stand between lines
    later: list[bytes] = []  # pieces of the line that goes on behind the block, the last piece first
    while end >= 0:
        start = max(0, end - _BLOCK_BYTES)
        data = os.pread(fd, end - start, start)
        first, *others = data.split(b"\n") if _holds(data, holding) else _outer_lines(data)
        if others:
            later.append(others.pop())
            yield b"".join(reversed(later))
            yield from reversed(others)
            later.clear()
        later.append(first)
        end = start or -1
    if later:
        yield b"".join(reversed(later))


def _outer_lines(data: bytes) -> list[bytes]:
    first, newline, others = data.partition(b"\n")
    return [first, others.rpartition(b"\n")[2]] if newline else [first]

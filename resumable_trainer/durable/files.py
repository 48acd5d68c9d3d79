"""The one place that changes files of a run: every create, write, sync, rename and removal.

Policy: nothing is written in place. New bytes go into new files, are synced, and only then get the
name under which they are looked for; a removal first takes the name away. So a process killed, or
a machine that loses power, between any two calls leaves either the old or the new state.

Cost: one sync per file and two per directory; a sync is what makes "saved" true. Large writes go past the page cache
where they may: a copy of a snapshot there costs processor time that training needs and pushes its data out. On virtual
machines that give free memory back to their host, asking for those pages again took up to 4 s for 1.1 GB, all of it
processor time; past it the same bytes took 0.6 s, and 0.1 s of processor time. The price: a restore reads the disk.

`Files` holds the primitive calls; the functions below compose them. Tests hand in a subclass that
fails or dies at any one of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import sys
from typing import TYPE_CHECKING, Any, Self, cast

from resumable_trainer.durable.digest import Digest, FileDigest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from types import TracebackType

    from typing_extensions import Buffer

TEMPORARY_PREFIX = ".tmp-"
TRASH_PREFIX = ".trash-"
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_SYNC_FILE_RANGE_WRITE = 2
_LOST_BYTES = (errno.EIO, errno.ENOSPC, errno.EDQUOT)
# Hashed, written and handed on to the disk in pieces of this size. Waiting for the final sync to begin leaves the disk
# idle while pages are filled: 0.3 GB took 124 ms so, 73 ms in pieces of 4 MiB, 81 ms of 16 MiB (ext4, NVMe).
_PIECE_BYTES = 4 << 20
LARGE_BYTES = 64 << 20
"""Less is as quick through the page cache, and soon found there by the next start."""

BLOCK_BYTES = 4096
"""Writes past the page cache begin and end at multiples of this, in memory and in the file."""


class Files:
    """Primitive operations, each one or two system calls; permissions follow the umask."""

    def make_directory(self, path: Path) -> None:
        """Make a directory that is not there yet."""
        os.mkdir(path)

    def create(self, path: Path) -> int:
        """Open a new file for writing; `FileExistsError` if the name is taken, links included."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(path, flags, 0o666)

    def open_append(self, path: Path) -> int:
        """Open a file for reading and appending; made if it is not there."""
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(path, flags, 0o666)

    def write(self, fd: int, data: Buffer) -> int:
        """Write some of `data`; how many bytes were taken (may be short)."""
        return os.write(fd, data)

    def bypass_page_cache(self, fd: int, *, wanted: bool) -> bool:
        """Let writes go past the page cache from now on, or through it again; whether they go past it.

        Only where the file system lies on a block device: on a network its own cache gathers them better.
        It makes nothing durable: `sync` still must.
        """
        if not hasattr(os, "O_DIRECT") or os.major(os.fstat(fd).st_dev) == 0:
            return False
        import fcntl

        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        try:
            fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT if wanted else flags & ~os.O_DIRECT)
        except OSError:
            return False
        return wanted

    def start_writeback(self, fd: int, offset: int, num_bytes: int) -> None:
        """Let the disk begin with a range that was written; a hint, and nothing where the system has no such call.

        It makes nothing durable: `sync` still must, and reports what is lost until then.
        """
        if _SYNC_FILE_RANGE is None or _SYNC_FILE_RANGE(fd, offset, num_bytes, _SYNC_FILE_RANGE_WRITE) == 0:
            return
        number = ctypes.get_errno()
        if number in _LOST_BYTES:  # anything else says that the file system has no such call
            raise OSError(number, os.strerror(number))

    def sync(self, fd: int) -> None:
        """Make a file's content durable. Never called again on a file whose sync failed.

        After an error the kernel may mark the lost pages clean, and the next sync reports success
        (Rebello et al., ATC 2020): the attempt must be thrown away, the bytes written anew.
        """
        if sys.platform == "darwin":
            import fcntl

            # macOS: fsync leaves the data in the drive's cache; some network file systems know nothing better.
            try:
                fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            except OSError as error:
                if error.errno not in (errno.ENOTSUP, errno.ENOTTY):
                    raise
                os.fsync(fd)
        else:
            os.fsync(fd)

    def truncate(self, fd: int, length: int) -> None:
        """Cut a file."""
        os.ftruncate(fd, length)

    def close(self, fd: int) -> None:
        """Close a file; an error here means that its content may be lost."""
        os.close(fd)

    def rename(self, source: Path, target: Path) -> None:
        """Give a new name that must be free; `FileExistsError` if it is taken."""
        if _rename_noreplace(source, target):
            return
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        os.rename(source, target)

    def replace(self, source: Path, target: Path) -> None:
        """Give a name, taking it from whatever had it."""
        os.replace(source, target)

    def link(self, source: Path, target: Path) -> None:
        """Give a file one more name, which must be free; its content is as durable as before, its new name is not."""
        os.link(source, target)

    def sync_directory(self, path: Path) -> None:
        """Make a directory's entries durable."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def remove_file(self, path: Path) -> None:
        """Remove a file or link."""
        os.unlink(path)

    def remove_empty_directory(self, path: Path) -> None:
        """Remove a directory that has no entries left."""
        os.rmdir(path)


def _rename_noreplace(source: Path, target: Path) -> bool:
    """`renameat2(RENAME_NOREPLACE)`; False where the system or file system does not have it."""
    if _RENAMEAT2 is None:
        return False
    flag = ctypes.c_uint(_RENAME_NOREPLACE)
    if _RENAMEAT2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flag) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(source), None, str(target))


def _find_renameat2() -> Callable[..., int] | None:
    return _find("renameat2", ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)


def _find_sync_file_range() -> Callable[..., int] | None:
    return _find("sync_file_range", ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


def _find(name: str, *arguments: type[Any]) -> Callable[..., int] | None:
    """A call of Linux that Python does not offer; None where there is none."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        found = getattr(ctypes.CDLL(None, use_errno=True), name)
    except (OSError, AttributeError):
        return None
    found.argtypes = arguments
    return cast("Callable[..., int]", found)


_RENAMEAT2 = _find_renameat2()
_SYNC_FILE_RANGE = _find_sync_file_range()


class NewFile:
    """Streaming writer of one new file, hashing what it writes.

    Leaving the block without an error syncs and closes the file. After an error the file is closed
    and left as it is: it lies in a temporary directory that is swept.

    Args:
        path: Where; the name must be free.
        files: Primitive operations.
    """

    def __init__(self, path: Path, *, files: Files) -> None:
        self._path = path
        self._files = files
        self._digest = Digest()
        self._fd = -1
        self._is_past_cache = False

    def __enter__(self) -> Self:
        self._fd = self._files.create(self._path)
        return self

    def write(self, data: Buffer) -> None:
        """Write all of `data`; short writes are legal and continued."""
        view = memoryview(data)
        if not view.nbytes:  # an empty array; `cast` refuses a zero in the shape
            return
        view = view.cast("B")
        whole = view.nbytes // BLOCK_BYTES * BLOCK_BYTES if self._goes_past_cache(view) else 0
        self._write_pieces(view[:whole])
        if self._is_past_cache:
            self._go_through_cache()
        self._write_pieces(view[whole:])

    def _goes_past_cache(self, view: memoryview) -> bool:
        if view.nbytes < LARGE_BYTES or view.readonly or self._digest.num_bytes % BLOCK_BYTES:
            return False
        is_aligned = ctypes.addressof(ctypes.c_char.from_buffer(view)) % BLOCK_BYTES == 0
        self._is_past_cache = is_aligned and self._files.bypass_page_cache(self._fd, wanted=True)
        return self._is_past_cache

    def _go_through_cache(self) -> None:
        self._files.bypass_page_cache(self._fd, wanted=False)
        self._is_past_cache = False

    def _write_pieces(self, view: memoryview) -> None:
        for start in range(0, view.nbytes, _PIECE_BYTES):
            self._write_piece(view[start : start + _PIECE_BYTES])

    def _write_piece(self, piece: memoryview) -> None:
        begin = self._digest.num_bytes
        self._digest.update(piece)
        left = piece
        while left.nbytes:
            try:
                written = self._files.write(self._fd, left)
            except OSError as error:
                # The file system has larger blocks than that, or the write before was short and ended within one.
                if error.errno != errno.EINVAL or not self._is_past_cache:
                    raise
                self._go_through_cache()
                continue
            left = left[written:]
        if piece.nbytes == _PIECE_BYTES:
            self._files.start_writeback(self._fd, begin, piece.nbytes)

    def start_writeback(self) -> None:
        """Let the disk begin with what was written so far; a hint."""
        self._files.start_writeback(self._fd, 0, self._digest.num_bytes)

    @property
    def digest(self) -> FileDigest:
        """Length and digest of what was written so far."""
        return self._digest.value()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            with contextlib.suppress(OSError):
                self._files.close(self._fd)
            return
        try:
            self._files.sync(self._fd)
        except BaseException:
            with contextlib.suppress(OSError):
                self._files.close(self._fd)
            raise
        self._files.close(self._fd)


def write_new_file(files: Files, path: Path, data: Buffer) -> FileDigest:
    """Write a whole new file; its content is durable, its name once the directory is synced."""
    with NewFile(path, files=files) as file:
        file.write(data)
    return file.digest


def write_replacing(files: Files, path: Path, data: Buffer) -> None:
    """Put new content under a name, all or nothing, durable on return."""
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{secrets.token_hex(4)}")
    write_new_file(files, temporary, data)
    # Crash here: the old content stands; the temporary file is swept at the next start.
    files.replace(temporary, path)
    files.sync_directory(path.parent)


@contextlib.contextmanager
def published_file(files: Files, path: Path, *, replacing: bool = False) -> Iterator[NewFile]:
    """A file that gets its name, whole and durable, on leaving the block without an error.

    Args:
        files: Primitive operations.
        path: Where.
        replacing: Take the name from a file that has it; else it must be free.

    Raises:
        FileExistsError: The name is taken.
    """
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}")  # a long name stays within the limit
    try:
        with NewFile(temporary, files=files) as file:
            yield file
        # Crash here: nothing has the name, or the old content; the temporary file counts for nobody.
        (files.replace if replacing else files.rename)(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            files.remove_file(temporary)
        raise
    files.sync_directory(path.parent)


def make_directories(files: Files, path: Path) -> None:
    """Make a directory and its missing parents, each durable before the next; one that is there is fine.

    Without this, power loss could take a whole run whose every file was synced: nothing named it.
    """
    if path.is_dir():
        return
    make_directories(files, path.parent)
    with contextlib.suppress(FileExistsError):  # twenty starts at once make it together
        files.make_directory(path)
    files.sync_directory(path.parent)


def commit_directory(files: Files, temporary: Path, final: Path, *, check: Callable[[], None]) -> None:
    """Give a directory whose files are all synced its final name, durable on return.

    Args:
        files: Primitive operations.
        temporary: The finished directory, beside its final place.
        final: The name under which it counts; must be free.
        check: Called last before the name is given; raises if the right to publish is lost.
    """
    files.sync_directory(temporary)
    mine = os.stat(temporary)
    check()
    # Crash here: the directory has its temporary name, does not count, and is swept.
    try:
        files.rename(temporary, final)
    except OSError:
        # A network file system may lose the reply to a rename that was done (rename(2), BUGS).
        if not _is_there(mine, final):
            raise
    # Crash here: it may be found under either name after power loss; complete in both cases.
    try:
        files.sync_directory(final.parent)
    except BaseException:
        # Not known to be durable, so it must not be found: the next attempt is a new directory.
        with contextlib.suppress(OSError):
            files.rename(final, temporary)
        raise


def _is_there(mine: os.stat_result, path: Path) -> bool:
    try:
        return os.path.samestat(mine, os.lstat(path))
    except OSError:
        return False


def move_directory(files: Files, source: Path, target: Path) -> None:
    """Move a file or directory within the run directory, durable on return; the name must be free."""
    files.rename(source, target)
    # The new name first: power loss between the two leaves both names or the new one, never neither.
    files.sync_directory(target.parent)
    if source.parent != target.parent:
        files.sync_directory(source.parent)


def remove_tree(files: Files, path: Path) -> None:
    """Remove a directory and all below it.

    It loses its name first, durably, so that a kill in the middle cannot leave half of it under a
    name that counts; what remains is swept at the next start.
    """
    trash = path
    if not path.name.startswith((TRASH_PREFIX, TEMPORARY_PREFIX)):
        trash = take_name_away(files, path)
        files.sync_directory(path.parent)
    _remove_below(files, trash)


def take_name_away(files: Files, path: Path) -> Path:
    """Give a directory a name that does not count; durable when its parent is synced. Where it lies now."""
    trash = path.with_name(f"{TRASH_PREFIX}{path.name}-{secrets.token_hex(4)}")
    files.rename(path, trash)
    return trash


def _remove_below(files: Files, path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        files.remove_file(path)
        return
    for entry in sorted(path.iterdir()):
        _remove_below(files, entry)
    files.remove_empty_directory(path)

"""Digests of buffers and files: xxh3-128, 32 hexadecimal digits.

Chosen for accidental damage (bit rot, torn writes, swapped files), at memory speed. It is no
defence against somebody who forges a file and its manifest together.
"""

from __future__ import annotations

import contextlib
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

import xxhash

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from typing_extensions import Buffer

_CHUNK_BYTES = 1 << 19  # stays in a processor's own cache between the read and the digest


@dataclass(frozen=True)
class FileDigest:
    """Length and digest of a file's content.

    Attributes:
        num_bytes: Length.
        digest: xxh3-128, 32 hexadecimal digits.
    """

    num_bytes: int
    digest: str


class Digest:
    """A running digest; what is fed in any pieces gives the digest of the whole."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_128()
        self.num_bytes = 0

    def update(self, data: Buffer) -> None:
        """Feed more bytes; releases the GIL for large pieces."""
        view = memoryview(data)
        self._state.update(view)
        self.num_bytes += view.nbytes

    def value(self) -> FileDigest:
        """Length and digest so far."""
        return FileDigest(self.num_bytes, self._state.hexdigest())


def digest_bytes(data: Buffer) -> str:
    """Digest of one buffer."""
    return xxhash.xxh3_128_hexdigest(memoryview(data))


def digest_file(path: Path) -> FileDigest:
    """Length and digest of a regular file, read in chunks.

    Raises:
        ValueError: The path names no regular file (a link, a device, a FIFO, a directory).
        OSError: It cannot be read.
    """
    fd = open_regular(path)
    try:
        digest = Digest()
        # One buffer for all: fresh memory for each chunk would cost more than reading it.
        buffer = memoryview(bytearray(min(_CHUNK_BYTES, os.fstat(fd).st_size + 1)))
        while count := os.readv(fd, [buffer]):
            digest.update(buffer[:count])
        return digest.value()
    finally:
        close_after_reading(fd)


def open_regular(path: Path) -> int:
    """Open a regular file for reading, following no link and waiting for no FIFO.

    Raises:
        ValueError: The path names something else, or a giant of holes; the message says what.
        OSError: It cannot be opened.
    """
    problem = not_a_plain_file(path, os.lstat(path))
    if problem is not None:
        raise ValueError(f"{path} {problem}")
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):  # changed between the two calls
        close_after_reading(fd)
        raise ValueError(f"{path} is not a regular file")
    return fd


def not_a_plain_file(path: Path, found: os.stat_result) -> str | None:
    """What is wrong with reading a file from end to end, as the end of a sentence; None if nothing is.

    A sparse giant costs its maker nothing, and its reader minutes. One that is longer than its whole file system
    was not written byte by byte; a file that only has holes (zeros that a copy left out) is fine.
    """
    if not stat.S_ISREG(found.st_mode):
        return f"is {_kind(found.st_mode)}, not a regular file"
    if found.st_blocks * 512 < found.st_size // 2:
        whole = os.statvfs(path)
        if 0 < whole.f_blocks * whole.f_frsize < found.st_size:
            return f"has {found.st_size:,} bytes, more than the file system that it lies on; nearly all are holes"
    return None


@contextlib.contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """A regular file, opened as `open_regular` does."""
    file = os.fdopen(open_regular(path), "rb")
    try:
        yield file
    finally:
        with contextlib.suppress(OSError):
            file.close()


def close_after_reading(fd: int) -> None:
    """Close a descriptor through which nothing was written: an error here loses nothing, so it is none."""
    with contextlib.suppress(OSError):
        os.close(fd)


def _kind(mode: int) -> str:
    names = {
        stat.S_IFLNK: "a symbolic link",
        stat.S_IFDIR: "a directory",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFBLK: "a block device",
        stat.S_IFCHR: "a character device",
    }
    return names.get(stat.S_IFMT(mode), "something else")

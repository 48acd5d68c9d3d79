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

_CHUNK_BYTES = 1 << 20


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
        while chunk := os.read(fd, _CHUNK_BYTES):
            digest.update(chunk)
        return digest.value()
    finally:
        close_after_reading(fd)


def open_regular(path: Path) -> int:
    """Open a regular file for reading, following no link and waiting for no FIFO.

    Raises:
        ValueError: The path names something else; the message says what.
        OSError: It cannot be opened.
    """
    mode = os.lstat(path).st_mode
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is {_kind(mode)}, not a regular file")
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):  # changed between the two calls
        close_after_reading(fd)
        raise ValueError(f"{path} is not a regular file")
    return fd


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

"""A disk that remembers every write and flush: one file, served by this process through /dev/fuse.

A real file system on it (loop device) does what it does on a real disk, and the log tells what a power loss at any
moment could have left. The kernel's protocol is spoken directly, in the few requests that one file needs, so that no
FUSE library has to be installed. Source: include/uapi/linux/fuse.h, protocol 7.31.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import struct
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NAME = "disk"
_MARK = "mark-"
_LOOKUP, _FORGET, _GETATTR, _SETATTR, _OPEN, _READ, _WRITE, _STATFS = 1, 2, 3, 4, 14, 15, 16, 17
_RELEASE, _FSYNC, _FLUSH, _INIT, _OPENDIR, _RELEASEDIR, _INTERRUPT, _BATCH_FORGET = 18, 20, 25, 26, 27, 29, 36, 42
_UNANSWERED = (_FORGET, _INTERRUPT, _BATCH_FORGET)
_BIG_WRITES = 1 << 5
_MAX_WRITE = 131072
_ROOT, _DISK = 1, 2
_LONG_SECONDS = 3600
_RECORD = struct.Struct("<cQQ")
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Write:
    """Bytes that went to the disk's cache."""

    offset: int
    data: bytes


@dataclass(frozen=True)
class Mark:
    """A word that the process under test has said between two requests to the disk."""

    word: str


class Flush:
    """All writes before are durable."""


Record = Write | Mark | Flush


@contextlib.contextmanager
def logged_disk(image: Path, place: Path, log: Path) -> Iterator[Path]:
    """Serve an image as a disk whose requests are logged.

    Args:
        image: Its content; changed by what is written.
        place: Where the served file is mounted, as `disk`.
        log: Where the records go.

    Yields:
        The path of the served file.
    """
    place.mkdir(exist_ok=True)
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0".encode()
    if _libc.mount(b"logged", os.fsencode(place), b"fuse", 0, options):
        raise OSError(ctypes.get_errno(), "mounting through /dev/fuse failed", str(place))
    server = os.fork()  # after the mount: before it, the device refuses to be read
    if server == 0:
        _serve(device, image, log)
    os.close(device)
    try:
        yield place / NAME
    finally:
        _unmount(place)
        os.waitpid(server, 0)


def _unmount(place: Path) -> None:
    """A loop device lets go of its file an instant after it was told to."""
    for _ in range(100):
        if subprocess.run(["umount", str(place)], capture_output=True).returncode == 0:
            return
        time.sleep(0.02)
    subprocess.run(["umount", "-l", str(place)], capture_output=True)


def say(place: Path, word: str) -> None:
    """Put a mark into the log, after all that the disk was asked before."""
    with contextlib.suppress(FileNotFoundError):
        os.stat(place / f"{_MARK}{word}")


def records(log: Path) -> list[Record]:
    """What the disk was asked, in order."""
    data, at = log.read_bytes(), 0
    found: list[Record] = []
    while at < len(data):
        kind, offset, num_bytes = _RECORD.unpack_from(data, at)
        payload = data[at + _RECORD.size : at + _RECORD.size + num_bytes]
        at += _RECORD.size + num_bytes
        if kind == b"W":
            found.append(Write(offset, payload))
        else:
            found.append(Flush() if kind == b"F" else Mark(payload.decode()))
    return found


def _serve(device: int, image: Path, log: Path) -> None:
    """Answer the kernel until the mount is gone; never returns."""
    try:
        disk = _Disk(os.open(image, os.O_RDWR), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND))
        while True:
            request = os.read(device, _MAX_WRITE + 65536)
            _, operation, unique, node = struct.unpack_from("<IIQQ", request)
            if operation in _UNANSWERED:
                continue
            try:
                body, error = disk.answer(operation, node, request[40:]), 0
            except OSError as problem:
                body, error = b"", -(problem.errno or errno.EIO)
            os.write(device, struct.pack("<IiQ", 16 + len(body), error, unique) + body)
    except OSError as error:
        os._exit(0 if error.errno == errno.ENODEV else 1)  # ENODEV: unmounted
    finally:
        os._exit(1)


class _Disk:
    def __init__(self, image: int, log: int) -> None:
        self._image, self._log = image, log

    def answer(self, operation: int, node: int, body: bytes) -> bytes:
        """The reply to one request.

        Raises:
            OSError: The request is refused.
        """
        if operation == _INIT:
            return struct.pack("<IIIIHHIIHH32x", 7, 31, 65536, _BIG_WRITES, 16, 12, _MAX_WRITE, 1, 0, 0)
        if operation == _LOOKUP:
            return self._look_up(body.rstrip(b"\0").decode())
        if operation in (_GETATTR, _SETATTR):
            return struct.pack("<QII", _LONG_SECONDS, 0, 0) + self._attributes(node)
        if operation in (_OPEN, _OPENDIR):
            return struct.pack("<QIi", 0, 0, 0)
        if operation == _READ:
            _, offset, num_bytes = struct.unpack_from("<QQI", body)
            return os.pread(self._image, num_bytes, offset)
        if operation == _WRITE:
            _, offset, num_bytes = struct.unpack_from("<QQI", body)
            return self._write(offset, body[40 : 40 + num_bytes])
        if operation == _FSYNC:
            self._note(b"F", 0, b"")
            return b""
        if operation == _STATFS:
            return struct.pack("<QQQQQIII28x", 1 << 20, 1 << 20, 1 << 20, 2, 0, 4096, 255, 4096)
        if operation in (_RELEASE, _RELEASEDIR, _FLUSH):
            return b""
        raise OSError(errno.ENOSYS, "not needed for one file")

    def _look_up(self, name: str) -> bytes:
        if name == NAME:
            return struct.pack("<QQQQII", _DISK, 0, _LONG_SECONDS, _LONG_SECONDS, 0, 0) + self._attributes(_DISK)
        if name.startswith(_MARK):
            self._note(b"M", 0, name.removeprefix(_MARK).encode())
        raise OSError(errno.ENOENT, "no such file")

    def _attributes(self, node: int) -> bytes:
        is_disk = node == _DISK
        size = os.fstat(self._image).st_size if is_disk else 0
        mode = stat.S_IFREG | 0o600 if is_disk else stat.S_IFDIR | 0o755
        return struct.pack(
            "<6Q10I", node, size, size // 512, 0, 0, 0, 0, 0, 0, mode, 1 if is_disk else 2, 0, 0, 0, 4096, 0
        )

    def _write(self, offset: int, data: bytes) -> bytes:
        self._note(b"W", offset, data)
        os.pwrite(self._image, data, offset)
        return struct.pack("<II", len(data), 0)

    def _note(self, kind: bytes, offset: int, data: bytes) -> None:
        os.write(self._log, _RECORD.pack(kind, offset, len(data)) + data)

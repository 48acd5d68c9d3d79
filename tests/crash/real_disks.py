"""Real file systems on image files: made, mounted, and cut off as by a power loss. Linux, and root.

Every mount happens in a mount namespace of the process that makes it: it is gone with the process, however that
ends, and its loop device too. Nothing outside sees it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import multiprocessing
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from scenarios import SCENARIOS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lab import Lab

_MIB = 1 << 20
_NEW_MOUNT_NAMESPACE = 0x20000
_PRIVATE_AND_BELOW = 1 << 18 | 1 << 14  # mount(2): MS_PRIVATE | MS_REC
_REMOUNT = 32  # mount(2): MS_REMOUNT
_SHUTDOWN = 0x8004587D  # FS_IOC_SHUTDOWN, in <linux/fs.h> and ext4.h: _IOR('X', 125, __u32)
DROP_LOG, FLUSH_LOG = 2, 1  # FSOP_GOING_FLAGS_NOLOGFLUSH, FSOP_GOING_FLAGS_LOGFLUSH (xfs_fs.h)
_NEXT_FREE, _CONFIGURE, _AUTOCLEAR = 0x4C82, 0x4C0A, 4  # LOOP_CTL_GET_FREE, LOOP_CONFIGURE, LO_FLAGS_AUTOCLEAR
_TRIES = 200
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Kind:
    """A kind of file system.

    Attributes:
        name: As the kernel calls it.
        num_bytes: Of an image.
        make: The command that makes one.
        options: Mount options: nothing is committed by the clock, as one commit takes every missing sync with it.
        shuts_down: Whether it knows the shutdown call.
    """

    name: str
    num_bytes: int
    make: tuple[str, ...]
    options: str
    shuts_down: bool = True

    def missing(self) -> str | None:
        """What is missing to use it here; None if nothing is."""
        kernel = Path("/proc/filesystems").read_text().split()
        return next(
            (
                text
                for text, is_there in (
                    (f"the kernel has no {self.name}", self.name in kernel),
                    (f"{self.make[0]} is not installed", _command(self.make[0]) is not None),
                )
                if not is_there
            ),
            None,
        )

    def create(self, image: Path) -> None:
        """Make an empty file system in a new sparse file."""
        with image.open("wb") as file:
            file.truncate(self.num_bytes)
        _run([_command(self.make[0]) or self.make[0], *self.make[1:], str(image)])

    @contextlib.contextmanager
    def mounted(self, image: Path, place: Path) -> Iterator[None]:
        """The image's file system at a place; unmounted, with its loop device, afterwards."""
        place.mkdir(exist_ok=True)
        device = _loop_device(image)
        try:
            _call("mount", os.readlink(f"/proc/self/fd/{device}"), os.fspath(place), self.name, 0, self.options)
        finally:
            os.close(device)
        try:
            yield
        finally:
            _call("umount2", os.fspath(place), 0)


KINDS = (
    # Journals as small as they can be: a replay reads them, and there are a thousand replays.
    Kind("ext4", 16 * _MIB, ("mkfs.ext4", "-q", "-F", "-m", "0", "-J", "size=4"), "commit=1000"),
    Kind("xfs", 320 * _MIB, ("mkfs.xfs", "-q", "-f"), "nouuid"),
    Kind("btrfs", 128 * _MIB, ("mkfs.btrfs", "-q", "-f"), "commit=300", shuts_down=False),
)


@contextlib.contextmanager
def tmpfs(place: Path, options: str) -> Iterator[None]:
    """A file system in memory at a place, until the block ends."""
    _call("mount", "tmpfs", os.fspath(place), "tmpfs", 0, options)
    try:
        yield
    finally:
        _call("umount2", os.fspath(place), 0)


def remount_tmpfs(place: Path, options: str) -> None:
    """Change the limits of a file system in memory."""
    _call("mount", "tmpfs", os.fspath(place), "tmpfs", _REMOUNT, options)


def private_mounts() -> None:
    """Give this process, and those it forks from now on, mounts of its own."""
    _call("unshare", _NEW_MOUNT_NAMESPACE)
    _call("mount", None, "/", None, _PRIVATE_AND_BELOW, None)


@functools.cache
def why_not() -> str | None:
    """Why no file system can be mounted here; None if one can."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "mounting file systems takes Linux and root"
    kind = KINDS[0]
    if (missing := kind.missing()) is not None:
        return missing
    with tempfile.TemporaryDirectory() as directory:
        trial = multiprocessing.get_context("fork").Process(target=_try, args=(kind, Path(directory)))
        trial.start()
        trial.join()
    return None if trial.exitcode == 0 else "an image file cannot be mounted here (no loop devices, or not allowed)"


def _try(kind: Kind, directory: Path) -> None:
    try:
        private_mounts()
        kind.create(directory / "image")
        with kind.mounted(directory / "image", directory / "place"):
            pass
    except (OSError, RuntimeError):
        os._exit(1)


def usable(say: Callable[[str], None], kinds: Sequence[Kind]) -> list[Kind]:
    """Those kinds that can be used here; the others are named."""
    for kind in kinds:
        if (missing := kind.missing()) is not None:
            say(f"without {kind.name}: {missing}")
    return [kind for kind in kinds if kind.missing() is None]


def pairs(kinds: Sequence[Kind], lab: Lab) -> list[tuple[Kind, str]]:
    """Scenarios and where they are carried out: everywhere in the long form, each on one kind in the short."""
    names = lab.scenarios or tuple(SCENARIOS)
    if lab.long:
        return [(kind, name) for kind in kinds for name in names]
    return [(kinds[(lab.seed + place) % len(kinds)], name) for place, name in enumerate(names)]


def shut_down(place: Path, mode: int) -> None:
    """Cut a file system off from its disk at once; what it has not written is lost.

    Args:
        place: Where it is mounted.
        mode: `DROP_LOG`: as a power loss would; `FLUSH_LOG`: the journal is written first, the data are not, which
            gives more names without their content.
    """
    fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.ioctl(fd, _SHUTDOWN - (1 << 32), struct.pack("I", mode))
    finally:
        os.close(fd)


def flush(place: Path) -> None:
    """Make all of a file system durable."""
    fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _call("syncfs", fd)
    finally:
        os.close(fd)


def copy_sparsely(source: Path, target: Path) -> None:
    """Copy a file's data and leave its holes, and whole blocks of zeros, as holes."""
    with source.open("rb") as reading, target.open("wb") as writing:
        size = os.fstat(reading.fileno()).st_size
        writing.truncate(size)
        end = 0
        while end < size:
            try:
                start = os.lseek(reading.fileno(), end, os.SEEK_DATA)
            except OSError:  # ENXIO: a hole up to the end
                return
            end = os.lseek(reading.fileno(), start, os.SEEK_HOLE)
            for offset in range(start, end, _MIB):
                _copy_block(reading.fileno(), writing.fileno(), offset, min(_MIB, end - offset))


def _copy_block(source: int, target: int, offset: int, num_bytes: int) -> None:
    data = os.pread(source, num_bytes, offset)
    if data.count(0) < len(data):
        os.pwrite(target, data, offset)


def _command(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def _loop_device(image: Path) -> int:
    """A loop device, open, that shows a file; it is free again once it is neither open nor mounted.

    Others may take the free one first, and one that was freed stays busy for an instant: then the next is tried.
    """
    backing = os.open(image, os.O_RDWR | os.O_CLOEXEC)
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        settings = bytearray(304)  # struct loop_config in <linux/loop.h>
        struct.pack_into("<I", settings, 0, backing)
        struct.pack_into("<I", settings, 8 + 52, _AUTOCLEAR)
        for trial in range(_TRIES):
            device = -1
            try:
                number = fcntl.ioctl(control, _NEXT_FREE)
                device = os.open(f"/dev/loop{number}", os.O_RDWR | os.O_CLOEXEC)
                fcntl.ioctl(device, _CONFIGURE, settings)
                return device
            except OSError as error:
                if device >= 0:
                    os.close(device)
                if error.errno not in (errno.EBUSY, errno.ENXIO, errno.EAGAIN) or trial == _TRIES - 1:
                    raise
            time.sleep(0.01)
        raise AssertionError("unreachable")
    finally:
        os.close(control)
        os.close(backing)


def _call(name: str, *arguments: str | int | None) -> None:
    """A system call of the C library; its error as an exception."""
    given = [os.fsencode(argument) if isinstance(argument, str) else argument for argument in arguments]
    if getattr(_libc, name)(*given):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}{arguments}: {os.strerror(number)}")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")

"""Past the page cache: large files are written and read without a copy of them in the system's memory.

A copy there costs processor time that training needs, and pushes its data out. On virtual machines that give free
memory back to their host, having the pages again took up to 4 s for 1.1 GB, all of it processor time; past the cache
the same bytes took 0.6 s to write and 0.8 s to read, and 0.1 s of processor time.

Only where the file system lies on a block device: on a network its own cache gathers calls better. Every call must then
begin and end at whole blocks, in memory and in the file; whoever is refused goes through the cache. Nothing becomes
durable by it: a sync still must make it so.
"""

from __future__ import annotations

import mmap
import os

BLOCK_BYTES = 4096
LARGE_BYTES = 64 << 20
"""Less is as quick through the page cache, and soon found there by the next start."""


def bypass(fd: int, *, wanted: bool) -> bool:
    """Let calls of a descriptor go past the page cache from now on, or through it again; whether they go past it."""
    if not hasattr(os, "O_DIRECT") or os.major(os.fstat(fd).st_dev) == 0:
        return False
    import fcntl

    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT if wanted else flags & ~os.O_DIRECT)
    except OSError:
        return False
    return wanted


def bypass_to_read(fd: int) -> bool:
    """Let reads go past the page cache, if the file is large and not there; whether they do.

    Those that are refused all the same (`EINVAL`) are for the caller to do again, through it.
    """
    size = os.fstat(fd).st_size
    return size >= LARGE_BYTES and not _is_there(fd, size // 2) and bypass(fd, wanted=True)


def _is_there(fd: int, offset: int) -> bool:
    try:
        os.preadv(fd, [bytearray(1)], offset, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    except (OSError, AttributeError):  # it cannot be asked
        return True
    return True


def blocks(num_bytes: int) -> memoryview:
    """Memory for at least so many bytes that begins and ends with a block."""
    return memoryview(mmap.mmap(-1, max(1, -(-num_bytes // BLOCK_BYTES)) * BLOCK_BYTES))

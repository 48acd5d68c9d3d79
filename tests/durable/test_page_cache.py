"""Large files that are not in the page cache are read past it, and are the same read either way."""

from __future__ import annotations

import errno
import fcntl
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from resumable_trainer.durable import page_cache
from resumable_trainer.durable.digest import digest_bytes, digest_file
from resumable_trainer.durable.page_cache import BLOCK_BYTES, blocks, bypass, bypass_to_read

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NUM_BYTES = 3_000_001


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is not in the page cache, and counts as large."""
    monkeypatch.setattr(page_cache, "LARGE_BYTES", 1 << 20)
    path = tmp_path / "f"
    path.write_bytes(np.random.default_rng(1).integers(0, 256, NUM_BYTES, dtype=np.uint8).tobytes())
    fd = os.open(path, os.O_RDWR)
    os.fsync(fd)
    can_bypass = bypass(fd, wanted=True)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    if not can_bypass:
        pytest.skip(f"{tmp_path} lies on a file system whose page cache cannot be gone past")
    return path


@pytest.fixture
def fd(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    yield fd
    os.close(fd)


def is_past_cache(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)


def test_what_is_not_there_is_read_past_the_cache(fd: int) -> None:
    assert bypass_to_read(fd)
    assert is_past_cache(fd)


@pytest.mark.parametrize("case", ["there", "small", "cannot be asked", "not known how to ask"])
def test_all_else_is_read_through_the_cache(fd: int, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if case == "there":
        os.pread(fd, NUM_BYTES, 0)
    elif case == "small":
        monkeypatch.setattr(page_cache, "LARGE_BYTES", NUM_BYTES + 1)
    elif case == "cannot be asked":
        monkeypatch.setattr(os, "preadv", refused)
    else:
        monkeypatch.delattr(os, "RWF_NOWAIT")
    assert not bypass_to_read(fd)
    assert not is_past_cache(fd)


def refused(*_: Any) -> int:
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


def test_a_digest_is_the_same_past_the_cache(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ways: set[bool] = set()
    readv = os.readv

    def noted(fd: int, buffers: Any) -> int:
        ways.add(is_past_cache(fd))
        return readv(fd, buffers)

    monkeypatch.setattr(os, "readv", noted)
    found = digest_file(path)
    assert ways == {True}
    assert (found.num_bytes, found.digest) == (NUM_BYTES, digest_bytes(path.read_bytes()))
    assert digest_file(path) == found
    assert ways == {True, False}, "the second time it was there"


def test_a_read_that_is_refused_past_the_cache_goes_through_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readv = os.readv

    def larger_blocks(fd: int, buffers: Any) -> int:
        if is_past_cache(fd):
            raise OSError(errno.EINVAL, "larger blocks")
        return readv(fd, buffers)

    monkeypatch.setattr(os, "readv", larger_blocks)
    assert digest_file(path).digest == digest_bytes(path.read_bytes())


@pytest.mark.parametrize("number", [errno.EIO, errno.EINVAL])
def test_an_error_of_reading_is_one(path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def failing(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "readv", failing)
    with pytest.raises(OSError, match=os.strerror(number)):
        digest_file(path)


@pytest.mark.parametrize("num_bytes", [0, 1, BLOCK_BYTES, BLOCK_BYTES + 1])
def test_memory_for_blocks_is_whole_blocks(num_bytes: int) -> None:
    memory = blocks(num_bytes)
    assert memory.nbytes >= max(num_bytes, 1)
    assert memory.nbytes % BLOCK_BYTES == 0
    assert np.frombuffer(memory, dtype=np.uint8).ctypes.data % BLOCK_BYTES == 0

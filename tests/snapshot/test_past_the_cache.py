"""Tensors that are read past the page cache arrive as those that are read through it."""

from __future__ import annotations

import errno
import fcntl
import os
from typing import TYPE_CHECKING, Any

import pytest
import torch

from resumable_trainer.durable import page_cache
from resumable_trainer.durable.digest import digest_file
from resumable_trainer.durable.files import Files, NewFile
from resumable_trainer.errors import DamagedSnapshotError
from resumable_trainer.snapshot import in_place
from resumable_trainer.snapshot.tensors import TensorFile, write_tensors
from resumable_trainer.state.compare import same_bytes

if TYPE_CHECKING:
    from pathlib import Path


def tensors() -> dict[str, torch.Tensor]:
    return {
        "odd": torch.arange(5, dtype=torch.uint8),
        "large": torch.randn(700, 301),
        "scalar": torch.tensor(2.5),
        "larger": torch.randn(300_001, dtype=torch.float64),
        **{f"small {n}": torch.randn(n) for n in range(1, 60)},
        "flipped small": torch.randn(9, 5),
        "flipped": torch.randn(400, 301),
        "half": torch.randn(77_777).bfloat16(),
    }


def targets() -> dict[str, torch.Tensor]:
    found = {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}
    flipped = {name: torch.zeros_like(found[name].t()).t() for name in found if name.startswith("flipped")}
    return {**found, **flipped}


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of them that is not in the page cache, and counts as large."""
    monkeypatch.setattr(page_cache, "LARGE_BYTES", 1 << 20)
    monkeypatch.setattr(in_place, "_ALONE_BYTES", 1 << 20)
    path = tmp_path / "t.safetensors"
    with NewFile(path, files=Files()) as file:
        write_tensors(file, tensors_of_the_file)
    fd = os.open(path, os.O_RDONLY)
    can_bypass = page_cache.bypass(fd, wanted=True)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    if not can_bypass:
        pytest.skip(f"{tmp_path} lies on a file system whose page cache cannot be gone past")
    return path


tensors_of_the_file = tensors()


def is_past_cache(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)


@pytest.mark.parametrize("chunk_bytes", [10_000, 1 << 16, 2 << 20])
def test_what_is_read_past_the_cache_is_what_was_saved(
    path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr(in_place, "_CHUNK_BYTES", chunk_bytes)
    ways, preadv = set(), os.preadv

    def noted(fd: int, buffers: Any, offset: int, *flags: int) -> int:
        if not flags:
            ways.add(is_past_cache(fd))
        return preadv(fd, buffers, offset, *flags)

    monkeypatch.setattr(os, "preadv", noted)
    for is_past in (True, False):
        ways.clear()
        into = targets()
        with TensorFile(path) as file:
            digest = in_place.fill(file, into)
            assert ways == {is_past}
            assert same_bytes(file.read("larger"), tensors_of_the_file["larger"]), "read as any other afterwards"
        assert all(same_bytes(into[name], tensor) for name, tensor in tensors_of_the_file.items())
        assert digest == digest_file(path)
        with path.open("rb") as again:
            again.read()  # from now on it is there


def test_a_refused_read_goes_through_the_cache(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv

    def larger_blocks(fd: int, buffers: Any, offset: int, *flags: int) -> int:
        if offset > 1 << 20 and not flags and is_past_cache(fd):
            raise OSError(errno.EINVAL, "larger blocks")
        return preadv(fd, buffers, offset, *flags)

    monkeypatch.setattr(os, "preadv", larger_blocks)
    into = targets()
    with TensorFile(path) as file:
        in_place.fill(file, into)
    assert all(same_bytes(into[name], tensor) for name, tensor in tensors_of_the_file.items())


def test_short_reads_are_continued(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv

    def short(fd: int, buffers: Any, offset: int, *flags: int) -> int:
        return preadv(fd, [buffers[0][: page_cache.BLOCK_BYTES]], offset, *flags)

    monkeypatch.setattr(os, "preadv", short)
    into = targets()
    with TensorFile(path) as file:
        assert in_place.fill(file, into) == digest_file(path)
    assert all(same_bytes(into[name], tensor) for name, tensor in tensors_of_the_file.items())


def test_a_file_that_becomes_shorter_is_damaged(path: Path) -> None:
    with TensorFile(path) as file:
        os.truncate(path, (2 << 20) + 100)
        with pytest.raises(DamagedSnapshotError, match="ends too early"):
            in_place.fill(file, targets())


@pytest.mark.parametrize("number", [errno.EIO, errno.EINVAL])
def test_an_error_of_reading_is_one(path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def failing(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    with TensorFile(path) as file:
        monkeypatch.setattr(os, "preadv", failing)
        with pytest.raises(OSError, match=os.strerror(number)):
            in_place.fill(file, targets())

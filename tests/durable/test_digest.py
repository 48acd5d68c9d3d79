from __future__ import annotations

import errno
import os
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resumable_trainer.durable import digest as digest_module
from resumable_trainer.durable.digest import Digest, FileDigest, digest_bytes, digest_file, open_regular

if TYPE_CHECKING:
    from pathlib import Path


def test_only_regular_files_are_digested(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("/etc/passwd")
    for name, kind in (("fifo", "a FIFO"), ("link", "a symbolic link"), (".", "a directory")):
        with pytest.raises(ValueError, match=kind):
            digest_file(tmp_path / name)


def test_the_digest_is_the_published_xxh3_128() -> None:
    """The value for no bytes stands in the algorithm's own test vectors; a digest on disk must never change."""
    assert digest_bytes(b"") == "99aa06d3014798d86001c324468d497f"


@given(st.lists(st.binary(max_size=300)))
def test_any_pieces_give_the_digest_of_the_whole(pieces: list[bytes]) -> None:
    digest = Digest()
    for piece in pieces:
        digest.update(piece)
    whole = b"".join(pieces)
    assert digest.value() == FileDigest(len(whole), digest_bytes(whole))


@given(st.binary(min_size=1, max_size=200), st.data())
def test_any_flipped_bit_changes_the_digest(content: bytes, data: st.DataObject) -> None:
    bit = data.draw(st.integers(0, len(content) * 8 - 1))
    flipped = bytearray(content)
    flipped[bit // 8] ^= 1 << bit % 8
    assert digest_bytes(flipped) != digest_bytes(content)


@pytest.mark.parametrize("num_bytes", [0, 1, 9, 10, 11, 35])
def test_a_file_is_digested_whole_however_it_falls_into_chunks(
    tmp_path: Path, num_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest_module, "_CHUNK_BYTES", 10)
    content = os.urandom(num_bytes)
    (tmp_path / "f").write_bytes(content)
    assert digest_file(tmp_path / "f") == FileDigest(num_bytes, digest_bytes(content))


def test_a_file_that_is_not_there_is_not_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        digest_file(tmp_path / "f")


def test_a_refused_file_leaves_no_descriptor_open(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ValueError, match="not a regular file"):
        open_regular(tmp_path / "fifo")
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("what", ["fifo", "directory"])
def test_a_file_exchanged_between_the_look_and_the_opening_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"x")
    look = os.lstat

    def exchanged(name: Path) -> os.stat_result:
        found = look(name)
        path.unlink()
        os.mkfifo(path) if what == "fifo" else path.mkdir()
        return found

    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "lstat", exchanged)
        with pytest.raises(ValueError, match="is not a regular file"):
            open_regular(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_reading_leaves_no_descriptor_open_whatever_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_bytes(b"x")
    before = len(os.listdir("/proc/self/fd"))
    digest_file(tmp_path / "f")

    def interrupted() -> None:
        with digest_module.reading(tmp_path / "f") as file:
            assert file.read() == b"x"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()

    def broken(fd: int, buffers: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "readv", broken)
        with pytest.raises(OSError, match="Input/output error"):
            digest_file(tmp_path / "f")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_sparse_giant_is_refused_and_a_file_with_holes_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(1 << 20)
    assert digest_file(path).num_bytes == 1 << 20
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_blocks=10, f_frsize=4096))
    with pytest.raises(ValueError, match="more than the file system that it lies on"):
        digest_file(path)

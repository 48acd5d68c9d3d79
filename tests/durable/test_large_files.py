"""Files of many pieces: hashed, written and handed on to the disk piece by piece."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

import pytest

from resumable_trainer.durable import files as files_module
from resumable_trainer.durable.digest import digest_file
from resumable_trainer.durable.files import Files, NewFile

if TYPE_CHECKING:
    from pathlib import Path

PIECE = 64


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "_PIECE_BYTES", PIECE)


class Noting(Files):
    """Notes what is written, and which ranges the disk was told of."""

    def __init__(self, most: int = 10**9) -> None:
        self.most, self.calls = most, []

    def write(self, fd: int, data: Any) -> int:
        self.calls.append(("write", min(self.most, memoryview(data).nbytes)))
        return super().write(fd, memoryview(data)[: self.most])

    def start_writeback(self, fd: int, offset: int, num_bytes: int) -> None:
        self.calls.append((offset, num_bytes))
        assert os.fstat(fd).st_size >= offset + num_bytes, "only what was written can be handed on"
        super().start_writeback(fd, offset, num_bytes)


@pytest.mark.parametrize("length", [0, 1, PIECE - 1, PIECE, PIECE + 1, 5 * PIECE, 5 * PIECE + 7])
@pytest.mark.parametrize("most", [10**9, 9])
def test_a_file_of_any_length_is_whole_and_its_digest_that_of_its_bytes(tmp_path: Path, length: int, most: int) -> None:
    data = os.urandom(length)
    files = Noting(most)
    with NewFile(tmp_path / "f", files=files) as file:
        file.write(b"head")
        file.write(data)
    assert (tmp_path / "f").read_bytes() == b"head" + data
    assert file.digest == digest_file(tmp_path / "f")
    handed_on = [call for call in files.calls if call[0] != "write"]
    assert handed_on == [(4 + start, PIECE) for start in range(0, length - PIECE + 1, PIECE)]


def test_a_system_without_early_writeback_does_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "_SYNC_FILE_RANGE", None)
    with NewFile(tmp_path / "f", files=Files()) as file:
        file.write(bytes(3 * PIECE))
    assert (tmp_path / "f").read_bytes() == bytes(3 * PIECE)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EINVAL, errno.ESPIPE, errno.EOPNOTSUPP])
def test_a_file_system_that_refuses_the_hint_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(files_module, "_SYNC_FILE_RANGE", lambda *_: -1)
    monkeypatch.setattr(files_module.ctypes, "get_errno", lambda: number)
    with NewFile(tmp_path / "f", files=Files()) as file:
        file.write(bytes(PIECE))
    assert (tmp_path / "f").read_bytes() == bytes(PIECE)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_bytes_that_the_hint_reports_as_lost_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The kernel may forget such an error until the sync: the attempt is thrown away now."""
    monkeypatch.setattr(files_module, "_SYNC_FILE_RANGE", lambda *_: -1)
    monkeypatch.setattr(files_module.ctypes, "get_errno", lambda: number)
    with pytest.raises(OSError, match=os.strerror(number)), NewFile(tmp_path / "f", files=Files()) as file:
        file.write(bytes(PIECE))


def test_early_writeback_is_there_on_linux() -> None:
    if os.uname().sysname == "Linux":
        assert files_module._find_sync_file_range() is not None

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from resumable_trainer.durable.digest import digest_bytes, digest_file
from resumable_trainer.durable.files import (
    Files,
    NewFile,
    commit_directory,
    remove_tree,
    write_new_file,
    write_replacing,
)
from resumable_trainer.durable.journal import Journal, Mark, read_rows
from resumable_trainer.errors import SnapshotWriteError


class Dies(BaseException):
    """Stands for a kill: nothing after it runs."""


class Faulty(Files):
    """Fails, or dies, at the n-th call of any primitive; counts them all."""

    def __init__(self, at: int, error: BaseException | None) -> None:
        self.at, self.error, self.calls = at, error, 0

    def _count(self) -> None:
        self.calls += 1
        if self.calls == self.at and self.error is not None:
            raise self.error


def _counting(name: str) -> Any:
    def call(self: Faulty, *args: Any) -> Any:
        self._count()
        return getattr(Files, name)(self, *args)

    return call


for _name in [
    "make_directory",
    "create",
    "write",
    "sync",
    "close",
    "rename",
    "replace",
    "sync_directory",
    "remove_file",
    "remove_empty_directory",
]:
    setattr(Faulty, _name, _counting(_name))


def publish(files: Files, root: Path) -> None:
    temporary = root / ".tmp-new"
    files.make_directory(temporary)
    for name in ("a", "b"):
        write_new_file(files, temporary / name, name.encode() * 10)
    commit_directory(files, temporary, root / "new", check=lambda: None)


def whole(path: Path) -> bool:
    return {p.name: p.read_bytes() for p in path.iterdir()} == {"a": b"a" * 10, "b": b"b" * 10}


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), Dies()])
def test_a_commit_is_all_or_nothing_whatever_call_fails(tmp_path: Path, error: BaseException) -> None:
    counter = Faulty(0, None)
    (tmp_path / "dry").mkdir()
    publish(counter, tmp_path / "dry")
    assert counter.calls >= 12
    for at in range(1, counter.calls + 1):
        root = tmp_path / str(at)
        root.mkdir()
        with pytest.raises(type(error)):
            publish(Faulty(at, error), root)
        assert not (root / "new").exists() or whole(root / "new")
        for left in root.iterdir():
            if left.name.startswith("."):
                remove_tree(Files(), left)
        if not (root / "new").exists():
            publish(Files(), root)
        assert whole(root / "new")


def test_every_file_is_synced_before_the_name_and_the_parent_after_it(tmp_path: Path) -> None:
    calls: list[str] = []

    class Noting(Files):
        def sync(self, fd: int) -> None:
            calls.append("sync " + Path(os.readlink(f"/proc/self/fd/{fd}")).name)
            super().sync(fd)

        def rename(self, source: Path, target: Path) -> None:
            calls.append(f"rename {target.name}")
            super().rename(source, target)

        def sync_directory(self, path: Path) -> None:
            calls.append("directory " + ("temporary" if path.name == ".tmp-new" else "parent"))
            super().sync_directory(path)

    publish(Noting(), tmp_path)
    assert calls == ["sync a", "sync b", "directory temporary", "rename new", "directory parent"]


def test_a_removal_takes_the_name_away_first(tmp_path: Path) -> None:
    counter = Faulty(0, None)
    publish(Files(), tmp_path)
    remove_tree(counter, tmp_path / "new")
    for at in range(1, counter.calls + 1):
        root = tmp_path / str(at)
        root.mkdir()
        publish(Files(), root)
        with pytest.raises(Dies):
            remove_tree(Faulty(at, Dies()), root / "new")
        assert not (root / "new").exists() or whole(root / "new")


def test_short_writes_are_continued(tmp_path: Path) -> None:
    class Short(Files):
        def write(self, fd: int, data: Any) -> int:
            return super().write(fd, memoryview(data)[:3])

    with NewFile(tmp_path / "f", files=Short()) as file:
        file.write(b"0123456789")
    assert (tmp_path / "f").read_bytes() == b"0123456789"
    assert file.digest == digest_file(tmp_path / "f")
    assert file.digest.digest == digest_bytes(b"0123456789")


def test_a_taken_name_is_never_written_over(tmp_path: Path) -> None:
    publish(Files(), tmp_path)
    with pytest.raises(FileExistsError):
        publish(Files(), tmp_path)
    assert whole(tmp_path / "new")
    write_replacing(Files(), tmp_path / "r", b"1")
    write_replacing(Files(), tmp_path / "r", b"2")
    assert (tmp_path / "r").read_bytes() == b"2"


def test_only_regular_files_are_digested(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("/etc/passwd")
    for name, kind in (("fifo", "a FIFO"), ("link", "a symbolic link"), (".", "a directory")):
        with pytest.raises(ValueError, match=kind):
            digest_file(tmp_path / name)


def test_a_torn_last_line_is_cut_and_rows_come_back(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal = Journal.open(path)
    journal.append({"a": 1, "b": float("nan")})
    journal.append({"a": 2})
    journal.close()
    path.write_bytes(path.read_bytes() + b'{"a": 3')
    journal = Journal.open(path)
    assert journal.mark().rows == 2
    journal.append({"a": 4})
    journal.close()
    assert [row["a"] for row in read_rows(path)] == [1, 2, 4]
    assert path.read_text().splitlines()[0] == '{"a":1,"b":"NaN"}'


def test_rewind_cuts_to_the_mark_and_refuses_other_bytes(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal = Journal.open(path)
    journal.append({"a": 1})
    mark = journal.mark()
    before = path.read_bytes()
    journal.append({"a": 2})
    assert journal.rewind(mark)
    assert path.read_bytes() == before
    journal.append({"a": 3})
    later = journal.mark()
    assert not journal.rewind(Mark(mark.num_bytes, "0" * 32, 1))
    assert not journal.rewind(Mark(later.num_bytes + 1, later.digest, 3))
    assert journal.mark() == later
    journal.close()


def test_a_failed_sync_is_never_tried_again(tmp_path: Path) -> None:
    class Once(Files):
        failed = 0

        def sync(self, fd: int) -> None:
            self.failed += 1
            if self.failed == 1:
                raise OSError(errno.EIO, "Input/output error")

    files = Once()
    journal = Journal.open(tmp_path / "j", files=files)
    journal.append({"a": 1})
    with pytest.raises(SnapshotWriteError):
        journal.sync()
    with pytest.raises(SnapshotWriteError):
        journal.sync()
    assert files.failed == 1


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / "j").write_bytes(b'{"a":1}\nxx\n{"a":2}\n')
    with pytest.raises(ValueError, match="j line 2 is damaged"):
        list(read_rows(tmp_path / "j"))

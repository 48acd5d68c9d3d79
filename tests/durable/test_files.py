from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from resumable_trainer.durable import files as files_module
from resumable_trainer.durable.digest import digest_bytes, digest_file
from resumable_trainer.durable.files import (
    Files,
    NewFile,
    commit_directory,
    make_directories,
    move_directory,
    remove_tree,
    write_new_file,
    write_replacing,
)


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


class Killed(Faulty):
    """Is killed at the n-th call."""

    def _count(self) -> None:
        self.calls += 1
        if self.calls == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def publish_killed_everywhere(tmp_path: Path) -> None:
    """Publish in children killed at the first, second, ... call, until one is not; prints how many were."""
    status, at = -1, 0
    while status != 0:
        at += 1
        root = tmp_path / str(at)
        root.mkdir()
        pid = os.fork()
        if pid == 0:
            publish(Killed(at, None), root)
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        assert status in (0, signal.SIGKILL)
    print(at - 1)


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


def test_a_commit_is_all_or_nothing_wherever_the_process_is_killed(tmp_path: Path) -> None:
    """The same with a real SIGKILL: no exception handler gets to tidy up."""
    code = "import pathlib, sys, test_files; test_files.publish_killed_everywhere(pathlib.Path(sys.argv[1]))"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment, capture_output=True)
    assert int(done.stdout) >= 12
    roots = list(tmp_path.iterdir())
    assert len(roots) == int(done.stdout) + 1
    published = [root for root in roots if (root / "new").exists()]
    assert all(whole(root / "new") for root in published)
    assert 1 < len(published) < len(roots)  # some were killed after the rename, some before


def test_nothing_is_published_once_the_right_to_is_lost(tmp_path: Path) -> None:
    def lost() -> None:
        raise BlockingIOError("superseded")

    (tmp_path / ".tmp-new").mkdir()
    with pytest.raises(BlockingIOError):
        commit_directory(Files(), tmp_path / ".tmp-new", tmp_path / "new", check=lost)
    assert [path.name for path in tmp_path.iterdir()] == [".tmp-new"]


def test_a_commit_never_lands_on_an_empty_directory_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain rename would replace it; so would the fallback where there is no renameat2, if it did not look."""
    for name in ("with", "without"):
        root = tmp_path / name
        (root / "new").mkdir(parents=True)
        with pytest.raises(FileExistsError):
            publish(Files(), root)
        assert not any((root / "new").iterdir())
        monkeypatch.setattr(files_module, "_RENAMEAT2", None)
    publish(Files(), tmp_path)
    assert whole(tmp_path / "new")


def test_a_dangling_link_is_a_taken_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "_RENAMEAT2", None)
    (tmp_path / "new").symlink_to("nowhere")
    with pytest.raises(FileExistsError):
        publish(Files(), tmp_path)
    with pytest.raises(FileExistsError):
        write_new_file(Files(), tmp_path / "new", b"")


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), Dies()])
def test_a_replacement_is_all_or_nothing_whatever_call_fails(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "run.json"
    counter = Faulty(0, None)
    write_replacing(counter, path, b"old")
    assert counter.calls == 6
    for at in range(1, counter.calls + 1):
        write_replacing(Files(), path, b"old")
        with pytest.raises(type(error)):
            write_replacing(Faulty(at, error), path, b"new!")
        assert path.read_bytes() in (b"old", b"new!")


def test_a_move_is_never_neither_here_nor_there(tmp_path: Path) -> None:
    (tmp_path / "aside").mkdir()
    publish(Files(), tmp_path)
    counter = Faulty(0, None)
    move_directory(counter, tmp_path / "new", tmp_path / "aside" / "new")
    assert counter.calls == 3
    for at in range(1, counter.calls + 1):
        move_directory(Files(), tmp_path / "aside" / "new", tmp_path / "new")
        with pytest.raises(Dies):
            move_directory(Faulty(at, Dies()), tmp_path / "new", tmp_path / "aside" / "new")
        found = [path for path in (tmp_path / "new", tmp_path / "aside" / "new") if path.exists()]
        assert len(found) == 1
        assert whole(found[0])
        if found == [tmp_path / "new"]:
            move_directory(Files(), tmp_path / "new", tmp_path / "aside" / "new")


def test_a_removal_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_bytes(b"x")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "link").symlink_to(tmp_path / "precious")
    os.mkfifo(tmp_path / "old" / "fifo")
    remove_tree(Files(), tmp_path / "old")
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
    assert (tmp_path / "precious" / "file").exists()


def test_every_directory_made_on_the_way_is_durable_before_the_next(tmp_path: Path) -> None:
    calls: list[str] = []

    class Noting(Files):
        def make_directory(self, path: Path) -> None:
            calls.append(f"make {path.name}")
            super().make_directory(path)

        def sync_directory(self, path: Path) -> None:
            calls.append(f"sync {path.name}")
            super().sync_directory(path)

    make_directories(Noting(), tmp_path / "runs" / "pima")
    assert calls == ["make runs", f"sync {tmp_path.name}", "make pima", "sync runs"]
    make_directories(Noting(), tmp_path / "runs" / "pima")
    assert len(calls) == 4


def test_a_directory_cannot_be_made_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError):
        make_directories(Files(), tmp_path / "file" / "run")


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 3), ()])
def test_arrays_of_any_shape_are_written_as_their_bytes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape, dtype=int), dtype="<f4").reshape(shape)
    with NewFile(tmp_path / "f", files=Files()) as file:
        file.write(array)
    assert (tmp_path / "f").read_bytes() == array.tobytes()
    assert file.digest.num_bytes == array.nbytes


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        publish(Files(), tmp_path)
    finally:
        os.umask(before)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "new" / "a").stat().st_mode & 0o777 == 0o640


class ClosesWell(Faulty):
    """A close that fails before it closes would leak by the fake's doing, not by ours."""

    def close(self, fd: int) -> None:
        Files.close(self, fd)


def test_no_descriptor_is_left_open_whatever_call_fails(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for at in range(1, 15):
        root = tmp_path / str(at)
        root.mkdir()
        with contextlib.suppress(OSError):
            publish(ClosesWell(at, OSError(errno.EIO, "Input/output error")), root)
    assert len(os.listdir("/proc/self/fd")) == before


class Mac:
    """What macOS adds: its name, and a call that makes the drive itself write; each answer is handed in."""

    F_FULLFSYNC = 51
    platform = "darwin"

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: OSError | None) -> None:
        self.error = error
        self.calls: list[str] = []
        monkeypatch.setattr(files_module, "sys", self)
        monkeypatch.setitem(sys.modules, "fcntl", self)
        monkeypatch.setattr(os, "fsync", lambda fd: self.calls.append("fsync"))

    def fcntl(self, fd: int, command: int) -> None:
        assert command == self.F_FULLFSYNC
        self.calls.append("full")
        if self.error is not None:
            raise self.error


def test_on_macos_a_sync_goes_through_the_drive_s_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mac = Mac(monkeypatch, None)
    write_new_file(Files(), tmp_path / "f", b"x")
    assert mac.calls == ["full"]


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOTTY])
def test_on_macos_a_file_system_without_the_full_sync_gets_the_plain_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    mac = Mac(monkeypatch, OSError(number, os.strerror(number)))
    write_new_file(Files(), tmp_path / "f", b"x")
    assert mac.calls == ["full", "fsync"]


def test_on_macos_a_full_sync_that_fails_is_not_made_good_by_a_plain_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mac = Mac(monkeypatch, OSError(errno.EIO, "Input/output error"))
    with pytest.raises(OSError, match="Input/output error"):
        write_new_file(Files(), tmp_path / "f", b"x")
    assert mac.calls == ["full"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP])
def test_where_the_kernel_knows_no_exclusive_rename_the_name_is_looked_at_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refused(*_: Any) -> int:
        ctypes.set_errno(number)
        return -1

    monkeypatch.setattr(files_module, "_RENAMEAT2", refused)
    publish(Files(), tmp_path)
    assert whole(tmp_path / "new")
    with pytest.raises(FileExistsError):
        publish(Files(), tmp_path)


class NoLinux:
    platform = "darwin"


class OldLibrary:
    """A C library that has none of the newer calls."""


def no_library(*_: Any, **__: Any) -> None:
    raise OSError("a static build has no library to ask")


def test_the_exclusive_rename_is_there_on_linux_and_not_claimed_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform == "linux":
        assert files_module._find_renameat2() is not None
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: OldLibrary())
    assert files_module._find_renameat2() is None
    monkeypatch.setattr(ctypes, "CDLL", no_library)
    assert files_module._find_renameat2() is None
    monkeypatch.undo()
    monkeypatch.setattr(files_module, "sys", NoLinux)
    assert files_module._find_renameat2() is None


def test_an_error_of_the_exclusive_rename_is_an_error_and_names_both_ends(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as raised:
        Files().rename(tmp_path / "nothing", tmp_path / "new")
    assert (raised.value.filename, raised.value.filename2) == (str(tmp_path / "nothing"), str(tmp_path / "new"))


def test_a_move_syncs_each_directory_that_it_changes_the_new_name_s_first(tmp_path: Path) -> None:
    synced: list[str] = []

    class Noting(Files):
        def sync_directory(self, path: Path) -> None:
            synced.append(path.name)
            super().sync_directory(path)

    (tmp_path / "old").mkdir()
    (tmp_path / "aside").mkdir()
    move_directory(Noting(), tmp_path / "old", tmp_path / "new")
    assert synced == [tmp_path.name]
    move_directory(Noting(), tmp_path / "new", tmp_path / "aside" / "new")
    assert synced == [tmp_path.name, "aside", tmp_path.name]


def test_every_sync_reaches_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform == "darwin":
        pytest.skip("there it is another call")
    synced: list[str] = []
    sync = os.fsync

    def noted(fd: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        sync(fd)

    monkeypatch.setattr(os, "fsync", noted)
    publish(Files(), tmp_path)
    assert synced == ["a", "b", ".tmp-new", tmp_path.name]


def test_the_name_of_what_is_removed_is_durably_gone_before_its_first_file(tmp_path: Path) -> None:
    calls: list[str] = []

    class Noting(Files):
        def rename(self, source: Path, target: Path) -> None:
            calls.append(f"rename {source.name}")
            super().rename(source, target)

        def sync_directory(self, path: Path) -> None:
            calls.append(f"sync {path.name}")
            super().sync_directory(path)

        def remove_file(self, path: Path) -> None:
            calls.append(f"remove {path.name}")
            super().remove_file(path)

    publish(Files(), tmp_path)
    remove_tree(Noting(), tmp_path / "new")
    assert calls == ["rename new", f"sync {tmp_path.name}", "remove a", "remove b"]


def test_a_cut_file_is_cut(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"0123456789")
    fd = os.open(tmp_path / "f", os.O_RDWR)
    Files().truncate(fd, 4)
    Files().close(fd)
    assert (tmp_path / "f").read_bytes() == b"0123"


class Recorded(Files):
    """Notes of each write how many bytes it took, and whether they went past the page cache."""

    def __init__(self) -> None:
        self.writes: list[tuple[int, bool]] = []

    def is_past_cache(self, fd: int) -> bool:
        return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0))

    def write(self, fd: int, data: Any) -> int:
        self.writes.append((memoryview(data).nbytes, self.is_past_cache(fd)))
        return super().write(fd, data)

    def past_cache(self) -> int:
        return sum(num_bytes for num_bytes, is_past in self.writes if is_past)


def pages(num_bytes: int) -> memoryview:
    """Memory that begins with a page, as that of staged tensors does."""
    view = memoryview(mmap.mmap(-1, num_bytes))
    view[:] = np.random.default_rng(1).integers(0, 256, num_bytes, dtype=np.uint8).data
    return view


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, past_cache: list[int]) -> Path:
    """A directory where writes can go past the page cache, and need not be large for it."""
    monkeypatch.setattr(files_module, "LARGE_BYTES", 1 << 16)
    monkeypatch.setattr(files_module, "_PIECE_BYTES", 1 << 15)
    return tmp_path


def test_what_is_large_and_lies_alike_goes_past_the_page_cache(disk: Path) -> None:
    files, data = Recorded(), pages(300_001)
    with NewFile(disk / "f", files=files) as file:
        file.write(b"h" * 4096)
        file.write(data)
        file.write(b"end")
    whole = b"h" * 4096 + bytes(data) + b"end"
    assert (disk / "f").read_bytes() == whole
    assert file.digest.digest == digest_bytes(whole)
    assert files.past_cache() == 300_001 // 4096 * 4096
    assert [is_past for _, is_past in files.writes][-2:] == [False, False], "what is no whole block"


@pytest.mark.parametrize("case", ["small", "other memory", "within a block", "read-only"])
def test_what_is_small_or_lies_otherwise_goes_through_the_page_cache(disk: Path, case: str) -> None:
    files, data = Recorded(), pages(300_000)
    given = {"small": data[: (1 << 16) - 1], "other memory": data[512:], "read-only": data.toreadonly()}.get(case, data)
    head = b"h" * (100 if case == "within a block" else 4096)
    with NewFile(disk / "f", files=files) as file:
        file.write(head)
        file.write(given)
    assert (disk / "f").read_bytes() == head + bytes(given)
    assert files.past_cache() == 0


def test_a_file_system_that_refuses_a_write_past_its_cache_gets_it_through_it(disk: Path) -> None:
    class Refusing(Recorded):
        def write(self, fd: int, data: Any) -> int:
            if self.is_past_cache(fd) and len(self.writes) == 3:
                raise OSError(errno.EINVAL, "larger blocks")
            return super().write(fd, data)

    files, data = Refusing(), pages(300_000)
    with NewFile(disk / "f", files=files) as file:
        file.write(data)
    assert (disk / "f").read_bytes() == bytes(data)
    assert file.digest.digest == digest_bytes(bytes(data))
    assert files.past_cache() == 3 << 15


def test_a_short_write_past_the_cache_that_ends_within_a_block_is_continued(disk: Path) -> None:
    class Short(Recorded):
        def write(self, fd: int, data: Any) -> int:
            if len(self.writes) == 1:  # the kernel takes no part of a block past its cache: so it is told afterwards
                taken = super().write(fd, data)
                os.lseek(fd, 100 - taken, os.SEEK_CUR)
                return 100
            return super().write(fd, data)

    files, data = Short(), pages(300_000)
    with NewFile(disk / "f", files=files) as file:
        file.write(data)
    assert (disk / "f").read_bytes() == bytes(data)
    assert files.past_cache() < 4 << 15, "the write after it was refused, and went through the cache"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_another_error_past_the_cache_is_one(disk: Path, number: int) -> None:
    class Failing(Recorded):
        def write(self, fd: int, data: Any) -> int:
            raise OSError(number, os.strerror(number))

    with pytest.raises(OSError, match=os.strerror(number)), NewFile(disk / "f", files=Failing()) as file:
        file.write(pages(300_000))


def test_an_invalid_write_through_the_cache_is_an_error(tmp_path: Path) -> None:
    class Invalid(Files):
        def write(self, fd: int, data: Any) -> int:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    with pytest.raises(OSError, match="Invalid"), NewFile(tmp_path / "f", files=Invalid()) as file:
        file.write(b"few")


def test_no_cache_is_gone_past_where_that_is_not_to_be_had(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (disk / "f").open("wb") as file:
        fd = file.fileno()
        found = os.fstat(fd)
        with monkeypatch.context() as patch:  # no block device: tmpfs, overlays, networks
            patch.setattr(os, "fstat", lambda _: os.stat_result((*found[:2], 5, *found[3:])))
            assert not Files().bypass_page_cache(fd, wanted=True)
        with monkeypatch.context() as patch:
            patch.setattr(fcntl, "fcntl", lambda _, what, *flags: 0 if what == fcntl.F_GETFL else refuse())
            assert not Files().bypass_page_cache(fd, wanted=True)
        with monkeypatch.context() as patch:
            patch.delattr(os, "O_DIRECT")
            assert not Files().bypass_page_cache(fd, wanted=True)
        assert Files().bypass_page_cache(fd, wanted=True)
        assert not Files().bypass_page_cache(fd, wanted=False)
        assert not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT


def refuse() -> int:
    raise OSError(errno.EINVAL, "no such flag")

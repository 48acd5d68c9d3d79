"""Traits of file systems, room, links: what is said before a run starts, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from resumable_trainer.durable import filesystem
from resumable_trainer.errors import SettingsError

MOUNTS = r"""
22 1 254:0 / / rw,relatime - ext4 /dev/root rw
25 22 0:23 / /memory rw - tmpfs tmpfs rw,size=1000k
26 22 0:24 / /with\040space rw - nfs4 host:/export rw,vers=4.2,local_lock=all
27 22 0:25 / /container rw - overlay overlay rw,lowerdir=/a,upperdir=/b,fsync=volatile
28 22 0:26 / /layer rw - overlay overlay rw,lowerdir=/a,upperdir=/b
29 22 0:27 / /memory/disk rw - xfs /dev/loop0 rw
"""


@pytest.fixture
def mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(MOUNTS.lstrip())
    monkeypatch.setattr(filesystem, "_MOUNTS", table)
    monkeypatch.delenv("LD_PRELOAD", raising=False)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/elsewhere/run", "ext4"),
        ("/memory/runs/a", "tmpfs"),
        ("/memory/disk/a", "xfs"),
        ("/memoryless/a", "ext4"),
        ("/with space/a", "nfs4"),
    ],
)
@pytest.mark.usefixtures("mounts")
def test_the_innermost_mount_tells_the_kind(path: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem, "_nearest_existing", lambda path: path)
    assert filesystem.file_system(Path(path)).kind == kind


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("/memory/a", "lies in memory (tmpfs)"),
        ("/with space/a", "without shared locks"),
        ("/container/a", "syncs are off"),
        ("/layer/a", "container's own layer"),
    ],
)
@pytest.mark.usefixtures("mounts")
def test_each_trait_that_endangers_a_run_is_said(path: str, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem, "_nearest_existing", lambda path: path)
    (line,) = filesystem.warnings(Path(path))
    assert word in line
    assert path in line


@pytest.mark.usefixtures("mounts")
def test_a_sound_place_gives_no_warning_and_an_open_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert filesystem.warnings(tmp_path) == []
    tmp_path.chmod(0o777)
    (line,) = filesystem.warnings(tmp_path)
    assert "everybody" in line
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libeatmydata.so")
    assert any("libeatmydata" in line for line in filesystem.warnings(tmp_path))


@pytest.mark.usefixtures("mounts")
def test_a_directory_of_another_user_is_said(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to give a directory away")
    os.chown(tmp_path, 12345, -1)
    (line,) = filesystem.warnings(tmp_path)
    assert "12345" in line


def test_without_a_mount_table_nothing_is_claimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem, "_MOUNTS", tmp_path / "none")
    assert filesystem.file_system(tmp_path).kind == ""


def test_the_kind_of_the_real_file_system_is_found(tmp_path: Path) -> None:
    if not Path("/proc/self/mountinfo").exists():
        pytest.skip("no /proc here")
    found = filesystem.file_system(tmp_path / "not" / "there" / "yet")
    assert found.kind
    assert tmp_path.is_relative_to(found.mount_point)


def test_room_counts_bytes_and_files(tmp_path: Path) -> None:
    room = filesystem.room(tmp_path)
    assert room.holds(num_bytes=1000, files=1)
    assert not room.holds(num_bytes=1 << 62, files=1)
    assert not filesystem.Room(num_bytes=10_000_000, files=2).holds(num_bytes=1, files=3)
    exactly = filesystem.Room(filesystem.bytes_on_disk(1000, files=2), 2)
    assert exactly.holds(num_bytes=1000, files=2)
    assert not exactly.holds(num_bytes=1001, files=2)
    assert filesystem.Room(num_bytes=None, files=None).holds(num_bytes=1 << 62, files=1 << 40)


def test_room_of_a_directory_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        filesystem.room(tmp_path / "gone")


def test_links_in_the_place_of_a_run_s_own_files_are_refused_all_at_once(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("somebody's")
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "other")
    os.link(tmp_path / "other", tmp_path / "events.jsonl")
    (tmp_path / "snapshots").mkdir()
    with pytest.raises(SettingsError) as raised:
        filesystem.refuse_links(tmp_path, ("metrics.jsonl", "events.jsonl", "snapshots", "run.json"))
    assert "metrics.jsonl is a symbolic link" in str(raised.value)
    assert "events.jsonl has 2 names" in str(raised.value)
    assert "snapshots" not in str(raised.value)


def test_plain_files_and_directories_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "snapshots").mkdir()
    filesystem.refuse_links(tmp_path, ("metrics.jsonl", "snapshots", "not-there"))


@pytest.mark.parametrize(("user", "expected"), [(0, (50, 7)), (1000, (30, 6))])
def test_what_is_kept_back_for_root_is_room_for_root_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, user: int, expected: tuple[int, int]
) -> None:
    counts = {"f_frsize": 10, "f_blocks": 9, "f_bfree": 5, "f_bavail": 3, "f_files": 9, "f_ffree": 7, "f_favail": 6}
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(**counts))
    monkeypatch.setattr(os, "geteuid", lambda: user)
    assert filesystem.room(tmp_path) == filesystem.Room(*expected)
    counts.update(f_blocks=0, f_files=0)
    assert filesystem.room(tmp_path) == filesystem.Room(None, None), "what is not counted is not full"


def test_only_on_a_network_do_local_locks_endanger_a_run() -> None:
    shared = filesystem.FileSystem("nfs4", Path("/a"), frozenset({"rw"}))
    local = filesystem.FileSystem("nfs4", Path("/a"), frozenset({"rw", "nolock"}))
    disk = filesystem.FileSystem("ext4", Path("/a"), frozenset({"rw", "nolock"}))
    assert [place.locks_are_local for place in (shared, local, disk)] == [False, True, False]


def test_what_is_neither_a_file_nor_a_directory_is_refused_in_a_run_s_own_places(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "run.json")
    with pytest.raises(SettingsError, match=r"run\.json is a FIFO"):
        filesystem.refuse_links(tmp_path, ("run.json", "run.lock"))

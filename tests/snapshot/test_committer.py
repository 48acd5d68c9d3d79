"""Attempts, room and retention: what a disk that fails or fills up may cost, and what it may not."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch

from resumable_trainer import DamagedSnapshotError, RunHeldError, SnapshotWriteError, StateManager
from resumable_trainer.durable import filesystem
from resumable_trainer.durable.digest import digest_bytes
from resumable_trainer.durable.files import Files
from resumable_trainer.manager import Facts
from resumable_trainer.snapshot import committer
from resumable_trainer.snapshot.layout import Position
from resumable_trainer.snapshot.manifest import Best, from_bytes
from resumable_trainer.snapshot.retention import kept_of, to_delete
from resumable_trainer.snapshot.store import Store
from resumable_trainer.snapshot.writer import StateFiles

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CALLS = ("make_directory", "create", "write", "sync", "close", "rename", "sync_directory")


class Failing(Files):
    """Fails at the n-th call of one primitive, and at as many after it as it is told."""

    def __init__(self) -> None:
        self.call, self.at, self.times, self.number = "", 0, 0, errno.EIO
        self.made: dict[str, list[int]] = {}

    def arm(self, call: str, *, at: int = 0, times: int = 1, number: int = errno.EIO) -> None:
        self.call, self.at, self.times, self.number = call, at, times, number

    def __getattribute__(self, name: str) -> Any:
        if name in CALLS and object.__getattribute__(self, "call") == name:
            self.at -= 1
            if self.at < 0 and self.times > 0:
                self.times -= 1
                raise OSError(self.number, os.strerror(self.number))
        return object.__getattribute__(self, name)


def make(directory: Path, files: Files | None = None, **settings: Any) -> tuple[StateManager, torch.nn.Linear]:
    torch.manual_seed(0)
    model = torch.nn.Linear(20, 20)
    return StateManager(directory, state={"model": model}, files=files, **settings), model


def save(manager: StateManager, step: int) -> None:
    manager.snapshot(epoch=0, batch=step, step=step, background=False)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "snapshots").iterdir())


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("call", CALLS)
def test_an_error_that_passes_costs_another_attempt_with_new_files_and_nothing_else(
    tmp_path: Path, call: str, times: int
) -> None:
    files = Failing()
    manager, model = make(tmp_path / "run", files)
    with manager:
        save(manager, 1)
        files.arm(call, times=times)
        save(manager, 2)
        assert files.times == 0, "the fault was not met"
        assert names(tmp_path / "run") == ["step-000000001", "step-000000002"]
        manager.store.verify("step-000000002")
        expected = model.weight.clone()
        torch.nn.init.zeros_(model.weight)
        assert manager.restore().snapshot == "step-000000002"
        assert torch.equal(model.weight, expected)
    first = events(tmp_path / "run", "attempt_failed")[0]
    assert (first["snapshot"], first["attempt"]) == ("step-000000002", 1)
    assert os.strerror(errno.EIO) in first["reason"]


@pytest.mark.parametrize("call", CALLS)
def test_an_error_that_stays_ends_the_attempts_and_leaves_what_was_durable(tmp_path: Path, call: str) -> None:
    files = Failing()
    manager, _ = make(tmp_path / "run", files)
    with manager:
        save(manager, 1)
        files.arm(call, times=1000)
        with pytest.raises(SnapshotWriteError, match="the last durable one is step-000000001"):
            save(manager, 2)
        assert 1000 - files.times < 20, "attempts are bounded"
        files.arm("")
        assert manager.store.names() == ["step-000000001"]
        save(manager, 3)
        assert manager.store.names() == ["step-000000001", "step-000000003"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_what_lasts_is_tried_once(tmp_path: Path, number: int) -> None:
    files = Failing()
    manager, _ = make(tmp_path / "run", files)
    with manager:
        files.arm("sync", times=5, number=number)
        with pytest.raises(SnapshotWriteError, match=os.strerror(number)):
            save(manager, 1)
        assert files.times == 4


def test_a_snapshot_whose_entry_could_not_be_synced_does_not_count(tmp_path: Path) -> None:
    """It has its final name when the sync of the parent fails; acknowledged it must not be, nor found."""
    files = Failing()
    manager, _ = make(tmp_path / "run", files)
    with manager:
        save(manager, 1)
        files.arm("sync_directory", at=1, times=1, number=errno.ENOSPC)  # 0: its own entries, 1: the parent's
        with pytest.raises(SnapshotWriteError):
            save(manager, 2)
        assert files.times == 0
        assert manager.store.names() == ["step-000000001"]
        assert manager.latest == "step-000000001"


def test_a_rename_whose_reply_was_lost_is_a_rename(tmp_path: Path) -> None:
    class LostReply(Files):
        def rename(self, source: Path, target: Path) -> None:
            super().rename(source, target)
            if target.name.startswith("step-"):
                raise OSError(errno.ENOENT, "No such file or directory")  # what a repeated NFS rename says

    manager, _ = make(tmp_path / "run", LostReply())
    with manager:
        save(manager, 1)
        assert manager.latest == "step-000000001"
    assert names(tmp_path / "run") == ["step-000000001"]


def test_a_failed_attempt_never_takes_away_the_snapshot_of_who_superseded_it(tmp_path: Path) -> None:
    """The other launch commits the same position just before we do."""

    class Superseded(Files):
        armed = False

        def rename(self, source: Path, target: Path) -> None:
            if self.armed and target.name == "step-000000002" and not target.exists():
                shutil.copytree(source, target)
            super().rename(source, target)

    files = Superseded()
    manager, _ = make(tmp_path / "run", files)
    with manager:
        save(manager, 1)
        files.armed = True
        with pytest.raises(SnapshotWriteError):
            save(manager, 2)
        assert manager.store.names() == ["step-000000001", "step-000000002"]


def test_losing_the_run_is_no_write_error_and_is_not_tried_again(tmp_path: Path) -> None:
    manager, _ = make(tmp_path / "run")
    with manager:
        save(manager, 1)
        (tmp_path / "run/run.lock").unlink()
        with pytest.raises(RunHeldError, match="lock file is gone"):
            save(manager, 2)
        assert names(tmp_path / "run") == ["step-000000001"]


def test_a_snapshot_of_another_line_at_the_same_position_is_set_aside_not_taken_for_ours(tmp_path: Path) -> None:
    manager, model = make(tmp_path / "run")
    with manager:
        save(manager, 5)
    manager, model = make(tmp_path / "run")
    with manager:  # nothing is restored: another state comes to the same step
        with torch.no_grad():
            model.weight.add_(1)
        save(manager, 5)
        expected = model.weight.clone()
        torch.nn.init.zeros_(model.weight)
        manager.restore()
        assert torch.equal(model.weight, expected)
    assert [path.name for path in (tmp_path / "run/set-aside/line-1").iterdir() if path.is_dir()] == ["step-000000005"]


class Rows:
    """A journal whose `sync` is told."""

    whole_file = None

    def __init__(self, sync: Callable[[], None]) -> None:
        self.sync = sync


class Disk:
    """How much room there is: a disk on which every snapshot takes one unit."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, directory: Path, *, snapshots: int) -> None:
        self.snapshots, self.directory, self.unlimited = snapshots, directory, False
        monkeypatch.setattr(committer, "room", self.room)

    def room(self, path: Path) -> filesystem.Room:
        assert path == self.directory
        used = len(Store(path).names())
        return filesystem.Room(10**9 if used < self.snapshots or self.unlimited else 100, 10**6)


def keep(number: int) -> Any:
    return lambda kept: to_delete(kept, keep_last=number, keep_best=0, keep_every=None)


def test_without_room_nothing_is_written_and_the_message_says_how_much_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch, tmp_path / "run", snapshots=2)
    manager, _ = make(tmp_path / "run", retain=keep(5))
    with manager:
        save(manager, 1)
        save(manager, 2)
        with pytest.raises(SnapshotWriteError, match=r"it needs [\d,]+ bytes, 100 are free on"):
            save(manager, 3)
        assert names(tmp_path / "run") == ["step-000000001", "step-000000002"]
        disk.unlimited = True
        save(manager, 4)
        assert manager.latest == "step-000000004"


def test_short_of_room_what_retention_gives_up_goes_first_and_the_newest_never(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Disk(monkeypatch, tmp_path / "run", snapshots=3)
    manager, _ = make(tmp_path / "run", retain=keep(3))
    with manager:
        for step in range(1, 7):
            save(manager, step)
        assert names(tmp_path / "run") == ["step-000000004", "step-000000005", "step-000000006"]


def test_the_only_durable_snapshot_is_not_given_for_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Disk(monkeypatch, tmp_path / "run", snapshots=1)
    manager, _ = make(tmp_path / "run", retain=keep(1))
    with manager:
        save(manager, 1)
        with pytest.raises(SnapshotWriteError):
            save(manager, 2)
        assert names(tmp_path / "run") == ["step-000000001"]


def test_the_estimate_covers_what_is_written(tmp_path: Path) -> None:
    manager, _ = make(tmp_path / "run")
    with manager:
        staged = manager.stage(manager.capture())
        num_bytes, num_files = StateFiles(staged).size()
        save(manager, 1)
    written = list((tmp_path / "run/snapshots/step-000000001").iterdir())
    assert sum(path.stat().st_size for path in written) <= num_bytes
    assert len(written) + 1 <= num_files


def test_as_many_stay_after_a_new_start_as_before_it(tmp_path: Path) -> None:
    for step in range(1, 6):
        manager, _ = make(tmp_path / "run", retain=keep(3))
        with manager:
            manager.restore()
            save(manager, step)
        assert names(tmp_path / "run") == [f"step-{n:09d}" for n in range(max(1, step - 2), step + 1)]


def test_too_few_file_entries_are_a_full_disk_too_and_are_said_as_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(committer, "room", lambda path: filesystem.Room(10**12, 2))
    manager, _ = make(tmp_path / "run")
    with manager, pytest.raises(SnapshotWriteError, match=r"it needs \d+ file entries, 2 are free on .*\("):
        save(manager, 1)
    assert not (tmp_path / "run/snapshots").exists()


def test_no_more_is_deleted_early_than_the_new_one_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager, _ = make(tmp_path / "run", retain=keep(9))
    with manager:
        for step in range(1, 6):
            save(manager, step)
    Disk(monkeypatch, tmp_path / "run", snapshots=5)
    manager, _ = make(tmp_path / "run", retain=lambda kept: [snapshot.name for snapshot in kept[:3]])
    with manager:
        manager.restore()
        notes: list[str] = []
        monkeypatch.setattr(manager, "note", lambda event, **fields: notes.append(f"{event} {fields.get('snapshot')}"))
        save(manager, 6)
        assert notes == ["deleted_early step-000000001", "committed step-000000006"]


def test_who_has_lost_the_run_deletes_nothing_of_it_to_make_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager, _ = make(tmp_path / "run", retain=keep(1))
    with manager:
        save(manager, 1)
        save(manager, 2)
        Disk(monkeypatch, tmp_path / "run", snapshots=1)
        (tmp_path / "run/snapshots/.tmp-of-who-has-it-now").mkdir()
        (tmp_path / "run/run.lock").unlink()
        with pytest.raises(RunHeldError):
            save(manager, 3)
    assert names(tmp_path / "run") == [".tmp-of-who-has-it-now", "step-000000002"]


def events(directory: Path, kind: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == kind]


class Undeletable(Files):
    """Gives nothing the name of what is to be removed."""

    def rename(self, source: Path, target: Path) -> None:
        if target.name.startswith(".trash-"):
            raise OSError(errno.EIO, "Input/output error")
        super().rename(source, target)


def test_an_old_snapshot_that_cannot_be_deleted_is_noted_and_stops_nothing(tmp_path: Path) -> None:
    manager, _ = make(tmp_path / "run", Undeletable(), retain=keep(1))
    with manager:
        for step in (1, 2, 3):
            save(manager, step)
        assert manager.latest == "step-000000003"
    assert names(tmp_path / "run") == ["step-000000001", "step-000000002", "step-000000003"]
    found = events(tmp_path / "run", "not_deleted")
    assert [event["snapshot"] for event in found] == ["step-000000001", "step-000000002"], "each is tried once"
    assert "Input/output error" in found[0]["reason"]


def test_retention_that_cannot_look_deletes_nothing_and_the_snapshot_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        manager, _ = make(tmp_path / "run", retain=keep(9))
        with manager:
            manager.restore()
            save(manager, step)

    def unreadable() -> list[str]:
        raise OSError(errno.EIO, "Input/output error")

    manager, _ = make(tmp_path / "run", retain=keep(1))
    with manager:
        manager.restore()
        with monkeypatch.context() as patch:
            patch.setattr(manager.store, "names", unreadable)
            save(manager, 3)
        assert manager.latest == "step-000000003"
        assert manager.store.names() == ["step-000000001", "step-000000002", "step-000000003"]
        save(manager, 4)
        assert manager.store.names() == ["step-000000004"], "the next one makes up for it"
    assert "Input/output error" in events(tmp_path / "run", "not_deleted")[0]["reason"]


def test_retention_neither_counts_nor_deletes_what_it_cannot_read(tmp_path: Path) -> None:
    manager, _ = make(tmp_path / "run", retain=keep(9))
    with manager:
        for step in (1, 2, 3):
            save(manager, step)
    (tmp_path / "run/snapshots/step-000000002/manifest.json").write_bytes(b"{}")
    manager, _ = make(tmp_path / "run", retain=keep(2))
    with manager:
        manager.restore()
        save(manager, 4)
    assert names(tmp_path / "run") == ["step-000000002", "step-000000003", "step-000000004"]


def test_a_word_among_the_metrics_that_is_no_number_is_damage(tmp_path: Path) -> None:
    """Nothing here writes one, and what retention keeps hangs on them."""
    manager, _ = make(tmp_path / "run")
    with manager:
        save(manager, 1)
        manifest = manager.store.verify("step-000000001")
    said = manifest.model_copy(
        update={
            "metrics": {"b": "-Infinity", "c": 1},
            "best": Best(metric="b", value=1.0, epoch=0, step=1),
            "epoch_complete": True,
        }
    )
    assert from_bytes(said.to_bytes()).metric_values == {"b": -math.inf, "c": 1}
    assert kept_of(said).value == -math.inf
    body = said.to_bytes().partition(b',\n  "digest": "')[0].replace(b'"-Infinity"', b'"high"')
    with pytest.raises(DamagedSnapshotError, match="does not describe a snapshot"):
        from_bytes(body + b',\n  "digest": "%s"\n}\n' % digest_bytes(body).encode())


def test_files_and_rows_are_durable_before_the_manifest_that_counts_them_is(tmp_path: Path) -> None:
    done: list[str] = []
    names_of: dict[int, str] = {}

    class Noting(Files):
        def create(self, path: Path) -> int:
            fd = super().create(path)
            names_of[fd] = path.name
            return fd

        def sync(self, fd: int) -> None:
            super().sync(fd)
            done.append(names_of.get(fd, "another"))

    manager, _ = make(tmp_path / "run", Noting())
    with manager:
        staged = manager.stage(manager.capture())
        done.clear()
        manager.write(staged, Facts(Position(0, 1, 1)), background=False, rows=Rows(lambda: done.append("rows")))
        saved = {path.name for path in manager.store.path("step-000000001").iterdir()} - {"manifest.json"}
        assert len(saved) > 2
        assert set(done[: len(saved)]) == saved
        assert done[len(saved) : len(saved) + 2] == ["rows", "manifest.json"]
        done.clear()

        def failing() -> None:
            done.append("rows")
            raise OSError(errno.EIO, "Input/output error")

        with pytest.raises(SnapshotWriteError, match="Input/output error"):
            manager.write(staged, Facts(Position(0, 2, 2)), background=False, rows=Rows(failing))
        assert done.count("rows") == 3
        assert "manifest.json" not in done
    assert names(tmp_path / "run") == ["step-000000001"]


def test_short_of_room_what_a_killed_attempt_has_left_goes_before_any_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager, _ = make(tmp_path / "run", retain=keep(9))
    with manager:
        save(manager, 1)
        save(manager, 2)
        left = tmp_path / "run/snapshots/.tmp-step-000000009-ab"
        left.mkdir()
        monkeypatch.setattr(committer, "room", lambda path: filesystem.Room(0 if left.exists() else 10**9, 10**6))
        save(manager, 3)
    assert names(tmp_path / "run") == ["step-000000001", "step-000000002", "step-000000003"]

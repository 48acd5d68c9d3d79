"""The scribe: what it commits is what the training would have committed, and it is trusted with nothing else."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from resumable_trainer import EarlyStopping, Run, RunHeldError, SnapshotPolicy, SnapshotWriteError, StateManager
from resumable_trainer.durable.files import Files
from resumable_trainer.durable.journal import Journal, read_rows
from resumable_trainer.durable.lock import RunLock
from resumable_trainer.manager import Facts
from resumable_trainer.snapshot import dictation, scribe, scribe_process
from resumable_trainer.snapshot.layout import EVENTS, RUN_LOCK, Position
from resumable_trainer.snapshot.pending import OrderedSnapshot

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(not scribe.can_be_used(), reason="the scribe is used on Linux only")
PATIENCE_SECONDS = 60


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dictation, "_OFTEN", 1)


def make(directory: Path, **settings: Any) -> tuple[StateManager, torch.nn.Module]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(8, 4)).sum().backward()
    optimizer.step()
    return StateManager(directory, state={"model": model, "optimizer": optimizer}, **settings), model


def save(manager: StateManager, step: int) -> Any:
    return manager.snapshot(epoch=0, batch=step, step=step)


def process_of(manager: StateManager) -> subprocess.Popen[bytes]:
    writing = manager._saving._dictation._scribe
    assert writing is not None
    return writing._process


@pytest.fixture
def dictating(tmp_path: Path) -> Iterator[tuple[StateManager, torch.nn.Module]]:
    """A manager whose scribe is ready; it has saved step 1."""
    manager, model = make(tmp_path / "run")
    with manager:
        save(manager, 1).wait()
        await_scribe(manager)
        yield manager, model


def await_scribe(manager: StateManager) -> None:
    writing = manager._saving._dictation._scribe
    assert writing is not None
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not writing.is_ready():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def contents(snapshot: Path) -> dict[str, Any]:
    """All files, of the manifest what the two ways have in common."""
    found: dict[str, Any] = {path.name: path.read_bytes() for path in snapshot.iterdir()}
    manifest = json.loads(found["manifest.json"])
    for name in ("created", "parent_digest", "digest"):
        del manifest[name]
    return {**found, "manifest.json": json.dumps(manifest)}


def events(manager: StateManager, name: str) -> list[dict[str, Any]]:
    return [row for row in read_rows(manager.directory / EVENTS) if row["event"] == name]


def test_it_commits_the_same_bytes_as_the_training_itself(
    dictating: tuple[StateManager, torch.nn.Module], tmp_path: Path
) -> None:
    manager, model = dictating
    plain, twin = make(tmp_path / "plain", files=type("Others", (Files,), {})())
    with plain:
        for step in range(1, 7):
            for net in (model, twin):
                with torch.no_grad():
                    next(net.parameters()).add_(step)
            for each in (manager, plain):
                torch.manual_seed(step)
                pending = save(each, step)
                assert isinstance(pending, OrderedSnapshot) == (each is manager and step > 1)
                pending.wait()
        assert manager.store.names() == plain.store.names() == [f"step-{step:09d}" for step in (4, 5, 6)]
        for name in manager.store.names():
            manager.store.verify(name)
            mine, other = contents(manager.store.path(name)), contents(plain.store.path(name))
            mine["manifest.json"] = mine["manifest.json"].replace(manager.run_id, plain.run_id)
            assert mine == other
    parents = [manager.store.manifest(name).parent_digest for name in manager.store.names()[1:]]
    assert parents == [manager.store.manifest(name).own_digest for name in manager.store.names()[:-1]]
    assert [row["snapshot"] for row in events(manager, "committed")] == [f"step-{step:09d}" for step in range(1, 7)]


def test_a_state_that_it_wrote_is_restored_exactly(dictating: tuple[StateManager, torch.nn.Module]) -> None:
    manager, model = dictating
    pending = save(manager, 2)
    assert isinstance(pending, OrderedSnapshot)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():  # while it is being written
        for parameter in model.parameters():
            parameter.zero_()
    assert manager.restore().snapshot == "step-000000002"
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_a_scribe_that_dies_costs_nothing(dictating: tuple[StateManager, torch.nn.Module]) -> None:
    manager, _ = dictating
    process_of(manager).kill()
    process_of(manager).wait()
    pending = save(manager, 2)
    pending.wait()
    assert manager.latest == "step-000000002"
    manager.store.verify("step-000000002")
    assert len(events(manager, "scribe_ended")) == 1
    later = save(manager, 3)
    later.wait()
    assert not isinstance(later, OrderedSnapshot)
    assert manager.latest == "step-000000003"


def test_one_that_dies_with_a_snapshot_in_its_hands_costs_nothing_either(
    dictating: tuple[StateManager, torch.nn.Module],
) -> None:
    manager, _ = dictating
    process = process_of(manager)
    process.send_signal(signal.SIGSTOP)
    pending = save(manager, 2)
    assert isinstance(pending, OrderedSnapshot)
    assert not pending.done
    process.kill()
    pending.wait()
    assert manager.latest == "step-000000002"
    manager.store.verify("step-000000002")
    assert pending.done


def test_it_ignores_what_is_sent_to_the_whole_group(dictating: tuple[StateManager, torch.nn.Module]) -> None:
    manager, _ = dictating
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        process_of(manager).send_signal(number)
    pending = save(manager, 2)
    pending.wait()
    assert isinstance(pending, OrderedSnapshot)
    assert process_of(manager).poll() is None
    assert not events(manager, "scribe_ended")


def test_it_publishes_nothing_for_who_has_lost_the_run(dictating: tuple[StateManager, torch.nn.Module]) -> None:
    manager, _ = dictating
    (manager.directory / RUN_LOCK).unlink()
    pending = save(manager, 2)
    with pytest.raises(RunHeldError, match="lock file is gone"):
        pending.wait()
    assert manager.store.names() == ["step-000000001"]


def test_a_disk_that_refuses_is_reported_as_ever(
    dictating: tuple[StateManager, torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    manager, _ = dictating
    snapshots = manager.directory / "snapshots"
    snapshots.rename(manager.directory / "elsewhere")
    snapshots.write_text("no directory")
    pending = save(manager, 2)
    with pytest.raises(SnapshotWriteError, match=r"step-000000002 .* was NOT saved"):
        pending.wait()
    assert len(events(manager, "scribe_ended")) == 1


def test_it_ends_with_its_owner_in_good_order(tmp_path: Path) -> None:
    manager, _ = make(tmp_path / "run")
    with manager:
        save(manager, 1).wait()
        await_scribe(manager)
        process = process_of(manager)
        save(manager, 2)
    assert process.returncode == 0
    assert manager.store.names() == ["step-000000001", "step-000000002"]


def test_a_manager_that_is_opened_again_has_a_scribe_that_is_told_everything(tmp_path: Path) -> None:
    manager, _ = make(tmp_path / "run")
    for first in (1, 4):
        with manager:
            save(manager, first).wait()
            await_scribe(manager)
            for step in (first + 1, first + 2):
                pending = save(manager, step)
                assert isinstance(pending, OrderedSnapshot)
                pending.wait()
            assert not events(manager, "scribe_ended")


def test_what_cannot_be_told_is_written_by_the_training(dictating: tuple[StateManager, torch.nn.Module]) -> None:
    manager, _ = dictating
    writing = manager._saving._dictation._scribe
    assert writing is not None
    with pytest.raises(scribe.ScribeError, match="not JSON serializable"):
        writing.order({"manifest": {"settings": {1j}}}, {})


def test_what_is_large_or_has_files_of_its_own_is_not_dictated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dictation, "_MAX_BYTES", 1000)
    manager, _ = make(tmp_path / "run")
    with manager:
        assert not isinstance(save(manager, 1), OrderedSnapshot)
        assert manager._saving._dictation._scribe is None
    monkeypatch.undo()
    monkeypatch.setattr(dictation, "_OFTEN", 1)
    manager, _ = make(tmp_path / "other", files=type("Others", (Files,), {})())
    with manager:
        save(manager, 1).wait()
        assert manager._saving._dictation._scribe is None


def test_seldom_snapshots_start_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(dictation.time, "monotonic", lambda: now)
    monkeypatch.setattr(dictation, "_OFTEN", 8)
    manager, _ = make(tmp_path / "run")
    with manager:
        for step in range(1, 21):
            now += 0.6
            save(manager, step).wait()
        assert manager._saving._dictation._scribe is None
        for step in range(21, 30):
            now += 0.1
            save(manager, step).wait()
        assert manager._saving._dictation._scribe is not None


def test_where_no_process_can_be_started_the_training_writes_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scribe.sys, "executable", str(tmp_path / "nothing"))
    manager, _ = make(tmp_path / "run")
    with manager:
        for step in (1, 2):
            pending = save(manager, step)
            pending.wait()
            assert not isinstance(pending, OrderedSnapshot)
        assert manager.store.names() == ["step-000000001", "step-000000002"]
        assert len(events(manager, "scribe_ended")) == 1


def test_what_cannot_be_deleted_is_noted_and_no_reason_to_stop(
    dictating: tuple[StateManager, torch.nn.Module],
) -> None:
    manager, _ = dictating
    for step in (2, 3):
        save(manager, step).wait()
    shutil.rmtree(manager.store.path("step-000000001"))
    save(manager, 4).wait()
    assert [row["snapshot"] for row in events(manager, "not_deleted")] == ["step-000000001"]
    save(manager, 5).wait()
    assert manager.store.names() == ["step-000000003", "step-000000004", "step-000000005"]
    assert not events(manager, "scribe_ended")


def test_one_that_has_gone_is_found_out_when_it_is_asked(dictating: tuple[StateManager, torch.nn.Module]) -> None:
    manager, _ = dictating
    process_of(manager).kill()
    writing = manager._saving._dictation._scribe
    assert writing is not None
    with pytest.raises(scribe.ScribeError, match="it is gone"):
        writing.answer()


def test_one_that_does_not_answer_or_answers_something_else_is_not_asked_again(
    dictating: tuple[StateManager, torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    manager, _ = dictating
    monkeypatch.setattr(scribe, "_TIMEOUT_SECONDS", 0.05)
    writing = manager._saving._dictation._scribe
    assert writing is not None
    with pytest.raises(scribe.ScribeError, match="no answer: timed out"):
        writing.answer()
    writing._received = b"something else\n"
    with pytest.raises(scribe.ScribeError, match="no answer: not enough values"):
        writing.answer()
    process = process_of(manager)
    process.send_signal(signal.SIGSTOP)
    pending = save(manager, 2)
    assert isinstance(pending, OrderedSnapshot)
    monkeypatch.setattr(scribe, "_END_SECONDS", 0.1)
    pending.wait()
    manager.store.verify("step-000000002")
    assert process.returncode == -signal.SIGKILL
    assert [row["reason"] for row in events(manager, "scribe_ended")] == ["no answer: timed out"]


def test_one_that_hangs_is_killed_at_the_end(
    dictating: tuple[StateManager, torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    manager, _ = dictating
    monkeypatch.setattr(scribe, "_END_SECONDS", 0.1)
    process = process_of(manager)
    process.send_signal(signal.SIGSTOP)
    manager.close()
    assert process.returncode == -signal.SIGKILL


def test_messages_that_end_too_early_or_never_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, other = socket.socketpair()
    with mine, other:
        scribe.send(other, {"a": 1}, {"file": b"12345"})
        assert scribe.receive(mine) == ({"a": 1}, {"file": b"12345"})
        large = {"one": bytes(range(256)) * 500, "none": b""}  # comes in several pieces
        scribe.send(other, {}, large)
        assert scribe.receive(mine) == ({}, large)
        other.sendall(b'[{}, [["file", 10]]]\n123')
        other.shutdown(socket.SHUT_WR)
        assert scribe.receive(mine) is None
        assert scribe.receive(mine) is None
    mine, other = socket.socketpair()
    monkeypatch.setattr(scribe, "_MAX_LINE_BYTES", 10)
    with mine, other:
        other.sendall(b"x" * 11)
        with pytest.raises(ValueError, match="without an end"):
            scribe.receive(mine)


@pytest.mark.parametrize("begin", [None, {"parent": 1}])
def test_a_scribe_without_an_owner_ends(begin: dict[str, Any] | None) -> None:
    mine, other = socket.socketpair()
    process = subprocess.Popen(
        [sys.executable, "-m", "resumable_trainer.snapshot.scribe_process"], stdin=other.fileno()
    )
    other.close()
    with mine:
        if begin is not None:
            scribe.send(mine, begin)
        else:
            mine.shutdown(socket.SHUT_WR)
        assert process.wait(PATIENCE_SECONDS) == 0


class Told(Files):
    """Files that tell of their calls."""

    calls: list[str]

    def __init__(self) -> None:
        type(self).calls = []

    def sync(self, fd: int) -> None:
        super().sync(fd)
        self.calls.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)

    def sync_directory(self, path: Path) -> None:
        super().sync_directory(path)
        self.calls.append(path.name.partition("-step")[0])

    def rename(self, source: Path, target: Path) -> None:
        self.calls.append(f"-> {target.name.partition('-step')[0]}")
        super().rename(source, target)

    def remove_empty_directory(self, path: Path) -> None:
        self.calls.append(f"removed {path.name.partition('-step')[0]}")
        super().remove_empty_directory(path)


class Unsynced(Told):
    """Files of which the journal of rows cannot be synced."""

    def sync(self, fd: int) -> None:
        super().sync(fd)
        if self.calls[-1] == "metrics.jsonl":
            raise OSError(errno.EIO, "Input/output error")


@pytest.fixture
def order(tmp_path: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any], dict[str, bytes]]]:
    """What a scribe is told at its beginning, an order, and files."""
    manager, _ = make(tmp_path / "run")
    with manager:
        save(manager, 1).wait()
        fields = manager._saving._manifest_fields(Facts(Position(0, 2, 2)))
        files = {p.name: p.read_bytes() for p in manager.store.path("step-000000001").iterdir()}
        del files["manifest.json"]
        rows = tmp_path / "run/metrics.jsonl"
        rows.write_bytes(b"{}\n")
        lock = [*manager.lock.identity, manager.lock.generation]
        begin = {"directory": str(tmp_path / "run"), "lock": lock, "rows": str(rows)}
        yield begin, {"manifest": fields, "delete": []}, files


def test_rows_are_durable_before_the_manifest_that_counts_them(
    order: tuple[dict[str, Any], dict[str, Any], dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, what, files = order
    monkeypatch.setattr(scribe_process, "Files", Told)
    scribe_process._Desk(begin).carry_out(what, files)
    assert set(Told.calls[: len(files)]) == set(files)
    after = ["metrics.jsonl", "manifest.json", ".tmp", "-> step-000000002", "snapshots"]
    assert Told.calls[len(files) :] == after


def test_what_is_not_kept_loses_its_name_and_is_removed_when_the_next_commit_has_made_that_durable(
    order: tuple[dict[str, Any], dict[str, Any], dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, what, files = order
    monkeypatch.setattr(scribe_process, "Files", Told)
    desk = scribe_process._Desk(begin)
    snapshots = Path(begin["directory"]) / "snapshots"
    whole = contents(snapshots / "step-000000001")
    desk.carry_out({**what, "delete": ["step-000000001"]}, files)
    assert Told.calls[-2:] == ["snapshots", "-> .trash"]
    (trash,) = snapshots.glob(".trash-*")
    assert contents(trash) == whole
    third = {**what["manifest"], "name": "step-000000003", "position": {"epoch": 0, "batch": 3, "step": 3}}
    desk.carry_out({"manifest": third, "delete": ["step-000000002"]}, files)
    assert Told.calls[-4:] == ["-> step-000000003", "snapshots", "removed .trash", "-> .trash"]
    desk.close()
    assert Told.calls[-2:] == ["snapshots", "removed .trash"]
    assert [path.name for path in snapshots.iterdir()] == ["step-000000003"]
    desk.close()


def test_nothing_is_published_that_counts_rows_which_may_be_lost(
    order: tuple[dict[str, Any], dict[str, Any], dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, what, files = order
    monkeypatch.setattr(scribe_process, "Files", Unsynced)
    with pytest.raises(OSError, match="Input/output"):
        scribe_process._Desk(begin).carry_out(what, files)
    assert not (Path(begin["directory"]) / "snapshots/step-000000002").exists()


def test_fields_that_are_left_out_are_those_of_the_order_before(
    order: tuple[dict[str, Any], dict[str, Any], dict[str, bytes]],
) -> None:
    begin, what, files = order
    desk = scribe_process._Desk(begin)
    first = {**what["manifest"], "settings": {"a": 1}, "saved_by": {"torch": "2"}}
    desk.carry_out({**what, "manifest": first}, files)
    short = {name: value for name, value in first.items() if name not in scribe.REMEMBERED}
    second = {**short, "name": "step-000000003", "position": {"epoch": 0, "batch": 3, "step": 3}}
    desk.carry_out({"manifest": second, "delete": ["step-000000001"]}, files)
    desk.close()
    snapshots = Path(begin["directory"]) / "snapshots"
    manifests = [json.loads((path / "manifest.json").read_text()) for path in sorted(snapshots.iterdir())]
    assert [(m["name"], m["settings"], m["saved_by"]) for m in manifests] == [
        ("step-000000002", {"a": 1}, {"torch": "2"}),
        ("step-000000003", {"a": 1}, {"torch": "2"}),
    ]


def test_a_journal_is_whole_only_while_the_system_has_every_row(tmp_path: Path) -> None:
    class Full(Files):
        is_full = False

        def write(self, fd: int, data: Any) -> int:
            if self.is_full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(fd, data)

        def sync(self, fd: int) -> None:
            if self.is_full:
                raise OSError(errno.EIO, "Input/output error")
            super().sync(fd)

    files = Full()
    path = tmp_path / "rows"
    journal = Journal.open(path, files=files)
    assert journal.whole_file == path
    journal.append({"a": 1})
    assert journal.whole_file is None
    journal.flush()
    assert journal.whole_file == path
    files.is_full = True
    with pytest.raises(SnapshotWriteError):
        journal.sync()
    assert journal.whole_file is None  # bytes may be lost
    files.is_full = False
    journal.sync()
    assert journal.whole_file is None  # it is another file now, and others may have the old one open
    journal.close()
    journal = Journal.open(path, files=files)
    assert journal.whole_file == path
    files.is_full = True
    journal.append({"a": 2})
    journal.flush()
    assert journal.whole_file is None  # refused
    files.is_full = False
    journal.close()


SCRIPT = """
import sys, time, torch
from resumable_trainer import EarlyStopping, Run, SnapshotPolicy
from resumable_trainer.snapshot import dictation
dictation._OFTEN = 1
torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.Adam(model.parameters())
data = torch.randn(40, 4)
epochs = int(sys.argv[2])
with Run(sys.argv[1], state={"model": model, "optimizer": optimizer}, progress=False) as run:
    for epoch in run.epochs(epochs):
        for x in run.batches(data, batch_size=10, shuffle=True):
            optimizer.zero_grad(); loss = model(x + torch.randn(())).pow(2).mean(); loss.backward(); optimizer.step()
            run.log(loss=loss)
        writing = run._keeper.manager._saving._dictation._scribe
        if writing is not None and epoch > 2:
            while not writing.is_ready(): time.sleep(0.01)
            print(writing._process.pid, flush=True)
"""


def train(directory: Path, epochs: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(directory), str(epochs)], stdout=subprocess.PIPE, text=True
    )


def test_a_killed_training_takes_its_scribe_along_and_resumes_exactly(tmp_path: Path) -> None:
    undisturbed = train(tmp_path / "a", 400)
    undisturbed.communicate()
    assert undisturbed.returncode == 0
    for _ in range(2):
        killed = train(tmp_path / "b", 400)
        assert killed.stdout is not None
        lines = [killed.stdout.readline() for _ in range(25)]
        killed.kill()
        killed.communicate()
        scribe_pid = int(lines[-1])
        deadline = time.monotonic() + PATIENCE_SECONDS
        while is_running(scribe_pid):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    resumed = train(tmp_path / "b", 400)
    resumed.communicate()
    assert resumed.returncode == 0
    assert (tmp_path / "a/metrics.jsonl").read_bytes() == (tmp_path / "b/metrics.jsonl").read_bytes()
    newest = "snapshots/step-000001600-epoch-000400"
    for name in ("model.safetensors", "optimizer.safetensors", "generators.safetensors", "state.json"):
        assert (tmp_path / "a" / newest / name).read_bytes() == (tmp_path / "b" / newest / name).read_bytes(), name


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def test_a_run_is_the_same_with_and_without_a_scribe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(directory: Path) -> Path:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        data = torch.randn(40, 4)
        stopping = EarlyStopping("loss", mode="min", patience=100)
        policy = SnapshotPolicy(keep_last=2)
        state = {"model": model, "optimizer": optimizer}
        with Run(directory, state=state, early_stopping=stopping, snapshots=policy, progress=False) as training:
            for epoch in training.epochs(30):
                for x in training.batches(data, batch_size=10, shuffle=True):
                    optimizer.zero_grad()
                    loss = model(x).pow(2).mean()
                    loss.backward()
                    optimizer.step()
                    training.log(loss=loss)
                if epoch == 3 and training._keeper.manager._saving._dictation._scribe is not None:
                    await_scribe(training._keeper.manager)
            assert len(training._keeper.manager.store.names()) <= 4
        return directory

    with_scribe = run(tmp_path / "a")
    monkeypatch.setattr(scribe, "can_be_used", lambda: False)
    without = run(tmp_path / "b")
    assert (with_scribe / "metrics.jsonl").read_bytes() == (without / "metrics.jsonl").read_bytes()
    names = sorted(path.name for path in (without / "snapshots").iterdir())
    assert sorted(path.name for path in (with_scribe / "snapshots").iterdir()) == names
    for name in names:
        mine, other = (contents(each / "snapshots" / name) for each in (with_scribe, without))
        del mine["manifest.json"], other["manifest.json"]
        assert mine == other


def test_a_lock_knows_its_file(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "run.lock")
    lock.acquire()
    found = os.stat(tmp_path / "run.lock")
    assert lock.identity == (found.st_dev, found.st_ino)
    lock.release()

"""A disk that fails while a run trains: nothing durable is lost, training goes on, and a person is told."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from typing import TYPE_CHECKING, Any

import endings
import pytest
import torch
from small import Killed, Small, killed_at

from resumable_trainer import Run, SettingsError, SnapshotPolicy, SnapshotWriteError
from resumable_trainer.durable.files import Files
from resumable_trainer.loop import launch
from resumable_trainer.loop.notices import notices
from resumable_trainer.snapshot.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

AT_ONCE = SnapshotPolicy(background=False)
BEHIND = SnapshotPolicy(background=True)
STEPS_PER_EPOCH = 4


class Disk:
    """All writes, or all syncs, of the whole process fail while it is told so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failing = ""
        self.number = errno.ENOSPC
        self.refused = 0
        for call in ("write", "sync", "make_directory", "sync_directory"):
            monkeypatch.setattr(Files, call, self._guarded(call, getattr(Files, call)))

    def _guarded(self, call: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(files: Files, *args: Any) -> Any:
            if self.failing == call:
                self.refused += 1
                raise OSError(self.number, os.strerror(self.number))
            return original(files, *args)

        return guarded

    def fails(self, run: Run, *, call: str = "write", first: int, last: int = 10**9) -> None:
        """Fail from one step on until another; snapshots begun before either are settled first."""
        if run.step in (first, last + 1):
            run._keeper.saver.settle()
        self.failing = call if first <= run.step <= last else ""


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, bytes]:
    Small().train(tmp_path / "whole", snapshots=AT_ONCE)
    return endings.ending(tmp_path / "whole")


def events(directory: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]
    return [event for event in found if event["event"] == kind]


@pytest.mark.parametrize("policy", [AT_ONCE, BEHIND])
@pytest.mark.parametrize("call", ["write", "sync", "sync_directory", "make_directory"])
def test_a_disk_that_fails_for_a_while_costs_the_run_nothing_in_the_end(
    tmp_path: Path, disk: Disk, whole: dict[str, bytes], policy: SnapshotPolicy, call: str
) -> None:
    small = Small(at_step=lambda run: disk.fails(run, call=call, first=5, last=9))
    run = small.train(tmp_path / "run", snapshots=policy)
    assert disk.refused
    assert run.outcome == "finished"
    assert endings.ending(tmp_path / "run") == whole
    assert len(events(tmp_path / "run", "finished")) == 1


@pytest.mark.parametrize("policy", [AT_ONCE, BEHIND])
def test_a_disk_full_to_the_end_loses_no_epoch_and_no_old_snapshot_and_the_next_start_goes_on(
    tmp_path: Path, disk: Disk, whole: dict[str, bytes], policy: SnapshotPolicy, capsys: pytest.CaptureFixture[str]
) -> None:
    small = Small(at_step=lambda run: disk.fails(run, first=5))
    with pytest.raises(SnapshotWriteError, match=r"step-000000012-epoch-000003 .* was NOT saved: .*No space") as e:
        small.train(tmp_path / "run", snapshots=policy, progress=None)
    assert int(e.value.exit_code) == 74
    assert [epoch for epoch, batch in small.seen] == [0] * 4 + [1] * 4 + [2] * 4, "every epoch was trained"
    said = capsys.readouterr()
    assert "step-000000008-epoch-000002" in said.out + said.err
    assert "training goes on, and the next snapshot tries again" in said.out + said.err
    store = Store(tmp_path / "run")
    assert store.names() == ["step-000000004-epoch-000001"]
    store.verify("step-000000004-epoch-000001")
    assert events(tmp_path / "run", "finished") == []
    disk.failing = ""
    assert Small().train(tmp_path / "run", snapshots=policy).outcome == "finished"
    assert endings.ending(tmp_path / "run") == whole


def test_a_recovery_is_said(tmp_path: Path, disk: Disk, capsys: pytest.CaptureFixture[str]) -> None:
    small = Small(at_step=lambda run: disk.fails(run, first=1, last=9))
    small.train(tmp_path / "run", snapshots=AT_ONCE, progress=None)
    said = "".join(capsys.readouterr())
    assert "saved   step-000000012-epoch-000003, after 2 that failed" in said


def test_the_end_is_tried_once_more_on_leaving(tmp_path: Path, disk: Disk, whole: dict[str, bytes]) -> None:
    small = Small(at_step=lambda run: disk.fails(run, first=8))
    with Run(tmp_path / "run", state=small.state, snapshots=AT_ONCE, progress=False) as run:
        for _ in run.epochs(3):
            small.model.train()
            small.train_epoch(run)
            small.model.eval()
            for _ in run.evaluating(small.data, batch_size=4):
                torch.rand(3)
            run.log_epoch(test_accuracy=float(run.epoch))
        assert events(tmp_path / "run", "finished") == []
        disk.failing = ""
        torch.nn.init.zeros_(small.model[0].weight)  # what the script does afterwards is not what had ended
    assert endings.ending(tmp_path / "run") == whole
    assert len(events(tmp_path / "run", "finished")) == 1


def test_a_notice_that_cannot_be_served_is_an_error_and_names_what_is_durable(tmp_path: Path, disk: Disk) -> None:
    def notice(run: Run) -> None:
        disk.fails(run, first=5)
        if run.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        with pytest.raises(SnapshotWriteError, match="the last durable one is step-000000004-epoch-000001"):
            Small(at_step=notice).train(tmp_path / "run", snapshots=AT_ONCE)
    finally:
        notices.reset()


def test_the_script_s_own_error_is_not_hidden_by_the_disk_s(tmp_path: Path, disk: Disk) -> None:
    def both(run: Run) -> None:
        disk.fails(run, first=5)
        killed_at(10)(run)

    with pytest.raises(Killed):
        Small(at_step=both).train(tmp_path / "run", snapshots=BEHIND)


def test_a_run_directory_that_vanishes_is_not_made_again_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch.process, "exit_recorded", False)  # put back as it was afterwards

    def vanish(run: Run) -> None:
        if run.step == 5:
            shutil.rmtree(tmp_path / "run")

    small = Small(at_step=vanish)
    with pytest.raises(SnapshotWriteError, match="No such file or directory"):
        small.train(tmp_path / "run", snapshots=AT_ONCE)
    assert len(small.seen) == 3 * STEPS_PER_EPOCH
    assert not (tmp_path / "run").exists()
    launch.process.record_exit(0)
    assert not (tmp_path / "run").exists(), "not when the process ends either"


def test_a_run_directory_that_comes_back_is_saved_to_again(tmp_path: Path, whole: dict[str, bytes]) -> None:
    """A network mount that was gone for an epoch."""

    def blink(run: Run) -> None:
        if run.step == 5:
            (tmp_path / "run").rename(tmp_path / "elsewhere")
        if run.step == 9:
            (tmp_path / "elsewhere").rename(tmp_path / "run")

    Small(at_step=blink).train(tmp_path / "run", snapshots=AT_ONCE)
    assert endings.ending(tmp_path / "run") == whole


@pytest.mark.parametrize(
    ("name", "kind"), [("metrics.jsonl", "link"), ("events.jsonl", "hard"), ("snapshots", "link"), ("run.json", "link")]
)
def test_links_in_the_run_directory_are_refused_and_what_they_point_to_is_untouched(
    tmp_path: Path, name: str, kind: str
) -> None:
    directory, other = tmp_path / "run", tmp_path / "other"
    directory.mkdir()
    if name == "snapshots":
        other.mkdir()
    else:
        other.write_text("somebody's")
    if kind == "hard":
        os.link(other, directory / name)
    else:
        (directory / name).symlink_to(other)
    with pytest.raises(SettingsError, match=f"is refused: {name}"):
        Small().train(directory)
    assert other.read_text() == "somebody's" if other.is_file() else not any(other.iterdir())
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "handlers are put back"


@pytest.mark.parametrize("call", ["make_directory", "write", "sync", "sync_directory"])
def test_a_run_directory_that_cannot_be_written_to_is_said_in_one_line(tmp_path: Path, disk: Disk, call: str) -> None:
    disk.failing, disk.number = call, errno.EROFS
    with pytest.raises(SnapshotWriteError, match="Read-only file system"):
        Small().train(tmp_path / "run")


def test_the_run_directory_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "large-disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "large-disk")
    Small().train(tmp_path / "run", epochs=1)
    assert Store(tmp_path / "large-disk").names()

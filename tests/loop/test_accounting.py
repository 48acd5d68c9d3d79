"""Training notes now and then what its events come to; nobody has to read them all."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from small import Killed, Small, killed_at

from resumable_trainer import SnapshotPolicy
from resumable_trainer.cli.main import main
from resumable_trainer.durable.journal import encode_row, read_rows
from resumable_trainer.loop import accounting, launch
from resumable_trainer.metrics.account import NOTED, Account, newest_noted
from resumable_trainer.report.summary import last_event

if TYPE_CHECKING:
    from pathlib import Path

EVERY = 3000
OFTEN = SnapshotPolicy(every_steps=1, keep_last=2, background=False)


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting, "EVERY_BYTES", EVERY)
    monkeypatch.setattr(accounting, "AT_END_BYTES", EVERY)


def train(directory: Path, *, steps: int) -> None:
    with pytest.raises(Killed):
        Small(at_step=killed_at(steps)).train(directory, snapshots=OFTEN, epochs=100)


def test_a_run_of_many_launches_is_accounted_for_as_if_all_were_read(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    for steps in (30, 33, 34, 60):
        train(tmp_path, steps=steps)
    rows = list(read_rows(path))
    noted = [row for row in rows if row["event"] == NOTED]
    assert len(noted) > 3
    assert {row["generation"] for row in noted} >= {1, 4}
    sizes = [after["upto"] - before["upto"] for before, after in pairwise(noted)]
    assert all(EVERY <= size < EVERY + 6000 for size in sizes), "neither more often nor more seldom"
    assert Account.read(path).goodput() == Account.of(rows).goodput()
    assert Account.read(path).interrupted == 3
    path.write_bytes(b"damage" + path.read_bytes()[6:])
    assert Account.read(path).goodput() == Account.of(rows).goodput(), "what is old was not read"


def test_a_launch_that_ends_in_order_leaves_little_to_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting, "EVERY_BYTES", 1 << 20)
    monkeypatch.setattr(accounting, "AT_END_BYTES", 2000)
    Small().train(tmp_path, snapshots=OFTEN, epochs=3)
    assert [row["event"] for row in read_rows(tmp_path / "events.jsonl")][-2:] == ["finished", NOTED]
    assert newest_noted(tmp_path / "events.jsonl")[0].said == "finished"
    assert (last := last_event(tmp_path)) is not None
    assert last["event"] == "finished", "that accounts were kept is no event for people"
    Small().train(tmp_path, snapshots=OFTEN, epochs=3)
    assert sum(row["event"] == NOTED for row in read_rows(tmp_path / "events.jsonl")) == 1, "too little has come since"
    assert newest_noted(tmp_path / "events.jsonl")[1] > 2000
    whole = Account.of(read_rows(tmp_path / "events.jsonl"))
    assert Account.read(tmp_path / "events.jsonl").goodput() == whole.goodput()


def test_who_listens_is_told_of_everything_all_the_same(tmp_path: Path) -> None:
    told: list[Any] = []
    launch.process.handover = launch.Handover(on_event=lambda directory, event: told.append(event["event"]))
    train(tmp_path, steps=20)
    assert told == [row["event"] for row in read_rows(tmp_path / "events.jsonl")]
    assert NOTED in told


def test_what_is_noted_while_the_account_is_read_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "events.jsonl"

    def meanwhile(path: Path) -> tuple[Account, int]:
        with path.open("ab") as file:
            file.write(encode_row({"event": "launched", "time": "2026-01-01T00:00:00+00:00"}))
        return newest_noted(path)

    monkeypatch.setattr(accounting, "newest_noted", meanwhile)
    train(tmp_path, steps=20)
    launches = sum(row["event"] == "launched" for row in read_rows(path))
    assert 1 < launches == Account.read(path).goodput().launches


def test_damaged_events_are_no_reason_to_stop(tmp_path: Path) -> None:
    train(tmp_path, steps=1)
    path = tmp_path / "events.jsonl"
    path.write_bytes(path.read_bytes() + b"damage\n")
    train(tmp_path, steps=30)
    assert b'"committed"' in path.read_bytes().partition(b"damage")[2]
    assert NOTED.encode() not in path.read_bytes()


def test_neither_a_start_nor_those_who_look_read_what_is_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Watched, in a cloud, with an interval of its own choosing: behind the newest events stands what none can read."""
    run = tmp_path / "run"
    train(run, steps=70)
    path = run / "events.jsonl"
    first, _, rest = path.read_bytes().partition(b"\n")
    kinds = ("launched", "committed", "paced", "forked", "exited", "finished")
    unreadable = b"".join(f'"event":"{kind}"'.encode() for kind in kinds)
    path.write_bytes(unreadable.ljust(len(first), b".")[: len(first)] + b"\n" + rest)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    monkeypatch.setenv("RESUMABLE_TRAINER_NOTICES", "slurm")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 86400))
    Small().train(run, snapshots=SnapshotPolicy(every="auto"), epochs=20, progress=None)
    assert "goodput" in capsys.readouterr().err
    assert launch.command_is_done(run) is False
    assert main(["status", str(run)]) == main(["runs", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "2 launches" in shown
    assert "unreadable" not in shown

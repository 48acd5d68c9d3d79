"""Training notes now and then what its events come to; nobody has to read them all."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from small import Killed, Small, killed_at

from resumable_trainer import SnapshotPolicy
from resumable_trainer.durable.journal import encode_row, read_rows
from resumable_trainer.loop import accounting, launch
from resumable_trainer.metrics.account import NOTED, Account, newest_noted

if TYPE_CHECKING:
    from pathlib import Path

EVERY = 3000
OFTEN = SnapshotPolicy(every_steps=1, keep_last=2, background=False)


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting, "EVERY_BYTES", EVERY)


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

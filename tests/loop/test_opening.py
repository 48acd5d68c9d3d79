"""Opening a run: its identity, its line and its journal, also where they are damaged."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import endings
import pytest
import torch
from small import Killed, Small, killed_at

from resumable_trainer import DamagedSnapshotError, EarlyStopping, SnapshotPolicy
from resumable_trainer.durable.files import Files
from resumable_trainer.loop import launch, opening
from resumable_trainer.loop.opening import lost_snapshots, with_loop
from resumable_trainer.loop.record import Record
from resumable_trainer.manager import RestoreReport, StateManager
from resumable_trainer.snapshot.manifest import Manifest, PositionFields
from resumable_trainer.snapshot.store import Store

if TYPE_CHECKING:
    from pathlib import Path

AT_ONCE = SnapshotPolicy(background=False)


def run_id(directory: Path) -> str:
    return str(json.loads((directory / "run.json").read_bytes())["run_id"])


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[]", b"null", b'{"run_id":3}', b"\xff", b"[" * 100_000])
def test_an_identity_that_cannot_be_read_is_said_and_changes_nothing(tmp_path: Path, content: bytes) -> None:
    directory = tmp_path / "run"
    Small().train(directory, epochs=1)
    before, identity = endings.ending(directory), run_id(directory)
    (directory / "run.json").write_bytes(content)
    small = Small()
    with pytest.raises(DamagedSnapshotError, match=r"run\.json is damaged: .*remove it"):
        small.train(directory)
    assert not small.seen
    assert endings.ending(directory) == before
    (directory / "run.json").unlink()
    Small().train(directory, epochs=1)
    assert run_id(directory) == identity, "it comes back from the snapshots"


def test_a_lost_identity_comes_back_from_the_newest_snapshot_that_can_be_read(tmp_path: Path) -> None:
    Small().train(tmp_path / "run", snapshots=AT_ONCE)
    identity = run_id(tmp_path / "run")
    (tmp_path / "run/run.json").unlink()
    newest = Store(tmp_path / "run").names()[-1]
    (tmp_path / "run/snapshots" / newest / "manifest.json").write_bytes(b"{}")
    run = Small().train(tmp_path / "run", snapshots=AT_ONCE)
    assert run.resumed_from == "step-000000008-epoch-000002"
    assert run_id(tmp_path / "run") == identity


def test_what_the_command_line_hands_over_is_for_its_own_run_alone(tmp_path: Path) -> None:
    Small().train(tmp_path / "mine", epochs=1)
    Small().train(tmp_path / "other", epochs=1)
    launch.process.handover = launch.Handover(target=tmp_path / "mine", fresh=True)
    assert Small().train(tmp_path / "other", epochs=2).resumed_from == "step-000000004-epoch-000001"
    assert not (tmp_path / "other/set-aside").exists()
    assert Small().train(tmp_path / "mine", epochs=2).resumed_from is None
    assert (tmp_path / "mine/set-aside/line-1/step-000000004-epoch-000001").is_dir()


def test_snapshots_that_are_gone_without_a_trace_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Small().train(tmp_path / "run", epochs=1)
    Store(tmp_path / "run").delete("step-000000004-epoch-000001")
    run = Small().train(tmp_path / "run", epochs=1, progress=None)
    assert run.resumed_from is None
    assert "step-000000004-epoch-000001 was committed here and is gone, with all others" in capsys.readouterr().err
    assert lost_snapshots(tmp_path / "nowhere") == []


def test_snapshots_that_were_set_aside_are_not_gone_but_those_committed_since_are(tmp_path: Path) -> None:
    with StateManager(tmp_path, state={"model": Small().model}) as manager:
        for number in (1, 2):
            manager.note("committed", snapshot=f"step-00000000{number}")
            manager.note("training")
            assert f"step-00000000{number} was committed here" in lost_snapshots(tmp_path)[0]
            manager.note("set_aside", snapshots=[f"step-00000000{number}"])
            assert lost_snapshots(tmp_path) == []


def test_what_the_newest_launch_has_noted_is_found_and_nothing_older(tmp_path: Path) -> None:
    """Also where another event speaks of such a one: its own name is what counts."""
    with StateManager(tmp_path, state={"model": Small().model}) as manager:
        for number in (1, 2):
            manager.note("failed", number=number)
            manager.note("launched", number=number)
            manager.note("finished", number=number, other={"event": "paced"})
    assert [row["number"] for row in launch.last_events(tmp_path, ("launched", "finished")).values()] == [2, 2]
    assert launch.last_events(tmp_path, ("failed", "paced")) == {}
    assert [row["number"] for row in launch.events_from_end(tmp_path, ("launched", "failed"))] == [2, 2, 1, 1]
    assert list(launch.events_from_end(tmp_path, ("paced",))) == []
    assert launch.last_events(tmp_path / "nowhere", ("failed",)) == {}


def test_a_snapshot_without_generators_begins_as_a_fresh_run_does(tmp_path: Path) -> None:
    manifest = Manifest(
        run_id="r", generation=1, name="step-000000007", position=PositionFields(epoch=1, batch=3, step=7),
        epoch_complete=False, parent=None, parent_digest=None, created="now", files={},
    )  # fmt: skip
    record = Record(tmp_path / "metrics.jsonl", None, files=Files())
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(99)
    report = with_loop(RestoreReport(manifest=manifest, absent=("generators",)), record, 5)
    assert torch.equal(torch.rand(3), expected)
    assert report.sections["loop"]["cursor"] == {"epoch": 1, "batch": 3, "step": 7, "loops": [[3, False]]}
    record.close()


def test_a_damaged_journal_gives_back_the_rows_before_the_damage_and_takes_no_other_s_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "run"
    with pytest.raises(Killed):
        Small(at_step=killed_at(10)).train(directory, snapshots=AT_ONCE)
    for number in (1, 2):
        journal = directory / "metrics.jsonl"
        lines = journal.read_bytes().splitlines(keepends=True)
        rows = len(lines)
        journal.write_bytes(b"".join([*lines[:3], b"damage\n", *lines[4:]]))
        with pytest.raises(Killed):
            Small(at_step=killed_at(10)).train(directory, snapshots=AT_ONCE, progress=None)
        assert "(3 of 10 rows are readable)" in capsys.readouterr().err
        assert rows > 3
        kept = sorted(path.name for path in (directory / "quarantine").iterdir())
        assert kept == ["metrics.jsonl", "metrics.jsonl.2"][:number]
        assert b"damage" in (directory / "quarantine" / kept[-1]).read_bytes()


def test_rows_behind_the_snapshot_s_are_cut_also_where_the_journal_was_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A changed digit leaves every row readable; which of them count is still the snapshot's word."""
    directory = tmp_path / "run"
    with pytest.raises(Killed):
        Small(at_step=killed_at(10)).train(directory, snapshots=AT_ONCE)
    journal = directory / "metrics.jsonl"
    data = journal.read_bytes()
    journal.write_bytes(data.replace(b'"epoch":0', b'"epoch":9', 1) + b'{"row":"step","step":10}\n')
    run = Small().train(directory, snapshots=AT_ONCE, progress=None)
    assert "(10 of 10 rows are readable)" in capsys.readouterr().err
    records = run.history.to_records()
    assert [row["step"] for row in records if row["row"] == "step"] == list(range(12))
    assert records[0]["epoch"] == 9, "what cannot be known better is left as it was found"


@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_a_run_whose_best_value_is_infinite_is_resumed(tmp_path: Path, value: float, mode: Any) -> None:
    """A first epoch whose loss overflows; a signal-to-noise ratio without noise."""
    settings = {"early_stopping": EarlyStopping("test_accuracy", patience=9, mode=mode), "snapshots": AT_ONCE}
    Small(accuracy=lambda epoch: value).train(tmp_path / "whole", **settings)
    Small(accuracy=lambda epoch: value).train(tmp_path / "cut", epochs=2, **settings)
    store = Store(tmp_path / "cut")
    best = store.verify(store.select("latest")).best
    assert best is not None
    assert (best.value, best.epoch) == (value, 0)
    run = Small(accuracy=lambda epoch: value).train(tmp_path / "cut", **settings)
    assert run.resumed_from == "step-000000008-epoch-000002"
    assert endings.ending(tmp_path / "cut") == endings.ending(tmp_path / "whole")


def test_goodput_is_told_where_the_events_can_be_read(tmp_path: Path) -> None:
    assert opening.goodput(tmp_path) == [], "no events"
    Small().train(tmp_path, epochs=1)
    assert opening.goodput(tmp_path)[0].startswith("goodput ")
    (tmp_path / "events.jsonl").write_bytes(b"damage\n")
    assert opening.goodput(tmp_path) == []


@pytest.mark.parametrize(("noted", "limit"), [(7.0, 70.0), ("long", 600.0), (-1, 600.0), (None, 600.0)])
def test_the_pace_of_earlier_launches_is_known_if_it_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noted: object, limit: float
) -> None:
    with StateManager(tmp_path, state={"model": Small().model}) as manager:
        if noted is not None:
            manager.note("paced", longest_gap_seconds=noted)
        opening.heartbeat(manager).epoch_ends()  # nobody watches: nothing is learned
        assert launch.last_events(tmp_path, ("paced",)).get("paced", {}).get("longest_gap_seconds") == noted
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
        monkeypatch.setenv("WATCHDOG_USEC", "600000000")
        heart = opening.heartbeat(manager)
        heart.ready()
        assert heart._limit == limit
        heart._note(3.0)
    assert launch.last_events(tmp_path, ("paced",))["paced"]["longest_gap_seconds"] == 3.0

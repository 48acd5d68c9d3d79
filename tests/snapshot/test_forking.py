"""A fork is a run of its own, from its first byte on, or it is not there."""

from __future__ import annotations

import json
import shutil
import threading
from typing import TYPE_CHECKING, Any

import endings
import pytest
from small import Small

from resumable_trainer import (
    DamagedSnapshotError,
    EarlyStopping,
    SnapshotPolicy,
    SnapshotWriteError,
    StateManager,
    UsageError,
)
from resumable_trainer.durable import filesystem
from resumable_trainer.durable.files import Files
from resumable_trainer.durable.lock import RunLock
from resumable_trainer.report.summary import is_run, most_recent, origin, runs_below
from resumable_trainer.snapshot import new_run
from resumable_trainer.snapshot.forking import fork
from resumable_trainer.snapshot.selected import select
from resumable_trainer.snapshot.store import Store

if TYPE_CHECKING:
    from pathlib import Path

SETTINGS: dict[str, Any] = {
    "snapshots": SnapshotPolicy(keep_last=99, every_steps=3),
    "early_stopping": EarlyStopping("test_accuracy", patience=9),
}


class Killed(BaseException):
    """Stands for a kill."""


class Dying(Files):
    """Dies before the n-th change, and does nothing more from then on."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __getattribute__(self, name: str) -> Any:
        if name in ("left", "close") or name.startswith("_"):
            return object.__getattribute__(self, name)
        if self.left == 0:
            raise Killed
        self.left -= 1
        return object.__getattribute__(self, name)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("which", ["epoch:1", "6", "latest", "best"])
def test_a_fork_goes_on_as_the_run_itself_did(tmp_path: Path, which: str) -> None:
    Small().train(tmp_path / "a", **SETTINGS)
    before = contents(tmp_path / "a")
    fork(select(tmp_path / "a", which), tmp_path / "b")
    assert Small().train(tmp_path / "b", **SETTINGS).resumed_from is not None
    assert endings.ending(tmp_path / "b") == endings.ending(tmp_path / "a")
    assert contents(tmp_path / "a") == before, "the run itself is not touched"


def test_a_fork_has_an_identity_of_its_own_and_says_where_it_comes_from(tmp_path: Path) -> None:
    Small().train(tmp_path / "a", seed=7, **SETTINGS)
    source = select(tmp_path / "a", "6")
    manifest = fork(source, tmp_path / "b", start={"command": None})
    old = json.loads((tmp_path / "a/run.json").read_bytes())
    new = json.loads((tmp_path / "b/run.json").read_bytes())
    assert new["run_id"] == manifest.run_id != old["run_id"]
    assert new["seed"] == 7
    expected = {
        "run_id": old["run_id"],
        "directory": str(tmp_path / "a"),
        "snapshot": "step-000000006",
        "digest": source.manifest.own_digest,
    }
    assert origin(tmp_path / "b") == {"forked_from": expected}
    assert (manifest.parent, manifest.parent_digest) == ("step-000000006", source.manifest.own_digest)
    assert manifest.files == source.manifest.files
    event = json.loads((tmp_path / "b/events.jsonl").read_bytes())
    assert (event["event"], event["from"], event["generation"]) == ("forked", expected, source.manifest.generation)
    assert len((tmp_path / "b/metrics.jsonl").read_bytes()) == source.manifest.journal.num_bytes  # type: ignore[union-attr]
    for path in (tmp_path / "b").rglob("*"):
        assert path.is_dir() or path.stat().st_nlink == 1, "no file is shared"


def test_a_line_that_was_set_aside_can_be_forked_with_its_own_rows(tmp_path: Path) -> None:
    from resumable_trainer.report.selection import select_by_words

    Small().train(tmp_path / "a", **SETTINGS)
    whole = endings.ending(tmp_path / "a")
    from resumable_trainer.loop import launch

    launch.process.handover.which = "3"
    Small().train(tmp_path / "a", **SETTINGS)
    aside = tmp_path / "a/set-aside/line-1/step-000000006"
    (tmp_path / "a/metrics.jsonl").unlink()
    fork(select_by_words(str(aside)), tmp_path / "b")
    Small().train(tmp_path / "b", **SETTINGS)
    assert endings.ending(tmp_path / "b") == whole


def test_a_fork_killed_at_any_point_is_whole_or_not_there(tmp_path: Path) -> None:
    Small().train(tmp_path / "runs/a", epochs=1)
    source = select(tmp_path / "runs/a", "latest")
    target = tmp_path / "runs/b"
    deaths = whole = 0
    for after in range(1000):
        try:
            fork(source, target, files=Dying(after))
        except Killed:
            deaths += 1
        else:
            break
        if target.exists():
            whole += 1
            assert Store(target).verify(source.manifest.name)
            assert Small().train(target, epochs=1).resumed_from == source.manifest.name
            target.rename(tmp_path / f"done-{after}")
        assert runs_below(tmp_path / "runs") == [tmp_path / "runs/a"]
        assert most_recent(tmp_path / "runs") == tmp_path / "runs/a"
    assert deaths > 30
    assert 0 < whole < 5
    assert is_run(target)
    left = [path.name for path in (tmp_path / "runs").iterdir()]
    assert sorted(left) == ["a", "b"], "what killed attempts have left is swept by the next"


def test_a_fork_in_the_making_is_left_alone_by_another(tmp_path: Path) -> None:
    Small().train(tmp_path / "a", epochs=1)
    other = tmp_path / ".tmp-b-0123456789ab"
    other.mkdir()
    strangers = tmp_path / ".tmp-b-of-somebody-else"
    strangers.mkdir()
    with RunLock(other / "run.lock").held_again():
        fork(select(tmp_path / "a", "latest"), tmp_path / "b")
        assert other.is_dir()
    fork(select(tmp_path / "b", "latest"), tmp_path / "c")
    assert other.is_dir(), "another name's"
    assert strangers.is_dir()


def test_a_sweep_does_not_bring_back_what_its_maker_removes(tmp_path: Path) -> None:
    final = tmp_path / "b"
    made = tmp_path / ".tmp-b-0123456789ab"
    made.mkdir()
    with RunLock(made / "run.lock").held_again():
        sweeping = threading.Thread(target=new_run._sweep, args=(Files(), final))
        sweeping.start()
        sweeping.join(0.1)
        shutil.rmtree(made)
    sweeping.join()
    assert list(tmp_path.iterdir()) == []


def test_what_was_killed_while_it_was_removed_is_swept(tmp_path: Path) -> None:
    Small().train(tmp_path / "a", epochs=1)
    left = tmp_path / ".tmp-b-0123456789ab"
    (left / "snapshots").mkdir(parents=True)
    fork(select(tmp_path / "a", "latest"), tmp_path / "b")
    assert not left.exists()


def test_a_run_may_have_the_longest_name_there_is(tmp_path: Path) -> None:
    Small().train(tmp_path / "a", epochs=1)
    for name in ("b" * 255, "\u00e9" * 127, "a name\nof two lines"):
        fork(select(tmp_path / "a", "latest"), tmp_path / name)
        assert select(tmp_path / name, "latest").manifest
    with pytest.raises(SnapshotWriteError, match=r"was NOT made.*too long"):
        fork(select(tmp_path / "a", "latest"), tmp_path / ("b" * 256))


def test_a_name_that_is_taken_is_refused_and_kept(tmp_path: Path) -> None:
    Small().train(tmp_path / "a", epochs=1)
    source = select(tmp_path / "a", "latest")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("a", "empty", "link"):
        with pytest.raises(UsageError, match="is there already"):
            fork(source, tmp_path / name)
    assert not list((tmp_path / "empty").iterdir())


def test_rows_that_are_not_those_the_snapshot_counts_are_refused(tmp_path: Path) -> None:
    Small().train(tmp_path / "a", epochs=1)
    journal = tmp_path / "a/metrics.jsonl"
    good = journal.read_bytes()
    for bad in (good[:-1], good.replace(b"0", b"1", 1), None):
        journal.unlink()
        if bad is not None:
            journal.write_bytes(bad)
        with pytest.raises(DamagedSnapshotError, match=r"metrics\.jsonl"):
            fork(select(tmp_path / "a", "latest"), tmp_path / "b")
        journal.write_bytes(b"")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_a_snapshot_that_changes_while_it_is_copied_is_noticed(tmp_path: Path) -> None:
    Small().train(tmp_path / "a", epochs=1)
    source = select(tmp_path / "a", "latest")
    victim = source.path / "model.safetensors"
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    with pytest.raises(DamagedSnapshotError, match="has changed while it was copied"):
        fork(source, tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"[" * 100_000, None])
def test_a_source_that_has_lost_its_identity_is_forked_all_the_same(tmp_path: Path, content: bytes | None) -> None:
    Small().train(tmp_path / "a", epochs=1)
    (tmp_path / "a/run.json").unlink()
    if content is not None:
        (tmp_path / "a/run.json").write_bytes(content)
    source = select(tmp_path / "a", "latest")
    fork(source, tmp_path / "b")
    new = json.loads((tmp_path / "b/run.json").read_bytes())
    assert (new["seed"], new["forked_from"]["run_id"]) == (None, source.manifest.run_id)
    assert Small().train(tmp_path / "b").outcome == "finished"


def test_a_snapshot_that_counts_no_rows_takes_none_along(tmp_path: Path) -> None:
    small = Small()
    with StateManager(tmp_path / "a", state=small.state) as manager:
        manager.snapshot(epoch=0, batch=3, step=3, background=False)
    (tmp_path / "a/metrics.jsonl").write_bytes(b'{"row":"step","step":0}\n')
    manifest = fork(select(tmp_path / "a", "3"), tmp_path / "b")
    assert manifest.journal is None
    assert (tmp_path / "b/metrics.jsonl").read_bytes() == b""


@pytest.mark.parametrize(
    ("room", "missing"),
    [
        (filesystem.Room(1000, 10**6), r"it needs [\d,]+ bytes, 1,000 are free on"),
        (filesystem.Room(10**12, 3), "it needs 8 file entries, 3 are free on"),
        (filesystem.Room(None, 3), "it needs 8 file entries, 3 are free on"),
    ],
)
def test_without_room_a_fork_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: filesystem.Room, missing: str
) -> None:
    Small().train(tmp_path / "a", epochs=1)
    monkeypatch.setattr(new_run, "room", lambda path: room)
    with pytest.raises(SnapshotWriteError, match=f"was NOT made: {missing}"):
        fork(select(tmp_path / "a", "latest"), tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]

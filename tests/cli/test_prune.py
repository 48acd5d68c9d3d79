"""What `prune` deletes, and what it never does."""

from __future__ import annotations

import errno
import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from small import Small
from test_commands import command

from resumable_trainer import EarlyStopping, NoValidSnapshotError, SnapshotPolicy, StateManager
from resumable_trainer.cli.main import main
from resumable_trainer.durable.files import Files
from resumable_trainer.durable.lock import RunLock
from resumable_trainer.report.summary import most_recent
from resumable_trainer.snapshot import pruning
from resumable_trainer.snapshot.retention import Retention
from resumable_trainer.snapshot.store import Store

if TYPE_CHECKING:
    from pathlib import Path


KEEP_ALL = SnapshotPolicy(keep_last=99)
NAMES = [f"step-{4 * epoch:09d}-epoch-{epoch:06d}" for epoch in range(1, 7)]


def train(directory: Path, *, best: int = 2, mode: Any = "max", policy: SnapshotPolicy = KEEP_ALL) -> None:
    """Six epochs; the best value is that of the epoch with this number, from 1."""
    sign = 1.0 if mode == "max" else -1.0
    small = Small(accuracy=lambda epoch: sign * (10.0 if epoch + 1 == best else epoch))
    small.train(directory, epochs=6, snapshots=policy, early_stopping=EarlyStopping("test_accuracy", mode, 99))


def prune(capsys: pytest.CaptureFixture[str], directory: Path, *options: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["prune", str(directory), "--json", *options]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def contents(directory: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.lstat().st_mtime_ns, p.lstat().st_size) for p in sorted(directory.rglob("*"))}


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def names_deleted(found: dict[str, Any]) -> list[str]:
    return [entry["name"] for entry in found["deleted"] if entry["kind"] == "snapshot"]


@pytest.mark.parametrize(
    ("options", "stays"),
    [
        (["--keep-last", "3"], [2, 4, 5, 6]),
        (["--keep-last", "1"], [2, 6]),
        (["--keep-last", "1", "--keep-best", "0"], [6]),
        (["--keep-last", "1", "--keep-best", "3"], [2, 5, 6]),
        (["--keep-last", "1", "--keep-every", "3"], [2, 3, 6]),
        (["--keep-last", "1", "--keep-best", "0", "--keep-every", "0"], [6]),
    ],
)
@pytest.mark.parametrize("mode", ["max", "min"])
def test_what_is_asked_for_stays_and_the_rest_goes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], stays: list[int], mode: str
) -> None:
    train(tmp_path / "a", mode=mode)
    before = {p.parent.name: 0 for p in (tmp_path / "a/snapshots").glob("*/*")}
    for path in (tmp_path / "a/snapshots").glob("*/*"):
        before[path.parent.name] += path.stat().st_size
    untouched = contents(tmp_path)
    planned = prune(capsys, tmp_path / "a", "--dry-run", *options)
    assert contents(tmp_path) == untouched
    found = prune(capsys, tmp_path / "a", *options)
    assert {**planned, "dry_run": False} == found
    expected = [name for number, name in enumerate(NAMES, 1) if number in stays]
    assert found["kept"] == expected
    assert sorted(p.name for p in (tmp_path / "a/snapshots").iterdir()) == expected
    assert names_deleted(found) == [name for name in NAMES if name not in expected]
    assert found["bytes"] == sum(before[name] for name in NAMES if name not in expected)
    assert main(["verify", str(tmp_path / "a")]) == 0


def test_without_options_it_keeps_what_the_run_was_last_trained_to_keep(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "a")
    assert prune(capsys, tmp_path / "a")["deleted"] == []
    train(tmp_path / "a", policy=SnapshotPolicy(keep_last=2, keep_every=3))  # over already: it saves nothing more
    assert len(Store(tmp_path / "a").names()) == 6
    assert main(["prune", str(tmp_path / "a"), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "keep    the last 2, the best 1, each 3. epoch (as it was last trained)" in text
    assert "2 would be deleted" in text
    found = prune(capsys, tmp_path / "a")
    assert [NAMES.index(name) + 1 for name in found["kept"]] == [2, 3, 5, 6]
    assert found["retention"]["source"] == "as it was last trained"
    event = json.loads((tmp_path / "a/events.jsonl").read_bytes().splitlines()[-1])
    assert (event["event"], event["snapshots"], event["bytes"]) == ("pruned", [NAMES[0], NAMES[3]], found["bytes"])
    train(tmp_path / "a", best=0)
    assert Small().train(tmp_path / "a", epochs=7).epoch == 7, "it goes on, though parents are gone"


@pytest.mark.parametrize("mode", ["max", "min"])
def test_where_nothing_is_recorded_the_last_three_and_the_best_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    train(tmp_path / "a", mode=mode)
    for rows in (b"", b'{"event":"launched","retention":{"keep_last":-5}}\n', b'{"event":"launched","retention":7}\n'):
        (tmp_path / "a/events.jsonl").write_bytes(rows)
        found = prune(capsys, tmp_path / "a", "--dry-run")
        assert [NAMES.index(name) + 1 for name in found["kept"]] == [2, 4, 5, 6]
        assert found["retention"]["source"] == "by default"


def test_a_run_that_was_trained_to_keep_no_best_still_keeps_it_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "a", best=4, policy=SnapshotPolicy(keep_last=3, keep_best=0))
    assert prune(capsys, tmp_path / "a", "--keep-last", "1")["kept"] == [NAMES[3], NAMES[5]]


def test_a_damaged_newest_is_not_the_one_that_stays_and_is_not_deleted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "a")
    damage(tmp_path / "a/snapshots" / NAMES[5] / "model.safetensors")
    damage(tmp_path / "a/snapshots" / NAMES[0] / "manifest.json")
    found = prune(capsys, tmp_path / "a", "--keep-last", "1", "--keep-best", "0")
    assert found["kept"] == [NAMES[4]]
    assert found["damaged"].keys() == {NAMES[0], NAMES[5]}
    assert Store(tmp_path / "a").names() == [NAMES[0], NAMES[4], NAMES[5]]


def test_with_no_valid_snapshot_nothing_at_all_is_deleted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "a")
    Small().train(tmp_path / "b", epochs=1)
    with StateManager(tmp_path / "b", state=Small().state) as manager:
        manager.set_aside(manager.store.names(), reason="a test")
    for name in NAMES:
        damage(tmp_path / "a/snapshots" / name / "manifest.json")
    for run in ("a", "b"):
        before = contents(tmp_path / run / "snapshots"), contents(tmp_path / run / "set-aside")
        assert main(["prune", str(tmp_path / run), "--keep-last", "1", "--set-aside", "--quarantine"]) == 65
        assert "no snapshot that verifies" in capsys.readouterr().err
        assert (contents(tmp_path / run / "snapshots"), contents(tmp_path / run / "set-aside")) == before


def test_quarantine_and_what_was_set_aside_go_only_when_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "a")
    run = tmp_path / "a"
    with StateManager(run, state=Small().state) as manager:
        manager.quarantine(NAMES[0], "a test")
        manager.set_aside([NAMES[1]], reason="a test")
    (run / "snapshots/.tmp-step-000000099-0123").mkdir()
    (run / "snapshots/.tmp-step-000000099-0123/state.json").write_bytes(b"12345")
    assert [(e["kind"], e["bytes"]) for e in prune(capsys, run)["deleted"]] == [("unfinished", 5)]
    assert (run / "quarantine" / NAMES[0]).is_dir()
    assert (run / "set-aside/line-1" / NAMES[1]).is_dir()
    planned = prune(capsys, run, "--quarantine", "--dry-run")
    assert [entry["kind"] for entry in planned["deleted"]] == ["quarantine"]
    assert prune(capsys, run, "--quarantine")["bytes"] == planned["bytes"] > 1000
    assert not (run / "quarantine").exists()
    assert [entry["kind"] for entry in prune(capsys, run, "--set-aside")["deleted"]] == ["set-aside"]
    assert sorted(path.name for path in run.iterdir()) == [
        "events.jsonl", "metrics.jsonl", "run.json", "run.lock", "snapshots",
    ]  # fmt: skip
    assert Store(run).names() == NAMES[2:]


def test_a_held_run_is_refused_and_may_be_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "a")
    with RunLock(tmp_path / "a/run.lock").held_again():
        before = contents(tmp_path)
        assert main(["prune", str(tmp_path / "a"), "--keep-last", "1"]) == 69
        assert "held by" in capsys.readouterr().err
        assert len(names_deleted(prune(capsys, tmp_path / "a", "--keep-last", "1", "--dry-run"))) == 4
        assert contents(tmp_path) == before


def test_odd_names_links_and_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "läuft ☃\n:best"
    train(run)
    for name in ("step-7", "step-0000000099999", "notes", NAMES[0] + ".old"):
        (run / "snapshots" / name).mkdir()
    (run / "snapshots" / "step-000000001").symlink_to(run / "snapshots" / NAMES[5])
    others = sorted(p.name for p in (run / "snapshots").iterdir() if p.name not in NAMES)
    assert prune(capsys, run, "--keep-last", "1", "--keep-best", "0")["kept"] == [NAMES[5]]
    assert sorted(p.name for p in (run / "snapshots").iterdir()) == sorted([*others, NAMES[5]])
    for options in (["--keep-last", "0"], ["--keep-best", "-1"], ["--keep-every", "-2"]):
        assert main(["prune", str(run), *options]) == 2
    for missing in (tmp_path / "none", tmp_path):
        assert main(["prune", str(missing)]) == 66
    (run / "set-aside").symlink_to(tmp_path)
    assert main(["prune", str(run), "--set-aside"]) == 78
    assert "symbolic link" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert main(["prune"]) == 66


def test_pruning_an_old_run_does_not_make_it_the_most_recent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "old")
    train(tmp_path / "new")
    assert prune(capsys, tmp_path / "old", "--keep-last", "1")["bytes"]
    assert most_recent(tmp_path) == tmp_path / "new"


class Refusing(Files):
    """Refuses to take away the n-th name, as a disk with an error would."""

    def __init__(self, after: int) -> None:
        self.left = after

    def rename(self, source: Path, target: Path) -> None:
        if self.left == 0:
            raise OSError(errno.EIO, "a test")
        self.left -= 1
        super().rename(source, target)


def test_what_went_before_an_error_is_noted_and_the_rest_is_whole(tmp_path: Path) -> None:
    train(tmp_path / "a")
    planned = pruning.plan(tmp_path / "a", Retention(keep_last=1, keep_best=0))
    with pytest.raises(OSError, match="a test"):
        pruning.carry_out(planned, tmp_path / "a", files=Refusing(2))
    assert Store(tmp_path / "a").names() == NAMES[2:]
    event = json.loads((tmp_path / "a/events.jsonl").read_bytes().splitlines()[-1])
    assert (event["event"], event["snapshots"]) == ("pruned", NAMES[:2])
    assert main(["verify", str(tmp_path / "a")]) == 0


def test_it_starts_without_torch_and_takes_the_most_recent_run(tmp_path: Path) -> None:
    train(tmp_path / "runs/a")
    done = command(tmp_path, "prune", "--keep-last", "2", "--dry-run", PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0, done.stderr
    assert "| torch" not in done.stderr
    assert "3 would be deleted" in done.stdout
    shutil.rmtree(tmp_path / "runs/a/snapshots")
    assert "0 deleted, 0 bytes freed; 0 valid snapshots stay" in command(tmp_path, "prune").stdout


def test_a_plan_for_a_run_without_valid_snapshots_says_which_are_damaged(tmp_path: Path) -> None:
    train(tmp_path / "a")
    for name in NAMES:
        damage(tmp_path / "a/snapshots" / name / "state.json")
    with pytest.raises(NoValidSnapshotError, match=r"step-000000004-epoch-000001: state\.json has digest"):
        pruning.plan(tmp_path / "a", Retention())

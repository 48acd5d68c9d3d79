"""`runs` while trainings come, go and break; and its text file for Prometheus."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from small import Killed, Small, killed_at

from resumable_trainer import EarlyStopping, SnapshotPolicy
from resumable_trainer.cli.main import main
from resumable_trainer.durable.lock import RunLock

if TYPE_CHECKING:
    from collections.abc import Callable

NAMES = ["plain", 'a "quoted"', "back\\slash", "new\nline", "ümlaut", "surrogate\udcff", "{x=1}", "tab\t"]


def listed(root: Path, capfd: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    capfd.readouterr()
    assert main(["runs", "--json", str(root)]) == 0
    return {Path(row["run_dir"]).name: row for row in json.loads(capfd.readouterr().out)}


def test_each_run_is_told_with_its_state_place_best_holder_and_goodput(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Small().train(tmp_path / "finished", early_stopping=EarlyStopping("test_accuracy", patience=5))
    Small(accuracy=lambda epoch: -epoch).train(
        tmp_path / "stopped", early_stopping=EarlyStopping("test_accuracy", patience=1)
    )
    for name in ("failed", "held"):
        with pytest.raises(Killed):
            Small(at_step=killed_at(6)).train(tmp_path / name, snapshots=SnapshotPolicy(every_steps=2))
    lock = RunLock(tmp_path / "held" / "run.lock")
    lock.acquire()
    found = listed(tmp_path, capfd)
    lock.release()
    states = {name: row["state"] for name, row in found.items()}
    assert states == {"finished": "finished", "stopped": "stopped_early", "failed": "failed", "held": "running"}
    assert (found["finished"]["step"], found["finished"]["epoch"]) == (12, 3)
    assert found["finished"]["best"]["value"] == 2.0
    assert (found["failed"]["step"], found["failed"]["epoch"]) == (6, 1)
    assert found["held"]["holder"]["pid"] == os.getpid()
    assert [row["holder"] for name, row in found.items() if name != "held"] == [None] * 3
    assert found["failed"]["goodput"]["interruptions"] == {"failed": 1}


def damage(name: str) -> Callable[[Path], None]:
    def manifests(run: Path) -> None:
        for manifest in run.glob("snapshots/*/manifest.json"):
            manifest.write_text("{")

    return {
        "no events": lambda run: (run / "events.jsonl").unlink(),
        "torn events": lambda run: (run / "events.jsonl").write_bytes((run / "events.jsonl").read_bytes()[:-9]),
        "events are a directory": lambda run: ((run / "events.jsonl").unlink(), (run / "events.jsonl").mkdir()),
        "odd lock": lambda run: (run / "run.lock").write_text("\0\0"),
        "manifests": manifests,
        "no snapshots": lambda run: os.rename(run / "snapshots", run / "gone"),
        "snapshots is a file": lambda run: (
            os.rename(run / "snapshots", run / "gone"),
            (run / "snapshots").write_text(""),
        ),
        "foreign events": lambda run: (run / "events.jsonl").write_text('[]\n{"event": 5}\n{"event": "launched"}\n7\n'),
    }[name]


@pytest.mark.parametrize(
    "kind",
    [
        "no events",
        "torn events",
        "events are a directory",
        "odd lock",
        "manifests",
        "no snapshots",
        "snapshots is a file",
        "foreign events",
    ],
)
def test_a_run_that_is_broken_hides_no_other(tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str) -> None:
    for name in ("broken", "whole"):
        Small().train(tmp_path / name, epochs=1)
    damage(kind)(tmp_path / "broken")
    assert listed(tmp_path, capfd)["whole"]["state"] == "finished"
    assert main(["runs", str(tmp_path)]) == 0
    assert main(["runs", str(tmp_path), "--prometheus", str(tmp_path / "x.prom")]) == 0


def families(file: Path) -> dict[str, list[Any]]:
    from prometheus_client.parser import text_string_to_metric_families

    return {family.name: family.samples for family in text_string_to_metric_families(file.read_text())}


def test_every_metric_has_its_name_and_every_label_comes_back_as_it_was(tmp_path: Path) -> None:
    for name in NAMES:
        Small().train(tmp_path / name, epochs=1, early_stopping=EarlyStopping("test_accuracy", patience=5))
    file = tmp_path / "runs.prom"
    assert main(["runs", str(tmp_path), "--prometheus", str(file)]) == 0
    found = families(file)
    names = ["step", "epoch", "best", "snapshot_age_seconds", "state", "launches", "interruptions", "goodput_ratio"]
    assert set(found) == {f"resumable_trainer_{name}" for name in [*names, "seconds"]}
    runs = {str(tmp_path / name).encode(errors="backslashreplace").decode() for name in NAMES}
    for family, samples in found.items():
        if samples:
            assert {sample.labels["run"] for sample in samples} == runs, family
    (best,) = {(sample.labels["metric"], sample.value) for sample in found["resumable_trainer_best"]}
    assert best == ("test_accuracy", 0.0)
    states = [sample for sample in found["resumable_trainer_state"] if sample.labels["run"] == str(tmp_path / "plain")]
    assert {sample.labels["state"]: sample.value for sample in states} == {
        "running": 0.0,
        "interrupted": 0.0,
        "finished": 1.0,
        "stopped_early": 0.0,
        "failed": 0.0,
        "unreadable": 0.0,
    }


def test_the_text_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Small().train(tmp_path / "run", epochs=1)
    (tmp_path / "out").mkdir()
    file = tmp_path / "out" / "runs.prom"
    command = ["runs", str(tmp_path), "--prometheus", str(file)]
    assert main(command) == 0
    first = file.read_bytes()
    with file.open("rb", buffering=0) as reader:  # node_exporter reads while it is written
        head = reader.read(10)
        Small().train(tmp_path / "run", epochs=2)
        assert main(command) == 0
        assert head + reader.read() == first, "the old file, whole"
    assert file.read_bytes() != first

    second = file.read_bytes()
    monkeypatch.setattr("prometheus_client.exposition.generate_latest", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(command)
    assert file.read_bytes() == second
    assert [path.name for path in file.parent.iterdir()] == ["runs.prom"], "nothing is left beside it"


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Small().train(tmp_path / "run", epochs=1)
    for file in (tmp_path / "nowhere" / "x.prom", Path("/proc/x.prom")):
        assert main(["runs", str(tmp_path), "--prometheus", str(file)]) == 74
        assert "Traceback" not in capfd.readouterr().err

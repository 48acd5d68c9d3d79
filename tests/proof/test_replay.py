"""`verify --replay`: a stretch of a recorded run, trained once more, comes to the same bits, or it is said."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from leaks import LEAKS

pytestmark = pytest.mark.timeout(300)
COMMAND = [sys.executable, "-m", "resumable_trainer"]


def command(directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *words], cwd=directory, capture_output=True, text=True, check=False)


def replay(directory: Path, *options: str) -> tuple[int, dict[str, object]]:
    done = command(directory, "verify", "runs/job", "--replay", "--json", *options)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def trained(directory: Path, script: str) -> Path:
    """A finished run with snapshots within epochs and after them."""
    policy = "progress=False, snapshots=SnapshotPolicy(every_steps=4, keep_last=30)"
    script = script.replace("import Run", "import Run, SnapshotPolicy").replace("progress=False", policy)
    (directory / "job.py").write_text(script)
    done = command(directory, "run", "job.py")
    assert done.returncode == 0, done.stderr
    return directory / "runs" / "job"


def files(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_stretch_within_an_epoch_and_one_to_its_end_come_to_what_was_recorded(tmp_path: Path) -> None:
    run = trained(tmp_path, LEAKS["none"].script)
    before = files(tmp_path)
    for begin, end in (("8", "step-000000010-epoch-000001"), ("12", "step-000000016"), ("16", "step-000000020")):
        code, found = replay(tmp_path, "--from", begin)
        assert (code, found["exact"], found["to"]) == (0, True, end), found
    assert found["changed"] == []
    code, found = replay(tmp_path)
    assert (code, found["to"]) == (0, max(path.name for path in (run / "snapshots").iterdir()))
    assert files(tmp_path) == before  # the run was only looked at, and nothing stays behind


def test_a_stretch_that_comes_to_something_else_is_said_with_its_parts(tmp_path: Path) -> None:
    trained(tmp_path, LEAKS["an unseeded generator"].script)
    code, found = replay(tmp_path, "--from", "12")
    assert (code, found["exact"]) == (1, False)
    assert [s["name"] for s in found["difference"]["sections"] if not s["same"]][:2] == ["model", "optimizer"]


def test_a_script_that_has_changed_since_is_named(tmp_path: Path) -> None:
    trained(tmp_path, LEAKS["none"].script)
    job = tmp_path / "job.py"
    job.write_text(job.read_text().replace(".square()", ".abs()"))
    code, found = replay(tmp_path, "--from", "12")
    assert (code, found["exact"], found["changed"]) == (1, False, ["script"])


def test_a_snapshot_made_by_a_notice_in_an_evaluation_is_replayed(tmp_path: Path) -> None:
    script = LEAKS["none"].script.replace(
        "run.log_epoch(test_loss", "os.kill(os.getpid(), 15) if run.epoch == 1 else None; run.log_epoch(test_loss"
    )
    script = script.replace("progress=False", "progress=False, snapshots=SnapshotPolicy(keep_last=9)")
    (tmp_path / "job.py").write_text(script.replace("import Run", "import Run, SnapshotPolicy"))
    assert command(tmp_path, "run", "job.py").returncode == 75
    code, found = replay(tmp_path)
    assert (code, found["to"]) == (0, "step-000000020"), found


def test_the_last_snapshot_and_a_run_with_one_alone_cannot_be_replayed(tmp_path: Path) -> None:
    trained(tmp_path, LEAKS["none"].script)
    done = command(tmp_path, "verify", "runs/job", "--replay", "--from", "latest")
    assert done.returncode == 66
    assert "is the last of" in done.stderr
    done = command(tmp_path, "verify", "runs/job", "--from", "4")
    assert done.returncode == 2

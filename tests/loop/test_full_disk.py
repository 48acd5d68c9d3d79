"""A real disk that fills up while a run trains: every epoch is trained, and with room again nothing was lost."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small import Small

from resumable_trainer import SnapshotPolicy

TRAINING = Path(__file__).with_name("on_small_disk.py")
# What is mounted in a namespace of its own is gone with the shell, however that ends.
SMALL_DISK = """
mkdir disk && {mount} || exit 99
$TRAIN; echo "first $?"
cp parameters full-parameters; cp epochs full-epochs
$LOOK verify disk/run; echo "verified $?"
rm disk/ballast
$TRAIN; echo "second $?"
cp disk/run/metrics.jsonl metrics.jsonl
cp -r disk/run/snapshots snapshots
"""
MOUNTS = {
    "tmpfs": "mount -t tmpfs -o size=1m none disk",
    "ext4": "truncate -s 8M image && mkfs.ext4 -q -F -m 0 -J size=1 image && mount -o loop image disk",
}


def shell(script: str, cwd: Path, *, background: str) -> subprocess.CompletedProcess[str]:
    train = f"{sys.executable} {TRAINING} disk/run {background}"
    environment = {
        **os.environ,
        "TRAIN": train,
        "LOOK": f"{sys.executable} -m resumable_trainer",
        "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    command = ["unshare", "--mount", "sh", "-c", script]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=100)


@pytest.fixture
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The command that mounts a small disk; skipped with a reason where that is not possible."""
    mount = MOUNTS[request.param]
    if not sys.platform.startswith("linux") or os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("mounting a small disk takes Linux, root and unshare")
    (tmp_path / "trial").mkdir()
    trial = shell(f"mkdir disk && {mount}", tmp_path / "trial", background="")
    if trial.returncode:
        pytest.skip(f"no {request.param} can be mounted here: {trial.stderr.strip()}")
    return mount


@pytest.mark.parametrize(("disk", "background"), [("tmpfs", "background"), ("ext4", "at-once")], indirect=["disk"])
def test_a_disk_that_fills_up_costs_no_epoch_and_with_room_again_the_run_ends_as_if_it_never_had(
    tmp_path: Path, disk: str, background: str
) -> None:
    small = Small()
    small.train(tmp_path / "whole", snapshots=SnapshotPolicy(every_steps=1))
    parameters = b"".join(parameter.detach().numpy().tobytes() for parameter in small.model.parameters())
    rows = (tmp_path / "whole/metrics.jsonl").read_bytes()
    names = sorted(path.name for path in (tmp_path / "whole/snapshots").iterdir())

    work = tmp_path / "full"
    work.mkdir()
    done = shell(SMALL_DISK.format(mount=disk), work, background=background)
    said = done.stdout + done.stderr
    assert "first 74" in done.stdout, said
    assert (work / "full-epochs").read_text() == "[0, 1, 2]", "every epoch was trained"
    assert (work / "full-parameters").read_bytes() == parameters
    assert "No space left on device" in done.stderr
    assert "training goes on, and the next snapshot tries again" in said
    assert "verified 0" in done.stdout, said
    assert "step-000000005" in done.stdout, "the snapshot before the disk was full"
    assert "second 0" in done.stdout, said
    assert (work / "parameters").read_bytes() == parameters
    assert (work / "metrics.jsonl").read_bytes() == rows
    assert sorted(path.name for path in (work / "snapshots").iterdir()) == names

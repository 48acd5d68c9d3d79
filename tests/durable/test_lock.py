from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from resumable_trainer.durable.lock import RunLock, is_alive, read_owner
from resumable_trainer.errors import RunHeldError

if TYPE_CHECKING:
    from pathlib import Path

HOLDER = """
import os, sys, time
from pathlib import Path
from resumable_trainer.durable.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.acquire(command="holder")
lock.note_step(42)
if sys.argv[2] == "fork":
    there, here = os.pipe()
    if os.fork() == 0:
        os.write(here, b"x")  # the child is in Python again: what it closes at its birth is closed
        time.sleep(60)
        os._exit(0)
    os.read(there, 1)
if sys.argv[2] == "child exits" :
    pid = os.fork()
    if pid == 0:
        sys.exit(0)
    os.waitpid(pid, 0)
print("held", flush=True)
time.sleep(60)
"""


def holder(path: Path, how: str = "plain") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLDER, str(path), how]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def test_a_second_process_is_told_in_one_line_who_holds_the_run(tmp_path: Path) -> None:
    process = holder(tmp_path / "run.lock")
    try:
        with pytest.raises(RunHeldError, match=rf"held by pid {process.pid} on \S+ since \S+, at step 42") as error:
            RunLock(tmp_path / "run.lock").acquire()
        assert "\n" not in str(error.value)
        assert error.value.exit_code == 69
    finally:
        end(process)


@pytest.mark.parametrize("how", ["plain", "fork"])
def test_a_killed_holder_frees_the_run_at_once_though_its_child_lives(tmp_path: Path, how: str) -> None:
    process = holder(tmp_path / "run.lock", how)
    try:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        lock = RunLock(tmp_path / "run.lock")
        assert lock.acquire().generation == 2
        lock.release()
    finally:
        end(process) if how == "fork" else process.stdout.close()  # type: ignore[union-attr]


def test_a_forked_child_that_exits_frees_nothing(tmp_path: Path) -> None:
    process = holder(tmp_path / "run.lock", "child exits")
    try:
        with pytest.raises(RunHeldError):
            RunLock(tmp_path / "run.lock").acquire()
    finally:
        end(process)


def test_the_generation_grows_and_survives_a_lost_record(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    for generation in (1, 2):
        lock = RunLock(path)
        assert lock.acquire().generation == generation
        lock.release()
    path.write_bytes(b"torn")
    lock = RunLock(path)
    assert lock.acquire(known_generation=7).generation == 8
    lock.release()


def test_check_notices_a_lock_that_was_taken_away(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    lock = RunLock(path)
    lock.acquire()
    lock.check()
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"generation": 1', b'"generation": 9'))
    with pytest.raises(RunHeldError, match="superseded by generation 9"):
        lock.check()
    path.unlink()
    with pytest.raises(RunHeldError, match="its lock file is gone"):
        lock.check()
    path.write_bytes(data)
    with pytest.raises(RunHeldError, match="was replaced"):
        lock.check()
    lock.release()


def test_a_released_run_has_no_living_owner(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    lock = RunLock(path)
    owner = lock.acquire()
    assert is_alive(owner)
    lock.release()
    found = read_owner(path)
    assert found is not None
    assert found.released
    assert is_alive(found) is False

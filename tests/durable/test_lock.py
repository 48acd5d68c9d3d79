from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import pytest

from resumable_trainer.durable import lock as lock_module
from resumable_trainer.durable.files import Files
from resumable_trainer.durable.lock import RunLock, is_alive, read_owner
from resumable_trainer.errors import RunHeldError, SettingsError, SnapshotWriteError

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
if sys.argv[2].startswith("child:"):
    pid = os.fork()
    if pid == 0:
        null = os.open(os.devnull, os.O_RDONLY)  # takes a number that a lock's descriptor had
        exec(sys.argv[2].removeprefix("child:"))
        os.fstat(null)
        sys.exit(0)
    assert os.waitpid(pid, 0)[1] == 0, "the child failed"
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


LOOK = "import glob; assert os.path.realpath(sys.argv[1]) not in map(os.path.realpath, glob.glob('/proc/self/fd/*'))"


@pytest.mark.parametrize(
    "act", ["pass", "os._exit(0)", "lock.release()", "lock.note_step(9)", "del lock; import gc; gc.collect()", LOOK]
)
def test_a_forked_child_frees_nothing_and_says_nothing_whatever_it_does(tmp_path: Path, act: str) -> None:
    process = holder(tmp_path / "run.lock", f"child:{act}")
    try:
        owner = read_owner(tmp_path / "run.lock")
        assert owner is not None
        assert (owner.pid, owner.step, owner.released) == (process.pid, 42, False)
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


STARTER = """
import sys, time
from pathlib import Path
from resumable_trainer.durable.lock import RunLock
from resumable_trainer.errors import RunHeldError
print("ready", flush=True)
sys.stdin.readline()
try:
    lock = RunLock(Path(sys.argv[1]))  # named: a lock that nobody refers to is let go
    lock.acquire()
except RunHeldError as error:
    print(error.found.pid if error.found else "unknown", flush=True)
    sys.exit(error.exit_code)
print("won", flush=True)
sys.stdin.readline()
"""


def test_of_twenty_starts_at_once_one_wins_and_the_others_name_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", STARTER, str(tmp_path / "runs" / "new" / "run.lock")]
    starts = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(20)]
    try:
        for start in starts:
            assert start.stdout is not None
            assert start.stdout.readline() == "ready\n"
        for start in starts:
            assert start.stdin is not None
            start.stdin.write("go\n")
            start.stdin.flush()
        answers = [start.stdout.readline().strip() for start in starts]  # type: ignore[union-attr]
        winner = starts[answers.index("won")]
        assert sorted(answers) == sorted(["won", *[str(winner.pid)] * 19])
        owner = read_owner(tmp_path / "runs" / "new" / "run.lock")
        assert owner is not None
        assert (owner.pid, owner.generation) == (winner.pid, 1)
    finally:
        for start in starts:
            start.communicate("end\n")
    assert sorted(start.returncode for start in starts) == [0, *[69] * 19]


def test_a_second_lock_in_the_same_process_is_refused_too(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "run.lock")
    lock.acquire()
    with pytest.raises(RunHeldError, match=f"pid {os.getpid()} on"):
        RunLock(tmp_path / "run.lock").acquire()
    lock.check()
    lock.release()
    lock.release()
    assert not lock.is_held
    assert lock.acquire().generation == 2
    lock.release()


def test_a_refused_start_leaves_the_record_as_it_is(tmp_path: Path) -> None:
    """filelock before 4.0 emptied the file even when it was refused, and the holder's next commit failed."""
    process = holder(tmp_path / "run.lock")
    try:
        before = (tmp_path / "run.lock").read_bytes()
        assert len(before) == 2048
        for _ in range(3):
            with pytest.raises(RunHeldError):
                RunLock(tmp_path / "run.lock").acquire()
        assert (tmp_path / "run.lock").read_bytes() == before
    finally:
        end(process)


def test_a_start_waits_for_a_moment_for_one_who_only_notes_an_exit(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    lock = RunLock(path)
    lock.acquire()
    lock.release()
    record = path.read_bytes()
    held, go_on = threading.Event(), threading.Event()

    def note() -> None:
        with RunLock(path).held_again():
            held.set()
            assert go_on.wait(10)

    thread = threading.Thread(target=note)
    thread.start()
    assert held.wait(10)
    with pytest.raises(RunHeldError, match="another process that has not said yet who it is"):
        lock.acquire()
    assert path.read_bytes() == record
    threading.Timer(0.1, go_on.set).start()
    assert lock.acquire().generation == 2
    lock.release()
    thread.join()


NOTER = """
import sys
from pathlib import Path
from resumable_trainer.durable.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.acquire(command="c" * 900)
print("held", flush=True)
step = 0
while True:
    step += 1
    lock.note_step(10 ** (step % 15))
"""


def test_who_looks_beside_a_write_sees_a_whole_record(tmp_path: Path) -> None:
    """The kernel may show half of a write; one read in a hundred was a mix."""
    path = tmp_path / "run.lock"
    process = subprocess.Popen([sys.executable, "-c", NOTER, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        for _ in range(5000):
            owner = read_owner(path)
            assert owner is not None
            assert owner.step is None or str(owner.step).strip("0") == "1"
    finally:
        process.kill()
        process.communicate()


def test_a_mix_of_two_records_is_never_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel showed in the race above, played back: it is too rare to rely on."""
    lock = RunLock(tmp_path / "run.lock")
    lock.acquire()
    lock.note_step(9)
    old = (tmp_path / "run.lock").read_bytes()
    lock.note_step(1000)
    new = (tmp_path / "run.lock").read_bytes()
    lock.release()
    cut = old.index(b'"step": 9,') + len(b'"step": 9')
    mixes = [new[:cut] + old[cut:], new[: cut + 1] + old[cut + 1 :]]  # step 1, and no JSON at all
    reads = [old, *mixes, new, new]
    monkeypatch.setattr(os, "pread", lambda *_: reads.pop(0))
    found = read_owner(tmp_path / "run.lock")
    assert found is not None
    assert found.step == 1000
    assert not reads


def test_check_holds_while_another_thread_notes_steps(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "run.lock")
    lock.acquire()
    done = threading.Event()

    def note() -> None:
        step = 0
        while not done.is_set():
            step += 1
            lock.note_step(10 ** (step % 15))

    thread = threading.Thread(target=note)
    thread.start()
    try:
        for _ in range(2000):
            lock.check()
    finally:
        done.set()
        thread.join()
        lock.release()


@pytest.mark.parametrize("character", ["x", "\u8bad", "\U0001f525", "\udcff", "\x00", '"'])
def test_a_command_of_any_length_and_script_fits_the_record(tmp_path: Path, character: str) -> None:
    command = character * 5000
    lock = RunLock(tmp_path / "run.lock")
    lock.acquire(command=command)
    lock.note_step(10**15)
    lock.check()
    found = read_owner(tmp_path / "run.lock")
    assert found == lock.owner
    assert len(lock.owner.command) > 50
    assert command.startswith(lock.owner.command)
    lock.release()


def test_what_can_be_no_record_is_none_and_hangs_nobody(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "run.lock")
    owner = lock.acquire()
    fields = json.loads((tmp_path / "run.lock").read_bytes())
    lock.release()
    path = tmp_path / "other"
    for damage in ({"pid": -1}, {"pid": 0}, {"pid": "1"}, {"generation": None}, {"surprise": 1}):
        path.write_text(json.dumps({**fields, **damage}))
        assert read_owner(path) is None
    for content in (b"", b"[" * 5000, b"[]", b"3", b"\xff" * 2048, bytes(2048)):
        path.write_bytes(content)
        assert read_owner(path) is None
    path.write_text(json.dumps(fields))
    assert read_owner(path) == owner
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(path)
    for name in ("fifo", "link", "nothing"):
        assert read_owner(tmp_path / name) is None


def test_the_lock_is_not_taken_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"mine")
    (tmp_path / "run.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
        RunLock(tmp_path / "run.lock").acquire()
    assert (tmp_path / "precious").read_bytes() == b"mine"


def test_a_lock_file_replaced_while_it_is_taken_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"

    class Interrupted(RunLock):
        def _lock_unless_held(self) -> None:
            super()._lock_unless_held()
            path.unlink()
            path.write_bytes(b"")

    lock = Interrupted(path)
    with pytest.raises(RunHeldError):
        lock.acquire()
    assert not lock.is_held
    other = RunLock(path)
    assert other.acquire().generation == 1
    other.release()


def test_an_acquire_that_fails_holds_nothing(tmp_path: Path) -> None:
    class Broken(Files):
        def sync(self, fd: int) -> None:
            raise OSError(errno.EIO, "Input/output error")

    before = len(os.listdir("/proc/self/fd"))
    lock = RunLock(tmp_path / "run.lock", files=Broken())
    with pytest.raises(SnapshotWriteError, match=r"run\.lock could not be written: .*Input/output error"):
        lock.acquire()
    assert not lock.is_held
    assert len(os.listdir("/proc/self/fd")) == before
    other = RunLock(tmp_path / "run.lock")
    assert other.acquire().generation == 2
    other.release()


def test_without_flock_a_run_does_not_start_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", missing)
        with pytest.raises(SettingsError, match="its file system has no flock"):
            RunLock(tmp_path / "run.lock").acquire()
    lock = RunLock(tmp_path / "run.lock")
    assert lock.acquire().generation == 1
    lock.release()


def test_an_owner_lives_only_as_the_very_process_that_signed(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "run.lock")
    owner = lock.acquire()
    assert is_alive(owner) is True
    assert is_alive(replace(owner, host=socket.gethostname() + "-other")) is None
    assert is_alive(replace(owner, boot_id="another boot")) is False
    assert is_alive(replace(owner, process_start="1")) is False  # the pid is used by another process now
    lock.release()


def test_a_zombie_is_not_alive(tmp_path: Path) -> None:
    process = holder(tmp_path / "run.lock")
    owner = read_owner(tmp_path / "run.lock")
    assert owner is not None
    assert is_alive(owner) is True
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and not yet reaped
    assert is_alive(owner) is False
    end(process)
    assert is_alive(owner) is False


def test_noting_a_step_costs_no_sync(tmp_path: Path) -> None:
    class Counting(Files):
        num_syncs = 0

        def sync(self, fd: int) -> None:
            self.num_syncs += 1
            super().sync(fd)

    files = Counting()
    lock = RunLock(tmp_path / "run.lock", files=files)
    lock.acquire()
    lock.note_step(3)
    lock.release()
    assert files.num_syncs == 1


class Interrupts(Files):
    def sync(self, fd: int) -> None:
        raise KeyboardInterrupt


def test_an_acquire_that_is_interrupted_holds_nothing(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    lock = RunLock(tmp_path / "run.lock", files=Interrupts())
    with pytest.raises(KeyboardInterrupt):
        lock.acquire()
    assert not lock.is_held
    assert len(os.listdir("/proc/self/fd")) == before
    other = RunLock(tmp_path / "run.lock")
    other.acquire()
    other.release()


@pytest.mark.parametrize("damage", [b"", b"torn", b"[]"])
def test_nothing_is_published_under_a_record_that_was_damaged(tmp_path: Path, damage: bytes) -> None:
    lock = RunLock(tmp_path / "run.lock")
    lock.acquire()
    (tmp_path / "run.lock").write_bytes(damage)
    with pytest.raises(RunHeldError, match="the record in its lock file was damaged"):
        lock.check()
    lock.release()


def test_an_error_of_flock_that_says_nothing_of_holders_is_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", failing)
        with pytest.raises(OSError, match="Input/output error") as raised:
            RunLock(tmp_path / "run.lock").acquire()
    assert not isinstance(raised.value, RunHeldError)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_record_that_the_disk_takes_half_of_is_no_launch_and_costs_a_running_one_nothing_but_its_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.pwrite
    lock = RunLock(tmp_path / "run.lock")
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda fd, data, at: write(fd, data[:100], at))
        with pytest.raises(SnapshotWriteError, match="No space left on device"):
            lock.acquire()
        assert not lock.is_held
    lock.acquire()
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda fd, data, at: write(fd, b"", at))
        lock.note_step(7)
    assert lock.owner.step is None
    lock.check()
    lock.note_step(8)
    assert lock.owner.step == 8
    lock.release()


HELD_AGAIN = """
import os, sys
from pathlib import Path
from resumable_trainer.durable.lock import RunLock
from resumable_trainer.errors import RunHeldError
path = Path(sys.argv[1])
block = RunLock(path).held_again()
block.__enter__()
pid = os.fork()
if pid == 0:
    null = os.open(os.devnull, os.O_RDONLY)  # takes a number that a lock's descriptor had
    block.__exit__(None, None, None)
    os.fstat(null)
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0, "the child failed"
try:
    RunLock(path).acquire()
except RunHeldError:
    print("still held")
block.__exit__(None, None, None)
print(RunLock(path).acquire().generation)
"""


def test_a_child_that_leaves_the_block_of_its_parent_lets_nothing_go(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HELD_AGAIN, str(tmp_path / "run.lock")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == ["still held", "1"]


def test_who_looks_at_a_record_that_never_rests_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.lock"
    lock = RunLock(path)
    fields = asdict(lock.acquire())
    lock.release()
    steps = iter(range(10**6))
    monkeypatch.setattr(os, "pread", lambda *_: json.dumps({**fields, "step": next(steps)}).encode())
    found = read_owner(path)
    assert found is not None
    assert found.step == next(steps) - 1, "the newest that it has seen"


def test_without_proc_an_owner_lives_while_its_pid_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS has neither the boot's id nor the start time of a process to read."""
    lock = RunLock(tmp_path / "run.lock")
    monkeypatch.setattr(lock_module, "Path", lambda _: tmp_path / "no-proc")
    owner = lock.acquire()
    assert (owner.boot_id, owner.process_start) == ("", "")
    assert is_alive(owner) is True
    process = subprocess.Popen([sys.executable, "-c", ""])
    assert process.wait() == 0
    assert is_alive(replace(owner, pid=process.pid)) is False

    def not_ours(pid: int, number: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "kill", not_ours)
    assert is_alive(replace(owner, pid=1)) is True, "another user's process is one that lives"
    lock.release()


def test_a_run_that_was_held_again_is_let_go_at_the_end_of_the_block_whatever_ends_it(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    lock = RunLock(tmp_path / "run.lock")

    def interrupted() -> None:
        with lock.held_again():
            with pytest.raises(RunHeldError):
                RunLock(tmp_path / "run.lock").acquire()
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert len(os.listdir("/proc/self/fd")) == before
    other = RunLock(tmp_path / "run.lock")
    assert other.acquire().generation == 1
    other.release()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_lock_file_that_was_replaced_between_opening_and_locking_is_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, flock = tmp_path / "run.lock", fcntl.flock
    path.touch()

    def too_late(fd: int, how: int) -> None:
        path.unlink()
        path.touch()
        flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", too_late)
    with pytest.raises(FileNotFoundError, match="replaced"), lock_module.held_as_it_is(path):
        raise AssertionError("it was held")

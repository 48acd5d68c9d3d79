"""The supervisor over children without torch: what it restarts, ends, passes on, and leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from resumable_trainer.service.budget import Limits
from resumable_trainer.service.guardian import Guardian
from resumable_trainer.service.supervisor import Supervisor, Training

SUPERVISE = """
import signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
from resumable_trainer.service.budget import Limits
from resumable_trainer.service.supervisor import Supervisor, Training
hang = float(sys.argv[1]) or None
argv = [sys.executable, *sys.argv[2:]]
say = lambda line: print(line, file=sys.stderr, flush=True)
training = Training(argv, argv, lambda: [])
sys.exit(Supervisor(training, limits=Limits(max_stuck=3, first_wait_seconds=0.01), hang_timeout=hang, say=say).run())
"""
NOTIFY = """
import faulthandler, os, signal, socket, sys, threading, time
faulthandler.enable()
def notify(text):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
        s.sendto(text.encode(), chr(0) + os.environ["NOTIFY_SOCKET"][1:])
count = int(open("count").read()) if os.path.exists("count") else 0
open("count", "w").write(str(count + 1))
"""


def supervise(*argv: str) -> tuple[int, list[str]]:
    lines: list[str] = []
    training = Training([sys.executable, *argv], [sys.executable, *argv], list)
    limits = Limits(max_stuck=3, first_wait_seconds=0.01)
    return Supervisor(training, limits=limits, say=lines.append).run(), lines


def started(tmp_path: Path, script: str, *, hang: float = 0) -> subprocess.Popen[str]:
    (tmp_path / "child.py").write_text(script)
    argv = [sys.executable, "-c", SUPERVISE, str(hang), "child.py"]
    return subprocess.Popen(argv, cwd=tmp_path, stderr=subprocess.PIPE, text=True)


def until(path: Path) -> str:
    deadline = time.monotonic() + 20
    while not path.exists() or not path.read_text():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)
    return path.read_text()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("code", [0, 2, 65, 66, 69, 78, 79, 130])
def test_a_final_exit_code_is_passed_on_and_nothing_is_restarted(code: int) -> None:
    assert supervise("-c", f"raise SystemExit({code})") == (code, [])


@pytest.mark.parametrize("end", ["sys.exit(75)", "sys.exit(70)", "sys.exit(74)", "os.kill(os.getpid(), 9)"])
def test_preemptions_failures_and_deaths_are_restarted(tmp_path: Path, end: str) -> None:
    code = f"import os, sys; p = {str(tmp_path / 'x')!r}\nif not os.path.exists(p): open(p, 'w'); {end}"
    found, lines = supervise("-c", code)
    assert found == 0
    assert len(lines) == 1
    assert lines[0].startswith("restart 1 in 0.01 s")


def test_a_script_that_opens_no_run_is_given_up_soon_with_the_last_code_and_the_reason() -> None:
    found, lines = supervise("-c", "raise SystemExit(70)")
    assert found == 70
    assert lines[-1].startswith("gave up: 3 failures in a row without durable progress, before a run was opened")


def test_the_last_words_of_a_child_are_heard(tmp_path: Path) -> None:
    script = NOTIFY + "notify('STATUS=failed: Oh: no\\nX_FAILURE=Oh: no')\nsys.exit(70 if count == 0 else 0)\n"
    supervisor = started(tmp_path, script)
    assert "it failed with exit code 70 (Oh: no)" in supervisor.communicate(timeout=20)[1]


def test_a_death_by_signal_is_told_as_a_shell_does() -> None:
    assert supervise("-c", "import os; os.kill(os.getpid(), 11)")[0] == 139


@pytest.mark.parametrize(
    ("number", "heard"),
    [(signal.SIGTERM, "15"), (signal.SIGINT, "2"), (signal.SIGHUP, "15"), (signal.SIGUSR1, "10")],
)
def test_signals_pass_through(tmp_path: Path, number: signal.Signals, heard: str) -> None:
    script = """
import os, signal, sys, time
def heard(number, frame):
    open("heard", "a").write(str(number))
    sys.exit(78 if number == 10 else 75)
for number in (2, 10, 15): signal.signal(number, heard)
open("ready", "w").write("1")
time.sleep(60)
"""
    supervisor = started(tmp_path, script)
    until(tmp_path / "ready")
    supervisor.send_signal(number)
    _, said = supervisor.communicate(timeout=20)
    assert (tmp_path / "heard").read_text() == heard
    assert supervisor.returncode == (78 if number == signal.SIGUSR1 else 75)
    assert said == ""


BEATING = """
notify("READY=1")
notify("WATCHDOG_USEC=2000000")
open("ready", "a").write(f"{os.getpid()} ")
"""


def test_a_child_that_was_stopped_together_with_its_supervisor_does_not_hang(tmp_path: Path) -> None:
    script = NOTIFY + BEATING + "for _ in range(40): time.sleep(0.1); notify('WATCHDOG=1')\n"
    supervisor = started(tmp_path, script, hang=30)
    child = int(until(tmp_path / "ready"))
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for pid in (child, supervisor.pid) if number == signal.SIGSTOP else (supervisor.pid, child):
            os.kill(pid, number)
            time.sleep(0.2)  # the supervisor is the first to find how late it is
        time.sleep(4)
    assert (supervisor.communicate(timeout=20)[1], supervisor.returncode) == ("", 0)


def test_a_child_that_was_stopped_alone_is_ended_with_its_stacks(tmp_path: Path) -> None:
    script = NOTIFY + BEATING + "if not count: os.kill(os.getpid(), signal.SIGSTOP)\n"
    supervisor = started(tmp_path, script, hang=30)
    said = supervisor.communicate(timeout=20)[1]
    assert supervisor.returncode == 0
    assert "no sign of life for 2 s" in said
    assert "Fatal Python error: Aborted" in said


def test_a_second_sigterm_passes_through_too(tmp_path: Path) -> None:
    script = """
import os, signal, time
def heard(number, frame):
    if os.path.exists("heard"): os._exit(75)
    open("heard", "w").write("1")
signal.signal(15, heard)
open("ready", "w").write("1")
while True: time.sleep(1)
"""
    supervisor = started(tmp_path, script)
    until(tmp_path / "ready")
    supervisor.terminate()
    until(tmp_path / "heard")
    supervisor.terminate()
    supervisor.communicate(timeout=20)
    assert supervisor.returncode == 75


def test_a_sigterm_while_it_waits_ends_it_with_the_childs_code(tmp_path: Path) -> None:
    code = SUPERVISE.replace("0.01", "100")
    argv = [sys.executable, "-c", code, "0", "-c", "raise SystemExit(70)"]
    supervisor = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
    assert supervisor.stderr is not None
    assert supervisor.stderr.readline().startswith("restart 1 in 100 s")
    supervisor.terminate()
    assert supervisor.wait(20) == 70
    supervisor.stderr.close()


def test_a_killed_supervisor_takes_the_child_along_gently(tmp_path: Path) -> None:
    script = """
import signal, sys, time
signal.signal(15, lambda *_: (open("saved", "w").write("1"), sys.exit(75)))
open("ready", "w").write("1")
time.sleep(60)
"""
    supervisor = started(tmp_path, script)
    until(tmp_path / "ready")
    supervisor.kill()
    supervisor.communicate(timeout=20)
    until(tmp_path / "saved")


@pytest.mark.parametrize("leader", ["stubborn", "gone"])
def test_a_killed_supervisors_child_that_does_not_follow_is_ended_with_all_that_is_its(
    tmp_path: Path, leader: str
) -> None:
    """It hangs, or is still being set up; or it left in order, and a worker of it does not."""
    script = f"""
import os, signal, sys, time
signal.signal(15, (lambda *_: sys.exit(75)) if {leader!r} == "gone" else lambda *_: open("heard", "w").write("1"))
worker = os.fork()
if not worker: signal.signal(15, signal.SIG_IGN)
else: open("pids", "w").write(f"{{os.getpid()}} {{worker}}")
while True: time.sleep(1)
"""
    grace = 2.0 if leader == "stubborn" else 600.0
    code = SUPERVISE.replace("hang =", f"supervisor_module.Guardian = lambda: guardian.Guardian({grace})\nhang =")
    code = "import resumable_trainer.service.supervisor as supervisor_module\n" + code
    code = "from resumable_trainer.service import guardian\n" + code
    (tmp_path / "child.py").write_text(script)
    supervisor = subprocess.Popen([sys.executable, "-c", code, "0", "child.py"], cwd=tmp_path)
    pids = [int(word) for word in until(tmp_path / "pids").split()]
    supervisor.kill()
    supervisor.wait(20)
    if leader == "stubborn":
        until(tmp_path / "heard")
    deadline = time.monotonic() + 20
    while (left := [pid for pid in pids if is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def test_the_training_is_the_only_child(tmp_path: Path) -> None:
    """Who looks for it by its parent finds nothing else."""
    supervisor = started(tmp_path, "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(60)")
    pid = until(tmp_path / "pid")
    assert Path(f"/proc/{supervisor.pid}/task/{supervisor.pid}/children").read_text().split() == [pid]
    supervisor.terminate()
    supervisor.communicate(timeout=20)


def test_a_guardian_ends_with_its_supervisor_and_no_child_that_has_ended_is_touched(tmp_path: Path) -> None:
    guardian = Guardian(0.0)
    ended, alive = (subprocess.Popen(["sleep", "60"], process_group=0) for _ in range(2))
    guardian.watch(ended.pid)
    guardian.watch(0)
    guardian.close()
    assert ended.poll() is None, "for all that the guardian knows its number may be another's by now"
    guardian = Guardian(0.0)
    guardian.watch(alive.pid)
    guardian.close()
    assert alive.wait(20) == -signal.SIGKILL
    ended.kill()
    ended.wait()


@pytest.mark.parametrize("stderr", ["2>&-", "2>&1 >&- | true"])
def test_a_supervisor_that_nobody_reads_goes_on_all_the_same(tmp_path: Path, stderr: str) -> None:
    (tmp_path / "job.py").write_text(
        "import os, sys\nn = len(os.listdir('starts'))\nopen(f'starts/{n}', 'w')\nsys.exit(78 if n == 2 else 70)\n"
    )
    (tmp_path / "starts").mkdir()
    command = f"{sys.executable} -m resumable_trainer run --restart --backoff 0.01 job.py {stderr}"
    subprocess.run(["bash", "-c", f"{command}; echo ${{PIPESTATUS[0]}} > code"], cwd=tmp_path, check=True, timeout=60)
    assert ((tmp_path / "code").read_text(), len(os.listdir(tmp_path / "starts"))) == ("78\n", 3)


def test_a_child_that_closes_its_streams_and_ends_is_no_failure(tmp_path: Path) -> None:
    supervisor = started(tmp_path, "import os\nos.close(1); os.close(2)\nos._exit(0)")
    assert supervisor.communicate(timeout=20)[1] == ""
    assert supervisor.returncode == 0


@pytest.mark.parametrize(
    ("more", "seen"),
    [
        ((), []),
        (("-x", "--lr=1", "a b"), ["-x", "--lr=1", "a b"]),
        (("--restart", "$HOME", "ü\n"), ["--restart", "$HOME", "ü\n"]),
    ],
)
def test_every_start_is_given_the_words_of_the_first(tmp_path: Path, more: tuple[str, ...], seen: list[str]) -> None:
    (tmp_path / "-odd name.py").write_text(
        "import json, os, sys\nprint(json.dumps(sys.argv[1:]))\n"
        "n = len(os.listdir('starts'))\nopen(f'starts/{n}', 'w')\nsys.exit(0 if n == 2 else 75)\n"
    )
    (tmp_path / "starts").mkdir()
    command = [sys.executable, "-m", "resumable_trainer", "run", "--restart", "--backoff", "0.01", "--run-dir=-r"]
    done = subprocess.run(
        [*command, "--", "-odd name.py", *more], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, f"{json.dumps(seen)}\n" * 3), done.stderr


@pytest.mark.parametrize(
    ("option", "code", "starts", "reason"),
    [
        ("--max-failures=1", 70, 2, "2 failures, 1 are allowed"),
        ("--max-preemptions=1", 75, 2, "2 preemptions, 1 are allowed"),
        ("--max-stuck=1", 70, 2, "2 failures in a row without durable progress, before a run was opened"),
    ],
)
def test_a_budget_that_is_used_up_ends_it_with_the_last_code_and_is_said(
    tmp_path: Path, option: str, code: int, starts: int, reason: str
) -> None:
    (tmp_path / "job.py").write_text(f"import sys\nprint('start')\nsys.exit({code})\n")
    command = [sys.executable, "-m", "resumable_trainer", "run", "--restart", "--backoff", "0.01", option, "job.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout.count("start")) == (code, starts)
    assert done.stderr.splitlines()[-1].startswith(f"resumable-trainer: gave up: {reason}")


def test_ctrl_c_twice_ends_a_script_that_opens_no_run(tmp_path: Path) -> None:
    """The first is noted for a boundary between batches, of which there is none."""
    (tmp_path / "job.py").write_text("import time\nopen('ready', 'w').write('1')\nwhile True: time.sleep(0.1)\n")
    command = [sys.executable, "-m", "resumable_trainer", "run", "--restart", "job.py"]
    supervisor = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    until(tmp_path / "ready")
    for _ in range(2):
        supervisor.send_signal(signal.SIGINT)
        time.sleep(0.3)  # two at once are one
    assert "second SIGINT, leaving at once" in supervisor.communicate(timeout=20)[1]
    assert supervisor.returncode == 130


def test_no_worker_outlives_the_child(tmp_path: Path) -> None:
    script = """
import os, signal, time
worker = os.fork()
if not worker: signal.signal(15, signal.SIG_IGN); time.sleep(60); os._exit(0)
open("worker", "w").write(str(worker))
"""
    supervisor = started(tmp_path, script)
    assert supervisor.communicate(timeout=20)[1] == ""
    assert not is_running(int(until(tmp_path / "worker")))


@pytest.mark.parametrize("hang", ["while True: pass", "l = threading.Lock(); l.acquire(); l.acquire()"])
def test_a_child_that_hangs_is_ended_with_its_stacks_within_the_learned_limit(tmp_path: Path, hang: str) -> None:
    script = (
        NOTIFY
        + f"""
def stuck():
    {hang}
notify("READY=1\\nWATCHDOG_USEC=300000\\nSTATUS=epoch 1")
if count == 0: stuck()
"""
    )
    supervisor = started(tmp_path, script, hang=100)
    _, said = supervisor.communicate(timeout=30)
    assert supervisor.returncode == 0
    assert "no sign of life for 0.3 s (epoch 1)" in said
    assert "in stuck" in said
    assert "restart 1" in said


def test_a_worker_that_keeps_talking_does_not_hide_that_the_training_hangs(tmp_path: Path) -> None:
    script = (
        NOTIFY
        + """
notify("READY=1\\nWATCHDOG_USEC=500000")
if count == 0:
    worker = os.fork()
    while True:
        if not worker: notify("WATCHDOG=1")
        time.sleep(0.05)
"""
    )
    supervisor = started(tmp_path, script, hang=100)
    _, said = supervisor.communicate(timeout=30)
    assert supervisor.returncode == 0
    assert "no sign of life for 0.5 s" in said


def test_a_child_that_ignores_sigabrt_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = NOTIFY + "faulthandler.disable()\nsignal.signal(6, signal.SIG_IGN)\nif count == 0: time.sleep(60)\n"
    (tmp_path / "child.py").write_text(script)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("resumable_trainer.service.supervisor._ABORT_GRACE_SECONDS", 0.2)
    lines: list[str] = []
    argv = [sys.executable, "child.py"]
    limits = Limits(first_wait_seconds=0.01)
    assert Supervisor(Training(argv, argv, list), limits=limits, hang_timeout=0.5, say=lines.append).run() == 0
    assert len(lines) == 2


def test_it_leaves_the_handlers_as_they_were() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGCHLD, signal.SIGHUP)]
    supervise("-c", "pass")
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGCHLD, signal.SIGHUP)] == before
    assert os.getpid()

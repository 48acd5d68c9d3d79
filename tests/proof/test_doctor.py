"""`doctor` on jobs that are exact, and on jobs with a deliberate leak: what it says of each."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from leaks import LEAKS
from marks import by_default

pytestmark = pytest.mark.timeout(600)
EXAMPLES = Path(__file__).parents[2] / "examples"
# Each examination is ten starts or more. One leak of each kind is looked for by default; all of them with --long.
USUAL = {
    "an unseeded generator",
    "a seeded generator that is no part",
    "data shuffled before the run",
    "the clock in a sample",
    "a kernel that has a deterministic form",
}


def doctor(directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "resumable_trainer", "doctor", *words]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)


def examine(directory: Path, script: str, *options: str) -> tuple[int, dict[str, Any], str]:
    (directory / "job.py").write_text(script)
    done = doctor(directory, "--json", *options, "job.py")
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr


def test_every_kind_of_leak_is_looked_for_by_default() -> None:
    assert sorted(LEAKS[name].kind for name in USUAL) == sorted({leak.kind for leak in LEAKS.values()} - {None})


@pytest.mark.parametrize("name", by_default(USUAL, [name for name, leak in LEAKS.items() if leak.kind is not None]))
def test_a_planted_leak_is_found_and_its_cause_named(name: str, tmp_path: Path) -> None:
    leak = LEAKS[name]
    code, found, errors = examine(tmp_path, leak.script)
    assert code == 1, errors
    assert found["exact"] is False
    assert [cause["kind"] for cause in found["causes"]] == [leak.kind], found["causes"]
    assert leak.named in json.dumps(found["causes"])
    assert not list(tmp_path.glob("runs*"))


@pytest.mark.parametrize("name", [name for name, leak in LEAKS.items() if leak.kind is None])
def test_an_exact_job_is_called_exact(name: str, tmp_path: Path) -> None:
    code, found, errors = examine(tmp_path, LEAKS[name].script)
    assert code == 0, (errors, found)
    assert found["exact"] is True
    assert found["causes"] == []
    assert len(found["kills"]) == 7
    assert found["fresh_starts_differ"] is (name == "parameters begin at random")


@pytest.mark.parametrize("example", by_default(["own_loop.py"], ["own_loop.py", "ready_made.py"]))
def test_the_examples_are_exact_and_what_they_cost_is_said(example: str, tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the examples' data come with scikit-learn")
    done = doctor(tmp_path, str(EXAMPLES / example))
    assert done.returncode == 0, done.stdout + done.stderr
    words = [line.split()[0] for line in done.stdout.splitlines()]
    assert words[:5] == ["exact", "cost", "room", "disk", "notice"] or "warning" in words


def test_a_run_that_is_there_already_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(LEAKS["none"].script)
    subprocess.run([sys.executable, "job.py"], cwd=tmp_path, check=True, capture_output=True)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert doctor(tmp_path, "--epochs", "2", "--batches", "2", "job.py").returncode == 0
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("script", "code", "words"),
    [
        ("print('no run')", 2, "opens no run"),
        ("raise ValueError('broken by itself')", 70, "broken by itself"),
        ("import sys; sys.exit(3)", 70, "exit code 3"),
        ("from resumable_trainer import Run\nwith Run('r', state={}) as run: pass", 2, "trains nothing"),
    ],
)
def test_what_cannot_be_examined_is_said_in_a_line(script: str, code: int, words: str, tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(script)
    done = doctor(tmp_path, "job.py")
    assert (done.returncode, words in done.stderr) == (code, True), done.stderr
    assert "Traceback" not in done.stderr.partition("\n")[0]


def test_a_script_that_is_not_there_is_no_traceback(tmp_path: Path) -> None:
    done = doctor(tmp_path, "missing.py")
    assert done.returncode == 66
    assert "is not there" in done.stderr


def test_a_start_that_never_ends_is_given_up(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text("import time\nwhile True: time.sleep(0.1)")
    done = doctor(tmp_path, "--timeout", "8", "job.py")
    assert done.returncode == 70
    assert "did not end within 8 s" in done.stderr


def test_a_job_that_cannot_be_started_twice_is_found_out(tmp_path: Path) -> None:
    script = LEAKS["none"].script.replace("state = {", "Path('once').mkdir()\nstate = {", 1)
    (tmp_path / "job.py").write_text(script)
    done = doctor(tmp_path, "job.py")
    assert done.returncode == 70
    assert "started again, fails" in done.stderr
    assert "FileExistsError" in done.stderr
    shutil.rmtree(tmp_path / "once")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_examination_that_is_broken_off_leaves_no_file_and_no_process(
    number: signal.Signals, tmp_path: Path
) -> None:
    child = "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    script = child + LEAKS["none"].script.replace("run.log(loss=loss)", "run.log(loss=loss); time.sleep(0.5)")
    (tmp_path / "job.py").write_text(script)
    command = [sys.executable, "-m", "resumable_trainer", "doctor", "job.py"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        while not list(tmp_path.glob("runs/.tmp-doctor-*/frozen")):
            assert process.poll() is None
            time.sleep(0.05)
        assert processes_in(tmp_path)
        os.killpg(process.pid, number)
        assert process.wait(60) == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert [path.name for path in tmp_path.iterdir()] == ["job.py"]
    deadline = time.monotonic() + 30
    while processes_in(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_in(tmp_path) == []


def processes_in(directory: Path) -> list[str]:
    """Processes with that working directory."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (entry / "cwd").readlink() == directory:
                found.append(entry.name)
    return found

"""Real trainings under `run --restart` and `--on-event`."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import endings
import pytest

from resumable_trainer.durable.lock import RunLock, read_owner
from resumable_trainer.loop import launch, started
from resumable_trainer.metrics.account import Account
from resumable_trainer.metrics.goodput import seconds_of

if TYPE_CHECKING:
    from pathlib import Path

SCRIPT = """
import os, signal, time, torch
from resumable_trainer import Run, SnapshotPolicy
torch.set_num_threads(1)
torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
def first(name):
    if os.environ.get("HURT") != name or os.path.exists(name): return False
    open(name, "w").write("1")
    return True
with Run("run", state={"model": model, "optimizer": optimizer}, progress=False,
         snapshots=SnapshotPolicy(every_steps=3, background=False)) as run:
    for epoch in run.epochs(2):
        for x in run.batches(range(10)):
            loss = model(torch.randn(8, 4)).square().mean()
            optimizer.zero_grad(); loss.backward(); optimizer.step()
            run.log(loss=loss)
            if run.step == 8 and first("kill"): os.kill(os.getpid(), signal.SIGKILL)
            if run.step == 8 and first("raise"): raise RuntimeError("boom")
            if run.step == 8 and os.environ.get("HURT") == "always": raise RuntimeError("boom")
            if run.step == 8 and first("wait"):
                while True:
                    time.sleep(0.01)
                    from resumable_trainer.loop.notices import notices
                    if notices.pending: break
            if os.environ.get("HURT") == "slow": time.sleep(0.2)
            if run.step == 14 and first("hang"):
                def stuck():
                    while True: pass
                stuck()
        if os.environ.get("HURT") == "slow": time.sleep(1.5)
        run.log_epoch(weight=model.weight.sum())
"""
HOOK = "import sys; open('told', 'a').write(sys.stdin.read())"


def command(*options: str) -> list[str]:
    return [sys.executable, "-m", "resumable_trainer", "run", *options, "train.py"]


def start(place: Path, *options: str, hurt: str = "") -> subprocess.Popen[str]:
    place.mkdir(exist_ok=True)
    (place / "train.py").write_text(SCRIPT)
    environment = {**os.environ, "HURT": hurt}
    return subprocess.Popen(command(*options), cwd=place, env=environment, stderr=subprocess.PIPE, text=True)


def finished(training: subprocess.Popen[str]) -> bool:
    training.communicate(timeout=60)
    return training.returncode == 0


def events(place: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place / "run" / "events.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    place = tmp_path_factory.mktemp("whole")
    assert finished(start(place))
    return endings.ending(place / "run")


def test_a_killed_training_is_continued_and_ends_as_if_nothing_had_happened(
    tmp_path: Path, whole: dict[str, bytes]
) -> None:
    training = start(
        tmp_path, "--restart", "--backoff", "0.01", "--on-event", f'{sys.executable} -c "{HOOK}"', hurt="kill"
    )
    _, said = training.communicate(timeout=60)
    assert training.returncode == 0
    assert "restart 1 in 0.01 s: it died of SIGKILL; safe on disk: step 6" in said
    assert endings.differing(whole, endings.ending(tmp_path / "run")) == []
    ended = [event for event in events(tmp_path) if event["event"] == "ended"]
    assert [(e["by"], e["result"], e.get("signal"), e.get("code"), e["generation"]) for e in ended] == [
        ("supervisor", "signal", "SIGKILL", None, 1),
        ("supervisor", "exit", None, 0, 2),
    ]
    told = [json.loads(line) for line in (tmp_path / "told").read_text().splitlines()]
    # The first "started" may have been on its way when the training was killed.
    assert [one["event"] for one in told if one["event"] != "started"] == ["failing", "finished"]
    assert all(one["run_dir"] == str(tmp_path / "run") for one in told)


def test_a_training_that_hangs_is_found_by_what_it_has_learned_shown_and_continued(
    tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESUMABLE_TRAINER_MIN_WATCHDOG_SECONDS", "2")
    training = start(tmp_path, "--restart", "--backoff", "0.01", "--hang-timeout", "1000", hurt="hang")
    _, said = training.communicate(timeout=100)
    assert training.returncode == 0, said
    limit = float(re.findall(r"no sign of life for (\S+) s \(", said)[0])
    assert 2 <= limit < 100, "learned in the first epoch, not the one it was given"
    assert "in stuck" in said, "where it hung"
    assert endings.differing(whole, endings.ending(tmp_path / "run")) == []
    ended = next(event for event in events(tmp_path) if event["event"] == "ended")
    assert (ended["result"], ended["signal"]) == ("hang", "SIGABRT")


def test_a_slow_training_that_is_well_is_left_alone(
    tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it is silent for longer than the least limit, in each batch and in what follows an epoch."""
    monkeypatch.setenv("RESUMABLE_TRAINER_MIN_WATCHDOG_SECONDS", "0.1")
    training = start(tmp_path, "--restart", "--hang-timeout", "60", hurt="slow")
    assert training.communicate(timeout=100)[1] == ""
    assert training.returncode == 0
    assert endings.differing(whole, endings.ending(tmp_path / "run")) == []
    assert [event["event"] for event in events(tmp_path)].count("paced") >= 1


def test_a_finished_run_is_a_quick_nothing(tmp_path: Path) -> None:
    assert finished(start(tmp_path, "--restart"))
    again = start(tmp_path, "--restart")
    assert again.communicate(timeout=60)[1] == ""
    assert again.returncode == 0
    assert sum(event["event"] == "launched" for event in events(tmp_path)) == 1


def test_it_gives_up_on_the_same_error_at_the_same_step(tmp_path: Path) -> None:
    training = start(tmp_path, "--restart", "--backoff", "0.01", "--max-stuck", "1", hurt="always")
    _, said = training.communicate(timeout=60)
    assert training.returncode == 70
    assert "gave up: 2 failures in a row without durable progress, at step 6; each time the same" in said
    assert "RuntimeError: boom" in said
    assert [event["code"] for event in events(tmp_path) if event["event"] == "ended"] == [70, 70]


def test_a_runs_time_begins_with_its_supervisor_and_ends_with_its_last_process(tmp_path: Path) -> None:
    before = time.time()
    training = start(tmp_path, "--restart", "--backoff", "0.01", hurt="kill")
    supervisor = started.process_started(training.pid)
    training.communicate(timeout=60)
    after = time.time()
    begun = [event["started"] for event in events(tmp_path) if event["event"] == "launched"]
    assert len(begun) == 2
    first, second = (seconds_of(text) or 0.0 for text in begun)
    assert first == pytest.approx(seconds_of(supervisor), abs=0.05)
    assert second > first + 0.1, "of its own process"
    assert before - 0.05 < first
    *_, exited, ended = events(tmp_path)
    assert (exited["event"], ended["event"], ended["code"]) == ("exited", "ended", 0)
    goodput = Account.read(tmp_path / "run/events.jsonl").goodput()
    assert goodput.wall_seconds <= after - before + 0.05
    assert goodput.wall_seconds == pytest.approx((seconds_of(ended["time"]) or 0.0) - first, abs=1.0)


def test_the_end_of_what_has_said_so_itself_is_noted_only_by_who_knows_the_process(tmp_path: Path) -> None:
    """A unit that is started once more, when all is done, must not note an end that was long ago as one of now."""
    assert finished(start(tmp_path))
    launch.note_ended(tmp_path / "run", by="systemd", result="exit", code=0)
    assert events(tmp_path)[-1]["event"] == "exited"
    for _ in range(2):
        launch.note_ended(tmp_path / "run", unless=("ended",), by="supervisor", result="exit", code=0)
    assert [event["event"] for event in events(tmp_path)][-2:] == ["exited", "ended"]
    assert finished(start(tmp_path)), "nothing to do"
    assert events(tmp_path)[-1]["event"] == "ended"


def test_a_fresh_start_is_fresh_once(tmp_path: Path, whole: dict[str, bytes]) -> None:
    assert finished(start(tmp_path))
    training = start(tmp_path, "--restart", "--fresh", "--backoff", "0.01", hurt="raise")
    _, said = training.communicate(timeout=60)
    assert training.returncode == 0
    assert "it failed with exit code 70 (RuntimeError: boom)" in said
    assert sum(event["event"] == "set_aside" for event in events(tmp_path)) == 1
    assert sum(event["event"] == "resumed" for event in events(tmp_path)) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_supervisor_that_goes_leaves_no_training_and_nothing_is_lost(
    tmp_path: Path, whole: dict[str, bytes], number: signal.Signals
) -> None:
    training = start(tmp_path, "--restart", hurt="wait")
    deadline = time.monotonic() + 60
    while not (tmp_path / "wait").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    training.send_signal(number)
    training.communicate(timeout=60)
    assert training.returncode == (75 if number == signal.SIGTERM else -9)
    while not any(event["event"] == "exited" for event in events(tmp_path)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    preempted = next(event for event in events(tmp_path) if event["event"] == "preempted")
    assert preempted["snapshot"] == "step-000000009"
    assert finished(start(tmp_path, "--restart"))
    assert endings.differing(whole, endings.ending(tmp_path / "run")) == []


def test_the_end_is_noted_only_where_nobody_holds_the_run(tmp_path: Path) -> None:
    launch.note_ended(tmp_path, by="supervisor", result="signal")
    assert not list(tmp_path.iterdir())
    lock = RunLock(tmp_path / "run.lock")
    lock.acquire()
    launch.note_ended(tmp_path, by="supervisor", result="signal")
    assert not (tmp_path / "events.jsonl").exists()
    lock.release()
    launch.note_ended(tmp_path, by="supervisor", result="signal")
    (event,) = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    owner = read_owner(tmp_path / "run.lock")
    assert owner is not None
    assert (event["event"], event["by"], event["generation"]) == ("ended", "supervisor", owner.generation)

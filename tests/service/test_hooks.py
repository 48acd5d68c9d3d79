"""Hooks for people: told in order, and of no harm whatever they do."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from resumable_trainer.errors import UsageError
from resumable_trainer.service.hooks import Hooks, word_for

APPEND = "import sys; open(sys.argv[1], 'a').write(sys.stdin.read()); print('noise', flush=True)"


def appending(path: Path) -> str:
    return f'{sys.executable} -c "{APPEND}" {path}'


def test_events_are_told_in_order_with_json_on_standard_input(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hooks = Hooks(appending(tmp_path / "told"))
    for event in (
        {"event": "training", "step": 0, "epoch": 0, "time": "t"},
        {"event": "committed", "step": 1},
        {"event": "preempted", "signal": "SIGTERM", "step": 2, "epoch": 1},
        {"event": "finished", "outcome": "stopped_early", "step": 3},
    ):
        hooks.noted(tmp_path, event)
    hooks.close()
    told = [json.loads(line) for line in (tmp_path / "told").read_text().splitlines()]
    assert [one["event"] for one in told] == ["started", "preempted", "stopped_early"]
    assert told[0] == {"event": "started", "run_dir": str(tmp_path), "time": "t", "step": 0, "epoch": 0}
    assert told[1]["signal"] == "SIGTERM"
    assert capfd.readouterr() == ("", "")


def test_every_event_for_people_has_its_word() -> None:
    kinds = ["training", "preempted", "failed", "not_saved", "quarantined", "diverged", "finished", "committed"]
    words = [word_for({"event": kind, "outcome": "finished"}) for kind in kinds]
    assert words == ["started", "preempted", "failing", "failing", "quarantined", "diverged", "finished", None]


@pytest.mark.parametrize(
    ("command", "reason"),
    [("/no/such/command", "No such file"), ("false", "ended with 1"), ("sleep 100", "longer than 0.2 s")],
)
def test_a_hook_that_fails_is_said_once(command: str, reason: str, capfd: pytest.CaptureFixture[str]) -> None:
    hooks = Hooks(command, limit_seconds=0.2)
    for _ in range(3):
        hooks.tell("started", None, {})
    hooks.close()
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert reason in said


def test_a_hook_that_hangs_is_waited_for_a_moment_and_killed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    hooks = Hooks(f"sh -c 'echo $$ > {tmp_path}/pid; sleep 100'", at_exit_seconds=0.5)
    hooks.tell("started", None, {})
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
        time.sleep(0.01)
    hooks.close()
    assert "not done when the process ended" in capfd.readouterr().err
    pid = int((tmp_path / "pid").read_text())
    while Path(f"/proc/{pid}").exists():  # until the thread has reaped it
        time.sleep(0.01)


def test_a_flood_of_events_is_cut_off(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    hooks = Hooks("sleep 100", at_exit_seconds=0.0)
    for _ in range(1000):
        hooks.tell("started", None, {})
    hooks.close()
    assert "further ones are dropped" in capfd.readouterr().err


def test_what_a_hook_prints_without_end_fills_nothing(tmp_path: Path) -> None:
    hooks = Hooks("yes", limit_seconds=0.2)
    hooks.tell("started", None, {})
    hooks.close()


def test_a_forked_child_tells_nothing(tmp_path: Path) -> None:
    hooks = Hooks(appending(tmp_path / "told"))
    child = os.fork()
    if not child:
        hooks.tell("started", None, {})
        hooks.close()
        os._exit(0)
    os.waitpid(child, 0)
    hooks.close()
    assert not (tmp_path / "told").exists()


@pytest.mark.parametrize("command", ["", "'open"])
def test_a_command_that_cannot_be_split_is_refused(command: str) -> None:
    with pytest.raises(UsageError):
        Hooks(command)

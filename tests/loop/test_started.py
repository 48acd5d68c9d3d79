"""When a launch began: with its process, with its supervisor, or when it was opened."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from small import Small

from resumable_trainer.loop import launch
from resumable_trainer.loop.started import SUPERVISOR_VARIABLE, launch_started, process_started
from resumable_trainer.metrics.goodput import seconds_of


def seconds(text: str | None) -> float:
    found = seconds_of(text)
    assert found is not None
    return found


def test_when_the_process_was_started_is_told_where_the_system_tells_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert process_started(os.getpid()) is not None
    assert process_started(2**31 - 1) is None
    monkeypatch.setattr(Path, "read_text", lambda self: "")
    assert process_started(os.getpid()) is None


@pytest.mark.parametrize("told", ["parent", "somebody", "", "-1", "x"])
def test_a_supervisors_child_began_with_it_and_whoever_inherits_the_word_with_himself(
    monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
    number = {"parent": os.getppid(), "somebody": os.getpid()}.get(told, told)
    monkeypatch.setenv(SUPERVISOR_VARIABLE, str(number))
    began = process_started(os.getppid() if told == "parent" else os.getpid())
    assert seconds(launch_started()) == pytest.approx(seconds(began), abs=0.05)


def test_the_second_run_of_a_process_begins_when_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.process, "opened", {})
    for name, is_told in {"one": True, "other": False}.items():
        Small().train(tmp_path / name, epochs=1)
        first = json.loads((tmp_path / name / "events.jsonl").read_text().splitlines()[0])
        assert first["event"] == "launched"
        assert (first["started"] is not None) is is_told

"""All runs below a directory."""

from __future__ import annotations

import gc
import json
from typing import TYPE_CHECKING

import pytest
from small import Small

from resumable_trainer.cli.main import main
from resumable_trainer.report import overview as overview_module
from resumable_trainer.report.overview import overview

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any


def test_runs_are_found_at_any_depth_with_state_progress_and_goodput(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Small().train(tmp_path / "a" / "deep" / "er", epochs=2)
    Small().train(tmp_path / ("long-" * 20 + "\n\x1b[2Jname"), epochs=1)
    (tmp_path / "bad" / "snapshots").mkdir(parents=True)
    (tmp_path / "bad" / "events.jsonl").write_text("rubbish\nrubbish\n")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert main(["runs", str(tmp_path), "--json"]) == 0
    deep, bad, long = json.loads(capsys.readouterr().out)
    assert (deep["state"], deep["step"], deep["epoch"], deep["holder"]) == ("finished", 8, 2, None)
    assert deep["goodput"]["launches"] == long["goodput"]["launches"] == 1
    assert (bad["state"], bad["goodput"]) == ("unreadable", None)
    assert main(["runs", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert len(shown.splitlines()) == 4
    assert "\x1b" not in shown
    assert overview(tmp_path / "a" / "deep" / "er")[0].state == "finished"


def test_a_directory_without_runs_is_said_and_one_that_is_not_there_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["runs", str(tmp_path)]) == 0
    assert "there is no run" in capsys.readouterr().out
    assert main(["runs", str(tmp_path / "missing")]) == 66


@pytest.mark.parametrize("is_on", [True, False])
def test_the_garbage_collector_rests_and_is_then_as_before(
    is_on: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Small().train(tmp_path / "run", epochs=1)
    within: list[bool] = []
    original = overview_module._line

    def noted(directory: Path) -> Any:
        within.append(gc.isenabled())
        return original(directory)

    monkeypatch.setattr(overview_module, "_line", noted)
    (gc.enable if is_on else gc.disable)()
    try:
        assert len(overview(tmp_path)) == 1
        assert gc.isenabled() is is_on
    finally:
        gc.enable()
    assert within == [False]

"""Runs as metrics for node_exporter."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from small import Small

from resumable_trainer.cli.main import main

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_the_text_file_has_progress_state_and_times_of_every_run(tmp_path: Path) -> None:
    Small().train(tmp_path / 'a "quoted"\nname', epochs=2)
    Small().train(tmp_path / "b", epochs=1)
    file = tmp_path / "runs.prom"
    assert main(["runs", str(tmp_path), "--prometheus", str(file)]) == 0
    from prometheus_client.parser import text_string_to_metric_families

    families = {family.name: family.samples for family in text_string_to_metric_families(file.read_text())}
    steps = {sample.labels["run"]: sample.value for sample in families["resumable_trainer_step"]}
    assert steps == {str(tmp_path / 'a "quoted"\nname'): 8, str(tmp_path / "b"): 4}
    states = [sample.labels["state"] for sample in families["resumable_trainer_state"] if sample.value]
    assert states == ["finished", "finished"]
    assert {sample.labels["kind"] for sample in families["resumable_trainer_seconds"]} >= {"training", "down"}
    assert [path.name for path in tmp_path.glob("*.prom*")] == ["runs.prom"]


def test_a_missing_package_and_a_name_that_is_not_read_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["runs", str(tmp_path), "--prometheus", str(tmp_path / "runs.txt")]) == 2
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    assert main(["runs", str(tmp_path), "--prometheus", str(tmp_path / "runs.prom")]) == 2
    assert "resumable-trainer[metrics]" in capsys.readouterr().err

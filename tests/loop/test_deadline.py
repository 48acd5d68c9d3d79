"""How long before the end a run is left."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resumable_trainer.durable.journal import encode_row
from resumable_trainer.loop import opening
from resumable_trainer.loop.deadline import UNKNOWN_SECONDS, longer_than, percentile_95, seconds_needed

if TYPE_CHECKING:
    from pathlib import Path

seconds = st.floats(0, 1e5)
JOB = """
import torch
from resumable_trainer import Run

model = torch.nn.Linear(2, 1)
with Run("run", state={"model": model}) as run:
    for _ in run.epochs(2):
        for (inputs,) in run.batches((torch.ones(400, 2),), batch_size=1):
            model(inputs)
"""


@given(st.lists(seconds), seconds)
def test_what_is_needed_is_finite_and_covers_a_snapshot_and_a_batch(costs: list[float], silence: float) -> None:
    needed = seconds_needed(costs, silence)
    assert math.isfinite(needed)
    assert needed >= silence + (percentile_95(costs) if costs else UNKNOWN_SECONDS)


@given(st.lists(seconds, min_size=1), st.lists(seconds), seconds)
def test_slower_snapshots_never_need_less(costs: list[float], more: list[float], silence: float) -> None:
    slower = [*costs, *(max(costs) + extra for extra in more)]
    assert seconds_needed(slower, silence) >= seconds_needed(costs, silence)


def test_one_slow_snapshot_of_twenty_is_left_out_and_two_are_not() -> None:
    assert percentile_95([1.0] * 19 + [9.0]) == 1.0
    assert percentile_95([1.0] * 18 + [9.0] * 2) == 9.0


def test_a_snapshot_that_usually_takes_longer_than_is_left_is_told() -> None:
    assert longer_than(8.0, [1.0] * 18 + [9.0] * 2) == 9.0
    assert longer_than(8.0, [1.0] * 19 + [9.0]) is None, "one slow snapshot of twenty is not what they usually take"
    assert longer_than(1.0, [1.0]) is None
    assert longer_than(-1.0, []) is None, "none has been saved yet"
    assert longer_than(None, [1.0]) is None, "no end is known"


@pytest.mark.parametrize("seconds", [86400, -3600])
def test_a_job_whose_end_is_a_day_away_or_past_already_trains(tmp_path: Path, seconds: int) -> None:
    """Nothing is known of its snapshots yet: that is no reason to leave. Nor is an end that has not come to pass."""
    (tmp_path / "job.py").write_text(JOB)
    environment = {**os.environ, "RESUMABLE_TRAINER_NOTICES": "slurm"}
    environment["SLURM_JOB_END_TIME"] = end = str(int(time.time()) + seconds)
    done = subprocess.run(
        [sys.executable, "job.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "finished: 2 epochs" in done.stderr
    line = f"warning Slurm's end time (SLURM_JOB_END_TIME={end}) is past already: it is not followed\n"
    assert done.stderr.count(line) == (seconds < 0)
    costs = opening.snapshot_costs(tmp_path / "run")
    assert len(costs) == 2
    assert all(cost > 0 for cost in costs)


def test_the_newest_snapshots_alone_tell_of_costs(tmp_path: Path) -> None:
    """Of all launches, and in the order in which they were taken; what lies behind them is not looked at."""
    rows = [{"event": "committed", "seconds": float(number), "stall_seconds": 0.5} for number in range(60)]
    lines = [b"no json, though committed: " + b'"event":"committed"\n']
    for number, row in enumerate(rows):
        lines += [encode_row(row), encode_row({"event": "launched" if number % 7 == 0 else "training"})]
    (tmp_path / "events.jsonl").write_bytes(b"".join(lines))
    assert opening.snapshot_costs(tmp_path) == [number + 0.5 for number in range(10, 60)]
    (tmp_path / "events.jsonl").write_bytes(b"".join(lines[:3]))
    assert opening.snapshot_costs(tmp_path) == [0.5]


def test_events_that_cannot_be_read_tell_of_no_costs(tmp_path: Path) -> None:
    assert opening.snapshot_costs(tmp_path) == []
    (tmp_path / "events.jsonl").write_text('{"event":"committed","seconds":"x","stall_seconds":null}\nno json\n')
    assert opening.snapshot_costs(tmp_path) == []

"""The same snapshot, and the same resume, early and late in a long run: 10^6 rows of history, 1,000 snapshots kept."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import jobs
from benchmarks.table import Goal, Row, Side
from benchmarks.timing import Bench, Worker, alternately, in_lockstep, started, timed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from benchmarks.worker import Laps
    from resumable_trainer import Run

_ROWS_PER_EPOCH = 1000
_MEASURED_ROWS = 10
_NEVER_DELETE = 10**6


def growths(bench: Bench) -> Iterator[Row]:
    """An old run against a young one; both keep all their snapshots, and write the same."""
    epochs = bench.pick(1000, 100)
    directories = {"young": bench.directory("young"), "old": bench.directory("old")}
    workers = {
        name: Worker(
            "growth:arm",
            settings={"directory": directory, "epochs": epochs if name == "old" else 0, "turn": 5},
            threads=1,
            log=Path(directory).with_suffix(".log"),
        )
        for name, directory in directories.items()
    }
    with started(workers):
        m, failed = in_lockstep(workers, rounds=bench.pick(25, 5))
    age = f"after {epochs * _ROWS_PER_EPOCH:,} rows, {epochs:,} snapshots kept"
    what = f"a snapshot in the foreground, and {_MEASURED_ROWS} rows, {age}"
    if failed:
        yield Row("growth", what, goal=Goal(1.1), skipped=next(iter(failed.values())))
        return
    note = "" if epochs == 1000 else "the goal is for 1,000,000 rows and 1,000 snapshots: that is the full form"
    old, young = (Side(name, m[name], durability="synced and verified") for name in ("old", "young"))
    yield Row("growth", what, old, young, goal=Goal(1.1), note=note)

    opened = bench.in_child("growth:measure_opening", threads=1, rounds=bench.pick(7, 3), **directories)
    old, young = (Side(name, opened[name], durability="verified") for name in ("old", "young"))
    yield Row("growth", f"opening the run again, restore included, {age}", old, young)


def arm(laps: Laps, *, directory: str, epochs: int, turn: int) -> None:
    """For a worker: let the run grow old, then a snapshot after every few rows."""
    laps.plan(epochs=turn, warmup=2)
    with _run(directory) as run:
        for epoch in run.epochs(jobs.FOREVER):
            if epoch >= epochs:
                laps()
            rows = _ROWS_PER_EPOCH if epoch < epochs else _MEASURED_ROWS
            for number in run.batches(list(range(rows))):
                run.log(loss=number / rows, accuracy=0.5)


def measure_opening(laps: Laps, *, young: str, old: str, rounds: int, directory: str) -> None:
    """For a child: entering both runs alternately."""

    def opening(name: str, path: str) -> Mapping[str, float]:
        run = _run(path)
        taken = timed(run.__enter__)
        run.__exit__(None, None, None)
        return {name: taken}

    laps.turn(alternately([lambda: opening("young", young), lambda: opening("old", old)], rounds=rounds))


def _run(directory: str) -> Run:
    from resumable_trainer import Run, SnapshotPolicy

    model = jobs.CLASSIC.model()
    parts: dict[str, Any] = {"model": model, "optimizer": jobs.adam(model)}
    policy = SnapshotPolicy(background=False, keep_last=_NEVER_DELETE)
    return Run(directory, state=parts, snapshots=policy, progress=False)

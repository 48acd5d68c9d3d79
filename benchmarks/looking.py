"""Looking at thousands of runs, few of them with a long history: `runs`, as JSON and for Prometheus, and `status`."""

from __future__ import annotations

import datetime
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.machine import starting
from benchmarks.table import Goal, Row, Side
from benchmarks.timing import Bench, alternately

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.worker import Laps

_LAUNCHES = 5
_ONE_LONG_OF = 30
_ONE_MEDIUM_OF, _EPOCHS = 3, 200


def lookers(bench: Bench) -> Iterator[Row]:
    """Against an interpreter that does nothing; and a run with a long history against one with a short one."""
    num_runs, snapshots = bench.pick(3000, 300), bench.pick(10_000, 500)
    root = Path(bench.directory("looking"))
    bench.in_child("looking:make", threads=1, root=str(root), num_runs=num_runs, snapshots=snapshots)
    command = ["-m", "resumable_trainer"]
    runs = [*command, "runs", str(root)]
    arms = {
        "runs": runs,
        "runs --json": [*runs, "--json"],
        "runs --prometheus": [*runs, "--prometheus", str(root / "runs.prom")],
        "status of a long one": [*command, "status", str(root / "run-00000")],
        "status of a short one": [*command, "status", str(root / "run-00001")],
        "pass": ["-c", "pass"],
    }
    m = alternately([_arm(name, arguments) for name, arguments in arms.items()], rounds=bench.pick(5, 3))
    history = (
        f"{num_runs:,} runs, one of {_ONE_LONG_OF} after {snapshots:,} snapshots, of {_ONE_MEDIUM_OF} after {_EPOCHS}"
    )
    note = "" if num_runs == 3000 else "the goals are for 3,000 runs: that is the full form"
    nothing = Side("python -c pass", m["pass"])
    for name, limit in (("runs", 3.0), ("runs --json", 3.0), ("runs --prometheus", 4.0)):
        yield Row("looking", f"{name}: {history}", Side("own", m[name]), nothing, "difference", Goal(limit), note=note)
    long, short = (Side(name, m[f"status of a {name} one"]) for name in ("long", "short"))
    yield Row("looking", f"status of a run after {snapshots:,} snapshots", long, short, goal=Goal(1.2))


def _arm(name: str, arguments: list[str]) -> Any:
    return lambda: {name: starting(arguments)}


def make(laps: Laps, *, root: str, num_runs: int, snapshots: int, directory: str) -> None:
    """For a child: three runs that were trained, and links to their files for all others, which are read as often."""
    from resumable_trainer import Run

    short, medium, long = (Path(directory) / name for name in ("short", "medium", "long"))
    for path, epochs in ((short, 3), (medium, _EPOCHS), (long, 3)):
        with Run(path, state={"model": torch.nn.Linear(2, 1)}, progress=False) as run:
            for epoch in run.epochs(epochs):
                run.log_epoch(loss=float(epoch))
    for launch in range(_LAUNCHES):
        _grow_old(long, range(launch * snapshots // _LAUNCHES, (launch + 1) * snapshots // _LAUNCHES))
    for number in range(num_runs):
        model = long if not number % _ONE_LONG_OF else medium if not number % _ONE_MEDIUM_OF else short
        shutil.copytree(model, Path(root) / f"run-{number:05d}", copy_function=os.link)
    laps.turn({})


def _grow_old(directory: Path, steps: range) -> None:
    """One launch more, killed after it has noted so many snapshots: writing them is not what is measured."""
    from resumable_trainer.loop import launch, opening
    from resumable_trainer.manager import StateManager
    from resumable_trainer.snapshot.retention import Retention

    with StateManager(directory, state={"model": torch.nn.Linear(2, 1)}) as manager:
        opening.note_launch(manager, launch.Command.current(), Retention())
        manager.note("training", step=steps.start, epoch=0, batch=steps.start)
        for step in steps:
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
            manager.note(
                "committed",
                snapshot=f"step-{step:09d}",
                step=step,
                bytes=1000,
                seconds=0.01,
                taken=now,
                stall_seconds=0.001,
            )

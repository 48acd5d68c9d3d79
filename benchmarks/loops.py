"""Time per epoch: the classic job, 60k x 64 floats, steps of 5 ms. Each arm trains in its own processes, in lockstep.

Ours has all features on and pays for the snapshot of every epoch; what it is held against saves nothing.
"""

from __future__ import annotations

import time
from itertools import chain, pairwise
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from benchmarks import jobs, peers
from benchmarks.table import Goal, Row, Side
from benchmarks.timing import Bench, Worker, in_lockstep, started

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.table import Comparison
    from benchmarks.timing import Measured
    from benchmarks.worker import Laps

_THREADS = 1
_BARE = "hand-written, no features"
_LEAST = "hand-written, nothing around torch's kernels"
_CLASSIC = "classic job, time per epoch"
_PEER_GOALS = {"DataLoader": 1.2, "Ignite": 1.3, "Accelerate": 1.6, "HF Trainer": 2.2, "Lightning": 4.0}
_OURS = {"compiled": "Trainer(compile=True)"}
_STEP_SECONDS = 0.005
_PROCESSES = 3  # of each arm, one after the other
_EPOCHS_A_SNAPSHOT = 6
_CLASSIC_EPOCHS = 20  # of a turn, which then takes half a second: a training that has just been woken is on any core


def classic(bench: Bench) -> Iterator[Row]:
    """The classic job against the bare loop, with a DataLoader, and in peers' loops; and what its snapshots take."""
    missing = {name: reason for name in peers.PEERS if (reason := peers.why_not(name))}
    kinds = ["hand-written", "own loop", "Trainer", "DataLoader", "unwrapped"]
    kinds += ["compiled"] if jobs.can_compile() else []
    here = [*kinds, *(name for name in peers.PEERS if name not in missing)]
    measured, failed = _epochs(bench, "classic", here, epochs=_CLASSIC_EPOCHS, rounds=bench.pick(21, 5))
    failed |= missing
    if not jobs.can_compile():
        failed["compiled"] = "not built yet: Trainer has no compile="

    yield _row("classic", f"own loop: {_CLASSIC}", measured, failed, "own loop", "hand-written", Goal(1.05))
    yield _row("classic", f"Trainer: {_CLASSIC}", measured, failed, "Trainer", "hand-written", Goal(1.05))
    yield _row("classic", f"Trainer(compile=True): {_CLASSIC}", measured, failed, "compiled", "hand-written", Goal(0.4))
    for ours in ("own loop", "Trainer", "compiled"):
        for name, limit in _PEER_GOALS.items():
            what = f"{_OURS.get(ours, ours)}: {_CLASSIC}"
            yield _row("classic", what, measured, failed, ours, name, Goal(limit, at_least=True))
    yield _snapshots_part(bench)


def wide(bench: Bench) -> Iterator[Row]:
    """60k x 64 floats, batch 256: what gathering whole batches is worth, with about 50,000 parameters and with 900."""
    for job in (jobs.WIDE, jobs.WIDE_SMALL):
        kinds = ["own loop", "hand-written", "DataLoader", "unwrapped"]
        measured, failed = _epochs(bench, job.name, kinds, epochs=1, rounds=bench.pick(12, 3))
        network = "-".join(map(str, job.widths))
        what = f"own loop: 60k x 64 floats, batch 256 ({network}), time per epoch"
        yield _row("wide", what, measured, failed, "own loop", "DataLoader", Goal(3.0, at_least=True))
        yield _row("wide", what, measured, failed, "own loop", "hand-written", None)


def long_steps(bench: Bench) -> Iterator[Row]:
    """Steps of 5 ms of real matrix work: what is left of the loop's own cost."""
    batch = bench.in_child("loops:calibrate", threads=_THREADS)
    kinds = ["own loop", "Trainer", "hand-written"]
    measured, failed = _epochs(bench, "long", kinds, epochs=1, rounds=bench.pick(15, 3), batch_size=int(batch))
    for ours in ("own loop", "Trainer"):
        what = f"{ours}: 100 steps of 5 ms (256-256-256-256-1, batch {batch}), time per epoch"
        yield _row("long", what, measured, failed, ours, "hand-written", Goal(1.01))


def calibrate(laps: object, *, directory: str) -> None:
    """For a child: the batch size with which a step takes 5 ms."""
    laps.turn(jobs.batch_size_for(jobs.LONG, _STEP_SECONDS))  # type: ignore[attr-defined]


def _epochs(
    bench: Bench, job: str, kinds: Sequence[str], *, epochs: int, rounds: int, batch_size: int | None = None
) -> tuple[Measured, dict[str, str]]:
    """So many rounds; in the full form each third of them with new processes.

    Two processes that do the same differ, for as long as they live.
    """
    processes = bench.pick(_PROCESSES, 1)
    parts = [_in_new_processes(bench, job, kinds, epochs, rounds // processes, batch_size) for _ in range(processes)]
    failed = {name: reason for _, reasons in parts for name, reason in reasons.items()}
    whole = [name for name in kinds if name not in failed]
    return {name: tuple(chain.from_iterable(measured[name] for measured, _ in parts)) for name in whole}, failed


def _in_new_processes(
    bench: Bench, job: str, kinds: Sequence[str], epochs: int, rounds: int, batch_size: int | None
) -> tuple[Measured, dict[str, str]]:
    workers = {}
    for kind in kinds:
        directory = bench.directory(f"{job}-{kind}")
        settings = {"kind": kind, "job": job, "epochs": epochs, "directory": directory, "batch_size": batch_size}
        target = "peers:arm" if kind in peers.PEERS else "jobs:arm"
        log = Path(directory).with_suffix(".log")
        workers[kind] = Worker(target, settings=settings, threads=_THREADS, log=log)
    with started(workers):
        return in_lockstep(workers, rounds=rounds)


def _row(
    group: str, what: str, measured: Measured, failed: dict[str, str], ours: str, theirs: str, goal: Goal | None
) -> Row:
    names = {"hand-written": _BARE, "DataLoader": "hand-written + DataLoader"}
    comparison: Comparison = "times faster" if goal is not None and goal.at_least else "ratio"
    # Who runs the step eagerly cannot be faster than the loop that does nothing else.
    is_bound = ours != "compiled" and "unwrapped" in measured
    for name in (ours, theirs):
        if name in failed:
            reason = f"{names.get(name, name)}: {failed[name]}"
            return Row(group, what, comparison=comparison, goal=goal, skipped=reason)
    return Row(
        group,
        what,
        Side(ours, measured[ours], durability="synced and verified"),
        Side(names.get(theirs, theirs), measured[theirs], durability="nothing saved"),
        comparison=comparison,
        goal=goal,
        bound=Side(_LEAST, measured["unwrapped"]) if is_bound else None,
    )


def _snapshots_part(bench: Bench) -> Row:
    rounds = bench.pick(200, 30)
    m = bench.in_child("loops:measure_snapshots_part", threads=_THREADS, rounds=rounds)
    return Row(
        "classic",
        "classic job: all that a snapshot each epoch adds to an epoch of the own loop",
        Side("added", m["added"], durability="synced and verified"),
        Side("its epoch", m["epoch"]),
        note=f"in one run with a snapshot in each {_EPOCHS_A_SNAPSHOT}th epoch: what that epoch, and the next, in which"
        " it is still being written, are longer than the others; epochs differ by more, so no goal is judged by it"
        " (what is taken from the training thread is in the group small)",
    )


def measure_snapshots_part(laps: Laps, *, rounds: int, directory: str) -> None:
    """For a child: epochs of one training, as two processes that do the same differ by more than a snapshot takes."""
    began: list[float] = []
    jobs.own_loop(
        jobs.CLASSIC,
        directory,
        epochs=(rounds + 2) * _EPOCHS_A_SNAPSHOT,
        laps=lambda: began.append(time.perf_counter()),
        every_epochs=_EPOCHS_A_SNAPSHOT,
    )
    seconds = [end - begin for begin, end in pairwise(began)]
    first = 2 * _EPOCHS_A_SNAPSHOT - 1  # which ends with a snapshot
    starts = range(first, len(seconds) - _EPOCHS_A_SNAPSHOT + 1, _EPOCHS_A_SNAPSHOT)
    alone = [fmean(seconds[at + 2 : at + _EPOCHS_A_SNAPSHOT]) for at in starts]
    added = [seconds[at] + seconds[at + 1] - 2 * epoch for at, epoch in zip(starts, alone, strict=True)]
    laps.turn({"added": added, "epoch": alone})

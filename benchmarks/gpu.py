"""What needs a GPU: the host's wait for a snapshot of 1.5 GB, and the classic job as a graph of whole steps."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import jobs
from benchmarks.savers import Distributed, Own, settle
from benchmarks.table import Goal, Row, Side
from benchmarks.timing import Bench, Worker, alternately, in_lockstep, started

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from benchmarks.worker import Laps

_BYTES = 1_500_000_000
_LAUNCH_SECONDS = 0.001


def on_gpu(bench: Bench) -> Iterator[Row]:
    """Both parts; skipped with the reason where there is no device."""
    reason = None if torch.cuda.is_available() else "no CUDA device here"
    yield from _snapshots(bench, reason)
    yield from _graph(bench, reason)


def _snapshots(bench: Bench, reason: str | None) -> Iterator[Row]:
    what = "GPU: host-blocking per snapshot of 1.5 GB"
    added = "GPU: memory of the device taken while a snapshot is on its way"
    against_dcp, alone = Goal(1 / 10), Goal(_LAUNCH_SECONDS)
    if reason is not None:
        yield Row("gpu", what, goal=against_dcp, skipped=reason)
        yield Row("gpu", f"{what}, beyond launch", comparison="difference", goal=alone, skipped=reason)
        yield Row("gpu", added, skipped=reason)
        return
    m = bench.in_child("gpu:measure_snapshots", threads=1, rounds=bench.pick(9, 3))
    own = Side("own", m["own"], durability="synced and verified")
    yield Row("gpu", what, own, Side("DCP async_save, pinned", m["dcp"], durability="synced"), goal=against_dcp)
    launch = Side("launching a kernel for each tensor", m["launch"])
    yield Row("gpu", f"{what}, beyond launch", own, launch, "difference", alone)
    state = Side("state", m["state bytes"], "B")
    for name, kind in (("own", "own"), ("dcp", "DCP async_save, pinned")):
        yield Row("gpu", f"{added}: {kind}", Side(kind, m[f"{name} bytes"], "B"), state)


def measure_snapshots(laps: Laps, *, rounds: int, directory: str) -> None:
    """For a child: the host's time in the call, nothing waited for before it but the device at rest.

    The first two rounds, in which memory is pinned, are not counted.
    """
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    model, optimizer = jobs.big_state(_BYTES, device="cuda")
    own = Own(Path(directory) / "own", {"model": model, "optimizer": optimizer})
    # Staged before the call returns: with async staging the wait only moves to before the next optimizer step.
    pinned = DefaultStager(StagingOptions(use_pinned_memory=True, use_shared_memory=True, use_async_staging=False))
    dcp = Distributed(Path(directory), model, optimizer, async_stager=pinned)
    copies = [tensor.clone() for tensor in jobs.tensors_of(model, optimizer)]
    state_bytes = float(jobs.num_bytes_of(copies))

    def arm(name: str, saver: Any) -> Mapping[str, float]:
        jobs.train_once(optimizer)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        begun = time.perf_counter()
        saver.begin()
        taken = time.perf_counter() - begun
        saver.finish()
        settle([saver])
        return {name: taken, f"{name} bytes": float(torch.cuda.max_memory_allocated() - before)}

    def launch() -> Mapping[str, float]:
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for copy, tensor in zip(copies, jobs.tensors_of(model, optimizer), strict=True):
            copy.copy_(tensor, non_blocking=True)
        return {"launch": time.perf_counter() - begun, "state bytes": state_bytes}

    arms = [
        lambda: arm("own", own),
        lambda: arm("dcp", dcp),
        launch,
    ]
    laps.turn(alternately(arms, rounds=rounds, warmup=2))


def _graph(bench: Bench, reason: str | None) -> Iterator[Row]:
    what, goal = "GPU: classic job with whole-step graph, time per epoch", Goal(5, at_least=True)
    if reason is None and not jobs.can_compile():
        reason = "not built yet: Trainer has no compile="
    if reason is not None:
        yield Row("gpu", what, comparison="times faster", goal=goal, skipped=reason)
        return
    workers = {}
    for kind in ("compiled", "DataLoader"):
        directory = bench.directory(f"gpu-{kind}")
        settings = {"kind": kind, "job": "classic", "epochs": 10, "directory": directory, "device": "cuda"}
        workers[kind] = Worker("jobs:arm", settings=settings, threads=1, log=Path(directory).with_suffix(".log"))
    with started(workers):
        m, failed = in_lockstep(workers, rounds=bench.pick(9, 3))
    if failed:
        yield Row("gpu", what, goal=goal, skipped=next(iter(failed.values())))
        return
    own = Side("Trainer(compile=True)", m["compiled"], durability="synced and verified")
    theirs = Side("hand-written eager + DataLoader", m["DataLoader"], durability="nothing saved")
    yield Row("gpu", what, own, theirs, "times faster", goal)

"""Snapshots of a large state: stall, time to durable, interference, bytes, memory; and of many small tensors.

A stall is the time taken from the training thread. Every group runs in a process of its own, its arms alternately.
"""

from __future__ import annotations

import mmap
import os
import random
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from benchmarks import jobs
from benchmarks.machine import CORES, big_bytes, gigabytes, raw_write
from benchmarks.savers import Distributed, Own, TorchSave, settle
from benchmarks.table import Goal, Row, Side
from benchmarks.timing import ArmError, Bench, alternately, processor_time, timed
from resumable_trainer.durable.files import Files, NewFile
from resumable_trainer.durable.priority import yield_to_training
from resumable_trainer.snapshot.pending import PendingSnapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from benchmarks.worker import Laps

_VERIFIED, _SYNCED = "synced and verified", "synced"
_TRAINED_STEPS = 2
_SETTLING_STEPS = 5  # the first gives back to the system what the step before, of another model, has left
_IDLE_STEPS = 200
_WORK_SECONDS_PER_BYTE = 0.5e-9  # forward and backward: some times as long as a copy of so many bytes


# -- stall and time to durable --------------------------------------------------------------------------


def stalls(bench: Bench) -> Iterator[Row]:
    """1.1 GB: how long the training thread waits, and how long it takes to the disk, against peers and the limits."""
    rounds = bench.pick(7, 3)
    m = bench.in_child("snapshots:measure_stalls", threads=1, num_bytes=big_bytes(bench), rounds=rounds)
    stall, durable = f"stall per snapshot, {gigabytes(bench)}", f"time to durable, {gigabytes(bench)}"
    own_stall = Side("own", m["own stall"], durability=_VERIFIED)
    own = Side("own", m["own durable"], durability=_VERIFIED)
    dcp, save = "DCP async_save, warm", "torch.save + sync"

    copy = Side("memory copy", m["copy"])
    yield Row("stall", stall, own_stall, copy, goal=Goal(1.2))
    yield Row("stall", stall, own_stall, Side(dcp, m["dcp stall"], durability=_SYNCED), goal=Goal(1 / 3))
    yield Row("stall", stall, own_stall, Side(save, m["save"], durability=_SYNCED), goal=Goal(1 / 12))
    overlapped = Side("own, overlapped", m["overlapped stall"], durability=_VERIFIED)
    yield Row("stall", f"{stall}, overlapped staging", overlapped, copy, goal=Goal(0.3))
    yield Row("stall", durable, own, Side("raw write + sync", m["raw"], durability=_SYNCED), goal=Goal(1.15))
    yield Row("stall", durable, own, Side(dcp, m["dcp durable"], durability=_SYNCED))
    yield Row("stall", durable, own, Side(save, m["save"], durability=_SYNCED))


def measure_stalls(laps: Laps, *, num_bytes: int, rounds: int, directory: str) -> None:
    """For a child: all arms on one state, which changes before each."""
    root = Path(directory)
    model, optimizer = jobs.big_state(num_bytes)
    tensors = jobs.tensors_of(model, optimizer)
    copies = [tensor.clone() for tensor in tensors]
    flat = memoryview(torch.ones(jobs.num_bytes_of(tensors), dtype=torch.uint8).numpy())
    own = Own(root / "own", {"model": model, "optimizer": optimizer})
    overlapped = Own(root / "overlapped", {"model": model, "optimizer": optimizer}, staging="overlapped")
    save, dcp = TorchSave(root, model, optimizer), Distributed(root, model, optimizer)
    work = jobs.work_of(seconds=num_bytes * _WORK_SECONDS_PER_BYTE)

    def prepare() -> None:
        """The same page cache and the same moment for all: memory is slower where a lot has just been asked for.

        A virtual machine may have given free memory back, and waits for it again.
        """
        settle()
        (root / "pages").write_bytes(flat)
        (root / "pages").unlink()
        jobs.train_once(optimizer)

    def overlapped_arm() -> Mapping[str, float]:
        """The call, the wait before the step, and the processor time by which forward and backward are longer.

        Not written: what writing costs the steps beside it is the group interference.
        """
        prepare()
        manager, before = overlapped.manager, processor_time(work)
        called = timed(lambda: manager.stage(manager.capture()))
        beside = processor_time(work)
        waited = timed(manager.settle)
        alone = (before + processor_time(work)) / 2  # a machine that gets slower or faster meanwhile is no stall
        return {"overlapped stall": called + waited + beside - alone}

    def plain_copy() -> Mapping[str, float]:
        """In the same moment as our snapshot, and like that into memory that was last written a round ago.

        Such memory takes up to three times as long as what was just written: a virtual machine's host has put it away.
        """
        return {"copy": timed(lambda: [b.copy_(a) for a, b in zip(tensors, copies, strict=True)])}

    def arm(name: str, saver: Any, before: Callable[[], Mapping[str, float]] = dict) -> Mapping[str, float]:
        prepare()
        found = before()
        stall, durable = saver.save()
        settle([saver])
        return {**found, f"{name} stall": stall, f"{name} durable": durable}

    def raw() -> Mapping[str, float]:
        prepare()
        return {"raw": raw_write(root / "raw", flat)}

    arms = [
        lambda: arm("own", own, plain_copy),
        overlapped_arm,
        raw,
        lambda: {"save": arm("save", save)["save stall"]},
        lambda: arm("dcp", dcp),
    ]
    laps.turn(alternately(arms, rounds=rounds))


# -- the classic job's snapshot -------------------------------------------------------------------------


def small(bench: Bench) -> Iterator[Row]:
    """The call that takes the classic job's snapshot, at the end of each epoch of the bare loop."""
    m = bench.in_child("snapshots:measure_small", threads=1, epochs=bench.pick(200, 60))
    yield Row(
        "small",
        "classic job: the call that takes a snapshot each epoch, waiting for the one before included",
        Side("the call", m["stall"], durability=_VERIFIED),
        Side("its epoch", m["epoch"]),
        goal=Goal(0.02),
        bound=Side("`state_dict()` of both, the generators, and a copy of the tensors", m["least"]),
    )


def measure_small(laps: Laps, *, epochs: int, directory: str) -> None:
    """For a child: the stall and the rest of each epoch."""
    job = jobs.CLASSIC
    model, (features, labels) = job.model(), job.data()
    optimizer = jobs.adam(model)
    own = Own(Path(directory), {"model": model, "optimizer": optimizer}, keep=False)

    def train() -> float:
        started = time.perf_counter()
        for rows in torch.split(torch.randperm(job.num_rows), job.batch_size):
            jobs.step(model, optimizer, features.index_select(0, rows), labels.index_select(0, rows))
        optimizer.zero_grad()
        return time.perf_counter() - started

    def take() -> None:
        kept.append([tensor.clone() for tensor in model.state_dict().values()])
        kept.append([value.clone() for each in optimizer.state_dict()["state"].values() for value in each.values()])
        kept.append([random.getstate(), np.random.get_state(), torch.get_rng_state()])

    def epoch() -> Mapping[str, float]:
        return {"epoch": train(), "stall": timed(own.begin)}

    def least() -> Mapping[str, float]:
        train()
        own.manager.wait()
        kept.clear()
        return {"least": timed(take)}

    kept: list[Any] = []
    laps.turn(alternately([epoch, least], rounds=epochs, warmup=10))


# -- interference ---------------------------------------------------------------------------------------


def interference(bench: Bench) -> Iterator[Row]:
    """Steps of 5 ms while a large snapshot is written beside them, with one thread and with one for each core.

    A ratio of steps is the larger, the sooner the snapshot is on the disk: so the time that is lost is shown, too.
    """
    for threads in (1,) if bench.quick else sorted({1, CORES}):
        m = bench.in_child(
            "snapshots:measure_interference", threads=threads, num_bytes=big_bytes(bench), rounds=bench.pick(7, 3)
        )
        beside = f"while {gigabytes(bench)} are written, {threads} threads"
        bare = "the same bytes hashed, written and synced as they lie, at the same priority"
        yield Row(
            "interference",
            f"mean step of 5 ms {beside}",
            Side("while writing", m["own step"], durability=_VERIFIED),
            Side("idle", m["idle"]),
            goal=Goal(1.1),
            bound=Side(bare, m["bare step"]),
        )
        for what, unit in (("lost", "what steps of 5 ms lose"), ("writing", "how long it takes beside steps of 5 ms")):
            own = Side("own", m[f"own {what}"], durability=_VERIFIED)
            theirs = Side(bare, m[f"bare {what}"], durability=_SYNCED)
            yield Row("interference", f"{unit} {beside}", own, theirs, "difference")


def measure_interference(laps: Laps, *, num_bytes: int, rounds: int, directory: str) -> None:
    """For a child: steps while a snapshot is written, while the same bytes are, and while nothing is."""
    big, optimizer_of_big = jobs.big_state(num_bytes)
    flat = memoryview(mmap.mmap(-1, num_bytes))  # it begins with a page, as what is staged does
    torch.frombuffer(flat, dtype=torch.uint8).fill_(1)
    own = Own(Path(directory), {"model": big, "optimizer": optimizer_of_big}, keep=False)
    job = jobs.LONG
    model, batch = job.model(), jobs.batch_size_for(job, 0.005)
    optimizer = jobs.adam(model)
    inputs, labels = torch.randn(batch, job.widths[0]), torch.ones(batch, 1)
    kept = Path(directory) / "bare"

    def steps(goes_on: Any) -> tuple[int, float]:
        count, started = 0, time.perf_counter()
        while goes_on(count):
            jobs.step(model, optimizer, inputs, labels)
            count += 1
        return count, time.perf_counter() - started

    def write_bare() -> None:
        yield_to_training()
        with NewFile(kept.with_suffix(".new"), files=Files()) as file:
            file.write(flat)
        kept.with_suffix(".new").replace(kept)

    def beside(name: str, begin: Callable[[], PendingSnapshot]) -> Mapping[str, float]:
        os.sync()
        steps(lambda done: done < _SETTLING_STEPS)
        pending = begin()
        count, writing = steps(lambda done: not pending.done or done < 1)
        pending.wait()
        os.sync()
        _, idle = steps(lambda done: done < _IDLE_STEPS)
        idle /= _IDLE_STEPS
        lost = writing - count * idle
        return {f"{name} step": writing / count, f"{name} lost": lost, f"{name} writing": writing, "idle": idle}

    def begin_bare() -> PendingSnapshot:
        return PendingSnapshot("bare", write_bare, background=True)

    def round_() -> Mapping[str, float]:
        jobs.train_once(optimizer_of_big)
        # The later "idle" counts: that which was measured beside the snapshot.
        return {**beside("bare", begin_bare), **beside("own", own.begin)}

    laps.turn(alternately([round_], rounds=rounds))


# -- bytes ----------------------------------------------------------------------------------------------


def frozen(bench: Bench) -> Iterator[Row]:
    """Bytes that a snapshot writes when 90 % of the state never change."""
    m = bench.in_child("snapshots:measure_frozen", threads=1, num_bytes=bench.pick(400, 200) * 10**6)
    what = "bytes written per snapshot after the first, 90 % of the state frozen"
    if m["own"] is None:
        yield Row("frozen", what, goal=Goal(0.12), skipped="this system does not count the bytes that a process writes")
        return
    full = Side("state", tuple(m["state"] for _ in m["own"]), "B")
    yield Row("frozen", what, Side("own", tuple(m["own"]), "B", _VERIFIED), full, goal=Goal(0.12))
    yield Row("frozen", "torch.save of the same, beside it", Side("torch.save", tuple(m["save"]), "B", _SYNCED), full)


def measure_frozen(laps: Laps, *, num_bytes: int, directory: str) -> None:
    """For a child: what the kernel counts as written by this process, its threads included."""
    root = Path(directory)
    model, optimizer = jobs.big_state(num_bytes, frozen=0.9, width=512)
    own, save = Own(root / "own", {"model": model, "optimizer": optimizer}), TorchSave(root, model, optimizer)
    own.save()

    def arm(name: str, saver: Any) -> Mapping[str, float]:
        jobs.train_once(optimizer)
        before = written_bytes()
        saver.save()
        return {name: written_bytes() - before}

    if not Path("/proc/self/io").exists():
        laps.turn({"own": None})
    found: dict[str, Any] = dict(alternately([lambda: arm("own", own), lambda: arm("save", save)], rounds=3, warmup=0))
    laps.turn({**found, "state": jobs.num_bytes_of(jobs.tensors_of(model, optimizer))})


def written_bytes() -> int:
    """Bytes that this process has caused to be written to disk, however it wrote them."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["write_bytes"])


# -- many small tensors ---------------------------------------------------------------------------------


def many_tensors(bench: Bench) -> Iterator[Row]:
    """The same bytes in 10,000 tensors and in 10."""
    m = bench.in_child("snapshots:measure_tensors", threads=1, num_bytes=120 * 10**6, rounds=bench.pick(7, 3))
    for name, goal in (("stall", Goal(2)), ("durable", Goal(2)), ("restore", None)):
        words = {"stall": "stall", "durable": "time to durable", "restore": "restore, verified, in place"}[name]
        yield Row(
            "tensors",
            f"120 MB in 10,000 tensors: {words}",
            Side("10,000", m[f"many {name}"], durability=_VERIFIED),
            Side("the same in 10 tensors", m[f"few {name}"], durability=_VERIFIED),
            goal=goal,
            bound=Side("their copies alone, in one call", m["many copy"]) if name == "stall" else None,
        )


def measure_tensors(laps: Laps, *, num_bytes: int, rounds: int, directory: str) -> None:
    """For a child: two models, saved and restored alternately."""

    def arm(name: str, count: int) -> Any:
        values = [nn.Parameter(torch.ones(num_bytes // 4 // count)) for _ in range(count)]
        model = nn.ParameterList(values)
        own = Own(Path(directory) / name, {"model": model})
        copies = torch.ones(num_bytes // 4)

        def copy() -> None:
            with torch.no_grad():
                torch.cat(values, out=copies)

        def act() -> Mapping[str, float]:
            with torch.no_grad():
                torch._foreach_add_(values, 1.0)
            os.sync()
            copied = timed(copy)
            stall, durable = own.save()
            restore = timed(own.manager.restore)
            settle([own])
            found = {"stall": stall, "durable": durable, "restore": restore, "copy": copied}
            return {f"{name} {what}": seconds for what, seconds in found.items()}

        return act

    laps.turn(alternately([arm("many", 10_000), arm("few", 10)], rounds=rounds))


# -- memory ---------------------------------------------------------------------------------------------


def memory(bench: Bench) -> Iterator[Row]:
    """Peak of resident memory that snapshots add to a training, and a restore to a fresh process, against the state."""
    size, kinds = big_bytes(bench), ("own",) if bench.quick else ("own", "torch.save + sync", "DCP async_save")
    found: dict[tuple[str, str], list[Any]] = {}
    for kind in [kind for _ in range(bench.pick(3, 1)) for kind in kinds]:
        run = bench.directory("memory")
        settings = {"num_bytes": size, "kind": kind, "run": run}
        for name in ("saving", "restoring") if kind == "own" else ("saving",):
            extra = bench.in_child(f"snapshots:measure_memory_{name}", threads=1, **settings)
            found.setdefault((name, kind), []).append(extra)
        shutil.rmtree(run)
    for (name, kind), extras in found.items():
        what, goal = f"extra memory while {name}: {kind}", Goal(1.05) if kind == "own" else None
        if None in extras:
            yield Row("memory", what, goal=goal, skipped="this system has no peak of memory that can be reset")
            continue
        state = Side("state", tuple(each["state"] for each in extras), "B")
        yield Row("memory", what, Side(kind, tuple(each["extra"] for each in extras), "B"), state, goal=goal)


def measure_memory_saving(laps: Laps, *, num_bytes: int, kind: str, run: str, directory: str) -> None:
    """For a child: the peak of a training with snapshots in flight, less that of the same without."""
    model, optimizer = jobs.big_state(num_bytes)
    saver = _saver(kind, Path(run), model, optimizer)

    def train(save: Callable[[], Any] = lambda: None, finish: Callable[[], Any] = lambda: None) -> None:
        for _ in range(3):
            save()
            for _ in range(_TRAINED_STEPS):
                jobs.train_once(optimizer)
            finish()

    train()
    without, with_saves = peak_of(train), peak_of(lambda: train(saver.begin, saver.finish))
    laps.turn(_extra(with_saves, without, model, optimizer))


def measure_memory_restoring(laps: Laps, *, num_bytes: int, kind: str, run: str, directory: str) -> None:
    """For a child that has never saved: the peak of a restore, less what is resident before it."""
    model, optimizer = jobs.big_state(num_bytes)
    saver = _saver(kind, Path(run), model, optimizer)
    resident = peak_of(lambda: None)
    laps.turn(_extra(peak_of(saver.manager.restore), resident, model, optimizer))


def _saver(kind: str, root: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    if kind == "own":
        return Own(root, {"model": model, "optimizer": optimizer})
    if kind == "torch.save + sync":
        return TorchSave(root, model, optimizer)
    import torch.distributed.checkpoint  # noqa: F401 - its code is no memory of a snapshot

    return Distributed(root, model, optimizer)


def _extra(
    peak: int | None, without: int | None, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, int] | None:
    if peak is None or without is None:
        return None
    return {"extra": peak - without, "state": jobs.num_bytes_of(jobs.tensors_of(model, optimizer))}


def peak_of(act: Callable[[], object]) -> int | None:
    """Largest resident memory of this process during a call, in bytes; None where the system cannot tell.

    Pages of files that it has mapped count, too.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    act()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def check_disk(bench: Bench) -> None:
    """Refuse to fill a disk.

    Raises:
        ArmError: There is not room for the largest group.
    """
    found = os.statvfs(bench.scratch)
    if found.f_bavail * found.f_frsize < 8 * big_bytes(bench):
        raise ArmError(f"{bench.scratch} has not the room for 8 states of {gigabytes(bench)}; name another: --scratch")

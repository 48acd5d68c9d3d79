"""L9: trainers killed at random moments, over and over in one run directory, while a worker of theirs lives on.

Races and clocks that jump are in races.py, and counted here too.

Nothing watches or slows them down: here are the moments between two threads that no tracer meets, and kills in the
middle of a recovery. The next start must take the run at once, though the worker still has all that it inherited.
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import oracle
from faults import in_parallel, make_ready
from lab import Count
from oracle import order
from races import Clocks, Races
from scenarios import Scenario, Values, manager_of, name_of, save

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lab import Lab

_SHORT_KILLS, _LONG_KILLS = 60, 10_000
_NUM_RUNS = 2
_LONGEST_SECONDS = 0.05
_HANGS_AFTER_SECONDS = 30
_ADOPT_ORPHANS = 36  # prctl(2): PR_SET_CHILD_SUBREAPER


def run(lab: Lab) -> Count:
    """Some kills, races and jumping clocks in the short form; ten thousand kills and a thousand races in the long."""
    if not sys.platform.startswith("linux"):
        return Count(skipped="orphans can be adopted on Linux only")
    make_ready()
    kills = (_LONG_KILLS if lab.long else _SHORT_KILLS) // _NUM_RUNS
    rounds, trainings = (500, 100) if lab.long else (6, 2)
    kinds = (_Kills(kills, lab.seed), Races(rounds, lab.seed), Clocks(trainings, lab.seed))
    work = [(kind, lab.scratch / f"{type(kind).__name__}-{number}") for kind in kinds for number in range(_NUM_RUNS)]
    return in_parallel(_carry_out, work)


def _carry_out(work: tuple[Callable[[Path], Count], Path]) -> Count:
    kind, directory = work
    return kind(directory)


class _Kills:
    """A run directory whose trainers are killed one after the other."""

    def __init__(self, num_kills: int, seed: int) -> None:
        self._num_kills, self._seed = num_kills, seed

    def __call__(self, directory: Path) -> Count:
        count, chance = Count(), random.Random(f"{self._seed} {directory.name}")
        ctypes.CDLL(None).prctl(_ADOPT_ORPHANS, 1, 0, 0, 0)
        scenario = Scenario("random kills", lambda directory: None, lambda directory, acknowledge: None)
        for number in range(self._num_kills):
            acked, broken = _one(directory, scenario, chance)
            count.add(
                "with snapshots" if acked else "before a snapshot", [f"{line} [kill {number}]" for line in broken]
            )
            if broken:
                return count  # what follows would only say it again
            # The oracle has saved one more, which must be there from now on.
            newest = max((*scenario.durable_before, *acked), key=order, default=name_of(0))
            scenario = replace(scenario, durable_before=(newest,))
        return count


def _one(directory: Path, scenario: Scenario, chance: random.Random) -> tuple[list[str], list[str]]:
    """What one killed trainer had acknowledged, and what it has broken."""
    said = directory.with_suffix(".said")
    said.unlink(missing_ok=True)
    lives, ends = os.pipe()  # the worker lives until the other end is closed
    trainer = os.fork()
    if trainer == 0:
        os.close(ends)
        _train(directory, said, lives, background=chance.random() < 0.5)
    os.close(lives)
    if chance.random() < 0.7:
        _await_a_snapshot(said)
    time.sleep(chance.uniform(0, _LONGEST_SECONDS))
    os.kill(trainer, signal.SIGKILL)
    os.waitpid(trainer, 0)
    lines = said.read_text().splitlines() if said.exists() else []
    acked = [line for line in lines if line.startswith("step-")]
    errors = [f"the trainer ended by itself: {line}" for line in lines if line.startswith("error ")]
    broken = oracle.violations(directory, scenario, acked)
    os.close(ends)
    for worker in (int(line.removeprefix("worker ")) for line in lines if line.startswith("worker ")):
        os.waitpid(worker, 0)
    return acked, errors + broken


def _await_a_snapshot(said: Path) -> None:
    """However slow the machine is, most kills are to come after the trainer's start."""
    deadline = time.monotonic() + _HANGS_AFTER_SECONDS
    while time.monotonic() < deadline and not (said.exists() and "\n" in said.read_text().partition("step-")[2]):
        time.sleep(0.001)


def _train(directory: Path, said: Path, lives: int, *, background: bool) -> None:
    """Snapshot after snapshot, until somebody ends it; never returns."""
    out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        values = Values()
        with manager_of(directory, values) as manager:
            manager.restore()
            if (worker := os.fork()) == 0:
                os.read(lives, 1)
                os._exit(0)
            os.write(out, f"worker {worker}\n".encode())
            while True:
                save(manager, values, values.step + 1, background=background)
                manager.wait()
                os.write(out, f"{name_of(values.step)}\n".encode())
    except BaseException as error:  # noqa: BLE001 - told to the parent
        os.write(out, f"error {type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(1)

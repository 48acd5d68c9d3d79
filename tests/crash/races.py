"""L9, second half: processes that race for one run, and clocks that jump by years while they do.

Two to eight start at once, again and again; some are killed at random moments, the holder among them, some while
they recover. There are never two holders, every launch has a generation of its own and of its snapshots a greater
one than those before, and nothing that was acknowledged is lost. A clock tells only labels: what it says, and how it
jumps, changes nothing else.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import functools
import os
import random
import signal
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import oracle
from lab import Count
from oracle import order
from scenarios import Scenario, Training, Values, manager_of, name_of, save

from resumable_trainer.durable import lock as lock_module
from resumable_trainer.errors import ResumableTrainerError, RunHeldError
from resumable_trainer.loop import launch, opening
from resumable_trainer.manager import held
from resumable_trainer.snapshot.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_LONGEST_SECONDS = 0.04
_HANGS_AFTER_SECONDS = 60
_YEARS = 365 * 86_400
_HIGH = 200  # above every descriptor of a run
_real_time = time.time


class Races:
    """Rounds of racing starts in one run directory.

    Args:
        num_rounds: How many.
        seed: Of what is drawn.
    """

    def __init__(self, num_rounds: int, seed: int) -> None:
        self._num_rounds, self._seed = num_rounds, seed

    def __call__(self, directory: Path) -> Count:
        count, chance = Count(), random.Random(f"{self._seed} {directory.name}")
        scenario = Scenario("race", lambda directory: None, lambda directory, acknowledge: None)
        generation = 0
        for number in range(self._num_rounds):
            said, num_starts = directory.with_suffix(f".said-{number}"), chance.randint(2, 8)
            _race(directory, said, num_starts, chance)
            lines = said.read_text().splitlines() if said.exists() else []
            acked = [line.split()[2] for line in lines if line.startswith("saved ")]
            broken = _contradictions(lines, generation)
            generation = max([generation, *(int(line.split()[1]) for line in lines if line.startswith("held "))])
            broken += oracle.violations(directory, scenario, sorted(acked, key=order))
            broken += _generations(directory)
            count.add(f"races of {num_starts}", [f"{line} [round {number}]" for line in broken])
            said.unlink(missing_ok=True)
            if broken:
                return count
            newest = max((*scenario.durable_before, *acked), key=order, default=name_of(0))
            scenario = replace(scenario, durable_before=(newest,))
        return count


def _race(directory: Path, said: Path, num_starts: int, chance: random.Random) -> None:
    """Start so many at the same moment, and kill them one after the other."""
    ready, go = os.pipe()
    starts = []
    for _ in range(num_starts):
        seed = chance.random()
        if (pid := os.fork()) == 0:
            os.close(go)
            _contend(directory, said, ready, random.Random(seed))
        starts.append(pid)
    os.close(ready)
    os.close(go)  # all of them read its end now
    chance.shuffle(starts)
    for pid in starts:
        time.sleep(chance.uniform(0, _LONGEST_SECONDS))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _contend(directory: Path, said: Path, ready: int, chance: random.Random) -> None:
    """Try to hold the run until it works, save, let go, and again until somebody ends it; never returns."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(_HANGS_AFTER_SECONDS)
    out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    # A lock of the laboratory's own, so that two holders are seen whatever the package believes. Linux frees the locks
    # of a killed process from the highest descriptor down: this one goes before the run's, or the next holder meets it.
    alone = os.open(said.with_suffix(".alone"), os.O_RDWR | os.O_CREAT)
    os.dup2(alone, _HIGH)
    os.close(alone)
    os.read(ready, 1)
    try:
        with jumping_clock(chance):
            while True:
                _hold(directory, out, _HIGH, chance)
    except BaseException as error:  # noqa: BLE001 - told to the parent
        os.write(out, f"error {type(error).__name__}: {error}\n".replace("\n", " ").encode() + b"\n")
    finally:
        os._exit(1)


def _hold(directory: Path, out: int, alone: int, chance: random.Random) -> None:
    values = Values()
    try:
        manager = manager_of(directory, values).open()
    except RunHeldError:
        time.sleep(0.001)
        return
    try:
        try:
            fcntl.flock(alone, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.write(out, b"two holders\n")
        generation = manager.lock.generation
        os.write(out, f"held {generation}\n".encode())
        manager.restore()
        for _ in range(chance.randint(1, 3)):
            save(manager, values, values.step + 1, background=chance.random() < 0.5)
            manager.wait()
            os.write(out, f"saved {generation} {name_of(values.step)}\n".encode())
    finally:
        fcntl.flock(alone, fcntl.LOCK_UN)
        manager.close()


def _contradictions(lines: list[str], before: int) -> list[str]:
    """What the racers have told that cannot be."""
    broken = [line for line in lines if line.startswith(("error ", "two holders"))]
    held = [int(line.split()[1]) for line in lines if line.startswith("held ")]
    if any(one >= other for one, other in zip([before, *held], held, strict=False)):
        broken.append(f"generations do not grow: {before}, then {held}")
    saved = [line.split()[2] for line in lines if line.startswith("saved ")]
    if saved != sorted(saved, key=order) or len(set(saved)) != len(saved):
        broken.append(f"a holder did not continue from the last: {saved}")
    return broken


def _generations(directory: Path) -> list[str]:
    store = Store(directory)
    try:
        found = [store.manifest(name).generation for name in store.names()]
    except ResumableTrainerError as error:
        return [f"a snapshot cannot be read: {error}"]
    return [] if found == sorted(found) else [f"generations of the snapshots: {found}"]


# -- clocks -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def jumping_clock(chance: random.Random) -> Iterator[None]:
    """The wall clock as the package reads it jumps by years, forward and back, at every look."""

    def now() -> float:
        return _real_time() + chance.uniform(-50 * _YEARS, 50 * _YEARS)

    class Datetime(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.datetime.fromtimestamp(now(), tz)

    class Module:
        UTC = datetime.UTC
        datetime = Datetime

    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(time, "time", now))
        for module in (held, lock_module, launch, opening):
            stack.enter_context(patch.object(module, "datetime", Module))
        yield


class Clocks:
    """Trainings killed again and again under a clock that jumps: they end as if nothing had happened.

    Args:
        num_runs: How many trainings.
        seed: Of what is drawn.
    """

    def __init__(self, num_runs: int, seed: int) -> None:
        self._num_runs, self._seed = num_runs, seed

    def __call__(self, directory: Path) -> Count:
        count, chance = Count(), random.Random(f"{self._seed} {directory.name}")
        for number in range(self._num_runs):
            place = directory.with_name(f"{directory.name}-{number}")
            for step in sorted(chance.sample(range(1, 6), 3)):
                _in_child(functools.partial(_train, place, random.Random(chance.random()), step))
            broken = oracle.violations(place, _RUN, [])
            count.add("trainings under jumping clocks", [f"{line} [training {number}]" for line in broken])
        return count


_RUN = Scenario("clock", lambda directory: None, lambda directory, acknowledge: None, is_run=True)


def _train(directory: Path, chance: random.Random, step: int) -> None:
    with jumping_clock(chance):
        Training().train(directory, die_at=step)


def _in_child(work: Callable[[], None]) -> None:
    if (pid := os.fork()) == 0:
        try:
            work()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)

"""L2: each call that changes the run directory fails, once or from then on, with every error a disk knows.

Either the run says so in an error of its own, or the snapshot is wholly there; what was durable before stays, and
the next start succeeds. Short writes are legal at any time and must cost nothing.
"""

from __future__ import annotations

import errno
import random
from typing import TYPE_CHECKING

import ptrace
from faults import Bench, benches, in_parallel
from lab import Count
from scenarios import SCENARIOS

if TYPE_CHECKING:
    from lab import Lab

NUMBERS = (
    errno.EIO,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EINTR,
    errno.EROFS,
    errno.EACCES,
    errno.ESTALE,
    errno.EMFILE,
)
_INTERRUPTIONS = 5
_SHORT_SAMPLE = 6
_LONG_SAMPLE_OF_RUNS = 40


def run(lab: Lab) -> Count:
    """Every call with every error, once and for ever, in the long form; drawn samples in the short one."""
    if (reason := ptrace.why_not()) is not None:
        return Count(skipped=reason)
    return in_parallel(_Errors(long=lab.long, seed=lab.seed), benches(lab))


class _Errors:
    """All errors at all calls of one scenario."""

    def __init__(self, *, long: bool, seed: int) -> None:
        self._long, self._seed = long, seed

    def __call__(self, bench: Bench) -> Count:
        count, chance = Count(), random.Random(f"{self._seed} {bench.scenario}")
        for at in self._places(len(bench.act(_nothing).calls), chance, is_run=SCENARIOS[bench.scenario].is_run):
            numbers = NUMBERS if self._long else chance.sample(NUMBERS, 2)
            for number in numbers:
                for forever in (False, True) if self._long else (chance.random() < 0.5,):
                    self._one(bench, count, failing(at, number, forever=forever), _name(at, number, forever=forever))
            self._one(bench, count, _short(at), f"short write at call {at}")
        return count

    def _places(self, num_calls: int, chance: random.Random, *, is_run: bool) -> list[int]:
        if self._long and not is_run:
            return list(range(num_calls))
        wanted = _LONG_SAMPLE_OF_RUNS if self._long else _SHORT_SAMPLE
        return sorted(chance.sample(range(num_calls), min(wanted, num_calls)))

    def _one(self, bench: Bench, count: Count, decide: ptrace.Decide, fault: str) -> None:
        outcome = bench.act(decide)
        if not outcome.was_met:
            return
        is_short = fault.startswith("short")
        kind = "short writes" if is_short else fault.split()[0]
        count.add(kind, _untyped(bench, outcome, fault) + bench.judge(outcome, fault))


def _nothing(call: ptrace.Call, index: int) -> None:
    """Let it go on."""


def failing(at: int, number: int, *, forever: bool) -> ptrace.Decide:
    """The call of that number fails; from then on all of its name, if for ever."""
    name, left = "", _INTERRUPTIONS if number == errno.EINTR else -1

    def decide(call: ptrace.Call, index: int) -> ptrace.Fail | None:
        nonlocal name, left
        if index == at:
            name = call.name
        # Python tries an interrupted call again, for ever if it is interrupted for ever (PEP 475).
        if left == 0 or not (index == at or (forever and name and call.name == name)):
            return None
        left -= 1
        return ptrace.Fail(number)

    return decide


def _short(at: int) -> ptrace.Decide:
    """The first write from `at` on takes half of its bytes."""
    done = False

    def decide(call: ptrace.Call, index: int) -> ptrace.Short | None:
        nonlocal done
        if done or index < at or call.name != "write" or call.length < 2:
            return None
        done = True
        return ptrace.Short(call.length // 2)

    return decide


def _name(at: int, number: int, *, forever: bool) -> str:
    return f"{errno.errorcode[number]} {'from' if forever else 'at'} call {at} {'on' if forever else ''}"


def _untyped(bench: Bench, outcome: ptrace.Outcome, fault: str) -> list[str]:
    """Errors that a user would meet as a traceback, and ends by a signal."""
    if outcome.status == 0 or "ResumableTrainerError" in outcome.error:
        return []
    return [f"{bench.scenario}: status {outcome.status}, {outcome.error} [{fault}]"]

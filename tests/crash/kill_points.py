"""L1: SIGKILL just before each call that changes the run directory, in every scenario, and after the last one.

The long form kills the recovery too: at every point of the act, then at one of the next start's.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import ptrace
from faults import Bench, benches, in_parallel
from lab import Count
from scenarios import SCENARIOS

if TYPE_CHECKING:
    from lab import Lab

_SHORT_EVERY = 9


def run(lab: Lab) -> Count:
    """Every kill point in the long form, each ninth (from a drawn one on) in the short form."""
    if (reason := ptrace.why_not()) is not None:
        return Count(skipped=reason)
    first = 0 if lab.long else random.Random(lab.seed).randrange(_SHORT_EVERY)
    step = 1 if lab.long else _SHORT_EVERY
    return in_parallel(_Points(first, step, twice=lab.long, seed=lab.seed), benches(lab))


class _Points:
    """All kill points of one scenario, by number."""

    def __init__(self, first: int, step: int, *, twice: bool, seed: int) -> None:
        self._first, self._step, self._twice, self._seed = first, step, twice, seed

    def __call__(self, bench: Bench) -> Count:
        count, at, chance = Count(), self._first, random.Random(self._seed)
        while True:
            outcome = bench.act(_kill_at(at))
            fault = f"killed before {outcome.calls[-1]}, call {at}" if outcome.was_met else "not killed"
            count.add(bench.scenario, bench.judge(outcome, fault) + _unfinished(bench, outcome))
            if not outcome.was_met:
                return count
            if self._twice:
                outcome = bench.act(_kill_at(at))
                fault += self._kill_the_next_start(bench, chance)
                count.add("recoveries killed too", bench.judge(outcome, fault))
            at += self._step

    def _kill_the_next_start(self, bench: Bench, chance: random.Random) -> str:
        def start(acknowledge: object) -> None:
            SCENARIOS[bench.scenario].act(bench.directory, lambda name: None)

        again = ptrace.trace(start, under=bench.directory, decide=_kill_at(chance.randrange(40)))
        return f", its recovery before {again.calls[-1]}" if again.was_met else ""


def _kill_at(at: int) -> ptrace.Decide:
    return lambda call, index: ptrace.KILL if index == at else None


def _unfinished(bench: Bench, outcome: ptrace.Outcome) -> list[str]:
    """An act that nobody killed must have succeeded, else nothing was tested."""
    if outcome.was_met or outcome.status == 0:
        return []
    return [f"{bench.scenario}: fails without a fault: {outcome.error}"]

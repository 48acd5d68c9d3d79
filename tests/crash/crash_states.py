"""L3: every state that power loss may leave, at every point of every scenario, opened by the real recovery.

One traced run of a scenario gives thousands of states; each distinct one is made in memory and judged once.
"""

from __future__ import annotations

import hashlib
import random
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

import oracle
import ptrace
from faults import Bench, benches, in_parallel
from lab import Count
from model import Model, UnmodelledCallError, materialise
from scenarios import SCENARIOS

if TYPE_CHECKING:
    from lab import Lab
    from model import Disk, Op


@dataclass(frozen=True)
class Size:
    """At most so many states, crash points, and random choices at each point."""

    num_states: int
    num_points: int
    num_random: int


SHORT, LONG = Size(60, 10, 2), Size(10_000, 400, 40)


def run(lab: Lab) -> Count:
    """Up to ten thousand distinct states per scenario in the long form, drawn from all; some dozens in the short."""
    if (reason := ptrace.why_not()) is not None:
        return Count(skipped=reason)
    return in_parallel(_States(long=lab.long, seed=lab.seed), benches(lab))


class _States:
    def __init__(self, *, long: bool, seed: int) -> None:
        self._size = LONG if long else SHORT
        self._seed = seed

    def __call__(self, bench: Bench) -> Count:
        count, chance = Count(), random.Random(f"{self._seed} {bench.scenario}")
        outcome = bench.act(lambda call, index: None, data=True)
        if outcome.status:
            count.add(bench.scenario, [f"{bench.scenario}: fails without a fault: {outcome.error}"])
        try:
            model = Model(bench.root / "base", bench.directory, outcome.calls)
        except UnmodelledCallError as error:
            count.add(bench.scenario, [f"{bench.scenario}: the model does not know {error}"])
            return count
        for acked, disk in distinct(model, chance, self._size):
            count.add(bench.scenario, judge(bench, acked, disk))
        return count


def distinct(model: Model, chance: random.Random, size: Size) -> list[tuple[list[str], Disk]]:
    """Distinct states with what had been acknowledged, drawn evenly from all where there are too many."""
    found: dict[bytes, tuple[int, list[str], list[Op]]] = {}
    points = model.points()
    if len(points) > size.num_points:
        points = sorted(chance.sample(points, size.num_points))
    for at, survivors in model.states(points, chance, num_random=size.num_random):
        acked = model.acked(at)
        key = hashlib.blake2b(repr((acked, sorted(model.disk(survivors).tree()))).encode(), digest_size=16).digest()
        found.setdefault(key, (at, acked, survivors))
    chosen = list(found.values())
    if len(chosen) > size.num_states:
        chosen = chance.sample(chosen, size.num_states)
    return [(acked, model.disk(survivors)) for _, acked, survivors in chosen]


def judge(bench: Bench, acked: list[str], disk: Disk) -> list[str]:
    """What a state breaks."""
    shutil.rmtree(bench.directory, ignore_errors=True)
    materialise(disk, bench.directory.parent)
    found = ", ".join(f"{path}:{'/' if data is None else len(data)}" for path, data in disk.tree())
    broken = oracle.violations(bench.directory, SCENARIOS[bench.scenario], acked)
    return [f"{line} [acked {acked}; {found}]" for line in broken]

"""One scenario, one fault: made ready, struck, judged. Shared by the layers that trace."""

from __future__ import annotations

import functools
import multiprocessing
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import oracle
import ptrace
import torch
from lab import Count
from scenarios import SCENARIOS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from lab import Lab
    from ptrace import Call, Fail, Outcome, Short

Item = TypeVar("Item")


@dataclass(frozen=True)
class Bench:
    """Where one scenario is carried out again and again.

    Attributes:
        scenario: Its name.
        root: A directory for it alone.
    """

    scenario: str
    root: Path

    @property
    def directory(self) -> Path:
        """The run directory under test."""
        return self.root / "run"

    def prepare(self) -> None:
        """Make the durable base once."""
        self.root.mkdir(parents=True)
        SCENARIOS[self.scenario].prepare(self.root / "base")

    def act(self, decide: Callable[[Call, int], Fail | Short | str | None], *, data: bool = False) -> Outcome:
        """Carry out the act on a fresh copy of the base."""
        shutil.rmtree(self.directory, ignore_errors=True)
        if (self.root / "base").exists():
            shutil.copytree(self.root / "base", self.directory, symlinks=True)
        act = functools.partial(SCENARIOS[self.scenario].act, self.directory)
        return ptrace.trace(act, under=self.directory, decide=decide, data=data)

    def judge(self, outcome: Outcome, fault: str) -> list[str]:
        """What the directory breaks after a fault."""
        return [
            f"{line} [{fault}]" for line in oracle.violations(self.directory, SCENARIOS[self.scenario], outcome.acked)
        ]


def make_ready() -> None:
    """What has to be done once before work is spread over forked processes."""
    torch.set_num_threads(1)  # a forked child has no thread pool
    oracle.golden_run()


def benches(lab: Lab, names: Sequence[str] = tuple(SCENARIOS)) -> list[Bench]:
    """A bench for each scenario, made ready."""
    make_ready()
    made = [Bench(name, lab.scratch / name.replace(" ", "-")) for name in names]
    for bench in made:
        bench.prepare()
    return made


def in_parallel(work: Callable[[Item], Count], items: Sequence[Item]) -> Count:
    """All items' counts added up, worked on in as many forked processes as there are cores."""
    total = Count()
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("fork")) as pool:
        for count in pool.map(work, items):
            total.tried += count.tried
            total.detail += count.detail
            total.violations += count.violations
    return total

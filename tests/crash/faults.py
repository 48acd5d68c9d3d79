"""One scenario, one fault: made ready, struck, judged. Shared by the layers that trace."""

from __future__ import annotations

import functools
import multiprocessing
import os
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import oracle
import ptrace
import torch
from lab import Count
from scenarios import SCENARIOS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

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
        lay_base(self.scenario, self.root / "base")

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
    """What is done once: before work is spread over forked processes, and before a deliberate fault is put in."""
    torch.set_num_threads(1)  # a forked child has no thread pool
    oracle.golden_run()
    for scenario in SCENARIOS:
        base_of(scenario)


def lay_base(scenario: str, directory: Path) -> None:
    """Put down a scenario's run directory as it is before the act; nothing if there is none yet."""
    for path, data in base_of(scenario):
        if data is None:
            (directory / path).mkdir()
        else:
            (directory / path).write_bytes(data)


@functools.cache
def base_of(scenario: str) -> list[tuple[str, bytes | None]]:
    """Paths in a scenario's run directory, parents first, with their bytes; None for directories."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "run"
        SCENARIOS[scenario].prepare(directory)
        paths = [directory, *sorted(directory.rglob("*"))] if directory.exists() else []
        return [(os.path.relpath(path, directory), None if path.is_dir() else path.read_bytes()) for path in paths]


def benches(lab: Lab) -> list[Bench]:
    """A bench for each scenario wanted, made ready."""
    make_ready()
    made = [Bench(name, lab.scratch / name.replace(" ", "-")) for name in lab.scenarios or SCENARIOS]
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

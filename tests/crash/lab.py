"""The crash laboratory: what its layers are given, what they give back, and which there are."""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_MEMORY = "/dev/shm"  # noqa: S108 - a directory of random name is made in it
LAYERS = {
    "L1": "kill_points",
    "L2": "injected_errors",
    "L3": "crash_states",
    "L4": "power_loss",
    "L5": "block_replay",
    "L6": "space",
    "L7": "damage",
    "L8": "hostile_files",
    "L9": "random_kills",
}
HOSTILE = Path(__file__).parents[1] / "hostile"  # where layers 7 and 8 are
sys.path.append(str(HOSTILE))


@dataclass(frozen=True)
class Lab:
    """What a layer is given.

    Attributes:
        long: The long form; the short one is for every change.
        seed: Of whatever is drawn.
        scratch: An empty directory of its own.
        say: Shows a line of progress.
        scenarios: Names of those to be used; None: all.
    """

    long: bool
    seed: int
    scratch: Path
    say: Callable[[str], None] = lambda line: None
    scenarios: tuple[str, ...] | None = None


@dataclass
class Count:
    """What a layer has tried.

    Attributes:
        tried: How many faults, states or files.
        violations: One line for each promise that was broken.
        detail: Counts by kind.
        skipped: Why the layer could not be run; None if it was.
    """

    tried: int = 0
    violations: list[str] = field(default_factory=list)
    detail: Counter[str] = field(default_factory=Counter)
    skipped: str | None = None

    def add(self, kind: str, violations: list[str]) -> None:
        """Count one try of a kind, and what it broke."""
        self.tried += 1
        self.detail[kind] += 1
        self.violations += violations

    def __str__(self) -> str:
        if self.skipped is not None:
            return f"skipped: {self.skipped}"
        detail = ", ".join(f"{name} {number:,}" for name, number in self.detail.items())
        return f"{self.tried:,} tried, {len(self.violations)} violations ({detail})"


def run_layer(name: str, lab: Lab) -> Count:
    """Run one layer."""
    count: Count = importlib.import_module(LAYERS[name]).run(lab)
    return count


@contextmanager
def scratch_directory(*, in_memory: bool = True) -> Iterator[Path]:
    """A directory that is gone afterwards; in memory where there is such a place, as it is made anew often."""
    parent = _MEMORY if in_memory and os.access(_MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="crash-lab-", dir=parent) as directory:
        yield Path(directory)

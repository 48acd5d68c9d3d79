"""L4: real file systems cut off from their disk in the middle of each scenario, mounted again, and judged.

In two modes: as a power loss would, and with the journal written first, which leaves more names without their content.
The process is killed before a call that changes the run directory; then the file system is shut down under what
it had not written.
"""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ptrace
import real_disks
from faults import Bench, in_parallel, make_ready
from lab import Count
from real_disks import DROP_LOG, FLUSH_LOG, KINDS

if TYPE_CHECKING:
    from pathlib import Path

    from lab import Lab
    from real_disks import Kind

_SHORT_POINTS, _LONG_POINTS = 2, 22  # of each scenario, in each mode, on each kind of file system used for it
_MODES = {DROP_LOG: "journal lost", FLUSH_LOG: "journal written"}


def run(lab: Lab) -> Count:
    """Some points of every scenario in each mode; on each kind of file system in the long form, on one in the short."""
    if (reason := real_disks.why_not() or ptrace.why_not()) is not None:
        return Count(skipped=reason)
    make_ready()
    kinds = real_disks.usable(lab.say, [kind for kind in KINDS if kind.shuts_down])
    pairs = real_disks.pairs(kinds, lab)
    disks = [_Disk(kind, mode, name, lab.scratch) for kind, name in pairs for mode in _MODES]
    return in_parallel(_Cuts(_LONG_POINTS if lab.long else _SHORT_POINTS, lab.seed), disks)


@dataclass(frozen=True)
class _Disk:
    """One file system for one scenario, shut down in one mode."""

    kind: Kind
    mode: int
    scenario: str
    scratch: Path

    @property
    def root(self) -> Path:
        return self.scratch / f"{self.kind.name} {self.mode} {self.scenario}".replace(" ", "-")

    @property
    def image(self) -> Path:
        return self.root / "image"

    @property
    def place(self) -> Path:
        return self.root / "mounted"

    @property
    def bench(self) -> Bench:
        return Bench(self.scenario, self.place / "bench")


class _Cuts:
    """Some power losses of one disk, by the number of the call before which they come."""

    def __init__(self, num_points: int, seed: int) -> None:
        self._num_points, self._seed = num_points, seed

    def __call__(self, disk: _Disk) -> Count:
        count, chance = Count(), random.Random(f"{self._seed} {disk.root.name}")
        real_disks.private_mounts()
        disk.root.mkdir()
        disk.kind.create(disk.image)
        with disk.kind.mounted(disk.image, disk.place):
            disk.bench.prepare()
            num_calls = len(disk.bench.act(lambda call, index: None).calls)
        for at in sorted(chance.sample(range(num_calls + 1), min(self._num_points, num_calls + 1))):
            count.add(f"{disk.kind.name}, {_MODES[disk.mode]}", _cut(disk, at))
        shutil.rmtree(disk.root)
        return count


def _cut(disk: _Disk, at: int) -> list[str]:
    """What one power loss has broken."""

    def decide(call: ptrace.Call, index: int) -> str | None:
        if index == 0:
            real_disks.flush(disk.place)  # the base is durable, and nothing of the act has been done
        return ptrace.KILL if index == at else None

    with disk.kind.mounted(disk.image, disk.place):
        outcome = disk.bench.act(decide)
        real_disks.shut_down(disk.place, disk.mode)
    where = f"before {outcome.calls[-1]}, call {at}" if outcome.was_met else "after the last call"
    with disk.kind.mounted(disk.image, disk.place):
        return disk.bench.judge(outcome, f"{disk.kind.name} lost power {where}, {_MODES[disk.mode]}")

"""L5: what a real file system wrote to its disk, and every moment at which the disk could have lost power.

Each scenario is carried out once on a file system whose disk keeps a log of writes and flushes. Then disks are made
that hold the writes up to some moment: all that came before the last flush, and of those after it all, none, all but
one, some, or the last one in part, as a disk with a cache may leave them. Each is mounted, and judged.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

import logged_disk
import oracle
import real_disks
from faults import in_parallel, lay_base, make_ready
from lab import Count
from logged_disk import Flush, Write
from real_disks import KINDS
from scenarios import SCENARIOS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lab import Lab
    from logged_disk import Record
    from real_disks import Kind

_SHORT_STATES, _LONG_STATES = 4, 60  # of each scenario on each kind of file system used for it
_SUBSETS = 6
_SECTOR = 512
_BEGIN, _END = "begin", "end"


def run(lab: Lab) -> Count:
    """Some states of every scenario; on each kind of file system in the long form, on one in the short."""
    if (reason := real_disks.why_not()) is not None:
        return Count(skipped=reason)
    make_ready()
    kinds = real_disks.usable(lab.say, KINDS)
    replays = [Replay(kind, name, lab.scratch) for kind, name in real_disks.pairs(kinds, lab)]
    return in_parallel(_States(_LONG_STATES if lab.long else _SHORT_STATES, lab.seed), replays)


class ActFailedError(Exception):
    """A scenario does not succeed though nothing disturbs it."""


@dataclass(frozen=True)
class State:
    """What a disk may hold after power loss.

    Attributes:
        writes: In order, after those of the base.
        acked: Snapshots that had been acknowledged.
        about: Which moment, and what was lost.
    """

    writes: tuple[Write, ...]
    acked: tuple[str, ...]
    about: str

    def key(self) -> bytes:
        """Equal for equal disks after equal acknowledgements."""
        sectors: dict[int, bytes] = {}
        for write in self.writes:
            for at in range(0, len(write.data), _SECTOR):
                sectors[write.offset + at] = write.data[at : at + _SECTOR]
        digest = hashlib.blake2b(repr(self.acked).encode(), digest_size=16)
        for offset in sorted(sectors):
            digest.update(offset.to_bytes(8))
            digest.update(sectors[offset])
        return digest.digest()


def states(log: list[Record], chance: random.Random) -> Iterator[State]:
    """Every moment from the beginning mark to the end mark, with what a disk's cache may do to it."""
    durable: list[Write] = []
    pending: list[Write] = []
    acked: list[str] = []
    is_under_way = False
    for moment, record in enumerate(log):
        if isinstance(record, Write):
            pending.append(record)
        elif isinstance(record, Flush):
            durable, pending = durable + pending, []
        elif record.word in (_BEGIN, _END):
            is_under_way = record.word == _BEGIN
        else:
            acked.append(record.word)
        if is_under_way:
            for kept, about in _survivors(pending, chance):
                yield State((*durable, *kept), tuple(acked), f"power lost after request {moment}, {about}")
    for kept, about in _survivors(pending, chance):
        yield State((*durable, *kept), tuple(acked), f"power lost at the end, {about}")


def _survivors(pending: list[Write], chance: random.Random) -> Iterator[tuple[list[Write], str]]:
    """Which of the writes since the last flush have reached the disk."""
    yield pending, "all written"
    if not pending:
        return
    yield [], f"{len(pending)} writes lost"
    last = pending[-1]
    half = len(last.data) // 2 // _SECTOR * _SECTOR
    yield [*pending[:-1], Write(last.offset, last.data[:half])], "the last write torn"
    for index in range(len(pending) - 1):
        yield pending[:index] + pending[index + 1 :], f"write {index} of {len(pending)} lost"
    for _ in range(_SUBSETS if len(pending) > 2 else 0):
        kept = [write for write in pending if chance.random() < 0.5]
        yield kept, f"{len(pending) - len(kept)} of {len(pending)} writes lost"


@dataclass(frozen=True)
class Replay:
    """One scenario on one kind of file system."""

    kind: Kind
    scenario: str
    scratch: Path

    @property
    def root(self) -> Path:
        """A directory for it alone."""
        return self.scratch / f"{self.kind.name} {self.scenario}".replace(" ", "-")

    @property
    def place(self) -> Path:
        """Where the file system is mounted, each time."""
        return self.root / "mounted"

    def record(self) -> list[Record]:
        """Carry out the scenario on a logged disk; leaves the image from before as `base`."""
        made, base, served = self.root / "made", self.root / "base", self.root / "served"
        self.kind.create(made)
        with self.kind.mounted(made, self.place):
            lay_base(self.scenario, self.place / "run")
        real_disks.copy_sparsely(made, base)
        made.unlink()
        real_disks.copy_sparsely(base, self.root / "image")
        with (
            logged_disk.logged_disk(self.root / "image", served, self.root / "log") as disk,
            self.kind.mounted(disk, self.place),
        ):
            real_disks.flush(self.place)
            logged_disk.say(served, _BEGIN)
            self._act(served)
            logged_disk.say(served, _END)
        return logged_disk.records(self.root / "log")

    def _act(self, served: Path) -> None:
        """Let a child do it, so that nothing of it stays in this process."""
        child = os.fork()
        if child == 0:
            status = 1
            try:
                SCENARIOS[self.scenario].act(self.place / "run", lambda name: logged_disk.say(served, name))
                status = 0
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        if status:
            raise ActFailedError(f"{self.scenario}: fails on {self.kind.name} without power loss")

    def judge(self, state: State) -> list[str]:
        """What a recovery from this state breaks."""
        image = self.root / "image"
        real_disks.copy_sparsely(self.root / "base", image)
        with image.open("r+b", buffering=0) as file:
            for write in state.writes:
                file.seek(write.offset)
                file.write(write.data)
        with self.kind.mounted(image, self.place):
            broken = oracle.violations(self.place / "run", SCENARIOS[self.scenario], state.acked)
        return [f"{line} [{self.kind.name}: {state.about}]" for line in broken]


class _States:
    """Some distinct states of one replay."""

    def __init__(self, limit: int, seed: int) -> None:
        self._limit, self._seed = limit, seed

    def __call__(self, replay: Replay) -> Count:
        count, chance = Count(), random.Random(f"{self._seed} {replay.root.name}")
        real_disks.private_mounts()
        replay.root.mkdir()
        try:
            found = list(states(replay.record(), chance))
        except ActFailedError as error:
            found = []
            count.add(replay.kind.name, [str(error)])
        for state in _distinct(found, self._limit, chance):
            count.add(replay.kind.name, replay.judge(state))
        shutil.rmtree(replay.root)
        return count


def _distinct(found: list[State], limit: int, chance: random.Random) -> Iterator[State]:
    """Up to so many of them, drawn evenly, no two alike."""
    seen: set[bytes] = set()
    chance.shuffle(found)
    for state in found:
        if len(seen) == limit:
            return
        if (key := state.key()) not in seen:
            seen.add(key)
            yield state

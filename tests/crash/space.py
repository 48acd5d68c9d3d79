"""L6: every scenario on a real file system that has room for less than it needs: in bytes, and in file entries.

The package looks for room before it writes, so each size is met three ways: with that look; with one that sees no
limit; and with another writer who takes the room right after the look. Whatever happens, what was acknowledged
stays, an error is one of ours, and with room again the next start succeeds to the bit.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING
from unittest.mock import patch

import oracle
import ptrace
import real_disks
from faults import in_parallel, lay_base, make_ready
from lab import Count
from real_disks import KINDS
from scenarios import SCENARIOS

from resumable_trainer.durable.filesystem import Room, room
from resumable_trainer.errors import ResumableTrainerError
from resumable_trainer.snapshot import committer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from lab import Lab
    from real_disks import Kind

_KIB, _MIB = 1 << 10, 1 << 20
_STEP_BYTES = 4 * _KIB  # a block
_LARGEST = 320 * _KIB  # a snapshot of the scenarios asks for half of it
_LONG_ENTRIES = range(40)
_SHORT_SAMPLE = 3
_ROOMY_BYTES, _ROOMY_ENTRIES = 32 * _MIB, 10_000
LOOKING, BLIND, EATEN = "looks", "sees no limit", "room taken after the look"
WAYS = (LOOKING, BLIND, EATEN)


def run(lab: Lab) -> Count:
    """Every size on each kind of file system in each way in the long form; some of them in the short one."""
    if (reason := real_disks.why_not()) is not None:
        return Count(skipped=reason)
    make_ready()
    images = {kind.name: kind for kind in real_disks.usable(lab.say, KINDS)}
    kinds = ["tmpfs", "entries", *images]
    names = lab.scenarios or tuple(SCENARIOS)
    if lab.long:
        pairs = [(kind, name) for kind in kinds for name in names]
    else:
        others = [(kinds[1 + (lab.seed + place) % (len(kinds) - 1)], name) for place, name in enumerate(names)]
        pairs = [("tmpfs", name) for name in names] + others
    disks = [small_disk(kind, lab.scratch / f"{kind} {name}".replace(" ", "-"), images) for kind, name in pairs]
    work = [(disk, name) for disk, (_, name) in zip(disks, pairs, strict=True)]
    count = in_parallel(_Sizes(long=lab.long, seed=lab.seed), work)
    lab.say(f"{sum(len(_sizes(kind)) for kind in kinds) if lab.long else _SHORT_SAMPLE * len(pairs)} sizes")
    return count


def _sizes(kind: str) -> range:
    if kind == "entries":
        return _LONG_ENTRIES
    return range(0, _LARGEST, _STEP_BYTES if kind == "tmpfs" else 2 * _STEP_BYTES)


# -- small file systems -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tmpfs:
    """A file system in memory, whose size can be changed while it is mounted.

    Attributes:
        root: A directory for it alone.
    """

    root: Path
    kind: str = "tmpfs"

    @property
    def place(self) -> Path:
        """Where it is mounted."""
        return self.root / "mounted"

    @contextlib.contextmanager
    def mounted(self) -> Iterator[None]:
        """The file system, until the block ends."""
        self.place.mkdir(parents=True)
        with real_disks.tmpfs(self.place, self._roomy):
            yield

    @property
    def _roomy(self) -> str:
        return f"size={_ROOMY_BYTES},nr_inodes={_ROOMY_ENTRIES}"

    def leave(self, num: int) -> None:
        """Let so many bytes be free."""
        found = os.statvfs(self.place)
        used = (found.f_blocks - found.f_bfree) * found.f_frsize
        # A size of 0 means no limit; one that is not a multiple of a page is rounded up.
        real_disks.remount_tmpfs(self.place, f"size={max(used + num, _STEP_BYTES)}")

    def make_room(self) -> None:
        """Let there be plenty."""
        real_disks.remount_tmpfs(self.place, self._roomy)


class Entries(Tmpfs):
    """The same, short of file entries (inodes)."""

    def leave(self, num: int) -> None:
        """Let so many entries be free."""
        found = os.statvfs(self.place)
        real_disks.remount_tmpfs(self.place, f"nr_inodes={found.f_files - found.f_ffree + num}")


@dataclass(frozen=True)
class Filled:
    """A file system on an image file, filled by a file of somebody else.

    Attributes:
        root: A directory for it alone.
        image_kind: What it is.
    """

    root: Path
    image_kind: Kind

    @property
    def kind(self) -> str:
        """Its name."""
        return self.image_kind.name

    @property
    def place(self) -> Path:
        """Where it is mounted."""
        return self.root / "mounted"

    @contextlib.contextmanager
    def mounted(self) -> Iterator[None]:
        """The file system, until the block ends."""
        self.root.mkdir()
        self.image_kind.create(self.root / "image")
        with self.image_kind.mounted(self.root / "image", self.place):
            yield
        (self.root / "image").unlink()

    def leave(self, num: int) -> None:
        """Let about so many bytes be free: some file systems keep a little back, and count it as free."""
        fd = os.open(self.place / "ballast", os.O_RDWR | os.O_CREAT)
        piece = 64 * _MIB
        try:
            while piece >= _STEP_BYTES:
                free = room(self.place).num_bytes or 0
                size = os.fstat(fd).st_size
                wanted = min(piece, free - num) // _STEP_BYTES * _STEP_BYTES
                try:
                    os.posix_fallocate(fd, size, max(wanted, 0) or 1)
                except OSError:
                    os.ftruncate(fd, size)
                    piece //= 2
                    continue
                if wanted < piece:
                    return
        finally:
            os.close(fd)

    def make_room(self) -> None:
        """Let there be plenty."""
        (self.place / "ballast").unlink(missing_ok=True)


SmallDisk = Tmpfs | Filled


def small_disk(kind: str, root: Path, images: dict[str, Kind]) -> SmallDisk:
    """A small file system of that kind."""
    if kind in images:
        return Filled(root, images[kind])
    return Entries(root, kind) if kind == "entries" else Tmpfs(root)


# -- one scenario on one file system ------------------------------------------------------------------


class _Sizes:
    """All sizes, in all ways, of one scenario on one file system."""

    def __init__(self, *, long: bool, seed: int) -> None:
        self._long, self._seed = long, seed

    def __call__(self, work: tuple[SmallDisk, str]) -> Count:
        disk, scenario = work
        count, chance = Count(), random.Random(f"{self._seed} {disk.root.name}")
        real_disks.private_mounts()
        with disk.mounted():
            for num, way in self._tries(disk.kind, chance):
                outcome = _act(disk, scenario, num, way)
                count.add(f"{disk.kind}: {_ending(outcome)}", _judge(disk, scenario, outcome, f"{num} free, {way}"))
        return count

    def _tries(self, kind: str, chance: random.Random) -> Sequence[tuple[int, str]]:
        sizes = _sizes(kind)
        if self._long:
            return [(num, way) for num in sizes for way in WAYS]
        # Of those that let a run begin, and not all of it fit.
        return [(chance.choice(sizes[1 : len(sizes) // 2]), way) for way in WAYS]


def _act(disk: SmallDisk, scenario: str, num: int, way: str) -> ptrace.Outcome:
    """Carry out a scenario with so much room, in a process of its own."""
    directory = disk.place / "run"
    disk.make_room()
    shutil.rmtree(directory, ignore_errors=True)
    lay_base(scenario, directory)
    if way != EATEN:
        disk.leave(num)

    def look(path: Path) -> Room:
        found = room(path)
        if way == BLIND:
            return Room(None, None)
        if way == EATEN and found.holds(num_bytes=_ROOMY_BYTES // 8, files=0):
            disk.leave(num)
        return found

    def act(acknowledge: Callable[[str], None]) -> None:
        with patch.object(committer, "room", look):
            SCENARIOS[scenario].act(directory, acknowledge)

    return carry_out(act)


def carry_out(act: Callable[[Callable[[str], None]], None]) -> ptrace.Outcome:
    """Run `act` in a forked child that nothing watches."""
    said, saying = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            act(lambda name: ptrace.void(os.write(saying, f"{name}\n".encode())))
        except BaseException as error:  # noqa: BLE001 - told to the parent
            kind = "" if isinstance(error, ResumableTrainerError) else "NOT OURS: "
            os.write(saying, f"error {kind}{type(error).__name__}: {error}".replace("\n", " ").encode())
            os._exit(7)
        os._exit(0)
    os.close(saying)
    with os.fdopen(said) as file:
        lines = file.read().splitlines()
    outcome = ptrace.Outcome(status=os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    outcome.acked = [line for line in lines if not line.startswith("error ")]
    outcome.error = "".join(line for line in lines if line.startswith("error "))
    return outcome


def _ending(outcome: ptrace.Outcome) -> str:
    """In which of the ways that are to be met a scenario has ended."""
    if outcome.status == 0:
        return "fitted"
    return "refused by the look" if "it needs" in outcome.error else "failed in a write"


def _judge(disk: SmallDisk, scenario: str, outcome: ptrace.Outcome, fault: str) -> list[str]:
    """What the shortage has broken, once there is room again."""
    wrong = []
    if outcome.status != 0 and (outcome.status != 7 or "NOT OURS" in outcome.error):
        wrong.append(f"{scenario}: status {outcome.status}, {outcome.error}")
    disk.make_room()
    wrong += oracle.violations(disk.place / "run", SCENARIOS[scenario], outcome.acked)
    return [f"{line} [{disk.kind}, {fault}]" for line in wrong]

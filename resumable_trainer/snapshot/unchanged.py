"""Files that hold what an earlier snapshot's file holds: linked from there, not written again.

Policy: only bytes decide. What would be written is hashed in memory, and linked if the newest durable snapshot's
manifest lists a file of this name, length and digest. That costs a read of memory, and so is tried only where it is
likely to pay: with large files of what is frozen, or that were the same the last time.

One rotten block must not take all snapshots that are kept. So two snapshots that follow each other never share a file
(each is linked from the one before its neighbour, so that there are two copies by turns), the first snapshot of a
process writes its files, and a file serves `MAX_USES` snapshots at most. Where retention keeps a single snapshot,
there is nothing to share a loss with, and the file is linked on.

A link needs no sync of the file: its bytes were synced before the snapshot that it is taken from was committed. Its
name is made durable with the directory's other entries.
"""

from __future__ import annotations

import os
import stat
from collections import Counter, deque
from typing import TYPE_CHECKING

from resumable_trainer.snapshot.layout import FROZEN, TENSORS_SUFFIX

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from resumable_trainer.durable.files import Files
    from resumable_trainer.snapshot.manifest import FileEntry

MAX_USES = 50
WORTH_BYTES = 1 << 20  # what is smaller is written again: it costs less than to think about it
_REMEMBERED = 3


class Unchanged:
    """Knows the newest durable snapshots, and what in them can be used once more."""

    def __init__(self) -> None:
        self._snapshots: deque[tuple[Path, Mapping[str, FileEntry]]] = deque(maxlen=_REMEMBERED)
        self._uses: Counter[int] = Counter()

    def start_from(self, directory: Path | None, entries: Mapping[str, FileEntry]) -> None:
        """A snapshot that verifies is the newest; of older ones nothing is known."""
        self._snapshots.clear()
        if directory is not None:
            self._snapshots.append((directory, entries))

    def committed(self, directory: Path, entries: Mapping[str, FileEntry]) -> None:
        """A snapshot has become durable, and is the newest."""
        self._snapshots.append((directory, entries))

    def is_likely(self, name: str) -> bool:
        """Whether hashing a file before it is written is likely to spare the writing."""
        if not self._snapshots:
            return False
        newest = self._snapshots[-1][1].get(name)
        if newest is None or newest.num_bytes < WORTH_BYTES:
            return False
        if name.endswith(FROZEN + TENSORS_SUFFIX):
            return True
        return len(self._snapshots) > 1 and self._snapshots[-2][1].get(name) == newest

    def link(self, files: Files, target: Path, entry: FileEntry) -> bool:
        """Make `target` a link to a file that holds what `entry` says; False if there is none that may be used."""
        for source in self._sources(target.name, entry):
            number = _number_of(source, entry)
            if number is None or self._uses[number] >= MAX_USES:
                continue
            try:
                files.link(source, target)
            except OSError:  # a file system without links, or with too many: it is written
                return False
            self._uses[number] += 1
            return True
        return False

    def _sources(self, name: str, entry: FileEntry) -> Iterator[Path]:
        """Files of earlier snapshots with this content, the best first."""
        holders = [directory / name for directory, entries in self._snapshots if entries.get(name) == entry]
        if not holders or self._snapshots[-1][1].get(name) != entry:
            return
        *older, newest = holders
        mine = _number_of(newest, entry)
        still_there = [path for path in reversed(older) if _number_of(path, entry) is not None]
        yield from (path for path in still_there if _number_of(path, entry) != mine)
        if older and not still_there:
            yield newest


def _number_of(path: Path, entry: FileEntry) -> int | None:
    """The file's number on its file system; None if it is no regular file of this length any more."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_ino if stat.S_ISREG(found.st_mode) and found.st_size == entry.num_bytes else None

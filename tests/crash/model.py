"""What a disk may hold after power loss: every state that POSIX allows, made from the trace of one run.

The model is the weakest that POSIX admits (the method is that of ALICE, Pillai et al., OSDI 2014): written
bytes are safe once their file is synced, names once their directory is synced; anything else may be there or
not, in any order, and the last write may be torn. A rename is atomic within a directory; across two, the new
name may come without the old one going, never the reverse. Syncing a file says nothing about its name.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator, Sequence

    from ptrace import Call

_HARMLESS = frozenset({"close", "flock", "chmod", "fchmod", "fchmodat", "sync_file_range", "ack"})


class UnmodelledCallError(Exception):
    """A call that the model does not know; to skip it silently would make the layer lie."""


@dataclass
class Op:
    """One change that power loss may undo.

    Attributes:
        inode: The file or directory that is changed.
        name: Of the directory entry; "" for a file's bytes.
        child: What the entry names from then on; None: the entry goes.
        offset: Where bytes go.
        data: The bytes; None: the file is cut at `offset`.
        needs: An operation without which this one does not happen.
        synced_by: Index of the call that made it durable; None: none did.
        at: Index of the call that made it.
    """

    inode: int
    name: str = ""
    child: int | None = None
    offset: int = 0
    data: bytes | None = None
    needs: Op | None = None
    synced_by: int | None = None
    at: int = 0

    @property
    def is_write(self) -> bool:
        """Whether it puts bytes into a file."""
        return self.data is not None


@dataclass
class Disk:
    """Directories as name -> inode, files as bytes."""

    directories: dict[int, dict[str, int]] = field(default_factory=dict)
    files: dict[int, bytearray] = field(default_factory=dict)

    def copy(self) -> Disk:
        """One that can be changed on its own."""
        return Disk({i: dict(d) for i, d in self.directories.items()}, {i: bytearray(f) for i, f in self.files.items()})

    def apply(self, op: Op) -> None:
        """Carry out an operation."""
        if op.name and op.child is None:
            self.directories[op.inode].pop(op.name, None)
        elif op.name:
            assert op.child is not None
            self.directories[op.inode][op.name] = op.child
        elif op.data is None:
            file = self.files[op.inode]
            del file[op.offset :]
            file.extend(bytes(op.offset - len(file)))
        else:
            file = self.files[op.inode]
            file.extend(bytes(max(0, op.offset - len(file))))
            file[op.offset : op.offset + len(op.data)] = op.data

    def tree(self, root: int = 0, prefix: str = "") -> Iterator[tuple[str, bytes | None]]:
        """Every path below a directory: bytes of a file, None for a directory."""
        for name, inode in sorted(self.directories[root].items()):
            if inode in self.files:
                yield prefix + name, bytes(self.files[inode])
            else:
                yield prefix + name, None
                yield from self.tree(inode, f"{prefix}{name}/")


class Model:
    """The operations of one trace over a durable base.

    Args:
        base: The run directory before; it may not be there.
        directory: The run directory as it is named in the trace.
        calls: What was done, with data and results.
    """

    def __init__(self, base: Path, directory: Path, calls: Sequence[Call]) -> None:
        self._top = str(directory.parent)
        self.base = Disk({0: {}})
        self._next = 1
        if base.exists():
            self.base.directories[0][directory.name] = self._take_in(base)
        self._live = self.base.copy()
        self.ops: list[Op] = []
        self.acks: list[tuple[int, str]] = []
        for index, call in enumerate(calls):
            self._take(index, call)

    def _take_in(self, path: Path) -> int:
        inode, self._next = self._next, self._next + 1
        if path.is_dir():
            self.base.directories[inode] = {}
            for entry in sorted(path.iterdir()):
                self.base.directories[inode][entry.name] = self._take_in(entry)
        else:
            self.base.files[inode] = bytearray(path.read_bytes())
        return inode

    def _find(self, path: str) -> int | None:
        inode = 0
        for part in Path(os.path.relpath(path, self._top)).parts:
            found = self._live.directories.get(inode, {}).get(part)
            if found is None:
                return None
            inode = found
        return inode

    def _parent(self, path: str) -> tuple[int, str]:
        inode = self._find(os.path.dirname(path))
        assert inode is not None, path
        return inode, os.path.basename(path)

    def _do(self, index: int, op: Op) -> Op:
        op.at = index
        self.ops.append(op)
        self._live.apply(op)
        return op

    def _take(self, index: int, call: Call) -> None:
        if call.name == "ack":
            self.acks += [(index, name) for name in call.data.decode().split()]
        if call.name in _HARMLESS or (call.result or 0) < 0 or call.path.endswith(" (deleted)"):
            return
        handler = getattr(self, f"_{call.name}", None)
        if handler is None:
            raise UnmodelledCallError(str(call))
        handler(index, call)

    def _openat(self, index: int, call: Call) -> None:
        inode = self._find(call.path)
        if inode is None:
            inode, self._next = self._next, self._next + 1
            self.base.files[inode] = bytearray()
            self._live.files[inode] = bytearray()
            directory, name = self._parent(call.path)
            self._do(index, Op(directory, name, inode))
        elif call.flags & os.O_TRUNC and inode in self._live.files:
            self._do(index, Op(inode))

    _open = _openat

    def _mkdir(self, index: int, call: Call) -> None:
        inode, self._next = self._next, self._next + 1
        self.base.directories[inode] = {}
        self._live.directories[inode] = {}
        directory, name = self._parent(call.path)
        self._do(index, Op(directory, name, inode))

    _mkdirat = _mkdir

    def _write(self, index: int, call: Call) -> None:
        inode = self._find(call.path)
        assert inode is not None, call
        offset = len(self._live.files[inode]) if call.offset is None else call.offset
        self._do(index, Op(inode, offset=offset, data=call.data[: call.result]))

    _pwrite64 = _writev = _sendfile = _copy_file_range = _write

    def _ftruncate(self, index: int, call: Call) -> None:
        inode = self._find(call.path)
        assert inode is not None, call
        self._do(index, Op(inode, offset=call.length))

    def _fsync(self, index: int, call: Call) -> None:
        inode = self._find(call.path)
        for op in self.ops:
            if op.inode == inode and op.synced_by is None:
                op.synced_by = index

    _fdatasync = _fsync

    def _rename(self, index: int, call: Call) -> None:
        inode = self._find(call.path)
        if inode is None:
            raise UnmodelledCallError(f"{call} from outside the directory")
        (source, old), (target, new) = self._parent(call.path), self._parent(call.target)
        arrives = self._do(index, Op(target, new, inode))
        leaves = self._do(index, Op(source, old, needs=arrives))
        if source == target:
            arrives.needs = leaves  # one entry changes: both or none

    _renameat = _renameat2 = _rename

    def _link(self, index: int, call: Call) -> None:
        inode = self._find(call.path)
        if inode is None:
            raise UnmodelledCallError(f"{call} from outside the directory")
        directory, name = self._parent(call.target)
        self._do(index, Op(directory, name, inode))

    _linkat = _link

    def _unlink(self, index: int, call: Call) -> None:
        directory, name = self._parent(call.path)
        self._do(index, Op(directory, name))

    _rmdir = _unlinkat = _unlink

    # -- states ---------------------------------------------------------------------------------------

    def points(self) -> list[int]:
        """After which calls a crash makes a difference."""
        synced = {op.synced_by for op in self.ops if op.synced_by is not None}
        return sorted({op.at for op in self.ops} | synced | {index for index, _ in self.acks})

    def states(
        self, points: Sequence[int], chance: random.Random, *, num_random: int
    ) -> Iterator[tuple[int, list[Op]]]:
        """Crash points with the operations that survive, as many as the scheme gives; duplicates among them."""
        for at in points:
            safe = [op for op in self.ops if op.at <= at and op.synced_by is not None and op.synced_by <= at]
            open_ops = [op for op in self.ops if op.at <= at and not (op.synced_by is not None and op.synced_by <= at)]
            for chosen in _choices(open_ops, chance, num_random):
                for survivors in _torn(safe, chosen):
                    yield at, self._possible(survivors)

    def _possible(self, survivors: list[Op]) -> list[Op]:
        """In their order, without those that need one which is lost."""
        kept = {id(op) for op in survivors}
        while True:
            fewer = {id(o) for o in survivors if id(o) in kept and (o.needs is None or id(o.needs) in kept)}
            if fewer == kept:
                return sorted((op for op in survivors if id(op) in kept), key=lambda op: op.at)
            kept = fewer

    def disk(self, survivors: Sequence[Op]) -> Disk:
        """What is found after the crash."""
        disk = self.base.copy()
        for op in survivors:
            disk.apply(op)
        return disk

    def acked(self, at: int) -> list[str]:
        """What had been acknowledged by then."""
        return [name for index, name in self.acks if index <= at]


def _choices(ops: list[Op], chance: random.Random, num_random: int) -> Iterator[list[Op]]:
    """None, all, each dropped, each alone, every prefix, random subsets."""
    yield []
    yield ops
    for place in range(len(ops)):
        yield ops[:place] + ops[place + 1 :]
        yield [ops[place]]
        yield ops[:place]
    for _ in range(num_random if len(ops) > 2 else 0):
        yield [op for op in ops if chance.random() < 0.5]


def _torn(safe: list[Op], chosen: list[Op]) -> Iterator[list[Op]]:
    """As chosen; with the last write halved; with its bytes zero."""
    yield safe + chosen
    last = next((op for op in reversed(chosen) if op.is_write and len(op.data or b"") > 1), None)
    if last is None:
        return
    assert last.data is not None
    others = [op for op in chosen if op is not last]
    for data in (last.data[: len(last.data) // 2], bytes(len(last.data))):
        torn = Op(last.inode, offset=last.offset, data=data, at=last.at)
        yield safe + sorted([*others, torn], key=lambda op: op.at)


def materialise(disk: Disk, top: Path) -> None:
    """Make the files and directories."""
    for path, data in disk.tree():
        if data is None:
            (top / path).mkdir()
        else:
            (top / path).write_bytes(data)

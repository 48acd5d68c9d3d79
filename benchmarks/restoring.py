"""1.1 GB put back into live tensors: verified, in place, every page touched.

The files are in the page cache for all arms: what is measured is the work of restoring, not the disk. Then once more
with nothing of them there, as after our own large snapshots, which go past it, and on another machine.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import xxhash

from benchmarks import jobs
from benchmarks.machine import CORES, big_bytes, gigabytes
from benchmarks.savers import Own, TorchSave
from benchmarks.table import Goal, Row, Side
from benchmarks.timing import Bench, alternately, timed

if TYPE_CHECKING:
    import io
    from collections.abc import Callable, Iterator, Mapping

    from torch import nn

    from benchmarks.worker import Laps

_PAGE = 4096
_CHUNK = 2 << 20


def restores(bench: Bench) -> Iterator[Row]:
    """Against torch.load with load_state_dict, and against reading the bytes and copying them."""
    m = bench.in_child("restoring:measure", threads=1, num_bytes=big_bytes(bench), rounds=bench.pick(7, 3))
    what = f"restore of {gigabytes(bench)}: verified, in place, touched"
    note = "" if m["in place"] else "the live tensors were replaced, not filled"
    own = Side("own", m["own"], durability="verified")
    load, read = (
        Side("torch.load + load_state_dict", m["load"], durability="not verified"),
        Side("read + copy", m["read"]),
    )
    bound = Side("read into the live tensors by two threads, each of which verifies its own share", m["read alone"])
    yield Row("restore", what, own, load, "times faster", Goal(2, at_least=True), bound=bound, note=note)
    yield Row("restore", what, own, read, goal=Goal(1.5), bound=bound)
    own = Side("own", m["own from disk"], durability="verified")
    load = Side("torch.load + load_state_dict", m["load from disk"], durability="not verified")
    yield Row("restore", f"{what}, nothing of it in the page cache", own, load, "times faster")


def measure(laps: Laps, *, num_bytes: int, rounds: int, directory: str) -> None:
    """For a child: ways into the same live tensors."""
    root = Path(directory)
    model, optimizer = jobs.big_state(num_bytes)
    own = Own(root / "own", {"model": model, "optimizer": optimizer})
    save = TorchSave(root, model, optimizer)
    own.save(), own.save(), save.save()  # two, as a run has that keeps several: there is one to fall back to
    tensors = jobs.tensors_of(model, optimizer)
    (root / "raw").write_bytes(b"".join(tensor.numpy().tobytes() for tensor in tensors))
    at_first = _places(model, optimizer)
    own.manager.restore()
    in_place = _places(model, optimizer) == at_first

    def own_restore() -> None:
        own.manager.restore()
        touch(model, optimizer)

    def load() -> None:
        found = torch.load(save.path)
        model.load_state_dict(found["model"])
        optimizer.load_state_dict(found["optimizer"])
        torch.set_rng_state(found["torch"])
        touch(model, optimizer)

    buffer = torch.empty(jobs.num_bytes_of(tensors), dtype=torch.uint8)
    buffer.fill_(1)

    def read() -> None:
        with (root / "raw").open("rb", buffering=0) as file:
            fill(buffer, file)
        place = 0
        for tensor in jobs.tensors_of(model, optimizer):
            size = tensor.numel() * tensor.element_size()
            tensor.copy_(buffer[place : place + size].view(tensor.dtype).view(tensor.shape))
            place += size
        touch(model, optimizer)

    def read_alone() -> None:
        """By as many threads as ours has: each reads a part, and verifies it by itself."""
        views, begin = [], 0
        for tensor in tensors:
            view = memoryview(tensor.view(-1).view(torch.uint8).numpy())
            views += [(view[at : at + _CHUNK], begin + at) for at in range(0, len(view), _CHUNK)]
            begin += len(view)
        chunks = iter(views)
        with (root / "raw").open("rb", buffering=0) as file, ThreadPoolExecutor(2) as pool:
            done = [pool.submit(read_chunks, file.fileno(), chunks) for _ in range(min(2, CORES))]
            for each in done:
                each.result()
        touch(model, optimizer)

    def arm(name: str, act: Callable[[], object]) -> Mapping[str, float]:
        have_in_cache(root)
        found = {name: timed(act)}
        if name in ("own", "load"):
            forget(root)
            found[f"{name} from disk"] = timed(act)
        return found

    arms = [
        lambda: arm("own", own_restore),
        lambda: arm("load", load),
        lambda: arm("read", read),
        lambda: arm("read alone", read_alone),
    ]
    laps.turn({**alternately(arms, rounds=rounds), "in place": in_place})


def have_in_cache(root: Path) -> None:
    """Read all files below a directory."""
    for path in _files(root):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 22):
                pass


def forget(root: Path) -> None:
    """Let the page cache forget all files below a directory; nothing where the system has no such call."""
    for path in _files(root):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _files(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file()]


def read_chunks(fd: int, chunks: Iterator[tuple[memoryview, int]]) -> None:
    """Read each into its memory, and hash it there."""
    digest = xxhash.xxh3_128()
    for view, offset in chunks:
        assert os.preadv(fd, [view], offset) == len(view)
        digest.update(view)


def fill(tensor: torch.Tensor, file: io.FileIO) -> None:
    """Read the bytes of a contiguous tensor."""
    view, place = memoryview(tensor.view(-1).view(torch.uint8).numpy()), 0
    while place < len(view):
        place += file.readinto(view[place:]) or 0


def touch(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Read a value of every page: a loader that maps its file pays here."""
    for tensor in jobs.tensors_of(model, optimizer):
        tensor.view(-1)[:: _PAGE // tensor.element_size()].sum()


def _places(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[int]:
    return [tensor.data_ptr() for tensor in jobs.tensors_of(model, optimizer)]

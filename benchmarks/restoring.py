"""1.1 GB put back into live tensors: verified, in place, every page touched.

The files are in the page cache for all arms: what is measured is the work of restoring, not the disk.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks import jobs
from benchmarks.machine import big_bytes, gigabytes
from benchmarks.savers import Own, TorchSave
from benchmarks.table import Goal, Row, Side
from benchmarks.timing import Bench, alternately, timed

if TYPE_CHECKING:
    import io
    from collections.abc import Iterator, Mapping

    from torch import nn

    from benchmarks.worker import Laps

_PAGE = 4096


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
    bound = Side("read into the live tensors, not verified", m["read alone"])
    yield Row("restore", what, own, load, "times faster", Goal(2, at_least=True), bound=bound, note=note)
    yield Row("restore", what, own, read, goal=Goal(1.5), bound=bound)


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
        with (root / "raw").open("rb", buffering=0) as file:
            for tensor in jobs.tensors_of(model, optimizer):
                fill(tensor, file)
        touch(model, optimizer)

    def arm(name: str, act: object) -> Mapping[str, float]:
        return {name: timed(act)}  # type: ignore[arg-type]

    arms = [
        lambda: arm("own", own_restore),
        lambda: arm("load", load),
        lambda: arm("read", read),
        lambda: arm("read alone", read_alone),
    ]
    laps.turn({**alternately(arms, rounds=rounds), "in place": in_place})


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

"""Staging: copies in host memory that later training cannot change.

Invariant: after `stage` returns, no tensor of the result shares memory with a live one: 0-dim
optimizer steps and BatchNorm buffers on the CPU included. Four published systems wrote snapshots
of a later step than they said because `state_dict()` hands out live tensors.

Cost: one memory copy of the state; the training thread waits for exactly this and no longer. An `Arena` is
asked for memory once: fresh pages for each snapshot would cost more than the copy itself. What is on CUDA devices is
copied there, and arrives while training goes on: see `on_device`.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import torch

from resumable_trainer.state.compare import same_bytes
from resumable_trainer.state.on_device import AT_ONCE_BYTES, Carrier, Devices, Pin
from resumable_trainer.state.overlap import Copying

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    from resumable_trainer.state.cuda import Cuda
    from resumable_trainer.state.on_device import Crossing

Named = dict[str, dict[str, torch.Tensor]]
# Targets and their sources; or a tensor, and the rows of which it is to consist.
Portion = tuple["Sequence[torch.Tensor] | torch.Tensor", "Sequence[torch.Tensor]"]
_ALIGNMENT = mmap.PAGESIZE  # of a section, so that it can go to the disk as it lies; gaps within as dtypes ask for
_HUGE_BYTES = 8 << 20  # from here on memory comes in huge pages, where the system has them
_MANY_TENSORS = 1024  # from here on the calls cost more than their bytes, and threads share them
_LARGE_BYTES = 64 << 20  # from here on a thread more is worth its start: one core leaves the memory half idle
_PORTION_BYTES = 4 << 20
_MOST_THREADS = 4
_MADV_WIPEONFORK = 18
_WORTH_ROWS = 16  # fewer are not worth a call of their own
_MOST_ROWS = 256  # more are cut up, for threads to share
_SMALL_BYTES = 64 << 10  # a larger tensor has a call of its own, which copies it faster


def stage(tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> Named:
    """Contiguous CPU copies of all tensors, by section and name."""
    return {section: {name: _copy(tensor) for name, tensor in named.items()} for section, named in tensors.items()}


_DEVICES = Devices()  # what was found out of them holds for the process


class Arena:
    """Host memory into which one snapshot after the other is staged, the tensors of a section one behind the other.

    What `stage` gives is good until it is called again: the snapshot before must be on disk by then.

    Args:
        devices: Those whose tensors arrive while training goes on.
    """

    def __init__(self, devices: Devices = _DEVICES) -> None:
        self._devices = devices
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._is_private = False  # no forked process shares its pages
        self._pin: Pin | None = None
        self._carrier: Carrier | None = None
        self._staged: Named = {}
        self._targets: list[torch.Tensor] = []
        self._rows: list[Rows] = []
        self._description: object = None
        self._structure: object = None
        self._copying: Copying | None = None  # the newest, under way or not
        self._crossing: Crossing | None = None  # the newest that was not waited for at once
        self._is_awaited = True

    def stage(
        self,
        tensors: Mapping[str, Mapping[str, torch.Tensor]],
        *,
        structure: object = None,
        later: Collection[tuple[str, str]] = (),
    ) -> Named:
        """Contiguous CPU copies of all tensors, by section and name; those from CUDA devices once `ready` has waited.

        The very same dicts are given again as long as names, shapes, dtypes and devices stay the same.

        Args:
            tensors: By section and name.
            structure: Stands for names, shapes, dtypes and devices: where it is the very object of the last call they
                are not compared.
            later: Sections and names of tensors that may be copied after the return: they are there after `settle`.

        Raises:
            SnapshotWriteError: What was staged before is still on its way, and will not arrive.
        """
        self.settle()  # Invariant: no memory is filled again while anything is under way from it or into it
        self._copying = self._crossing = None
        sources = [*chain.from_iterable(map(_tensors_of, tensors.values()))]
        is_known = structure is not None and structure is self._structure
        if not is_known:
            self._lay_out(tensors, sources)
            self._structure, self._rows = structure, []
        others = self._set_out(sources)
        targets, live = self._targets, sources
        if others is not None:
            targets, live = [targets[number] for number in others], [live[number] for number in others]
        if not is_known and structure is not None:
            self._rows = rows_of(live, targets)
        if not later:
            copy_into(targets, live, self._rows)
            return self._staged
        waits = [(section, name) in later for section, named in tensors.items() for name in named]
        if others is not None:
            waits = [waits[number] for number in others]
        pairs = list(zip(waits, targets, live, strict=True))
        # At once before the thread begins: it would only make this slower.
        copy_into([target for wait, target, _ in pairs if not wait], [source for wait, _, source in pairs if not wait])
        self._copying = Copying(
            partial(copy_into, may_share=False),
            [target for wait, target, _ in pairs if wait],
            [source for wait, _, source in pairs if wait],
        )
        self._is_awaited = False
        return self._staged

    def let_go(self) -> None:
        """Block until training may change all that was staged, for the thread that trains.

        What is on CUDA devices it may always change: the copy there comes first in the order of the device's work.

        Raises:
            UsageError: What was to be copied has been changed meanwhile. Said once.
        """
        if not self._is_awaited:
            self._is_awaited = True
            assert self._copying is not None
            self._copying.wait()

    def settle(self) -> None:
        """Block until all that was staged is there, for the thread that trains.

        Raises:
            SnapshotWriteError: It could not be copied from a device.
            UsageError: What was to be copied has been changed meanwhile. Said once.
        """
        self.let_go()
        if self._crossing is not None:
            self._crossing.wait()

    def ready(self) -> Callable[[], object] | None:
        """Blocks until what was staged last is there, for the thread that writes it; raises if it is no good.

        None if it is there already.
        """
        waits = [each.wait for each in (self._copying, self._crossing) if each is not None]
        return partial(_call_all, waits) if waits else None

    def _set_out(self, sources: Sequence[torch.Tensor]) -> Sequence[int] | None:
        """Let set out what comes from devices; numbers of the tensors that are left to the host, or None for all."""
        if self._carrier is None or self._pin is None:
            return None
        crossing = self._carrier.begin(sources)
        if crossing is None:
            self._rows, self._structure = [], None
            return None
        self._pin.under_way[:] = [crossing]
        self._crossing = crossing  # also if waiting fails: it is asked again before the memory is used
        if self._carrier.num_bytes <= AT_ONCE_BYTES:
            crossing.wait()
            self._crossing = None
        return self._carrier.others

    def _lay_out(self, tensors: Mapping[str, Mapping[str, torch.Tensor]], sources: Sequence[torch.Tensor]) -> None:
        owners = self._devices.owners(sources, _is_sound)
        names = [(section, list(named)) for section, named in tensors.items()]
        shapes, dtypes = [tensor.shape for tensor in sources], [tensor.dtype for tensor in sources]
        description = (names, shapes, dtypes, owners)
        if description == self._description:
            return
        # Whatever fails below must not leave old targets to be filled with other tensors.
        self._description, self._structure, self._staged, self._targets, self._rows = None, None, {}, [], []
        self._carrier = None
        places, num_bytes = _places(tensors)
        device = next((owner for owner in owners if owner is not None), None)
        self._have_memory(num_bytes, device)
        views = iter([_view(self._memory, at, tensor) for at, tensor in zip(places, sources, strict=True)])
        self._staged = {section: {name: next(views) for name in named} for section, named in tensors.items()}
        self._targets = [tensor for named in self._staged.values() for tensor in named.values()]
        if device is not None and self._pin is not None and self._pin.holds:
            self._carrier = Carrier(self._memory, targets=self._targets, places=places, owners=owners, sources=sources)
        self._description = description

    def _have_memory(self, num_bytes: int, device: Cuda | None) -> None:
        is_fitting = num_bytes <= self._memory.numel() <= 2 * num_bytes + _HUGE_BYTES
        if not is_fitting or (device is not None and not self._is_private):
            if self._pin is not None:
                self._pin.close()
                self._pin = None
            self._memory = torch.empty(0, dtype=torch.uint8)  # given back before more is asked for
            self._memory, self._is_private = _memory(num_bytes, is_pinned=device is not None)
        if device is not None and self._is_private and self._pin is None:
            self._pin = Pin(self._memory, device)


def _is_sound(device: Cuda) -> bool:
    """Whether a few tensors of a device arrive as they were, twice, though they are changed at once."""
    state = [torch.arange(700.0), torch.tensor(3), torch.arange(12, dtype=torch.int16).reshape(3, 4).t()]
    state += [torch.tensor([True]), torch.tensor([0x7FA1, -1], dtype=torch.int16).view(torch.bfloat16)]
    try:
        device.room()  # only large states ask for it
        arena = Arena(Devices.knowing(device))
        for _ in range(2):
            live = {str(n): device.holding(tensor) for n, tensor in enumerate(state)} | {"on cpu": torch.tensor(5)}
            live["last"] = device.holding(torch.ones(3))
            staged = arena.stage({"s": live})["s"]
            expected = [*state, torch.tensor(5), torch.ones(3)]
            for name, tensor in live.items():
                if name != "on cpu":
                    device.clone([tensor], [device.holding(torch.zeros(tensor.shape, dtype=tensor.dtype))])
            arena.settle()
            if not all(map(same_bytes, staged.values(), expected)):
                raise RuntimeError("what arrives is not what was there")
    except Exception as error:  # noqa: BLE001 - whatever it is, the host can copy and wait
        warnings.warn(
            f"snapshots of what is on {device.device} hold the training up for the whole copy: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


class Rows(NamedTuple):
    """Neighbours that are rows of one larger tensor once they are copied: for them a copy is one call."""

    first: int
    end: int
    whole: torch.Tensor


def rows_of(sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> list[Rows]:
    """Where neighbours among the tensors on the CPU differ in nothing but how many rows they have, in their order.

    Args:
        sources: Live tensors.
        targets: Memory for them; where one lies right behind the other they can be one.
    """
    found: list[Rows] = []
    first = 0
    for number in range(1, len(sources) + 1):
        is_more = number < len(sources) and _continues(sources, targets, number)
        if is_more and number - first < _MOST_ROWS:
            continue
        if number - first >= _WORTH_ROWS:
            width = sum(target.shape[0] for target in targets[first:number])
            start = targets[first]
            whole = start.as_strided((width, *start.shape[1:]), start.stride())
            found.append(Rows(first, number, whole))
        first = number
    return found


def _continues(sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], number: int) -> bool:
    one, other = targets[number - 1], targets[number]
    return (
        sources[number - 1].device.type == sources[number].device.type == "cpu"
        and one.dtype == other.dtype
        and one.ndim == other.ndim > 0
        and 0 < one.nbytes <= _SMALL_BYTES
        and one.shape[1:] == other.shape[1:]
        and one.data_ptr() + one.nbytes == other.data_ptr()
    )


def copy_into(
    targets: Sequence[torch.Tensor],
    sources: Sequence[torch.Tensor],
    rows: Sequence[Rows] = (),
    *,
    may_share: bool = True,
) -> None:
    """Copy each tensor of `sources` into the one of `targets` at the same place; blocks until all are copied.

    Args:
        targets: Of the shapes and dtypes of the sources, dense and row-major.
        sources: Live tensors.
        rows: Found among tensors of the very same shapes, dtypes and devices.
        may_share: Whether other threads may take a share of what is large or many.
    """
    num_threads = _num_threads(sources) if may_share else 1
    whole = _in_order(targets, sources, rows)
    if num_threads == 1:
        _copy_all(whole)
        return
    with torch.inference_mode():
        portions = iter([*_cut_up(whole)])
    # Whoever is free takes the next: a thread whose core is busy holds the others up for one portion at most.
    with ThreadPoolExecutor(num_threads - 1, thread_name_prefix="staging") as pool:
        others = [pool.submit(_copy_all, portions) for _ in range(num_threads - 1)]
        _copy_all(portions)
        for other in others:
            other.result()


def _num_threads(sources: Sequence[torch.Tensor]) -> int:
    """How many a copy is worth. What is large torch shares out itself, where it has been given threads for that."""
    is_worth_it = len(sources) >= _MANY_TENSORS or (
        torch.get_num_threads() == 1 and sum(source.nbytes for source in sources) >= _LARGE_BYTES
    )
    return min(_num_cores(), _MOST_THREADS) if is_worth_it else 1


def _copy_all(portions: Iterable[Portion]) -> None:
    with torch.inference_mode():
        for target, sources in portions:
            if isinstance(target, torch.Tensor):
                torch.cat([*sources], out=target)
            else:
                torch._foreach_copy_(target, sources)  # type: ignore[arg-type]


def _in_order(
    targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], rows: Sequence[Rows]
) -> Iterator[Portion]:
    """All of it in as few calls as it takes."""
    done = 0
    for each in rows:
        if each.first > done:
            yield targets[done : each.first], sources[done : each.first]
        yield each.whole, sources[each.first : each.end]
        done = each.end
    if len(sources) > done:
        yield targets[done:], sources[done:]


def _cut_up(portions: Iterable[Portion]) -> Iterator[Portion]:
    """The same in calls none of which takes long."""
    for targets, sources in portions:
        if isinstance(targets, torch.Tensor):
            yield targets, sources
            continue
        first = num_bytes = 0
        for number, (target, source) in enumerate(zip(targets, sources, strict=True)):
            is_large = source.nbytes > _PORTION_BYTES and source.is_cpu and source.is_contiguous()
            if is_large or num_bytes > _PORTION_BYTES or number - first >= _MOST_ROWS:
                if number > first:
                    yield targets[first:number], sources[first:number]
                first, num_bytes = number, 0
            num_bytes += source.nbytes
            if is_large:
                count = _PORTION_BYTES // source.element_size()
                pieces = zip(torch.split(target.view(-1), count), torch.split(source.view(-1), count), strict=True)
                yield from (([into], [piece]) for into, piece in pieces)
                first, num_bytes = number + 1, 0
        if len(sources) > first:
            yield targets[first:], sources[first:]


def _call_all(calls: Iterable[Callable[[], object]]) -> None:
    for call in calls:
        call()


def _tensors_of(named: Mapping[str, torch.Tensor]) -> Iterable[torch.Tensor]:
    return named.values()


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _places(tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> tuple[list[int], int]:
    """Offset of each tensor in one memory, and the length of it all."""
    places, end = [], 0
    for named in tensors.values():
        end = -(-end // _ALIGNMENT) * _ALIGNMENT
        for tensor in named.values():
            size = tensor.element_size()
            places.append(-(-end // size) * size)
            end = places[-1] + tensor.numel() * size
    return places, end


def _view(memory: torch.Tensor, at: int, like: torch.Tensor) -> torch.Tensor:
    num_bytes = like.numel() * like.element_size()
    return memory[at : at + num_bytes].view(like.dtype).view(like.shape)


def _memory(num_bytes: int, *, is_pinned: bool = False) -> tuple[torch.Tensor, bool]:
    """Bytes that no forked process shares, and whether that is certain; for a few it is not worth it.

    A worker forked while they are there would make the kernel copy every page at the next snapshot, and keep twice
    the state in memory. What is not to be had of that is done without.

    Args:
        num_bytes: How many.
        is_pinned: Whether pages of their own are needed however few they are.
    """
    is_worth_it = num_bytes >= _HUGE_BYTES or (is_pinned and num_bytes > 0)
    if not is_worth_it or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.empty(num_bytes, dtype=torch.uint8), False
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE") and num_bytes >= _HUGE_BYTES:
        with contextlib.suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
    is_private = False
    if hasattr(mmap, "MADV_DONTFORK"):
        with contextlib.suppress(OSError):
            pages.madvise(_MADV_WIPEONFORK)
            is_private = True
    return torch.frombuffer(pages, dtype=torch.uint8), is_private


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    return copy.copy_(tensor.detach())


def total_bytes(tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> int:
    """Bytes of tensor data."""
    return sum(t.numel() * t.element_size() for named in tensors.values() for t in named.values())

"""State on CUDA devices: copied there in the order of the device's work, and carried to the host beside the training.

For each device with tensors of the state, nothing of which the host waits for:

1. *Clone*: into memory of the device, in its current stream. What is enqueued there later cannot change the clone.
2. *Carry*: in a stream of our own, `after` the clone is made, its bytes in as few pieces as they lie in the host's
   memory, which is pinned. Small tensors of the CPU that lie between them (the `step` of Adam) would be written over:
   they are copied at once into memory of their own, and put in their place when the rest has arrived.
3. *Arrive* (`Crossing.wait`): whoever writes the state waits for the end of 2. Only then is the clone's memory given
   back, and only then may either memory be filled again: `Arena.stage` waits first.

A clone is taken only where there is room for it beside the most that training has ever had; its memory goes back to
torch's allocator on arrival, from where training gets it. Without room the live tensors are copied straight into the
pinned memory, in the current stream: later work on it waits, the host does not. Nothing needs to be kept alive for
either: memory that is freed meanwhile is used again in the order of that same stream.

What the snapshot holds is what the current stream of each device (of the calling thread) holds once all that was
enqueued before is done: as with `tensor.cpu()`, other streams must have been joined to it.

Host memory is pinned once, when it is taken, and is never shared with forked processes: a page that a fork shares
could be replaced under the device's eyes. Where anything of that is not to be had, and where a few tensors do not
arrive as they were (looked at once for each device), the host copies and waits, as for other devices.

Policy: bits, not numbers. torch copies many tensors of two bytes by way of float32, which does not keep every NaN:
they are copied as integers.

A graph must not be captured in torch's default "global" mode while a snapshot is on its way: waiting for an event is
then forbidden to all threads. No GPU was at hand when this was written: tests run all but `cuda` on a stand-in that
does everything as late as it may, and `cuda` itself where there is a device.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from resumable_trainer.errors import SnapshotWriteError
from resumable_trainer.state.cuda import Cuda

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

AT_ONCE_BYTES = 4 << 20  # so little is waited for: then it can be dictated to the scribe
_BRIDGED_BYTES = 4096  # of a larger tensor on the CPU it is better to have two pieces
_ALIGNMENT = 64
_KEPT = {torch.float32, torch.float64, torch.complex64, torch.complex128}
_KEPT |= {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
_AS_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Devices:
    """The devices of this process, each tried out when it is first met.

    Args:
        calls: What is asked of a device.
    """

    def __init__(self, calls: type[Cuda] = Cuda) -> None:
        self._calls = calls
        self._known: dict[Hashable, Cuda | None] = {}

    @classmethod
    def knowing(cls, device: Cuda) -> Devices:
        """These alone, without trying it out."""
        devices = cls(type(device))
        devices._known[device.device] = device
        return devices

    def owners(self, tensors: Sequence[torch.Tensor], is_sound: Callable[[Cuda], bool]) -> list[Cuda | None]:
        """The device of each tensor; None for the CPU, and where the host copies and waits.

        Args:
            tensors: Of a state.
            is_sound: Tries a device out.
        """
        if not any(map(self._calls.is_there, tensors)):
            return [None] * len(tensors)
        return [self._of(tensor, is_sound) for tensor in tensors]

    def _of(self, tensor: torch.Tensor, is_sound: Callable[[Cuda], bool]) -> Cuda | None:
        place = self._calls.place(tensor)
        if place is None:
            return None
        if place not in self._known:
            device = self._calls(place)
            self._known[place] = device if is_sound(device) else None
        return self._known[place]


class Pin:
    """Host memory that devices write into by themselves, until this is closed or forgotten.

    Args:
        memory: Not shared with forked processes.
        device: Any that is to write into it.

    Attributes:
        holds: Whether it was granted.
        under_way: What may be writing into it.
    """

    def __init__(self, memory: torch.Tensor, device: Cuda) -> None:
        self.holds = device.pin(memory)
        self.under_way: list[Crossing] = []
        self._end = weakref.finalize(self, _unpin, memory, device, self.under_way, os.getpid())
        self._end.atexit = False  # a process that ends gives all back at once
        if not self.holds:
            self._end.detach()

    def close(self) -> None:
        """Wait for what is under way, and give the pages back."""
        self._end()


def _unpin(memory: torch.Tensor, device: Cuda, under_way: Sequence[Crossing], owner: int) -> None:
    if os.getpid() != owner:
        return
    for each in under_way:
        with contextlib.suppress(SnapshotWriteError):
            each.wait()
    device.unpin(memory)


class Crossing:
    """A state on its way from devices to the host.

    Args:
        landed: Called when all has arrived.
    """

    def __init__(self, landed: Callable[[], None]) -> None:
        self._landed = landed
        self._legs: list[tuple[_Load, Any]] = []
        self._lock = threading.Lock()
        self._is_over = False

    def add(self, load: _Load, end: Any) -> None:
        """One more device has something on its way, until `end`."""
        self._legs.append((load, end))

    def wait(self) -> None:
        """Block until all is there; from any thread.

        Raises:
            SnapshotWriteError: Something has gone wrong on a device: what is there is no state.
        """
        with self._lock:
            if self._is_over:
                return
            for load, end in self._legs:
                _wait(load.device, end)
            self._landed()  # Invariant: after the pieces between which it goes, which write over it
            for load, _ in self._legs:
                load.give_back()
            self._is_over = True


def _wait(device: Cuda, end: Any) -> None:
    # Invariant: while this fails the memory counts as being written to; `stage` asks again before it uses it.
    try:
        device.wait(end)
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise SnapshotWriteError(
            f"the state could not be copied from {device.device} to the host: {reason}",
            hint="the device may be unusable from here on: start the same command again",
        ) from error


class Span(NamedTuple):
    """Bytes that come from one device in one piece: where they lie on the host, and where in the clone."""

    begin: int
    end: int
    at: int


@dataclass
class _Load:
    """What a layout has on one device.

    Attributes:
        device: The device.
        numbers: Which tensors.
        spans: Where they go.
        clone: Memory of the device, or None before it was first taken.
        groups: By dtype: numbers, and memory in the clone.
        is_taken: Whether the clone has memory.
    """

    device: Cuda
    numbers: list[int] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    clone: torch.Tensor | None = None
    groups: list[tuple[list[int], list[torch.Tensor]]] = field(default_factory=list)
    is_taken: bool = False

    @property
    def num_bytes(self) -> int:
        last = self.spans[-1]
        return last.at + last.end - last.begin

    def begin(self, host: _Host, sources: Sequence[torch.Tensor]) -> Any:
        """Enqueue all; the event of its end."""
        if not self._take(host):
            return self.device.copy([host.targets[n] for n in self.numbers], [sources[n] for n in self.numbers])
        assert self.clone is not None
        for numbers, targets in self.groups:
            self.device.clone(targets, [_bits(sources[number]) for number in numbers])
        targets = [host.memory[each.begin : each.end] for each in self.spans]
        parts = [self.clone[each.at : each.at + each.end - each.begin] for each in self.spans]
        # Invariant: carried once it is cloned, and not before.
        return self.device.carry(targets, parts, after=self.device.mark())

    def _take(self, host: _Host) -> bool:
        if self.num_bytes > AT_ONCE_BYTES and self.device.room() < self.num_bytes:
            return False
        try:
            clone = self.device.take(self.clone, self.num_bytes)
        except torch.OutOfMemoryError:
            return False
        self.is_taken = True
        if self.clone is None:
            self.clone = clone
            self._lay_out(host, clone)
        return True

    def _lay_out(self, host: _Host, clone: torch.Tensor) -> None:
        groups: dict[torch.dtype, tuple[list[int], list[torch.Tensor]]] = {}
        spans = iter(self.spans)
        span = next(spans)
        for number in self.numbers:
            place, like = host.places[number], host.targets[number]
            while place + like.nbytes > span.end:
                span = next(spans)
            begin = span.at + place - span.begin
            view = _bits(clone[begin : begin + like.nbytes].view(like.dtype).view(like.shape))
            numbers, views = groups.setdefault(view.dtype, ([], []))
            numbers.append(number)
            views.append(view)
        self.groups = list(groups.values())

    def give_back(self) -> None:
        if self.is_taken:
            assert self.clone is not None
            self.is_taken = False
            self.device.give_back(self.clone)


class _Host(NamedTuple):
    """Where all tensors of a layout go: views of one memory, and their offsets in it."""

    memory: torch.Tensor
    targets: list[torch.Tensor]
    places: list[int]


class Carrier:
    """Brings what a state has on devices into its place on the host, beside the training.

    Args:
        memory: Pinned.
        targets: Views of it, one for each tensor of the state.
        places: Their offsets.
        owners: The device of each tensor; None for those that the host copies.
        sources: The tensors.

    Attributes:
        others: Numbers of the tensors that are left to the host.
        num_bytes: That come from devices.
    """

    def __init__(
        self,
        memory: torch.Tensor,
        *,
        targets: list[torch.Tensor],
        places: list[int],
        owners: Sequence[Cuda | None],
        sources: Sequence[torch.Tensor],
    ) -> None:
        self._host = _Host(memory, targets, places)
        self._loads: dict[Hashable, _Load] = {}
        self._bridged: list[int] = []
        self._plan(owners, [source.device.type == "cpu" for source in sources])
        self._bridge = [torch.empty_like(targets[number]) for number in self._bridged]
        taken = {*self._bridged, *(number for load in self._loads.values() for number in load.numbers)}
        self.others = [number for number in range(len(targets)) if number not in taken]
        self.num_bytes = sum(load.num_bytes for load in self._loads.values())

    def begin(self, sources: Sequence[torch.Tensor]) -> Crossing | None:
        """Let all set out that `others` does not name; None if the host must copy everything.

        Args:
            sources: The tensors, of the shapes, dtypes and devices that were planned for.
        """
        sources = [_resolved(source) for source in sources]
        crossing = Crossing(self._land)
        _copy(self._bridge, [sources[number] for number in self._bridged])
        for load in self._loads.values():
            try:
                crossing.add(load, load.begin(self._host, sources))
            except BaseException as error:
                # What has set out must not arrive on top of what is copied next.
                with contextlib.suppress(RuntimeError):
                    load.device.rest()
                crossing.wait()
                load.give_back()
                if isinstance(error, torch.OutOfMemoryError):
                    return None
                raise
        return crossing

    def _land(self) -> None:
        _copy([self._host.targets[number] for number in self._bridged], self._bridge)

    def _plan(self, owners: Sequence[Cuda | None], is_on_cpu: Sequence[bool]) -> None:
        """Find the spans: as long as nothing comes from elsewhere but what is small and on the CPU."""
        open_span: tuple[Cuda, int, int] | None = None  # of the last device
        between: list[int] = []
        for number, owner in enumerate(owners):
            begin = self._host.places[number]
            end = begin + self._host.targets[number].nbytes
            if owner is None:
                between.append(number)
                if open_span is not None and not (is_on_cpu[number] and end - begin <= _BRIDGED_BYTES):
                    self._close(*open_span)
                    open_span = None
                continue
            self._loads.setdefault(owner.device, _Load(owner)).numbers.append(number)
            if open_span is not None and open_span[0] is owner:
                self._bridged += between
                open_span = owner, open_span[1], end
            else:
                if open_span is not None:
                    self._close(*open_span)
                open_span = owner, begin, end
            between = []
        if open_span is not None:
            self._close(*open_span)

    def _close(self, owner: Cuda, begin: int, end: int) -> None:
        load = self._loads[owner.device]
        start = load.num_bytes if load.spans else 0
        # Aligned as on the host, for every dtype.
        load.spans.append(Span(begin, end, -(-start // _ALIGNMENT) * _ALIGNMENT + begin % _ALIGNMENT))


def _copy(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    if targets:
        with torch.inference_mode():
            torch._foreach_copy_(targets, sources)  # type: ignore[arg-type]


def _resolved(tensor: torch.Tensor) -> torch.Tensor:
    """With the bytes that it says it has: copying to the host would turn them there, before they have arrived."""
    return tensor.resolve_conj().resolve_neg() if tensor.is_conj() or tensor.is_neg() else tensor


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory, of a dtype that is copied bit by bit."""
    return tensor if tensor.dtype in _KEPT else tensor.detach().view(_AS_INTEGERS[tensor.element_size()])

"""All calls to CUDA that staging makes, for one device: what is enqueued where, and what waits for what.

What each relies on, as CUDA and torch document it: work within a stream is done in its order; an event stands for what
was enqueued before it was recorded; a stream that waits for an event does nothing that is enqueued later until then; a
copy from a device to pinned memory with `non_blocking` returns at once and is done in the order of the current stream;
memory that torch's allocator gets back is given again in the order of the stream for which it was taken, whatever other
streams do with it: they must be done before it is given back.
"""

from __future__ import annotations

import contextlib
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for all devices
_SPARED = 10  # one part in so many of a device is left free, for what allocating in another order wastes
_PLAIN = (torch.Tensor, torch.nn.Parameter)


class Cuda:
    """One device.

    Args:
        device: With its index.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    is_there = attrgetter("is_cuda")  # quick to ask of many

    @staticmethod
    def place(tensor: torch.Tensor) -> torch.device | None:
        """Where a tensor lies; None if not as plain memory of a CUDA device."""
        is_ours = tensor.is_cuda and type(tensor) in _PLAIN and tensor.layout == torch.strided
        return tensor.device if is_ours and torch.version.hip is None else None

    def holding(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the device, laid out the same."""
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self.device).copy_(tensor)

    def pin(self, memory: torch.Tensor) -> bool:
        """Let devices write into the host's memory by themselves; whether that was granted."""
        return self._asked("cudaHostRegister", memory.data_ptr(), memory.numel(), _PORTABLE)

    def unpin(self, memory: torch.Tensor) -> None:
        """The way back of `pin`; nothing may be on its way into it."""
        self._asked("cudaHostUnregister", memory.data_ptr())

    def _asked(self, name: str, *args: int) -> bool:
        with torch.cuda.device(self.device):
            cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            is_done = int(getattr(cudart, name)(*args)) == 0
            if not is_done:
                with contextlib.suppress(RuntimeError):  # CUDA keeps the error for the next kernel: let it be this one
                    torch.ones(1, device=self.device)
        return is_done

    def room(self) -> int:
        """Bytes that may be taken so that training still gets the most that it has ever had, and some more.

        "Ever" is since `torch.cuda.reset_peak_memory_stats`, where that is called.
        """
        free, total = torch.cuda.mem_get_info(self.device)
        known = torch.cuda.memory_stats_as_nested_dict(self.device)
        reserved, most = known["reserved_bytes"]["all"]["current"], known["allocated_bytes"]["all"]["peak"]
        return int(free + reserved - most - total // _SPARED)

    def take(self, memory: torch.Tensor | None, num_bytes: int) -> torch.Tensor:
        """Memory for so many bytes, to be used in the current stream first; what was given back is filled again.

        Raises:
            torch.OutOfMemoryError: There is not enough.
        """
        with torch.cuda.device(self.device):
            if memory is None:
                return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
            memory.untyped_storage().resize_(num_bytes)  # views of it stay what they are
            return memory

    def give_back(self, memory: torch.Tensor) -> None:
        """Let the allocator have the memory; views of it must not be used until it is taken again."""
        with torch.cuda.device(self.device):
            memory.untyped_storage().resize_(0)

    def clone(self, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        """Enqueue copies within the device, in its current stream; all of one dtype."""
        with torch.cuda.device(self.device), torch.inference_mode():
            torch._foreach_copy_(targets, sources)  # type: ignore[arg-type]

    def mark(self) -> Any:
        """An event: all that is enqueued in the current stream by now."""
        with torch.cuda.device(self.device):
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self.device))
        return event

    def carry(self, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], *, after: Any) -> Any:
        """Enqueue copies into pinned memory, in a stream of our own.

        Args:
            targets: Bytes of the host.
            sources: Bytes of the device.
            after: The event that these wait for.

        Returns:
            The event of their end.
        """
        with torch.cuda.stream(self._side), torch.inference_mode():
            self._side.wait_event(after)
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)
            return self.mark()

    def copy(self, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> Any:
        """Enqueue copies of live tensors into pinned memory, in the current stream; the event of their end."""
        with torch.cuda.device(self.device), torch.inference_mode():
            torch._foreach_copy_(targets, sources, non_blocking=True)  # type: ignore[arg-type]
        return self.mark()

    def rest(self) -> None:
        """Block until nothing is under way on the device, in whatever stream."""
        torch.cuda.synchronize(self.device)

    def wait(self, event: Any) -> None:
        """Block this thread until the event has come to pass, without keeping a core busy.

        Raises:
            RuntimeError: Something has gone wrong on the device before.
        """
        with torch.cuda.device(self.device):  # a thread that has none would open a second one
            event.synchronize()

"""Tensor files read straight into memory that is there already, and hashed on the way.

Each byte goes once from the file to where it belongs, and is hashed while it is hot in the processor's
cache. Two threads read pieces of a large file side by side; the digest takes them in the file's order, one
after the other. Nothing is mapped: a file that is truncated under a mapping would kill the process.

Cost: about that of reading the file once. Memory: what is dense and row-major on the CPU needs none; small
tensors go through a buffer for each thread, any other one (on a device, or with its dimensions in another
order) through a copy of its own.
"""

from __future__ import annotations

import ctypes
import os
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from resumable_trainer.durable.digest import Digest, FileDigest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from resumable_trainer.snapshot.raw import RawTensorFile

_CHUNK_BYTES = 2 << 20
_SMALL_BYTES = 128 << 10
_GATHER_BYTES = 1 << 20
_ALONE_BYTES = 32 << 20  # of a file that one thread reads as fast as two


@dataclass(frozen=True)
class _Piece:
    """Consecutive bytes of the file, and where they go.

    Attributes:
        begin: Offset of the first.
        num_bytes: How many.
        memory: Live memory that takes them as they are; None if they go through a buffer.
        tensors: Otherwise the tensors that they fill, one after the other, all of one dtype; none for the header.
    """

    begin: int
    num_bytes: int
    memory: memoryview | None = None
    tensors: list[torch.Tensor] = field(default_factory=list)


def fill(file: RawTensorFile, targets: Mapping[str, torch.Tensor]) -> FileDigest:
    """Read every tensor of a file into its target; length and digest of the whole file, for the caller to compare.

    Args:
        file: The open file.
        targets: A target for each of the file's tensors by name, of its shape and of its dtype (complex128 for
            float64 with a last dimension of 2), dense; no two share memory.

    Raises:
        DamagedSnapshotError: The file has become shorter; some of it may have been read into targets.
    """
    _rest({target.device for target in targets.values()})
    pieces = list(_pieces(file, targets))
    line = _Line(file, pieces)
    second = None
    if sum(piece.num_bytes for piece in pieces) > _ALONE_BYTES and (os.cpu_count() or 1) > 1:
        second = threading.Thread(target=line.work, name="resumable-trainer-read", daemon=True)
        second.start()
    line.work()
    if second is not None:
        second.join()
    if line.error is not None:
        raise line.error
    return line.digest.value()


def _rest(devices: Iterable[torch.device]) -> None:
    """Block until nothing is under way on accelerators.

    What was enqueued in another stream than that of the threads which read here would land on top of what they read.
    """
    for device in devices:
        if device.type not in ("cpu", "meta"):
            torch.accelerator.synchronize(device)


class _Line:
    """Pieces that several threads read and one after the other feeds to the digest."""

    def __init__(self, file: RawTensorFile, pieces: list[_Piece]) -> None:
        self.digest = Digest()
        self.error: BaseException | None = None
        self._file = file
        self._pieces = iter(enumerate(pieces))
        self._turn = 0
        self._changed = threading.Condition()

    def work(self) -> None:
        """Read pieces until there are none; what goes wrong is kept, and ends the other thread's work too."""
        scratch = torch.empty(_GATHER_BYTES, dtype=torch.uint8, device="cpu")
        try:
            with torch.no_grad():
                while (taken := self._next()) is not None:
                    self._read(*taken, scratch)
        except BaseException as error:  # noqa: BLE001 - raised by `fill`, whichever thread it was
            with self._changed:
                self.error = self.error or error
                self._changed.notify_all()

    def _next(self) -> tuple[int, _Piece] | None:
        with self._changed:
            return None if self.error is not None else next(self._pieces, None)

    def _read(self, number: int, piece: _Piece, scratch: torch.Tensor) -> None:
        memory, buffer = piece.memory, None
        if memory is None:
            fits = piece.num_bytes <= scratch.numel()
            buffer = scratch[: piece.num_bytes] if fits else torch.empty(piece.num_bytes, dtype=torch.uint8)
            memory = buffer.numpy().data
        self._file.read_at(memory, piece.begin)
        with self._changed:
            self._changed.wait_for(lambda: self._turn == number or self.error is not None)
            if self.error is not None:
                return
        self.digest.update(memory)
        with self._changed:
            self._turn += 1
            self._changed.notify_all()
        if buffer is not None and piece.tensors:
            _scatter(buffer, piece.tensors)


def _scatter(buffer: torch.Tensor, tensors: list[torch.Tensor]) -> None:
    if all(tensor.is_cpu and tensor.is_contiguous() for tensor in tensors):
        address = buffer.data_ptr()
        for tensor in tensors:  # ten thousand views to copy from would cost more than their bytes
            num_bytes = tensor.nbytes
            ctypes.memmove(tensor.data_ptr(), address, num_bytes)
            address += num_bytes
        return
    values = buffer.view(tensors[0].dtype)
    if len(tensors) == 1:
        tensors[0].copy_(values.view(tensors[0].shape))
        return
    views = torch._C._nn.unflatten_dense_tensors(values, tensors)
    torch._foreach_copy_(tensors, views)


def _pieces(file: RawTensorFile, targets: Mapping[str, torch.Tensor]) -> Iterator[_Piece]:
    """The whole file in order: header, large tensors in chunks, small ones together."""
    start = file.header_bytes
    for begin in range(0, start, _GATHER_BYTES):
        yield _Piece(begin, min(_GATHER_BYTES, start - begin))
    gathered: list[torch.Tensor] = []
    first = size = 0
    for name, begin, end in file.extents():
        target, num_bytes = targets[name], end - begin
        if not num_bytes:
            continue
        is_small = num_bytes <= _SMALL_BYTES
        joins = bool(gathered) and is_small and size + num_bytes <= _GATHER_BYTES and target.dtype == gathered[0].dtype
        if gathered and not joins:
            yield _Piece(start + first, size, tensors=gathered)
            gathered, size = [], 0
        if is_small:
            first = first if gathered else begin
            gathered.append(target)
            size += num_bytes
        else:
            yield from _large(start + begin, num_bytes, target)
    if gathered:
        yield _Piece(start + first, size, tensors=gathered)


def _large(begin: int, num_bytes: int, target: torch.Tensor) -> Iterator[_Piece]:
    if target.device.type != "cpu" or not target.is_contiguous():
        yield _Piece(begin, num_bytes, tensors=[target])
        return
    memory = target.detach().view(-1).view(torch.uint8).numpy().data
    for offset in range(0, num_bytes, _CHUNK_BYTES):
        count = min(_CHUNK_BYTES, num_bytes - offset)
        yield _Piece(begin + offset, count, memory[offset : offset + count])

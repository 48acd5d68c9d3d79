"""Files of named tensors in the safetensors layout, written and read as streams.

Layout (https://github.com/huggingface/safetensors, "Format"): 8 bytes little-endian length of the
header, the header (JSON: name -> dtype, shape, offsets into the data), the data, row-major, without
gaps. Any safetensors reader opens the files. The library's own writer is not used: it took 2 to 4
times as long as writing the same bytes.

Writing copies no large tensor: its memory goes to the file as it is, hashed on the way. Tensors that lie one behind
the other are written as one, small pieces are gathered. The data of a large file begin at a block of the disk, as what
is staged does in memory, so that they can go past the page cache.
"""

from __future__ import annotations

import json
import struct
import sys
from typing import TYPE_CHECKING, Any, Protocol

import torch

from resumable_trainer.durable.digest import Digest
from resumable_trainer.durable.files import BLOCK_BYTES, LARGE_BYTES
from resumable_trainer.errors import UnsafeValueError
from resumable_trainer.snapshot.raw import MAX_HEADER_BYTES, MAX_TENSORS, RawTensorFile

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from typing_extensions import Buffer

    from resumable_trainer.durable.digest import FileDigest

_ALIGNMENT = 8
_LENGTH = struct.Struct("<Q")
_GATHER_BYTES = 1 << 20  # small tensors are written together in pieces of about this size

_DTYPE_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}
DTYPES: dict[str, torch.dtype] = {code: getattr(torch, name) for code, name in _DTYPE_NAMES.items()}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


class Sink(Protocol):
    """Where bytes go: a new file, say."""

    def write(self, data: Buffer) -> None:
        """Take all of `data`."""


def is_storable(tensor: torch.Tensor) -> str | None:
    """None if the layout can hold the tensor, else why not, as the end of a sentence."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
        # nn.Buffer instances are plain tensors; anything else has meaning that plain bytes would lose.
        return f"is a {type(tensor).__module__}.{type(tensor).__qualname__}"
    if tensor.layout != torch.strided:
        return f"is a tensor of layout {tensor.layout}"
    if tensor.is_quantized or tensor.is_nested:
        return "is a quantized or nested tensor"
    if tensor.device.type == "meta":
        return "is a tensor without data (device meta)"
    if tensor.dtype not in _CODES and tensor.dtype != torch.complex128:
        return f"is a tensor of dtype {tensor.dtype}"
    return None


class Image:
    """The bytes of one file of tensors, where they lie in memory: the header, then runs of tensors without gaps.

    It follows the tensors: what is written is what they hold when it is written. Tensors that lie one behind the
    other, as they are staged, are one run, so that neither their number nor their size costs anything at a write.

    Args:
        tensors: CPU tensors of any shape, 0-dim and empty ones included, in the order of the file.

    Raises:
        UnsafeValueError: More than is ever read back.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        header = _header(tensors)
        self._pieces: list[Buffer] = [_LENGTH.pack(len(header)) + header, *_runs(tensors)]
        self.num_bytes = sum(memoryview(piece).nbytes for piece in self._pieces)

    def write(self, file: Sink) -> None:
        """Write all of it; equal tensors give equal bytes."""
        for buffer in _gathered(self._pieces):
            file.write(buffer)

    def digest(self) -> FileDigest:
        """Length and digest of the file that would be written now; reads all of its memory once."""
        digest = Digest()
        for buffer in _gathered(self._pieces):
            digest.update(buffer)
        return digest.value()


def write_tensors(file: Sink, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write CPU tensors in the order given; equal tensors give equal bytes.

    Raises:
        UnsafeValueError: More than is ever read back.
    """
    Image(tensors).write(file)


def _gathered(pieces: Sequence[Buffer]) -> Iterator[Buffer]:
    """The same bytes, small pieces joined: a call for each of ten thousand would cost more than their bytes."""
    small: list[Buffer] = []
    gathered = 0
    for piece in pieces:
        num_bytes = memoryview(piece).nbytes
        if gathered + num_bytes > _GATHER_BYTES and small:
            yield b"".join(small)
            small, gathered = [], 0
        if num_bytes > _GATHER_BYTES:
            yield piece
        else:
            small.append(piece)
            gathered += num_bytes
    if small:
        yield b"".join(small)


def _header(tensors: Mapping[str, torch.Tensor]) -> bytes:
    fields: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        fields[name] = {"dtype": _CODES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    if len(tensors) > MAX_TENSORS or len(text) > MAX_HEADER_BYTES - BLOCK_BYTES:
        raise UnsafeValueError(
            f"a part of the state has {len(tensors):,} tensors, whose names and shapes take {len(text):,} bytes;"
            f" at most {MAX_TENSORS:,} in {MAX_HEADER_BYTES:,} are read back",
            found=len(tensors),
            expected=MAX_TENSORS,
            hint="hand it over as several parts",
        )
    alignment = _ALIGNMENT if end < LARGE_BYTES else BLOCK_BYTES
    return text.ljust(-(-(_LENGTH.size + len(text)) // alignment) * alignment - _LENGTH.size)


def _runs(tensors: Mapping[str, torch.Tensor]) -> Iterator[memoryview]:
    """The tensors' bytes, row-major; those that lie one behind the other in one memory as one."""
    if sys.byteorder != "little":
        raise NotImplementedError("the layout is little-endian; this machine is not")
    first, begin, end = torch.empty(0), 0, 0
    for tensor in tensors.values():
        num_bytes = tensor.numel() * tensor.element_size()
        if not num_bytes:
            continue
        plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
        address = plain.data_ptr()
        if address != end or plain.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            if end > begin:
                yield _memory(first, end - begin)
            first, begin = plain, address
        end = address + num_bytes
    if end > begin:
        yield _memory(first, end - begin)


def _memory(first: torch.Tensor, num_bytes: int) -> memoryview:
    """So many bytes from where a tensor begins; they keep its storage alive."""
    storage = first.untyped_storage()
    start = first.storage_offset() * first.element_size()
    return torch.empty(0, dtype=torch.uint8).set_(storage, start, (num_bytes,)).numpy().data  # type: ignore[call-overload, no-any-return]


class TensorFile(RawTensorFile):
    """An open file of tensors, read as tensors."""

    def read(self, name: str) -> torch.Tensor:
        """One tensor, read into memory of its own."""
        info = self.info(name)
        tensor = torch.empty(info.shape, dtype=DTYPES[info.code])
        if info.end > info.begin:
            self.read_into(tensor.reshape(-1).view(torch.uint8).numpy().data, name)
        return tensor

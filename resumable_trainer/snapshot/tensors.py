"""Files of named tensors in the safetensors layout, written and read as streams.

Layout (https://github.com/huggingface/safetensors, "Format"): 8 bytes little-endian length of the
header, the header (JSON: name -> dtype, shape, offsets into the data), the data, row-major, without
gaps. Any safetensors reader opens the files. The library's own writer is not used: it took 2 to 4
times as long as writing the same bytes.

Writing copies no large tensor: its memory goes to the file as it is, hashed on the way. Small ones are gathered: a
call for each of ten thousand would cost more than their bytes.
"""

from __future__ import annotations

import json
import struct
import sys
from typing import TYPE_CHECKING, Any, Protocol

import torch

from resumable_trainer.errors import UnsafeValueError
from resumable_trainer.snapshot.raw import MAX_HEADER_BYTES, MAX_TENSORS, RawTensorFile

if TYPE_CHECKING:
    from collections.abc import Mapping

    from typing_extensions import Buffer

_ALIGNMENT = 8
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


def write_tensors(file: Sink, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write CPU tensors in the order given; equal tensors give equal bytes.

    Args:
        file: Where to.
        tensors: CPU tensors of any shape, 0-dim and empty ones included.

    Raises:
        UnsafeValueError: More than is ever read back.
    """
    header = _header(tensors)
    pieces: list[Buffer] = [struct.pack("<Q", len(header)), header]
    gathered = len(header)
    for tensor in tensors.values():
        if not tensor.numel():
            continue
        memory = _memory(tensor)
        if gathered + memory.nbytes > _GATHER_BYTES and pieces:
            file.write(b"".join(pieces))
            pieces, gathered = [], 0
        if memory.nbytes > _GATHER_BYTES:
            file.write(memory)
        else:
            pieces.append(memory)
            gathered += memory.nbytes
    if pieces:
        file.write(b"".join(pieces))


def _header(tensors: Mapping[str, torch.Tensor]) -> bytes:
    fields: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        fields[name] = {"dtype": _CODES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    if len(tensors) > MAX_TENSORS or len(text) > MAX_HEADER_BYTES - _ALIGNMENT:
        raise UnsafeValueError(
            f"a part of the state has {len(tensors):,} tensors, whose names and shapes take {len(text):,} bytes;"
            f" at most {MAX_TENSORS:,} in {MAX_HEADER_BYTES:,} are read back",
            found=len(tensors),
            expected=MAX_TENSORS,
            hint="hand it over as several parts",
        )
    return text.ljust(-(-len(text) // _ALIGNMENT) * _ALIGNMENT)


def _memory(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes, row-major, without a copy if they lie so already."""
    if sys.byteorder != "little":
        raise NotImplementedError("the layout is little-endian; this machine is not")
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


class TensorFile(RawTensorFile):
    """An open file of tensors, read as tensors."""

    def read(self, name: str) -> torch.Tensor:
        """One tensor, read into memory of its own."""
        info = self.info(name)
        tensor = torch.empty(info.shape, dtype=DTYPES[info.code])
        if info.end > info.begin:
            self.read_into(tensor.reshape(-1).view(torch.uint8).numpy().data, name)
        return tensor

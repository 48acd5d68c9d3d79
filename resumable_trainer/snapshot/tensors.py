"""Files of named tensors in the safetensors layout, written and read as streams.

Layout (https://github.com/huggingface/safetensors, "Format"): 8 bytes little-endian length of the
header, the header (JSON: name -> dtype, shape, offsets into the data), the data, row-major, without
gaps. Any safetensors reader opens the files. The library's own writer is not used: it took 2 to 4
times as long as writing the same bytes.

Writing copies nothing: each tensor's memory goes to the file as it is, hashed on the way.
"""

from __future__ import annotations

import json
import math
import os
import struct
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch

from resumable_trainer.durable.digest import close_after_reading, open_regular
from resumable_trainer.errors import DamagedSnapshotError
from resumable_trainer.snapshot import strict_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import TracebackType

    from resumable_trainer.durable.files import NewFile

MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 100_000
MAX_NAME_BYTES = 512
_ALIGNMENT = 8
_METADATA = "__metadata__"

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
DTYPES: dict[str, torch.dtype] = {
    code: getattr(torch, name) for code, name in _DTYPE_NAMES.items() if hasattr(torch, name)
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


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


def write_tensors(file: NewFile, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write CPU tensors in the order given; equal tensors give equal bytes.

    Args:
        file: Where to.
        tensors: CPU tensors of any shape, 0-dim and empty ones included.
    """
    header = _header(tensors)
    file.write(struct.pack("<Q", len(header)) + header)
    for tensor in tensors.values():
        if tensor.numel():
            file.write(_memory(tensor))


def _header(tensors: Mapping[str, torch.Tensor]) -> bytes:
    fields: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        fields[name] = {"dtype": _CODES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    return text.ljust(-(-len(text) // _ALIGNMENT) * _ALIGNMENT)


def _memory(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes, row-major, without a copy if they lie so already."""
    if sys.byteorder != "little":
        raise NotImplementedError("the layout is little-endian; this machine is not")
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies in a file, and what it is."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """An open file of tensors; a context manager.

    Everything the header says is checked against the file before memory is asked for: dtypes, sizes,
    offsets without gaps and overlaps up to the end of the file.

    Args:
        path: The file.

    Raises:
        DamagedSnapshotError: It is not a file of the layout.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._fd = open_regular(path)
        except ValueError as error:
            raise DamagedSnapshotError(str(error), path=path) from None
        try:
            self._start, self._infos = self._read_header()
        except BaseException:
            close_after_reading(self._fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        close_after_reading(self._fd)

    def names(self) -> list[str]:
        """Names of the tensors, in the file's order."""
        return list(self._infos)

    def info(self, name: str) -> TensorInfo:
        """What a tensor is, without reading it."""
        return self._infos[name]

    def read(self, name: str) -> torch.Tensor:
        """One tensor, read into memory of its own."""
        try:
            info = self._infos[name]
        except KeyError:
            raise self._damaged(f"holds no tensor {name!r}") from None
        tensor = torch.empty(info.shape, dtype=info.dtype)
        if info.end > info.begin:
            view = tensor.reshape(-1).view(torch.uint8).numpy().data
            self._read_into(view, self._start + info.begin)
        return tensor

    def _read_into(self, view: memoryview, offset: int) -> None:
        while view.nbytes:
            count = os.preadv(self._fd, [view], offset)
            if count == 0:
                raise self._damaged("ends too early")
            view, offset = view[count:], offset + count

    def _read_header(self) -> tuple[int, dict[str, TensorInfo]]:
        size = os.fstat(self._fd).st_size
        if size < 8:
            raise self._damaged(f"has {size} bytes, a file of tensors has at least 8")
        (length,) = struct.unpack("<Q", os.pread(self._fd, 8, 0))
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise self._damaged(f"says that its header has {length} bytes")
        try:
            fields = strict_json.parse(os.pread(self._fd, length, 8), max_bytes=MAX_HEADER_BYTES)
        except ValueError as error:
            raise self._damaged(f"has a bad header: {error}") from None
        return 8 + length, self._parse(fields, size - 8 - length)

    def _parse(self, fields: Any, data_bytes: int) -> dict[str, TensorInfo]:
        if not isinstance(fields, dict) or len(fields) > MAX_TENSORS:
            raise self._damaged(f"has a bad header: not an object of at most {MAX_TENSORS} tensors")
        infos = {name: self._parse_one(name, f) for name, f in fields.items() if name != _METADATA}
        end = 0
        for name, info in sorted(infos.items(), key=lambda item: (item[1].begin, item[1].end)):
            if info.begin != end:
                raise self._damaged(f"has a gap or overlap before {name!r}")
            end = info.end
        if end != data_bytes:
            raise self._damaged(f"holds {data_bytes} bytes of data, its header describes {end}")
        return infos

    def _parse_one(self, name: str, fields: Any) -> TensorInfo:
        try:
            dtype, shape, (begin, end) = DTYPES[fields["dtype"]], fields["shape"], fields["data_offsets"]
            if set(fields) != {"dtype", "shape", "data_offsets"} or len(name.encode()) > MAX_NAME_BYTES:
                raise ValueError("unknown fields or too long a name")
            if not all(type(n) is int and 0 <= n < 2**48 for n in (*shape, begin, end)) or len(shape) > 64:
                raise ValueError("bad numbers")
            if end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError("its offsets do not fit its shape")
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged(f"describes tensor {name[:80]!r} badly: {error}") from None
        return TensorInfo(dtype, tuple(shape), begin, end)

    def _damaged(self, reason: str) -> DamagedSnapshotError:
        return DamagedSnapshotError(f"{self._path.name} {reason}", path=self._path)

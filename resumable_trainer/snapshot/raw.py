"""Tensor files as bytes: which tensors lie where, checked before anything is believed. Free of torch.

Layout (https://github.com/huggingface/safetensors, "Format"): 8 bytes little-endian length of the
header, the header (JSON: name -> dtype, shape, offsets into the data), the data, row-major, without
gaps.
"""

from __future__ import annotations

import math
import os
import struct
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from resumable_trainer.durable.digest import close_after_reading, open_regular
from resumable_trainer.errors import DamagedSnapshotError
from resumable_trainer.snapshot import strict_json

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 100_000
MAX_NAME_BYTES = 512
_METADATA = "__metadata__"
ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
    "C64": 8,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1,
}


class TensorInfo(NamedTuple):
    """Where a tensor lies in a file, and what it is.

    Attributes:
        code: Name of its dtype in the layout: "F32".
        shape: Its sizes.
        begin: Offset of its first byte in the file's data.
        end: Offset behind its last.
    """

    code: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def num_elements(self) -> int:
        """Number of its elements."""
        return math.prod(self.shape)


class RawTensorFile:
    """An open file of tensors, read as bytes; a context manager.

    Everything the header says is checked against the file before memory is asked for: dtypes, sizes,
    offsets without gaps and overlaps up to the end of the file.

    Args:
        path: The file.

    Attributes:
        header_bytes: Where the tensors' data begin.

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
            self.header_bytes, self._infos = self._read_header()
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

    def extents(self) -> list[tuple[str, int, int]]:
        """Name, first byte and end of each tensor's data, in the order in which they lie."""
        return sorted(((n, i.begin, i.end) for n, i in self._infos.items()), key=lambda extent: extent[1:])

    def info(self, name: str) -> TensorInfo:
        """What a tensor is, without reading it.

        Raises:
            DamagedSnapshotError: The file holds none of this name.
        """
        try:
            return self._infos[name]
        except KeyError:
            raise self._damaged(f"holds no tensor {name!r}") from None

    def read_into(self, view: memoryview, name: str, *, start: int = 0) -> None:
        """Fill `view` with the bytes of a tensor, from its byte `start` on.

        Raises:
            DamagedSnapshotError: The file has become shorter.
        """
        self.read_at(view, self.header_bytes + self.info(name).begin + start)

    def read_at(self, view: memoryview, offset: int) -> None:
        """Fill `view` with the file's bytes from `offset` on, the header counted; threads may do so at the same time.

        Raises:
            DamagedSnapshotError: The file has become shorter.
        """
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
            code, shape, (begin, end) = fields["dtype"], fields["shape"], fields["data_offsets"]
            if len(fields) != 3 or len(name.encode()) > MAX_NAME_BYTES:
                raise ValueError("unknown fields or too long a name")
            for number in (*shape, begin, end):
                if type(number) is not int or not 0 <= number < 2**48:
                    raise ValueError("bad numbers")
            if len(shape) > 64:
                raise ValueError("bad numbers")
            if end - begin != math.prod(shape) * ITEM_BYTES[code]:
                raise ValueError("its offsets do not fit its shape")
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged(f"describes tensor {name[:80]!r} badly: {error}") from None
        return TensorInfo(code, tuple(shape), begin, end)

    def _damaged(self, reason: str) -> DamagedSnapshotError:
        return DamagedSnapshotError(f"{self._path.name} {reason}", path=self._path)

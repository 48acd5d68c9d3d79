"""A state taken apart, to the files of a snapshot: `state.json` and one tensor file per section."""

from __future__ import annotations

import json
from functools import cached_property
from typing import TYPE_CHECKING

from resumable_trainer.durable.files import Files, NewFile, write_new_file
from resumable_trainer.errors import UnsafeValueError
from resumable_trainer.snapshot.layout import STATE, TENSORS_SUFFIX
from resumable_trainer.snapshot.manifest import FileEntry
from resumable_trainer.snapshot.tensors import write_tensors
from resumable_trainer.snapshot.values import MAX_STATE_BYTES

if TYPE_CHECKING:
    from pathlib import Path

    from typing_extensions import Buffer

    from resumable_trainer.durable.digest import FileDigest
    from resumable_trainer.snapshot.tree import Flat


_HEADER_BYTES = 4096
_ENTRY_BYTES = 256  # a tensor's line in a header; names are longer rarely, and the estimate is one
_MANIFEST_BYTES = 65536


def encode_values(flat: Flat) -> bytes:
    """The bytes of `state.json`.

    Raises:
        UnsafeValueError: More than is ever read back.
    """
    values = json.dumps(flat.values, separators=(",", ":"), allow_nan=False).encode()
    if len(values) > MAX_STATE_BYTES:
        raise UnsafeValueError(
            f"the state's plain values take {len(values):,} bytes, at most {MAX_STATE_BYTES:,} are read back",
            found=len(values),
            expected=MAX_STATE_BYTES,
            hint="keep large lists of numbers in tensors or arrays",
        )
    return values


class StateFiles:
    """Content of a snapshot: a state taken apart.

    Args:
        flat: CPU tensors that nobody changes any more, and values.

    Every method raises `UnsafeValueError` if there are more values than are ever read back.
    """

    def __init__(self, flat: Flat) -> None:
        self._flat = flat

    @cached_property
    def _values(self) -> bytes:
        return encode_values(self._flat)

    def size(self) -> tuple[int, int]:
        """Bytes that it takes, headers and manifest included, and how many new files and directories."""
        flat = self._flat
        headers = sum(_HEADER_BYTES + _ENTRY_BYTES * len(tensors) for tensors in flat.tensors.values())
        tensors = sum(t.numel() * t.element_size() for named in flat.tensors.values() for t in named.values())
        return len(self._values) + headers + tensors + _MANIFEST_BYTES, len(flat.tensors) + 3

    def write(self, files: Files, directory: Path) -> dict[str, FileEntry]:
        """Write and sync every file but the manifest; what the manifest is to say of each.

        Args:
            files: Primitive operations.
            directory: A temporary directory; its own entries are synced at the commit.

        Raises:
            OSError: A file could not be made durable; the directory is to be thrown away.
        """
        entries = {STATE: _entry(write_new_file(files, directory / STATE, self._values))}
        for section, tensors in self._flat.tensors.items():
            name = section + TENSORS_SUFFIX
            with NewFile(directory / name, files=files) as file:
                write_tensors(file, tensors)
            entries[name] = _entry(file.digest)
        return entries

    def in_memory(self) -> dict[str, bytes]:
        """The same files as bytes by name; for small states."""
        found = {STATE: self._values}
        for section, tensors in self._flat.tensors.items():
            pieces = _Pieces()
            write_tensors(pieces, tensors)
            found[section + TENSORS_SUFFIX] = b"".join(pieces)
        return found


class _Pieces(list["Buffer"]):
    def write(self, data: Buffer) -> None:
        self.append(data)


def _entry(digest: FileDigest) -> FileEntry:
    return FileEntry(num_bytes=digest.num_bytes, digest=digest.digest)

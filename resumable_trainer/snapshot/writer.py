"""A state taken apart, to the files of a snapshot: `state.json` and one tensor file per section."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from resumable_trainer.durable.files import Files, NewFile, write_new_file
from resumable_trainer.errors import UnsafeValueError
from resumable_trainer.snapshot.layout import STATE, TENSORS_SUFFIX
from resumable_trainer.snapshot.manifest import FileEntry
from resumable_trainer.snapshot.tensors import write_tensors
from resumable_trainer.snapshot.values import MAX_STATE_BYTES

if TYPE_CHECKING:
    from pathlib import Path

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


def size(flat: Flat, values: bytes) -> tuple[int, int]:
    """Bytes a snapshot takes, headers and manifest included, and how many new files and directories."""
    headers = sum(_HEADER_BYTES + _ENTRY_BYTES * len(tensors) for tensors in flat.tensors.values())
    tensors = sum(t.numel() * t.element_size() for named in flat.tensors.values() for t in named.values())
    return len(values) + headers + tensors + _MANIFEST_BYTES, len(flat.tensors) + 3


def write_files(files: Files, directory: Path, flat: Flat, values: bytes) -> dict[str, FileEntry]:
    """Write and sync every file but the manifest; what the manifest is to say of each.

    Args:
        files: Primitive operations.
        directory: A temporary directory; its own entries are synced at the commit.
        flat: CPU tensors that nobody changes any more.
        values: What `encode_values` gave.

    Raises:
        OSError: A file could not be made durable; the directory is to be thrown away.
    """
    entries = {STATE: _entry(write_new_file(files, directory / STATE, values))}
    for section, tensors in flat.tensors.items():
        name = section + TENSORS_SUFFIX
        with NewFile(directory / name, files=files) as file:
            write_tensors(file, tensors)
        entries[name] = _entry(file.digest)
    return entries


def _entry(digest: FileDigest) -> FileEntry:
    return FileEntry(num_bytes=digest.num_bytes, digest=digest.digest)

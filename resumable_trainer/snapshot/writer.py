"""A state taken apart, to the files of a snapshot: `state.json` and one tensor file per section."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from resumable_trainer.durable.files import Files, NewFile, write_new_file
from resumable_trainer.snapshot.layout import STATE, TENSORS_SUFFIX
from resumable_trainer.snapshot.manifest import FileEntry
from resumable_trainer.snapshot.tensors import write_tensors

if TYPE_CHECKING:
    from pathlib import Path

    from resumable_trainer.durable.digest import FileDigest
    from resumable_trainer.snapshot.tree import Flat


def write_files(files: Files, directory: Path, flat: Flat) -> dict[str, FileEntry]:
    """Write and sync every file but the manifest; what the manifest is to say of each.

    Args:
        files: Primitive operations.
        directory: A temporary directory; its own entries are synced at the commit.
        flat: CPU tensors that nobody changes any more, and values.

    Raises:
        OSError: A file could not be made durable; the directory is to be thrown away.
    """
    text = json.dumps(flat.values, separators=(",", ":"), allow_nan=False)
    entries = {STATE: _entry(write_new_file(files, directory / STATE, text.encode()))}
    for section, tensors in flat.tensors.items():
        name = section + TENSORS_SUFFIX
        with NewFile(directory / name, files=files) as file:
            write_tensors(file, tensors)
        entries[name] = _entry(file.digest)
    return entries


def _entry(digest: FileDigest) -> FileEntry:
    return FileEntry(num_bytes=digest.num_bytes, digest=digest.digest)

"""A state taken apart, to the files of a snapshot: `state.json` and one tensor file per section."""

from __future__ import annotations

import json
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

from resumable_trainer.durable.files import Files, NewFile, write_new_file
from resumable_trainer.errors import UnsafeValueError
from resumable_trainer.snapshot.layout import STATE, TENSORS_SUFFIX
from resumable_trainer.snapshot.manifest import FileEntry
from resumable_trainer.snapshot.tensors import Image
from resumable_trainer.snapshot.unchanged import Unchanged
from resumable_trainer.snapshot.values import MAX_STATE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import torch
    from typing_extensions import Buffer

    from resumable_trainer.durable.digest import FileDigest
    from resumable_trainer.snapshot.tree import Flat


_MANIFEST_BYTES = 65536
_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


class Worked:
    """What writing the snapshot before has worked out, good for what is the very same in the next one.

    Attributes:
        images: By section: its tensors, and how they lie in memory.
        texts: By section: its values, and their JSON.
        unchanged: Files that need not be written again.
    """

    def __init__(self) -> None:
        self.images: dict[str, tuple[Mapping[str, torch.Tensor], Image]] = {}
        self.texts: dict[str, tuple[Any, str]] = {}
        self.unchanged = Unchanged()

    def image(self, section: str, tensors: Mapping[str, torch.Tensor]) -> Image:
        """How a section's tensors lie; worked out anew unless the very same dict of them is given again."""
        known = self.images.get(section)
        if known is None or known[0] is not tensors:
            self.images[section] = known = (tensors, Image(tensors))
        return known[1]

    def text(self, section: str, values: Any) -> str:
        """JSON of a section's values; written anew unless the very same object is given again."""
        known = self.texts.get(section)
        if known is None or known[0] is not values:
            self.texts[section] = known = (values, _encode(values))
        return known[1]


def encode_values(flat: Flat, worked: Worked | None = None) -> bytes:
    """The bytes of `state.json`.

    Args:
        flat: Its values.
        worked: From the snapshot before.

    Raises:
        UnsafeValueError: More than is ever read back.
    """
    worked = worked or Worked()
    fields = (f"{json.dumps(name)}:{worked.text(name, inner)}" for name, inner in flat.values.items())
    values = f"{{{','.join(fields)}}}".encode()
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
        worked: From the snapshot before; may be used by one snapshot at a time.

    Every method raises `UnsafeValueError` if there is more than is ever read back.
    """

    def __init__(self, flat: Flat, worked: Worked | None = None) -> None:
        self._flat = flat
        self._worked = worked or Worked()

    @cached_property
    def _values(self) -> bytes:
        return encode_values(self._flat, self._worked)

    def size(self) -> tuple[int, int]:
        """Bytes that it takes, headers and manifest included, and how many new files and directories."""
        tensors = sum(image.num_bytes for image in self._images.values())
        return len(self._values) + tensors + _MANIFEST_BYTES, len(self._flat.tensors) + 3

    @cached_property
    def _images(self) -> dict[str, Image]:
        """By name of the file."""
        worked, tensors = self._worked, self._flat.tensors
        worked.images = {section: known for section, known in worked.images.items() if section in tensors}
        return {section + TENSORS_SUFFIX: worked.image(section, named) for section, named in tensors.items()}

    def write(self, files: Files, directory: Path) -> dict[str, FileEntry]:
        """Write and sync every file but the manifest, or link what is unchanged; what the manifest is to say of each.

        Args:
            files: Primitive operations.
            directory: A temporary directory; its own entries are synced at the commit.

        Raises:
            OSError: A file could not be made durable; the directory is to be thrown away.
        """
        entries = {STATE: _entry(write_new_file(files, directory / STATE, self._values))}
        for name, image in self._images.items():
            entries[name] = _linked_or_written(files, directory / name, image, self._worked.unchanged)
        return entries

    @contextmanager
    def writing(self, files: Files, directory: Path) -> Iterator[dict[str, FileEntry]]:
        """As `write`: on entering the block every file is durable already, one after the other."""
        yield self.write(files, directory)

    def in_memory(self) -> dict[str, bytes]:
        """The same files as bytes by name; for small states."""
        found = {STATE: self._values}
        for name, image in self._images.items():
            pieces = _Pieces()
            image.write(pieces)
            found[name] = b"".join(pieces)
        return found


class _Pieces(list["Buffer"]):
    def write(self, data: Buffer) -> None:
        self.append(data)


def _linked_or_written(files: Files, path: Path, image: Image, unchanged: Unchanged) -> FileEntry:
    if unchanged.is_likely(path.name):
        entry = _entry(image.digest())
        if unchanged.link(files, path, entry):
            return entry
    with NewFile(path, files=files) as file:
        image.write(file)
    return _entry(file.digest)


def _entry(digest: FileDigest) -> FileEntry:
    return FileEntry(num_bytes=digest.num_bytes, digest=digest.digest)

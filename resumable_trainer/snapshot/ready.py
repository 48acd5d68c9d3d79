"""The files of a snapshot as bytes in memory, ready to be written. Free of torch."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from resumable_trainer.durable.files import Files, NewFile
from resumable_trainer.snapshot.manifest import FileEntry

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

_MANIFEST_BYTES = 65536


class ReadyFiles:
    """Content of a snapshot, all files but the manifest.

    Args:
        files: Bytes by name of the file.
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self._files = files

    def size(self) -> tuple[int, int]:
        """Bytes that it takes, the manifest included, and how many new files and directories."""
        return sum(map(len, self._files.values())) + _MANIFEST_BYTES, len(self._files) + 2

    @contextmanager
    def writing(self, files: Files, directory: Path) -> Iterator[dict[str, FileEntry]]:
        """Write every file, and sync each on leaving the block; gives what the manifest is to say of them.

        Raises:
            OSError: A file could not be made durable; the directory is to be thrown away.
        """
        with ExitStack() as leaving:
            opened = {name: leaving.enter_context(NewFile(directory / name, files=files)) for name in self._files}
            for name, data in self._files.items():
                opened[name].write(data)
            for file in opened.values():
                file.start_writeback()
            digests = {name: file.digest for name, file in opened.items()}
            yield {name: FileEntry(num_bytes=each.num_bytes, digest=each.digest) for name, each in digests.items()}

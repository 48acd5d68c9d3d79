"""A snapshot held open while its state is put back: what is in it first, then the bytes, each checked once.

A tensor file whose digest was not checked beforehand is checked while it is read into place (`fill`), or
before anything is taken from it.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Self

from resumable_trainer.snapshot import verify
from resumable_trainer.snapshot.in_place import fill
from resumable_trainer.snapshot.layout import TENSORS_SUFFIX
from resumable_trainer.snapshot.outline import Describe, Outliner
from resumable_trainer.snapshot.reader import Reader
from resumable_trainer.snapshot.values import read_values

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping
    from pathlib import Path
    from types import TracebackType

    import torch

    from resumable_trainer.snapshot.manifest import Manifest
    from resumable_trainer.snapshot.tensors import TensorFile


class OpenSnapshot:
    """A snapshot whose files are open; a context manager.

    Args:
        path: Its directory.
        manifest: Its manifest, verified together with all files but those of tensors.
        is_verified: Whether those were, too.

    Raises:
        DamagedSnapshotError: Its values are not what the format says.
    """

    def __init__(self, path: Path, manifest: Manifest, *, is_verified: bool) -> None:
        self._path = path
        self._manifest = manifest
        self._reader = Reader(path, manifest)
        self._values = read_values(path, manifest)
        self._unchecked = set() if is_verified else {n for n in manifest.files if n.endswith(TENSORS_SUFFIX)}
        self._stack = ExitStack()
        self._open: dict[str, TensorFile] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def names(self) -> list[str]:
        """Names of the sections."""
        return list(self._values)

    def outlines(self, names: Iterable[str], describe: Describe) -> dict[str, Any]:
        """The trees of some sections with a description in the place of each tensor.

        Raises:
            DamagedSnapshotError: The files do not hold what the format says.
        """
        outliner = Outliner(self._file, describe)
        with self._reader.decoding():
            return {name: outliner.value(self._values[name]) for name in names}

    def fills(self, section: str, names: Collection[str]) -> bool:
        """Whether these are the names of all tensors in a section's file."""
        if section + TENSORS_SUFFIX not in self._manifest.files:
            return not names
        return set(self._file(section).names()) == set(names)

    def check(self, *, but: Collection[str] = ()) -> None:
        """Check the files that were not checked yet, without those of some sections.

        Raises:
            DamagedSnapshotError: One is not what was committed.
        """
        for name in sorted(self._unchecked - {section + TENSORS_SUFFIX for section in but}):
            verify.verify_file(self._path, name, self._manifest.files[name])
            self._unchecked.discard(name)

    def sections(self, *, but: Collection[str] = ()) -> tuple[dict[str, Any], set[str]]:
        """All trees without those of some sections, as they were saved; every tensor is fresh.

        Returns:
            The trees by section, and which of the sections left out hold tensors that are these trees', too.

        Raises:
            DamagedSnapshotError: The files do not hold what the format says.
        """
        others = {name: encoded for name, encoded in self._values.items() if name not in but}
        shared: set[str] = set()

        def read(section: str, name: str) -> torch.Tensor:
            if section in but:
                shared.add(section)
                self.check(but=[name for name in but if name != section])
            return self._file(section).read(name)

        return self._reader.unflatten(others, read), shared

    def fill(self, section: str, targets: Mapping[str, torch.Tensor]) -> None:
        """Read a section's tensors into targets, see `in_place.fill`, and check the file on the way.

        Raises:
            DamagedSnapshotError: It is not what was committed; it has been read into the targets.
        """
        name = section + TENSORS_SUFFIX
        if name in self._manifest.files:
            found = fill(self._file(section), targets)
            verify.check_digest(self._path, name, self._manifest.files[name], found)
            self._unchecked.discard(name)

    def _file(self, section: str) -> TensorFile:
        if section not in self._open:
            self._open[section] = self._stack.enter_context(self._reader.tensor_file(section))
        return self._open[section]

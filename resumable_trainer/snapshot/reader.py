"""A verified snapshot's files, back to the trees that were saved."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from resumable_trainer.errors import DamagedSnapshotError, ResumableTrainerError
from resumable_trainer.snapshot.layout import STATE, TENSORS_SUFFIX
from resumable_trainer.snapshot.tensors import TensorFile
from resumable_trainer.snapshot.tree import BAD_VALUES, unflatten
from resumable_trainer.snapshot.values import read_values

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import torch

    from resumable_trainer.snapshot.manifest import Manifest


class Reader:
    """Reads one snapshot.

    Tensors are read into memory of their own, not mapped: a file truncated under a mapping would
    kill the process.

    Args:
        path: The snapshot's directory.
        manifest: Its manifest, verified together with the files by `verify`.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self._path = path
        self._manifest = manifest

    def sections(self) -> dict[str, Any]:
        """All trees by section, as they were saved; every tensor is fresh.

        Raises:
            DamagedSnapshotError: The files do not hold what the format says.
        """
        return self._unflatten(read_values(self._path, self._manifest))

    def section_on_cpu(self, name: str) -> Any:
        """One tree as it was saved, all of its tensors on the CPU.

        Raises:
            DamagedSnapshotError: The files do not hold what the format says, or no such section.
        """
        values = read_values(self._path, self._manifest)
        if name not in values:
            raise DamagedSnapshotError(f"{STATE} holds no section {name!r}", path=self._path)
        return self._unflatten({name: _without_devices(values[name])})[name]

    def _unflatten(self, values: dict[str, Any]) -> dict[str, Any]:
        with ExitStack() as stack:
            open_files: dict[str, TensorFile] = {}

            def read(section: str, name: str) -> torch.Tensor:
                if section not in open_files:
                    open_files[section] = stack.enter_context(self.tensor_file(section))
                return open_files[section].read(name)

            return self.unflatten(values, read)

    def unflatten(self, values: dict[str, Any], read: Callable[[str, str], torch.Tensor]) -> dict[str, Any]:
        """Trees from the snapshot's values; `read(section, name)` gives a tensor.

        Raises:
            DamagedSnapshotError: The values do not describe a state.
        """
        with self.decoding():
            return unflatten(values, read)

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Values that `flatten` does not write are damage.

        Raises:
            DamagedSnapshotError: There were such values.
            ResumableTrainerError: There was not enough memory.
        """
        try:
            yield
        except DamagedSnapshotError:
            raise
        except BAD_VALUES as error:
            raise DamagedSnapshotError(f"{STATE} does not describe a state: {error}", path=self._path) from error
        except MemoryError as error:  # not damaged: another machine may hold it
            raise ResumableTrainerError(f"{self._path} does not fit into memory", path=self._path) from error

    def tensor_file(self, section: str) -> TensorFile:
        """The file of a section's tensors, opened.

        Raises:
            DamagedSnapshotError: There is none, or it is none.
        """
        name = section + TENSORS_SUFFIX
        if name not in self._manifest.files:
            raise DamagedSnapshotError(f"{STATE} speaks of {name!r}, the manifest does not", path=self._path)
        return TensorFile(self._path / name)


def _without_devices(encoded: Any) -> Any:
    """The same values, tensors without the device on which they were."""
    if isinstance(encoded, list):
        return [_without_devices(inner) for inner in encoded]
    if isinstance(encoded, dict):
        is_tensor = "$tensor" in encoded
        return {key: _without_devices(inner) for key, inner in encoded.items() if not (is_tensor and key == "device")}
    return encoded

"""The values of a snapshot as they stand in `state.json`: typed JSON, tensors as references. Free of torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from resumable_trainer.durable.digest import reading
from resumable_trainer.errors import DamagedSnapshotError
from resumable_trainer.snapshot import strict_json
from resumable_trainer.snapshot.layout import STATE

if TYPE_CHECKING:
    from pathlib import Path

    from resumable_trainer.snapshot.manifest import Manifest

MAX_STATE_BYTES = 256 << 20


def read_values(path: Path, manifest: Manifest) -> dict[str, Any]:
    """Typed JSON by section of a snapshot that verifies.

    Args:
        path: The snapshot's directory.
        manifest: Its manifest.

    Raises:
        DamagedSnapshotError: The file does not hold what the format says.
    """
    if STATE not in manifest.files:
        raise DamagedSnapshotError(f"the manifest lists no {STATE}", path=path)
    with reading(path / STATE) as file:
        data = file.read(MAX_STATE_BYTES + 1)
    try:
        values = strict_json.parse(data, max_bytes=MAX_STATE_BYTES)
    except ValueError as error:
        raise DamagedSnapshotError(f"{STATE}: {error}", path=path) from error
    if not isinstance(values, dict):
        raise DamagedSnapshotError(f"{STATE} is no object", path=path)
    return values

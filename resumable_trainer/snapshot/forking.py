"""Forking: a new run from a snapshot of another. Free of torch.

Policy: every byte is copied and read again; nothing is shared, so that damage to one run never reaches the
other. The new run has an identity of its own; its first manifest names the snapshot that it is a copy of
as its parent, with that manifest's digest. The metric rows that the snapshot counts come along.
"""

from __future__ import annotations

import json
import secrets
from typing import TYPE_CHECKING, Any

from resumable_trainer.durable.digest import digest_bytes, reading
from resumable_trainer.durable.files import Files, NewFile
from resumable_trainer.errors import DamagedSnapshotError
from resumable_trainer.snapshot.layout import RUN_JSON
from resumable_trainer.snapshot.manifest import FileEntry
from resumable_trainer.snapshot.new_run import new_run, now
from resumable_trainer.snapshot.store import still_there

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from resumable_trainer.snapshot.manifest import Manifest
    from resumable_trainer.snapshot.selected import Selected

_CHUNK_BYTES = 1 << 20
_MAX_IDENTITY_BYTES = 1 << 20


def fork(
    source: Selected, directory: Path, *, start: Mapping[str, Any] | None = None, files: Files | None = None
) -> Manifest:
    """Make a new run directory that continues from a copy of a snapshot.

    Args:
        source: The snapshot; it verifies.
        directory: The new run directory; the name must be free.
        start: How the source was started ("command", "directory"), for whoever resumes the fork.
        files: Primitive operations.

    Returns:
        The manifest of the new run's snapshot.

    Raises:
        UsageError: The name is taken.
        DamagedSnapshotError: The metric journal does not hold what the snapshot counts, or a file is
            no longer what it was when it was verified.
        SnapshotWriteError: There is no room for it.
    """
    files = files if files is not None else Files()
    old = source.manifest
    rows = _rows(source)
    run_id = secrets.token_hex(8)
    origin = {
        "run_id": old.run_id,
        "directory": str(source.run.resolve()),
        "snapshot": old.name,
        "digest": old.own_digest,
    }
    lineage = {"run_id": run_id, "parent": old.name, "parent_digest": old.own_digest, "created": now("milliseconds")}
    with new_run(directory, num_bytes=old.total_bytes + len(rows), files=files) as new:
        manifest = new.write_snapshot(
            old.name,
            lambda target: {name: _copy(source.path / name, target / name, files) for name in old.files},
            lambda entries: old.model_copy(update={**lineage, "files": entries}),
        )
        if manifest.files != old.files:
            raise DamagedSnapshotError(f"{source.path} has changed while it was copied", path=source.path)
        new.write_metrics(rows)
        identity = _identity(source.run)
        new.write_identity(
            {"run_id": run_id, "seed": identity.get("seed"), "versions": old.saved_by, "forked_from": origin},
            {"event": "forked", "generation": old.generation, "from": origin, **(start or {})},
        )
    return manifest


def _rows(source: Selected) -> bytes:
    """The metric rows that the snapshot counts."""
    mark = source.manifest.journal
    if mark is None or mark.num_bytes == 0:
        return b""
    try:
        with reading(source.journal) as file:
            rows = file.read(mark.num_bytes)
    except (FileNotFoundError, ValueError) as error:
        raise DamagedSnapshotError(f"{source.journal} cannot be copied: {error}", path=source.journal) from None
    if len(rows) != mark.num_bytes or digest_bytes(rows) != mark.digest:
        raise DamagedSnapshotError(
            f"{source.journal} does not hold the {mark.rows} rows that {source.manifest.name} counts",
            path=source.journal,
            hint="resume the run first: it keeps the damaged journal aside and goes on with what can be read",
        )
    return rows


def _copy(source: Path, target: Path, files: Files) -> FileEntry:
    with still_there(source.parent), reading(source) as old, NewFile(target, files=files) as new:
        while chunk := old.read(_CHUNK_BYTES):
            new.write(chunk)
    return FileEntry(num_bytes=new.digest.num_bytes, digest=new.digest.digest)


def _identity(run: Path) -> dict[str, Any]:
    """What the source's `run.json` says; nothing if it is not there or cannot be read as JSON."""
    try:
        with reading(run / RUN_JSON) as file:
            fields = json.loads(file.read(_MAX_IDENTITY_BYTES))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}

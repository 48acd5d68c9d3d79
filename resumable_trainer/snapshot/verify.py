"""Does a snapshot verify? The one answer that latest, list, the command line and reports share.

Free of torch. Cost: every byte of the snapshot is read once, at about memory or disk speed.
"""

from __future__ import annotations

import contextlib
import os
import stat
from typing import TYPE_CHECKING

from resumable_trainer.durable.digest import FileDigest, digest_file, reading
from resumable_trainer.errors import DamagedSnapshotError
from resumable_trainer.snapshot.layout import MANIFEST, TENSORS_SUFFIX, Position, snapshot_name

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from resumable_trainer.snapshot.manifest import FileEntry, Manifest

_MAX_NAME_BYTES = 255  # of a file name, on every file system in use


def verify(path: Path) -> Manifest:
    """Check everything about a snapshot that can be checked without its meaning.

    Raises:
        DamagedSnapshotError: It is not exactly what was committed; the message says why.
        OSError: It cannot be read; an I/O error is not "damaged" and not "nothing there".
    """
    manifest = read_manifest(path)
    verify_files(path, manifest)
    return manifest


def verify_files(path: Path, manifest: Manifest) -> None:
    """Check every file that a snapshot's manifest lists.

    Raises:
        DamagedSnapshotError: They are not exactly what was committed; the message says why.
        OSError: They cannot be read.
    """
    for name, entry in manifest.files.items():
        verify_file(path, name, entry)


def read_manifest(path: Path) -> Manifest:
    """The snapshot's manifest, verified itself; the other files are not looked at.

    Raises:
        DamagedSnapshotError: It is missing or not what was written.
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:  # it was listed, and whoever holds the run has deleted it since
        raise _damaged(path, "it is gone") from None
    if not stat.S_ISDIR(mode):
        raise _damaged(path, "it is not a directory")
    from resumable_trainer.snapshot import manifest as manifest_module  # pydantic takes longer than all else of a look

    try:
        with reading(path / MANIFEST) as file:
            data = file.read(manifest_module.MAX_BYTES + 1)
    except FileNotFoundError:
        raise _damaged(path, f"{MANIFEST} is missing") from None
    except ValueError as error:
        raise _damaged(path, str(error)) from None
    try:
        manifest = manifest_module.from_bytes(data)
    except DamagedSnapshotError as error:
        raise _damaged(path, str(error)) from error
    if manifest.name != path.name:
        raise _damaged(path, f"{MANIFEST} is that of {manifest.name}")
    at = manifest.position
    if snapshot_name(Position(at.epoch, at.batch, at.step), epoch_complete=manifest.epoch_complete) != path.name:
        raise _damaged(path, f"{MANIFEST} speaks of another position: epoch {at.epoch}, step {at.step}")
    return manifest


def verify_outline(path: Path) -> Manifest:
    """All of `verify` but the digests of tensor files: for who hashes those while reading them.

    Raises:
        DamagedSnapshotError: It is not what was committed; the message says why.
        OSError: It cannot be read.
    """
    manifest = read_manifest(path)
    for name, entry in manifest.files.items():
        if name.endswith(TENSORS_SUFFIX):
            with _readable(path, name):
                _check_length(path, name, entry)
        else:
            verify_file(path, name, entry)
    return manifest


def verify_file(path: Path, name: str, entry: FileEntry) -> None:
    """Check one file of a snapshot against its entry in the manifest.

    Raises:
        DamagedSnapshotError: It is not what was committed; the message says why.
    """
    with _readable(path, name):
        _check_length(path, name, entry)
        check_digest(path, name, entry, digest_file(path / name))


def check_digest(path: Path, name: str, entry: FileEntry, found: FileDigest) -> None:
    """Compare what was found in a file with its entry in the manifest.

    Raises:
        DamagedSnapshotError: They differ.
    """
    if found.num_bytes != entry.num_bytes or found.digest != entry.digest:
        raise _damaged(path, f"{name} has digest {found.digest[:8]}.., the manifest says {entry.digest[:8]}..")


def _check_length(path: Path, name: str, entry: FileEntry) -> None:
    if (
        "/" in name
        or name in ("", ".", "..", MANIFEST)
        or "\0" in name
        or len(name.encode(errors="replace")) > _MAX_NAME_BYTES
    ):
        raise _damaged(path, f"{MANIFEST} lists {name!r}, which is no file name")
    size = os.lstat(path / name).st_size
    if size != entry.num_bytes:
        raise _damaged(path, f"{name} has {size} bytes, the manifest says {entry.num_bytes}")


@contextlib.contextmanager
def _readable(path: Path, name: str) -> Iterator[None]:
    """A file that is missing, or none that can be read from end to end, is damage."""
    try:
        yield
    except FileNotFoundError:
        raise _damaged(path, f"{name} is missing") from None
    except DamagedSnapshotError:
        raise
    except ValueError as error:
        raise _damaged(path, str(error)) from None


def _damaged(path: Path, reason: str) -> DamagedSnapshotError:
    return DamagedSnapshotError(reason, path=path)

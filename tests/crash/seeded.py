"""Deliberate faults in the code that commits, recovers and locks: a laboratory that misses one proves nothing.

Each is put in by replacing a function of the package in this process, and taken out again on leaving.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from faults import make_ready

from resumable_trainer.durable import digest
from resumable_trainer.durable import journal as journal_module
from resumable_trainer.durable import lock as lock_module
from resumable_trainer.durable.files import Files, NewFile
from resumable_trainer.durable.lock import RunLock
from resumable_trainer.errors import DamagedSnapshotError
from resumable_trainer.loop.record import Record
from resumable_trainer.manager import StateManager
from resumable_trainer.snapshot import raw, store, tree, verify
from resumable_trainer.snapshot.committer import Committer
from resumable_trainer.snapshot.raw import RawTensorFile, TensorInfo
from resumable_trainer.snapshot.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from resumable_trainer.snapshot.manifest import FileEntry

_sync, _sync_directory, _exit = Files.sync, Files.sync_directory, NewFile.__exit__


def _nothing(*args: Any, **kwargs: Any) -> None:
    """In place of what should be done."""


def _name(fd: int) -> str:
    return os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))


def _data_not_synced(self: Files, fd: int) -> None:
    if not _name(fd).endswith(".safetensors"):
        _sync(self, fd)


def _manifest_not_synced(self: Files, fd: int) -> None:
    if _name(fd) != "manifest.json":
        _sync(self, fd)


def _journal_not_synced(self: Files, fd: int) -> None:
    if _name(fd) != "metrics.jsonl":
        _sync(self, fd)


def _new_directory_not_synced(self: Files, path: Path) -> None:
    if not path.name.startswith(".tmp-"):
        _sync_directory(self, path)


def _parent_not_synced(self: Files, path: Path) -> None:
    if path.name != "snapshots":
        _sync_directory(self, path)


def _run_directory_not_synced(self: Files, path: Path) -> None:
    if not (path / "run").is_dir():
        _sync_directory(self, path)


def _sync_before_flush(self: NewFile, *error: Any) -> None:
    """What a buffered writer does whose buffer is flushed by close: the last bytes come after the sync."""
    self._files.sync(self._fd)
    if (held := getattr(self, "held", b"")) and error[0] is None:
        self._files.write(self._fd, held)
    self._files.close(self._fd)


def _buffered_write(self: NewFile, data: Any) -> None:
    """Keep the last piece for the close."""
    view = memoryview(data)
    if view.nbytes:
        view = view.cast("B")
        self._digest.update(view)
        held = getattr(self, "held", b"")
        if held:
            self._files.write(self._fd, held)
        self.held = bytes(view)


def _acknowledged_before_the_parent_is_synced(
    files: Files, temporary: Path, final: Path, *, check: Callable[[], None]
) -> None:
    files.sync_directory(temporary)
    check()
    files.rename(temporary, final)


def _retention_before_durable(self: Committer, flat: Any, facts: Any, hooks: Any) -> Any:
    for name in self._store.names():
        self._store.delete(name)
    self._kept = []
    return _commit(self, flat, facts, hooks)


_commit = Committer.commit


def _failed_sync_tried_again(self: Files, fd: int) -> None:
    """The second call reports success for bytes that are lost; here the loss is played by cutting the file."""
    try:
        _sync(self, fd)
    except OSError:
        os.ftruncate(fd, 0)
        _sync(self, fd)


def _no_digest_check(path: Path) -> Any:
    return verify.read_manifest(path)


def _nothing_compared(*_args: object) -> None:
    """As if every file were the one that was committed."""


def _written_in_place(self: Store, name: str, *, token: str) -> Path:
    """Over the newest snapshot, as a single file `last.pt` would be."""
    final = self.path(name)
    if names := self.names():
        os.rename(self.path(names[-1]), final)
        for entry in final.iterdir():
            entry.unlink()
    else:
        final.mkdir(parents=True)
    return final


def _already_in_place(files: Files, temporary: Path, final: Path, *, check: Callable[[], None]) -> None:
    files.sync_directory(temporary)
    files.sync_directory(final.parent)


def _generators_too_early(self: StateManager, found: Any, *, strictly: bool = True) -> Any:
    """As if something drew from the generators after they were put back."""
    import torch

    report = _apply(self, found, strictly=strictly)
    torch.rand(1)
    return report


_apply = StateManager.apply


def _torn_tail_kept(fd: int, size: int) -> int:
    return size


def _quarantine_deletes(self: Store, name: str, reason: str) -> Path:
    for other in self.names():
        self.delete(other)
    return self.path(name)


def _set_aside_deletes(self: Store, names: Any, reason: str) -> Path:
    for name in self.names():
        self.delete(name)
    return self.run_directory


def _rewind_nothing(self: Record, mark: Any) -> bool:
    return True


def _first_found(self: Store, *, on_damage: Any) -> Any:
    """The newest by name, whether it verifies or not."""
    names = self.names()
    return self.manifest(names[-1]) if names else None


def _lock_inherited(self: RunLock) -> None:
    """As if nothing closed the lock's descriptor in forked children: a copy of it that nobody knows of."""
    _take(self)
    os.dup(self._flock._context.lock_file_fd)


_take = RunLock._take


def _links_followed(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _links_verified(path: Path, name: str, entry: FileEntry) -> None:
    if digest.digest_file(path / name).digest != entry.digest:
        raise DamagedSnapshotError(f"{name} has another digest", path=path)


def _offsets_believed(self: RawTensorFile, fields: Any, data_bytes: int) -> dict[str, TensorInfo]:
    """As a reader does that takes the header at its word."""
    return {
        name: TensorInfo(entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
        for name, entry in fields.items()
        if name != "__metadata__"
    }


def _enums_imported(reader: Any, encoded: list[str]) -> Any:
    found: Any = importlib.import_module(encoded[0])
    for part in encoded[1].split("."):
        found = getattr(found, part)
    return found[encoded[2]]


def _full_disk_is_no_error(self: Files, fd: int, data: Any) -> int:
    """Called written what the disk had no room for."""
    try:
        return _write(self, fd, data)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return memoryview(data).nbytes


_write = Files.write


def _never_locked(self: RunLock) -> None:
    """As if every start found the run free."""


def _generation_by_the_clock(self: RunLock, **settings: Any) -> Any:
    """Launches numbered by the time of day, which may go back."""
    owner = _acquire(self, **settings)
    self._write_record(replace(owner, generation=int(lock_module.datetime.datetime.now().timestamp())))
    return self._owner


_acquire = RunLock.acquire


SEEDED: dict[str, tuple[tuple[object, str, Any], ...]] = {
    "data files not synced": ((Files, "sync", _data_not_synced),),
    "manifest not synced": ((Files, "sync", _manifest_not_synced),),
    "journal not synced before the manifest": ((Files, "sync", _journal_not_synced),),
    "new directory not synced": ((Files, "sync_directory", _new_directory_not_synced),),
    "parent directory not synced": ((Files, "sync_directory", _parent_not_synced),),
    "run directory's own name not synced": ((Files, "sync_directory", _run_directory_not_synced),),
    "sync before flush": ((NewFile, "write", _buffered_write), (NewFile, "__exit__", _sync_before_flush)),
    "acknowledged before the parent is synced": (
        (store, "commit_directory", _acknowledged_before_the_parent_is_synced),
    ),
    "retention before durable": ((Committer, "commit", _retention_before_durable),),
    "failed sync tried again": ((Files, "sync", _failed_sync_tried_again),),
    "no digest check": (
        (store, "verify", _no_digest_check),
        (verify, "verify_file", _nothing_compared),
        (verify, "check_digest", _nothing_compared),
    ),
    "written in place": ((Store, "begin", _written_in_place), (store, "commit_directory", _already_in_place)),
    "journal not rewound": ((Record, "rewind", _rewind_nothing),),
    "generators restored too early": ((StateManager, "apply", _generators_too_early),),
    "torn tail of a journal kept": ((journal_module, "_length_of_full_lines", _torn_tail_kept),),
    "quarantine deletes": ((Store, "quarantine", _quarantine_deletes),),
    "going back deletes": ((Store, "set_aside", _set_aside_deletes),),
    "lock inherited by workers": ((RunLock, "_take", _lock_inherited),),
    "newest by name, not by digest": ((Store, "newest_valid", _first_found),),
    "a full disk is no error": ((Files, "write", _full_disk_is_no_error),),
    "links followed": (
        (digest, "open_regular", _links_followed),
        (raw, "open_regular", _links_followed),
        (verify, "verify_file", _links_verified),
    ),
    "offsets believed": ((RawTensorFile, "_parse", _offsets_believed),),
    "enums imported": ((tree._DECODERS, "$enum", _enums_imported),),
    "lock taken by everybody": ((RunLock, "_lock_unless_held", _never_locked),),
    "generation by the clock": ((RunLock, "acquire", _generation_by_the_clock),),
}


# Which layers are expected to catch each; `crash_lab --seeded` tries these, `--seeded --long` tries all.
EXPECTED: dict[str, tuple[str, ...]] = {
    "data files not synced": ("L3", "L4", "L5"),
    "manifest not synced": ("L3", "L4"),
    "journal not synced before the manifest": ("L3",),
    "new directory not synced": ("L3",),
    "parent directory not synced": ("L3", "L4"),
    "run directory's own name not synced": ("L3",),
    "sync before flush": ("L3",),
    "acknowledged before the parent is synced": ("L3", "L4"),
    "retention before durable": ("L1", "L2", "L6"),
    "failed sync tried again": ("L2",),
    "no digest check": ("L7", "L8"),
    "written in place": ("L1", "L9"),
    "journal not rewound": ("L1",),
    "generators restored too early": ("L1",),
    "torn tail of a journal kept": ("L1", "L7"),
    "quarantine deletes": ("L1",),
    "going back deletes": ("L1",),
    "lock inherited by workers": ("L9",),
    "newest by name, not by digest": ("L7", "L1"),
    "a full disk is no error": ("L6", "L2"),
    "links followed": ("L8",),
    "offsets believed": ("L8",),
    "enums imported": ("L8",),
    "lock taken by everybody": ("L9",),
    "generation by the clock": ("L9",),
}
# Scenarios in which a fault can show, where others would only take time.
SCENARIOS_OF: dict[str, tuple[str, ...]] = {
    "journal not synced before the manifest": ("a run's beginning", "journal rewind"),
    "run directory's own name not synced": ("first snapshot", "a run's beginning"),
    "journal not rewound": ("journal rewind",),
    "generators restored too early": ("journal rewind",),
    "torn tail of a journal kept": ("journal rewind",),
    "quarantine deletes": ("quarantine",),
    "going back deletes": ("going back",),
    **dict.fromkeys(
        ("data files not synced", "manifest not synced", "new directory not synced", "parent directory not synced"),
        ("first snapshot", "n-th snapshot", "in the background", "retention"),
    ),
    **dict.fromkeys(
        ("sync before flush", "acknowledged before the parent is synced", "failed sync tried again"),
        ("first snapshot", "n-th snapshot", "several, synchronous"),
    ),
    "retention before durable": ("n-th snapshot", "retention"),
    "written in place": ("n-th snapshot", "several, synchronous"),
}


@contextlib.contextmanager
def seeded(name: str) -> Iterator[None]:
    """Work with the fault of that name; what lies there before it strikes comes from sound code."""
    make_ready()
    with contextlib.ExitStack() as stack:
        for owner, attribute, fault in SEEDED[name]:
            in_place = patch.dict(owner, {attribute: fault}) if isinstance(owner, dict) else None
            stack.enter_context(in_place or patch.object(owner, attribute, fault))
        yield

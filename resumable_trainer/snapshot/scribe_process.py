"""The scribe's own process: waits for orders, commits, answers; see `scribe`. Free of torch."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resumable_trainer.durable.files import Files, remove_tree
from resumable_trainer.durable.lock import check_still_ours
from resumable_trainer.durable.priority import move_to_core_of_disk
from resumable_trainer.errors import ResumableTrainerError
from resumable_trainer.snapshot.committer import Committer, Hooks, delete_each
from resumable_trainer.snapshot.layout import RUN_LOCK
from resumable_trainer.snapshot.manifest import Manifest
from resumable_trainer.snapshot.ready import ReadyFiles
from resumable_trainer.snapshot.retention import kept_of
from resumable_trainer.snapshot.scribe import READY, REMEMBERED, Committed, failed, receive
from resumable_trainer.snapshot.store import Store

if TYPE_CHECKING:
    from collections.abc import Mapping

    from resumable_trainer.snapshot.manifest import FileEntry

_PR_SET_PDEATHSIG = 1
_NICE = 0
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


class _Desk:
    """Carries out orders for one run directory."""

    def __init__(self, begin: Mapping[str, Any]) -> None:
        directory = Path(begin["directory"])
        device, inode, generation = begin["lock"]
        self._files = Files()
        self._remembered: dict[str, Any] = {}
        self._store = Store(directory, files=self._files)
        self._discarded: list[Path] = []
        self._check = partial(check_still_ours, directory / RUN_LOCK, (device, inode), generation)
        # Opened once and kept: a descriptor learns of every error that the kernel meets after its opening.
        self._rows = -1 if begin["rows"] is None else os.open(begin["rows"], os.O_RDONLY | os.O_CLOEXEC)

    def carry_out(self, order: Mapping[str, Any], files: Mapping[str, bytes]) -> Committed:
        """Commit one snapshot, delete what is not to stay, and tell."""
        notes: list[tuple[str, dict[str, Any]]] = []
        fields = {**self._remembered, **order["manifest"]}
        self._remembered = {name: fields[name] for name in REMEMBERED}

        def note(event: str, **fields: Any) -> None:
            notes.append((event, fields))

        def manifest(entries: Mapping[str, FileEntry]) -> Manifest:
            return Manifest.model_validate({**fields, "files": entries})

        facts = kept_of(manifest({}))
        hooks = Hooks(
            check=self._check,
            begin_before_manifest=self._begin_rows,
            before_manifest=self._sync_rows,
            manifest=manifest,
            note=note,
        )
        committer = Committer(self._store, files=self._files, retain=lambda _: [])  # its owner knows what stays
        written = committer.commit(ReadyFiles(files), facts, hooks)
        at = time.monotonic()
        assert written is not None
        self._remove_discarded()  # whose new names the commit has made durable
        delete_each(order["delete"], self._discard, note)
        return Committed(written.own_digest, written.total_bytes, at, notes)

    def _discard(self, name: str) -> None:
        """Take its name away now, and remove it behind the next commit: that saves a sync for each."""
        self._discarded.append(self._store.discard(name))

    def _remove_discarded(self) -> None:
        discarded, self._discarded = self._discarded, []
        for path in discarded:
            with contextlib.suppress(OSError):  # what stays is swept at the next start
                remove_tree(self._files, path)

    def close(self) -> None:
        """Remove what there is to be removed."""
        if self._discarded:
            with contextlib.suppress(OSError):
                self._files.sync_directory(self._discarded[0].parent)
                self._remove_discarded()

    def _begin_rows(self) -> None:
        if self._rows >= 0:
            self._files.start_writeback(self._rows, 0, 0)  # up to its end

    def _sync_rows(self) -> None:
        if self._rows >= 0:
            self._files.sync(self._rows)


def main() -> None:
    """Serve until the owner closes the connection, or dies."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        # As ready as others to run, but it interrupts nobody: woken by an order, it would begin on the training's core.
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    with socket.socket(fileno=0) as connection:
        received = receive(connection)
        if received is None:
            return
        begin, _ = received
        if os.getppid() != begin["parent"]:
            return  # it died before we could tie ourselves to it
        move_to_core_of_disk(Path(begin["directory"]))
        desk = _Desk(begin)
        connection.sendall(READY)
        while (received := receive(connection)) is not None:
            try:
                answer = desk.carry_out(*received).to_line()
            except (OSError, ValueError, ResumableTrainerError) as error:
                answer = failed(error)
            connection.sendall(answer)
        desk.close()


if __name__ == "__main__":
    with contextlib.suppress(ConnectionError):
        main()

"""All runs below a directory, each in a line: looked up without verifying bytes, so that thousands cost seconds."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from resumable_trainer.durable.files import TEMPORARY_PREFIX
from resumable_trainer.durable.lock import is_alive, read_owner
from resumable_trainer.garbage import WithoutCollections
from resumable_trainer.metrics.account import Account
from resumable_trainer.report.summary import goodput_of, is_run, place_of, state_of
from resumable_trainer.snapshot.layout import EVENTS, RUN_LOCK
from resumable_trainer.snapshot.store import Store

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from resumable_trainer.durable.lock import Owner
    from resumable_trainer.metrics.goodput import Goodput
    from resumable_trainer.snapshot.manifest import Manifest

_MAX_DEPTH = 6


@dataclass(frozen=True)
class Line:
    """One run in the overview.

    Attributes:
        directory: Where it lies.
        state: As in `status`; "unreadable" if its files cannot be read.
        newest: What its newest snapshot says; not verified.
        holder: Who runs it now.
        goodput: Where its time went; None if its events cannot be read.
    """

    directory: Path
    state: str
    newest: Manifest | None = None
    holder: Owner | None = None
    goodput: Goodput | None = None

    def to_json(self) -> dict[str, Any]:
        """One object of `runs --json`."""
        return {
            "run_dir": str(self.directory),
            "state": self.state,
            **place_of(self.newest),
            "saved": self.newest.created if self.newest else None,
            "holder": None if self.holder is None else {"pid": self.holder.pid, "host": self.holder.host},
            "goodput": None if self.goodput is None else self.goodput.to_json(),
        }


def overview(root: Path) -> list[Line]:
    """All runs below a directory, and the directory itself if it is one; in order of their names."""
    with WithoutCollections():
        return [_line(directory) for directory in _runs(root, _MAX_DEPTH)]


def _runs(root: Path, depth: int) -> Iterator[Path]:
    """Run directories; within one there are no others to look for, and links are not followed."""
    try:
        if is_run(root):
            yield root
            return
        with os.scandir(root) as entries:
            names = sorted(e.name for e in entries if e.is_dir(follow_symlinks=False))
    except OSError:
        return
    for name in names if depth else []:
        if not name.startswith((".", TEMPORARY_PREFIX)):
            yield from _runs(root / name, depth - 1)


def _line(directory: Path) -> Line:
    try:
        owner = read_owner(directory / RUN_LOCK)
        holder = owner if owner is not None and is_alive(owner) is not False else None
        newest = Store(directory).newest_readable()
        account = Account.read(directory / EVENTS)
    except (OSError, ValueError):
        return Line(directory, "unreadable")
    is_running = holder is not None
    state = state_of(account, newest, is_running=is_running)
    return Line(directory, state, newest, holder, goodput_of(account, owner, is_running=is_running))

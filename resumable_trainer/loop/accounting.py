"""Noting now and then among a run's events what they come to, so that nobody has to read them all.

Policy: when a snapshot has been committed and the events have grown by `EVERY_BYTES` since the newest state that was
noted, one more is; when a launch ends in order, earlier. That is the work of the thread that has noted the snapshot: a
start does not pay for it, and no launch, however long and however it ends, leaves much more to be read. Free of torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from resumable_trainer.metrics.account import NOTED, Account, newest_noted
from resumable_trainer.snapshot.layout import EVENTS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

EVERY_BYTES = 1 << 15  # more than a hundred events, read in less than a millisecond
AT_END_BYTES = 1 << 13
_LAST = ("finished", "preempted", "interrupted", "failed")
_COMMITTED_BYTES = 512  # of the event of a snapshot, at most


class Accounting:
    """Is told each event of a run that is open.

    Args:
        note: Notes one more.
        tell: Who else is told.
    """

    def __init__(
        self, note: Callable[..., None], *, tell: Callable[[Path, Mapping[str, Any]], None] | None = None
    ) -> None:
        self._note, self._tell = note, tell
        self._noted_upto = 0
        self._to_pass = 0  # snapshots before the events can have grown enough
        self._is_possible = True

    def heard(self, directory: Path, event: Mapping[str, Any]) -> None:
        """Pass an event on, and note what all come to if it is time."""
        if self._tell is not None:
            self._tell(directory, event)
        kind = event["event"]
        limit = EVERY_BYTES if kind == "committed" else AT_END_BYTES if kind in _LAST else None
        if kind == "committed" and self._to_pass > 0:
            self._to_pass -= 1
        elif limit is not None and self._is_possible:
            try:
                self._account(directory / EVENTS, limit)
            except (OSError, ValueError):  # damaged: whoever has to read them says so
                self._is_possible = False

    def _account(self, path: Path, limit: int) -> None:
        size = path.stat().st_size
        if size - self._noted_upto < limit:
            self._to_pass = (limit + self._noted_upto - size) // _COMMITTED_BYTES
            return
        _, self._noted_upto = newest_noted(path)  # by an earlier launch, the first time
        if size - self._noted_upto >= limit:
            account, self._noted_upto = Account.read_up_to(path)
            self._note(NOTED, **account.noted(self._noted_upto))

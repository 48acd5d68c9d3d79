"""When small snapshots come often, they are dictated to a scribe; see `scribe` for why.

Policy: a scribe is started when eight snapshots have come within four seconds, and used from when it is ready. What is
large, or speaks of rows that the operating system does not have whole, goes the ordinary way. A scribe that fails once
is not asked again: the snapshot is written the ordinary way, which knows what to do about failures.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from resumable_trainer.durable.files import Files
from resumable_trainer.snapshot import scribe
from resumable_trainer.snapshot.pending import OrderedSnapshot, PendingSnapshot
from resumable_trainer.snapshot.scribe import REMEMBERED, Scribe, ScribeError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from resumable_trainer.durable.lock import RunLock
    from resumable_trainer.snapshot.committer import Committer
    from resumable_trainer.snapshot.retention import Kept
    from resumable_trainer.snapshot.writer import StateFiles

_OFTEN = 8  # snapshots
_OFTEN_SECONDS = 4.0
_MAX_BYTES = 4 << 20


@dataclass(frozen=True)
class Draft:
    """A snapshot that is to be committed.

    Attributes:
        kept: What retention will know of it.
        content: Its files.
        fields: Gives the fields of its manifest but `files`.
        rows: The journal that must be durable before; None for none.
        committed: Told the bytes and seconds that it took.
        otherwise: Commits it the ordinary way.
    """

    kept: Kept
    content: StateFiles
    fields: Callable[[], dict[str, Any]]
    rows: Path | None
    committed: Callable[[int, float], None]
    otherwise: Callable[[], None]


class Dictation:
    """Gives snapshots to a scribe, if there is to be one.

    Args:
        directory: The run directory.
        committer: Commits in this process, and knows what there is.
        files: Primitive operations; others than the real ones are never left to another process.
        note: Appends to the run's events.
    """

    def __init__(self, directory: Path, *, committer: Committer, files: Files, note: Callable[..., None]) -> None:
        self._directory = directory
        self._committer = committer
        self._note = note
        self._is_allowed = type(files) is Files and scribe.can_be_used()
        self._times: deque[float] = deque(maxlen=_OFTEN)
        self._scribe: Scribe | None = None
        self._told: dict[str, Any] = {}

    def take(self, draft: Draft, lock: RunLock) -> PendingSnapshot | None:
        """Dictate a snapshot; None if it is to go the ordinary way."""
        self._times.append(time.monotonic())
        is_often = len(self._times) == _OFTEN and self._times[-1] - self._times[0] < _OFTEN_SECONDS
        if not self._is_allowed or not (is_often or self._scribe) or draft.content.size()[0] > _MAX_BYTES:
            return None
        newest = self._committer.newest
        if newest is not None and newest.name == draft.kept.name:
            return None  # nothing is to be done
        try:
            if self._scribe is None:
                held = (*lock.identity, lock.generation)
                self._scribe = Scribe(self._directory, lock=held, rows=draft.rows)
            if self._scribe.rows != draft.rows or not self._scribe.is_ready():
                return None
            return self._dictate(self._scribe, draft)
        except (ScribeError, OSError) as error:
            self._give_up(error)
            return None

    def _dictate(self, writing: Scribe, draft: Draft) -> PendingSnapshot:
        started = time.monotonic()
        name = draft.kept.name
        doomed = self._committer.doomed(draft.kept)
        order = {"manifest": self._shortened(draft.fields()), "delete": doomed}
        writing.order(order, draft.content.in_memory())

        def finish() -> None:
            try:
                answer = writing.answer()
            except ScribeError as error:
                self._give_up(error)
                draft.otherwise()
                return
            self._committer.took(draft.kept, answer.own_digest, doomed)
            draft.committed(answer.num_bytes, answer.at - started)
            for event, fields in answer.notes:
                self._note(event, **fields)

        return OrderedSnapshot(name, is_done=writing.has_answered, finish=finish)

    def _shortened(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Without what the scribe knows from the order before."""
        told = {name: fields[name] for name in REMEMBERED}
        if told == self._told:
            return {name: value for name, value in fields.items() if name not in REMEMBERED}
        self._told = told
        return fields

    def _give_up(self, error: Exception) -> None:
        """From now on this process writes by itself."""
        self._is_allowed = False
        self._note("scribe_ended", reason=str(error))
        self.close()

    def close(self) -> None:
        """End the scribe; no snapshot may be in flight."""
        if self._scribe is not None:
            self._scribe.close()
            self._scribe, self._told = None, {}  # the next one knows nothing

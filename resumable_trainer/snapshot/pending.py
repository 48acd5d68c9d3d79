"""A snapshot on its way to the disk: in a thread of its own, or in the scribe's hands. Free of torch."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class PendingSnapshot:
    """A snapshot on its way to the disk.

    Attributes:
        name: Its directory's name below `snapshots/`.
    """

    def __init__(self, name: str, write: Callable[[], None], *, background: bool) -> None:
        self.name = name
        self._write = write
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"snapshot {name}") if background else None
        if self._thread is None:
            self._run()
            self.wait()
        else:
            self._thread.start()

    def _run(self) -> None:
        try:
            self._write()
        except BaseException as error:  # noqa: BLE001 - thread edge: it is raised by wait() in the caller's thread
            self._error = error

    @property
    def done(self) -> bool:
        """Whether it is durable, or has failed."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> None:
        """Block until the snapshot is durable.

        Raises:
            SnapshotWriteError: It could not be made durable; older snapshots stand.
        """
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            error, self._error = self._error, None
            raise error


class OrderedSnapshot(PendingSnapshot):
    """A snapshot that another process commits.

    Args:
        name: Its directory's name.
        is_done: Whether that process has answered.
        finish: Takes its answer, and makes good what it did not do; blocks.
    """

    def __init__(self, name: str, *, is_done: Callable[[], bool], finish: Callable[[], None]) -> None:
        self.name = name
        self._is_done, self._finish = is_done, finish
        self._is_finished = False

    @property
    def done(self) -> bool:
        """Whether it is durable, or has failed."""
        return self._is_finished or self._is_done()

    def wait(self) -> None:
        """Block until the snapshot is durable.

        Raises:
            SnapshotWriteError: It could not be made durable; older snapshots stand.
        """
        if not self._is_finished:
            self._is_finished = True
            self._finish()

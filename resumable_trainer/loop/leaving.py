"""Leaving before the end: who asks for it, how much time is left, and the exit code that it ends with."""

from __future__ import annotations

import contextlib
import math
import os
import time
from typing import TYPE_CHECKING, Any, NoReturn

from resumable_trainer.data.randomness import switching
from resumable_trainer.errors import Interrupted, Preempted, Stopped
from resumable_trainer.loop import clouds, deadline, opening, screen
from resumable_trainer.loop.notices import notices

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable

    from resumable_trainer.loop.keeper import Keeper


class Leaving:
    """Follows notices of the end, in one entering of a run.

    Args:
        keeper: The run's state.

    Attributes:
        stopped: What the run is left with, once it is; a script may catch it, and must leave all the same.
    """

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self.stopped: Stopped | None = None
        self._clouds: clouds.Watch | None = None
        self._tell_saved: Callable[[], None] | None = None
        self._began = math.inf  # to save

    def watch(self) -> None:
        """Ask the clouds, where there is one, from now on."""
        keeper = self._keeper
        notices.may_break = lambda: not switching.now
        sources = clouds.found_here(os.environ, say=self._say) if keeper.settings.probe is None else []
        if sources:
            keeper.manager.costs.extend(opening.snapshot_costs(keeper.settings.directory))
            self._clouds = clouds.Watch(
                sources,
                tell=self._asked,
                seconds_needed=self._seconds_needed,
                say=self._say,
            )

    def _say(self, line: str) -> None:
        self._keeper.screen.say([line])

    def _asked(self, asked: clouds.Asked, end: float | None) -> None:
        self._tell_saved = asked.saved or self._tell_saved
        notices.ask(leave=asked.leave, source=asked.source, deadline=end)

    def _seconds_needed(self) -> float:
        """How long before its end a machine must be left."""
        keeper = self._keeper
        return deadline.seconds_needed(list(keeper.manager.costs), keeper.heart.longest_seconds)

    def save_begins(self) -> None:
        """The last snapshot is about to be taken: let who watches wait for it, and say so if it may be too late."""
        keeper = self._keeper
        self._began = time.monotonic()
        keeper.heart.stopping()
        left = None if notices.deadline is None else notices.deadline - time.monotonic()
        usual = deadline.longer_than(left, keeper.manager.costs)
        if left is not None and usual is not None:
            keeper.screen.say([screen.late(left, usual, keeper.manager.latest)])

    def leave(self, number: signal.Signals, where: str) -> NoReturn:
        """Unwind the user's loops with the exit code of the notice; what was to be saved is durable by now.

        Raises:
            Stopped: Always.
        """
        keeper, began = self._keeper, min(self._began, time.monotonic())
        keeper.heart.stopping()
        keeper.saver.settle()
        kind = Interrupted if number.name == "SIGINT" else Preempted
        latest = keeper.manager.latest
        told: dict[str, Any] = {"source": notices.source} if notices.source else {}
        if notices.deadline is not None:
            told["seconds_left"] = round(notices.deadline - time.monotonic(), 3)
        event = "interrupted" if kind is Interrupted else "preempted"
        told["leaving_seconds"] = round(time.monotonic() - began, 3)  # since then nothing was trained or evaluated
        keeper.note(event, signal=number.name, snapshot=latest, **told)
        if self._tell_saved is not None:
            with contextlib.suppress(OSError, ValueError):  # the state is saved, whatever the cloud makes of that
                self._tell_saved()
        self.stop(kind(screen.left(notices.source or number.name, where, latest, int(kind.exit_code))))

    def stop(self, stopped: Stopped) -> NoReturn:
        """Unwind the user's loops."""
        self.stopped = stopped
        raise stopped

    def close(self) -> None:
        """Ask the clouds no more."""
        if self._clouds is not None:
            self._clouds.stop()

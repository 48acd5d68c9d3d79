"""What a person sees while a run trains: bars on a terminal, lines where there is none.

Policy: a bar is redrawn at most ten times a second, and never reads a device. Without a terminal
(cron, journald, a file) there are no control characters: one line per epoch, and one every 30 s.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from resumable_trainer.loop.journal_lines import marked, priority

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

LINE_SECONDS = 30.0
_REFRESH_SECONDS = 0.1


class Progress:
    """Shows where a run is.

    Args:
        style: "bar", "lines" or "silent".
        clock: Seconds; for tests.

    Attributes:
        clock: Seconds.
        due_at: From when on `refresh` is to be called; every batch looks at it.
    """

    def __init__(self, style: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._style, self.clock = style, clock
        self._epochs: Any = None
        self._batches: Any = None
        self._total_epochs = 0
        self.due_at = 0.0
        self._drawn = self._said = clock()
        self._make_batches: Callable[[], Any] | None = None  # the bar of the epoch under way, until it is needed

    @classmethod
    def for_choice(cls, progress: bool | None) -> Progress:
        """None: bars on a terminal, lines elsewhere; True: bars; False: nothing."""
        if progress is None:
            return cls("bar" if sys.stderr.isatty() else "lines")
        return cls("bar" if progress else "silent")

    def say(self, lines: Sequence[str]) -> None:
        """Show lines for a person, above the bars."""
        if self._style == "silent":
            return
        for line in lines:
            if self._style == "bar":
                _bars().write(line, file=sys.stderr)
            else:
                print(marked(line, priority(line)), file=sys.stderr, flush=True)  # noqa: T201 - the program's screen

    def begin_epochs(self, total: int, done: int) -> None:
        """The loop over epochs begins, `done` of `total` lie behind."""
        self._total_epochs = total
        if self._style == "bar":
            self._epochs = _bars()(total=total, initial=done, desc="epochs", unit="epoch", file=sys.stderr, leave=True)

    def begin_batches(self, epoch: int, total: int | None, done: int) -> None:
        """The loop over an epoch's batches begins, `done` of `total` lie behind."""
        if self._style == "bar":
            self._make_batches = partial(
                _bars(),
                total=total,
                initial=done,
                desc=f"epoch {epoch + 1}/{self._total_epochs}",
                unit="batch",
                file=sys.stderr,
                leave=False,
            )
            if self.clock() - self._drawn >= _REFRESH_SECONDS:
                self._show_batches()  # else it may be over before anybody could read it

    def _show_batches(self) -> None:
        if self._make_batches is not None:
            self._drawn = self.clock()
            self._batches, self._make_batches = self._make_batches(), None

    def refresh(self, epoch: int, step: int, batches: int, values: Mapping[str, float], extra: str) -> None:
        """Redraw the bar, `batches` of the epoch done; or, without a terminal, say a line if the last was 30 s ago."""
        self._drawn = self.clock()
        self.due_at = self._drawn + _REFRESH_SECONDS
        self._show_batches()
        if self._batches is not None:
            self._batches.update(batches - self._batches.n)
            self._batches.set_postfix_str(_joined(values, extra), refresh=False)
        elif self._style == "lines" and self._drawn - self._said >= LINE_SECONDS:
            self._line(epoch, f"step {step}", values, extra)

    def end_batches(self, batches: int | None = None) -> None:
        """The batches of the epoch are over, so many done."""
        self._make_batches = None
        if self._batches is not None:
            if batches is not None:
                self._batches.update(batches - self._batches.n)
            self._batches.close()
            self._batches = None

    def epoch_done(self, epoch: int, values: Mapping[str, float], extra: str) -> None:
        """An epoch is over; its row's values."""
        self.end_batches()
        if self._epochs is not None:
            self._epochs.set_postfix_str(_joined(values, extra), refresh=False)
            self._epochs.update(1)
        elif self._style == "lines":
            self._line(epoch, "", values, extra)

    def go_back(self, total: int, done: int) -> None:
        """The run has gone back: `done` of `total` epochs lie behind now."""
        self._total_epochs = total
        if self._epochs is not None:
            self._epochs.n = done
            self._epochs.refresh()

    def close(self) -> None:
        """Leave the terminal in order."""
        self.end_batches()
        if self._epochs is not None:
            self._epochs.close()
            self._epochs = None

    def _line(self, epoch: int, place: str, values: Mapping[str, float], extra: str) -> None:
        self._said = self.clock()
        parts = [f"epoch {epoch + 1}/{self._total_epochs}", place, _joined(values, extra)]
        self.say([" | ".join(part for part in parts if part)])


def _joined(values: Mapping[str, float], extra: str) -> str:
    shown = " ".join(f"{name} {value:.4g}" for name, value in values.items())
    return " | ".join(part for part in (shown, extra) if part)


def _bars() -> Any:
    """Imported by who shows bars."""
    from tqdm import tqdm

    return tqdm

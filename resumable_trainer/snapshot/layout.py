"""Names in a run directory: build them and take them apart. Free of torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

RUN_JSON = "run.json"
RUN_LOCK = "run.lock"
EVENTS = "events.jsonl"
METRICS = "metrics.jsonl"
SNAPSHOTS = "snapshots"
QUARANTINE = "quarantine"
SET_ASIDE = "set-aside"
COMPILED = "compiled"  # machine code of a Trainer's steps; may be deleted at any time
OWN_NAMES = (RUN_JSON, RUN_LOCK, EVENTS, METRICS, SNAPSHOTS, QUARANTINE, SET_ASIDE, COMPILED)
MANIFEST = "manifest.json"
STATE = "state.json"
TENSORS_SUFFIX = ".safetensors"
FROZEN = ".frozen"  # a section's tensors that are not trained lie in SECTION.frozen.safetensors
OWN_SECTIONS = ("generators", "gradients", "loop", "modes")  # beside the parts

_NAME = re.compile(r"step-([0-9]{9,18})(?:-epoch-([0-9]{6,18}))?")


@dataclass(frozen=True, order=True)
class Position:
    """Where a run stands; all count from 0.

    Attributes:
        epoch: Epochs finished, or the index of the epoch under way.
        batch: Batches finished in that epoch.
        step: Training batches finished since the start of the run.
    """

    epoch: int
    batch: int
    step: int


def epochs_in_words(complete: int) -> str:
    """How many epochs are over."""
    return "1 epoch complete" if complete == 1 else f"{complete} epochs complete"


@dataclass(frozen=True)
class ParsedName:
    """What a snapshot's name says.

    Attributes:
        step: Training batches finished.
        epochs_complete: Epochs finished, if the snapshot was taken after an epoch's body.
    """

    step: int
    epochs_complete: int | None

    @property
    def order(self) -> tuple[int, bool, int]:
        """Sorts names from the oldest to the newest: one step can be within, and after, an epoch."""
        return self.step, self.epochs_complete is not None, self.epochs_complete or 0


def snapshot_name(position: Position, *, epoch_complete: bool) -> str:
    """`step-000000700`, or `step-000000700-epoch-000010` after the tenth epoch's body."""
    name = f"step-{position.step:09d}"
    return f"{name}-epoch-{position.epoch:06d}" if epoch_complete else name


@lru_cache(maxsize=1 << 14)
def parse_name(name: str) -> ParsedName | None:
    """The way back of `snapshot_name`; None if it is no snapshot's name."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    step, epochs = match.groups()
    if _is_padded(step, 9) and (epochs is None or _is_padded(epochs, 6)):
        return ParsedName(int(step), None if epochs is None else int(epochs))
    return None


def _is_padded(digits: str, width: int) -> bool:
    """Whether a number is written as `snapshot_name` does: with zeros up to a width, and none beyond it."""
    return len(digits) == width or digits[0] != "0"

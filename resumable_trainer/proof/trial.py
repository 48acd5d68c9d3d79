"""What one trial is told. Free of torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resumable_trainer.loop.probe import Place


@dataclass(frozen=True)
class Kill:
    """Where a trial ends itself.

    Attributes:
        place: Of the run, see `loop.probe`.
        epoch: Epochs finished there.
        batch: Batches finished in the epoch there.
        number: How many times that place was met with these counts before.
        signal: "SIGKILL", or "SIGTERM" for a notice.
        words: For people.
    """

    place: Place
    epoch: int
    batch: int
    number: int
    signal: str
    words: str

    @property
    def key(self) -> tuple[str, int, int, int]:
        """The moment at which it comes."""
        return self.place, self.epoch, self.batch, self.number


@dataclass(frozen=True)
class Trial:
    """What one trial is told.

    Attributes:
        command: The user's command, as recorded by a run.
        trace: File that the trial appends its trace to.
        scratch: Name of the directory, beside the one that the script names, in which the run takes place; of a
            replay its path.
        run: Name of the run directory therein, one that exists is continued; of a replay the run directory that
            the script names.
        num_epochs: Epochs to train at most.
        num_batches: Batches of each loop at most.
        kill: Where to end; None: at the run's end.
        freeze: Name for a copy of the run directory made when the first snapshot is there.
        steady: Sources of chance to be taken away, see `surroundings`.
        perturb: 0: surroundings as they are; N: as they might be N starts later.
        replay_to: Name of a recorded snapshot: nothing is shortened, and the trial ends when it has made that one.
    """

    command: dict[str, Any]
    trace: str
    scratch: str
    run: str
    num_epochs: int = 0
    num_batches: int = 0
    kill: Kill | None = None
    freeze: str | None = None
    steady: tuple[str, ...] = ()
    perturb: int = 0
    replay_to: str | None = None

    def to_text(self) -> str:
        """One line, for the trial's process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> Trial:
        """The way back of `to_text`."""
        fields = json.loads(text)
        kill = None if fields["kill"] is None else Kill(**fields["kill"])
        return cls(**{**fields, "kill": kill, "steady": tuple(fields["steady"])})

"""What a run's script asks for: checked once, the same each time the run is entered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from resumable_trainer.errors import SettingsError
from resumable_trainer.snapshot.retention import Retention

if TYPE_CHECKING:
    from pathlib import Path

    from resumable_trainer.loop.divergence import OnDivergence
    from resumable_trainer.loop.launch import Command
    from resumable_trainer.loop.probe import Probe
    from resumable_trainer.loop.triggers import SnapshotPolicy
    from resumable_trainer.metrics.early_stopping import EarlyStopping


@dataclass(frozen=True)
class RunSettings:
    """Settings of a `Run`, in the words of its arguments.

    Attributes:
        command: What was started, as it is recorded.
        strict: As the script or the command line says.
        probe: What examines the run; None for a training.

    Raises:
        SettingsError: The seed is none.
    """

    directory: Path
    command: Command
    state: dict[str, object]
    seed: int
    snapshots: SnapshotPolicy
    early_stopping: EarlyStopping | None
    on_divergence: OnDivergence | None
    strict: bool
    probe: Probe | None

    def __post_init__(self) -> None:
        seed = self.seed
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
            raise SettingsError(f"Run: seed is {seed!r}, it must be an int from 0 to 2**63 - 1")

    @property
    def may_go_back(self) -> bool:
        """Whether a run that diverges goes back, and trains on."""
        return self.on_divergence is not None and self.on_divergence.action == "rollback" and self.probe is None

    @property
    def retention(self) -> Retention:
        """Which snapshots stay."""
        policy, stopping = self.snapshots, self.early_stopping
        every_steps = None
        if policy.keep_every is not None and policy.every_steps is not None:
            every_steps = policy.keep_every * policy.every_steps
        return Retention(
            keep_last=policy.keep_last,
            keep_best=policy.keep_best if stopping else 0,
            keep_every=policy.keep_every,
            keep_every_steps=every_steps,
            mode=stopping.mode if stopping else "max",
        )

"""One snapshot of a run, chosen and verified, for commands that read it. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from resumable_trainer.errors import NotFoundError
from resumable_trainer.snapshot.layout import METRICS, SNAPSHOTS
from resumable_trainer.snapshot.store import Store

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from resumable_trainer.snapshot.manifest import Manifest


@dataclass(frozen=True)
class Selected:
    """A snapshot that verifies.

    Attributes:
        run: Its run directory.
        path: Its own.
        manifest: What it says.
        skipped: Newer snapshots that do not verify, with the reason for each.
    """

    run: Path
    path: Path
    manifest: Manifest
    skipped: Mapping[str, str] = field(default_factory=dict)

    @property
    def journal(self) -> Path:
        """The metric journal that it counts: the run's, or the copy beside a snapshot that was set aside."""
        return (self.run if self.path.parent == self.run / SNAPSHOTS else self.path.parent) / METRICS


def select(run: Path, which: str) -> Selected:
    """The snapshot of a run meant by "latest" (the newest that verifies), "best", a step, "epoch:N" or a name.

    Raises:
        NotFoundError: There is none such.
        NoValidSnapshotError: None verifies.
        DamagedSnapshotError: The one that was named does not verify.
    """
    store = Store(run)
    if which == "latest":
        skipped: dict[str, str] = {}
        manifest = store.newest_valid(on_damage=lambda name, error: skipped.update({name: error.message}))
        if manifest is None:
            raise NotFoundError(f"run {run} has no snapshots yet", path=run, found=which)
        return Selected(run, store.path(manifest.name), manifest, skipped)
    manifest = store.verify(store.select(which))
    return Selected(run, store.path(manifest.name), manifest)

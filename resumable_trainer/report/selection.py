"""Which snapshot is meant: words of the command line to one that verifies. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from resumable_trainer.errors import NotFoundError
from resumable_trainer.report.summary import is_run, most_recent, require_run
from resumable_trainer.snapshot.layout import MANIFEST, METRICS, SNAPSHOTS
from resumable_trainer.snapshot.store import Store
from resumable_trainer.snapshot.verify import verify

if TYPE_CHECKING:
    from collections.abc import Mapping

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


def select_by_words(words: str, *, beside: Path | None = None) -> Selected:
    """The snapshot meant by `RUN_DIR`, `RUN_DIR:WHICH`, `WHICH`, or the path of a snapshot's directory.

    Args:
        words: What was typed; a run alone means its latest.
        beside: The run that a bare `WHICH` is looked for in; the most recent one below runs/ if None.

    Raises:
        NotFoundError: There is no such run or snapshot.
    """
    path = Path(words)
    if (path / MANIFEST).is_file():
        return Selected(_run_of(path), path, verify(path))
    if path.is_dir():
        return select(require_run(path), "latest")
    for place, letter in enumerate(words):
        if letter == ":" and place and is_run(Path(words[:place])):
            return select(Path(words[:place]), words[place + 1 :] or "latest")
    directory = words.partition(":")[0]
    if "/" in directory:
        require_run(Path(directory))
    return select(beside if beside is not None else most_recent(), words.removeprefix(":") or "latest")


def _run_of(snapshot: Path) -> Path:
    """The run directory above a snapshot; the directory that it lies in where there is none."""
    absolute = snapshot.absolute()
    return next((parent for parent in absolute.parents[1:3] if is_run(parent)), absolute.parent)

"""Which snapshot is meant: words of the command line to one that verifies. Free of torch."""

from __future__ import annotations

from pathlib import Path

from resumable_trainer.report.summary import is_run, most_recent, require_run
from resumable_trainer.snapshot.layout import MANIFEST
from resumable_trainer.snapshot.selected import Selected, select
from resumable_trainer.snapshot.verify import verify


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
        return Selected(_run_of(path.absolute()), path.absolute(), verify(path))
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
    """The run directory above a snapshot (or two above, if it was set aside); else the one that it lies in."""
    return next((parent for parent in snapshot.parents[1:3] if is_run(parent)), snapshot.parent)

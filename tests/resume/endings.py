"""How a run ended, as bytes: what must not depend on how often it was killed."""

from __future__ import annotations

import json
from pathlib import Path

from resumable_trainer.snapshot.store import Store


def ending(directory: str | Path) -> dict[str, bytes]:
    """Everything that two runs of the same training must share, by name.

    The metric journal; every file but the manifest of the last snapshot (parameters, optimizer,
    generators, loop state); of the manifest the position, the outcome and the best value.
    """
    run = Path(directory)
    store = Store(run)
    name = store.names()[-1]
    manifest = store.verify(name)
    facts = {
        "name": name,
        "outcome": manifest.outcome,
        "best": None if manifest.best is None else manifest.best.model_dump(),
        "journal": None if manifest.journal is None else manifest.journal.model_dump(),
        "metrics": manifest.metrics,
    }
    files = {file: (store.path(name) / file).read_bytes() for file in manifest.files}
    return {
        "metrics.jsonl": (run / "metrics.jsonl").read_bytes(),
        "facts": json.dumps(facts, sort_keys=True).encode(),
        **files,
    }


def differing(a: dict[str, bytes], b: dict[str, bytes]) -> list[str]:
    """Names of what differs between two endings."""
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))

"""What a run's events tell of its divergences: where, and which batches were left out because of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from resumable_trainer.loop.divergence import in_words as skips_in_words
from resumable_trainer.loop.launch import events_from_end

if TYPE_CHECKING:
    from pathlib import Path

_FIELDS = ("step", "epoch", "batch", "name", "value", "action", "back_to", "skip")


def divergences(directory: Path) -> list[dict[str, Any]]:
    """Each divergence of a run once, the newest last; a run that was killed finds the same one again."""
    found: dict[str, dict[str, Any]] = {}
    for row in events_from_end(directory, ("diverged",)):
        fields = {name: row.get(name) for name in _FIELDS}
        found.setdefault(str([fields[name] for name in ("step", "epoch", "batch", "action", "skip")]), fields)
    return list(found.values())[::-1]


def in_words(divergence: dict[str, Any]) -> str:
    """One line for people; whatever the event holds, it is only shown."""
    place = f"{divergence['name']} was {divergence['value']} at step {divergence['step']}"
    if divergence["action"] != "rollback":
        return f"{place}, stopped; the state of before is {divergence['back_to']}"
    return f"{place}, back to {divergence['back_to']}, left out {_left_out(divergence['skip'])}"


def _left_out(skip: Any) -> str:
    try:
        pieces = [(int(epoch), int(first), int(last)) for epoch, first, last in skip]
    except (TypeError, ValueError, OverflowError):
        return "nothing that can be read"
    return skips_in_words(pieces)

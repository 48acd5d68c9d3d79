"""What a run directory tells a supervisor: how far the run is safe on disk, and how its process ended. No torch."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from resumable_trainer.durable.lock import read_owner
from resumable_trainer.loop import launch
from resumable_trainer.snapshot.layout import RUN_LOCK, parse_name
from resumable_trainer.snapshot.store import Store

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

Order = tuple[int, bool, int]
_BEYOND_START = ("training", "committed", "preempted", "interrupted", "finished")


@dataclass(frozen=True)
class Standing:
    """How far runs are, by directory.

    Attributes:
        durable: Order of the newest snapshot of each; None for none.
        generations: Number of the newest launch of each.
    """

    durable: dict[Path, Order | None]
    generations: dict[Path, int]

    @classmethod
    def of(cls, directories: Iterable[Path]) -> Standing:
        """As it is now."""
        found = [path for path in directories if path.is_dir()]
        return cls({path: _newest(path) for path in found}, {path: _generation(path) for path in found})

    @property
    def step(self) -> int | None:
        """The newest durable step of them all."""
        return max((order[0] for order in self.durable.values() if order is not None), default=None)

    def is_further_than(self, before: Standing) -> bool:
        """Whether any run has a newer snapshot than it had."""
        return any(
            order is not None and (before.durable.get(path) is None or order > (before.durable[path] or order))
            for path, order in self.durable.items()
        )


def _newest(directory: Path) -> Order | None:
    with contextlib.suppress(OSError):
        for name in reversed(Store(directory).names()):
            parsed = parse_name(name)
            if parsed is not None:
                return parsed.order
    return None


def _generation(directory: Path) -> int:
    owner = read_owner(directory / RUN_LOCK)
    return 0 if owner is None else owner.generation


def runs_of(pid: int, directories: Iterable[Path]) -> list[Path]:
    """Those that process `pid` was the last to hold."""
    owners = {path: read_owner(path / RUN_LOCK) for path in directories if path.is_dir()}
    return [path for path, owner in owners.items() if owner is not None and owner.pid == pid]


def last_of(directory: Path, kinds: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """The newest events of these kinds that the newest launch has noted."""
    generation = _generation(directory)
    with contextlib.suppress(OSError, ValueError):
        events = launch.last_events(directory, kinds)
        return {kind: event for kind, event in events.items() if event.get("generation") == generation}
    return {}


def error_in(directory: Path) -> str:
    """What the newest launch has said about its failure; empty if nothing."""
    failed = last_of(directory, ("failed",)).get("failed", {})
    return str(failed.get("error", "")).partition("\n")[0][:200]


def has_begun(directory: Path) -> bool:
    """Whether the newest launch has got beyond choosing where to begin."""
    return bool(last_of(directory, _BEYOND_START))

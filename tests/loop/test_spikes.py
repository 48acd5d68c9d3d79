"""Leaps of the loss, and how often a run may go back: found, skipped and counted the same after any kill."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import endings
import pytest
from small import Killed, Small, killed_at

from resumable_trainer import DivergedError, OnDivergence, SnapshotPolicy
from resumable_trainer.loop.divergence import DivergenceWatch

if TYPE_CHECKING:
    from pathlib import Path

SPIKED = OnDivergence("rollback", spike=50, window=3, max_rollbacks=10)
POLICIES = [
    SnapshotPolicy(),
    SnapshotPolicy(every_steps=1),
    SnapshotPolicy(every_steps=3),
    SnapshotPolicy(every_steps=5, background=False),
]


def leaping(**settings: Any) -> Small:
    """A training one of whose samples has an absurd target: every epoch has a batch whose loss leaps, and is finite."""
    small = Small(**settings)
    small.data[1][3] = 1e3
    return small


def diverged(directory: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == "diverged"]


def place(event: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(json.dumps(event.get(name)) for name in ("step", "epoch", "batch", "skip", "value", "action"))


def test_a_leap_is_gone_back_from_once_the_median_is_known(tmp_path: Path) -> None:
    assert leaping().train(tmp_path / "run", on_divergence=SPIKED).outcome == "finished"
    found = diverged(tmp_path / "run")
    assert found, "at least in the epochs in which it is not among the first batches"
    assert all(event["value"] > 1000 for event in found)
    assert not diverged_in_whole(tmp_path)


def diverged_in_whole(tmp_path: Path) -> list[dict[str, Any]]:
    Small().train(tmp_path / "calm", on_divergence=SPIKED)
    return diverged(tmp_path / "calm")


@pytest.mark.parametrize("policy", POLICIES[::2])
@pytest.mark.parametrize("step", range(11))
def test_a_kill_at_any_step_finds_the_same_leaps_and_skips_the_same(
    tmp_path: Path, step: int, policy: SnapshotPolicy
) -> None:
    """The median is of values from before the kill, too."""
    leaping().train(tmp_path / "whole", on_divergence=SPIKED, snapshots=policy)
    try:
        leaping(at_step=killed_at(step)).train(tmp_path / "run", on_divergence=SPIKED, snapshots=policy)
    except Killed:
        leaping().train(tmp_path / "run", on_divergence=SPIKED, snapshots=policy)
    assert endings.differing(endings.ending(tmp_path / "whole"), endings.ending(tmp_path / "run")) == []
    assert set(map(place, diverged(tmp_path / "run"))) == set(map(place, diverged(tmp_path / "whole")))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("most", [1, 2])
def test_no_kill_gives_a_run_more_ways_back_than_it_has(tmp_path: Path, policy: SnapshotPolicy, most: int) -> None:
    """Killed after every single step, it stops at the same batch, gone back as often as one that never was."""
    settings = OnDivergence("rollback", spike=50, window=3, max_rollbacks=most)
    with pytest.raises(DivergedError) as undisturbed:
        spoilt_in_each_epoch().train(tmp_path / "whole", on_divergence=settings, snapshots=policy)
    for step in range(1, 12):
        with pytest.raises((Killed, DivergedError)):
            spoilt_in_each_epoch(at_step=killed_at(step)).train(
                tmp_path / "run", on_divergence=settings, snapshots=policy
            )
    with pytest.raises(DivergedError) as disturbed:
        spoilt_in_each_epoch().train(tmp_path / "run", on_divergence=settings, snapshots=policy)
    assert str(disturbed.value).replace("/run", "/whole") == str(undisturbed.value)
    assert set(map(place, diverged(tmp_path / "run"))) == set(map(place, diverged(tmp_path / "whole")))
    assert [event["action"] for event in diverged(tmp_path / "whole")] == [*["rollback"] * most, "stop"]


def spoilt_in_each_epoch(**settings: Any) -> Small:
    small = Small(**settings)
    small.data[0][3, 1] = float("nan")
    return small


def test_only_the_last_values_say_what_is_usual() -> None:
    """A loss that has fallen from 100 to 1 leaps at 20."""
    watch = DivergenceWatch(OnDivergence(spike=10, window=3))
    values = [100.0, 100.0, 100.0, 1.0, 1.0, 1.0, 20.0]
    watch.look([(step, 0, step) for step in range(7)], values)
    assert watch.found is not None
    assert (watch.found.step, watch.found.median) == (6, 1.0)

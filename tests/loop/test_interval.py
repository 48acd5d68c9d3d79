"""How often to save: Young's rule, what events tell of interruptions, and a run that follows both."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small import Killed, Small, killed_at

from resumable_trainer import SettingsError, SnapshotPolicy
from resumable_trainer.durable.journal import encode_row
from resumable_trainer.loop import opening
from resumable_trainer.loop.interval import ASSUMED_SECONDS, Interruptions, interval_seconds
from resumable_trainer.loop.saver import Saver
from resumable_trainer.manager import Facts
from resumable_trainer.metrics.goodput import duration
from resumable_trainer.snapshot.layout import Position

if TYPE_CHECKING:
    from pathlib import Path


def seen_in(directory: Path, rows: list[dict[str, Any]]) -> Interruptions:
    (directory / "events.jsonl").write_bytes(b"".join(map(encode_row, rows)))
    return opening.interruptions(directory)


def event(kind: str, second: int, **fields: Any) -> dict[str, Any]:
    return {"event": kind, "time": f"2026-01-01T00:{second // 60:02}:{second % 60:02}.000+00:00", **fields}


@given(
    stall=st.floats(1e-4, 100), mean=st.floats(60, 1e6), factor=st.floats(0.2, 5).filter(lambda f: abs(f - 1) > 0.01)
)
def test_no_other_interval_loses_less(stall: float, mean: float, factor: float) -> None:
    def lost(seconds: float) -> float:
        return stall / seconds + seconds / 2 / mean

    best = interval_seconds(stall, mean, max_overhead=1.0)
    if best > max(1.0, stall):  # else a limit has the say
        assert lost(best) < lost(best * factor)


@given(stall=st.floats(1e-4, 100), mean=st.floats(1, 1e6), share=st.floats(0.001, 1))
def test_snapshots_never_take_more_than_allowed(stall: float, mean: float, share: float) -> None:
    assert stall / interval_seconds(stall, mean, share) <= share * (1 + 1e-9)


def test_launches_that_are_followed_by_another_before_the_end_are_interruptions(tmp_path: Path) -> None:
    found = seen_in(
        tmp_path,
        [
            event("launched", 0),
            event("committed", 50, stall_seconds=0.25),
            event("launched", 60),  # killed at about 50
            event("preempted", 70),
            event("launched", 100),
            event("interrupted", 105),  # from the keyboard: a person wanted it so
            event("launched", 200),
            event("finished", 230),
            event("exited", 231, code=0),
            event("launched", 300),
        ],
    )
    assert found == Interruptions(number=2, seconds=50 + 10 + 5 + 31, stalls=(0.25,))
    assert found.mean_seconds == (96 + ASSUMED_SECONDS) / 3


@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(["event", "time", "code", "stall_seconds"]),
            st.one_of(
                st.none(),
                st.integers(),
                st.floats(),
                st.text(max_size=5),
                st.sampled_from(["launched", "committed", "2026-01-01"]),
            ),
        )
    )
)
def test_foreign_events_do_no_harm(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> None:
    assert seen_in(tmp_path_factory.mktemp("run"), rows).mean_seconds > 0


def test_a_run_says_how_often_it_saves_and_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = SnapshotPolicy(every="auto")
    with pytest.raises(Killed):
        Small(at_step=killed_at(6)).train(tmp_path / "run", snapshots=policy, progress=None)
    first = capsys.readouterr().err
    assert "after 60.0 s within (auto), then as often as pays: no interruption seen yet, one a day assumed" in first
    assert "of the training, no interruption seen yet" in first
    Small().train(tmp_path / "run", snapshots=policy, progress=None)
    second = capsys.readouterr().err
    assert "1 interruption seen in" in second.partition("epoch 2/3")[0], "what is known already is said at the start"
    assert "as often as pays" not in second


def test_it_saves_within_an_epoch_when_the_time_has_come(tmp_path: Path) -> None:
    clock = iter(range(0, 10**9, 45))
    small = Small()

    def later(run: Any) -> None:
        run._keeper.saver._clock = lambda: run._keeper.clock() + next(clock)

    small.at_step = later
    small.train(tmp_path / "run", snapshots=SnapshotPolicy(every="auto", keep_last=100), epochs=1)
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    names = [row["snapshot"] for row in events if row["event"] == "committed"]
    assert len(names) > 1
    assert names[-1] == "step-000000004-epoch-000001"


@dataclass
class Clocked:
    """A manager that writes nothing, under a clock that is moved by hand."""

    now: float = 0.0
    written: list[float] = field(default_factory=list)
    is_writing: bool = False
    latest: str = "step"

    def write(self, *arguments: Any, **settings: Any) -> None:
        self.written.append(self.now)

    def wait(self) -> None:
        """Nothing is on its way."""


@pytest.mark.parametrize("known", [Interruptions(), Interruptions(9, 6400.0), Interruptions(3, 5e5, (2.0,) * 20)])
@pytest.mark.parametrize("stall", [0.01, 0.5, 8.0])
@pytest.mark.parametrize("overhead", [0.01, 0.2])
def test_it_saves_as_often_as_it_says(known: Interruptions, stall: float, overhead: float) -> None:
    """Ten hours of training in steps of half a second, in the middle of one long epoch."""
    manager, said = Clocked(), list[str]()
    saver = Saver(
        manager,  # type: ignore[arg-type]
        SnapshotPolicy(every="auto", max_overhead=overhead),
        rows=None,  # type: ignore[arg-type]
        clock=lambda: manager.now,
        say=said.extend,
        interruptions=known,
    )
    costs: list[float] = []
    for step in range(1, 72_000):
        manager.now += 0.5
        if saver.is_due_after_batch(step):
            costs.append(stall if len(costs) % 10 else 5 * stall)  # now and then a disk is slow: the median counts
            manager.now += costs[-1]
            saver.save({}, Facts(Position(0, step, step), stall_seconds=costs[-1]))
    gaps = [
        later - earlier - cost
        for (earlier, later), cost in zip(itertools.pairwise(manager.written), costs[1:], strict=True)
    ]
    newest = interval_seconds(stall, known.mean_seconds, overhead)
    assert len(gaps) > 20
    assert all(newest <= gap < newest + 0.51 for gap in gaps[20:]), "to a step"
    assert stall * len(gaps) / manager.now <= overhead
    first = interval_seconds(2.0, known.mean_seconds, overhead) if known.stalls else 60.0
    assert first <= manager.written[0] - costs[0] < first + 0.5
    assert ("as often as pays" in said[0]) == (not known.stalls)
    stated = float(re.findall(r"every (\S+) (s|min|h) within", said[-1])[0][0])
    unit = {"s": 1, "min": 60, "h": 3600}[re.findall(r"every (\S+) (s|min|h) within", said[-1])[0][1]]
    assert 0.5 < newest / (stated * unit) < 2, "what was said last is still true"
    assert f"at most {overhead:.0%} of its time" in said[-1]


@pytest.mark.parametrize(
    "settings",
    [
        {"every": "often"},
        {"every": "auto", "every_steps": 5},
        {"every": "auto", "every_seconds": 5.0},
        {"every": "auto", "every_epochs": None},
        {"max_overhead": 0.0},
        {"max_overhead": 2.0},
    ],
)
def test_illegal_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        SnapshotPolicy(**settings)


def test_durations_are_in_a_unit_that_fits() -> None:
    assert [duration(seconds) for seconds in (0.0021, 59, 150, 7300, 400_000)] == [
        "2.1 ms",
        "59.0 s",
        "2.5 min",
        "2.0 h",
        "4.6 days",
    ]

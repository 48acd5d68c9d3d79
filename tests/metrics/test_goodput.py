"""Where a run's time went: every second once, whatever the events hold."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from told import BEGIN, KILLED_ONCE, ROWS, at, event

from resumable_trainer.metrics.account import Account
from resumable_trainer.metrics.goodput import KINDS, Goodput, in_words, seconds_of


def account(rows: list[dict[str, Any]], **known: Any) -> Goodput:
    return Account.of(rows).goodput(**known)


def test_a_kill_costs_what_was_trained_since_the_snapshot_and_the_start() -> None:
    found = account(KILLED_ONCE)
    assert found.seconds == pytest.approx(
        {"training": 10 - 0.5 + 8 - 0.25, "set-up": 8 + 10, "saving": 0.75 + 2, "repeated": 10, "hung": 0, "down": 10}
    )
    assert found.wall_seconds == 58
    assert (found.launches, found.interruptions, found.steps_repeated) == (2, {"killed": 1}, 50)
    assert "29.7% of 58.0 s moved the run forward" in in_words(found)


def test_a_snapshot_that_was_durable_before_it_could_be_noted_is_no_loss_of_all_before_it() -> None:
    rows = [*KILLED_ONCE[:4], event("resumed", 46, snapshot="unheard of", step=140), *KILLED_ONCE[5:]]
    assert account(rows).seconds == account(KILLED_ONCE).seconds, "what is known to be kept is kept"


def test_a_snapshot_of_an_earlier_launch_leaves_nothing_of_the_last_one() -> None:
    began_further = [*KILLED_ONCE[:1], event("resumed", 6, snapshot="z", step=90), *KILLED_ONCE[1:4]]
    found = account([*began_further, event("resumed", 46, snapshot="z", step=90), *KILLED_ONCE[5:]])
    assert found.seconds["repeated"] == 20, "from the first batch to the last sign of life"
    assert account([*KILLED_ONCE[:4], event("resumed", 46, snapshot="?", step=0)]).seconds["repeated"] == 20


def test_who_watched_it_knows_better_when_it_ended() -> None:
    rows = [*KILLED_ONCE[:3], event("ended", 33, by="supervisor", result="signal"), *KILLED_ONCE[3:]]
    found = account(rows)
    assert found.seconds["repeated"] == 13
    assert found.seconds["down"] == 7


def test_a_hang_is_the_silence_before_it_was_ended() -> None:
    rows = [*KILLED_ONCE[:3], event("ended", 38, by="systemd", result="hang"), *KILLED_ONCE[3:]]
    found = account(rows)
    assert found.interruptions == {"hung": 1}
    assert found.seconds["hung"] == 8
    assert found.seconds["repeated"] == 10


def test_a_hang_before_the_first_batch_is_one_too() -> None:
    hung = [event("launched", 5, started=at(2), generation=1), event("resumed", 7, snapshot="z", step=90)]
    hung += [event("ended", 38, by="supervisor", result="hang")]
    found = account(hung)
    assert (found.interruptions, found.seconds["hung"], found.seconds["set-up"]) == ({"hung": 1}, 31, 5)
    later = {"generation": 1, "step": 90, "seen": at(10)}
    found = account([*hung, event("launched", 40, started=at(39), generation=2, previous=later)])
    assert (found.seconds["hung"], found.seconds["set-up"]) == (28, 8 + 1), "its last sign of life came later"
    assert account([hung[0], event("ended", 38, by="supervisor", result="signal")]).seconds["set-up"] == 36


def test_what_a_script_does_after_its_run_is_no_time_of_the_run_but_the_end_of_its_process_is() -> None:
    finished = [*KILLED_ONCE[:-1], event("accounted", 60), event("paced", 60.5)]
    exported = [*finished, event("exited", 160, code=0)]
    watched = [*exported, event("ended", 161.5, by="supervisor", result="exit", code=0)]
    before = account(KILLED_ONCE).seconds
    assert account(exported).seconds == before
    assert account(watched).seconds == {**before, "down": before["down"] + 1.5}
    assert account([*finished, event("ended", 161.5, by="supervisor", result="signal")]).seconds == before
    assert account(finished, now=BEGIN + 100).seconds["training"] == before["training"] + before["saving"] - 0.75
    further = [*watched, event("launched", 1000, started=at(998)), event("training", 1003), event("committed", 1010)]
    found = account(further).seconds
    assert found["down"] == before["down"] + 1.5, "it was through"
    assert found["set-up"] == before["set-up"] + 5
    assert found["training"] == before["training"] + 7


def test_a_start_that_finds_nothing_to_do_is_none_of_the_runs() -> None:
    before = account(KILLED_ONCE)
    daily = [*KILLED_ONCE]
    for number in range(3, 6):
        daily += [event("launched", 1000 * number, started=at(1000 * number - 5), generation=number)]
        daily += [event("resumed", 1000 * number + 1, snapshot="b", step=200)]
        assert account(daily) == before, "while it shows how the run ended"
        assert account(daily, now=BEGIN + 1000 * number + 2) == before
        daily += [event("exited", 1000 * number + 2, code=0)]
        assert account(daily) == before
    further = [*daily, event("launched", 9000, started=at(8995), generation=6), event("training", 9002)]
    further += [event("committed", 9010, snapshot="c", taken=at(9009), step=300), event("finished", 9010)]
    found = account(further)
    assert found.launches == before.launches + 1
    assert found.wall_seconds == before.wall_seconds + 15
    refused = [*daily, event("launched", 9000, started=at(8995), generation=6), event("failed", 9002)]
    assert account(refused).interruptions == {"killed": 1, "failed": 1}
    assert account([event("launched", 1), event("exited", 2, code=0)] * 2).launches == 2, "that run had no end"


def test_one_is_told_as_one() -> None:
    alone = Goodput(1, {"killed": 1}, 0, 1, dict.fromkeys(KINDS, 1.0))
    assert in_words(alone).endswith(" | 1 launch: 1 killed | 1 step repeated")
    assert in_words(Goodput(2, {"killed": 1}, 0, 2, alone.seconds)).endswith(
        " | 2 launches: 1 killed | 2 steps repeated"
    )


def test_a_run_that_goes_on_in_the_process_that_had_ended_it_has_not_ended() -> None:
    rows = [*KILLED_ONCE[:-1], event("committed", 80, snapshot="c"), event("finished", 81, outcome="finished")]
    assert account(rows).wall_seconds == 79


def test_an_evaluation_that_was_left_is_made_again_and_no_saving() -> None:
    rows = [
        *KILLED_ONCE[:2],
        event("committed", 39, snapshot="a", taken=at(30), stall_seconds=0.0, step=100),
        event("preempted", 39.5, snapshot="a", step=100, leaving_seconds=1.5),
        event("exited", 39.5, code=75),
    ]
    for found in (account(rows), account([*rows, *KILLED_ONCE[3:]])):
        assert found.seconds["repeated"] == 8
    assert account(rows).seconds["saving"] == 1.5
    assert account(rows).seconds["training"] == 20


def test_a_preemption_loses_nothing_but_the_saving_and_the_start() -> None:
    rows = [
        *KILLED_ONCE[:2],
        event("committed", 31, snapshot="a", taken=at(30), stall_seconds=0.0, step=100),
        event("preempted", 31.5, snapshot="a", step=100),
        event("exited", 32, code=75),
        *KILLED_ONCE[3:],
    ]
    found = account(rows)
    assert found.interruptions == {"preempted": 1}
    assert (found.seconds["repeated"], found.steps_repeated) == (0, 50)
    assert found.seconds["saving"] == pytest.approx(2 + 2 + 0.25)


def test_going_back_behind_an_older_snapshot_loses_all_of_a_launch() -> None:
    rows = [
        *KILLED_ONCE[:3],
        event("launched", 45, generation=2, previous={"generation": 1, "step": 150, "seen": at(30)}),
        event("resumed", 46, snapshot="a", step=100),
        event("training", 50, step=100),
        event("launched", 65, generation=3, previous={"generation": 2, "step": 130, "seen": at(60)}),
        event("resumed", 66, snapshot="a", step=100),
    ]
    assert account(rows).seconds["repeated"] == 10 + 10
    assert account(rows).steps_repeated == 50 + 30


def test_a_newest_snapshot_that_was_damaged_loses_what_it_held() -> None:
    rows = [*KILLED_ONCE[:3], event("committed", 26, snapshot="b", taken=at(25), stall_seconds=0.0, step=130)]
    assert account([*rows, *KILLED_ONCE[3:]]).seconds["repeated"] == 10, "back to the one before"


def test_a_rollback_loses_what_was_trained_since_its_snapshot() -> None:
    rows = [
        *KILLED_ONCE[:3],
        event("diverged", 27, action="rollback", back_to="a", step=140),
        event("resumed", 28, snapshot="a", step=100),
        event("training", 29, step=100),
        event("finished", 40, outcome="finished"),
        event("exited", 40, code=0),
    ]
    found = account(rows)
    assert found.seconds["repeated"] == 7 + 2, "and going back itself"
    assert (found.rollbacks, found.interruptions) == (1, {})


def test_a_run_that_trains_has_lost_nothing_yet() -> None:
    found = account(KILLED_ONCE[:3], now=BEGIN + 30)
    assert found.seconds["training"] == 20 - 0.5
    assert found.interruptions == {}


def test_a_run_that_was_killed_and_not_started_again_has_lost_what_no_snapshot_holds() -> None:
    found = account(KILLED_ONCE[:3], seen=BEGIN + 29)
    assert found.seconds["repeated"] == 9
    assert found.interruptions == {"killed": 1}


def test_a_run_without_events_has_nothing_to_account_for() -> None:
    assert account([]).share is None
    assert in_words(account([])) == "nothing to account for yet"


@given(rows=ROWS, now=st.one_of(st.none(), st.floats(BEGIN, BEGIN + 2000)))
def test_the_parts_add_up_to_the_whole_and_none_is_negative(rows: list[dict[str, Any]], now: float | None) -> None:
    found = account(rows, now=now)
    assert set(found.seconds) == set(KINDS)
    assert all(seconds >= 0 for seconds in found.seconds.values())
    launches = [i for i, row in enumerate(rows) if row["event"] == "launched" and row["time"] is not None]
    if launches and now is None:
        begins = rows[launches[0]]
        first = min(seconds_of(begins.get("started")) or float("inf"), seconds_of(begins["time"]) or 0.0)
        active = [row for row in rows[launches[0] :] if row["event"] != "pruned"]
        last = max(seconds for row in active if (seconds := seconds_of(row["time"])) is not None)
        assert found.wall_seconds <= last - first + 1e-3
        if not any(row["event"] == "finished" for row in rows):
            assert found.wall_seconds == pytest.approx(last - first, abs=1e-3)


def test_a_launch_that_has_told_its_exit_code_was_not_killed() -> None:
    refused = [event("launched", 70, started=at(69), generation=3), event("exited", 71, code=78)]
    assert account([*KILLED_ONCE, *refused]).interruptions == {"killed": 1, "failed": 1}
    assert account([*KILLED_ONCE, event("exited", 62, code=1)]).interruptions == {"killed": 1}, "the run had ended"

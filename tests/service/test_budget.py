"""Restart policy: who pays for what, how long the wait is, and when it is given up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resumable_trainer.errors import SettingsError
from resumable_trainer.service.budget import FINAL, Decision, Ending, Limits, Spent, decide

endings = st.builds(Ending, st.sampled_from([70, 74, 75, 1, -9, -15, -11]), st.booleans(), st.none() | st.integers(0))


def play(limits: Limits, *all_endings: Ending) -> tuple[Spent, Decision]:
    spent = Spent()
    for ending in all_endings:
        spent = spent.after(ending)
    return spent, decide(limits, spent, all_endings[-1])


@pytest.mark.parametrize("code", [0, 2, 65, 66, 69, 78, 79, 130])
def test_what_would_end_the_same_again_is_never_restarted(code: int) -> None:
    assert code in FINAL
    assert play(Limits(), Ending(code, progressed=True))[1] == Decision(None)


@given(st.lists(endings, min_size=1))
def test_a_run_that_makes_progress_is_never_given_up(all_endings: list[Ending]) -> None:
    moving = [Ending(ending.code, True, ending.step) for ending in all_endings]
    _, decision = play(Limits(max_stuck=1), *moving)
    assert decision.wait_seconds is not None
    assert decision.wait_seconds <= Limits().first_wait_seconds


@given(st.lists(endings, min_size=1), st.integers(0, 4))
def test_preemptions_and_failures_are_paid_for_apart(all_endings: list[Ending], most: int) -> None:
    spent, decision = play(Limits(max_preemptions=most, max_stuck=10**6), *all_endings)
    kinds = [ending.kind for ending in all_endings]
    assert (spent.preemptions, spent.failures) == (kinds.count("preempted"), kinds.count("failed"))
    over = spent.preemptions > most and kinds[-1] == "preempted"
    assert (decision.wait_seconds is None) == over


@given(st.lists(endings, min_size=1))
def test_the_wait_is_bounded_and_grows_only_without_progress(all_endings: list[Ending]) -> None:
    limits = Limits(max_stuck=10**6, first_wait_seconds=0.5, longest_wait_seconds=4)
    _, decision = play(limits, *all_endings)
    assert decision.wait_seconds is not None
    assert 0 <= decision.wait_seconds <= 4


def test_waits_double_and_progress_resets_them() -> None:
    stuck = Ending(70, progressed=False)
    limits = Limits(max_stuck=10)
    waits = [play(limits, *[stuck] * n)[1].wait_seconds for n in range(1, 11)]
    assert waits == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300]
    assert play(limits, *[stuck] * 5, Ending(70, progressed=True))[1].wait_seconds == 1
    assert play(limits, Ending(75, progressed=True))[1].wait_seconds == 0


def test_it_gives_up_after_so_many_failures_without_progress_and_says_why() -> None:
    stuck = Ending(70, progressed=False, step=12, error="RuntimeError: boom")
    assert play(Limits(max_stuck=2), stuck, stuck)[1].wait_seconds is not None
    _, decision = play(Limits(max_stuck=2), stuck, stuck, stuck)
    assert decision.wait_seconds is None
    assert "at step 12; each time the same" in decision.reason
    assert "RuntimeError: boom" in decision.reason


def test_preemptions_without_progress_do_not_count_as_being_stuck() -> None:
    _, decision = play(Limits(max_stuck=1), *[Ending(75, progressed=False)] * 50)
    assert decision.wait_seconds is not None


def test_all_illegal_limits_are_named_at_once() -> None:
    with pytest.raises(SettingsError) as caught:
        Limits(max_failures=-1, max_stuck=-2, first_wait_seconds=5, longest_wait_seconds=1)
    assert all(word in str(caught.value) for word in ("max_failures", "max_stuck", "longest_wait_seconds"))

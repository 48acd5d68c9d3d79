"""Where traces part, and where a job is killed: pure functions over what a run has told."""

from __future__ import annotations

from typing import Any

from resumable_trainer.proof.diagnosis import lost_variables, lost_without_effect, missing_name, without_effect
from resumable_trainer.proof.plan import kills
from resumable_trainer.proof.trace import (
    Moment,
    Trace,
    cut_short,
    first_difference,
    longest_gap_seconds,
    pairs_part_at,
    same_samples_in_another_order,
)


def moment(place: str, epoch: int, batch: int, *, seconds: float = 0.0, **fields: Any) -> Moment:
    return Moment((place, epoch, batch, 0), seconds, **fields)


def epochs(count: int, *, evaluates: bool = True) -> Trace:
    """Epochs of five batches."""
    moments = []
    for epoch in range(count):
        moments += [
            moment("batch", epoch, batch, data=f"{epoch}.{batch}", state={"model/w": "1"}) for batch in range(5)
        ]
        moments.append(moment("batches", epoch, 5))
        if evaluates:
            moments += [Moment(("evaluating", epoch, 5, number), 0.0) for number in range(3)]
        moments += [moment("logged", epoch, 5), moment("epoch", epoch + 1, 0)]
    return Trace(moments)


def test_the_same_is_the_same_and_a_batch_or_a_tensor_is_named_that_differs() -> None:
    trace, expected = epochs(2), epochs(2)
    assert first_difference(trace, expected) is None
    trace.moments[7] = moment("batch", 0, 3, data="other", state={"model/w": "1"})
    trace.moments[3] = moment("batch", 0, 3, data="0.3", state={"model/w": "2", "ema/w": "1"})
    found = first_difference(trace, expected)
    assert found is not None
    assert (found.data, found.state) == (False, ("model/w", "ema/w"))
    trace.moments[3] = moment("batch", 0, 3, data="x", state={"model/w": "1"})
    found = first_difference(trace, expected)
    assert found is not None
    assert (found.data, found.state) == (True, ())


def test_a_moment_that_the_other_never_had_is_a_difference_and_one_never_met_is_found() -> None:
    shorter = Trace(epochs(2).moments[:-1])
    found = first_difference(epochs(2), shorter)
    assert found is not None
    assert found.expected is None
    missing = cut_short(shorter, epochs(2).moments)
    assert missing is not None
    assert missing.moment.key == ("epoch", 2, 0, 0)
    assert cut_short(epochs(2), epochs(2).moments) is None


def test_two_starts_part_where_they_first_differ_or_where_one_ends() -> None:
    one, other = epochs(1), epochs(1)
    assert pairs_part_at(one, other) is None
    other.moments[4] = moment("batch", 0, 4, data="x", state={"model/w": "1"})
    assert pairs_part_at(one, other) == 4
    assert pairs_part_at(one, Trace(one.moments[:6])) == 6


def test_kills_come_in_the_order_of_the_run_and_at_every_kind_of_place() -> None:
    trace = epochs(3)
    plan = kills(trace)
    order = {m.key: number for number, m in enumerate(trace.moments)}
    places = [order[kill.key] for kill in plan]
    assert places == sorted(places)
    assert {(kill.place, kill.signal) for kill in plan} == {
        ("batch", "SIGKILL"),
        ("batches", "SIGKILL"),
        ("evaluating", "SIGKILL"),
        ("evaluating", "SIGTERM"),
        ("logged", "SIGKILL"),
        ("batch", "SIGTERM"),
    }


def test_a_job_without_evaluation_or_with_a_single_epoch_is_killed_all_the_same() -> None:
    assert len(kills(epochs(3, evaluates=False))) == 5
    single = kills(epochs(1, evaluates=False))
    assert [kill.signal for kill in single] == ["SIGTERM", "SIGKILL", "SIGKILL", "SIGKILL"]
    assert kills(Trace([moment("epoch", 1, 0)])) == []


def test_only_what_moves_with_the_training_and_is_not_brought_back_is_lost() -> None:
    def at(batch: int, **variables: str) -> Moment:
        return moment("batch", 0, batch, variables={name: ("value", value) for name, value in variables.items()})

    undisturbed = Trace([at(0, ema="0", began="9", loss="1"), at(1, ema="1", began="9", loss="2", rng="5")])
    resumed = Trace([at(1, ema="0", began="4", rng="5")])
    assert lost_variables(resumed, undisturbed) == [("ema", "value")]


def test_known_samples_in_a_wrong_batch_are_another_order() -> None:
    expected = Trace(
        [moment("batch", 0, 0, data="a", samples=("1", "2")), moment("batch", 0, 1, data="b", samples=("3", "4"))]
    )
    shuffled = first_difference(Trace([moment("batch", 0, 0, data="c", samples=("4", "1"))]), expected)
    strange = first_difference(Trace([moment("batch", 0, 0, data="c", samples=("7", "8"))]), expected)
    assert shuffled is not None
    assert strange is not None
    assert same_samples_in_another_order(shuffled, expected)
    assert not same_samples_in_another_order(strange, expected)


def test_a_notice_waits_for_the_longest_stretch_in_which_it_is_not_looked_at() -> None:
    trace = Trace(
        [
            moment("batch", 0, 0, seconds=1),
            moment("batches", 0, 1, seconds=2),
            moment("logged", 0, 1, seconds=5),
            moment("epoch", 1, 0, seconds=0.5),
        ]
    )
    assert longest_gap_seconds(trace) == 5.5


def test_what_is_lost_without_an_effect_is_a_cause_if_it_will_have_one() -> None:
    def at(batch: int, *, clock: str, **variables: tuple[str, str]) -> Moment:
        return moment("batch", 0, batch, variables={**variables, "clock": ("value", clock)})

    def both(value: str) -> dict[str, tuple[str, str]]:
        return {"average": ("state", value), "main.bad": ("value", value), "seen": ("value", value)}

    undisturbed = Trace([at(0, clock="1", **both("0")), at(1, clock="2", **both("1"))])
    resumed = Trace([at(1, clock="3", **both("0"))])
    again = Trace([at(1, clock="4", **both("0"))])
    lost = lost_without_effect([resumed], undisturbed, (resumed, again))
    assert lost == [("average", "state"), ("seen", "value"), ("main.bad", "value")]
    found, others = without_effect(lost, ["if bad > 8:\n    break\nprint(seen)"])
    assert [cause.where for cause in found] == [("average", "main.bad")]
    assert others == ["seen"]
    assert without_effect([("seen", "value")], ["print(seen)"]) == ([], ["seen"])


def test_a_variable_that_was_never_set_is_read_from_the_last_error() -> None:
    local = "UnboundLocalError: cannot access local variable 'loss' where it is not associated with a value"
    assert missing_name(f"epoch 1\nTraceback\n{local}\n") == "loss"
    assert missing_name("NameError: name 'x' is not defined") == "x"
    assert missing_name("ValueError: name 'x' is not defined") is None

"""The benchmark measures what it says: its table reckons right, its arms take turns, and they do the same work."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import jobs, loops, peers
from benchmarks.__main__ import GROUPS, arguments, measure
from benchmarks.restarting import Launch
from benchmarks.savers import Own, TorchSave
from benchmarks.table import Goal, Report, Row, Side, Spread, quantity
from benchmarks.timing import ArmError, Bench, Worker, alternately, in_lockstep, started
from resumable_trainer.data.order import permutation

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn

SMALL = jobs.Job("small", (8, 12, 8, 1), 96, 10)
EPOCHS = 3


def row(ours: Sequence[float], theirs: Sequence[float], goal: Goal, comparison: str = "ratio") -> Row:
    sides = Side("own", tuple(ours)), Side("peer", tuple(theirs))
    return Row("group", "what", *sides, comparison=comparison, goal=goal)  # type: ignore[arg-type]


# -- the table ----------------------------------------------------------------------------------------


def test_ratios_are_formed_round_by_round() -> None:
    """The quotient of the medians would be 2: the machine was slow for both in the last round."""
    assert row([1, 2, 30], [2, 1, 10], Goal(1)).spread == Spread(2, 1.25, 2.5)
    assert row([1, 1, 30], [2, 2, 60], Goal(1)).spread == Spread(0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("comparison", "goal", "verdict"),
    [
        ("ratio", Goal(0.5), "met"),
        ("ratio", Goal(0.499), "NOT met"),
        ("times faster", Goal(2, at_least=True), "met"),
        ("times faster", Goal(2.001, at_least=True), "NOT met"),
        ("difference", Goal(-1), "met"),
        ("difference", Goal(-1.001), "NOT met"),
    ],
)
def test_a_goal_is_met_up_to_its_limit_and_no_further(comparison: str, goal: Goal, verdict: str) -> None:
    assert row([1], [2], goal, comparison).verdict == verdict


@pytest.mark.parametrize(
    ("comparison", "goal", "shown"),
    [
        ("ratio", Goal(0.5), "0.500 (a copy)"),
        ("ratio", Goal(0.49), "0.500 (a copy)"),
        ("times faster", Goal(2, at_least=True), "2.000 x (a copy)"),
        ("times faster", Goal(2.01, at_least=True), "2.000 x (a copy)"),
        ("difference", Goal(-1), "-1.000 s (a copy)"),
        ("difference", Goal(-1.01), "-1.000 s (a copy)"),
    ],
)
def test_a_goal_that_the_bound_does_not_meet_is_out_of_reach(comparison: str, goal: Goal, shown: str) -> None:
    bounded = replace(row([3], [2], goal, comparison), bound=Side("a copy", (1.0,)))
    report = Report(rows=[bounded, row([3], [2], goal, comparison)])
    beyond = goal.limit not in (0.5, 2, -1)
    assert bounded.is_beyond_bound is beyond
    assert shown in report.text()
    assert f"of those not met {int(beyond)} are out of reach even at best" in report.summary()


def test_a_goal_that_is_met_is_not_counted_as_out_of_reach() -> None:
    met = replace(row([1], [2], Goal(1)), bound=Side("slower", (5.0,)))
    assert "of those not met 0 are out of reach" in Report(rows=[met]).summary()


def test_what_was_not_measured_is_said_with_the_reason_and_never_counts_as_met() -> None:
    skipped = Row("group", "what", goal=Goal(1), skipped="pytorch-ignite is not installed here")
    report = Report(rows=[skipped, row([1], [2], Goal(1)), row([3], [2], Goal(1)), Row("group", "informs")])
    assert skipped.verdict == "not measured"
    for shown in (report.text(), report.markdown()):
        assert "skipped: pytorch-ignite is not installed here" in shown
        assert "3 goals: 1 met, 1 NOT met, 1 not measured" in shown


def test_a_peer_that_does_not_resume_exactly_is_marked() -> None:
    theirs = Side("peer", (1.0,), durability="page cache", exact=False)
    shown = Report(rows=[Row("group", "what", Side("own", (1.0,), durability="synced", exact=True), theirs)]).text()
    assert "synced / page cache (inexact)" in shown
    assert shown.count("(inexact)") == 2  # the other is the legend


def test_every_line_of_the_markdown_table_has_the_same_cells() -> None:
    report = Report(rows=[row([1], [2], Goal(1)), Row("a|b", "what", skipped="why"), Row("g", "w", Side("o", (1.0,)))])
    lines = [line for line in report.markdown().splitlines() if line.startswith("|")]
    assert len(lines) == 5
    assert {line.replace("\\|", "").count("|") for line in lines} == {12}


def test_json_holds_every_measurement() -> None:
    told = json.loads(json.dumps(Report({"machine": "this"}, [row([1, 2], [2, 8], Goal(1))]).to_json()))
    assert told["facts"] == {"machine": "this"}
    assert told["rows"][0]["ours"]["values"] == [1, 2]
    assert told["rows"][0]["measured"]["median"] == 0.375
    assert told["rows"][0]["verdict"] == "met"


def test_quantities_have_the_unit_that_suits_them() -> None:
    shown = [quantity(value, unit) for value, unit in ((2.5, "s"), (0.0025, "s"), (2e-6, "s"), (1.1e9, "B"), (3, ""))]
    assert shown == ["2.5 s", "2.5 ms", "2 us", "1.1 GB", "3"]


def test_a_group_that_cannot_be_measured_is_a_row_and_the_others_go_on(tmp_path: Path) -> None:
    def fails(bench: Bench) -> Iterator[Row]:
        yield Row("fails", "before")
        raise ArmError("it has ended")

    def works(bench: Bench) -> Iterator[Row]:
        yield Row("works", "after")

    report = measure(Bench(tmp_path, quick=True, say=lambda line: None), {"fails": fails, "works": works})
    assert [(each.group, each.skipped) for each in report.rows] == [
        ("fails", None),
        ("fails", "it has ended"),
        ("works", None),
    ]


def test_groups_are_asked_for_by_name() -> None:
    assert arguments(["--only", "classic,memory"]).only == ["classic", "memory"]
    assert arguments([]).only == list(GROUPS)
    with pytest.raises(SystemExit):
        arguments(["--only", "everything"])


# -- turns --------------------------------------------------------------------------------------------


def test_arms_take_turns_in_alternating_order_and_the_first_round_does_not_count() -> None:
    order: list[str] = []

    def arm(name: str) -> dict[str, float]:
        order.append(name)
        return {name: float(len(order))}

    measured = alternately([lambda: arm("a"), lambda: arm("b")], rounds=2)
    assert "".join(order) == "abbaab"
    assert measured == {"b": (3, 6), "a": (4, 5)}


def test_workers_train_in_lockstep_and_one_that_ends_is_told_with_its_last_words(tmp_path: Path) -> None:
    def worker(kind: str, target: str) -> Worker:
        settings = {"kind": kind, "job": "classic", "epochs": 2, "directory": str(tmp_path / kind)}
        return Worker(target, settings=settings, threads=1, log=tmp_path / f"{kind}.log")

    workers = {"hand-written": worker("hand-written", "jobs:arm"), "unknown": worker("unknown", "peers:arm")}
    with started(workers):
        measured, failed = in_lockstep(workers, rounds=2)
    assert measured.keys() == {"hand-written"}
    assert all(0 < seconds < 60 for seconds in measured["hand-written"])
    assert failed == {"unknown": "KeyError: 'unknown'"}


def test_a_peer_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ignite", None)
    assert peers.why_not("Ignite") == "pytorch-ignite is not installed here"
    assert "pytorch-ignite MISSING" in peers.versions()
    failed = {"Ignite": str(peers.why_not("Ignite"))}
    shown = loops._row("classic", "what", {"own loop": (1.0,)}, failed, "own loop", "Ignite", Goal(1.3, at_least=True))
    assert (shown.skipped, shown.verdict) == ("Ignite: pytorch-ignite is not installed here", "not measured")


# -- the same work ------------------------------------------------------------------------------------


def values_of(model: nn.Module) -> bytes:
    return b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters())


class Count:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


def test_the_package_and_the_hand_written_loop_end_in_the_same_bits_given_the_same_order(tmp_path: Path) -> None:
    orders = (permutation(SMALL.num_rows, seed=0, epoch=epoch) for epoch in range(EPOCHS))
    laps = Count(), Count(), Count(), Count()
    by_hand = jobs.hand_written(SMALL, epochs=EPOCHS, laps=laps[0], orders=orders)
    own = jobs.own_loop(SMALL, str(tmp_path / "own"), epochs=EPOCHS, laps=laps[1])
    unsaved = jobs.own_loop(SMALL, str(tmp_path / "unsaved"), epochs=EPOCHS, laps=laps[2], every_epochs=None)
    ready_made = jobs.trainer(SMALL, str(tmp_path / "trainer"), epochs=EPOCHS, laps=laps[3])
    assert values_of(by_hand) == values_of(own) == values_of(unsaved) == values_of(ready_made)
    assert values_of(by_hand) != values_of(SMALL.model())
    assert [each.count for each in laps] == [EPOCHS] * 4


def test_the_loop_that_none_can_be_quicker_than_does_the_same_work() -> None:
    least, plain = jobs.unwrapped(jobs.CLASSIC, epochs=3), jobs.hand_written(jobs.CLASSIC, epochs=3)
    assert all(map(torch.equal, least.parameters(), plain.parameters()))


def test_the_package_saves_every_epoch_and_a_row_per_step(tmp_path: Path) -> None:
    jobs.own_loop(SMALL, str(tmp_path), epochs=EPOCHS)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert sum(event["event"] == "committed" for event in events) == EPOCHS
    assert sum(each["row"] == "step" for each in rows) == EPOCHS * 10


@pytest.mark.parametrize("name", ["Ignite", "Accelerate", "Lightning"])
@pytest.mark.filterwarnings("ignore")
def test_peers_that_draw_the_same_order_end_in_the_same_bits(name: str, tmp_path: Path) -> None:
    if reason := peers.why_not(name):
        pytest.skip(reason)
    laps = Count()
    theirs = peers.LOOPS[name](SMALL, str(tmp_path), epochs=EPOCHS, laps=laps)
    assert values_of(theirs) == values_of(jobs.with_loader(SMALL, epochs=EPOCHS))
    assert laps.count == EPOCHS


@pytest.mark.filterwarnings("ignore")
def test_the_hf_trainer_does_the_same_steps_where_order_does_not_matter(tmp_path: Path) -> None:
    """It draws orders of its own; with one batch of all rows they only change the rounding."""
    if reason := peers.why_not("HF Trainer"):
        pytest.skip(reason)
    whole = jobs.Job("whole", SMALL.widths, SMALL.num_rows, SMALL.num_rows)
    theirs = peers.hf_trainer(whole, str(tmp_path), epochs=EPOCHS, laps=Count())
    for mine, other in zip(jobs.with_loader(whole, epochs=EPOCHS).parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other)


def test_savers_save_the_same_tensors(tmp_path: Path) -> None:
    model, optimizer = jobs.big_state(300_000, frozen=0.5, width=64)
    own, save = Own(tmp_path / "own", {"model": model, "optimizer": optimizer}), TorchSave(tmp_path, model, optimizer)
    own.save(), save.save()
    saved = [tensor.clone() for tensor in jobs.tensors_of(model, optimizer)]
    for restore in (own.manager.restore, lambda: _load(save, model, optimizer)):
        jobs.train_once(optimizer)
        restore()
        found = jobs.tensors_of(model, optimizer)
        assert all(torch.equal(a, b) for a, b in zip(saved, found, strict=True))
    own.manager.close()


def _load(save: TorchSave, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    found = torch.load(save.path)
    model.load_state_dict(found["model"])
    optimizer.load_state_dict(found["optimizer"])


def test_nine_tenths_of_a_frozen_state_never_change() -> None:
    model, optimizer = jobs.big_state(4_000_000, frozen=0.9, width=64)
    before = [tensor.clone() for tensor in jobs.tensors_of(model, optimizer)]
    jobs.train_once(optimizer)
    pairs = list(zip(before, jobs.tensors_of(model, optimizer), strict=True))
    changed = jobs.num_bytes_of(new for old, new in pairs if not torch.equal(old, new))
    assert changed / jobs.num_bytes_of(before) == pytest.approx(0.1, rel=0.05)


def test_the_script_that_is_killed_goes_on_where_it_was_and_ends_in_the_same_bits(tmp_path: Path) -> None:
    whole = Launch("own", str(tmp_path / "whole"), tmp_path / "whole.log").until("digest", kill=False)
    killed = Launch("own", str(tmp_path / "killed"), tmp_path / "killed.log")
    killed.until("epoch", times=3)
    resumed = killed.until("digest", kill=False)
    assert [word for word in resumed if word.startswith("digest")] == [w for w in whole if w.startswith("digest")]
    assert 0 < resumed["first"] < resumed[next(word for word in resumed if word.startswith("digest"))]

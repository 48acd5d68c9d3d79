"""A loss that is no number: stopping with the state of before, or going back without the batches that are blamed."""

from __future__ import annotations

import itertools
import json
import math
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import endings
import jobs
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import Killed, Small, killed_at

from resumable_trainer import DivergedError, OnDivergence, Preempted, Run, SettingsError, SnapshotPolicy, Trainer
from resumable_trainer.cli.main import main
from resumable_trainer.durable.files import Files
from resumable_trainer.loop.divergence import DivergenceWatch, in_words, merged, stretches
from resumable_trainer.loop.notices import notices
from resumable_trainer.loop.record import Record
from resumable_trainer.snapshot.layout import Position

if TYPE_CHECKING:
    from pathlib import Path

ROLLBACK = OnDivergence("rollback", max_rollbacks=10)
SPOILT = 3  # by the order of the epochs, its batches do not follow each other
OFTEN = SnapshotPolicy(every_steps=3)


def spoilt(**settings: Any) -> Small:
    """A training one of whose samples is no number: every epoch has a batch that makes all weights NaN."""
    small = Small(**settings)
    small.data[0][SPOILT, 1] = math.nan
    return small


def events(directory: Path, kind: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == kind]


def rows(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_stopping_names_the_batch_and_keeps_the_snapshot_of_before(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"loss is nan at step \d+ \(epoch 1, batch \d\)") as caught:
        spoilt().train(tmp_path / "run", on_divergence="stop", snapshots=SnapshotPolicy(every_steps=1))
    assert caught.value.exit_code == 79
    assert isinstance(caught.value, ArithmeticError)
    step = caught.value.step
    assert step is not None
    kept = sorted(path.name for path in (tmp_path / "run" / "snapshots").iterdir())
    assert kept[-1] == f"step-{step:09d}", "the state before the batch is there, and none from after it"
    (event,) = events(tmp_path / "run", "diverged")
    assert (event["step"], event["action"], event["back_to"]) == (step, "stop", kept[-1])


def test_stopping_again_after_a_restart_finds_the_same_batch(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(DivergedError):
            spoilt().train(tmp_path / "run", on_divergence="stop", snapshots=OFTEN)
    first, second = events(tmp_path / "run", "diverged")
    assert [first[name] for name in ("step", "epoch", "batch")] == [second[name] for name in ("step", "epoch", "batch")]


def test_going_back_leaves_out_the_batch_and_goes_on(tmp_path: Path) -> None:
    small = spoilt()
    run = small.train(tmp_path / "run", on_divergence=ROLLBACK)
    assert run.outcome == "finished"
    found = events(tmp_path / "run", "diverged")
    assert [event["skip"] for event in found] == [[[event["epoch"], event["batch"], event["batch"]]] for event in found]
    assert [event["epoch"] for event in found] == [0, 1, 2], "one batch of each epoch holds the sample"
    trained = [row for row in rows(tmp_path / "run") if row["row"] == "step"]
    assert all(math.isfinite(float(row["loss"])) for row in trained)
    assert len(trained) == 3 * 4 - 3
    assert [row["step"] for row in trained] == list(range(9)), "a batch that is left out is no step"
    left_out = {(event["epoch"], event["batch"]) for event in found}
    assert left_out.isdisjoint((row["epoch"], row["batch"]) for row in trained)


def test_a_run_that_goes_back_equals_one_that_never_saw_the_batch(tmp_path: Path) -> None:
    spoilt().train(tmp_path / "run", on_divergence=ROLLBACK, snapshots=OFTEN)
    skips = [tuple(event["skip"][0]) for event in events(tmp_path / "run", "diverged")]

    class Knowing(Small):
        def train_epoch(self, run: Run) -> None:
            run._keeper.record.watch.skips = skips  # left out from the beginning
            super().train_epoch(run)

    knowing = Knowing()
    knowing.data[0][SPOILT, 1] = math.nan
    knowing.train(tmp_path / "whole", snapshots=OFTEN)
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    for name in ("model.safetensors", "optimizer.safetensors"):
        last = "snapshots/step-000000009-epoch-000003"
        assert (tmp_path / "run" / last / name).read_bytes() == (tmp_path / "whole" / last / name).read_bytes()


class Noticed:
    """Batches of tensors, one of them no numbers; a SIGTERM comes while the one after it is loaded once."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 3 and not self.flag.exists():
            self.flag.touch()
            signal.raise_signal(signal.SIGTERM)
        return torch.full((2, 6), math.nan if index == 2 else float(index))


@pytest.mark.parametrize("policy", [OFTEN, SnapshotPolicy(every_steps=1), SnapshotPolicy(every_epochs=9)])
def test_a_notice_that_breaks_off_a_wait_after_a_divergence_that_was_not_read_yet(
    tmp_path: Path, policy: SnapshotPolicy
) -> None:
    def train(directory: Path, flag: Path) -> None:
        model = jobs.network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        state = {"model": model, "optimizer": optimizer}
        with Run(directory, state=state, snapshots=policy, progress=False, on_divergence=ROLLBACK) as run:
            for _ in run.epochs(2):
                for inputs in run.batches(Noticed(flag)):
                    run._screen.due_at = math.inf  # rows are read at boundaries alone
                    optimizer.zero_grad()
                    loss = model(inputs).mean()
                    loss.backward()
                    optimizer.step()
                    run.log(loss=loss)

    (tmp_path / "never").touch()
    train(tmp_path / "whole", tmp_path / "never")
    with pytest.raises(Preempted):
        train(tmp_path / "run", tmp_path / "flag")
    assert len(events(tmp_path / "run", "diverged")) == 1
    notices.reset()
    train(tmp_path / "run", tmp_path / "flag")
    assert endings.differing(endings.ending(tmp_path / "whole"), endings.ending(tmp_path / "run")) == []


def test_what_the_body_and_the_samplers_moved_before_going_back_is_as_if_it_had_not(tmp_path: Path) -> None:
    """A scheduler stepped by the rest of the body, a batch sampler that counts its rounds: all begin again."""

    def train(directory: Path, known: list[tuple[int, int, int]]) -> None:
        def leave_out(run: Run) -> None:
            run._keeper.record.watch.skips = run._keeper.record.watch.skips or known

        jobs.by_going_back(str(directory), at_start=leave_out)

    train(tmp_path / "run", [])
    found = events(tmp_path / "run", "diverged")
    assert "step-000000000-epoch-000000" in {event["back_to"] for event in found}, "to the very beginning, too"
    train(tmp_path / "whole", [tuple(event["skip"][0]) for event in found])
    assert not events(tmp_path / "whole", "diverged")
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    last = sorted(path.name for path in (tmp_path / "run" / "snapshots").iterdir())[-1]
    for name in ("model.safetensors", "optimizer.safetensors"):
        here, there = (tmp_path / run / "snapshots" / last / name for run in ("run", "whole"))
        assert here.read_bytes() == there.read_bytes()


def test_a_stretch_of_several_batches_is_left_out_wherever_snapshots_lie(tmp_path: Path) -> None:
    settings = OnDivergence("rollback", skip_batches=3, max_rollbacks=9)
    for name, policy in (("often", SnapshotPolicy(every_steps=1, keep_last=9)), ("seldom", SnapshotPolicy())):
        spoilt().train(tmp_path / name, epochs=2, on_divergence=settings, snapshots=policy)
    assert [event["skip"] for event in events(tmp_path / "often", "diverged")] == [
        event["skip"] for event in events(tmp_path / "seldom", "diverged")
    ]
    assert rows(tmp_path / "often") == rows(tmp_path / "seldom")


@pytest.mark.parametrize(
    "policy", [SnapshotPolicy(), OFTEN, SnapshotPolicy(every_steps=1), SnapshotPolicy(every_steps=5)]
)
@pytest.mark.parametrize("step", range(9))
def test_a_kill_at_any_step_repeats_the_same_rollbacks(tmp_path: Path, step: int, policy: SnapshotPolicy) -> None:
    spoilt().train(tmp_path / "whole", on_divergence=ROLLBACK, snapshots=policy)
    with pytest.raises(Killed):
        spoilt(at_step=killed_at(step)).train(tmp_path / "run", on_divergence=ROLLBACK, snapshots=policy)
    spoilt().train(tmp_path / "run", on_divergence=ROLLBACK, snapshots=policy)
    assert endings.differing(endings.ending(tmp_path / "whole"), endings.ending(tmp_path / "run")) == []


def test_how_often_snapshots_are_taken_changes_nothing(tmp_path: Path) -> None:
    for number, policy in enumerate((SnapshotPolicy(), OFTEN, SnapshotPolicy(every_steps=1))):
        spoilt().train(tmp_path / str(number), on_divergence=ROLLBACK, snapshots=policy)
    model = [
        (tmp_path / str(n) / "snapshots/step-000000009-epoch-000003/model.safetensors").read_bytes() for n in range(3)
    ]
    assert model[0] == model[1] == model[2]


def test_status_tells_every_divergence_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def kill(run: Run) -> None:
        raise Killed  # in the evaluation that follows the first rollback, before a snapshot knows of it

    with pytest.raises(Killed):
        spoilt(at_evaluation=kill).train(tmp_path / "run", on_divergence=ROLLBACK)
    spoilt().train(tmp_path / "run", on_divergence=ROLLBACK)
    assert len(events(tmp_path / "run", "diverged")) > 3, "found again after the kill"
    assert main(["status", str(tmp_path / "run"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["divergences"]
    assert [(one["epoch"], one["action"]) for one in told] == [(0, "rollback"), (1, "rollback"), (2, "rollback")]
    assert main(["status", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.count("left out epoch ") == 3


def test_a_run_may_go_back_only_so_often(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="gone back 2 times already"):
        spoilt().train(tmp_path / "run", on_divergence=OnDivergence("rollback", max_rollbacks=2))
    assert [event["action"] for event in events(tmp_path / "run", "diverged")] == ["rollback", "rollback", "stop"]


def test_a_snapshot_that_is_spoilt_already_is_not_gone_back_to(tmp_path: Path) -> None:
    """The update of an epoch's last batch spoils the weights; its own loss was finite, and the snapshot was taken."""

    class Exploding(Small):
        def train_epoch(self, run: Run) -> None:
            for inputs, targets in run.batches(self.data, batch_size=3):
                self.optimizer.zero_grad()
                loss = (self.model(inputs) - targets).square().mean()
                loss.backward()
                self.optimizer.step()
                run.log(loss=loss)
                if (run.epoch, run.batch) == (0, 3):
                    with torch.no_grad():
                        self.model[0].weight.fill_(math.inf)

    run = Exploding().train(tmp_path / "run", on_divergence="rollback")
    assert run.outcome == "finished"
    (event,) = events(tmp_path / "run", "diverged")
    assert (event["epoch"], event["batch"]) == (1, 0), "there it was seen"
    assert event["skip"] == [[0, 3, 3]], "and this one is to blame"
    assert event["back_to"] == "step-000000000-epoch-000000"
    assert any((tmp_path / "run" / "set-aside").rglob("step-000000004-epoch-000001")), "kept, to be looked at"


def test_without_a_good_snapshot_it_stops(tmp_path: Path) -> None:
    class NeverGood(Small):
        def __post_init__(self) -> None:
            super().__post_init__()
            with torch.no_grad():
                self.model[0].weight.fill_(math.nan)

    with pytest.raises(DivergedError, match="no snapshot from before it is good"):
        NeverGood().train(tmp_path / "run", on_divergence="rollback")


def test_a_stretch_that_is_too_short_is_doubled(tmp_path: Path) -> None:
    class Poisoned(Small):
        """Two samples in a row in each epoch's order."""

        def train_epoch(self, run: Run) -> None:
            for inputs, targets in run.batches(self.data, batch_size=1):
                loss = (self.model[0](inputs) - targets).square().mean() / (0.0 if 3 <= run.batch <= 5 else 1.0)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                run.log(loss=loss)

    run = Poisoned().train(tmp_path / "run", epochs=1, on_divergence=OnDivergence("rollback", max_rollbacks=9))
    assert run.outcome == "finished"
    found = events(tmp_path / "run", "diverged")
    assert [event["batch"] for event in found] == [3, 4, 5]
    assert [event["skip"] for event in found] == [[[0, 3, 3]], [[0, 2, 4]], [[0, 0, 5]]]


def test_the_body_of_an_epoch_that_diverged_ends_on_a_good_model(tmp_path: Path) -> None:
    seen = []

    class Looking(Small):
        def train_epoch(self, run: Run) -> None:
            super().train_epoch(run)
            seen.append(all(bool(torch.isfinite(p).all()) for p in self.model.parameters()))

    looking = Looking()
    looking.data[0][SPOILT, 1] = math.nan
    looking.train(tmp_path / "run", on_divergence=ROLLBACK)
    assert seen == [True] * 6


def test_leaving_the_epochs_while_going_back_is_no_end_of_the_run(tmp_path: Path) -> None:
    def train() -> None:
        small = spoilt()
        with Run(tmp_path / "run", state=small.state, progress=False, on_divergence="rollback") as run:
            for _ in run.epochs(3):
                small.train_epoch(run)
                break

    with pytest.raises(Preempted):
        train()
    assert not events(tmp_path / "run", "finished")


def test_a_notice_behind_a_diverged_step_saves_nothing_of_it(tmp_path: Path) -> None:
    def notice(run: Run) -> None:
        row = small.seen[-1]
        if row == diverging:
            asked_to_leave(run)

    small = spoilt()
    with pytest.raises(DivergedError) as caught:
        small.train(tmp_path / "first", on_divergence="stop")
    assert caught.value.step is not None
    diverging = small.seen[caught.value.step]
    small = spoilt(at_step=notice)
    try:
        with pytest.raises(Preempted):
            small.train(tmp_path / "run", on_divergence="rollback")
    finally:
        notices.reset()
    spoilt().train(tmp_path / "run", on_divergence=ROLLBACK)
    spoilt().train(tmp_path / "whole", on_divergence=ROLLBACK)
    assert endings.differing(endings.ending(tmp_path / "whole"), endings.ending(tmp_path / "run")) == []


def asked_to_leave(run: Run) -> None:
    notices.leave, notices.pending = signal.SIGTERM, True


def test_a_notice_in_the_evaluation_behind_a_diverged_batch_saves_nothing_of_it(tmp_path: Path) -> None:
    class Leaving(Small):
        def train_epoch(self, run: Run) -> None:
            for inputs, _ in run.batches(self.data, batch_size=3):
                run.log(loss=inputs.sum())
                with torch.no_grad():
                    self.model[0].weight.add_(inputs.sum())
                if inputs.isnan().any():
                    break

    leaving = Leaving(at_evaluation=asked_to_leave)
    leaving.data[0][SPOILT, 1] = math.nan
    try:
        with pytest.raises((Preempted, DivergedError)):
            leaving.train(tmp_path / "run", on_divergence="stop")
    finally:
        notices.reset()
    for snapshot in (tmp_path / "run").glob("snapshots/*"):
        assert torch.isfinite(safetensors.torch.load_file(snapshot / "model.safetensors")["0.weight"]).all()


def test_a_notice_in_an_evaluation_after_going_back_saves_the_epoch(tmp_path: Path) -> None:
    seen = []

    def leave_in_the_second_epoch(run: Run) -> None:
        seen.append(run.epoch)
        if run.epoch == 1 and math.isfinite(rows(tmp_path / "run")[-1].get("loss", 0.0)) and seen.count(1) == 4:
            asked_to_leave(run)  # the first three were behind the batch that is left out by now

    small = spoilt(at_evaluation=leave_in_the_second_epoch)
    try:
        with pytest.raises(Preempted, match="75"):
            small.train(tmp_path / "run", on_divergence=ROLLBACK)
    finally:
        notices.reset()
    assert small.model is not None
    (event,) = events(tmp_path / "run", "preempted")
    assert event["snapshot"] == f"step-{event['step']:09d}", "within the epoch, its batches done"
    spoilt().train(tmp_path / "run", on_divergence=ROLLBACK)
    spoilt().train(tmp_path / "whole", on_divergence=ROLLBACK)
    assert endings.differing(endings.ending(tmp_path / "whole"), endings.ending(tmp_path / "run")) == []


def test_a_loss_of_whole_epochs_is_looked_at_too(tmp_path: Path) -> None:
    def train() -> None:
        small = Small()
        with Run(tmp_path / "run", state=small.state, progress=False, on_divergence="stop") as run:
            for _ in run.epochs(2):
                for _ in run.batches(small.data, batch_size=3):
                    pass
                run.log_epoch(loss=math.inf)

    with pytest.raises(DivergedError, match=r"loss is inf at step 3 \(epoch 1, batch 3\)"):
        train()


def test_what_was_left_out_stays_out_when_the_script_asks_for_nothing_any_more(tmp_path: Path) -> None:
    spoilt().train(tmp_path / "run", epochs=1, on_divergence=ROLLBACK, snapshots=OFTEN)
    run = Small()
    run.train(tmp_path / "run", epochs=2)
    state = json.loads(sorted((tmp_path / "run/snapshots").iterdir())[-1].joinpath("state.json").read_text())
    assert "divergence" in json.dumps(state)


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_trainer_goes_back_too(tmp_path: Path, compile: bool) -> None:
    def train(directory: Path, epochs: int = 4) -> None:
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.1), torch.nn.Linear(4, 1))
        inputs = torch.rand(40, 3)
        inputs[11, 2] = math.nan
        Trainer(
            model=model,
            loss_fn=torch.nn.functional.mse_loss,
            optimizer=torch.optim.Adam(model.parameters(), lr=0.01),
            train_data=(inputs, torch.rand(40, 1)),
            batch_size=8,
            run_dir=directory,
            progress=False,
            on_divergence=ROLLBACK,
            compile=compile,
        ).fit(epochs=epochs)

    train(tmp_path / "whole")
    assert len(events(tmp_path / "whole", "diverged")) == 4
    train(tmp_path / "run", 2)
    train(tmp_path / "run")
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    last = "snapshots/step-000000016-epoch-000004/model.safetensors"
    assert (tmp_path / "run" / last).read_bytes() == (tmp_path / "whole" / last).read_bytes()


def test_the_process_ends_with_79(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        "import torch\nfrom resumable_trainer import Run\n"
        "m = torch.nn.Linear(1, 1)\n"
        "with Run('run', state={'m': m}, on_divergence='stop') as run:\n"
        "    for _ in run.epochs(1):\n"
        "        for i in run.batches(range(5)):\n"
        "            run.log(loss=float('nan') if i == 3 else 1.0)\n"
    )
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 79
    assert "loss is nan at step 3 (epoch 1, batch 3)" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_choice_it_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = spoilt(at_step=lambda run: setattr(run._screen, "due_at", 0.0))
    small.train(tmp_path / "run", progress=None)
    assert capsys.readouterr().err.count("on_divergence='stop'") == 1


@pytest.mark.parametrize(
    "settings",
    [{"action": "panic"}, {"metric": ""}, {"spike": 1.0}, {"spike": math.nan}, {"window": 1}, {"skip_batches": 0}],
)
def test_illegal_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        OnDivergence(**settings)


def test_a_word_that_is_none_of_the_two_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="action is 'explode'"):
        Run(tmp_path, state={"model": Small().model}, on_divergence="explode")  # type: ignore[arg-type]


def test_a_spike_is_found_only_where_it_is_asked_for() -> None:
    positions = [(step, 0, step) for step in range(6)]
    values = [1.0, 1.2, 0.8, 1.0, 11.0, 1.0]
    calm, watchful = DivergenceWatch(OnDivergence()), DivergenceWatch(OnDivergence(spike=10, window=4))
    calm.look(positions, values)
    watchful.look(positions, values)
    assert calm.found is None
    assert watchful.found is not None
    assert (watchful.found.step, watchful.found.median) == (4, 1.0)


@given(values=st.lists(st.floats(0.1, 10), min_size=1, max_size=40), cut=st.integers(0, 40))
def test_a_watch_that_was_saved_and_restored_finds_the_same(values: list[float], cut: int) -> None:
    settings = OnDivergence(spike=3.0, window=3)
    positions = [(step, 0, step) for step in range(len(values))]
    whole, first, second = (DivergenceWatch(settings) for _ in range(3))
    whole.look(positions, values)
    first.look(positions[:cut], values[:cut])
    if first.found is None:
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        second.look(positions[cut:], values[cut:])
        assert second.found == whole.found


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9), st.integers(0, 3))))
def test_stretches_that_touch_are_one_and_hold_the_same_batches(pieces: list[tuple[int, int, int]]) -> None:
    skips = [(epoch, first, first + more) for epoch, first, more in pieces]
    result = merged(skips)
    whole, other = DivergenceWatch(None, skips=skips), DivergenceWatch(None, skips=result)
    assert all(whole.left_out(epoch) == other.left_out(epoch) for epoch in range(3))
    assert all(a[0] < b[0] or a[2] + 1 < b[1] for a, b in itertools.pairwise(result))


def test_the_blamed_are_the_last_rows_across_epochs(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b"what is older is not read\n")
    record = Record(tmp_path / "metrics.jsonl", None, files=Files())
    for at in [(5, 0, 5), (6, 0, 6), (7, 1, 0), (8, 1, 1), (9, 1, 2)]:
        record.add_step(*at, weight=1, values={"loss": 0.5})
        if at == (6, 0, 6):
            record.end_epoch(Position(0, 7, 7))
    assert record.last_steps(until=8, number=3) == [(6, 0, 6), (7, 1, 0), (8, 1, 1)]
    assert stretches(record.last_steps(until=8, number=3)) == [(0, 6, 6), (1, 0, 1)]
    assert record.last_steps(until=9, number=1) == [(9, 1, 2)], "also rows that were not written yet"
    record.close()
    assert in_words([(0, 6, 6), (1, 0, 1)]) == "epoch 1 batch 6, epoch 2 batches 0 to 1"

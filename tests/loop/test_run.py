from __future__ import annotations

import json
import os
import signal
from typing import TYPE_CHECKING, Any

import endings
import pytest
import torch
from small import Killed, Small, killed_at

from resumable_trainer import (
    DriftError,
    EarlyStopping,
    Interrupted,
    NoValidSnapshotError,
    Preempted,
    Run,
    RunHeldError,
    SettingsError,
    SnapshotPolicy,
    StateMismatchError,
    UsageError,
)
from resumable_trainer.loop import launch
from resumable_trainer.loop.notices import notices
from resumable_trainer.snapshot.store import Store

if TYPE_CHECKING:
    from pathlib import Path

EVERY_STEP = SnapshotPolicy(every_steps=1, keep_last=2)


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, bytes]:
    Small().train(tmp_path / "whole", snapshots=EVERY_STEP)
    return endings.ending(tmp_path / "whole")


def rows(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def events(directory: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]
    return [event for event in found if event["event"] == kind]


def test_there_is_a_row_per_step_and_per_epoch_and_no_clock_in_them(tmp_path: Path) -> None:
    Small().train(tmp_path / "run", epochs=2)
    found = rows(tmp_path / "run")
    steps = [row for row in found if row["row"] == "step"]
    assert [(r["step"], r["epoch"], r["batch"]) for r in steps] == [(s, s // 4, s % 4) for s in range(8)]
    assert [list(row) for row in found if row["row"] == "epoch"] == [
        ["row", "step", "epoch", "batch", "loss", "test_accuracy"]
    ] * 2
    mean = sum(row["loss"] for row in steps[:4]) / 4
    assert found[4]["loss"] == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize("step", range(12))
def test_a_run_killed_at_any_step_ends_like_one_never_killed(
    tmp_path: Path, whole: dict[str, bytes], step: int
) -> None:
    with pytest.raises(Killed):
        Small(at_step=killed_at(step)).train(tmp_path / "run", snapshots=EVERY_STEP)
    again = Small()
    again.train(tmp_path / "run", snapshots=EVERY_STEP)
    assert endings.differing(whole, endings.ending(tmp_path / "run")) == []
    assert again.seen[0] == (step // 4, step % 4)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [0, 3, 7, 11])
def test_a_notice_in_training_saves_at_the_next_boundary(
    tmp_path: Path, whole: dict[str, bytes], step: int, number: signal.Signals
) -> None:
    def notice(run: Run) -> None:
        if run.step == step:
            os.kill(os.getpid(), number)

    with pytest.raises((Preempted, Interrupted)) as leaving:
        Small(at_step=notice).train(tmp_path / "run")
    assert leaving.value.code == {signal.SIGTERM: 75, signal.SIGINT: 130}[number]
    assert Store(tmp_path / "run").names()[-1] == f"step-{step + 1:09d}"
    notices.reset()
    Small().train(tmp_path / "run", snapshots=EVERY_STEP)
    assert endings.differing(whole, endings.ending(tmp_path / "run")) == []


@pytest.mark.parametrize("batch", range(3))
def test_a_notice_in_evaluation_saves_what_was_before_it(tmp_path: Path, whole: dict[str, bytes], batch: int) -> None:
    seen: list[int] = []

    def notice(run: Run) -> None:
        seen.append(run.epoch)
        if len(seen) == 4 + batch:
            os.kill(os.getpid(), signal.SIGTERM)

    small = Small(at_evaluation=notice)
    if batch == 2:  # the last batch: served when the epoch is complete
        with pytest.raises(Preempted):
            small.train(tmp_path / "run")
        assert Store(tmp_path / "run").names()[-1] == "step-000000008-epoch-000002"
    else:
        with pytest.raises(Preempted):
            small.train(tmp_path / "run")
        assert Store(tmp_path / "run").names()[-1] == "step-000000008"
    notices.reset()
    Small().train(tmp_path / "run", snapshots=EVERY_STEP)
    assert endings.differing(whole, endings.ending(tmp_path / "run")) == []


def test_an_evaluation_that_changes_the_state_is_interrupted_and_repeated_exactly(tmp_path: Path) -> None:
    """Somebody forgot `model.eval()`: what is saved is the state of before."""

    def train(directory: Path, notice_at: int | None = None) -> None:
        small, seen = Small(), []

        def change(run: Run) -> None:
            small.model[1].running_mean.add_(0.1)
            seen.append(run.epoch)
            if len(seen) == notice_at:
                os.kill(os.getpid(), signal.SIGTERM)

        small.at_evaluation = change
        small.train(directory)

    train(tmp_path / "whole")
    with pytest.raises(Preempted):
        train(tmp_path / "run", 5)
    assert Store(tmp_path / "run").names()[-1] == "step-000000008"
    notices.reset()
    train(tmp_path / "run")
    assert endings.differing(endings.ending(tmp_path / "whole"), endings.ending(tmp_path / "run")) == []


def test_a_large_state_that_evaluation_changed_falls_back_to_the_last_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from resumable_trainer.loop import held

    monkeypatch.setattr(held.HeldState.__init__, "__kwdefaults__", {"copy_up_to_bytes": 0})
    small = Small()

    def spoil(run: Run) -> None:
        if run.epoch == 1:
            with torch.no_grad():
                small.model[0].weight.data.add_(1)
            os.kill(os.getpid(), signal.SIGTERM)

    small.at_evaluation = spoil
    with pytest.raises(Preempted):
        small.train(tmp_path / "run", progress=None)
    assert Store(tmp_path / "run").names()[-1] == "step-000000004-epoch-000001"
    assert "the last durable snapshot stands" in capsys.readouterr().err


def test_usr1_saves_and_training_goes_on(tmp_path: Path, whole: dict[str, bytes]) -> None:
    def notice(run: Run) -> None:
        if run.step == 5:
            os.kill(os.getpid(), signal.SIGUSR1)

    Small(at_step=notice).train(tmp_path / "run", snapshots=SnapshotPolicy(keep_last=9))
    assert "step-000000006" in Store(tmp_path / "run").names()
    ended = endings.ending(tmp_path / "run")
    assert endings.differing(whole, ended) == []


def test_the_users_own_handler_is_called_too(tmp_path: Path) -> None:
    called: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: called.append(number))
    with pytest.raises(Preempted):
        Small(at_step=lambda run: os.kill(os.getpid(), signal.SIGTERM)).train(tmp_path / "run")
    assert called == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, None)


def test_snapshots_change_nothing(tmp_path: Path, whole: dict[str, bytes]) -> None:
    Small().train(tmp_path / "run", snapshots=SnapshotPolicy(every_epochs=None))
    assert Store(tmp_path / "run").names() == ["step-000000012-epoch-000003"]
    assert endings.differing(whole, endings.ending(tmp_path / "run")) == []


@pytest.mark.parametrize("progress", [None, True])
def test_showing_progress_changes_nothing(tmp_path: Path, whole: dict[str, bytes], progress: bool | None) -> None:
    Small().train(tmp_path / "run", progress=progress, snapshots=EVERY_STEP)
    assert endings.differing(whole, endings.ending(tmp_path / "run")) == []


@pytest.mark.parametrize("kill", [3, 5, -2])
def test_break_out_of_the_batches_ends_the_epoch_and_is_not_redone(tmp_path: Path, kill: int) -> None:
    def train(directory: Path, kill: int | None = None) -> list[tuple[int, int]]:
        small = Small()
        with Run(directory, state=small.state, progress=False, snapshots=EVERY_STEP) as run:
            for epoch in run.epochs(3):
                for inputs, _ in run.batches(small.data, batch_size=3):
                    small.seen.append((run.epoch, run.batch))
                    run.log(sum=inputs.sum())
                    if kill == run.step:
                        raise Killed
                    if run.batch == 1:
                        break
                if kill == -epoch - 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                for _ in run.evaluating(small.data, batch_size=4):
                    pass
                run.log_epoch(done=run.batch)
        return small.seen

    whole = train(tmp_path / "whole")
    assert whole == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    with pytest.raises((Killed, Preempted)):
        train(tmp_path / "run", kill)
    notices.reset()  # a new process would not know of the SIGTERM
    assert train(tmp_path / "run") == whole[abs(kill) if kill > 0 else 4 :]
    assert endings.differing(endings.ending(tmp_path / "whole"), endings.ending(tmp_path / "run")) == []


def test_break_out_of_the_epochs_ends_the_run(tmp_path: Path) -> None:
    def train(total: int) -> list[int]:
        small, epochs = Small(), []
        with Run(tmp_path / "run", state=small.state, progress=False) as run:
            for epoch in run.epochs(total):
                epochs.append(epoch)
                small.train_epoch(run)
                if epoch == 1:
                    break
            assert run.outcome == "finished" or epochs[-1:] == [1]
            assert len(run.history.epochs("loss")) == max(2, run.epoch)
        assert run.outcome == "finished"
        return epochs

    assert train(5) == [0, 1]
    assert train(5) == []
    assert train(6) == [2, 3, 4, 5]


def test_an_exception_in_an_epoch_is_no_break(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        Small(at_step=killed_at(5)).train(tmp_path / "run")
    assert Store(tmp_path / "run").names() == ["step-000000004-epoch-000001"]
    assert events(tmp_path / "run", "failed")[0]["error"] == "Killed: "


def test_epochs_are_a_total_and_can_be_raised(tmp_path: Path) -> None:
    assert Small().train(tmp_path / "run", epochs=2).outcome == "finished"
    nothing = Small()
    assert nothing.train(tmp_path / "run", epochs=2).outcome == "finished"
    assert nothing.seen == []
    more = Small()
    more.train(tmp_path / "run", epochs=4)
    assert [epoch for epoch, batch in more.seen if batch == 0] == [2, 3]
    Small().train(tmp_path / "straight", epochs=4)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (tmp_path / "straight/metrics.jsonl").read_bytes()


def test_early_stopping_is_remembered_and_a_changed_patience_takes_effect(tmp_path: Path) -> None:
    def train(patience: int) -> tuple[Run, int]:
        small = Small(accuracy=lambda epoch: [0.5, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3][epoch])
        stopping = EarlyStopping("test_accuracy", patience=patience)
        run = small.train(tmp_path / "run", epochs=8, early_stopping=stopping)
        return run, len({epoch for epoch, _ in small.seen})

    run, trained = train(2)
    assert (run.outcome, run.epoch, trained) == ("stopped_early", 4, 4)
    run, trained = train(2)
    assert (run.outcome, trained) == ("stopped_early", 0)
    run, trained = train(4)  # two epochs were waited already
    assert (run.outcome, run.epoch, trained) == ("stopped_early", 6, 2)
    names = Store(tmp_path / "run").names()
    assert "step-000000008-epoch-000002" in names, "the best one stays"
    assert Store(tmp_path / "run").select("best") == "step-000000008-epoch-000002"


def test_a_metric_that_is_not_logged_is_said_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'accuracy'.*loss, test_accuracy"):
        Small().train(tmp_path / "run", early_stopping=EarlyStopping("accuracy"))


def test_a_changed_model_is_one_error_that_lists_every_mismatch(tmp_path: Path) -> None:
    Small().train(tmp_path / "run")
    with pytest.raises(StateMismatchError) as error:
        Small(width=5).train(tmp_path / "run", epochs=5)
    for place in ("model.0.weight", "model.0.bias", "model.1.running_mean", "model.3.weight"):
        assert place in str(error.value)
    assert "shape [4, 3] in the snapshot, [5, 3] in the script" in str(error.value)
    assert error.value.exit_code == 78


def test_missing_and_unexpected_parts_are_named(tmp_path: Path) -> None:
    Small().train(tmp_path / "run")
    small = Small()
    state = {"model": small.model, "net": small.model}
    with (
        pytest.raises(StateMismatchError, match=r"'net' is not in the snapshot[\s\S]*'optimizer' is in the snapshot"),
        Run(tmp_path / "run", state=state, progress=False),
    ):
        pass


def test_drift_is_said_and_refused_under_strict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Small().train(tmp_path / "run", seed=1)
    small = Small()
    small.optimizer.param_groups[0]["lr"] = 0.5
    with pytest.raises(DriftError, match=r"seed was 1, now 2") as error:
        small.train(tmp_path / "run", epochs=4, seed=2, strict=True)
    assert "param_groups.0.lr was 0.01 when the run began, the script now says 0.5" in str(error.value)
    small.train(tmp_path / "run", epochs=4, seed=2, progress=None)
    shown = capsys.readouterr().err
    assert "drift   seed was 1, now 2" in shown
    assert "the saved value counts" in shown
    assert small.optimizer.param_groups[0]["lr"] == 0.01


def test_changed_data_is_said_and_refused_under_strict(tmp_path: Path) -> None:
    Small().train(tmp_path / "run")
    small = Small()
    small.data = (small.data[0][:9], small.data[1][:9])
    with pytest.raises(DriftError, match="data was"):
        small.train(tmp_path / "run", epochs=4, strict=True)


def test_going_back_sets_newer_ones_aside_and_trains_the_same_again(tmp_path: Path) -> None:
    policy = SnapshotPolicy(keep_last=9)
    Small().train(tmp_path / "run", snapshots=policy)
    ended = endings.ending(tmp_path / "run")
    launch.process.handover.which = "epoch:1"
    run = Small().train(tmp_path / "run", snapshots=policy)
    assert run.resumed_from == "step-000000004-epoch-000001"
    assert endings.differing(ended, endings.ending(tmp_path / "run")) == []
    aside = tmp_path / "run/set-aside/line-1"
    assert sorted(p.name for p in aside.iterdir() if p.is_dir()) == [
        "step-000000008-epoch-000002",
        "step-000000012-epoch-000003",
    ]
    assert (aside / "metrics.jsonl").read_bytes() == ended["metrics.jsonl"]


def test_a_fresh_start_sets_everything_aside(tmp_path: Path) -> None:
    Small().train(tmp_path / "run")
    ended = endings.ending(tmp_path / "run")
    launch.process.handover.fresh = True
    small = Small()
    assert small.train(tmp_path / "run").resumed_from is None
    assert len(small.seen) == 12
    assert endings.differing(ended, endings.ending(tmp_path / "run")) == []


def test_a_damaged_snapshot_goes_to_quarantine_and_the_older_one_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Small().train(tmp_path / "run")
    ended = endings.ending(tmp_path / "run")
    victim = tmp_path / "run/snapshots/step-000000012-epoch-000003/model.safetensors"
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    run = Small().train(tmp_path / "run", progress=None)
    assert run.resumed_from == "step-000000008-epoch-000002"
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("damaged")]
    assert len(lines) == 1
    assert "step-000000012-epoch-000003: model.safetensors has digest" in lines[0]
    quarantine = tmp_path / "run/quarantine"
    assert (quarantine / "step-000000012-epoch-000003/model.safetensors").read_bytes() == bytes(data)
    assert "model.safetensors has digest" in (quarantine / "step-000000012-epoch-000003.reason.txt").read_text()
    assert endings.differing(ended, endings.ending(tmp_path / "run")) == []


def test_if_all_are_damaged_nothing_is_started_over_and_nothing_changed(tmp_path: Path) -> None:
    Small().train(tmp_path / "run")
    for name in Store(tmp_path / "run").names():
        (tmp_path / "run/snapshots" / name / "state.json").unlink()
    before = sorted(str(path) for path in (tmp_path / "run/snapshots").rglob("*"))
    metrics = (tmp_path / "run/metrics.jsonl").read_bytes()
    with pytest.raises(NoValidSnapshotError, match=r"3 snapshots and none is valid"):
        Small().train(tmp_path / "run")
    assert sorted(str(path) for path in (tmp_path / "run/snapshots").rglob("*")) == before
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == metrics


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_journal_is_kept_aside_and_the_state_goes_on(tmp_path: Path, damage: str) -> None:
    Small().train(tmp_path / "run")
    path = tmp_path / "run/metrics.jsonl"
    data = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(data[:200] if damage == "cut" else data[:100] + bytes([data[100] ^ 128]) + data[101:])
    run = Small().train(tmp_path / "run", epochs=4)
    assert run.epoch == 4
    assert events(tmp_path / "run", "journal_damaged")
    assert rows(tmp_path / "run")[-1]["epoch"] == 3
    assert Store(tmp_path / "run").verify(Store(tmp_path / "run").names()[-1]).journal is not None


def test_a_second_process_is_told_who_holds_the_run(tmp_path: Path) -> None:
    small = Small()
    with (
        Run(tmp_path / "run", state=small.state, progress=False),
        pytest.raises(RunHeldError, match=rf"held by pid {os.getpid()} on \S+ since \S+") as error,
    ):
        Small().train(tmp_path / "run")
    assert error.value.exit_code == 69
    assert "\n" not in str(error.value)


def test_two_loops_over_batches_in_one_epoch_resume_within_the_second(tmp_path: Path) -> None:
    def train(directory: Path, kill: int | None = None) -> list[tuple[int, int]]:
        small = Small(at_step=killed_at(kill) if kill is not None else lambda run: None)
        policy = SnapshotPolicy(every_steps=1)
        with Run(directory, state=small.state, progress=False, snapshots=policy) as run:
            for _epoch in run.epochs(2):
                small.train_epoch(run)
                small.optimizer.param_groups[0]["lr"] *= 0.5  # between the loops: must not happen twice
                small.train_epoch(run)
        return small.seen

    train(tmp_path / "whole")
    with pytest.raises(Killed):
        train(tmp_path / "run", 6)
    assert train(tmp_path / "run")[0] == (0, 6)
    whole, ended = endings.ending(tmp_path / "whole"), endings.ending(tmp_path / "run")
    assert endings.differing(whole, ended) == []


def test_what_the_top_of_the_body_changes_and_draws_is_not_done_twice(tmp_path: Path) -> None:
    def train(directory: Path, kill: int | None = None) -> None:
        small = Small()
        with Run(directory, state=small.state, progress=False, snapshots=EVERY_STEP) as run:
            for _epoch in run.epochs(3):
                small.optimizer.param_groups[0]["lr"] *= 0.5
                drawn = torch.rand(())
                run.log_epoch(lr=small.optimizer.param_groups[0]["lr"], drawn=drawn)
                for inputs, targets in run.batches(small.data, batch_size=3, shuffle=True):
                    loss = (small.model(inputs * drawn) - targets).square().mean()
                    loss.backward()
                    small.optimizer.step()
                    small.optimizer.zero_grad()
                    run.log(loss=loss)
                    if run.step == kill:
                        raise Killed

    train(tmp_path / "whole")
    with pytest.raises(Killed):
        train(tmp_path / "run", 6)
    train(tmp_path / "run")
    assert endings.differing(endings.ending(tmp_path / "whole"), endings.ending(tmp_path / "run")) == []


class Stream:
    """An iterable that keeps its own place."""

    def __init__(self) -> None:
        self.next, self.read = 0, []

    def __iter__(self) -> Any:
        while self.next % 5 < 4:
            self.next += 1
            self.read.append(self.next)
            yield torch.tensor([float(self.next)])
        self.next += 1

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


def test_a_stateful_iterable_goes_on_where_it_was(tmp_path: Path) -> None:
    def train(directory: Path, kill: int | None = None) -> Stream:
        small, stream = Small(), Stream()
        with Run(directory, state=small.state, progress=False, snapshots=EVERY_STEP) as run:
            for _epoch in run.epochs(3):
                for value in run.batches(stream):
                    run.log(value=value)
                    if run.step == kill:
                        raise Killed
        return stream

    train(tmp_path / "whole")
    with pytest.raises(Killed):
        train(tmp_path / "run", 6)
    assert train(tmp_path / "run").read[0] == 8, "the seventh batch of the run is in the second epoch"
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


def test_any_iterable_is_skipped_and_one_line_says_what_it_costs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Plain:
        def __iter__(self) -> Any:
            return iter([torch.rand(2) for _ in range(5)])

    def train(directory: Path, kill: int | None = None) -> None:
        small = Small()
        with Run(directory, state=small.state, snapshots=EVERY_STEP) as run:
            for _epoch in run.epochs(2):
                for value in run.batches(Plain()):
                    run.log(value=value.sum(), draw=torch.rand(()))
                    if run.step == kill:
                        raise Killed

    train(tmp_path / "whole")
    with pytest.raises(Killed):
        train(tmp_path / "run", 7)
    capsys.readouterr()
    train(tmp_path / "run")
    assert sum("away every batch before its place" in line for line in capsys.readouterr().err.splitlines()) == 1


def test_log_refuses_what_is_no_metric(tmp_path: Path) -> None:
    small = Small()
    with Run(tmp_path / "run", state=small.state, progress=False) as run:
        with pytest.raises(UsageError, match="no batch is under way"):
            run.log(loss=1.0)
        for _ in run.epochs(1):
            for _ in run.batches(range(1)):
                with pytest.raises(UsageError, match=r"loss is a Tensor of shape \[3\]"):
                    run.log(loss=torch.rand(3))
                with pytest.raises(UsageError, match="step is in every row"):
                    run.log(step=3)
                with pytest.raises(UsageError, match="name is a str"):
                    run.log(name="x")
                run.log(a=1, b=torch.tensor(2.5), c=float("nan"), d=True)
    assert rows(tmp_path / "run")[0] == {
        "row": "step", "step": 0, "epoch": 0, "batch": 0, "a": 1, "b": 2.5, "c": "NaN", "d": 1,
    }  # fmt: skip


def test_illegal_settings_are_listed_all_at_once() -> None:
    with pytest.raises(SettingsError, match=r"every_epochs is 0.*keep_last is 1.*keep_best is -1"):
        SnapshotPolicy(every_epochs=0, keep_last=1, keep_best=-1)
    with pytest.raises(SettingsError, match=r"mode is 'best'.*patience is 0.*min_delta is -1"):
        EarlyStopping("x", mode="best", patience=0, min_delta=-1)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match=r"'a/b'.*reserved.*'int', which has no|int, which has no"):
        Run("x", state={"a/b": torch.nn.Linear(1, 1), "loop": torch.nn.Linear(1, 1), "c": 3})


def test_a_scheduler_that_is_not_handed_over_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = Small()
    torch.optim.lr_scheduler.StepLR(small.optimizer, 2)
    with Run(tmp_path / "run", state=small.state):
        pass
    assert "scheduler drives 'optimizer' and is not among the parts" in capsys.readouterr().err


def test_retention_keeps_the_last_the_best_and_every_nth(tmp_path: Path) -> None:
    small = Small(accuracy=lambda epoch: -abs(epoch - 2.0))
    policy = SnapshotPolicy(keep_last=2, keep_best=1, keep_every=4)
    small.train(
        tmp_path / "run", epochs=9, snapshots=policy, early_stopping=EarlyStopping("test_accuracy", patience=99)
    )
    epochs = [int(name[-6:]) for name in Store(tmp_path / "run").names()]
    assert epochs == [3, 4, 8, 9]


def test_a_snapshot_within_an_epoch_that_draws_nothing_is_spelled_the_same_after_a_resume(tmp_path: Path) -> None:
    """Its generators are those of the epoch's beginning: two objects with a resume, and so without one, too."""

    def train(directory: Path, *, leave_at: int) -> None:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        policy = SnapshotPolicy(every_steps=2, keep_last=99, background=False)
        with Run(directory, state={"model": model, "optimizer": optimizer}, progress=False, snapshots=policy) as run:
            for _ in run.epochs(3):
                for inputs in run.batches(torch.linspace(-1, 1, 36).reshape(12, 3), batch_size=3):
                    optimizer.zero_grad()
                    model(inputs).square().sum().backward()
                    optimizer.step()
                    if run.step == leave_at:
                        raise Killed

    def spelled(directory: Path) -> dict[str, bytes]:
        found = [path for path in (directory / "snapshots").glob("*/*") if path.name != "manifest.json"]
        return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in found}

    train(tmp_path / "whole", leave_at=-1)
    for left_at in (5, 7):
        with pytest.raises(Killed):
            train(tmp_path / "left", leave_at=left_at)
    train(tmp_path / "left", leave_at=-1)
    assert len(spelled(tmp_path / "whole")) > 20
    assert spelled(tmp_path / "whole") == spelled(tmp_path / "left")

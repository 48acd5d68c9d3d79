from __future__ import annotations

import errno
import itertools
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

from resumable_trainer import (
    DamagedSnapshotError,
    NotFoundError,
    NoValidSnapshotError,
    RunHeldError,
    SettingsError,
    SnapshotWriteError,
    StateManager,
    StateMismatchError,
    UnsafeValueError,
    UsageError,
)
from resumable_trainer.durable.files import Files
from resumable_trainer.durable.journal import read_rows
from resumable_trainer.durable.lock import RunLock
from resumable_trainer.loop import launch
from resumable_trainer.manager import Facts
from resumable_trainer.report.summary import entries
from resumable_trainer.snapshot.layout import Position
from resumable_trainer.snapshot.store import Store
from resumable_trainer.snapshot.tree import Flat
from resumable_trainer.state.compare import differences

if TYPE_CHECKING:
    from collections.abc import Callable


class HeldBack(Files):
    """A disk whose syncs wait until they are let go."""

    def __init__(self) -> None:
        self.let_go = threading.Event()

    def sync(self, fd: int) -> None:
        assert self.let_go.wait(30)
        super().sync(fd)


class Full(Files):
    """A disk that is full from the n-th write on, until it is told otherwise."""

    def __init__(self, after: int) -> None:
        self.left = after

    def write(self, fd: int, data: Any) -> int:
        if self.left <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.left -= 1
        return super().write(fd, data)


class Counter:
    """A part of the user's own, with a state of every kind."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return self.values

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = state


def parts() -> dict[str, Any]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    return {"model": model, "optimizer": optimizer}


def step(state: dict[str, Any]) -> None:
    state["optimizer"].zero_grad()
    state["model"](torch.randn(5, 3)).square().mean().backward()
    state["optimizer"].step()


def captured(state: dict[str, Any]) -> dict[str, Any]:
    """A deep copy of everything, made in another way than the manager's."""
    import copy

    return {name: copy.deepcopy(part.state_dict()) for name, part in state.items()}


def test_a_snapshot_deleted_by_the_holder_meanwhile_does_not_hide_that_the_run_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with StateManager(tmp_path / "run", state={"model": torch.nn.Linear(1, 1)}) as holder:
        holder.snapshot(epoch=0, batch=1, step=1, background=False)
        listed = [*holder.store.names(), "step-000000002"]
        monkeypatch.setattr(Store, "names", lambda self: listed)
        with pytest.raises(RunHeldError):
            StateManager(tmp_path / "run", state={"model": torch.nn.Linear(1, 1)}).open()
        assert [entry.name for entry in entries(tmp_path / "run")] == ["step-000000001"]


def test_a_snapshot_written_while_training_goes_on_holds_the_step_it_says(tmp_path: Path) -> None:
    """CPU tensors, 0-dim optimizer steps and BatchNorm buffers included."""
    files, state = HeldBack(), parts()
    step(state)
    with StateManager(tmp_path / "run", state=state, files=files) as manager:
        expected = captured(state)
        pending = manager.snapshot(epoch=0, batch=1, step=1)
        for _ in range(3):
            step(state)
        assert not pending.done
        files.let_go.set()
        pending.wait()
        assert differences(expected, captured(state), place="state"), "training went on meanwhile"
        manager.restore("latest")
        assert differences(expected, captured(state), place="state") == []
        assert state["optimizer"].state_dict()["state"][0]["step"].item() == 1
        assert state["model"][1].num_batches_tracked.item() == 1


def test_one_snapshot_is_in_flight_and_a_second_waits(tmp_path: Path) -> None:
    files, state = HeldBack(), parts()
    with StateManager(tmp_path / "run", state=state, files=files) as manager:
        first = manager.snapshot(epoch=0, batch=1, step=1)
        seen: list[bool] = []
        waiter = threading.Thread(target=lambda: seen.append(manager.snapshot(epoch=0, batch=2, step=2).done))
        waiter.start()
        waiter.join(0.2)
        assert waiter.is_alive()
        assert not first.done
        files.let_go.set()
        waiter.join(30)
        assert first.done
        manager.wait()
        assert manager.store.names() == ["step-000000001", "step-000000002"]


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("writes", range(6))
def test_a_full_disk_is_said_and_costs_no_older_snapshot(tmp_path: Path, writes: int, background: bool) -> None:
    state = parts()
    step(state)
    full = Full(1000)
    with StateManager(tmp_path / "run", state=state, files=full) as manager:
        manager.snapshot(epoch=0, batch=1, step=1, background=False)
        expected = captured(state)
        full.left = writes
        step(state)

        def save_and_wait() -> None:
            manager.snapshot(epoch=0, batch=2, step=2, background=background)
            manager.wait()

        with pytest.raises(
            SnapshotWriteError, match=r"step-000000002 .* was NOT saved.*last durable one is step-000000001"
        ):
            save_and_wait()
        assert [path.name for path in (tmp_path / "run/snapshots").iterdir()] == ["step-000000001"]
        full.left = 1000
        step(state)
        manager.snapshot(epoch=0, batch=3, step=3, background=False)  # the next attempt writes new files
        assert manager.store.names() == ["step-000000001", "step-000000003"]
        manager.restore("1")
        assert differences(expected, captured(state), place="state") == []


def test_an_error_in_the_background_is_raised_at_close(tmp_path: Path) -> None:
    full = Full(1000)
    manager = StateManager(tmp_path / "run", state=parts(), files=full).open()
    full.left = 0
    manager.snapshot(epoch=0, batch=1, step=1)
    with pytest.raises(SnapshotWriteError):
        manager.close()
    with StateManager(tmp_path / "run", state=parts()):
        pass  # the lock is free again


def test_a_fresh_run_restores_nothing_and_says_so(tmp_path: Path) -> None:
    with StateManager(tmp_path / "run", state=parts()) as manager:
        assert manager.restore().snapshot is None
        with pytest.raises(NotFoundError, match="has no snapshots"):
            manager.restore("best")


def test_parts_of_every_kind_come_back_to_the_bit(tmp_path: Path) -> None:
    def make() -> dict[str, Any]:
        state = parts()
        ema = torch.optim.swa_utils.AveragedModel(state["model"])
        scheduler = torch.optim.lr_scheduler.MultiStepLR(state["optimizer"], [2, 2, 5])
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(state["optimizer"])
        return {
            **state,
            "ema": ema,
            "scheduler": scheduler,
            "plateau": plateau,
            "scaler": torch.amp.GradScaler("cpu"),
            "counter": Counter(),
        }

    state = make()
    state["counter"].values = {
        "tuple": (1, 2.5, float("nan"), -0.0, float("-inf")),
        "ints": {3: b"\x00\xff", -1: None},
        "array": np.arange(600, dtype=np.float16).reshape(20, 30)[:, ::2],
        "scalar": np.float64(0.1),
        "dtype": torch.bfloat16,
        "set": {"b", "a"},
        "tensor": torch.randn(2, 3).to(torch.bfloat16),
        "empty": torch.empty(0, 4),
        "zero": torch.tensor(7),
    }
    step(state)
    state["scheduler"].step()
    state["plateau"].step(1.0)
    state["ema"].update_parameters(state["model"])
    expected = captured(state)
    with StateManager(tmp_path / "run", state=state) as manager:
        manager.snapshot(epoch=1, batch=0, step=9, background=False)
    fresh = make()
    with StateManager(tmp_path / "run", state=fresh) as manager:
        report = manager.restore()
    assert report.snapshot == "step-000000009-epoch-000001"
    assert report.notes == ()
    assert differences(expected, captured(fresh), place="state") == []


def test_generators_are_parts_too(tmp_path: Path) -> None:
    import random

    def make() -> dict[str, Any]:
        return {"torch": torch.Generator(), "numpy": np.random.default_rng(0), "python": random.Random(0)}

    def draw(state: dict[str, Any]) -> list[float]:
        return [torch.rand((), generator=state["torch"]).item(), state["numpy"].random(), state["python"].random()]

    state = make()
    draw(state)
    with StateManager(tmp_path / "run", state=state) as manager:
        manager.snapshot(epoch=0, batch=1, step=1, background=False)
    expected = draw(state)
    fresh = make()
    with StateManager(tmp_path / "run", state=fresh) as manager:
        manager.restore()
    assert draw(fresh) == expected


def test_taking_a_snapshot_draws_nothing_and_restoring_brings_generators_back(tmp_path: Path) -> None:
    import random

    def draw() -> list[float]:
        return [random.random(), float(np.random.randn()), torch.rand(()).item()]

    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    draw()
    with StateManager(tmp_path / "run", state=parts()) as manager:
        torch.manual_seed(3)
        manager.snapshot(epoch=0, batch=1, step=1, background=False)
        expected = [draw(), draw()]
        manager.restore()
        assert [draw(), draw()] == expected


def test_moments_keep_a_dtype_of_their_own(tmp_path: Path) -> None:
    """`Optimizer.load_state_dict` alone would cast them to the parameters' dtype."""

    def make() -> dict[str, Any]:
        model = nn.Linear(3, 2).to(torch.bfloat16)
        return {"model": model, "optimizer": torch.optim.Adam(model.parameters())}

    state = make()
    state["model"](torch.randn(4, 3, dtype=torch.bfloat16)).sum().backward()
    state["optimizer"].step()
    for moments in state["optimizer"].state.values():
        moments["exp_avg"] = torch.randn(moments["exp_avg"].shape)  # float32
    expected = captured(state)
    with StateManager(tmp_path / "run", state=state) as manager:
        manager.snapshot(epoch=0, batch=1, step=1, background=False)
    fresh = make()
    with StateManager(tmp_path / "run", state=fresh) as manager:
        manager.restore()
    assert differences(expected, captured(fresh), place="state") == []
    assert next(iter(fresh["optimizer"].state.values()))["exp_avg"].dtype == torch.float32


def test_gradients_under_accumulation_modes_and_frozen_parameters_come_back(tmp_path: Path) -> None:
    state = parts()
    state["model"](torch.randn(5, 3)).sum().backward()
    state["model"][1].eval()
    state["model"][0].bias.requires_grad_(False)
    expected = [p.grad.clone() for p in state["model"].parameters() if p.grad is not None]
    with StateManager(tmp_path / "run", state=state) as manager:
        manager.snapshot(epoch=0, batch=1, step=1, background=False)
    fresh = parts()
    with StateManager(tmp_path / "run", state=fresh) as manager:
        manager.restore()
    restored = [p.grad for p in fresh["model"].parameters() if p.grad is not None]
    assert len(restored) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(restored, expected, strict=True))
    assert (fresh["model"].training, fresh["model"][1].training) == (True, False)
    assert not fresh["model"][0].bias.requires_grad


def test_gradients_of_later_are_gone_where_there_were_none(tmp_path: Path) -> None:
    state = parts()
    with StateManager(tmp_path / "run", state=state) as manager:
        manager.snapshot(epoch=0, batch=1, step=1, background=False)
        state["model"](torch.randn(5, 3)).sum().backward()
        manager.restore()
    assert all(parameter.grad is None for parameter in state["model"].parameters())


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    def make() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].weight = model[0].weight
        return model

    model = make()
    with StateManager(tmp_path / "run", state={"model": model}) as manager:
        manager.snapshot(epoch=0, batch=1, step=1, background=False)
        stored = load_file(manager.store.path("step-000000001") / "model.safetensors")
    assert sorted(stored) == ["0.bias", "0.weight", "1.bias"]
    fresh = make()
    with StateManager(tmp_path / "run", state={"model": fresh}) as manager:
        manager.restore()
    assert torch.equal(fresh[1].weight, model[0].weight)
    assert fresh[1].weight is fresh[0].weight


def test_a_value_without_a_safe_form_is_named_at_the_first_snapshot(tmp_path: Path) -> None:
    counter = Counter()
    counter.values = {"deep": [{"lambda": lambda: None}]}
    with (
        StateManager(tmp_path / "run", state={"counter": counter}) as manager,
        pytest.raises(UnsafeValueError, match=r"counter\['deep'\]\[0\]\['lambda'\] is a builtins.function"),
    ):
        manager.snapshot(epoch=0, batch=1, step=1)


def test_a_part_that_refuses_its_state_is_named(tmp_path: Path) -> None:
    class Picky(Counter):
        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise KeyError("colour")

    with StateManager(tmp_path / "run", state={"picky": Picky()}) as manager:
        manager.snapshot(epoch=0, batch=1, step=1, background=False)
        with pytest.raises(StateMismatchError, match="part 'picky' does not take back its saved state: KeyError"):
            manager.restore()


def test_a_part_that_does_not_give_back_what_was_put_in_is_noted(tmp_path: Path) -> None:
    class Forgetful(Counter):
        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.values = {**state, "calls": 0}

    part = Forgetful()
    part.values = {"calls": 3}
    with StateManager(tmp_path / "run", state={"meter": part}) as manager:
        manager.snapshot(epoch=0, batch=1, step=1, background=False)
        report = manager.restore()
    assert report.notes == (
        "part 'meter' does not give back what was put in, so it may not resume exactly:"
        " meter['calls'] is 0, expected 3",
    )


def test_a_snapshot_of_another_run_is_refused(tmp_path: Path) -> None:
    import shutil

    for name in ("a", "b"):
        with StateManager(tmp_path / name, state=parts()) as manager:
            manager.run_id = name
            manager.snapshot(epoch=0, batch=1, step=1, background=False)
    shutil.copytree(tmp_path / "a/snapshots/step-000000001", tmp_path / "c/snapshots/step-000000001")
    with StateManager(tmp_path / "c", state=parts()) as manager:
        manager.run_id = "b"
        with pytest.raises(StateMismatchError, match="belongs to run a, not b"):
            manager.restore()


def test_what_dead_processes_left_unfinished_is_swept_at_start(tmp_path: Path) -> None:
    with StateManager(tmp_path / "run", state=parts()) as manager:
        manager.snapshot(epoch=0, batch=1, step=1, background=False)
    left = tmp_path / "run/snapshots/.tmp-step-000000002-1-abcd"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    with StateManager(tmp_path / "run", state=parts()) as manager:
        assert manager.swept == ["step-000000002-1-abcd"]
        assert not left.exists()
        assert manager.store.names() == ["step-000000001"]


def test_a_zombie_whose_run_was_taken_over_cannot_publish(tmp_path: Path) -> None:
    manager = StateManager(tmp_path / "run", state=parts()).open()
    (tmp_path / "run/run.lock").unlink()  # somebody removes the lock file; another process takes the run
    with StateManager(tmp_path / "run", state=parts()) as other:
        other.snapshot(epoch=0, batch=2, step=2, background=False)
        with pytest.raises(RunHeldError, match="no longer ours: its lock file was replaced"):
            manager.snapshot(epoch=0, batch=1, step=1, background=False)
        assert other.store.names() == ["step-000000002"]
    manager.close()


def test_an_unreadable_store_is_an_error_and_not_an_empty_one(tmp_path: Path) -> None:
    with StateManager(tmp_path / "run", state=parts()) as manager:
        (tmp_path / "run/snapshots").write_text("not a directory")
        with pytest.raises(OSError, match="Not a directory"):
            manager.restore()


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda m: m.snapshot(epoch=-1, batch=0, step=0), SettingsError),
        (lambda m: (m.close(), m.snapshot(epoch=0, batch=1, step=1)), UsageError),
        (lambda m: m.restore("nonsense"), NotFoundError),
    ],
)
def test_misuse_is_said(tmp_path: Path, call: Callable[[StateManager], object], error: type[Exception]) -> None:
    manager = StateManager(tmp_path / "run", state=parts()).open()
    with pytest.raises(error):
        call(manager)
    if manager._lock is not None:
        manager.close()


def test_two_thousand_damages_are_each_found_and_the_older_snapshot_taken(tmp_path: Path) -> None:
    """Flip a bit, cut or remove any file of the newest snapshot: the whole way through `restore`'s choice."""
    import random
    import shutil

    state = parts()
    with StateManager(tmp_path / "run", state=state) as manager:
        for number in (1, 2):
            step(state)
            manager.snapshot(epoch=0, batch=number, step=number, background=False)
        victim = manager.store.path("step-000000002")
        whole = tmp_path / "whole"
        shutil.copytree(victim, whole)
        generator, damages = random.Random(0), 0
        files = sorted(path.name for path in whole.iterdir())
        for name in files:
            data = (whole / name).read_bytes()
            for _ in range(2400 // len(files)):
                kind = generator.random()
                place = generator.randrange(len(data))
                if kind < 0.8:
                    damaged = bytearray(data)
                    damaged[place] ^= 1 << generator.randrange(8)
                    (victim / name).write_bytes(damaged)
                elif kind < 0.95:
                    (victim / name).write_bytes(data[:place])
                else:
                    (victim / name).unlink()
                reasons: dict[str, str] = {}
                found = manager.store.newest_valid(on_damage=lambda n, e, r=reasons: r.update({n: e.message}))
                assert found is not None
                assert found.name == "step-000000001", (name, kind, place)
                assert name in reasons["step-000000002"]
                (victim / name).write_bytes(data)
                damages += 1
        assert damages >= 2000
        assert manager.store.verify("step-000000002").position.step == 2
        for name in ("step-000000001", "step-000000002"):
            (manager.store.path(name) / "manifest.json").write_bytes(b"{}")
        with pytest.raises(NoValidSnapshotError):
            manager.restore()
        assert len(manager.store.names()) == 2


def test_a_run_directory_holds_no_pickle(tmp_path: Path) -> None:
    import io
    import zipfile

    state = parts()
    step(state)
    with StateManager(tmp_path / "run", state=state) as manager:
        manager.snapshot(epoch=0, batch=1, step=1, background=False)
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert not data.startswith(b"\x80"), f"{path} begins like a pickle"
            assert not zipfile.is_zipfile(io.BytesIO(data)), path
            assert path.suffix in (".json", ".jsonl", ".safetensors", ".lock"), path
    assert Path(tmp_path / "run/snapshots/step-000000001/manifest.json").is_file()


@pytest.mark.parametrize("is_held", [True, False])
def test_a_lock_that_is_handed_over_is_the_one_that_is_held(tmp_path: Path, is_held: bool) -> None:
    """The command line takes it before torch is imported."""
    lock = RunLock(tmp_path / "run" / "run.lock")
    if is_held:
        lock.acquire(command="handed over")
    with StateManager(tmp_path / "run", state=parts(), lock=lock) as manager:
        assert manager.lock is lock
        assert lock.generation == 1, "one launch is one generation"
        with pytest.raises(RunHeldError):
            StateManager(tmp_path / "run", state=parts()).open()
        manager.snapshot(epoch=0, batch=1, step=1, background=False)
    assert not lock.is_held
    with StateManager(tmp_path / "run", state=parts()) as manager:
        assert manager.lock.generation == 2


def test_an_error_in_the_background_is_raised_at_the_next_look_and_not_before(tmp_path: Path) -> None:
    files = Full(after=0)
    with StateManager(tmp_path / "run", state=parts(), files=files) as manager:
        files.left = 1  # for the row of the attempt
        pending = manager.snapshot(epoch=0, batch=1, step=1)
        while not pending.done:
            pending._thread.join()  # type: ignore[union-attr]
        with pytest.raises(SnapshotWriteError, match="No space left"):
            manager.poll()
        manager.poll()


def test_a_snapshot_without_modes_and_generators_leaves_both_as_they_are(tmp_path: Path) -> None:
    """One that was imported holds parts alone."""
    state = parts()
    with StateManager(tmp_path / "run", state=state) as manager:
        flat = manager.stage(manager.capture())
        bare = Flat(
            values={name: value for name, value in flat.values.items() if name in state},
            tensors={name: value for name, value in flat.tensors.items() if name in state},
        )
        manager.write(bare, Facts(Position(0, 1, 1)), background=False)
        expected = captured(state)
        step(state)
        state["model"].eval()
        torch.manual_seed(7)
        report = manager.restore()
        assert report.absent == ("generators", "gradients", "modes")
        assert differences(expected, captured(state), place="state") == []
        assert not state["model"].training
        drawn = torch.rand(2)
        torch.manual_seed(7)
        assert torch.equal(drawn, torch.rand(2))


def test_a_lost_lock_file_does_not_bring_generations_back(tmp_path: Path) -> None:
    for _ in range(3):
        with StateManager(tmp_path / "run", state=parts()) as manager:
            manager.restore()
            generation = manager.lock.generation
            manager.snapshot(epoch=0, batch=generation, step=generation, background=False)
    (tmp_path / "run/run.lock").unlink()
    (tmp_path / "run/snapshots/step-000000003/manifest.json").write_bytes(b"{}")
    with StateManager(tmp_path / "run", state=parts()) as manager:
        assert manager.lock.generation == 3, "one more than that of the newest manifest that can be read"


def test_each_manifest_names_its_parent_and_that_manifests_digest(tmp_path: Path) -> None:
    for first in (1, 3):  # the second launch reads its parent from the disk
        with StateManager(tmp_path, state={"model": nn.Linear(2, 3)}) as manager:
            manager.restore()
            for step in (first, first + 1):
                manager.snapshot(epoch=0, batch=step, step=step).wait()
    found = [manager.store.verify(name) for name in manager.store.names()]
    assert len(found) == 3
    for before, after in itertools.pairwise(found):
        assert (after.parent, after.parent_digest) == (before.name, before.own_digest)
        assert before.own_digest == (manager.store.path(before.name) / "manifest.json").read_bytes()[-36:-4].decode()


def test_the_event_of_a_commit_tells_the_bytes_that_were_written(tmp_path: Path) -> None:
    with StateManager(tmp_path / "run", state=parts()) as manager:
        manager.snapshot(epoch=0, batch=1, step=1, background=False)
    event = launch.last_events(tmp_path / "run", ("committed",))["committed"]
    written = [path for path in (tmp_path / "run/snapshots/step-000000001").iterdir() if path.name != "manifest.json"]
    assert event["bytes"] == sum(path.stat().st_size for path in written)


def test_whoever_listens_is_told_each_event_after_it_was_written(tmp_path: Path) -> None:
    told: list[tuple[Path, Any]] = []

    def listen(directory: Path, row: Any) -> None:
        assert list(read_rows(directory / "events.jsonl"))[-1] == row
        told.append((directory, row["event"]))

    with StateManager(tmp_path / "run", state=parts()) as manager:
        manager.on_event = listen
        manager.note("training", step=0)
        manager.snapshot(epoch=0, batch=1, step=1, background=False)
    assert told == [(manager.directory, "training"), (manager.directory, "committed")]


def test_memory_that_is_staged_into_is_used_again_and_only_when_the_snapshot_in_it_is_durable(tmp_path: Path) -> None:
    files, layer = HeldBack(), nn.Linear(30, 30)
    nn.init.zeros_(layer.weight)
    with StateManager(tmp_path / "run", state={"layer": layer}, files=files) as manager:
        manager.snapshot(epoch=0, batch=1, step=1)
        nn.init.ones_(layer.weight)
        staged: list[Flat] = []
        thread = threading.Thread(target=lambda: staged.append(manager.stage(manager.capture())))
        thread.start()
        thread.join(0.2)
        assert not staged, "the snapshot in flight still lies there"
        files.let_go.set()
        thread.join(30)
        address = staged[0].tensors["layer"]["weight"].data_ptr()
        assert manager.stage(manager.capture()).tensors["layer"]["weight"].data_ptr() == address
        manager.restore("1")
        assert not layer.weight.any()


def test_generators_that_nothing_here_writes_are_damage(tmp_path: Path) -> None:
    with StateManager(tmp_path / "run", state=parts()) as manager:
        captured = manager.capture({"generators": {"python": 3}})
        manager.write(manager.stage(captured), Facts(Position(0, 1, 1)), background=False)
        with pytest.raises(DamagedSnapshotError, match="holds generators, gradients or modes"):
            manager.restore()

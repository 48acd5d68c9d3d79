"""Overlapped staging gives the bytes that a copy gives, however late it copies; and finds who breaks its conditions."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from resumable_trainer import EarlyStopping, Run, SnapshotPolicy, StateManager
from resumable_trainer.errors import SettingsError, UsageError
from resumable_trainer.snapshot.pending import PendingSnapshot
from resumable_trainer.snapshot.tree import references
from resumable_trainer.state import overlap, staging
from resumable_trainer.state.compare import differences
from resumable_trainer.state.overlap import Copying, changed_by_steps_alone

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Late:
    """Lets the copying begin only when the thread that trains waits for it: as late as it can be."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_waited_for = 0
        self._held_back: dict[int, tuple[Copying, threading.Event]] = {}
        begin, wait, run, wait_for_snapshot = Copying.__init__, Copying.wait, Copying._run, PendingSnapshot.wait

        def known_from_the_beginning(copying: Copying, *args: Any) -> None:
            self._event(
                copying
            )  # before its thread is there: whoever waits for the snapshot lets all go that are known
            begin(copying, *args)

        def late_run(copying: Copying) -> None:
            assert self._event(copying).wait(60)
            run(copying)

        def late_wait(copying: Copying) -> None:
            if threading.current_thread() is threading.main_thread():
                self.num_waited_for += 1
                self._event(copying).set()
            wait(copying)

        def late_wait_for_snapshot(pending: PendingSnapshot) -> None:
            for _, event in list(self._held_back.values()):
                event.set()
            wait_for_snapshot(pending)

        monkeypatch.setattr(Copying, "__init__", known_from_the_beginning)
        monkeypatch.setattr(Copying, "_run", late_run)
        monkeypatch.setattr(Copying, "wait", late_wait)
        monkeypatch.setattr(PendingSnapshot, "wait", late_wait_for_snapshot)

    def _event(self, copying: Copying) -> threading.Event:
        return self._held_back.setdefault(id(copying), (copying, threading.Event()))[1]


class Job(nn.Module):
    """Buffers that change in forward, tied weights, a parameter that no optimizer has."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.3)
        self.second = nn.Linear(6, 6)
        self.third = nn.Linear(6, 6)
        self.third.weight = self.second.weight
        self.alone = nn.Parameter(torch.zeros(1))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.alone += 1
        return self.third(self.second(self.drop(self.norm(self.first(inputs))))).mean(1)


def parts() -> dict[str, Any]:
    torch.manual_seed(1)
    model = Job()
    ema = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.AdamW([p for n, p in model.named_parameters() if n != "alone"], lr=torch.tensor(0.01))
    return {
        "model": model,
        "ema": ema,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2),
    }


def train(directory: Path, state: dict[str, Any], *, staged: str, epochs: int = 3, background: bool = True) -> Run:
    data = torch.randn(24, 6, generator=torch.Generator().manual_seed(2)), torch.arange(24.0) / 24
    policy = SnapshotPolicy(every_steps=1, keep_last=99, staging=staged, background=background)  # type: ignore[arg-type]
    stopping = EarlyStopping("loss", mode="min", patience=99)
    with Run(directory, state=state, seed=3, snapshots=policy, early_stopping=stopping, progress=False) as run:
        for _ in run.epochs(epochs):
            for number, (inputs, targets) in enumerate(run.batches(data, batch_size=6, shuffle=True)):
                loss = nn.functional.mse_loss(state["model"](inputs), targets)
                loss.backward()
                if number % 2:  # gradients are accumulated over two batches
                    state["optimizer"].step()
                    state["optimizer"].zero_grad()
                    state["ema"].update_parameters(state["model"])
                run.log(loss=loss)
            state["scheduler"].step()
            with torch.no_grad():
                state["model"].second.weight.mul_(0.999)  # after the last batch that is allowed
    return run


def tensor_files(directory: Path) -> dict[str, bytes]:
    return {
        f"{path.parent.name}/{path.name}": path.read_bytes()
        for path in sorted((directory / "snapshots").glob("*/*"))
        if path.name != "manifest.json"
    }


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("late", [True, False])
def test_every_snapshot_has_the_bytes_that_a_copy_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool, background: bool
) -> None:
    train(tmp_path / "copy", parts(), staged="copy")
    held_back = Late(monkeypatch) if late else None
    train(tmp_path / "overlapped", parts(), staged="overlapped", background=background)
    copied, overlapped = tensor_files(tmp_path / "copy"), tensor_files(tmp_path / "overlapped")
    assert copied.keys() == overlapped.keys()
    assert len(copied) > 40
    assert [name for name in copied if copied[name] != overlapped[name]] == []
    assert held_back is None or held_back.num_waited_for > 10


def test_a_run_that_goes_on_from_such_a_snapshot_ends_in_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Late(monkeypatch)
    whole, again = parts(), parts()
    train(tmp_path / "whole", whole, staged="copy")
    train(tmp_path / "cut", parts(), staged="overlapped", epochs=2)
    train(tmp_path / "cut", again, staged="overlapped")
    for name, part in whole.items():
        assert differences(part.state_dict(), again[name].state_dict(), place=name) == []


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StateManager]:
    Late(monkeypatch)
    state = parts()
    with StateManager(tmp_path / "run", state=state, staging="overlapped") as opened:
        forward_and_backward(state)
        state["optimizer"].step()
        state["optimizer"].zero_grad()
        yield opened


def forward_and_backward(state: dict[str, Any]) -> None:
    state["model"](torch.randn(5, 6)).sum().backward()


def save(manager: StateManager, step: int) -> Any:
    return manager.snapshot(epoch=0, batch=step, step=step)


def values_of(manager: StateManager) -> dict[str, Any]:
    return {name: {k: v.clone() for k, v in manager.state[name].state_dict().items()} for name in ("model", "ema")}  # type: ignore[attr-defined]


def test_what_only_steps_change_waits_and_all_else_is_there_at_once(manager: StateManager) -> None:
    captured = manager.capture()
    later = manager._capturing.changed_by_steps_alone(captured)
    names = {file: {name for f, name in later if f == file} for file in captured.tensors}
    assert names["model"] == {
        name
        for name, _ in manager.state["model"].named_parameters()
        if name != "alone"  # type: ignore[attr-defined]
    }
    assert names["ema"] == names["generators"] == set()
    assert names["optimizer"] == {name for name in captured.tensors["optimizer"] if name.startswith("state.")}


def test_restoring_saving_again_and_closing_wait(manager: StateManager, tmp_path: Path) -> None:
    save(manager, 1)
    expected = values_of(manager)
    save(manager, 2)
    manager.restore()
    assert differences(expected, values_of(manager), place="state") == []
    save(manager, 3)
    manager.close()
    with StateManager(tmp_path / "run", state=parts()) as other:
        assert other.restore().snapshot == "step-000000003"
        assert differences(expected, values_of(other), place="state") == []


def test_hooks_are_taken_off_at_the_end(manager: StateManager) -> None:
    optimizer: Any = manager.state["optimizer"]
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    manager.close()
    assert not optimizer._optimizer_step_pre_hooks


def changes() -> dict[str, Any]:
    def averaged(state: dict[str, Any]) -> None:
        with torch.no_grad():
            state["model"].second.bias.lerp_(torch.ones(6), 0.5)

    def loaded(state: dict[str, Any]) -> None:
        state["model"].load_state_dict({k: v.clone() for k, v in state["model"].state_dict().items()})

    def moments(state: dict[str, Any]) -> None:
        next(iter(state["optimizer"].state.values()))["exp_avg"].zero_()

    def behind_torch(state: dict[str, Any]) -> None:
        state["model"].second.bias.detach().numpy()[0] += 1

    def data(state: dict[str, Any]) -> None:
        state["model"].second.bias.data.clamp_(0, 0.001)

    return {f.__name__: f for f in (averaged, loaded, moments, behind_torch, data)}


@pytest.mark.parametrize("change", changes().values(), ids=changes())
def test_who_changes_them_before_the_step_is_found_and_nothing_is_written(manager: StateManager, change: Any) -> None:
    pending = save(manager, 1)
    forward_and_backward(manager.state)
    change(manager.state)
    with pytest.raises(UsageError, match="changed outside of the optimizer's step"):
        manager.state["optimizer"].step()  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="was not written"):
        pending.wait()
    assert manager.store.names() == []
    manager._saving._in_flight = None
    save(manager, 2).wait()
    manager.store.verify("step-000000002")


def test_a_replaced_memory_is_no_change_of_what_was_there(manager: StateManager) -> None:
    save(manager, 1).wait()
    expected = values_of(manager)
    save(manager, 2)
    bias: Any = manager.state["model"].second.bias  # type: ignore[attr-defined]
    bias.data = torch.full((6,), 7.0)
    manager.restore()
    assert differences(expected, values_of(manager), place="state") == []


def test_what_is_tied_to_anything_else_is_copied_at_once() -> None:
    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.register_buffer("view", model.bias.detach()[:2])
    state, tensors = {"model": model, "optimizer": optimizer}, {"model": dict(model.state_dict())}
    assert changed_by_steps_alone(state, tensors, ()) == {("model", "weight")}
    assert changed_by_steps_alone(state, tensors, {("model", "weight")}) == set()
    model.weight.grad = model.weight.detach()
    assert changed_by_steps_alone(state, tensors, ()) == set()
    assert changed_by_steps_alone({"model": model}, tensors, ()) == set()


class Holder:
    """A part that holds a parameter of another part's module."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def state_dict(self) -> dict[str, Any]:
        return {"list": [1, {"it": self.tensor}]}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def test_what_another_part_holds_too_is_copied_at_once(tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = {"model": model, "optimizer": optimizer, "holder": Holder(model.weight.detach())}
    with StateManager(tmp_path, state=state, staging="overlapped") as manager:
        assert manager._capturing.changed_by_steps_alone(manager.capture()) == {("model", "bias")}


def test_references_are_found_wherever_they_stand() -> None:
    encoded = {"a": [{"$tensor": ["f", "x"], "device": "cuda"}, 1], "$dict": [[1, {"$tensor": ["g", "y"]}]], "b": "c"}
    assert set(references(encoded)) == {("f", "x"), ("g", "y")}


def test_an_error_of_the_copy_is_raised_where_it_is_waited_for() -> None:
    def failing(*_: Any) -> None:
        raise MemoryError("copy")

    copying = Copying(failing, [torch.ones(1)], [torch.ones(1)])
    for _ in range(2):
        with pytest.raises(MemoryError, match="copy"):
            copying.wait()


def test_what_went_wrong_with_one_state_is_not_said_of_the_next() -> None:
    arena, live = staging.Arena(), {"s": {"x": torch.ones(3)}}
    arena.stage(live, later={("s", "x")})
    arena._copying._error = UsageError("changed")  # type: ignore[union-attr]
    ready = arena.ready()
    assert ready is not None
    with pytest.raises(UsageError):
        arena.settle()
    arena.settle()
    with pytest.raises(UsageError):
        ready()
    arena.stage(live)
    assert arena.ready() is None


def test_tensors_that_count_no_versions_or_lie_scattered_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.inference_mode():
        inference = torch.arange(4.0)
    sources = [inference, torch.arange(6.0).reshape(2, 3).t(), torch.eye(3).to_sparse().to_dense()]
    targets = [torch.empty(source.shape) for source in sources]
    Copying(staging.copy_into, targets, sources).wait()
    assert all(torch.equal(a, b) for a, b in zip(targets, sources, strict=True))
    assert overlap._memory(torch.eye(2).to_sparse()) == 0


def test_an_unknown_staging_is_refused() -> None:
    with pytest.raises(SettingsError, match="staging is 'later', it must be 'copy' or 'overlapped'"):
        SnapshotPolicy(staging="later")  # type: ignore[arg-type]

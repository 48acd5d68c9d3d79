"""An optimizer around another, as Accelerate makes them: never initialised as one, all of it the inner one's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from resumable_trainer import Run, SnapshotPolicy
from resumable_trainer.state.modes import StepWatch, heard
from resumable_trainer.state.overlap import Fence, changed_by_steps_alone

if TYPE_CHECKING:
    from pathlib import Path

DATA = torch.linspace(-1, 1, 96).reshape(24, 4)


class Wrapping(torch.optim.Optimizer):
    """Like `accelerate.optimizer.AcceleratedOptimizer`."""

    name = "optimizer"

    def __init__(self, optimizer: Any) -> None:
        vars(self)[self.name] = optimizer

    @property
    def _within(self) -> Any:
        return vars(self)[self.name]

    @property
    def state(self) -> Any:
        return self._within.state

    @property
    def param_groups(self) -> Any:
        return self._within.param_groups

    @property
    def defaults(self) -> Any:
        return self._within.defaults

    def state_dict(self) -> Any:
        return self._within.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        self._within.load_state_dict(state_dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._within.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> None:
        self._within.step(closure)


class Alone(Wrapping):
    """Keeps what it wraps under a name that nobody knows."""

    name = "hidden"


class Left(Exception):
    pass


def train(directory: Path, wrap: Any, *, until: int | None = None, staging: Any = "copy") -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = wrap(torch.optim.Adam(model.parameters(), lr=0.01))
    policy = SnapshotPolicy(every_steps=1, background=False, staging=staging)
    state = {"model": model, "optimizer": optimizer}
    with Run(directory, state=state, progress=False, snapshots=policy) as run:
        for _ in run.epochs(3):
            for (inputs,) in run.batches((DATA,), batch_size=6, shuffle=True):
                optimizer.zero_grad()
                loss = model(inputs).square().sum()
                loss.backward()
                optimizer.step()
                run.log(loss=loss)
                if run.step == until:
                    raise Left
    return model


@pytest.mark.parametrize("staging", ["copy", "overlapped"])
@pytest.mark.parametrize("wrap", [Wrapping, lambda optimizer: Wrapping(Wrapping(optimizer)), Alone])
def test_a_run_resumes_exactly_with_it(tmp_path: Path, wrap: Any, staging: Any) -> None:
    plain = train(tmp_path / "plain", lambda optimizer: optimizer)
    for until in (2, 7):
        with pytest.raises(Left):
            train(tmp_path / "wrapped", wrap, until=until, staging=staging)
    found = train(tmp_path / "wrapped", wrap, staging=staging)
    assert all(map(torch.equal, plain.parameters(), found.parameters()))
    names = ("plain", "wrapped")
    one, other = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in names]
    assert one == other


def test_its_steps_are_heard_where_they_can_be() -> None:
    parameter = nn.Parameter(torch.ones(2))
    inner = torch.optim.SGD([parameter], lr=0.1)
    state = {"outer": Wrapping(Wrapping(inner)), "plain": torch.optim.SGD([parameter], lr=0.1), "other": object()}
    assert heard(state) == [inner, state["plain"]]
    watch = StepWatch(state)
    assert not watch.used_gradients()
    state["outer"].step()  # type: ignore[attr-defined]
    assert watch.used_gradients() == {id(parameter)}
    assert heard({"alone": Alone(inner)}) == []
    endless = Wrapping(None)
    vars(endless)["optimizer"] = endless
    assert heard({"endless": endless}) == []


def test_overlapped_staging_waits_for_steps_that_it_hears_and_for_no_others() -> None:
    model = nn.Linear(3, 2)
    inner = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    inner.step()
    model.zero_grad()
    tensors = {"model": dict(model.named_parameters())}
    waited: list[int] = []
    for wrapped, expected in ((Wrapping(inner), 2), (Alone(inner), 0)):
        state: dict[str, object] = {"model": model, "optimizer": wrapped}
        fence = Fence(state, lambda: waited.append(1))
        assert len(changed_by_steps_alone(state, tensors, set())) == expected
        wrapped.step()
        fence.close()
    assert waited == [1]

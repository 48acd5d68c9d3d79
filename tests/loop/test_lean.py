"""Optimizers of an open run: the same bits with less around them, and what they had before when somebody looks."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from resumable_trainer import Run, SnapshotPolicy, StateMismatchError
from resumable_trainer.loop import lean
from resumable_trainer.loop.lean import LeanOptimizers
from resumable_trainer.state.modes import StepWatch

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch.optim import Optimizer

    Make = Callable[[list[nn.Parameter]], Optimizer]


class Halved(torch.optim.SGD):
    """A user's own: half a step."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(0.5)
        return super().step(closure)


OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
    "a subclass": lambda p: Halved(p, lr=0.1),
}
INPUTS = torch.linspace(-1, 1, 24).reshape(6, 4)


def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def train(model: nn.Module, optimizer: Optimizer, steps: int = 4) -> None:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(INPUTS).square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    for _ in range(steps):
        optimizer.step(closure)


class Open:
    """An optimizer of an open run, and what the run is told of its steps."""

    def __init__(self, make: Make = OPTIMIZERS["Adam"], *, before: Callable[[Optimizer], Any] = lambda _: None) -> None:
        self.model = layer()
        self.optimizer: Any = make([*self.model.parameters()])
        self.kept = before(self.optimizer)
        self.watch = StepWatch({"optimizer": self.optimizer})
        self.lean = LeanOptimizers({"model": self.model, "optimizer": self.optimizer}, self.watch)

    def close(self) -> None:
        self.lean.close()
        self.watch.close()

    def calls_of_wrapper(self, act: Callable[[], object]) -> int:
        """How often the range for profilers was opened."""
        opened = []
        original = torch.autograd.profiler.record_function.__enter__

        def enter(this: Any) -> Any:
            opened.append(this.name)
            return original(this)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.autograd.profiler.record_function, "__enter__", enter)
            act()
        return len(opened)


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")  # LBFGS of torch 2.8 does
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_bits_are_torchs_and_its_wrapping_is_gone(name: str) -> None:
    plain = layer()
    train(plain, OPTIMIZERS[name]([*plain.parameters()]))
    mine = Open(OPTIMIZERS[name])
    wrapped = mine.calls_of_wrapper(lambda: train(mine.model, mine.optimizer))
    # Once something was compiled in this process, the step of LBFGS is marked as not to be: no longer torch's wrapper.
    is_marked = name == "LBFGS" and hasattr(type(mine.optimizer).step, "_torchdynamo_disable")
    assert wrapped == 0 or is_marked or name == "a subclass", "what its own code calls, it calls as ever"
    assert mine.watch.stepped == {id(mine.optimizer)}
    for one, other in zip(plain.parameters(), mine.model.parameters(), strict=True):
        assert torch.equal(one, other)
    mine.close()
    assert vars(mine.optimizer).keys().isdisjoint({"step", "zero_grad"})


def test_gradients_go_as_torch_lets_them_go() -> None:
    mine = Open()
    train(mine.model, mine.optimizer)
    assert all(parameter.grad is not None for parameter in mine.model.parameters())
    mine.optimizer.zero_grad(set_to_none=False)
    assert all(not parameter.grad.any() for parameter in mine.model.parameters())
    mine.optimizer.zero_grad(True)
    assert all(parameter.grad is None for parameter in mine.model.parameters())


def test_whoever_has_hooks_is_told() -> None:
    told: list[str] = []
    mine = Open()
    train(mine.model, mine.optimizer)
    handles = [
        mine.optimizer.register_step_pre_hook(lambda *_: told.append("before")),
        mine.optimizer.register_step_post_hook(lambda *_: told.append("after")),
    ]
    train(mine.model, mine.optimizer, steps=2)
    assert told == ["before", "after"] * 2
    handles[1].remove()
    train(mine.model, mine.optimizer, steps=1)
    assert told == ["before", "after"] * 2 + ["before"]
    handles[0].remove()
    assert mine.calls_of_wrapper(lambda: train(mine.model, mine.optimizer)) == 0
    for register in (register_optimizer_step_pre_hook, register_optimizer_step_post_hook):
        told.clear()
        handle = register(lambda *_: told.append("global"))
        try:
            train(mine.model, mine.optimizer, steps=1)
        finally:
            handle.remove()
        assert told == ["global"]
    assert mine.watch.stepped == {id(mine.optimizer)}


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")  # torch 2.11 says so once
def test_a_profiler_finds_the_ranges_that_it_looks_for() -> None:
    mine = Open()
    train(mine.model, mine.optimizer)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(mine.model, mine.optimizer, steps=2)
    names = [event.name for event in profile.events()]
    assert names.count("Optimizer.step#Adam.step") == names.count("Optimizer.zero_grad#Adam.zero_grad") == 2


@pytest.mark.parametrize("is_known", [True, False])
@pytest.mark.parametrize("first", ["scheduler", "run"])
def test_schedulers_find_what_they_look_for(first: str, is_known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_known:
        monkeypatch.setattr(lean, "_is_noted", lambda optimizer: False)

    def schedule(optimizer: Optimizer) -> Any:
        return lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mine = Open(before=schedule if first == "scheduler" else lambda _: None)
        scheduler = mine.kept if first == "scheduler" else schedule(mine.optimizer)
        for _ in range(3):
            train(mine.model, mine.optimizer, steps=1)
            scheduler.step()
        later = schedule(mine.optimizer)
        train(mine.model, mine.optimizer, steps=1)
        later.step()
    plain = layer()
    other = torch.optim.Adam(plain.parameters(), lr=0.01)
    planned = schedule(other)
    for _ in range(3):
        train(plain, other, steps=1)
        planned.step()
    train(plain, other, steps=1)
    assert all(map(torch.equal, plain.parameters(), mine.model.parameters()))
    assert not lean.has_step_of_its_own(mine.optimizer)
    wrapper = vars(mine.optimizer)["step"]
    mine.close()
    if first == "run":
        assert vars(mine.optimizer)["step"] is wrapper, "which the scheduler has put there"
    else:
        assert lean.is_schedulers(mine.optimizer)
        assert not inspect.ismethod(vars(mine.optimizer)["step"])
    before = mine.watch.stepped.copy()
    mine.watch.stepped.clear()
    train(mine.model, mine.optimizer)
    assert before
    assert not mine.watch.stepped, "it is told nothing any more"


def test_a_scheduler_that_is_called_too_early_is_told_so_as_ever() -> None:
    mine = Open(before=lambda optimizer: lr_scheduler.StepLR(optimizer, step_size=1))
    with pytest.warns(UserWarning, match="Detected call of `lr_scheduler.step\\(\\)` before"):
        mine.kept.step()


def test_a_step_that_is_not_torchs_wrapper_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Own(torch.optim.SGD):
        pass

    Own([nn.Parameter(torch.ones(1))])  # torch wraps the class's step when the first is made
    wrapped = Own.step

    @functools.wraps(wrapped)
    def step(self: Any, closure: Any = None) -> Any:
        calls.append("class")
        return wrapped(self, closure)

    monkeypatch.setattr(Own, "step", step)
    mine = Open(lambda p: Own(p, lr=0.1))
    train(mine.model, mine.optimizer, steps=2)
    assert calls == ["class"] * 2
    assert "step" not in vars(mine.optimizer)
    mine.close()

    def put(optimizer: Any) -> None:
        optimizer.step = lambda closure=None: calls.append("instance")

    mine = Open(before=put)
    assert lean.has_step_of_its_own(mine.optimizer)
    train(mine.model, mine.optimizer, steps=1)
    assert calls[-1] == "instance"
    mine.close()
    mine.optimizer.step()
    assert calls[-2:] == ["instance"] * 2


def test_a_zero_grad_of_its_own_is_left_alone() -> None:
    class Own(torch.optim.SGD):
        def zero_grad(self, set_to_none: bool = True) -> None:
            super().zero_grad(set_to_none=False)

    mine = Open(lambda p: Own(p, lr=0.1))
    train(mine.model, mine.optimizer)
    mine.optimizer.zero_grad()
    assert all(parameter.grad is not None for parameter in mine.model.parameters())


def test_copies_and_what_is_saved_know_nothing_of_it() -> None:
    mine = Open()
    train(mine.model, mine.optimizer)
    model, twin = copy.deepcopy((mine.model, mine.optimizer))
    before = [parameter.detach().clone() for parameter in mine.model.parameters()]
    assert vars(twin).keys().isdisjoint({"step", "zero_grad"})
    train(model, twin)
    assert all(map(torch.equal, before, mine.model.parameters())), "the copy has changed what is its own"
    assert not torch.equal(before[0], next(model.parameters()))
    file = io.BytesIO()
    torch.save(mine.optimizer, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert vars(loaded).keys().isdisjoint({"step", "zero_grad"})
    assert mine.optimizer.state_dict().keys() == {"state", "param_groups"}
    assert inspect.signature(mine.optimizer.step) == inspect.signature(twin.step)
    assert inspect.signature(mine.optimizer.zero_grad) == inspect.signature(twin.zero_grad)


def test_two_runs_with_one_optimizer_are_both_told() -> None:
    mine = Open()
    watch = StepWatch({"optimizer": mine.optimizer})
    other = LeanOptimizers({"optimizer": mine.optimizer}, watch)
    train(mine.model, mine.optimizer)
    assert mine.watch.stepped == watch.stepped == {id(mine.optimizer)}
    other.close()
    watch.close()
    assert mine.calls_of_wrapper(lambda: train(mine.model, mine.optimizer)) == 0
    mine.close()
    assert vars(mine.optimizer).keys().isdisjoint({"step", "zero_grad"})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_whole_step_can_be_compiled_as_ever() -> None:
    def compiled(model: nn.Module, optimizer: Optimizer) -> int:
        torch._dynamo.reset()
        pieces = torch._dynamo.testing.CompileCounter()

        @torch.compile(backend=pieces)
        def whole() -> None:
            optimizer.zero_grad()
            model(INPUTS).square().sum().backward()
            optimizer.step()

        for _ in range(4):
            whole()
        return pieces.frame_count

    import torch._dynamo.testing

    plain, mine = layer(), Open(OPTIMIZERS["SGD"])
    expected = compiled(plain, OPTIMIZERS["SGD"]([*plain.parameters()]))
    assert compiled(mine.model, mine.optimizer) == expected > 0
    assert all(map(torch.equal, plain.parameters(), mine.model.parameters()))
    assert mine.watch.stepped == {id(mine.optimizer)}


def test_where_torch_is_not_what_it_was_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lean, "_is_known", False)
    mine = Open()
    assert vars(mine.optimizer).keys().isdisjoint({"step", "zero_grad"})
    train(mine.model, mine.optimizer)
    assert mine.watch.stepped == {id(mine.optimizer)}


def test_a_run_gives_them_back_however_it_ends(tmp_path: Path) -> None:
    model = layer()
    optimizer = torch.optim.Adam(model.parameters())
    state = {"model": model, "optimizer": optimizer}
    with Run(tmp_path / "run", state=state, progress=False, snapshots=SnapshotPolicy(background=False)) as run:
        for _ in run.epochs(1):
            for _ in run.batches([1, 2, 3]):
                assert {"step", "zero_grad"} <= vars(optimizer).keys()
                train(model, optimizer, steps=1)
    assert vars(optimizer).keys().isdisjoint({"step", "zero_grad"})
    assert not optimizer._optimizer_step_post_hooks
    other = nn.Linear(5, 2)
    optimizer = torch.optim.Adam(other.parameters())
    with pytest.raises(StateMismatchError), Run(tmp_path / "run", state={"model": other, "optimizer": optimizer}):
        pass
    assert vars(optimizer).keys().isdisjoint({"step", "zero_grad"})
    assert not optimizer._optimizer_step_post_hooks

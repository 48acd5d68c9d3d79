"""Updates in one call for many parameters: torch's bits, and torch's own step wherever anything is not plain."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from resumable_trainer.loop import multi_tensor
from resumable_trainer.loop.lean import LeanOptimizers
from resumable_trainer.loop.multi_tensor import MultiTensorStep
from resumable_trainer.state.modes import StepWatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch.optim import Optimizer

    Make = Callable[[Any], Optimizer]

WAYS: dict[str, Make] = {
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "Adam with decay": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-5),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "AdamW without decay": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD with decay": lambda p: torch.optim.SGD(p, lr=1, weight_decay=0.1),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.01),
    "SGD of Nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
}
SPECIAL = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-42, 3e38, -1e-30]


def parameters() -> list[nn.Parameter]:
    """Of all kinds that a model on the CPU has."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    made = [random(12, 8), random(12), random(1), random(()), random(0, 4), random(33, 17).t()]
    made += [random(2, 3, 5, 4).to(memory_format=torch.channels_last), random(40, 6)[::2], random(300, 40)]
    made += [random(9, 5, dtype=torch.float64), random(1025, dtype=torch.float64)]
    made += [torch.tensor(SPECIAL), torch.ones(len(SPECIAL))]
    return [nn.Parameter(tensor) for tensor in made]


def give_gradients(parameters: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters:
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        parameter.grad = torch.empty_like(parameter).copy_(noise).detach()
    parameters[-1].grad = torch.tensor(SPECIAL).roll(step)


def groups(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Two, with other settings."""
    return [{"params": parameters[::2]}, {"params": parameters[1::2], "lr": 0.5}]


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def contents(parameters: list[nn.Parameter], optimizer: Optimizer) -> list[Any]:
    """All that a step may change, to the bit; and how often torch has counted it as changed."""
    found: list[Any] = [(bits(parameter), parameter._version) for parameter in parameters]
    found += [bits(parameter.grad) for parameter in parameters if parameter.grad is not None]
    state = optimizer.state_dict()
    for number, values in state["state"].items():
        found += [(number, name, bits(value), value._version) for name, value in values.items()]
    return [*found, state["param_groups"]]


def stepped(make: Make, *, steps: int, act: Callable[[Any, int], object] = lambda *_: None) -> tuple[Any, Any]:
    """Parameters and optimizer after some steps of torch's own."""
    mine = parameters()
    optimizer = make(groups(mine))
    for step in range(steps):
        give_gradients(mine, step)
        act(optimizer, step)
        optimizer.step()
    return mine, optimizer


@pytest.mark.parametrize("portion_bytes", [0, 500, multi_tensor._PORTION_BYTES])
@pytest.mark.parametrize("way", WAYS)
def test_every_bit_is_torchs(way: str, portion_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multi_tensor, "_PORTION_BYTES", portion_bytes)
    mine = parameters()
    optimizer = WAYS[way](groups(mine))
    step_at_once = MultiTensorStep(optimizer)
    for step in range(6):
        give_gradients(mine, step)
        for group in optimizer.param_groups:
            group["lr"] *= 0.7
        needs_state = step == 0 and bool(len(copy.deepcopy(stepped(WAYS[way], steps=1)[1].state)))
        assert step_at_once() is not needs_state
        if needs_state:
            optimizer.step()
        with_torch = stepped(
            WAYS[way], steps=step + 1, act=lambda o, _: [g.update(lr=g["lr"] * 0.7) for g in o.param_groups]
        )
        assert contents(mine, optimizer) == contents(*with_torch)


class Lean:
    """An optimizer of an open run, and how often it updated all at once."""

    def __init__(self, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        self.parameters = parameters()
        self.optimizer: Any = make(groups(self.parameters))
        self.at_once: list[bool] = []
        original = MultiTensorStep.__call__

        def noted(this: MultiTensorStep) -> bool:
            self.at_once.append(original(this))
            return self.at_once[-1]

        monkeypatch.setattr(MultiTensorStep, "__call__", noted)
        self.watch = StepWatch({"optimizer": self.optimizer})
        LeanOptimizers({"optimizer": self.optimizer}, self.watch)

    def step(self, number: int) -> None:
        give_gradients(self.parameters, number)
        self.optimizer.step()


@pytest.fixture
def lean(monkeypatch: pytest.MonkeyPatch) -> Lean:
    return Lean(WAYS["Adam"], monkeypatch)


def test_a_lean_optimizer_takes_all_but_its_first_step_at_once(lean: Lean) -> None:
    for number in range(4):
        lean.watch.stepped.clear()
        lean.step(number)
        assert lean.watch.stepped == {id(lean.optimizer)}
    assert lean.at_once == [False, True, True, True]
    assert contents(lean.parameters, lean.optimizer) == contents(*stepped(WAYS["Adam"], steps=4))


def with_other_tensors(optimizer: Any, step: int) -> None:
    """What a script may do between steps, and what comes of it must be followed."""
    first = optimizer.param_groups[0]["params"][0]
    if step == 2:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    if step >= 3:
        first.grad = None
        if step == 3:
            first.data = torch.full((5, 2), 0.5)
            optimizer.state[first]["exp_avg"] = torch.full((5, 2), 0.25)
            optimizer.state[first]["exp_avg_sq"] = torch.full((5, 2), 0.125)
        first.grad = torch.full((5, 2), float(step))
    if step == 4:
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    for group in optimizer.param_groups[2:]:
        group["params"][0].grad = torch.full((3,), float(step))


def test_what_has_been_replaced_in_between_is_followed(lean: Lean) -> None:
    theirs = parameters()
    optimizer = WAYS["Adam"](groups(theirs))
    for step in range(7):
        for each, its in ((lean.optimizer, lean.parameters), (optimizer, theirs)):
            give_gradients(its[1:], step)
            its[0].grad = torch.ones_like(its[0])
            with_other_tensors(each, step)
            each.step()
    assert lean.at_once == [False, True, True, True, False, True, True]
    assert contents(lean.parameters, lean.optimizer) == contents(theirs, optimizer)


def test_parameters_without_gradients_are_left_out(lean: Lean) -> None:
    for number in range(3):
        give_gradients(lean.parameters, number)
        lean.optimizer.param_groups[0]["params"][1].grad = None
        lean.optimizer.step()
    assert lean.at_once == [False, True, True]
    theirs = stepped(WAYS["Adam"], steps=3, act=lambda o, _: setattr(o.param_groups[0]["params"][1], "grad", None))
    assert contents(lean.parameters, lean.optimizer) == contents(*theirs)
    lean.optimizer.zero_grad()
    lean.optimizer.step()
    theirs[1].zero_grad()
    theirs[1].step()
    assert lean.at_once[-1]
    assert contents(lean.parameters, lean.optimizer) == contents(*theirs)


# -- what is left to torch ------------------------------------------------------------------------------


MOMENTS = ("exp_avg", "exp_avg_sq")


class Tagged(torch.Tensor):
    """A user's own kind."""


def overlapping(optimizer: Any) -> None:
    first, second, *_ = optimizer.param_groups[0]["params"]
    memory = torch.linspace(0, 1, first.numel() + second.numel())
    first.data = memory[: first.numel()].reshape(first.shape)
    second.data = memory[first.numel() - second.numel() :][: second.numel()].reshape(second.shape)


def with_tagged_state(optimizer: Any) -> None:
    state = optimizer.state[optimizer.param_groups[1]["params"][0]]
    state["exp_avg"] = state["exp_avg"].as_subclass(Tagged)


def with_one_counter(optimizer: Any) -> None:
    first, second, *_ = optimizer.param_groups[0]["params"]
    optimizer.state[second]["step"] = optimizer.state[first]["step"]


def with_one_counter_in_two_groups(optimizer: Any) -> None:
    first, second = (group["params"][0] for group in optimizer.param_groups)
    optimizer.state[second]["step"] = optimizer.state[first]["step"]


def with_a_parameter_in_two_groups(optimizer: Any) -> None:
    optimizer.param_groups[1]["params"].append(optimizer.param_groups[0]["params"][0])


def with_another_number_of_steps(optimizer: Any) -> None:
    optimizer.state[optimizer.param_groups[1]["params"][0]]["step"].add_(1)


def with_gradients_in_parameters(optimizer: Any) -> None:
    first, second, *_ = optimizer.param_groups[0]["params"]
    second.grad = None
    second.data = torch.ones_like(first.detach())
    second.grad = first.detach()
    optimizer.state[second].update({name: torch.ones_like(second.grad) for name in MOMENTS})


def of_another_kind(kind: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], None]:
    def put(optimizer: Any) -> None:
        last = optimizer.param_groups[1]["params"][-1]
        last.grad = None
        last.data = kind(last.detach().nan_to_num())
        last.grad = torch.ones_like(last)
        optimizer.state[last].update({name: torch.zeros_like(last.grad) for name in MOMENTS})

    return put


def with_setting(**settings: Any) -> Callable[[Any], None]:
    return lambda optimizer: optimizer.param_groups[1].update(settings)


def without_state(optimizer: Any) -> None:
    optimizer.state.pop(optimizer.param_groups[1]["params"][0])


def with_tagged_gradient(optimizer: Any) -> None:
    parameter = optimizer.param_groups[1]["params"][0]
    parameter.grad = torch.ones_like(parameter).as_subclass(Tagged)


UNUSUAL: dict[str, Callable[[Any], None]] = {
    "foreach": with_setting(foreach=True),
    "maximize": with_setting(maximize=True),
    "a number of NumPy": with_setting(lr=np.float64(0.1)),
    "a tensor as the rate": with_setting(lr=torch.tensor(0.1)),
    "a tensor of a decay": with_setting(weight_decay=torch.tensor(0.1)),
    "parameters in one memory": overlapping,
    "state of another kind": with_tagged_state,
    "one counter for two": with_one_counter,
    "one counter for two groups": with_one_counter_in_two_groups,
    "one parameter in two groups": with_a_parameter_in_two_groups,
    "another number of steps": with_another_number_of_steps,
    "gradients in parameters": with_gradients_in_parameters,
    "half": of_another_kind(torch.Tensor.half),
    "bfloat16": of_another_kind(torch.Tensor.bfloat16),
    "complex": of_another_kind(lambda tensor: tensor.to(torch.complex64)),
    "a parameter without state": without_state,
    "a gradient of another kind": with_tagged_gradient,
}


@pytest.mark.parametrize("what", UNUSUAL)
def test_what_is_not_plain_torch_updates_and_nothing_twice(lean: Lean, what: str) -> None:
    theirs, optimizer = stepped(WAYS["Adam"], steps=2)
    for step in range(2):
        lean.step(step)
    for each, its in ((lean.optimizer, lean.parameters), (optimizer, theirs)):
        give_gradients(its, 7)
        UNUSUAL[what](each)
        each.step()
    assert lean.at_once == [False, True, False]
    assert lean.watch.stepped == {id(lean.optimizer)}
    assert contents(lean.parameters, lean.optimizer) == contents(theirs, optimizer)


@pytest.mark.parametrize("changed", [torch.Tensor.double, lambda tensor: tensor.new_zeros(77)])
def test_an_error_leaves_what_torchs_leaves(lean: Lean, changed: Any) -> None:
    theirs, optimizer = stepped(WAYS["Adam"], steps=2)
    for step in range(2):
        lean.step(step)
    for each, its in ((lean.optimizer, lean.parameters), (optimizer, theirs)):
        give_gradients(its, 7)
        state = each.state[each.param_groups[0]["params"][2]]
        state["exp_avg"] = changed(state["exp_avg"])
        with pytest.raises(RuntimeError):
            each.step()
    assert contents(lean.parameters, lean.optimizer) == contents(theirs, optimizer)


def test_sparse_gradients_and_amsgrad_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    for make in (
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.Adam(p[:1], amsgrad=True),
        lambda p: torch.optim.AdamW(p[:1], fused=True),
    ):
        table = nn.Embedding(5, 3, sparse=make([nn.Parameter(torch.ones(1))]).__class__ is torch.optim.SGD)
        optimizer = make([*table.parameters()])
        at_once = MultiTensorStep(optimizer)
        for _ in range(2):
            table(torch.tensor([1, 3])).sum().backward()
            assert not at_once()
            optimizer.step()


class Functions(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Functions, Dispatched])
def test_who_listens_to_operations_hears_torchs(lean: Lean, mode: Any) -> None:
    for step in range(2):
        lean.step(step)
    with mode():
        lean.step(2)
    lean.step(3)
    assert lean.at_once == [False, True, False, True]
    assert contents(lean.parameters, lean.optimizer) == contents(*stepped(WAYS["Adam"], steps=4))


def test_a_step_with_a_closure_is_torchs(lean: Lean) -> None:
    for step in range(2):
        lean.step(step)
    assert lean.optimizer.step(lambda: 3.5) == 3.5
    assert lean.at_once == [False, True]


@pytest.mark.parametrize("enabled", [True, False])
def test_whether_gradients_are_recorded_is_as_before(lean: Lean, enabled: bool) -> None:
    lean.step(0)
    with torch.set_grad_enabled(enabled):
        lean.step(1)
        assert torch.is_grad_enabled() is enabled
    assert lean.at_once[-1]
    assert not any(parameter.grad_fn or parameter.grad.requires_grad for parameter in lean.parameters)


def test_types_other_than_the_three_are_torchs() -> None:
    class Own(torch.optim.Adam):
        pass

    for make in (Own, torch.optim.RMSprop, torch.optim.NAdam):
        assert not MultiTensorStep.serves(make([nn.Parameter(torch.ones(1))]))


@pytest.fixture
def tried_anew() -> Iterator[None]:
    multi_tensor._has_torchs_bits.cache_clear()
    yield
    multi_tensor._has_torchs_bits.cache_clear()


def other_bits(*args: Any) -> Any:
    return torch._foreach_mul_(args[0], 1 + 1e-7)


def refused(*args: Any) -> Any:
    raise TypeError("no such way of calling it")


@pytest.mark.usefixtures("tried_anew")
@pytest.mark.parametrize("fault", [other_bits, refused])
def test_where_torch_is_not_what_it_was_its_own_step_is_taken(
    lean: Lean, fault: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "_foreach_div_", fault)
    for step in range(4):
        lean.step(step)
    assert not any(lean.at_once)
    assert contents(lean.parameters, lean.optimizer) == contents(*stepped(WAYS["Adam"], steps=4))


def test_without_what_it_builds_upon_it_serves_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multi_tensor, "_is_known", False)
    assert not MultiTensorStep.serves(WAYS["Adam"]([nn.Parameter(torch.ones(1))]))


# -- the ground it stands on ----------------------------------------------------------------------------

PAIRS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "add": (lambda x, y, z, s: x.add_(s), lambda x, y, z, s: torch._foreach_add_(x, s)),
    "add scaled": (lambda x, y, z, s: x.add_(y, alpha=-s), lambda x, y, z, s: torch._foreach_add_(x, y, alpha=-s)),
    "mul": (lambda x, y, z, s: x.mul_(s), lambda x, y, z, s: torch._foreach_mul_(x, s)),
    "lerp": (lambda x, y, z, s: x.lerp_(y, s), lambda x, y, z, s: torch._foreach_lerp_(x, y, s)),
    "addcmul": (
        lambda x, y, z, s: x.addcmul_(y, y, value=s),
        lambda x, y, z, s: torch._foreach_addcmul_(x, y, y, s),
    ),
    "div": (lambda x, y, z, s: x.copy_(x / s), lambda x, y, z, s: torch._foreach_div_(x, s)),
    "addcdiv": (
        lambda x, y, z, s: x.addcdiv_(y, z, value=-s),
        lambda x, y, z, s: torch._foreach_addcdiv_(x, y, z, -s),
    ),
    "sqrt": (
        lambda x, y, z, s: x.copy_(x.sqrt()),
        lambda x, y, z, s: [a.copy_(b) for a, b in zip(x, torch._foreach_sqrt(x), strict=True)],
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PAIRS)
def test_a_call_for_many_has_the_bits_of_one_for_each(name: str, dtype: torch.dtype) -> None:
    one, many = PAIRS[name]
    generator = torch.Generator().manual_seed(1)
    whole = {torch.float32: torch.int32, torch.float64: torch.int64}[dtype]
    sizes = (1, 3, 8, 17, 64, 1000, 70_001)
    for number in (0.1, 1 - 0.9, 0.999, 1e-8, 3e-39, 0.5):
        drawn = []
        for any_bits in (True, False, False):
            limits = torch.iinfo(whole)
            draws = (
                torch.randint(limits.min, limits.max, (size + 3,), dtype=whole, generator=generator).view(dtype)
                if any_bits
                else torch.randn(size + 3, dtype=dtype, generator=generator)
                for size in sizes
            )
            drawn.append([values[size % 4 :][:size] for size, values in zip(sizes, draws, strict=True)])
        single = [values.clone() for values in drawn[0]]
        together = [values.clone() for values in drawn[0]]
        for values, others, thirds in zip(single, drawn[1], drawn[2], strict=True):
            one(values, others, thirds, number)
        many(together, drawn[1], drawn[2], number)
        assert [*map(bits, single)] == [*map(bits, together)]

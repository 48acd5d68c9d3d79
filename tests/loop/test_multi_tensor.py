"""Updates in one call for many parameters: torch's bits, and torch's own step wherever anything is not plain."""

from __future__ import annotations

import copy
import functools
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import adam as adams
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from resumable_trainer.loop import multi_tensor, update_rules
from resumable_trainer.loop.lean import LeanOptimizers
from resumable_trainer.loop.multi_tensor import MultiTensorStep
from resumable_trainer.state.modes import StepWatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch.optim import Optimizer

    Make = Callable[[Any], Optimizer]


@pytest.fixture(autouse=True)
def _however_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few parameters are updated at once, too, as here it is not about time."""
    for settings in (update_rules.AdamSettings, update_rules.SgdSettings):
        monkeypatch.setattr(settings, "fewest", 0)


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
    return tensor.detach().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def contents(parameters: list[nn.Parameter], optimizer: Optimizer) -> list[Any]:
    """All that a step may change, to the bit; and how often torch has counted it as changed."""
    found: list[Any] = [(bits(parameter), parameter._version) for parameter in parameters]
    found += [bits(parameter.grad) for parameter in parameters if parameter.grad is not None]
    state = optimizer.state_dict()
    for number, values in state["state"].items():
        found += [
            (number, name, bits(value), None if value.is_inference() else value._version)
            for name, value in values.items()
        ]
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
        needs_state = step == 0 and bool(stepped(WAYS[way], steps=1)[1].state)
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


@pytest.mark.parametrize(("way", "fewest"), [("Adam", 3), ("AdamW", 3), ("SGD", 16), ("SGD with momentum", 8)])
def test_too_few_are_not_worth_looking_at(way: str, fewest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for count, pays in ((fewest - 1, False), (fewest, True)):
        mine = [nn.Parameter(torch.ones(3)) for _ in range(count)]
        optimizer = WAYS[way](mine)
        for parameter in mine:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert MultiTensorStep(optimizer)() is pays


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


def with_a_gradient_missing_once(optimizer: Any, step: int) -> None:
    if step == 2:
        optimizer.param_groups[0]["params"][1].grad = None


def with_state_in_another_order(optimizer: Any, step: int) -> None:
    if step == 1:
        last_first = [*optimizer.state.items()][::-1]
        optimizer.state.clear()
        optimizer.state.update(last_first)


def with_betas_in_a_list(optimizer: Any, step: int) -> None:
    for group in optimizer.param_groups:
        if not step:
            group["betas"] = [0.8, 0.9]
        group["betas"][0] = 0.5 + step / 10


@pytest.mark.parametrize(
    ("way", "change", "counters_differ"),
    [
        ("Adam", with_a_gradient_missing_once, True),
        ("SGD with momentum", with_a_gradient_missing_once, False),
        ("Adam", with_state_in_another_order, False),
        ("SGD with momentum", with_state_in_another_order, False),
        ("Adam", with_betas_in_a_list, False),
    ],
)
def test_what_changes_between_two_steps_is_followed(
    way: str, change: Callable[[Any, int], None], counters_differ: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = Lean(WAYS[way], monkeypatch)
    for number in range(5):
        give_gradients(mine.parameters, number)
        change(mine.optimizer, number)
        mine.optimizer.step()
    assert mine.at_once == [False, True, True, not counters_differ, not counters_differ]
    assert contents(mine.parameters, mine.optimizer) == contents(*stepped(WAYS[way], steps=5, act=change))


def test_no_parameter_is_looked_up_whose_state_lies_in_its_place(lean: Lean, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(2):
        lean.step(step)
    looked_up: list[Any] = []
    monkeypatch.setattr(torch.Tensor, "__hash__", lambda tensor: looked_up.append(tensor) or id(tensor))
    lean.optimizer.step()
    assert lean.at_once == [False, True, True]
    assert not looked_up


def test_gradients_may_lie_on_both_sides_of_a_parameter(lean: Lean) -> None:
    memory = torch.arange(1.0, 13.0)
    first, second, third = (nn.Parameter(torch.zeros(())) for _ in range(3))
    first.data, first.grad = memory[4:8], memory[:4]
    second.data, second.grad = memory[8:9], memory[9:10]
    third.data, third.grad = memory[10:11], torch.ones(1)
    optimizer = WAYS["SGD"]([first, second, third])
    assert MultiTensorStep(optimizer)()
    expected = [*range(1, 5), *(5 - 0.1, 6 - 0.2, 7 - 0.3, 8 - 0.4), 9 - 1.0, 10, 11 - 0.1, 12]
    assert torch.allclose(memory, torch.tensor(expected))


@pytest.mark.parametrize("way", ["SGD", "SGD of Nesterov"])
@pytest.mark.parametrize("setting", ["foreach", "maximize", "differentiable", "fused"])
def test_what_a_group_of_sgd_is_told_later_is_followed(way: str, setting: str) -> None:
    mine = parameters()
    optimizer = WAYS[way](mine)
    at_once = MultiTensorStep(optimizer)
    give_gradients(mine, 0)
    optimizer.step()
    assert at_once()
    optimizer.param_groups[0][setting] = True
    assert not at_once()
    optimizer.param_groups[0][setting] = False
    assert at_once()


def test_pieces_that_torchs_compiler_has_wrapped_are_torchs(lean: Lean, monkeypatch: pytest.MonkeyPatch) -> None:
    original = adams.adam

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)

    wrapped._torchdynamo_orig_callable = original  # type: ignore[attr-defined]
    monkeypatch.setattr(adams, "adam", wrapped)
    for step in range(2):
        lean.step(step)
    assert lean.at_once == [False, True]


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


def put_on(name: str, value: Any) -> Callable[[Any], None]:
    return lambda optimizer: setattr(optimizer, name, value)


def with_init_group(optimizer: Any) -> None:
    original = optimizer._init_group

    def without_the_first(group: Any, *lists: Any) -> Any:
        return original({**group, "params": group["params"][1:]}, *lists)

    optimizer._init_group = without_the_first


def with_other_counters(optimizer: Any) -> None:
    for values in optimizer.state.values():
        values["step"] = values["step"].half()


def with_default(optimizer: Any) -> None:
    optimizer.defaults["differentiable"] = True


class Own(torch.optim.Adam):
    pass


def of_another_class(optimizer: Any) -> None:
    optimizer.__class__ = Own


class Noted(nn.Parameter):
    pass


def with_parameter_of_another_class(optimizer: Any) -> None:
    optimizer.param_groups[0]["params"][1].__class__ = Noted


def with_gradient_within_a_parameter(optimizer: Any) -> None:
    first, second, *_ = optimizer.param_groups[0]["params"]
    second.grad = first.detach().reshape(-1)[1 : 1 + second.numel()].reshape(second.shape)


def with_state(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], None]:
    def put(optimizer: Any) -> None:
        state = optimizer.state[optimizer.param_groups[0]["params"][2]]
        state[name] = change(state[name])

    return put


def under_inference(tensor: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return tensor.clone()


UNUSUAL: dict[str, Callable[[Any], None]] = {
    "gradients that are scaled": put_on("grad_scale", torch.tensor(2.0)),
    "an infinite gradient found": put_on("found_inf", torch.tensor(1.0)),
    "steps that are differentiated": with_default,
    "an optimizer of another class": of_another_class,
    "a parameter of another class": with_parameter_of_another_class,
    "a parameter that negates": of_another_kind(torch._neg_view),
    "a gradient within a parameter": with_gradient_within_a_parameter,
    "state of another dtype": with_state("exp_avg", torch.Tensor.double),
    "state of another shape": with_state("exp_avg", lambda tensor: tensor.new_zeros(77)),
    "state of inference": with_state("exp_avg_sq", under_inference),
    "a piece of its own": with_init_group,
    "counters of another dtype": with_other_counters,
    "a counter of more digits": with_state("step", torch.Tensor.double),
    "a counter of another dtype": with_state("step", torch.Tensor.half),
    "a counter that is a truth": with_state("step", torch.Tensor.bool),
    "two counters": with_state("step", lambda tensor: tensor.repeat(2)),
    "counters below zero": lambda optimizer: [each["step"].fill_(-1) for each in optimizer.state.values()],
    "no betas": with_setting(betas=None),
    "three betas": with_setting(betas=(0.9, 0.99, 0.999)),
    "a beta of one": with_setting(betas=(1.0, 0.9)),
    "a beta above one": with_setting(betas=(0.9, 1.5)),
    "a beta below zero": with_setting(betas=(-0.1, 0.9)),
    "no rate": lambda optimizer: optimizer.param_groups[1].pop("lr"),
    "foreach": with_setting(foreach=True),
    "maximize": with_setting(maximize=True),
    "a number of NumPy": with_setting(lr=np.float64(0.1)),
    "a tensor as the rate": with_setting(lr=torch.tensor(0.1)),
    "a tensor as the rate, of the same value": with_setting(lr=torch.tensor(0.5)),
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


def outcome(optimizer: Any) -> type[Exception] | None:
    try:
        optimizer.step()
    except Exception as error:  # noqa: BLE001 - whatever torch says is right
        return type(error)
    return None


@pytest.mark.parametrize("what", UNUSUAL)
def test_what_is_not_plain_torch_updates_and_nothing_twice(lean: Lean, what: str) -> None:
    theirs, optimizer = stepped(WAYS["Adam"], steps=2)
    for step in range(2):
        lean.step(step)
    outcomes = []
    for each, its in ((lean.optimizer, lean.parameters), (optimizer, theirs)):
        give_gradients(its, 7)
        UNUSUAL[what](each)
        outcomes.append(outcome(each))
    assert outcomes[0] is outcomes[1]
    assert lean.at_once == [False, True, False]
    assert contents(lean.parameters, lean.optimizer) == contents(theirs, optimizer)


class Steps:
    """An SGD of some parameters with what a run puts on it, and one as torch has it."""

    def __init__(self, parameters: Callable[[], list[Any]], **settings: Any) -> None:
        self.pairs = [(its, torch.optim.SGD(its, **settings)) for its in (parameters(), parameters())]
        LeanOptimizers({"o": self.pairs[0][1]}, StepWatch({"o": self.pairs[0][1]}))

    def step(self, act: Callable[[list[Any]], object]) -> None:
        for its, optimizer in self.pairs:
            act(its)
            optimizer.step()
        (mine, _), (theirs, _) = self.pairs
        for one, other in zip(mine, theirs, strict=True):
            assert torch.equal(one.detach().to_dense(), other.detach().to_dense())


def ones(parameters: list[Any]) -> None:
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)


def test_a_parameter_that_grows_into_another_is_noticed() -> None:
    def grown(parameters: list[Any]) -> None:
        first = parameters[0]
        first.grad = None
        first.data = torch.as_strided(first.detach(), (6,), (1,))
        ones(parameters)

    def neighbours() -> list[Any]:
        memory = torch.arange(1.0, 7.0)
        return [nn.Parameter(memory[:3]), nn.Parameter(memory[3:])]

    steps = Steps(neighbours, lr=0.1, weight_decay=0.5)
    steps.step(ones)
    steps.step(grown)


def test_a_gradient_that_begins_within_another_parameter_is_noticed() -> None:
    def within(parameters: list[Any]) -> None:
        parameters[0].grad = torch.ones(4)
        parameters[1].grad = parameters[0].detach()[1:3]

    def before(parameters: list[Any]) -> None:
        memory = torch.ones(6)
        parameters[0].grad = None
        parameters[0].data = memory[2:]
        parameters[0].grad = torch.ones(4)
        parameters[1].grad = memory[1:3]

    steps = Steps(lambda: [nn.Parameter(torch.arange(4.0)), nn.Parameter(torch.ones(2))], lr=0.1, weight_decay=0.1)
    steps.step(ones)
    steps.step(within)
    steps.step(before)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_that_are_none_of_the_usual_are_stepped_as_ever() -> None:
    steps = Steps(lambda: [nn.Parameter(torch.eye(2)), nn.Parameter(torch.ones(2))], lr=0.1)
    steps.step(ones)

    def sparse(parameters: list[Any]) -> None:
        torch.utils.swap_tensors(parameters[0], nn.Parameter(torch.eye(2).to_sparse()))
        parameters[0].grad = torch.eye(2).to_sparse()

    steps.step(sparse)
    nested = Steps(lambda: [nn.Parameter(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))], lr=0.1)
    for its, optimizer in nested.pairs:
        its[0].to_padded_tensor(0.0).sum().backward()
        optimizer.step()
    (mine, theirs) = (its[0].detach().to_padded_tensor(0.0) for its, _ in nested.pairs)
    assert torch.equal(mine, theirs)


def test_a_momentum_that_is_set_later_is_followed() -> None:
    steps = Steps(lambda: [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))], lr=0.1)
    steps.step(ones)
    for its, optimizer in steps.pairs:
        optimizer.param_groups[0]["momentum"] = 0.9
        for parameter in its:
            optimizer.state[parameter]["momentum_buffer"] = torch.full((3,), 0.5)

    def the_first_alone(parameters: list[Any]) -> None:
        ones(parameters)
        parameters[1].grad = None

    steps.step(the_first_alone)
    steps.pairs[0][1].param_groups[0]["momentum"] = steps.pairs[1][1].param_groups[0]["momentum"] = 0
    steps.step(the_first_alone)
    steps.step(ones)


def test_what_becomes_plain_is_updated_at_once_from_then_on() -> None:
    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    at_once = MultiTensorStep(torch.optim.SGD([parameter], lr=0.1))
    parameter.grad = torch.ones_like(parameter)
    assert not at_once()
    parameter.grad = None
    parameter.data = parameter.data.float()
    parameter.grad = torch.ones_like(parameter)
    assert at_once()
    assert parameter.tolist() == pytest.approx([0.9] * 3)


def test_within_a_transform_torch_says_what_is_wrong(lean: Lean) -> None:
    for step in range(2):
        lean.step(step)
    give_gradients(lean.parameters, 2)
    before = contents(lean.parameters, lean.optimizer)
    with pytest.raises(RuntimeError, match="mutate a captured Tensor"):
        torch.func.grad(lambda x: (lean.optimizer.step(), (x * x).sum())[1])(torch.ones(3))
    assert contents(lean.parameters, lean.optimizer) == before


@pytest.mark.parametrize(("place", "name"), [(adams, "_single_tensor_adam"), (torch.optim.Adam, "_init_group")])
def test_who_has_replaced_a_piece_of_torchs_step_is_called(
    lean: Lean, place: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in range(2):
        lean.step(step)
    called: list[str] = []
    original = getattr(place, name)

    def noted(*args: Any, **kwargs: Any) -> Any:
        called.append(name)
        return original(*args, **kwargs)

    monkeypatch.setattr(place, name, noted)
    lean.step(2)
    assert called
    assert lean.at_once == [False, True, False]


def test_where_cuda_is_in_use_torch_looks_whether_a_graph_is_captured(
    lean: Lean, monkeypatch: pytest.MonkeyPatch
) -> None:
    lean.step(0)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    lean.step(1)
    assert lean.at_once == [False, False]


def test_no_tensor_is_kept_from_one_step_to_the_next(lean: Lean) -> None:
    for step in range(3):
        lean.step(step)
    assert lean.at_once[-1]
    state = lean.optimizer.state[lean.optimizer.param_groups[0]["params"][0]]
    before = weakref.ref(state["exp_avg"])
    state["exp_avg"] = state["exp_avg"].clone()
    assert before() is None


def test_sparse_gradients_and_amsgrad_are_torchs() -> None:
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
    for make in (Own, torch.optim.RMSprop, torch.optim.NAdam):
        assert not MultiTensorStep.serves(make([nn.Parameter(torch.ones(1))]))


@pytest.fixture
def tried_anew() -> Iterator[None]:
    update_rules.has_torchs_bits.cache_clear()
    yield
    update_rules.has_torchs_bits.cache_clear()


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

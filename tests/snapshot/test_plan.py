"""A state taken apart along the plan of the one before gives exactly what taking it apart in full gives."""

from __future__ import annotations

import collections
import enum
import json
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

from resumable_trainer.errors import UnsafeValueError
from resumable_trainer.snapshot.plan import Planner
from resumable_trainer.snapshot.tree import Flat, Plain, flatten

if TYPE_CHECKING:
    from collections.abc import Callable

    Change = Callable[[dict[str, Any]], Any]


class Word(enum.StrEnum):
    A = "a"
    Y = "y"


def state() -> dict[str, Any]:
    """Fresh objects, the same values: a module's dict, an optimizer's, and all sorts between."""
    weights = {"layer.weight": nn.Parameter(torch.ones(3, 4)), "layer.bias": nn.Parameter(torch.zeros(4))}
    moments = {n: {"step": torch.tensor(1.0), "exp_avg": torch.ones(3, 4), "exp_avg_sq": torch.ones(3)} for n in (0, 1)}
    return {
        "model": Plain({**weights, "buffer": torch.arange(5), "empty": torch.empty(0, 2)}),
        "optimizer": {"state": moments, "param_groups": [{"lr": 0.1, "params": [0, 1]}]},
        "words": {"a": {"x": torch.ones(2)}, "b": {"y": torch.ones(3)}},
        "loop": {"position": 3, "generator": torch.ones(8), "list": [torch.ones(2), 1.5], "array": np.arange(999)},
        "gradients": {"pending": {}, "spent": {"model": ["layer.weight"]}},
        "parameter": {"p": nn.Parameter(torch.ones(2)), "more": 1},
        "nothing": None,
    }


def same(a: Flat, b: Flat) -> bool:
    """Values to the letter, tensors to the address."""
    return json.dumps(a.values) == json.dumps(b.values) and _places(a) == _places(b)


def _places(flat: Flat) -> list[Any]:
    return [
        (section, name, tensor.data_ptr() if tensor.numel() else 0, tensor.shape, tensor.stride(), tensor.dtype)
        for section, named in flat.tensors.items()
        for name, tensor in named.items()
    ]


def put(path: str, value: Callable[[], Any]) -> Change:
    def change(tree: dict[str, Any]) -> None:
        inner: Any = tree
        *keys, last = (int(key) if key.isdigit() else key for key in path.split("/"))
        for key in keys:
            inner = inner[key]
        inner[last] = value()

    return change


def settings(**changed: Any) -> Change:
    return put("optimizer/param_groups", lambda: [{"lr": 0.1, "params": [0, 1], **changed}])


def tie(tree: dict[str, Any]) -> None:
    tree["optimizer"]["state"][1]["exp_avg"] = tree["model"]["layer.weight"].detach()


def tie_within(tree: dict[str, Any]) -> None:
    tree["optimizer"]["state"][1]["exp_avg"] = tree["optimizer"]["state"][0]["exp_avg"]


def freeze(tree: dict[str, Any]) -> None:
    tree["model"]["layer.weight"].requires_grad_(False)


def freeze_marked(tree: dict[str, Any]) -> None:
    tree["parameter"]["p"].requires_grad_(False)


def reshape_in_place(tree: dict[str, Any]) -> None:
    tree["model"]["layer.weight"].data = tree["model"]["layer.weight"].data.view(4, 3)


def transpose_in_place(tree: dict[str, Any]) -> None:
    tree["optimizer"]["state"][0]["exp_avg"].t_()


def reverse(tree: dict[str, Any]) -> None:
    tree["model"] = Plain(reversed(tree["model"].items()))


def no_longer_plain(tree: dict[str, Any]) -> None:
    tree["model"] = dict(tree["model"])


def move(tree: dict[str, Any]) -> None:
    tree["zoo"] = tree.pop("model")


FOLLOWED: dict[str, Change] = {
    "nothing": lambda tree: None,
    "a plain value": put("loop/position", lambda: 4),
    "a NaN": put("loop/position", lambda: float("nan")),
    "a replaced tensor": put("model/buffer", lambda: torch.arange(5) + 1),
    "a replaced tensor alone": put("loop/generator", lambda: torch.zeros(8)),
    "a setting": put("optimizer/param_groups", lambda: [{"lr": 0.2, "params": [0, 1], "new": "x"}]),
    "a parameter of a module that is frozen": freeze,
    "True where a one was": settings(params=[0, True]),
    "a float where the same number was": settings(params=[0, 1.0]),
    "a negative zero": settings(params=[-0.0, 1]),
    "a tuple where a list was": settings(params=(0, 1)),
    "NumPy's number of the same value": settings(lr=np.float64(0.1)),
    "bytes": settings(lr=b"0.1"),
    "a small array": settings(lr=np.arange(3)),
    "another order": put("optimizer/param_groups", lambda: [{"params": [0, 1], "lr": 0.1}]),
}
DIFFERENT: dict[str, Change] = {
    "another dtype": put("model/buffer", lambda: torch.arange(5).int()),
    "another dtype of the same size": put("model/layer.bias", lambda: torch.zeros(4, dtype=torch.int32)),
    "another shape": put("model/buffer", lambda: torch.arange(6)),
    "another shape of the same size": reshape_in_place,
    "another shape within": put("optimizer/state/0/exp_avg", lambda: torch.ones(4, 3)),
    "another stride": put("optimizer/state/0/exp_avg", lambda: torch.ones(4, 3).t()),
    "a transposed tensor": transpose_in_place,
    "tied across sections": tie,
    "tied within a section": tie_within,
    "a new tensor": put("model/more", lambda: torch.ones(1)),
    "a new tensor where a number was": put("loop/position", lambda: torch.ones(1)),
    "a new entry of a parameter": put("optimizer/state/1/max", lambda: torch.ones(1)),
    "a new parameter's entry": put("optimizer/state/2", lambda: {"step": torch.ones(1)}),
    "a number where a tensor was": put("optimizer/state/0/step", lambda: 1),
    "a number where a tensor was alone": put("loop/generator", lambda: 1),
    "None where a tensor was": put("model/buffer", lambda: None),
    "a list where a dict was": put("words/a", lambda: [torch.ones(2)]),
    "a dict of another kind": put("words/a", lambda: collections.OrderedDict(x=torch.ones(2))),
    "a key of another type": put("words", lambda: {Word.A: {"x": torch.ones(2)}, "b": {"y": torch.ones(3)}}),
    "a key of another type within": put("words/b", lambda: {Word.Y: torch.ones(3)}),
    "a key of another type in a module": put("model", lambda: Plain({Word.Y: torch.ones(3)})),
    "keys that are bools": put("optimizer/state", lambda: {False: {"s": torch.ones(1)}, True: {"s": torch.ones(1)}}),
    "a parameter where a tensor was": put("words/a/x", lambda: nn.Parameter(torch.ones(2))),
    "a frozen parameter": freeze_marked,
    "complex numbers": put("words/a/x", lambda: torch.ones(2, dtype=torch.complex64)),
    "a conjugate": put("words/a/x", lambda: torch.ones(2, dtype=torch.complex64).conj()),
    "a negative view": put("words/a/x", lambda: torch._neg_view(torch.ones(2))),
    "entries of other names": put(
        "optimizer/state/0", lambda: {"step": torch.tensor(1.0), "avg": torch.ones(3, 4), "exp_avg_sq": torch.ones(3)}
    ),
    "a frozen parameter where a tensor was": put("words/a/x", lambda: nn.Parameter(torch.ones(2), requires_grad=False)),
    "another order": reverse,
    "a tensor among settings": settings(lr=torch.tensor(0.1)),
    "an array among settings": settings(lr=np.arange(999)),
    "a dict that marks its parameters": no_longer_plain,
    "another section": move,
    "one section less": lambda tree: tree.pop("words"),
    "no tensors": lambda tree: tree["model"].clear(),
    "an array of another size": put("loop/array", lambda: np.arange(1000)),
}


@pytest.mark.parametrize("change", FOLLOWED.values(), ids=FOLLOWED)
def test_what_has_the_same_structure_follows_the_plan_and_is_exact(change: Change) -> None:
    planner, tree = Planner(), state()
    first = planner.flatten(tree)
    assert same(first, flatten(tree))
    for again in (tree, state()):
        change(again)
        followed = planner.flatten(again)
        assert followed.structure is first.structure is not None
        assert same(followed, flatten(again))


@pytest.mark.parametrize("change", DIFFERENT.values(), ids=DIFFERENT)
def test_what_has_another_structure_is_taken_apart_anew(change: Change) -> None:
    first = state()
    for again in (first, state()):
        planner = Planner()
        before = planner.flatten(first)
        change(again)
        changed = planner.flatten(again)
        assert changed.structure is not before.structure
        assert same(changed, flatten(again))
        assert same(planner.flatten(again), flatten(again)), "and the one after it"
        back = state()
        assert same(planner.flatten(back), flatten(back)), "and the way back"
        first = state()


@pytest.mark.parametrize(
    "names", [["layer.weight"], ["buffer"], ["layer.weight", "layer.bias", "buffer", "empty"], ["?"]]
)
def test_what_lies_apart_follows_the_plan_in_the_same_order(names: list[str]) -> None:
    planner, tree, apart = Planner(), state(), {"model": names}
    first = planner.flatten(tree, apart)
    assert list(first.tensors.get("model.frozen", ())) == [name for name in names if name != "?"]
    again = planner.flatten(other := state(), dict(apart))
    assert again.structure is first.structure
    assert same(first, flatten(tree, apart))
    assert same(again, flatten(other, apart))
    assert [[*named] for named in again.tensors.values()] == [[*named] for named in first.tensors.values()]
    assert list(again.tensors) == list(first.tensors)
    for less in ({}, {"optimizer": names}, None):
        assert same(planner.flatten(other, less), flatten(other, less))


def test_what_lies_apart_is_told_by_its_place_at_the_root_alone() -> None:
    tree = {"s": {"w": torch.ones(1), "inner": {"w": torch.ones(2)}, "tied": None}, "t": {"w": torch.ones(3)}}
    tree["s"]["tied"] = tree["s"]["w"]
    flat = flatten(tree, {"s": ["w"]})
    assert {file: list(named) for file, named in flat.tensors.items()} == {
        "s": ["inner.w"],
        "s.frozen": ["w"],
        "t": ["w"],
    }
    assert flat.values["s"]["tied"] == flat.values["s"]["w"] == {"$tensor": ["s.frozen", "w"]}


def test_names_depend_on_what_came_before_and_stay_the_same() -> None:
    tree: dict[str, Any] = {"s": {"a": {"b.c": torch.ones(1)}, "a.b": {"c": torch.ones(2)}, "x": 3}}
    planner = Planner()
    assert list(planner.flatten(tree).tensors["s"]) == ["a.b.c", "a.b.c~2"]
    assert list(planner.flatten(tree).tensors["s"]) == ["a.b.c", "a.b.c~2"]
    del tree["s"]["a"]
    assert list(planner.flatten(tree).tensors["s"]) == ["a.b.c"]


def test_ties_that_stay_are_followed_and_stored_once() -> None:
    planner, tree = Planner(), state()
    tie(tree)
    first = planner.flatten(tree)
    assert "state.1.exp_avg" not in first.tensors["optimizer"]
    again = planner.flatten(tree)
    assert again.structure is first.structure
    assert same(again, flatten(tree))
    tree["optimizer"]["state"][1]["exp_avg"] = torch.ones(3, 4)
    assert "state.1.exp_avg" in planner.flatten(tree).tensors["optimizer"]


HOLDS_ITSELF: list[Any] = [1]
HOLDS_ITSELF.append(HOLDS_ITSELF)


@pytest.mark.parametrize("bad", [object(), torch.eye(3).to_sparse(), torch.ones(2, device="meta"), HOLDS_ITSELF])
def test_a_value_without_a_safe_form_is_refused_wherever_it_turns_up(bad: object) -> None:
    for path in ("loop/generator", "loop/position", "words/a/x"):
        planner, tree = Planner(), state()
        planner.flatten(tree)
        put(path, lambda: bad)(tree)
        with pytest.raises(UnsafeValueError):
            planner.flatten(tree)
        good = state()
        assert same(planner.flatten(good), flatten(good)), "and the next state is taken apart as ever"


class Subclass(torch.Tensor):
    """Has meaning that plain bytes would lose."""


def test_a_tensor_of_another_class_in_the_place_of_a_plain_one_is_refused() -> None:
    for path in ("loop/generator", "words/a/x", "optimizer/state/0/step"):
        planner, tree = Planner(), state()
        planner.flatten(tree)
        shape = {"loop/generator": (8,), "words/a/x": (2,)}.get(path, ())
        put(path, lambda shape=shape: torch.ones(shape).as_subclass(Subclass))(tree)
        with pytest.raises(UnsafeValueError, match="Subclass"):
            planner.flatten(tree)


@pytest.mark.parametrize("view", [torch.Tensor.conj, torch._neg_view])
def test_a_view_that_reads_other_values_from_the_same_memory_is_not_taken_for_a_tie(view: Any) -> None:
    planner, numbers = Planner(), torch.ones(2, dtype=torch.complex64)
    for second in (numbers, view(numbers), numbers, view(numbers)):
        tree = {"s": [numbers, second]}
        assert same(planner.flatten(tree), flatten(tree))


def test_a_place_of_another_type_is_another_place() -> None:
    planner = Planner()
    for key in (1, True, "1", 1):
        tree = {"s": {key: [torch.ones(2)]}}
        assert same(planner.flatten(tree), flatten(tree))


def test_a_key_of_another_type_is_another_key() -> None:
    planner = Planner()
    for key in ("y", Word.Y, "y"):
        tree = {"s": {key: torch.ones(2)}, "t": {"a": {key: torch.ones(2)}}, "u": {key: {"y": torch.ones(3)}}}
        assert same(planner.flatten(tree), flatten(tree))


def test_values_that_stay_are_the_very_same_objects_so_that_they_need_not_be_written_down_again() -> None:
    planner = Planner()
    first, again = planner.flatten(state()).values, planner.flatten(state()).values
    stays = {section: again[section] is first[section] for section in first}
    assert stays == {**dict.fromkeys(first, True), "loop": False}, "a list with tensors in it is encoded afresh"
    for _ in range(2):
        tree = state()
        settings(lr=0.3)(tree)
        changed = planner.flatten(tree).values
        assert changed["optimizer"] is not first["optimizer"]
        assert changed["optimizer"]["param_groups"] == [{"lr": 0.3, "params": [0, 1]}]
        assert changed["gradients"] is first["gradients"]
    assert planner.flatten(state()).values["optimizer"] == first["optimizer"], "also when it changes back"


def test_values_that_only_look_alike_are_told_apart() -> None:
    for alike in ([b"1", bytearray(b"1")], [1, True, 1.0, np.float64(1)], ["a", Word.A], [0.0, -0.0], [(1,), [1]]):
        planner = Planner()
        for value in alike + alike:
            tree = {"s": {"values": [value], "w": torch.ones(2)}}
            assert same(planner.flatten(tree), flatten(tree))


def test_plain_values_at_an_unusual_place_do_not_keep_the_rest_from_being_planned_with() -> None:
    planner, tree = Planner(), {"s": {"w": torch.ones(2), None: [1, 2], (1, 2): {"a": 3}}}
    first, again = planner.flatten(tree), planner.flatten(tree)
    assert again.structure is first.structure is not None
    assert same(again, flatten(tree))


def test_a_plan_keeps_no_tensor_alive() -> None:
    planner, tree = Planner(), state()
    planner.flatten(tree)
    planner.flatten(tree)
    gone = weakref.ref(tree["model"]["buffer"])
    del tree
    assert gone() is None


def test_places_of_unusual_keys_are_not_planned_with() -> None:
    planner, tree = Planner(), {"s": {(1, 2): torch.ones(2), "x": {None: torch.ones(3)}}}
    assert planner.flatten(tree).structure is None
    assert same(planner.flatten(tree), flatten(tree))


def test_views_that_negate_or_conjugate_are_not_tied_to_what_they_view() -> None:
    numbers = torch.randn(3, dtype=torch.complex64)
    flat = flatten({"s": [numbers, numbers.conj(), numbers.imag, numbers.conj().imag, numbers]})
    assert list(flat.tensors["s"]) == ["0", "1", "2", "3"]
    assert flat.values["s"][4] == flat.values["s"][0]
    double = flatten({"s": torch.ones(2, dtype=torch.complex128).conj()})
    assert torch.equal(double.tensors["s"]["value"], torch.tensor([[1.0, -0.0]] * 2, dtype=torch.float64))


def test_what_is_made_once_is_not_walked_again_and_comes_out_the_same() -> None:
    planner, tree = Planner(), state()
    once = ("loop", "optimizer")
    planner.flatten(tree, made_once=once)
    first = planner.flatten(tree, made_once=once)  # from here on there is a plan, and what to keep is known
    again = planner.flatten(tree, made_once=once)
    assert same(again, flatten(tree))
    assert again.structure is first.structure
    assert all(again.values[name] is first.values[name] for name in once)
    tree["loop"]["position"] = 4  # against what was said
    assert planner.flatten(tree, made_once=once).values["loop"]["position"] == 3
    assert planner.flatten(tree).values["loop"]["position"] == 4
    assert planner.flatten(tree, made_once=once).values["loop"]["position"] == 4


def test_another_object_in_the_place_of_what_was_made_once_is_walked() -> None:
    planner, tree = Planner(), state()
    for _ in range(3):
        planner.flatten(tree, made_once=["loop"])
    other = state()
    other["loop"]["position"] = 7
    found = planner.flatten({**tree, "loop": other["loop"]}, made_once=["loop"])
    assert same(found, flatten({**tree, "loop": other["loop"]}))
    with_more = {**tree, "loop": {**other["loop"], "more": torch.ones(2)}}
    assert same(planner.flatten(with_more, made_once=["loop"]), flatten(with_more))
    tree["loop"]["generator"].set_(torch.ones(5))  # its bytes may change, and were they another shape, it is seen
    assert same(planner.flatten(tree, made_once=["loop"]), flatten(tree))


def test_beside_an_entry_that_is_another_those_made_once_are_not_walked_again() -> None:
    planner, tree = Planner(), state()
    for _ in range(3):
        planner.flatten(tree, made_once=["optimizer"])
    moments = tree["optimizer"]["state"]
    other = {**tree, "optimizer": {"state": moments, "param_groups": [{"lr": 0.2, "params": [0, 1]}]}}
    found = planner.flatten(other, made_once=["optimizer"])
    assert same(found, flatten(other))
    assert planner.flatten(tree, made_once=["optimizer"]).structure is found.structure
    before, moments[0]["step"] = moments[0]["step"], torch.tensor(2.0)  # against what was said
    assert planner.flatten(other, made_once=["optimizer"]).tensors["optimizer"]["state.0.step"] is before
    again = {**other, "optimizer": {**other["optimizer"], "state": dict(moments)}}
    assert same(planner.flatten(again, made_once=["optimizer"]), flatten(again))
    assert same(planner.flatten(tree), flatten(tree))

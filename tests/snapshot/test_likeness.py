"""Tensors are alike in all that names, references and encodings depend on: asked at once, and one by one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from resumable_trainer.snapshot import likeness
from resumable_trainer.snapshot.likeness import Likeness
from resumable_trainer.snapshot.plan import Planner
from resumable_trainer.snapshot.tree import Plain, flatten

if TYPE_CHECKING:
    from collections.abc import Callable


def usual() -> torch.Tensor:
    return torch.zeros(3, 4)


def in_inference() -> torch.Tensor:
    with torch.inference_mode():
        return torch.zeros(3, 4)


ALIKE: dict[str, Callable[[], torch.Tensor]] = {
    "another of the kind": usual,
    "that is trained": lambda: torch.zeros(3, 4, requires_grad=True),
    "a parameter": lambda: nn.Parameter(torch.zeros(3, 4)),
    "made in inference": in_inference,
    "a view of a larger one": lambda: torch.zeros(6, 4)[3:],
}
OTHERS: dict[str, Callable[[], torch.Tensor]] = {
    "more rows": lambda: torch.zeros(4, 4),
    "as many numbers in other rows": lambda: torch.zeros(4, 3),
    "one dimension more": lambda: torch.zeros(3, 4, 1),
    "another dtype": lambda: torch.zeros(3, 4, dtype=torch.float64),
    "another dtype of the same size": lambda: torch.zeros(3, 4, dtype=torch.int32),
    "column by column": lambda: torch.zeros(4, 3).t(),
    "with gaps": lambda: torch.zeros(3, 8)[:, ::2],
    "on another device": lambda: torch.zeros(3, 4, device="meta"),
    "negated when it is read": lambda: torch.zeros(3, 4, dtype=torch.complex64).conj().imag,
}


@pytest.fixture(params=["at once", "one by one"])
def asked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether torch is asked about all tensors in one call."""
    if request.param == "one by one":
        monkeypatch.setattr(likeness, "guard", lambda leaves: None)
    return str(request.param)


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize("make", ALIKE.values(), ids=ALIKE.keys())
def test_what_is_alike_is_found_so(make: Callable[[], torch.Tensor]) -> None:
    assert Likeness([usual(), usual()], []).holds_for([usual(), make()], [])


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS.keys())
def test_what_is_not_alike_is_found_so(make: Callable[[], torch.Tensor]) -> None:
    known = Likeness([usual(), usual()], [])
    assert not known.holds_for([usual(), make()], [])
    assert not Likeness([usual(), make()], []).holds_for([usual(), usual()], [])
    assert known.holds_for([usual(), usual()], [])


@pytest.mark.usefixtures("asked")
def test_which_share_memory_is_part_of_it() -> None:
    one, other = usual(), usual()
    apart, tied = Likeness([one, other], []), Likeness([one, one], [])
    assert not apart.holds_for([other, other], [])
    assert not tied.holds_for([one, other], [])
    assert tied.holds_for([other, other], [])


@pytest.mark.usefixtures("asked")
def test_where_it_is_said_which_are_parameters_and_trained_both_are_part_of_it() -> None:
    def of(kind: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
        return [usual(), kind()]

    def frozen() -> torch.Tensor:
        return nn.Parameter(usual(), requires_grad=False)

    def trained() -> torch.Tensor:
        return nn.Parameter(usual())

    for kind in (usual, frozen, trained):
        known = Likeness(of(kind), of(kind))
        for other in (usual, frozen, trained):
            leaves = of(other)
            assert known.holds_for(leaves, leaves) is (kind is other)


def test_torch_is_asked_in_one_call_where_it_can_be() -> None:
    assert Likeness([usual()], [])._passes_at_once([usual()])


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize("make", (ALIKE | OTHERS).values(), ids=(ALIKE | OTHERS).keys())
def test_a_module_in_which_a_tensor_was_replaced_is_taken_apart_as_if_for_the_first_time(
    make: Callable[[], torch.Tensor],
) -> None:
    planner, tree = Planner(), {"a": usual(), "b": usual(), "c": usual()}
    planner.flatten({"model": Plain(tree)}, {})
    tree["b"] = make()
    if tree["b"].device.type == "meta":
        pytest.skip("has no bytes to be saved")
    planned, anew = planner.flatten({"model": Plain(tree)}, {}), flatten({"model": Plain(tree)})
    assert planned.values == anew.values
    assert [*planned.tensors["model"]] == [*anew.tensors["model"]]
    for name, tensor in anew.tensors["model"].items():
        found = planned.tensors["model"][name]
        assert (found.shape, found.dtype, found.stride()) == (tensor.shape, tensor.dtype, tensor.stride())
        assert torch.equal(found, tensor)

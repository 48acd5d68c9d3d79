"""What the user's code holds beside the parts is seen wherever it lives."""

from __future__ import annotations

import itertools
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from resumable_trainer.proof import fingerprints
from resumable_trainer.proof.variables import Variables, _is_users

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def _no_other_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other modules of tests are a user's, too, and all that they hold: seconds for each look."""
    monkeypatch.setattr(
        "resumable_trainer.proof.variables._is_users",
        lambda module: _is_users(module) and module.__name__ == __name__,
    )


class Counted:
    total = 0


class Slotted:
    __slots__ = ("level",)

    def __init__(self) -> None:
        self.level = 0


class Warm(nn.Linear):
    heat = 1.0


def counting() -> Any:
    for number in itertools.count():  # noqa: UP028 - a local variable that moves
        yield number


def look(known: list[object], it: object, path: str = "") -> tuple[str, str]:
    """(kind, digest) of what is seen of a variable, from the function that holds it."""
    assert it is not None
    found = Variables(known).look(sys._getframe(0))
    return found[f"look.it.{path}".removesuffix(".")]


@pytest.mark.parametrize(
    ("path", "kind", "make", "move"),
    [
        ("level", "value", Slotted, lambda it: setattr(it, "level", 3)),
        ("level", "value", lambda: SimpleNamespace(level=1), lambda it: setattr(it, "level", 2)),
        ("heat", "value", lambda: Warm(2, 1), lambda it: setattr(it, "heat", 2.0)),
        ("", "iterator", counting, next),
        ("", "iterator", lambda: iter([1, 2, 3]), next),
        ("", "iterator", lambda: enumerate(zip("ab", "cd", strict=True)), next),
        ("", "iterator", lambda: itertools.islice(itertools.cycle([1, 2, 3]), 9), next),
        ("", "iterator", lambda: iter(torch.utils.data.DataLoader([1, 2, 3])), next),
        ("items()", "value", lambda: list(range(1000)), lambda it: it.reverse()),
        ("__len__()", "value", lambda: list(range(1000)), lambda it: it.append(1)),
    ],
)
def test_what_moves_is_seen_and_looking_moves_nothing(path: str, kind: str, make: Any, move: Any) -> None:
    it = make()
    known = [it] if isinstance(it, nn.Module) else []
    before = look(known, it, path)
    assert look(known, it, path) == before
    assert before[0] == kind
    move(it)
    assert look(known, it, path) != before


def test_a_class_and_a_method_show_what_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    assert look([], Slotted().__init__, "level")[0] == "value"
    before = look([], Counted, "total")
    monkeypatch.setattr(Counted, "total", 5)
    assert look([], Counted, "total") != before


def test_a_file_is_where_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "lines").write_text("1\n" * 100_000)
    with (tmp_path / "lines").open() as file:
        before = look([], file)
        file.read(50_000)
        assert look([], file) != before


ODD_TENSORS = {
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "rows": lambda: torch.eye(3).to_sparse_csr(),
    "mkldnn": lambda: torch.eye(3).to_mkldnn(),
    "meta": lambda: torch.ones(3, device="meta"),
    "conjugate": lambda: torch.ones(3, dtype=torch.complex64).conj(),
    "negative": lambda: torch.ones(3, dtype=torch.complex64).conj().imag,
    "expanded": lambda: torch.ones(1).expand(3, 4),
    "float8": lambda: torch.ones(3).to(torch.float8_e4m3fn),
    "none": lambda: torch.empty(0, 3),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("max_bytes", [fingerprints._MAX_BYTES, 4])
@pytest.mark.parametrize("name", ODD_TENSORS)
def test_no_tensor_is_too_odd_to_be_looked_at(name: str, max_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "_MAX_BYTES", max_bytes)
    assert look([], ODD_TENSORS[name]()) == look([], ODD_TENSORS[name]())
    assert look([], ODD_TENSORS[name]())[0] == "tensor"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_what_moves_in_a_nested_tensor_is_seen(layout: torch.layout) -> None:
    parts = [torch.ones(2), torch.ones(3)]
    before = look([], torch.nested.nested_tensor(parts, layout=layout))
    parts[1][2] = 2
    assert look([], torch.nested.nested_tensor(parts, layout=layout)) != before

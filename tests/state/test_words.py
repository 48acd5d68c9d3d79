"""The generators of Python and NumPy, read where they lie: always what the ordinary calls give, or not used at all."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from resumable_trainer.state import generators, words

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NUMBER = 1300  # draws, after which all words have been made anew twice


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    python, numpy, state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(state)


def ordinary() -> dict[str, Any]:
    """As the libraries give it."""
    version, numbers, gauss = random.getstate()
    return {"python": (version, numbers, gauss), "numpy": plain(np.random.get_state(legacy=False))}


def found() -> dict[str, Any]:
    captured = generators.capture_global()
    python = captured["python"]
    assert python["words"].dtype == np.uint32
    assert python["words"].flags.writeable, "torch warns of arrays that are not"
    state = (python["version"], tuple(python["words"].tolist()), python["gauss"])
    return {"python": state, "numpy": plain(captured["numpy"])}


def plain(state: Any) -> dict[str, Any]:
    assert state["state"]["key"].dtype == np.uint32
    numbers = {name: (type(value), value) for name, value in state.items() if name != "state"}
    return {**numbers, "key": state["state"]["key"].tolist(), "pos": state["state"]["pos"]}


def one_more() -> None:
    random.random()
    np.random.random()


def one_more_normal() -> None:
    """Two are made at once, so that a second call draws nothing."""
    random.gauss(0, 1)
    np.random.standard_normal()


def seeded_anew() -> None:
    random.seed(random.random())
    np.random.seed(np.random.randint(1 << 31))


def put_back() -> None:
    random.setstate((3, (*range(7, 631), 300), 0.25))
    key = np.arange(3, 627, dtype=np.uint32)
    np.random.set_state({"bit_generator": "MT19937", "state": {"key": key, "pos": 17}, "has_gauss": 1, "gauss": -0.75})


@pytest.mark.parametrize("change", [one_more, one_more_normal, seeded_anew, put_back])
def test_it_is_what_the_libraries_give(change: Callable[[], None]) -> None:
    assert words.python_words() is not None
    assert words.numpy_words() is not None
    for number in range(NUMBER):
        change()
        if number % 97 < 3:
            assert found() == ordinary()


def test_reading_draws_nothing_and_what_was_read_does_not_change() -> None:
    first = generators.capture_global()
    before, kept = ordinary(), (first["python"]["words"].copy(), first["numpy"]["state"]["key"].copy())
    for _ in range(NUMBER):
        one_more()
    assert np.array_equal(first["python"]["words"], kept[0])
    assert np.array_equal(first["numpy"]["state"]["key"], kept[1])
    generators.restore_global(first)
    assert ordinary() == before


def numbers_of(tree: Any) -> Any:
    if isinstance(tree, torch.Tensor):
        return tree.numpy()
    return tree["words"] if "words" in tree else tree["state"]["key"]


@pytest.mark.parametrize(
    ("draw", "changed"),
    [
        (random.random, ["python"]),
        (lambda: random.gauss(0, 1), ["python"]),
        (np.random.random, ["numpy"]),
        (np.random.standard_normal, ["numpy"]),
        (lambda: torch.rand(1), ["torch"]),
        (lambda: np.random.seed(5), ["numpy"]),
        (lambda: random.seed(5), ["python"]),
        (put_back, ["python", "numpy"]),
    ],
)
def test_the_state_of_before_is_given_again_only_if_it_still_is_the_state(
    draw: Callable[[], object], changed: list[str]
) -> None:
    random.gauss(0, 1)
    np.random.standard_normal()  # each has one in hand: the next is given, and changes nothing else
    before = generators.capture_global()
    assert generators.capture_global(before) is before
    draw()
    after = generators.capture_global(before)
    assert after is not before
    assert [name for name in before if after[name] is not before[name]] == changed
    for name in changed:
        assert not np.shares_memory(numbers_of(after[name]), numbers_of(before[name]))
    assert generators.capture_global(after) is after
    assert generators.capture_global(before) is not before
    assert found() == ordinary()


def test_one_that_another_capture_has_followed_is_not_given_again() -> None:
    """Where both are saved, a resumed run would have two objects."""
    before = generators.capture_global()
    other = generators.capture_global()
    assert generators.capture_global(before) is not before
    assert other is not before


def test_another_source_below_numpys_generator_is_found_out() -> None:
    mine = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.MT19937(7))
        assert found() == ordinary()
        np.random.random()
        assert found() == ordinary()
        np.random.set_bit_generator(np.random.PCG64(7))
        assert words.numpy_words() is None
        captured = generators.capture_global()["numpy"]
        expected = np.random.random()
        np.random.set_state(captured)
        assert np.random.random() == expected
    finally:
        np.random.set_bit_generator(mine)
    assert found() == ordinary()


def test_a_layout_that_is_not_as_expected_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = ordinary()
    real = words._words_at
    for function in (words._python_words, words._numpy_words, words._python_is_as_expected, words._place_of_gauss):
        function.cache_clear()
    monkeypatch.setattr(words, "_words_at", lambda address, length: real(address + 4, length))
    assert words.python_words() is None
    assert words.numpy_words() is None
    assert found() == ordinary() == expected
    before = generators.capture_global()
    assert generators.capture_global(before) is not before
    monkeypatch.undo()
    for function in (words._python_words, words._numpy_words, words._python_is_as_expected, words._place_of_gauss):
        function.cache_clear()
    assert words.python_words() is not None


def test_a_pair_of_normal_numbers_that_is_not_to_be_found_is_not_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    words._numpy_words.cache_clear()
    words._place_of_gauss.cache_clear()
    monkeypatch.setattr(words.ctypes, "string_at", lambda address, length: bytes(length))
    assert words.numpy_words() is None
    assert found() == ordinary()
    monkeypatch.undo()
    words._numpy_words.cache_clear()
    words._place_of_gauss.cache_clear()
    assert words.numpy_words() is not None


def test_generators_of_other_classes_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(random.Random):
        pass

    own = Own(3)
    monkeypatch.setattr(random, "getstate", own.getstate)
    assert words.python_words() is None
    assert found()["python"] == own.getstate()
    monkeypatch.setattr(np.random, "get_state", lambda legacy=True: {"some": "other"})
    assert words.numpy_words() is None


def test_a_class_that_has_no_room_for_the_words_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    words._python_is_as_expected.cache_clear()

    class Small:
        __basicsize__ = 64

        def __init__(self, seed: int) -> None: ...

    monkeypatch.setattr(words.random, "Random", Small)
    assert not words._python_is_as_expected()
    words._python_is_as_expected.cache_clear()


def test_generators_of_accelerators_that_are_gone_are_not_given_again() -> None:
    now = generators.capture_global()
    before = {**now, "accelerators": {"elsewhere": [torch.zeros(3, dtype=torch.uint8)]}}
    assert list(generators.capture_global(before)["accelerators"]) == list(now["accelerators"])

"""Generators are seeded apart, and put back to the bit."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Subset

from resumable_trainer.data import numpy_state
from resumable_trainer.data.randomness import (
    each_apart,
    generators_of_dataset,
    isolated_generators,
    own_generators,
    seed_all,
    seed_generators,
)


def global_draws() -> tuple[object, ...]:
    """What the global generators give next: the second of a pair of normal draws comes from NumPy's cache."""
    return random.random(), random.gauss(0, 1), np.random.randn(), np.random.rand(), torch.rand(2).tolist()


def draws_of(generator: object) -> float:
    if isinstance(generator, torch.Generator):
        return torch.rand((), generator=generator).item()
    return generator.random()  # type: ignore[attr-defined]


def all_kinds() -> list[object]:
    return [torch.Generator(), np.random.default_rng(0), np.random.RandomState(0), random.Random(0)]


@pytest.mark.parametrize("normals", [0, 1], ids=["whole pairs of normals", "half a pair of normals"])
@pytest.mark.parametrize("seed", [None, 5])
def test_global_generators_are_afterwards_as_before(normals, seed):
    expected, found = [], []
    for results, isolate in ((expected, False), (found, True)):
        seed_all(123)
        for _ in range(normals):
            np.random.randn()
        if isolate:
            with isolated_generators(seed=seed):
                global_draws()
                np.random.randn(3)
        results.append(global_draws())
    assert found == expected


def test_global_generators_are_put_back_after_an_error_too():
    seed_all(1)
    expected = global_draws()
    seed_all(1)
    with pytest.raises(ZeroDivisionError), isolated_generators(seed=2):
        int(random.random()) // int(np.random.rand())
    assert global_draws() == expected


def test_without_a_seed_generators_go_on_inside_from_where_they_are():
    seed_all(1)
    np.random.randn()
    expected = global_draws()
    seed_all(1)
    np.random.randn()
    with isolated_generators():
        assert global_draws() == expected
    assert global_draws() == expected


def test_isolations_nest():
    with isolated_generators(seed=1):
        np.random.rand()
        expected = np.random.rand()
    with isolated_generators(seed=1):
        np.random.rand()
        with isolated_generators(seed=2):
            np.random.rand()
        assert np.random.rand() == expected


def test_generator_objects_are_seeded_inside_and_put_back():
    own = all_kinds()
    [draws_of(generator) for generator in own]
    with isolated_generators(*own):
        expected = [draws_of(generator) for generator in own]
    inside = []
    for _ in range(2):
        with isolated_generators(*own, seed=7):
            inside.append([draws_of(generator) for generator in own])
    assert inside[0] == inside[1] != expected
    assert [draws_of(generator) for generator in own] == expected


def test_no_two_generators_draw_the_same_stream():
    seed_all(99)
    words = np.random.randint(0, 2**32, size=8, dtype=np.uint32) % 2**24
    assert words.tolist() != torch.randint(0, 2**24, (8,)).tolist()  # both would be the words of one MT19937
    pair = [torch.Generator(), torch.Generator()]
    seed_generators(pair, 5)
    assert draws_of(pair[0]) != draws_of(pair[1])


class _Holder:
    def __init__(self, **attributes: object) -> None:
        self.__dict__.update(attributes)

    def __len__(self) -> int:
        return 4


def test_own_generators_are_found_once_and_global_ones_are_not_among_them():
    shared, *others = all_kinds()
    holder = _Holder(a=shared, b=others, c=torch.default_generator, d=np.random.mtrand._rand, e="text")
    assert own_generators(holder, _Holder(again=shared, other=others[0])) == [shared, others[0]]
    assert own_generators(3, None, "text") == []


def test_generators_of_wrapped_datasets_and_of_transforms_are_found():
    first, second, third, fourth = all_kinds()
    inner = _Holder(rng=first, transform=_Holder(rng=second, transforms=[_Holder(rng=third)]))
    concatenated = ConcatDataset([Subset(inner, [0, 1]), _Holder(rng=fourth)])
    found = generators_of_dataset(concatenated)
    assert {id(generator) for generator in found} == {id(g) for g in (first, second, third, fourth)}


def test_a_dataset_that_refers_to_itself_is_walked_once():
    holder = _Holder(rng=random.Random(0))
    holder.dataset = holder
    assert generators_of_dataset(holder) == [holder.rng]


def test_items_made_apart_depend_on_their_number_and_not_on_what_is_drawn_between_them():
    def items():
        while True:
            yield global_draws()

    whole = each_apart(items(), 3)
    expected = [next(whole) for _ in range(5)]
    tail = each_apart(items(), 3, first=2)
    found = []
    for _ in range(3):
        global_draws()
        found.append(next(tail))
    assert found == expected[2:]


def test_numpys_words_are_where_the_fast_way_looks_for_them():
    assert numpy_state._words_are_where_we_look()


def test_a_bit_generator_that_the_user_has_set_is_kept_too():
    original = np.random.mtrand.get_bit_generator()
    np.random.mtrand.set_bit_generator(np.random.MT19937(1).jumped())
    try:
        np.random.randn()
        with numpy_state.numpy_kept():
            expected = np.random.randn(), np.random.rand()
        with isolated_generators(seed=3):
            np.random.randn(3)
        assert (np.random.randn(), np.random.rand()) == expected
    finally:
        np.random.mtrand.set_bit_generator(original)

"""Seeds and permutations are pure functions of their arguments."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resumable_trainer.data.order import mix, permutation

_PARTS = st.lists(st.one_of(st.integers(), st.text()), max_size=5)


@given(_PARTS, _PARTS)
def test_different_parts_give_different_seeds_of_63_bits(left, right):
    assert 0 <= mix(*left) < 2**63
    assert (mix(*left) == mix(*right)) == (left == right)


@pytest.mark.parametrize(("left", "right"), [((1,), ("1",)), (("a", "b"), ("ab",)), ((1, 23), (12, 3)), ((), ("",))])
def test_parts_that_look_alike_are_told_apart(left, right):
    assert mix(*left) != mix(*right)


def test_numpy_integers_count_as_python_integers():
    assert mix(np.int64(7), "train", np.uint8(3)) == mix(7, "train", 3)


def test_the_same_seed_comes_out_in_every_process_and_version():
    # Frozen: a change here changes the order of data of every run that exists.
    assert mix(0, "train", 0) == 0x5614B892A5BF25F3
    code = "from resumable_trainer.data.order import mix; print(mix(0, 'train', 0))"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(there.stdout) == mix(0, "train", 0)


def test_a_permutation_holds_each_index_once_and_touches_no_global_generator():
    before = torch.default_generator.get_state()
    order = permutation(1000, seed=0, epoch=0)
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(1000))
    assert torch.equal(before, torch.default_generator.get_state())


def test_order_differs_between_seeds_epochs_and_salts_and_is_the_same_for_the_same():
    of = {
        permutation(50, seed=seed, epoch=epoch, salt=salt).numpy().tobytes()
        for seed in (0, 1)
        for epoch in (0, 1, 2)
        for salt in ("train", "evaluating")
    }
    assert len(of) == 12
    assert torch.equal(permutation(50, seed=1, epoch=2), permutation(50, seed=1, epoch=2))

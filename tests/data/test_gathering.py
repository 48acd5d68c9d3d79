"""Batches of tensors: order, content, shapes of batches, and what they cost in copies."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from batch_bytes import all_bytes, as_bytes
from torch.utils.data import DataLoader, Subset, TensorDataset

from resumable_trainer.data import gather
from resumable_trainer.data.sources import source_of
from resumable_trainer.errors import SettingsError

X, Y = torch.randn(37, 8, generator=torch.Generator().manual_seed(0)), torch.arange(37)
DATA = {
    "tuple": (X, Y),
    "list": [X, Y],
    "three tensors": (X, Y, X[:, 0].double()),
    "one tensor": X,
    "TensorDataset": TensorDataset(X, Y),
    "not contiguous": (X.t().contiguous().t(), Y),
}
SETTINGS = [
    {"shuffle": shuffle, "drop_last": drop_last, "batch_size": batch_size}
    for shuffle, drop_last, batch_size in itertools.product((False, True), (False, True), (1, 5, 37, 100))
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("data", DATA.values(), ids=DATA.keys())
def test_batches_from_any_start_are_the_tail_of_the_epoch(data, settings):
    source = source_of(data, seed=1, **settings)
    whole = all_bytes(source.batches(epoch=3))
    assert len(whole) == source.num_batches()
    for start in (0, 1, len(whole) // 2, len(whole), len(whole) + 3):
        assert all_bytes(source_of(data, seed=1, **settings).batches(epoch=3, start=start)) == whole[start:]


@pytest.mark.parametrize("drop_last", [False, True])
def test_each_sample_comes_once_with_its_own_label(drop_last):
    batches = list(source_of((X, Y), seed=0, batch_size=5, shuffle=True, drop_last=drop_last).batches(epoch=0))
    seen = torch.cat([labels for _, labels in batches])
    assert [len(labels) for _, labels in batches] == [5] * 7 + ([] if drop_last else [2])
    assert len(set(seen.tolist())) == len(seen)
    assert torch.equal(torch.cat([rows for rows, _ in batches]), X[seen])


def test_without_shuffle_samples_come_in_order_in_every_epoch():
    for epoch in (0, 4):
        rows = torch.cat([rows for rows, _ in source_of((X, Y), seed=9, batch_size=5).batches(epoch=epoch)])
        assert torch.equal(rows, X)


def test_shuffled_order_differs_between_epochs_seeds_and_salts():
    def order(**how):
        epoch = how.pop("epoch", 0)
        source = source_of(Y, **{"seed": 0, "batch_size": 37, "shuffle": True, **how})
        return next(source.batches(epoch=epoch)).numpy().tobytes()

    assert len({order(), order(epoch=1), order(seed=1), order(salt="evaluating")}) == 4
    assert order(epoch=1) == order(epoch=1)


def test_order_does_not_depend_on_the_block_in_which_row_numbers_are_cut(monkeypatch):
    whole = all_bytes(source_of((X, Y), seed=0, batch_size=2, shuffle=True).batches(epoch=0))
    monkeypatch.setattr(gather, "_BLOCK", 3)
    cut = source_of((X, Y), seed=0, batch_size=2, shuffle=True)
    assert all_bytes(cut.batches(epoch=0)) == whole
    assert all_bytes(cut.batches(epoch=0, start=7)) == whole[7:]


@pytest.mark.parametrize(
    ("data", "kind"), [((X, Y), tuple), ([X, Y], tuple), (TensorDataset(X, Y), tuple), (X, torch.Tensor)]
)
def test_a_batch_has_the_shape_of_what_was_given(data, kind):
    assert type(next(source_of(data, seed=0, batch_size=2).batches(epoch=0))) is kind


@pytest.mark.parametrize("shuffle", [False, True])
def test_changing_a_batch_in_place_leaves_the_data_alone(shuffle):
    data = X.clone()
    for batch in source_of(data, seed=0, batch_size=5, shuffle=shuffle).batches(epoch=0):
        batch.zero_()
    assert as_bytes(data) == as_bytes(X)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.uint16, torch.bfloat16, torch.complex64, torch.float8_e4m3fn]
)
def test_any_dtype_is_gathered_and_fingerprinted(dtype):
    data = torch.arange(11).to(torch.float32).to(dtype)
    source = source_of(data, seed=0, batch_size=4)
    assert as_bytes(torch.cat(list(source.batches(epoch=0)))) == as_bytes(data)
    assert source.fingerprint()["dtypes"] == [str(dtype)]


def test_no_global_generator_is_touched():
    before = torch.default_generator.get_state()
    list(source_of((X, Y), seed=0, batch_size=5, shuffle=True).batches(epoch=0))
    assert torch.equal(before, torch.default_generator.get_state())


def test_an_iterator_can_be_closed_early():
    batches = source_of((X, Y), seed=0, batch_size=5).batches(epoch=0)
    next(batches)
    batches.close()
    assert next(batches, None) is None


def test_the_banner_and_the_fingerprint_say_what_the_data_are():
    source = source_of((X, Y), seed=0, batch_size=5)
    assert source.describe() == "37 samples, 8 batches of 5"
    other = source_of((X + 1, Y), seed=0, batch_size=5)
    assert source.fingerprint()["content"] != other.fingerprint()["content"]
    assert source.fingerprint() == source_of((X.clone(), Y), seed=5, batch_size=5).fingerprint()


def test_weight_is_the_number_of_samples():
    for data in (X, (X, Y)):
        source = source_of(data, seed=0, batch_size=5)
        assert [source.weight(batch) for batch in source.batches(epoch=0)] == [5] * 7 + [2]


@pytest.mark.parametrize(
    ("data", "settings", "words"),
    [
        ((X, Y), {}, "batch_size"),
        ((X, Y[:3]), {"batch_size": 5}, "[37, 3] samples"),
        ((X, torch.tensor(1.0)), {"batch_size": 5}, "no dimensions"),
        (X[:0], {"batch_size": 5}, "no samples"),
        (X, {"batch_size": 0}, "batch_size is 0"),
        (X, {"batch_size": True}, "batch_size is True"),
        ((X, Y[:3]), {"batch_size": -1}, "batch_size is -1"),
    ],
)
def test_data_that_give_no_batches_are_refused_by_name(data, settings, words):
    with pytest.raises(SettingsError) as caught:
        source_of(data, seed=0, **settings)
    assert words in str(caught.value)


def _loader(**how):
    return DataLoader(TensorDataset(X, Y), batch_size=5, **how)


LOADERS = {
    "in order": {},
    "shuffled": {"shuffle": True},
    "short last batch dropped": {"shuffle": True, "drop_last": True},
    "with a generator": {"shuffle": True, "generator": torch.Generator()},
    "from a list of indices, some negative": {"sampler": [3, -1, 0, 36, -37, 7, 7]},
}


def _picky_collate(samples):
    """Not the default collate function, so that nothing is gathered."""
    return torch.utils.data.default_collate(samples)


@pytest.mark.parametrize("how", LOADERS.values(), ids=LOADERS.keys())
def test_gathering_stands_in_for_a_loader_to_the_byte(how):
    gathering = source_of(_loader(**how), seed=3)
    loading = source_of(_loader(**how, collate_fn=_picky_collate), seed=3)
    assert type(gathering) is not type(loading)
    whole = all_bytes(loading.batches(epoch=2))
    assert all_bytes(gathering.batches(epoch=2)) == whole
    assert all_bytes(gathering.batches(epoch=2, start=1)) == whole[1:]
    assert gathering.fingerprint() == loading.fingerprint()


def test_gathering_stands_in_for_a_loader_over_a_subset_of_a_subset():
    def source(**how):
        outer = Subset(Subset(TensorDataset(X, Y), [*range(30, 10, -1), -1]), np.array([1, 3, 5, 20, -2]))
        return source_of(DataLoader(outer, 2, shuffle=True, **how), seed=3)

    gathering, loading = source(), source(collate_fn=_picky_collate)
    assert type(gathering) is not type(loading)
    assert all_bytes(gathering.batches(epoch=2)) == all_bytes(loading.batches(epoch=2))
    assert gathering.fingerprint() == loading.fingerprint()


def test_a_sampler_that_names_a_row_beyond_the_data_is_an_error():
    with pytest.raises(IndexError):
        list(source_of(_loader(sampler=[0, 37]), seed=0).batches(epoch=0))

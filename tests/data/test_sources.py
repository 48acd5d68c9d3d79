"""Sequences, iterables, and telling kinds of data apart."""

from __future__ import annotations

import itertools
import random
from collections import UserDict

import numpy as np
import pytest
import torch
from batch_bytes import all_bytes
from torch.utils.data import DataLoader, Dataset, TensorDataset

from resumable_trainer.data.gather import TensorSource
from resumable_trainer.data.loader import GatheringSource, LoaderSource, StreamSource
from resumable_trainer.data.sequences import IterableSource, SequenceSource, StatefulSource
from resumable_trainer.data.sources import source_of
from resumable_trainer.data.stateless import num_samples
from resumable_trainer.errors import SettingsError

X = torch.arange(12.0)


class Drawing:
    """Makes batches when it is asked, from its own generator and the global ones."""

    def __init__(self, number=9):
        self.number = number
        self.made = 0
        self.rng = np.random.default_rng(5)

    def make(self, index):
        self.made += 1
        return index, random.random(), torch.rand(2), np.random.randn(), self.rng.normal()


class DrawingSequence(Drawing):
    def __len__(self):
        return self.number

    def __getitem__(self, index):
        return self.make(index)


class DrawingIterable(Drawing):
    def __iter__(self):
        order = np.random.permutation(self.number).tolist()
        for index in order:
            yield self.make(index)


class KeepsItsPlace(Drawing):
    def __init__(self):
        super().__init__()
        self.place = 0

    def __iter__(self):
        while self.place < self.number:
            self.place += 1
            yield self.make(self.place)
        self.place = 0

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


class LoaderWithItsOwnWay(DataLoader):
    def __iter__(self):
        return (batch * 2 for batch in super().__iter__())


class OneRow(Dataset):
    def __getitem__(self, index):
        return index


ITERABLES = {
    "list": lambda: [(X, 1), (X + 1, 2), (X + 2, 3), (X, 4)],
    "list of tensors": lambda: [X, X + 1, X + 2, X],
    "range": lambda: range(7),
    "sequence": DrawingSequence,
    "iterable": DrawingIterable,
    "keeps its place": KeepsItsPlace,
    "loader with an own __iter__": lambda: LoaderWithItsOwnWay(
        TensorDataset(X), 2, collate_fn=_only_tensor, shuffle=True
    ),
}


def _only_tensor(samples):
    return torch.stack([sample for (sample,) in samples])


@pytest.mark.parametrize("make", ITERABLES.values(), ids=ITERABLES.keys())
def test_batches_from_any_start_are_the_tail_of_the_epoch_whatever_training_draws(make):
    whole = all_bytes(source_of(make(), seed=1).batches(epoch=2))
    assert len(whole) >= 4
    for start in (0, 1, len(whole) - 1, len(whole)):
        source = source_of(make(), seed=1)
        tail = source.batches(epoch=2, start=start)
        found = []
        for batch in tail:
            found += all_bytes([batch])
            torch.rand(3), random.random(), np.random.randn()
        assert found == whole[start:]


@pytest.mark.parametrize("make", ITERABLES.values(), ids=ITERABLES.keys())
def test_no_generator_is_touched_by_creating_fetching_finishing_or_leaving(make):
    def states():
        return (
            random.getstate(),
            repr(np.random.get_state(legacy=False)),
            torch.default_generator.get_state().numpy().tobytes(),
            repr(data.rng.bit_generator.state) if isinstance(data, Drawing) else None,
        )

    data = make()
    np.random.seed(0)
    np.random.randn()
    before = states()
    source = source_of(data, seed=1)
    batches = source.batches(epoch=0, start=1)
    assert states() == before
    for _ in batches:
        assert states() == before
    assert states() == before
    next(left := source.batches(epoch=1))
    left.close()
    assert states() == before


@pytest.mark.parametrize("kind", [DrawingSequence, DrawingIterable])
def test_epochs_seeds_and_salts_draw_anew(kind):
    drawn = {
        repr(all_bytes(source_of(kind(), seed=seed, salt=salt).batches(epoch=epoch)))
        for seed, epoch, salt in itertools.product((0, 1), (0, 1), ("train", "evaluating"))
    }
    assert len(drawn) == 8


def test_a_sequence_makes_no_skipped_batch_and_an_iterable_says_what_skipping_costs():
    data = DrawingSequence()
    source = source_of(data, seed=0)
    list(source.batches(epoch=0, start=6))
    assert data.made == 3
    assert source.skip_cost is None
    assert "reads and throws away every batch" in source_of(DrawingIterable(), seed=0).skip_cost


def test_an_iterable_that_keeps_its_place_goes_on_from_there_without_reading_again():
    first = source_of(KeepsItsPlace(), seed=0)
    whole = all_bytes(source_of(KeepsItsPlace(), seed=0).batches(epoch=1))
    batches = first.batches(epoch=1)
    for _ in range(4):
        next(batches)
    state = first.capture(epoch_complete=False)

    data = KeepsItsPlace()
    second = source_of(data, seed=0)
    second.restore(state)
    assert all_bytes(second.batches(epoch=1, start=4)) == whole[4:]
    assert data.made == 5
    assert second.skip_cost is None
    assert len(list(second.batches(epoch=2))) == 9


def test_one_shot_iterators_go_on_where_they_were_left():
    stream = (number for number in range(10))
    source = source_of(stream, seed=0)
    batches = source.batches(epoch=0)
    assert [next(batches), next(batches)] == [0, 1]
    batches.close()
    assert list(source.batches(epoch=1)) == list(range(2, 10))


@pytest.mark.parametrize(
    ("data", "settings", "kind"),
    [
        ((X, X), {"batch_size": 3}, TensorSource),
        ([X, X], {"batch_size": 3}, TensorSource),
        (X, {"batch_size": 3}, TensorSource),
        (TensorDataset(X), {"batch_size": 3}, TensorSource),
        ([X, X], {}, SequenceSource),
        (DataLoader(TensorDataset(X)), {}, GatheringSource),
        (DataLoader(TensorDataset(X), num_workers=1), {}, LoaderSource),
        (DataLoader(TensorDataset(X), collate_fn=_only_tensor), {}, LoaderSource),
        (DataLoader(TensorDataset(X), batch_size=None), {}, LoaderSource),
        (DataLoader([1, 2, 3]), {}, LoaderSource),
        (LoaderWithItsOwnWay(TensorDataset(X)), {}, IterableSource),
        (KeepsItsPlace(), {}, StatefulSource),
        ({1, 2}, {}, IterableSource),
        (zip([1], [2], strict=True), {}, IterableSource),
    ],
)
def test_each_kind_of_data_gets_its_source(data, settings, kind):
    assert type(source_of(data, seed=0, **settings)) is kind


def test_a_loader_over_a_stream_gets_its_source():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(range(3))

    assert type(source_of(DataLoader(Stream()), seed=0)) is StreamSource


@pytest.mark.parametrize(
    ("data", "settings", "words"),
    [
        (X, {}, "batch_size"),
        (TensorDataset(X), {}, "batch_size"),
        (DataLoader(TensorDataset(X)), {"batch_size": 3}, "DataLoader makes its own batches"),
        (DataLoader(TensorDataset(X)), {"shuffle": True}, "DataLoader makes its own batches"),
        ([1, 2], {"drop_last": True}, "list makes its own batches"),
        (OneRow(), {}, "wrap it: DataLoader"),
        (OneRow(), {"batch_size": 3}, "wrap it: DataLoader"),
        ({"x": X}, {"batch_size": 3}, "dict"),
        ({"x": X}, {}, "dict"),
        ("text", {}, "str"),
        ((np.zeros(3), np.zeros(3)), {"batch_size": 3}, "torch.from_numpy"),
        (np.zeros(3), {"batch_size": 3}, "torch.from_numpy"),
        (7, {}, "int"),
        (None, {}, "NoneType"),
    ],
)
def test_data_that_give_no_batches_are_refused_with_the_way_out(data, settings, words):
    with pytest.raises(SettingsError) as caught:
        source_of(data, seed=0, **settings)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("batch", "samples"),
    [
        (torch.zeros(10, 8), 10),
        ([torch.zeros(10, 8), torch.zeros(10)], 10),
        ((["a", "b"], torch.zeros(2, 3)), 2),
        ({"name": ["a", "b", "c"], "x": torch.zeros(3, 1)}, 3),
        (UserDict(x=np.zeros((4, 2))), 4),
        ({"deep": ({"x": torch.zeros(5)},)}, 5),
        (["a", "b", "c"], 3),
        (torch.tensor(1.0), 1),
        ((1, 2.0), 1),
        ("text", 1),
        ([], 0),
    ],
)
def test_the_weight_of_a_batch_is_its_number_of_samples_as_far_as_can_be_seen(batch, samples):
    assert num_samples(batch) == samples


def test_banners_and_fingerprints_are_plain():
    assert source_of(range(7), seed=0).describe() == "7 batches (range)"
    assert source_of(DrawingIterable(), seed=0).describe() == "DrawingIterable"
    assert source_of(range(7), seed=0).fingerprint() == {"kind": "range", "batches": 7}
    assert source_of(DrawingIterable(), seed=0).fingerprint() == {"kind": "DrawingIterable"}


class Adapter:
    """As Accelerate wraps a DataLoader: it has `state_dict` whatever it wraps, and a class that is not its own."""

    def __init__(self, loader):
        self.base_dataloader = loader

    @property
    def __class__(self):
        return self.base_dataloader.__class__

    def __iter__(self):
        yield from self.base_dataloader

    def state_dict(self):
        return self.base_dataloader.state_dict()

    def load_state_dict(self, state_dict):
        self.base_dataloader.load_state_dict(state_dict)


def test_a_wrapped_loader_that_has_a_state_in_name_alone_is_read_again_to_its_place():
    def source():
        return source_of(Adapter(DataLoader(TensorDataset(X), batch_size=3, shuffle=True)), seed=3)

    assert type(source()) is IterableSource
    whole = [batch[0].tolist() for batch in source().batches(epoch=1)]
    assert sorted(itertools.chain.from_iterable(whole)) == X.tolist()
    assert [batch[0].tolist() for batch in source().batches(epoch=1, start=2)] == whole[2:]

    class Stateful:
        def __iter__(self):
            return iter([1, 2])

        def state_dict(self):
            return {"place": 0}

        def load_state_dict(self, state):
            pass

    assert type(source_of(Adapter(Stateful()), seed=3)) is StatefulSource

"""A DataLoader, as the user wrote it: the same bytes from any start, for any number of workers."""

from __future__ import annotations

import itertools
import multiprocessing
import random
import warnings

import numpy as np
import pytest
import torch
from batch_bytes import all_bytes
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Sampler,
    Subset,
    WeightedRandomSampler,
    default_collate,
    get_worker_info,
)

from resumable_trainer.data.sources import source_of

NUM_ROWS = 23


class Rows(Dataset):
    """Counts, across processes, how often each row was read."""

    def __init__(self):
        self.reads = torch.zeros(NUM_ROWS, dtype=torch.int64).share_memory_()

    def __len__(self):
        return NUM_ROWS

    def __getitem__(self, index):
        self.reads[index] += 1
        return torch.full((3,), float(index)), index


class Augmented(Dataset):
    """Draws from every generator that there is, global ones and its own."""

    def __init__(self):
        self.torch_rng = torch.Generator()
        self.numpy_rng = np.random.default_rng()
        self.legacy_rng = np.random.RandomState()
        self.python_rng = random.Random()

    def __len__(self):
        return NUM_ROWS

    def __getitem__(self, index):
        own = [self.numpy_rng.normal(), self.legacy_rng.randn(), self.python_rng.gauss(0, 1)]
        shared = [random.gauss(0, 1), np.random.randn(), torch.randn(()).item()]
        return index, torch.tensor([*own, torch.rand((), generator=self.torch_rng).item(), *shared])


class AugmentedInBatches(Augmented):
    def __getitems__(self, indices):
        return [self[index] for index in indices]


class TorchGenerator(Sampler):
    def __init__(self):
        self.generator = torch.Generator().manual_seed(3)

    def __iter__(self):
        return iter(torch.randperm(NUM_ROWS, generator=self.generator).tolist())

    def __len__(self):
        return NUM_ROWS


class GlobalPython(TorchGenerator):
    def __iter__(self):
        return iter(random.sample(range(NUM_ROWS), NUM_ROWS))


class GlobalNumpy(TorchGenerator):
    def __iter__(self):
        return iter(np.random.permutation(NUM_ROWS))  # yields np.int64


class WithoutLength(Sampler):
    """Draws while it is asked, and ends after more lists than are drawn ahead."""

    def __iter__(self):
        for _ in range(NUM_ROWS * 7):
            yield int(torch.randint(NUM_ROWS, ()))


class Batches(Sampler):
    """Batches of random sizes, with and without a length."""

    def __iter__(self):
        rows = np.random.permutation(NUM_ROWS).tolist()
        while rows:
            size = random.randint(1, 4)
            yield rows[:size]
            del rows[:size]


class CountsEpochs(TorchGenerator):
    """Its order depends on how often it was iterated over."""

    def __init__(self):
        self.iterated = 0

    def __iter__(self):
        self.iterated += 1
        return iter([(index * (1 + self.iterated)) % NUM_ROWS for index in range(NUM_ROWS)])


class SavesItself(TorchGenerator):
    """Its order depends on state that only its state_dict shows."""

    def __init__(self):
        self.history = [1]

    def __iter__(self):
        self.history.append(self.history[-1] + 1)
        return iter([(index * self.history[-1]) % NUM_ROWS for index in range(NUM_ROWS)])

    def state_dict(self):
        return {"history": self.history}

    def load_state_dict(self, state):
        self.history = list(state["history"])


class Stream(IterableDataset):
    """Shares its numbers out among workers, and draws as it goes."""

    def __init__(self):
        self.numpy_rng = np.random.default_rng()

    def __iter__(self):
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        for number in range(first, 41, step):
            yield number, torch.rand(2), self.numpy_rng.normal(), random.random(), np.random.rand()


def draw_in_collate(samples):
    return default_collate(samples), torch.rand(2), random.random(), np.random.randn()


def own_seed(worker):
    """What people write to give workers generators of their own."""
    info = get_worker_info()
    info.dataset.numpy_rng = np.random.default_rng(info.seed)
    np.random.seed(info.seed % 2**32)


LOADERS = {
    "in order": lambda **how: DataLoader(Augmented(), batch_size=4, **how),
    "shuffled": lambda **how: DataLoader(Augmented(), batch_size=4, shuffle=True, **how),
    "drop_last": lambda **how: DataLoader(Augmented(), batch_size=4, shuffle=True, drop_last=True, **how),
    "generator": lambda **how: DataLoader(Augmented(), batch_size=4, shuffle=True, generator=torch.Generator(), **how),
    "sampler with a generator": lambda **how: DataLoader(Augmented(), 4, sampler=TorchGenerator(), **how),
    "sampler of Python's": lambda **how: DataLoader(Augmented(), 4, sampler=GlobalPython(), **how),
    "sampler of NumPy's": lambda **how: DataLoader(Augmented(), 4, sampler=GlobalNumpy(), **how),
    "weighted": lambda **how: DataLoader(
        Augmented(), 4, sampler=WeightedRandomSampler([1.0, 2.0] * 11 + [1.0], 30), **how
    ),
    "distributed": lambda **how: DataLoader(
        Augmented(), 4, sampler=DistributedSampler(Augmented(), num_replicas=2, rank=1), **how
    ),
    "sampler without length": lambda **how: DataLoader(Augmented(), 2, sampler=WithoutLength(), **how),
    "list as sampler": lambda **how: DataLoader(Augmented(), 4, sampler=[5, 4, 3, 2, 1, 5] * 3, **how),
    "batch sampler": lambda **how: DataLoader(Augmented(), batch_sampler=Batches(), **how),
    "batch sampler of torch": lambda **how: DataLoader(
        Augmented(), batch_sampler=BatchSampler(TorchGenerator(), 5, drop_last=True), **how
    ),
    "collate_fn": lambda **how: DataLoader(Augmented(), 4, shuffle=True, collate_fn=draw_in_collate, **how),
    "no batches": lambda **how: DataLoader(Augmented(), batch_size=None, shuffle=True, **how),
    "samples in batches": lambda **how: DataLoader(AugmentedInBatches(), 4, shuffle=True, **how),
    "subset": lambda **how: DataLoader(Subset(Augmented(), range(3, 20)), 4, shuffle=True, **how),
    "concatenated": lambda **how: DataLoader(ConcatDataset([Augmented(), Augmented()]), 9, shuffle=True, **how),
    "worker_init_fn": lambda **how: DataLoader(Augmented(), 4, shuffle=True, worker_init_fn=own_seed, **how),
    "pinned": lambda **how: DataLoader(Augmented(), 4, shuffle=True, pin_memory=True, **how),
}
BOTH = {"here": {}, "two workers": {"num_workers": 2}}


def batches_of(loader, *, epoch=2, start=0, seed=0):
    source = source_of(loader, seed=seed)
    try:
        return all_bytes(source.batches(epoch=epoch, start=start))
    finally:
        source.close()


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS.keys())
def test_batches_are_the_same_for_0_1_and_2_workers_and_from_any_start(make):
    whole = batches_of(make())
    assert len(whole) > 2
    assert batches_of(make(num_workers=1)) == whole
    for start, how in itertools.product((0, 1, len(whole) - 1, len(whole) + 2), BOTH.values()):
        assert batches_of(make(**how), start=start) == whole[start:]


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS.keys())
def test_epochs_and_seeds_draw_anew(make):
    assert len({repr(batches_of(make(), epoch=epoch, seed=seed)) for epoch in (0, 1) for seed in (0, 1)}) == 4


def test_persistent_workers_give_the_same_epochs_as_new_ones():
    def loader(**how):
        return DataLoader(Augmented(), 4, shuffle=True, num_workers=2, worker_init_fn=own_seed, **how)

    persistent = source_of(loader(persistent_workers=True), seed=0)
    processes = set()
    for epoch in range(3):
        assert all_bytes(persistent.batches(epoch=epoch)) == batches_of(loader(), epoch=epoch)
        processes |= {process.pid for process in multiprocessing.active_children()}
    assert len(processes) == 2
    persistent.close()
    assert not multiprocessing.active_children()


def test_persistent_workers_go_on_after_an_epoch_left_early():
    source = source_of(DataLoader(Augmented(), 4, shuffle=True, num_workers=2, persistent_workers=True), seed=0)
    left = source.batches(epoch=0)
    next(left)
    left.close()
    assert all_bytes(source.batches(epoch=1)) == batches_of(DataLoader(Augmented(), 4, shuffle=True), epoch=1)
    source.close()


def test_unordered_loaders_are_read_in_order():
    loader = DataLoader(Augmented(), 1, num_workers=2, in_order=False)
    assert batches_of(loader) == batches_of(DataLoader(Augmented(), 1))


@pytest.mark.parametrize("how", BOTH.values(), ids=BOTH.keys())
@pytest.mark.parametrize("start", [0, 3, 6])
def test_skipped_samples_are_never_read(how, start):
    dataset = Rows()
    source = source_of(DataLoader(dataset, 4, shuffle=True, **how), seed=0)
    wanted = [index for _, indices in source.batches(epoch=0) for index in indices.tolist()][4 * start :]
    dataset.reads.zero_()
    list(source.batches(epoch=0, start=start))
    assert dataset.reads.nonzero().flatten().tolist() == sorted(wanted)
    assert dataset.reads.sum() == len(wanted)


def test_an_augmentation_depends_on_the_sample_and_not_on_its_batch():
    def draws(loader):
        samples = [
            sample for batch in source_of(loader, seed=0).batches(epoch=1) for sample in zip(*batch, strict=True)
        ]
        return {int(index): values.numpy().tobytes() for index, values in samples}

    for dataset in (Augmented(), Subset(Augmented(), range(NUM_ROWS))):
        assert draws(DataLoader(dataset, 4, shuffle=True)) == draws(DataLoader(dataset, 7))
    assert len(set(draws(DataLoader(Augmented(), 4)).values())) == NUM_ROWS


def every_state(*generators):
    return (
        random.getstate(),
        repr(np.random.get_state(legacy=False)),
        torch.default_generator.get_state().numpy().tobytes(),
        [generator.get_state().numpy().tobytes() for generator in generators],
    )


@pytest.mark.parametrize("how", BOTH.values(), ids=BOTH.keys())
@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS.keys())
def test_creating_fetching_finishing_and_leaving_touch_no_generator(make, how):
    loader = make(**how)
    own = [loader.generator] if loader.generator is not None else []
    if isinstance(loader.sampler, TorchGenerator) and hasattr(loader.sampler, "generator"):
        own.append(loader.sampler.generator)
    np.random.seed(0)
    np.random.randn()
    before = every_state(*own)
    source = source_of(loader, seed=0)
    batches = source.batches(epoch=0)
    assert every_state(*own) == before
    for _ in batches:
        assert every_state(*own) == before
    assert every_state(*own) == before
    left = source.batches(epoch=1)
    next(left)
    left.close()
    source.close()
    assert every_state(*own) == before


def test_a_datasets_own_generator_is_put_back_in_the_training_process():
    dataset = Augmented()
    before = every_state(dataset.torch_rng), dataset.numpy_rng.bit_generator.state, dataset.python_rng.getstate()
    batches_of(DataLoader(dataset, 4))
    after = every_state(dataset.torch_rng), dataset.numpy_rng.bit_generator.state, dataset.python_rng.getstate()
    assert after == before


@pytest.mark.parametrize("kind", [CountsEpochs, SavesItself])
@pytest.mark.parametrize("how", BOTH.values(), ids=BOTH.keys())
def test_what_a_sampler_remembers_is_captured_and_restored(kind, how):
    def source():
        return source_of(DataLoader(Rows(), 4, sampler=kind(), **how), seed=0)

    unbroken = source()
    epochs = [all_bytes(unbroken.batches(epoch=epoch)) for epoch in range(4)]
    assert len({repr(batches) for batches in epochs}) == 4

    broken = source()
    list(broken.batches(epoch=0))
    at_end_of_epoch = broken.capture(epoch_complete=True)
    batches = broken.batches(epoch=1)
    head = [next(batches), next(batches)]
    within_epoch = broken.capture(epoch_complete=False)
    rest = list(batches)
    after_last_batch = broken.capture(epoch_complete=False)
    assert all_bytes(head + rest) == epochs[1]

    for state, epoch, start in ((at_end_of_epoch, 1, 0), (within_epoch, 1, 2), (after_last_batch, 1, 6)):
        resumed = source()
        resumed.restore(state)
        assert all_bytes(resumed.batches(epoch=epoch, start=start)) == epochs[epoch][start:]
        assert all_bytes(resumed.batches(epoch=epoch + 1)) == epochs[epoch + 1]


def test_set_epoch_is_called_for_samplers_that_have_it():
    sampler = DistributedSampler(Rows(), num_replicas=2, rank=0, shuffle=True)
    source = source_of(DataLoader(Rows(), 4, sampler=sampler), seed=0)
    list(source.batches(epoch=5))
    assert sampler.epoch == 5


def test_a_sampler_without_length_draws_anew_in_each_of_the_blocks_that_are_drawn_ahead():
    loader = DataLoader(Rows(), 1, sampler=WithoutLength())
    order = [int(index) for _, index in source_of(loader, seed=0).batches(epoch=0)]
    assert len(order) == NUM_ROWS * 7
    assert order[:32] != order[32:64]


def test_a_sampler_that_never_ends_can_be_left():
    class Endless(Sampler):
        def __iter__(self):
            return itertools.count()

    class Numbers(Rows):
        def __getitem__(self, index):
            return index

    source = source_of(DataLoader(Numbers(), 2, sampler=Endless()), seed=0)
    assert source.num_batches() is None
    batches = source.batches(epoch=0, start=100)
    assert next(batches).tolist() == [200, 201]
    batches.close()


@pytest.mark.parametrize("how", BOTH.values(), ids=BOTH.keys())
def test_an_error_in_a_dataset_comes_through_and_leaves_generators_and_no_worker(how):
    class Broken(Rows):
        def __getitem__(self, index):
            raise KeyError("broken row")

    before = every_state()
    with pytest.raises(KeyError, match="broken row"):
        list(source_of(DataLoader(Broken(), 4, **how), seed=0).batches(epoch=0))
    assert every_state() == before
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("how", [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}], ids=str)
def test_streams_are_the_same_from_any_start_and_in_any_epoch_after_a_restart(how):
    def source():
        return source_of(DataLoader(Stream(), 4, **how), seed=0)

    unbroken = source()
    epochs = []
    for epoch in range(2):
        before = every_state()
        epochs.append(all_bytes(unbroken.batches(epoch=epoch)))
        assert every_state() == before
    assert epochs[0] != epochs[1]
    for epoch, start in itertools.product((0, 1), (0, 3)):
        batches = source().batches(epoch=epoch, start=start)
        torch.rand(7)  # what training draws in between is no affair of the data's
        assert all_bytes(batches) == epochs[epoch][start:]
    assert "from its beginning" in unbroken.skip_cost
    assert not multiprocessing.active_children()


def test_the_banner_and_the_fingerprint_say_what_the_loader_is():
    source = source_of(DataLoader(Rows(), 4, shuffle=True), seed=0)
    assert source.describe() == "23 samples, 6 batches of 4"
    with_workers = source_of(DataLoader(Rows(), 4, shuffle=True, num_workers=2), seed=0)
    assert with_workers.describe() == "23 samples, 6 batches of 4, 2 workers"
    assert source.fingerprint() == with_workers.fingerprint()
    assert source.fingerprint() != source_of(DataLoader(Rows(), 4), seed=0).fingerprint()
    assert source_of(DataLoader(Stream(), 4), seed=0).describe() == "batches of 4, read from the beginning"
    assert source_of(DataLoader(Rows(), 4, sampler=WithoutLength()), seed=0).describe() == "23 samples, batches of 4"


def test_too_many_workers_are_warned_of_once_by_the_users_own_loader():
    with pytest.warns(UserWarning, match="This DataLoader will create"):
        loader = DataLoader(Rows(), 4, num_workers=65)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source_of(loader, seed=0)

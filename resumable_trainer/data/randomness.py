"""Randomness inside data: seeded per sample, and kept apart from the training's own.

Costs measured on 2 cores: seeding all three global generators 7 us; keeping and putting back their
states 20 us, most of it for Python's. That is paid once per batch fetched in the training process,
never with workers and never for tensors.
"""

from __future__ import annotations

import contextlib
import random
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from resumable_trainer.data.numpy_state import numpy_apart, numpy_kept
from resumable_trainer.data.order import mix

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_KINDS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_INNER = ("dataset", "datasets", "transform", "transforms", "target_transform")


def seed_all(value: int) -> None:
    """Seed the global generators of Python, NumPy (legacy) and torch on the CPU.

    Not `torch.manual_seed`, which visits every device and costs a hundred times as much.

    Args:
        value: A seed of 63 bits, from `mix`.
    """
    random.seed(value)
    np.random.seed(_other_half(value))
    torch.default_generator.manual_seed(value)


def seed_generators(generators: Iterable[Any], value: int) -> None:
    """Seed generator objects, each in its own way and with a stream of its own."""
    for number, generator in enumerate(generators):
        own = mix(value, number)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(own)
        elif isinstance(generator, np.random.Generator):
            generator.bit_generator.state = type(generator.bit_generator)(own).state
        elif isinstance(generator, np.random.RandomState):
            generator.seed(_other_half(own))
        else:
            generator.seed(own)


def _other_half(value: int) -> int:
    """Torch and NumPy both run MT19937 from the low 32 bits: with the same ones they would draw the same words."""
    return value >> 31


class Switching:
    """Whether generators are being put aside or back just now: no moment to break off."""

    now = False


switching = Switching()


@contextlib.contextmanager
def isolated_generators(*generators: Any, seed: int | None = None) -> Iterator[None]:
    """Whatever is drawn or seeded inside, generators are afterwards as they were before.

    Args:
        generators: Generator objects to keep, beside the three global ones.
        seed: Seeds all of them inside; without it they go on inside from where they are.
    """
    python, cpu = random.getstate(), torch.default_generator.get_state()
    own = [(generator, _get(generator)) for generator in generators]
    switching.now = True
    try:
        with numpy_kept() if seed is None else numpy_apart():
            try:
                if seed is not None:
                    seed_all(seed)
                    seed_generators(generators, seed)
                switching.now = False
                yield
            finally:
                switching.now = True
                random.setstate(python)
                torch.default_generator.set_state(cpu)
                for generator, state in own:
                    _set(generator, state)
    finally:
        switching.now = False


def each_apart(items: Iterable[Any], seed: int, *generators: Any, first: int = 0) -> Iterator[Any]:
    """Items, each made with the generators seeded from `seed` and its number, and put back afterwards.

    Args:
        items: What makes the items, when it is asked.
        seed: The epoch's seed.
        generators: Generator objects to seed and put back, beside the three global ones.
        first: Number of the first item.
    """
    iterator = iter(items)
    for number in count(first):
        with isolated_generators(*generators, seed=mix(seed, number)):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item


def own_generators(*owners: object) -> list[Any]:
    """Generators that objects keep in their attributes; the global ones are not among them."""
    found: list[Any] = []
    for owner in owners:
        for value in getattr(owner, "__dict__", {}).values():
            if isinstance(value, _KINDS) and not _among(value, found):
                found.append(value)
    return [generator for generator in found if not _is_global(generator)]


def generators_of_dataset(dataset: object) -> list[Any]:
    """Generators of a dataset, of the datasets that it wraps (Subset, ConcatDataset) and of their transforms."""
    owners: list[object] = [dataset]
    for owner in owners:  # grows while it is walked
        attributes = getattr(owner, "__dict__", {})
        for name in _INNER:
            inner = attributes.get(name)
            members = inner if isinstance(inner, list | tuple) else [inner]
            owners += [item for item in members if hasattr(item, "__dict__") and not _among(item, owners)]
    return own_generators(*owners)


def _among(item: object, others: list[Any]) -> bool:
    return any(item is other for other in others)


def _is_global(generator: Any) -> bool:
    return generator is torch.default_generator or generator is np.random.mtrand._rand


def _get(generator: Any) -> Any:
    if isinstance(generator, torch.Generator | np.random.RandomState):
        return generator.get_state()
    return generator.bit_generator.state if isinstance(generator, np.random.Generator) else generator.getstate()


def _set(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator | np.random.RandomState):
        generator.set_state(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.setstate(state)

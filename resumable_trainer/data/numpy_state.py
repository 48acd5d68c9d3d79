"""NumPy's global generator, kept apart in 3 us.

Reading its whole state takes NumPy 30 to 70 us, word by word in Python objects: too much for once per
batch. Putting another bit generator in its place and the untouched one back costs next to nothing,
but NumPy then forgets the second half of a pair of normal draws, if it holds one. Whether it does
can be seen by asking for a normal draw: a held one comes without a word being taken from the bit
generator. The words are looked at where they lie; where they lie is what the `ctypes` interface of
a bit generator is for. If they should lie differently in another NumPy, the slow way is taken.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

_Words = ctypes.c_uint32 * 625  # of MT19937: its state, and the place in it
_spares: list[np.random.MT19937] = []  # making one costs 80 us, so they are used again


@contextlib.contextmanager
def numpy_kept() -> Iterator[None]:
    """NumPy's global generator goes on inside, and is afterwards as it was before."""
    state = np.random.get_state(legacy=False)
    try:
        yield
    finally:
        np.random.set_state(state)


@contextlib.contextmanager
def numpy_apart() -> Iterator[None]:
    """NumPy's global generator is another one inside, to be seeded there, and afterwards as it was before."""
    bits = np.random.mtrand.get_bit_generator()
    if type(bits) is not np.random.MT19937 or not _words_are_where_we_look():
        with numpy_kept():
            yield
        return
    held = _take_held_normal(np.random.mtrand._rand, bits)
    spare = _spares.pop() if _spares else np.random.MT19937(0)
    np.random.mtrand.set_bit_generator(spare)
    try:
        yield
    finally:
        np.random.mtrand.set_bit_generator(bits)
        _spares.append(spare)
        if held is not None:
            np.random.set_state({**np.random.get_state(legacy=False), "has_gauss": 1, "gauss": held})


def _take_held_normal(generator: Any, bits: Any) -> float | None:
    """The second half of a pair of normal draws that a generator holds, if any; the bit generator stays as it is."""
    words = _Words.from_address(bits.ctypes.state_address)
    before = bytes(words)
    normal: float = generator.standard_normal()
    if bytes(words) == before:
        return normal
    ctypes.memmove(words, before, len(before))
    return None


@functools.cache
def _words_are_where_we_look() -> bool:
    """Try it once, on a generator that is nobody's."""
    generator = np.random.RandomState(1)
    bits = generator._bit_generator
    drew_anew = _take_held_normal(generator, bits) is None
    held = _take_held_normal(generator, bits)
    expected = np.random.RandomState(1).standard_normal(4).tolist()
    found = generator.standard_normal(2).tolist()
    return drew_anew and held == expected[1] and found == expected[:2]

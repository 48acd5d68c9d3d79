"""The words of Python's and NumPy's global generators, read where they lie in memory.

Why: `random.getstate` and `numpy.random.get_state` make an object of each of 624 words. Between two steps, with cold
caches, that is a fifth of what the snapshot of a small model takes.

Policy: no layout is taken for granted. Where the words are is asked (NumPy says it), or known of CPython and found out
with a generator of our own; then such a generator must give the same in both ways, in several states. Whatever
does not come out as expected, here or in another version, means that the ordinary calls are used.
"""

from __future__ import annotations

import ctypes
import random
import struct
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.random import MT19937, RandomState

if TYPE_CHECKING:
    from collections.abc import Callable

_NUM_WORDS = 624
_MARK = -1.2345678901234567e-77  # a number that no memory holds by chance
_SEED = 5489


class PythonWords:
    """The state of one of Python's generators.

    Args:
        generator: Kept alive, and read at each call.
    """

    def __init__(self, generator: random.Random) -> None:
        self._generator: Any = generator
        # In C: the object's head, an index, and the words. As a state they come with the index last.
        words = _words_at(id(generator) + object.__basicsize__, 1 + _NUM_WORDS)
        self._key, self._index = words[1:], words[:1]
        self._seen: tuple[Any, ...] = ()

    def read(self) -> dict[str, Any]:
        """What `getstate` gives: its version, its words as an array [625] of uint32, and the second normal number."""
        gauss = self._generator.gauss_next
        data = bytearray(self._key)
        data += self._index
        words = memoryview(data).cast("I")
        tree = {"version": random.Random.VERSION, "words": np.frombuffer(data, dtype=np.uint32), "gauss": gauss}
        self._seen = tree, words[:_NUM_WORDS], words[_NUM_WORDS:], gauss
        return tree

    def is_still(self, tree: object) -> bool:
        """Whether what was read last is this very object, and nothing has been drawn since."""
        if not self._seen or self._seen[0] is not tree:
            return False
        _, key, index, gauss = self._seen
        return self._index == index and self._key == key and self._generator.gauss_next is gauss


class NumpyWords:
    """The state of one of NumPy's legacy generators, on top of MT19937.

    Args:
        generator: Kept alive, and read at each call.
        gauss: Where in it the flag and the value of a second normal number lie that was drawn with the first, in bytes.
    """

    def __init__(self, generator: RandomState, gauss: tuple[int, int]) -> None:
        self._generator = generator
        self._source = generator._bit_generator
        address = self._source.ctypes.state_address
        self._key = _words_at(address, _NUM_WORDS)
        self._place = ctypes.c_int.from_address(address + self._key.nbytes)
        self._has_gauss = ctypes.c_int.from_address(id(generator) + gauss[0])
        self._gauss = ctypes.c_double.from_address(id(generator) + gauss[1])
        self._gauss_bits = ctypes.c_uint64.from_address(id(generator) + gauss[1])
        self._seen: tuple[Any, ...] = ()

    @property
    def is_there(self) -> bool:
        """Whether it still draws from where it did."""
        return self._generator._bit_generator is self._source

    def read(self) -> dict[str, Any]:
        """What `get_state(legacy=False)` gives."""
        data, place, has_gauss = bytearray(self._key), self._place.value, self._has_gauss.value
        tree = {
            "bit_generator": "MT19937",
            "state": {"key": np.frombuffer(data, dtype=np.uint32), "pos": place},
            "has_gauss": has_gauss,
            "gauss": self._gauss.value,
        }
        self._seen = tree, memoryview(data).cast("I"), place, has_gauss, self._gauss_bits.value
        return tree

    def is_still(self, tree: object) -> bool:
        """Whether what was read last is this very object, and nothing has been drawn since."""
        if not self._seen or self._seen[0] is not tree:
            return False
        _, key, *others = self._seen
        now = [self._place.value, self._has_gauss.value, self._gauss_bits.value]
        return now == others and self._key == key


def python_words() -> PythonWords | None:
    """Of Python's global generator; None if it is to be asked."""
    generator = getattr(random.getstate, "__self__", None)
    return _python_words(generator) if type(generator) is random.Random else None


def numpy_words() -> NumpyWords | None:
    """Of NumPy's global generator; None if it is to be asked."""
    generator = getattr(np.random.get_state, "__self__", None)
    if type(generator) is not RandomState or type(generator._bit_generator) is not MT19937:
        return None
    words = _numpy_words(generator)
    if words is not None and not words.is_there:
        _numpy_words.cache_clear()
        words = _numpy_words(generator)
    return words


@lru_cache(maxsize=1)
def _python_words(generator: random.Random) -> PythonWords | None:
    return PythonWords(generator) if _python_is_as_expected() else None


@lru_cache(maxsize=1)
def _numpy_words(generator: RandomState) -> NumpyWords | None:
    gauss = _place_of_gauss()
    return None if gauss is None else NumpyWords(generator, gauss)


def _words_at(address: int, length: int) -> memoryview:
    """Words in memory as they are at any time; good for as long as their owner lives."""
    return memoryview((ctypes.c_uint32 * length).from_address(address)).cast("B").cast("I")


# -- whether it is as expected ---------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _python_is_as_expected() -> bool:
    ours = random.Random(_SEED)
    if random.Random.__basicsize__ < object.__basicsize__ + 4 * (1 + _NUM_WORDS):
        return False
    words = PythonWords(ours)

    def is_same() -> bool:
        state = words.read()
        return (state["version"], tuple(state["words"].tolist()), state["gauss"]) == ours.getstate()

    return _in_several_states(is_same, ours.random, lambda: ours.gauss(0, 1))


@lru_cache(maxsize=1)
def _place_of_gauss() -> tuple[int, int] | None:
    """Where in a RandomState the flag and the value are, in bytes; None if that is not to be found."""
    ours = RandomState(_SEED)

    def memory(*, has_gauss: int) -> bytes:
        ours.set_state({**ours.get_state(legacy=False), "has_gauss": has_gauss, "gauss": _MARK})
        return ctypes.string_at(id(ours), RandomState.__basicsize__)

    without, with_it = memory(has_gauss=0), memory(has_gauss=1)
    value = with_it.find(struct.pack("d", _MARK))
    flag = next((at for at, (one, other) in enumerate(zip(without, with_it, strict=True)) if one != other), -1)
    if value < 0 or flag < 0 or flag % ctypes.sizeof(ctypes.c_int):
        return None
    words = NumpyWords(ours, (flag, value))

    def is_same() -> bool:
        return _comparable(words.read()) == _comparable(ours.get_state(legacy=False))

    return (flag, value) if _in_several_states(is_same, ours.random_sample, ours.standard_normal) else None


def _in_several_states(is_same: Callable[[], bool], *draws: Callable[[], object]) -> bool:
    """Whether it holds after drawing each so often that all words are made anew twice."""
    for draw in draws:
        for number in range(_NUM_WORDS + 3):
            draw()
            if number % 200 < 3 and not is_same():
                return False
    return True


def _comparable(state: Any) -> dict[str, Any]:
    return {**state, "state": {**state["state"], "key": state["state"]["key"].tolist()}}

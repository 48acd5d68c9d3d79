"""Seeds and permutations: everything random about data, derived from (seed, epoch, index)."""

from __future__ import annotations

import torch
import xxhash


def mix(*parts: int | str) -> int:
    """A 63-bit seed derived from the parts, the one source of every derived seed.

    The hash is xxh3-64 of the parts' canonical text, without the sign bit; the text tells `1` from
    `"1"` and `("a", "b")` from `("ab",)`. Integers of NumPy count as the same integers of Python.

    >>> mix(0, "train", 3) == mix(0, "train", 3)
    True
    >>> mix(0, "train", 3) == mix(0, "train3")
    False
    """
    plain = [part if type(part) is str else int(part) for part in parts]
    return xxhash.xxh3_64_intdigest(repr(plain).encode()) >> 1


def permutation(n: int, *, seed: int, epoch: int, salt: str = "train") -> torch.Tensor:
    """The order of `n` samples in an epoch.

    Returns:
        int64 tensor of shape [n] on the CPU, each index once.
    """
    generator = torch.Generator()
    generator.manual_seed(mix(seed, salt, epoch))
    return torch.randperm(n, generator=generator)

"""Seeds and permutations: everything random about data, derived from (seed, epoch, index)."""

from __future__ import annotations

import torch
import xxhash


def mix(*parts: int | str) -> int:
    """A 63-bit seed derived from the parts: xxh3-64 of their canonical text, without the sign bit."""
    return xxhash.xxh3_64_intdigest(repr(parts).encode()) >> 1


def permutation(n: int, *, seed: int, epoch: int, salt: str = "train") -> torch.Tensor:
    """The order of `n` samples in an epoch.

    Returns:
        int64 tensor of shape [n] on the CPU, each index once.
    """
    generator = torch.Generator()
    generator.manual_seed(mix(seed, salt, epoch))
    return torch.randperm(n, generator=generator)

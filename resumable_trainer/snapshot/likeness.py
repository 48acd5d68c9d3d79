"""Likeness: whether the tensors of two states are alike in all that names, references and encodings depend on.

Each property that is asked of ten thousand tensors in Python takes half a millisecond. So they are first asked all at
once by what torch's compiler guards its code with: exact type, dtype, sizes, strides, device, and what else tells a
tensor's kind (layout, conjugate, negative, inference). What passes is alike; what does not, or cannot be asked in this
way, is compared in full, and that decides. Which of them share memory is always compared.

No tensor is kept. Addresses are, as numbers: where all are what they were, so is what shares memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Likeness:
    """What some tensors are like.

    Args:
        leaves: The tensors, in some order.
        marked: Those of them in which it is said what is a parameter, and whether it is trained.
    """

    def __init__(self, leaves: Sequence[torch.Tensor], marked: Sequence[torch.Tensor]) -> None:
        self._full = _description(leaves, marked)
        self._addresses = _addresses(leaves)
        self._shared = _shared(self._addresses)
        self._has_parameters = any(type(leaf) is torch.nn.Parameter for leaf in marked)
        self._passes = guard(leaves)
        # They may be views that negate or conjugate when they are read.
        self.is_usual = not any(leaf.is_complex() or leaf.is_neg() for leaf in leaves)

    def holds_for(self, leaves: Sequence[torch.Tensor], marked: Sequence[torch.Tensor]) -> bool:
        """Whether others are alike, in the same order; if they are, they are kept in mind as the newest."""
        if not self._passes_at_once(leaves) and _description(leaves, marked) != self._full:
            return False
        addresses = _addresses(leaves)
        if addresses != self._addresses:
            if _shared(addresses) != self._shared:
                return False
            self._addresses = addresses
        return True

    def _passes_at_once(self, leaves: Sequence[torch.Tensor]) -> bool:
        if self._passes is None or self._has_parameters:  # which of them are trained is said
            return False
        with torch.no_grad():  # otherwise it looks at which are trained
            return self._passes(*leaves)


def guard(leaves: Sequence[torch.Tensor]) -> Callable[..., bool] | None:
    """Tells whether tensors are like these in all but what they hold and whether they are trained; None if nothing can.

    It is no public part of torch: where it is not what it was, one does without.
    """
    try:
        from torch._C._dynamo.guards import TensorGuards

        with torch.no_grad():
            guards = TensorGuards(*leaves, dynamic_dims_sizes=None, dynamic_dims_strides=None)
            return guards.check if guards.check(*leaves) is True else None
    except Exception:  # noqa: BLE001 - whatever it is, it is slower without
        return None


def _description(leaves: Sequence[torch.Tensor], marked: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    dtypes = [leaf.dtype for leaf in leaves]
    shapes, places = [leaf.shape for leaf in leaves], [leaf.device for leaf in leaves]
    strides = None if all(map(torch.Tensor.is_contiguous, leaves)) else [leaf.stride() for leaf in leaves]
    views = any(map(torch.Tensor.is_neg, leaves)) or any(map(torch.Tensor.is_conj, leaves))
    parameters = [type(leaf) is torch.nn.Parameter for leaf in marked]
    trained = [leaf.requires_grad for leaf in marked] if any(parameters) else None
    return dtypes, shapes, strides, places, views, parameters, trained


def _addresses(leaves: Sequence[torch.Tensor]) -> list[int]:
    return [*map(torch.Tensor.data_ptr, leaves)]


def _shared(addresses: Sequence[int]) -> list[int] | None:
    """For each tensor the number of the first at its address; None if no two are at one.

    Two tensors at one address are told apart by shape and stride, which are compared, too.
    """
    if len({*addresses}) == len(addresses):
        return None
    first: dict[int, int] = {}
    return [first.setdefault(address, number) for number, address in enumerate(addresses)]

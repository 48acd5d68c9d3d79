"""A section's tree with a description in the place of each tensor: what would be read, known before it is.

What is restored into memory that is there already needs names, shapes, dtypes and strides first, and the
bytes last.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch

from resumable_trainer.snapshot.tensors import DTYPES
from resumable_trainer.snapshot.tree import TENSOR_FIELDS, TreeReader, is_dense

if TYPE_CHECKING:
    from collections.abc import Callable

    from resumable_trainer.snapshot.raw import RawTensorFile


class Describe(Protocol):
    """Makes the object that stands for a stored tensor."""

    def __call__(
        self,
        section: str,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        stride: tuple[int, ...] | None,
        device: str | None,
        is_parameter: bool,
    ) -> object:
        """For the tensor `name` of a section.

        Args:
            section: Whose file holds it.
            name: Its name there.
            shape: Its sizes.
            dtype: Its dtype.
            stride: How it lay in memory, if that was dense and not row-major.
            device: Where it was, if not on the CPU.
            is_parameter: Whether it was an `nn.Parameter`.
        """


class StoredArray:
    """Stands for an array of NumPy's that is stored in a tensor file."""


class Outliner(TreeReader):
    """Reads no tensor.

    Args:
        open_file: Gives the tensor file of a section.
        describe: Makes what stands for a tensor.
    """

    def __init__(self, open_file: Callable[[str], RawTensorFile], describe: Describe) -> None:
        super().__init__(_refuse)
        self._open_file, self._describe = open_file, describe

    def tensor(self, encoded: dict[str, Any]) -> Any:
        """What stands for one tensor.

        Raises:
            ValueError: It is spoken of in a way that is never written.
        """
        section, name = encoded["$tensor"]
        info = self._open_file(section).info(name)
        shape, dtype = info.shape, DTYPES[info.code]
        if len(encoded) == 1:
            return self._describe(section, name, shape, dtype, None, None, False)
        if not encoded.keys() <= TENSOR_FIELDS:
            raise ValueError("a tensor with unknown fields")
        if "dtype" in encoded:
            if encoded["dtype"] != "complex128" or dtype != torch.float64 or shape[-1:] != (2,):
                raise ValueError("a tensor of another dtype than its file's")
            shape, dtype = shape[:-1], torch.complex128
        stride = encoded.get("stride")
        if stride is not None and not (len(stride) == len(shape) and is_dense(shape, stride)):
            raise ValueError("a stride that does not fit its shape")
        strides = None if stride is None else tuple(stride)
        return self._describe(section, name, shape, dtype, strides, encoded.get("device"), "parameter" in encoded)

    def array(self, encoded: dict[str, Any]) -> Any:
        """An array of values, or what stands for it."""
        return StoredArray() if "tensor" in encoded else super().array(encoded)


def _refuse(section: str, name: str) -> torch.Tensor:
    raise ValueError(f"tensor {name!r} of {section!r} is not to be read yet")

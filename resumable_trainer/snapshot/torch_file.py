"""Files of `torch.save`: written when somebody asks for one, read when somebody brings one. Nowhere else.

Such a file holds a pickle, a program that builds objects. What is written here loads with
`weights_only=True`, which builds tensors and plain values alone.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import TYPE_CHECKING, Any

import torch

from resumable_trainer.errors import UnsafeValueError

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from resumable_trainer.durable.files import NewFile

_PLAIN = (type(None), bool, int, float, complex, str, bytes, bytearray, torch.Size, torch.dtype, torch.device)
_CONTAINERS = (list, tuple, set, dict, OrderedDict, Counter)


def write_torch_file(file: NewFile, tree: object, *, place: str) -> None:
    """Write a tree of tensors and plain values as `torch.save` does.

    Args:
        file: Where to.
        tree: What.
        place: What the tree is, for errors.

    Raises:
        UnsafeValueError: It holds a value that `torch.load(weights_only=True)` does not give back.
        OSError: The disk does not take it.
    """
    _check(tree, place)
    sink = _Sink(file)
    try:
        torch.save(tree, sink)  # type: ignore[arg-type] # it has all that torch.save calls
    except RuntimeError as error:
        # torch's writer closes its archive after the failure, and complains of that instead.
        raise sink.error or error from None


class _Sink:
    """A file as torch.save wants it; keeps the error that torch hides."""

    def __init__(self, file: NewFile) -> None:
        self.error: BaseException | None = None
        self._file = file

    def write(self, data: Buffer) -> int:
        try:
            self._file.write(data)
        except BaseException as error:
            self.error = error
            raise
        return memoryview(data).nbytes

    def flush(self) -> None:
        """Nothing is held back."""


def _check(value: Any, place: str) -> None:
    """Exact types only, as elsewhere: a subclass would be a global that the loader refuses."""
    if type(value) in (torch.Tensor, torch.nn.Parameter) or type(value) in _PLAIN:
        return
    if type(value) not in _CONTAINERS:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise UnsafeValueError(
            f"{place} is a {kind}, which torch.load(weights_only=True) does not give back",
            found=kind,
            hint="export another part, or restore it with StateManager, which does",
        )
    if isinstance(value, dict):
        for key, inner in value.items():
            _check(key, f"key {key!r} of {place}")
            _check(inner, f"{place}[{key!r}]")
    else:
        for index, inner in enumerate(value):
            _check(inner, f"{place}[{index}]")

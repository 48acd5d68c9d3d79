"""Files of `torch.save`: written when somebody asks for one, read when somebody brings one. Nowhere else.

Such a file holds a pickle, a program that builds objects. What is written here loads with
`weights_only=True`, which builds tensors and plain values alone.

Reading is for files from strangers. Nothing but `weights_only=True` is ever tried, and limits stand before and
around it: what the archive unpacks to against its own length and the memory there is; the address space while it
is read; afterwards how many values there are, and no tensor beyond the bytes that the file brought for it.
"""

from __future__ import annotations

import contextlib
import re
import resource
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from resumable_trainer.errors import DamagedSnapshotError, SettingsError, UnsafeValueError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typing_extensions import Buffer

    from resumable_trainer.durable.files import NewFile

_PLAIN = (type(None), bool, int, float, complex, str, bytes, bytearray, torch.Size, torch.dtype, torch.device)
_CONTAINERS = (list, tuple, set, dict, OrderedDict, Counter)
MAGIC = b"PK\x03\x04"
_SAFE_TORCH = (2, 10)  # before, a file could corrupt memory although weights_only was set (CVE-2026-24747)
_MAX_RATIO = 20  # torch.save packs without compressing; people who compress afterwards gain a little
_SLACK_BYTES = 16 << 20
_MAX_VALUES = 2_000_000
_ADDRESS_SPACE_BYTES = 2 << 30  # beside three times what the archive holds


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


# -- reading ------------------------------------------------------------------------------------------


def read_torch_file(file: BinaryIO, name: str) -> Any:
    """What a file of `torch.save` holds, on the CPU: tensors, plain values and containers of them.

    Args:
        file: Open for reading; it begins with `MAGIC`.
        name: For errors.

    Raises:
        DamagedSnapshotError: It is not a whole file of `torch.save`.
        UnsafeValueError: It wants code to be run, or is made to fill memory; nothing of it was run.
        SettingsError: There is not enough memory for it.
    """
    num_bytes = _unpacked_bytes(file, name)
    file.seek(0)
    try:
        with _bounded_memory(3 * num_bytes + _ADDRESS_SPACE_BYTES):
            content = torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:  # noqa: BLE001 - whatever a stranger's file brings torch to say is its refusal
        raise _refusal(error, name) from None
    _check_content(content, name)
    return content


def warnings(file: BinaryIO) -> list[str]:
    """Lines for a person on why a file of `torch.save` should not be trusted."""
    lines = []
    if tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2]) < _SAFE_TORCH:
        lines.append(
            f"torch {torch.__version__} can be attacked by a file even with weights_only (CVE-2026-24747, mended in"
            " 2.10): import only what you trust"
        )
    file.seek(0)
    with zipfile.ZipFile(file) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        lines.append(f"its entry {printable(damaged)} does not match its checksum, which torch does not look at")
    return lines


def printable(text: object, *, limit: int = 200) -> str:
    """Text of a stranger's for a terminal, in one line."""
    found = str(text)
    shown = "".join(letter if letter.isprintable() else "?" for letter in found[:limit])
    return shown if len(found) <= limit else f"{shown}..."


def _unpacked_bytes(file: BinaryIO, name: str) -> int:
    """What the archive says that it unpacks to, if that can be."""
    size = file.seek(0, 2)
    try:
        with zipfile.ZipFile(file) as archive:
            num_bytes = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, OSError) as error:
        if isinstance(error, OSError):
            raise
        raise DamagedSnapshotError(f"{name} is not a whole file of torch.save: {printable(error)}") from None
    if num_bytes > _MAX_RATIO * size + _SLACK_BYTES:
        raise UnsafeValueError(
            f"{name} has {size:,} bytes and says that it unpacks to {num_bytes:,}: it was not read",
            found=num_bytes,
            hint="torch.save does not compress; if it is yours, unpack it, and pack it again without compressing",
        )
    available = _available_bytes()
    if available is not None and num_bytes > available:
        raise SettingsError(f"{name} needs {num_bytes:,} bytes of memory, {available:,} are available", found=num_bytes)
    return num_bytes


def _available_bytes() -> int | None:
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    return None if found is None else int(found[1]) << 10


@contextlib.contextmanager
def _bounded_memory(num_bytes: int) -> Iterator[None]:
    """At most so much more address space in this block: what asks for more gets a MemoryError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + num_bytes
        if soft in (resource.RLIM_INFINITY, -1) or limit < soft:
            resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    except (OSError, ValueError):  # not Linux: the checks before and after remain
        pass
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _refusal(error: Exception, name: str) -> Exception:
    text = str(error)
    wanted = re.search(r"GLOBAL ([\w.]+)", text)
    if wanted is not None:
        return UnsafeValueError(
            f"{name} wants {wanted[1]} to be loaded and run, and only tensors and plain values are taken from it;"
            " nothing of it was run",
            found=wanted[1],
            hint="if you trust it, load it yourself and save its state_dicts alone:"
            ' torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "new.pt")',
        )
    reason = printable(next(iter(text.splitlines()), "") or type(error).__name__)
    if isinstance(error, MemoryError) or "allocate memory" in text:
        return UnsafeValueError(f"{name} asks for far more memory than it has bytes: {reason}")
    if "Weights only load failed" in text or "weights_only" in text:
        lines = [line.strip() for line in text.splitlines() if "rror" in line or "nsupported" in line]
        return UnsafeValueError(f"{name} is not taken with weights_only: {printable((lines or [reason])[-1])}")
    return DamagedSnapshotError(f"{name} cannot be read as torch.save writes it: {reason}")


def _check_content(content: Any, name: str) -> None:
    """Look at every value before anybody walks the tree: few bytes can name one list a billion times."""
    left, num_values = [content], 0
    while left:
        value = left.pop()
        num_values += 1
        if num_values > _MAX_VALUES:
            raise UnsafeValueError(f"{name} holds more than {_MAX_VALUES:,} values, or one that holds itself")
        if isinstance(value, torch.Tensor):
            _check_tensor(value, name)
        elif isinstance(value, dict):
            left += value.keys()
            left += value.values()
        elif isinstance(value, list | tuple | set) and not isinstance(value, torch.Size):
            left += value


def _check_tensor(tensor: torch.Tensor, name: str) -> None:
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return  # what has no safe form is refused with its place when it is taken apart
    needed, there = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
    if needed > there:
        raise UnsafeValueError(
            f"{name} holds a tensor of shape {list(tensor.shape)} that has {there:,} bytes and needs {needed:,}",
            found=there,
            expected=needed,
            hint="if it is yours, save an expanded tensor as .contiguous()",
        )
    if tensor.is_conj() or tensor.is_neg():
        raise UnsafeValueError(f"{name} holds a lazily conjugated tensor", hint="save it with .resolve_conj()")

"""Export: one part of a snapshot as a file that other programs read. Free of torch for safetensors.

Policy: the bytes of the tensors are those of the snapshot, copied and not computed. A tensor that is known
under several names (tied weights) is written under each of them: that is what `load_state_dict(strict=True)`
of a fresh module asks for. The library's `save_model` keeps one of them and its `load_model` puts the others
back; a plain `load_file` then lacks names.

Cost: the snapshot's bytes are read once to verify them, and those that are copied twice more.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import struct
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from resumable_trainer.durable.digest import digest_file
from resumable_trainer.durable.files import Files, published_file
from resumable_trainer.durable.filesystem import room
from resumable_trainer.errors import (
    DamagedSnapshotError,
    NotFoundError,
    ResumableTrainerError,
    SnapshotWriteError,
    UnsafeValueError,
    UsageError,
)
from resumable_trainer.snapshot.layout import OWN_NAMES, OWN_SECTIONS, TENSORS_SUFFIX
from resumable_trainer.snapshot.raw import ITEM_BYTES, RawTensorFile, TensorInfo
from resumable_trainer.snapshot.store import still_there
from resumable_trainer.snapshot.values import read_values

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from resumable_trainer.durable.files import NewFile
    from resumable_trainer.snapshot.selected import Selected

_CHUNK_BYTES = 1 << 20
_ALIGNMENT = 8
_ZIP_BYTES = 1 << 16
EXTRA_STATE = "_extra_state"


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        num_tensors: Names of tensors in the file; None where they lie in a tree of values.
        tied: Names of tensors beside the first of each group that is one tensor.
        num_bytes: Length of the file.
        digest: Its xxh3-128.
    """

    num_tensors: int | None
    tied: tuple[str, ...]
    num_bytes: int
    digest: str


def choose_part(values: Mapping[str, Any], name: str | None) -> str:
    """The section that is meant: the one named, else "model", else the only one that looks like a module's.

    Raises:
        NotFoundError: There is none such, or more than one; the message lists the parts.
    """
    parts = [section for section in values if section not in OWN_SECTIONS]
    listed = f"its parts are: {', '.join(parts) or 'none'}"
    if name is not None:
        if name not in values:
            raise NotFoundError(f"the snapshot has no part {name!r}", found=name, expected=parts, hint=listed)
        return name
    modules = [section for section in parts if _is_module(values[section])]
    if "model" in values:
        return "model"
    if len(modules) != 1:
        how_many = f"{len(modules)} parts of the snapshot look" if modules else "no part of the snapshot looks"
        raise NotFoundError(f"{how_many} like a model", found=modules, hint=f"name one with --part; {listed}")
    return modules[0]


def export_safetensors(
    source: Selected, part: str, path: Path, *, replacing: bool = False, files: Files | None = None
) -> Exported:
    """Write the tensors of a part as a safetensors file.

    Args:
        source: The snapshot; it verifies.
        part: Its section.
        path: Where.
        replacing: Whether a file of this name may be overwritten.
        files: Primitive operations.

    Raises:
        UnsafeValueError: The part holds more than tensors by name.
        DamagedSnapshotError: The snapshot has changed meanwhile.
        SnapshotGoneError: It was deleted meanwhile.
        UsageError: The name is taken, or is no place for a file.
        SnapshotWriteError: The disk does not take it.
    """
    places = _places(part, read_values(source.path, source.manifest).get(part))
    with still_there(source.path), ExitStack() as stack:
        opened = {
            section: stack.enter_context(RawTensorFile(source.path / f"{section}{TENSORS_SUFFIX}"))
            for section in sorted({section for section, _ in places.values()})
        }
        infos = {name: opened[section].info(inner) for name, (section, inner) in places.items()}
        # The widest first, as the library does: so each tensor begins at a multiple of its element's size.
        order = sorted(infos, key=lambda name: (-ITEM_BYTES[infos[name].code], name))
        header = _header(source, part, {name: infos[name] for name in order})
        num_bytes = len(header) + sum(info.end - info.begin for info in infos.values())
        with _writing(source, path, num_bytes=num_bytes, replacing=replacing, files=files) as file:
            file.write(header)
            for name in order:
                section, inner = places[name]
                _copy(opened[section], inner, file)
            _check_unchanged(source, opened)
    seen: set[tuple[str, str]] = set()
    tied = [name for name, place in places.items() if place in seen or seen.add(place)]  # type: ignore[func-returns-value]
    return Exported(len(places), tuple(tied), file.digest.num_bytes, file.digest.digest)


def export_torch(
    source: Selected, part: str, path: Path, *, replacing: bool = False, files: Files | None = None
) -> Exported:
    """Write a part's whole state as a file of `torch.save` that `torch.load(weights_only=True)` reads.

    Raises and arguments as for `export_safetensors`; tied tensors are tied in the file.
    """
    from resumable_trainer.snapshot.reader import Reader
    from resumable_trainer.snapshot.torch_file import write_torch_file

    with still_there(source.path):
        tree = Reader(source.path, source.manifest).section_on_cpu(part)
    num_bytes = source.manifest.total_bytes + _ZIP_BYTES  # at most
    with _writing(source, path, num_bytes=num_bytes, replacing=replacing, files=files) as file:
        write_torch_file(file, tree, place=part)
        _check_unchanged(source, [part])
    return Exported(None, (), file.digest.num_bytes, file.digest.digest)


def _is_module(encoded: Any) -> bool:
    """Whether a section is a flat dict of tensors, as a module's is."""
    entries = _entries(encoded) or {}
    tensors = [name for name, value in entries.items() if _is_tensor(value)]
    return bool(tensors) and all(name in tensors or name.endswith(EXTRA_STATE) for name in entries)


def _entries(encoded: Any) -> dict[str, Any] | None:
    """The entries of a dict with string keys; None if it is something else."""
    if not isinstance(encoded, dict):
        return None
    tag = next(iter(encoded), "")
    if not tag.startswith("$"):
        return encoded
    if tag not in ("$dict", "$ordered"):
        return None
    pairs = encoded[tag]
    return dict(pairs) if all(isinstance(key, str) for key, _ in pairs) else None


def _is_tensor(encoded: Any) -> bool:
    return isinstance(encoded, dict) and "$tensor" in encoded


def _places(part: str, encoded: Any) -> dict[str, tuple[str, str]]:
    """Where in the snapshot each tensor of a part lies: section and name.

    Raises:
        UnsafeValueError: It holds something else.
    """
    hint = "use --format torch, which holds values too"
    entries = _entries(encoded)
    if entries is None:
        raise UnsafeValueError(f"part {part!r} is no dict of tensors by name, so safetensors cannot hold it", hint=hint)
    wrong = [f"{part}[{name!r}]" for name, value in entries.items() if not _is_tensor(value) or name == "__metadata__"]
    if wrong:
        listed = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise UnsafeValueError(f"{listed}: not a tensor, and safetensors holds tensors alone", found=wrong, hint=hint)
    complex128 = [name for name, value in entries.items() if value.get("dtype") == "complex128"]
    if complex128:
        raise UnsafeValueError(
            f"{part}[{complex128[0]!r}] is complex128, which safetensors does not have", found=complex128, hint=hint
        )
    return {name: (value["$tensor"][0], value["$tensor"][1]) for name, value in entries.items()}


def _header(source: Selected, part: str, infos: Mapping[str, TensorInfo]) -> bytes:
    at = source.manifest.position
    about = {"run_id": source.manifest.run_id, "snapshot": source.manifest.name, "part": part}
    fields: dict[str, Any] = {
        "__metadata__": {"format": "pt", **about, "epoch": str(at.epoch), "batch": str(at.batch), "step": str(at.step)}
    }
    end = 0
    for name, info in infos.items():
        begin, end = end, end + info.end - info.begin
        fields[name] = {"dtype": info.code, "shape": list(info.shape), "data_offsets": [begin, end]}
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // _ALIGNMENT) * _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _copy(source: RawTensorFile, name: str, target: NewFile) -> None:
    info = source.info(name)
    left, start = info.end - info.begin, 0
    buffer = memoryview(bytearray(min(left, _CHUNK_BYTES)))
    while left:
        piece = buffer[: min(left, _CHUNK_BYTES)]
        source.read_into(piece, name, start=start)
        target.write(piece)
        start, left = start + piece.nbytes, left - piece.nbytes


def _check_unchanged(source: Selected, sections: Iterable[str]) -> None:
    """What was verified and then copied must still be what it was, or the copy is of something else."""
    for section in sections:
        entry = source.manifest.files.get(f"{section}{TENSORS_SUFFIX}")
        if entry is None:
            continue
        if digest_file(source.path / f"{section}{TENSORS_SUFFIX}").digest != entry.digest:
            raise DamagedSnapshotError(f"{source.path} has changed while it was copied", path=source.path)


@contextlib.contextmanager
def _writing(
    source: Selected, path: Path, *, num_bytes: int, replacing: bool, files: Files | None
) -> Iterator[NewFile]:
    """The new file; the disk's errors as ours."""
    _check_target(source, path, replacing=replacing)
    try:
        found = room(path.parent)
        if not found.holds(num_bytes=num_bytes, files=1):
            raise OSError(errno.ENOSPC, f"it needs {num_bytes:,} bytes, {found.num_bytes or 0:,} are free")
        files = files if files is not None else Files()
        with published_file(files, path, replacing=replacing) as file, still_there(source.path):
            yield file
    except FileExistsError:
        raise _taken(path) from None
    except OSError as error:
        if isinstance(error, ResumableTrainerError):
            raise
        raise SnapshotWriteError(
            f"{path} was NOT written: {error}", path=path, hint="free space, or put it on another disk"
        ) from error


def _check_target(source: Selected, path: Path, *, replacing: bool) -> None:
    if not path.parent.is_dir():
        raise UsageError(f"{path.parent} is no directory", path=path, hint="make it first")
    if path.is_dir():
        raise UsageError(f"{path} is a directory", path=path, hint="name a file in it")
    real = path.parent.resolve() / path.name
    run = source.run.resolve()
    if any(real.is_relative_to(run / name) for name in OWN_NAMES):
        raise UsageError(f"{path} lies where the run {source.run} keeps its own files", path=path)
    if os.path.lexists(path) and not replacing:
        raise _taken(path)
    if path.exists() and not path.is_file():
        raise UsageError(
            f"{path} is no regular file, and is not replaced by one", path=path, hint="choose another name"
        )


def _taken(path: Path) -> UsageError:
    return UsageError(f"{path} is there already", path=path, hint="choose another name, or overwrite it with --force")

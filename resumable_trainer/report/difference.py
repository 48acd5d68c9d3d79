"""What two snapshots differ in: their state tensor by tensor, and what their manifests say. Free of torch.

Cost: both are read once (and were read before, to verify them); memory for one piece of one tensor of
each. A file of tensors whose digests are equal is not read again.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np

from resumable_trainer.durable.digest import reading
from resumable_trainer.report.numbers import Distance, distance
from resumable_trainer.snapshot.layout import TENSORS_SUFFIX
from resumable_trainer.snapshot.raw import ITEM_BYTES, RawTensorFile
from resumable_trainer.snapshot.store import still_there
from resumable_trainer.snapshot.values import read_values

if TYPE_CHECKING:
    from collections.abc import Iterator

    from resumable_trainer.snapshot.manifest import Manifest
    from resumable_trainer.snapshot.raw import TensorInfo
    from resumable_trainer.snapshot.selected import Selected

_PIECE_ELEMENTS = 1 << 20
_COMPARED = ("position", "epoch_complete", "outcome", "best", "metrics", "settings", "depends_on")
_LINEAGE = ("run_id", "generation", "parent", "parent_digest", "created", "saved_by")
_ABSENT = object()


@dataclass(frozen=True)
class ValueChange:
    """A plain value that differs.

    Attributes:
        place: Where in its section or in the manifest.
        sides: The value by "a" and "b"; a side that has none is left out.
    """

    place: str
    sides: dict[str, Any]


@dataclass(frozen=True)
class TensorChange:
    """A tensor that differs.

    Attributes:
        place: Where in its section.
        a: Dtype and shape in A.
        b: Dtype and shape in B.
        elements: Number of its elements in A.
        distance: How far both are apart; None if their shapes differ.
    """

    place: str
    a: str
    b: str
    elements: int
    distance: Distance | None


@dataclass
class SectionDifference:
    """A part of the state, or the generators, gradients, modes, the loop's own.

    Attributes:
        name: Its name.
        only_in: "a" or "b" if the other snapshot has none such.
        num_tensors: Tensors found on both sides.
        tensors: Those that differ.
        values: Plain values that differ.
    """

    name: str
    only_in: str | None = None
    num_tensors: int = 0
    tensors: list[TensorChange] = field(default_factory=list)
    values: list[ValueChange] = field(default_factory=list)

    @property
    def is_same(self) -> bool:
        """Whether nothing in it differs."""
        return self.only_in is None and not self.tensors and not self.values


@dataclass(frozen=True)
class RowsDifference:
    """The metric rows that belong to each snapshot.

    Attributes:
        a: How many belong to A; None if it counts none.
        b: How many belong to B.
        is_same: Whether they are the same.
        first_different: Number, from 1, of the first that differs; None if that cannot be told.
    """

    a: int | None
    b: int | None
    is_same: bool
    first_different: int | None = None


@dataclass(frozen=True)
class Difference:
    """Two snapshots side by side.

    Attributes:
        facts: Position, outcome, best, metrics, settings and dependences that differ.
        rows: The metric rows.
        sections: Everything that was saved.
        lineage: Where they come from; differs between any two, and does not count.
    """

    facts: list[ValueChange]
    rows: RowsDifference
    sections: list[SectionDifference]
    lineage: list[ValueChange]

    @property
    def is_same(self) -> bool:
        """Whether both are the same state of the same training, whoever wrote it and when."""
        return not self.facts and self.rows.is_same and all(section.is_same for section in self.sections)


def compare(a: Selected, b: Selected) -> Difference:
    """What two snapshots that verify differ in.

    Raises:
        DamagedSnapshotError: A file does not hold what the format says.
        SnapshotGoneError: One was deleted meanwhile.
    """
    with still_there(a.path), still_there(b.path):
        sections = _sections(a, b)
    fields_a, fields_b = a.manifest.model_dump(mode="json"), b.manifest.model_dump(mode="json")
    return Difference(
        facts=[change for name in _COMPARED for change in _values(name, fields_a[name], fields_b[name])],
        rows=_rows(a, b),
        sections=sections,
        lineage=[change for name in _LINEAGE for change in _values(name, fields_a[name], fields_b[name])],
    )


def _rows(a: Selected, b: Selected) -> RowsDifference:
    mark_a, mark_b = a.manifest.journal, b.manifest.journal
    rows = (mark_a.rows if mark_a else None, mark_b.rows if mark_b else None)
    if mark_a is None or mark_b is None or mark_a.digest == mark_b.digest:
        return RowsDifference(*rows, is_same=mark_a == mark_b)
    try:
        with reading(a.journal) as file_a, reading(b.journal) as file_b:
            for number in range(max(mark_a.rows, mark_b.rows)):
                if min(mark_a.rows, mark_b.rows) == number or file_a.readline() != file_b.readline():
                    return RowsDifference(*rows, is_same=False, first_different=number + 1)
    except (OSError, ValueError):
        pass  # a journal that is gone or no file: that the rows differ is known from the marks
    return RowsDifference(*rows, is_same=False)


def _sections(a: Selected, b: Selected) -> list[SectionDifference]:
    values_a, values_b = read_values(a.path, a.manifest), read_values(b.path, b.manifest)
    found = []
    with ExitStack() as stack:
        walk = _Walk(_Tensors(a, stack), _Tensors(b, stack))
        for name in dict.fromkeys([*values_a, *values_b]):
            if name in values_a and name in values_b:
                found.append(walk.section(name, values_a[name], values_b[name]))
            else:
                found.append(SectionDifference(name, only_in="a" if name in values_a else "b"))
    return found


class _Tensors:
    """The tensor files of one snapshot, opened when they are asked for."""

    def __init__(self, selected: Selected, stack: ExitStack) -> None:
        self._path = selected.path
        self._stack = stack
        self._open: dict[str, RawTensorFile] = {}
        self.manifest: Manifest = selected.manifest

    def file(self, section: str) -> RawTensorFile:
        if section not in self._open:
            self._open[section] = self._stack.enter_context(RawTensorFile(self._path / f"{section}{TENSORS_SUFFIX}"))
        return self._open[section]

    def digest(self, section: str) -> str | None:
        entry = self.manifest.files.get(section + TENSORS_SUFFIX)
        return None if entry is None else entry.digest


class _Walk:
    """Goes through the typed JSON of both sides at once."""

    def __init__(self, a: _Tensors, b: _Tensors) -> None:
        self._a, self._b = a, b
        self._found = SectionDifference("")
        self._distances: dict[tuple[str, str, str, str], Distance] = {}

    def section(self, name: str, a: Any, b: Any) -> SectionDifference:
        self._found = SectionDifference(name)
        self.value("", a, b)
        return self._found

    def value(self, place: str, a: Any, b: Any) -> None:
        if _is_tensor(a) and _is_tensor(b):
            self._tensor(place, a, b)
        elif isinstance(a, dict) and isinstance(b, dict):
            self._entries(place, _by_key(a), _by_key(b))
        elif isinstance(a, list) and isinstance(b, list):
            self._entries(place, dict(enumerate(a)), dict(enumerate(b)))
        elif json.dumps(a) != json.dumps(b):  # as text: 1 is not 1.0, and 0.0 is not -0.0
            self._found.values.append(ValueChange(place, {"a": _shown(a), "b": _shown(b)}))

    def _entries(self, place: str, a: dict[Any, Any], b: dict[Any, Any]) -> None:
        for key in dict.fromkeys([*a, *b]):
            inner = place if str(key).startswith("$") else f"{place}.{key}" if place else str(key)
            if key in a and key in b:
                self.value(inner, a[key], b[key])
            else:
                sides = {side: _shown(tree[key]) for side, tree in (("a", a), ("b", b)) if key in tree}
                self._found.values.append(ValueChange(inner, sides))

    def _tensor(self, place: str, a: dict[str, Any], b: dict[str, Any]) -> None:
        self._found.num_tensors += 1
        traits_a, traits_b = _traits(a), _traits(b)
        self._entries(place, traits_a, traits_b)
        (section_a, name_a), (section_b, name_b) = a["$tensor"], b["$tensor"]
        if (section_a, name_a) == (section_b, name_b) and self._a.digest(section_a) == self._b.digest(section_b):
            return
        key = (section_a, name_a, section_b, name_b)
        info_a, info_b = self._a.file(section_a).info(name_a), self._b.file(section_b).info(name_b)
        if info_a.shape != info_b.shape:
            change = TensorChange(place, _kind(info_a), _kind(info_b), info_a.num_elements, None)
            self._found.tensors.append(change)
            return
        if key not in self._distances:
            self._distances[key] = self._distance(key, info_a, info_b)
        apart = self._distances[key]
        if apart.differing or info_a.code != info_b.code:
            change = TensorChange(place, _kind(info_a), _kind(info_b), info_a.num_elements, apart)
            self._found.tensors.append(change)

    def _distance(self, key: tuple[str, str, str, str], a: TensorInfo, b: TensorInfo) -> Distance:
        total = Distance()
        pieces_a = _pieces(self._a.file(key[0]), key[1], a)
        pieces_b = _pieces(self._b.file(key[2]), key[3], b)
        for piece_a, piece_b in zip_longest(pieces_a, pieces_b):
            total = total.plus(distance(a.code, piece_a, b.code, piece_b))
        return total


def _pieces(file: RawTensorFile, name: str, info: TensorInfo) -> Iterator[np.ndarray[Any, Any]]:
    """The tensor's bytes, a bounded number of elements at a time."""
    item = ITEM_BYTES[info.code]
    for first in range(0, info.num_elements, _PIECE_ELEMENTS):
        count = min(_PIECE_ELEMENTS, info.num_elements - first)
        piece = np.empty(count * item, dtype="u1")
        file.read_into(piece.data, name, start=first * item)
        yield piece


def _values(place: str, a: Any, b: Any) -> list[ValueChange]:
    """Where two plain values of the manifests differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        changes = []
        for key in dict.fromkeys([*a, *b]):
            changes += _values(f"{place}.{key}", a.get(key, _ABSENT), b.get(key, _ABSENT))
        return changes
    if a is not _ABSENT and b is not _ABSENT and json.dumps(a) == json.dumps(b):
        return []
    return [ValueChange(place, {side: value for side, value in (("a", a), ("b", b)) if value is not _ABSENT})]


def _is_tensor(value: Any) -> bool:
    return isinstance(value, dict) and "$tensor" in value


def _traits(encoded: dict[str, Any]) -> dict[str, Any]:
    """Device, stride and what else stands beside a tensor's name."""
    return {key: value for key, value in encoded.items() if key != "$tensor"}


def _by_key(encoded: dict[str, Any]) -> dict[Any, Any]:
    """A mapping's entries by key, whichever way it was written."""
    tag = next(iter(encoded), "")
    if tag in ("$dict", "$ordered", "$counter"):
        return {key if isinstance(key, str | int) else json.dumps(key): value for key, value in encoded[tag]}
    if tag == "$defaultdict":
        return _by_key({"$dict": encoded[tag]["items"]})
    return encoded


def _kind(info: TensorInfo) -> str:
    return f"{info.code}{list(info.shape)}"


def _shown(value: Any) -> Any:
    """A value for people and programs; what is nested or long, shortened."""
    if value is None or isinstance(value, bool | int | float):
        return value
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."

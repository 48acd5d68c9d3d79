"""Plans: what was worked out about one state serves the next of the same structure.

Between two snapshots of a training hardly ever more changes than bytes and a few numbers; names, references and the
layout of ten thousand tensors would be worked out each time for nothing. A plan is made while a state is taken apart.
The next state is walked again. Where the plan has tensors only what their encoding depends on is compared, in bulk:
places, keys, types, dtypes, shapes, strides, devices, and which share memory. Plain values are encoded afresh if they
are not, to the byte, what they were; what is the same is given as the very same object, so that its JSON is, too.

Policy: anything that differs, or cannot be compared, is taken apart in full. A plan holds no tensor and no address, so
that replaced tensors are found, and none is kept alive; but for those of sections of which is said that nobody changes
them once they are made: where the very object is given again, it is not walked.
"""

from __future__ import annotations

import marshal
from dataclasses import dataclass, field
from itertools import chain
from operator import is_
from typing import TYPE_CHECKING, Any

import torch

from resumable_trainer.snapshot.likeness import Likeness
from resumable_trainer.snapshot.tree import MAX_DEPTH, Flat, Plain, TreeWriter

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

_TENSORS = {torch.Tensor, torch.nn.Parameter}
_HOLDERS = (dict, Plain, list)
_KEPT_DEPTH = 1  # a section made once, and each of its entries
_WITHOUT_REFERENCES = 2  # version of the marshal format whose bytes depend on nothing but the value
_NAMES = {str}
_PLACES = {str, int}


class Planner:
    """Takes states apart one after the other, each as `flatten` would."""

    def __init__(self) -> None:
        self._plan: _Plan | None = None

    def flatten(
        self,
        sections: Mapping[str, object],
        apart: Mapping[str, Collection[str]] | None = None,
        *,
        made_once: Collection[str] = (),
    ) -> Flat:
        """Take named trees apart into values and tensors; other arguments and errors are those of `tree.flatten`.

        Args:
            sections: Trees by name.
            apart: See there.
            made_once: Sections whose trees, and what these are made of, nobody changes once they are made, but for the
                bytes of their tensors. What is the very object of before is not walked.
        """
        apart = apart or {}
        is_planned = self._plan is not None and self._plan.apart == apart
        again = self._plan.follow(sections, made_once) if self._plan is not None and is_planned else None
        if again is not None:
            return again
        self._plan = None
        recorder = _Recorder(apart)
        values = {name: recorder.section(name, tree) for name, tree in sections.items()}
        self._plan = recorder.plan(values)
        return Flat(values, recorder.found(), self._plan)


@dataclass
class _Node:
    """What is encoded as a whole.

    Attributes:
        section: Where it is.
        path: And where in it.
        kind: Its type; None for a tensor.
        encoded: Its typed JSON.
    """

    section: str
    path: tuple[Any, ...]
    kind: type | None
    encoded: Any

    def is_at(self, section: str, path: tuple[Any, ...]) -> bool:
        """Whether it stands at this place; True is no 1 here."""
        is_here = self.section == section and self.path == path
        return is_here and (not path or [*map(type, self.path)] == [*map(type, path)])


@dataclass
class _Tensors(_Node):
    """A tensor, or a dict that holds nothing but tensors, or nothing but such dicts.

    Attributes:
        keys: Of the dict; None for a single tensor.
        inner_keys: Keys of the dicts in it; None if it holds tensors.
    """

    keys: list[Any] | None
    inner_keys: list[list[str]] | None


@dataclass
class _Values(_Node):
    """A list or dict of plain values.

    Attributes:
        packed: Its bytes, which nothing but an equal one of the very same types has; None once it has changed.
    """

    packed: bytes | None

    def still_is(self, value: object) -> bool:
        """Whether this is its value; what has changed once is likely to change again, and not compared any more."""
        if self.packed is not None and _packed(value) != self.packed:
            self.packed = None
        return self.packed is not None


@dataclass
class _Recorder(TreeWriter):
    """Takes a state apart, and takes note of what a plan needs."""

    leaves: list[torch.Tensor] = field(default_factory=list)
    marked: list[torch.Tensor] = field(default_factory=list)  # those in which it is said what is a parameter
    nodes: list[_Node] = field(default_factory=list)
    stored: dict[str, dict[str, int]] = field(default_factory=dict)  # file -> name -> number of its leaf
    _is_within_node: bool = False

    def value(self, value: object, path: tuple[Any, ...]) -> Any:
        kind = type(value)
        if kind not in _HOLDERS or self._is_within_node:
            return super().value(value, path)
        keys = _keys(value) if kind is not list else None  # type: ignore[arg-type]
        is_usual = {*map(type, path)} <= _PLACES
        packed = _packed(value) if keys is None and is_usual and _is_plain(value) else None
        if keys is None and packed is None:
            return super().value(value, path)
        self._is_within_node = True
        encoded = super().value(value, path)
        self._is_within_node = False
        place = self._section, path, kind, encoded
        self.nodes.append(_Values(*place, packed) if keys is None else _Tensors(*place, *keys))
        return encoded

    def tensor(self, tensor: torch.Tensor, path: tuple[Any, ...]) -> dict[str, Any]:
        encoded = super().tensor(tensor, path)
        self.leaves.append(tensor)
        if not self._is_plain:
            self.marked.append(tensor)
        if not self._is_within_node:
            self.nodes.append(_Tensors(self._section, path, None, encoded, None, None))
        return encoded

    def store(self, file: str, name: str, tensor: torch.Tensor) -> None:
        super().store(file, name, tensor)
        self.stored.setdefault(file, {})[name] = len(self.leaves)

    def plan(self, values: dict[str, Any]) -> _Plan | None:
        """What the next state may follow, given the encoded sections; None if this one is too unusual."""
        if not all({*map(type, node.path)} <= _PLACES for node in self.nodes):
            return None
        likeness = Likeness(self.leaves, self.marked)
        # Invariant: files come in the order of `found`.
        stored = {file: _Picked.of(self.stored[file]) for file in self.found()}
        # A dict of its own: the one that is given out is written down while the next state is taken apart.
        return _Plan(self.apart, self.nodes, stored, likeness, dict(values)) if likeness.is_usual else None


@dataclass(frozen=True)
class _Picked:
    """Which tensors are in a file, by their numbers, and under which names."""

    names: list[str]
    numbers: list[int]
    first: int | None  # if they follow one another

    @classmethod
    def of(cls, stored: Mapping[str, int]) -> _Picked:
        numbers = [*stored.values()]
        is_run = numbers == [*range(numbers[0], numbers[0] + len(numbers))]
        return cls([*stored], numbers, numbers[0] if is_run else None)

    def out_of(self, leaves: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        if self.first is not None:
            return dict(zip(self.names, leaves[self.first : self.first + len(self.names)], strict=True))
        return dict(zip(self.names, [leaves[number] for number in self.numbers], strict=True))


@dataclass(frozen=True)
class _Kept:
    """A part of the newest state that comes again as the very same object, or not at all."""

    value: object
    encoded: Any
    leaves: list[torch.Tensor]
    marked: list[torch.Tensor]
    num_nodes: int


@dataclass(frozen=True, eq=False)
class _Plan:
    apart: Mapping[str, Collection[str]]
    nodes: list[_Node]
    stored: dict[str, _Picked]
    likeness: Likeness
    values: dict[str, Any]  # of the newest state
    kept: dict[tuple[str, tuple[Any, ...]], _Kept] = field(default_factory=dict)  # of it, too: by section and place

    def follow(self, sections: Mapping[str, object], made_once: Collection[str]) -> Flat | None:
        """The state taken apart; None if it has another structure."""
        for at in [at for at in self.kept if at[0] not in made_once]:
            del self.kept[at]
        follower = _Follower(plan=self, made_once=made_once)
        try:
            values = {name: self._newest(name, follower.section(name, tree)) for name, tree in sections.items()}
            is_like = follower.done == len(self.nodes) and self.likeness.holds_for(follower.leaves, follower.marked)
        except Exception:  # noqa: BLE001 - taking it apart in full says what is wrong with it, if anything is
            return None
        if not is_like:
            return None
        self.values.update(values)
        tensors = {file: picked.out_of(follower.leaves) for file, picked in self.stored.items()}
        return Flat(values, tensors, self)

    def _newest(self, section: str, encoded: Any) -> Any:
        """The object from before, if it holds the very same."""
        known = self.values.get(section)
        if encoded is known or type(encoded) is not dict or type(known) is not dict or list(encoded) != list(known):
            return encoded
        return known if all(map(is_, encoded.values(), known.values())) else encoded


class _DiffersError(Exception):
    """The state is not as the plan has it."""


@dataclass
class _Follower(TreeWriter):
    """Walks a state along a plan; collects its tensors in their order."""

    plan: _Plan = field(kw_only=True)
    made_once: Collection[str] = field(kw_only=True)
    leaves: list[torch.Tensor] = field(default_factory=list)
    marked: list[torch.Tensor] = field(default_factory=list)
    done: int = 0

    def value(self, value: object, path: tuple[Any, ...]) -> Any:
        if len(path) <= _KEPT_DEPTH and self._section in self.made_once and type(value) in _HOLDERS:
            return self._once(value, path)
        return self._walked(value, path)

    def _once(self, value: object, path: tuple[Any, ...]) -> Any:
        """As before, where it is the very object of before."""
        kept = self.plan.kept.get((self._section, path))
        if kept is not None and kept.value is value:
            self.leaves += kept.leaves
            self.marked += kept.marked
            self.done += kept.num_nodes
            return kept.encoded
        leaves, marked, done = len(self.leaves), len(self.marked), self.done
        encoded = self._walked(value, path)
        found = self.leaves[leaves:], self.marked[marked:], self.done - done
        self.plan.kept[self._section, path] = _Kept(value, encoded, *found)
        return encoded

    def _walked(self, value: object, path: tuple[Any, ...]) -> Any:
        kind = type(value)
        if kind in _HOLDERS and self.done < len(self.plan.nodes):
            node = self.plan.nodes[self.done]
            if node.kind is kind and node.is_at(self._section, path):
                if isinstance(node, _Tensors):
                    return self._whole(value, node)  # type: ignore[arg-type]
                assert isinstance(node, _Values)
                self.done += 1
                return node.encoded if node.still_is(value) else super().value(value, path)
        return super().value(value, path)

    def _whole(self, value: dict[Any, Any], node: _Tensors) -> Any:
        if _keys(value) != (node.keys, node.inner_keys):
            raise _DiffersError
        inner = value.values()
        leaves = list(inner) if node.inner_keys is None else [*chain.from_iterable(map(dict.values, inner))]
        self.leaves += leaves
        if node.kind is not Plain:
            self.marked += leaves
        self.done += 1
        return node.encoded

    def tensor(self, tensor: torch.Tensor, path: tuple[Any, ...]) -> dict[str, Any]:
        node = self.plan.nodes[self.done]
        if node.kind is not None or type(tensor) not in _TENSORS or not node.is_at(self._section, path):
            raise _DiffersError
        self.leaves.append(tensor)
        if not self._is_plain:
            self.marked.append(tensor)
        self.done += 1
        return node.encoded  # type: ignore[no-any-return]


def _keys(value: dict[Any, Any]) -> tuple[list[Any], list[list[str]] | None] | None:
    """Keys of a dict that is encoded as a whole, and of the dicts in it; None if it is not one."""
    keys, inner = list(value), value.values()
    kinds = {*map(type, inner)}
    if kinds and kinds <= _TENSORS:
        return (keys, None) if {*map(type, keys)} == _NAMES else None
    if kinds != {dict} or not {*map(type, keys)} <= _PLACES:
        return None
    leaves = chain.from_iterable(map(dict.values, inner))
    if not {*map(type, leaves)} <= _TENSORS or not {*map(type, chain.from_iterable(inner))} <= _NAMES:
        return None
    return keys, [*map(list, inner)]


def _packed(value: object) -> bytes | None:
    """The bytes of plain values; of others some that no plain value has, or None."""
    try:
        return marshal.dumps(value, _WITHOUT_REFERENCES)  # type: ignore[arg-type]
    except ValueError:
        return None


def _is_plain(value: object, depth: int = 0) -> bool:
    """Whether it holds nothing but values of these very types, which differ in their bytes if they differ at all."""
    kind = type(value)
    if kind is dict:
        inner: Iterable[object] = chain.from_iterable(value.items())  # type: ignore[attr-defined]
    elif kind is list or kind is tuple:
        inner = value  # type: ignore[assignment]
    else:
        return value is None or kind in (bool, int, float, str)
    return depth < MAX_DEPTH and all(_is_plain(each, depth + 1) for each in inner)

from __future__ import annotations

import collections
import enum
import json
import pathlib
import struct
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from resumable_trainer.durable.files import Files, NewFile
from resumable_trainer.errors import DamagedSnapshotError, NoValidSnapshotError, SettingsError, UnsafeValueError
from resumable_trainer.snapshot import manifest as manifests
from resumable_trainer.snapshot import tensors, writer
from resumable_trainer.snapshot import tensors as tensors_module
from resumable_trainer.snapshot import tree as tree_module
from resumable_trainer.snapshot.layout import Position, parse_name, snapshot_name
from resumable_trainer.snapshot.manifest import Best, Manifest, PositionFields
from resumable_trainer.snapshot.reader import Reader
from resumable_trainer.snapshot.retention import Kept, to_delete
from resumable_trainer.snapshot.store import Store
from resumable_trainer.snapshot.tensors import DTYPES, TensorFile, write_tensors
from resumable_trainer.snapshot.tree import flatten, unflatten
from resumable_trainer.snapshot.writer import StateFiles
from resumable_trainer.state.compare import differences

if TYPE_CHECKING:
    from pathlib import Path


def through_disk(directory: Path, tree: Any) -> Any:
    store = Store(directory)
    name = save(store, 1, tree)
    return Reader(store.path(name), store.verify(name)).sections()["part"]


def save(store: Store, step: int, tree: Any = None) -> str:
    name = f"step-{step:09d}"
    store.run_directory.mkdir(exist_ok=True)
    temporary = store.begin(name, token="t")
    flat = flatten({"part": {"w": torch.arange(40.0)} if tree is None else tree})
    entries = StateFiles(flat).write(Files(), temporary)
    manifest = Manifest(
        run_id="r", generation=1, name=name, position=PositionFields(epoch=0, batch=step, step=step),
        epoch_complete=False, parent=None, parent_digest=None, created="now", files=entries,
        metrics={"a": "NaN", "b": 0.1},
    )  # fmt: skip
    store.write_manifest(temporary, manifest)
    store.commit(temporary, name, check=lambda: None)
    return name


def in_memory(tree: Any) -> Any:
    flat = flatten({"part": tree})
    values = json.loads(json.dumps(flat.values, allow_nan=False))
    return unflatten(values, lambda section, name: flat.tensors[section][name])["part"]


floats = st.floats(allow_nan=True, allow_infinity=True)
keys = st.one_of(st.text(max_size=4), st.integers(), st.booleans(), st.tuples(st.integers(), st.text(max_size=2)))
leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), floats, st.text(max_size=5), st.binary(max_size=5), st.complex_numbers(),
    floats.map(np.float64), st.integers(-100, 100).map(np.int8), st.just(torch.bfloat16), st.just(torch.device("cpu")),
    st.just(torch.Size([2, 3])), st.just(range(1, 9, 2)), st.just(slice(None, 3)), st.frozensets(st.integers()),
    st.sets(st.text(max_size=3)), st.just(np.array([1.5, -0.0])), st.just(np.dtype("<f4")),
)  # fmt: skip
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(keys, inner, max_size=3),
        st.dictionaries(st.text(max_size=3), inner, max_size=3).map(collections.OrderedDict),
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(trees)
def test_values_come_back_in_kind_and_to_the_bit(tree: Any) -> None:
    back = in_memory(tree)
    assert type(back) is type(tree)
    assert differences(tree, back, place="tree") == []


def test_deques_counters_and_defaultdicts_keep_what_they_are() -> None:
    tree = [collections.deque([1, 2], 5), collections.Counter("abca"), collections.defaultdict(list, {3: [4]})]
    back = in_memory(tree)
    assert back == tree
    assert (back[0].maxlen, back[2].default_factory) == (5, list)


class Colour(enum.Enum):
    RED = 1


class Level(enum.StrEnum):
    HIGH = "high"


def test_enums_come_back_without_an_import() -> None:
    assert in_memory([Colour.RED, Level.HIGH]) == [Colour.RED, Level.HIGH]
    flat = flatten({"part": Colour.RED})
    flat.values["part"]["$enum"][0] = "not_loaded_anywhere"
    with pytest.raises(ValueError, match="import not_loaded_anywhere"):
        unflatten(flat.values, lambda s, n: torch.empty(0))


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (lambda: None, r"part\['x'\]\[0\] is a builtins.function"),
        (object(), "is a builtins.object"),
        (collections.namedtuple("P", "a")(1), "is a"),
        (np.array([object()]), "is an array of dtype object"),
        (torch.eye(2).to_sparse(), "layout torch.sparse_coo"),
        (torch.empty(2, device="meta"), "without data"),
    ],
)
def test_a_value_without_a_safe_form_is_named_with_its_place(value: Any, reason: str) -> None:
    with pytest.raises(UnsafeValueError, match=reason):
        flatten({"part": {"x": [value]}})


def test_a_tree_that_holds_itself_is_refused() -> None:
    tree: list[Any] = []
    tree.append(tree)
    with pytest.raises(UnsafeValueError, match="holds itself"):
        flatten({"part": tree})


def samples() -> dict[str, torch.Tensor]:
    tensors = {}
    for code, dtype in DTYPES.items():
        raw = torch.arange(48 * dtype.itemsize, dtype=torch.int64).to(torch.uint8)
        tensors[code] = (raw % 2).to(torch.bool)[:48].reshape(6, 8) if code == "BOOL" else raw.view(dtype).reshape(6, 8)
    tensors["zero"] = torch.tensor(1.5)
    tensors["empty"] = torch.empty(0, 3)
    tensors["transposed"] = torch.arange(6.0).reshape(2, 3).t()
    tensors["nan"] = torch.tensor([float("nan"), -0.0, float("inf")])
    return tensors


def test_the_library_opens_every_file_and_sees_the_same_bytes(tmp_path: Path) -> None:
    tensors = samples()
    with NewFile(tmp_path / "t.safetensors", files=Files()) as file:
        write_tensors(file, tensors)
    library = load_file(tmp_path / "t.safetensors")
    with TensorFile(tmp_path / "t.safetensors") as ours:
        assert ours.names() == list(tensors)
        for name, tensor in tensors.items():
            assert differences(tensor, ours.read(name), place=name) == []
            assert differences(tensor, library[name], place=name) == []


def test_tensors_of_all_kinds_come_back_from_disk(tmp_path: Path) -> None:
    tree = {
        **samples(),
        "complex": torch.randn(3, 2, dtype=torch.complex128),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "big array": np.arange(5000, dtype=np.uint16),
    }
    back = through_disk(tmp_path / "run", tree)
    assert differences(tree, back, place="tree") == []
    assert back["channels_last"].stride() == tree["channels_last"].stride()


def test_tied_tensors_are_stored_once_also_across_sections() -> None:
    tensor = torch.randn(3)
    flat = flatten({"a": {"x": tensor, "y": tensor}, "b": [tensor, tensor[:2]]})
    assert {section: list(named) for section, named in flat.tensors.items()} == {"a": ["x"], "b": ["1"]}
    back = unflatten(flat.values, lambda section, name: flat.tensors[section][name].clone())
    assert back["a"]["x"] is back["a"]["y"] is back["b"][0]


def test_what_would_not_be_read_back_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flat = flatten({"part": {str(number): torch.tensor(number) for number in range(4)}})
    monkeypatch.setattr(writer, "MAX_STATE_BYTES", 10)
    with pytest.raises(UnsafeValueError, match="at most 10 are read back"):
        StateFiles(flat).size()
    monkeypatch.setattr(tensors, "MAX_TENSORS", 3)
    with pytest.raises(UnsafeValueError, match="has 4 tensors"), NewFile(tmp_path / "file", files=Files()) as file:
        write_tensors(file, flat.tensors["part"])


def test_names_never_collide() -> None:
    tree = {
        "a.b": torch.ones(1),
        "a": {"b": torch.zeros(1)},
        0: torch.ones(2),
        "0": torch.zeros(2),
        "x" * 600: torch.ones(3),
    }
    assert differences(tree, in_memory(tree), place="tree") == []


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"[]",
        b'{"a":1}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}',
        b'{"a":{"dtype":"F32","shape":[1152921504606846976],"data_offsets":[0,4611686018427387904]}}',
        b'{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,-8]}}',
        b'{"a":{"dtype":"F99","shape":[2],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}',
        b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}",
    ],
)
def test_lying_headers_are_refused(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)
    with pytest.raises(DamagedSnapshotError):
        TensorFile(path)
    path.write_bytes(struct.pack("<Q", 2**63) + b"{}")
    with pytest.raises(DamagedSnapshotError):
        TensorFile(path)


def test_every_single_bit_flip_of_a_manifest_is_found(tmp_path: Path) -> None:
    store = Store(tmp_path / "run")
    data = (store.path(save(store, 1)) / "manifest.json").read_bytes()
    manifests.from_bytes(data)
    for place in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[place] ^= 1 << bit
            with pytest.raises(DamagedSnapshotError):
                manifests.from_bytes(bytes(damaged))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), 0.25])
def test_a_best_value_that_is_infinite_is_read_again(tmp_path: Path, value: float) -> None:
    store = Store(tmp_path / "run")
    manifest = store.manifest(save(store, 1))
    best = Best(metric="loss", value=value, epoch=0, step=1)
    assert manifests.from_bytes(manifest.model_copy(update={"best": best}).to_bytes()).best == best


def test_a_newer_format_is_said_and_never_quarantined(tmp_path: Path) -> None:
    from resumable_trainer.durable.digest import digest_bytes

    store = Store(tmp_path / "run")
    path = store.path(save(store, 1)) / "manifest.json"
    body = path.read_bytes().replace(b'"format": 1', b'"format": 2').rpartition(b',\n  "digest"')[0]
    path.write_bytes(body + b',\n  "digest": "%s"\n}\n' % digest_bytes(body).encode())
    with pytest.raises(SettingsError, match="format 2, this version reads up to 1"):
        store.newest_valid(on_damage=lambda name, error: pytest.fail("not damaged"))


@pytest.mark.parametrize("kind", ["symlink", "fifo", "directory", "swap", "manifest of another"])
def test_what_is_no_regular_file_or_not_its_own_is_found(tmp_path: Path, kind: str) -> None:
    import os
    import shutil

    store = Store(tmp_path / "run")
    old, new = save(store, 1), save(store, 2)
    victim, other = store.path(new) / "state.json", store.path(new) / "part.safetensors"
    if kind == "swap":
        a, b = victim.read_bytes(), other.read_bytes()
        victim.write_bytes(b)
        other.write_bytes(a)
    elif kind == "manifest of another":
        shutil.copy(store.path(old) / "manifest.json", store.path(new) / "manifest.json")
    else:
        shutil.copy(victim, tmp_path / "copy")
        victim.unlink()
        make = {
            "symlink": lambda: victim.symlink_to(tmp_path / "copy"),
            "fifo": lambda: os.mkfifo(victim),
            "directory": victim.mkdir,
        }
        make[kind]()
    reasons: list[str] = []
    found = store.newest_valid(on_damage=lambda name, error: reasons.append(name))
    assert found is not None
    assert (found.name, reasons) == (old, [new])


def test_none_valid_lists_every_reason(tmp_path: Path) -> None:
    store = Store(tmp_path / "run")
    for step in (1, 2):
        (store.path(save(store, step)) / "state.json").unlink()
    with pytest.raises(
        NoValidSnapshotError, match=r"step-000000002: state.json is missing[\s\S]*step-000000001: state"
    ):
        store.newest_valid(on_damage=lambda name, error: None)


def test_quarantine_and_set_aside_never_overwrite(tmp_path: Path) -> None:
    store = Store(tmp_path / "run")
    for _ in range(2):
        name = save(store, 1)
        store.quarantine(name, "why")
        store.set_aside([save(store, 1)], "back")
    assert sorted(p.name for p in (tmp_path / "run/quarantine").iterdir()) == [
        "step-000000001", "step-000000001.2", "step-000000001.2.reason.txt", "step-000000001.reason.txt",
    ]  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "run/set-aside").iterdir()) == ["line-1", "line-2"]


def test_names_sort_by_step_and_then_by_completeness(tmp_path: Path) -> None:
    names = [
        snapshot_name(Position(0, 7, 7), epoch_complete=False),
        snapshot_name(Position(1, 0, 7), epoch_complete=True),
        snapshot_name(Position(1, 1, 8), epoch_complete=False),
        snapshot_name(Position(2, 0, 10**10), epoch_complete=True),
    ]
    for name in reversed(names):
        (tmp_path / "snapshots" / name).mkdir(parents=True)
    junk_names = ["step-7", "step-000000007-epoch-1", ".tmp-step-000000009-a", "step-0000000007", "x"]
    junk_names += ["step-000000007-epoch-0000001", "step-00000000\u0667", "step-000000007-epoch-00000\u0667"]
    for junk in junk_names:
        (tmp_path / "snapshots" / junk).mkdir()
        assert parse_name(junk) is None
    assert Store(tmp_path).names() == names
    assert Store(tmp_path).select("7") == names[1]
    assert Store(tmp_path).select("epoch:2") == names[3]


@given(
    st.lists(st.one_of(st.none(), st.floats()), min_size=1, max_size=12),
    st.integers(2, 5),
    st.integers(0, 3),
    st.one_of(st.none(), st.integers(1, 4)),
    st.sampled_from(["max", "min"]),
)
def test_retention_keeps_what_it_promises(
    values: list[float | None], last: int, best: int, every: int | None, mode: Any
) -> None:
    kept = [Kept(f"s{i}", Position(i + 1, 0, i), True, value) for i, value in enumerate(values)]
    gone = to_delete(kept, keep_last=last, keep_best=best, keep_every=every, mode=mode)
    stay = [snapshot for snapshot in kept if snapshot.name not in gone]
    assert stay[-1] is kept[-1]
    assert stay[-last:] == kept[-last:]
    rated = [s.value for s in kept if s.value is not None and s.value == s.value]
    if best and rated:
        assert (max if mode == "max" else min)(rated) in [s.value for s in stay]
    if every:
        assert all(s in stay for s in kept if s.position.epoch % every == 0)
    assert len(stay) <= last + best + (len(kept) if every else 0)


def test_parameters_come_back_as_parameters_and_frozen_ones_frozen() -> None:
    tree = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.zeros(2), requires_grad=False), torch.ones(2)]
    back = in_memory(tree)
    assert [type(tensor) for tensor in back] == [torch.nn.Parameter, torch.nn.Parameter, torch.Tensor]
    assert [tensor.requires_grad for tensor in back] == [True, False, False]
    assert all(torch.equal(old, new) for old, new in zip(tree, back, strict=True))


def test_a_tensor_whose_memory_has_gaps_comes_back_without_them(tmp_path: Path) -> None:
    gaps = torch.arange(12.0).reshape(3, 4)[:, :2]
    back = through_disk(tmp_path / "run", {"gaps": gaps})["gaps"]
    assert torch.equal(back, gaps)
    assert back.is_contiguous()


def test_paths_and_arrays_of_every_kind_come_back() -> None:
    tree = {
        "path": pathlib.PurePosixPath("/data/set"),
        "text": np.array(["a", "bc"] * 300),
        "long": np.arange(300, dtype=np.longdouble),
        "swapped": np.arange(300, dtype=">f8"),
        "dates": np.arange(300).astype("M8[s]"),
    }
    back = in_memory(tree)
    assert back["path"] == pathlib.Path("/data/set")
    for name in ("text", "long", "swapped", "dates"):
        assert back[name].dtype == tree[name].dtype  # type: ignore[attr-defined]
        assert back[name].tobytes() == tree[name].tobytes()  # type: ignore[attr-defined]


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecated, prototype and experimental: states may hold them all the same
    QUANTIZED = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    NESTED = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    HALF_COMPLEX = torch.zeros(2, dtype=torch.complex32)


class Unit(torch.Tensor):
    """A subclass has meaning of its own."""


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (torch.ones(2).as_subclass(Unit), r"is a .*\.Unit"),
        (QUANTIZED, "is a quantized or nested tensor"),
        (NESTED, "is a quantized or nested tensor"),
        (HALF_COMPLEX, "is a tensor of dtype torch.complex32"),
        (collections.defaultdict(lambda: 0), "is a defaultdict of <lambda>"),
        (np.zeros(1, dtype=[("a", "i4")])[0], "is a scalar of dtype"),
        (np.zeros(1, dtype=[("a", "i4")]), "is an array of dtype"),
    ],
)
def test_what_plain_bytes_would_lose_is_refused(value: Any, reason: str) -> None:
    with pytest.raises(UnsafeValueError, match=rf"part\['x'\] {reason}"):
        flatten({"part": {"x": value}})


def test_on_a_machine_of_the_other_byte_order_nothing_is_written_wrongly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Big:
        byteorder = "big"

    monkeypatch.setattr(tensors_module, "sys", Big)
    with pytest.raises(NotImplementedError, match="little-endian"), NewFile(tmp_path / "t", files=Files()) as file:
        write_tensors(file, {"w": torch.ones(2)})


class Movable:
    """Stands for a tensor that was read; says where it was moved to."""

    device = torch.device("cpu")

    def to(self, device: torch.device) -> Movable:
        moved = Movable()
        moved.device = device
        return moved


@pytest.mark.parametrize(
    ("current", "count", "saved", "found"),
    [
        ("cuda:0", 4, "cuda:3", "cuda:3"),
        ("cuda:1", 2, "cuda:2", "cuda:1"),  # fewer of them here: the current one
        ("cuda:0", 1, "cuda", "cuda"),
        ("mps:0", 1, "cuda:0", "cpu"),  # another kind
        (None, 0, "cuda:0", "cpu"),
    ],
)
def test_a_tensor_goes_back_to_its_device_as_far_as_this_machine_has_it(
    monkeypatch: pytest.MonkeyPatch, current: str | None, count: int, saved: str, found: str
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: current is not None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(current or "cpu"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    encoded = {"part": {"$tensor": ["part", "value"], "device": saved}}
    back = unflatten(encoded, lambda section, name: Movable())["part"]  # type: ignore[arg-type,return-value]
    assert back.device == torch.device(found)


def test_a_tensor_that_was_not_on_the_cpu_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    """`meta` is the one other device that every machine has; it is refused otherwise."""
    monkeypatch.setattr(tree_module, "is_storable", lambda tensor: None)
    assert flatten({"part": torch.empty(2, device="meta")}).values["part"]["device"] == "meta"
    assert "device" not in flatten({"part": torch.empty(2)}).values["part"]


def test_what_a_killed_removal_left_is_swept_and_is_no_snapshot_that_never_came_to_be(tmp_path: Path) -> None:
    store = Store(tmp_path / "run")
    name = save(store, 1)
    for left in ("snapshots/.trash-step-000000001-ab", "snapshots/.tmp-step-000000002-cd", ".tmp-run.json-ef"):
        (tmp_path / "run" / left).mkdir()
    (tmp_path / "run" / "mine").mkdir()
    assert store.sweep() == ["step-000000002-cd"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["mine", "snapshots"]
    assert [path.name for path in (tmp_path / "run/snapshots").iterdir()] == [name]
    assert Store(tmp_path / "nowhere").sweep() == []


@given(st.lists(st.booleans(), min_size=1, max_size=20), st.integers(1, 5))
def test_every_nth_within_an_epoch_stays(complete: list[bool], every: int) -> None:
    kept = [Kept(f"s{i}", Position(0, i, i), done, None) for i, done in enumerate(complete)]
    gone = to_delete(kept, keep_last=1, keep_best=0, keep_every=None, keep_every_steps=every)
    stay = [s for s in kept[:-1] if not s.epoch_complete and s.position.step % every == 0]
    assert [s.name for s in kept if s.name not in gone] == [s.name for s in [*stay, kept[-1]]]


class Noting(Files):
    """Notes what becomes durable, and what gets another name."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def sync_directory(self, path: Path) -> None:
        super().sync_directory(path)
        self.done.append(f"sync {path.name}")

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        self.done.append(f"rename {target.name}")


def test_what_goes_with_an_abandoned_line_is_durable_before_its_first_snapshot_moves(tmp_path: Path) -> None:
    files = Noting()
    store = Store(tmp_path / "run", files=files)
    names = [save(store, 1), save(store, 2)]
    (tmp_path / "run/metrics.jsonl").write_bytes(b"rows\n")
    files.done.clear()
    line = store.set_aside(names, "going back")
    assert files.done == [
        "sync run", "sync line-1", "sync set-aside",
        "rename step-000000002", "sync line-1", "sync snapshots",
        "rename step-000000001", "sync line-1", "sync snapshots",
    ]  # fmt: skip
    assert (line / "reason.txt").read_text() == "going back\n"
    assert (line / "metrics.jsonl").read_bytes() == b"rows\n"
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == b"rows\n"


def test_the_reason_of_a_quarantine_is_there_before_the_snapshot(tmp_path: Path) -> None:
    files = Noting()
    store = Store(tmp_path / "run", files=files)
    name = save(store, 1)
    files.done.clear()
    target = store.quarantine(name, "a bit has flipped")
    assert files.done == ["sync run", f"rename {name}", "sync quarantine", "sync snapshots"]
    assert target.with_name(f"{name}.reason.txt").read_text() == f"{name}: a bit has flipped\n"


def test_the_directory_of_snapshots_is_durable_before_the_first_is_written(tmp_path: Path) -> None:
    files = Noting()
    (tmp_path / "run").mkdir()
    store = Store(tmp_path / "run", files=files)
    store.begin("step-000000001", token="a")
    assert files.done == ["sync run"]
    store.begin("step-000000002", token="b")
    assert files.done == ["sync run"]

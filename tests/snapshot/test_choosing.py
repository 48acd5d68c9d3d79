"""Which snapshot is meant, whether it is what was committed, and what is said where it is not."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from resumable_trainer.durable.digest import digest_bytes, digest_file
from resumable_trainer.durable.files import Files, NewFile
from resumable_trainer.errors import DamagedSnapshotError, NotFoundError, ResumableTrainerError, SnapshotGoneError
from resumable_trainer.snapshot import manifest as manifests
from resumable_trainer.snapshot import strict_json, values
from resumable_trainer.snapshot.layout import Position, snapshot_name
from resumable_trainer.snapshot.manifest import Best, Manifest, PositionFields
from resumable_trainer.snapshot.raw import RawTensorFile
from resumable_trainer.snapshot.reader import Reader
from resumable_trainer.snapshot.selected import select
from resumable_trainer.snapshot.store import Store
from resumable_trainer.snapshot.tensors import TensorFile, write_tensors
from resumable_trainer.snapshot.tree import flatten, unflatten
from resumable_trainer.snapshot.writer import StateFiles

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def save(
    store: Store,
    step: int,
    *,
    epoch: int | None = None,
    best: Best | None = None,
    change: Callable[[Path], None] = lambda directory: None,
) -> str:
    """A committed snapshot, after `epoch` epochs if that is given; `change` acts before its manifest is made."""
    store.run_directory.mkdir(exist_ok=True)
    name = snapshot_name(Position(epoch or 0, 0, step), epoch_complete=epoch is not None)
    temporary = store.begin(name, token="t")
    flat = flatten({"part": {"w": torch.arange(4.0)}})
    StateFiles(flat).write(Files(), temporary)
    change(temporary)
    manifest = Manifest(
        run_id="r", generation=1, name=name, position=PositionFields(epoch=epoch or 0, batch=0, step=step),
        epoch_complete=epoch is not None, parent=None, parent_digest=None, created="now", files=entries(temporary),
        best=best,
    )  # fmt: skip
    store.write_manifest(temporary, manifest)
    store.commit(temporary, name, check=lambda: None)
    return name


def entries(directory: Path) -> dict[str, Any]:
    found = {path.name: path.read_bytes() for path in directory.iterdir()}
    return {name: manifests.FileEntry(num_bytes=len(data), digest=digest_bytes(data)) for name, data in found.items()}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "run")


# -- which one ------------------------------------------------------------------------------------


def test_latest_a_step_an_epoch_and_a_name_choose_what_they_say(store: Store) -> None:
    first, second, third = save(store, 4, epoch=1), save(store, 6), save(store, 8, epoch=2)
    assert store.select("latest") == third
    assert store.select("6") == store.select(second) == second
    assert store.select("epoch:1") == store.select("4") == first


@pytest.mark.parametrize("which", ["5", "epoch:3", "epoch:", "step:6", "nonsense", "best", ""])
def test_what_is_not_there_is_said_with_all_that_is(store: Store, which: str) -> None:
    names = [save(store, 4, epoch=1), save(store, 6)]
    with pytest.raises(NotFoundError, match=f"no snapshot {which!r}") as raised:
        store.select(which)
    assert raised.value.expected == names
    assert ", ".join(names) in str(raised.value)


def test_in_a_run_without_snapshots_there_is_no_latest(store: Store) -> None:
    for which in ("latest", "best", "4"):
        with pytest.raises(NotFoundError, match="there are: none"):
            store.select(which)
    with pytest.raises(NotFoundError, match="has no snapshots yet"):
        select(store.run_directory, "latest")


def best(epoch: int, step: int) -> Best:
    return Best(metric="accuracy", value=0.5, epoch=epoch, step=step)


def test_best_is_the_epoch_that_the_newest_readable_manifest_names(store: Store) -> None:
    first = save(store, 4, epoch=1, best=best(0, 4))
    second = save(store, 8, epoch=2, best=best(1, 8))
    assert store.select("best") == second
    save(store, 12, epoch=3, best=best(0, 4))
    assert store.select("best") == first
    damaged = save(store, 16, epoch=4, best=best(1, 8))
    (store.path(damaged) / "manifest.json").write_bytes(b"{}")
    assert store.select("best") == first, "a manifest that cannot be read says nothing"


def test_there_is_no_best_if_it_was_deleted_or_none_can_be_read(store: Store) -> None:
    name = save(store, 8, epoch=2, best=best(0, 4))
    with pytest.raises(NotFoundError):
        store.select("best")
    (store.path(name) / "manifest.json").unlink()
    with pytest.raises(NotFoundError):
        store.select("best")


# -- is it what was committed ---------------------------------------------------------------------


def test_a_file_or_a_link_with_a_snapshot_s_name_is_none(store: Store, tmp_path: Path) -> None:
    good = save(store, 1)
    store.path("step-000000002").write_bytes(b"")
    store.path("step-000000003").symlink_to(store.path(good))
    for name in ("step-000000002", "step-000000003"):
        with pytest.raises(DamagedSnapshotError, match="it is not a directory"):
            store.verify(name)


def test_a_manifest_that_is_no_regular_file_is_damage(store: Store) -> None:
    name = save(store, 1)
    manifest = store.path(name) / "manifest.json"
    manifest.rename(manifest.with_name("elsewhere"))
    manifest.symlink_to("elsewhere")
    with pytest.raises(DamagedSnapshotError, match="is a symbolic link, not a regular file"):
        store.verify(name)


def sealed(fields: object) -> bytes:
    """Any JSON as a manifest whose digest is right: what a stranger could write."""
    body = json.dumps(fields, indent=2).encode().removesuffix(b"\n}").removesuffix(b"\n]")
    return body + b',\n  "digest": "%s"\n}\n' % digest_bytes(body).encode()


def fields_of(path: Path) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(path.read_bytes())
    del fields["digest"]
    return fields


@pytest.mark.parametrize("file", ["../precious", "sub/file", "", ".", "..", "manifest.json", "a\0b"])
def test_a_manifest_that_names_a_file_outside_of_its_directory_is_damage(store: Store, file: str) -> None:
    path = store.path(save(store, 1)) / "manifest.json"
    fields = fields_of(path)
    fields["files"][file] = fields["files"]["state.json"]
    path.write_bytes(sealed(fields))
    with pytest.raises(DamagedSnapshotError, match="which is no file name"):
        store.verify("step-000000001")


def test_a_directory_in_the_place_of_a_file_is_damage_though_its_size_fits(store: Store) -> None:
    path = store.path(save(store, 1))
    fields = fields_of(path / "manifest.json")
    (path / "state.json").unlink()
    (path / "state.json").mkdir()
    fields["files"]["state.json"]["num_bytes"] = (path / "state.json").stat().st_size
    (path / "manifest.json").write_bytes(sealed(fields))
    with pytest.raises(DamagedSnapshotError, match="is a directory, not a regular file"):
        store.verify("step-000000001")


@pytest.mark.parametrize(
    "change",
    [
        {"position": {"epoch": -1, "batch": 0, "step": 1}},
        {"generation": "1"},
        {"surprise": 1},
        {"outcome": "exploded"},
        {"files": []},
        {"run_id": None},
    ],
)
def test_a_manifest_with_a_right_digest_and_wrong_fields_is_damage(store: Store, change: dict[str, Any]) -> None:
    path = store.path(save(store, 1)) / "manifest.json"
    path.write_bytes(sealed({**fields_of(path), **change}))
    with pytest.raises(DamagedSnapshotError, match=r"manifest\.json does not describe a snapshot"):
        store.verify("step-000000001")


def test_a_manifest_larger_than_any_that_is_written_is_not_read_whole(store: Store) -> None:
    path = store.path(save(store, 1)) / "manifest.json"
    with path.open("r+b") as file:
        file.truncate(manifests.MAX_BYTES + 1)
    with pytest.raises(DamagedSnapshotError, match=f"at most {manifests.MAX_BYTES} are read"):
        store.verify("step-000000001")


def test_settings_with_special_floats_at_any_depth_come_back_as_words(store: Store) -> None:
    settings = {"optimizer": {"lr": [1.5, float("inf"), -float("inf")], "eps": float("nan"), "name": "x"}}
    manifest = Manifest(
        run_id="r", generation=1, name="n", position=PositionFields(epoch=0, batch=0, step=0), epoch_complete=False,
        parent=None, parent_digest=None, created="now", files={}, settings=settings,
    )  # fmt: skip
    found = manifests.from_bytes(manifest.to_bytes()).settings
    assert found == {"optimizer": {"lr": [1.5, "Infinity", "-Infinity"], "eps": "NaN", "name": "x"}}


# -- what its files say ---------------------------------------------------------------------------


def sections(store: Store, change: Callable[[Path], None]) -> dict[str, Any]:
    """The state of a snapshot that was committed as a stranger has made it."""
    name = save(store, 1, change=change)
    return Reader(store.path(name), store.verify(name)).sections()


def test_a_snapshot_without_values_is_damage(store: Store) -> None:
    with pytest.raises(DamagedSnapshotError, match=r"the manifest lists no state\.json"):
        sections(store, lambda directory: (directory / "state.json").unlink())


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"[]", "is no object"),
        (b"3", "is no object"),
        (b"{", "Expecting property name"),
        (b"\xff", "can't decode"),
        (b'{"a":1,"a":2}', "duplicate key"),
        (b'{"a":NaN}', "JSON holds NaN"),
        (b'{"a":' + b"[" * 300 + b"]" * 300 + b"}", "nested deeper than 200"),
        (b"[" * 100_000, "nested too deep"),
    ],
)
def test_values_that_are_no_strict_json_object_are_damage(store: Store, data: bytes, reason: str) -> None:
    with pytest.raises(DamagedSnapshotError, match=reason):
        sections(store, lambda directory: (directory / "state.json").write_bytes(data))


def test_values_longer_than_is_read_are_damage(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "MAX_STATE_BYTES", 10)
    with pytest.raises(DamagedSnapshotError, match="at most 10 are read"):
        sections(store, lambda directory: None)
    assert strict_json.parse(b'{"a": 123}', max_bytes=10) == {"a": 123}


FLAT = {"$tensor": ["part", "w"]}


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"$surprise": 1}, "holds '\\$surprise', which this version does not know"),
        ({"$tuple": [1], "more": 2}, "holds '\\$tuple', which this version does not know"),
        ({"$npdtype": "O"}, "holds an array of dtype 'O'"),
        ({"$npscalar": ["i4,i4", "AAAAAAAAAAA="]}, "holds an array of dtype"),
        ({**FLAT, "stride": [2]}, "gives stride \\[2\\] for shape"),
        ({"$tensor": ["other", "w"]}, "speaks of 'other.safetensors', the manifest does not"),
        ({"$tensor": ["part", "v"]}, "holds no tensor 'v'"),
        ({"$tensor": "part"}, "does not describe a state"),
        ({"$defaultdict": {"factory": "eval", "items": []}}, "does not describe a state"),
        ({"$device": "warp"}, "does not describe a state"),
        ({"$deque": []}, "does not describe a state"),
        ({"$path": 3}, "does not describe a state"),
        ({"$float": "nan:00"}, "does not describe a state"),
        ({"$npscalar": ["<f4", ""]}, "does not describe a state"),
        ({"$timedelta": [10**12, 0, 0]}, "does not describe a state"),
        ({"$size": [2, -1]}, "holds a size that no tensor has"),
        ({**FLAT, "dtype": "float64"}, "gives tensor 'w' of 'part' another dtype"),
    ],
)
def test_values_that_describe_no_state_are_damage(store: Store, value: Any, reason: str) -> None:
    data = json.dumps({"part": [value]}).encode()
    with pytest.raises(DamagedSnapshotError, match=reason):
        sections(store, lambda directory: (directory / "state.json").write_bytes(data))


def test_a_part_that_is_not_there_is_damage_and_what_does_not_fit_into_memory_is_none(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = store.verify(save(store, 1))
    found = Reader(store.path(manifest.name), manifest)
    with pytest.raises(DamagedSnapshotError, match="holds no section 'other'"):
        found.section_on_cpu("other")

    def no_room(self: TensorFile, name: str) -> None:
        raise MemoryError

    monkeypatch.setattr(TensorFile, "read", no_room)
    with pytest.raises(ResumableTrainerError, match="does not fit into memory") as caught:
        found.sections()
    assert not isinstance(caught.value, DamagedSnapshotError), "nothing may quarantine it"


def test_a_tensor_file_that_is_none_is_refused_before_it_is_believed(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    path.symlink_to("/dev/zero")
    with pytest.raises(DamagedSnapshotError, match="is a symbolic link"):
        RawTensorFile(path)
    path.unlink()
    for size in range(8):
        path.write_bytes(bytes(size))
        with pytest.raises(DamagedSnapshotError, match=f"has {size} bytes, a file of tensors has at least 8"):
            RawTensorFile(path)


@pytest.mark.parametrize(
    ("name", "fields", "reason"),
    [
        ("a" * 513, {}, "too long a name"),
        ("a", {"more": 1}, "unknown fields"),
        ("a", {"shape": [1] * 65}, "bad numbers"),
        ("a", {"shape": [True]}, "bad numbers"),
        ("a", {"data_offsets": [0, 4, 4]}, "too many values"),
    ],
)
def test_a_tensor_described_otherwise_than_the_layout_says_is_refused(
    tmp_path: Path, name: str, fields: dict[str, Any], reason: str
) -> None:
    path = tmp_path / "t.safetensors"
    header = json.dumps({name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **fields}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(DamagedSnapshotError, match=reason):
        RawTensorFile(path)


def test_a_tensor_file_that_becomes_shorter_while_it_is_read_is_an_error_and_no_zeros(store: Store) -> None:
    path = store.path(save(store, 1)) / "part.safetensors"
    with TensorFile(path) as file:
        assert file.info("w").num_elements == 4
        assert file.read("w").tolist() == [0, 1, 2, 3]
        with path.open("r+b") as shortened:
            shortened.truncate(path.stat().st_size - 1)
        with pytest.raises(DamagedSnapshotError, match="ends too early"):
            file.read("w")


# -- what is deleted while one looks, and what is signed and wrong all the same ----------------------


def test_snapshots_deleted_while_one_looks_are_passed_over(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    name = save(store, 1)
    monkeypatch.setattr(store, "names", lambda: [name, "step-000000002"])
    found = store.newest_valid(on_damage=lambda name, error: pytest.fail(f"{name}: {error}"))
    assert found is not None
    assert found.name == name
    monkeypatch.setattr(store, "names", lambda: ["step-000000002"])
    with pytest.raises(SnapshotGoneError, match="was deleted while it was read"):
        store.newest_valid(on_damage=lambda name, error: None)


def test_a_manifest_of_another_position_than_its_name_says_is_damage(store: Store) -> None:
    name = save(store, 1)
    told = store.verify(name).model_copy(update={"position": PositionFields(epoch=0, batch=0, step=7)})
    (store.path(name) / "manifest.json").write_bytes(told.to_bytes())
    with pytest.raises(DamagedSnapshotError, match="speaks of another position: epoch 0, step 7"):
        store.verify(name)


def test_a_tensor_spoken_of_in_ways_that_are_never_written_is_damage() -> None:
    with pytest.raises(ValueError, match="in a way that is never written"):
        unflatten({"part": {"$tensor": ["part", "w"], "colour": "red"}}, lambda section, name: torch.zeros(2))


def test_keys_made_to_have_one_hash_are_refused_before_they_cost_time() -> None:
    prime = 2**61 - 1  # the modulus of the hashes of integers (CPython on 64 bits)
    pairs = [[{"$int": hex(prime * number)}, 0] for number in range(2000)]
    with pytest.raises(ValueError, match="keys of the same hash"):
        unflatten({"part": {"$dict": pairs}}, lambda section, name: torch.zeros(2))


def test_small_and_large_tensors_are_written_together_as_the_layout_says(tmp_path: Path) -> None:
    large = torch.arange(400_000, dtype=torch.float32)
    tensors = {
        "a": torch.ones(3),
        "b": large,
        "c": torch.empty(0),
        "d": torch.arange(5),
        "e": large + 1,
        "f": large[:9],
    }
    tensors |= {f"small.{number}": torch.full((60_000,), float(number)) for number in range(9)}
    path = tmp_path / "t.safetensors"
    with NewFile(path, files=Files()) as file:
        write_tensors(file, tensors)
    assert file.digest == digest_file(path)
    library = load_file(path)
    assert all(torch.equal(library[name], tensor) for name, tensor in tensors.items())
    with NewFile(tmp_path / "last.safetensors", files=Files()) as file:
        write_tensors(file, {"a": large, "b": torch.empty(0)})
    assert torch.equal(load_file(tmp_path / "last.safetensors")["a"], large)

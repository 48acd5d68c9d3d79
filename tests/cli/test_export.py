"""What `export` writes is what was saved, for whoever reads it with the usual libraries."""

from __future__ import annotations

import collections
import datetime
import errno
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from small import Small
from test_commands import command
from torch import nn

from resumable_trainer import (
    DamagedSnapshotError,
    EarlyStopping,
    SnapshotPolicy,
    SnapshotWriteError,
    StateManager,
    UsageError,
)
from resumable_trainer.cli.main import main
from resumable_trainer.durable.files import Files
from resumable_trainer.snapshot.exporting import export_safetensors, export_torch
from resumable_trainer.snapshot.selected import select

if TYPE_CHECKING:
    from typing_extensions import Buffer

EXPORTS = {"safetensors": export_safetensors, "torch": export_torch}


class Tied(nn.Module):
    """Weights of every odd kind, two of them one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.convolution = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.normal = nn.BatchNorm2d(4)
        self.register_buffer("flag", torch.tensor([True, False, True]))
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("short", torch.tensor([1.5, float("nan"), -0.0], dtype=torch.bfloat16))
        self.register_buffer("wave", torch.tensor([1 + 2j, complex("nan-infj")]))
        self.register_buffer("bits", torch.tensor([0x7FC00001, -0x3FFFFF], dtype=torch.int32).view(torch.float32))
        self.register_buffer("wide", torch.arange(3.0, dtype=torch.float64))


class Values:
    """A part that holds whatever it is given."""

    def __init__(self, **values: Any) -> None:
        self.values = values

    def state_dict(self) -> dict[str, Any]:
        return self.values

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = state


def save(directory: Path, **parts: Any) -> None:
    with StateManager(directory, state=parts) as manager:
        manager.snapshot(epoch=1, batch=0, step=4).wait()


def bits(state: dict[str, Any]) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    def data(tensor: torch.Tensor) -> bytes:
        return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    return {name: (tensor.dtype, tensor.shape, data(tensor)) for name, tensor in state.items()}


def read(path: Path, kind: str) -> Any:
    return load_file(path) if kind == "safetensors" else torch.load(path, weights_only=True)


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_a_fresh_module_loads_it_strictly_tied_weights_included(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(1)
    model = Tied()
    save(tmp_path / "a", model=model)
    file = tmp_path / "weights ☃"
    assert main(["export", str(tmp_path / "a"), "-o", str(file), "--format", kind]) == 0
    torch.manual_seed(2)
    fresh = Tied()
    loaded = read(file, kind)
    assert bits(loaded) == bits(model.state_dict())
    assert fresh.load_state_dict(loaded, strict=True) is not None
    assert bits(fresh.state_dict()) == bits(model.state_dict())
    assert fresh.head.weight is fresh.embedding.weight
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "weights ☃"]


def test_a_safetensors_file_says_where_it_comes_from_and_counts_a_tied_tensor_under_each_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "a", model=Tied())
    file = tmp_path / "weights.safetensors"
    assert main(["export", str(tmp_path / "a"), "-o", str(file), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["num_tensors"], said["tied"], said["num_bytes"]) == (
        len(Tied().state_dict()), ["head.weight"], file.stat().st_size,
    )  # fmt: skip
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {
            "format": "pt", "run_id": "", "snapshot": "step-000000004-epoch-000001", "part": "model",
            "epoch": "1", "batch": "0", "step": "4",
        }  # fmt: skip
    # As documented: the library's own load_model takes the second name of a tied tensor for one too many.
    missing, unexpected = load_model(Tied(), file, strict=False)
    assert (list(missing), unexpected) == ([], ["head.weight"])


def test_the_best_is_exported_unless_another_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = Small(accuracy=lambda epoch: -abs(epoch - 1.0))
    small.train(
        tmp_path / "a",
        epochs=3,
        snapshots=SnapshotPolicy(keep_last=9, every_steps=2),
        early_stopping=EarlyStopping("test_accuracy", patience=9),
    )
    Small().train(tmp_path / "b", epochs=2)

    def exported(run: str, *options: str) -> str:
        capsys.readouterr()
        assert main(["export", str(tmp_path / run), "-o", str(tmp_path / "x"), "--force", "--json", *options]) == 0
        found = json.loads(capsys.readouterr().out)
        weights = load_file(tmp_path / run / "snapshots" / found["snapshot"] / "model.safetensors")
        assert bits(load_file(tmp_path / "x")) == bits(weights)
        return str(found["snapshot"])

    assert exported("a") == "step-000000008-epoch-000002"
    assert exported("a", "--from", "latest") == "step-000000012-epoch-000003"
    assert exported("a", "--from", "epoch:1") == "step-000000004-epoch-000001"
    assert exported("a", "--from", "6") == "step-000000006"
    assert exported("b") == "step-000000008-epoch-000002"
    assert main(["export", str(tmp_path / "b"), "-o", str(tmp_path / "y"), "--from", "best"]) == 66
    newest = tmp_path / "b/snapshots/step-000000008-epoch-000002/model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    assert exported("b") == "step-000000004-epoch-000001"
    assert main(["export", str(tmp_path / "b"), "-o", str(tmp_path / "y"), "--from", "8"]) == 65


def test_a_part_is_the_model_the_only_one_like_it_or_the_one_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = nn.Linear(2, 3)
    save(tmp_path / "one", net=net, optimizer=torch.optim.Adam(net.parameters()))
    save(tmp_path / "two", net=net, ema=nn.Linear(2, 3))
    save(tmp_path / "none", optimizer=torch.optim.SGD(net.parameters()))
    assert main(["export", str(tmp_path / "one"), "-o", str(tmp_path / "x")]) == 0
    assert bits(load_file(tmp_path / "x")) == bits(net.state_dict())
    for run, text in (("two", "its parts are: net, ema"), ("none", "its parts are: optimizer")):
        assert main(["export", str(tmp_path / run), "-o", str(tmp_path / "y")]) == 66
        assert text in capsys.readouterr().err
    assert main(["export", str(tmp_path / "two"), "-o", str(tmp_path / "y"), "--part", "ema"]) == 0
    assert main(["export", str(tmp_path / "two"), "-o", str(tmp_path / "z"), "--part", "other"]) == 66
    assert main(["export", str(tmp_path / "one"), "-o", str(tmp_path / "z"), "--part", "optimizer"]) == 78
    assert "optimizer['state'], optimizer['param_groups']: not a tensor" in capsys.readouterr().err
    assert not (tmp_path / "z").exists()


def test_an_optimizer_is_exported_for_torch_and_goes_on_as_the_first(tmp_path: Path) -> None:
    small = Small()
    small.train(tmp_path / "a", epochs=1)
    options = ["--part", "optimizer", "--format", "torch"]
    assert main(["export", str(tmp_path / "a"), "-o", str(tmp_path / "x"), *options]) == 0
    found, expected = torch.load(tmp_path / "x", weights_only=True), small.optimizer.state_dict()
    assert found["param_groups"] == expected["param_groups"]
    for number, moments in expected["state"].items():
        assert bits(found["state"][number]) == bits(moments)


ALLOWED = {
    "none": None, "word": "é", "numbers": [1, 2.5, float("inf"), 1 + 2j, 10**30, True], "bytes": b"\0",
    "more": bytearray(b"x"),
    "tuple": (1, (2,)), "set": {3}, "ordered": collections.OrderedDict(a=1), "counter": collections.Counter("aab"),
    "size": torch.Size([1, 2]), "dtype": torch.bfloat16, "keys": {1: 2, (3, 4): None},
    "parameter": nn.Parameter(torch.ones(2)), "complex": torch.tensor([1j], dtype=torch.complex128),
}  # fmt: skip


def test_what_torch_loads_with_weights_only_is_written_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "a", x=Values(**ALLOWED))
    options = ["--part", "x", "--format", "torch"]
    assert main(["export", str(tmp_path / "a"), "-o", str(tmp_path / "x"), *options]) == 0
    loaded = torch.load(tmp_path / "x", weights_only=True)
    assert {name: type(value) for name, value in loaded.items()} == {n: type(v) for n, v in ALLOWED.items()}
    tensors = {name for name, value in ALLOWED.items() if isinstance(value, torch.Tensor)}
    assert {n: v for n, v in loaded.items() if n not in tensors} == {
        n: v for n, v in ALLOWED.items() if n not in tensors
    }
    refused: list[Any] = [np.float64(1), np.zeros(2), frozenset([1]), collections.deque([1]), range(3)]
    for number, value in enumerate([*refused, datetime.datetime(2020, 1, 1), collections.defaultdict(int)]):
        save(tmp_path / f"b{number}", x=Values(deep=[{"at": value}]))
        assert main(["export", str(tmp_path / f"b{number}"), "-o", str(tmp_path / "y"), *options]) == 78, value
        assert "x['deep'][0]['at'] is a " in capsys.readouterr().err
    save(tmp_path / "c", x=Values(wave=ALLOWED["complex"]))
    assert main(["export", str(tmp_path / "c"), "-o", str(tmp_path / "y"), "--part", "x"]) == 78
    assert "complex128" in capsys.readouterr().err
    assert not (tmp_path / "y").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_name_that_is_taken_is_kept_and_overwritten_only_when_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "a", model=nn.Linear(2, 3))
    (tmp_path / "taken").write_bytes(b"mine")
    (tmp_path / "link").symlink_to("taken")
    (tmp_path / "directory").mkdir()
    for name in ("taken", "link", "directory", "missing/file"):
        assert main(["export", str(tmp_path / "a"), "-o", str(tmp_path / name)]) == 2, name
    for name in ("directory", "missing/file"):
        assert main(["export", str(tmp_path / "a"), "-o", str(tmp_path / name), "--force"]) == 2, name
    for own in ("snapshots/step-000000004-epoch-000001/model.safetensors", "events.jsonl", "run.lock", "set-aside"):
        assert main(["export", str(tmp_path / "a"), "-o", str(tmp_path / "a" / own), "--force"]) == 2, own
    assert main(["verify", str(tmp_path / "a")]) == 0
    assert (tmp_path / "taken").read_bytes() == b"mine"
    for name in ("link", "taken"):
        assert main(["export", str(tmp_path / "a"), "-o", str(tmp_path / name), "--force"]) == 0
        assert load_file(tmp_path / name).keys() == {"weight", "bias"}
        assert (tmp_path / name).is_file()
        assert not (tmp_path / name).is_symlink()
    os.mkfifo(tmp_path / "fifo")
    for special in (tmp_path / "fifo", Path("/dev/null")):
        assert main(["export", str(tmp_path / "a"), "-o", str(special), "--force"]) == 2
        assert not special.is_file()
    assert main(["export", str(tmp_path / "none"), "-o", str(tmp_path / "x")]) == 66
    (tmp_path / "empty/snapshots").mkdir(parents=True)
    assert main(["export", str(tmp_path / "empty"), "-o", str(tmp_path / "x")]) == 66
    capsys.readouterr()


class Full(Files):
    """A disk that takes so many bytes and no more."""

    def __init__(self, num_bytes: int) -> None:
        self.left = num_bytes

    def write(self, fd: int, data: Buffer) -> int:
        if self.left == 0:
            raise OSError(errno.ENOSPC, "a test")
        count = super().write(fd, memoryview(data)[: self.left])
        self.left -= count
        return count


class FailingSync(Files):
    """A disk that takes everything and keeps nothing."""

    def sync(self, fd: int) -> None:
        raise OSError(errno.EIO, "a test")


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
@pytest.mark.parametrize("replacing", [False, True])
def test_a_disk_that_fails_leaves_what_was_there(tmp_path: Path, kind: str, replacing: bool) -> None:
    save(tmp_path / "a", model=nn.Linear(20, 3))
    source = select(tmp_path / "a", "latest")
    if replacing:
        (tmp_path / "x").write_bytes(b"mine")
    for files in (Full(0), Full(10), Full(300), FailingSync()):
        with pytest.raises(SnapshotWriteError, match=r"was NOT written: .*a test"):
            EXPORTS[kind](source, "model", tmp_path / "x", replacing=replacing, files=files)
        assert sorted(path.name for path in tmp_path.iterdir()) == (["a", "x"] if replacing else ["a"])
    assert not replacing or (tmp_path / "x").read_bytes() == b"mine"


class Racing(Files):
    """Somebody else takes the name while the file is being written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def sync(self, fd: int) -> None:
        self.path.write_bytes(b"theirs")
        super().sync(fd)


def test_a_name_that_is_taken_meanwhile_is_kept_too(tmp_path: Path) -> None:
    save(tmp_path / "a", model=nn.Linear(2, 3))
    with pytest.raises(UsageError, match="is there already"):
        export_safetensors(select(tmp_path / "a", "latest"), "model", tmp_path / "x", files=Racing(tmp_path / "x"))
    assert (tmp_path / "x").read_bytes() == b"theirs"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "x"]


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_a_snapshot_that_changes_while_it_is_copied_is_noticed(tmp_path: Path, kind: str) -> None:
    save(tmp_path / "a", model=nn.Linear(2, 3))
    source = select(tmp_path / "a", "latest")
    victim = source.path / "model.safetensors"
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    with pytest.raises(DamagedSnapshotError, match="has changed while it was copied"):
        EXPORTS[kind](source, "model", tmp_path / "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_safetensors_are_written_without_torch_from_a_run_that_is_held(tmp_path: Path) -> None:
    model = nn.Linear(2, 3)
    with StateManager(tmp_path / "runs/a", state={"model": model}) as manager:
        manager.snapshot(epoch=0, batch=3, step=3).wait()
        done = command(tmp_path, "export", "-o", "x", PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0, done.stderr
    assert "| torch" not in done.stderr
    assert "export  model of runs/a/snapshots/step-000000003: 2 tensors" in done.stdout
    assert bits(load_file(tmp_path / "x")) == bits(model.state_dict())

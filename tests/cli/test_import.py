"""What `import` takes from somebody else's checkpoint, and what no file makes it do."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import zipfile
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_commands import command
from torch import nn

from resumable_trainer import Run, SnapshotPolicy, SnapshotWriteError, StateMismatchError
from resumable_trainer.cli.main import main
from resumable_trainer.durable.files import Files
from resumable_trainer.report.summary import is_run
from resumable_trainer.snapshot.importing import import_run, read_checkpoint, recognise
from resumable_trainer.snapshot.layout import Position
from resumable_trainer.snapshot.store import Store
from resumable_trainer.snapshot.values import read_values
from resumable_trainer.state.compare import differences

if TYPE_CHECKING:
    from pathlib import Path

    from typing_extensions import Buffer

DATA = (torch.arange(36.0).reshape(12, 3) / 36, torch.arange(12.0).reshape(12, 1) / 12)


class Job:
    """A training that anybody might have written; a fresh one is what a new process builds."""

    def __init__(self) -> None:
        torch.manual_seed(9)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 1))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.05, amsgrad=True)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1, gamma=0.5)

    @property
    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}

    def step(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        (self.model(inputs) - targets).square().mean().backward()
        self.optimizer.step()

    def train_by_hand(self, epochs: range, *, skip: int = 0, only: int = 4) -> None:
        for epoch in epochs:
            for batch in range(skip if epoch == epochs.start else 0, only):
                self.step(DATA[0][3 * batch : 3 * batch + 3], DATA[1][3 * batch : 3 * batch + 3])
            if only == 4:
                self.scheduler.step()

    def train(self, directory: Path, *, until_step: int | None = None, **settings: Any) -> Run:
        with Run(directory, state=self.state, progress=False, **settings) as run:
            for _ in run.epochs(4):
                for inputs, targets in run.batches(DATA, batch_size=3):
                    self.step(inputs, targets)
                    if run.step == until_step:
                        raise Killed
                self.scheduler.step()
        return run

    def checkpoint(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.state.items()}

    def load(self, saved: dict[str, Any]) -> None:
        for name, part in self.state.items():
            part.load_state_dict(saved[name])


class Killed(BaseException):
    """Stands for a kill."""


def imported(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["import", *map(str, words), "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refused(capsys: pytest.CaptureFixture[str], directory: Path, *words: object) -> tuple[int, str]:
    """The exit code and message of an import that makes nothing."""
    before = sorted(path.name for path in directory.iterdir())
    capsys.readouterr()
    code = main(["import", *map(str, words)])
    assert sorted(path.name for path in directory.iterdir()) == before
    said = capsys.readouterr()
    assert said.out == ""
    return code, said.err


@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("killed_at", [None, 11])
def test_a_continued_training_equals_one_that_loaded_the_checkpoint_by_hand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], batch: int, killed_at: int | None
) -> None:
    first = Job()
    first.train_by_hand(range(2))
    first.train_by_hand(range(2, 3), only=batch)
    torch.save({**first.checkpoint(), "epoch": 2, "step": 8 + batch}, tmp_path / "old.pt")

    by_hand = Job()
    by_hand.load(torch.load(tmp_path / "old.pt", weights_only=True))
    torch.manual_seed(0)
    by_hand.train_by_hand(range(2, 4), skip=batch)

    found = imported(capsys, tmp_path / "old.pt", tmp_path / "run", "--batch", batch)
    assert (found["epoch"], found["batch"], found["step"], found["not_taken"]) == (2, batch, 8 + batch, [])
    policy = SnapshotPolicy(every_steps=1)
    if killed_at is not None:
        with pytest.raises(Killed):
            Job().train(tmp_path / "run", until_step=killed_at, snapshots=policy)
    job = Job()
    run = job.train(tmp_path / "run", snapshots=policy)
    assert (run.step, run.epoch, run.outcome) == (16, 4, "finished")
    assert differences(by_hand.checkpoint(), job.checkpoint(), place="state") == []
    assert differences(first.checkpoint(), job.checkpoint(), place="state") != []


def test_one_that_is_killed_before_its_first_snapshot_begins_again_with_no_row_too_many(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(Job().checkpoint(), tmp_path / "old.pt")
    imported(capsys, tmp_path / "old.pt", tmp_path / "run", "--epoch", 2, "--step", 8)

    def train(epochs_to_do: int) -> None:
        job = Job()
        with Run(tmp_path / "run", state=job.state, progress=False, snapshots=SnapshotPolicy(every_epochs=9)) as run:
            for _ in run.epochs(4):
                for _ in run.batches(DATA, batch_size=3):
                    run.log(x=run.step)
                if epochs_to_do == 1:
                    _ = run.history  # the rows are in the file
                    raise Killed

    with pytest.raises(Killed):
        train(1)
    assert (tmp_path / "run/metrics.jsonl").read_bytes()
    train(2)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_bytes().splitlines()]
    assert [row["x"] for row in rows if row["row"] == "step"] == list(range(8, 16))


def test_the_run_is_one_of_its_own_and_says_where_it_comes_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(Job().checkpoint(), tmp_path / "alt ☃.pt")
    (tmp_path / "link").symlink_to("alt ☃.pt")
    found = imported(capsys, tmp_path / "link", tmp_path / "läufe" / "neu", "--epoch", 3, "--step", 12)
    run = tmp_path / "läufe" / "neu"
    manifest = Store(run).verify("step-000000012-epoch-000003")
    identity = json.loads((run / "run.json").read_bytes())
    assert identity["run_id"] == manifest.run_id == found["run_id"]
    assert identity["imported_from"]["file"] == found["imported_from"]["file"] == str(tmp_path / "alt ☃.pt")
    assert len(identity["imported_from"]["digest"]) == 32
    assert (manifest.parent, manifest.generation, manifest.epoch_complete) == (None, 0, True)
    assert "0.weight" in read_values(run / "snapshots" / manifest.name, manifest)["model"], "as Run saves a model"
    assert main(["status", str(run)]) == 0
    assert f"imported from {tmp_path / 'alt ☃.pt'}" in capsys.readouterr().out
    assert main(["verify", str(run)]) == 0
    assert main(["resume", str(run)]) == 66
    assert "start its script again" in capsys.readouterr().err
    with Run(run, state=Job().state, progress=None) as opened:
        assert opened.resumed_from == manifest.name
    assert "it begins anew: generators (seeded with 0)" in capsys.readouterr().err


def tensors(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.ones(2) * number for number, name in enumerate(names)}


LAYOUTS: list[tuple[str, Any, list[str], dict[str, str], list[str], tuple[int, int]]] = [
    ("usual", {"model": tensors("w"), "optimizer": {"state": {}}, "epoch": 3, "step": 30, "loss": 0.5}, [],
     {"model": "model", "optimizer": "optimizer"}, ["loss"], (3, 30)),
    ("optimizer alone", {"state": {}, "param_groups": [{"lr": 0.1}]}, ["--epoch", "3", "--step", "7"],
     {"optimizer": ""}, [], (3, 7)),
    ("tutorial", {"epoch": 3, "model_state_dict": tensors("w"), "optimizer_state_dict": {}, "loss": torch.ones(())},
     ["--step", "7"], {"model": "model_state_dict", "optimizer": "optimizer_state_dict"}, ["loss"], (3, 7)),
    ("lightning", {"state_dict": tensors("model.w", "model.b", "loss.w"), "optimizer_states": [{"state": {}}, {}],
                   "lr_schedulers": [{"last_epoch": 3}], "epoch": 3, "global_step": 30, "callbacks": {}},
     ["--strip", "model."], {"model": "state_dict", "optimizer": "optimizer_states.0", "scheduler": "lr_schedulers.0"},
     ["optimizer_states.1", "callbacks", "model: loss.w"], (3, 30)),
    ("bare", OrderedDict(tensors("w", "b")), ["--epoch", "0", "--step", "0"], {"model": ""}, [], (0, 0)),
    ("bare with step", tensors("step", "epoch"), ["--epoch", "1", "--step", "2"], {"model": ""}, [], (1, 2)),
    ("said otherwise", {"model": tensors("w"), "epoch": 3, "step": 30}, ["--epoch", "4", "--step", "40"],
     {"model": "model"}, [], (4, 40)),
    ("a tensor as step", {"net": tensors("w"), "iteration": torch.tensor(5), "epoch": 2}, [],
     {"model": "net"}, [], (2, 5)),
    ("mapped", {"nets": {"g": tensors("w"), "d": tensors("w")}, "o": [{}], "epoch": 1, "step": 2, "model": {"x": 1}},
     ["--map", "g=nets.g", "--map", "opt=o.0", "--map", "model="], {"g": "nets.g", "opt": "o.0"},
     ["nets.d", "model"], (1, 2)),
    ("renamed", {"model": tensors("w"), "epoch": 1, "step": 2}, ["--map", "net=model"], {"net": "model"}, [], (1, 2)),
    ("one of both", {"model": tensors("w"), "state_dict": tensors("v"), "epoch": 1, "step": 2}, [],
     {"model": "model"}, ["state_dict"], (1, 2)),
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[0])
def test_usual_layouts_are_recognised_and_what_is_not_taken_is_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: Any
) -> None:
    _, content, options, parts, not_taken, (epoch, step) = layout
    torch.save(content, tmp_path / "x")
    found = imported(capsys, tmp_path / "x", tmp_path / "run", *options)
    assert (found["parts"], found["not_taken"], found["epoch"], found["step"]) == (parts, not_taken, epoch, step)
    again = recognise(content, mapping=dict(word.split("=") for word in options if "=" in word))
    assert again.keys == parts
    assert main(["import", str(tmp_path / "x"), str(tmp_path / "text"), *options]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in not_taken)
    if "epoch" in content and "--epoch" not in options and content["epoch"] == 3:
        assert "it should be --epoch 4" in said


def test_a_stripped_prefix_gives_the_names_of_the_module_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = Job()
    state = {f"module.model.{name}": value for name, value in job.model.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "x")
    words = [tmp_path / "x", tmp_path / "run", "--epoch", 0, "--step", 0]
    assert refused(capsys, tmp_path, *words, "--strip", "other.")[0] == 2
    imported(capsys, *words, "--strip", "module.", "--strip", "model.")
    fresh = Job()
    fresh.model[0].weight.data.zero_()
    with Run(tmp_path / "run", state={"model": fresh.model}, progress=False):
        pass
    assert differences(job.model.state_dict(), fresh.model.state_dict(), place="model") == []


def test_a_file_of_safetensors_is_taken_as_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = Job()
    save_file(job.model.state_dict(), tmp_path / "x")
    words = [tmp_path / "x", tmp_path / "run"]
    code, text = refused(capsys, tmp_path, *words)
    assert (code, "give --epoch and --step" in text) == (2, True)
    assert imported(capsys, *words, "--epoch", 2, "--step", 8)["parts"] == {"model": ""}
    fresh = Job()
    fresh.model[0].weight.data.zero_()
    with Run(tmp_path / "run", state={"model": fresh.model}, progress=False):
        pass
    assert differences(job.model.state_dict(), fresh.model.state_dict(), place="model") == []
    (tmp_path / "cut").write_bytes((tmp_path / "x").read_bytes()[:-1])
    assert refused(capsys, tmp_path, tmp_path / "cut", tmp_path / "b", "--epoch", 2, "--step", 8)[0] == 65


def test_what_does_not_fit_the_script_is_said_by_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({**Job().checkpoint(), "epoch": 1, "step": 4}, tmp_path / "x")
    imported(capsys, tmp_path / "x", tmp_path / "run")
    with (
        pytest.raises(StateMismatchError, match="part 'scheduler' is in the snapshot"),
        Run(tmp_path / "run", state={"model": Job().model, "optimizer": Job().optimizer}, progress=False),
    ):
        pass


def test_wrong_words_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": tensors("w"), "epoch": 1}, tmp_path / "x")
    torch.save({"things": [1, 2], "\x1b[31m": 3}, tmp_path / "strange")
    torch.save([tensors("w")], tmp_path / "list")
    torch.save({}, tmp_path / "empty")
    at = ["--epoch", 1, "--step", 4]
    for words, text in (
        ([], "give --step"),
        (["--step", 4, "--epoch", -1], "is no position"),
        (["--step", 4, "--batch", 5], "is no position"),
        ([*at, "--map", "a/b=model"], "part name 'a/b'"),
        ([*at, "--map", "loop=model"], "'loop' is reserved"),
        ([*at, "--map", "model"], "is not NAME=KEY"),
        ([*at, "--map", "m=model", "--map", "m=epoch"], "given twice"),
        ([*at, "--map", "opt=optimizer_states.0"], "the file has no 'optimizer_states.0'; its keys are: model, epoch"),
        ([*at, "--map", "opt=model.w.x"], "the file has no"),
        ([*at, "--map", "model="], "nothing in the file is recognised"),
        ([*at, "--strip", ""], "no model in the file"),
    ):
        code, said = refused(capsys, tmp_path, tmp_path / "x", tmp_path / "run", *words)
        assert (code, text in said) == (2, True), (words, said)
    for name in ("strange", "list", "empty"):
        code, said = refused(capsys, tmp_path, tmp_path / name, tmp_path / "run", *at)
        assert (code, "\x1b" in said) == (2, False), name
    (tmp_path / "taken").mkdir()
    assert refused(capsys, tmp_path, tmp_path / "x", tmp_path / "taken", *at)[0] == 2
    assert not list((tmp_path / "taken").iterdir())


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": tensors("w")}, tmp_path / "good")
    good = (tmp_path / "good").read_bytes()
    torch.save({"model": tensors("w")}, tmp_path / "legacy", _use_new_zipfile_serialization=False)
    for name, data in (
        ("nothing", b""), ("text", b"epoch 1"), ("cut", good[:-100]), ("half", good[: len(good) // 2]),
        ("head", good[:4]), ("bracket", b"\0" * 8 + b"{"), ("huge header", b"\xff" * 8 + b"{}"),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(data)
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("a/readme.txt", "nothing of torch")
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    expected = {
        "missing": 66, "good/below": 66, "directory": 2, "fifo": 2, "loop": 2, "/dev/zero": 2, "nothing": 2, "text": 2,
        "legacy": 2, "cut": 65, "half": 65, "head": 65, "bracket": 65, "huge header": 65, "zip": 65,
    }  # fmt: skip
    for name, code in expected.items():
        found = refused(capsys, tmp_path, tmp_path / name, tmp_path / "run", "--epoch", 1, "--step", 4)
        assert found[0] == code, (name, found)
        assert "Traceback" not in found[1]


class Wants:
    """Asks whoever loads it to call something."""

    def __init__(self, what: Any, *arguments: Any) -> None:
        self.what = what, arguments

    def __reduce__(self) -> Any:
        return self.what


def with_data(content: dict[str, Any], old: bytes, new: bytes) -> bytes:
    """A file of torch.save whose pickle was changed by hand, where `old` stands last."""
    saved, changed = io.BytesIO(), io.BytesIO()
    torch.save(content, saved)
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(changed, "w") as target:
        for entry in source.infolist():
            data = source.read(entry)
            if entry.filename.endswith("data.pkl"):
                head, found, tail = data.rpartition(old)
                assert found
                data = head + new + tail
            target.writestr(entry, data)
    return changed.getvalue()


def pickled(content: dict[str, Any]) -> bytes:
    saved = io.BytesIO()
    torch.save(content, saved)
    with zipfile.ZipFile(saved) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


def laughs(depth: int) -> list[Any]:
    value: list[Any] = [1]
    for _ in range(depth):
        value = [value, value]
    return value


def test_a_file_that_wants_code_to_be_run_is_refused_and_nothing_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = tmp_path / "it ran"
    for name, value, text in (
        ("system", Wants(os.system, f"touch '{mark}'"), "wants posix.system to be loaded and run"),
        ("eval", Wants(eval, f"open({str(mark)!r}, 'w')"), "eval"),
        ("module", nn.Linear(2, 3), "wants torch.nn.modules.linear.Linear"),
        ("array", np.zeros(2), "numpy"),
        ("path", mark, "pathlib"),
    ):
        torch.save({"model": tensors("w"), "epoch": 1, "step": 2, "other": value}, tmp_path / name)
        code, said = refused(capsys, tmp_path, tmp_path / name, tmp_path / "run")
        assert (code, text in said) == (78, True), said
        assert "weights_only=False" not in said, "never a way to run it after all"
    assert not mark.exists()


def test_a_small_file_that_is_made_to_fill_the_memory_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = torch.zeros(1 << 18)
    itself: list[Any] = []
    itself.append(itself)
    many = {str(n): shared[n:] for n in range(40)}
    for name, value in (
        ("expanded", torch.zeros(1).expand(10**12)),
        ("views", many),
        ("laughs", laughs(40)),
        ("itself", itself),
        ("bytes", Wants(bytearray, 3 << 30)),
        ("sparse", torch.zeros(10**6, 10**6, layout=torch.sparse_coo)),
        ("meta", torch.zeros(10**12, device="meta")),
    ):
        model = value if isinstance(value, dict) else {"w": value}
        torch.save({"model": model, "epoch": 1, "step": 2}, tmp_path / name)
    size, giant = b"M\x39\x30", b"\x8a\x05\x00\x00\x00\x00\x7f"  # 12345, and 2**38 or so
    content = {"model": {"w": torch.zeros(12345)}, "epoch": 1, "step": 2}
    assert pickled(content).count(size) == 2, "the storage's size, and then the tensor's"
    (tmp_path / "lying").write_bytes(with_data(content, size, giant))
    with zipfile.ZipFile(tmp_path / "deflated", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(64 << 20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in ("expanded", "views", "laughs", "itself", "bytes", "sparse", "meta", "lying", "deflated"):
        code, said = refused(capsys, tmp_path, tmp_path / name, tmp_path / "run")
        assert code == (65 if name == "lying" else 78), (name, said)
        assert name != "expanded" or "has 4 bytes and needs 4,000,000,000,000" in said
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20, "a GiB, in KiB"
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


def test_a_file_with_a_wrong_checksum_and_an_old_torch_are_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"model": {"w": torch.full((300,), 7.0)}, "epoch": 1, "step": 4}, tmp_path / "x")
    monkeypatch.setattr(torch, "__version__", "2.10.0+cpu")
    assert main(["import", str(tmp_path / "x"), str(tmp_path / "a")]) == 0
    assert capsys.readouterr().err == ""
    data = bytearray((tmp_path / "x").read_bytes())
    data[data.index(torch.full((300,), 7.0).numpy().tobytes()) + 5] ^= 1
    (tmp_path / "x").write_bytes(data)
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    assert main(["import", str(tmp_path / "x"), str(tmp_path / "b")]) == 0
    said = capsys.readouterr().err
    assert "does not match its checksum" in said
    assert "CVE-2026-24747" in said


class Dying(Files):
    """Dies before the n-th change, and does nothing more from then on."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __getattribute__(self, name: str) -> Any:
        if name in ("left", "close") or name.startswith("_"):
            return object.__getattribute__(self, name)
        if self.left == 0:
            raise Killed
        self.left -= 1
        return object.__getattribute__(self, name)


def test_an_interrupted_import_leaves_nothing_that_counts(tmp_path: Path) -> None:
    torch.save({**Job().checkpoint(), "epoch": 2, "step": 8}, tmp_path / "x")
    checkpoint = read_checkpoint(tmp_path / "x")
    found, run = recognise(checkpoint.content), tmp_path / "run"
    after = 0
    while True:
        try:
            import_run(run, checkpoint, found, Position(2, 0, 8), files=Dying(after))
        except Killed:
            if run.exists():  # renamed, and killed before the name was durable: it is whole
                assert Store(run).verify("step-000000008-epoch-000002")
                assert (run / "run.json").exists()
                break
            assert not [p for p in tmp_path.iterdir() if p.name.startswith("run") and is_run(p)]
            after += 1
        else:
            break
    assert after > 20
    if run.exists():
        run.rename(tmp_path / "moved")
    import_run(run, checkpoint, found, Position(2, 0, 8))
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith((".", "run"))) == ["run"]


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


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    torch.save({**Job().checkpoint(), "epoch": 2, "step": 8}, tmp_path / "x")
    checkpoint = read_checkpoint(tmp_path / "x")
    for num_bytes in (0, 100, 1000, 3000):
        with pytest.raises(SnapshotWriteError, match=r"run was NOT made: .*a test"):
            import_run(
                tmp_path / "run", checkpoint, recognise(checkpoint.content), Position(2, 0, 8), files=Full(num_bytes)
            )
        assert sorted(path.name for path in tmp_path.iterdir()) == ["x"]


def test_import_from_the_command_line_and_continue(tmp_path: Path) -> None:
    torch.save({"model": nn.Linear(2, 1).state_dict(), "epoch": 1, "step": 4}, tmp_path / "old.pt")
    done = command(tmp_path, "import", "old.pt", "runs/mine")
    assert done.returncode == 0, done.stderr
    assert 'next    start a script with Run("runs/mine", state={"model": ...})' in done.stdout
    assert command(tmp_path, "import", "old.pt", "runs/mine").returncode == 2
    (tmp_path / "train.py").write_text(
        "from torch import nn\nfrom resumable_trainer import Run\n"
        'with Run("runs/mine", state={"model": nn.Linear(2, 1)}) as run:\n'
        "    for _ in run.epochs(3):\n        for _ in run.batches(range(4)):\n            pass\n"
    )
    done = command(tmp_path, "run", "train.py")
    assert done.returncode == 0, done.stderr
    assert "resume  step-000000004-epoch-000001 (1 epoch complete, step 4; verified)" in done.stderr
    assert json.loads(command(tmp_path, "status", "--json").stdout)["step"] == 12

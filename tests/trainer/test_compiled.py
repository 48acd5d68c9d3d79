"""Compiled steps: exact across kills, close to eager ones, and said where they are not made."""

from __future__ import annotations

import copy
import os
import shutil
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import compiled_jobs
import endings
import jobs
import numpy as np
import pytest
import torch
from compiled_jobs import train
from marks import by_default
from torch import nn

from resumable_trainer import DriftError, Run, SnapshotPolicy
from resumable_trainer.errors import Interrupted
from resumable_trainer.snapshot.layout import COMPILED
from resumable_trainer.snapshot.store import Store
from resumable_trainer.trainer import artefacts, compiled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

needs_compiler = pytest.mark.skipif(artefacts.cxx() is None, reason="there is no C++ compiler")


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled code of all tests, so that each step is compiled once."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(autouse=True)
def secret(kept: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept))
    return kept / "resumable_trainer" / "compiled.secret"


@pytest.fixture
def at(tmp_path: Path, kept: Path) -> Iterator[Callable[[str], Path]]:
    """Run directories in which code of earlier tests lies already."""
    made: list[Path] = []

    def directory(name: str) -> Path:
        made.append(tmp_path / name)
        shutil.copytree(kept / COMPILED, made[-1] / COMPILED) if (kept / COMPILED).exists() else None
        return made[-1]

    yield directory
    (kept / COMPILED).mkdir(exist_ok=True)
    for run in made:
        for file in (run / COMPILED).glob("*.step"):
            if not (kept / COMPILED / file.name).exists():
                shutil.copy(file, kept / COMPILED)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are not compiled but run as they are: all else of a compiled run is as ever."""

    def make(_self: object, graph: Any, *_: object) -> tuple[Callable[[list[torch.Tensor]], Any], bytes]:
        return lambda live: graph(*live), b""

    monkeypatch.setattr(artefacts.Artefacts, "make", make)
    monkeypatch.setattr(artefacts.Artefacts, "keep", lambda *_: False)
    monkeypatch.setattr(artefacts.Artefacts, "load", lambda _self, _key: None)
    monkeypatch.setattr(artefacts, "cxx", lambda: sys.executable)


def differing(a: Path, b: Path) -> list[str]:
    return endings.differing(endings.ending(a), endings.ending(b))


def lines(capsys: pytest.CaptureFixture[str], word: str) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith(word)]


def facts_of(directory: Path) -> dict[str, Any]:
    store = Store(directory)
    return store.manifest(store.names()[-1]).depends_on


def steps_fact(directory: Path) -> object:
    return facts_of(directory).get("steps")


# -- exactness ------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("job", by_default(["adam"], compiled_jobs.JOBS))
def test_a_compiled_run_killed_in_any_epoch_ends_in_the_same_bytes(at: Callable[[str], Path], job: str) -> None:
    whole, run = at("whole"), at("run")
    train(whole, job)
    assert str(steps_fact(whole)).startswith("compiled (")
    for kill in (2, 5, 6, 12, 19):
        with pytest.raises(KeyboardInterrupt):
            train(run, job, kill=kill)
    train(run, job)
    assert differing(whole, run) == []


@needs_compiler
def test_a_process_killed_within_an_epoch_is_continued_by_another_which_compiles_nothing(
    at: Callable[[str], Path],
) -> None:
    whole, run = at("whole"), at("run")
    train(whole, "adam")
    launch = [sys.executable, compiled_jobs.__file__, "adam", str(run)]
    killed = subprocess.run([*launch, "11"], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    made = {file.name: file.stat().st_mtime_ns for file in (run / COMPILED).iterdir()}
    resumed = subprocess.run([*launch, "-1"], capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    assert "resume  step-000000009" in resumed.stderr
    assert "(found in compiled/)" in resumed.stderr
    assert "drift" not in resumed.stderr
    assert {file.name: file.stat().st_mtime_ns for file in (run / COMPILED).iterdir()} == made
    assert differing(whole, run) == []


@needs_compiler
@pytest.mark.parametrize("job", by_default(["adamw"], compiled_jobs.JOBS))
def test_compiled_steps_are_close_to_eager_ones(at: Callable[[str], Path], job: str) -> None:
    trainer = train(at("compiled"), job)
    eager = train(at("eager"), job, compile=False)
    assert trainer.run.step == eager.run.step == 21
    assert trainer.run.history.names("step") == eager.run.history.names("step")
    for name in eager.run.history.names("step"):
        assert trainer.run.history.steps(name) == pytest.approx(eager.run.history.steps(name), rel=1e-3)
    a, b = trainer.run.captured(), eager.run.captured()
    assert list(a.tensors) == list(b.tensors)
    for part in ("model", "optimizer"):
        assert list(a.tensors[part]) == list(b.tensors[part])
        for name, tensor in a.tensors[part].items():
            torch.testing.assert_close(tensor, b.tensors[part][name], rtol=1e-3, atol=1e-5)


# -- what is not compiled --------------------------------------------------------------------------------


def rmsprop() -> dict[str, Any]:
    model = jobs.network()
    return {"model": model, "optimizer": torch.optim.RMSprop(model.parameters(), lr=0.01)}


def with_hook() -> dict[str, Any]:
    settings = compiled_jobs.adam()
    settings["model"][2].register_forward_hook(lambda _module, _inputs, outputs: outputs * 2)
    return settings


def with_parameter_hook() -> dict[str, Any]:
    settings = compiled_jobs.adam()
    settings["model"][4].weight.register_hook(lambda grad: grad * 2)
    return settings


def with_optimizer_hook() -> dict[str, Any]:
    settings = compiled_jobs.adam()
    settings["optimizer"].register_step_pre_hook(lambda *_: None)
    return settings


def with_tensor_rate() -> dict[str, Any]:
    model = jobs.network()
    return {"model": model, "optimizer": torch.optim.Adam(model.parameters(), lr=torch.tensor(0.01))}


class Odd(nn.Module):
    """Does something in its forward pass that a graph would leave out."""

    def __init__(self, what: Callable[[Odd, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.what, self.calls, self.seen = nn.Linear(6, 1), what, 0, [0]

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.what(self, self.layer(inputs)))


def counts(odd: Odd, outputs: torch.Tensor) -> torch.Tensor:
    odd.calls += 1
    return outputs * odd.calls


def lists(odd: Odd, outputs: torch.Tensor) -> torch.Tensor:
    odd.seen.append(1)
    return outputs * len(odd.seen)


def decides(_odd: Odd, outputs: torch.Tensor) -> torch.Tensor:
    return outputs if outputs.sum() > 0 else outputs * 2


def selects(_odd: Odd, outputs: torch.Tensor) -> torch.Tensor:
    return outputs * outputs[outputs > 0].sum()


def reads(_odd: Odd, outputs: torch.Tensor) -> torch.Tensor:
    return outputs * outputs.max().item()


def draws_from_numpy(_odd: Odd, outputs: torch.Tensor) -> torch.Tensor:
    return outputs * float(np.random.rand())


def draws_by_values(_odd: Odd, outputs: torch.Tensor) -> torch.Tensor:
    return outputs * torch.bernoulli(torch.sigmoid(outputs.detach()))


def odd(what: Callable[[Odd, torch.Tensor], torch.Tensor]) -> Callable[[], dict[str, Any]]:
    def settings() -> dict[str, Any]:
        model = Odd(what)
        return {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}

    return settings


NOT_COMPILED = {
    "accumulate": (lambda: {**compiled_jobs.adam(), "accumulate": 2}, "accumulate is 2"),
    "optimizer": (rmsprop, "the optimizer is RMSprop"),
    "hook on a module": (with_hook, r"model.2 (ReLU) has hooks"),
    "hook on a parameter": (with_parameter_hook, "model.4.weight has hooks"),
    "hook on the optimizer": (with_optimizer_hook, "the optimizer has hooks"),
    "tensor as learning rate": (with_tensor_rate, "a setting of the optimizer is a tensor"),
    "attribute": (odd(counts), "changes 'calls'"),
    "list": (odd(lists), "changes 'seen'"),
    "decision": (odd(decides), "it decides by the values of tensors"),
    "values in a shape": (odd(selects), "it decides by the values of tensors"),
    "value of a tensor": (odd(reads), "it decides by the values of tensors"),
    "numpy": (odd(draws_from_numpy), "draws from numpy's generator"),
    "draw by values": (odd(draws_by_values), "it draws random numbers with bernoulli."),
}


@pytest.mark.parametrize("case", NOT_COMPILED)
def test_what_cannot_be_exact_is_said_in_one_line_and_trained_as_if_nobody_had_asked(
    at: Callable[[str], Path], capsys: pytest.CaptureFixture[str], case: str, interpreted: None
) -> None:
    settings, reason = NOT_COMPILED[case]
    asked, eager = at("asked"), at("eager")
    train(asked, "adam", progress=None, **{"scheduler": None, **settings()})
    said = lines(capsys, "compile")
    assert len(said) == 1
    assert reason in said[0]
    assert said[0].startswith("compile steps are not compiled, the job runs eagerly: ")
    train(eager, "adam", **{"scheduler": None, **settings(), "compile": False})
    assert differing(asked, eager) == []
    assert steps_fact(asked) == "eager"


def test_what_cannot_be_traced_is_tried_once_and_not_at_each_epoch(
    at: Callable[[str], Path], interpreted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []
    original = compiled.trace

    def counted(*arguments: Any) -> Any:
        tried.append("tried")
        return original(*arguments)

    monkeypatch.setattr(compiled, "trace", counted)
    train(at("run"), "adam", **{"scheduler": None, **odd(decides)()})
    assert tried == ["tried"]


def test_without_a_compiler_the_job_runs_eagerly_and_says_so(
    at: Callable[[str], Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++")
    asked, eager = at("asked"), at("eager")
    train(asked, "adam", progress=None)
    assert "there is no C++ compiler" in lines(capsys, "compile")[0]
    train(eager, "adam", compile=False)
    assert differing(asked, eager) == []


def test_a_batch_of_another_shape_is_trained_eagerly_and_said_once(
    at: Callable[[str], Path], capsys: pytest.CaptureFixture[str], interpreted: None
) -> None:
    train(at("run"), "adam", progress=None)
    said = [line for line in lines(capsys, "compile") if "float32[4, 6], float32[4, 1]" in line]
    assert len(said) == 1
    assert "are trained eagerly, steps are compiled for float32[8, 6], float32[8, 1]" in said[0]


def test_the_run_decides_on_the_shape_and_not_where_a_launch_begins(
    at: Callable[[str], Path], capsys: pytest.CaptureFixture[str], interpreted: None
) -> None:
    """Killed before the short batch of the first epoch, the next launch begins with it."""
    run = at("run")
    with pytest.raises(KeyboardInterrupt):
        train(run, "adam", kill=6, snapshots=SnapshotPolicy(every_steps=6, background=False))
    capsys.readouterr()
    train(run, "adam", progress=None, snapshots=SnapshotPolicy(every_steps=6, background=False))
    said = " ".join(lines(capsys, "compile"))
    assert "batches of float32[4, 6], float32[4, 1] are trained eagerly" in said


def test_a_notice_that_breaks_the_compiler_is_followed_and_changes_nothing(
    at: Callable[[str], Path], interpreted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C reaches the compiler, too: its failure must not turn the batch into an eager one."""
    whole, run = at("whole"), at("run")
    train(whole, "adam")
    with pytest.raises(KeyboardInterrupt):
        train(run, "adam", kill=8)

    def broken(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)
        raise artefacts.CannotCompileError("the compiler was interrupted")

    with monkeypatch.context() as patched:
        patched.setattr(artefacts.Artefacts, "make", broken)
        with pytest.raises(Interrupted):
            train(run, "adam")
    train(run, "adam")
    assert differing(whole, run) == []


# -- no trace --------------------------------------------------------------------------------------------


def test_tracing_leaves_everything_as_it_was(at: Callable[[str], Path], interpreted: None) -> None:
    """A run of one batch is traced, and trained eagerly: it must be the eager run to the bit, its generators too."""
    settings = {"train_data": jobs.table(8), "epochs": 1}
    traced, eager = at("traced"), at("eager")
    train(traced, "adam", **settings)
    train(eager, "adam", compile=False, **settings)
    assert differing(traced, eager) == []


def test_draws_move_the_generator_as_eager_steps_do(at: Callable[[str], Path], interpreted: None) -> None:
    after = []
    for name, asked in (("compiled", True), ("eager", False)):
        train(at(name), "adam", compile=asked)
        after.append(torch.get_rng_state())
    assert torch.equal(*after)


def test_gradients_are_none_after_a_compiled_run(at: Callable[[str], Path], interpreted: None) -> None:
    settings = compiled_jobs.adam()
    train(at("run"), "adam", **settings)
    assert all(parameter.grad is None for parameter in settings["model"].parameters())


# -- what changes within a run ---------------------------------------------------------------------------


class Schedule:
    """A part that changes at each epoch what a graph takes for constant; stepped as a scheduler."""

    def __init__(self, optimizer: torch.optim.Optimizer, change: Callable[[int], None]) -> None:
        self.epoch, self.change = 0, change

    def step(self) -> None:
        self.epoch += 1
        self.change(self.epoch)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch = state["epoch"]
        self.change(self.epoch) if self.epoch else None


def unfreezing() -> dict[str, Any]:
    settings = compiled_jobs.adam()
    model = settings["model"]
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)

    def change(_epoch: int) -> None:
        model[0].weight.requires_grad_(True)

    return {**settings, "scheduler": Schedule(settings["optimizer"], change)}


def cycling() -> dict[str, Any]:
    settings = compiled_jobs.adam()
    optimizer = settings["optimizer"]

    def change(epoch: int) -> None:
        optimizer.param_groups[0]["betas"] = (0.9 - 0.1 * epoch, 0.99)

    return {**settings, "scheduler": Schedule(optimizer, change)}


def scaling() -> dict[str, Any]:
    model = Odd(lambda odd, outputs: outputs * odd.calls)
    model.calls = 1

    def change(epoch: int) -> None:
        model.calls = epoch + 1

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return {"model": model, "optimizer": optimizer, "scheduler": Schedule(optimizer, change)}


@pytest.mark.parametrize("changing", [unfreezing, cycling, scaling])
def test_what_a_graph_took_for_constant_may_change_between_epochs(
    at: Callable[[str], Path], interpreted: None, changing: Callable[[], dict[str, Any]]
) -> None:
    whole, run, eager = at("whole"), at("run"), at("eager")
    trainer = train(whole, "adam", **changing())
    for kill in (5, 9, 16):
        with pytest.raises(KeyboardInterrupt):
            train(run, "adam", kill=kill, **changing())
    train(run, "adam", **changing())
    assert differing(whole, run) == []
    expected = train(eager, "adam", **{**changing(), "compile": False}).run.history.steps("loss")
    assert trainer.run.history.steps("loss") == pytest.approx(expected, rel=1e-4)


def test_tensors_that_were_replaced_between_epochs_are_followed(at: Callable[[str], Path], interpreted: None) -> None:
    """As a restore does: the optimizer has other state tensors and groups then, parameters may have other memory."""

    def replacing() -> dict[str, Any]:
        settings = compiled_jobs.adam()
        model, optimizer = settings["model"], settings["optimizer"]

        def change(_epoch: int) -> None:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.data = tensor.detach().clone()

        return {**settings, "scheduler": Schedule(optimizer, change)}

    def leaving() -> dict[str, Any]:
        settings = compiled_jobs.adam()
        return {**settings, "scheduler": Schedule(settings["optimizer"], lambda _epoch: None)}

    even = {"train_data": jobs.table(48)}
    replaced, left = at("replaced"), at("left")
    train(replaced, "adam", **replacing(), **even)
    train(left, "adam", **leaving(), **even)
    assert differing(replaced, left) == []


def test_a_scheduler_sees_that_the_optimizer_has_stepped(at: Callable[[str], Path], interpreted: None) -> None:
    """It warns if not, and warnings are errors here; without state the optimizer makes no eager step."""
    model = jobs.network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    train(at("run"), "adam", train_data=jobs.table(48), epochs=2, **parts)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001)


# -- drift -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), [(True, False), (False, True)])
def test_going_from_compiled_to_eager_steps_or_back_is_said_and_refused_when_strict(
    at: Callable[[str], Path], capsys: pytest.CaptureFixture[str], interpreted: None, before: bool, after: bool
) -> None:
    run = at("run")
    train(run, "adam", compile=before, epochs=1)
    with pytest.raises(DriftError, match=r"steps was '.*', now '.*'; numbers may differ in the last bits"):
        train(run, "adam", compile=after, epochs=2, strict=True)
    capsys.readouterr()
    train(run, "adam", compile=after, epochs=2, progress=None)
    said = lines(capsys, "drift")
    assert len(said) == 1
    assert said[0].startswith("drift   steps was 'compiled" if before else "drift   steps was 'eager'")


def test_an_own_loop_that_continues_a_compiled_run_is_told(
    at: Callable[[str], Path], capsys: pytest.CaptureFixture[str], interpreted: None
) -> None:
    run, settings = at("run"), compiled_jobs.adam()
    train(run, "adam", epochs=1, **settings)
    parts = {name: settings[name] for name in ("model", "optimizer", "scheduler")}
    with Run(run, state=parts):
        assert any("steps was 'compiled" in line for line in lines(capsys, "drift"))


def test_a_resumed_compiled_run_says_nothing_of_drift(
    at: Callable[[str], Path], capsys: pytest.CaptureFixture[str], interpreted: None
) -> None:
    run = at("run")
    train(run, "adam", epochs=1)
    train(run, "adam", epochs=2, progress=None)
    assert lines(capsys, "drift") == []


def test_a_launch_that_trains_no_batch_forgets_nothing_of_the_steps_before(
    at: Callable[[str], Path], capsys: pytest.CaptureFixture[str], interpreted: None
) -> None:
    run = at("run")

    def settings() -> dict[str, Any]:
        policy = SnapshotPolicy(every_epochs=None, every_steps=7, background=False)
        return {**compiled_jobs.adam(), "scheduler": None, "snapshots": policy}

    with pytest.raises(KeyboardInterrupt):
        train(run, "adam", kill=7, **settings())
    train(run, "adam", epochs=1, **settings())  # the evaluation alone
    facts = facts_of(run)
    assert str(facts["steps"]).startswith("compiled (")
    assert facts["compiled for"] == "float32[8, 6], float32[8, 1]"
    capsys.readouterr()
    train(run, "adam", epochs=2, progress=None, **settings())
    assert lines(capsys, "drift") == []


# -- files -----------------------------------------------------------------------------------------------


def nobody_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> bytes:
        raise AssertionError("compiled again")

    monkeypatch.setattr(artefacts, "_compiled", refuse)


def compiles_as_before(code: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The compiler's answer is the code that lies there; a list that grows at each question."""
    answer, asked = code.read_bytes()[32:], []

    def compiled(*_: object) -> bytes:
        asked.append("asked")
        return answer

    monkeypatch.setattr(artefacts, "_compiled", compiled)
    return asked


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def make_it_a_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def make_it_a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a bit is flipped": flip,
    "cut": lambda file: os.truncate(file, 1000),
    "empty": lambda file: os.truncate(file, 0),
    "gone": lambda file: file.unlink(),
    "a directory": make_it_a_directory,
    "a pipe": make_it_a_pipe,
    "all gone": lambda file: shutil.rmtree(file.parent),
    "another step's": lambda file: file.write_bytes(min(file.parent.glob("*.step")).read_bytes()),
}


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the code that was asked for, in this order."""
    names: list[str] = []
    original = artefacts.key_of

    def recorded(*arguments: Any) -> str:
        names.append(original(*arguments))
        return names[-1]

    monkeypatch.setattr(artefacts, "key_of", recorded)
    return names


@needs_compiler
@pytest.mark.parametrize("damage", by_default(["a bit is flipped"], DAMAGES))
def test_damaged_code_is_compiled_anew_and_changes_nothing(
    at: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, damage: str, used: list[str]
) -> None:
    whole, run = at("whole"), at("run")
    train(whole, "adamw")
    with pytest.raises(KeyboardInterrupt):
        train(run, "adamw", kill=8)
    code = run / COMPILED / f"{used[-1]}.step"
    asked = compiles_as_before(code, monkeypatch)
    (code.parent / "0000.step").write_bytes(b"of a step that is not ours" * 100)
    DAMAGES[damage](code)
    train(run, "adamw")
    assert asked == ["asked"]
    assert differing(whole, run) == []
    train(run, "adamw", epochs=4)
    assert len(asked) == (2 if damage == "a directory" else 1), "what was made anew is kept, where it can be"


@needs_compiler
def test_code_that_this_user_did_not_compile_is_not_loaded(
    at: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, secret: Path, used: list[str], tmp_path: Path
) -> None:
    """A run directory of somebody else: the code is sealed, but with another secret."""
    run = at("run")
    train(run, "adamw", epochs=1)
    asked = compiles_as_before(run / COMPILED / f"{used[-1]}.step", monkeypatch)
    train(run, "adamw", epochs=2)
    assert asked == []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "somebody"))
    train(run, "adamw", epochs=3)
    assert asked == ["asked"]
    assert (tmp_path / "somebody/resumable_trainer/compiled.secret").stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv("XDG_CACHE_HOME", str(secret.parents[1]))
    train(run, "adamw", epochs=4)
    assert asked == ["asked", "asked"]


@needs_compiler
def test_nothing_is_loaded_or_kept_where_others_can_read_the_secret(
    at: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    used: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = at("run")
    train(run, "adamw", epochs=1)
    code = run / COMPILED / f"{used[-1]}.step"
    asked = compiles_as_before(code, monkeypatch)
    readable = tmp_path / "cache/resumable_trainer/compiled.secret"
    readable.parent.mkdir(parents=True)
    readable.write_bytes(bytes(32))
    readable.chmod(0o644)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.rmtree(run / COMPILED)
    train(run, "adamw", epochs=2, progress=None)
    assert "not kept: the next start compiles again" in " ".join(lines(capsys, "compile"))
    assert asked == ["asked"]
    assert not (run / COMPILED).exists()


def test_code_of_earlier_scripts_makes_room(tmp_path: Path) -> None:
    kept = artefacts.Artefacts(tmp_path / COMPILED)
    for number in range(20):
        assert kept.keep(f"{number:04d}", b"code")
    (tmp_path / COMPILED / ".tmp-of-a-process-that-died").touch()
    assert kept.keep("last", b"code")
    names = sorted(file.name for file in (tmp_path / COMPILED).iterdir())
    assert names == [f"{number:04d}.step" for number in range(5, 20)] + ["last.step"]


@needs_compiler
def test_a_secret_of_the_wrong_length_is_made_anew(
    at: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, used: list[str]
) -> None:
    run = at("run")
    train(run, "adamw", epochs=1)
    compiles_as_before(run / COMPILED / f"{used[-1]}.step", monkeypatch)
    short = tmp_path / "cache/resumable_trainer/compiled.secret"
    short.parent.mkdir(parents=True)
    short.write_bytes(b"short")
    short.chmod(0o600)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    train(run, "adamw", epochs=2)
    assert len(short.read_bytes()) == 32


@needs_compiler
def test_a_compiler_that_fails_is_said_and_the_job_runs_eagerly(
    at: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    asked, eager = at("asked"), at("eager")
    train(asked, "adamw", progress=None)
    assert "steps are not compiled, the job runs eagerly: torch cannot compile it" in " ".join(lines(capsys, "compile"))
    train(eager, "adamw", compile=False)
    assert differing(asked, eager) == []


# -- on a GPU --------------------------------------------------------------------------------------------


def on_gpu(job: str) -> dict[str, Any]:
    settings = compiled_jobs.JOBS[job]()
    settings["model"].cuda()  # parameters stay the same objects, the optimizer's too
    settings.get("loss_fn", nn.BCELoss()).cuda()
    return {
        **settings,
        "train_data": tuple(t.cuda() for t in jobs.table(52)),
        "test_data": None,
        "early_stopping": None,
    }


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("job", ["adam", "adamw"])
def test_a_cuda_graph_is_exact_across_kills_and_close_to_eager_steps(at: Callable[[str], Path], job: str) -> None:
    whole, run, eager = at("whole"), at("run"), at("eager")
    trainer = train(whole, job, **on_gpu(job))
    assert steps_fact(whole) == "compiled (CUDA graph)"
    for kill in (2, 5, 6, 12, 19):
        with pytest.raises(KeyboardInterrupt):
            train(run, job, kill=kill, **on_gpu(job))
    train(run, job, **on_gpu(job))
    assert differing(whole, run) == []
    expected = train(eager, job, **{**on_gpu(job), "compile": False}).run.history.steps("loss")
    assert trainer.run.history.steps("loss") == pytest.approx(expected, rel=1e-3)

"""The command line on real trainings, each command a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from resumable_trainer.cli.main import _parser

if TYPE_CHECKING:
    from pathlib import Path

SCRIPT = """
import os, time, torch
from torch import nn
from resumable_trainer import EarlyStopping, Run

torch.manual_seed(0)
model = nn.Linear(2, 1)
with Run("runs/mine", state={"model": model}, early_stopping=EarlyStopping("accuracy", patience=9)) as run:
    for epoch in run.epochs(EPOCHS):
        for step in run.batches(range(4)):
            with torch.no_grad():
                model.weight.mul_(torch.rand(()))
            run.log(weight=model.weight.sum())
            time.sleep(float(os.environ.get("PAUSE", "0")))
            if os.environ.get("KILL") == str(run.step):
                os.kill(os.getpid(), int(os.environ.get("SIGNAL", "9")))
        run.log_epoch(accuracy=epoch)
"""


def command(cwd: Path, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "resumable_trainer", *args]
    variables = {**os.environ, **environment}
    return subprocess.run(line, cwd=cwd, env=variables, capture_output=True, text=True, timeout=60, check=False)


def write_script(cwd: Path, epochs: int = 3) -> None:
    (cwd / "train.py").write_text(SCRIPT.replace("EPOCHS", str(epochs)))


def listing(directory: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(directory.rglob("*"))}


def test_run_kill_resume_and_look(tmp_path: Path) -> None:
    """One story, as starting a training costs seconds: every step of it must hold."""
    write_script(tmp_path)
    assert command(tmp_path, "status").returncode == 66
    assert command(tmp_path, "run", "missing.py").returncode == 66
    assert command(tmp_path, "run").returncode == 2

    killed = command(tmp_path, "run", "train.py", KILL="6", PAUSE="0.2")
    assert killed.returncode == -signal.SIGKILL
    status = json.loads(command(tmp_path, "status", "--json").stdout)
    assert (status["state"], status["step"], status["epoch"], status["holder"]) == ("interrupted", 4, 1, None)

    ended = command(tmp_path, "resume", "--from", "latest")
    assert ended.returncode == 0, ended.stderr
    assert "resume  step-000000004-epoch-000001" in ended.stderr

    before = listing(tmp_path / "runs")
    for args in (("run", "train.py"), ("resume",), ("resume", "runs/mine")):
        again = command(tmp_path, *args, PYTHONPROFILEIMPORTTIME="1")
        assert again.returncode == 0
        assert "already finished after 3 epochs, 12 steps | best accuracy 2.0000 @ epoch 3 |" in again.stdout
        for heavy in ("| torch", "| pydantic", "| filelock"):
            assert heavy not in again.stderr, f"{heavy} was imported"
    for args in (["list"], ["status"], ["show"], ["verify"], ["diff", "4", "12"]):
        looked = command(tmp_path, *args, "--json", PYTHONPROFILEIMPORTTIME="1")
        assert looked.returncode == (1 if args[0] == "diff" else 0), looked.stderr
        assert "| torch" not in looked.stderr, f"{args[0]} imported torch"
        json.loads(looked.stdout)
    assert listing(tmp_path / "runs") == before

    found = json.loads(command(tmp_path, "list", "--json").stdout)
    assert [(f["step"], f["epoch"], f["batch"], f["valid"], f["best"]) for f in found] == [
        (4, 1, 0, True, False), (8, 2, 0, True, False), (12, 3, 0, True, True),
    ]  # fmt: skip
    missing = command(tmp_path, "resume", "--from", "5")
    assert missing.returncode == 66
    assert "there are: step-000000004-epoch-000001" in missing.stderr

    write_script(tmp_path, epochs=4)  # raised in the script: there is something to do
    assert command(tmp_path, "resume").returncode == 0
    assert json.loads(command(tmp_path, "status", "--json").stdout)["epoch"] == 4
    strict = command(tmp_path, "run", "--relaunch", "--strict", "train.py")
    assert strict.returncode == 0
    write_script(tmp_path, epochs=5)
    strict = command(tmp_path, "run", "--strict", "train.py")
    assert strict.returncode == 78
    assert "script was" in strict.stderr
    assert "Traceback" not in strict.stderr

    victim = tmp_path / "runs/mine/snapshots/step-000000016-epoch-000004/model.safetensors"
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    verified = command(tmp_path, "verify")
    assert verified.returncode == 65
    assert "step-000000016-epoch-000004: DAMAGED: model.safetensors has digest" in verified.stdout
    for path in (tmp_path / "runs/mine/snapshots").iterdir():
        (path / "manifest.json").unlink()
    refused = command(tmp_path, "run", "train.py")
    assert refused.returncode == 65
    assert "none is valid" in refused.stderr
    fresh = command(tmp_path, "run", "--fresh", "train.py")
    assert fresh.returncode == 0, fresh.stderr
    assert (tmp_path / "runs/mine/set-aside/line-1").is_dir()


def test_a_finished_run_says_so_by_its_events_however_large_its_snapshots_are(tmp_path: Path) -> None:
    write_script(tmp_path)
    assert command(tmp_path, "run", "train.py").returncode == 0
    run = tmp_path / "runs/mine"
    said = "already finished after 3 epochs, 12 steps | best accuracy 2.0000 @ epoch 3 | nothing to do"

    def answer() -> str:
        done = command(tmp_path, "run", "train.py")
        assert done.returncode == 0, done.stderr
        return done.stdout

    tensors = {path: path.read_bytes() for path in (run / "snapshots").glob("*/model.safetensors")}
    for path in tensors:
        path.write_bytes(b"not read")
    assert said in answer()
    events = (run / "events.jsonl").read_text()
    (run / "events.jsonl").write_text(events.replace(',"best":{', ',"from-an-older-release":{'))
    assert "already finished | nothing to do" in answer(), "no snapshot verifies now"
    for path, data in tensors.items():
        path.write_bytes(data)
    assert said in answer()
    (run / "events.jsonl").write_text(events.replace('"value":2.0', '"value":"two"'))
    assert said in answer()
    (run / "events.jsonl").write_text(events.replace('"outcome":"finished"', '"outcome":["finished"]'))
    assert said.replace("finished", "done") in answer()

    (run / "events.jsonl").write_text(events)
    shutil.rmtree(run / "snapshots/step-000000012-epoch-000003")
    assert "already finished after 2 epochs, 8 steps | best accuracy 1.0000 @ epoch 2 | nothing" in answer()


def test_stop_makes_the_holder_save_and_leave_and_a_second_start_is_refused(tmp_path: Path) -> None:
    write_script(tmp_path, epochs=1000)
    line = [sys.executable, "-m", "resumable_trainer", "run", "train.py"]
    variables = {**os.environ, "PAUSE": "0.05"}
    holder = subprocess.Popen(line, cwd=tmp_path, env=variables, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not list((tmp_path / "runs/mine/snapshots").glob("step-*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert json.loads(command(tmp_path, "status", "--json").stdout)["state"] == "running"
        second = command(tmp_path, "run", "train.py")
        assert second.returncode == 69
        assert len(second.stderr.splitlines()) == 1
        assert f"held by pid {holder.pid} on" in second.stderr
        skipped = command(tmp_path, "run", "--if-running", "skip", "train.py")
        assert (skipped.returncode, skipped.stdout, skipped.stderr) == (0, "", "")
        stopped = command(tmp_path, "stop", "--timeout", "30")
        assert stopped.returncode == 0, stopped.stderr
        assert holder.wait(30) == 75
        assert json.loads(command(tmp_path, "status", "--json").stdout)["state"] == "interrupted"
    finally:
        if holder.poll() is None:
            holder.kill()
            holder.wait()
        assert holder.stderr is not None
        holder.stderr.close()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_script_started_by_python_that_was_asked_to_leave_is_not_done(tmp_path: Path, number: int, code: int) -> None:
    write_script(tmp_path)
    environment = {**os.environ, "KILL": "6", "SIGNAL": str(int(number))}
    left = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, env=environment, timeout=60, check=False)
    assert left.returncode == code
    newest = json.loads((tmp_path / "runs/mine/events.jsonl").read_text().splitlines()[-1])
    assert (newest["event"], newest["code"]) == ("exited", code)
    again = command(tmp_path, "run", "train.py")
    assert again.returncode == 0, again.stderr
    assert json.loads(command(tmp_path, "status", "--json").stdout)["state"] == "finished"


def test_a_notebook_that_runs_a_cell_again_after_an_interrupt_is_done_when_that_is(tmp_path: Path) -> None:
    write_script(tmp_path)
    begins = "import os\nfrom resumable_trainer import Interrupted\n"
    begins += "cell = compile(open('train.py').read(), 'train.py', 'exec')\n"
    cells = "try:\n    exec(cell)\nexcept Interrupted:\n    del os.environ['KILL']\n    exec(cell)\n"
    (tmp_path / "notebook.py").write_text(begins + cells)
    environment = {**os.environ, "KILL": "6", "SIGNAL": str(int(signal.SIGINT))}
    subprocess.run([sys.executable, "notebook.py"], cwd=tmp_path, env=environment, timeout=60, check=True)
    newest = json.loads((tmp_path / "runs/mine/events.jsonl").read_text().splitlines()[-1])
    assert (newest["event"], newest["code"]) == ("exited", 0)


@pytest.mark.parametrize("how", ["run", "python"])
def test_a_training_that_raises_exits_70_with_its_traceback(tmp_path: Path, how: str) -> None:
    write_script(tmp_path)
    text = (
        (tmp_path / "train.py").read_text().replace("run.log(weight", "raise ValueError('mine')\n            run.log(w")
    )
    (tmp_path / "train.py").write_text(text)
    line = (
        [sys.executable, "train.py"]
        if how == "python"
        else [sys.executable, "-m", "resumable_trainer", "run", "train.py"]
    )
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 70
    assert "ValueError: mine" in done.stderr
    assert json.loads(command(tmp_path, "status", "--json").stdout)["state"] == "failed"


def test_help_needs_nothing_heavy(tmp_path: Path) -> None:
    for words in ("", "run", "resume", "stop", "prune", "export", "import"):
        done = command(tmp_path, *words.split(), "--help", PYTHONPROFILEIMPORTTIME="1")
        assert done.returncode == 0
        assert "example" in done.stdout
        for heavy in ("| torch", "| pydantic", "| numpy"):
            assert heavy not in done.stderr


@pytest.mark.parametrize(
    "given", ["show --json r best", "show r --json best", "show r best --json"], ids=["before", "between", "after"]
)
def test_options_may_stand_anywhere_among_the_arguments(given: str) -> None:
    args = _parser().parse_args(given.split())
    assert (args.run_dir, args.which, args.json) == ("r", "best", True)


def test_what_is_missing_too_much_or_the_scripts_is_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    for given, words in (
        ("diff a --json", "the following arguments are required: B"),
        ("show r best --json more", "unrecognized arguments: more"),
        ("show r --jason best", "unrecognized arguments: --jason best"),
    ):
        with pytest.raises(SystemExit) as ended:
            _parser().parse_args(given.split())
        assert ended.value.code == 2
        assert words in capsys.readouterr().err
    args = _parser().parse_args(["run", "--run-dir", "r", "train.py", "--run-dir", "its-own", "--json"])
    assert (args.run_dir, args.target, args.args) == ("r", "train.py", ["--run-dir", "its-own", "--json"])


def test_of_twenty_starts_at_once_one_trains_and_nineteen_are_refused(tmp_path: Path) -> None:
    write_script(tmp_path, epochs=8)
    line = [sys.executable, "-m", "resumable_trainer", "run", "train.py"]
    variables = {**os.environ, "PAUSE": "0.25"}
    pipe = subprocess.PIPE
    starts = [subprocess.Popen(line, cwd=tmp_path, env=variables, stderr=pipe, text=True) for _ in range(20)]
    ended = [(start.communicate(timeout=100)[1], start.returncode) for start in starts]
    assert sorted(code for _, code in ended) == [0] + [69] * 19
    assert all(len(text.splitlines()) == 1 for text, code in ended if code == 69)

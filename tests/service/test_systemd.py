"""Runs under a real systemd, booted in a namespace; and the texts of units for evil names."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import sandbox as sandboxes
from marks import by_default

from resumable_trainer.cli.main import main
from resumable_trainer.service import systemd
from resumable_trainer.service.systemd import Plan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sandbox import Sandbox

pytestmark = pytest.mark.timeout(300)  # systemd waits before it restarts

JOB = """
import os, sys, threading, time
import torch
from resumable_trainer import Run, SnapshotPolicy

mode, pause = sys.argv[1], float(sys.argv[2])

def once(name):
    try:
        os.close(os.open(name, os.O_CREAT | os.O_EXCL))
        return True
    except FileExistsError:
        return False

class SlowToRestore:
    def state_dict(self):
        return {"a": 1}
    def load_state_dict(self, state):
        if mode == "whole":
            return
        time.sleep(2)
        open("restored", "a").write("x")

class Hanging(torch.utils.data.Dataset):
    def __len__(self):
        return 60
    def __getitem__(self, index):
        if mode == "worker" and os.path.exists("hang") and torch.utils.data.get_worker_info() and once("hung"):
            time.sleep(10_000)
        return torch.arange(4.0) + index

def stuck_here():
    if mode == "lock":
        lock = threading.Lock(); lock.acquire(); lock.acquire()
    while mode == "loop":
        pass

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.2), torch.nn.Linear(4, 1))
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
loader = torch.utils.data.DataLoader(Hanging(), batch_size=3, shuffle=True, num_workers=int(mode == "worker"))
state = {"model": model, "optimizer": optimizer, "slow": SlowToRestore()}
with Run("run", state=state, snapshots=SnapshotPolicy(every_steps=5)) as run:
    for epoch in run.epochs(6):
        for inputs in run.batches(loader):
            optimizer.zero_grad()
            loss = model(inputs / 60).square().mean()
            loss.backward()
            optimizer.step()
            run.log(loss=loss)
            time.sleep(pause)
            if epoch == 2 and run.batch == 3 and mode in ("loop", "lock", "worker"):
                if mode == "worker":
                    once("hang")
                elif once("hung"):
                    stuck_here()
"""
PYTHON = f"{sys.prefix}/bin/python"
TRAINER = (PYTHON, "-m", "resumable_trainer")


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    reason = sandboxes.lacking()
    if reason is not None:
        pytest.skip(reason)
    booted = sandboxes.Sandbox("resumable-trainer-systemd")
    if booted.failure is not None:
        booted.stop()
        pytest.skip(booted.failure)
    yield booted
    booted.stop()


class Job:
    """A run in the sandbox, and its unit."""

    def __init__(self, box: Sandbox, mode: str, *, pause: float = 0.05, options: tuple[str, ...] = ()) -> None:
        self.box, self.directory = box, f"/srv/{mode}"
        self.run = f"{self.directory}/run"
        box.write(f"{self.directory}/job.py", JOB)
        self.command = f"cd {self.directory} && exec {' '.join(TRAINER)} run job.py {mode} {pause}"
        self.options = options

    def start_by_hand(self) -> None:
        """The first launch, killed after its first snapshots: from then on the run is known."""
        script = f"""{self.command} &
for i in $(seq 300); do [ -d {self.run}/snapshots/step-000000005 ] && break; sleep 0.1; done
kill -9 $!; wait $!"""
        done = self.box.sh("sh", "-c", script)
        assert self.box.sh("test", "-d", f"{self.run}/snapshots/step-000000005").returncode == 0, done.stderr

    def install(self) -> None:
        done = self.box.sh(*TRAINER, "systemd", "install", self.run, "--json", *self.options)
        assert done.returncode == 0, done.stderr + self.journal()
        self.unit = str(json.loads(done.stdout)["instance"])

    def show(self, name: str) -> str:
        return self.box.sh("systemctl", "show", "-P", name, self.unit).stdout.strip()

    def kill(self, signal: str) -> None:
        pid = self.show("MainPID")
        assert pid != "0", self.journal()[-3000:]
        self.box.sh("kill", f"-{signal}", pid)

    def systemctl(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.box.sh("systemctl", *words, self.unit)

    def journal(self) -> str:
        return self.box.sh("journalctl", "--no-pager", "-o", "cat").stdout

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.box.sh("cat", f"{self.run}/events.jsonl").stdout.splitlines()]

    def until(self, holds: Callable[[], bool], seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, (
                self.box.sh("systemctl", "status", self.unit).stdout + self.journal()[-3000:]
            )
            time.sleep(0.2)

    def is_training(self) -> bool:
        return self.show("ActiveState") == "active" and " step " in self.show("StatusText")

    def launches(self) -> int:
        return sum(event["event"] == "launched" for event in self.events())

    def ending(self) -> str:
        """Digests of what a run must end with, whatever has happened to it."""
        names = "metrics.jsonl snapshots/step-000000120-epoch-000006/*.safetensors"
        return self.box.sh("sh", "-c", f"cd {self.run} && sha256sum {names}").stdout


@pytest.fixture(scope="module")
def whole(box: Sandbox) -> str:
    """The ending of a run that nothing has happened to."""
    job = Job(box, "whole", pause=0)
    done = box.sh("sh", "-c", job.command)
    assert done.returncode == 0, done.stderr
    assert len(job.ending().splitlines()) >= 3
    return job.ending()


def test_a_run_lives_through_everything_that_happens_to_its_unit(box: Sandbox, whole: str) -> None:
    job = Job(box, "stopping", pause=0.1)
    job.start_by_hand()
    job.install()
    assert box.sh("cat", f"{job.directory}/restored").stdout == "x", "install waits until it is ready: restored"
    job.until(job.is_training)
    assert "epoch" in job.show("StatusText")

    before = job.launches()
    job.kill("KILL")
    job.until(lambda: job.launches() == before + 1)
    job.until(job.is_training)
    assert [event["signal"] for event in job.events() if event["event"] == "ended"] == ["KILL"]

    job.kill("TERM")
    job.until(lambda: job.launches() == before + 2)
    job.until(job.is_training)
    assert any(event["event"] == "preempted" for event in job.events())

    job.systemctl("stop")
    assert (job.show("ActiveState"), job.show("Result")) == ("inactive", "success")
    assert job.events()[-1]["code"] == 75
    job.systemctl("start")
    job.until(lambda: job.show("ActiveState") == "inactive")
    assert job.show("Result") == "success"
    assert job.ending() == whole

    launches = job.launches()
    assert job.systemctl("start").returncode == 0, "a finished run is a quick success"
    job.until(lambda: job.show("ActiveState") == "inactive")
    assert (job.show("Result"), job.launches()) == ("success", launches)
    assert box.sh(*TRAINER, "systemd", "remove", job.run).returncode == 0
    assert box.sh("test", "-e", f"/etc/systemd/system/{job.unit}.d").returncode != 0


@pytest.mark.parametrize("mode", by_default(["loop"], ["loop", "lock", "worker"]))
def test_a_run_that_hangs_is_found_shown_and_continued(box: Sandbox, whole: str, mode: str) -> None:
    job = Job(box, mode)
    job.start_by_hand()
    box.write(
        "/etc/systemd/system/resumable-trainer@.service.d/quick.conf",
        "[Service]\nEnvironment=RESUMABLE_TRAINER_MIN_WATCHDOG_SECONDS=3\n",
    )
    job.install()
    job.until(lambda: job.show("ActiveState") == "inactive")
    assert job.ending() == whole
    (ended,) = [event for event in job.events() if event["event"] == "ended"]
    assert (ended["by"], ended["result"]) == ("systemd", "hang")
    stack = job.journal()
    assert "Fatal Python error: Aborted" in stack
    assert ("_try_get_data" if mode == "worker" else "stuck_here") in stack, "where it hung"


def test_drift_under_strict_is_refused_once(box: Sandbox) -> None:
    job = Job(box, "drifting", options=("--strict",))
    job.start_by_hand()
    box.write(f"{job.directory}/job.py", JOB + "\n# changed\n")
    done = box.sh(*TRAINER, "systemd", "install", job.run, "--strict", "--no-start", "--json")
    job.unit = json.loads(done.stdout)["instance"]
    assert job.systemctl("start").returncode != 0
    job.until(lambda: job.show("ActiveState") == "failed")
    assert (job.show("ExecMainStatus"), job.show("NRestarts")) == ("78", "0")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
@pytest.mark.parametrize("name", ["plain", "with space ", 'odd%h"quote$HOME\\', "umlaut-ü"])
def test_units_are_sound_for_every_name(tmp_path: Path, name: str) -> None:
    directory = tmp_path / name
    directory.mkdir()
    plan = Plan(directory, sys.executable, [directory], "root")
    escaped = subprocess.run(["systemd-escape", "--path", str(directory)], capture_output=True, text=True, check=True)
    assert plan.instance == f"resumable-trainer@{escaped.stdout.strip()}.service"
    units = tmp_path / "units"
    (units / plan.drop_in).parent.mkdir(parents=True)
    (units / systemd.TEMPLATE).write_text(systemd.template(plan))
    (units / plan.drop_in).write_text(systemd.drop_in(plan))
    environment = {"SYSTEMD_UNIT_PATH": f"{units}:", "PATH": "/usr/bin:/bin"}
    verified = subprocess.run(
        ["systemd-analyze", "verify", units / plan.instance],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (verified.returncode, verified.stdout, verified.stderr) == (0, "", "")
    exposure = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=30", units / plan.instance],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert exposure.returncode == 0, exposure.stdout


def settings(text: str) -> dict[str, list[str]]:
    """Values by section and key."""
    found: dict[str, list[str]] = {}
    section = ""
    for line in text.splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(f"{section}.{key}", []).append(value)
    return found


@pytest.mark.parametrize("user", ["ann", None])
def test_a_unit_says_how_a_training_is_started_watched_stopped_and_restarted(tmp_path: Path, user: str | None) -> None:
    plan = Plan(Path("/srv/run"), "/opt/python", [Path("/srv/run"), Path("/srv")], user, strict=True, hang_seconds=77)
    unit = settings(systemd.template(plan))
    expected = {
        "Unit.Wants": "network-online.target",
        "Unit.After": "network-online.target",
        "Unit.StartLimitIntervalSec": "1h",
        "Unit.StartLimitBurst": "60",
        "Service.Type": "notify",
        "Service.NotifyAccess": "main",
        "Service.ExecReload": "/bin/kill -USR1 $MAINPID",
        "Service.TimeoutStartSec": "30min",
        "Service.TimeoutStopSec": "90",
        "Service.WatchdogSec": "77",
        "Service.KillMode": "mixed",
        "Service.Restart": "on-failure",
        "Service.RestartSec": "5",
        "Service.RestartForceExitStatus": "75 SIGTERM",
        "Service.SuccessExitStatus": "75",
        "Service.RestartPreventExitStatus": "2 65 66 78 79 130",  # CONTRACT: no use in the same again
        "Service.OOMPolicy": "stop",
        "Service.Environment": "PYTHONUNBUFFERED=1",
        "Service.NoNewPrivileges": "yes",
        "Service.UMask": "0027",
        "Install.WantedBy": "multi-user.target" if user else "default.target",
    }
    assert {key: unit.get(key) for key in expected} == {key: [value] for key, value in expected.items()}
    assert ("Service.ProtectSystem" in unit) == (user is not None), "the manager of a user may not do that"
    own = settings(systemd.drop_in(plan))
    command, ended = '"/opt/python" -m resumable_trainer resume "/srv/run" --strict', own["Service.ExecStopPost"]
    assert own["Service.ExecStart"] == ["", command], "in place of the template's"
    assert ended == ["", '-"/opt/python" -m resumable_trainer systemd ended "/srv/run"']
    assert own.get("Service.User") == (["ann"] if user else None)
    assert own.get("Service.ReadWritePaths") == (['"-/srv/run"', '"-/srv"'] if user else None)
    assert own["Service.WorkingDirectory"] == ["%f"]


def test_keys_that_the_local_systemd_does_not_know_are_left_out(tmp_path: Path) -> None:
    assert "RestartSteps" not in systemd.template(Plan(tmp_path, "python", [], "root", version=252))
    assert "RestartSteps" in systemd.template(Plan(tmp_path, "python", [], "root", version=254))


def test_a_unit_that_is_not_ours_is_never_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "job.py").write_text(
        "from resumable_trainer import Run\nimport torch\n"
        "with Run('run', state={'m': torch.nn.Linear(1, 1)}, progress=False) as run:\n"
        "    for _ in run.epochs(1): pass\n"
    )
    subprocess.run([*TRAINER, "run", "job.py"], cwd=tmp_path, check=True, timeout=60)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    foreign = tmp_path / "config/systemd/user/resumable-trainer@.service"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("[Unit]\n")
    assert main(["systemd", "install", "--user", str(tmp_path / "run")]) == 78, "illegal settings"
    assert foreign.read_text() == "[Unit]\n"
    assert main(["systemd", "remove", "--user", str(tmp_path / "run")]) == 0
    assert foreign.exists()


def test_a_run_that_never_was_started_is_refused(tmp_path: Path) -> None:
    (tmp_path / "snapshots").mkdir()
    assert main(["systemd", "print", str(tmp_path)]) == 66

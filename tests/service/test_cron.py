"""A run under Debian's real cron, in a system of its own: killed, started again, and never heard of."""

from __future__ import annotations

import json
import shutil
import sys
import sysconfig
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import sandbox as sandboxes

import resumable_trainer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sandbox import Sandbox

JOB = """
import sys, time, torch
from resumable_trainer import Run, SnapshotPolicy
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.2), torch.nn.Linear(4, 1))
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
with Run("run", state={"model": model, "optimizer": optimizer}, snapshots=SnapshotPolicy(every_steps=5)) as run:
    for epoch in run.epochs(6):
        for _ in run.batches(range(20)):
            optimizer.zero_grad()
            loss = model(torch.randn(3, 4)).square().mean()
            loss.backward()
            optimizer.step()
            run.log(loss=loss)
            time.sleep(float(sys.argv[1]))
"""
TRAINER = (f"{sys.prefix}/bin/python", "-m", "resumable_trainer")
DIRECTORY = "/srv/50% of it's"
RUN = f"{DIRECTORY}/run"


@pytest.fixture
def box() -> Iterator[Sandbox]:
    reason = sandboxes.lacking() or (None if shutil.which("cron") else "Debian's cron is not installed")
    if reason is not None:
        pytest.skip(reason)
    booted = sandboxes.Sandbox("resumable-trainer-cron")
    if booted.failure is not None:
        booted.stop()
        pytest.skip(booted.failure)
    # Cron's environment has no PYTHONPATH: the package under test comes first in there, wherever it is.
    here = Path(resumable_trainer.__file__).parents[1]
    line = f"import sys; sys.path.insert(0, {str(here)!r})\n"
    booted.write(f"{sysconfig.get_paths()['purelib']}/under_test.pth", line)
    yield booted
    booted.stop()


def start(box: Sandbox, directory: str, pause: float, behind: str = "") -> None:
    box.write(f"{directory}/job.py", JOB)
    done = box.sh("sh", "-c", f'cd "{directory}"; {" ".join(TRAINER)} run job.py {pause} {behind}')
    assert done.returncode == 0, done.stderr


def ending(box: Sandbox, directory: str) -> str:
    names = "metrics.jsonl snapshots/step-000000120-epoch-000006/*.safetensors"
    return box.sh("sh", "-c", f'cd "{directory}/run" && sha256sum {names}').stdout


def events(box: Sandbox, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in box.sh("cat", f"{RUN}/events.jsonl").stdout.splitlines()]
    return [event for event in found if event["event"] == kind]


def until(holds: Callable[[], bool]) -> None:
    """Cron looks once a minute."""
    deadline = time.monotonic() + 180
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.3)


def kill(box: Sandbox) -> None:
    """The training, once it trains."""
    launches = len(events(box, "launched"))
    until(lambda: len(events(box, "training")) == launches)
    assert box.sh("kill", "-9", str(events(box, "launched")[-1]["pid"])).returncode == 0


@pytest.mark.timeout(480)  # cron looks once a minute
def test_a_run_that_is_killed_three_times_is_continued_to_its_end_without_a_word(box: Sandbox) -> None:
    start(box, "/srv/whole", 0)
    whole = ending(box, "/srv/whole")
    assert len(whole.splitlines()) >= 3
    box.write("/usr/sbin/sendmail", "#!/bin/sh\ncat >> /srv/mail\n")
    box.sh("chmod", "755", "/usr/sbin/sendmail")
    # The user's own line speaks, so that silence is ours and not the mail's.
    box.sh("crontab", "-", text="MAILTO=root\n* * * * * echo spoken\n")

    start(box, DIRECTORY, 0.1, "> /dev/null 2>&1 &")
    until(lambda: bool(events(box, "committed")))
    done = box.sh(*TRAINER, "cron", "install", RUN, "--every", "1")
    assert done.returncode == 0, done.stderr
    crontab = box.sh("crontab", "-l").stdout
    every = next(line for line in crontab.splitlines() if line.startswith("*/1 "))
    box.sh("crontab", "-", text=f"{crontab}{every}\n")  # twice: each minute one of two starts must be skipped
    for kills in (1, 2, 3):
        kill(box)
        until(lambda: len(events(box, "launched")) == kills + 1)  # noqa: B023 - called at once
    second = box.sh("sh", "-c", every.removeprefix("*/1 * * * * ").replace(r"\%", "%"))
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    assert not events(box, "finished"), "it was skipped because the run was held"
    until(lambda: bool(events(box, "finished")))

    assert [event["generation"] for event in events(box, "launched")] == [1, 2, 3, 4], "never two at a time"
    assert ending(box, DIRECTORY) == whole
    mail = box.sh("cat", "/srv/mail").stdout
    assert "spoken" in mail
    assert "resumable" not in mail
    assert "Traceback" not in box.sh("cat", f"{RUN}/cron.log").stdout
    assert box.sh(*TRAINER, "cron", "remove", RUN).returncode == 0
    assert box.sh("crontab", "-l").stdout == f"MAILTO=root\n* * * * * echo spoken\n{every}\n"

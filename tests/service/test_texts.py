"""Texts for cron, Slurm and Kubernetes: their form, and what they do where that can be tried."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resumable_trainer.errors import SettingsError
from resumable_trainer.service import cron, kubernetes, slurm

HOSTILE = Path("/srv/a b/50%/it's $HOME")
LINES = st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20), max_size=5)


def test_cron_entries_escape_the_percent_sign_and_quote_the_path() -> None:
    text = cron.block(cron.Entry(HOSTILE, "/opt/bin/python", minutes=10))
    begin, reboot, every, end = text.splitlines()
    assert reboot.startswith("@reboot { /opt/bin/python -m resumable_trainer resume ")
    assert every.startswith("*/10 * * * * { /opt/bin/python ")
    assert "%" not in every.replace("\\%", "")
    assert (begin[:5], end[:5]) == ("# >>>", "# <<<")
    assert reboot.removeprefix("@reboot ") == every.removeprefix("*/10 * * * * ")
    command = every.removeprefix("*/10 * * * * ").replace("\\%", "%")
    assert subprocess.run(["sh", "-n", "-c", command], check=False).returncode == 0


@pytest.mark.parametrize("shell", ["sh", "bash"])
@pytest.mark.parametrize(
    ("end", "speaks"),
    [("exit 0", 0), ("exit 75", 0), ("kill -9 $$", 0), ("kill -15 $$", 0), ("exit 70", 70), ("kill -11 $$", 139)],
)
def test_an_entry_is_silent_unless_a_person_is_needed(tmp_path: Path, shell: str, end: str, speaks: int) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho noise; echo noise >&2; {end}\n")
    python.chmod(0o755)
    line = cron.block(cron.Entry(tmp_path, str(python))).splitlines()[2].removeprefix("*/5 * * * * ")
    done = subprocess.run([shell, "-c", line], capture_output=True, text=True, check=False)
    assert done.stdout == (f"exit {speaks}, see {tmp_path}/cron.log\n" if speaks else "")
    assert done.stderr == ""
    assert (tmp_path / "cron.log").read_text().startswith("noise\nnoise\n")


@given(LINES, st.booleans())
def test_installing_and_removing_leaves_the_users_crontab_as_it_was(lines: list[str], ends: bool) -> None:
    mine = "\n".join(lines) + ("\n" if ends else "")
    one, other = cron.Entry(Path("/a"), "python"), cron.Entry(Path("/a/b"), "python", minutes=3)
    both = cron.with_entry(cron.with_entry(mine, one), other)
    assert cron.with_entry(both, other) == both
    rest = cron.without_entry(cron.without_entry(both, one.directory), other.directory)
    assert rest == (mine if not mine or mine.endswith("\n") else mine + "\n")


def test_marks_that_do_not_fit_are_refused_and_an_illegal_interval_too() -> None:
    text = cron.block(cron.Entry(Path("/a"), "python"))
    for torn in (text.split("\n", 1)[1], text.rsplit("#", 1)[0], text.split("\n", 1)[0] + "\n" + text):
        with pytest.raises(SettingsError):
            cron.without_entry("* * * * * mine\n" + torn, Path("/a"))
    for entry in (cron.Entry(Path("/a"), "python", minutes=0), cron.Entry(Path("/a\nb"), "python")):
        with pytest.raises(SettingsError):
            cron.block(entry)


TRAINING = """
import signal, sys, time

signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
open("started", "w").close()
time.sleep(30 if "preempt" in sys.argv[-1] else 0)
sys.exit(70 if "fail" in sys.argv[-1] else 0)
"""


def slurm_job(tmp_path: Path, name: str) -> tuple[Path, dict[str, str]]:
    binaries = tmp_path / "bin"
    binaries.mkdir()
    (tmp_path / "training.py").write_text(TRAINING)
    (binaries / "python").write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path}/training.py "$@"\n')
    (binaries / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/requeued\n')
    for file in binaries.iterdir():
        file.chmod(0o755)
    script = tmp_path / "job.sh"
    script.write_text(slurm.script(slurm.Job(tmp_path / name, str(binaries / "python"), str(tmp_path))))
    return script, {"PATH": f"{binaries}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}


@pytest.mark.parametrize(("name", "code"), [("done", 0), ("fail", 70)])
def test_a_batch_script_gives_the_trainings_code_and_queues_no_failure(tmp_path: Path, name: str, code: int) -> None:
    script, environment = slurm_job(tmp_path, name)
    assert subprocess.run(["bash", script], env=environment, check=False).returncode == code
    assert not (tmp_path / "requeued").exists()


def test_a_warning_is_passed_on_and_the_job_queued_again(tmp_path: Path) -> None:
    script, environment = slurm_job(tmp_path, "preempt")
    warned = "(while [ ! -e started ]; do sleep 0.1; done; kill -USR1 $$) &\n"  # while the shell waits
    wait = 'wait "$training"; code=$?\n'
    text = script.read_text().replace(wait, warned + wait, 1)
    script.write_text(text)
    assert subprocess.run(["bash", script], env=environment, check=False, timeout=60).returncode == 75
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"


def test_a_training_that_has_saved_before_the_shell_waits_again_is_queued_again(tmp_path: Path) -> None:
    script, environment = slurm_job(tmp_path, "preempt")
    text = script.read_text().replace(
        "2>/dev/null' USR1", "2>/dev/null; sleep 2' USR1", 1
    )  # a trap that takes its time
    warned = "(while [ ! -e started ]; do sleep 0.1; done; kill -USR1 $$) &\n"
    wait = 'wait "$training"; code=$?\n'
    script.write_text(text.replace(wait, warned + wait, 1))
    assert subprocess.run(["bash", script], env=environment, check=False, timeout=60).returncode == 75
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"


def test_a_batch_script_has_the_options_and_quotes_the_path() -> None:
    text = slurm.script(slurm.Job(HOSTILE, "python", "/srv/a b", options=("--gres=gpu:1",)))
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    assert "#SBATCH --signal=B:USR1@120\n#SBATCH --requeue\n#SBATCH --open-mode=append\n" in text
    assert "#SBATCH --gres=gpu:1\n" in text


def test_a_job_of_kubernetes_is_started_again_only_where_that_is_of_use() -> None:
    job = kubernetes.Job(HOSTILE, ("python", "-m", "x"), "image:1", "claim", "/app")
    spec = json.loads(kubernetes.manifest(job))["spec"]
    ignored, again, never = spec["podFailurePolicy"]["rules"]
    assert ignored == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}
    assert again == {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [75]}}
    assert never["onExitCodes"]["values"] == [2, 65, 66, 78, 79]
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    assert json.loads(kubernetes.manifest(job))["metadata"]["name"] == "it-s-home"
    assert spec["backoffLimit"] == 20
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert (container["image"], container["command"], container["workingDir"]) == (
        "image:1",
        ["python", "-m", "x"],
        "/app",
    )
    assert container["volumeMounts"] == [{"name": "runs", "mountPath": "/srv/a b/50%"}]
    assert pod["volumes"] == [{"name": "runs", "persistentVolumeClaim": {"claimName": "claim"}}]
    assert pod["terminationGracePeriodSeconds"] == 120


def test_a_job_holds_dollars_as_they_are_and_no_path_that_cannot_be_mounted() -> None:
    text = kubernetes.manifest(kubernetes.Job(Path("/srv/$(HOME)/$$"), ("python", "/srv/$(HOME)/$$"), "i", "c", "/app"))
    (container,) = json.loads(text)["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["python", "/srv/$$(HOME)/$$$$"], (
        "Kubernetes would put in a variable, and halve the rest"
    )
    for path, argument in (("/srv/a:b/run", "x"), ("/srv/a/run", "\udcff")):
        with pytest.raises(SettingsError):
            kubernetes.manifest(kubernetes.Job(Path(path), (argument,), "i", "c", "/app"))

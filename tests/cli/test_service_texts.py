"""`runs`, `cron`, `systemd`, `slurm` and `k8s` as they are typed, with names as people and programs give them."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from resumable_trainer.cli.main import main

if TYPE_CHECKING:
    from collections.abc import Callable

NAMES = [
    "plain",
    "with space ",
    "quo'te",
    'dq"x',
    "per%cent%h",
    "dol$HOME${PATH}`x`",
    "ümlaut-日本",
    "-leading",
    "back\\slash\\",
    "semi;colon&#",
    "*glob?",
    "tab\there",
    "line\u2028paragraph\x85",
    "\x1b[31m",
]
UNPRINTABLE = [*NAMES, "new\nExecStartPre=evil", "surrogate\udcff"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("made")
    (place / "job.py").write_text(
        "import torch\nfrom resumable_trainer import Run\n"
        "with Run('run', state={'m': torch.nn.Linear(1, 1)}, progress=False) as run:\n"
        "    for _ in run.epochs(1): pass\n"
    )
    subprocess.run([sys.executable, "-m", "resumable_trainer", "run", "job.py"], cwd=place, check=True)
    return place / "run"


@pytest.fixture
def named(made: Path, tmp_path: Path) -> Callable[[str], Path]:
    def copied(name: str) -> Path:
        return Path(shutil.copytree(made, tmp_path / name))

    return copied


def printed(capfd: pytest.CaptureFixture[str], *words: str) -> str:
    capfd.readouterr()
    assert main(list(words)) == 0
    out, error = capfd.readouterr()
    assert error == ""
    return out


@pytest.mark.parametrize("name", NAMES)
def test_cron_starts_the_very_run_whatever_its_name(
    named: Callable[[str], Path], capfd: pytest.CaptureFixture[str], name: str
) -> None:
    directory = named(name)
    text = printed(capfd, "cron", "print", "--every", "7", "--strict", str(directory))
    entry = next(line for line in text.split("\n") if line.startswith("*/7 * * * * "))
    command = entry.removeprefix("*/7 * * * * ").replace("\\%", "%")
    shown = command.replace(shlex.quote(sys.executable), "printf '%s\\n'", 1)
    assert subprocess.run(["sh", "-c", shown], check=False).returncode == 0
    words = ["-m", "resumable_trainer", "resume", str(directory), "--if-running", "skip", "--quiet", "--strict"]
    assert (directory / "cron.log").read_text().split("\n") == [*words, ""]


def fake_crontab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin/crontab"
    tool.write_text(f'#!/bin/sh\ncase $1 in -l) cat "{tmp_path}/tab";; -) cat > "{tmp_path}/tab";; esac\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    (tmp_path / "tab").write_bytes(b"* * * * * mine \xff 50\\%\n")
    return tmp_path / "tab"


@pytest.mark.parametrize("name", [*NAMES, "surrogate\udcff"])
def test_cron_is_installed_once_and_removed_whatever_the_name(
    named: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    tab = fake_crontab(tmp_path, monkeypatch)
    before, directory = tab.read_bytes(), str(named(name))
    assert main(["cron", "install", "--every", "3", directory]) == 0
    once = tab.read_bytes()
    assert os.fsencode(name).replace(b"%", b"\\%").split(b"'")[0] in once
    assert main(["cron", "install", directory, "--every", "3"]) == 0
    assert tab.read_bytes() == once
    assert main(["cron", "remove", directory]) == 0
    assert tab.read_bytes() == before


def test_what_was_installed_for_a_run_can_be_removed_when_the_run_is_gone(
    named: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tab = fake_crontab(tmp_path, monkeypatch)
    before, directory = tab.read_bytes(), named("a")
    assert main(["cron", "install", str(directory)]) == 0
    (tmp_path / "bin/systemctl").write_text("#!/bin/sh\n")
    (tmp_path / "bin/systemctl").chmod(0o755)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    assert main(["systemd", "install", "--user", str(directory)]) == 0
    units = tmp_path / "config/systemd/user"
    assert len(list(units.iterdir())) == 2
    shutil.rmtree(directory)
    assert main(["cron", "remove", str(directory)]) == 0
    assert tab.read_bytes() == before
    assert main(["systemd", "remove", "--user", str(directory)]) == 0
    assert list(units.iterdir()) == []


def test_a_run_that_can_have_no_unit_is_refused_in_one_line(
    named: Callable[[str], Path], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["systemd", "print", str(named("x" * 200))]) == 78
    assert "is too long" in capfd.readouterr().err
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    assert main(["systemd", "print", str(named("a"))]) == 78
    assert "who has no name on this machine" in capfd.readouterr().err


def test_a_crontab_that_cannot_be_read_is_not_replaced(
    named: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    tab = fake_crontab(tmp_path, monkeypatch)
    before, directory = tab.read_bytes(), str(named("a"))
    (tmp_path / "bin/crontab").write_text('#!/bin/sh\n[ "$1" = - ] && exec cat > x\necho "no space left" >&2; exit 1\n')
    assert main(["cron", "install", directory]) == 78
    assert "the crontab cannot be read: no space left" in capfd.readouterr().err
    assert tab.read_bytes() == before
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert main(["cron", "remove", directory]) == 78
    assert "apt install cron" in capfd.readouterr().err


@pytest.mark.parametrize("name", UNPRINTABLE[:-1])
def test_a_unit_says_one_thing_in_each_line_whatever_the_name(
    named: Callable[[str], Path], capfd: pytest.CaptureFixture[str], name: str
) -> None:
    directory = named(name)
    units = json.loads(printed(capfd, "systemd", "print", "--json", "--hang-timeout", "77", str(directory)))["units"]
    drop_in = next(text for path, text in units.items() if path.endswith(".d/run.conf"))
    keys = [line.partition("=")[0] for line in drop_in.split("\n")]
    words = ["ExecStart", "ExecStart", "ExecStopPost", "ExecStopPost", "WorkingDirectory", "User"]
    assert keys == ["# Written by resumable-trainer.", "[Service]", *words, *["ReadWritePaths"] * 3, ""]
    assert not any(line.endswith("\\") for line in drop_in.split("\n")), "the next line would belong to it"
    assert "WatchdogSec=77\n" in units["resumable-trainer@.service"]


def test_a_name_that_is_no_text_is_refused_where_it_cannot_stand(
    named: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    directory = named("surrogate\udcff")
    assert main(["systemd", "print", str(directory)]) == 78
    assert "is no UTF-8" in capfd.readouterr().err
    assert main(["cron", "print", str(named("new\nline"))]) == 78


@pytest.mark.parametrize("name", UNPRINTABLE[:-1])
def test_a_batch_script_and_a_job_name_the_very_run(
    named: Callable[[str], Path], capfd: pytest.CaptureFixture[str], name: str
) -> None:
    directory = named(name)
    script = printed(capfd, "slurm", "print", "--time", "5", "--sbatch=--gres=gpu:1", str(directory))
    assert shlex.split(script.partition("TERM\n")[2].partition(" &\ntraining=$!")[0])[-2:] == ["resume", str(directory)]
    job = json.loads(printed(capfd, "k8s", "print", "--image", "i", "--grace", "9", str(directory)))
    pod = job["spec"]["template"]["spec"]
    # Kubernetes makes one dollar of two.
    assert [w.replace("$$", "$") for w in pod["containers"][0]["command"][-2:]] == ["resume", str(directory)]
    assert pod["terminationGracePeriodSeconds"] == 9
    kubernetes_name = job["metadata"]["name"]
    assert kubernetes_name.isascii()
    assert kubernetes_name.strip("-").replace("-", "").isalnum()
    assert kubernetes_name == kubernetes_name.lower().strip("-")


@pytest.mark.parametrize("words", [["cron", "print"], ["slurm", "print"], ["k8s", "print", "--image", "i"]])
def test_a_run_that_is_not_there_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for more in ([], ["nowhere"], ["empty"]):
        assert main([*words, *more]) == 66
        assert capfd.readouterr().out == ""
    assert main([*words, ""]) == 2


def test_runs_shows_every_run_in_a_line_whatever_its_name(
    named: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in UNPRINTABLE:
        named(name)
    table = printed(capfd, "runs", str(tmp_path))
    assert len(table.split("\n")) == len(UNPRINTABLE) + 2
    assert all(line.isprintable() and len(line) <= 80 for line in table.split("\n"))
    rows = json.loads(printed(capfd, "runs", "--json", str(tmp_path)))
    assert {Path(row["run_dir"]).name for row in rows} == set(UNPRINTABLE)
    assert {row["state"] for row in rows} == {"finished"}

"""Signs of life: what a watcher is told, and when a limit is learned; the clock is handed in."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from typing import TYPE_CHECKING

import pytest
from small import Small

from resumable_trainer.loop.heartbeat import Heartbeat, Messenger, failing
from resumable_trainer.loop.launch import Command
from resumable_trainer.loop.script import run_script

if TYPE_CHECKING:
    from pathlib import Path


class Watched:
    """A heartbeat with its messages and a clock of the test's own."""

    def __init__(self, **settings: object) -> None:
        self.now, self.told, self.noted = 0.0, list[str](), list[float]()
        self.heart = Heartbeat(
            self.told.append, clock=lambda: self.now, note=self.noted.append, limit_seconds=600.0, **settings
        )  # type: ignore[arg-type]

    def beat_after(self, *seconds: float) -> None:
        for one in seconds:
            self.now += one
            self.heart.beat()

    def limits(self) -> list[float]:
        lines = [line for message in self.told for line in message.splitlines()]
        return [int(line.partition("=")[2]) / 1e6 for line in lines if line.startswith("WATCHDOG_USEC=")]


def test_no_limit_is_learned_before_the_end_of_an_epoch_was_seen() -> None:
    watched = Watched()
    watched.heart.ready()
    watched.beat_after(1, 20, 1)
    assert watched.limits() == []
    watched.heart.epoch_ends()
    assert watched.limits() == [200.0], "ten times the longest silence"
    assert watched.noted == [20.0]


def test_a_limit_is_never_below_the_floor() -> None:
    watched = Watched(floor_seconds=30.0)
    watched.beat_after(0.1, 0.1)
    watched.heart.epoch_ends()
    assert watched.limits() == [30.0]


def test_a_longer_silence_raises_the_limit_and_a_shorter_one_never_lowers_it() -> None:
    watched = Watched()
    for longest in (5, 50, 6):
        watched.beat_after(longest)
        watched.heart.epoch_ends()
    assert watched.limits() == [50.0, 500.0]
    assert watched.noted == [5.0, 50.0]


def test_a_silence_that_nobody_could_have_watched_is_not_learned() -> None:
    watched = Watched()
    watched.beat_after(5)
    watched.heart.epoch_ends()
    watched.beat_after(30_000)  # suspended for the night, and its watcher with it
    watched.heart.epoch_ends()
    assert (watched.limits(), watched.noted, watched.heart.longest_seconds) == ([50.0], [5.0], 5.0)


def test_what_an_earlier_launch_has_learned_holds_from_the_beginning() -> None:
    watched = Watched(longest_gap_seconds=7.0)
    watched.heart.ready()
    assert watched.limits() == [70.0]


def test_what_a_script_does_after_its_run_has_the_watchers_own_limit() -> None:
    watched = Watched(longest_gap_seconds=1.0)
    watched.heart.ready()
    watched.heart.closed()
    assert watched.limits() == [30.0, 600.0], "it has no pace that is known"


def test_signs_of_life_come_from_progress_alone_and_not_too_often() -> None:
    watched = Watched(floor_seconds=10.0)
    watched.heart.ready()
    watched.beat_after(*[0.01] * 500)
    assert watched.told.count("WATCHDOG=1") == 4, "five seconds, one a second"
    watched.now += 1000  # nothing happens, nothing is said
    assert watched.told.count("WATCHDOG=1") == 4


def test_nobody_watching_means_nothing_is_done(tmp_path: Path) -> None:
    heart = Heartbeat.of_process({}, longest_gap_seconds=None, note=lambda seconds: pytest.fail("noted"))
    heart.ready(), heart.beat(lambda: pytest.fail("asked")), heart.epoch_ends(), heart.stopping()


def test_a_watchdog_meant_for_another_process_is_none_of_ours(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as listener:
        listener.bind(str(tmp_path / "notify"))
        environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"}
        heart = Heartbeat.of_process(environment, longest_gap_seconds=1.0, note=lambda seconds: None)
        heart.ready()
        assert listener.recv(100) == b"READY=1\nSTATUS=ready", "it is told how the training goes"
        with pytest.raises(BlockingIOError):
            listener.recv(100)  # but asked for no limit


def test_a_manager_that_is_gone_is_no_error(tmp_path: Path) -> None:
    Messenger(str(tmp_path / "nobody"))("READY=1")
    Messenger("x" * 500)("READY=1")


def test_a_forked_child_says_nothing(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        send = Messenger(str(tmp_path / "notify"))
        pid = os.fork()
        if not pid:
            send("WATCHDOG=1")
            os._exit(0)
        os.waitpid(pid, 0)
        send("READY=1")
        assert listener.recv(100) == b"READY=1"


def test_a_run_tells_when_it_is_ready_how_it_goes_and_that_it_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "600000000")
        Small().train(tmp_path / "run")
        told = []
        while True:
            try:
                told.append(listener.recv(10_000).decode())
            except BlockingIOError:
                break
    assert "STATUS=restoring" in told[0]
    assert "EXTEND_TIMEOUT_USEC=" in told[0]
    assert told[1] == "READY=1\nSTATUS=ready", "and not: restoring"
    assert "WATCHDOG_USEC=30000000\nWATCHDOG=1" in told
    assert told[-1] == "WATCHDOG_USEC=600000000\nWATCHDOG=1", "the run is closed, the script may go on"


class Unshown(Exception):
    def __str__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("def f(:", ["STATUS=failed: SyntaxError: invalid syntax (job.py, line 1)"]),
        ("raise OSError('first\\nsecond')", ["STATUS=failed: OSError: first"]),
        ("raise SystemExit(70)", []),
        ("raise KeyboardInterrupt", []),
        ("from resumable_trainer.errors import Preempted\nraise Preempted('gone')", []),
    ],
)
def test_a_script_that_fails_says_so_and_one_that_leaves_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, told: list[str]
) -> None:
    (tmp_path / "job.py").write_text(script)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        run_script(Command(sys.executable, str(tmp_path / "job.py"), None, (), str(tmp_path)))
        heard = []
        with contextlib.suppress(BlockingIOError):
            heard.append(listener.recv(10_000).decode().splitlines()[0])
        failing(Unshown())
        assert listener.recv(10_000) == b"STATUS=failed: Unshown\nX_FAILURE=Unshown"
    assert heard == told

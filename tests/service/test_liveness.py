"""The watching end of sd_notify: who is heard, and what a word changes."""

from __future__ import annotations

import os
import socket

from resumable_trainer.service.liveness import DEFAULT_LIMIT_SECONDS, Ear, Liveness


def say(address: str, text: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto(text.encode(), "\0" + address[1:])


def test_the_limit_is_the_first_one_until_a_better_one_is_learned() -> None:
    liveness = Liveness(60, started=100)
    assert not liveness.is_over(159)
    assert liveness.is_over(160)
    liveness.hear({"READY": "1"}, 150)
    assert not liveness.is_over(209)
    liveness.hear({"WATCHDOG_USEC": "2000000"}, 160)
    assert liveness.is_over(162)
    liveness.hear({"WATCHDOG": "1"}, 161)
    assert not liveness.is_over(162.5)
    liveness.hear({"STOPPING": "1"}, 162)
    assert not liveness.is_over(163.5)
    assert liveness.is_over(164)


def test_a_status_alone_is_no_sign_of_progress() -> None:
    liveness = Liveness(10, started=0)
    liveness.hear({"STATUS": "epoch 1"}, 9)
    assert liveness.is_over(10)
    assert liveness.status == "epoch 1"


def test_time_asked_for_is_given_and_never_shortens() -> None:
    liveness = Liveness(10, started=0)
    liveness.hear({"EXTEND_TIMEOUT_USEC": "30000000"}, 5)
    assert liveness.deadline == 35
    liveness.hear({"EXTEND_TIMEOUT_USEC": "1000000"}, 6)
    assert liveness.deadline == 35


def test_a_child_that_never_speaks_is_not_watched_unless_asked_for() -> None:
    liveness = Liveness(None, started=0)
    assert not liveness.is_over(1e9)
    liveness.hear({"STATUS": "loading"}, 5)
    assert liveness.deadline == 5 + DEFAULT_LIMIT_SECONDS


def test_nonsense_changes_nothing() -> None:
    liveness = Liveness(10, started=0)
    for value in ("-5", "x", "", "9" * 30, "0", "٣"):
        liveness.hear({"WATCHDOG_USEC": value, "EXTEND_TIMEOUT_USEC": value}, 5)
    assert (liveness.limit_seconds, liveness.deadline) == (10, 10)


def test_a_worker_cannot_speak_for_the_training() -> None:
    ear = Ear()
    assert ear.address is not None
    child = os.fork()
    if not child:
        say(ear.address, "WATCHDOG=1")
        os._exit(0)
    os.waitpid(child, 0)
    say(ear.address, "READY=1\nSTATUS=a=b")
    os.write(1, b"")
    assert ear.messages(os.getpid()) == [{"READY": "1", "STATUS": "a=b"}]
    assert ear.messages(os.getpid()) == []
    ear.close()

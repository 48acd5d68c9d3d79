"""Priorities for the journal: only on the stream that it reads."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

CODE = """
import os, sys
from resumable_trainer.cli.main import main
from resumable_trainer.loop.progress import Progress
Progress("lines").say(["run     x", "drift   y", "warning z", "damaged a"])
sys.exit(main(["status", "/no/such/run"]))
"""


def said(*, is_journal: bool) -> list[str]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        found = os.fstat(theirs.fileno())
        stream = f"{found.st_dev}:{found.st_ino + (not is_journal)}"
        environment = {**os.environ, "JOURNAL_STREAM": stream}
        done = subprocess.run([sys.executable, "-c", CODE], stderr=theirs, env=environment, check=False)
        assert done.returncode == 66
        theirs.shutdown(socket.SHUT_WR)
        return ours.makefile().read().splitlines()


def test_each_line_carries_its_priority_where_the_journal_reads_it() -> None:
    lines = said(is_journal=True)
    assert lines[:4] == ["<6>run     x", "<4>drift   y", "<4>warning z", "<4>damaged a"]
    assert lines[4].startswith("<3>resumable-trainer: ")
    assert all(line.startswith("<3>") for line in lines[4:])


def test_another_stream_is_left_as_it_is() -> None:
    assert not [line for line in said(is_journal=False) if line.startswith("<")]

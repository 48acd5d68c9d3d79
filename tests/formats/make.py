"""Make the frozen run of the format that this version writes.

    python tests/formats/make.py tests/formats/v1

Deterministic: what differs from launch to launch and from machine to machine (identities, clocks, host,
versions) is put to fixed words. A format that is released is never made again: a new one gets a directory of
its own, a list of digests (`sha256sum`), and a class of tests beside those of the old ones.
"""

from __future__ import annotations

import hashlib
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import torch
from frozen_job import Died, Job

from resumable_trainer.durable import lock
from resumable_trainer.loop import identity, keeper, launch, opening
from resumable_trainer.manager import held, saving

if TYPE_CHECKING:
    from collections.abc import Iterator

RUN_ID = "0123456789abcdef"
NOW = "2026-01-02T03:04:05.678+00:00"
DIES_AT = 7
VERSIONS = {"resumable_trainer": "0.1.0", "torch": "2.13.0+cpu", "python": "3.11.2"}
FACTS = {"script": None, "seed": 7, "torch": "2.13.0+cpu", "device": "cpu", "threads": 1}
COMMAND = launch.Command("/usr/bin/python3", "/home/user/train.py", None, ("--lr", "0.5"), "/home/user")


def make(directory: Path) -> None:
    """Train until the kill; the run directory is what it leaves."""
    handover = launch.Handover(command=COMMAND)
    handover.moved[Path("/home/user/runs/frozen")] = directory.resolve()
    torch.set_num_threads(1)
    with ExitStack() as stack:
        for target, name, value in _labels():
            stack.enter_context(mock.patch.object(target, name, value))
        stack.enter_context(mock.patch.object(launch.process, "handover", handover))
        stack.enter_context(mock.patch.object(launch.process, "note_opened"))
        try:
            Job().train(directory, die_at=DIES_AT)
        except Died:
            return
    raise AssertionError("it was to die")


def _labels() -> Iterator[tuple[Any, str, Any]]:
    class Clock:
        @staticmethod
        def monotonic() -> float:
            return 0.0

    owner = lock.Owner("host", 4242, "boot", "1", NOW, 1, command=str(COMMAND))
    yield held, "now", lambda: NOW
    yield saving, "time", Clock
    yield keeper, "time", Clock
    yield lock, "_myself", lambda generation, command: owner
    yield opening.secrets, "token_hex", lambda num_bytes: RUN_ID[: 2 * num_bytes]
    yield opening.socket, "gethostname", lambda: "host"
    yield opening, "getpid", lambda: 4242
    yield opening, "launch_started", lambda: None
    yield opening, "datetime", _FixedDatetime
    yield identity, "versions", lambda: VERSIONS
    yield identity, "current_facts", lambda *_, **__: FACTS


class _FixedDatetime:
    UTC = None

    class datetime:  # noqa: N801 - named as the one that it stands for
        @staticmethod
        def now(_zone: object) -> Any:
            return _FixedDatetime.datetime()

        def isoformat(self, *, timespec: str) -> str:
            assert timespec == "seconds"
            return "2026-01-02T03:04:05+00:00"


def digests(directory: Path) -> str:
    """Digests of all files below, as `sha256sum` prints them."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    lines = [
        f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(directory.parent).as_posix()}" for p in paths
    ]
    return "".join(f"{line}\n" for line in lines)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    make(target)
    target.with_name(f"{target.name}.sha256").write_text(digests(target))
    print(f"{sum(p.stat().st_size for p in target.rglob('*') if p.is_file()):,} bytes in {target}")

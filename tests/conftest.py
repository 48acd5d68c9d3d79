"""What tests share: small trainings, and a process that has nothing left over from the test before."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, settings

sys.path[:0] = [str(Path(__file__).parent / name) for name in ("", "resume", "loop")]

from resumable_trainer.durable.files import Files
from resumable_trainer.loop import launch
from resumable_trainer.loop.notices import notices

if TYPE_CHECKING:
    from collections.abc import Iterator

PIMA = Path(__file__).resolve().parents[2] / "shared" / "data" / "pima-indians-diabetes.csv"

# A shell starts what it does in the background with SIGINT ignored, and so would each process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# No test fails because the machine is slow; the first run in a fresh checkout also builds tables of Unicode.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """First come those that wait more than they work, a minute and longer: others work beside them."""
    items.sort(key=lambda item: "service" not in item.path.parts)


@pytest.fixture(autouse=True)
def _fresh_process() -> Iterator[None]:
    """No notice, no handover and no handler of an earlier test."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    hook = sys.excepthook
    torch.set_num_threads(1)
    notices.reset()
    launch.process.handover = launch.Handover()
    yield
    notices.reset()
    sys.excepthook = hook
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def past_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each write that goes past the page cache; skipped with a reason where none can."""
    with (tmp_path / "try").open("wb") as file:
        if not Files().bypass_page_cache(file.fileno(), wanted=True):
            pytest.skip(f"{tmp_path} lies on a file system whose page cache cannot be gone past")
    past: list[int] = []
    write = Files.write

    def noted(self: Files, fd: int, data: Any) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            past.append(memoryview(data).nbytes)
        return write(self, fd, data)

    monkeypatch.setattr(Files, "write", noted)
    return past


@pytest.fixture
def pima() -> Path:
    """The Pima file; skipped with a reason where it is not."""
    path = Path(os.environ.get("RESUMABLE_TRAINER_PIMA_CSV", PIMA))
    if not path.is_file():
        pytest.skip(f"the Pima file is not at {path}; name it with RESUMABLE_TRAINER_PIMA_CSV")
    return path

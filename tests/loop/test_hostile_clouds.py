"""Metadata services that answer as none should: said once each, and of no harm to the training or its end."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from hostile_servers import BEHAVIOURS, Hostile, hostile
from metadata_servers import serving
from small import Small

from resumable_trainer.loop import cloud_sources, clouds, metadata_service
from resumable_trainer.loop.cloud_sources import Asked, Aws, Azure, Google
from resumable_trainer.loop.clouds import Watch

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def watching() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("notices of")]


def until(holds: Any) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def stays(value: Callable[[], object]) -> bool:
    """Whether it is the same after half a second."""
    before = value()
    time.sleep(0.5)
    return value() == before


def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata_service, "TIMEOUT_SECONDS", 0.1)
    monkeypatch.setattr(cloud_sources, "_AZURE_FIRST_SECONDS", 0.1)
    monkeypatch.setattr(clouds, "_AFTER_FAILURE_SECONDS", 0.01)


@pytest.fixture
def elsewhere(request: pytest.FixtureRequest) -> Any:
    """A host that nobody was told to ask."""
    with hostile("silent") as server:
        yield server
        assert server.requests == []


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_every_source_says_once_that_it_fails_and_asks_again(
    behaviour: str, elsewhere: Hostile, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient(monkeypatch)
    said: list[str] = []
    told: list[Asked] = []
    servers = [Hostile(behaviour, elsewhere.host) for _ in range(3)]
    sources = [
        Aws(f"http://{servers[0].host}"),
        Google(servers[1].host),
        Azure(f"http://{servers[2].host}", "vm"),
    ]
    for source in sources:
        source.every_seconds = 0.01  # type: ignore[attr-defined]
    watch = Watch(sources, tell=lambda asked, _: told.append(asked), seconds_needed=lambda: 0, say=said.append)
    until(lambda: all(len(server.requests) > 6 for server in servers))
    watch.stop()
    until(lambda: not watching())
    until(lambda: not any(server.open for server in servers))  # nothing is left open
    assert told == []
    assert sorted(line.split(" cannot be had (")[0] for line in said) == [
        f"warning notices of {name}" for name in ("AWS", "Azure", "Google")
    ]
    for server in servers:
        server.close()


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_training_is_as_if_nobody_were_asked_and_leaves_no_thread(
    tmp_path: Path, behaviour: str, elsewhere: Hostile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the limits that it has in earnest: Azure's first answer is waited for two minutes."""
    with hostile(behaviour, elsewhere.host) as server:
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://{server.host}")
        monkeypatch.setenv("GCE_METADATA_HOST", server.host)
        monkeypatch.setenv("RESUMABLE_TRAINER_AZURE_IMDS", f"http://{server.host}")
        small = Small(at_step=lambda run: until(lambda: len(server.requests) >= 3))
        run = small.train(tmp_path / "run")
        assert (run.outcome, len(small.seen)) == ("finished", 12), "all batches, while the answers are waited for"
        until(lambda: not watching())
        until(lambda: not server.open)
    assert len(server.requests) < 10, "none is asked without a pause"
    assert server.num_bytes < 100 << 20, "a megabyte each, and what lies in the buffers between"


def test_a_thread_that_waits_for_azures_first_answer_ends_with_the_watch() -> None:
    """Which may come after two minutes."""
    with hostile("silent") as server:
        azure = Azure(f"http://{server.host}", "vm")
        azure._name = "vm"
        watch = Watch([azure], tell=lambda *_: pytest.fail("told"), seconds_needed=lambda: 0, say=pytest.fail)
        until(lambda: server.requests)
        watch.stop()
        until(lambda: not watching())


def test_a_service_that_still_sends_is_told_when_it_is_called_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though what it has sent is read to its end: without a reset it would wait for the window to open again."""
    begun, goes_on = threading.Event(), threading.Event()
    original = metadata_service._InTime.readinto

    def readinto(this: Any, buffer: Any) -> int:
        begun.set()
        goes_on.wait()
        return original(this, buffer)

    monkeypatch.setattr(metadata_service._InTime, "readinto", readinto)
    with hostile("enormous") as server:
        service = metadata_service.MetadataService(f"http://{server.host}")

        def ask() -> None:
            with contextlib.suppress(OSError, ValueError):
                service.ask("/", {}, timeout=60)

        asking = threading.Thread(target=ask)
        asking.start()
        begun.wait()
        until(lambda: server.num_bytes and stays(lambda: server.num_bytes))
        service.call_off()
        goes_on.set()
        asking.join()
        until(lambda: not server.open)


def test_a_process_ends_in_order_while_an_answer_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(
        "import torch\nfrom resumable_trainer import Run\n"
        "run = Run('run', state={'m': torch.nn.Linear(1, 1)}, progress=False)\n"
        "with run:\n    for _ in run.epochs(1):\n        for _ in run.batches(range(3)): pass\n"
    )
    with hostile("silent") as server:
        environment = {**os.environ, "RESUMABLE_TRAINER_AZURE_IMDS": f"http://{server.host}"}
        done = subprocess.run(
            [sys.executable, "job.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_notice_is_followed_though_the_screen_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    impatient(monkeypatch)

    def say(line: str) -> None:
        raise BrokenPipeError

    told: list[Asked] = []
    with serving() as (host, metadata):
        metadata.preempted = "MAYBE"
        google = Google(host)
        google.every_seconds = 0.01
        watch = Watch([google], tell=lambda asked, _: told.append(asked), seconds_needed=lambda: 0, say=say)
        time.sleep(0.1)
        metadata.preempted = "TRUE"
        monkeypatch.setattr(cloud_sources, "_GOOGLE_SECONDS", 0.0)
        until(lambda: told)
        watch.stop()


@pytest.mark.parametrize(
    "endpoint", ["", "nonsense", "file:///etc/passwd", "http://", "http://[", "http://h:x", "http:// "]
)
def test_an_address_that_is_none_is_said_once(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    impatient(monkeypatch)
    said: list[str] = []
    azure = Azure(endpoint, "vm")
    azure.every_seconds = 0.01
    watch = Watch([azure], tell=lambda *_: pytest.fail("told"), seconds_needed=lambda: 0, say=said.append)
    time.sleep(0.1)
    watch.stop()
    until(lambda: not watching())
    assert len(said) == 1


def test_a_token_that_is_none_is_not_kept() -> None:
    with serving() as (host, metadata):
        aws = Aws(f"http://{host}")
        aws._token = "a\nb"  # noqa: S105 - none
        with pytest.raises(ValueError, match="Invalid header value"):
            aws.ask()
        assert aws.ask() is None
        assert metadata.tokens_given == 1

"""Notices of clouds: what is asked for, what is made of the answers, and what a training does then."""

from __future__ import annotations

import datetime
import json
import os
import signal
import subprocess
import sys
import threading
import time
from email.utils import format_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import endings
import pytest
from metadata_servers import Metadata, serving

from resumable_trainer.loop.cloud_sources import Asked, Aws, Azure, Google, Slurm
from resumable_trainer.loop.clouds import Watch, found_here

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def served() -> Iterator[tuple[str, Metadata]]:
    with serving() as found:
        yield found


def later(seconds: float) -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)


def action(seconds: float, kind: str = "terminate") -> str:
    return json.dumps({"action": kind, "time": later(seconds).strftime("%Y-%m-%dT%H:%M:%SZ")})


def test_aws_tells_of_an_interruption_and_renews_its_token(served: tuple[str, Metadata]) -> None:
    host, metadata = served
    aws = Aws(f"http://{host}/")
    assert aws.ask() is None
    metadata.expire()
    metadata.action = action(100)
    asked = aws.ask()
    assert asked is not None
    assert (asked.source, asked.leave) == ("AWS spot: terminate", True)
    assert 95 < (asked.seconds_left or 0) <= 100
    assert len(metadata.refused) == 1
    assert metadata.tokens_given == 2


def test_a_rebalance_recommendation_asks_for_a_snapshot_once(served: tuple[str, Metadata]) -> None:
    host, metadata = served
    aws = Aws(f"http://{host}")
    metadata.rebalance = json.dumps({"noticeTime": "2026-01-01T00:00:00Z"})
    assert aws.ask() == Asked("AWS rebalance recommendation", leave=False)
    assert aws.ask() is None


@pytest.mark.parametrize("word", ["TRUE", "true"])
def test_google_is_asked_at_once_and_then_waits_for_a_change(served: tuple[str, Metadata], word: str) -> None:
    host, metadata = served
    metadata.preempted = "false" if word.islower() else "FALSE"
    google = Google(host)
    assert google.ask() is None
    threading.Timer(0.2, lambda: (setattr(metadata, "preempted", word), metadata.changed.set())).start()
    began = time.monotonic()
    assert google.ask() == Asked("Google: preempted", leave=True, seconds_left=30.0)
    assert time.monotonic() - began < 5, "the answer came with the change"


def test_azure_tells_of_events_of_this_machine_alone(served: tuple[str, Metadata]) -> None:
    host, metadata = served
    azure = Azure(f"http://{host}", "vm-1")
    assert azure.ask() is None
    event = {"EventId": "x", "EventType": "Preempt", "ResourceType": "VirtualMachine", "EventStatus": "Scheduled"}
    event["NotBefore"] = format_datetime(later(40), usegmt=True)
    metadata.events = {"DocumentIncarnation": 2, "Events": [{**event, "Resources": ["vm-2"]}]}
    assert azure.ask() is None
    metadata.events["Events"] += [{**event, "EventType": "Freeze", "Resources": ["VM-1"]}]
    assert azure.ask() is None
    metadata.events["Events"] += [{**event, "Resources": ["VM-1"]}]
    asked = azure.ask()
    assert asked is not None
    assert asked.source == "Azure: Preempt"
    assert 35 < (asked.seconds_left or 0) <= 40
    metadata.events["Events"][-1]["NotBefore"] = ""  # it has started
    asked = azure.ask()
    assert asked is not None
    assert asked.seconds_left == 30


def test_azure_calls_a_machine_by_another_name_than_it_calls_itself(served: tuple[str, Metadata]) -> None:
    host, metadata = served
    metadata.name = "vmss_7"
    azure = Azure(f"http://{host}", "vmss000007")
    event = {"EventId": "x", "EventType": "Preempt", "EventStatus": "Scheduled", "NotBefore": ""}
    metadata.events = {"DocumentIncarnation": 2, "Events": [{**event, "Resources": ["vmss_6"]}]}
    assert azure.ask() is None
    metadata.events = {"DocumentIncarnation": 3, "Events": [{**event, "Resources": ["vmss_7"]}]}
    assert azure.ask() is not None


@pytest.mark.parametrize("answer", ['{"error": "busy"}', "<html>503</html>", "", "x" * 1000])
def test_a_name_that_is_none_is_not_kept(served: tuple[str, Metadata], answer: str) -> None:
    host, metadata = served
    azure = Azure(f"http://{host}", "vmss000007")
    event = {"EventId": "x", "EventType": "Preempt", "NotBefore": "", "Resources": ["vmss_7"]}
    metadata.name, metadata.events = answer, {"Events": [event]}
    assert azure.ask() is None
    metadata.name = "vmss_7"
    assert azure.ask() is not None


def test_slurm_tells_the_end_of_the_job() -> None:
    asked = Slurm(time.time() + 500).ask()
    assert asked is not None
    assert 495 < (asked.seconds_left or 0) <= 500


@pytest.mark.parametrize("answer", ["", "[]", "{", '{"Events": 5}', '{"Events": [5, {"EventType": null}]}', "\0" * 100])
def test_a_malformed_answer_is_said_once_and_harms_nothing(served: tuple[str, Metadata], answer: str) -> None:
    host, metadata = served
    metadata.events, metadata.action, metadata.preempted = answer, answer, answer
    said: list[str] = []
    told: list[Asked] = []
    sources = [Azure(f"http://{host}", "vm"), Aws(f"http://{host}"), Google(host)]
    for source in sources:
        source.every_seconds = 0.01
    watch = Watch(sources, tell=lambda asked, _: told.append(asked), seconds_needed=lambda: 0, say=said.append)
    time.sleep(0.3)
    watch.stop()
    assert len(said) <= 3
    assert all("cannot be had" in line for line in said)


def test_a_service_that_is_not_there_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resumable_trainer.loop.clouds._AFTER_FAILURE_SECONDS", 0.01)
    said: list[str] = []
    aws = Aws("http://127.0.0.1:9")
    aws.every_seconds = 0.01
    watch = Watch([aws], tell=lambda *_: pytest.fail("told"), seconds_needed=lambda: 0, say=said.append)
    time.sleep(0.2)
    watch.stop()
    assert len(said) == 1


def test_nothing_is_asked_outside_of_clouds(tmp_path: Path) -> None:
    (tmp_path / "sys_vendor").write_text("QEMU\n")
    assert found_here({}, dmi=tmp_path) == []
    assert found_here({}, dmi=tmp_path / "none") == []
    (tmp_path / "sys_vendor").write_text("Amazon EC2\n")
    assert [source.name for source in found_here({}, dmi=tmp_path)] == ["AWS"]
    assert found_here({"AWS_EC2_METADATA_DISABLED": "true"}, dmi=tmp_path) == []
    assert found_here({"RESUMABLE_TRAINER_NOTICES": "off"}, dmi=tmp_path) == []
    names = [source.name for source in found_here({"RESUMABLE_TRAINER_NOTICES": "google,azure"}, dmi=tmp_path)]
    assert names == ["Google", "Azure"]
    (tmp_path / "sys_vendor").write_text("Microsoft Corporation\n")
    assert found_here({}, dmi=tmp_path) == [], "a Hyper-V at home is no Azure"
    (tmp_path / "chassis_asset_tag").write_text("7783-7084-3265-9085-8269-3286-77\n")
    assert [source.name for source in found_here({}, dmi=tmp_path)] == ["Azure"]
    end = str(int(time.time()) + 60)
    assert [source.name for source in found_here({"SLURM_JOB_END_TIME": end}, dmi=tmp_path / "none")] == ["Slurm"]


def test_training_goes_on_while_there_is_time_to_spare() -> None:
    told: list[float | None] = []
    said: list[str] = []
    needed = [0.0]
    asked = Asked("somebody", leave=True, seconds_left=30.0)
    source = Slurm(0)
    source.ask = lambda: asked  # type: ignore[method-assign]
    watch = Watch([source], tell=lambda _, at: told.append(at), seconds_needed=lambda: needed[0], say=said.append)
    time.sleep(0.3)
    assert told == []
    assert said == ["notice  somebody in 30 s; training goes on for 30 s"]
    needed[0] = 29.9  # snapshots have become slow
    time.sleep(0.8)
    assert len(told) == 1
    watch.stop()


JOB = """
import os, sys, time
import torch
from resumable_trainer import Run, SnapshotPolicy

where = sys.argv[1]

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 24
    def __getitem__(self, index):
        value = torch.rand(2) + index
        if where == "load" and index == 13 and not os.path.exists("loaded"):
            print("READY", flush=True)
            end = time.monotonic() + 60
            while time.monotonic() < end:
                time.sleep(0.01)
        return value

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.3), torch.nn.Linear(2, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
workers = int(len(sys.argv) > 2)
loader = torch.utils.data.DataLoader(Data(), batch_size=2, num_workers=workers)
policy = SnapshotPolicy(every_steps=None if where == "recommended" else 4)
with Run("run", state={"model": model, "optimizer": optimizer}, snapshots=policy, progress=None) as run:
    for epoch in run.epochs(2):
        for inputs in run.batches(loader):
            if where == "first" and not os.path.exists("loaded"):
                print("READY", flush=True)
                time.sleep(2)
            if where == "recommended":
                time.sleep(0.1)
            if where == "training" and run.step >= 5 and not os.path.exists("loaded"):
                if run.step == 5:
                    print("READY", flush=True)
                time.sleep(0.6)
            optimizer.zero_grad()
            loss = model(inputs).square().mean()
            loss.backward()
            optimizer.step()
            run.log(loss=loss)
        for inputs in run.evaluating(loader):
            if where == "evaluation" and not os.path.exists("loaded"):
                print("READY", flush=True)
                time.sleep(0.5)
        run.log_epoch(draw=float(torch.rand(())))
"""


def started(directory: Path, where: str, *more: str, **environment: str) -> subprocess.Popen[str]:
    (directory / "job.py").write_text(JOB)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RESUMABLE_TRAINER_N")}
    return subprocess.Popen(
        [sys.executable, "job.py", where, *more],
        cwd=directory,
        env={**clean, "PYTHONPATH": str(Path(__file__).parents[2]), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("where", "more", "cloud"),
    [
        ("training", (), "aws"),
        ("evaluation", (), "google"),
        ("load", (), "azure"),
        pytest.param("load", ("worker",), "aws", marks=pytest.mark.long),
        ("load", (), "signal"),
        pytest.param("first", (), "google", marks=pytest.mark.long),
    ],
)
def test_a_notice_is_followed_wherever_it_finds_the_training(
    tmp_path: Path, served: tuple[str, Metadata], where: str, more: tuple[str, ...], cloud: str
) -> None:
    host, metadata = served
    endpoints = {
        "aws": {"AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://{host}"},
        "google": {"GCE_METADATA_HOST": host},
        "azure": {"RESUMABLE_TRAINER_AZURE_IMDS": f"http://{host}"},
        "signal": {},
    }[cloud]
    process = started(tmp_path, where, *more, **endpoints)
    assert process.stdout is not None
    assert process.stdout.readline() == "READY\n"
    noticed = time.monotonic()
    event: dict[str, Any] = {"EventType": "Preempt", "NotBefore": format_datetime(later(15), usegmt=True)}
    metadata.action, metadata.events, metadata.preempted = action(15), {"Events": [event]}, "TRUE"
    metadata.changed.set()
    if cloud == "signal":
        process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert time.monotonic() - noticed < 30, "not after the load of a minute, nor when all is over"
    rows = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    (left,) = [row for row in rows if row["event"] == "preempted"]
    saved = {row["snapshot"] for row in rows if row["event"] == "committed"}
    assert left["snapshot"] in saved
    assert f"step-{left['step']:09d}" in left["snapshot"], "nothing trained is lost"
    if cloud != "signal":
        assert left["seconds_left"] > 0, "inside the deadline"
        assert cloud in left["source"].lower()
    (tmp_path / "loaded").touch()
    resumed = started(tmp_path, where, *more)
    assert resumed.communicate(timeout=60)[1] is not None
    assert resumed.returncode == 0
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "loaded").touch()
    reference = started(whole, where, *more)
    reference.communicate(timeout=60)
    assert endings.differing(endings.ending(whole / "run"), endings.ending(tmp_path / "run")) == []


@pytest.mark.parametrize("approves", [False, True])
def test_azure_is_told_that_the_run_has_saved_if_that_is_asked_for(
    tmp_path: Path, served: tuple[str, Metadata], approves: bool
) -> None:
    host, metadata = served
    metadata.events = {"Events": [{"EventId": "e-1", "EventType": "Preempt", "NotBefore": ""}]}
    environment = {"RESUMABLE_TRAINER_AZURE_IMDS": f"http://{host}"}
    if approves:
        environment["RESUMABLE_TRAINER_AZURE_APPROVE"] = "1"
    process = started(tmp_path, "training", **environment)
    assert "Azure: Preempt" in process.communicate(timeout=60)[1]
    assert process.returncode == 75
    assert metadata.approved == (["e-1"] if approves else [])


def test_a_rebalance_recommendation_saves_and_goes_on(tmp_path: Path, served: tuple[str, Metadata]) -> None:
    host, metadata = served
    metadata.rebalance = json.dumps({"noticeTime": "2026-01-01T00:00:00Z"})
    process = started(tmp_path, "recommended", AWS_EC2_METADATA_SERVICE_ENDPOINT=f"http://{host}")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    rows = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    names = [row["snapshot"] for row in rows if row["event"] == "committed"]
    assert ["epoch" in name for name in names] == [False, True, True], "one more than the policy asks for"

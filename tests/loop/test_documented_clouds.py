"""Sources against services written from the clouds' documents: asked as documented, and understood."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import pytest
from documented_clouds import Clouds, azure_event, documented, iso, rfc1123

from resumable_trainer.loop.cloud_sources import Asked, Aws, Azure, Google, Slurm
from resumable_trainer.loop.clouds import Watch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Served = tuple[str, Clouds]


@pytest.fixture
def served() -> Iterator[Served]:
    with documented() as found:
        yield found
        assert found[1].faults == []


def until(holds: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# -- AWS ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("action", "seconds"), [("terminate", 90), ("stop", 90), ("hibernate", 0)])
def test_aws_is_asked_with_a_token_and_every_action_ends_the_machine(
    served: Served, action: str, seconds: float
) -> None:
    host, clouds = served
    aws = Aws(f"http://{host}")
    assert [aws.ask() for _ in range(3)] == [None] * 3
    assert len(clouds.tokens) == 1, "one token for six hours"
    clouds.aws["spot/instance-action"] = json.dumps({"action": action, "time": iso(90)})
    asked = aws.ask()
    assert asked is not None
    assert (asked.source, asked.leave) == (f"AWS spot: {action}", True)
    assert seconds - 2 <= (asked.seconds_left or 0.0) <= seconds, "a hibernation begins at once"
    assert set(clouds.asked) == {
        "PUT /latest/api/token",
        "GET /latest/meta-data/spot/instance-action",
        "GET /latest/meta-data/events/recommendations/rebalance",
    }


def test_each_recommendation_of_aws_is_passed_on_once(served: Served) -> None:
    host, clouds = served
    aws = Aws(f"http://{host}")
    for second in range(2):
        clouds.aws["events/recommendations/rebalance"] = json.dumps({"noticeTime": iso(second * 60)})
        assert [aws.ask(), aws.ask()] == [Asked("AWS rebalance recommendation", leave=False), None]


def test_an_instance_that_is_to_go_is_more_than_one_that_may(served: Served) -> None:
    host, clouds = served
    clouds.aws["events/recommendations/rebalance"] = json.dumps({"noticeTime": iso(0)})
    clouds.aws["spot/instance-action"] = json.dumps({"action": "terminate", "time": iso(90)})
    asked = Aws(f"http://{host}").ask()
    assert asked is not None
    assert asked.leave


# -- Google ---------------------------------------------------------------------------------------


def test_google_tells_of_a_change_between_two_questions_at_once(served: Served) -> None:
    host, clouds = served
    google = Google(host)
    assert google.ask() is None
    clouds.preempted = "TRUE"  # nobody waits at this moment
    began = time.monotonic()
    assert google.ask() == Asked("Google: preempted", leave=True, seconds_left=30.0)
    assert time.monotonic() - began < 10, "not when the minute is over: by then the machine is gone"


def test_google_is_asked_once_a_minute_while_nothing_changes(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    host, clouds = served
    monkeypatch.setattr("resumable_trainer.loop.cloud_sources._LONG_POLL_SECONDS", 1)
    monkeypatch.setattr("resumable_trainer.loop.metadata_service.TIMEOUT_SECONDS", 0.5)  # of other answers
    google = Google(host)
    assert [google.ask() for _ in range(3)] == [None] * 3
    assert len(clouds.asked) == 3
    assert clouds.asked[0] == "GET /computeMetadata/v1/instance/preempted"
    assert clouds.asked[1].startswith(f"{clouds.asked[0]}?wait_for_change=true&timeout_sec=1&last_etag=")


# -- Azure ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Preempt", "Terminate", "Reboot", "Redeploy", "Freeze"])
@pytest.mark.parametrize(
    ("machines", "is_ours"),
    [
        (["myscaleset_4"], True),
        (["MYSCALESET_4"], True),
        (["host000004"], True),
        (["myscaleset_3", "myscaleset_4"], True),
        (["myscaleset_3"], False),
        (["myscaleset_40"], False),
        (["myscaleset", "scaleset_4"], False),
    ],
)
def test_azure_events_that_end_this_machine_are_followed_and_no_others(
    served: Served, kind: str, machines: list[str], is_ours: bool
) -> None:
    host, clouds = served
    clouds.azure_events = [azure_event(kind, "", Resources=machines, NotBefore=rfc1123(100))]
    asked = Azure(f"http://{host}", "host000004").ask()
    assert (asked is not None) == (is_ours and kind != "Freeze")
    if asked is not None:
        assert (asked.source, asked.leave, asked.saved) == (f"Azure: {kind}", True, None)
        assert 95 <= (asked.seconds_left or 0.0) <= 100


@pytest.mark.parametrize("without", [{"NotBefore": ""}, {"NotBefore": None}, "NotBefore"])
def test_an_azure_event_without_a_time_has_begun(served: Served, without: Any) -> None:
    host, clouds = served
    event = azure_event("Preempt", "myscaleset_4", EventStatus="Started")
    clouds.azure_events = [
        {**event, **without} if isinstance(without, dict) else {k: v for k, v in event.items() if k != without}
    ]
    asked = Azure(f"http://{host}", "h").ask()
    assert asked is not None
    assert asked.seconds_left == 30, "what Azure promises at least"


def test_of_several_azure_events_the_one_with_the_least_time_counts_and_is_approved(served: Served) -> None:
    host, clouds = served
    clouds.azure_events = [
        azure_event("Redeploy", "myscaleset_4", EventId="later"),
        azure_event("Preempt", "myscaleset_4", EventId="sooner", NotBefore=rfc1123(40)),
        azure_event("Terminate", "myscaleset_3", EventId="another's", NotBefore=rfc1123(5)),
    ]
    asked = Azure(f"http://{host}", "h", approves=True).ask()
    assert asked is not None
    assert asked.source == "Azure: Preempt"
    assert asked.saved is not None
    asked.saved()
    assert clouds.started == [{"EventId": "sooner"}]
    assert set(clouds.asked) == {
        "GET /metadata/instance/compute/name?api-version=2021-02-01&format=text",
        "GET /metadata/scheduledevents?api-version=2020-07-01",
        "POST /metadata/scheduledevents?api-version=2020-07-01",
    }


# -- watched --------------------------------------------------------------------------------------


class Watched:
    """A watch over one source that needs no pause, with what it tells."""

    def __init__(self, source: Any, *, needed: float = 30.0) -> None:
        source.every_seconds = 0.01
        self.told: list[Asked] = []
        self.said: list[str] = []
        self.watch = Watch(
            [source],
            tell=lambda asked, _: self.told.append(asked),
            seconds_needed=lambda: needed,
            say=self.said.append,
        )


def test_a_preemption_that_comes_while_a_later_end_is_waited_for_is_followed(served: Served) -> None:
    host, clouds = served
    clouds.azure_events = [azure_event("Redeploy", "myscaleset_4", NotBefore=rfc1123(600))]
    watched = Watched(Azure(f"http://{host}", "h"))
    until(lambda: watched.said)
    assert watched.said[0].startswith("notice  Azure: Redeploy in ")
    assert watched.told == []
    clouds.azure_events.append(azure_event("Preempt", "myscaleset_4", NotBefore=rfc1123(30)))
    until(lambda: watched.told)
    assert [asked.source for asked in watched.told] == ["Azure: Preempt"]
    assert len(watched.said) == 1
    watched.watch.stop()


def test_an_end_that_was_called_off_is_not_followed(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    host, clouds = served
    monkeypatch.setattr("resumable_trainer.loop.clouds._NO_MORE_SECONDS", 0.0)
    clouds.azure_events = [azure_event("Reboot", "myscaleset_4", NotBefore=rfc1123(33))]
    watched = Watched(Azure(f"http://{host}", "h"))
    until(lambda: watched.said)
    clouds.azure_events = []
    count = len(clouds.asked)
    time.sleep(3.5)
    assert len(clouds.asked) > count
    assert watched.told == []
    watched.watch.stop()


def test_a_service_that_falls_silent_after_its_notice_has_not_taken_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resumable_trainer.loop.clouds._AFTER_FAILURE_SECONDS", 0.01)
    monkeypatch.setattr("resumable_trainer.loop.clouds._NO_MORE_SECONDS", 0.0)
    with documented() as (host, clouds):
        clouds.aws["spot/instance-action"] = json.dumps({"action": "terminate", "time": iso(33)})
        watched = Watched(Aws(f"http://{host}"))
        until(lambda: watched.said)
        clouds.aws["spot/instance-action"] = "<html>"
        until(lambda: watched.told)
    assert [line.split()[0] for line in watched.said] == ["notice", "warning"]
    assert [asked.source for asked in watched.told] == ["AWS spot: terminate"]
    watched.watch.stop()


def test_shortly_before_the_time_nothing_is_asked_that_could_delay(served: Served) -> None:
    host, clouds = served
    clouds.aws["spot/instance-action"] = json.dumps({"action": "terminate", "time": iso(35)})
    watched = Watched(Aws(f"http://{host}"))
    until(lambda: watched.said)
    until(lambda: watched.told)
    assert sum("instance-action" in line for line in clouds.asked) == 1
    watched.watch.stop()


def test_slurms_end_is_waited_for_and_not_counted_down_from_anew() -> None:
    watched = Watched(Slurm(time.time() + 31.5))
    until(lambda: watched.told)
    assert len(watched.told) == 1
    watched.watch.stop()

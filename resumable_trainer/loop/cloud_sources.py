"""What clouds and Slurm say of a machine's end: how each is asked, and what its answers mean.

Rules and forms: AWS "Spot Instance interruption notices" (IMDSv2), Google "Preemptible and Spot VMs: preempted" and
"Querying VM metadata" (waiting for changes), Azure "Scheduled Events for Linux VMs", Slurm `sbatch(1)`. Free of torch.
"""

from __future__ import annotations

import datetime
import email.utils
import json
import re
import time
import urllib.parse
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from resumable_trainer.loop.metadata_service import MetadataService, RefusedError

if TYPE_CHECKING:
    from collections.abc import Callable

_LONG_POLL_SECONDS = 60
_GOOGLE_SECONDS = 30.0  # best effort, after the machine is told to go off
_AZURE_SECONDS = 30.0  # at least, for Preempt
_AZURE_FIRST_SECONDS = 125.0
_AZURE_EVENTS = "/metadata/scheduledevents?api-version=2020-07-01"
_AZURE_NAME = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
_AZURE_MACHINE = re.compile(r"[\w.-]{1,80}")
_AZURE_ENDS = ("Preempt", "Terminate", "Reboot", "Redeploy")


@dataclass(frozen=True)
class Asked:
    """What a source asks of the run.

    Attributes:
        source: Who asks, for a person: "AWS spot: terminate".
        leave: Whether to leave; else to save, and go on.
        seconds_left: Until the machine goes; None if it is not told.
        saved: Tells the source that the run has saved and leaves; None if it does not want to know.
    """

    source: str
    leave: bool
    seconds_left: float | None = None
    saved: Callable[[], None] | None = field(default=None, compare=False)


class Source(Protocol):
    """Something that can be asked whether the end is near."""

    name: str
    every_seconds: float

    def ask(self) -> Asked | None:
        """What it says now; None if nothing.

        Raises:
            OSError: It cannot be reached.
            ValueError: Its answer has no form that is known.
        """

    def call_off(self) -> None:
        """Ask no more, from another thread: what is being waited for fails."""


class Aws:
    """Spot interruption notices, two minutes before; a rebalance recommendation asks for a snapshot, once."""

    name, every_seconds = "AWS", 5.0

    def __init__(self, endpoint: str) -> None:
        self._service = MetadataService(endpoint)
        self.call_off = self._service.call_off
        self._token = ""
        self._rebalance = ""

    def ask(self) -> Asked | None:
        """An interruption, else a rebalance recommendation that was not told yet."""
        text = self._read("spot/instance-action")
        if text is not None:
            found = _object(text)
            action = found.get("action")
            if action not in ("stop", "terminate", "hibernate"):
                raise ValueError(f"no action that is known: {text[:60]!r}")
            left = _until(found.get("time")) if action != "hibernate" else 0.0
            return Asked(f"AWS spot: {action}", leave=True, seconds_left=left)
        text = self._read("events/recommendations/rebalance")
        if text is None or text == self._rebalance:
            return None
        self._rebalance = text
        return Asked("AWS rebalance recommendation", leave=False)

    def _read(self, path: str) -> str | None:
        for attempt in range(2):
            if not self._token:
                lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": "21600"}
                given = self._service.ask("/latest/api/token", lifetime, method="PUT")
                self._token = given.text.strip() if given is not None else ""
            try:
                found = self._service.ask(f"/latest/meta-data/{path}", {"X-aws-ec2-metadata-token": self._token})
            except (RefusedError, ValueError) as error:
                self._token = ""  # it has run out, or is none
                if attempt or getattr(error, "code", None) != 401:
                    raise
            else:
                return found.text if found is not None else None
        raise AssertionError("unreachable")


class Google:
    """`preempted`, waited for: about 30 seconds are left when it turns TRUE.

    The state that is known is named (`last_etag`): a change between two questions is answered at once, and not slept
    through until the next.
    """

    name, every_seconds = "Google", 1.0

    def __init__(self, host: str) -> None:
        self._service = MetadataService(f"http://{host}")
        self.call_off = self._service.call_off
        self._etag = ""

    def ask(self) -> Asked | None:
        """At first what holds now; then the next change, for a minute."""
        path, timeout = "/computeMetadata/v1/instance/preempted", None
        if self._etag:
            known = urllib.parse.quote(self._etag, safe="")
            path += f"?wait_for_change=true&timeout_sec={_LONG_POLL_SECONDS}&last_etag={known}"
            timeout = _LONG_POLL_SECONDS + 10.0
        self._etag = ""  # after an answer that is none it begins anew
        answer = self._service.ask(path, {"Metadata-Flavor": "Google"}, timeout=timeout)
        if answer is None:
            return None
        text = answer.text.strip()
        if text.upper() == "TRUE":
            return Asked("Google: preempted", leave=True, seconds_left=_GOOGLE_SECONDS)
        if text.upper() != "FALSE":
            raise ValueError(f"neither TRUE nor FALSE: {text[:60]!r}")
        self._etag = answer.etag
        return None


class Azure:
    """Scheduled events that end this machine or its processes; a Freeze does not.

    The first answer may take two minutes: it switches the service on. Events are approved once the run has saved, so
    that Azure need not wait, only if that is asked for: it approves them for every machine that they concern.
    """

    name, every_seconds = "Azure", 1.0

    def __init__(self, endpoint: str, host: str, *, approves: bool = False) -> None:
        self._service = MetadataService(endpoint)
        self.call_off = self._service.call_off
        self._approves = approves
        self._host = host
        self._name = ""
        self._has_answered = False

    def ask(self) -> Asked | None:
        """Of the events that end this machine, or its processes, the one that leaves the least time."""
        self._name = self._name or self._own_name()
        timeout = None if self._has_answered else _AZURE_FIRST_SECONDS
        answer = self._service.ask(_AZURE_EVENTS, {"Metadata": "true"}, timeout=timeout)
        self._has_answered = True
        events = _object(answer.text if answer is not None else "{}").get("Events", [])
        if not isinstance(events, list):
            raise ValueError(f"Events is no list: {str(events)[:60]!r}")
        asked = [self._asked_by(event) for event in events if isinstance(event, dict) and self._is_the_end(event)]
        return min(asked, key=lambda one: one.seconds_left or 0.0, default=None)

    def _is_the_end(self, event: dict[str, Any]) -> bool:
        """Whether an event ends this machine; a Freeze is a pause of seconds, and others are other machines'."""
        concerned = event.get("Resources") or []
        names = {str(name).lower() for name in concerned} if isinstance(concerned, list) else set()
        own = {name.strip().lower() for name in (self._host, self._name) if name.strip()}
        return event.get("EventType") in _AZURE_ENDS and (not names or not own or not own.isdisjoint(names))

    def _asked_by(self, event: dict[str, Any]) -> Asked:
        """An event that has started has no time any more."""
        left = _until(event["NotBefore"]) if event.get("NotBefore") else _AZURE_SECONDS
        saved = partial(self._approve, event.get("EventId")) if self._approves else None
        return Asked(f"Azure: {event['EventType']}", leave=True, seconds_left=left, saved=saved)

    def _own_name(self) -> str:
        """What Azure calls this machine, which need not be what the machine calls itself; empty if it is not told."""
        try:
            answer = self._service.ask(_AZURE_NAME, {"Metadata": "true"})
        except (OSError, ValueError):
            return ""
        name = answer.text.strip() if answer is not None else ""
        return name if _AZURE_MACHINE.fullmatch(name) else ""  # else it is asked again: no event would be for us

    def _approve(self, event_id: object) -> None:
        body = json.dumps({"StartRequests": [{"EventId": event_id}]}).encode()
        headers = {"Metadata": "true", "Content-Type": "application/json"}
        self._service.ask(_AZURE_EVENTS, headers, method="POST", data=body)


class Slurm:
    """The job's end time, as its environment tells; known from the beginning."""

    name, every_seconds = "Slurm", 3600.0

    def __init__(self, end_time: float) -> None:
        self._end_time = end_time
        self.call_off = lambda: None

    def ask(self) -> Asked | None:
        """The end of the job."""
        return Asked("Slurm: the job's time limit", leave=True, seconds_left=self._end_time - time.time())


def _object(text: str) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(f"no object: {text[:60]!r}")
    return found


def _until(text: object) -> float:
    """Seconds until a time (ISO 8601, or as in mail); 0 if it has none that is known: then there is none to spare."""
    try:
        at = datetime.datetime.fromisoformat(str(text))
    except ValueError:
        try:
            at = email.utils.parsedate_to_datetime(str(text))
        except (ValueError, TypeError):
            return 0.0
    if at.tzinfo is None:
        at = at.replace(tzinfo=datetime.UTC)
    return max(0.0, at.timestamp() - time.time())

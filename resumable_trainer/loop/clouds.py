"""Where a notice of the end comes from, beside signals: the metadata services of clouds, and Slurm's end time.

Each source is asked by one thread, in its own rhythm; it begins when training does, and only where a source was found
(by the machine's vendor, or by what the environment says). A source that fails says so once and is asked again; nothing
that it answers can harm the run. Only the standard library; proxies of the environment are passed by, as metadata
services are of the machine. Free of torch.

Rules and forms: AWS "Spot Instance interruption notices" (IMDSv2), Google "Preemptible and Spot VMs: preempted", Azure
"Scheduled Events for Linux VMs", Slurm `sbatch(1)`.
"""

from __future__ import annotations

import contextlib
import datetime
import email.utils
import json
import math
import os
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

VARIABLE = "RESUMABLE_TRAINER_NOTICES"
AZURE_VARIABLE = "RESUMABLE_TRAINER_AZURE_IMDS"
APPROVAL_VARIABLE = "RESUMABLE_TRAINER_AZURE_APPROVE"
_TIMEOUT_SECONDS = 2.0
_LONG_POLL_SECONDS = 60
_MAX_BYTES = 1 << 20
_GOOGLE_SECONDS = 30.0  # best effort, after the machine is told to go off
_AZURE_SECONDS = 30.0  # at least, for Preempt
_AZURE_ENDS = ("Preempt", "Terminate", "Reboot", "Redeploy")
_DMI = Path("/sys/class/dmi/id")


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


def _get(
    url: str,
    headers: Mapping[str, str],
    *,
    method: str = "GET",
    timeout: float = _TIMEOUT_SECONDS,
    data: bytes | None = None,
) -> str | None:
    """The body of an answer; None for 404."""
    import urllib.error
    import urllib.request

    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url, data=data, headers=dict(headers), method=method)  # noqa: S310 - http of the machine itself
    try:
        with opener.open(request, timeout=timeout) as answer:
            return str(answer.read(_MAX_BYTES).decode("utf-8", "replace"))
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 404:
            return None
        raise


class Aws:
    """Spot interruption notices, two minutes before; a rebalance recommendation asks for a snapshot, once."""

    name, every_seconds = "AWS", 5.0

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint.rstrip("/")
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
        import urllib.error

        for attempt in range(2):
            if not self._token:
                lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": "21600"}
                self._token = _get(f"{self._endpoint}/latest/api/token", lifetime, method="PUT") or ""
            try:
                return _get(f"{self._endpoint}/latest/meta-data/{path}", {"X-aws-ec2-metadata-token": self._token})
            except urllib.error.HTTPError as error:
                if error.code != 401 or attempt:
                    raise
                self._token = ""  # it has run out
        raise AssertionError("unreachable")


class Google:
    """`preempted`, waited for: about 30 seconds are left when it turns TRUE."""

    name, every_seconds = "Google", 0.1

    def __init__(self, host: str) -> None:
        self._url = f"http://{host}/computeMetadata/v1/instance/preempted"
        self._has_asked = False

    def ask(self) -> Asked | None:
        """At first what holds now; then the next change, for a minute."""
        wait = f"?wait_for_change=true&timeout_sec={_LONG_POLL_SECONDS}" if self._has_asked else ""
        timeout = _LONG_POLL_SECONDS + 10.0 if wait else _TIMEOUT_SECONDS
        text = _get(self._url + wait, {"Metadata-Flavor": "Google"}, timeout=timeout)
        self._has_asked = True
        if text is None or text.strip() == "FALSE":
            return None
        if text.strip() != "TRUE":
            raise ValueError(f"neither TRUE nor FALSE: {text[:60]!r}")
        return Asked("Google: preempted", leave=True, seconds_left=_GOOGLE_SECONDS)


class Azure:
    """Scheduled events that end this machine or its processes; a Freeze does not.

    The first answer may take two minutes: it switches the service on. Events are approved once the run has saved, so
    that Azure need not wait, only if that is asked for: it approves them for every machine that they concern.
    """

    name, every_seconds = "Azure", 1.0

    def __init__(self, endpoint: str, host: str, *, approves: bool = False) -> None:
        self._approves = approves
        self._url = f"{endpoint.rstrip('/')}/metadata/scheduledevents?api-version=2020-07-01"
        self._named = f"{endpoint.rstrip('/')}/metadata/instance/compute/name?api-version=2021-02-01&format=text"
        self._host = host
        self._name: str | None = None
        self._has_answered = False

    def ask(self) -> Asked | None:
        """The first event that ends this machine, or its processes."""
        if self._name is None:
            self._name = self._own_name()
        text = _get(self._url, {"Metadata": "true"}, timeout=_TIMEOUT_SECONDS if self._has_answered else 125.0)
        self._has_answered = True
        events = _object(text or "{}").get("Events", [])
        if not isinstance(events, list):
            raise ValueError(f"Events is no list: {str(events)[:60]!r}")
        for event in events:
            if not isinstance(event, dict) or event.get("EventType") not in _AZURE_ENDS:
                continue  # a Freeze is a pause of seconds
            concerned = [str(name).lower() for name in event.get("Resources") or ()]
            own = {name.strip().lower() for name in (self._host, self._name) if name}
            if concerned and own and not own.intersection(concerned):
                continue
            left = _until(event.get("NotBefore")) if event.get("NotBefore") else _AZURE_SECONDS
            saved = partial(self._approve, event.get("EventId")) if self._approves else None
            return Asked(f"Azure: {event.get('EventType')}", leave=True, seconds_left=left, saved=saved)
        return None

    def _own_name(self) -> str | None:
        """What Azure calls this machine, which need not be what the machine calls itself; None if it is not told."""
        try:
            return _get(self._named, {"Metadata": "true"})
        except OSError:
            return None

    def _approve(self, event_id: object) -> None:
        body = json.dumps({"StartRequests": [{"EventId": event_id}]}).encode()
        _get(self._url, {"Metadata": "true", "Content-Type": "application/json"}, method="POST", data=body)


class Slurm:
    """The job's end time, as its environment tells; known from the beginning."""

    name, every_seconds = "Slurm", 3600.0

    def __init__(self, end_time: float) -> None:
        self._end_time = end_time

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


def found_here(environment: Mapping[str, str], *, dmi: Path = _DMI) -> list[Source]:
    """The sources of this machine: asked for by name, else by its vendor; nothing is asked yet."""
    chosen = environment.get(VARIABLE)
    names = {name.strip().lower() for name in chosen.split(",")} if chosen is not None else _detected(environment, dmi)
    sources: list[Source] = []
    if "aws" in names and environment.get("AWS_EC2_METADATA_DISABLED", "").lower() != "true":
        sources.append(Aws(environment.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or "http://169.254.169.254"))
    if "google" in names:
        sources.append(Google(environment.get("GCE_METADATA_HOST") or "metadata.google.internal"))
    if "azure" in names:
        approves = environment.get(APPROVAL_VARIABLE) == "1"
        endpoint = environment.get(AZURE_VARIABLE) or "http://169.254.169.254"
        sources.append(Azure(endpoint, os.uname().nodename, approves=approves))
    if "slurm" in names and (end := environment.get("SLURM_JOB_END_TIME", "")).isdecimal():
        sources.append(Slurm(float(end)))
    return sources


def _detected(environment: Mapping[str, str], dmi: Path) -> set[str]:
    names = {"slurm"} if environment.get("SLURM_JOB_END_TIME") else set()
    vendor = _line(dmi / "sys_vendor")
    if vendor == "Amazon EC2" or environment.get("AWS_EC2_METADATA_SERVICE_ENDPOINT"):
        names.add("aws")
    if vendor == "Google" or environment.get("GCE_METADATA_HOST"):
        names.add("google")
    is_azure = vendor == "Microsoft Corporation" and _line(dmi / "chassis_asset_tag").startswith("7783-7084-3265-9085")
    if is_azure or environment.get(AZURE_VARIABLE):
        names.add("azure")
    return names


def _line(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


class Watch:
    """Asks all sources, each in a thread of its own, until it is stopped.

    Args:
        sources: Whom to ask.
        tell: Told what is asked of the run.
        seconds_needed: How long before the end the run must begin to save; asked again and again.
        say: Shows a line to a person.
    """

    def __init__(
        self,
        sources: list[Source],
        *,
        tell: Callable[[Asked, float | None], None],
        seconds_needed: Callable[[], float],
        say: Callable[[str], None],
    ) -> None:
        self._tell, self._needed, self._say = tell, seconds_needed, say
        self._stopped = threading.Event()
        self._pid = os.getpid()
        for source in sources:
            threading.Thread(target=self._watch, args=(source,), name=f"notices of {source.name}", daemon=True).start()

    def stop(self) -> None:
        """Ask no more; an answer that is being waited for is not waited for here."""
        self._stopped.set()

    def _watch(self, source: Source) -> None:
        has_failed = False
        while not self._stopped.is_set():
            pause = source.every_seconds
            try:
                asked = source.ask()
            except Exception as error:  # noqa: BLE001 - whatever a metadata service answers, the run goes on
                asked, pause = None, max(pause, _TIMEOUT_SECONDS)
                if not has_failed:
                    has_failed = True
                    self._say(f"warning notices of {source.name} cannot be had ({error}); it is asked again")
            if asked is not None and not self._stopped.is_set():
                self._follow(asked)
                if asked.leave:
                    return
            self._stopped.wait(pause)

    def _follow(self, asked: Asked) -> None:
        """Tell the run when it is time: at once, or when it needs the time that is left."""
        deadline = None
        if asked.leave and asked.seconds_left is not None and math.isfinite(asked.seconds_left):
            deadline = time.monotonic() + asked.seconds_left
            spare = asked.seconds_left - self._needed()
            if spare > 1:
                with contextlib.suppress(OSError, ValueError):  # a screen that is gone must not lose the notice
                    self._say(
                        f"notice  {asked.source} in {asked.seconds_left:.0f} s; training goes on for {spare:.0f} s"
                    )
            while (spare := deadline - time.monotonic() - self._needed()) > 0:
                if self._stopped.wait(min(spare, 0.5)):
                    return
        self._tell(asked, deadline)

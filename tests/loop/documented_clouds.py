"""The metadata services of three clouds, written from their documents alone, with what they refuse.

AWS: "Use the Instance Metadata Service", "Spot Instance interruption notices", "EC2 instance rebalance
recommendations". Google: "About VM metadata", "View and query VM metadata" (wait_for_change, last_etag, timeout_sec).
Azure: "Azure Instance Metadata Service", "Scheduled Events for Linux VMs". A question that the documents do not allow
is answered as they say, and remembered in `faults`.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterator

AZURE_VERSIONS = ("2017-08-01", "2017-11-01", "2019-01-01", "2019-04-01", "2019-08-01", "2020-07-01")
NOT_FOUND = '<?xml version="1.0" encoding="iso-8859-1"?><html><title>404 - Not Found</title></html>'


def in_seconds(seconds: float) -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)


def iso(seconds: float) -> str:
    """As AWS writes times."""
    return in_seconds(seconds).strftime("%Y-%m-%dT%H:%M:%SZ")


def rfc1123(seconds: float) -> str:
    """As Azure writes them."""
    return in_seconds(seconds).strftime("%a, %d %b %Y %H:%M:%S GMT")


def azure_event(kind: str, machine: str, **fields: Any) -> dict[str, Any]:
    return {
        "EventId": "602d9444-d2cd-49c7-8624-8643e7171297",
        "EventStatus": "Scheduled",
        "EventType": kind,
        "ResourceType": "VirtualMachine",
        "Resources": [machine],
        "NotBefore": rfc1123(600),
        "Description": "",
        "EventSource": "Platform",
        "DurationInSeconds": -1,
        **fields,
    }


class Clouds:
    """What holds in the three clouds; changed by a test while they are asked."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.asked: list[str] = []
        self.tokens: dict[str, float] = {}
        self.aws: dict[str, str] = {}
        self.preempted = "FALSE"
        self.azure_name = "myscaleset_4"
        self.azure_events: list[dict[str, Any]] = []
        self.started: list[dict[str, Any]] = []
        self.incarnation = 0
        self._seen = ""

    def scheduled(self) -> dict[str, Any]:
        if (now := json.dumps(self.azure_events)) != self._seen:
            self.incarnation, self._seen = self.incarnation + 1, now
        return {"DocumentIncarnation": self.incarnation, "Events": self.azure_events}


class Service(BaseHTTPRequestHandler):
    clouds: Clouds
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def reply(self, code: int, body: str, kind: str = "text/plain", **headers: str) -> None:
        if code in (400, 401, 403, 405):
            self.clouds.faults.append(f"{self.command} {self.path}: {code}")
        self.send_response(code)
        data = body.encode()
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def handle_any(self) -> None:
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        self.clouds.asked.append(f"{self.command} {self.path}")
        if self.headers["X-Forwarded-For"] is not None:
            return self.reply(403, "through a proxy")
        if url.path.startswith("/latest/"):
            return self.aws(url.path)
        if url.path.startswith("/computeMetadata/"):
            return self.google(url.path, query)
        if url.path.startswith("/metadata/"):
            return self.azure(url.path, query)
        return self.reply(404, NOT_FOUND, "text/html")

    do_GET = do_PUT = do_POST = handle_any  # noqa: N815 - names that the base class looks for

    def aws(self, path: str) -> None:
        if path == "/latest/api/token":
            lifetime = self.headers["X-aws-ec2-metadata-token-ttl-seconds"] or ""
            if self.command != "PUT":
                return self.reply(405, "")
            if not lifetime.isdecimal() or not 1 <= int(lifetime) <= 21600:
                return self.reply(400, "")
            token = f"AQAE-{len(self.clouds.tokens)}=="
            self.clouds.tokens[token] = time.monotonic() + int(lifetime)
            return self.reply(200, token, X_Aws_Ec2_Metadata_Token_Ttl_Seconds=lifetime)
        if self.clouds.tokens.get(self.headers["X-aws-ec2-metadata-token"] or "", 0.0) < time.monotonic():
            return self.reply(401, "")
        found = self.clouds.aws.get(path.removeprefix("/latest/meta-data/"))
        return self.reply(404, NOT_FOUND, "text/html") if found is None else self.reply(200, found)

    def google(self, path: str, query: dict[str, str]) -> None:
        if self.headers["Metadata-Flavor"] != "Google":
            return self.reply(403, "Missing Metadata-Flavor:Google header.", "text/html")
        if path != "/computeMetadata/v1/instance/preempted":
            return self.reply(404, NOT_FOUND, "text/html")
        until = time.monotonic() + min(float(query.get("timeout_sec", "3600")), 3600.0)
        known = query.get("last_etag", self.etag())  # without one it waits for the next change
        while query.get("wait_for_change", "").lower() == "true" and known == self.etag() and time.monotonic() < until:
            time.sleep(0.01)
        return self.reply(200, self.clouds.preempted, "application/text", ETag=self.etag(), Metadata_Flavor="Google")

    def etag(self) -> str:
        return f"{zlib.crc32(self.clouds.preempted.encode()):016x}"

    def azure(self, path: str, query: dict[str, str]) -> None:
        if self.headers["Metadata"] != "true":
            return self.reply(400, '{"error":"Bad request. Required metadata header not specified"}')
        if path == "/metadata/instance/compute/name":
            if "api-version" not in query or query.get("format") != "text":
                return self.reply(400, '{"error":"Bad request. api-version was not specified"}')
            return self.reply(200, self.clouds.azure_name)
        if path != "/metadata/scheduledevents":
            return self.reply(404, '{"error":"Not found"}')
        if query.get("api-version") not in AZURE_VERSIONS:
            return self.reply(400, '{"error":"Bad request. api-version is invalid or was not specified"}')
        if self.command == "GET":
            return self.reply(200, json.dumps(self.clouds.scheduled()), "application/json; charset=utf-8")
        try:
            requests = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["StartRequests"]
            known = [event["EventId"] for event in self.clouds.azure_events]
            assert requests, "one at least"
            assert all(set(request) == {"EventId"} and request["EventId"] in known for request in requests)
        except (AssertionError, KeyError, ValueError, TypeError):
            return self.reply(400, '{"error":"Bad request"}')
        self.clouds.started += requests
        return self.reply(200, "")


@contextlib.contextmanager
def documented() -> Iterator[tuple[str, Clouds]]:
    """Host and port of all three, and what holds there; at the end nothing undocumented has been asked."""
    clouds = Clouds()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Service,), {"clouds": clouds}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}", clouds
    finally:
        clouds.preempted += " "  # whoever waits for a change waits no longer
        server.shutdown()
        server.server_close()
        thread.join()

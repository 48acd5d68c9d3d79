"""Metadata services of three clouds as their documents describe them, on loopback."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


class Metadata:
    """What the services answer; changed by the test while they run."""

    def __init__(self) -> None:
        self.token, self.tokens_given = "t0", 0
        self.action: str | None = None  # AWS, body of spot/instance-action
        self.rebalance: str | None = None
        self.preempted = "FALSE"
        self.changed = threading.Event()
        self.name: str | None = None  # of the machine, as Azure calls it
        self.events: Any = {"DocumentIncarnation": 1, "Events": []}
        self.refused: list[str] = []
        self.approved: list[str] = []
        self.silent = False

    def expire(self) -> None:
        self.token = f"t{self.tokens_given + 1}x"


class Handler(BaseHTTPRequestHandler):
    metadata: Metadata

    def log_message(self, *arguments: object) -> None:
        pass

    def answer(self, code: int, body: str = "") -> None:
        self.send_response(code)
        self.send_header("ETag", f"{hash(body):x}")
        self.send_header("Content-Length", str(len(body.encode())))
        self.end_headers()
        self.wfile.write(body.encode())

    def do_PUT(self) -> None:
        it = self.metadata
        if self.path != "/latest/api/token" or "X-aws-ec2-metadata-token-ttl-seconds" not in self.headers:
            return self.answer(400)
        it.tokens_given += 1
        it.token = f"t{it.tokens_given}"
        return self.answer(200, it.token)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["Metadata"] != "true" or not self.path.startswith("/metadata/scheduledevents?api-version="):
            return self.answer(400)
        self.metadata.approved += [request["EventId"] for request in body["StartRequests"]]
        return self.answer(200)

    def do_GET(self) -> None:
        it = self.metadata
        if it.silent:
            time.sleep(3)
        path = self.path.partition("?")[0]
        if path.startswith("/latest/meta-data/"):
            if self.headers["X-aws-ec2-metadata-token"] != it.token:
                it.refused.append(self.path)
                return self.answer(401)
            body = {"spot/instance-action": it.action, "events/recommendations/rebalance": it.rebalance}.get(path[18:])
            return self.answer(404) if body is None else self.answer(200, body)
        if path == "/computeMetadata/v1/instance/preempted":
            if self.headers["Metadata-Flavor"] != "Google":
                return self.answer(403)
            if "wait_for_change=true" in self.path and it.preempted.upper() == "FALSE":
                it.changed.wait(5)
            return self.answer(200, it.preempted)
        if path == "/metadata/scheduledevents":
            if self.headers["Metadata"] != "true" or "api-version=" not in self.path:
                return self.answer(400)
            return self.answer(200, it.events if isinstance(it.events, str) else json.dumps(it.events))
        if path == "/metadata/instance/compute/name" and it.name is not None and self.headers["Metadata"] == "true":
            return self.answer(200, it.name)
        return self.answer(404)


@contextlib.contextmanager
def serving() -> Iterator[tuple[str, Metadata]]:
    """Host and port, and what is answered there."""
    metadata = Metadata()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Handler,), {"metadata": metadata}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}", metadata
    finally:
        metadata.changed.set()
        server.shutdown()
        server.server_close()
        thread.join()

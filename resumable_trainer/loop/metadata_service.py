"""Asking a metadata service of a cloud: one request, one answer, within its time however slowly the bytes come.

Policy: what is at the other end may be anything. No redirect is followed and no proxy asked, as the service is of the
machine itself and a token sent along is nobody else's; of a body without end no more than a megabyte is read; the whole
exchange has one limit, not each byte; and whoever waits in it can be called off. Only the standard library (urllib has
no limit for a whole answer, and follows redirects). Free of torch.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import socket
import struct
import threading
import time
import urllib.parse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Mapping

TIMEOUT_SECONDS = 2.0
_MAX_BYTES = 1 << 20


class RefusedError(OSError):
    """An answer that is none: any status but 2xx and 404."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"HTTP status {code} {reason}")
        self.code = code


@dataclass(frozen=True)
class Answer:
    """What was answered.

    Attributes:
        text: The body.
        etag: Names the state of what was asked for; empty if the service gives none.
    """

    text: str
    etag: str


class MetadataService:
    """A service, asked by one thread at a time.

    Args:
        endpoint: Its address, `http://host[:port]`; that it is none is said when it is asked.
    """

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint.rstrip("/")
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._is_called_off = False

    def ask(
        self,
        path: str,
        headers: Mapping[str, str],
        *,
        method: str = "GET",
        timeout: float | None = None,
        data: bytes | None = None,
    ) -> Answer | None:
        """The answer; None for 404.

        Raises:
            OSError: There is none in time, or another status.
            ValueError: It has no form that is known.
        """
        url = urllib.parse.urlsplit(self._endpoint + path)
        if url.scheme != "http" or not url.hostname:
            raise ValueError(f"{self._endpoint!r} is no address of a metadata service")
        seconds = TIMEOUT_SECONDS if timeout is None else timeout
        connection = http.client.HTTPConnection(url.hostname, url.port, timeout=min(seconds, TIMEOUT_SECONDS))
        deadline = time.monotonic() + seconds
        try:
            connection.connect()
            self._begin(connection.sock)
            connection.sock = cast("socket.socket", _InTime(connection.sock, deadline))  # what http.client uses of it
            target = url.path + (f"?{url.query}" if url.query else "")
            connection.request(method, target, body=data, headers={**headers, "Connection": "close"})
            return _answer(connection.getresponse())
        except http.client.HTTPException as error:
            raise ValueError(f"no answer of HTTP: {error!r}"[:100]) from error
        finally:
            self._end()

    def call_off(self) -> None:
        """Ask no more; an answer that is being waited for fails at once."""
        with self._lock, contextlib.suppress(OSError):
            self._is_called_off = True
            if self._socket is not None:
                # Who still sends is told at once when it is closed: else, with no window left, in a minute or more.
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self._socket.shutdown(socket.SHUT_RDWR)

    def _begin(self, connected: socket.socket) -> None:
        with self._lock:
            self._socket = connected
            if self._is_called_off:
                raise OSError("called off")

    def _end(self) -> None:
        with self._lock:  # not while it is being called off: the number of a closed socket may be another's
            if self._socket is not None:
                self._socket.close()
            self._socket = None


def _answer(response: http.client.HTTPResponse) -> Answer | None:
    if response.status == 404:
        return None
    if not 200 <= response.status < 300:
        raise RefusedError(response.status, response.reason[:60])
    return Answer(response.read(_MAX_BYTES).decode("utf-8-sig", "replace"), response.getheader("ETag", ""))


class _InTime(io.RawIOBase):
    """A socket for `http.client` whose whole exchange ends by a time; closed by who has opened it."""

    def __init__(self, connected: socket.socket, deadline: float) -> None:
        self._socket, self._deadline = connected, deadline

    def sendall(self, data: bytes) -> None:
        self._limit()
        self._socket.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:  # any writable buffer
        self._limit()
        return self._socket.recv_into(buffer)

    def close(self) -> None:
        """Not the socket: an answer is still read after `http.client` has let go of it."""

    def _limit(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self._socket.settimeout(left)

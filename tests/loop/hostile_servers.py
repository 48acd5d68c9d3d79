"""Servers that answer as no metadata service should, on loopback; what a client may meet all the same."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n"


class Hostile:
    """A server that meets every connection in the same way, and counts them."""

    def __init__(self, behaviour: str, elsewhere: str = "") -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._over = threading.Event()
        self._behave: Callable[[socket.socket], None] = getattr(self, behaviour)
        self._elsewhere = elsewhere
        self.host = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.requests: list[bytes] = []
        self.num_bytes = 0  # that the client has taken, without an end in sight
        self.open = 0  # connections that the client has not closed yet
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._over.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._meet, args=(connection,), daemon=True).start()

    def _meet(self, connection: socket.socket) -> None:
        self.open += 1
        with connection, contextlib.suppress(OSError):
            self.requests.append(connection.recv(65536))
            self._behave(connection)
        self.open -= 1

    # -- behaviours -------------------------------------------------------------------------------

    def silent(self, connection: socket.socket) -> None:
        connection.recv(1)  # until the client gives up

    def drips_headers(self, connection: socket.socket) -> None:
        connection.sendall(_HEAD + b"X: ")
        self._drip(connection)

    def drips_its_body(self, connection: socket.socket) -> None:
        connection.sendall(_HEAD + b"Content-Length: 100000\r\n\r\n")
        self._drip(connection)

    def _drip(self, connection: socket.socket) -> None:
        while not self._over.wait(0.01):
            connection.sendall(b"T")

    def late(self, connection: socket.socket) -> None:
        self._over.wait(0.5)
        connection.sendall(_HEAD + b"Content-Length: 4\r\n\r\nTRUE")

    def fails(self, connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nTRUE")

    def redirects(self, connection: socket.socket) -> None:
        connection.sendall(f"HTTP/1.1 302 Found\r\nLocation: http://{self._elsewhere}/x\r\n\r\n".encode())

    def enormous(self, connection: socket.socket) -> None:
        connection.sendall(_HEAD + b"\r\n")
        while not self._over.is_set():
            connection.sendall(b"[" * 65536)
            self.num_bytes += 65536

    def continues_for_ever(self, connection: socket.socket) -> None:
        while not self._over.wait(0.001):  # else it leaves the client, in the same process, no time to give up
            connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")

    def no_http(self, connection: socket.socket) -> None:
        connection.sendall(b"\0\xff" * 1000 + b"\n")

    def hangs_up(self, connection: socket.socket) -> None:
        pass

    def breaks_off(self, connection: socket.socket) -> None:
        connection.sendall(_HEAD + b"Content-Length: 100\r\n\r\nTRU")

    def absurd_chunks(self, connection: socket.socket) -> None:
        connection.sendall(_HEAD + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\nTRUE")

    def nests_deeply(self, connection: socket.socket) -> None:
        connection.sendall(_HEAD + b"\r\n" + b'{"Events":' + b"[" * 500_000)


BEHAVIOURS = (
    "silent",
    "drips_headers",
    "drips_its_body",
    "late",
    "fails",
    "redirects",
    "enormous",
    "continues_for_ever",
    "no_http",
    "hangs_up",
    "breaks_off",
    "absurd_chunks",
    "nests_deeply",
)


@contextlib.contextmanager
def hostile(behaviour: str, elsewhere: str = "") -> Iterator[Hostile]:
    """A server of this behaviour."""
    server = Hostile(behaviour, elsewhere)
    try:
        yield server
    finally:
        server.close()

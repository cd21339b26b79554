"""Slow links between ranks of one machine: proxies that hand on all that comes, but later."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Sequence

CONNECT_SECONDS = 120.0
"""How long a proxy waits for a rank that has yet to listen."""


class SlowLinks:
    """A ring of links, each with a proxy that delays both directions. Inside a ``with`` block.

    Args:
        ports: where each rank listens, on this machine.
        milliseconds: how much later each byte arrives. Bandwidth is not limited.
    """

    def __init__(self, ports: Sequence[int], milliseconds: float) -> None:
        self._ports = ports
        self._delay = milliseconds / 1000
        self._listeners: list[socket.socket] = []

    def __enter__(self) -> SlowLinks:
        for _ in self._ports:
            self._listeners.append(socket.create_server(("127.0.0.1", 0)))
        for listener, port in zip(self._listeners, self._ports, strict=True):
            threading.Thread(target=self._accept, args=(listener, port), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for listener in self._listeners:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
            listener.close()

    def seen_by(self, rank: int) -> list[str]:
        """The addresses of all ranks as `rank` must know them: the next one's is its proxy's."""
        addresses = [f"127.0.0.1:{port}" for port in self._ports]
        following = (rank + 1) % len(addresses)
        addresses[following] = f"127.0.0.1:{self._listeners[following].getsockname()[1]}"
        return addresses

    def _accept(self, listener: socket.socket, port: int) -> None:
        with contextlib.suppress(OSError):  # closed: the ranks have ended
            while True:
                near, _ = listener.accept()
                far = _connect(port)
                for source, sink in ((near, far), (far, near)):
                    source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    self._pump(source, sink)

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        """Hand on what comes from `source`, until its end."""
        on_the_way: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()

        def receive() -> None:
            data = b"-"
            while data:
                try:
                    data = source.recv(1 << 16)
                except OSError:
                    data = b""
                on_the_way.put((time.monotonic() + self._delay, data))

        def send() -> None:
            with contextlib.suppress(OSError):
                while True:
                    due, data = on_the_way.get()
                    time.sleep(max(0.0, due - time.monotonic()))
                    if not data:
                        sink.shutdown(socket.SHUT_WR)
                        return
                    sink.sendall(data)

        for work in (receive, send):
            threading.Thread(target=work, daemon=True).start()


def _connect(port: int) -> socket.socket:
    limit = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except OSError:
            if time.monotonic() > limit:
                raise
            time.sleep(0.02)

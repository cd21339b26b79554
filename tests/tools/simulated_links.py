"""``python tests/tools/simulated_links.py -n N [--delay MS] [--rate MBIT] COMMAND...``: a launcher
of a ring of ranks on this machine, with slow links: proxies that delay what they forward.

As with Ethernet, each machine has one port for what it sends to both neighbours. The port sends one
chunk after the other, each in size / rate, and a chunk arrives one latency after that. So a small
message on a free port takes the latency only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from mlx_lm_skiphead.cli.ranks import free_ports

CONNECT_SECONDS = 120.0
"""How long a proxy waits for a rank that has yet to listen."""


class SlowLinks:
    """A ring of links, each with a proxy that delays both directions; a context manager.

    Args:
        ports: where each rank listens, on this machine.
        milliseconds: the latency, one way.
        megabits: what each rank can send in a second, Mbit (10^6); 0 for no limit.
    """

    def __init__(self, ports: Sequence[int], milliseconds: float, megabits: float = 0.0) -> None:
        self._ports = ports
        self._delay = milliseconds / 1000
        self._listeners: list[socket.socket] = []
        self._senders = [_Port(megabits) for _ in ports]

    def __enter__(self) -> SlowLinks:
        for _ in self._ports:
            self._listeners.append(socket.create_server(("127.0.0.1", 0)))
        for rank in range(len(self._ports)):
            threading.Thread(target=self._accept, args=(rank,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for listener in self._listeners:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
            listener.close()

    def seen_by(self, rank: int) -> list[str]:
        """The addresses of all ranks for `rank`. That of the next rank is of its proxy."""
        addresses = [f"127.0.0.1:{port}" for port in self._ports]
        following = (rank + 1) % len(addresses)
        addresses[following] = f"127.0.0.1:{self._listeners[following].getsockname()[1]}"
        return addresses

    def _accept(self, rank: int) -> None:
        """Accept the connections to `rank` from the rank before it."""
        with contextlib.suppress(OSError):  # closed: the ranks have ended
            while True:
                near, _ = self._listeners[rank].accept()
                far = _connect(self._ports[rank])
                for source, sink, sender in ((near, far, rank - 1), (far, near, rank)):
                    source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    self._pump(source, sink, self._senders[sender])

    def _pump(self, source: socket.socket, sink: socket.socket, sender: _Port) -> None:
        """Forward what comes from `source` to `sink`, until its end."""
        on_the_way: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()

        def receive() -> None:
            data = b"-"
            while data:
                try:
                    data = source.recv(1 << 16)
                except OSError:
                    data = b""
                on_the_way.put((sender.sends(len(data)) + self._delay, data))

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


class _Port:
    """The port of one machine, which sends one chunk after the other at a rate."""

    def __init__(self, megabits: float) -> None:
        self._seconds_per_byte = 8e-6 / megabits if megabits else 0.0
        self._is_free = 0.0
        self._lock = threading.Lock()

    def sends(self, size: int) -> float:
        """When `size` bytes that are sent now have left, by `time.monotonic`."""
        with self._lock:
            start = max(time.monotonic(), self._is_free)
            self._is_free = start + size * self._seconds_per_byte
            return self._is_free


def _connect(port: int) -> socket.socket:
    limit = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except OSError:
            if time.monotonic() > limit:
                raise
            time.sleep(0.02)


def main() -> int:
    parser = argparse.ArgumentParser(description="launch a ring of ranks with slow links")
    parser.add_argument("-n", dest="ranks", type=int, required=True)
    parser.add_argument("--delay", type=float, default=0.0, metavar="MS")
    parser.add_argument("--rate", type=float, default=0.0, metavar="MBIT")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    with contextlib.ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        first = free_ports(given.ranks)
        ports = range(first, first + given.ranks)
        links = opened.enter_context(SlowLinks(ports, given.delay, given.rate))
        processes = []
        for rank in range(given.ranks):
            hostfile = folder / f"hosts-{rank}.json"
            hostfile.write_text(json.dumps([[address] for address in links.seen_by(rank)]))
            place = {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hostfile)}
            process = subprocess.Popen(
                given.command, env=os.environ | place, stdin=subprocess.DEVNULL
            )
            processes.append(process)
            opened.callback(process.wait)
            opened.callback(process.kill)
        while None in (codes := [process.poll() for process in processes]) and not any(codes):
            time.sleep(0.05)
        return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())

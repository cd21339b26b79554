"""Starts ranks and hears what they say; leaves no process and no port behind.

A rank is ``python -m mlx_lm_skiphead.cli.rank``, which says one JSON object a line on its output,
or another program. It gets what the ring backend of MLX reads, the variables ``MLX_RANK`` and
``MLX_HOSTFILE``. `Ranks` starts them on this machine, `MpiRanks` does so through ``mpirun``, and
`HostRanks` on the machines of a host file, through ``mlx.launch``.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any

from ..config import VARIABLE
from .links import SlowLinks

Event = dict[str, Any]

WAYS = ("unpatched", "skip")
"""How ranks run a model: as mlx-lm alone, and with the plugin."""

NOT_INHERITED = (VARIABLE, "MLX_RANK", "MLX_HOSTFILE", "OMPI_COMM_WORLD_RANK")


class RankFailed(RuntimeError):
    """A rank ended with an error; the message names it and has the end of what it printed."""


class Ranks:
    """A set of ranks of one pipeline. Leaving the ``with`` block ends every one of them.

    Args:
        count: how many.
        command: what each of them is: `rank_command`, or another program that uses the ring.
        plugin: whether `MLX_LM_SKIPHEAD` is set for them.
        gpus: the CUDA device of each, or None.
        link_delay: milliseconds that whatever one rank sends to another takes longer.
        link_rate: Mbit/s that each rank can send, or 0 for no limit.
    """

    def __init__(
        self,
        count: int,
        command: Sequence[str],
        *,
        plugin: bool,
        gpus: Sequence[int] | None = None,
        link_delay: float = 0.0,
        link_rate: float = 0.0,
    ) -> None:
        self._count = count
        self._command = command
        self._plugin = plugin
        self._gpus = gpus
        self._link = link_delay, link_rate
        self._processes: list[subprocess.Popen[str]] = []
        self._events: queue.SimpleQueue[tuple[int, Event | None]] = queue.SimpleQueue()
        self._errors: list[deque[str]] = []
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Ranks:
        folder = tempfile.TemporaryDirectory(prefix="mlx-lm-skiphead-")
        hostfiles = self._write_hosts(Path(self._open.enter_context(folder)))
        environment = {k: v for k, v in os.environ.items() if k not in NOT_INHERITED}
        if self._plugin:
            environment[VARIABLE] = "1"
        try:
            for rank, hostfile in enumerate(hostfiles):
                self._start(self._command, environment | self._place(rank, hostfile))
        except BaseException:
            self._end()
            raise
        return self

    def _write_hosts(self, folder: Path) -> list[Path]:
        """A host file for each rank."""
        ports = free_ports(self._count)
        seen = [[f"127.0.0.1:{port}" for port in ports]] * self._count
        if any(self._link) and self._count > 1:
            links = self._open.enter_context(SlowLinks(ports, *self._link))
            seen = [links.seen_by(rank) for rank in range(self._count)]
        files = [folder / f"hosts-{rank}.json" for rank in range(self._count)]
        for file, known in zip(files, seen, strict=True):
            file.write_text(json.dumps([[address] for address in known]))
        return files

    def _start(self, command: Sequence[str], environment: Mapping[str, str]) -> IO[str]:
        """Start one process and hear what it says; its input. A rank ends when that does: also if
        this process is killed."""
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for this process, which ends its ranks
        )
        number, said = len(self._processes), deque[str](maxlen=60)
        self._processes.append(process)
        self._errors.append(said)
        assert process.stdin and process.stdout and process.stderr
        errors = threading.Thread(target=said.extend, args=(process.stderr,), daemon=True)
        errors.start()
        threading.Thread(
            target=self._listen, args=(number, process.stdout, errors), daemon=True
        ).start()
        return process.stdin

    def _place(self, rank: int, hostfile: Path) -> dict[str, str]:
        place = {}
        if self._count > 1:  # MLX refuses a ring of one
            place = {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hostfile)}
        if self._gpus is not None:
            place["CUDA_VISIBLE_DEVICES"] = str(self._gpus[rank])
        return place

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()

    def events(self) -> Iterator[tuple[int, Event]]:
        """What the ranks say, as ``(rank, event)``, until all have ended well.

        Raises:
            RankFailed: as soon as one of them has not.
        """
        left = self._count
        while left:
            rank, event = self._events.get()
            if event is None:
                left -= 1
                code = self._processes[rank].wait()
                if code:
                    said = self.errors(rank)
                    raise RankFailed(f"rank {rank} ended with exit code {code}:\n{said}")
            elif "error" in event:
                raise RankFailed(f"rank {rank}: {event['error']}")
            else:
                yield rank, event

    def errors(self, number: int) -> str:
        """The end of what a process has printed as errors until now."""
        return "".join(list(self._errors[number])).strip() or "it printed nothing"

    def _listen(self, rank: int, output: IO[str], errors: threading.Thread) -> None:
        for line in output:
            if line.startswith("{"):
                self._events.put((rank, json.loads(line)))
        errors.join()
        self._events.put((rank, None))

    def _end(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
        for process in self._processes:
            process.wait()
        self._open.close()


class _LaunchedRanks(Ranks):
    """A set of ranks that one program starts and whose output it hands on."""

    _launcher: str

    def events(self) -> Iterator[tuple[int, Event]]:
        """See `Ranks.events`. ``mlx.launch`` ends well whatever its ranks do."""
        done: set[int] = set()
        while len(done) < self._count:
            _, event = self._events.get()
            if event is None:
                said = self.errors(0)
                raise RankFailed(f"{self._launcher} ended before its ranks were done:\n{said}")
            if "error" in event:
                raise RankFailed(f"rank {event['rank']}: {event['error']}")
            if "result" in event:
                done.add(event["rank"])
            yield event["rank"], event

    def _end(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                # As Ctrl-C does: only so does it end its ranks, those on other machines too.
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        super()._end()


class HostRanks(_LaunchedRanks):
    """A set of ranks on the machines of a host file, as ``mlx.launch --hostfile`` starts them.

    This Python and the model must have the same paths on each of them.
    """

    _launcher = "mlx.launch"

    def __init__(
        self, hostfile: Path, count: int, task: Mapping[str, Any], port: int, backend: str = "ring"
    ) -> None:
        super().__init__(count, rank_command({**task, "ends_with_input": False}), plugin=True)
        self._hostfile = hostfile
        self._port = port
        self._backend = backend

    def __enter__(self) -> HostRanks:
        beside = Path(sys.executable).with_name("mlx.launch")
        command = [
            *([str(beside)] if beside.exists() else ["mlx.launch"]),
            *("--hostfile", str(self._hostfile), "--backend", self._backend),
            *("--starting-port", str(self._port)),
            # "env", since mlx before 0.32 takes a path to Python for the script.
            *("--env", f"{VARIABLE}=1", "--", "env", *self._command),
        ]
        to_ranks = self._start(
            command, {k: v for k, v in os.environ.items() if k not in NOT_INHERITED}
        )
        # mlx.launch waits actively while the pipes to its ranks have room. They read nothing.
        with contextlib.suppress(BrokenPipeError):
            to_ranks.write("\n" * 65536)
            to_ranks.flush()
        return self


class MpiRanks(_LaunchedRanks):
    """A set of ranks of this machine that talk over MPI, as ``mpirun`` starts them."""

    _launcher = "mpirun"

    def __enter__(self) -> MpiRanks:
        environment = {k: v for k, v in os.environ.items() if k not in NOT_INHERITED}
        if self._plugin:
            environment[VARIABLE] = "1"
        mpirun = shutil.which("mpirun") or "mpirun"
        # One that pip or Homebrew has installed is not where MLX looks.
        libraries = sorted(Path(mpirun).parents[1].glob("lib/libmpi.*[0-9]*"))
        if libraries:
            environment.setdefault("MLX_MPI_LIBNAME", str(libraries[0]))
        # Waiting ranks take whole cores otherwise, and each but one core.
        environment.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
        command = [mpirun, "--oversubscribe", "--bind-to", "none"]
        if self._gpus is None:
            command += ["-n", str(self._count), *self._command]
        else:
            for gpu in self._gpus:
                command += ["-n", "1", "-x", f"CUDA_VISIBLE_DEVICES={gpu}", *self._command, ":"]
            command.pop()
        self._start(command, environment)
        return self


def local_ranks(
    count: int,
    command: Sequence[str],
    *,
    plugin: bool,
    backend: str,
    gpus: Sequence[int] | None = None,
    link_delay: float = 0.0,
    link_rate: float = 0.0,
) -> Ranks:
    """Ranks of this machine over a backend of MLX, "ring" or "mpi"; MPI has no slow links."""
    if backend == "mpi":
        return MpiRanks(count, command, plugin=plugin, gpus=gpus)
    slow = {"link_delay": link_delay, "link_rate": link_rate}
    return Ranks(count, command, plugin=plugin, gpus=gpus, **slow)


def launched_rank() -> int | None:
    """The number of this process among those of mlx.launch or mpirun; None outside of them."""
    numbers = (os.environ.get(name) for name in ("MLX_RANK", "OMPI_COMM_WORLD_RANK"))
    return next((int(number) for number in numbers if number), None)


def role(rank: int, ranks: int) -> str:
    """What one of `ranks` ranks of a pipeline is there for."""
    return "head" if rank == 0 else "first stage" if rank == ranks - 1 else "middle"


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """SIGTERM unwinds the stack as Ctrl-C does, so that the ranks are ended."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def rank_command(task: Mapping[str, Any]) -> list[str]:
    """The command of a rank; its task in letters and digits only, for the shells on the way."""
    text = base64.b64encode(json.dumps(task).encode()).decode()
    return [sys.executable, "-m", "mlx_lm_skiphead.cli.rank", text]


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()

"""Starts ranks and reads what they print; leaves no process and no port behind.

A rank of a bench or a demo is ``python -m mlx_lm_skiphead.cli.ranks TASK``. It is started by
``mlx.launch``, as people do. It loads a model and runs it with the plugin and without it in turn,
in one process, so that drift of the machine cancels. Rank 0 tells what all ranks did, since
launchers pass on the output of several ranks torn and mixed. It does so in JSON objects, as
`records`:

- ``{"step": ...}``: what the ranks do now.
- ``{"measured": ...}``: one generation of a round.
- ``{"results": ...}``: the last one; see `measure.Measurement.run`.
- ``{"error": ...}``: the last one, of any rank, if the model cannot be used.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import SPLIT, VARIABLE

WAYS = ("unpatched", "plugin")
"""How ranks run a model: as mlx-lm alone, and with the plugin."""

RECORD = 512
"""Bytes of a line by which a rank tells something."""
_RECORD = re.compile(r"skiphead (\d{4}) (\d{8}) ([^|]*)\|")

NOT_INHERITED = (VARIABLE, "MLX_RANK", "MLX_HOSTFILE", "OMPI_COMM_WORLD_RANK")


class RankFailed(RuntimeError):
    """A rank ended with an error; the message names it and has the end of what it printed."""


def records(rank: int, event: dict[str, Any]) -> Iterator[bytes]:
    """An event as lines of `RECORD` bytes, each to be written at once, and nothing beside them.

    mlx.launch passes on what ranks print in pieces of 8192 bytes, with warnings of other ranks
    between them: records of this size are not torn. mpirun tears off the newline of every eighth.
    """
    text = json.dumps(event).replace("|", r"\u007c")
    size = RECORD - len("skiphead 0000 00000000 |\n")
    starts = range(0, len(text), size)
    for left, at in zip(reversed(range(len(starts))), starts, strict=True):
        line = f"skiphead {rank:04} {left:08} {text[at : at + size]}|"
        yield f"{line:{RECORD - 1}}\n".encode()


@contextlib.contextmanager
def running(count: int, command: Sequence[str]) -> Iterator[Iterator[dict[str, Any]]]:
    """Inside the ``with`` block the ranks of one pipeline run. At its end every one is ended.

    Args:
        count: how many ranks.
        command: of the one process that this starts: a rank, or a launcher of ranks.

    Yields:
        What the ranks print, see `_events`.
    """
    process = subprocess.Popen(
        command,
        env={k: v for k, v in os.environ.items() if k not in NOT_INHERITED},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,  # Ctrl-C is for this process, which ends its ranks
    )
    try:
        if process.stdin and count > 1:
            # mlx.launch waits actively while the pipes to its ranks have room. They read nothing.
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write("\n" * 65536)
                process.stdin.flush()
        yield _events(process)
    finally:
        if process.poll() is None:
            # To all of its session, as Ctrl-C in a terminal: a launcher alone would wait for its
            # ranks. Those on other machines end with their ssh.
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _events(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    """What the ranks print, until rank 0 has told the results.

    Raises:
        RankFailed: as soon as one has ended before that, or has told an error.
    """
    printed = deque[str](maxlen=60)
    pieces: dict[str, list[tuple[int, str]]] = {}
    for line in process.stdout or ():
        if not (records := _RECORD.findall(line)):
            printed.append(line)
        for rank, left, piece in records:
            pieces.setdefault(rank, []).append((int(left), piece))
            if int(left):
                continue
            numbers, texts = zip(*pieces.pop(rank), strict=True)
            event = {"error": "a part of what it printed has been lost"}
            if numbers == tuple(reversed(range(len(numbers)))):
                event = json.loads("".join(texts))
            if "error" in event:
                raise RankFailed(f"rank {int(rank)}: {event['error']}")
            yield event
            if "results" in event:
                return
    said = "".join(printed).strip() or "it printed nothing"
    raise RankFailed(f"exit code {process.wait()}:\n{said}")


def launcher(
    task: Mapping[str, Any], count: int, backend: str, hostfile: Path | None, port: int
) -> list[str]:
    """The command that starts ranks for a task, on this machine or on those of a host file.

    On other machines this Python and the model must have the same paths. On this machine ranks end
    when this process does, also if it is killed.
    """
    if hostfile is None:
        task = {**task, "ends_with": os.getpid()}
    command = rank_command(task)
    if count == 1:  # MLX refuses a ring of one
        return command
    beside = Path(sys.executable).with_name("mlx.launch")
    launch = [str(beside) if beside.exists() else "mlx.launch", "--backend", backend]
    launch += ["--hostfile", str(hostfile)] if hostfile else ["-n", str(count)]
    launch += ["--starting-port", str(port or free_ports(count))]
    if backend == "mpi":
        launch += ["--mpi-arg", "--oversubscribe --bind-to none"]
    # "env", since mlx before 0.32 takes a path to Python for the script. Without the variable ranks
    # that wait for others take whole cores over MPI.
    return [*launch, "--", "env", "OMPI_MCA_mpi_yield_when_idle=1", *command]


def launched_rank() -> int | None:
    """The number of this process among those of mlx.launch or mpirun; None outside of them."""
    number = os.environ.get("MLX_RANK") or os.environ.get("OMPI_COMM_WORLD_RANK")
    return int(number) if number else None


def role(rank: int, ranks: int) -> str:
    """What one of `ranks` ranks of a pipeline does."""
    return "head" if rank == 0 else "first stage" if rank == ranks - 1 else "middle"


def rank_command(task: Mapping[str, Any]) -> list[str]:
    """The command of a rank. The task is in letters and digits only, for shells on the way."""
    text = base64.b64encode(json.dumps(task).encode()).decode()
    return [sys.executable, "-m", "mlx_lm_skiphead.cli.ranks", text]


def free_ports(count: int) -> int:
    """The first of some ports in a row of this machine on which nobody listens now."""
    # Below those that systems give to outgoing connections.
    for first in random.SystemRandom().sample(range(20000, 32000), 100):
        with contextlib.ExitStack() as opened, contextlib.suppress(OSError):
            for port in range(first, first + count):
                opened.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise RuntimeError(f"there are no {count} free ports in a row")


def main() -> None:
    """Run as a rank."""
    task = json.loads(base64.b64decode(sys.argv[1]))
    if starter := task.get("ends_with"):
        threading.Thread(target=_end_with, args=(starter,), daemon=True).start()
    if task["split"]:  # which installing reads
        os.environ[SPLIT] = ",".join(map(str, task["split"]))
    choose_gpu(task)
    import mlx.core as mx

    from .measure import Measurement

    try:
        # `strict`, or each rank would be alone where MLX does not find the library of MPI.
        is_mpi = "OMPI_COMM_WORLD_RANK" in os.environ
        group = mx.distributed.init(strict=is_mpi, backend="mpi" if is_mpi else "any")
        tell = say if group.rank() == 0 else lambda **event: None
        tell(results=Measurement(task, group, tell).run())
    except (ValueError, OSError) as error:  # a model that is not there or cannot be pipelined
        say(error=str(error))
        sys.exit(1)


def choose_gpu(task: Mapping[str, Any]) -> None:
    """Give this rank its GPU of `task`. CUDA reads that as it starts: before MLX is imported."""
    if task["gpus"] is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(task["gpus"][launched_rank() or 0])


def say(**event: Any) -> None:
    """Tell the process that started the ranks."""
    for record in records(launched_rank() or 0, event):
        os.write(_output(), record)


@functools.cache
def _output() -> int:
    """The standard output, in which nothing else is printed from now on."""
    output = os.dup(1)
    os.dup2(2, 1)
    return output


def _end_with(process: int) -> None:
    """End this process when another one of this machine has ended."""
    try:
        while True:
            os.kill(process, 0)
            time.sleep(0.5)
    except OSError:
        os._exit(1)


if __name__ == "__main__":
    main()

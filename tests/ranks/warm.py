"""A Python that starts in no time: it is forked from one that has imported what is slow to import.

Importing mlx-lm takes 2 s of a core, nearly all of it for packages that have nothing to do with
what is tested (transformers reads 1,600 of its files). `python()` is an executable that is called
as Python is, with a script, ``-m`` or ``-c``. It passes them, its environment and its standard
streams to a server of this test session, which forks; the fork runs the script as ``__main__`` and
ends as Python does. Its exit status, and signals, are passed on. Ended by force, it takes the fork
along.

mlx-lm and the plugin are not among what has been imported: a script imports them in its own order.
Rank 0 and the other ranks are forked from two servers, since their hashes of strings differ too
where ranks are started one by one. Linux only.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any, NamedTuple

PACKAGES = ("numpy", "mlx.core", "mlx.nn", "huggingface_hub", "transformers", "jinja2")
MESSAGE = 1 << 17
EXECUTABLE = "WARM_PYTHON"
JOIN = "WARM_JOIN"
"""A variable: ranks of a ring begin with `ranks.join`, so that they do not wait by spinning."""

CLIENT = """
import json, os, signal, socket, sys
link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
link.connect("FOLDER/" + ("0" if os.environ.get("MLX_RANK", "0") == "0" else "1"))
environment = os.environ | {"EXECUTABLE": "FOLDER/python"}
said = json.dumps([sys.argv[1:], environment, os.getcwd()]).encode()
socket.send_fds(link, [said], [0, 1, 2])
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1)
for number in PASSED_ON:
    signal.signal(number, lambda number, _: link.send(b"%d" % number))
status = int(link.recv(16) or b"9")
if os.WIFSIGNALED(status):
    for number in PASSED_ON:
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), os.WTERMSIG(status))
os._exit(os.waitstatus_to_exitcode(status))
"""


def python() -> str:
    """The path of the executable; where there is none, of this Python."""
    return _start() if hasattr(os, "pidfd_open") else sys.executable


def command_line(*arguments: str) -> list[str]:
    """`mlx-lm-skiphead` in a process of its own, for tests that end it; what it starts is warm."""
    code = "import sys; sys.executable = sys.argv.pop(1); from mlx_lm_skiphead.cli import main; "
    return [sys.executable, "-c", f"{code}sys.exit(main(sys.argv[1:]))", python(), *arguments]


@functools.cache
def _start() -> str:
    folder = tempfile.TemporaryDirectory(prefix="warm-")
    file = Path(folder.name, "python")
    client = Path(folder.name, "client.py")
    client.write_text(CLIENT.replace("FOLDER", folder.name).replace("EXECUTABLE", EXECUTABLE))
    file.write_text(f'#!/bin/sh\nexec "{sys.executable}" -IS "{client}" "$@"\n')
    file.chmod(0o700)
    launch = Path(sys.executable).with_name("mlx.launch")
    if launch.exists():  # which is looked for beside a Python
        Path(folder.name, launch.name).symlink_to(launch)
    for name in ("0", "1"):
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(os.path.join(folder.name, name))
        listener.listen(64)
        # Ends when this process does: its standard input is a pipe from here.
        command = [sys.executable, __file__, str(listener.fileno())]
        server = subprocess.Popen(
            command, stdin=subprocess.PIPE, pass_fds=[listener.fileno()], start_new_session=True
        )
        listener.close()
        atexit.register(_end, server)
    atexit.register(folder.cleanup)
    return str(file)


def _end(server: subprocess.Popen[bytes]) -> None:
    assert server.stdin is not None
    server.stdin.close()
    server.wait()


class Fork(NamedTuple):
    pid: int
    link: socket.socket


def serve(listener: socket.socket) -> Any:
    """Forks for each that connects. Returns in the fork: arguments, environment and folder."""
    forks: dict[int, Fork] = {}
    """By pidfd."""
    while True:
        links = {fork.link: fork for fork in forks.values() if fork.link.fileno() != -1}
        for ready in select.select([0, listener, *links, *forks], [], [])[0]:
            if ready == 0:  # the session has ended
                for fork in forks.values():
                    os.kill(fork.pid, signal.SIGKILL)
                sys.exit()
            elif ready is listener:
                link, _ = listener.accept()
                said, streams, _, _ = socket.recv_fds(link, MESSAGE, 3)
                pid = os.fork()
                if pid == 0:
                    for at, stream in enumerate(streams):
                        os.dup2(stream, at)
                    os.closerange(3, max([*streams, *forks, link.fileno()]) + 1)
                    return json.loads(said)
                for stream in streams:
                    os.close(stream)
                forks[os.pidfd_open(pid)] = Fork(pid, link)
            elif ready in forks:
                fork = forks.pop(ready)
                os.close(ready)
                _, status = os.waitpid(fork.pid, 0)
                with contextlib.suppress(OSError):
                    fork.link.send(b"%d" % status)
                fork.link.close()
            elif ready.fileno() != -1:
                signalled = b""
                with contextlib.suppress(OSError):
                    signalled = ready.recv(16)
                os.kill(links[ready].pid, int(signalled or signal.SIGKILL))
                if not signalled:
                    ready.close()


if __name__ == "__main__":
    for package in PACKAGES:
        importlib.import_module(package)
    # What is imported from it is what takes the time.
    sys.modules["transformers"].AutoTokenizer  # noqa: B018
    gc.collect()
    gc.freeze()
    paths = sys.path[1:]
    arguments, environment, folder = serve(socket.socket(fileno=int(sys.argv[1])))
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.executable = environment[EXECUTABLE]  # so that what it starts is warm too
    sys.orig_argv[:] = [sys.executable, *arguments]
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(write_through=True)
    what = arguments.pop(0)
    name = arguments.pop(0) if what in ("-m", "-c") else what
    sys.argv[:] = [what if what == "-c" else name, *arguments]
    first = {"-m": folder, "-c": ""}.get(what, str(Path(name).parent))
    before = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [first, *before, *paths]
    if any(name.startswith("HF_") for name in environment):
        importlib.reload(sys.modules["huggingface_hub.constants"])  # which has read them
    if JOIN in environment and "MLX_HOSTFILE" in environment:
        sys.path.append(str(Path(__file__).parent))
        importlib.import_module("ranks").join()
    if what == "-m":
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        code, main.__file__ = (
            (name, "<string>") if what == "-c" else (Path(name).read_bytes(), name)
        )
        exec(compile(code, main.__file__, "exec"), vars(main))

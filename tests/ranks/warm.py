"""A Python that starts in no time: it is forked from one that has imported what is slow to import.

Importing mlx-lm takes 2 s of a core, nearly all of it for packages that have nothing to do with
what is tested (transformers reads 1,600 of its files). `python()` is an executable that is called
as Python is, with a script, ``-m`` or ``-c``:

    executable (warm_client.py)         server     its fork     the fork's fork
    arguments, environment, streams --> forks  --> forks    --> runs the script as __main__
    signals                         --------------------------> and ends as Python does
    exit status                     <------------- waits    <--
    (killed)                        -------------> kills    -->

mlx-lm and the plugin are not among what has been imported: a script imports them in its own order.
Rank 0 and the other ranks are forked from two servers, since their hashes of strings differ too
where ranks are started one by one. Linux only.

The fork server of `multiprocessing` would not do: what it starts ends without `atexit`, and after
a KeyboardInterrupt with exit code 1, unlike a script.
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
from typing import Any

PACKAGES = ("numpy", "mlx.core", "mlx.nn", "huggingface_hub", "transformers", "jinja2")
MESSAGE = 1 << 17  # bytes of arguments, environment and folder, at most
JOIN = "WARM_JOIN"
"""A variable: ranks of a ring begin with `ranks.join`, so that they do not wait by spinning."""


def python() -> str:
    """The path of the executable; where there is none, of this Python."""
    return _start() if hasattr(os, "pidfd_open") else sys.executable


def command_line(*arguments: str) -> list[str]:
    """`mlx-lm-skiphead` in a process of its own, for tests that end it; what it starts is warm."""
    code = "import sys; sys.executable = sys.argv.pop(1); from mlx_lm_skiphead.cli import main; "
    return [sys.executable, "-c", f"{code}sys.exit(main(sys.argv[1:]))", python(), *arguments]


@functools.cache
def _start() -> str:
    """Starts the servers, which end when this process does."""
    folder = tempfile.TemporaryDirectory(prefix="warm-")
    atexit.register(folder.cleanup)
    for name in ("0", "1"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(os.path.join(folder.name, name))
            listener.listen(64)
            command = [sys.executable, "-u", __file__, str(listener.fileno())]
            server = subprocess.Popen(
                command, stdin=subprocess.PIPE, pass_fds=[listener.fileno()], start_new_session=True
            )
        atexit.register(server.communicate)  # closes its standard input, and waits
    file = Path(folder.name, "python")
    client = Path(__file__).with_name("warm_client.py")
    file.write_text(f'#!/bin/sh\nexec "{sys.executable}" -IS "{client}" "{folder.name}" "$@"\n')
    file.chmod(0o700)
    launch = Path(sys.executable).with_name("mlx.launch")
    if launch.exists():  # which is looked for beside a Python
        Path(folder.name, launch.name).symlink_to(launch)
    return str(file)


def serve(listener: socket.socket) -> list[Any]:
    """Forks for each client. Returns in the fork's fork: arguments, environment and folder."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that no fork stays as a zombie
    while 0 not in select.select([0, listener], [], [])[0]:  # until the session ends
        link, _ = listener.accept()
        with link:
            if os.fork() == 0:
                listener.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                return attend(link)
    sys.exit()


def attend(link: socket.socket) -> list[Any]:
    """Forks, tells the client how the fork has ended, and ends. Returns in the fork."""
    request, streams, _, _ = socket.recv_fds(link, MESSAGE, 3)
    pid = os.fork()
    if pid == 0:
        link.send(b"%d" % os.getpid())
        for at, stream in enumerate(streams):
            os.dup2(stream, at)
    for stream in streams:
        os.close(stream)
    if pid == 0:
        return json.loads(request)
    ended = os.pidfd_open(pid)
    if ended not in select.select([ended, link, 0], [], [])[0]:  # the client or the session has
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(BrokenPipeError):
        link.send(b"%d" % status)
    os._exit(0)


if __name__ == "__main__":
    for package in PACKAGES:
        importlib.import_module(package)
    # What is imported from it is what takes the time.
    sys.modules["transformers"].AutoTokenizer  # noqa: B018
    gc.collect()
    gc.freeze()
    listener = socket.socket(fileno=int(sys.argv[1]))
    sys.executable = str(Path(listener.getsockname()).with_name("python"))  # starts what is warm
    arguments, environment, folder = serve(listener)
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    importlib.reload(sys.modules["huggingface_hub.constants"])  # which has read the environment
    sys.orig_argv[:] = [sys.executable, *arguments]
    what = arguments.pop(0)
    name = arguments.pop(0) if what in ("-m", "-c") else what
    sys.argv[:] = [what if what == "-c" else name, *arguments]
    first = {"-m": folder, "-c": ""}.get(what, str(Path(name).parent))
    before = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:1] = [first, *before]
    if JOIN in environment and "MLX_HOSTFILE" in environment:
        sys.path.append(str(Path(__file__).parent))
        importlib.import_module("ranks").join()
    if what == "-m":
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        main.__file__ = "<string>" if what == "-c" else name
        code = name if what == "-c" else Path(name).read_bytes()
        exec(compile(code, main.__file__, "exec"), vars(main))

"""Starts a real mlx_lm.server for a test, in one process or on ranks, and ends it as a user does.

`server` waits until it answers and gives its address; at the end comes Ctrl-C, and an error says
if the server did not end by itself, or had said that something went wrong while it served.
`client` talks to it with the openai library, `ask` gives an answer in one shape for all kinds.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ranks
import warm

from mlx_lm_skiphead.cli.ranks import free_ports

if TYPE_CHECKING:
    import openai

START = 90  # seconds until it answers
END = 20  # seconds from Ctrl-C to the end
ANSWER = 40  # seconds for an answer

# What no server may say while it serves: a lost connection, an error, anything of the plugin.
_WRONG = re.compile(r".*(?:\[ring\]| - (?:ERROR|WARNING) - |skiphead).*")
_EXCEPTION = re.compile(r"^[\w.]+(?:Error|Exception|Interrupt)\b.*", re.MULTILINE)
_CLIENT_LEFT = ("BrokenPipeError", "ConnectionResetError")  # it says so, and serves on

_RANK = (
    "import ranks, runpy, serving; ranks.join(); serving.prepare(); "
    "runpy.run_module({!r}, run_name='__main__', alter_sys=True)"
)


def command(
    arguments: list[str], count: int, plugin: bool, launcher: str, split: str = ""
) -> list[str]:
    """What each of `count` ranks runs: the server with its `arguments`."""
    python = warm.python() if launcher == "ring" else sys.executable
    run = ["mlx_lm_skiphead", "run", *(["--split", split] if split else [])]
    module, *rest = [*(run if plugin else []), "mlx_lm.server"]
    if count == 1:
        return [python, "-m", module, *rest, *arguments]
    return [python, "-c", _RANK.format(module), *rest, *arguments, "--pipeline"]


def prepare() -> None:
    """In a rank: report what a test asks for by the environment."""
    if folders := os.environ.get("RANK_FOLDERS"):
        os.chdir(Path(folders, str(ranks.rank())))  # of this machine, as it were
        note_loads()
    else:
        count_heads()


def note_loads() -> None:
    """In a rank: report of each load what the models before have left, and what there is then."""
    import gc

    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm import utils

    load, noted = utils.sharded_load, []

    def state() -> dict[str, Any]:
        gc.collect()
        mx.clear_cache()
        found: dict[str, Any] = {"bytes": mx.get_active_memory()}
        modules = [o for o in gc.get_objects() if isinstance(o, nn.Module)]
        found["models"] = sum(type(module).__name__ == "Model" for module in modules)
        if plugin := sys.modules.get("mlx_lm_skiphead.installing"):
            from mlx_lm_skiphead.patching import registry
            from mlx_lm_skiphead.ranks import watch

            found["status"] = [str(model) for model in plugin.status().models]
            found["noted"] = len(watch.under_way()) + registry.generations()
        return found

    def noting(*args: Any, **kwargs: Any) -> Any:
        noted.append({"model": Path(args[0]).name, "left": state()})
        loaded = load(*args, **kwargs)
        noted[-1]["loaded"] = state()
        ranks.report(noted)
        return loaded

    utils.sharded_load = noting


def count_heads() -> None:
    """In a rank of a tiny model: report how often its head was evaluated, as the server runs.

    Four calls late: MLX is lazy, and what a call returned may be computed later, or, in prefill,
    never.
    """
    import mlx.core as mx
    import mlx.nn as nn
    import tiny_models

    linear, evaluated = nn.Linear.__call__, 0
    recent: deque[mx.array] = deque()

    def counted(self: nn.Linear, x: mx.array) -> mx.array:
        nonlocal evaluated
        y = linear(self, x)
        if self.weight.shape[0] == tiny_models.VOCAB:
            recent.append(y)
            if len(recent) > 4:
                graph = io.StringIO()
                mx.export_to_dot(graph, recent.popleft())
                evaluated += "label" not in graph.getvalue()  # no operation is left to be done
                ranks.report(evaluated)
        return y

    ranks.report(evaluated)
    nn.Linear.__call__ = counted


class Server:
    """A server that runs. `url` is where the openai library finds it."""

    def __init__(self, process: subprocess.Popen[bytes], run: ranks.Run, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/v1"
        self.exit_code: int | None = None
        """Of the process or of mlx.launch, once it has ended."""
        self._process = process
        self._run = run
        self._port = port

    def reported(self) -> list[Any]:
        """What each rank reports: how often it has evaluated the head so far, or its loads."""
        return [value for _, value in sorted(self._run.reported().items())]

    def said(self) -> str:
        """All that it has said."""
        return self._run.output("stdout") + "\n" + self._run.output("stderr")

    def wrong(self) -> list[str]:
        """What it has said that no server should say while it serves."""
        exceptions = [e for e in self.exceptions() if not e.startswith(_CLIENT_LEFT)]
        return [*_WRONG.findall(self.said()), *exceptions]

    def exceptions(self) -> set[str]:
        """The exceptions in what it has said, whether they matter or not."""
        return set(_EXCEPTION.findall(self.said()))

    def press_ctrl_c(self) -> None:
        """SIGINT to all processes at once, as from a terminal; waits until all are gone."""
        os.killpg(self._process.pid, signal.SIGINT)
        limit = time.monotonic() + END
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.exit_code = self._process.wait(END)
        while ranks.is_alive(self._process.pid):
            if time.monotonic() > limit:
                raise AssertionError(self._run.describe(f"not gone {END} s after Ctrl-C"))
            time.sleep(0.01)

    def wait_until_it_answers(self) -> None:
        limit = time.monotonic() + START
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while time.monotonic() < limit and self._process.poll() is None:
            # On ranks it listens once all of them are connected.
            with contextlib.suppress(OSError):
                direct.open(f"http://127.0.0.1:{self._port}/health", timeout=ANSWER).close()
                return
            time.sleep(0.05)
        exited = self._process.poll()
        raise AssertionError(
            self._run.describe(
                f"no answer in {START} s" if exited is None else f"exited with code {exited}"
            )
        )


@contextlib.contextmanager
def server(
    model: Path,
    *options: str,
    count: int = 1,
    plugin: bool = False,
    launcher: str = "ring",
    env: Mapping[str, str] | None = None,
    may_complain: bool = False,
    split: str = "",
) -> Iterator[Server]:
    """mlx_lm.server with `model` and `options`, in a plain process or on `count` ranks, which
    `launcher` starts (`ranks.LAUNCHERS`) and which have layers by `split`. They see `env` too.

    An AssertionError with the end of all outputs says if it does not start, if it said something
    that is wrong, or if it did not end by itself. No process outlives the block in any case.
    """
    with ranks.run_folder() as folder:
        port = free_ports(1)
        variables = ranks.rank_environment(env, folder)
        environment = ranks.inherited() | variables
        arguments = ["--model", str(model), "--port", str(port), *options]
        run = command(arguments, count, plugin, launcher, split)
        if count > 1:
            launch, environment = ranks.launch_command(launcher, count, variables)
            run = [*launch, *(["--"] if launcher == "ring" else []), *run]
        described = ranks.Run(run, folder, count)
        with (
            open(folder / "stdout", "wb") as stdout,
            open(folder / "stderr", "wb") as stderr,
        ):
            process = subprocess.Popen(
                run,
                stdin=subprocess.PIPE,
                stdout=stdout,
                stderr=stderr,
                env=environment | {"TMPDIR": str(folder)},
                start_new_session=True,
            )
        try:
            with contextlib.suppress(BrokenPipeError):
                os.write(process.stdin.fileno(), ranks.FILL_STDIN)  # type: ignore[union-attr]
            started = Server(process, described, port)
            started.wait_until_it_answers()
            yield started
            if started.exit_code is None:
                if not may_complain and (wrong := started.wrong()):
                    raise AssertionError(described.describe(*wrong))
                started.press_ctrl_c()
        finally:
            ranks.end(process)


def client(server: Server) -> openai.OpenAI:
    import openai  # here, so that ranks do not import it

    return openai.OpenAI(
        base_url=server.url,
        api_key="none",
        max_retries=2,  # the server lets five connections wait, and others may be reset
        timeout=ANSWER,
        http_client=openai.DefaultHttpxClient(trust_env=False),
    )


def ask(client: openai.OpenAI, prompt: str | list[Any], **options: Any) -> dict[str, Any]:
    """The answer to a text, or to the messages of a chat: text, why it ends, logprobs, usage.

    Whether it is streamed, an answer looks the same, but for `logprobs`: streams have none.
    """
    request: dict[str, Any] = {"model": "default_model", **options}
    if request.get("stream"):
        request["stream_options"] = {"include_usage": True}
    if isinstance(prompt, str):
        given = client.completions.create(prompt=prompt, **request)
    else:
        given = client.chat.completions.create(messages=prompt, **request)
    parts = [part.model_dump() for part in (given if request.get("stream") else [given])]

    texts, reason, logprobs = [], None, None
    for choice in (choice for part in parts for choice in part["choices"]):
        message = choice.get("message") or choice.get("delta") or choice
        texts.append(message.get("text") or message.get("content") or "")
        reason = choice["finish_reason"] or reason
        logprobs = choice.get("logprobs") or logprobs
    return {
        "text": "".join(texts),
        "finish_reason": reason,
        "logprobs": [_logprob(entry) for entry in logprobs["content"]] if logprobs else None,
        "usage": parts[-1]["usage"],
    }


def _logprob(entry: dict[str, Any]) -> dict[Any, float]:
    """By id: of the token, or of the likeliest tokens where those were asked for.

    Then the server says of the token itself nothing, and has them in no order.
    """
    return {one["id"]: one["logprob"] for one in entry.get("top_logprobs") or [entry]}

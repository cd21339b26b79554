"""``python tests/tools/slow_links.py [N ...]``: how many latencies of a link a token takes.
``python tests/tools/slow_links.py FOLDER`` writes a model for `tests/tools/bench.py --link-rate`.

Each link of a ring of ranks is delayed, by one time and by another: the slope of milliseconds over
delay is the number of latencies, whatever the machine computes besides. Single and batched decode
by `tools/bench.py`, and the server; without the plugin and with it.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

from mlx_lm_skiphead.cli.ranks import WAYS, RankFailed, free_ports, running

sys.path.insert(0, str(Path(__file__).parents[1] / "ranks"))  # what the tests share

import tiny_checkpoint
import warm

TOOLS = Path(__file__).parent
DELAYS = (20, 60)  # ms
BATCHES = (1, 4)
WIDE: dict[str, Any] = {
    "hidden_size": 4096,
    "vocab_size": 1024,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 6,
    "layer_types": ["full_attention"] * 6,
}
"""Hidden states of 16 KiB a token, in layers so thin that a CPU takes no longer than the links."""
Slopes = dict[str, dict[str, float]]
"""By what takes them and by way, latencies."""


def write_model(folder: Path) -> Path:
    tiny_checkpoint.write("deepseek_v3", folder)
    return folder


def write_wide_model(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tiny_checkpoint.write("ministral3-untied", folder, **WIDE)


def decoding(model: Path, count: int, tokens: int = 32, rounds: int = 3) -> Slopes:
    """Latencies per token, and to the first one, of `generate_step` and of batches."""
    told: dict[int, Any] = {}
    for delay in DELAYS:
        done = subprocess.run(
            [
                *(warm.python(), str(TOOLS / "bench.py"), str(model), "-n", str(count)),
                *("--batch", ",".join(map(str, BATCHES)), "--tokens", str(tokens)),
                *("--rounds", str(rounds), "--link-delay", str(delay), "--json"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            check=True,
            timeout=600,
        )
        told[delay] = json.loads(done.stdout)["cases"]
    slopes = {}
    for number, batch in enumerate(BATCHES):
        for quantity, name in (("ms_per_token", "a token"), ("first_token_ms", "the first token")):
            slopes[f"{name}, batch of {batch}"] = {
                way: _slope({d: told[d][number][quantity][way]["median"] for d in DELAYS})
                for way in WAYS
            }
    return slopes


def serving(
    model: Path, count: int, tokens: int = 12, requests: int = 7, ways: Sequence[str] = WAYS
) -> Slopes:
    """Latencies per token of an answer of mlx_lm.server, and of a whole answer."""
    each: dict[str, dict[int, float]] = {way: {} for way in ways}
    whole: dict[str, dict[int, float]] = {way: {} for way in ways}
    for delay in DELAYS:
        for way in ways:
            port = free_ports(1)
            options = ["--model", str(model), "--pipeline", "--port", str(port)]
            module = ["mlx_lm_skiphead", "run"] if way == "plugin" else []
            command = [warm.python(), "-m", *module, "mlx_lm.server", *options]
            launch = [sys.executable, str(TOOLS / "simulated_links.py"), "-n", str(count)]
            said: list[str] = []
            try:
                with running(count, [*launch, "--delay", str(delay), *command]) as events:
                    reader = threading.Thread(target=_read, args=(events, said))
                    reader.start()
                    _wait_for(port)
                    times = [_ask(port, tokens) for _ in range(requests + 1)][1:]
            except OSError as error:
                reader.join()
                answer = error.read().decode() if isinstance(error, HTTPError) else ""
                raise AssertionError("\n".join([way, f"{error}", answer, *said])) from error
            each[way][delay] = statistics.median(t[0] for t in times)
            whole[way][delay] = statistics.median(t[1] for t in times)
    return {
        "a token, mlx_lm.server": {way: _slope(times) for way, times in each.items()},
        f"an answer of {tokens}, mlx_lm.server": {
            way: _slope(times) for way, times in whole.items()
        },
    }


def _read(events: Iterator[Any], said: list[str]) -> None:
    """Read what servers print, lest they wait for that, until they end."""
    try:
        list(events)
    except RankFailed as failure:
        said.append(str(failure))


def _slope(times: dict[int, float]) -> float:
    (less, ms), (more, more_ms) = sorted(times.items())
    return (more_ms - ms) / (more - less)


def _wait_for(port: int) -> None:
    limit = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10).close()
            return
        except OSError:
            if time.monotonic() > limit:
                raise
            time.sleep(0.1)


def _ask(port: int, tokens: int) -> tuple[float, float]:
    """Milliseconds between two tokens, and of the whole answer."""
    request = {"prompt": "abc", "max_tokens": tokens, "stream": True, "logit_bias": {"255": -100}}
    start = time.perf_counter()
    arrived = []
    with urllib.request.urlopen(
        urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions",
            data=json.dumps(request).encode(),
            headers={"Content-Type": "application/json"},
        ),
        timeout=120,
    ) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                arrived.append(time.perf_counter())
    between = (arrived[-2] - arrived[0]) / (len(arrived) - 2)
    return 1000 * between, 1000 * (time.perf_counter() - start)


def main(counts: list[int]) -> None:
    print(f"latencies of a link, by {DELAYS[0]} and {DELAYS[1]} ms: unpatched, plugin")
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder))
        for count in counts:
            for name, by_way in (decoding(model, count) | serving(model, count)).items():
                values = ", ".join(f"{by_way[way]:.2f}" for way in WAYS)
                print(f"{count} ranks, {name}: {values}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:] and not sys.argv[1].isdecimal():
        write_wide_model(Path(sys.argv[1]))
    else:
        main([int(count) for count in sys.argv[1:]] or [2, 3, 4])

"""``python tests/tools/bench.py MODEL -n 2 ...``: the command `bench`, with instruments of ours.

It takes all options of `mlx-lm-skiphead bench`, and these: links that are slow (`simulated_links`),
workers that run a head or layers several times as slower machines would, cores of each rank, a
picture (`plot`), unpatched against itself, and `plan`'s formula beside what was measured.
"""

from __future__ import annotations

import argparse
import base64
import functools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import wrapt
from rich.console import Console

from mlx_lm_skiphead.cli import bench, ranks
from mlx_lm_skiphead.cli.formula import Link, token
from mlx_lm_skiphead.cli.models import family_of
from mlx_lm_skiphead.cli.ranks import WAYS
from mlx_lm_skiphead.cli.shared import add_command
from mlx_lm_skiphead.cli.tables import digits, show, table

LINKS = Path(__file__).with_name("simulated_links.py")


def main() -> int:
    commands = argparse.ArgumentParser(prog="tests/tools/bench.py").add_subparsers()
    add_command(commands, bench)
    parser = commands.choices["bench"]
    option = parser.add_argument_group("instruments").add_argument
    option("--link-delay", type=float, default=0, metavar="MS", help="added to each message")
    option("--link-rate", type=float, default=0, metavar="MBIT", help="Mbit/s that each rank sends")
    option("--head-passes", type=int, default=1, metavar="K", help="workers run a head K times")
    option("--layer-passes", type=int, default=1, metavar="K", help="and their layers")
    option("--cores", type=_by_rank, metavar="C;C;...", help="of each rank, as in '0,1;2,3'")
    option("--control", action="store_true", help="unpatched a second time in place of the plugin")
    option("--plan", action="store_true", help="measure links and each rank alone, and predict")
    option("--plot", type=Path, metavar="FILE.png", help="draw the result (needs matplotlib)")
    arguments = parser.parse_args()
    arguments.command = "bench"
    bench.launcher = lambda *given: launcher(arguments, *given)
    told, code = bench.measure(arguments)
    cases = [case for case in told["cases"] if case["ratio"]]
    if arguments.plan and all(told["memory"]):
        predict(told)
    show(arguments.json, told, report)
    if arguments.plot and cases:
        from plot import draw

        draw(told, arguments.plot)
    return code


def _by_rank(text: str) -> list[list[int]]:
    return [[int(core) for core in part.split(",")] for part in text.split(";")]


def launcher(
    arguments: argparse.Namespace, task: dict[str, Any], count: int, *where: Any
) -> list[str]:
    """In the place of `ranks.launcher`: the same ranks, with our instruments."""
    names = ("cores", "head_passes", "layer_passes", "control", "plan")
    task = {**task, **{name: getattr(arguments, name) for name in names}}
    ranks.rank_command = _rank_command
    if not (arguments.link_delay or arguments.link_rate):
        return ranks.launcher(task, count, *where)
    links = ["--delay", str(arguments.link_delay), "--rate", str(arguments.link_rate)]
    command = _rank_command({**task, "ends_with": os.getpid()})
    return [sys.executable, str(LINKS), "-n", str(count), *links, *command]


def _rank_command(task: dict[str, Any]) -> list[str]:
    text = base64.b64encode(json.dumps(task).encode()).decode()
    return [sys.executable, __file__, "rank", text]


def predict(told: dict[str, Any]) -> None:
    """Put what the formula gives into ``planned`` of each case, by way, in ms."""
    results = told["memory"]
    latency, rate = results[0]["link"]
    for number, case in enumerate(told["cases"]):
        times = [result["times"][number] for result in results]
        link = Link(rate or math.inf, latency)
        row = results[0]["row"]
        case["planned"] = {way: token(times, row, link, case["batch"], way).ms for way in WAYS}


def report(console: Console, told: dict[str, Any]) -> None:
    bench.report(console, told)
    if planned := [case for case in told["cases"] if case["ratio"] and "planned" in case]:
        report_plan(console, told, planned)


def report_plan(console: Console, told: dict[str, Any], cases: list[dict[str, Any]]) -> None:
    latency, rate = told["memory"][0]["link"]
    rows = []
    for case in cases:
        planned = case["planned"]
        sizes = {name: str(case[name]) for name in ("batch", "prompt")}
        times = {way: digits(planned[way]) for way in WAYS}
        ratio = digits(planned["plugin"] / planned["unpatched"])
        rows.append({**sizes, **times, "plugin / unpatched": ratio})
    console.print(table("planned ms per token", rows))
    links = f"{1000 * rate:.4g} Mbit/s and {latency:.2f} ms" if rate else f"{latency:.2f} ms"
    console.print(f"From the layers and the head of each rank alone, and links of {links}.")


# What follows runs in a rank.


def run_rank() -> None:
    task = json.loads(base64.b64decode(sys.argv[1]))
    number = ranks.launched_rank() or 0
    if task["cores"]:
        try:
            os.sched_setaffinity(0, task["cores"][number])
        except OSError as error:
            return ranks.say(error=str(error))
    ranks.choose_gpu(task)
    from mlx_lm_skiphead.cli import measure
    from mlx_lm_skiphead.ranks.agreement import exchanged

    class Instrumented(measure.Measurement):
        def run(self) -> list[dict[str, Any]]:
            with ExitStack() as slower:
                if number > 0 and task["head_passes"] > 1:
                    slower.enter_context(_slower_heads(self.model, task["head_passes"]))
                if number > 0 and task["layer_passes"] > 1:
                    slower.enter_context(_slower_layers(self.split.stage, task["layer_passes"]))
                results = super().run()
                if task["plan"]:
                    alone = exchanged(measure_alone(self))
                    return [told | of_rank for told, of_rank in zip(results, alone, strict=True)]
                return results

    if task["control"]:
        install, calls = measure.install, []

        def only_first() -> None:  # which is before loading; the others begin a round
            calls.append(1)
            install() if len(calls) == 1 else measure.uninstall()

        measure.install = only_first
    measure.Measurement = Instrumented
    ranks.main()


@contextmanager
def around_head(model: Any, around: Callable[[Callable[[], Any]], Any]) -> Iterator[None]:
    """Inside the ``with`` block call `around` where the head of `model` is to run.

    Its argument is a function that runs the head and returns the logits. It returns the logits.
    """
    family = family_of(model)
    head = family.head_of(family.owner_of(model))
    method = "as_linear" if hasattr(head, "as_linear") else "__call__"  # tied

    def called(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        run_head = functools.partial(wrapped, *args, **kwargs)
        return around(run_head) if instance is head else run_head()

    handle = wrapt.wrap_function_wrapper(type(head), method, called)
    try:
        yield
    finally:
        wrapt.unwrap_object(type(head), method, handle)


def _slower_heads(model: Any, passes: int) -> Any:
    import mlx.core as mx

    def repeated(run_head: Callable[[], Any]) -> Any:
        logits = run_head()
        for _ in range(passes - 1):
            logits = mx.depends(run_head(), logits)
        return logits

    return around_head(model, repeated)


@contextmanager
def _slower_layers(stage: Any, passes: int) -> Iterator[None]:
    """Inside the ``with`` block each matrix product of the layers of a rank is made `passes` times.

    Not each layer, which would put its tokens into the prompt cache so many times. Each time with
    another copy of the weights, since those that were just read are still in the CPU's cache.
    """
    import copy

    import mlx.core as mx
    import mlx.nn as nn
    import wrapt
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    kinds = (nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear)
    modules = [m for layer in stage.pipeline_layers for m in layer.modules()]
    copies = {
        id(module): [copy.deepcopy(module) for _ in range(passes - 1)]
        for module in modules
        if isinstance(module, kinds)
    }
    for others in copies.values():
        for other in others:
            other.update({name: array + 0 for name, array in other.parameters().items()})
            mx.eval(other.parameters())

    def called(wrapped: Any, module: Any, args: Any, kwargs: Any) -> Any:
        out = wrapped(*args, **kwargs)
        for other in copies.get(id(module), ()):
            out = mx.depends(wrapped.__func__(other, *args, **kwargs), out)
        return out

    with ExitStack() as undo:
        for kind in kinds:
            handle = wrapt.wrap_function_wrapper(kind, "__call__", called)
            undo.callback(wrapt.unwrap_object, kind, "__call__", handle)
        yield


def measure_alone(measured: Any) -> dict[str, Any]:
    """What the formula needs.

    Returns:
        ``row``: the bytes of a token's hidden states. ``link``: the mean latency in ms, and the
        rate of the slowest link in Gbit/s or None. ``times``: for each case the ms of this rank's
        layers and of its head.
    """
    import mlx.core as mx

    from mlx_lm_skiphead.cli import links

    measured.say(step="links and ranks alone")
    with mx.stream(mx.cpu):
        found = links.each_link(measured.group)
    rates = [max(link["there_mb_s"], link["back_mb_s"]) * 8e-3 for link in found]
    latency = statistics.mean([link["latency_ms"] for link in found] or [0.0])
    times = [_alone(measured, case) for case in measured.task["cases"]]
    split = measured.split
    embedding = getattr(split.stage, split.family.embedding)
    row = embedding(mx.zeros((1, 1), mx.int32)).nbytes
    return {"row": row, "link": [latency, min(rates, default=None)], "times": times}


def _alone(measured: Any, case: list[int]) -> tuple[float, float]:
    """The ms of this rank's layers and of its head for a token, while no other rank works."""
    from mlx_lm_skiphead.cli import links

    stage, took = measured.split.stage, (0.0, 0.0)
    place = stage.pipeline_rank, stage.pipeline_size
    for number in range(place[1]):
        links.total()
        if number == place[0]:
            stage.pipeline_rank, stage.pipeline_size = 0, 1  # its own layers, nothing sent
            try:
                took = _layers_and_head(measured, *case)
            finally:
                stage.pipeline_rank, stage.pipeline_size = place
    return took


def _layers_and_head(measured: Any, batch: int, length: int) -> tuple[float, float]:
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    owner, cache = measured.split.owner, make_prompt_cache(measured.model)
    prompts = mx.arange(batch * length).reshape(batch, length) % measured.vocabulary
    heads: list[Callable[[], Any]] = []

    def keep(run_head: Callable[[], Any]) -> Any:
        heads.append(run_head)
        return run_head()

    _sample(owner(prompts, cache=cache))
    with around_head(measured.model, keep):
        _sample(owner(prompts[:, :1], cache=cache))
    head = _median_ms(lambda: _sample(heads[0]()))
    both = _median_ms(lambda: _sample(owner(prompts[:, :1], cache=cache)))
    return max(0.0, both - head), head


def _sample(logits: Any) -> None:
    """As mlx-lm's loops do it."""
    import mlx.core as mx

    logits = logits[:, -1]
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    mx.eval(mx.argmax(logprobs, axis=-1), logprobs)


def _median_ms(work: Callable[[], None], times: int = 5) -> float:
    took = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        took.append(1000 * (time.perf_counter() - start))
    return statistics.median(took)


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        del sys.argv[1]
        run_rank()
    else:
        sys.exit(main())

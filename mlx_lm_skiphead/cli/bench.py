"""``mlx-lm-skiphead bench MODEL -n N``: measures what the plugin changes on these machines.

One set of ranks runs a model both ways in turn, so that drift of the machine cancels. Each round
gives one ratio, of two generations that ran one after the other. Printed are times, their ratio
with a confidence interval, memory, and whether the tokens agree.

Example: mlx-lm-skiphead bench ./my-model -n 2 --batch 1,8 --prompt 32,512
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import signal
import statistics
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..config import layers_by_rank
from .ranks import WAYS, RankFailed, launcher, role, running
from .shared import Unusable, at_least, both, listed, new_command, table


def add_command(commands: Any) -> None:
    """Add ``bench`` to the parser's subcommands."""
    summary = "measure a model with and without the plugin, in interleaved rounds"
    parser = new_command(commands, run, __doc__, summary)
    option, size, sizes = parser.add_argument, at_least(1), listed(at_least(1))
    option("model", metavar="MODEL", help="a folder, or a hub repository in the cache")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("-n", dest="ranks", type=size, metavar="N", help="N ranks on this machine")
    where.add_argument("--hostfile", type=Path, metavar="FILE", help="ranks of an mlx.launch file")
    option("--starting-port", type=size, default=0, metavar="P", help="of the ranks (a free one)")
    option("--backend", choices=("ring", "mpi"), default="ring", help="of MLX (ring)")
    option("--gpus", type=listed(at_least(0)), metavar="G,...", help="CUDA device of each rank")
    option("--split", type=sizes, metavar="A,...", help="layers of each rank, rank 0 first (even)")
    option("--batch", type=sizes, default=[1], metavar="B,...", help="batch sizes (1)")
    option("--prompt", type=sizes, default=[8], metavar="L,...", help="prompt lengths (8)")
    option("--tokens", type=size, metavar="N", help="to generate (what takes 2 s, from 8 to 64)")
    option("--rounds", type=size, default=7, metavar="N", help="6 give 95 %% confidence (7)")
    option("--json", action="store_true", help="print one JSON document, and nothing else")
    parser.set_defaults(text=None)


def run(arguments: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        The exit code: 0; 1 if tokens differ or a rank failed; 130 after Ctrl-C, with a report of
        what was measured until then.

    Raises:
        Unusable: for wrong arguments.
    """
    told, code = measure(arguments)
    if arguments.json:
        print(json.dumps(told, default=str))  # paths
    else:
        report(Console(highlight=False), told)
    return code


def measure(arguments: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Run the ranks: see `document`, and the exit code of `run`."""
    from .models import locate, split

    count = arguments.ranks or _count_hosts(arguments.hostfile)
    if arguments.gpus is not None and len(arguments.gpus) != count:
        raise Unusable(f"--gpus is for {len(arguments.gpus)} ranks, and there are {count}")
    folder = locate(arguments.model)
    arguments.split = arguments.split or layers_by_rank()
    family = split(folder, 0, count, arguments.split).family.name
    names = ("tokens", "rounds", "text", "gpus", "split")
    task = {name: getattr(arguments, name) for name in names}
    task["model"] = str(folder)
    task["cases"] = [(b, p) for p in arguments.prompt for b in arguments.batch]
    where = arguments.backend, arguments.hostfile, arguments.starting_port
    code = 0
    results: list[Any] = [None] * count
    measured: list[dict[str, Any]] = []
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: ranks are ended
        _listen(launcher(task, count, *where), results, measured)
    except RankFailed as failure:
        print(f"mlx-lm-skiphead {arguments.command}: {failure}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("Stopped; all ranks have been ended.", file=sys.stderr)
        code = 130
    told = document(arguments, family, results, measured)
    return told, code or (0 if told["tokens_agree"] else 1)


def _count_hosts(hostfile: Path) -> int:
    try:
        data = json.loads(hostfile.read_text())
        hosts = data["hosts"] if isinstance(data, dict) else data
        if not isinstance(hosts, list) or len(hosts) < 2:
            raise ValueError("a pipeline needs a list of 2 hosts or more")
    except (OSError, ValueError, KeyError) as error:
        raise Unusable(f"{hostfile} is no host file: {error}") from error
    return len(hosts)


def _listen(command: list[str], results: list[Any], measured: list[dict[str, Any]]) -> None:
    """Start ranks, and show what they do until all have ended; fill in results, by rank."""
    step, console = "", Console(stderr=True)
    with running(len(results), command) as events, console.status("starting ranks") as line:
        for rank, event in events:
            if "result" in event:
                results[rank] = event["result"]
            elif "measured" in event:
                measured.append({**event["measured"], "rank": rank})
            elif rank == 0 and event["step"] != step:
                step = event["step"]
                line.update(step)
                if not console.is_terminal:
                    console.print(step, highlight=False)


def document(
    arguments: argparse.Namespace, family: str, results: list[Any], measured: list[dict[str, Any]]
) -> dict[str, Any]:
    """What was measured, as JSON. Times are in milliseconds on rank 0, memory is in bytes.

    It has the arguments of the command. `cases` has what `of_case` returns, and `memory` what each
    rank told at its end. None stands for what was not measured.
    """
    cases = [of_case(b, p, measured) for p in arguments.prompt for b in arguments.batch]
    return {
        **{name: value for name, value in vars(arguments).items() if name != "run"},
        "family": family,
        "ranks": len(results),
        "machine": platform.platform(),
        "versions": {name: metadata.version(name) for name in ("mlx", "mlx-lm", "mlx-lm-skiphead")},
        "tokens_agree": all(case["tokens_agree"] for case in cases),
        "cases": cases,
        "memory": [r and {"rank": rank, **r} for rank, r in enumerate(results)],
    }


def of_case(batch: int, prompt: int, measured: list[dict[str, Any]]) -> dict[str, Any]:
    """What was measured with one batch size and prompt length.

    Returns:
        ``batch``, ``prompt``, ``tokens``: of each generation. ``tokens_agree``: on all ranks, both
        ways. ``ms_per_token``, ``first_token_ms``: by way, ``median``, ``low``, ``high`` and
        ``values``, one of each round. ``ratio``: the same of plugin / unpatched, and its confidence
        ``interval``. ``tokens_per_second``: by way, of the whole batch.
    """
    mine = [each for each in measured if each["case"] == [batch, prompt]]
    values = {
        name: {way: [e[name] for e in mine if (e["rank"], e["way"]) == (0, way)] for way in WAYS}
        for name in ("ms_per_token", "first_token_ms")
    }
    both = zip(*values["ms_per_token"].values(), strict=False)  # the last round may be half done
    ratios = [plugin / unpatched for unpatched, plugin in both if unpatched]
    ratio = _spread(ratios)
    return {
        "batch": batch,
        "prompt": prompt,
        "tokens": mine[0]["tokens"] if mine else 0,
        "tokens_agree": len({each["digest"] for each in mine}) <= 1,
        **{name: {way: _spread(v) for way, v in ways.items()} for name, ways in values.items()},
        "ratio": ratio and {**ratio, "interval": interval(ratios)},
        "tokens_per_second": {
            way: 1000 * batch / statistics.median(times) if any(times) else None
            for way, times in values["ms_per_token"].items()
        },
    }


def _spread(values: list[float]) -> dict[str, Any] | None:
    if not values:
        return None
    median = statistics.median(values)
    return {"median": median, "low": min(values), "high": max(values), "values": values}


def interval(values: Sequence[float], confidence: float = 0.95) -> dict[str, float]:
    """The confidence interval of the median, for any distribution of the values.

    It is from ``low`` to ``high``, and ``confidence`` is the probability that it holds the median.

    From order statistics: the number of values below the median has a binomial distribution. It is
    the narrowest interval with at least `confidence`. With fewer than 6 values none has 95 %, and
    it is their range.
    """
    count, ordered = len(values), sorted(values)

    def reached(left_out: int) -> float:
        """The confidence without so many values at each end."""
        below = sum(math.comb(count, k) for k in range(left_out + 1))
        return max(0.0, 1 - 2 * below / float(2**count))

    enough = (k for k in range((count + 1) // 2) if reached(k) >= confidence)
    left_out = max(enough, default=0)
    low, high = ordered[left_out], ordered[-1 - left_out]
    return {"low": low, "high": high, "confidence": reached(left_out)}


def report(console: Console, told: dict[str, Any]) -> None:
    """Print what `document` returns."""
    split = f" with {','.join(map(str, told['split']))} layers" if told["split"] else ""
    line = f"{told['model']}: {told['family']}, {told['ranks']} ranks{split}, both ways in turn"
    console.print(line, markup=False)
    cases = [case for case in told["cases"] if case["ratio"]]  # of which a round has ended
    if cases:
        _report_times(console, cases)
    if all(told["memory"]):
        console.print(_ranks_table(told["memory"]))
    elif not cases:
        console.print("Nothing was measured.")
        return
    agree = "[green]Tokens agree[/]: on all ranks, both ways, in every round."
    differ = "[red bold]Tokens differ[/] between ranks or ways. Please report this."
    console.print(agree if told["tokens_agree"] else differ)


def _report_times(console: Console, cases: list[dict[str, Any]]) -> None:
    """Print the tables of times and ratios of `cases`, and how many rounds are behind them."""
    times, speeds = [], []
    interval = "{median:.2f}, {interval[low]:.2f}-{interval[high]:.2f}"
    for case in cases:
        sizes = str(case["batch"]), str(case["prompt"])
        spreads = (_range(case["ms_per_token"][way]) for way in WAYS)
        times.append([*sizes, *spreads, interval.format_map(case["ratio"])])
        first = {way: case["first_token_ms"][way]["median"] for way in WAYS}
        speeds.append([*sizes, both(first), both(case["tokens_per_second"])])
    title = "ms per token: median, lowest-highest; ratio: median, interval"
    console.print(table(title, ("batch", "prompt", *WAYS, "plugin / unpatched"), times))
    title = "ms to the first token, and tokens per second: unpatched → plugin"
    console.print(table(title, ("batch", "prompt", "first token", "tokens/s"), speeds))
    confidence = min(case["ratio"]["interval"]["confidence"] for case in cases)
    rounds = min(len(case["ratio"]["values"]) for case in cases)
    line = "The interval of the ratio has {:.0f} % confidence ({} rounds)."
    console.print(line.format(100 * confidence, rounds))


def _ranks_table(results: Sequence[dict[str, Any]]) -> Table:
    """The memory of each rank, and the heads that it ran for an answer, if there is one."""
    rows = []
    for rank, result in enumerate(results):
        heads = {way: answer["heads_per_token"] for way, answer in result["answers"].items()}
        sizes = (both(result[what], unit=1e6) for what in ("loaded_bytes", "peak_bytes"))
        left = f"{sum(result['on_disk'].values()) / 1e6:.1f}"
        row = [str(rank), role(rank, len(results)), *sizes, left]
        rows.append([*row, both(heads, 2)] if heads else row)
    columns = ["rank", "role", "loaded", "at most", "on disk", "heads/token"]
    title = f"MB in memory and left on disk, a head of {results[0]['head_bytes'] / 1e6:.1f}"
    return table(f"{title}: unpatched → plugin", columns[: len(rows[0])], rows)


def _range(spread: dict[str, Any]) -> str:
    low, high = spread["low"], spread["high"]
    digits = 2 if high < 10 else 1 if high < 100 else 0
    return f"{spread['median']:.{digits}f}, {low:.{digits}f}-{high:.{digits}f}"

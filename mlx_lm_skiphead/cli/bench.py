"""``mlx-lm-skiphead bench MODEL -n N``: measures what the plugin changes on these machines.

One set of ranks runs a model both ways in turn, so that drift of the machine cancels. Each round
gives one ratio, of two generations that ran one after the other. Printed are times, their ratio
with a confidence interval, memory, and whether the tokens agree.

Example: mlx-lm-skiphead bench ./my-model -n 2 --batch 1,8 --prompt 32,512
"""

from __future__ import annotations

import argparse
import itertools
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

from ..config import layers_by_rank
from .ranks import WAYS, RankFailed, launcher, role, running
from .shared import Unusable, at_least, listed
from .tables import both, commas, digits, show, table


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``bench``."""
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
    show(arguments.json, told, report)
    return code


def measure(arguments: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Run the ranks, and return what was measured, as JSON, and the exit code of `run`.

    The JSON has the arguments of the command. Times are in milliseconds on rank 0, memory is in
    bytes. `cases` has what `of_case` returns, and `memory` what each rank told at its end. None
    stands for what was not measured.
    """
    from .models import locate, split

    count = arguments.ranks or _count_hosts(arguments.hostfile)
    if arguments.gpus is not None and len(arguments.gpus) != count:
        raise Unusable(f"--gpus is for {len(arguments.gpus)} ranks, and there are {count}")
    folder = locate(arguments.model)
    arguments.split = arguments.split or layers_by_rank()
    family = split(folder, 0, count, arguments.split).family.name
    given = {name: value for name, value in vars(arguments).items() if name != "run"}
    cases = [(b, p) for p in arguments.prompt for b in arguments.batch]
    task = {name: given[name] for name in ("tokens", "rounds", "text", "gpus", "split")}
    task |= {"model": str(folder), "cases": cases}
    where = arguments.backend, arguments.hostfile, arguments.starting_port
    results: list[Any] = [None] * count
    measured: list[dict[str, Any]] = []
    code = 0
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: ranks are ended
        _listen(launcher(task, count, *where), results, measured)
    except RankFailed as failure:
        print(f"mlx-lm-skiphead {arguments.command}: {failure}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("Stopped; all ranks have been ended.", file=sys.stderr)
        code = 130
    by_case = [of_case(*case, measured) for case in cases]
    told = {
        **given,
        "family": family,
        "ranks": count,
        "machine": platform.platform(),
        "versions": {name: metadata.version(name) for name in ("mlx", "mlx-lm", "mlx-lm-skiphead")},
        "tokens_agree": all(case["tokens_agree"] for case in by_case),
        "cases": by_case,
        "memory": [r and {"rank": rank, **r} for rank, r in enumerate(results)],
    }
    return told, code or int(not told["tokens_agree"])


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
    """Start ranks, and show what they do until all have ended; fill in what they tell."""
    console = Console(stderr=True, highlight=False)
    with running(len(results), command) as events, console.status("starting ranks") as line:
        for event in events:
            if "results" in event:
                results[:] = event["results"]
            elif "measured" in event:
                measured.append(event["measured"])
            else:
                line.update(event["step"])
                if not console.is_terminal:
                    console.print(event["step"])


def of_case(batch: int, prompt: int, measured: list[dict[str, Any]]) -> dict[str, Any]:
    """What was measured with one batch size and prompt length.

    Returns:
        ``batch``, ``prompt``, ``tokens``: of each generation. ``tokens_agree``: on all ranks, both
        ways. ``ms_per_token``, ``first_token_ms``: by way, ``median``, ``low``, ``high`` and
        ``values``, one of each round. ``ratio``: the same of plugin / unpatched, and its confidence
        ``interval``. ``tokens_per_second``: by way, of the whole batch.
    """
    mine = [each for each in measured if each["case"] == [batch, prompt]]

    def values(name: str, way: str) -> list[float]:
        return [each[name] for each in mine if each["way"] == way]

    times = {way: values("ms_per_token", way) for way in WAYS}
    pairs = zip(*times.values(), strict=False)  # the last round may be half done
    ratios = [plugin / unpatched for unpatched, plugin in pairs if unpatched]
    ratio = _spread(ratios)
    return {
        "batch": batch,
        "prompt": prompt,
        "tokens": mine[0]["tokens"] if mine else 0,
        "tokens_agree": len({digest for each in mine for digest in each["digests"]}) <= 1,
        "ms_per_token": {way: _spread(times[way]) for way in WAYS},
        "first_token_ms": {way: _spread(values("first_token_ms", way)) for way in WAYS},
        "ratio": ratio and {**ratio, "interval": interval(ratios)},
        "tokens_per_second": {
            way: 1000 * batch / statistics.median(taken) if any(taken) else None
            for way, taken in times.items()
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
    # By how many values are left out at each end: the orders in which the median is beyond one of
    # them, and the confidence in what remains.
    beyond = itertools.accumulate(math.comb(count, k) for k in range(count // 2 + 1))
    reached = [max(0.0, 1 - 2 * orders / 2**count) for orders in beyond]
    left_out = max((k for k, each in enumerate(reached) if each >= confidence), default=0)
    low, high = ordered[left_out], ordered[-1 - left_out]
    return {"low": low, "high": high, "confidence": reached[left_out]}


def report(console: Console, told: dict[str, Any]) -> None:
    """Print what `measure` returns."""
    split = f" with {commas(told['split'])} layers" if told["split"] else ""
    ranks = f"{told['ranks']} ranks{split}, both ways in turn"
    console.print(f"{told['model']}: {told['family']}, {ranks}")
    cases = [case for case in told["cases"] if case["ratio"]]  # of which a round has ended
    if cases:
        _report_times(console, cases)
    if all(told["memory"]):
        head = digits(told["memory"][0]["head_bytes"] / 1e6)
        title = f"MB in memory and left on disk, a head of {head}: unpatched → plugin"
        console.print(table(title, [_of_rank(rank, told["ranks"]) for rank in told["memory"]]))
    elif not cases:
        console.print("Nothing was measured.")
        return
    agree = "Tokens agree: on all ranks, both ways, in every round."
    differ = "Tokens differ between ranks or ways. Please report this."
    line, style = (agree, "green") if told["tokens_agree"] else (differ, "red bold")
    console.print(line, style=style)


def _report_times(console: Console, cases: list[dict[str, Any]]) -> None:
    """Print the tables of times and ratios of `cases`, and how many rounds are behind them."""
    times, speeds = [], []
    for case in cases:
        sizes = {"batch": str(case["batch"]), "prompt": str(case["prompt"])}
        spreads = {way: _range(case["ms_per_token"][way]) for way in WAYS}
        ratio = _range(case["ratio"] | case["ratio"]["interval"])
        times.append({**sizes, **spreads, "plugin / unpatched": ratio})
        first = both({way: case["first_token_ms"][way]["median"] for way in WAYS})
        speeds.append({**sizes, "first token": first, "tokens/s": both(case["tokens_per_second"])})
    console.print(table("ms per token: median, lowest-highest; ratio: median, interval", times))
    console.print(table("ms to the first token, and tokens per second: unpatched → plugin", speeds))
    confidence = min(case["ratio"]["interval"]["confidence"] for case in cases)
    rounds = min(len(case["ratio"]["values"]) for case in cases)
    line = "The interval of the ratio has {:.0f} % confidence ({} rounds)."
    console.print(line.format(100 * confidence, rounds))


def _range(spread: dict[str, Any]) -> str:
    median, low, high = (digits(spread[name]) for name in ("median", "low", "high"))
    return f"{median}, {low}-{high}"


def _of_rank(result: dict[str, Any], ranks: int) -> dict[str, str]:
    """The row of a rank: its memory, and the heads that it ran for an answer, if there is one."""
    heads = {way: answer["heads_per_token"] for way, answer in result["answers"].items()}
    return {
        "rank": str(result["rank"]),
        "role": role(result["rank"], ranks),
        "loaded": both(result["loaded_bytes"], 1e6),
        "at most": both(result["peak_bytes"], 1e6),
        "on disk": digits(sum(result["on_disk"].values()) / 1e6),
        "heads/token": both(heads) if heads else "",
    }

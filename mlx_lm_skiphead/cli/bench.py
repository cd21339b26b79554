"""``mlx-lm-skiphead bench MODEL -n N``: measures what the plugin changes on these machines.

One set of ranks runs a model both ways in turn, so that drift of the machine cancels. Each round
gives one ratio, of two generations that ran one after the other.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from .arguments import Unusable, at_least, indices, indices_by_rank, positives
from .plan import Link, Plan, plan, token
from .ranks import (
    WAYS,
    RankFailed,
    Ranks,
    host_ranks,
    interrupted_by_sigterm,
    mpi_ranks,
    rank_command,
)
from .tables import both, table

STOPPED = "Stopped; all ranks have been ended."


class Interval(NamedTuple):
    """A confidence interval of a median."""

    low: float
    high: float
    confidence: float
    """The probability that it holds the median, 0 to 1."""


def add_command(commands: Any) -> None:
    """Add ``bench`` to the parser's subcommands."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help="measure a model with and without the plugin, in interleaved rounds",
        description="Runs a model on ranks of this machine, or of a host file, with and without "
        "the plugin in turn. Prints times, their ratio with a confidence interval, memory, and "
        "whether the tokens agree.",
        epilog="example: mlx-lm-skiphead bench ./my-model -n 2 --batch 1,8 --prompt 32,512",
    )
    option, size, sizes = parser.add_argument, at_least(1), positives(int)
    option("model", metavar="MODEL", help="a folder, or a hub repository in the cache")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("-n", dest="ranks", type=size, metavar="N", help="N ranks on this machine")
    where.add_argument(
        "--hostfile", type=Path, metavar="FILE", help="ranks on the machines of an mlx.launch file"
    )
    option(
        "--starting-port",
        type=size,
        default=32323,
        metavar="P",
        help="with --hostfile, the first port that the ranks use (32323)",
    )
    option("--backend", choices=("ring", "mpi"), default="ring", help="of MLX (ring)")
    option("--batch", type=sizes, default=[1], metavar="B,...", help="batch sizes (1)")
    option("--prompt", type=sizes, default=[8], metavar="L,...", help="prompt lengths (8)")
    option(
        "--tokens",
        type=size,
        metavar="N",
        help="tokens of each generation (as many as take 2 s, from 8 to 64)",
    )
    option("--rounds", type=size, default=7, metavar="N", help="6 give 95 %% confidence (7)")
    option(
        "--plan",
        action="store_true",
        help="also measure links and each rank alone, and predict times from that as `plan` does",
    )
    option = parser.add_argument_group("to arrange ranks on this machine").add_argument
    option("--cores", type=indices_by_rank, metavar="C;C;...", help="of each rank, as in '0,1;2,3'")
    option("--gpus", type=indices, metavar="G,G,...", help="CUDA device of each rank, as in 0,1")
    option("--head-passes", type=size, default=1, metavar="K", help="workers run a head K times")
    option("--link-delay", type=size, default=0, metavar="MS", help="added to each message")
    option("--link-rate", type=size, default=0, metavar="MBIT", help="Mbit/s that each rank sends")
    option = parser.add_argument_group("output").add_argument
    option("--plot", type=Path, metavar="FILE.png", help="draw the result (needs matplotlib)")
    option("--json", action="store_true", help="print one JSON document, and nothing else")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        The exit code: 0; 1 if tokens differ or a rank failed; 130 after Ctrl-C, with a report of
        what was measured until then.

    Raises:
        Unusable: for wrong arguments.
    """
    from .models import locate, split

    _check(arguments)
    count = arguments.ranks or _count_hosts(arguments.hostfile)
    for name in ("cores", "gpus"):
        given = getattr(arguments, name)
        if given is not None and len(given) != count:
            raise Unusable(f"--{name} is for {len(given)} ranks, and there are {count}")
    folder = locate(arguments.model)
    family = split(folder, 0, count).family.name
    planned = plan(folder, count, None, arguments.batch) if arguments.plan else None
    ranks = _ranks(arguments, count, folder, planned)
    code = 0
    results: list[Any] = [None] * count
    measured: list[dict[str, Any]] = []
    try:
        with interrupted_by_sigterm():
            listen(ranks, results, measured, Console(stderr=True))
    except RankFailed as failure:
        print(f"mlx-lm-skiphead bench: {failure}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print(STOPPED, file=sys.stderr)
        code = 130
    told = document(arguments, family, results, measured, planned)
    if arguments.json:
        print(json.dumps(told, default=str))  # paths
    else:
        _report(Console(highlight=False), told)
    if arguments.plot is not None and _measured(told):
        from .plot import draw

        draw(told, arguments.plot)
    return code or (0 if told["tokens_agree"] else 1)


def _check(arguments: argparse.Namespace) -> None:
    plot, is_slow = arguments.plot, arguments.link_delay or arguments.link_rate
    if plot is not None and find_spec("matplotlib") is None:
        raise Unusable("--plot needs matplotlib: pip install 'mlx-lm-skiphead[plot]'")
    if plot is not None and not plot.resolve().parent.is_dir():
        raise Unusable(f"there is no folder {plot.resolve().parent} for the plot")
    if is_slow and (arguments.hostfile is not None or arguments.backend == "mpi"):
        raise Unusable("slow links are for a ring on this machine, not for --hostfile or mpi")


def _count_hosts(hostfile: Path) -> int:
    try:
        data = json.loads(hostfile.read_text())
        hosts = data["hosts"] if isinstance(data, dict) else data
        if not isinstance(hosts, list) or len(hosts) < 2:
            raise ValueError("a pipeline needs a list of 2 hosts or more")
    except (OSError, ValueError, KeyError) as error:
        raise Unusable(f"{hostfile} is no host file: {error}") from error
    return len(hosts)


def _ranks(arguments: argparse.Namespace, count: int, folder: Path, planned: Plan | None) -> Ranks:
    task: dict[str, Any] = {
        **{name: getattr(arguments, name) for name in ("tokens", "rounds", "cores", "head_passes")},
        "model": str(folder),
        "cases": [(b, p) for p in arguments.prompt for b in arguments.batch],
    }
    if planned is not None:
        task["plan"] = planned.row * max(arguments.batch)
    backend, gpus = arguments.backend, arguments.gpus
    if arguments.hostfile is not None:
        return host_ranks(arguments.hostfile, count, task, arguments.starting_port, backend)
    if backend == "mpi":
        return mpi_ranks(count, task, gpus)
    delay, rate = arguments.link_delay, arguments.link_rate
    return Ranks(count, rank_command(task), gpus=gpus, link_delay=delay, link_rate=rate)


def listen(
    ranks: Ranks, results: list[Any], measured: list[dict[str, Any]], console: Console
) -> None:
    """Start ranks, and show what they do until all have ended.

    Args:
        ranks: to be started.
        results: by rank, gets what `rank.Measurement.run` returns.
        measured: gets each generation of a round on each rank.
        console: where to show it.
    """
    step = ""
    with ranks, console.status("starting ranks") as line:
        for rank, event in ranks.events():
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
    arguments: argparse.Namespace,
    family: str,
    results: list[Any],
    measured: list[dict[str, Any]],
    planned: Plan | None,
) -> dict[str, Any]:
    """What was measured, as JSON. Times are in milliseconds on rank 0, memory is in bytes.

    It has the arguments of the command. `cases` has what `of_case` returns, and `memory` what each
    rank told at its end. `planned` of a case is what `plan.token` predicts, by way. None stands for
    what was not measured.
    """
    cases = [of_case(b, p, measured) for p in arguments.prompt for b in arguments.batch]
    if planned is not None and all(results):
        latency, rate = results[0]["link"]
        link = Link(rate or math.inf, latency)
        for number, case in enumerate(cases):
            times = [result["times"][number] for result in results]
            case["planned"] = {
                way: token(times, planned.row, link, case["batch"], way).ms for way in WAYS
            }
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
        ``values``, one of each round. ``ratio``: the same of skip / unpatched, and its confidence
        ``interval``. ``tokens_per_second``: by way, of the whole batch. ``planned``: None.
    """
    mine = [each for each in measured if each["case"] == [batch, prompt]]
    values = {
        quantity: {
            way: [each[quantity] for each in mine if (each["rank"], each["way"]) == (0, way)]
            for way in WAYS
        }
        for quantity in ("ms_per_token", "first_token_ms")
    }
    both = zip(*values["ms_per_token"].values(), strict=False)  # the last round may be half done
    ratios = [skip / unpatched for unpatched, skip in both if unpatched]
    ratio, between = _spread(ratios), interval(ratios)
    return {
        "batch": batch,
        "prompt": prompt,
        "tokens": mine[0]["tokens"] if mine else 0,
        "tokens_agree": len({each["digest"] for each in mine}) <= 1,
        **{name: {way: _spread(v) for way, v in ways.items()} for name, ways in values.items()},
        "ratio": ratio and between and {**ratio, "interval": between._asdict()},
        "tokens_per_second": {
            way: 1000 * batch / statistics.median(times) if any(times) else None
            for way, times in values["ms_per_token"].items()
        },
        "planned": None,
    }


def _spread(values: list[float]) -> dict[str, Any] | None:
    if not values:
        return None
    median = statistics.median(values)
    return {"median": median, "low": min(values), "high": max(values), "values": values}


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval | None:
    """The confidence interval of the median, for any distribution of the values.

    From order statistics: the number of values below the median has a binomial distribution. It is
    the narrowest interval with at least `confidence`. With fewer than 6 values none has 95 %, and
    it is their range.
    """
    count = len(values)
    if not count:
        return None
    ordered = sorted(values)

    def reached(left_out: int) -> float:
        """The confidence without so many values at each end."""
        below = sum(math.comb(count, k) for k in range(left_out + 1))
        return max(0.0, 1 - 2 * below / float(2**count))

    left_out = 0
    while left_out + 1 < count / 2 and reached(left_out + 1) >= confidence:
        left_out += 1
    return Interval(ordered[left_out], ordered[-1 - left_out], reached(left_out))


def _measured(told: dict[str, Any]) -> list[dict[str, Any]]:
    """The cases of which a round has ended."""
    return [case for case in told["cases"] if case["ratio"]]


def _report(console: Console, told: dict[str, Any]) -> None:
    console.print(
        f"{told['model']}: {told['family']}, {told['ranks']} ranks, both ways in turn", markup=False
    )
    cases = _measured(told)
    if not cases:
        console.print("Nothing was measured.")
        return
    report_times(console, cases)
    if cases[0]["planned"]:
        latency, rate = told["memory"][0]["link"]
        links = f"{1000 * rate:.4g} Mbit/s and {latency:.2f} ms" if rate else f"{latency:.2f} ms"
        console.print(
            "In brackets: planned, from the layers and the head of each rank alone and from links "
            f"of {links}, as measured here."
        )
    names = ("batch", "prompt", "first token", "tokens/s")
    rows = []
    for case in cases:
        first = {way: case["first_token_ms"][way]["median"] for way in WAYS}
        rows.append([*_sizes(case), both(first), both(case["tokens_per_second"])])
    console.print(
        table("ms to the first token, and tokens per second: unpatched → skip", names, rows)
    )
    if all(told["memory"]):
        console.print(memory_table(told["memory"]))
    if told["tokens_agree"]:
        console.print("[green]Tokens agree[/]: on all ranks, both ways, in every round.")
    else:
        console.print("[red bold]Tokens differ[/] between ranks or ways. Please report this.")


def report_times(console: Console, cases: list[dict[str, Any]]) -> None:
    """Print the table of times and ratios of `cases`, and how many rounds are behind it."""
    rows = []
    for case in cases:
        cells = [_range(case["ms_per_token"][way]) for way in WAYS]
        interval = "{median:.2f}, {interval[low]:.2f}-{interval[high]:.2f}"
        cells.append(interval.format_map(case["ratio"]))
        if planned := case["planned"]:
            times = [f"{planned[way]:.1f}" for way in WAYS]
            times.append(f"{planned['skip'] / planned['unpatched']:.2f}")
            cells = [f"{cell} ({time})" for cell, time in zip(cells, times, strict=True)]
        rows.append([*_sizes(case), *cells])
    title = "ms per token: median, lowest-highest; ratio: median, interval"
    console.print(table(title, ("batch", "prompt", *WAYS, "skip / unpatched"), rows))
    confidence = min(case["ratio"]["interval"]["confidence"] for case in cases)
    rounds = min(len(case["ratio"]["values"]) for case in cases)
    console.print(
        f"The interval of the ratio has {100 * confidence:.0f} % confidence ({rounds} rounds)."
    )


def memory_table(results: Sequence[dict[str, Any]]) -> Table:
    """The memory of each rank, from the results of all ranks."""
    rows = []
    for rank, result in enumerate(results):
        sizes = (both(result[what], unit=1e6) for what in ("loaded_bytes", "peak_bytes"))
        rows.append([str(rank), *sizes, f"{sum(result['on_disk'].values()) / 1e6:.1f}"])
    title = "MB in memory: unpatched → plugin"
    return table(title, ("rank", "after loading", "at most", "left on disk"), rows)


def _sizes(case: dict[str, Any]) -> tuple[str, str]:
    return str(case["batch"]), str(case["prompt"])


def _range(spread: dict[str, Any]) -> str:
    low, high = spread["low"], spread["high"]
    digits = 2 if high < 10 else 1 if high < 100 else 0
    return f"{spread['median']:.{digits}f}, {low:.{digits}f}-{high:.{digits}f}"

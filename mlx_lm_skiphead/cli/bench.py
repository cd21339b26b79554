"""``mlx-lm-skiphead bench MODEL -n N``: what the plugin changes here, measured.

One set of ranks runs both ways in turn, so that drift of the machine cancels; each round gives one
ratio of a pair that ran one after the other.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from .arguments import backend, cores, gpus, positive, positives
from .plan import Link, Plan, plan, token
from .ranks import (
    WAYS,
    HostRanks,
    RankFailed,
    interrupted_by_sigterm,
    local_ranks,
    rank_command,
)

QUANTITIES = ("ms_per_token", "first_token_ms")


class Interval(NamedTuple):
    """A confidence interval of a median."""

    low: float
    high: float
    confidence: float
    """How likely it holds the median, 0 to 1."""


class Case:
    """What was measured of one batch size and prompt length; lists have a value a round."""

    def __init__(self, batch: int, prompt: int) -> None:
        self.batch = batch
        self.prompt = prompt
        self.values: dict[str, dict[str, list[float]]] = {
            quantity: {way: [] for way in WAYS} for quantity in QUANTITIES
        }
        self.tokens = 0
        """How many were generated each time, of each of the batch."""
        self.digests: set[str] = set()

    def ratios(self) -> list[float]:
        """Skip / unpatched, of each finished round."""
        times = self.values["ms_per_token"]
        both = zip(times["unpatched"], times["skip"], strict=False)
        return [skip / unpatched for unpatched, skip in both if unpatched]


def add_command(commands: Any) -> None:
    """Add ``bench`` to the parser's subcommands."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help="measure a model with and without the plugin, in interleaved rounds",
        description="Runs a model on ranks of this machine, or of a host file, with and without "
        "the plugin in turn, and prints times, their ratio with a confidence interval, memory, "
        "and whether the tokens agree.",
        epilog="example: mlx-lm-skiphead bench ./my-model -n 2 --batch 1,8 --prompt 32,512",
    )
    parser.add_argument("model", metavar="MODEL", help="a folder, or a hub repository in the cache")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "-n", dest="ranks", type=positive, metavar="RANKS", help="so many ranks on this machine"
    )
    where.add_argument(
        "--hostfile", type=Path, metavar="HOSTS", help="ranks on these machines, see mlx.launch"
    )
    parser.add_argument(
        "--starting-port",
        type=positive,
        default=32323,
        metavar="P",
        help="with --hostfile, ports from this one on (32323, as mlx.launch)",
    )
    parser.add_argument(
        "--batch", type=positives(int), default=[1], metavar="B,...", help="batch sizes (1)"
    )
    parser.add_argument(
        "--prompt", type=positives(int), default=[8], metavar="L,...", help="prompt lengths (8)"
    )
    parser.add_argument(
        "--tokens",
        type=positive,
        metavar="N",
        help="tokens to generate each time (as many as take about 2 s, from 8 to 64)",
    )
    parser.add_argument(
        "--rounds",
        type=positive,
        default=7,
        metavar="N",
        help="rounds; 6 or more for 95 %% confidence (7)",
    )
    parser.add_argument(
        "--cores",
        type=cores,
        metavar="C;C;...",
        help="cores of this machine for each rank, as in '0;1' or '0,1;2,3' (Linux)",
    )
    parser.add_argument(
        "--gpus",
        type=gpus,
        metavar="G,G,...",
        help="CUDA device of this machine for each rank, as in 0,1 (all ranks: the first)",
    )
    parser.add_argument(
        "--head-passes",
        type=positive,
        default=1,
        metavar="K",
        help="workers compute each head K times, which stands for machines slower at it (1)",
    )
    parser.add_argument(
        "--link-delay",
        type=positive,
        default=0,
        metavar="MS",
        help="with -n, what ranks send each other takes so much longer, as on slow links (0)",
    )
    parser.add_argument(
        "--backend", type=backend, default="ring", metavar="B", help="of MLX: ring or mpi (ring)"
    )
    parser.add_argument(
        "--link-rate",
        type=positive,
        default=0,
        metavar="MBIT",
        help="with -n, Mbit/s that each rank can send its neighbours (as fast as it goes)",
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="also measure links and each rank alone, and print what `plan` makes of that",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw it (needs matplotlib)")
    parser.add_argument("--json", action="store_true", help="one JSON document, and nothing else")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Exit code: 0, 1 if tokens differ or a rank failed, 2 if it cannot be run so, 130 after Ctrl-C
    (with what had been measured until then)."""
    from .models import Unusable, locate, split

    try:
        if arguments.plot is not None:
            _check_plot(arguments.plot)
        slow = arguments.link_delay or arguments.link_rate
        if slow and (arguments.hostfile is not None or arguments.backend == "mpi"):
            raise Unusable("slow links are for a ring on this machine, not for --hostfile or mpi")
        count = arguments.ranks or _count_hosts(arguments.hostfile)
        for name in ("cores", "gpus"):
            given = getattr(arguments, name)
            if given is not None and len(given) != count:
                raise Unusable(f"--{name} is for {len(given)} ranks, and there are {count}")
        folder = locate(arguments.model)
        family = split(folder, 0, count).family.name
        planned = plan(folder, count, None, arguments.batch) if arguments.plan else None
    except Unusable as error:
        print(f"mlx-lm-skiphead bench: {error}", file=sys.stderr)
        return 2
    cases = [Case(b, p) for p in arguments.prompt for b in arguments.batch]
    task = {
        "model": str(folder),
        "cases": [(case.batch, case.prompt) for case in cases],
        "tokens": arguments.tokens,
        "rounds": arguments.rounds,
        "cores": arguments.cores,
        "head_passes": arguments.head_passes,
        "plan": planned.row * max(arguments.batch) if planned else 0,
    }
    ranks = (
        local_ranks(
            count,
            rank_command(task),
            plugin=True,
            backend=arguments.backend,
            gpus=arguments.gpus,
            link_delay=arguments.link_delay,
            link_rate=arguments.link_rate,
        )
        if arguments.hostfile is None
        else HostRanks(arguments.hostfile, count, task, arguments.starting_port, arguments.backend)
    )
    code, results = 0, [None] * count
    progress = Console(stderr=True)
    step = ""
    try:
        with interrupted_by_sigterm(), ranks, progress.status("starting ranks") as line:
            for rank, event in ranks.events():
                if "result" in event:
                    results[rank] = event["result"]
                elif "measured" in event:
                    _take(cases, rank, event["measured"])
                elif rank == 0 and event["step"] != step:
                    step = event["step"]
                    line.update(step)
                    if not progress.is_terminal:
                        progress.print(step, highlight=False)
    except RankFailed as failure:
        print(f"mlx-lm-skiphead bench: {failure}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("Stopped; all ranks have been ended.", file=sys.stderr)
        code = 130
    told = document(arguments, family, cases, results, planned)
    if arguments.json:
        print(json.dumps(told))
    else:
        _report(Console(), told)
    if any(case["ratio"] for case in told["cases"]) and arguments.plot is not None:
        from .plot import draw

        draw(told, arguments.plot)
    return code or (0 if told["tokens_agree"] else 1)


def _take(cases: list[Case], rank: int, measured: dict[str, Any]) -> None:
    (case,) = (c for c in cases if [c.batch, c.prompt] == measured["case"])
    case.digests.add(measured["digest"])
    case.tokens = measured["tokens"]
    if rank == 0:
        for quantity in QUANTITIES:
            case.values[quantity][measured["way"]].append(measured[quantity])


def document(
    arguments: argparse.Namespace,
    family: str,
    cases: list[Case],
    results: list[Any],
    planned: Plan | None = None,
) -> dict[str, Any]:
    """What was measured, as JSON: times in milliseconds on rank 0, memory in bytes.

    Each quantity has a ``median``, ``low``, ``high`` and all ``values``, one a round; the
    ``ratio`` (skip / unpatched, of each round) its confidence ``interval``. `None` stands for what
    was not measured before the end. With `planned`, `plan` has what was measured for it, and each
    case what `plan.token` makes of that.
    """
    link = None
    if planned is not None and all(results):
        latency, rate = results[0]["link"]
        link = Link(rate or math.inf, latency)
    return {
        "model": arguments.model,
        "family": family,
        "ranks": len(results),
        "rounds": arguments.rounds,
        "head_passes": arguments.head_passes,
        "cores": arguments.cores,
        "gpus": arguments.gpus,
        "link_delay_ms": arguments.link_delay,
        "backend": arguments.backend,
        "link_rate_mbit": arguments.link_rate,
        "machine": platform.platform(),
        "versions": {name: metadata.version(name) for name in ("mlx", "mlx-lm", "mlx-lm-skiphead")},
        "tokens_agree": all(len(case.digests) <= 1 for case in cases),
        "cases": [
            {
                "batch": case.batch,
                "prompt": case.prompt,
                "tokens": case.tokens,
                **{
                    quantity: {
                        way: _spread(values) for way, values in case.values[quantity].items()
                    }
                    for quantity in QUANTITIES
                },
                "tokens_per_second": {
                    way: 1000 * case.batch / statistics.median(values) if any(values) else None
                    for way, values in case.values["ms_per_token"].items()
                },
                "ratio": _spread(case.ratios(), interval(case.ratios())),
                "planned": None
                if planned is None or link is None
                else {
                    way: token(
                        [result["times"][number] for result in results],
                        planned.row,
                        link,
                        case.batch,
                        way,
                    ).ms
                    for way in WAYS
                },
            }
            for number, case in enumerate(cases)
        ],
        "memory": [
            None if result is None else {"rank": rank, **result}
            for rank, result in enumerate(results)
        ],
    }


def _spread(values: list[float], between: Interval | None = None) -> dict[str, Any] | None:
    if not values:
        return None
    told: dict[str, Any] = {
        "median": statistics.median(values),
        "low": min(values),
        "high": max(values),
        "values": values,
    }
    return told if between is None else {**told, "interval": between._asdict()}


def interval(values: list[float], confidence: float = 0.95) -> Interval | None:
    """The confidence interval of the median, whatever the values' distribution.

    From order statistics: as many values are below the median as heads among as many coins. The
    narrowest that reaches `confidence`; with fewer than 6 values none does, and it is their range.
    """
    count = len(values)
    if not count:
        return None
    ordered = sorted(values)

    def reached(left_out: int) -> float:
        tail = sum(math.comb(count, k) for k in range(left_out + 1)) / float(2**count)
        return 1 - 2 * tail

    narrowest = 0
    while narrowest + 1 < count / 2 and reached(narrowest + 1) >= confidence:
        narrowest += 1
    return Interval(ordered[narrowest], ordered[-1 - narrowest], max(0.0, reached(narrowest)))


def _report(console: Console, told: dict[str, Any]) -> None:
    console.print(
        f"{told['model']}: {told['family']}, {told['ranks']} ranks, both ways in turn",
        markup=False,
        highlight=False,
    )
    if not any(case["ratio"] for case in told["cases"]):
        console.print("Nothing was measured.")
        return
    table = Table(title="ms per token: median, lowest to highest; and its ratio")
    for column in ("batch", "prompt", "unpatched", "skip", "skip / unpatched"):
        table.add_column(column, justify="right")
    speed = Table(title="ms to the first token, and tokens per second: unpatched → skip")
    for column in ("batch", "prompt", "first token", "tokens/s"):
        speed.add_column(column, justify="right")
    for case in told["cases"]:
        if case["ratio"] is None:
            continue
        names = str(case["batch"]), str(case["prompt"])
        times, first, rate = (
            case[key] for key in ("ms_per_token", "first_token_ms", "tokens_per_second")
        )
        between = case["ratio"]["interval"]
        table.add_row(
            *names,
            *(_range(times[way]) for way in WAYS),
            f"{case['ratio']['median']:.2f}, {between['low']:.2f}-{between['high']:.2f}",
        )
        speed.add_row(
            *names,
            " → ".join(f"{first[way]['median']:.1f}" for way in WAYS),
            " → ".join(f"{rate[way]:.1f}" for way in WAYS),
        )
    console.print(table, highlight=False)
    confidence = min(c["ratio"]["interval"]["confidence"] for c in told["cases"] if c["ratio"])
    rounds = min(len(c["ratio"]["values"]) for c in told["cases"] if c["ratio"])
    console.print(
        f"Behind the ratio: where its median over {rounds} rounds lies with "
        f"{100 * confidence:.0f} % confidence.",
        highlight=False,
    )
    console.print(speed, highlight=False)
    if all(case["planned"] for case in told["cases"]):
        console.print(_planned(told), highlight=False)
    if all(told["memory"]):
        console.print(_memory(told["memory"]), highlight=False)
    if told["tokens_agree"]:
        console.print("[green]Tokens agree[/]: on all ranks, both ways, in every round.")
    else:
        console.print("[red bold]Tokens differ[/] between ranks or ways. Please report this.")


def _planned(told: dict[str, Any]) -> Table:
    latency, rate = told["memory"][0]["link"]
    mbit = f"{1000 * rate:.4g}" if rate else "any"
    table = Table(
        title="ms per token, as planned and as measured: the plan by each rank's layers and head "
        f"alone and by links, as measured here ({mbit} Mbit/s, {latency:.2f} ms)"
    )
    for column in ("batch", "prompt", "unpatched", "skip", "skip / unpatched"):
        table.add_column(column, justify="right")
    for case in told["cases"]:
        times = [(case["planned"][way], case["ms_per_token"][way]["median"]) for way in WAYS]
        ratio = case["planned"]["skip"] / case["planned"]["unpatched"]
        table.add_row(
            str(case["batch"]),
            str(case["prompt"]),
            *(f"{planned:.2f}, {measured:.2f}" for planned, measured in times),
            f"{ratio:.2f}, {case['ratio']['median']:.2f}",
        )
    return table


def _range(spread: dict[str, Any]) -> str:
    low, high = spread["low"], spread["high"]
    digits = 2 if high < 10 else 1 if high < 100 else 0
    return f"{spread['median']:.{digits}f}, {low:.{digits}f}-{high:.{digits}f}"


def _memory(memory: list[dict[str, Any]]) -> Table:
    table = Table(title="MB in memory: unpatched → plugin")
    for column in ("rank", "after loading", "at most", "left on disk"):
        table.add_column(column, justify="right")
    for rank in memory:
        table.add_row(
            str(rank["rank"]),
            *(
                " → ".join(f"{rank[what][way] / 1e6:.1f}" for way in WAYS)
                for what in ("loaded_bytes", "peak_bytes")
            ),
            f"{sum(rank['on_disk'].values()) / 1e6:.1f}",
        )
    return table


def _count_hosts(hostfile: Path) -> int:
    from .models import Unusable

    try:
        data = json.loads(hostfile.read_text())
        hosts = data["hosts"] if isinstance(data, dict) else data
        if not isinstance(hosts, list) or len(hosts) < 2:
            raise ValueError("a pipeline needs a list of 2 hosts or more")
    except (OSError, ValueError, KeyError) as error:
        raise Unusable(f"{hostfile} is no host file: {error}") from error
    return len(hosts)


def _check_plot(file: Path) -> None:
    from importlib.util import find_spec

    from .models import Unusable

    if find_spec("matplotlib") is None:
        raise Unusable("--plot needs matplotlib: pip install 'mlx-lm-skiphead[plot]'")
    if not file.resolve().parent.is_dir():
        raise Unusable(f"there is no folder {file.resolve().parent} for the plot")

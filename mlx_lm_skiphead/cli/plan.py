"""``mlx-lm-skiphead plan MODEL -n N``: predicts memory, downloads and time from headers alone.

For each rank it prints layers, the memory of its weights without the plugin and with it, downloads,
and how much a token reads. It loads no weights and starts no rank. With the memory bandwidths of
the ranks' machines, their links, or both, it also prints the time of a token; with their memory and
a context, what fits. With bandwidths or memories it finds the best split and order of machines, for
the first batch size. `sizes` has what a rank has, `formula` the time of a token, and `splits` the
search.

Example: mlx-lm-skiphead plan ./my-model -n 3 --bandwidth 800,400,120 --link 1,0.1 --batch 1,8,32
--memory 512,128,128 --context 32768
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from . import downloads
from .formula import Link, token
from .ranks import WAYS
from .shared import Unusable, above_0, at_least, both, listed, new_command, table

if TYPE_CHECKING:
    from .sizes import Plan
    from .splits import Machine, Search


def add_command(commands: Any) -> None:
    """Add ``plan`` to the parser's subcommands."""
    summary = "predict what each rank holds and what the plugin saves"
    parser = new_command(commands, run, __doc__, summary)
    option, sizes, numbers = parser.add_argument, listed(at_least(1)), listed(above_0)
    option("model", metavar="MODEL", help="a folder, or a hub repository in the cache")
    option("-n", dest="ranks", type=at_least(2), required=True, metavar="N", help="ranks")
    option("--split", type=sizes, metavar="A,...", help="layers of each rank, rank 0 first (even)")
    option("--bandwidth", type=numbers, metavar="GB/S,...", help="memory bandwidth of each rank")
    option("--memory", type=numbers, metavar="GB,...", help="for weights and caches of each rank")
    count = at_least(0)
    option("--context", type=count, default=0, metavar="N", help="tokens in each prompt cache (0)")
    option("--link", type=numbers, metavar="GBIT/S[,MS]", help="rate and latency of each link")
    option("--batch", type=sizes, default=[1], metavar="B,...", help="batch sizes (1)")
    option("--fetch-headers", action="store_true", help="get the headers of MODEL from the hub")
    option("--json", action="store_true", help="print one JSON document, and nothing else")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; its exit code is 0.

    Raises:
        Unusable: if the model cannot be split in this way.
    """
    from .models import locate
    from .sizes import layers, plan
    from .splits import Machine, search

    ranks, link = arguments.ranks, arguments.link
    for name in ("bandwidth", "memory"):
        given = getattr(arguments, name)
        if given is not None and len(given) != ranks:
            raise Unusable(f"--{name} has {len(given)} values for {ranks} ranks")
    if link is not None and len(link) > 2:
        raise Unusable("--link is a rate in Gbit/s and a latency in ms, no more")
    with tempfile.TemporaryDirectory() as name:
        if arguments.fetch_headers:
            downloads.fetch_headers(arguments.model, Path(name))
        folder = Path(name) if arguments.fetch_headers else locate(arguments.model)
        case = arguments.batch, arguments.context
        planned = plan(folder, ranks, arguments.split, *case)
        unknown = [None] * ranks
        bandwidths, memories = arguments.bandwidth or unknown, arguments.memory or unknown
        machines = [Machine(*each) for each in zip(bandwidths, memories, strict=True)]
        is_known = bool(arguments.bandwidth or arguments.memory)
        look = search(planned, layers(folder, *case), machines, case[0][0]) if is_known else None
    told = document(planned, machines, link and Link(*link), arguments.batch, look)
    told = {"model": arguments.model, "context": arguments.context, **told}
    if arguments.json:
        print(json.dumps(told))
    else:
        _report(Console(highlight=False), told)
    return 0


def reading_times(
    planned: Plan, machines: Sequence[Machine], batch: int
) -> list[tuple[float, float]]:
    """The ms in which each rank reads its layers and its head; 0 without a bandwidth."""
    ranks = zip(planned.ranks, machines, strict=True)
    return [(m.ms(rank.reads_bytes[batch]), m.ms(rank.head_bytes)) for rank, m in ranks]


def document(
    planned: Plan,
    machines: Sequence[Machine],
    link: Link | None,
    batches: Sequence[int],
    look: Search | None,
) -> dict[str, Any]:
    """The plan as JSON: sizes in bytes, times in milliseconds, `ranks` in order of rank.

    `tokens` has one entry for each batch size. Without bandwidths its `stages` and `head` are 0. It
    is empty without bandwidths and links. `splits` and `limits` are what `compare` returns, with
    the links in the times; they are empty without bandwidths and memories.
    """
    links, files = link or Link(), [rank.downloads for rank in planned.ranks]
    tokens: list[dict[str, Any]] = []
    for batch in batches if link or machines[0].bandwidth else ():
        times = reading_times(planned, machines, batch)
        ways = {way: token(times, planned.row, links, batch, way) for way in WAYS}
        parts = {way: {**taken._asdict(), "ms": taken.ms} for way, taken in ways.items()}
        saved = ways["unpatched"].ms - ways["plugin"].ms
        tokens.append({"batch": batch, **parts, "saved_ms": saved})
    ranks = [
        {
            **rank._asdict(),
            **machine._asdict(),
            "fits": {
                way: machine.holds(m + rank.cache_bytes) for way, m in rank.memory_bytes.items()
            },
        }
        for rank, machine in zip(planned.ranks, machines, strict=True)
    ]
    from .splits import compare

    splits, limits = compare(look, [rank.layers for rank in planned.ranks]) if look else ([], [])
    unread = [(0.0, 0.0)] * len(machines)
    between = token(unread, planned.row, links, batches[0], "plugin").links
    return {
        "family": planned.family,
        "head_bytes": planned.ranks[0].head_bytes,
        "hidden_bytes_per_token": planned.row,
        "link": link and link._asdict(),
        "ranks": ranks,
        "tokens": tokens,
        "download_bytes": {c: downloads.total(files, c) for c in downloads.CHOICES},
        "takes_split": look is None or len(look.stages[0]) > 1,
        "splits": [{**way._asdict(), "ms": way.ms + between} for way in splits],
        "limits": limits,
    }


def _report(console: Console, told: dict[str, Any]) -> None:
    head = _mb(told["head_bytes"])
    console.print(f"{told['model']}: {told['family']}, a head of {head} MB", markup=False)
    unknown = [] if told["context"] else ["cache"]
    unknown += [] if told["ranks"][0]["memory"] else ["fits"]
    rows = []
    for rank in told["ranks"]:
        fits, reads, its_head = rank["fits"], rank["reads_bytes"][1], rank["head_bytes"]
        read = {"unpatched": reads + its_head, "plugin": reads + (0 if rank["rank"] else its_head)}
        sizes = (sum(files.values()) for files in rank["downloads"].values())
        fetched = dict(zip(WAYS, sizes, strict=True))
        row = {
            "rank": str(rank["rank"]),
            "role": rank["role"],
            "layers": f"{rank['layers'][0]}-{rank['layers'][1] - 1}",
            **{way: _mb(rank["memory_bytes"][way]) for way in WAYS},
            "cache": _mb(rank["cache_bytes"]),
            "read": both(read, unit=1e6),
            "download": both(fetched, unit=1e6),
            "fits": "yes" if fits["unpatched"] else "plugin" if fits["plugin"] else "no",
        }
        rows.append({name: cell for name, cell in row.items() if name not in unknown})
    title = "MB of weights: in memory, read for a token, downloaded (all → needed)"
    console.print(table(title, list(rows[0]), [list(row.values()) for row in rows]))
    console.print(downloads.summary([rank["downloads"] for rank in told["ranks"]]))
    if told["tokens"]:
        console.print(_times_table(told))
    if told["splits"]:
        console.print(_splits_table(told["splits"], bool(told["ranks"][0]["bandwidth"])))
    console.print("\n".join(_verdict(told)), soft_wrap=True)  # there is a command among it


def _times_table(told: dict[str, Any]) -> Table:
    """The parts of the time of a token that are known."""
    has_bandwidths = told["ranks"][0]["bandwidth"] is not None
    parts = ["stages", "head"] if has_bandwidths else []
    parts += (["links"] if told["link"] else []) + (["ms"] if has_bandwidths else [])
    rows = []
    for case in told["tokens"]:
        before, after = (case[way] for way in WAYS)
        ratio = f"{after['ms'] / before['ms']:.2f}" if has_bandwidths else _ms(case["saved_ms"])
        times = (f"{_ms(before[part])} → {_ms(after[part])}" for part in parts)
        rows.append([str(case["batch"]), *times, ratio])
    columns = ["batch", *parts, "ratio" if has_bandwidths else "saved"]
    return table("ms per token: unpatched → plugin", columns, rows)


def _splits_table(ways: Sequence[dict[str, Any]], has_bandwidths: bool) -> Table:
    rows = [
        [
            ",".join(map(str, way["machines"])),
            ",".join(map(str, way["layers"])),
            ", ".join(f"{size / 1e9:,.1f}" for size in way["memory_bytes"]),
            "yes" if way["fits"] else "no",
            *([_ms(way["ms"])] if has_bandwidths else []),
        ]
        for way in ways
    ]
    columns = ["machines", "layers", "GB", "fits", *(["ms per token"] if has_bandwidths else [])]
    return table("rank 0 first, with the plugin; the last row is the best", columns, rows)


def _splits_verdict(told: dict[str, Any]) -> Iterator[str]:
    given, best = told["splits"][0], told["splits"][-1]
    if not told["takes_split"]:
        yield f"This mlx-lm splits {told['family']} evenly only."
    if not best["fits"]:
        yield "No split fits into the memory of these machines."
        return
    if best is given:
        yield "No other split is better, nor another order of the machines."
    else:
        order, layers = (",".join(map(str, best[name])) for name in ("machines", "layers"))
        split = f" --split {layers}" if told["takes_split"] else ""
        yield f"The best, with the machines {order} in that order in hosts.json:"
        run = f"python -m mlx_lm_skiphead run{split} mlx_lm.server --pipeline --model ..."
        yield f"mlx.launch --hostfile hosts.json -- {run}"
    limits = " and of ".join(map(str, told["limits"]))
    limit = f"Its limit is the memory of machine {limits}" if limits else "No memory limits it"
    yield f"{limit}; machines are counted from 0."


def _verdict(told: dict[str, Any]) -> Iterator[str]:
    for rank in told["ranks"]:
        if not rank["fits"]["unpatched"]:
            way = "with the plugin only" if rank["fits"]["plugin"] else "neither way"
            yield f"Rank {rank['rank']}'s part fits {way}."
    if told["splits"]:
        yield from _splits_verdict(told)
    if not told["tokens"]:
        yield "The time that this saves depends on the machines: see --bandwidth and --link."
        yield "Equal machines on fast links save memory, but no time."
        return
    case = max(told["tokens"], key=lambda case: abs(case["saved_ms"]))
    saved, links = case["saved_ms"], case["unpatched"]["links"] - case["plugin"]["links"]
    less = "less" if saved > 0 else "more"
    line = f"With a batch of {case['batch']} expect {_ms(abs(saved))} ms {less} per token"
    line += f"; links take {_ms(links)} ms less." if told["link"] else "."
    yield line if abs(saved) >= 0.005 else "The plugin saves memory, but no time."
    if told["ranks"][0]["bandwidth"] is None:
        yield "This is for equal machines."
    yield "Times are of links and of reading weights, without arithmetic. Ranks that share a GPU"
    yield "save more. `mlx-lm-skiphead bench` measures."


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f}"


def _ms(time: float) -> str:
    return f"{time:.2f}" if abs(time) < 10 else f"{time:.1f}"

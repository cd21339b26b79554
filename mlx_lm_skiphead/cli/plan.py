"""``mlx-lm-skiphead plan MODEL -n N``: predicts memory, downloads and time from headers alone.

For each rank it prints layers, the memory of its weights without the plugin and with it, downloads,
and how much a token reads. It loads no weights and starts no rank. With the memory bandwidths of
the ranks' machines, their links, or both, it also prints the time of a token; with their memory and
a context, what fits. With bandwidths or memories it finds the best split and order of machines, for
the first batch size.

Example: mlx-lm-skiphead plan ./my-model -n 3 --bandwidth 800,400,120 --link 1,0.1 --batch 1,8,32
--memory 512,128,128 --context 32768
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from . import downloads
from .formula import Link, token
from .ranks import WAYS
from .shared import Unusable, above_0, at_least, listed
from .tables import both, commas, digits, show, table


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``plan``."""
    option, sizes, numbers = parser.add_argument, listed(at_least(1)), listed(above_0)
    option("model", metavar="MODEL", help="a folder, or a hub repository in the cache")
    option("-n", dest="ranks", type=at_least(2), required=True, metavar="N", help="ranks")
    option("--split", type=sizes, metavar="A,...", help="layers of each rank, rank 0 first (even)")
    option("--bandwidth", type=numbers, metavar="GB/S,...", help="memory bandwidth of each rank")
    option("--memory", type=numbers, metavar="GB,...", help="for weights and caches of each rank")
    option("--context", type=at_least(0), default=0, metavar="N", help="tokens in each cache (0)")
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

    for name in ("bandwidth", "memory"):
        given = getattr(arguments, name)
        if given is not None and len(given) != arguments.ranks:
            raise Unusable(f"--{name} has {len(given)} values for {arguments.ranks} ranks")
    if arguments.link is not None and len(arguments.link) > 2:
        raise Unusable("--link is a rate in Gbit/s and a latency in ms, no more")
    with tempfile.TemporaryDirectory() as headers:
        if arguments.fetch_headers:
            downloads.fetch_headers(arguments.model, Path(headers))
        folder = Path(headers) if arguments.fetch_headers else locate(arguments.model)
        told = document(arguments, folder)
    show(arguments.json, told, _report)
    return 0


def document(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The plan as JSON: sizes in bytes, times in milliseconds, `ranks` in order of rank.

    `tokens` has one entry for each batch size. Without bandwidths its `stages` and `head` are 0. It
    is empty without bandwidths and links. `splits` and `limits` are what `splits.compare` returns,
    with the links in the times, which are 0 without bandwidths; `takes_split` is whether mlx-lm
    splits this family unevenly. Without bandwidths and memories these are empty or missing.
    """
    from .sizes import layers, plan
    from .splits import Machine, compare, search

    batches, unknown = arguments.batch, [None] * arguments.ranks
    planned = plan(folder, arguments.ranks, arguments.split, batches, arguments.context)
    given = arguments.bandwidth or unknown, arguments.memory or unknown
    machines = [Machine(*each) for each in zip(*given, strict=True)]
    placed = list(zip(planned.ranks, machines, strict=True))
    ranks: list[dict[str, Any]] = []
    for rank, machine in placed:
        needs = {way: size + rank.cache_bytes for way, size in rank.memory_bytes.items()}
        fits = {way: machine.holds(size) for way, size in needs.items()}
        ranks.append({**rank._asdict(), **machine._asdict(), "fits": fits})
    tokens: list[dict[str, Any]] = []
    for batch in batches if arguments.link or arguments.bandwidth else ():
        times = [(m.ms(rank.reads_bytes[batch]), m.ms(rank.head_bytes)) for rank, m in placed]
        link = Link(*arguments.link or ())
        ways = {way: token(times, planned.row, link, batch, way) for way in WAYS}
        parts = {way: {**taken._asdict(), "ms": taken.ms} for way, taken in ways.items()}
        saved = ways["unpatched"].ms - ways["plugin"].ms
        tokens.append({"batch": batch, **parts, "saved_ms": saved})
    told = {
        "model": arguments.model,
        "family": planned.family,
        "head_bytes": planned.ranks[0].head_bytes,
        "ranks": ranks,
        "tokens": tokens,
        "splits": [],
        "limits": [],
    }
    if arguments.bandwidth or arguments.memory:
        every = layers(folder, batches, arguments.context)
        look = search(planned, every, machines, batches[0])
        found, told["limits"] = compare(look, [rank.layers for rank in planned.ranks])
        # Links take as long with every split.
        links = tokens[0]["plugin"]["links"] if arguments.bandwidth else 0.0
        told["splits"] = [{**way._asdict(), "ms": way.ms + links} for way in found]
        told["takes_split"] = bool(every.stages)
    return told


def _report(console: Console, told: dict[str, Any]) -> None:
    head = digits(told["head_bytes"] / 1e6)
    console.print(f"{told['model']}: {told['family']}, a head of {head} MB")
    title = "MB of weights: in memory, read for a token, downloaded (all → needed)"
    console.print(table(title, [_of_rank(rank) for rank in told["ranks"]]))
    console.print(downloads.summary([rank["downloads"] for rank in told["ranks"]]))
    if told["tokens"]:
        title = "ms per token: unpatched → plugin"
        console.print(table(title, [_of_token(case) for case in told["tokens"]]))
    if told["splits"]:
        title = "rank 0 first, with the plugin; the last row is the best"
        console.print(table(title, [_of_split(way) for way in told["splits"]]))
    console.print("\n".join(_verdict(told)), soft_wrap=True)  # there is a command among it


def _of_rank(rank: dict[str, Any]) -> dict[str, str]:
    """A rank's row."""
    reads, head, caches = rank["reads_bytes"][1], rank["head_bytes"], rank["cache_bytes"]
    read = {"unpatched": reads + head, "plugin": reads + (0 if rank["rank"] else head)}
    files = (sum(files.values()) for files in rank["downloads"].values())
    fits = "yes" if rank["fits"]["unpatched"] else "plugin" if rank["fits"]["plugin"] else "no"
    return {
        "rank": str(rank["rank"]),
        "role": rank["role"],
        "layers": f"{rank['layers'][0]}-{rank['layers'][1] - 1}",
        **{way: digits(rank["memory_bytes"][way] / 1e6) for way in WAYS},
        "cache": digits(caches / 1e6) if caches else "",
        "read": both(read, 1e6),
        "download": both(dict(zip(WAYS, files, strict=True)), 1e6),
        "fits": fits if rank["memory"] else "",
    }


def _of_token(case: dict[str, Any]) -> dict[str, str]:
    """A batch size's row, with the parts of the time of a token that are known."""
    before, after = (case[way] for way in WAYS)
    parts = {
        part: both({way: case[way][part] for way in WAYS}) if time else ""
        for part, time in before.items()
    }
    saved = digits(case["saved_ms"])
    ratio = digits(after["ms"] / before["ms"]) if before["stages"] else ""
    return {"batch": str(case["batch"]), **parts, "saved": saved, "ratio": ratio}


def _of_split(way: dict[str, Any]) -> dict[str, str]:
    """The row of a way to run the model."""
    return {
        "machines": commas(way["machines"]),
        "layers": commas(way["layers"]),
        "GB": ", ".join(f"{size / 1e9:,.1f}" for size in way["memory_bytes"]),
        "fits": "yes" if way["fits"] else "no",
        "ms per token": digits(way["ms"]) if way["ms"] else "",
    }


def _verdict(told: dict[str, Any]) -> Iterator[str]:
    """What follows from the tables, by line."""
    if told["splits"]:
        yield from _verdict_of_splits(told)
    if not told["tokens"]:
        yield "Equal machines on fast links save memory, but no time: see --bandwidth and --link."
        return
    case = max(told["tokens"], key=lambda case: abs(case["saved_ms"]))
    saved, less = digits(abs(case["saved_ms"])), "less" if case["saved_ms"] > 0 else "more"
    expected = f"With a batch of {case['batch']} expect {saved} ms {less} per token"
    verdict = "The plugin saves memory, but no time" if saved == digits(0) else expected
    yield verdict + ("." if told["ranks"][0]["bandwidth"] else ", if machines are equal.")
    yield "Arithmetic is not counted. Ranks on one GPU save more. `mlx-lm-skiphead bench` measures."


def _verdict_of_splits(told: dict[str, Any]) -> Iterator[str]:
    given, best = told["splits"][0], told["splits"][-1]
    if not told["takes_split"]:
        yield f"This mlx-lm splits {told['family']} evenly only."
    if not best["fits"]:
        yield "No split fits into the memory of these machines."
        return
    if best is given:
        yield "No other split is better, nor another order of the machines."
    else:
        split = f" --split {commas(best['layers'])}" if told["takes_split"] else ""
        order = commas(best["machines"])
        yield f"The best, with the machines {order} in that order in hosts.json:"
        run = f"python -m mlx_lm_skiphead run{split} mlx_lm.server --pipeline --model ..."
        yield f"mlx.launch --hostfile hosts.json -- {run}"
    limits = " and of ".join(map(str, told["limits"]))
    limit = f"Its limit is the memory of machine {limits}" if limits else "No memory limits it"
    yield f"{limit}; machines are counted from 0."

"""``mlx-lm-skiphead plan MODEL -n N``: predicts memory, downloads and time from headers alone.

mlx-lm builds the model with lazy weights and splits it, so that sizes are right for whatever mlx-lm
does with a checkpoint on loading.

The formula of the time of a token, for N ranks and a batch of B sequences:

=============================== ====================== ==========================
part                            unpatched              with the plugin
=============================== ====================== ==========================
stages                          T(0) + ... + T(N - 1)  the same
links, from stage to stage      (N - 1) (S + L)        the same
links, rank 0 to the last rank  (N - 1) S + L          (N - 1) s + L
head                            D(N - 1)               D(0)
=============================== ====================== ==========================

- T(r), D(r): the time of rank r for its layers, and for the head. `plan` takes the time to read
  their weights from memory, bytes / bandwidth; ``bench --plan`` measures both.
- H: bytes of the hidden states of one token. S = B H / rate, and s = 4 (B + 1) / rate, for the ids.
- L: the latency of a link, one way. Each machine has one port to all others, as with Ethernet.

In the last two rows the last rank counts, since it embeds the next token. A rank r between may take
longer: it knows the token N - r latencies after rank 0 has sent, and then runs its own head, if
unpatched. A rank begins its layers when it knows the token and has the hidden states of rank r + 1.
`token` follows the ranks in this way and takes the longest path. MLX's ring sends an all_gather of
`SPLIT_FROM` bytes or more both ways round, a half each. That takes as long through one port, but
max(r, N - r) latencies to rank r, so N - 1 to the last rank of more than two.

Between equal machines the plugin saves (N - 1) (S - s), and from `SPLIT_FROM` bytes on N - 2
latencies more.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from . import downloads
from .arguments import Unusable, at_least, positives
from .ranks import WAYS, role
from .tables import both, table

SPLIT_FROM = 2 * 262144
"""From this size on, in bytes, MLX's ring sends an all_gather both ways round, a half each."""


class Link(NamedTuple):
    """What connects a machine with the others: `rate` in Gbit/s, `latency` one way in ms."""

    rate: float = math.inf
    latency: float = 0.0

    def ms(self, size: float) -> float:
        """How long a machine takes to send `size` bytes, without the latency."""
        return 8 * size / self.rate / 1e6


class Machine(NamedTuple):
    """Where a rank runs. None stands for what is not known."""

    bandwidth: float | None = None
    """Of its memory, GB/s (10^9)."""
    memory: float | None = None
    """GB that it has for weights."""


class Rank(NamedTuple):
    """One rank's part of the model. Sizes are in bytes."""

    rank: int
    role: str
    layers: tuple[int, int]
    """The first one, and the one after the last."""
    unpatched: int
    """Weights that unpatched mlx-lm loads."""
    on_disk: dict[str, int]
    """Those of them that stay on disk with the plugin, by module."""
    reads: dict[int, int]
    """By batch size: weights that a step reads, without the head. Of the experts those that get
    tokens, of the embedding nothing."""
    head: int
    """Weights that the head reads."""
    files: downloads.Downloads
    """What it fetches from a hub, if it has nothing yet."""

    @property
    def skip(self) -> int:
        """Weights that are loaded with the plugin."""
        return self.unpatched - sum(self.on_disk.values())

    def fits(self, machine: Machine) -> dict[str, bool]:
        """Whether the weights fit into the memory of a machine, by way."""
        limit = math.inf if machine.memory is None else machine.memory * 1e9
        return {"unpatched": self.unpatched <= limit, "skip": self.skip <= limit}


class Plan(NamedTuple):
    """A model over a number of ranks."""

    family: str
    row: int
    """Bytes of the hidden states of one token."""
    ranks: list[Rank]


class Token(NamedTuple):
    """The parts of the time of a token, in milliseconds."""

    stages: float = 0.0
    head: float = 0.0
    links: float = 0.0

    @property
    def ms(self) -> float:
        return sum(self)


def token(
    times: Sequence[tuple[float, float]], row: int, link: Link, batch: int, way: str
) -> Token:
    """The time from rank 0's last layer to rank 0's last layer in the next step.

    By the formula of this module.

    Args:
        times: T and D of each rank, rank 0 first, in milliseconds.
        row: H, in bytes.
        link: its rate and L.
        batch: B.
        way: "unpatched" or "skip".
    """
    ranks, size = len(times), batch * row
    gathered = 4 * (batch + 1) if way == "skip" else size
    path = Token()
    for rank in reversed(range(ranks)):
        head, links = times[0 if way == "skip" else rank][1], 0.0
        if rank:
            hops = max(rank if gathered >= SPLIT_FROM else 0, ranks - rank)
            links = (ranks - 1) * link.ms(gathered) + hops * link.latency
        path = max(path, Token(0.0, head, links), key=lambda one: one.ms)
        sends = link.ms(size) + link.latency if rank else 0.0
        path = Token(path.stages + times[rank][0], path.head, path.links + sends)
    return path


def add_command(commands: Any) -> None:
    """Add ``plan`` to the parser's subcommands."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "plan",
        help="predict what each rank holds and what the plugin saves",
        description="Prints for each rank its layers, the memory of its weights without the plugin "
        "and with it, and how much a token reads. Reads the config and the headers of a model: "
        "loads no weights and starts no rank. With the memory bandwidth of each rank's machine, "
        "the links between them, or both, it also prints the time of a token.",
        epilog="example: mlx-lm-skiphead plan ./my-model -n 3 --bandwidth 800,400,120 --link 1,0.1 "
        "--batch 1,8,32",
    )
    option, sizes, numbers = parser.add_argument, positives(int), positives(float)
    option("model", metavar="MODEL", help="a folder, or a hub repository in the cache")
    option("-n", dest="ranks", type=at_least(2), required=True, metavar="N", help="ranks")
    option(
        "--split", type=sizes, metavar="A,B,...", help="layers of each rank, rank 0 first (even)"
    )
    option("--bandwidth", type=numbers, metavar="GB/S,...", help="memory bandwidth of each rank")
    option("--memory", type=numbers, metavar="GB,...", help="memory of each rank for weights")
    option("--link", type=numbers, metavar="GBIT/S[,MS]", help="rate and latency of each link")
    option("--batch", type=sizes, default=[1], metavar="B,...", help="batch sizes (1)")
    option("--fetch-headers", action="store_true", help="get the headers of MODEL from the hub")
    option("--json", action="store_true", help="print one JSON document, and nothing else")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; its exit code is 0.

    Raises:
        Unusable: if the model cannot be split in this way.
    """
    from .models import locate

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
        planned = plan(folder, ranks, arguments.split, arguments.batch)
    unknown = [None] * ranks
    bandwidths, memories = arguments.bandwidth or unknown, arguments.memory or unknown
    machines = [Machine(*each) for each in zip(bandwidths, memories, strict=True)]
    told = document(planned, machines, link and Link(*link), arguments.batch)
    told["model"] = arguments.model
    if arguments.json:
        print(json.dumps(told))
    else:
        _report(Console(highlight=False), told)
    return 0


def plan(
    folder: Path, ranks: int, layers: list[int] | None = None, batches: Sequence[int] = (1,)
) -> Plan:
    """What each of `ranks` ranks would have of the model in `folder`.

    Args:
        folder: of a checkpoint that mlx-lm loads.
        ranks: how many, 2 or more.
        layers: of each rank, rank 0 first; even if None.
        batches: the batch sizes of `Rank.reads`.

    Raises:
        Unusable: see `models.split`.
    """
    import mlx.core as mx

    from ..weights.on_disk import size_of, unused
    from .models import split

    planned = []
    for rank in range(ranks):
        model, family, config = split(folder, rank, ranks, layers)
        owner = family.owner_of(model)
        stage = family.stage_of(owner)
        embedding = getattr(stage, family.embedding)
        planned.append(
            Rank(
                rank,
                role(rank, ranks),
                # Before 0.32 mlx-lm counts layers that do not exist, in an uneven split.
                (stage.start_idx, min(stage.end_idx, len(stage.layers))),
                size_of(model),
                {n: size_of(family.parent_of(owner, n)[n]) for n in unused(family, owner, stage)},
                {batch: _reads(stage, embedding, config, batch) for batch in sorted({1, *batches})},
                size_of(family.head_of(owner)),
                downloads.of_rank(folder, model, family),
            )
        )
    # The graph of an embedded token, which is never computed. That is what all families broadcast.
    # From stage to stage deepseek_v41 and kimi_k3 send more, unpatched and with the plugin.
    hidden: mx.array = embedding(mx.zeros((1, 1), mx.int32))
    return Plan(family.name, hidden.nbytes, planned)


def _reads(stage: Any, embedding: Any, config: dict[str, Any], batch: int) -> int:
    """Bytes that a step reads of the layers of `stage`."""
    import mlx.core as mx
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    used = _experts_per_token(config)
    total = 0.0
    for module in stage.modules():
        if module is embedding:
            continue  # one row of it, on one rank
        size = sum(a.nbytes for a in module.values() if isinstance(a, mx.array))
        if used and isinstance(module, SwitchLinear | QuantizedSwitchLinear):
            # Of E experts, k for each token, a batch of B reads E (1 - (1 - k / E)^B).
            size *= 1 - max(0.0, 1 - used / module.weight.shape[0]) ** batch
        total += size
    return round(total)


def _experts_per_token(config: dict[str, Any]) -> int | None:
    for part in (config, config.get("text_config", {}), config.get("language_config", {})):
        for key in ("num_experts_per_tok", "num_experts_per_token"):
            if part.get(key):
                return int(part[key])
    return None


def reading_times(
    planned: Plan, machines: Sequence[Machine], batch: int
) -> list[tuple[float, float]]:
    """The ms in which each rank reads its layers and its head; 0 without a bandwidth."""
    speeds = [1e6 * (machine.bandwidth or math.inf) for machine in machines]  # bytes in a ms
    ranks = zip(planned.ranks, speeds, strict=True)
    return [(rank.reads[batch] / speed, rank.head / speed) for rank, speed in ranks]


def best_head_machine(planned: Plan, machines: Sequence[Machine], link: Link, batch: int) -> int:
    """Which machine should be rank 0, by its present rank, if the others keep their order.

    The one with which most ranks fit; of those the one with the shortest time of a token.
    """

    def cost(chosen: int) -> tuple[int, float]:
        order = [machines[chosen], *(m for i, m in enumerate(machines) if i != chosen)]
        pairs = zip(planned.ranks, order, strict=True)
        full = sum(not rank.fits(machine)["skip"] for rank, machine in pairs)
        times = reading_times(planned, order, batch)
        # Rounded to a nanosecond, so that the present rank 0 stays where nothing is gained.
        return full, round(token(times, planned.row, link, batch, "skip").ms, 6)

    return min(range(len(machines)), key=cost)


def document(
    planned: Plan, machines: Sequence[Machine], link: Link | None, batches: Sequence[int]
) -> dict[str, Any]:
    """The plan as JSON: sizes in bytes, times in milliseconds, `ranks` in order of rank.

    `tokens` has one entry for each batch size. Without bandwidths its `stages` and `head` are 0. It
    is empty without bandwidths and links.
    """
    links = link or Link()
    has_bandwidths = machines[0].bandwidth is not None
    tokens: list[dict[str, Any]] = []
    for batch in batches if link or has_bandwidths else ():
        times = reading_times(planned, machines, batch)
        ways = {way: token(times, planned.row, links, batch, way) for way in WAYS}
        parts = {way: {**taken._asdict(), "ms": taken.ms} for way, taken in ways.items()}
        saved = ways["unpatched"].ms - ways["skip"].ms
        tokens.append({"batch": batch, **parts, "saved_ms": saved})
    files = [rank.files for rank in planned.ranks]
    return {
        "family": planned.family,
        "head_bytes": planned.ranks[0].head,
        "hidden_bytes_per_token": planned.row,
        "link": link and link._asdict(),
        "ranks": [
            {
                "rank": rank.rank,
                "role": rank.role,
                "layers": list(rank.layers),
                "memory_bytes": {"unpatched": rank.unpatched, "skip": rank.skip},
                "on_disk": rank.on_disk,
                "reads_per_token_bytes": {
                    "unpatched": rank.reads[1] + rank.head,
                    "skip": rank.reads[1] + (0 if rank.rank else rank.head),
                },
                **machine._asdict(),
                "fits": rank.fits(machine),
                "downloads": rank.files,
            }
            for rank, machine in zip(planned.ranks, machines, strict=True)
        ],
        "tokens": tokens,
        "download_bytes": {way: downloads.total(files, way) for way in WAYS},
        "rank_0_should_be": best_head_machine(planned, machines, links, batches[0]),
    }


def _report(console: Console, told: dict[str, Any]) -> None:
    head = _mb(told["head_bytes"])
    console.print(f"{told['model']}: {told['family']}, a head of {head} MB", markup=False)
    columns = ["rank", "role", "layers", "unpatched", "plugin", "read", "fits"]
    if told["ranks"][0]["memory"] is None:
        columns.remove("fits")
    rows = []
    for rank in told["ranks"]:
        fits = rank["fits"]
        row = [
            str(rank["rank"]),
            rank["role"],
            f"{rank['layers'][0]}-{rank['layers'][1] - 1}",
            *(_mb(rank["memory_bytes"][way]) for way in WAYS),
            both(rank["reads_per_token_bytes"], unit=1e6),
            "yes" if fits["unpatched"] else "skip" if fits["skip"] else "no",
        ]
        rows.append(row[: len(columns)])
    console.print(table("MB of weights in memory, and read for a token", columns, rows))
    files = [rank["downloads"] for rank in told["ranks"]]
    if len({name for rank in files for name in rank["unpatched"]}) > 1:
        console.print(downloads.report(files), downloads.summary(files), sep="\n")
    if told["tokens"]:
        console.print(_times_table(told))
    console.print("\n".join(_verdict(told)))


def _times_table(told: dict[str, Any]) -> Table:
    """The parts of the time of a token that are known."""
    has_bandwidths = told["ranks"][0]["bandwidth"] is not None
    known = {
        "stages": has_bandwidths,
        "head": has_bandwidths,
        "links": told["link"] is not None,
        "ms": has_bandwidths,
    }
    parts = [part for part, is_known in known.items() if is_known]
    rows = []
    for case in told["tokens"]:
        before, after = (case[way] for way in WAYS)
        ratio = f"{after['ms'] / before['ms']:.2f}" if has_bandwidths else _ms(case["saved_ms"])
        times = (f"{_ms(before[part])} → {_ms(after[part])}" for part in parts)
        rows.append([str(case["batch"]), *times, ratio])
    names = ["token" if part == "ms" else part for part in parts]
    columns = ["batch", *names, "ratio" if has_bandwidths else "saved"]
    return table("ms per token: unpatched → plugin", columns, rows)


def _verdict(told: dict[str, Any]) -> list[str]:
    lines = [
        f"Rank {rank['rank']}'s part fits "
        + ("with the plugin only." if rank["fits"]["skip"] else "neither way.")
        for rank in told["ranks"]
        if not rank["fits"]["unpatched"]
    ]
    if best := told["rank_0_should_be"]:
        lines.append(f"Make the machine of rank {best} rank 0, which alone runs the head.")
    if not told["tokens"]:
        lines.append(
            "The time that this saves depends on the machines: give their memory bandwidths with "
            "--bandwidth and their links with --link. Equal machines on fast links save memory, "
            "but no time."
        )
        return lines
    case = max(told["tokens"], key=lambda case: abs(case["saved_ms"]))
    saved = case["saved_ms"]
    if abs(saved) < 0.005:
        lines.append("The plugin saves memory, but no time.")
    else:
        links = case["unpatched"]["links"] - case["skip"]["links"]
        lines.append(
            f"With a batch of {case['batch']} expect {_ms(abs(saved))} ms "
            f"{'less' if saved > 0 else 'more'} per token"
            + (f"; links take {_ms(links)} ms less." if told["link"] else ".")
        )
    if told["ranks"][0]["bandwidth"] is None:
        lines.append("This is for equal machines.")
    lines.append(
        "Times are of links and of reading weights, without arithmetic. Ranks that share a GPU "
        "save more. `mlx-lm-skiphead bench --plan` measures."
    )
    return lines


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f}"


def _ms(time: float) -> str:
    return f"{time:.2f}" if abs(time) < 10 else f"{time:.1f}"

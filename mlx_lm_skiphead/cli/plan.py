"""``mlx-lm-skiphead plan MODEL -n N``: what each rank would hold, and what a token would take.

mlx-lm builds the model without reading its weights, and splits it: so what is said here is right
for whatever mlx-lm does with a checkpoint on loading. `token` is the formula of the time.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from . import downloads
from .arguments import pipeline_ranks, positives
from .ranks import WAYS, role

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
    """From the first, to the one after the last."""
    unpatched: int
    """Weights that unpatched mlx-lm loads."""
    on_disk: dict[str, int]
    """Of these, what stays on disk with the plugin."""
    reads: dict[int, int]
    """By batch size: weights that a step reads, but for the head. Of the experts those that tokens
    are given to, of the embedding nothing."""
    head: int
    """What running the head reads."""
    files: downloads.Downloads = {}  # noqa: RUF012
    """What it fetches from a hub, where it has nothing yet."""

    @property
    def skip(self) -> int:
        """Weights that are loaded with the plugin."""
        return self.unpatched - sum(self.on_disk.values())

    def memory(self, way: str) -> int:
        """Weights that are loaded, by way."""
        return self.skip if way == "skip" else self.unpatched

    def reads_by(self, way: str) -> int:
        """What a token of one sequence reads."""
        return self.reads[1] + (self.head if way == "unpatched" or self.rank == 0 else 0)


class Plan(NamedTuple):
    """A model over a number of ranks."""

    family: str
    row: int
    """Bytes of the hidden states of one token."""
    ranks: list[Rank]


class Token(NamedTuple):
    """What one token of each sequence waits for, in milliseconds."""

    stages: float = 0.0
    head: float = 0.0
    links: float = 0.0

    @property
    def ms(self) -> float:
        return sum(self)

    def then(self, stages: float = 0.0, links: float = 0.0) -> Token:
        return Token(self.stages + stages, self.head, self.links + links)


def token(
    times: Sequence[tuple[float, float]], row: int, link: Link, batch: int, way: str
) -> Token:
    """What a decode step takes, from rank 0's last layer to rank 0's last layer again.

    With N ranks, S the time to send the hidden states of the batch, ``batch * row`` bytes, s that
    of its ids, ``4 * (batch + 1)`` bytes, and L a latency:

    - A rank begins its layers when it knows the token and has the hidden states of the rank before
      it, and sends its own in S + L.
    - Unpatched, rank 0's hidden states go round the ring: rank r has everything of the all_gather
      after (N - 1) S, and N - r latencies, since rank 0 sends to the last rank first. Then it runs
      its own head. From `SPLIT_FROM` bytes on, one half goes round the other way, through one port:
      as long, but max(r, N - r) latencies.
    - With the plugin, rank 0's head comes first, and its ids then go round: (N - 1) s, N - r
      latencies.

    So between equal machines the plugin saves (N - 1) (S - s), and above `SPLIT_FROM` N - 2
    latencies.

    Args:
        times: of the layers and of the head of each rank, rank 0 first, in milliseconds.
        row: bytes of the hidden states of one token.
        link: what connects the machines; each has one port to all others, as with Ethernet.
        batch: sequences.
        way: "unpatched" or "skip".
    """
    ranks = len(times)
    size = batch * row
    gathered = 4 * (batch + 1) if way == "skip" else size
    path = Token()
    for rank in reversed(range(ranks)):
        knows = Token(head=times[0 if way == "skip" else rank][1])
        if rank:
            hops = max(rank if gathered >= SPLIT_FROM else 0, ranks - rank)
            knows = knows.then(links=(ranks - 1) * link.ms(gathered) + hops * link.latency)
        path = max(path, knows, key=lambda p: p.ms).then(stages=times[rank][0])
        if rank:
            path = path.then(links=link.ms(size) + link.latency)
    return path


def add_command(commands: Any) -> None:
    """Add ``plan`` to the parser's subcommands."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "plan",
        help="what each rank would hold, and what the plugin would save",
        description="Says for each rank its layers, the memory of its weights without the plugin "
        "and with it, and how much one token reads. From a model's config and the headers of its "
        "files: nothing is loaded, no rank is started. With the memory bandwidth of each rank's "
        "machine, the links between them, or both, also what a token takes.",
        epilog="example: mlx-lm-skiphead plan ./my-model -n 3 --bandwidth 800,400,120 --link 1,0.1 "
        "--batch 1,8,32",
    )
    parser.add_argument("model", metavar="MODEL", help="a folder, or a hub repository in the cache")
    parser.add_argument("-n", dest="ranks", type=pipeline_ranks, required=True, metavar="RANKS")
    parser.add_argument(
        "--split",
        type=positives(int),
        metavar="A,B,...",
        help="layers of each rank, rank 0 first (mlx-lm's own: evenly)",
    )
    parser.add_argument(
        "--bandwidth",
        type=positives(float),
        metavar="GB/S,...",
        help="memory bandwidth of each rank's machine, rank 0 first",
    )
    parser.add_argument(
        "--memory",
        type=positives(float),
        metavar="GB,...",
        help="memory that each rank's machine has for weights",
    )
    parser.add_argument(
        "--link",
        type=positives(float),
        metavar="GBIT/S[,MS]",
        help="rate of each machine's port, and latency from one to another",
    )
    parser.add_argument(
        "--batch", type=positives(int), default=[1], metavar="B,...", help="batch sizes (1)"
    )
    parser.add_argument(
        "--fetch-headers",
        action="store_true",
        help="look at a repository on the hub: fetch its configuration and headers, no weights",
    )
    parser.add_argument("--json", action="store_true", help="one JSON document, and nothing else")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Exit code: 0, or 2 if the model cannot be split so."""
    from .models import Unusable, locate

    try:
        ranks = arguments.ranks
        for name in ("bandwidth", "memory"):
            given = getattr(arguments, name)
            if given is not None and len(given) != ranks:
                raise Unusable(f"--{name} has {len(given)} values for {ranks} ranks")
        if arguments.link is not None and len(arguments.link) > 2:
            raise Unusable("--link is a rate in Gbit/s and a latency in ms, no more")
        with tempfile.TemporaryDirectory() as name:
            if arguments.fetch_headers:
                downloads.fetch_headers(arguments.model, Path(name))
            folder = Path(name) if arguments.fetch_headers else locate(arguments.model)
            planned = plan(folder, ranks, arguments.split, arguments.batch)
    except Unusable as error:
        print(f"mlx-lm-skiphead plan: {error}", file=sys.stderr)
        return 2
    unknown = [None] * ranks
    machines = [
        Machine(*each)
        for each in zip(arguments.bandwidth or unknown, arguments.memory or unknown, strict=True)
    ]
    link = None if arguments.link is None else Link(*arguments.link)
    told = document(arguments.model, planned, machines, link, arguments.batch)
    if arguments.json:
        print(json.dumps(told))
    else:
        _report(Console(), told)
    return 0


def plan(
    folder: Path, ranks: int, layers: list[int] | None = None, batches: Sequence[int] = (1,)
) -> Plan:
    """What each of `ranks` ranks would have of the model in `folder`.

    Args:
        folder: of a checkpoint that mlx-lm loads.
        ranks: how many, 2 or more.
        layers: of each rank, rank 0 first; even if None.
        batches: sizes of batches for which `Rank.reads` is to say what a step reads.

    Raises:
        Unusable: see `models.split`.
    """
    from .models import split

    parts = [split(folder, rank, ranks, layers) for rank in range(ranks)]
    files = [downloads.of_rank(folder, model, family) for model, family, _ in parts]
    sizes = sorted({1, *batches})
    _, family, _ = parts[0]
    return Plan(
        family.name,
        _row(*parts[0][:2]),
        [
            _rank(*part, rank, ranks, sizes)._replace(files=files[rank])
            for rank, part in enumerate(parts)
        ],
    )


def _rank(
    model: Any, family: Any, config: dict[str, Any], rank: int, ranks: int, batches: Sequence[int]
) -> Rank:
    from ..dead_weights import dead, size_of

    owner = family.owner_of(model)
    stage = family.stage_of(owner)
    embedding = getattr(stage, family.embedding)
    experts = _experts_per_token(config)
    return Rank(
        rank,
        role(rank, ranks),
        # Before 0.32 mlx-lm counts layers that there are not, where they do not divide evenly.
        (stage.start_idx, min(stage.end_idx, len(stage.layers))),
        size_of(model),
        {name: size_of(parent[name]) for parent, name in dead(family, owner, stage)},
        {batch: _reads(stage, embedding, experts, batch) for batch in batches},
        size_of(family.head_of(owner)),
    )


def _row(model: Any, family: Any) -> int:
    """Bytes of one token's hidden states. A graph is built for that, and never computed.

    That is what all families broadcast. On the way from stage to stage deepseek_v41 and kimi_k3
    send more, unpatched and with the plugin.
    """
    import mlx.core as mx

    stage = family.stage_of(family.owner_of(model))
    hidden: mx.array = getattr(stage, family.embedding)(mx.zeros((1, 1), mx.int32))
    return hidden.nbytes


def _reads(stage: Any, embedding: Any, experts_per_token: int | None, batch: int) -> int:
    import mlx.core as mx
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    total = 0.0
    for module in stage.modules():
        if module is embedding:
            continue  # one row of it, on one rank
        size = sum(a.nbytes for a in module.values() if isinstance(a, mx.array))
        if isinstance(module, SwitchLinear | QuantizedSwitchLinear) and experts_per_token:
            # As many as that many draws of some experts each leave undrawn are not read.
            experts = module.weight.shape[0]
            size *= 1 - max(0.0, 1 - experts_per_token / experts) ** batch
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
    """Milliseconds that each rank reads its layers and its head; 0 where nothing is known."""
    return [
        (0.0, 0.0)
        if machine.bandwidth is None
        else (rank.reads[batch] / machine.bandwidth / 1e6, rank.head / machine.bandwidth / 1e6)
        for rank, machine in zip(planned.ranks, machines, strict=True)
    ]


def best_head_machine(
    planned: Plan, machines: Sequence[Machine], link: Link | None, batch: int
) -> int:
    """Which machine should be rank 0, by its present rank, where the others keep their order.

    The one with which most ranks fit, and of those the one with which a token is soonest.
    """

    def cost(chosen: int) -> tuple[int, float]:
        order = [machines[chosen], *(m for i, m in enumerate(machines) if i != chosen)]
        full = sum(not _fits(rank, m, "skip") for rank, m in zip(planned.ranks, order, strict=True))
        times = reading_times(planned, order, batch)
        # Beyond a nanosecond it is rounding, and the present rank 0 may stay.
        return full, round(token(times, planned.row, link or Link(), batch, "skip").ms, 6)

    return min(range(len(machines)), key=cost)


def _fits(rank: Rank, machine: Machine, way: str) -> bool:
    return machine.memory is None or rank.memory(way) <= machine.memory * 1e9


def document(
    model: str,
    planned: Plan,
    machines: Sequence[Machine],
    link: Link | None,
    batches: Sequence[int],
) -> dict[str, Any]:
    """The plan as JSON: sizes in bytes, times in milliseconds, `ranks` in order of rank.

    `tokens` has one entry a batch size; without bandwidths its `stages` and `head` are 0. It is
    empty if there are no links either.
    """
    known = link is not None or machines[0].bandwidth is not None
    times = {batch: reading_times(planned, machines, batch) for batch in batches}
    tokens: list[dict[str, Any]] = []
    for batch in batches if known else ():
        ways = {way: token(times[batch], planned.row, link or Link(), batch, way) for way in WAYS}
        told = {way: {**taken._asdict(), "ms": taken.ms} for way, taken in ways.items()}
        tokens.append({"batch": batch, **told, "saved_ms": ways[WAYS[0]].ms - ways[WAYS[1]].ms})
    return {
        "model": model,
        "family": planned.family,
        "head_bytes": planned.ranks[0].head,
        "hidden_bytes_per_token": planned.row,
        "link": None if link is None else link._asdict(),
        "ranks": [
            {
                "rank": rank.rank,
                "role": rank.role,
                "layers": list(rank.layers),
                "memory_bytes": {way: rank.memory(way) for way in WAYS},
                "on_disk": rank.on_disk,
                "reads_per_token_bytes": {way: rank.reads_by(way) for way in WAYS},
                "bandwidth": machine.bandwidth,
                "memory": machine.memory,
                "fits": {way: _fits(rank, machine, way) for way in WAYS},
                "head_ms": None if machine.bandwidth is None else times[batches[0]][rank.rank][1],
                "downloads": rank.files,
            }
            for rank, machine in zip(planned.ranks, machines, strict=True)
        ],
        "tokens": tokens,
        "download_bytes": {
            way: downloads.total([rank.files for rank in planned.ranks], way) for way in WAYS
        },
        "rank_0_should_be": best_head_machine(planned, machines, link, batches[0]),
    }


def _report(console: Console, told: dict[str, Any]) -> None:
    console.print(
        f"{told['model']}: {told['family']}, a head of {_mb(told['head_bytes'])} MB",
        markup=False,
        highlight=False,
    )
    is_limited = told["ranks"][0]["memory"] is not None
    table = Table(title="MB of weights in memory, and read for a token")
    columns = ["rank", "role", "layers", "unpatched", "plugin", "read"]
    for column in [*columns, "fits"] if is_limited else columns:
        table.add_column(column, justify="left" if column == "role" else "right")
    for rank in told["ranks"]:
        unpatched, skip = (rank["fits"][way] for way in WAYS)
        fits = "yes" if unpatched else "skip" if skip else "no"
        table.add_row(
            str(rank["rank"]),
            rank["role"],
            f"{rank['layers'][0]}-{rank['layers'][1] - 1}",
            *(_mb(rank["memory_bytes"][way]) for way in WAYS),
            " → ".join(_mb(rank["reads_per_token_bytes"][way]) for way in WAYS),
            *([fits] if is_limited else []),
        )
    files = [rank["downloads"] for rank in told["ranks"]]
    console.print(table, highlight=False)
    if len({name for rank in files for name in rank["unpatched"]}) > 1:
        console.print(downloads.table(files), downloads.summary(files), highlight=False)
    if told["tokens"]:
        console.print(_times(told), highlight=False)
    console.print("\n".join(_verdict(told)), highlight=False)


def _times(told: dict[str, Any]) -> Table:
    """The table of a token's time; what is not known is not in it."""
    has_bandwidths = told["ranks"][0]["bandwidth"] is not None
    parts = ["stages", "head"] if has_bandwidths else []
    parts += ["links"] if told["link"] is not None else []
    parts += ["ms"] if has_bandwidths else []
    table = Table(title="ms per token: unpatched → plugin")
    names = ["token" if part == "ms" else part for part in parts]
    for column in ["batch", *names, "ratio" if has_bandwidths else "saved"]:
        table.add_column(column, justify="right")
    for case in told["tokens"]:
        before, after = (case[way] for way in WAYS)
        table.add_row(
            str(case["batch"]),
            *(f"{_ms(before[part])} → {_ms(after[part])}" for part in parts),
            f"{after['ms'] / before['ms']:.2f}" if has_bandwidths else _ms(case["saved_ms"]),
        )
    return table


def _verdict(told: dict[str, Any]) -> list[str]:
    lines = [
        f"Rank {rank['rank']}'s part fits "
        + ("with the plugin only." if rank["fits"]["skip"] else "neither way.")
        for rank in told["ranks"]
        if not rank["fits"]["unpatched"]
    ]
    if not told["tokens"]:
        lines.append(
            "What that saves in time depends on the machines: say their memory bandwidths with "
            "--bandwidth, and what connects them with --link. Between equal ones on fast links "
            "nothing but memory is to be gained."
        )
    else:
        case = max(told["tokens"], key=lambda case: abs(case["saved_ms"]))
        saved = case["saved_ms"]
        if abs(saved) < 0.005:
            lines.append("Nothing but memory is to be gained.")
        else:
            links = case[WAYS[0]]["links"] - case[WAYS[1]]["links"]
            lines.append(
                f"With a batch of {case['batch']} expect {_ms(abs(saved))} ms "
                f"{'less' if saved > 0 else 'more'} per token"
                + ("." if told["link"] is None else f"; links take {_ms(links)} ms less.")
            )
    if best := told["rank_0_should_be"]:
        lines.append(
            f"Make the machine of rank {best} rank 0: that one alone has the head, and runs it."
        )
    if told["tokens"]:
        lines.append(
            ("" if told["ranks"][0]["bandwidth"] is not None else "For equal machines. ")
            + "By reading weights alone: arithmetic is not in it, and ranks that share a GPU save "
            "more. `mlx-lm-skiphead bench --plan` measures."
        )
    return lines


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f}"


def _ms(time: float) -> str:
    return f"{time:.2f}" if abs(time) < 10 else f"{time:.1f}"

"""``mlx-lm-skiphead plan MODEL -n N``: what each rank would hold and read, before any is started.

mlx-lm builds the model without reading its weights, and splits it: so what is said here is right
for whatever mlx-lm does with a checkpoint on loading.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from . import downloads
from .arguments import pipeline_ranks, positives
from .ranks import role


class Rank(NamedTuple):
    """One rank's part. Sizes are in bytes, `bandwidth` in GB/s (10^9), times in milliseconds."""

    rank: int
    role: str
    layers: tuple[int, int]
    """From the first, to the one after the last."""
    unpatched: int
    """Weights that unpatched mlx-lm loads."""
    on_disk: dict[str, int]
    """Of these, what stays on disk with the plugin."""
    reads: int
    """Weights that one token of one sequence reads, but for the head: of the experts those that
    a token is given to, of the embedding nothing."""
    head: int
    """What running the head reads."""
    bandwidth: float | None = None
    files: downloads.Downloads = {}  # noqa: RUF012
    """What it fetches from a hub, where it has nothing yet."""

    @property
    def skip(self) -> int:
        """Weights that are loaded with the plugin."""
        return self.unpatched - sum(self.on_disk.values())

    @property
    def reads_skip(self) -> int:
        """What a token reads with the plugin."""
        return self.reads + (self.head if self.rank == 0 else 0)

    def ms(self, size: int) -> float:
        """How long reading `size` bytes takes at `bandwidth`."""
        assert self.bandwidth is not None
        return size / self.bandwidth / 1e6


def add_command(commands: Any) -> None:
    """Add ``plan`` to the parser's subcommands."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "plan",
        help="what each rank would hold and read, and what the plugin would save",
        description="Says for each rank its layers, the memory of its weights without the plugin "
        "and with it, and how much one token reads. From a model's config and the headers of its "
        "files: nothing is loaded, no rank is started. With the memory bandwidth of each rank's "
        "machine, also the time that the plugin saves per token.",
        epilog="example: mlx-lm-skiphead plan ./my-model -n 3 --bandwidth 800,400,120",
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
        if arguments.bandwidth is not None and len(arguments.bandwidth) != ranks:
            raise Unusable(f"--bandwidth has {len(arguments.bandwidth)} values for {ranks} ranks")
        with tempfile.TemporaryDirectory() as name:
            if arguments.fetch_headers:
                downloads.fetch_headers(arguments.model, Path(name))
            folder = Path(name) if arguments.fetch_headers else locate(arguments.model)
            family, planned = plan(folder, ranks, arguments.split)
    except Unusable as error:
        print(f"mlx-lm-skiphead plan: {error}", file=sys.stderr)
        return 2
    if arguments.bandwidth is not None:
        planned = [
            r._replace(bandwidth=b) for r, b in zip(planned, arguments.bandwidth, strict=True)
        ]
    if arguments.json:
        print(json.dumps(document(arguments.model, family, planned)))
    else:
        _report(Console(), arguments.model, family, planned)
    return 0


def plan(folder: Path, ranks: int, layers: list[int] | None = None) -> tuple[str, list[Rank]]:
    """The family of the model in `folder`, and what each of `ranks` would have of it.

    Args:
        folder: of a checkpoint that mlx-lm loads.
        ranks: how many, 2 or more.
        layers: of each rank, rank 0 first; even if None.

    Raises:
        Unusable: see `models.split`.
    """
    from .models import split

    planned = []
    for rank in range(ranks):
        model, family, config = split(folder, rank, ranks, layers)
        files = downloads.of_rank(folder, model, family)
        planned.append(_rank(model, family, config, rank, ranks)._replace(files=files))
    return family.name, planned


def _rank(model: Any, family: Any, config: dict[str, Any], rank: int, ranks: int) -> Rank:
    from ..dead_weights import dead, size_of

    owner = family.owner_of(model)
    stage = family.stage_of(owner)
    unused = {name: size_of(parent[name]) for parent, name in dead(family, owner, stage)}
    return Rank(
        rank,
        role(rank, ranks),
        # Before 0.32 mlx-lm counts layers that there are not, where they do not divide evenly.
        (stage.start_idx, min(stage.end_idx, len(stage.layers))),
        size_of(model),
        unused,
        _reads(stage, getattr(stage, family.embedding), _experts_per_token(config)),
        size_of(family.head_of(owner)),
    )


def _reads(stage: Any, embedding: Any, experts_per_token: int | None) -> int:
    import mlx.core as mx
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    total = 0
    for module in stage.modules():
        if module is embedding:
            continue  # one row of it, on one rank
        size = sum(a.nbytes for a in module.values() if isinstance(a, mx.array))
        if isinstance(module, SwitchLinear | QuantizedSwitchLinear) and experts_per_token:
            experts = module.weight.shape[0]
            size = size * min(experts_per_token, experts) // experts
        total += size
    return total


def _experts_per_token(config: dict[str, Any]) -> int | None:
    for part in (config, config.get("text_config", {}), config.get("language_config", {})):
        for key in ("num_experts_per_tok", "num_experts_per_token"):
            if part.get(key):
                return int(part[key])
    return None


def period(planned: list[Rank], *, skip: bool) -> float:
    """Milliseconds from token to token, by reading weights alone: no links, no arithmetic.

    A rank begins its layers when it knows the token, and has what the rank before it sends.
    Unpatched it knows the token when its own head is done, with the plugin when rank 0's is.
    """
    done = 0.0
    for rank in reversed(planned):
        knows = planned[0].ms(rank.head) if skip else rank.ms(rank.head)
        done = max(done, knows) + rank.ms(rank.reads)
    return done


def saved(planned: list[Rank]) -> float:
    """Milliseconds per token that the plugin saves; less than 0 where it costs some."""
    return period(planned, skip=False) - period(planned, skip=True)


def best_head_rank(planned: list[Rank]) -> int:
    """Which of the machines should be rank 0: the fastest, since it alone runs the head."""
    return max(planned, key=lambda rank: (rank.bandwidth or 0, -rank.rank)).rank


def document(model: str, family: str, planned: list[Rank]) -> dict[str, Any]:
    """The plan as JSON: sizes in bytes, times in milliseconds, `ranks` in order of rank."""
    told: dict[str, Any] = {
        "model": model,
        "family": family,
        "head_bytes": planned[0].head,
        "ranks": [
            {
                "rank": rank.rank,
                "role": rank.role,
                "layers": list(rank.layers),
                "memory_bytes": {"unpatched": rank.unpatched, "skip": rank.skip},
                "on_disk": rank.on_disk,
                "reads_per_token_bytes": {
                    "unpatched": rank.reads + rank.head,
                    "skip": rank.reads_skip,
                },
                "downloads": rank.files,
                "head_ms": None if rank.bandwidth is None else rank.ms(rank.head),
            }
            for rank in planned
        ],
    }
    files = [rank.files for rank in planned]
    told["download_bytes"] = {way: downloads.total(files, way) for way in ("unpatched", "skip")}
    if planned[0].bandwidth is not None:
        told["saved_ms_per_token"] = saved(planned)
        told["fastest_rank"] = best_head_rank(planned)
    return told


def _report(console: Console, model: str, family: str, planned: list[Rank]) -> None:
    console.print(
        f"{model}: {family}, a head of {_mb(planned[0].head)} MB", markup=False, highlight=False
    )
    table = Table(title="MB of weights: in memory, left on disk, and read for a token")
    for column in ("rank", "role", "layers", "unpatched", "plugin", "on disk", "read"):
        table.add_column(column, justify="left" if column == "role" else "right")
    for rank in planned:
        table.add_row(
            str(rank.rank),
            rank.role,
            f"{rank.layers[0]}-{rank.layers[1] - 1}",
            _mb(rank.unpatched),
            _mb(rank.skip),
            _mb(sum(rank.on_disk.values())),
            f"{_mb(rank.reads + rank.head)} → {_mb(rank.reads_skip)}",
        )
    files = [rank.files for rank in planned]
    console.print(table, highlight=False)
    if len({name for rank in files for name in rank["unpatched"]}) > 1:
        console.print(downloads.table(files), downloads.summary(files), highlight=False)
    if planned[0].bandwidth is None:
        console.print(
            "What that saves in time depends on the machines: say their memory bandwidths with "
            "--bandwidth. Between equal ones nothing but memory is to be gained.",
            highlight=False,
        )
        return
    times = Table(title="ms to read")
    for column in ("rank", "GB/s", "its layers", "its head"):
        times.add_column(column, justify="right")
    for rank in planned:
        layers, head = rank.ms(rank.reads), rank.ms(rank.head)
        times.add_row(str(rank.rank), f"{rank.bandwidth:g}", f"{layers:.2f}", f"{head:.2f}")
    console.print(times, _verdict(planned), highlight=False)


def _verdict(planned: list[Rank]) -> str:
    saves = saved(planned)
    heads = [rank.ms(rank.head) for rank in planned]
    slowest = heads.index(max(heads))
    if abs(saves) < 0.005:
        lines = ["Nothing but memory is to be gained: no token waits for a worker's head."]
    elif saves > 0:
        lines = [
            f"Expect {saves:.2f} ms less per token: unpatched, it waits for rank {slowest}'s head "
            f"({heads[slowest]:.2f} ms), with the plugin for rank 0's ({heads[0]:.2f} ms)."
        ]
    else:
        lines = [
            f"Expect {-saves:.2f} ms more per token: with the plugin each one waits for rank 0's "
            f"head ({heads[0]:.2f} ms), unpatched for faster ones. It saves memory only."
        ]
    best = best_head_rank(planned)
    if best != 0 and planned[best].bandwidth != planned[0].bandwidth:
        lines.append(
            f"Make the machine of rank {best} rank 0: it has the fastest memory, and rank 0 alone "
            "runs the head."
        )
    lines.append(
        "By reading weights alone, for one sequence: links and arithmetic are not in it, and ranks "
        "that share a GPU save more. `mlx-lm-skiphead bench` measures."
    )
    return "\n".join(lines)


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f}"

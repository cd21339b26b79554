"""Ranks: the facts of each of them, how these differ, and the links between the ranks."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from typing import Any

from ...families import FAMILIES
from ..arguments import one_line
from ..ranks import launched_rank
from .packages import has_fast_synch

FACTS_BYTES = 4096
"""What each rank gives to the others."""
NO_MPI = (
    "MLX does not find MPI, and each rank is alone: set MLX_MPI_LIBNAME to its library, as in "
    "mpirun -x MLX_MPI_LIBNAME=/path/to/libmpi.so.40 ..."
)


def examine(report: dict[str, Any]) -> None:
    """Compare the facts of all ranks, and measure the links if the report has a place for them."""
    measures_links = report["links"] is not None
    group = _compare(report)
    report["links"] = None
    if not measures_links:
        return
    if group is None and not report["problems"]:
        report["wrong_argument"] = report["wrong_argument"] or (
            "--links needs ranks, as in mlx.launch -n 2 ... -- mlx-lm-skiphead doctor --links"
        )
    if group is not None and not report["differences"].keys() & {"plugin", "links"}:
        from . import links

        try:
            report["links"] = links.measure(group)
        except RuntimeError as error:
            report["problems"].append(f"The links failed: {one_line(error)}")


def _compare(report: dict[str, Any]) -> Any:
    """Give the facts of this rank to all ranks; fill in ``rank``, ``ranks`` and ``differences``.

    Returns:
        The group of the ranks, or None if there are none or they cannot be connected.
    """
    import mlx.core as mx

    rank = launched_rank()
    if rank is None:
        return None
    report["rank"] = rank
    try:
        group = mx.distributed.init()
        if group.size() == 1:
            # As MLX takes a library of MPI that it cannot load.
            if os.environ.get("OMPI_COMM_WORLD_SIZE", "1") != "1":
                report["problems"].append(NO_MPI)
            return None
        data = json.dumps(_facts(report)).encode().ljust(FACTS_BYTES, b"\0")
        gather = inspect.unwrap(mx.distributed.all_gather)  # whatever wraps it
        everything = bytes(gather(mx.array(list(data), mx.uint8)).tolist())
        parts = [everything[i : i + FACTS_BYTES] for i in range(0, len(everything), FACTS_BYTES)]
        ranks = [json.loads(part.rstrip(b"\0")) for part in parts]
    except RuntimeError as error:
        report["problems"].append(f"The ranks cannot be connected: {one_line(error)}")
        return None
    except ValueError as error:
        report["problems"].append(f"The ranks' facts did not arrive as sent: {one_line(error)}")
        return None
    report["ranks"] = ranks
    values = {name: [rank.get(name) for rank in ranks] for name in ranks[0]}
    report["differences"] = {n: v for n, v in values.items() if any(x != v[0] for x in v)}
    return group


def _facts(report: dict[str, Any]) -> dict[str, str]:
    """What ranks should have in common; it must fit into `FACTS_BYTES`."""
    targets = report["families"] | report["loops"]
    model = report["model"] or {}
    return {
        "mode": report["mode"],
        "variable": "not set" if report["variable"] is None else repr(report["variable"][:40]),
        "plugin": report["plugin"],
        **{name: report["packages"][name]["version"] for name in ("mlx-lm", "mlx", "wrapt")},
        "table": hashlib.sha256(repr(FAMILIES).encode()).hexdigest()[:12],
        "not patched": ", ".join(n for n, t in targets.items() if t["state"] != "patched"),
        "model": "" if not model else "supported" if model["supported"] else "not supported",
        "fast synch": "on" if has_fast_synch() else "off",
        "links": "to be measured" if report["links"] is not None else "",
        "arguments": report["wrong_argument"][:200],
    }

"""``python tests/tools/splits.py MODEL --split 9,1``: this split against the even one, 2 CPU ranks.

The worker's layers are 4 times slower than rank 0's. Each split loads the model anew, so the two
run in turn, and each pair gives one ratio. Beside it is what `plan` expects of the two.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from mlx_lm_skiphead.cli.bench import interval

BENCH = [sys.executable, str(Path(__file__).with_name("bench.py"))]
PLAN = [sys.executable, "-m", "mlx_lm_skiphead", "plan"]


def told(*command: str) -> dict[str, Any]:
    done = subprocess.run([*command, "--json"], stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--split", required=True)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--slower", type=int, default=4)
    given = parser.parse_args()
    splits: dict[str, list[str]] = {"even": [], given.split: ["--split", given.split]}
    times: dict[str, list[float]] = {split: [] for split in splits}
    for pair in range(given.pairs):
        for split, option in list(splits.items())[:: 1 if pair % 2 == 0 else -1]:
            ranks = ["-n", "2", "--cores", "0;1", "--layer-passes", str(given.slower)]
            found = told(*BENCH, given.model, *ranks, *option, "--rounds", "1", "--tokens", "8")
            assert found["tokens_agree"]
            times[split].append(found["cases"][0]["ms_per_token"]["plugin"]["median"])
            print(split, f"{times[split][-1]:.1f}", file=sys.stderr, flush=True)
    ratios = [other / even for even, other in zip(*times.values(), strict=True)]
    found = interval(ratios)
    low, high = found["low"], found["high"]
    bandwidths = f"{given.slower},1"
    planned = [
        told(*PLAN, given.model, "-n", "2", "--bandwidth", bandwidths, *option)["splits"][0]["ms"]
        for option in splits.values()
    ]
    for split, taken in times.items():
        print(f"{split}: {statistics.median(taken):.1f} ms per token")
    print(f"ratio: {statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})")
    print(f"plan expects {planned[1] / planned[0]:.2f}")


if __name__ == "__main__":
    main()

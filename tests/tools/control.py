"""``python tests/tools/control.py MODEL -n 2 ...``: `bench`, but unpatched against itself.

What it prints as "skip" is unpatched mlx-lm a second time: how far its ratio is from 1 is noise.
The model is loaded with the plugin, as there.
"""

from __future__ import annotations

import sys
from typing import Any

from mlx_lm_skiphead.cli import bench, main


def rank() -> None:
    """What each rank runs: the first `install` is before loading, the others begin a round."""
    from mlx_lm_skiphead.cli import rank

    install, calls = rank.install, []

    def only_first(*args: Any) -> None:
        calls.append(args)
        install(*args) if len(calls) == 1 else rank.uninstall()

    rank.install = only_first
    rank.main()


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        del sys.argv[1]
        rank()
    else:
        command = bench.rank_command
        bench.rank_command = lambda task: [sys.executable, __file__, "rank", command(task)[-1]]
        sys.exit(main(["bench", *sys.argv[1:]]))

"""One rank of a bench or a demo: ``python -m mlx_lm_skiphead.cli.rank TASK`` (see `cli.ranks`).

It loads a model and runs it with the plugin and without it in turn, in one process, so that drift
of the machine cancels. It prints these JSON objects, as `ranks.records`:

- ``{"step": ...}``: what it does now.
- ``{"measured": ...}``: one generation of a round.
- ``{"result": ...}``: the last one; see `measure.Measurement.run`.
- ``{"error": ...}``: the last one, if the model cannot be used.
"""

from __future__ import annotations

import base64
import functools
import json
import os
import sys
import threading
import time
from typing import Any

from ..config import SPLIT
from .ranks import launched_rank, records


def main() -> None:
    task = json.loads(base64.b64decode(sys.argv[1]))
    if starter := task.get("ends_with"):
        threading.Thread(target=_end_with, args=(starter,), daemon=True).start()
    if task["split"]:  # which installing reads
        os.environ[SPLIT] = ",".join(map(str, task["split"]))
    if task["gpus"] is not None:  # which CUDA reads when it starts, so before MLX is imported
        os.environ["CUDA_VISIBLE_DEVICES"] = str(task["gpus"][launched_rank() or 0])
    import mlx.core as mx

    from .measure import Measurement

    try:
        # `strict`, or each rank would be alone where MLX does not find the library of MPI.
        is_mpi = "OMPI_COMM_WORLD_RANK" in os.environ
        group = mx.distributed.init(strict=is_mpi, backend="mpi" if is_mpi else "any")
        say(result=Measurement(task, group, say).run())
    except (ValueError, OSError) as error:  # a model that is not there or cannot be pipelined
        say(error=str(error))


def say(**event: Any) -> None:
    """Tell the process that started the ranks."""
    for record in records(launched_rank() or 0, event):
        os.write(_output(), record)


@functools.cache
def _output() -> int:
    """The standard output, in which nothing else is printed from now on."""
    output = os.dup(1)
    os.dup2(2, 1)
    return output


def _end_with(process: int) -> None:
    """End this process when another one of this machine has ended."""
    try:
        while True:
            os.kill(process, 0)
            time.sleep(0.5)
    except OSError:
        os._exit(1)


if __name__ == "__main__":
    main()

"""``python tests/tools/gpu_soak.py --head NAME --way both --steps 20000``: a long run under watch.

Two ranks or more decode without end, unpatched, with the plugin, or both in turn, in stretches of
`STRETCH` tokens. At all times it is known which way runs, and at which step each rank is: that is
printed every few seconds. If a rank ends no step for a while, the stacks of all threads of every
rank are printed, the ranks are killed, and the exit code is 1; so it is if the plugin gives tokens
where unpatched always gives the same others. (On CUDA it need not: near-ties of random weights. How
often each answer came is printed for both ways; all ranks must have the same.) ``--sampler`` says
how ids are taken from logits; ``own`` looks at the logits in Python, within each step, and
``processor`` is greedy behind a logits processor that does so.

It relies on mlx-lm and on the public names of the plugin only; ranks of ``--way unpatched`` do not
even import it. `watch` and `Progress` serve other programs of ranks too.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import hashlib
import itertools
import json
import mmap
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HEADS = {
    "tiny": "1024x64-float32",
    "cpu": "65536x512-float32",
    "bf16": "129280x7168-bfloat16",
    "4bit": "262144x3840-4bit",
}
WAYS = ("unpatched", "plugin")
SAMPLERS = ("greedy", "temperature", "own", "processor")
STRETCH = 500  # tokens of one generation
STARTING = 240.0
"""Seconds that a rank may be at something that is no step: loading, compiling kernels."""
STATE = "WATCHED_STATE"  # the variable with the file in which a rank says where it is
SIZE = 128  # of that file


class Progress:
    """In a rank: says where it is, at the cost of a few bytes written to memory."""

    def __init__(self) -> None:
        # In C, without the interpreter's lock: it works whatever this process waits for.
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        self._file = None
        if STATE in os.environ:
            with open(os.environ[STATE], "r+b") as file:
                self._file = mmap.mmap(file.fileno(), SIZE)

    def __call__(self, where: str, step: int = 0) -> None:
        """The rank is at `where`; `step` is 0 for what may take long."""
        if self._file is not None:
            self._file[:] = f"{where}|{step}".encode()[:SIZE].ljust(SIZE)


def watch(
    command: Sequence[str],
    ranks: int,
    gpus: Sequence[str] | None = None,
    stall: float = 20.0,
    tell: float = 5.0,
) -> int:
    """Run `command` as `ranks` ranks of a ring, and watch them; 0 if all ended well, else 1.

    Their output is this process's. `stall` is how many seconds a step may take, `tell` after how
    many to print where the ranks are.
    """
    from mlx_lm_skiphead.cli.ranks import free_ports

    with tempfile.TemporaryDirectory(prefix="watch-") as name, contextlib.ExitStack() as open_:
        folder = Path(name)
        hosts = folder / "hosts.json"
        first = free_ports(ranks)
        hosts.write_text(json.dumps([[f"127.0.0.1:{first + rank}"] for rank in range(ranks)]))
        states = [folder / f"state-{rank}" for rank in range(ranks)]
        processes = []
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        open_.callback(signal.signal, signal.SIGTERM, before)
        for rank, state in enumerate(states):
            state.write_bytes(b"starting|0".ljust(SIZE))
            place = {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts), STATE: str(state)}
            if gpus is not None:
                place["CUDA_VISIBLE_DEVICES"] = gpus[rank]
            environment = {k: v for k, v in os.environ.items() if k != "MLX_LM_SKIPHEAD"}
            processes.append(subprocess.Popen(command, env={**environment, **place}))
            open_.callback(_kill, processes[-1])
        return _follow(processes, states, stall, tell)


def _follow(
    processes: list[subprocess.Popen[bytes]], states: list[Path], stall: float, tell: float
) -> int:
    start = told = time.monotonic()
    seen = [b""] * len(states)
    since = [start] * len(states)
    while True:
        codes = [process.poll() for process in processes]
        if any(codes) or None not in codes:
            for rank, code in enumerate(codes):
                if code:
                    _say(f"rank {rank} ended with exit code {code}, at {_where(states[rank])}")
            return int(any(codes))
        now = time.monotonic()
        for rank, state in enumerate(states):
            if (read := state.read_bytes()) != seen[rank]:
                seen[rank], since[rank] = read, now
            allowed = STARTING if read.strip().endswith(b"|0") else stall
            if codes[rank] is None and now - since[rank] > allowed:
                _say(f"rank {rank} has ended no step for {now - since[rank]:.0f} s")
                _dump(processes, states)
                return 1
        if now - told >= tell:
            told = now
            places = "; ".join(f"rank {r}: {_where(state)}" for r, state in enumerate(states))
            _say(f"{now - start:4.0f} s  {places}")
        time.sleep(0.25)


def _dump(processes: list[subprocess.Popen[bytes]], states: list[Path]) -> None:
    """Where all ranks stand, as far as the tools of this machine can say."""
    for rank, (process, state) in enumerate(zip(processes, states, strict=True)):
        _say(f"== rank {rank}, process {process.pid}: {_where(state)}; its Python threads:")
        if process.poll() is None:
            process.send_signal(signal.SIGUSR1)
            time.sleep(1)
    for rank, process in enumerate(processes):
        _say(f"== rank {rank}: all threads, with the milliseconds each computed in a second")
        before = _threads(process.pid)
        time.sleep(1)
        for thread, (name, state, ticks) in _threads(process.pid).items():
            used = ticks - before.get(thread, ("", "", ticks))[2]
            _say(f"  {thread} {name} {state} {1000 * used // os.sysconf('SC_CLK_TCK')}")
    stacks = os.environ.get("STACKS") or shutil.which("eu-stack") or shutil.which("gdb")
    for rank, process in enumerate(processes):
        if stacks and process.poll() is None:
            options = ["-p", str(process.pid)]
            if "gdb" in Path(stacks).name:
                options += ["-batch", "-ex", "thread apply all bt 25"]
            _say(f"== rank {rank}: native stacks")
            _run([stacks, *options])
    if smi := shutil.which("nvidia-smi"):
        _run([smi, "--query-gpu=index,utilization.gpu,memory.used", "--format=csv"])


def _run(command: list[str]) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT, timeout=40)


def _threads(process: int) -> dict[str, tuple[str, str, int]]:
    """Of each thread: its name, its state and the clock ticks that it has computed (Linux)."""
    found = {}
    for stat in Path(f"/proc/{process}/task").glob("*/stat"):
        with contextlib.suppress(OSError):
            head, _, tail = stat.read_text().rpartition(") ")
            fields = tail.split()
            ticks = int(fields[11]) + int(fields[12])
            found[stat.parent.name] = head.partition("(")[2], fields[0], ticks
    return found


def _where(state: Path) -> str:
    where, _, step = state.read_bytes().strip().decode(errors="replace").rpartition("|")
    return where if step == "0" else f"{where}, step {step}"


def _say(text: str) -> None:
    print(text, flush=True)


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def model_folder(head: str, folder: Path) -> Path:
    """The folder of the model with that head, in `folder`; written if it is not there yet."""
    model = folder / HEADS[head]
    if not (model / "config.json").exists():
        script = Path(__file__).with_name("big_heads.py")
        subprocess.run([sys.executable, str(script), HEADS[head], str(model)], check=True)
    return model


# What follows runs in a rank.


def load(model: str) -> tuple[Any, int]:
    """The rank's part of a model, and how many ids there are."""
    import mlx.core as mx
    from mlx_lm.utils import sharded_load

    loaded, _ = sharded_load(model, pipeline_group=mx.distributed.init(strict=True, backend="ring"))
    return loaded, json.loads(Path(model, "config.json").read_text())["vocab_size"]


def eager_argmax(logprobs: Any) -> Any:
    """A sampler that looks at each step's logprobs `(B, V)` as it is called; gives ids `(B,)`."""
    import mlx.core as mx

    return mx.array(mx.argmax(logprobs, axis=-1).tolist(), dtype=mx.uint32)


def halve(tokens: Any, logits: Any) -> Any:
    """A logits processor that looks at the logits `(1, V)` as it is called, and gives others."""
    return logits / 2 if logits[0, 0].item() else logits


def sampling_named(name: str) -> dict[str, Any]:
    """One of `SAMPLERS`, as arguments of a loop; without one mlx-lm's own default is greedy."""
    from mlx_lm.sample_utils import make_sampler

    if name == "processor":
        return {"logits_processors": [halve]}
    return {"sampler": {"temperature": make_sampler(0.8), "own": eager_argmax}.get(name)}


def decode(
    model: Any, vocabulary: int, batch: int, tokens: int, sampling: dict[str, Any]
) -> Iterator[list[int]]:
    """The ids of each step, one for each of a batch, through mlx-lm's own loops."""
    import importlib

    import mlx.core as mx

    loops: Any = importlib.import_module("mlx_lm.generate")
    prompts = [[(31 * i + 7 * i * i + 11 * b) % vocabulary for i in range(8)] for b in range(batch)]
    mx.random.seed(0)  # each stretch samples alike
    mx.eval(mx.distributed.all_sum(mx.array(1.0), stream=mx.cpu))  # all ranks begin at once
    if batch == 1:
        prompt = mx.array(prompts[0])
        for token, _ in loops.generate_step(prompt, model, max_tokens=tokens, **sampling):
            yield [token]
    else:
        generator = loops.BatchGenerator(
            model,
            completion_batch_size=batch,
            prefill_batch_size=batch,
            stop_tokens=[],
            **sampling,
        )
        uids = generator.insert(prompts, max_tokens=[tokens] * batch)
        while responses := generator.next_generated():
            by_uid = {response.uid: response.token for response in responses}
            yield [by_uid[uid] for uid in uids]
        generator.close()
    # Unpatched, a step is still in flight; it must not reach into what comes next.
    mx.synchronize(loops.generation_stream)


def choose(way: str) -> None:
    """Go on unpatched or with the plugin."""
    import mlx_lm_skiphead

    if way == "unpatched":
        mlx_lm_skiphead.uninstall()
    else:
        mlx_lm_skiphead.install(strict=True)


def soak(model: str, ways: list[str], batches: list[int], steps: int, sampling: str) -> int:
    """The rank: `steps` of each way with each size of a batch. 1 if tokens differ."""
    progress = Progress()
    both = len(ways) == 2
    progress("loading")
    if "plugin" in ways:
        choose("plugin")
    loaded, vocabulary = load(model)
    given = sampling_named(sampling)
    times: dict[tuple[str, int], list[float]] = {
        key: [] for key in itertools.product(ways, batches)
    }
    told: dict[tuple[str, int], Counter[str]] = {key: Counter() for key in times}
    done = 0
    while done < steps:
        length = min(STRETCH, steps - done)
        for (way, batch), measured in times.items():
            if both:
                choose(way)
            where = f"{way}, batch {batch}"
            progress(where)
            ids, start = [], 0.0
            for step, row in enumerate(decode(loaded, vocabulary, batch, length, given)):
                ids.append(row)
                if step > 1:  # kernels have been compiled
                    progress(where, done + step)
                start = start or time.perf_counter()
            measured.append(1000 * (time.perf_counter() - start) / max(1, length - 1))
            told[way, batch][hashlib.sha256(repr(ids).encode()).hexdigest()[:8]] += 1
        done += length
    progress("the end")
    for (way, batch), measured in times.items():
        answers = dict(told[way, batch].most_common())
        _say(
            f"rank {os.environ['MLX_RANK']}, {way}, batch {batch}: {done} steps, "
            f"{statistics.median(measured):.2f} ms each; answers {answers}"
        )
    pairs = [(told["unpatched", b], told["plugin", b]) for b in batches] if both else []
    return int(any(len(a) == 1 and a.keys() != b.keys() for a, b in pairs))


def main() -> int:
    parser = argparse.ArgumentParser(description="decode for long, under watch")
    parser.add_argument("--head", choices=HEADS, default="tiny")
    parser.add_argument("--way", choices=(*WAYS, "both"), default="both")
    parser.add_argument("--steps", type=int, default=20_000, help="of each way, each batch size")
    parser.add_argument("--batch", default="1", metavar="B,...")
    parser.add_argument("--sampler", choices=SAMPLERS, default="greedy")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--gpus", metavar="G,...", help="CUDA device of each rank")
    parser.add_argument("--stall", type=float, default=20.0, metavar="SECONDS")
    parser.add_argument("--tell", type=float, default=5.0, metavar="SECONDS")
    parser.add_argument(
        "--models", type=Path, default=Path(tempfile.gettempdir(), "big-heads"), metavar="FOLDER"
    )
    given = parser.parse_args()
    ways = list(WAYS) if given.way == "both" else [given.way]
    model = model_folder(given.head, given.models)
    if STATE in os.environ:
        batches = [int(b) for b in given.batch.split(",")]
        return soak(str(model), ways, batches, given.steps, given.sampler)
    gpus = None if given.gpus is None else given.gpus.split(",")
    _say(
        f"{given.head}, {given.ranks} ranks: {given.steps} steps {given.way}, "
        f"batch {given.batch}, sampler {given.sampler}"
    )
    code = watch([sys.executable, *sys.argv], given.ranks, gpus, given.stall, given.tell)
    _say("stood still, differed or failed" if code else "done: it never stood still")
    return code


if __name__ == "__main__":
    sys.exit(main())

"""One rank of a bench or a demo: ``python -m mlx_lm_skiphead.cli.rank TASK`` (see `cli.ranks`).

It loads a model and runs it with the plugin and without it in turn, in one process, so that drift
of the machine cancels. It prints these JSON objects, as `ranks.records`:

- ``{"step": ...}``: what it does now.
- ``{"measured": ...}``: one generation of a round.
- ``{"result": ...}``: the last one; see `Measurement.run`.
- ``{"error": ...}``: the last one, if the model cannot be used.
"""

from __future__ import annotations

import base64
import functools
import gc
import hashlib
import json
import math
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import mlx.core as mx
import mlx_lm.utils
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler

from .. import install, status, uninstall
from ..weights.on_disk import size_of
from . import downloads
from .measure import around_head, count_heads, decode, family_of
from .models import locate
from .ranks import WAYS, launched_rank, records

FEWEST, MOST, SECONDS = 8, 64, 2.0
"""Tokens of a generation and its length, where the task does not say how many tokens."""
GATHERS = 16
TEMPERATURE = 0.8


def main() -> None:
    task = json.loads(base64.b64decode(sys.argv[1]))
    over_mpi = "OMPI_COMM_WORLD_RANK" in os.environ
    # mpirun has an input for rank 0 only.
    if task.get("ends_with_input", True) and not (over_mpi and launched_rank()):
        threading.Thread(target=_end_with_input, daemon=True).start()
    try:
        if cores := task.get("cores"):
            os.sched_setaffinity(0, cores[launched_rank() or 0])
        if over_mpi:  # `strict`, or each rank would be alone where MLX does not find the library
            group = mx.distributed.init(strict=True, backend="mpi")
        else:
            group = mx.distributed.init()
        say(result=Measurement(task, group).run())
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


def _end_with_input() -> None:
    sys.stdin.read()
    os._exit(1)


class Measurement:
    """A model on this rank, and what is measured of it.

    Args:
        task: ``model``: a folder or a repository. ``cases``: a list of batch size and prompt
            length. ``tokens``: to generate each time, or None for as many as take `SECONDS`.
            ``rounds``: how many. And these, which may be missing: ``cores``, by rank;
            ``head_passes``, how often workers compute each head, to simulate slower machines;
            ``plan``, the bytes of hidden states with which to measure what `plan.token` needs;
            ``prompt``, a text to answer.
        group: of all ranks.
    """

    def __init__(self, task: dict[str, Any], group: mx.distributed.Group) -> None:
        self.task, self.group = task, group
        install()
        say(step="loading")
        self.model, self.tokenizer = mlx_lm.utils.sharded_load(task["model"], pipeline_group=group)
        self.family = family_of(self.model)
        now = status()
        targets = {**now.families, **now.loops}
        for name in (self.family.name, "generate_step"):
            if targets[name].state != "patched":
                raise ValueError(f"nothing is skipped here: {name} is {targets[name]}")
        self.owner = self.family.owner_of(self.model)
        self.stage = self.family.stage_of(self.owner)
        self.head = self.family.head_of(self.owner)
        self.vocabulary = self.head["weight"].shape[0]  # its shape, which reads nothing

    def run(self) -> dict[str, Any]:
        """Measure all that the task asks for.

        Returns:
            ``on_disk``: the bytes of each module that stays there with the plugin.
            ``loaded_bytes``, ``peak_bytes``: by way, in memory.
            With ``prompt``: ``answers``, by way, see `_answer`; ``layers``, the first one and the
            one after the last; ``head_bytes``; and ``downloads``, see `downloads.of_rank`.
            With ``plan``: ``link``, the latency in ms and the rate in Gbit/s or None; and
            ``times``, for each case the ms of this rank's layers and of its head.
        """
        task, cases = self.task, self.task["cases"]
        on_disk: dict[str, int] = next((model.on_disk for model in status().models), {})
        loaded: dict[str, int] = {}
        peak: dict[str, int] = {}
        answers: dict[str, Any] = {}
        links, times = [], []
        with self._slower_heads():
            # With the plugin first: afterwards unpatched mlx-lm reads what was left on disk.
            for way in reversed(WAYS):
                if way == "unpatched":
                    uninstall()
                    mx.eval(self.model.parameters())
                gc.collect()
                loaded[way] = mx.get_active_memory()
                mx.reset_peak_memory()
                tokens = []
                for case in cases:
                    say(step=f"warming up, {way}, {_named(case)}")
                    warm = self._generate(case, task["tokens"] or FEWEST)
                    tokens.append(task["tokens"] or self._agreed(warm["ms_per_token"]))
                peak[way] = mx.get_peak_memory()
                if "prompt" in task:
                    say(step=f"answering, {way}")
                    answers[way] = self._answer()
            for done in range(task["rounds"]):
                for case, length in zip(cases, tokens, strict=True):
                    # Each way comes first as often as the other.
                    for way in WAYS if done % 2 == 0 else reversed(WAYS):
                        install() if way == "skip" else uninstall()
                        say(step=f"round {done + 1} of {task['rounds']}, {_named(case)}")
                        measured = self._generate(case, length)
                        say(measured={"case": case, "way": way, **measured})
                if "plan" in task:
                    say(step=f"round {done + 1} of {task['rounds']}, links and ranks alone")
                    links.append(self._link())
                    times.append([self._alone(case) for case in cases])
        result: dict[str, Any] = {"on_disk": on_disk, "loaded_bytes": loaded, "peak_bytes": peak}
        if answers:
            result["answers"] = answers
            result["layers"] = [self.stage.start_idx, self.stage.end_idx]
            result["head_bytes"] = size_of(self.head)
            result["downloads"] = downloads.of_rank(locate(task["model"]), self.model, self.family)
        if links:
            latency, rate = map(statistics.median, zip(*links, strict=True))
            result["link"] = latency, rate if rate < math.inf else None
            result["times"] = [
                [statistics.median(part) for part in zip(*of_case, strict=True)]
                for of_case in zip(*times, strict=True)
            ]
        return result

    def _slower_heads(self) -> AbstractContextManager[None]:
        passes = self.task.get("head_passes", 1)
        if passes == 1 or self.group.rank() == 0:
            return nullcontext()

        def repeated(run_head: Callable[[], mx.array]) -> mx.array:
            logits = run_head()
            for _ in range(passes - 1):
                logits = mx.depends(run_head(), logits)
            return logits

        return around_head(self.model, repeated)

    def _meet(self, number: float = 0.0) -> float:
        """Wait for all ranks; the sum of their numbers."""
        total: Any = mx.distributed.all_sum(mx.array(number), stream=mx.cpu).item()
        return float(total)

    def _agreed(self, ms_per_token: float) -> int:
        """How many tokens take `SECONDS` on rank 0, within reason; the same on all ranks."""
        tokens = round(1000 * SECONDS / ms_per_token)
        return int(self._meet(min(MOST, max(FEWEST, tokens)) if self.group.rank() == 0 else 0))

    def _generate(self, case: tuple[int, int], tokens: int) -> dict[str, Any]:
        """Generate `tokens` for each of a batch: times, and a digest of the tokens."""
        batch, length = case
        prompts = [
            [(31 * i + 7 * i * i + 11 * b) % self.vocabulary for i in range(length)]
            for b in range(batch)
        ]
        self._meet()
        generated, seconds = decode(self.model, prompts, tokens)
        between = (seconds[-1] - seconds[0]) / max(1, len(seconds) - 1)
        return {
            "tokens": tokens,
            "first_token_ms": 1000 * seconds[0],
            "ms_per_token": 1000 * between,
            "digest": hashlib.sha256(repr(generated).encode()).hexdigest()[:16],
        }

    def _answer(self) -> dict[str, Any]:
        """The tokens of two answers to the prompt, ``greedy`` and ``seeded``; the ``text`` of the
        first one, and its ``heads_per_token``."""
        prompt, tokenizer = self.task["prompt"], self.tokenizer
        ids = tokenizer.encode(prompt)
        if tokenizer.chat_template is not None:
            messages = [{"role": "user", "content": prompt}]
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        with count_heads(self.model) as count:
            steps = list(self._stream(ids, 0.0))
        return {
            "greedy": [step.token for step in steps],
            "text": "".join(step.text for step in steps),
            # mlx-lm computes one token more than it gives out.
            "heads_per_token": count.evaluated() / (len(steps) + 1),
            "seeded": [step.token for step in self._stream(ids, TEMPERATURE)],
        }

    def _stream(self, prompt: list[int], temperature: float) -> Iterator[Any]:
        mx.random.seed(0)
        steps: Iterator[Any] = mlx_lm.stream_generate(
            self.model,
            self.tokenizer,
            prompt,
            self.task["tokens"],
            sampler=make_sampler(temperature),
        )
        return steps

    def _link(self) -> tuple[float, float]:
        """The latency of a link in ms, and its rate in Gbit/s.

        From all_gathers of 4 bytes, and of as many as hidden states have.
        """
        size, hops = self.task["plan"], self.group.size() - 1
        if not hops:
            return 0.0, math.inf
        took = []
        for data in (mx.zeros(4, mx.uint8), mx.zeros(4 + size, mx.uint8)):
            self._meet()
            start = time.perf_counter()
            for _ in range(GATHERS):
                mx.eval(mx.distributed.all_gather(data, stream=mx.cpu))
            # Not the median: ranks that are out of step take turns in being early.
            took.append(1000 * (time.perf_counter() - start) / GATHERS / hops)
        latency, longer = took[0], took[1] - took[0]
        return latency, 8 * size / longer / 1e6 if longer > 0 else math.inf

    def _alone(self, case: tuple[int, int]) -> tuple[float, float]:
        """The ms of this rank's layers and of its head for a token, while no other rank works."""
        batch, length = case
        prompts = mx.arange(batch * length).reshape(batch, length) % self.vocabulary
        stage = self.stage
        place = stage.pipeline_rank, stage.pipeline_size
        took = (0.0, 0.0)
        for rank in range(place[1]):
            self._meet()
            if rank == place[0]:
                stage.pipeline_rank, stage.pipeline_size = 0, 1  # its own layers, nothing sent
                try:
                    took = self._layers_and_head(prompts)
                finally:
                    stage.pipeline_rank, stage.pipeline_size = place
        return took

    def _layers_and_head(self, prompts: mx.array) -> tuple[float, float]:
        cache = make_prompt_cache(self.model)
        heads: list[Callable[[], mx.array]] = []

        def keep(run_head: Callable[[], mx.array]) -> mx.array:
            heads.append(run_head)
            return run_head()

        _sample(self.owner(prompts, cache=cache))
        token = prompts[:, :1]
        with around_head(self.model, keep):
            _sample(self.owner(token, cache=cache))
        head = _median_ms(lambda: _sample(heads[0]()))
        both = _median_ms(lambda: _sample(self.owner(token, cache=cache)))
        return max(0.0, both - head), head


def _sample(logits: mx.array) -> None:
    """As mlx-lm's loops do it."""
    logits = logits[:, -1]
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    mx.eval(mx.argmax(logprobs, axis=-1), logprobs)


def _median_ms(work: Callable[[], None], times: int = 5) -> float:
    took = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        took.append(1000 * (time.perf_counter() - start))
    return statistics.median(took)


def _named(case: tuple[int, int]) -> str:
    return f"batch {case[0]}, prompt {case[1]}"


if __name__ == "__main__":
    main()

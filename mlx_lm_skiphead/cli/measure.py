"""What a rank measures of a model, with the plugin and without it in turn.

Tokens, their times, memory, and how often the head was evaluated.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import wrapt
from mlx_lm.sample_utils import make_sampler

from .. import install, status, uninstall
from ..ranks.agreement import exchanged
from ..weights.on_disk import is_pending, size_of
from .links import total
from .models import Split, family_of
from .ranks import WAYS

FEWEST, MOST, SECONDS = 8, 64, 2.0
"""Tokens of a generation and its length, where the task does not say how many tokens."""


class Measurement:
    """A model on this rank, and what is measured of it.

    Args:
        task: ``model``: a folder or a repository. ``cases``: a list of batch size and prompt
            length. ``tokens``: to generate each time, or None for as many as take `SECONDS`.
            ``rounds``: how many. ``text``: a prompt to answer, or None.
        group: of all ranks.
        say: tells what is done now, and what was measured.
    """

    def __init__(
        self, task: dict[str, Any], group: mx.distributed.Group, say: Callable[..., None]
    ) -> None:
        self.task, self.group, self.say = task, group, say
        install()
        self.say(step="loading")
        self.model, self.tokenizer = mlx_lm.utils.sharded_load(task["model"], pipeline_group=group)
        self.split = Split(self.model, family_of(self.model), {})
        targets = status().families | status().loops
        for name in (self.split.family.name, "generate_step"):
            if targets[name].state != "patched":
                raise ValueError(f"nothing is skipped here: {name} is {targets[name]}")
        self.head = self.split.family.head_of(self.split.owner)
        self.vocabulary = self.head["weight"].shape[0]  # its shape, which reads nothing

    def run(self) -> list[dict[str, Any]]:
        """Measure all that the task asks for.

        Returns, by rank:
            ``on_disk``: the bytes of each module that stays there with the plugin.
            ``loaded_bytes``, ``peak_bytes``: by way, in memory.
            ``answers``: by way, see `_answer`; empty without a text. ``head_bytes``: of its
            weights.
        """
        task, cases = self.task, self.task["cases"]
        on_disk: dict[str, int] = next((model.on_disk for model in status().models), {})
        told: dict[str, Any] = {"loaded_bytes": {}, "peak_bytes": {}, "answers": {}}
        # With the plugin first: afterwards unpatched mlx-lm reads what was left on disk.
        for way in reversed(WAYS):
            if way == "unpatched":
                uninstall()
                mx.eval(self.model.parameters())
            gc.collect()
            told["loaded_bytes"][way] = mx.get_active_memory()
            mx.reset_peak_memory()
            tokens = []
            for case in cases:
                warm = self._generate(f"warming up, {way}", case, task["tokens"] or FEWEST)
                tokens.append(task["tokens"] or self._agreed(warm["ms_per_token"]))
            told["peak_bytes"][way] = mx.get_peak_memory()
            if task["text"]:
                self.say(step=f"answering, {way}")
                told["answers"][way] = self._answer()
        for done in range(task["rounds"]):
            for case, length in zip(cases, tokens, strict=True):
                # Each way comes first as often as the other.
                for way in WAYS if done % 2 == 0 else reversed(WAYS):
                    install() if way == "plugin" else uninstall()
                    now = f"round {done + 1} of {task['rounds']}, {way}"
                    measured = self._generate(now, case, length)
                    self.say(measured={"case": case, "way": way, **measured})
        return exchanged({"on_disk": on_disk, "head_bytes": size_of(self.head), **told})

    def _agreed(self, ms_per_token: float) -> int:
        """How many tokens take `SECONDS` on rank 0, within reason; the same on all ranks."""
        tokens = round(1000 * SECONDS / ms_per_token)
        return int(total(min(MOST, max(FEWEST, tokens)) if self.group.rank() == 0 else 0))

    def _generate(self, step: str, case: tuple[int, int], tokens: int) -> dict[str, Any]:
        """Generate `tokens` for each of a batch: times, and a digest of each rank's tokens."""
        self.say(step=f"{step}, batch {case[0]}, prompt {case[1]}")
        places, rows = mx.arange(case[1]), mx.arange(case[0])[:, None]
        prompts: Any = (((31 + 7 * places) * places + 11 * rows) % self.vocabulary).tolist()
        total()  # so that all ranks begin together
        steps, seconds = [], []
        start = time.perf_counter()
        for ids in decode(self.model, prompts, tokens):
            steps.append(ids)
            seconds.append(time.perf_counter() - start)
        between = (seconds[-1] - seconds[0]) / max(1, len(seconds) - 1)
        return {
            "tokens": tokens,
            "first_token_ms": 1000 * seconds[0],
            "ms_per_token": 1000 * between,
            "digests": exchanged(hashlib.sha256(repr(steps).encode()).hexdigest()[:16]),
        }

    def _answer(self) -> dict[str, Any]:
        """Answer the prompt, greedily and with a seed.

        Returns:
            ``tokens``: of both answers. ``text``: of the first one. ``heads_per_token``: of both.
        """
        text, tokenizer = self.task["text"], self.tokenizer
        ids = tokenizer.encode(text)
        if tokenizer.chat_template is not None:
            messages = [{"role": "user", "content": text}]
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        answers = []
        with count_heads(self.model) as evaluated:
            for temperature in (0.0, 0.8):
                mx.random.seed(0)
                options = {"max_tokens": self.task["tokens"], "sampler": make_sampler(temperature)}
                answers.append([*mlx_lm.stream_generate(self.model, tokenizer, ids, **options)])
        # mlx-lm computes one token more than it gives out.
        computed = sum(len(answer) + 1 for answer in answers)
        return {
            "tokens": [[step.token for step in answer] for answer in answers],
            "text": "".join(step.text for step in answers[0]),
            "heads_per_token": evaluated() / computed,
        }


def decode(model: Any, prompts: list[list[int]], tokens: int) -> Iterator[list[int]]:
    """The ids of each step, one of each prompt, greedily, whatever the stop tokens are.

    Through `generate_step` for one prompt, else through `BatchGenerator`.
    """
    loops: Any = importlib.import_module("mlx_lm.generate")
    size = len(prompts)
    if size == 1:
        for token, _ in loops.generate_step(mx.array(prompts[0]), model, max_tokens=tokens):
            yield [token]
    else:
        generator = loops.BatchGenerator(
            model, completion_batch_size=size, prefill_batch_size=size, stop_tokens=[]
        )
        uids = generator.insert(prompts, max_tokens=[tokens] * size)
        while responses := generator.next_generated():
            by_uid = {response.uid: response.token for response in responses}
            yield [by_uid[uid] for uid in uids]
        generator.close()
    # Unpatched mlx-lm leaves a step in flight, which must not reach into what comes next.
    mx.synchronize(loops.generation_stream)


@contextmanager
def count_heads(model: Any) -> Iterator[Callable[[], int]]:
    """Count the heads of `model` that this rank evaluates inside the ``with`` block.

    Yields:
        A function that returns how many there have been: heads whose matrix product was computed.
        MLX is lazy: logits that a call of the head returned may never be computed, as in prefill.
        Those that were have no operation behind them any more.
    """
    family = family_of(model)
    called: list[mx.array] = []
    head = family.head_of(family.owner_of(model))
    # An embedding that serves as the head does so through another method.
    method = "as_linear" if hasattr(head, "as_linear") else "__call__"

    def keep(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        logits = wrapped(*args, **kwargs)
        if instance is head:
            called.append(logits)
        return logits

    handle = wrapt.wrap_function_wrapper(type(head), method, keep)
    try:
        yield lambda: sum(not is_pending(logits) for logits in called)
    finally:
        wrapt.unwrap_object(type(head), method, handle)

"""What one rank measures of a model, with the plugin and without it in turn."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx_lm.utils
from mlx_lm.sample_utils import make_sampler

from .. import install, status, uninstall
from . import downloads
from .core import size_of
from .measure import count_heads, decode
from .models import Split, family_of, locate
from .ranks import WAYS

FEWEST, MOST, SECONDS = 8, 64, 2.0
"""Tokens of a generation and its length, where the task does not say how many tokens."""
TEMPERATURE = 0.8


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
        now = status()
        targets = {**now.families, **now.loops}
        for name in (self.split.family.name, "generate_step"):
            if targets[name].state != "patched":
                raise ValueError(f"nothing is skipped here: {name} is {targets[name]}")
        self.head = self.split.family.head_of(self.split.owner)
        self.vocabulary = self.head["weight"].shape[0]  # its shape, which reads nothing

    def run(self) -> dict[str, Any]:
        """Measure all that the task asks for.

        Returns:
            ``on_disk``: the bytes of each module that stays there with the plugin.
            ``loaded_bytes``, ``peak_bytes``: by way, in memory.
            With ``text``: ``answers``, by way, see `_answer`; ``layers``, the first one and the one
            after the last; ``head_bytes``; and ``downloads``, see `downloads.of_rank`.
        """
        task, cases = self.task, self.task["cases"]
        on_disk = next((model.on_disk for model in status().models), {})
        loaded: dict[str, int] = {}
        peak: dict[str, int] = {}
        answers: dict[str, Any] = {}
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
                self.say(step=f"warming up, {way}, {_named(case)}")
                warm = self._generate(case, task["tokens"] or FEWEST)
                tokens.append(task["tokens"] or self._agreed(warm["ms_per_token"]))
            peak[way] = mx.get_peak_memory()
            if task["text"]:
                self.say(step=f"answering, {way}")
                answers[way] = self._answer()
        for done in range(task["rounds"]):
            for case, length in zip(cases, tokens, strict=True):
                # Each way comes first as often as the other.
                for way in WAYS if done % 2 == 0 else reversed(WAYS):
                    install() if way == "plugin" else uninstall()
                    self.say(step=f"round {done + 1} of {task['rounds']}, {_named(case)}")
                    measured = self._generate(case, length)
                    self.say(measured={"case": case, "way": way, **measured})
        result: dict[str, Any] = {"on_disk": on_disk, "loaded_bytes": loaded, "peak_bytes": peak}
        if answers:
            result["answers"] = answers
            result["layers"] = [self.split.stage.start_idx, self.split.stage.end_idx]
            result["head_bytes"] = size_of(self.head)
            result["downloads"] = downloads.of_rank(locate(task["model"]), self.split)
        return result

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
        text, tokenizer = self.task["text"], self.tokenizer
        ids = tokenizer.encode(text)
        if tokenizer.chat_template is not None:
            messages = [{"role": "user", "content": text}]
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
        tokens, sampler = self.task["tokens"] or FEWEST, make_sampler(temperature)
        steps: Iterator[Any] = mlx_lm.stream_generate(
            self.model, self.tokenizer, prompt, tokens, sampler=sampler
        )
        return steps


def _named(case: tuple[int, int]) -> str:
    return f"batch {case[0]}, prompt {case[1]}"

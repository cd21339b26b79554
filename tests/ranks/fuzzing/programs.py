"""Programs as hypothesis strategies.

The simplest alternative of each choice comes first, and an option is absent first: hypothesis
shrinks towards both, and takes elements out of lists. What no program has, fuzz.py's docstring
says.
"""

from __future__ import annotations

import functools
import random
from typing import Any, NamedTuple

import tiny_models
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy, just

from fuzzing import BOTH

Program = dict[str, Any]
Step = dict[str, Any]
Spec = list[Any]
"""A sampler or a processor: its name, and what it takes."""

DENSE = ["qwen2-tied", "qwen2-untied", "ministral3-tied", "ministral3-untied"]
BATCHES = 128
"""There are so many batches, each with its entries in hypothesis's database."""
ERRORS = ["Planned", "PlannedStop", "SystemExit", "StopIteration", "ValueError"]
PLACES = [
    *("eval", "async_eval", "all_gather", "all_sum"),
    *("generate_step", "speculative_generate_step", "batch", "model", "stage"),
]
"""What other packages wrap, for `Session.wrap`."""

USUAL = {
    "generate": 6, "speculate": 2, "resume": 2, "insert": 3, "next": 4, "remove": 1,
    "close": 1, "own": 2, "direct": 1, "draw": 1, "seed": 0.5, "store": 0.7, "trim": 0.5,
    "look": 0.2, "save": 0.1, "wrap": 1, "unwrap": 0.7, "change": 0.5,
}  # fmt: skip
CHANGES = {"dtype": 1, "adapter": 2, "quantize": 0.5, "new_head": 0.7}
LOTS_OF_BATCHES = {"insert": 9, "next": 14, "remove": 4, "close": 2}
WRAPS = {"wrap": 6, "unwrap": 4}
TURNS = {"generate": 5, "wrap": 1, "unwrap": 1}
"""How often programs of some kinds have each step."""


class Kind(NamedTuple):
    """What decides which steps a program may have."""

    dense: bool = False
    heads: bool = False
    """Attention heads are wide enough for quantized caches."""
    together: bool = False
    """Samplers and processors talk to other ranks, and none raises."""
    turns: bool = False
    """Every step of a generation is asked for in another thread."""
    hidden: bool = False
    """A call of a model outside mlx-lm's loops gives no logits on workers."""


def batch_of(batch: int) -> tuple[int, list[str]]:
    """The number of ranks of a batch, and its models."""
    rng = random.Random(f"batch {batch}")
    dense = rng.choice(DENSE)
    return rng.choice([2, 2, 3]), [dense, dense, *rng.sample(sorted(tiny_models.CONFIGS), 3)]


@st.composite
def programs(draw: Any, batch: int) -> Program:
    """The programs of a batch: they share few models, so that ranks build them once."""
    ranks, cases = batch_of(batch)
    program: Program = {"ranks": ranks, "case": draw(st.sampled_from(cases))}
    turns = draw(chance(0.05))
    if turns:
        program |= {"case": draw(st.sampled_from(DENSE[:2])), "turns": True}
        kinds = TURNS
    else:
        program |= draw(surroundings(program["case"]))
        kinds = USUAL
        if program["case"] in DENSE and draw(chance(0.4)):
            kinds = kinds | CHANGES
        if draw(chance(0.4)):
            kinds = kinds | LOTS_OF_BATCHES
        if draw(chance(0.2)):
            kinds = kinds | WRAPS
    has = {name: name in program for name in ("heads", "together", "turns")}
    kind = Kind(program["case"] in DENSE, **has, hidden=program.get("mode") == "hidden")
    program["steps"] = draw(some_steps(kind, weighted(**kinds)))
    return program


@functools.cache
def some_steps(kind: Kind, names: SearchStrategy[str]) -> SearchStrategy[list[Step]]:
    return st.lists(names.flatmap(steps(kind).__getitem__), min_size=1, max_size=7)


@functools.cache
def surroundings(case: str) -> SearchStrategy[Program]:
    """Options of a program but for its steps."""
    fields: dict[str, Any] = {
        "seed": Maybe(0.5, NUMBER),
        "source": Maybe(0.3, one("lazy", "sharded")),
        "ways": Maybe(0.3, just(BOTH[::-1])),
        "thread": Maybe(0.15, just(True)),
        "mode": Maybe(0.1, just("hidden")),
        "together": Maybe(0.4, just(True)),
    }
    if "_" not in case:  # of the last rank; rank 0 has what is left
        fields["first_layers"] = Maybe(0.2, one(1, 2))
    if case.startswith("qwen2"):
        fields["heads"] = Maybe(0.3, just(2))
    return record(**fields).map(
        lambda p: without(p, "first_layers") if p.get("source") == "sharded" else p
    )


# What strategies are made of.


class Maybe(NamedTuple):
    """A field that a record has with this chance."""

    chance: float
    value: SearchStrategy[Any]


@st.composite
def record(draw: Any, **fields: SearchStrategy[Any] | Maybe) -> dict[str, Any]:
    made = {}
    for name, field in fields.items():
        if not isinstance(field, Maybe):
            made[name] = draw(field)
        elif draw(chance(field.chance)):
            made[name] = draw(field.value)
    return made


@functools.cache
def chance(of: float) -> SearchStrategy[bool]:
    """True with this chance, in twentieths."""
    yes = round(20 * of)
    return st.sampled_from([False] * (20 - yes) + [True] * yes)


@functools.cache
def weighted(**weights: float) -> SearchStrategy[str]:
    """Names, each as often as its weight says, in tenths."""
    return st.sampled_from([n for n, weight in weights.items() for _ in range(round(10 * weight))])


def either(one: SearchStrategy[Any], of: float, other: SearchStrategy[Any]) -> SearchStrategy[Any]:
    """`other` with this chance, else `one`."""
    return chance(of).flatmap(lambda yes: other if yes else one)


def one(*values: Any) -> SearchStrategy[Any]:
    return st.sampled_from(values)


def spec(name: str, *more: SearchStrategy[Any]) -> SearchStrategy[Spec]:
    return st.tuples(just(name), *more).map(list)


def without(options: dict[str, Any], name: str) -> dict[str, Any]:
    return {k: v for k, v in options.items() if k != name}


NUMBER = st.integers(0, 99)
PROMPT = st.tuples(st.integers(0, 255), one(1, 1, 2, 5, 9, 17, 40)).map(list)
"""Where a prompt begins, and how many tokens it has."""
CACHE = one("a", "b")
BATCH = one("x", "x", "y")
SOME = st.integers(1, 5)
RAISES = spec("raises", st.integers(0, 7), one(*ERRORS))


def second(kind: Kind, step: str) -> SearchStrategy[Spec]:
    """A sampler or processor that calls another model."""
    pipelined = ["pipelined"] * (step != "own" or not kind.hidden)
    return spec("second", one("whole", "sharded", *pipelined, *["stage"] * kind.dense))


@functools.cache
def samplers(kind: Kind, step: str) -> SearchStrategy[Spec]:
    """Samplers for a step of this name."""
    shape = spec("shape", one(0, 3))
    if kind.turns:
        return st.one_of(spec("by turns"), shape, spec("broadcast", just("eager")), spec("waits"))
    options = [
        spec("by turns"),
        # With other steps unpatched is wrong with ids that do not come from logits.
        spec("forced" if step == "generate" else "by turns"),
        spec("own key", NUMBER),
        spec("numpy", NUMBER),
        spec("numpy choice" if step in ("generate", "insert") else "numpy", NUMBER),
        spec("temperature", one({"temp": 0.3}, {"temp": 0.8}, {"temp": 1.5})),
        spec("temperature", just({"temp": 0.9, "min_p": 0.05})),
        spec("temperature", just({"temp": 0.9, "top_p": 0.9, "top_k": 20})),
        spec("temperature", just({"temp": 0.9, "xtc_probability": 0.5, "xtc_threshold": 0.05})),
    ]
    if step != "own":  # `share_tokens` wants one shape on all ranks
        options.append(shape)
    if not kind.together:
        return st.one_of(*options, RAISES)
    # Two lazy collectives in one graph have no order: only where there is one sequence.
    how = one("eager", "eager", *["lazy"] * (step == "generate"))
    together = st.one_of(spec("waits"), spec("broadcast", how), second(kind, step))
    return either(st.one_of(*options), 0.4, together)


@functools.cache
def processors(kind: Kind, step: str) -> SearchStrategy[list[Spec]]:
    """Lists of processors for a step of this name."""
    reader = spec("reader", st.integers(1, 7), one("memoryview", "frombuffer"))
    eager = spec("sum", just("eager"))
    if kind.turns:
        some = st.one_of(spec("calls"), spec("automaton"), reader, eager, spec("waits"))
        return st.lists(some, min_size=1, max_size=2)
    options = [
        spec("calls"),
        spec("automaton"),
        spec("eager automaton"),
        spec("noise"),
        spec("done", st.integers(1, 7)),
        reader,
        spec("usual", just({"logit_bias": {255: 4.0, 7: -3.0}})),
        spec("usual", just({"repetition_penalty": 1.3, "repetition_context_size": 5})),
        spec("usual", just({"presence_penalty": 0.5, "frequency_penalty": 0.3})),
    ]
    if not kind.together:
        return st.lists(st.one_of(*options, RAISES), min_size=1, max_size=2)
    together = st.one_of(spec("waits"), eager, second(kind, step))
    some = st.lists(either(st.one_of(*options), 0.4, together), min_size=1, max_size=2)
    return either(some, 0.1, just([["sum", "lazy"]])) if step == "generate" else some


@functools.cache
def steps(kind: Kind) -> dict[str, SearchStrategy[Step]]:
    """Steps, by their names; options that are left out have a default."""

    def change(step: str) -> dict[str, SearchStrategy[Any]]:
        return {"how": one("clear", "extend", "swap"), "to": processors(kind, step)}

    def generation(name: str, **more: SearchStrategy[Any] | Maybe) -> SearchStrategy[Step]:
        return record(
            op=just(name),
            prompt=PROMPT,
            n=one(1, 2, 4, 6, 9, 12),
            sampler=Maybe(0.55, samplers(kind, name)),
            processors=Maybe(0.45, processors(kind, name)),
            **more,
        )

    if kind.turns:
        return {
            "generate": generation("generate"),
            "wrap": WRAP,
            "unwrap": record(op=just("unwrap")),
        }
    cached: dict[str, Any] = {"cache": Maybe(0.35, CACHE)}
    other: dict[str, Any] = {"other": Maybe(0.1, just(True))}
    usual: dict[str, Any] = {
        "stream": Maybe(0.3, just(True)),
        "leave": Maybe(0.3, SOME),
        "keep": Maybe(0.2, just(True)),
        "draws": Maybe(0.2, just(True)),
        "early": Maybe(0.05, just(True)),
        "prefill_step_size": Maybe(0.3, one(4, 16)),
        **cached,
    }
    if kind.heads:
        usual["kv_bits"] = Maybe(0.5, one(4, 8))
    made = {
        "generate": generation(
            "generate",
            **usual,
            **other,
            change=Maybe(0.15, record(at=SOME, **change("generate"))),
            max_kv_size=Maybe(0.15, one(8, 16)),
            callback=Maybe(0.1, one("draw", "model", "raise")),
        ),
        "speculate": generation(
            "speculate",
            **usual,
            change=Maybe(0.15, record(at=SOME, **change("speculate"))),
            draft=one("same", "qwen2-untied"),
            num_draft_tokens=Maybe(0.5, one(1, 3, 5)),
        ),
        "insert": record(
            op=just("insert"),
            batch=BATCH,
            requests=st.lists(
                record(
                    prompt=PROMPT,
                    n=one(1, 3, 6, 10),
                    sampler=Maybe(0.25, samplers(kind, "insert")),
                    processors=Maybe(0.2, processors(kind, "insert")),
                ),
                min_size=1,
                max_size=3,
            ),
            # These are of the batch; they count where this step makes it.
            sampler=Maybe(0.3, samplers(kind, "insert")),
            max_kv_size=Maybe(0.2, just(16)),
            prefill_step_size=Maybe(0.3, just(8)),
            narrow=Maybe(0.2, just(True)),
            **cached,
            **other,
        ),
        "own": record(
            op=just("own"),
            prompt=st.tuples(st.integers(0, 255), one(1, 7, 20)).map(list),
            many=one(1, 1, 3),
            n=one(1, 4, 8),
            sampler=Maybe(0.5, samplers(kind, "own")),
            how=Maybe(0.4, one("chunks", "guidance", "two blocks", "forgets")),
            **cached,
            **other,
        ),
        "change": record(op=just("change"), batch=BATCH, which=WHICH, **change("change")),
        "next": record(
            op=just("next"),
            batch=BATCH,
            times=one(1, 2, 5, 12),
            progress=Maybe(0.2, just(True)),
        ),
        "remove": record(op=just("remove"), batch=BATCH, which=WHICH, **cached),
        "close": record(op=just("close"), batch=BATCH),
        "resume": record(op=just("resume"), which=WHICH, leave=Maybe(0.5, just(3))),
        "direct": record(op=just("direct"), prompt=PROMPT, **cached, **other),
        "seed": record(op=just("seed"), to=NUMBER),
        "store": record(op=just("store"), cache=CACHE, copies=Maybe(0.3, just(True))),
        "trim": record(op=just("trim"), cache=CACHE, by=one(1, 3, 50)),
        "dtype": record(op=just("dtype"), to=one("float16", "bfloat16", "float32")),
        "adapter": record(
            op=just("adapter"), where=one("head", "embedding", "layer", "wrapped head")
        ),
        "wrap": WRAP,
        "unwrap": UNWRAP,
    }
    for name in ("draw", "look", "save", "quantize", "new_head"):
        made[name] = record(op=just(name))
    for name in ("generate", "speculate"):  # README.md says what differs there
        made[name] = made[name].map(lambda s: without(s, "kv_bits") if "raises" in repr(s) else s)
    return made


WHICH = st.integers(0, 3)
WRAP = record(op=just("wrap"), place=one(*PLACES), who=one([0], [0], [1], [0, 1, 2]))
UNWRAP = record(op=just("unwrap"))

"""Run by test_kinds.py as a rank: kinds of programs that do more while they sample than to sample.

A program is a function below; `kind` names the loops of mlx-lm, and the other choices, in which it
is done. It gives what a user sees of it on this rank, and with the plugin that must be what it is
without it. What unpatched cannot be asked, since it stands still, is `alone_with_the_plugin`: such
a program gives what was seen and what ought to be.

Its arguments are names of programs; without any, all are done.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import itertools
import logging
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import numpy as np
import ranks
import tiny_models
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler

import mlx_lm_skiphead

loops = importlib.import_module("mlx_lm.generate")
GROUP = ranks.join()
RANK, SIZE = GROUP.rank(), GROUP.size()
MODE = mlx_lm_skiphead.status().mode
FILES = Path(os.environ["RANK_RESULTS"])
VOCAB = tiny_models.VOCAB
PROMPT, OTHER = tiny_models.PROMPTS[1], [5, 6]
LOOPS = ("generate", "batch", "speculation")
STUCK = 30  # seconds after which a program that has not ended says where it is, and ends


def pipelined(case, **changes):
    model = tiny_models.make(case, **changes)
    model.model.pipeline(GROUP)
    return model


MODEL = pipelined("qwen2-untied", num_hidden_layers=3)
DRAFT = tiny_models.make("qwen2-untied", num_hidden_layers=3)
"""The same, but for some noise: now and then it is right."""
DRAFT.lm_head.weight += 0.03 * mx.random.normal(DRAFT.lm_head.weight.shape, key=mx.random.key(4))
mx.eval(DRAFT.parameters())
SECOND = pipelined("deepseek_v3", num_hidden_layers=3)
WHOLE = tiny_models.make("qwen2-tied", num_hidden_layers=2)
# With heads enough for two ranks and for three.
WIDE = {"num_attention_heads": 6, "num_key_value_heads": 6, "hidden_size": 96}
SHARDED = tiny_models.make("qwen2-untied", num_hidden_layers=2, intermediate_size=192, **WIDE)
SHARDED.shard(GROUP)


def rest():
    """No step is in flight on any rank: the next program meets nothing of the last one's."""
    mx.synchronize(loops.generation_stream)
    mx.eval(mx.distributed.all_sum(mx.zeros((1,))))


def steps(loop, sampler=None, processors=None, n=8, rows="all", prompt=PROMPT, **options):
    """Tokens as `loop` gives them; in a batch two requests, with one sampler, or "one" with it."""
    if loop == "generate":
        for token, _ in loops.generate_step(
            mx.array(prompt),
            MODEL,
            max_tokens=n,
            sampler=sampler,
            logits_processors=processors,
            **options,
        ):
            yield token
    elif loop == "speculation":
        for token, _, from_draft in loops.speculative_generate_step(
            mx.array(prompt),
            MODEL,
            DRAFT,
            max_tokens=n,
            num_draft_tokens=2,
            sampler=sampler,
            logits_processors=processors,
            **options,
        ):
            yield [token, from_draft]
    else:
        of_all = sampler if rows == "all" else None
        batch = loops.BatchGenerator(MODEL, max_tokens=n, sampler=of_all)
        batch.insert(
            [prompt, OTHER],
            samplers=[None if rows == "all" else sampler, None],
            logits_processors=[[] if processors is None else processors, []],
        )
        while responses := batch.next_generated():
            yield [[r.uid, r.token] for r in responses]
        batch.close()


def seen(steps, error=()):
    """What `steps` give, and the error of this class with which they end."""
    told = []
    try:
        told.extend(steps)
    except error as raised:
        told.append(f"{type(raised).__name__}: {raised}")
    return told


def after():
    """A usual generation, when all is at rest."""
    rest()
    return list(steps("generate", n=3))


def greedy(logprobs):
    return mx.argmax(logprobs, axis=-1)


PROGRAMS, ALONE, BY_VALUE = {}, {}, {}


def kind(programs=PROGRAMS, **choices):
    """The function is a program for each combination of `choices`, its arguments."""

    def add(function):
        for values in itertools.product(*choices.values()):
            name = ", ".join([function.__name__.replace("_", " "), *values])
            options = dict(zip(choices, values, strict=True))
            programs[name] = lambda options=options: function(**options)
        return function

    return add


def alone_with_the_plugin(**choices):
    return kind(ALONE, **choices)


def by_value(**choices):
    """Its ranks are given different prompts, which unpatched's are not or do not notice."""
    return kind(BY_VALUE, **choices)


# Collectives of the program's own. Unpatched stands still with a lazy one in speculation.


def rank_zeros(ids):
    mine = ids.astype(mx.int32)
    return mx.distributed.all_sum(mine if RANK == 0 else mine * 0).astype(mx.uint32)


@kind(how=["eager"], loop=LOOPS)
@kind(how=["lazy"], loop=["generate", "batch"])
def broadcast(how, loop):
    """A sampler that gives rank 0's ids to all ranks itself, and may look at them before."""

    def sampler(logprobs):
        ids = greedy(logprobs)
        if how == "lazy":
            return rank_zeros(ids)
        ids.tolist()
        everyone = rank_zeros(ids)
        mx.eval(everyone)
        return everyone

    return [list(steps(loop, sampler)), after()]


@kind(how=["eager", "by tokens"], loop=LOOPS)
@kind(how=["lazy"], loop=["generate", "batch"])
def summed_bias(how, loop):
    """A processor that adds what all ranks together have against a token."""
    calls = itertools.count()

    def processor(tokens, logits):
        by = tokens[-1:] if how == "by tokens" else next(calls)
        mine = 2.0 * mx.sin(mx.arange(VOCAB) * (RANK + 1.0) + by)
        if how != "lazy":
            mx.eval(logits)
        bias = mx.distributed.all_sum(mine)
        if how != "lazy":
            mx.eval(bias)
        return logits + bias

    return [list(steps(loop, processors=[processor])), after()]


@kind()
def summed_bias_not_used():
    """A lazy sum over ranks in logits from which a grammar's forced ids do not come."""
    forced = itertools.count(5)

    def processor(tokens, logits):
        return logits + mx.distributed.all_sum(mx.ones((1,)))

    sampler = lambda logprobs: mx.array([next(forced)])  # noqa: E731
    return [list(steps("generate", sampler, [processor])), after()]


class Exchange:
    """Rank 0 writes a file at each call, and the other ranks wait for it, but not for ever."""

    numbers = itertools.count()

    def __init__(self):
        self.number = next(self.numbers)
        self.calls = itertools.count()

    def __call__(self, ids):
        file = FILES / f"exchange-{self.number}-{next(self.calls)}"
        if RANK == 0:
            part = file.with_suffix(".part")
            np.save(part.open("wb"), np.array(ids))
            part.replace(file)
            return ids
        until = time.monotonic() + 20
        while not file.exists():
            if time.monotonic() > until:
                raise TimeoutError(file.name)
            time.sleep(0.0005)
        return mx.array(np.load(file))


@kind(where=["sampler", "processor"], loop=LOOPS)
def waits_for_a_file(where, loop):
    """What looks at logits and then waits until rank 0 has written down what it has chosen."""
    exchange = Exchange()

    def sampler(logprobs):
        logprobs.tolist()
        return exchange(greedy(logprobs))

    def processor(tokens, logits):
        logits[0, 0].item()
        best = exchange(greedy(logits))
        return mx.where(mx.arange(VOCAB) == best[:, None], logits - 1.5, logits)

    options = {"sampler": sampler} if where == "sampler" else {"processors": [processor]}
    return [list(steps(loop, **options)), after()]


# Models within a step. Each pass has ended before the next is built: unpatched has no order either
# where two lazy ones are in one graph.


def second_model(which):
    """A function that gives logits ``(1, V)`` for a next token ``(1, 1)``."""
    model = {"pipelined": SECOND, "sharded": SHARDED, "whole": WHOLE, "stage": MODEL}[which]
    cache = make_prompt_cache(model)

    def call(token):
        if which == "stage":
            hidden = MODEL.model(token, cache=cache)[:, -1]
            out = hidden.sum(axis=-1, keepdims=True) * mx.sin(mx.arange(VOCAB))
        else:
            out = model(token, cache=cache)[:, -1]
        mx.eval(out)
        return out

    call(mx.array([[7, 8, 9]]))
    mx.eval([c.state for c in cache])
    rest()
    return call


@kind(which=["pipelined", "sharded", "whole", "stage"], where=["processor", "sampler"], loop=LOOPS)
def guidance(which, where, loop):
    """A second model, or the stage alone, is called for each token."""
    second = second_model(which)
    calls = itertools.count()

    def processor(tokens, logits):
        mx.eval(logits)
        return logits - 0.5 * second(tokens[-1:][None])

    def sampler(logprobs):
        mx.eval(logprobs)
        return greedy(logprobs - 0.5 * second(mx.array([[next(calls) % 50]])))

    options = {"sampler": sampler} if where == "sampler" else {"processors": [processor]}
    return [list(steps(loop, n=6, rows="one", **options)), after()]


# What samplers give.


@kind(count=["0", "3"], loop=LOOPS)
def shape_by_value(count, loop):
    """A sampler that has another number of ids for logits that are no numbers."""

    def sampler(logprobs):
        if mx.isnan(logprobs).any().item():
            return mx.zeros((int(count),), mx.uint32)
        return greedy(logprobs)

    return [list(steps(loop, sampler)), after()]


# In speculation upstream takes as many ids as it needs, without a word.
@kind(value=["of all", "of rank 0"], loop=["generate", "batch"])
def wrong_number(value, loop):
    """A sampler that once gives an id too many: an error, upstream's here and there."""
    calls = itertools.count()

    def sampler(logprobs):
        ids = greedy(logprobs)
        too_many = next(calls) == 3
        if value == "of rank 0":
            too_many = too_many and not mx.isnan(logprobs).any().item()
        return mx.concatenate([ids, ids[:1]]) if too_many else ids

    *told, error = seen(steps(loop, sampler), Exception)
    return [told, isinstance(error, str), after()]


# Lists of processors that change.


def bias(of):
    def processor(tokens, logits):
        return mx.where((mx.arange(VOCAB) + of) % 3 == 0, logits - 6.0, logits)

    return processor


class Chosen(list):
    """A list that decides anew, each time it is read, which of its members count."""

    enabled = True

    def __iter__(self):
        return iter([p for p in list.__iter__(self) if self.enabled])


@kind(change=["clear", "extend", "swap", "filter"], loop=LOOPS)
def live_list(change, loop):
    """The list of processors is another one from the fourth step on."""
    processors = Chosen([bias(1)]) if change == "filter" else [bias(1)]
    told = []
    for step in steps(loop, processors=processors, n=9):
        told.append(step)
        if len(told) == 3:
            if change == "clear":
                processors.clear()
            elif change == "extend":
                processors.extend([bias(2), *make_logits_processors({9: 3.0})])
            elif change == "swap":
                processors[0] = bias(2)
            else:
                processors.enabled = False
    return [told, after()]


# What reads numbers.

NORM_SAW_NAN = {}


@kind(how=["eager", "lazy"], loop=LOOPS)
def tap(how, loop):
    """A package that looks at the hidden states which the final norm gets."""
    cls, norm, taken = type(MODEL.model.norm), MODEL.model.norm, []
    calls = cls.__call__

    def tapped(self, x):
        if self is norm and x.shape[1] <= 3:  # not a prefill, which never ends in a norm
            taken.append(mx.isnan(x).any())
            if how == "eager":
                mx.eval(taken[-1])
        return calls(self, x)

    cls.__call__ = tapped
    try:
        told = list(steps(loop))
        rest()
    finally:
        cls.__call__ = calls
    NORM_SAW_NAN[f"{how}, {loop}"] = sorted({flag.item() for flag in taken})
    return [told, len(taken) > 4, after()]


@kind(reader=["memoryview", "frombuffer"], where=["processor", "sampler"], loop=LOOPS)
def buffers(reader, where, loop):
    """A loop that ends when what reads the memory of logits has been fed often enough."""
    fed = []

    def read(logits):
        if reader == "memoryview":
            fed.append(len(memoryview(logits).cast("B")))
        else:
            fed.append(np.frombuffer(logits, np.float32).size)

    def processor(tokens, logits):
        read(logits)
        return logits

    def sampler(logprobs):
        read(logprobs)
        return greedy(logprobs)

    told = []
    options = {"sampler": sampler} if where == "sampler" else {"processors": [processor]}
    for step in steps(loop, n=50, **options):
        told.append(step)
        if len(fed) >= 6:
            break
    return [told, fed, after()]


# Threads. They are kept: MLX may abort where a thread ends in which it has computed.

THREADS = [ThreadPoolExecutor(1) for _ in range(2)]


def in_thread(number, function, *args):
    return THREADS[number].submit(function, *args).result()


def rest_in_threads():
    for number in range(len(THREADS)):
        in_thread(number, mx.synchronize, loops.generation_stream)
        in_thread(number, mx.synchronize)


@kind(order=["by turns", "moved", "from the main thread"], loop=LOOPS)
def threads(order, loop):
    """The steps of one generation are asked for in several threads, one after another.

    Each thread evaluates the caches: unpatched leaves a lazy array in them on workers, which no
    other thread can compute. The generation ends where it has begun: MLX refuses to leave a stream
    in another thread.
    """
    main = None
    order = {
        "by turns": [0, 1] * 4,
        "moved": [0, 0, 0, 1, 1, 1, 1, 1],
        "from the main thread": [main, 0, 0, 0, main, 1, 1, 1],
    }[order]
    if loop == "batch":
        batch = loops.BatchGenerator(MODEL, max_tokens=8)
        batch.insert([PROMPT, OTHER], logits_processors=[[bias(1)], []])

        def ask():
            told.append([[r.uid, r.token] for r in batch.next_generated()])
            mx.eval([c.state for c in batch._generation_batch.prompt_cache])
    else:
        cache = make_prompt_cache(MODEL)
        cache += make_prompt_cache(DRAFT) if loop == "speculation" else []
        running = steps(loop, make_sampler(0.0), [bias(1)], prompt_cache=cache)

        def ask():
            told.append(next(running, None))
            mx.eval([c.state for c in cache])

    told = []
    for thread in [*order, order[0]]:
        if thread is main:
            ask()
        else:
            in_thread(thread, ask)
    if loop == "batch":
        batch.close()
    rest_in_threads()
    return [told, after()]


# Errors.


def raising(error, who, at=3, then=greedy):
    """A sampler that raises at a call, on the ranks `who`."""
    calls = itertools.count()

    def sampler(logprobs):
        if next(calls) == at and RANK in who:
            raise error(f"call {at} on rank {RANK}")
        return then(logprobs)

    return sampler


@kind(error=["KeyboardInterrupt", "ValueError", "SystemExit"], loop=LOOPS)
def all_raise(error, loop):
    """A sampler that raises at one call on all ranks; with Ctrl-C it leaves at once."""
    error = {"KeyboardInterrupt": KeyboardInterrupt, "ValueError": ValueError}.get(
        error, SystemExit
    )
    told = seen(steps(loop, raising(error, range(SIZE))), error)
    rest()
    return [told, after()]


@kind(loop=["generate", "batch"])
def looks_and_raises(loop):
    """Ctrl-C reaches all ranks while they look at logits."""
    calls = itertools.count()

    def sampler(logprobs):
        ids = greedy(logprobs)
        ids.tolist()
        if next(calls) == 3:
            raise KeyboardInterrupt
        return ids

    return [seen(steps(loop, sampler), KeyboardInterrupt), after()]


@alone_with_the_plugin(loop=LOOPS)
def rank_zero_raises(loop):
    """A sampler that raises on rank 0 only: all ranks leave. Unpatched the others stand still."""
    told = seen(steps(loop, raising(ValueError, [0], at=2)), Exception)
    told[-1] = told[-1] if RANK == 0 else told[-1].split(":")[0]
    # In speculation call 2 is the first of the pipelined model, and in the others the third.
    right = [] if loop == "speculation" else list(steps(loop))[:2]
    error = "ValueError: call 2 on rank 0" if RANK == 0 else "RuntimeError"
    return [[told, after()], [[*right, error], after()]]


@alone_with_the_plugin(loop=LOOPS, who=["rank 1", "last rank"])
def worker_raises(loop, who):
    """A sampler that raises on a worker only: it goes on. Unpatched the others stand still."""
    sampler = raising(ValueError, [1 if who == "rank 1" else SIZE - 1], at=2)
    return [[list(steps(loop, sampler)), after()], [list(steps(loop)), after()]]


@alone_with_the_plugin(who=["rank 0", "rank 1"])
def one_rank_raises_in_a_draft(who):
    """Nobody can go on without one rank's draft: an error on all ranks."""
    sampler = raising(ValueError, RANKS[who], at=3)
    *told, error = seen(steps("speculation", sampler), Exception)
    right = list(steps("speculation"))[: len(told)]
    return [[told, isinstance(error, str), after()], [right, True, after()]]


@alone_with_the_plugin(loop=LOOPS)
def worker_raises_each_time(loop):
    """A processor that cannot do with logits that are no numbers."""

    def processor(tokens, logits):
        if mx.isnan(logits).any().item():
            raise ValueError("no numbers")
        return logits

    told = list(steps(loop, processors=[processor]))
    return [[told, after()], [list(steps(loop)), after()]]


@kind(loop=LOOPS, what=["all", "nobody"])
def replaced_call(loop, what):
    """Another package has replaced the model's call by its own, and a sampler raises."""
    cls, called = type(MODEL), itertools.count()
    calls = cls.__call__

    def own(self, inputs, cache=None, input_embeddings=None):
        next(called)
        return self.lm_head(self.model(inputs, cache, input_embeddings))

    cls.__call__ = own
    try:
        sampler = raising(ValueError, range(SIZE) if what == "all" else ())
        told = seen(steps(loop, sampler), ValueError)
        # In speculation a draft that fails is told with the step's ids, some calls later.
        count = loop != "speculation" and next(called)
        rest()
        told.append(after())
    finally:
        cls.__call__ = calls
    return [told, count, after()]


# Prompts.


@kind(loop=LOOPS)
def usual(loop):
    """Generations of all kinds, one after another, and into each other's caches."""
    told = [list(steps(loop)), list(steps(loop, make_sampler(0.8), [bias(1)]))]
    for prompt in tiny_models.PROMPTS:
        told.append(list(steps(loop, prompt=prompt, n=3)))
    if loop == "generate":
        cache = make_prompt_cache(MODEL)
        for prompt in (PROMPT, OTHER, [9]):
            told.append(
                [
                    token
                    for token, _ in loops.generate_step(
                        mx.array(prompt), MODEL, max_tokens=3, prompt_cache=cache
                    )
                ]
            )
            rest()
    return [told, after()]


@kind()
def joins():
    """Requests that come and go while a batch runs."""
    batch = loops.BatchGenerator(MODEL, max_tokens=9)
    uids = batch.insert([PROMPT])
    told = []
    for number in range(14):
        told.append([[r.uid, r.token] for r in batch.next_generated()])
        if number in (1, 4, 9):
            uids += batch.insert([[number, 8], [40 + number] * 5][: 1 + number % 2])
        if number == 5:
            batch.remove(uids[1:2])
    batch.close()
    return [told, after()]


DIFFERENT = {}


def note(name, prompts, generations=1):
    """Which ranks have had other prompts than rank 0, all of one length, and how often."""
    ids = mx.array([token for prompt in prompts for token in prompt])
    rows = np.array(mx.distributed.all_gather(ids)).reshape(SIZE, -1).tolist()
    ranks_that_differ = [rank for rank in range(SIZE) if rows[rank] != rows[0]]
    DIFFERENT[name] = {"ranks": ranks_that_differ, "generations": generations}


def best_of_four():
    """The answer of four that this rank finds the likeliest, by the mean of its logprobs."""
    answers = []
    for number in range(4):
        mx.random.seed(40 + number)
        options = {"max_tokens": 4, "sampler": make_sampler(1.0)}
        found = [
            (token, logprobs[token].item())
            for token, logprobs in loops.generate_step(mx.array(PROMPT), MODEL, **options)
        ]
        answers.append(([token for token, _ in found], sum(p for _, p in found) / 4))
        rest()
    return max(answers, key=lambda answer: answer[1])[0]


def likeliest(prompt, count):
    """The tokens that this rank finds the likeliest next, the likeliest last."""
    *_, (_, logprobs) = loops.generate_step(mx.array(prompt), MODEL, max_tokens=1)
    rest()
    return mx.argsort(logprobs)[-count:].tolist()


@by_value(loop=["generate", "batch"])
def best_of(loop):
    """Best of four by mean logprob; each rank goes on with the one that it has chosen."""
    prompt = [*PROMPT, *best_of_four()]
    told = list(steps(loop, prompt=prompt, n=4))
    rest()
    note(f"best of, {loop}", [prompt])
    return told


@by_value()
def tree():
    """A tree search: the three likeliest next tokens, each of them gone on with in one batch."""
    prompts = [[*PROMPT, token] for token in likeliest(PROMPT, 3)]
    batch = loops.BatchGenerator(MODEL, max_tokens=4)
    batch.insert(prompts)
    told = []
    while responses := batch.next_generated():
        told.append([[r.uid, r.token] for r in responses])
    batch.close()
    rest()
    note("tree", prompts)
    return told


@by_value()
def path():
    """A search, a token at a time: each generation but the first has a prompt of this rank's."""
    prompt = list(PROMPT)
    for _ in range(2):
        prompt.append(likeliest(prompt, 2)[0])
    told = list(steps("generate", prompt=prompt, n=3))
    rest()
    note("path", [prompt], generations=2)
    return told


@by_value(loop=["generate", "batch"])
def another_prompt(loop):
    """The last rank alone was given another prompt."""
    prompt = [*PROMPT, 30 + (RANK == SIZE - 1)]
    told = list(steps(loop, prompt=prompt, n=4))
    rest()
    note(f"another prompt, {loop}", [prompt])
    return told


# Functions that another package has wrapped, as plain closures, on some ranks.

PLACES = {
    "eval": (mx, "eval"),
    "async_eval": (mx, "async_eval"),
    "all_gather": (mx.distributed, "all_gather"),
    "all_sum": (mx.distributed, "all_sum"),
    "generate_step": (loops, "generate_step"),
    "model": (type(MODEL), "__call__"),
    "stage": (type(MODEL.model), "__call__"),
    "batch": (loops.GenerationBatch, "_step"),
}
RANKS = {"rank 0": [0], "rank 1": [1], "all ranks": range(SIZE)}


@contextlib.contextmanager
def closure(owner, attribute, counted):
    real = getattr(owner, attribute)

    def counting(*args, **kwargs):
        counted.append(attribute)
        return real(*args, **kwargs)

    setattr(owner, attribute, counting)
    try:
        yield
    finally:
        setattr(owner, attribute, real)


def two_loops():
    told = [list(steps("generate", n=3)), list(steps("batch", n=3))]
    rest()
    return told


@kind(place=PLACES, who=RANKS)
def closures(place, who):
    """Put there between two generations, and taken out again: how often, is nobody's concern."""
    told, counted = [two_loops()], []
    with closure(*PLACES[place], counted) if RANK in RANKS[who] else contextlib.nullcontext():
        told += [two_loops(), list(steps("speculation", n=3))]
        rest()
    return [told, bool(counted), two_loops()]


# The others are refused where they are not mlx-lm's own: on all ranks, or the ranks do not agree.
@kind(place=["eval", "async_eval", "all_gather", "all_sum"], who=RANKS)
@kind(place=["generate_step", "model", "stage", "batch"], who=["all ranks"])
def closures_first(place, who):
    """Put there before the plugin is installed."""
    if MODE != "off":
        mlx_lm_skiphead.uninstall()
    counted = []
    with closure(*PLACES[place], counted) if RANK in RANKS[who] else contextlib.nullcontext():
        if MODE != "off":
            mlx_lm_skiphead.install(MODE)
        told = [two_loops(), list(steps("speculation", n=3)), bool(counted)]
        rest()
        if MODE != "off":
            mlx_lm_skiphead.uninstall()
    if MODE != "off":
        mlx_lm_skiphead.install(MODE)
    return [told, after()]


@kind(who=RANKS)
def nested_closures(who):
    """Two packages have wrapped the same function, and one leaves before the other."""
    counted, other = [], []
    here = RANK in RANKS[who]
    with closure(*PLACES["all_gather"], counted) if here else contextlib.nullcontext():
        with closure(*PLACES["all_gather"], other) if here else contextlib.nullcontext():
            told = [two_loops()]
        told += [two_loops(), list(steps("speculation", n=3))]
        rest()
    return [told, bool(counted), bool(other), two_loops()]


@kind(place=PLACES, who=RANKS)
def closures_midway(place, who):
    """Put there, and taken out, while a generation runs."""
    told, running = [], steps("generate", n=6)
    told += itertools.islice(running, 2)
    with closure(*PLACES[place], []) if RANK in RANKS[who] else contextlib.nullcontext():
        told += itertools.islice(running, 2)
    return [told, list(running), after()]


def run():
    logged = []

    class Handler(logging.Handler):
        def emit(self, record):
            logged.append(record.getMessage())

    logging.getLogger("mlx_lm_skiphead").addHandler(Handler(logging.WARNING))
    programs = PROGRAMS | BY_VALUE | (ALONE if MODE != "off" else {})
    names = sys.argv[1:] or [*programs]
    told, warnings, seconds = {}, {}, {}
    rest()
    for name in names:
        faulthandler.dump_traceback_later(STUCK, exit=True)
        print(RANK, name, file=sys.stderr, flush=True)
        mx.random.seed(7)
        begun = time.monotonic()
        try:
            told[name] = programs[name]()
        except BaseException as error:
            told[name] = f"{type(error).__name__}: {error}"
            print(told[name], file=sys.stderr, flush=True)
        rest()
        seconds[name] = round(time.monotonic() - begun, 2)
        warnings[name] = [*logged]
        logged.clear()
    faulthandler.cancel_dump_traceback_later()
    ranks.report(
        {
            "programs": told,
            "alone": [*ALONE],
            "by value": [*BY_VALUE],
            "warnings": warnings,
            "different": DIFFERENT,
            "norm saw NaN": NORM_SAW_NAN,
            "seconds": seconds,
        }
    )


run()
os._exit(0)  # MLX may abort at the exit of a process in which a thread has computed

"""Run by test_loop.py, as a rank or alone: scenarios by name, in turn; reports what each saw."""

from __future__ import annotations

import importlib
import itertools
import os
import signal
import sys
import threading

import mlx.core as mx
import ranks
import tiny_models
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler

import mlx_lm_skiphead
from mlx_lm_skiphead.cli.measure import count_heads
from mlx_lm_skiphead.config import requested_mode

generate = importlib.import_module("mlx_lm.generate")
early_generate_step = generate.generate_step
scenario = ranks.ByName()


class Pipeline:
    """The tiny model, pipelined where there are ranks to do so."""

    def __init__(self, case="deepseek_v3"):
        self.group = ranks.join()
        self.model = tiny_models.make(case)
        if self.group.size() > 1:
            self.model.model.pipeline(self.group)

    def tokens(self, prompt=1, limit=8, step=None, **options):
        prompt = tiny_models.PROMPTS[prompt] if isinstance(prompt, int) else prompt
        step = step or generate.generate_step
        return [t for t, _ in step(mx.array(prompt), self.model, max_tokens=limit, **options)]


@scenario
def guard_alone():
    """The pull request's guard as it was written, and nothing else."""
    from mlx_lm.models import deepseek_v3

    def guarded(self, inputs, cache=None):
        out = self.model(inputs, cache)
        return out if self.model.pipeline_rank != 0 else self.lm_head(out)

    pipeline = Pipeline()
    right = pipeline.tokens()
    upstream, deepseek_v3.Model.__call__ = deepseek_v3.Model.__call__, guarded
    told = {"upstream": right, "guard alone": pipeline.tokens()}
    deepseek_v3.Model.__call__ = upstream
    return told


@scenario
def short_requests():
    """A hundred requests of one to three tokens, some left by the caller before their end."""
    pipeline = Pipeline()
    told = []
    for i in range(100):
        prompt = [i + 1] if i % 3 else tiny_models.PROMPTS[1]
        steps = generate.generate_step(mx.array(prompt), pipeline.model, max_tokens=i % 3 + 1)
        # The generator is dropped here with its last step in flight, as on a stop token.
        told.append([next(steps)[0]] if i % 2 else [token for token, _ in steps])
    return told


@scenario
def in_a_thread():
    """As the server does: the model lives in a thread that imported nothing."""
    told = []
    staying(lambda: told.extend(Pipeline("glm4_moe").tokens(limit=16))).wait(100)
    return told


def staying(function):
    """Runs `function` in a thread that does not end; the event says that the function has.

    mlx aborts now and then where a thread that generated ends before its process, with or without
    the plugin; the server's never does.
    """
    done = threading.Event()

    def run():
        function()
        done.set()
        threading.Event().wait()

    threading.Thread(target=run, daemon=True).start()
    return done


@scenario
def two_models():
    """Beside a pipelined model a plain one, which another thread calls while the first decodes."""
    told, stop = {"plain": set(), "direct": set()}, threading.Event()
    started = threading.Event()

    def plain():
        model = tiny_models.make("glm4_moe")
        prompt = mx.array(tiny_models.PROMPTS[1])
        while not stop.is_set():
            steps = generate.generate_step(prompt, model, max_tokens=6)
            told["plain"].add(tuple(token for token, _ in steps))
            told["direct"].add(tuple(model(prompt[None])[0, -1, :4].tolist()))
            started.set()

    done = staying(plain)
    started.wait(60)
    pipeline = Pipeline()
    told["pipelined"] = [pipeline.tokens() for _ in range(20)]
    stop.set()
    done.wait(60)
    return {name: sorted(answers) for name, answers in told.items()}


@scenario
def callbacks():
    """A callback that calls the model gets what upstream gives."""
    pipeline = Pipeline()
    prompt = mx.array([tiny_models.PROMPTS[0]])
    seen = []

    def callback(done, total):
        # mlx-lm 0.31.3 calls back outside its loop's stream, while a step of the loop is in flight:
        # collectives of two streams then meet in another order on each rank, unpatched too.
        with mx.stream(generate.generation_stream):
            seen.append(pipeline.model(prompt)[0, -1, :4].tolist())

    return {"tokens": pipeline.tokens(prompt_progress_callback=callback), "seen": seen}


class Broken(Exception):
    pass


class Stopped(BaseException):
    pass


def looks_at_values(logprobs):
    """A sampler that cannot do with NaN."""
    if mx.isnan(logprobs).any().item():
        raise Broken("not a number")
    return mx.argmax(logprobs, axis=-1)


def failing_at_values(at):
    """A sampler that raises only where it has seen numbers."""
    calls = itertools.count()

    def fail(logprobs):
        if next(calls) == at and not mx.isnan(logprobs).any().item():
            raise Broken("at values")
        return mx.argmax(logprobs, axis=-1)

    return fail


def failing(at, function=None, error=Broken):
    """A sampler, or with `function` a logits processor, that raises when it is called again."""
    calls = itertools.count()

    def fail(*args):
        if next(calls) == at:
            raise error(f"at call {at}")
        return args[1] if function else mx.argmax(args[0], axis=-1)

    return fail


@scenario
def failures():
    """What samplers and processors raise, one after another; after each the ranks go on."""
    pipeline = Pipeline()
    draft = tiny_models.make("deepseek_v3")
    prompt = mx.array([tiny_models.PROMPTS[0]])
    kinds = {
        "a sampler": {"sampler": failing(4)},
        "its first call": {"sampler": failing(0)},
        "a processor": {"logits_processors": [failing(3, "processor")]},
        "shape": {"sampler": lambda logprobs: mx.argmax(logprobs)},
        "the worker's": {"sampler": looks_at_values},
        "only rank 0's": {"sampler": failing_at_values(5)},
        "exit": {"logits_processors": [failing(3, "processor", SystemExit)]},
        "its own": {"logits_processors": [failing(4, "processor", Stopped)]},
        "model": {"sampler": lambda _: mx.argmax(pipeline.model(prompt)[:, -1], axis=-1)},
    }
    if mlx_lm_skiphead.status().mode == "off" and pipeline.group.size() > 1:
        del kinds["model"]  # which stands still
    told = {}
    for kind, options in kinds.items():
        seen = []
        try:
            for token, _ in generate.generate_step(
                mx.array(tiny_models.PROMPTS[1]), pipeline.model, max_tokens=8, **options
            ):
                seen.append(token)
            error = "none"
        except BaseException as raised:
            error = f"{type(raised).__name__}: {raised}"
        mx.synchronize(generate.generation_stream)
        told[kind] = {"error": error, "seen": seen, "after": pipeline.tokens()}
        mx.synchronize(generate.generation_stream)

    seen, calls = [], itertools.count()

    def checked(logprobs):  # one row is the draft's
        if logprobs.shape[0] > 1 and next(calls) == 2:
            raise Broken("in speculation")
        return mx.argmax(logprobs, axis=-1)

    try:
        for token, *_ in generate.speculative_generate_step(
            mx.array(tiny_models.PROMPTS[1]), pipeline.model, draft, max_tokens=20, sampler=checked
        ):
            seen.append(token)
        error = "none"
    except BaseException as raised:
        error = f"{type(raised).__name__}: {raised}"
    told["speculation"] = {"error": error, "seen": seen, "after": pipeline.tokens()}
    mx.synchronize(generate.generation_stream)

    for kind, options in {
        "batch, sampler": {"samplers": [None, failing(3), None]},
        "batch, processor": {"logits_processors": [[], [failing(2, "processor")], []]},
    }.items():
        batch = generate.BatchGenerator(pipeline.model, max_tokens=8)
        batch.insert(tiny_models.PROMPTS, **options)
        seen = []
        try:
            while responses := batch.next_generated():
                seen += [[r.uid, r.token] for r in responses]
            error = "none"
        except BaseException as raised:
            error = f"{type(raised).__name__}: {raised}"
        batch.close()
        mx.synchronize(generate.generation_stream)
        again = generate.BatchGenerator(pipeline.model, max_tokens=4)
        again.insert(tiny_models.PROMPTS)
        after = []
        while responses := again.next_generated():
            after += [r.token for r in responses]
        again.close()
        mx.synchronize(generate.generation_stream)
        told[kind] = {"error": error, "seen": seen, "after": after}
    return told


@scenario
def uninstalled_midway():
    """While a generation runs uninstalling is an error; afterwards the next is upstream's."""
    pipeline = Pipeline()
    steps = generate.generate_step(
        mx.array(tiny_models.PROMPTS[1]), pipeline.model, max_tokens=8, sampler=make_sampler(0.8)
    )
    mx.random.seed(7)
    told = {"tokens": [next(steps)[0], next(steps)[0]]}
    batch = generate.BatchGenerator(pipeline.model, max_tokens=4)

    def refused():
        try:
            mlx_lm_skiphead.uninstall()
        except mlx_lm_skiphead.SkipheadError as error:
            return str(error)

    told["refused"] = [refused()]
    with count_heads(pipeline.model) as count:
        told["tokens"] += [token for token, _ in steps]
    told["heads, running"] = count()
    batch.insert(tiny_models.PROMPTS[:1])
    batch.next_generated()
    told["refused"].append(refused())
    batch.remove([0])
    batch.close()
    late = generate.generate_step(mx.array(tiny_models.PROMPTS[1]), pipeline.model, max_tokens=8)
    told["refused"].append(refused())
    told["restored"] = generate.generate_step is early_generate_step.__wrapped__
    with count_heads(pipeline.model) as count:
        told["next"] = [token for token, _ in late]  # begun before, and upstream's all the same
    told["heads, next"] = count()
    return told


@scenario
def not_ours():
    """Loops that are not wrapped are upstream's on every rank, whatever the mode."""
    mlx_lm_skiphead.uninstall()
    upstream = generate.generate_step
    mlx_lm_skiphead.install("hidden")
    pipeline = Pipeline()
    told = {"imported early": pipeline.tokens(step=upstream)}
    draft = tiny_models.make("deepseek_v3")
    # Nothing that is not pipelined is touched.
    told["alone"] = [t for t, _ in generate.generate_step(mx.array([3]), draft, max_tokens=4)]
    return told


@scenario
def speculative():
    """A draft that is often right, often wrong, greedy and not, with processors and without."""
    pipeline = Pipeline()
    told = {}
    for name, case, options in (
        ("same model", "deepseek_v3", {}),
        ("other model", "glm4_moe", {}),
        ("seeded", "deepseek_v3", {"sampler": make_sampler(0.8)}),
        ("processors", "deepseek_v3", {"logits_processors": penalties()}),
        ("all", "glm4_moe", {"sampler": make_sampler(0.8), "logits_processors": penalties()}),
        ("many", "deepseek_v3", {"num_draft_tokens": 5, "sampler": make_sampler(0.5)}),
    ):
        mx.random.seed(7)
        draft = tiny_models.make(case)
        with count_heads(pipeline.model) as count:
            steps = list(
                generate.speculative_generate_step(
                    mx.array(tiny_models.PROMPTS[2]),
                    pipeline.model,
                    draft,
                    max_tokens=12,
                    prefill_step_size=16,
                    **options,
                )
            )
        told[name] = {
            "tokens": [[token, from_draft] for token, _, from_draft in steps],
            "logprobs": [logprobs[token].item() for token, logprobs, _ in steps],
            "random": mx.random.uniform().item(),
            "heads": count(),
        }
    return told


def penalties():
    return make_logits_processors({7: 2.0, 31: -3.0}, 1.3)


@scenario
def counted():
    """Collectives and calls of samplers and processors, unpatched and with the plugin, in turn.

    The last one: it leaves what counts in its place.
    """
    mlx_lm_skiphead.uninstall()
    counts = {"collectives": 0, "samplers": 0, "processors": 0}

    def counting(what, function):
        def counted(*args, **kwargs):
            counts[what] += 1
            return function(*args, **kwargs)

        return counted

    for name in ("all_gather", "all_sum", "send", "recv", "recv_like"):
        function = getattr(mx.distributed, name)
        setattr(mx.distributed, name, counting("collectives", function))
    pipeline = Pipeline()
    sampler = counting("samplers", make_sampler(0.8))
    processors = [counting("processors", p) for p in penalties()]

    def one():
        # A prompt of one token: no prefill, whose collectives are built and never computed.
        pipeline.tokens(0, 10, sampler=sampler, logits_processors=processors)

    def several():
        batch = generate.BatchGenerator(pipeline.model, max_tokens=10)
        samplers = [sampler, counting("samplers", make_sampler(0.5)), None]
        batch.insert(
            [[1], [2], [3]], samplers=samplers, logits_processors=[processors, [], processors]
        )
        while batch.next_generated():
            pass
        batch.close()

    def draft():
        for _ in generate.speculative_generate_step(
            mx.array([1]),
            pipeline.model,
            tiny_models.make("glm4_moe"),
            max_tokens=10,
            logits_processors=penalties(),
        ):
            pass

    told = {}
    for name, loop in (("one", one), ("several", several), ("draft", draft)):
        for way in (mlx_lm_skiphead.uninstall, mlx_lm_skiphead.install):
            mx.random.seed(1)
            counts.update(dict.fromkeys(counts, 0))
            way()
            loop()
            mx.synchronize(generate.generation_stream)
            told.setdefault(name, {})[way.__name__] = dict(counts)
    return told


@scenario
def cancelled():
    """Requests that leave before their end, and ones that come after."""
    pipeline = Pipeline()
    mx.random.seed(7)
    batch = generate.BatchGenerator(pipeline.model, max_tokens=20, sampler=make_sampler(0.8))
    first, second = batch.insert(tiny_models.PROMPTS[:2])
    told = []

    def steps(count):
        for _ in range(count):
            told.extend([r.uid, r.token] for r in batch.next_generated())

    steps(3)
    batch.remove([first])
    steps(4)
    batch.insert([[9, 8]], max_tokens=[3])
    steps(4)
    batch.remove([second])
    steps(2)
    batch.insert([[5, 5, 5]], max_tokens=[6])
    steps(6)
    batch.close()
    return {"told": told, "random": mx.random.uniform().item()}


@scenario
def own_loop():
    """`share_tokens` where it is called, for numbers of all kinds, and what it refuses."""
    pipeline = Pipeline()
    cache = make_prompt_cache(pipeline.model)
    prompts = mx.array([[1, 2, 3], [4, 5, 6]])
    errors = []

    def refused(call):
        try:
            call()
        except TypeError as error:
            errors.append(f"{type(error).__name__}: {error}")

    rank = pipeline.group.rank()
    with mlx_lm_skiphead.rank_zero_head():
        logits = pipeline.model(prompts, cache=cache)
        inside = mlx_lm_skiphead.share_tokens(mx.array([1 + rank, 2]))
    tokens = mx.argmax(logits[:, -1], axis=-1)
    refused(lambda: mlx_lm_skiphead.share_tokens(logits[:, -1, 0]))
    refused(lambda: mlx_lm_skiphead.share_tokens([1, 2]))
    shared = mlx_lm_skiphead.share_tokens(tokens)
    told = {"first": shared.tolist(), "type": str(shared.dtype), "inside": inside.tolist()}
    with mlx_lm_skiphead.rank_zero_head():
        logits = pipeline.model(shared[:, None], cache=cache)
    # Looking at the logits of a worker makes it send: rank 0 does not wait for ever.
    told["not computed"] = bool(mx.isnan(logits).all().item())
    # Another batch than the model's, and no id: any choice of rank 0's.
    told["choice"] = mlx_lm_skiphead.share_tokens(mx.array([10**6 + rank])).tolist()
    # A call that fills the cache, and is not shared; then one with a head on every rank.
    cache = make_prompt_cache(pipeline.model)
    with mlx_lm_skiphead.rank_zero_head():
        pipeline.model(prompts[:, :2], cache=cache)
    mx.eval([c.state for c in cache])
    logits = pipeline.model(prompts[:, 2:], cache=cache)
    told["mixed"] = mlx_lm_skiphead.share_tokens(mx.argmax(logits[:, -1], axis=-1)).tolist()
    # Nothing was called before these.
    told["shared"] = mlx_lm_skiphead.share_tokens(mx.array([[10 + rank], [20]])).tolist()
    for number in (-5 + rank, 2**40 + rank, -(2**40) + rank):
        wide = mlx_lm_skiphead.share_tokens(mx.array(number, mx.int64))
        told.setdefault("wide", []).append([wide.item(), wide.shape, str(wide.dtype)])
    told["small"] = mlx_lm_skiphead.share_tokens(mx.array([-7 + rank, 9], mx.int8)).tolist()
    told["errors"] = errors
    return told


def killed():
    """A rank is lost while all of them decode."""
    pipeline = Pipeline()
    victim = pipeline.group.rank() == int(sys.argv[2])

    def lose(step):
        if victim and step == 20:
            os.kill(os.getpid(), signal.SIGKILL)

    if sys.argv[3] == "one":
        steps = generate.generate_step(mx.array([1, 2, 3]), pipeline.model, max_tokens=-1)
        for step, _ in enumerate(steps):
            lose(step)
    batch = generate.BatchGenerator(pipeline.model, max_tokens=100_000)
    batch.insert([[1, 2], [3, 4]])
    for step in range(100_000):
        lose(step)
        batch.next_generated()


def main(*scenarios: str) -> None:
    if scenarios[0] == "killed":
        killed()
    mode = requested_mode()
    told = {}
    for name in scenarios:
        mlx_lm_skiphead.uninstall() if mode == "off" else mlx_lm_skiphead.install(mode)
        mx.random.seed(0)
        told[name] = scenario[name]()
        # A loop of upstream's returns with a step in flight: a rank that goes on then would take it
        # from the others. The wrapped loop waits for it.
        mx.synchronize(generate.generation_stream)
    ranks.report(told)
    if {"in_a_thread", "two_models"} & {*scenarios}:
        os._exit(0)  # whose threads stay


main(*sys.argv[1:])

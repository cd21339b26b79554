"""Run by test_programs.py as a rank: programs that people run, one after another.

Its arguments are folders of checkpoints: an untied one, a tied one, and one of qwen3_next. A
program reports what a user sees of it on this rank; with the plugin that must be what it is without
it.
"""

from __future__ import annotations

import importlib
import itertools
import os
import pickle
import shutil
import sys
import threading
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import ranks
import tiny_models
from mlx_lm.models.base import create_attention_mask  # noqa: F401 (STAGE uses it)
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear
from mlx_lm.utils import load_model, save_model, sharded_load

import mlx_lm_skiphead
from mlx_lm_skiphead import rank_zero_head, share_tokens

loops = importlib.import_module("mlx_lm.generate")
UNTIED, TIED, NEXT = map(Path, sys.argv[1:4])
PROMPT = tiny_models.PROMPTS[1]
GROUP = ranks.join()
RANK = GROUP.rank()
OWN = Path(os.environ["RANK_RESULTS"], f"own-{RANK}")  # a folder of this rank's


def load(folder=UNTIED):
    return sharded_load(str(folder), pipeline_group=GROUP)[0]


def lazy(folder=UNTIED):
    """A model whose pipeline the program sets up itself."""
    model, _ = load_model(Path(folder), lazy=True)
    model.model.pipeline(GROUP)
    mx.eval(model.parameters())
    return model


def tokens(model, prompt=PROMPT, limit=8, **options):
    mx.random.seed(7)
    told = [t for t, _ in loops.generate_step(mx.array(prompt), model, max_tokens=limit, **options)]
    mx.synchronize(loops.generation_stream)
    return told


def direct(model):
    """The first numbers of a direct call, and their type."""
    logits = model(mx.array([PROMPT]))[0, -1, :8]
    return [str(logits.dtype), [round(x, 3) for x in logits.astype(mx.float32).tolist()]]


def recast(folder, dtype):
    model = load(folder)
    model.set_dtype(dtype)
    return [tokens(model), direct(model), tokens(model)]


def lora(where, when):
    model = load_model(TIED if where == "embed_tokens" else UNTIED, lazy=True)[0]

    def adapt():
        parent = model.model if where == "embed_tokens" else model
        kind = LoRAEmbedding if where == "embed_tokens" else LoRALinear
        mx.random.seed(3)
        adapted = kind.from_base(getattr(parent, where), r=4, scale=10.0)
        adapted.lora_b = mx.random.normal(adapted.lora_b.shape) * 0.1
        setattr(parent, where, adapted)

    if when == "before":
        adapt()
    model.model.pipeline(GROUP)
    mx.eval(model.parameters())
    if when == "after":
        adapt()
    return [tokens(model), direct(model)]


class Scaled(nn.Module):
    """A head in another one's clothes: no `weight`."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __call__(self, x):
        return self.inner(x) * 1.5


def wrapped_head():
    model = load()
    model.lm_head = Scaled(model.lm_head)
    return [tokens(model), direct(model)]


class Counting:
    """A logits processor whose effect depends on how often it has been called."""

    def __init__(self):
        self.calls = itertools.count()

    def __call__(self, context, logits):
        return logits + 3.0 * (mx.arange(logits.shape[-1]) % 7 == next(self.calls) % 7)


class OwnKey:
    """A sampler that splits a random key of its own."""

    def __init__(self):
        self.key = mx.random.key(11)

    def __call__(self, logprobs):
        self.key, key = mx.random.split(self.key)
        return mx.random.categorical(logprobs, key=key)


def speculation(drafts, **options):
    model, draft = load(), tiny_models.make("glm4_moe")
    mx.random.seed(7)
    steps = loops.speculative_generate_step(
        mx.array(PROMPT), model, draft, max_tokens=20, num_draft_tokens=drafts, **options
    )
    told = [[token, from_draft] for token, _, from_draft in steps]
    mx.synchronize(loops.generation_stream)
    return [told, mx.random.uniform().item(), tokens(model)]


def failing_speculation():
    """A sampler that raises at each of a step's calls, beside a processor that draws numbers."""
    model, draft, told = load(), tiny_models.make("glm4_moe"), []
    for at in range(7):
        mx.random.seed(7)
        calls, seen = itertools.count(), []

        def sampler(logprobs, at=at, calls=calls):
            if next(calls) == at:
                raise ValueError(f"call {at}")
            return mx.argmax(logprobs, axis=-1)

        try:
            for token, *_ in loops.speculative_generate_step(
                mx.array(PROMPT),
                model,
                draft,
                max_tokens=9,
                sampler=sampler,
                logits_processors=[lambda _, logits: logits + mx.random.normal(logits.shape)],
            ):
                seen.append(token)
        except ValueError as error:
            seen.append(str(error))
        mx.synchronize(loops.generation_stream)
        told.append([seen, mx.random.uniform().item()])
    return told


def forced():
    """A sampler whose ids do not come from logits, as where a grammar allows one token only."""
    model, calls = load(), itertools.count(5)
    return [tokens(model, sampler=lambda logprobs: mx.array([next(calls)])), tokens(model)]


class Surprised:
    """A sampler whose next choice depends on the values that it has seen, as Mirostat's."""

    def __init__(self):
        self.surprise = mx.array(0.0)

    def __call__(self, logprobs):
        chosen = mx.argmax(logprobs + 5.0 * mx.sin(self.surprise + mx.arange(logprobs.shape[-1])))
        self.surprise = self.surprise - logprobs.reshape(-1)[chosen]
        rows = logprobs + 5.0 * mx.sin(self.surprise + mx.arange(logprobs.shape[-1]))
        return mx.argmax(rows, axis=-1)


class Stop(BaseException):
    pass


def stopping_at(at, error):
    calls = itertools.count()

    def processor(context, logits):
        if next(calls) == at:
            raise error(f"call {at}")
        return logits

    return processor


def two_batches(second):
    """Two batches by turns; a processor of the first raises, and the first goes on after that."""
    model = load()
    other = load() if second else model
    mx.random.seed(7)
    failing = loops.BatchGenerator(model, max_tokens=12, sampler=make_sampler(0.7))
    going = loops.BatchGenerator(other, max_tokens=12, sampler=make_sampler(0.7))
    failing.insert([PROMPT, [5]], logits_processors=[[stopping_at(4, ValueError)], []])
    going.insert([[9, 8, 7]])
    told = []
    for _ in range(10):
        for name, batch in (("failing", failing), ("going", going)):
            try:
                told.append([name, [[r.uid, r.token] for r in batch.next_generated()]])
            except ValueError as error:
                told.append([name, str(error)])
    failing.close()
    going.close()
    mx.synchronize(loops.generation_stream)
    return [told, mx.random.uniform().item()]


def guidance(how):
    """Two calls of the model for each token."""
    model = load()
    caches = [make_prompt_cache(model), make_prompt_cache(model)]
    inputs = [mx.array([PROMPT]), mx.array([[3, 4]])]
    told = []
    for _ in range(8):
        if how == "one block":
            with rank_zero_head():
                first, second = (
                    model(i, cache=c)[:, -1] for i, c in zip(inputs, caches, strict=True)
                )
        else:
            with rank_zero_head():
                first = model(inputs[0], cache=caches[0])[:, -1]
            if how == "a share each":
                share_tokens(mx.argmax(first, axis=-1))
            with rank_zero_head():
                second = model(inputs[1], cache=caches[1])[:, -1]
        token = share_tokens(mx.argmax(second + 1.5 * (first - second), axis=-1))
        told.append(token.item())
        inputs = [token[:, None]] * 2
    mx.synchronize()
    return told


class Done:
    """A processor that has had enough when it has seen five tokens of the answer."""

    def __init__(self, after=5):
        self.done, self.left = False, after

    def __call__(self, context, logits):
        self.left -= 1
        self.done = self.left <= 0
        return logits


def done():
    model = load()
    told, processor = [], Done()
    for token, _ in loops.generate_step(
        mx.array(PROMPT), model, max_tokens=20, logits_processors=[processor]
    ):
        told.append(token)
        if processor.done:
            break
    mx.synchronize(loops.generation_stream)
    batch = loops.BatchGenerator(model, max_tokens=12)
    processor = Done()
    uids = batch.insert([PROMPT, [5]], logits_processors=[[processor], []])
    while responses := batch.next_generated():
        told += [[r.uid, r.token] for r in responses]
        if processor.done and uids:
            batch.remove(uids[:1])
            uids = []
    batch.close()
    mx.synchronize(loops.generation_stream)
    return told


def looks(context, logits):
    """A processor that cannot do with NaN."""
    int(logits[0, 0].item())
    return logits


def errors():
    """What all ranks raise in one call; beside what only workers raise, before that and after."""
    model, told = load(), []
    for error in (SystemExit, Stop, ValueError):
        for before, after, options in (
            ([], [], {}),
            ([], [], {"sampler": make_sampler(0.8)}),
            ([looks], [], {}),
            ([], [looks], {"sampler": make_sampler(0.8)}),
            # Behind the call that fails, in the same step: keys are too short to be quantized.
            ([], [], {"kv_bits": 8, "kv_group_size": 64, "quantized_kv_start": len(PROMPT) + 3}),
        ):
            seen = []
            try:
                for token, _ in loops.generate_step(
                    mx.array(PROMPT),
                    model,
                    logits_processors=[*before, stopping_at(3, error), *after],
                    **options,
                ):
                    seen.append(token)
            except error as raised:
                seen.append(f"{type(raised).__name__} {raised}")
            mx.synchronize(loops.generation_stream)
            told.append(
                [seen, mx.random.uniform().item(), tokens(model, sampler=make_sampler(0.5))]
            )
    return told


def random():
    """Numbers drawn between the steps, and after a generator that was left and is still there."""
    model, told = load(), []
    mx.random.seed(7)
    kept = []
    for _ in range(2):
        steps = loops.generate_step(mx.array(PROMPT), model, sampler=make_sampler(0.8))
        kept.append(steps)
        for number, (token, _) in enumerate(steps):
            told += [token, mx.random.uniform().item()]
            if number == 4:
                break
        told.append(mx.random.uniform().item())
    mx.synchronize(loops.generation_stream)
    kept.clear()
    return told


def telemetry():
    """A package that gathers a number from each rank in the model's forward pass."""
    model = load()
    cls = type(model)
    calls, seen = cls.__call__, []

    def gathering(self, *args, **kwargs):
        seen.append(mx.distributed.all_gather(mx.array([RANK + 1])))
        out = calls(self, *args, **kwargs)
        seen.append(mx.distributed.all_gather(mx.array([10 * (RANK + 1)])))
        mx.eval(seen[-2])
        mx.async_eval(out)
        mx.eval(seen[-1])
        return out

    cls.__call__ = gathering
    try:
        told = tokens(model, [5], 4)
    finally:
        cls.__call__ = calls
    return [told, [array.tolist() for array in seen]]


def pair():
    """A model that gives its logits and something else."""
    model = load()
    cls, calls = type(model), type(model).__call__

    def both(self, *args, **kwargs):
        out = calls(self, *args, **kwargs)
        return out, out * 2

    cls.__call__ = both
    told, cache, inputs = [], make_prompt_cache(model), mx.array([PROMPT])
    try:
        for _ in range(5):
            with rank_zero_head():
                logits, _ = model(inputs, cache=cache)
            token = share_tokens(mx.argmax(logits[:, -1], axis=-1))
            told.append(token.item())
            inputs = token[:, None]
    finally:
        cls.__call__ = calls
    mx.synchronize()
    return told


def in_thread(function):
    told = []
    thread = threading.Thread(target=lambda: told.append(function()))
    thread.start()
    thread.join()
    return told


def weights():
    """What a program does with the weights: in threads, without their folder, saved, loaded."""
    shutil.copytree(UNTIED, OWN)
    model = lazy(OWN)
    shutil.rmtree(OWN)
    told = [in_thread(lambda: model.lm_head.weight[[3, 7], :4].tolist()), direct(model)]
    model = load()
    new = mx.random.normal(model.lm_head.weight.shape, key=mx.random.key(1))
    model = load()
    model.load_weights([("lm_head.weight", new)], strict=False)
    told += [tokens(model), direct(model)]
    model = load()
    save_model(OWN, model)
    saved = mx.load(str(OWN / "model.safetensors"))
    told.append({key: round(mx.abs(array).sum().item(), 2) for key, array in saved.items()})
    told.append(in_thread(lambda: direct(load()))[0])
    return told


def quantized_in_a_thread():
    """Whose arrays no other thread can compute; `uninstall()` does not try to."""
    model, mode = load(), mlx_lm_skiphead.status().mode

    def quantize():
        nn.quantize(model, group_size=32)
        return tokens(model)

    told = in_thread(quantize)
    mlx_lm_skiphead.uninstall()
    if mode != "off":
        mlx_lm_skiphead.install(mode)
    return told


def no_group():
    """`sharded_load` splits some families by itself."""
    model = sharded_load(str(NEXT))[0]
    size = model.model.pipeline_size
    return [size, tokens(model), tokens(model, sampler=make_sampler(0.8)), direct(model)]


STAGE = """
def call(self, inputs, cache=None, input_embeddings=None):
    h, rank = self.embed_tokens(inputs), self.pipeline_rank
    cache = cache or [None] * len(self.pipeline_layers)
    mask = create_attention_mask(h, cache[0])
    if rank < self.pipeline_size - 1:
        h = mx.distributed.recv_like(h, rank + 1)
    for layer, of_layer in zip(self.pipeline_layers, cache):
        h = layer(h, mask, of_layer)
    if rank:
        h = mx.distributed.send(h, rank - 1)
        if cache[-1] is not None:
            cache[-1].keys = mx.depends(cache[-1].keys, h)
    h = BROADCAST[: h.shape[0]]
    return self.norm(h)
"""
GATHER = "mx.distributed.all_gather"
BROADCASTS = {
    "as usual": f"{GATHER}(h)",
    "a group": f"{GATHER}(h, group=GROUP)",
    "a stream": f"{GATHER}(h, stream=mx.cpu)",
    "twice": f"{GATHER}({GATHER}(h)[: h.shape[0]])",  # which is left to upstream
}


def stages_of_their_own():
    """Pipelined models with a ``__call__`` of their own under the usual `Model`, as GLM-5.2's."""
    told = []
    for broadcast in BROADCASTS.values():
        model, names = lazy(), {**globals()}
        exec(STAGE.replace("BROADCAST", broadcast), names)
        model.model.__class__ = type("Stage", (type(model.model),), {"__call__": names["call"]})
        told += [tokens(model), direct(model), tokens(model, sampler=make_sampler(0.8))]
    return told


def small():
    step = pickle.loads(pickle.dumps(loops.generate_step))
    return [step is loops.generate_step]


PROGRAMS = {
    "recast": lambda: recast(UNTIED, mx.float16),
    "recast, tied": lambda: recast(TIED, mx.bfloat16),
    "adapter before": lambda: lora("lm_head", "before"),
    "adapter after": lambda: lora("lm_head", "after"),
    "adapter, tied": lambda: lora("embed_tokens", "after"),
    "wrapped head": wrapped_head,
    "speculation, counting": lambda: speculation(2, logits_processors=[Counting()]),
    "speculation, 5 drafts": lambda: speculation(5, logits_processors=[Counting()]),
    "speculation, own key": lambda: speculation(2, sampler=OwnKey()),
    "speculation fails": failing_speculation,
    "speculation by value": lambda: speculation(2, sampler=Surprised()),
    "forced": forced,
    "two batches": lambda: two_batches(False),
    "two batches, two models": lambda: two_batches(True),
    "guidance, one block": lambda: guidance("one block"),
    "guidance, two blocks": lambda: guidance("two blocks"),
    "guidance, a share each": lambda: guidance("a share each"),
    "done": done,
    "errors": errors,
    "random": random,
    "telemetry": telemetry,
    "pair": pair,
    "weights": weights,
    "quantized in a thread": quantized_in_a_thread,
    "no group": no_group,
    "stages of their own": stages_of_their_own,
    "small": small,
}
told = {}
for name in sys.argv[4:] or PROGRAMS:
    try:
        told[name] = PROGRAMS[name]()
    except Exception as error:
        told[name] = f"{type(error).__name__}: {error}"
    print(RANK, name, file=sys.stderr, flush=True)
ranks.report(told)
os._exit(0)  # MLX may abort at the exit of a process in which a thread has computed

"""mlx_lm.server on real ranks, asked over HTTP by the openai library, against upstream's answers.

The right answers are those of one plain process without the plugin, asked one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest
import serving
import tiny_checkpoint
import tiny_models

pytestmark = pytest.mark.skipif(
    tiny_models.EVENLY, reason="mlx-lm before 0.32 cannot pipeline qwen2"
)

# Longer prompts are several chunks.
OPTIONS = ("--prefill-step-size", "32")

Request = tuple[str | list[Any], dict[str, Any]]
Answer = dict[str, Any]


def chat(*contents: str, system: str = "") -> list[Any]:
    """Messages of a user and an assistant in turn."""
    roles = ["user", "assistant"] * len(contents)
    turns = zip(roles, contents, strict=False)
    messages = [{"role": role, "content": content} for role, content in turns]
    return [{"role": "system", "content": system}, *messages] if system else messages


HELLO = chat("Hello")
LONG = "The quick brown fox jumps over the lazy dog, and 12 more do. " * 3
SEEDED = {"seed": 7, "temperature": 0.8, "max_tokens": 24}
ENDLESS = {"logit_bias": {str(tiny_checkpoint.END_ID): -100}, "max_tokens": 100_000}

# Asked one after another, first of all: each finds in the prompt cache what those before it left.
ONE_BY_ONE: dict[str, Request] = {
    "chat": (HELLO, {"max_tokens": 24}),
    "chat again": (HELLO, {"max_tokens": 24}),
    "chat, streamed": (HELLO, {"max_tokens": 24, "stream": True}),
    "text": ("Hello", {"max_tokens": 24}),
    "text, streamed": ("Hello", {"max_tokens": 24, "stream": True}),
    "one token": ("Hello", {"max_tokens": 1}),
    "to its end": ("The capital", {"max_tokens": 40}),
    "to its end, streamed": ("The capital", {"max_tokens": 40, "stream": True}),
    "nothing": (HELLO, {"logit_bias": {str(tiny_checkpoint.END_ID): 100}, "max_tokens": 9}),
    "several chunks": (LONG, {"max_tokens": 8}),
    "system": (chat("One?", system="Be brief. " * 4), {"max_tokens": 8}),
    "system again": (chat("Two!", system="Be brief. " * 4), {"max_tokens": 8}),
    "a longer chat": (chat("Hello", "A model.", "And now?"), {"max_tokens": 8}),
    "logprobs, chat": (HELLO, {"logprobs": True, "max_tokens": 9}),
    "logprobs, text": ("Hello", {"logprobs": True, "max_tokens": 9}),
    "top_logprobs, chat": (HELLO, {"logprobs": True, "top_logprobs": 5, "max_tokens": 9}),
    "top_logprobs, text": ("Hello", {"extra_body": {"top_logprobs": 2}, "max_tokens": 9}),
    "logprobs, seeded": (HELLO, {**SEEDED, "logprobs": True, "top_logprobs": 3}),
    "seed": (HELLO, SEEDED),
    "seed again": (HELLO, SEEDED),
    "seed, streamed": (HELLO, {**SEEDED, "stream": True}),
    "seed, other": (HELLO, {**SEEDED, "seed": 8}),
    "seed, hot": ("Hello", {**SEEDED, "temperature": 1.5}),
    "seed, long prompt": (LONG + "Yes?", SEEDED),
    "seed, top_p": ("Hello", {**SEEDED, "top_p": 0.7}),
    "seed, top_k": ("Hello", {**SEEDED, "extra_body": {"top_k": 5}}),
    "seed, min_p": ("Hello", {**SEEDED, "extra_body": {"min_p": 0.1}}),
    "seed, xtc": ("Hello", {**SEEDED, "extra_body": {"xtc_probability": 0.5}}),
    "logit_bias": ("Hello", {"logit_bias": {"5": 5.5, "60": 5}, "max_tokens": 24}),
    "frequency_penalty": ("Hello", {"frequency_penalty": 0.4, "max_tokens": 40}),
    "presence_penalty": ("Hello", {"presence_penalty": 0.2, "max_tokens": 40}),
    "repetition_penalty": ("Hello", {"extra_body": {"repetition_penalty": 1.05}, "max_tokens": 40}),
    "stop": ("Hello", {"stop": "DQ", "max_tokens": 40}),
    "stop, two": ("Hello", {"stop": ["`", "DQ"], "max_tokens": 40}),
    "stop, streamed": ("Hello", {"stop": ["DQ"], "max_tokens": 40, "stream": True}),
    "stop, seeded": (HELLO, {**SEEDED, "stop": list("abcdefghijklmnopqrstuvwxyz")}),
}

SHORT: list[Request] = [
    (chat(f"{i}?") if i % 3 else f"{i}?", {"max_tokens": 1 + i % 3, "stream": i % 5 == 0})
    for i in range(100)
]


def mixed(turn: int) -> list[Request]:
    """Sixteen requests of all lengths, samplers and stop words, others in each turn."""
    samplers: list[dict[str, Any]] = [
        {},
        {"seed": turn, "temperature": 0.9, "top_p": 0.9},
        {"logit_bias": {str(20 + turn): 3.5, str(tiny_checkpoint.END_ID): -100}},
        {"frequency_penalty": 0.5, "presence_penalty": 0.3},
        {"stop": list("ACEGIKMOQSUWY"[turn:])},
    ]
    requests: list[Request] = []
    for i in range(16):
        content = f"{turn}, {i}. {LONG}"[: 4 + (23 * i + 50 * turn) % 150]
        options = {"max_tokens": 1 + (7 * i + 11 * turn) % 40, "stream": i % 4 == 3}
        requests.append((chat(content) if i % 2 else content, options | samplers[i % 5]))
    return requests


TURNS = [mixed(turn) for turn in range(3)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_checkpoint.write("qwen2-untied", folder)
    return folder


@pytest.fixture(scope="module")
def right(checkpoint: Path) -> dict[str, Any]:
    with serving.server(checkpoint, *OPTIONS) as server, serving.client(server) as client:
        return {
            "one by one": {n: serving.ask(client, p, **o) for n, (p, o) in ONE_BY_ONE.items()},
            "short": [serving.ask(client, p, **o) for p, o in SHORT],
            "turns": [[serving.ask(client, p, **o) for p, o in turn] for turn in TURNS],
        }


class Patched:
    """The server with the plugin, and what it said to ONE_BY_ONE."""

    def __init__(self, server: serving.Server, client: openai.OpenAI) -> None:
        self.server = server
        self.client = client
        self.ask: Callable[..., Answer] = partial(serving.ask, client)
        self.one_by_one = {n: self.ask(p, **o) for n, (p, o) in ONE_BY_ONE.items()}


@pytest.fixture(scope="module", params=[2, 3], ids=["2 ranks", "3 ranks"])
def patched(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[Patched]:
    count = request.param
    with (
        serving.server(checkpoint, *OPTIONS, count=count, plugin=True) as server,
        serving.client(server) as client,
    ):
        yield Patched(server, client)


def without_cache(answer: Answer) -> Answer:
    """`answer` but for what the prompt cache had, which depends on what was asked before."""
    return {**answer, "usage": {**answer["usage"], "prompt_tokens_details": None}}


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_answer(name: str, patched: Patched, right: dict[str, Any]) -> None:
    said, expected = dict(patched.one_by_one[name]), dict(right["one by one"][name])
    logprobs, expected_logprobs = said.pop("logprobs"), expected.pop("logprobs")
    assert said == expected
    assert (logprobs is None) == (expected_logprobs is None) == ("logprobs" not in name)
    for one, expected_one in zip(logprobs or [], expected_logprobs or [], strict=True):
        assert one == pytest.approx(expected_one, abs=1e-3)


def test_the_answers_show_what_was_asked_for(right: dict[str, Any]) -> None:
    """So that no case above is the same as another without anyone noticing."""
    answers = right["one by one"]
    text = {name: answer["text"] for name, answer in answers.items()}
    assert text["seed"] == text["seed again"] == text["seed, streamed"]
    plain = text["text"]
    distinct = [n for n in text if n.startswith(("seed, ", "logit", "freq", "pres", "repe"))]
    distinct.remove("seed, streamed")
    assert len({plain, text["seed"], *(text[n] for n in distinct)}) == len(distinct) + 2
    stopped = {name for name, answer in answers.items() if answer["finish_reason"] == "stop"}
    assert stopped >= {"nothing", *(name for name in text if name.startswith(("to its", "stop")))}
    cached = {n: a["usage"]["prompt_tokens_details"]["cached_tokens"] for n, a in answers.items()}
    assert not cached["chat"] and not cached["text"]
    assert all(cached[n] for n in ("chat again", "system again", "a longer chat", "seed again"))


def test_100_short_requests(patched: Patched, right: dict[str, Any]) -> None:
    for (prompt, options), expected in zip(SHORT, right["short"], strict=True):
        assert without_cache(patched.ask(prompt, **options)) == without_cache(expected)


@pytest.mark.parametrize("turn", range(len(TURNS)))
def test_16_requests_at_once(turn: int, patched: Patched, right: dict[str, Any]) -> None:
    requests = TURNS[turn]
    with ThreadPoolExecutor(len(requests)) as pool:
        asked = [pool.submit(patched.ask, prompt, **options) for prompt, options in requests]
        told = [each.result() for each in asked]
    for request, said, expected in zip(requests, told, right["turns"][turn], strict=True):
        assert without_cache(said) == without_cache(expected), request


def test_a_client_that_disconnects(patched: Patched, right: dict[str, Any]) -> None:
    text, seeded = ONE_BY_ONE["text"], ONE_BY_ONE["seed"]
    left = patched.client.completions.create(
        model="default_model", prompt="On and on", stream=True, **ENDLESS
    )
    with ThreadPoolExecutor() as pool:
        for _ in range(3):
            next(left)
        beside = pool.submit(patched.ask, text[0], **text[1])
        next(left)
        left.close()
        assert without_cache(beside.result()) == without_cache(right["one by one"]["text"])
    # Seeds are served when nothing else is: an answer says that what was left has ended.
    said = patched.ask(seeded[0], **seeded[1])
    assert without_cache(said) == without_cache(right["one by one"]["seed"])


def test_workers_run_no_head(patched: Patched) -> None:
    head_rank, *workers = patched.server.reported()
    assert head_rank > 0 and not any(workers)


def test_ctrl_c_ends_it_as_upstream(checkpoint: Path) -> None:
    endings = []
    for plugin in (False, True):
        with serving.server(checkpoint, count=2, plugin=plugin) as server:
            with serving.client(server) as client:
                serving.ask(client, "Hello", max_tokens=12)
            assert not server.wrong()
            assert all(server.reported()) != plugin
            server.press_ctrl_c()
            endings.append((server.exit_code, server.exceptions()))
    assert endings[1] == endings[0]


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one for each rank, where "only-0" and "broken-1" are not all that they are."""
    folder = tmp_path_factory.mktemp("machines")
    models = {"a": "qwen2-untied", "b": "deepseek_v3", "tied": "qwen2-tied", "llama": "qwen2-tied"}
    for rank in ("0", "1"):
        some = {f"only-{rank}": "deepseek_v3", "broken-1": "qwen2-tied"}
        for name, case in (models | some).items():
            path = folder / rank / name
            path.mkdir(parents=True)
            tiny_checkpoint.write(case, path)
        config = folder / rank / "llama" / "config.json"
        config.write_text(config.read_text().replace('"qwen2"', '"llama"'))
    file = folder / "1" / "broken-1" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    return folder


SWAPS: list[tuple[str, dict[str, str]]] = [
    *((name, {}) for name in ("a", "b", "a", "tied", "llama", "b", "nowhere", "a")),
    ("a", {"adapters": "adapter"}),
    ("b", {"draft_model": "tied"}),
    *((name, {}) for name in ("b", "a")),
]
FAIL_ON_ONE = ["only-0", "a", "only-1", "b", "broken-1", "broken-1", "a"]


def test_models_are_swapped_as_unpatched(machines: Path) -> None:
    """And one that one rank lacks, or cannot load, is an error, and the server goes on."""
    answers, loads = {}, {}
    for plugin in (False, True):
        env = {"RANK_FOLDERS": str(machines), "HF_HUB_OFFLINE": "1"}
        swaps = [*SWAPS, *((name, {}) for name in FAIL_ON_ONE if plugin)]
        with (
            serving.server(
                machines / "0" / "a", count=2, plugin=plugin, env=env, may_complain=True
            ) as server,
            serving.client(server) as client,
        ):

            def ask(name: str, more: dict[str, str], client: openai.OpenAI = client) -> Any:
                options = {"model": name, "max_tokens": 9, "extra_body": more}
                try:
                    return serving.ask(client, "Hello, " + name[0], **options)["text"]
                except openai.APIStatusError as error:
                    return error.response.text

            answers[plugin] = [ask(name, more) for name, more in swaps]
            with ThreadPoolExecutor() as pool:
                asked = [pool.submit(ask, name, {}) for name in ("a", "b", "a", "b")]
                answers[plugin] += [each.result() for each in asked]
            loads[plugin] = server.reported()
            said = server.said()
    count = len(SWAPS)
    assert answers[True][:count] == answers[False][:count]
    assert answers[True][-4:] == answers[False][-4:]
    told = dict(zip(FAIL_ON_ONE, answers[True][count:], strict=False))
    assert [told["a"], told["b"]] == answers[True][:2]
    assert "only-0 cannot be loaded by rank 1 (LocalEntryNotFoundError(" in told["only-0"]
    assert "broken-1 cannot be loaded by rank 1 (RuntimeError('[load_safetens" in told["broken-1"]
    assert "Cannot find an appropriate cached" in told["only-1"]  # rank 0's own
    assert "only-1 cannot be loaded by rank 0 (LocalEntryNotFoundError(" in said
    for rank, (before, after) in enumerate(zip(loads[False], loads[True], strict=True)):
        for load in after:
            # Upstream's server keeps the model before while it loads the next one.
            for state in (load["left"], load.get("loaded", load["left"])):
                assert len(state["status"]) == state["models"] <= 2, load
                assert all(f", rank {rank} of 2, layers " in model for model in state["status"])
                assert state["noted"] == 0  # nothing is under way
        names = [load["model"] for load in after]
        alike = names.index(FAIL_ON_ONE[0])
        assert names[:alike] == [load["model"] for load in before][:alike]
        for load, unpatched in zip(after[:alike], before, strict=False):
            assert load.keys() == unpatched.keys()
            for when in load.keys() - {"model"}:
                assert load[when]["models"] == unpatched[when]["models"]
                # A head has 65,536. What is still in flight of a step differs.
                assert load[when]["bytes"] <= unpatched[when]["bytes"] + 4096

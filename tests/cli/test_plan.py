"""The plan against what real ranks load, for every family; and what it says."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import ranks
import tiny_checkpoint
import tiny_models

from mlx_lm_skiphead.cli import formula, main, sizes, splits

SCRIPT = Path(__file__).with_name("rank_plan.py")
CONTEXT = 260
"""The tokens of a prompt: two blocks of a cache, and more than a window."""
RANKS = 3
CASES = [case for case in tiny_models.CONFIGS if tiny_models.is_pipelined(case)]
MIXED = [case for case in ("deepseek_v3", "ministral3-tied") if case in CASES]
# Rotation tables and the like are in memory too, and are no weights.
NO_WEIGHTS = 1000


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint of each case."""
    folder = tmp_path_factory.mktemp("models")
    for case in CASES:
        (folder / case).mkdir()
        tiny_checkpoint.write(case, folder / case)
    for case in MIXED:
        (folder / f"{case} mixed").mkdir()
        tiny_checkpoint.write(case, folder / f"{case} mixed", mixed=True)
    return folder


@pytest.fixture(scope="module")
def loaded(folder) -> dict[str, list[dict[str, Any]]]:
    """What each of the ranks, unpatched and with the plugin, has loaded of each."""
    arguments = [str(folder), str(CONTEXT)]
    return {
        mode: ranks.launch(
            SCRIPT, *arguments, ranks=RANKS, env={"MLX_LM_SKIPHEAD": mode}, timeout=300
        ).results
        for mode in ("0", "1")
    }


@pytest.mark.parametrize("case", [*CASES, *(f"{case} mixed" for case in MIXED)])
def test_plan_is_what_ranks_load(case, folder, loaded):
    family, _, planned = sizes.plan(folder / case, RANKS, context=CONTEXT)
    for rank in planned:
        unpatched, plugin = (loaded[mode][rank.rank][case] for mode in ("0", "1"))
        assert 0 <= unpatched["loaded"] - rank.memory_bytes["unpatched"] < NO_WEIGHTS
        assert 0 <= plugin["loaded"] - rank.memory_bytes["plugin"] < NO_WEIGHTS
        assert plugin["on disk"] == rank.on_disk
        # In the place of each array on disk there is one number, of eight bytes at most.
        less = sum(rank.on_disk.values()) - (unpatched["loaded"] - plugin["loaded"])
        assert 0 <= less <= 8 * 6
        if case == "deepseek_v41":  # copies of another rank's groups are not counted
            assert 0 < rank.cache_bytes <= unpatched["cache"]
        else:
            assert rank.cache_bytes == unpatched["cache"]
    assert case.startswith(family) or family in ("deepseek_v32", "glm4_moe", "qwen3_5")


def test_downloads_are_the_same_with_a_context(folder):
    plain, long = (sizes.plan(folder / "deepseek_v3", RANKS, context=c).ranks for c in (0, CONTEXT))
    assert [rank.downloads for rank in long] == [rank.downloads for rank in plain]
    assert plain[0].downloads["needed"] != plain[0].downloads["all"]


@pytest.mark.parametrize("case", CASES)
def test_sizes_of_layers_are_those_of_ranks(case, folder):
    """What ranks would have with another split is what they do have with it."""
    context = 0 if case == "deepseek_v41" else CONTEXT  # which keeps copies of other ranks' groups
    layers = sizes.layers(folder / case, [4], context)
    planned = sizes.plan(folder / case, RANKS, None, [4], context)
    look = splits.search(planned, layers, [splits.Machine(1, 1)] * RANKS, 4)
    for stages in itertools.islice(chains(layers.stages, len(layers.sizes)), 3):
        other = [end - first for first, end in stages]
        there = sizes.plan(folder / case, RANKS, other, [4], context)
        way = look.way(range(RANKS), stages)
        has = [rank.memory_bytes["plugin"] + rank.cache_bytes for rank in there.ranks]
        assert list(way.memory_bytes) == has
        reads = sum(rank.reads_bytes[4] for rank in there.ranks) + there.ranks[0].head_bytes
        assert way.ms == pytest.approx(reads / 1e6)


def chains(stages: set[tuple[int, int]], end: int) -> Iterable[list[tuple[int, int]]]:
    """The splits that are made of some stages, rank 0 first."""
    for chosen in itertools.combinations(sorted(stages, reverse=True), RANKS):
        edges = [end, *(first for first, _ in chosen)]
        if edges[-1] == 0 and [last for _, last in chosen] == edges[:-1]:
            yield list(chosen)


def test_reads_are_of_some_experts(folder):
    config = tiny_models.CONFIGS["deepseek_v3"]
    used = config["num_experts_per_tok"] / config["n_routed_experts"]
    for rank in sizes.plan(folder / "deepseek_v3", 2, batches=[8, 1000]).ranks:
        one, eight, many = rank.reads_bytes.values()
        every, head = rank.memory_bytes["unpatched"], rank.head_bytes
        assert used * every < one + 2 * head < every + head
        assert one < eight < many
        assert many == pytest.approx(every - 2 * head, abs=NO_WEIGHTS)


def saved(heads: list[float], layers: float = 10.0, **links: Any) -> float:
    """By ranks whose heads take so many ms, and their layers as long as `layers`."""
    case = {"row": 4096 * 4, "link": formula.Link(), "batch": 1} | links
    times = [(layers, head) for head in heads]
    ways = ("unpatched", "plugin")
    unpatched, plugin = (formula.token(times, way=way, **case).ms for way in ways)
    return unpatched - plugin


@pytest.mark.parametrize(
    ("heads", "layers", "saves"),
    [
        ([1, 1, 1], 10, 0),
        ([1, 1, 4], 10, 3),  # the last rank starts each token when its own head is done
        ([4, 1, 1], 10, -3),
        ([1, 4, 1], 10, 0),  # that head is done before the hidden states come
        ([1, 4, 1], 1, 2),  # and here it is not
    ],
)
def test_saved_by_heads(heads, layers, saves):
    assert saved(heads, layers) == pytest.approx(saves, abs=1e-3)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_saved_by_links(ranks):
    """16 KiB a sequence, on 1 Gbit/s."""
    link = formula.Link(1, 0.5)
    ids, hidden = 8e-6 * 4 * 9, 8e-6 * 8 * 16384
    told = saved([2] * ranks, link=link, batch=8)
    assert told == pytest.approx((ranks - 1) * (hidden - ids))
    # Of 512 KiB half goes the other way round, one latency to each rank.
    ids, hidden = 8e-6 * 4 * 33, 8e-6 * 32 * 16384
    told = saved([2] * ranks, link=link, batch=32)
    assert told == pytest.approx((ranks - 1) * (hidden - ids) + (ranks - 2) * 0.5)
    token = formula.token([(10, 2)] * ranks, 16384, link, 8, "unpatched")
    assert (token.stages, token.head) == (10 * ranks, 2)
    assert token.links == pytest.approx(2 * (ranks - 1) * 8e-6 * 8 * 16384 + ranks * 0.5)


@pytest.fixture
def model(folder) -> str:
    return str(folder / "deepseek_v3")


def test_text(model, capfd):
    assert main(["plan", model, "-n", "3", "--split", "2,4,1"]) == 0
    said = capfd.readouterr().out
    assert "│ middle      │    1-4 │" in said
    words = " ".join(said.split())
    assert "deepseek_v3, a head of 0.07 MB" in words
    assert "save memory, but no time" in words and "ratio" not in words


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--bandwidth", "8e-3,4e-3,1.2e-3"], "ms less per token."),
        (["--bandwidth", "1.2e-3,4e-3,8e-3"], "with the machines 2,0,1 in that order"),
        (["--bandwidth", "1.2e-3,4e-3,8e-3"], "run --split 5,1,1 mlx_lm.server"),
        (["--bandwidth", "8e-3,4e-3,2e-3"], "No memory limits it"),
        (["--bandwidth", "8,4,2", "--memory", "1e-3,1,1"], "limit is the memory of machine 0"),
        (["--bandwidth", "800,800,800"], "The plugin saves memory, but no time."),
        (["--bandwidth", "800,800,800"], "No other split is better, nor another order"),
        (["--link", "1e-3", "--batch", "1,32"], "With a batch of 32 expect"),
        (["--link", "1,1"], "memory, but no time, if machines are equal."),
        (["--memory", "1,1e-6,1"], "No split fits into the memory of these machines."),
    ],
)
def test_verdict(arguments, said, model, capfd):
    assert main(["plan", model, "-n", "3", *arguments]) == 0
    assert said in capfd.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "fits"),
    [
        (["--memory", "1,1e-6,1"], ["yes", "no", "yes"]),
        (["--memory", "1,1,1", "--context", "10000000"], ["no", "no", "no"]),
        (["--memory", "1,{plugin},1"], ["yes", "plugin", "yes"]),
    ],
)
def test_fits(arguments, fits, model, capfd):
    planned = sizes.plan(Path(model), 3).ranks[1].memory_bytes
    arguments = [argument.format(plugin=planned["plugin"] / 1e9) for argument in arguments]
    assert main(["plan", model, "-n", "3", *arguments]) == 0
    ranks_table = capfd.readouterr().out.partition("From a hub")[0]
    assert re.findall(r"│ +\d │.*│ +(\w+) │$", ranks_table, re.MULTILINE) == fits


def test_json(model, capfd):
    machines = ["--bandwidth", "1,2", "--link", "1,0.5", "--batch", "1,16"]
    arguments = ["plan", model, "-n", "2", *machines]
    assert main([*arguments, "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["family"] == "deepseek_v3" and told["splits"][-1]["machines"] == [1, 0]
    head = told["head_bytes"]
    first = told["ranks"][1]
    assert first["role"] == "first stage" and first["on_disk"] == {"lm_head": head}
    assert first["memory_bytes"]["unpatched"] - first["memory_bytes"]["plugin"] == head
    one, many = told["tokens"]
    assert one["plugin"]["head"] == pytest.approx(head / 1e6)
    # The last rank's head and the hidden states, against rank 0's and the ids.
    saves = (head / 2 - head) / 1e6 + 8e-6 * (16 * 4 * tiny_models.HIDDEN - 4 * 17)
    assert many["saved_ms"] == pytest.approx(saves)
    # Where the one with the head does not fit, the other way round does.
    both = [part["memory_bytes"]["plugin"] / 1e9 for part in reversed(told["ranks"])]
    assert main([*arguments, "--json", "--memory", ",".join(map(str, both))]) == 0
    told = json.loads(capfd.readouterr().out)
    fits = [part["fits"]["plugin"] for part in told["ranks"]]
    assert fits.count(False) == 1
    given, *_, best = told["splits"]
    assert not given["fits"] and best["fits"] and told["limits"] == [1]
    assert (best["machines"], best["layers"]) == ([1, 0], given["layers"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere/at all", "-n", "2"], "there is no folder nowhere/at all"),
        (["nobody/nothing", "-n", "2"], "no copy of such a hub repository"),
        (["{empty}", "-n", "2"], "it has no config.json"),
        (["{llama}", "-n", "2"], "does not support mlx_lm.models.llama"),
        (["{model}", "-n", "9"], "9 ranks need 9 layers, and this model has 7"),
        (["{model}", "-n", "2", "--split", "4,4"], "mlx-lm cannot split deepseek_v3 so: "),
        (["{model}", "-n", "2", "--bandwidth", "1"], "--bandwidth has 1 values for 2 ranks"),
        (["{model}", "-n", "2", "--memory", "1"], "--memory has 1 values for 2 ranks"),
        (["{model}", "-n", "2", "--link", "1,2,3"], "--link is a rate in Gbit/s and a latency"),
        (["{headless}", "-n", "2"], "files of the model are missing"),
    ],
)
def test_what_cannot_be(arguments, said, model, capfd, tmp_path):
    for name in ("empty", "llama", "headless"):
        (tmp_path / name).mkdir()
    (tmp_path / "llama" / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "llama" / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    tiny_checkpoint.write("deepseek_v3", tmp_path / "headless")
    (tmp_path / "headless" / tiny_checkpoint.HEAD_FILE).unlink()
    names = {name: str(tmp_path / name) for name in ("empty", "llama", "headless")}
    assert main(["plan", *(a.format(model=model, **names) for a in arguments)]) == 2
    captured = capfd.readouterr()
    assert said in captured.err and captured.err.count("\n") == 1 and not captured.out


LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-5,
    "vocab_size": 64,
}


@pytest.mark.parametrize(
    "arguments", [["-n", "1"], ["-n", "2", "--split", "3,0"], ["-n", "2", "--bandwidth", "fast,1"]]
)
def test_wrong_arguments(arguments, model, capsys):
    with pytest.raises(SystemExit) as error:
        main(["plan", model, *arguments])
    assert error.value.code == 2
    assert "error:" in capsys.readouterr().err


def brute_force(look: splits.Search, orders: Iterable[Sequence[int]]) -> float:
    """The least ms of all that fit, by trying every split for every order of machines."""
    count, layers, least = len(look.machines), len(look.layers), math.inf
    for order in orders:
        for cuts in itertools.combinations(range(1, layers), count - 1):
            edges, time = [0, *cuts, layers], 0.0  # the last rank has the first layers
            for rank, number in enumerate(order):
                first, end = edges[count - 1 - rank], edges[count - rank]
                machine, has = look.machines[number], [*look.layers[first:end], look.besides[rank]]
                limit = 1e9 * machine.memory if machine.memory else math.inf
                if (first, end) not in look.stages[rank] or sum(p.memory for p in has) > limit:
                    time = math.inf
                time += sum(p.reads for p in has) / machine.bandwidth / 1e6
            least = min(least, time)
    return least


BYTES = st.integers(0, 20).map(lambda tenths: tenths * 10**8)
PARTS = st.builds(sizes.Size, BYTES, BYTES)
MACHINES = st.builds(
    splits.Machine,
    st.sampled_from([50.0, 100.0, 270.0]),
    st.sampled_from([None, 1.0, 2.5, 4.0, 8.0]),
)


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(st.data())
def test_the_best_split_is_the_best_of_all(data):
    count = data.draw(st.integers(2, 4))
    layers = data.draw(st.lists(PARTS, min_size=count, max_size=7))
    machines = data.draw(st.lists(MACHINES, min_size=count, max_size=count))
    besides = data.draw(st.lists(PARTS, min_size=count, max_size=count))
    every = list(itertools.combinations(range(len(layers) + 1), 2))
    stages = [set(every) - data.draw(st.sets(st.sampled_from(every), max_size=3))] * count
    look, orders = (
        splits.Search(machines, layers, besides, stages),
        list(permutations(range(count))),
    )
    best, least = look.best(), brute_force(look, orders)
    if best is None:
        assert least == math.inf
        return
    assert best.fits and best.ms == pytest.approx(least, abs=splits.TIE)
    assert sorted(best.machines) == list(range(count)) and sum(best.layers) == len(layers)
    for number, machine in enumerate(machines):
        freed = [*machines[:number], machine._replace(memory=None), *machines[number + 1 :]]
        more = brute_force(look._replace(machines=freed), [best.machines])
        assert (number in look.limits(best)) == (more < best.ms - splits.TIE)


@pytest.mark.parametrize(
    ("machines", "ways"),
    [
        # Equal machines: the given split is as good as any.
        ([(100, None)] * 3, [((0, 1, 2), (4, 3, 2))]),
        ([(100, None), (50, None), (50, None)], [((0, 1, 2), (4, 3, 2)), ((0, 1, 2), (7, 1, 1))]),
        # The fastest one as rank 0, and of equal ones the first one first.
        (
            [(50, None), (50, None), (100, None)],
            [((0, 1, 2), (4, 3, 2)), ((0, 1, 2), (1, 1, 7)), ((2, 0, 1), (7, 1, 1))],
        ),
        # Without bandwidths: as even as the memories allow.
        ([(None, 1), (None, 1), (None, 0.55)], [((0, 1, 2), (4, 3, 2))]),
        ([(None, 1), (None, 0.25), (None, 1)], [((0, 1, 2), (4, 3, 2)), ((0, 1, 2), (4, 1, 4))]),
        ([(None, 0.3)] * 3, [((0, 1, 2), (4, 3, 2))]),
    ],
)
def test_ways(machines, ways):
    """Nine layers of 0.2 GB, and a head."""
    every = set(itertools.combinations(range(10), 2))
    layers = [sizes.Size(2 * 10**8, 2 * 10**8)] * 9
    machines = [splits.Machine(*machine) for machine in machines]
    besides = [sizes.Size(0, 10**8), sizes.Size(0, 0), sizes.Size(0, 0)]
    look = splits.Search(machines, layers, besides, [every] * 3)
    found, _ = splits.compare(look, [(5, 9), (2, 5), (0, 2)])
    assert [(way.machines, way.layers) for way in found] == ways

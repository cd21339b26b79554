"""The switch, import orders, install and uninstall: each in a process of its own, no ranks."""

from __future__ import annotations

import ast
import itertools
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import ranks
import warm

import mlx_lm_skiphead
from mlx_lm_skiphead.config import SPELLINGS, VARIABLE, requested_mode

PLUGIN = "import mlx_lm_skiphead"
ORDERS = list(
    itertools.permutations([PLUGIN, "import mlx_lm", "from mlx_lm.models import solar_open"])
)


def run(
    code: str, value: str | None = None, check: bool = True, python: str = ""
) -> subprocess.CompletedProcess:
    """Run `code` in a new process with the variable set to `value`, or unset."""
    environment = {k: v for k, v in os.environ.items() if k != VARIABLE}
    environment["PYTHONPATH"] = str(ranks.TESTS)  # for tiny_models
    if value is not None:
        environment[VARIABLE] = value
    done = subprocess.run(
        [python or warm.python(), "-c", textwrap.dedent(code)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("value", [None, "0", "1", "hidden"])
def test_import_imports_nothing_of_others(value):
    """Off nothing at all; on no more than wrapt, which waits for mlx-lm."""
    others = "{m.split('.')[0] for m in sys.modules} & {'mlx', 'mlx_lm', 'numpy', 'rich', 'wrapt'}"
    expected = "{'wrapt'}\n" if value in ("1", "hidden") else "set()\n"
    code = f"import sys, mlx_lm_skiphead; print({others})"
    assert run(code, value, python=sys.executable).stdout == expected


def test_on_begins_when_mlx_lm_is_imported_and_hides_it_from_no_other_hook():
    run(
        """
        import sys
        import wrapt
        seen = []
        wrapt.register_post_import_hook(lambda module: seen.append(module.__name__), "mlx_lm")
        import mlx_lm_skiphead
        import mlx_lm
        assert seen == ["mlx_lm"]
        from mlx_lm.models import deepseek_v3
        assert isinstance(vars(deepseek_v3.Model)["__call__"], wrapt.FunctionWrapper)
        """,
        "1",
    )


@pytest.mark.parametrize("value", [None, "", "0", "off", "false", "no"])
def test_off_registers_nothing(value):
    run(
        """
        import sys
        finders = list(sys.meta_path)
        import mlx_lm_skiphead
        assert sys.meta_path == finders
        assert "wrapt" not in sys.modules and "mlx_lm_skiphead.installing" not in sys.modules
        import mlx.core as mx, mlx_lm
        from mlx_lm.models import qwen2
        import importlib, types
        generate = importlib.import_module("mlx_lm.generate")
        assert type(generate.generate_step) is types.FunctionType
        assert type(qwen2.Model.__call__) is types.FunctionType
        status = mlx_lm_skiphead.status()
        assert status.mode == "off"
        assert {t.state for t in (*status.families.values(), *status.loops.values())} == {"off"}
        """,
        value,
        python=sys.executable,
    )


@pytest.mark.parametrize("value", [v for v, mode in SPELLINGS.items() if mode != "off"])
def test_on(value):
    code = "import mlx_lm_skiphead; print(mlx_lm_skiphead.status().mode)"
    assert run(code, value).stdout.strip() == SPELLINGS[value]


@pytest.mark.parametrize("value", ["2", "ON", "enable", " 1", "hidden "])
def test_any_other_value_is_an_error_that_lists_the_values(value):
    with pytest.raises(ValueError, match=VARIABLE) as error:
        requested_mode({VARIABLE: value})
    assert repr(value) in str(error.value)
    assert all(repr(accepted) in str(error.value) for accepted in SPELLINGS)
    done = run(PLUGIN, value, check=False)
    assert done.returncode == 1 and "ValueError: MLX_LM_SKIPHEAD=" in done.stderr


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: " ".join(i.split()[-1] for i in order))
def test_any_import_order_gives_the_same(order):
    # solar_open's Model is glm4_moe's: one class, two names, wrapped once.
    code = "\n".join(order) + textwrap.dedent(
        """
        import importlib, wrapt
        import mlx.core as mx
        from mlx_lm.models import glm4_moe, kimi_k25, solar_open
        generate = importlib.import_module("mlx_lm.generate")
        status = mlx_lm_skiphead.status()
        print(sorted(n for n, t in status.families.items() if t.state == "patched"))
        print({t.state for t in status.loops.values()})

        def layers(function):
            return sum(isinstance(f, wrapt.FunctionWrapper) for f in wrapt.wrapper_chain(function))

        print([
            layers(vars(cls)["__call__"])
            for cls in (glm4_moe.Model, glm4_moe.LanguageModel, kimi_k25.DeepseekV3Model)
        ], layers(generate.generate_step), layers(mx.distributed.all_gather))
        """
    )
    assert run(code, "1").stdout.splitlines() == [
        "['deepseek_v3', 'glm4_moe', 'kimi_k25', 'solar_open']",
        "{'patched'}",
        "[1, 1, 1] 1 1",
    ]


def test_all_families_are_patched_and_restored():
    run(
        """
        import contextlib
        import importlib
        import mlx.core as mx
        import mlx_lm_skiphead
        from mlx_lm_skiphead.families import FAMILIES

        generate = importlib.import_module("mlx_lm.generate")
        modules = []
        for family in FAMILIES:
            with contextlib.suppress(ImportError):  # mlx-lm before 0.32 has fewer
                modules.append(importlib.import_module(family.module))

        def functions():
            found = {"gather": mx.distributed.all_gather}
            for function in (generate.generate_step, generate.speculative_generate_step):
                found[function.__name__] = function
            for cls in (generate.GenerationBatch, generate.BatchGenerator):
                found |= {(cls, name): function for name, function in vars(cls).items()}
            for module in modules:
                for name, cls in vars(module).items():
                    if isinstance(cls, type):
                        found[module.__name__, name] = vars(cls).get("__call__")
            return found

        upstream = functions()
        for _ in range(2):
            mlx_lm_skiphead.install()
            once = functions()
            mlx_lm_skiphead.install()  # twice installed is once installed
            assert all(a is b for a, b in zip(once.values(), functions().values(), strict=True))
            status = mlx_lm_skiphead.status()
            imported = {m.__name__.rpartition(".")[2] for m in modules}
            states = {n: str(t) for n, t in status.families.items() if n in imported}
            if len(imported) == len(FAMILIES):
                assert set(states.values()) == {"patched"}, states
            assert states["deepseek_v3"] == "patched"
            assert set(states.values()) <= {"patched", "not pipelined"}, states
            assert {str(t) for t in status.loops.values()} == {"patched"}
            assert once["generate_step"] is not upstream["generate_step"]
            mlx_lm_skiphead.uninstall()
            mlx_lm_skiphead.uninstall()
            restored = functions()
            assert all(restored[name] is upstream[name] for name in upstream)
            assert mlx_lm_skiphead.status().mode == "off"
        """
    )


def test_a_module_imported_after_uninstall_is_left_alone():
    run(
        """
        import types
        import mlx_lm_skiphead
        mlx_lm_skiphead.uninstall()
        from mlx_lm.models import glm4_moe
        assert type(vars(glm4_moe.Model)["__call__"]) is types.FunctionType
        mlx_lm_skiphead.install()
        assert type(vars(glm4_moe.Model)["__call__"]) is not types.FunctionType
        """,
        "1",
    )


def test_an_unknown_mode_is_an_error():
    done = run("import mlx_lm_skiphead; mlx_lm_skiphead.install('off')", check=False)
    assert "ValueError: mode='off' is not understood. Accepted: 'on', 'hidden'." in done.stderr


# An mlx-lm in which glm4_moe has no hidden broadcast any more, as far as its code shows.
CHANGED = """
import mlx_lm_skiphead
from mlx_lm.models import glm4_moe
def __call__(self, x, cache=None):
    return self.norm(self.embed_tokens(x))
glm4_moe.LanguageModel.__call__ = __call__
model_call = glm4_moe.Model.__call__
{install}
"""


def test_what_does_not_fit_is_left_to_upstream_and_said():
    code = CHANGED.format(install="mlx_lm_skiphead.install()") + textwrap.dedent(
        """
        assert glm4_moe.Model.__call__ is model_call
        assert glm4_moe.LanguageModel.__call__ is __call__
        print(mlx_lm_skiphead.status().families["glm4_moe"])
        """
    )
    done = run(code)
    assert done.stdout.startswith(
        "refused: mlx_lm.models.glm4_moe.LanguageModel.__call__: expected one call of all_gather, "
    )
    assert "glm4_moe is left to upstream mlx-lm" in done.stderr


def test_what_does_not_fit_raises_if_strict():
    done = run(CHANGED.format(install="mlx_lm_skiphead.install(strict=True)"), None, False)
    assert "SkipheadError: glm4_moe is left to upstream mlx-lm" in done.stderr


@pytest.mark.parametrize(
    ("part", "missing"),
    [
        ("downloads", "mlx_lm.utils._download"),
        ("comparison of ranks", "mlx.core.distributed.all_sum"),
        ("weights", "mlx.core.load"),
        ("prompt caches", "mlx_lm.models.cache.QuantizedKVCache"),
        ("hidden broadcast", "mlx.core.distributed.all_gather"),
    ],
)
def test_a_part_that_is_missing_costs_only_itself(part, missing):
    """But for the one on which all others build."""
    run(
        f"""
        import mlx.core, mlx_lm.utils, mlx_lm.generate, mlx_lm.models.deepseek_v3
        import mlx_lm_skiphead
        del {missing}
        mlx_lm_skiphead.install()
        status = mlx_lm_skiphead.status()
        refused = status.parts.pop({part!r})
        assert refused.state == "refused" and refused.reason.startswith({missing!r}), refused
        found = [*status.parts.values(), *status.loops.values(), status.families["deepseek_v3"]]
        states = ["patched"] * 4 + ["{"refused" if part == "hidden broadcast" else "patched"}"] * 4
        assert [target.state for target in found] == states, found
        mlx_lm_skiphead.uninstall()
        """
    )


def test_several_gpus_of_a_process_are_left_to_upstream():
    """With CUDA; this machine may have none."""
    done = run(
        """
        import mlx.core as mx
        import mlx_lm.generate, mlx_lm.models.deepseek_v3
        import mlx_lm_skiphead
        mx.default_device, mx.device_count = (lambda: mx.gpu), (lambda device: 2)
        mx.metal.is_available = lambda: False
        mlx_lm_skiphead.install()
        status = mlx_lm_skiphead.status()
        for target in (status.loops["generate_step"], status.families["deepseek_v3"]):
            assert target == status.parts["hidden broadcast"], target
        print(target)
        """
    )
    assert "refused: mlx.core.distributed.all_gather: expected one GPU, found 2" in done.stdout
    assert "hidden broadcast is left to upstream mlx-lm" in done.stderr


def test_one_rank_is_unchanged():
    run(
        """
        import importlib
        import mlx.core as mx
        import mlx_lm_skiphead
        import tiny_models

        generate = importlib.import_module("mlx_lm.generate")
        model = tiny_models.make("qwen2-tied")
        prompt = mx.array(tiny_models.PROMPTS[1])

        def results():
            steps = list(generate.generate_step(prompt, model, max_tokens=8))
            return [t for t, _ in steps], mx.stack([p for _, p in steps]), model(prompt[None])

        before = results()
        mlx_lm_skiphead.install()
        # Upstream's own generator, not one of ours around it.
        assert generate.generate_step(prompt, model).gi_code.co_name == "generate_step"
        after = results()
        assert before[0] == after[0]
        assert mx.array_equal(before[1], after[1]) and mx.array_equal(before[2], after[2])
        """
    )


REPLACED = """
    import functools, importlib
    import mlx_lm_skiphead
    loops = importlib.import_module("mlx_lm.generate")
    batch = loops.GenerationBatch

    def put():
        upstream = batch._step

        @functools.wraps(upstream)
        def step(self, *args):
            return {result}

        batch._step = step

    {first}
    {second}
    print(mlx_lm_skiphead.status().loops["GenerationBatch"])
"""
CALLS, CALLS_NOT = "upstream(self, *args)", "([], [])"


@pytest.mark.parametrize("result", [CALLS, CALLS_NOT])
@pytest.mark.parametrize(
    "order", [("put()", "mlx_lm_skiphead.install()"), ("mlx_lm_skiphead.install()", "put()")]
)
def test_what_is_a_wrapper_by_its_own_word_is_taken_for_one(result, order):
    """Whether it calls what it replaces decides what is skipped, and not what is reported."""
    said = run(REPLACED.format(result=result, first=order[0], second=order[1])).stdout
    assert said == "patched\n"


def test_imports_go_downward_only():
    """Of modules, and of the folders that they are in; the command line is on top of all."""
    package = Path(mlx_lm_skiphead.__file__).parent
    modules, rooms = {}, {}
    for file in package.rglob("*.py"):
        place = file.relative_to(package).with_suffix("").parts
        if place[0] in ("cli", "__init__", "__main__"):
            continue
        found = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = (*place[: len(place) - node.level], *filter(None, [node.module]))
                base = tuple(part for name in base for part in name.split("."))
                found |= {(*base, alias.name) for alias in node.names} | {base}
        modules[place] = found
        room = place[:1] if len(place) == 1 else place[:-1]
        rooms[room] = rooms.get(room, set()) | {name[:1] for name in found} - {room}
    assert len(rooms) > 6
    for imports in (modules, rooms):
        while imports:
            ground = [name for name, needed in imports.items() if not needed & imports.keys()]
            assert ground, f"a circle: {imports}"
            for name in ground:
                del imports[name]


def test_weights_are_an_addition():
    """Skipping works without: only installing and one call in head.py know of that room."""
    package = Path(mlx_lm_skiphead.__file__).parent
    users = {
        str(file.relative_to(package))
        for file in package.rglob("*.py")
        if "weights import" in file.read_text() and file.parent.name not in ("weights", "cli")
    }
    assert users == {"installing.py", "skipping/head.py"}

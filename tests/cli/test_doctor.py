"""The doctor, as a user starts it: what it says of versions, families, patches, models, ranks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny_checkpoint
import versions
import warm
from packaging.version import parse

from mlx_lm_skiphead import __version__
from mlx_lm_skiphead.cli import doctor, links, main
from mlx_lm_skiphead.cli.run import CHILDREN
from mlx_lm_skiphead.families import FAMILIES
from mlx_lm_skiphead.installing import LOOPS, PARTS

DOCTOR = ["-m", "mlx_lm_skiphead", "doctor"]


def python(*arguments: str, folder: Path, value: str | None = None) -> subprocess.CompletedProcess:
    """Run Python in `folder`, with modules from there and the variable set to `value` or unset."""
    environment = {k: v for k, v in os.environ.items() if k not in ranks.NOT_INHERITED}
    environment |= {"PYTHONPATH": str(folder), "COLUMNS": "200", "HF_HOME": str(folder / "hub")}
    if value is not None:
        environment["MLX_LM_SKIPHEAD"] = value
    return subprocess.run(
        [warm.python(), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def text(done: subprocess.CompletedProcess) -> str:
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


def document(done: subprocess.CompletedProcess) -> dict[str, Any]:
    report = json.loads(text(done))
    assert report["exit_code"] == done.returncode
    return report


def first_columns(said: str) -> dict[str, str]:
    """The second column of all tables, by the first."""
    return dict(re.findall(r"^│ (\S+) +│ (.*?) +│", said, re.MULTILINE))


def test_off(tmp_path: Path) -> None:
    done = python(*DOCTOR, folder=tmp_path)
    said = text(done)
    assert done.returncode == 0 and not done.stderr
    found = first_columns(said)
    assert found["mlx-lm-skiphead"] == __version__
    assert found["mlx-lm"] == metadata.version("mlx-lm")
    assert re.search(r"│ wrapt +│ \S+ +│ <3,>=2.4 +│ ok +│", said)
    states = {found[family.name] for family in FAMILIES}
    # Not imported yet is what this mlx-lm has not.
    assert states <= {"patched", "not pipelined", "not imported yet"}
    assert all(found[name] == "patched" for name in ("deepseek_v3", "glm4_moe", *LOOPS))
    assert all(re.search(rf"│ {part} +│ patched", said) for part in PARTS)
    assert "MLX_LM_SKIPHEAD is not set: the plugin is off" in said
    assert "Distributed backends: ring" in said
    assert "No problem was found." in said and "Warning" not in said


# A package that wraps in the two usual ways, and prints when it is imported.
WRAPS = """
import functools
import importlib
import wrapt
from mlx_lm.models import deepseek_v2, glm4_moe
generate = importlib.import_module("mlx_lm.generate")
def around(function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        return function(*args, **kwargs)
    return call
glm4_moe.Model.__call__ = around(glm4_moe.Model.__call__)
def traced(wrapped, instance, args, kwargs):
    return wrapped(*args, **kwargs)
wrapt.wrap_function_wrapper(deepseek_v2.DeepseekV2Model, "pipeline", traced)
wrapt.wrap_function_wrapper(generate.GenerationBatch, "_step", traced)
print("wraps was imported")
"""


def test_wrappers_beneath_are_seen_and_harmless(tmp_path: Path) -> None:
    (tmp_path / "wraps.py").write_text(WRAPS)
    tiny_checkpoint.write("ministral3-tied", tmp_path)
    # The variable is set, so that the plugin was there first.
    arguments = ["--json", "--import", "wraps", "--model", str(tmp_path)]
    done = python(*DOCTOR, *arguments, folder=tmp_path, value="hidden")
    report = document(done)
    assert done.stderr == "wraps was imported\n"
    assert done.returncode == 0 and not report["problems"]
    assert (report["variable"], report["mode"]) == ("hidden", "hidden")
    for name in (*LOOPS, "glm4_moe"):
        assert report["targets"][name] == {"state": "patched", "reason": ""}
    assert all(patch["by"] == "wraps" for patch in report["patches"])
    assert {patch["target"] for patch in report["patches"]} == {
        "mlx_lm.generate.GenerationBatch._step",
        "mlx_lm.models.deepseek_v2.DeepseekV2Model.pipeline",
        "mlx_lm.models.glm4_moe.Model.__call__",
    }
    (warning,) = report["warnings"]
    assert warning.startswith("Other packages have patched the same functions: mlx_lm.")
    assert "mlx_lm.models.glm4_moe.Model.__call__ (by wraps)" in warning
    assert report["model"] == {
        "name": str(tmp_path),
        "model_type": "ministral3",
        "family": "ministral3",
        "head": "tied to the embedding",
        "supported": True,
        "reason": "",
    }


# As an mlx-lm in which glm4_moe has no hidden broadcast. The hook replaces what the plugin has
# wrapped, where the plugin's hook is there already, or what it is about to wrap.
REPLACES = """
import wrapt
from mlx_lm.models import glm4_moe
def __call__(self, x, cache=None):
    return self.norm(self.embed_tokens(x))
glm4_moe.LanguageModel.__call__ = __call__
def replace(module):
    module.DeepseekV32Model.__call__ = __call__
wrapt.register_post_import_hook(replace, "mlx_lm.models.deepseek_v32")
"""


@pytest.mark.parametrize("value", [None, "1"])
def test_what_another_package_makes_unusable(value: str | None, tmp_path: Path) -> None:
    (tmp_path / "replaces.py").write_text(REPLACES)
    done = python(*DOCTOR, "--import", "replaces", folder=tmp_path, value=value)
    said = text(done)
    assert done.returncode == (1 if value else 0) and not done.stderr
    found = first_columns(said)
    unusable = {name: state for name, state in found.items() if state in ("refused", "replaced")}
    late = "replaced" if value else "refused"  # the plugin's hook comes first, or last
    expected = {"glm4_moe": "refused", "solar_open": "refused", "deepseek_v32": late}
    assert unusable == {**expected, "glm_moe_dsa": late}
    assert "mlx_lm.models.glm4_moe.LanguageModel.__call__: expected one call of" in said
    assert re.search(r"mlx_lm.models.deepseek_v32.DeepseekV32Model.__call__ \(by replaces\)", said)
    left = f"{'Problem' if value else 'Warning'}: Left to upstream mlx-lm: "
    assert f"{left}deepseek_v32, glm4_moe, glm_moe_dsa, solar_open." in said
    assert "every rank runs the head" in said
    assert "No problem" not in said


# Puts a family that the plugin does not know into mlx-lm.
CHANGES = """
import os
import mlx_lm.models
mlx_lm.models.__path__.append(os.path.dirname(__file__) + "/more")
"""
FAMILY_OF_THE_FUTURE = "class Model:\n    pass\nclass ModelArgs:\n    pass\n"


def test_an_old_wrapt_and_a_new_family(tmp_path: Path) -> None:
    old = tmp_path / "wrapt-2.3.9.dist-info"
    old.mkdir()
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: wrapt\nVersion: 2.3.9\n")
    (tmp_path / "changes.py").write_text(CHANGES)
    more = tmp_path / "more"
    more.mkdir()
    (more / "future.py").write_text(FAMILY_OF_THE_FUTURE)
    (tmp_path / "config.json").write_text('{"model_type": "future"}')
    arguments = ["--json", "--import", "changes", "--model", "."]
    report = document(python(*DOCTOR, *arguments, folder=tmp_path, value="on"))
    assert report["problems"] == [
        "wrapt 2.3.9: <3,>=2.4 is needed.",
        "The model . is not supported: the plugin does not know it, and it works as upstream.",
    ]


@pytest.mark.parametrize(
    ("version", "needs", "well"),
    [
        ("2.4.0", ">=2.4,<3", True),
        ("2.4", ">=2.4.0,<3", True),
        ("3.0.0rc1", "<3,>=2.4", False),
        ("2.10", ">=2.4", True),
        ("2.4.0rc1", ">=2.4", False),
        ("not a version", ">=2.4", False),
        ("0.32.0.dev20260101+abc", ">=0.31.2", True),
        ("0.31.1", ">=0.31.2", False),
        ("1", "", True),
    ],
)
def test_versions(version: str, needs: str, well: bool) -> None:
    assert doctor.satisfies(version, needs) == well


def test_known_faults_of_mlx(monkeypatch: pytest.MonkeyPatch) -> None:
    def judged(mlx: str, mlx_lm: str = "0.32.2") -> list[str]:
        return list(doctor.judge_versions(mlx, mlx_lm))

    for fault in doctor.KNOWN["faults"]:
        monkeypatch.delenv(fault["setting"] or "none", raising=False)
    assert judged("0.32.3") == judged("0.32.10") == []
    for mlx in ("0.32.2", "0.32.0", "0.31.2"):
        (warning,) = judged(mlx)
        assert "0.32.3 or newer" in warning and warning.startswith(f"mlx {mlx}: ")
    monkeypatch.setenv("MLX_JACCL_RING", "1")
    assert "mlx #4443" in judged("0.32.2")[-1] and len(judged("0.32.0")) == 1
    assert judged("0.32.3") == []
    monkeypatch.setenv("MLX_METAL_FAST_SYNCH", "0")
    assert judged("0.32.3") == []
    monkeypatch.setenv("MLX_METAL_FAST_SYNCH", "1")
    (warning,) = judged("0.32.3")
    assert warning.startswith("MLX_METAL_FAST_SYNCH is set: ")
    monkeypatch.delenv("MLX_METAL_FAST_SYNCH")
    monkeypatch.setenv("MLX_JACCL_COORDINATOR", "192.168.0.1:32323")  # as mlx.launch does
    (warning,) = judged("0.32.3")
    assert "mlx #3149" in warning and "share_tokens after each call" in warning


def test_versions_of_mlx_lm_that_were_tested() -> None:
    tested = [parse(version) for version in versions.VERSIONS]
    assert f">={min(tested)},<={max(tested)}" == doctor.KNOWN["tested"]
    for version in versions.VERSIONS:
        assert not list(doctor.judge_versions("0.32.4", version))
    for version in ("0.31.2", "0.32.3", "0.33.0.dev0"):
        (warning,) = doctor.judge_versions("0.32.4", version)
        assert (
            warning
            == f"mlx-lm {version}: the plugin has been tested with {doctor.KNOWN['tested']}."
        )


def test_links_that_are_slower_than_others() -> None:
    def link(one: int, latency: float, there: float = 900.0, back: float = 900.0) -> dict[str, Any]:
        between = [one, one + 1]
        return {"between": between, "latency_ms": latency, "there_mb_s": there, "back_mb_s": back}

    alike = links.judge([link(0, 0.2), link(1, 0.3), link(2, 0.25)])
    assert not any(is_slow for is_slow, _ in alike)
    judged = [*links.judge([link(0, 0.2), link(1, 1.4), link(2, 0.2, 90.0, 80.0)])]
    assert [is_slow for is_slow, _ in judged] == [False, True, True]
    _, late, narrow = (line for _, line in judged)
    assert "between ranks 1 and 2 has a latency of 1.40 ms" in late and "each token waits" in late
    assert "carries 90.0 MB/s there" in narrow and "prompts wait for it" in narrow
    assert narrow.endswith("the best have 0.20 ms and 900.0 MB/s.")
    assert all(is_slow for is_slow, _ in links.judge([link(0, 5.1), link(1, 5.1)]))


def test_another_sitecustomize(tmp_path: Path) -> None:
    """Of a launcher that is started by `run`, and begins its own children in the same way."""
    (tmp_path / "sitecustomize.py").write_text("")
    root = str(Path(CHILDREN).parents[2])
    for path, is_in_the_way in (([str(tmp_path), CHILDREN], True), ([CHILDREN], False)):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*path, root])}
        done = subprocess.run(
            [sys.executable, *DOCTOR, "--json"],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        warnings = json.loads(done.stdout)["warnings"]
        found = [line for line in warnings if f"{tmp_path}/sitecustomize.py comes before" in line]
        assert len(found) == is_in_the_way, warnings


# Several runs in one process: each must leave mlx-lm as it was.
MODELS = """
import importlib, json, sys, types
from mlx_lm_skiphead.cli import main
for model in sys.argv[1:]:
    code = main(["doctor", "--json", "--model", model])
    print(f"exit code {code}")
    generate = importlib.import_module("mlx_lm.generate")
    assert type(generate.generate_step) is types.FunctionType
"""


def test_models(tmp_path: Path) -> None:
    configs = {
        "kimi": {"model_type": "kimi_k2", "tie_word_embeddings": False},
        "solar": {"model_type": "solar_open"},
        "nested": {"model_type": "kimi_k25", "text_config": {"tie_word_embeddings": True}},
        "llama": {"model_type": "llama"},
        "vl": {"model_type": "kimi_vl"},
        "other": {"model_type": "no_such_type"},
        "file": {"model_type": "qwen2", "model_file": "model.py"},
        "typeless": {},
    }
    for name, config in configs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "empty").mkdir()
    repository = tmp_path / "hub" / "hub" / "models--some--repository"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (repository / "snapshots" / ("0" * 40) / "config.json").write_text(json.dumps(configs["kimi"]))
    missing = ["some/other", "./nowhere", "file.py"]
    (tmp_path / "file.py").write_text("")
    names = [*configs, "broken", "empty", "some/repository", *missing]
    done = python("-c", MODELS, *names, folder=tmp_path)
    assert not done.stderr
    documents = re.split(r"exit code (\d)\n", text(done))
    found = {name: json.loads(d) for name, d in zip(names, documents[::2], strict=False)}
    codes = {name: int(code) for name, code in zip(names, documents[1::2], strict=True)}
    models = {name: report["model"] for name, report in found.items()}
    well = ("kimi", "solar", "nested", "some/repository")
    assert codes == {name: 0 if name in well else 1 for name in names}
    assert {n: (m["family"], m["head"]) for n, m in models.items() if m["supported"]} == {
        "kimi": ("deepseek_v3", "its own"),
        "solar": ("glm4_moe", "unknown"),  # whose class it is
        "nested": ("kimi_k25", "tied to the embedding"),
        "some/repository": ("deepseek_v3", "its own"),
    }
    assert {n: m["reason"] for n, m in models.items() if not m["supported"]} == {
        "llama": "the plugin does not know it, and it works as upstream",
        "vl": "the plugin does not know it, and it works as upstream",
        "other": "it cannot be loaded: ValueError: Model type no_such_type not supported.",
        "file": "not covered: it brings a model_file of its own",
        "typeless": "it cannot be loaded: KeyError: 'model_type'",
        "broken": models["broken"]["reason"],
        "empty": "there is no model in empty: it has no config.json",
        **{
            name: f"there is no folder {name}, and no copy of such a hub repository here (plan "
            "--fetch-headers looks at the hub)"
            for name in missing
        },
    }
    assert models["broken"]["reason"].startswith("it cannot be loaded: JSONDecodeError")
    assert found["llama"]["problems"] == [
        "The model llama is not supported: the plugin does not know it, and it works as upstream."
    ]


# The variable is read anew, so that it may be wrong without failing the import of the plugin.
INVALID = """
import os, sys
from mlx_lm_skiphead.cli import main
os.environ["MLX_LM_SKIPHEAD"] = "enable"
sys.modules["wrapt"] = None  # as if it were not there
sys.exit(main(["doctor"]))
"""


def test_an_invalid_variable_and_a_missing_package(tmp_path: Path) -> None:
    done = python("-c", INVALID, folder=tmp_path)
    said = text(done)
    assert done.returncode == 1 and not done.stderr
    problems = [line for line in said.splitlines() if line.startswith("Problem: ")]
    assert len(problems) == 2
    assert "MLX_LM_SKIPHEAD='enable' is not understood. Accepted values:" in problems[0]
    assert "wrapt" in problems[1] and "cannot be imported" in problems[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--import", "b"], "--import b: ModuleNotFoundError: No module named 'b'"),
        (["--import", "a"], "--import a: ZeroDivisionError: division by zero"),
    ],
)
def test_wrong_arguments(arguments: list[str], said: str, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("1 / 0\n")
    done = python(*DOCTOR, "--json", *arguments, folder=tmp_path)
    assert done.returncode == 2
    assert (done.stdout, done.stderr) == ("", f"mlx-lm-skiphead doctor: {said}\n")


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["doctor", "--help"])
    assert error.value.code == 0
    assert "Example: mlx.launch" in capsys.readouterr().out


# As ranks whose environments differ: the variable is read when the plugin is imported.
RANK = """
import os, sys
os.environ |= dict(pair.split("=") for pair in sys.argv[1:] if os.environ["MLX_RANK"] == "1")
from mlx_lm_skiphead.cli import main
sys.exit(main(["doctor"]))
"""


def test_ranks(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    environment = {"MLX_LM_SKIPHEAD": "1", "COLUMNS": "120"}
    # "yes" is another spelling of the same.
    alike = ranks.launch(script, "MLX_LM_SKIPHEAD=yes", ranks=2, env=environment)
    assert alike.stdout.count("2 ranks agree.") == alike.stdout.count("versions") == 1
    assert "No problem was found." in alike.stdout

    environment = {"COLUMNS": "120"}
    differ = ranks.launch(script, "MLX_LM_SKIPHEAD=1", ranks=2, env=environment, check=False)
    assert "exited with code 1" in differ.stderr and "Traceback" not in differ.stderr
    assert differ.stdout.count("│ wrapt") == 1 and "ranks agree" not in differ.stdout
    assert "Problem: The ranks differ in: MLX_LM_SKIPHEAD (off | on)." in differ.stdout
    assert "mlx.launch --env MLX_LM_SKIPHEAD=1 ..." in differ.stdout


LINKS = ["doctor", "--links"]


def test_a_slow_link_is_measured() -> None:
    delay = 60.0
    launcher = Path(__file__).parents[1] / "tools" / "simulated_links.py"
    done = subprocess.run(
        [
            *(sys.executable, str(launcher), "-n", "2", "--delay", str(delay)),
            *(warm.python(), "-m", "mlx_lm_skiphead", *LINKS, "--json"),
        ],
        env={**os.environ, warm.JOIN: "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    report = json.loads(done.stdout)
    found = report["links"]
    (link,) = found["links"]
    assert link["between"] == [0, 1] and not found["garbled"]
    assert link["latency_ms"] == pytest.approx(delay, rel=0.2)
    assert report["exit_code"] == 0 and "a latency of 6" in report["warnings"][0]


# As over a link that changes a byte of the rows of odd lengths that rank 1 receives.
GARBLES = """
import sys
import mlx.core as mx
from mlx_lm_skiphead.cli import main
gather = mx.distributed.all_gather
def garbled(data, **where):
    everything = gather(data, **where)
    if data.dtype == mx.uint8 and data.size % 2 and mx.distributed.init().rank() == 1:
        everything[0, -1] = everything[0, -1] + 1
    return everything
mx.distributed.all_gather = garbled
sys.exit(main(["doctor", "--links", *sys.argv[1:]]))
"""


def test_rows_of_odd_lengths_that_arrive_changed(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(GARBLES)
    server = ("mlx_lm.server", "--prompt-cache-bytes", "1G")
    done = ranks.launch(script, *server, ranks=2, check=False, env={"COLUMNS": "120"})
    assert "Problem: The links are broken: another rank got other data than" in done.stdout
    assert "Warning: --prompt-cache-bytes over ranks: each drops prompts by" in done.stdout


# As where a message is late: rank 1 begins when rank 0 has said that it waits.
LATE = """
import logging, os, sys, time
from pathlib import Path
import mlx.core as mx
from mlx_lm_skiphead.cli import links, main
told = Path(sys.argv[1])
class Tells(logging.Handler):
    def emit(self, record):
        print(record.getMessage(), file=sys.stderr, flush=True)
        told.touch()
logging.getLogger("mlx_lm_skiphead").addHandler(Tells())
measure = links.measure
def late(group):
    while group.rank() == 1 and not told.exists():
        time.sleep(0.1)
    return measure(group)
links.measure = late
sys.exit(main(["doctor", "--links"]))
"""


def test_links_that_stand_still(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(LATE)
    env = {"MLX_LM_SKIPHEAD_WATCH": "2"}
    done = ranks.launch(script, str(tmp_path / "told"), ranks=2, env=env, timeout=90)
    waits = "rank 0, links: has waited [2-4] s for what rank 1 sends in step 0; usually another"
    assert re.search(waits, done.stderr), done.stderr
    assert "2 ranks agree." in done.stdout


def test_links_take_ranks(tmp_path: Path) -> None:
    done = python("-m", "mlx_lm_skiphead", *LINKS, folder=tmp_path)
    assert done.returncode == 2 and "--links needs ranks: mlx.launch" in done.stderr

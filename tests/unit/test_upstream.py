"""What is pinned of mlx-lm: the families that it can pipeline, and the results of its own tests.

Of these the ones that need no network and no Metal.
"""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import mlx_lm.models
import pytest

from mlx_lm_skiphead.families import BY_NAME, MODELS_PACKAGE

FILES = (
    "test_chat.py",
    "test_deepseek_v41.py",
    "test_evaluate.py",
    "test_gated_delta.py",
    "test_models.py",
    "test_muse_spark_inputs.py",
    "test_sample_utils.py",
    "test_tool_parsing.py",
    "test_tuner_utils.py",
)


OUT_OF_REACH = {"kimi_vl"}
"""Modules with a pipelined model that is not at `Model.model`, where `sharded_load` looks."""


def pipelined_classes(module: ModuleType) -> list[str]:
    """The classes that can be pipelined, of the module or of one that its `Model` inherits from."""
    lineage = getattr(module, "Model", object).__mro__
    modules = {sys.modules[c.__module__] for c in lineage if c.__module__.startswith("mlx_lm.")}
    classes = [c for m in (module, *modules) for c in vars(m).values() if inspect.isclass(c)]
    return [c.__name__ for c in classes if hasattr(c, "pipeline") and c.__name__ != "PipelineMixin"]


def test_the_table_covers_every_pipelined_family() -> None:
    found = {}
    for info in pkgutil.iter_modules(mlx_lm.models.__path__, f"{MODELS_PACKAGE}."):
        try:
            module = importlib.import_module(info.name)
        except (ImportError, SystemExit):  # it needs a package that is not here
            continue
        if hasattr(module, "Model") and (classes := pipelined_classes(module)):
            found[info.name.rpartition(".")[2]] = classes
    assert len(found) > 5
    assert {name: classes for name, classes in found.items() if name not in BY_NAME} == {
        name: found[name] for name in OUT_OF_REACH if name in found
    }


@pytest.mark.parametrize("name", sorted(OUT_OF_REACH))
def test_what_is_out_of_reach(name: str) -> None:
    module = pytest.importorskip(f"{MODELS_PACKAGE}.{name}")
    assert not hasattr(module.Model, "model")
    assert "self.model = " not in inspect.getsource(module.Model)


@pytest.fixture(scope="module")
def upstream(tmp_path_factory) -> Path:
    """The tests of the installed mlx-lm, from its source distribution."""
    folder = tmp_path_factory.mktemp("upstream")
    version = metadata.version("mlx-lm")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary=:all:"]
    command += [f"mlx-lm=={version}", "-d", str(folder)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder)
    return folder / f"mlx_lm-{version}" / "tests"


def outcomes(upstream: Path, plugin: str) -> dict[str, str]:
    """What became of each test."""
    report = upstream / f"{plugin}.xml"
    environment = {**os.environ, "MLX_LM_SKIPHEAD": plugin, "HF_HUB_OFFLINE": "1"}
    files = [name for name in FILES if (upstream / name).exists()]
    command = [sys.executable, "-m", "pytest", "-q", "--continue-on-collection-errors"]
    command += ["-p", "mlx_lm_skiphead", f"--junitxml={report}", *files]
    subprocess.run(
        command,
        cwd=upstream,  # they import each other
        env=environment,
        stdout=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
        timeout=900,
    )
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        found[f"{case.get('classname')}.{case.get('name')}"] = kinds[0] if kinds else "passed"
    return found


@pytest.mark.long
def test_the_same_results(upstream: Path) -> None:
    without = outcomes(upstream, "0")
    assert sum(outcome == "passed" for outcome in without.values()) > 100
    assert outcomes(upstream, "1") == without

"""mlx-lm's own tests that need no network and no Metal: the same results with the plugin."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

import pytest

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

"""What the tests share: the folders whose modules they import, and the real model.

The model is made once and kept: in the folder MLX_LM_SKIPHEAD_TEST_CACHE, else in the user's
cache. Without it the tests that need it fail; they are not skipped.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

for room in ("tools", "ranks"):
    sys.path.insert(0, str(Path(__file__).resolve().with_name(room)))

kernels = importlib.import_module("kernels")
kernels.faster()

# In the background of a shell SIGINT is ignored, also by what is started there.
signal.signal(signal.SIGINT, signal.default_int_handler)


SLOWEST = (
    *("families", "mpi", "soak", "fuzz", "slow_links", "real_model", "programs", "bench"),
    *("server", "split", "loop", "watch", "deadline", "demo", "plan", "agreement", "run"),
    *("fetch", "memory", "doctor", "readme"),
)
"""Files of tests that begin first, so that no process is left with one at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        name = item.path.stem.removeprefix("test_")
        return SLOWEST.index(name) if name in SLOWEST else len(SLOWEST)

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``-n``: whole files, since those of a file share what they start."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


@pytest.fixture(scope="session")
def real_model() -> Path:
    """The folder of SmolLM2-135M-Instruct as a qwen2 checkpoint (tests/tools/smollm2.py)."""
    # Here, so that tests without the model do not import mlx into the process that runs them.
    from smollm2 import smollm2

    cache = os.environ.get("MLX_LM_SKIPHEAD_TEST_CACHE")
    if not cache:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        cache = str(Path(home, "mlx-lm-skiphead"))
    try:
        return smollm2(Path(cache))
    except (OSError, RuntimeError) as error:
        reason = str(error)
    pytest.fail(
        f"the real model could not be made in {cache}: {reason}\n"
        "It takes the network once. MLX_LM_SKIPHEAD_TEST_CACHE may name a folder that has it.",
        pytrace=False,
    )

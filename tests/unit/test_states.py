"""Properties of the pure parts, by hypothesis: what is patched is what `status` says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import warm
from hypothesis import example, given
from hypothesis import strategies as st

from mlx_lm_skiphead.config import SPELLINGS, VARIABLE, requested_mode

SCRIPT = Path(__file__).with_name("states.py")


def test_any_order_ends_in_what_status_says():
    """Of install, uninstall, other packages' wrappers and replacements, and reload."""
    done = subprocess.run(
        [warm.python(), str(SCRIPT), "40"],
        capture_output=True,
        text=True,
        timeout=300,
        env={k: v for k, v in os.environ.items() if k != VARIABLE}
        | {"PYTHONPATH": str(ranks.TESTS)},
    )
    assert done.returncode == 0, done.stdout + done.stderr


@given(st.text())
@example("1 ")
@example("ON")
def test_any_string_as_the_variable(value):
    if value in SPELLINGS:
        assert requested_mode({VARIABLE: value}) == SPELLINGS[value]
    else:
        with pytest.raises(ValueError, match="is not understood"):
            requested_mode({VARIABLE: value})


# Another thread imports a module slowly, and this one installs in the middle of that.
IMPORTED_HALFWAY = """
import importlib, sys, threading, time
import importlib.abc
import mlx_lm, mlx_lm_skiphead

name = "mlx_lm.models.glm4_moe"
halfway, go_on = threading.Event(), threading.Event()

class Slow(importlib.abc.Loader):
    def __init__(self, loader): self.loader = loader
    def create_module(self, spec): return None
    def exec_module(self, module):
        halfway.set(); go_on.wait(20)
        self.loader.exec_module(module)

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path, target=None):
        if fullname != name: return None
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(fullname, path)):
                spec.loader = Slow(spec.loader)
                return spec

sys.meta_path.insert(0, Finder())
importing = threading.Thread(target=importlib.import_module, args=(name,))
importing.start()
halfway.wait(20)
threads = [threading.Thread(target=mlx_lm_skiphead.install) for _ in range(4)]
for thread in threads: thread.start()
time.sleep(0.5)
go_on.set()
for thread in [importing, *threads]: thread.join(20)
assert not any(thread.is_alive() for thread in [importing, *threads])
glm4_moe = sys.modules[name]
call = vars(glm4_moe.Model)["__call__"]
print(mlx_lm_skiphead.status().families["glm4_moe"], type(call.__wrapped__).__name__)
"""


def test_installing_in_threads_while_another_one_imports():
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED_HALFWAY], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "patched function\n", done.stderr
    assert not done.stderr

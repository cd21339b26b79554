"""Switches the plugin on in each Python that a program started by ``mlx-lm-skiphead run`` starts.

`run` puts this folder first on ``PYTHONPATH``, and a Python that begins imports what is called
``sitecustomize``. The one that is hidden by this one is run here, in its place.
"""

import contextlib
import os
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec

with contextlib.suppress(ImportError):  # a Python of another environment, which has no plugin
    import mlx_lm_skiphead  # noqa: F401

_here = os.path.realpath(os.path.dirname(__file__))
_others = [path for path in sys.path if os.path.realpath(path) != _here]
_hidden = PathFinder.find_spec("sitecustomize", _others)
if _hidden is not None and _hidden.loader is not None:
    sys.modules["sitecustomize"] = module_from_spec(_hidden)
    _hidden.loader.exec_module(sys.modules["sitecustomize"])

"""Pipeline-parallel mlx-lm without the head on ranks that do not sample.

With ``MLX_LM_SKIPHEAD=1`` in the environment of every rank, importing this package before or
after mlx-lm is all. See `install` for switching it on in code, and README.md.

To read the code, begin with families.py, then skipping/: sharing.py, head.py, programs.py,
loops.py, own_loop.py, speculation.py. weights/ has what stays on disk, and uneven splits; ranks/
the comparison of ranks, and the watch. installing.py puts the table of patches together.
"""

from __future__ import annotations

import importlib

from .config import requested_mode

TYPE_CHECKING = False  # as typing's, without importing typing
if TYPE_CHECKING:
    from .installing import Status, install, status, uninstall
    from .patching.registry import SkipheadError
    from .skipping.own_loop import rank_zero_head, share_tokens

__version__ = "0.3.0"
__all__ = [
    "SkipheadError",
    "Status",
    "__version__",
    "install",
    "rank_zero_head",
    "share_tokens",
    "status",
    "uninstall",
]


_MODULES = {
    "SkipheadError": "patching.registry",
    "rank_zero_head": "skipping.own_loop",
    "share_tokens": "skipping.own_loop",
}
"""Where what is public is defined, if not in installing.py."""


def __getattr__(name: str) -> object:
    # Off must cost nothing: what these need is imported when one of them is first used.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULES.get(name, 'installing')}")
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _imported_by_autowrapt(module: object) -> None:
    """For an entry point of autowrapt: finding this function has imported the package."""


def _is_command_line() -> bool:
    import sys
    from itertools import pairwise

    is_module = sys.argv[0] == "-m" and ("-m", __name__) in pairwise(sys.orig_argv)
    return is_module or sys.argv[0].endswith("mlx-lm-skiphead")


try:
    _mode = requested_mode()
    if _mode != "off":
        from .installing import install

        install(_mode)
except (ValueError, ImportError):  # a variable that is not understood, or no wrapt
    if not _is_command_line():  # which says so in a line
        raise

"""A model: of which family it is, and whether the plugin supports it. Reads config.json only."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...families import BY_NAME
from .report import Report, WrongArgument, line
from .targets import can_be_pipelined


def locate(model: str) -> Path | None:
    """Where its config.json would be; None if the hub's cache has no such repository."""
    if Path(model).is_dir():
        return Path(model)
    if Path(model).exists():
        raise WrongArgument(f"--model {model} is not a folder")
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise WrongArgument(f"--model {model}: there is no such folder")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(model, local_files_only=True, allow_patterns=["*.json"]))
    except (ImportError, OSError, ValueError):
        return None


def examine(
    name: str, folder: Path | None, report: Report, unusable: Sequence[str]
) -> dict[str, Any]:
    """What becomes of a model: see ``model`` in `examine`."""
    found: dict[str, Any] = {
        "name": name,
        "model_type": "",
        "family": "",
        "head": "unknown",
        "supported": False,
        "reason": "",
    }
    if folder is None:
        return found | {"reason": "no such folder, and not in the hub's cache on this machine"}
    try:
        written = json.loads((folder / "config.json").read_bytes())
        found["model_type"] = written["model_type"]
    except FileNotFoundError:
        return found | {"reason": "it has no config.json"}
    except (OSError, ValueError, TypeError, KeyError) as error:
        return found | {"reason": f"its config.json cannot be used: {line(error)}"}
    text = written.get("text_config")
    tied = {**written, **(text if isinstance(text, dict) else {})}.get("tie_word_embeddings")
    if tied is not None:
        found["head"] = "tied" if tied else "own"
    if written.get("model_file"):
        return found | {"reason": "not covered: it brings a model_file of its own"}
    if unusable:
        return found | {"reason": f"{', '.join(unusable)} cannot be used"}
    family, reason = _family_of(written, report)
    return found | {"family": family, "supported": not reason, "reason": reason}


def _family_of(written: dict[str, Any], report: Report) -> tuple[str, str]:
    """The family of a config, or ""; and why it is not supported, or ""."""
    from mlx_lm.utils import _get_classes

    try:
        model, arguments = _get_classes(config=written)
    except Exception as error:
        return "", f"mlx-lm does not load it: {line(error)}"
    # solar_open's Model is another family's, its ModelArgs are its own.
    for cls in (arguments, model):
        name = cls.__module__.rpartition(".")[2]
        if name in BY_NAME and getattr(sys.modules[cls.__module__], "Model", None) is model:
            state, reason = report["families"][name].values()
            return name, "" if state == "patched" else f"{name} is {state}: {reason}".strip(": ")
    if can_be_pipelined(model):
        return "", "mlx-lm pipelines it, but the plugin does not know it: it works as upstream"
    return "", "mlx-lm cannot pipeline it"

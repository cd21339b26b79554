"""``python tests/tools/versions.py [VERSION ...]``: tests on real ranks for each mlx-lm we support.

Each in an environment of its own, which is kept in MLX_LM_SKIPHEAD_TEST_CACHE, or else in the
user's cache. Prints a table, and exits with 1 if a test failed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import venv
from pathlib import Path

VERSIONS = {"0.31.3": "0.31.2", "0.32.0": "0.32.2", "0.32.1": "0.32.4", "0.32.2": "0.32.4"}
"""Of mlx-lm, each with an mlx that fits: 0.32.1 needs a newer one than it says."""

PROJECT = Path(__file__).resolve().parents[2]
TESTS = (
    "unit/test_switch",
    *(f"ranks/test_{t}" for t in ("families", "loop", "agreement", "fetch", "split")),
)
CACHE = Path(
    os.environ.get("MLX_LM_SKIPHEAD_TEST_CACHE") or Path.home() / ".cache" / "mlx-lm-skiphead-tests"
)


def environment(version: str) -> Path:
    """The Python of an environment with that mlx-lm and this plugin, newly installed."""
    folder = CACHE / f"mlx-lm-{version}-python{sys.version_info[0]}.{sys.version_info[1]}"
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    extra = [f"mlx-cpu=={VERSIONS[version]}"] if sys.platform == "linux" else []
    subprocess.run(
        [
            *(python, "-m", "pip", "install", "-q", "--disable-pip-version-check"),
            *(f"mlx-lm=={version}", f"mlx=={VERSIONS[version]}", *extra),
            *("openai>=2", "pytest>=8", "pytest-xdist>=3.6", PROJECT),
        ],
        check=True,
    )
    # As released it has the same version each time.
    subprocess.run(
        [
            *(python, "-m", "pip", "install", "-q", "--disable-pip-version-check"),
            *("--force-reinstall", "--no-deps", PROJECT),
        ],
        check=True,
    )
    return python


def main(versions: list[str]) -> int:
    rows, failed = [], False
    for version in versions:
        start = time.monotonic()
        done = subprocess.run(
            [
                environment(version),
                "-m",
                "pytest",
                *("-q", "-n", "2"),
                *(PROJECT / "tests" / f"{t}.py" for t in TESTS),
            ],
            cwd=CACHE,  # not the project's folder: what is installed is tested
            capture_output=True,
            text=True,
        )
        failed |= done.returncode != 0
        last = re.findall(r"^.*(?:passed|failed|error).* in .*$", done.stdout, re.MULTILINE)
        said = last[-1] if last else f"exit code {done.returncode}"
        rows.append(f"{version:<8} {VERSIONS[version]:<8} {said}")
        print(f"mlx-lm {version}: {said}, {time.monotonic() - start:.0f} s in all", flush=True)
        if done.returncode:
            print(done.stdout[-5000:], done.stderr[-2000:])
    print("\nmlx-lm   mlx      tests", *rows, sep="\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(VERSIONS)))

"""Two minutes of the fuzzer, always from the same seed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).with_name("fuzz.py")


@pytest.mark.long
def test_fuzz() -> None:
    command = [sys.executable, str(FUZZ), "--minutes", "2", "--seed", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "'without a head'" in done.stdout, done.stdout

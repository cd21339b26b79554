"""What README.md says that the code can check."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import ranks
import tiny_models

from mlx_lm_skiphead import config
from mlx_lm_skiphead.families import FAMILIES

ROOT = Path(__file__).parents[2]
README = ROOT.joinpath("README.md").read_text(encoding="utf-8")


def test_it_is_short_and_a_package_index_can_show_it() -> None:
    lines = README.splitlines()
    assert len(lines) < 200
    assert max(map(len, lines)) <= 110
    assert not re.search(r"!\[|<img", README)  # a relative picture would be broken there


@pytest.mark.parametrize("name", ["README.md", ".github/MEASUREMENTS.md", ".github/CHANGELOG.md"])
def test_links_lead_to_files_and_sections(name: str) -> None:
    file = ROOT / name
    for target in re.findall(r"\]\(([^)]+)\)", file.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, section = target.partition("#")
        linked = file.parent / path if path else file
        assert linked.is_file(), target
        if section:
            headings = re.findall(r"^#+ (.*)", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert section in [h.lower().replace(" ", "-") for h in headings], target


def test_the_families_are_those_of_the_code() -> None:
    (listed,) = re.findall(r"## Families\n\n([^:]*):", README)
    assert listed.replace("\n", " ").split(", ") == [family.name for family in FAMILIES]


def test_every_value_of_the_variable_is_named() -> None:
    for value in filter(None, config.SPELLINGS):
        assert f"`{value}`" in README


@pytest.mark.skipif(
    tiny_models.EVENLY, reason="mlx-lm before 0.32 cannot pipeline qwen2, as which this model loads"
)
@pytest.mark.parametrize(
    ("name", "plugin"), [("ask.py", "1"), ("own_loop.py", "1"), ("own_loop.py", "0")]
)
def test_the_examples_work_on_two_ranks(
    name: str, plugin: str, real_model: Path, tmp_path: Path
) -> None:
    (code,) = re.findall(rf"```python\n(# {name}\b.*?)```", README, re.DOTALL)
    program = tmp_path / name
    program.write_text(code.replace("path/to/model", str(real_model)))
    environment = {"MLX_LM_SKIPHEAD": plugin}
    done = ranks.launch(program, str(real_model), ranks=2, env=environment, timeout=300)
    assert done.stdout == "The capital of France is Paris.\n"

"""What README.md says that the code can check."""

from __future__ import annotations

from pathlib import Path

from mlx_lm_skiphead import config, families

README = Path(__file__).parents[1].joinpath("README.md").read_text(encoding="utf-8")


def test_the_table_of_families_is_the_one_in_the_code() -> None:
    assert families.markdown() in README


def test_every_value_of_the_variable_is_named() -> None:
    for value in filter(None, config.SPELLINGS):
        assert f"`{value}`" in README

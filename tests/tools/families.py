"""The table of families, as README.md shows it: ``python tests/tools/families.py``."""

from __future__ import annotations

from mlx_lm_skiphead.families import FAMILIES


def markdown() -> str:
    """A table in Markdown, one line a family."""
    rows = ["| family | its head is run by | on the hidden states of |", "|---|---|---|"]
    for family in FAMILIES:
        if family.is_alias:
            rows.append(f"| {family.name} | as {family.base} | |")
        else:
            path = f"{family.owner}.{family.stage}".lstrip(".")
            owner = family.head_class + (f" (`{family.owner}`)" if family.owner else "")
            rows.append(f"| {family.name} | {owner} | {family.stage_class} (`{path}`) |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(markdown())

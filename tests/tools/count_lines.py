"""``python tests/tools/count_lines.py [FOLDER]``: lines of code by file and by folder.

A line counts if it has a token of code: blank lines, comments and docstrings do not count. FOLDER
is the package if it is not given; of that the core (all but ``cli``) is summed up too.
"""

from __future__ import annotations

import ast
import sys
import tokenize
from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "mlx_lm_skiphead"
NO_CODE = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT),
    *(tokenize.ENCODING, tokenize.ENDMARKER),
}


def lines_of_code(file: Path) -> int:
    """The lines of a Python file that have code."""
    with tokenize.open(file) as opened:
        source = opened.read()
    with file.open("rb") as binary:
        tokens = [
            token for token in tokenize.tokenize(binary.readline) if token.type not in NO_CODE
        ]
    code = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    return len(code - set(_docstrings(ast.parse(source))))


def _docstrings(tree: ast.Module) -> list[int]:
    """The lines of docstrings, those of attributes among them: strings that are statements."""
    return [
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    ]


def count(folder: Path) -> dict[Path, int]:
    """The lines of code of each file in a folder, by its path from there."""
    return {file.relative_to(folder): lines_of_code(file) for file in sorted(folder.rglob("*.py"))}


def main(folder: Path) -> None:
    by_file = count(folder)
    rooms: Counter[str] = Counter()
    for file, lines in by_file.items():
        rooms[str(file.parent)] += lines
        print(f"{lines:6}  {file}")
    print()
    for room, lines in rooms.items():
        print(f"{lines:6}  {'(top)' if room == '.' else f'{room}/'}")
    if folder == PACKAGE:
        core = sum(lines for file, lines in by_file.items() if file.parts[0] != "cli")
        print(f"{core:6}  core")
    print(f"{sum(by_file.values()):6}  in all")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve() if sys.argv[1:] else PACKAGE)

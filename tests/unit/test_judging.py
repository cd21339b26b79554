"""What tests/ranks/programs calls right: one line for each way to be wrong."""

from __future__ import annotations

import pytest
from programs.judging import DRAFTS_DIFFER, problems
from programs.registry import ALONE, OTHER_PROMPTS, REFUSED, UNPATCHED

DIFFERENT = {"other prompts": {"ranks": [1], "generations": 1}}
WARNING = ["Another prompt than rank 0's was given to rank 1"]


def report(judged, seen=None, warnings=(), notes=None):
    """What a rank says of the program "p"; without `seen` it has not run."""
    return {
        "programs": {} if seen is None else {"p": seen},
        "judged": {"p": judged},
        "warnings": {"p": list(warnings)},
        "notes": {"p": notes or {}},
    }


def of_two(judged, *seen, warnings=(), notes=(None, None)):
    return [report(judged, seen[rank], warnings, notes[rank]) for rank in (0, 1)]


NORM = [{"norm saw NaN": [False]}, {"norm saw NaN": [True]}]

RIGHT = {
    "equal": (of_two(UNPATCHED, [1], [2]), of_two(UNPATCHED, [1], [2])),
    "alone": (of_two(ALONE, None, None), of_two(ALONE, [1, 1], [2, 2])),
    "refused": (of_two(REFUSED, [1], [1]), of_two(REFUSED, DRAFTS_DIFFER, DRAFTS_DIFFER)),
    "warned": (
        of_two(OTHER_PROMPTS, [1], [1]),
        of_two(OTHER_PROMPTS, [2], [2], warnings=WARNING, notes=[DIFFERENT] * 2),
    ),
    "norm": (
        of_two(UNPATCHED, [1], [1], notes=[NORM[0]] * 2),
        of_two(UNPATCHED, [1], [1], notes=NORM),
    ),
}
WRONG = {
    "a rank differs": (of_two(UNPATCHED, [1], [1]), of_two(UNPATCHED, [1], [2])),
    "raises both ways": (of_two(UNPATCHED, "E", "E"), of_two(UNPATCHED, "E", "E")),
    "has not run": (of_two(UNPATCHED, [1], [1]), of_two(UNPATCHED, None, None)),
    "a warning": (of_two(UNPATCHED, [1], [1]), of_two(UNPATCHED, [1], [1], warnings=WARNING)),
    "unpatched warns": (of_two(UNPATCHED, [1], [1], warnings=["x"]), of_two(UNPATCHED, [1], [1])),
    "alone, not as it ought to be": (of_two(ALONE, None, None), of_two(ALONE, [1, 1], [1, 2])),
    "alone, raises": (of_two(ALONE, None, None), of_two(ALONE, "EE", "EE")),
    "not refused": (of_two(REFUSED, [1], [1]), of_two(REFUSED, [1], [1])),
    "refused otherwise": (of_two(REFUSED, [1], [1]), of_two(REFUSED, "E", "E")),
    "not warned": (
        of_two(OTHER_PROMPTS, [1], [1]),
        of_two(OTHER_PROMPTS, [2], [2], notes=[DIFFERENT] * 2),
    ),
    "no other prompts": (of_two(OTHER_PROMPTS, [1], [1]), of_two(OTHER_PROMPTS, [2], [2])),
    "other tokens by rank": (
        of_two(OTHER_PROMPTS, [1], [1]),
        of_two(OTHER_PROMPTS, [2], [3], warnings=WARNING, notes=[DIFFERENT] * 2),
    ),
    "numbers in a worker's norm": (
        of_two(UNPATCHED, [1], [1], notes=[NORM[0]] * 2),
        of_two(UNPATCHED, [1], [1], notes=[NORM[0]] * 2),
    ),
    "NaN in an unpatched norm": (
        of_two(UNPATCHED, [1], [1], notes=NORM),
        of_two(UNPATCHED, [1], [1], notes=NORM),
    ),
}


@pytest.mark.parametrize("case", RIGHT)
def test_right(case):
    assert not [*problems("p", *RIGHT[case])]


@pytest.mark.parametrize("case", WRONG)
def test_wrong(case):
    assert [*problems("p", *WRONG[case])]

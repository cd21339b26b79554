"""Programs by name."""

from __future__ import annotations

import itertools

PROGRAMS, ALONE, BY_VALUE = {}, {}, {}


def kind(programs=PROGRAMS, **choices):
    """The function is a program for each combination of `choices`, its arguments."""

    def add(function):
        for values in itertools.product(*choices.values()):
            name = ", ".join([function.__name__.replace("_", " "), *values])
            options = dict(zip(choices, values, strict=True))
            programs[name] = lambda options=options: function(**options)
        return function

    return add


def alone_with_the_plugin(**choices):
    return kind(ALONE, **choices)


def by_value(**choices):
    """Its ranks are given different prompts, which unpatched's are not or do not notice."""
    return kind(BY_VALUE, **choices)

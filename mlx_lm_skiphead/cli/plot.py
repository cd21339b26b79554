"""Draws what `bench` measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLOURS = {"unpatched": "#8a8f98", "skip": "#0f6cbd"}


def draw(told: dict[str, Any], file: Path) -> None:
    """Write a picture of `bench.document` to `file`, in the format that its name says.

    Left the milliseconds per token, their medians and range, and what was planned (`--plan`); right
    the ratio with its interval.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = [case for case in told["cases"] if case["ratio"]]
    names = [f"batch {case['batch']}\nprompt {case['prompt']}" for case in cases]
    figure, (times, ratios) = pyplot.subplots(
        1, 2, figsize=(max(7.0, 2.2 * len(cases) + 4), 4), layout="constrained"
    )
    for number, (way, colour) in enumerate(COLOURS.items()):
        spreads = [case["ms_per_token"][way] for case in cases]
        medians = [spread["median"] for spread in spreads]
        times.bar(
            [place + 0.4 * (number - 0.5) for place in range(len(cases))],
            medians,
            0.38,
            label=way,
            color=colour,
            yerr=_arms(medians, [(spread["low"], spread["high"]) for spread in spreads]),
            error_kw={"elinewidth": 1, "capsize": 3},
        )
    if all(case["planned"] for case in cases):
        times.scatter(
            [place + 0.4 * (n - 0.5) for place in range(len(cases)) for n in range(len(COLOURS))],
            [case["planned"][way] for case in cases for way in COLOURS],
            marker="D",
            color="black",
            s=22,
            zorder=3,
            label="planned",
        )
    times.set_title("ms per token, lowest to highest", fontsize=10)
    times.set_ylim(bottom=0)
    times.legend(frameon=False)

    medians = [case["ratio"]["median"] for case in cases]
    between = [case["ratio"]["interval"] for case in cases]
    ratios.axhline(1, color=COLOURS["unpatched"], linewidth=1)
    ratios.errorbar(
        range(len(cases)),
        medians,
        yerr=_arms(medians, [(one["low"], one["high"]) for one in between]),
        fmt="o",
        color=COLOURS["skip"],
        capsize=4,
    )
    for place, median in enumerate(medians):
        ratios.annotate(
            f"{median:.2f}", (place, median), textcoords="offset points", xytext=(9, -3)
        )
    confidence = min(one["confidence"] for one in between)
    ratios.set_title(f"skip / unpatched, {100 * confidence:.0f} % confidence", fontsize=10)
    ratios.set_xlim(-0.5, len(cases) - 0.4)
    for axes in (times, ratios):
        axes.set_xticks(range(len(cases)), names)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{Path(told['model']).name} ({told['family']}), {told['ranks']} ranks, "
        f"{min(len(case['ratio']['values']) for case in cases)} interleaved rounds",
        fontsize=11,
    )
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def _arms(medians: list[float], ranges: list[tuple[float, float]]) -> list[list[float]]:
    below = [median - low for median, (low, _) in zip(medians, ranges, strict=True)]
    above = [high - median for median, (_, high) in zip(medians, ranges, strict=True)]
    return [below, above]

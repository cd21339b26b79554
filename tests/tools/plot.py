"""Draws what `bench` measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLOURS = {"unpatched": "#8a8f98", "plugin": "#0f6cbd"}


def draw(told: dict[str, Any], file: Path) -> None:
    """Write a picture of `bench.document` to `file`, in the format of its suffix.

    On the left are milliseconds per token with their range, and the plan (`--plan`); on the right
    is the ratio with its interval.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = [case for case in told["cases"] if case["ratio"]]
    figure, (times, ratios) = pyplot.subplots(
        1, 2, figsize=(max(7.0, 2.2 * len(cases) + 4), 4), layout="constrained"
    )
    for shift, (way, colour) in zip((-0.2, 0.2), COLOURS.items(), strict=True):
        places = [place + shift for place in range(len(cases))]
        spreads = [case["ms_per_token"][way] for case in cases]
        medians = [spread["median"] for spread in spreads]
        times.bar(places, medians, 0.38, label=way, color=colour)
        _draw_ranges(times, places, medians, spreads, color="black", elinewidth=1, capsize=3)
        if all(case.get("planned") for case in cases):
            planned = [case["planned"][way] for case in cases]
            label = "planned" if shift > 0 else None
            times.scatter(places, planned, s=22, marker="D", color="black", zorder=3, label=label)
    times.set_title("ms per token, lowest to highest", fontsize=10)
    times.set_ylim(bottom=0)
    times.legend(frameon=False)

    medians = [case["ratio"]["median"] for case in cases]
    between = [case["ratio"]["interval"] for case in cases]
    ratios.axhline(1, color=COLOURS["unpatched"], linewidth=1)
    _draw_ranges(ratios, range(len(cases)), medians, between, color=COLOURS["plugin"], fmt="o")
    for place, median in enumerate(medians):
        offset = {"textcoords": "offset points", "xytext": (9, -3)}
        ratios.annotate(f"{median:.2f}", (place, median), **offset)
    confidence = min(each["confidence"] for each in between)
    ratios.set_title(f"plugin / unpatched, {100 * confidence:.0f} % confidence", fontsize=10)
    ratios.set_xlim(-0.5, len(cases) - 0.4)
    for axes in (times, ratios):
        names = [f"batch {case['batch']}\nprompt {case['prompt']}" for case in cases]
        axes.set_xticks(range(len(cases)), names)
        axes.spines[["top", "right"]].set_visible(False)
    rounds = min(len(case["ratio"]["values"]) for case in cases)
    name = f"{Path(told['model']).name} ({told['family']})"
    figure.suptitle(f"{name}, {told['ranks']} ranks, {rounds} interleaved rounds", fontsize=11)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def _draw_ranges(axes: Any, places: Any, medians: Any, ranges: Any, **style: Any) -> None:
    """Draw the range from "low" to "high" of each around its median."""
    pairs = list(zip(medians, ranges, strict=True))
    below = [median - each["low"] for median, each in pairs]
    above = [each["high"] - median for median, each in pairs]
    axes.errorbar(places, medians, yerr=[below, above], **{"fmt": "none", **style})

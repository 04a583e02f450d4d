"""Plots training speed measured on a GPU: the ways side by side, and a step's kernels.

python -m benchmarks.ladder docs/images/speed.png
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.record import RESULTS

LADDERS = {
    "training-28b-h200.json": "LoRA of the reference targets",
    "training-28b-h200-experts.json": "routed experts adapted too",
}
PROFILE = "profile-28b-h200.json"
BAR, PALE = "#3b6fd4", "#9db7e8"

KINDS = {
    "routed experts": ("GroupProblem",),
    "attention": ("flash",),
    "matrix products": ("nvjet", "gemm"),
    "fused by the compiler": ("triton", "swiglu_backward", "gradient"),
}
"""Kinds of kernels, by substrings of their names; the first match counts."""
REST = "all else: loss, copies, sorting"


def kind(kernel: str) -> str:
    return next((k for k, marks in KINDS.items() if any(m in kernel for m in marks)), REST)


def shares(profile: dict[str, Any]) -> dict[str, float]:
    """Milliseconds by kind; kernels that the profile does not list count as the rest."""
    spent: Counter[str] = Counter(dict.fromkeys([*KINDS, REST], 0.0))
    for kernel in profile["kernels"]:
        spent[kind(kernel["kernel"])] += kernel["ms"]
    spent[REST] += profile["device_ms"] - spent.total()
    return dict(spent)


def bars(
    axes: mpl.axes.Axes,
    values: dict[str, float],
    unit: str,
    color: str,
    most: dict[str, float] | None = None,
) -> None:
    """A bar for each value, with a pale one up to `most` behind it, if given."""
    names, most = list(values), most or values
    axes.barh(names, [most[name] for name in names], color=PALE)
    axes.barh(names, list(values.values()), color=color)
    axes.invert_yaxis()
    for row, value in enumerate(values.values()):
        end = most[names[row]]
        axes.text(end, row, f" {value:,.0f}{unit}", va="center", fontsize=8)
    axes.set_xlim(0, 1.18 * max(most.values()))
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(left=False)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws the measured ways to train.")
    parser.add_argument("image", type=Path, help="the SVG or PNG to write")
    arguments = parser.parse_args()
    mpl.rcParams |= {"svg.hashsalt": "speed", "font.size": 9}
    figure = Figure(figsize=(9.6, 6.0), layout="constrained")
    first, second, third = figure.subplots(3, 1, height_ratios=(10, 3, 5))
    for axes, (name, what) in zip((first, second), LADDERS.items(), strict=True):
        record = json.loads((RESULTS / name).read_text())
        median, fastest = (
            {name: way[key] for name, way in record["ways"].items()}
            for key in ("tokens_per_second", "fastest")
        )
        bars(axes, median, "", BAR, fastest)
        axes.set_title(
            f"tokens a second, the median (pale: the fastest), {record['layers']} layers, "
            f"{record['device']}: {what}",
            fontsize=10,
            loc="left",
        )
    profile = json.loads((RESULTS / PROFILE).read_text())
    bars(third, shares(profile), " ms", PALE)
    third.set_title(
        f"one compiled step of {profile['rows']} rows: {profile['device_ms']:.0f} ms on "
        f"{profile['device']}",
        fontsize=10,
        loc="left",
    )
    figure.savefig(arguments.image, facecolor="white", metadata={"Date": None})


if __name__ == "__main__":
    main()

"""Draws what `benchmarks.reinforcement` has measured: exact matches by minutes of training.

python -m benchmarks.reinforcement_curves docs/images/reinforcement.png
"""

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks import record
from benchmarks.reinforcement import CONTINUED, REINFORCED, TRAINED

NAMES = {
    TRAINED: "training (SFT)",
    CONTINUED: "training continued",
    REINFORCED: "reinforcement (GRPO)",
}
COLORS = {TRAINED: "#777777", CONTINUED: "#3b6fd4", REINFORCED: "#c2571a"}


def curve(
    measured: dict[str, Any], name: str, seed: dict[str, Any]
) -> tuple[list[float], list[float]]:
    """The minutes of training at each validation of a run, and its exact matches in percent.

    Continuations start where the first training ends, whose steps take as long as those of
    training on.
    """
    seconds: dict[str, float] = measured["seconds_per_step"]
    first = [
        (each["step"] * seconds[CONTINUED], each["exact_match"]) for each in _of(seed, TRAINED)
    ]
    start, match = first[-1]
    points = first
    if name != TRAINED:
        own = _of(seed, name)
        points = [(start + each["step"] * seconds[name], each["exact_match"]) for each in own]
        points.insert(0, (start, match))
    return [at / 60 for at, _ in points], [100 * match for _, match in points]


def _of(seed: dict[str, Any], name: str) -> list[dict[str, Any]]:
    curve: list[dict[str, Any]] = seed[name]["curve"]
    return curve


def draw(measured: dict[str, Any], image: Path) -> None:
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    axes = figure.subplots()
    for name, color in COLORS.items():
        runs = [curve(measured, name, seed) for seed in measured["seeds"].values()]
        for minutes, matches in runs:
            axes.plot(minutes, matches, color=color, linewidth=0.8, alpha=0.4)
        means = [fmean(each) for each in zip(*(matches for _, matches in runs), strict=True)]
        axes.plot(runs[0][0], means, color=color, linewidth=2, label=NAMES[name])
    rows, seeds = measured["validation_rows"], len(measured["seeds"])
    axes.set_title(f"Mean of {seeds} seeds; thin lines are single ones", fontsize=10)
    axes.set_xlabel("minutes of training, on two cores")
    axes.set_ylabel(f"% of {rows} validation rows right")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(image, facecolor="white", metadata={"Date": None}, dpi=144)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("image", type=Path, help="the SVG or PNG to write")
    default = record.RESULTS / "reinforcement.json"
    parser.add_argument("--measured", type=Path, default=default, help="the benchmark's result")
    arguments = parser.parse_args()
    mpl.rcParams |= {"svg.hashsalt": "reinforcement", "font.size": 9}
    draw(json.loads(arguments.measured.read_text()), arguments.image)


if __name__ == "__main__":
    main()

"""Draws the training loss of finished runs, a panel for each, for README and documents.

python -m benchmarks.learning_curve docs/images/learning.png outputs/latex [OUTPUT …]
"""

import argparse
import json
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

LINE, FAINT = "#3b6fd4", "#9db7e8"


def panel(axes: mpl.axes.Axes, output: Path) -> None:
    """The loss of every logged step, and its running mean."""
    lines = (output / "train" / "history.jsonl").read_text().splitlines()
    entries = [entry for entry in map(json.loads, lines) if "loss" in entry]
    steps, losses = [e["step"] for e in entries], [e["loss"] for e in entries]
    reach = len(losses) // 100  # logged values are means over their steps already
    around = [losses[max(0, i - reach) : i + reach + 1] for i in range(len(losses))]
    axes.plot(steps, losses, color=FAINT, linewidth=0.8)
    axes.plot(steps, [sum(near) / len(near) for near in around], color=LINE, linewidth=1.8)
    run = json.loads((output / "run.json").read_text())
    minutes = run["stages"]["train"]["seconds"] / 60
    axes.set_title(f"{run['name']}: {minutes:.1f} minutes, {steps[-1]:,} steps", fontsize=10)
    axes.set_xlabel("step")
    axes.set_ylabel("loss on the answers")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws the training loss of finished runs.")
    parser.add_argument("picture", type=Path, help="the SVG or PNG to write")
    parser.add_argument("outputs", type=Path, nargs="+", help="what a run left, a folder")
    given = parser.parse_args()
    mpl.rcParams |= {"svg.hashsalt": "learning", "font.size": 9}
    figure = Figure(figsize=(5.2 * len(given.outputs), 2.8), layout="constrained")
    for axes, output in zip(
        figure.subplots(1, len(given.outputs), squeeze=False)[0], given.outputs, strict=True
    ):
        panel(axes, output)
    figure.savefig(given.picture, facecolor="white", metadata={"Date": None})


if __name__ == "__main__":
    main()

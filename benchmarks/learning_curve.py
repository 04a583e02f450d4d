"""Plots the training loss of finished runs, one panel each, for the README and the docs.

A run is the output folder of a job, or a record with its history under benchmarks/results/.

    python -m benchmarks.learning_curve docs/images/learning.png \\
        benchmarks/results/tiny-base-h200.json outputs/latex
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

LINE, FAINT = "#3b6fd4", "#9db7e8"


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The training of one run: its name, its length and its logged steps."""

    name: str
    seconds: float
    history: list[dict[str, Any]]

    @classmethod
    def read(cls, run: Path) -> "Curve":
        if run.is_file():
            record = json.loads(run.read_text())
            return cls(
                name=f"{record['run']} on one {record['device']}",
                seconds=record["seconds"],
                history=record["history"],
            )
        record = json.loads((run / "run.json").read_text())
        lines = (run / "train" / "history.jsonl").read_text().splitlines()
        return cls(
            name=record["name"],
            seconds=record["stages"]["train"]["seconds"],
            history=[entry for entry in map(json.loads, lines) if "loss" in entry],
        )


def panel(axes: mpl.axes.Axes, curve: Curve) -> None:
    """The loss of every logged step, and the running mean."""
    entries = curve.history
    steps, losses = [e["step"] for e in entries], [e["loss"] for e in entries]
    radius = len(losses) // 100  # each logged value is already a mean over several steps
    windows = [losses[max(0, i - radius) : i + radius + 1] for i in range(len(losses))]
    axes.plot(steps, losses, color=FAINT, linewidth=0.8)
    axes.plot(steps, [sum(window) / len(window) for window in windows], color=LINE, linewidth=1.8)
    minutes = curve.seconds / 60
    axes.set_title(f"{curve.name}: {minutes:.1f} minutes, {steps[-1]:,} steps", fontsize=10)
    axes.set_xlabel("step")
    axes.set_ylabel("loss on the answers")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws the training loss of finished runs.")
    parser.add_argument("image", type=Path, help="the SVG or PNG to write")
    parser.add_argument("outputs", type=Path, nargs="+", help="a run's folder, or a record of it")
    arguments = parser.parse_args()
    mpl.rcParams |= {"svg.hashsalt": "learning", "font.size": 9}
    figure = Figure(figsize=(5.2 * len(arguments.outputs), 2.8), layout="constrained")
    for axes, output in zip(
        figure.subplots(1, len(arguments.outputs), squeeze=False)[0], arguments.outputs, strict=True
    ):
        panel(axes, Curve.read(output))
    figure.savefig(arguments.image, facecolor="white", metadata={"Date": None})


if __name__ == "__main__":
    main()

"""Plots training and validation losses of finished runs, one panel each, for README and docs.

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

LINE, FAINT, HELD_OUT = "#3b6fd4", "#9db7e8", "#c2571a"


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The training of one run: its name, its length and its logged steps."""

    name: str
    seconds: float
    history: list[dict[str, Any]]
    """The logged steps."""
    validations: list[dict[str, Any]]

    @classmethod
    def read(cls, run: Path) -> "Curve":
        if run.is_file():
            record = json.loads(run.read_text())
            return cls(
                name=f"{record['run']} on one {record['device']}",
                seconds=record["seconds"],
                history=record["history"],
                validations=[],
            )
        record = json.loads((run / "run.json").read_text())
        lines = (run / "train" / "history.jsonl").read_text().splitlines()
        entries = [json.loads(line) for line in lines]
        return cls(
            name=record["name"],
            seconds=record["stages"]["train"]["seconds"],
            history=[entry for entry in entries if "loss" in entry],
            validations=[entry for entry in entries if "eval_loss" in entry],
        )


def panel(axes: mpl.axes.Axes, curve: Curve) -> None:
    """The loss of every logged step, the running mean, and the loss of each validation."""
    entries = curve.history
    steps, losses = [e["step"] for e in entries], [e["loss"] for e in entries]
    radius = len(losses) // 100  # each logged value is already a mean over several steps
    windows = [losses[max(0, i - radius) : i + radius + 1] for i in range(len(losses))]
    axes.plot(steps, losses, color=FAINT, linewidth=0.8)
    means = [sum(window) / len(window) for window in windows]
    axes.plot(steps, means, color=LINE, linewidth=1.8, label="training")
    if curve.validations:
        _draw_validations(axes, curve.validations)
        axes.legend(frameon=False)
    minutes = curve.seconds / 60
    axes.set_title(f"{curve.name}: {minutes:.1f} minutes, {steps[-1]:,} steps", fontsize=10)
    axes.set_xlabel("step")
    axes.set_ylabel("loss on the answers")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_validations(axes: mpl.axes.Axes, validations: list[dict[str, Any]]) -> None:
    """The validation loss, with a ring around the lowest."""
    steps, losses = ([each[key] for each in validations] for key in ("step", "eval_loss"))
    axes.plot(
        steps, losses, color=HELD_OUT, linewidth=1.2, marker=".", linestyle=":", label="validation"
    )
    best = losses.index(min(losses))
    axes.plot(
        steps[best : best + 1],
        losses[best : best + 1],
        linestyle="",
        marker="o",
        markersize=9,
        fillstyle="none",
        color=HELD_OUT,
        label=f"best, step {steps[best]:,}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws the losses of finished runs.")
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

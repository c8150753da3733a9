"""Draw docs/displacement.svg: a displacement taken back through one step of a recurrent network of two units.

Run: python docs/scripts/draw_displacement.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

W = np.array([[1.1, -0.5], [0.4, 0.35]])  # its singular values are 1.23 and 0.48
BEFORE = np.array([0.5, -0.2])
DISPLACEMENT = np.array([-0.05, 0.25])
# Colours of Okabe and Ito.
WAYS = {"plain inverse, reg = 0": "#0072B2", "regularised inverse, reg = 0.3": "#D55E00", "transpose": "#009E73"}


def step(state: np.ndarray) -> np.ndarray:
    moved: np.ndarray = np.tanh(W @ state)
    return moved


def taken_back(displacement: np.ndarray) -> list[np.ndarray]:
    """By each of the ways, what the displacement is of the state before."""
    slope = 1 - step(BEFORE) ** 2
    inverses = [np.linalg.solve(W.T @ W + reg * np.eye(2), W.T @ (displacement / slope)) for reg in (0.0, 0.3)]
    return [*inverses, W.T @ (displacement * slope)]


def arrow(axes: Axes, start: np.ndarray, move: np.ndarray, colour: str) -> None:
    style = {"arrowstyle": "-|>", "color": colour, "lw": 2, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 14}
    axes.annotate("", start + move, start, arrowprops=style)


def main() -> None:
    mpl.rcParams.update({"svg.hashsalt": "tpext", "svg.fonttype": "none", "font.family": "sans-serif"})
    after = step(BEFORE)
    figure = Figure(figsize=(9, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    arrow(right, after, DISPLACEMENT, "#333333")
    right.plot(*(after + DISPLACEMENT), "x", color="#333333", ms=9, mew=2)
    right.annotate("target $h_t + d_t$", after + DISPLACEMENT, (-8, 8), textcoords="offset points", ha="right")
    for (name, colour), move in zip(WAYS.items(), taken_back(DISPLACEMENT), strict=True):
        arrow(left, BEFORE, move, colour)
        left.plot([], [], color=colour, lw=2, label=name)
        right.plot(*step(BEFORE + move), "o", color=colour, ms=7)
    for axes, state, name in ((left, BEFORE, "h_{t-1}"), (right, after, "h_t")):
        axes.plot(*state, "o", color="#333333", ms=7)
        axes.annotate(f"${name}$", state, (8, -12), textcoords="offset points")
        axes.set_xlabel("unit 1")
        axes.set_ylabel("unit 2")
        axes.set_aspect("equal", adjustable="datalim")
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(0.2)
    left.set_title("step t-1: three ways to move the state", fontsize=10)
    right.set_title("step t: where the layer takes each of them", fontsize=10)
    left.update_datalim([BEFORE + move for move in taken_back(DISPLACEMENT)])
    left.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(Path(__file__).resolve().parents[1] / "displacement.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
